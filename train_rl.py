"""
Policy-gradient fine-tuning of an image generator whose reward is a fall of FID.

One iteration: seeds -> noise -> steps -> images -> features -> moments -> FD -> advantage -> update. The reward is a
property of the whole set: by how much does the Frechet distance (FD) of a set of generated images fall when a subset of
it is replaced by new ones ("Optimizing Visual Generative Models via Distribution-wise Rewards", arXiv 2607.02291)? With
--subset=1, the default, each image is its own subset: how much larger were FD without it (LOO-FID, arXiv 2603.23086)?

Left out on purpose: a value network (the mean of equal labels is the baseline), a KL term in the loss (the path KL of
an update is measured and bounded).

python train_rl.py                                              # a tiny SiT that draws too much blue, two minutes
python train_rl.py --objective=forward --samplers flow euler    # re-noised images instead: any sampler, ODEs too
python train_rl.py --ckpt base.pt --real FOLDER                 # your images, after lab/pretrain.py --real FOLDER
torchrun --nproc_per_node=8 -- train_rl.py --preset=paper --ckpt SiT-XL-2-256.pt --vae vae.safetensors --real stats.npz
"""
import copy
import json
import math
import os
import sys
import time
from contextlib import contextmanager, nullcontext
from typing import NamedTuple, Optional

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fid import finish, of_file, reward_networks, table_of, versioned
from models import (Recomputed, Stop, configure, fail, gather, move_aside, moved, normalize_filters, print0, reading,
                    save, setup, take_preset, whole, writable)
from reward import KernelSet, ReferenceSet, Stream, long_enough
from sample import (Schedule, compiled, decode, gaussian_step, generate, image_seeds, load_guided, log_prob, renoise,
                    save_grid, schedule, trajectory)

# -----------------------------------------------------------------------------
# files
ckpt = "sit-tiny-skewed" # model to fine-tune: .pt, .pkl or .safetensors, or the name of an asset
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
out = "out/train_rl" # folder for ckpt.pt, result.json, log.jsonl, before.png, after.png, curve.png
preset = "" # options for full-size models, printed as flags: paper (SiT-XL/2), large (not yet run on real weights)
seed = 0 # of rollouts; evaluation has noise of its own
resume = False # continue the run in OUT; torchrun's restarts do so by themselves
save_every = 10 # iterations between two states to resume from
keep = 0 # also keep a checkpoint every so many iterations, OUT/ckpt-00050.pt; 0: only the last
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
# rollouts
iters = 100 # rollouts, each with `epochs` updates
batch = 480 # images per rollout, over all ranks
samplers = [] # of the rollouts, in turn, see sample.py; empty: flow for SiT, ancestral for EDM2
steps = 10 # of the samplers
noise = -1.0 # noise level of the SDE; -1: 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # guidance scale; 1: none
guide = "" # autoguidance: a weaker network in place of the null class
batch_size = 250 # images in one pass, per rank
bf16 = False # the network in 16 bits, SiT's bfloat16 and EDM2's float16, all else in float32
compile = False # compile the block that a SiT repeats: seconds to begin with, faster passes on a GPU
# reward
reward = "fd" # fd; kid; sample: the contrast, log-density of features under the real Gaussian; or a file, my_reward.py
features = [] # feature networks of the reward, my_net.py one of your own; empty: tiny in the tiny world, else inception
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
subset = 1 # images that share a reward; 1: each its own; the paper's: 50
reference = 2000 # generated images the reward starts from: the reference set (subset > 1), or earlier images (1)
refresh = 0 # subset > 1: redraw the reference set every so many rollouts; 0: rollouts take the places of the oldest
advantage = "reward" # reward; controls: shuffled, constant (-1)
top = 1.0 # train on this share of the images (or subsets) only, those of the largest advantages
# objective and update
objective = "ppo" # ppo: policy gradient; forward: re-noised images; pathwise: through features and sampler (FD-loss)
times = 2 # ppo: random noisy steps trained per image, 0: all; forward: random times each image is re-noised to
noisiest = 0.5 # train on this share of the steps (ppo) or times (forward), those nearest to pure noise; 1: all
epochs = 1 # updates per rollout
clip = 0.2 # ppo: of the log-ratio, in nats; acts only if epochs > 1
horizon = 3 # pathwise: last steps of the sampler that the gradient passes
lr = 0.0 # Adam; 0: 1e-4 for SiT, 1e-3 for EDM2
beta1 = 0.5 # Adam's momentum
beta2 = 0.99 # Adam's mean of squares
cosine = True # lr falls to 0 over the run; --cosine=false: it stays
kl_limit = 0.2 # trust region, nats per iteration and image: a longer update is shortened; 0: none
anchor = 0.01 # after each update the weights move this fraction of the way back to the base (scaled by lr / its start)
ema = 0.9 # weight average per iteration; the average is what is evaluated and saved
micro_batch = 500 # (image, step) pairs in one backward pass, per rank
# evaluation
judges = [] # feature nets of the table, and c2st, a classifier; empty: tiny2, tiny, factors (tiny world), inception
num = 10000 # images before and after, on the same noise and labels; 0: no evaluation
stream = "report" # which noise and real images evaluate: report, or select to choose options by
# -----------------------------------------------------------------------------

# Defaults that depend on the model's family. EDM2 needs ten times the rate: its stored weights are ten times larger.
FAMILIES = {"sit": dict(sampler="flow", ode="euler", lr=1e-4), "edm2": dict(sampler="ancestral", ode="heun", lr=1e-3)}

# The paper's settings for SiT-XL/2 (16 subsets in a rollout are our choice), and what we would run there instead, which
# has not been run on real weights yet.
FULL_SIZE = dict(batch=800, noise=1.0, steps=50, lr=1e-5, beta1=0.9, beta2=0.999, iters=450, keep=50, micro_batch=16,
                 batch_size=50)
PRESETS = {
    "paper": dict(FULL_SIZE, subset=50, reference=5000, refresh=10, top=0.25, samplers=["sigma"], times=0,
                  noisiest=1.0, cosine=False, kl_limit=0.0, anchor=0.0, ema=0.0),
    "large": dict(FULL_SIZE, objective="forward", reference=10240, samplers=["sigma", "euler"]),
}

# Options that do nothing unless ..: a note says so if they are given all the same.
NEEDS = {"clip": ("--objective=ppo and --epochs above 1", lambda c: c.objective == "ppo" and c.epochs > 1),
         "horizon": ("--objective=pathwise", lambda c: c.objective == "pathwise"),
         "refresh": ("--subset above 1", lambda c: c.subset > 1),
         **dict.fromkeys(("times", "noisiest", "top", "advantage"), (
             "--objective=ppo or forward", lambda c: c.objective != "pathwise"))}


class Learner(NamedTuple):
    """What each sampler of the rollouts owns; the network, which is the policy, is shared by all."""
    plan: Schedule
    nets: object                            # features of the reward: FeatureNet, Nets ..
    reference: object                       # Stream (subset=1), ReferenceSet or KernelSet, of such features
    labels: torch.Tensor                    # (N,) of its members (subset > 1)
    optimizer: torch.optim.Adam
    ruler: Optional[Schedule] = None        # measures an update: the plan or, for an ODE, the SDE at the same times


class Rollout(NamedTuple):
    """This rank's images of one iteration."""
    states: torch.Tensor                    # (K + 1, n, C, H, W), from noise to clean
    outputs: torch.Tensor                   # (K, n, C, H, W): what the network said at the start of each step
    labels: torch.Tensor                    # (n,)
    advantages: torch.Tensor                # (n,)


stop = Stop(smaller="--batch_size and --micro_batch")


@stop
def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    rank, world, device = setup()
    began = time.time()
    take_preset(c, PRESETS)
    check(c, world)
    c["ckpt"], c["guide"] = (moved(path, c.out) if c.resume else path for path in (c.ckpt, c.guide))
    model = load_guided(c, device)
    plans = settle(c, model)
    nets, real = reward_networks(c, model, device)
    if c.reward == "kid" and real.features is None:
        fail(f"{c.real} has statistics only, --reward=kid needs real images: tiny, a folder, a zip or an .npz")
    describe(c, model, nets, world)

    # Evaluate the base first: if the real data do not fit, better to know before training.
    judge = both_samplers(c, model, device) if c.num else lambda model: []
    before = judge(model)
    state = read_state(c) if c.resume else None
    if not state:                           # options and data are known to work
        move_aside(c.out, LEFT)
        c["ckpt"], c["guide"] = moved(c.ckpt, c.out), moved(c.guide, c.out)
    if before and rank == 0:
        save_grid(os.path.join(c.out, "before.png"), before[0]["images"][:200])
        print0(f"base evaluated after {time.time() - began:.0f} s")

    # The base, to which an anchor holds; the average, which is what counts in the end; a learner for each sampler.
    params = [p for p in model.parameters() if p.requires_grad]
    base, average = [p.detach().clone() for p in params], compiled(copy.deepcopy(model), c.compile)
    average_params = [p for p in average.parameters() if p.requires_grad]
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    learners, drawn = begin_learners(c, model, nets, real, plans, params, state)
    it, rows = 0, []                        # the next iteration, the log
    if state:
        it, drawn, rows = restore(c, state, model, average, learners)
    train_began = time.time()

    # The first signal waits for the end of the iteration.
    stop.patient, stop.then = True, "; continue with --resume"
    with tqdm(total=c.iters, initial=it, desc="training", unit="iteration", disable=rank > 0 or None) as bar:
        while it < c.iters:
            learner, clock = learners[c.samplers[it % len(c.samplers)]], time.time()
            rng = torch.Generator().manual_seed(image_seeds(c.seed, "update", [it])[0])
            turn = it // len(c.samplers)    # of this sampler
            if c.subset > 1 and c.refresh and turn and turn % c.refresh == 0:
                learner.labels.copy_(torch.arange(len(learner.labels)) % model.num_classes)
                learner.reference.push(draw_features(c, model, nets, learner.plan, drawn, learner.labels))
                drawn += len(learner.labels)

            # Draw. Every rank its share: image i depends on (seed, i) and its label alone.
            labels, groups = rollout_labels(model.num_classes, c.batch, c.subset, rng)
            indices, own_labels = torch.arange(drawn, drawn + c.batch)[rank::world], labels[rank::world].to(device)
            states, outputs = roll_out(model, indices, own_labels, learner.plan, c.seed, c.batch_size)
            drawn += c.batch

            # Reward. Every rank sees the features of all images.
            features = gather(nets(decode(model, states[-1])), c.batch)
            reward = rewards_of(learner, features, labels, groups, c, rng)
            advantages = advantages_of(reward, groups, c.advantage, c.top, rng).repeat_interleave(c.subset)

            # Learn; a little back towards the base; average.
            rollout = Rollout(states, outputs, own_labels, advantages[rank::world].to(device))
            update = learn(c, ddp, learner, rollout, base, it, rng)
            with torch.no_grad():
                torch._foreach_lerp_(params, base, c.anchor * update["lr"] / c.lr)
                torch._foreach_lerp_(average_params, params, 1 - min(c.ema, (1 + it) / (10 + it)))

            # Log, save.
            row = dict(it=it, sampler=c.samplers[it % len(c.samplers)], images=drawn, fd=learner.reference.fd,
                       reward=reward.mean().item(), reward_std=reward.std().item(), **update)
            log(c, rows, row, time.time() - clock, bar)
            it += 1
            stopped = torch.tensor(stop.number)
            dist.all_reduce(stopped, dist.ReduceOp.MAX)
            if stopped or it == c.iters or it % c.save_every == 0:
                save_state(c, it, drawn, rows, model, average, learners)
            if c.keep and it % c.keep == 0 and rank == 0:
                save(os.path.join(c.out, f"ckpt-{it:05d}.pt"), average.model)
            if stopped:
                print0(f"stopped by signal {stopped} after {it} iterations; continue with --resume")
                raise SystemExit(128 + stopped.item())

    stop.patient, train_seconds = False, time.time() - train_began
    if rank == 0:
        save(os.path.join(c.out, "ckpt.pt"), average.model, config=of_the_run(c))
    print0(f"{drawn} images, {train_seconds:.0f} s of training")
    after = judge(average.eval())
    seconds = time.time() - began
    if rank == 0:
        curves = {name: [(row["images"], row["fd"]) for row in rows if row["sampler"] == name] for name in c.samplers}
        finish(c, before, after, curves, f"{c.reward} of the rollouts in {c.features[0]}",
               dict(seconds=seconds, train_seconds=train_seconds, images=drawn))
    print0(f"{seconds:.0f} s in all; {c.out}/ckpt.pt, result.json, log.jsonl, curve.png"
           + (", before.png, after.png" if after else ""))


# ---- Before the loop ------------------------------------------------------------------------------------------------

def check(c, world):
    """What people get wrong on the command line, before anything is loaded."""
    for name, choices in (("reward", ("fd", "kid", "sample")), ("objective", tuple(OBJECTIVES)),
                          ("advantage", ("reward", "shuffled", "constant")), ("stream", ("report", "select"))):
        if c[name] not in choices and not (name == "reward" and c.reward.endswith(".py") and of_file(c.reward, name)):
            fail(f"unknown {name} {c[name]!r}; choose {', '.join(choices)}")
    for name, least in dict(iters=1, batch=2 * world, subset=1, reference=2 * world, times=0, epochs=1, batch_size=1,
                            micro_batch=1, save_every=1, keep=0, refresh=0, kl_limit=0, lr=0, noisiest=0.01).items():
        if c[name] < least:
            fail(f"{name} {c[name]}: needed is at least {least}")
    for name in ("anchor", "ema", "beta1", "beta2"):
        if not 0 <= c[name] < 1:
            fail(f"{name} {c[name]}: needed is at least 0 and below 1")
    if c.batch % world:
        fail(f"batch {c.batch} does not divide over {world} ranks; try {max(1, c.batch // world) * world}")
    if c.batch % c.subset or c.batch < 4 * c.subset:
        fail(f"batch {c.batch} does not divide into at least four subsets of {c.subset}, whose rewards are compared")
    if (c.subset > 1) + (c.reward == "sample") + (c.objective == "pathwise") > 1:
        fail("a subset above 1, --reward=sample and --objective=pathwise exclude each other; name one of them")
    if c.reward.endswith(".py") and c.objective == "pathwise":
        fail(f"--objective=pathwise follows the gradient of the distance, not --reward={c.reward}; leave one out")
    for name, (needed, met) in NEEDS.items():
        if name in c.given and not met(c):
            print0(f"note: --{name} does nothing without {needed}")
    writable(os.path.join(c.out, "ckpt.pt"))


def settle(c, model):
    """Fill in what depends on the model; returns {sampler: Schedule} of the rollouts."""
    own, latents = FAMILIES[model.family], model.shape[0] != 3
    size = sum(p.numel() for p in model.model.parameters())
    if (latents or size > 50e6) and not c.preset and not {"lr", "micro_batch"} <= set(c.given):
        fail(f"{size / 1e6:.0f} M parameters{', latents' * latents}: the defaults are those of a tiny model; choose "
             f"{'--preset=paper or large, or ' * (model.family == 'sit')}both --lr and --micro_batch")
    c["lr"], c["samplers"] = c.lr or own["lr"], c.samplers or [own["sampler"]]
    plans = {name: schedule(name, c.steps, c.noise, model.sigmas) for name in c.samplers}
    silent = [name for name, plan in plans.items() if not len(plan.noisy)]
    if c.objective == "ppo" and silent:
        fail(f"{silent[0]} has no noise, so ppo has no policy; leave it out, or add --objective=forward")
    if c.objective == "pathwise" and not 1 <= c.horizon <= min(len(plan.t) for plan in plans.values()):
        fail(f"horizon {c.horizon}: needed is 1 to the sampler's number of steps")
    classes = model.num_classes
    if c.subset > 1 and not c.refresh and rollout_labels(classes, c.batch, c.subset)[0].unique().numel() < classes:
        fail(f"subsets of {c.subset} do not hold all {classes} classes, so rollouts would fill the reference set with "
             "a few; add --refresh=10")
    for block in model.modules():
        if isinstance(block, Recomputed):
            block.checkpointing = c.objective == "pathwise" and size > 50e6     # or its graph fills the card
    return plans


def both_samplers(c, model, device):
    """A function of a model: rows of the table, by the first sampler of the rollouts and by the family's ODE."""
    judge = table_of(c, model, device, c.stream, blue=True)
    names = dict.fromkeys([c.samplers[0], FAMILIES[model.family]["ode"]])
    pairs = [(name, c.steps // 2 if name == "heun" else c.steps) for name in names]     # heun evaluates twice a step
    return lambda model: [row for name, steps in pairs for row in judge(model, f"{name}-{steps}", name, steps)]


def describe(c, model, nets, world):
    """The first lines of a run: its derived sizes."""
    if c.ckpt == "sit-tiny-skewed":
        print0("sit-tiny-skewed was made wrong on purpose: every digit it draws is good, but four of five are blue, "
               "where the real ones have every colour. FD sees that; no single image shows it.")
    unit = "each image its own credit" if c.subset == 1 else f"{c.batch // c.subset} subsets of {c.subset}"
    print0(f"{sum(p.numel() for p in model.model.parameters()) / 1e6:.2f} M parameters, images {model.shape}, "
           f"{model.num_classes} classes; {c.iters} iterations of {c.batch} images, {c.batch // world} per rank, by "
           f"{' '.join(c.samplers)}, {c.steps} steps; {c.objective}, {unit}, reward {c.reward} in {nets.name} "
           f"({nets.dim}-d)" + (f"; evaluated in {' '.join(c.judges)}" if c.num else ""))
    if world == 1 and not torch.cuda.is_available() and model.shape[-1] <= 32:
        n = max(n for n in range(1, torch.get_num_threads() + 1) if c.batch % n == 0)
        if n > 1:
            print0(f"one process; faster: torchrun --nproc_per_node={n} -- {os.path.basename(sys.argv[0])} ..")


def begin_learners(c, model, nets, real, plans, params, state):
    """
    {sampler: Learner} and the number of images drawn. What a reward compares with is drawn by the base, or comes with
    the state of a resumed run.
    """
    learners, drawn, device = {}, 0, params[0].device
    memory, wanted = 0.0, c.reference
    if c.subset == 1 and c.reward == "kid":         # a set, of which all images of a rollout are members
        wanted = max(c.reference, c.batch)
    elif c.subset == 1:
        memory = long_enough(0.0, c.batch, nets.dim)
        wanted = c.reference if "reference" in c.given else max(c.reference, 5 * nets.dim)
        wanted = wanted if memory else 0            # enough images in one rollout: no earlier ones
    if memory:
        print0(f"note: {c.batch} images a rollout are few for {nets.dim} dimensions; the moments begin with {wanted} "
               f"and keep earlier ones at {memory:.3f} of their weight per iteration")
    for name, plan in plans.items():
        labels = state["learners"][name]["labels"] if state else torch.arange(wanted) % model.num_classes
        features = torch.zeros(len(labels), nets.dim, device=device)        # places for those of the state
        if not state:
            features = draw_features(c, model, nets, plan, drawn, labels)
            drawn += wanted
        if c.reward == "kid":
            reference = KernelSet(features, real.features)
        elif c.subset > 1:
            reference = ReferenceSet(features, real.mu, real.cov)
        else:
            reference = Stream(features, real.mu, real.cov, memory)
        optimizer = torch.optim.Adam(params, c.lr, betas=(c.beta1, c.beta2), fused=device.type == "cuda")
        sde = schedule(FAMILIES[model.family]["sampler"], len(plan.t), None, model.sigmas)
        learners[name] = Learner(plan, nets, reference, labels, optimizer, plan if len(plan.noisy) else sde)
    return learners, drawn


# ---- 1. Draw --------------------------------------------------------------------------------------------------------

def rollout_labels(num_classes, batch, subset, rng=None):
    """
    Labels (batch,) of a rollout, and for each of its subsets (batch // subset,) the group in which gains are compared:
    those of equal labels. Of single images the groups are the classes, or one group if classes have fewer than 8. Else
    as many groups as balance the classes, or one if they would hold fewer than 4 subsets. Random ones, if not all fit.
    """
    count = batch // subset
    if subset == 1:
        order = torch.randperm(num_classes, generator=rng) if batch % num_classes else torch.arange(num_classes)
        labels = order[torch.arange(batch) % num_classes]
        return labels, labels if batch >= 8 * num_classes else torch.zeros_like(labels)
    groups = math.lcm(num_classes, subset) // subset
    if count % groups or count < 4 * groups:
        groups = 1
    order = torch.randperm(num_classes, generator=rng) if groups == 1 else torch.arange(num_classes)
    group_labels = order[torch.arange(groups * subset) % num_classes].view(groups, subset)
    group = torch.arange(count) % groups
    return group_labels[group].flatten(), group


@torch.no_grad()
def roll_out(model, indices, labels, plan, seed, batch_size):
    """
    Images `indices` (n,) of the training stream: states (K+1, n, C, H, W) from noise to clean, the network's outputs
    (velocities, or denoised images of EDM2) (K, n, C, H, W) at their starts.
    """
    seeds = image_seeds(seed, "train", indices)
    states, outputs = [], []
    for i in range(0, len(seeds), batch_size):
        xs, vs = zip(*trajectory(model, seeds[i:i + batch_size], labels[i:i + batch_size], plan))
        states.append(torch.stack(xs))
        outputs.append(torch.stack(vs[:-1]))
    return torch.cat(states, dim=1), torch.cat(outputs, dim=1)


def draw_features(c, model, nets, plan, first, labels):
    """Features (N, d), on every rank, of images first, first + 1, .. of the training stream with these labels (N,)."""
    mine = torch.arange(len(labels))[dist.get_rank()::dist.get_world_size()]
    seeds = image_seeds(c.seed, "train", first + mine)
    images = generate(model, seeds, labels[mine], plan.sampler, len(plan.t), 1.0, c.batch_size, c.noise)
    features = [torch.empty(0, nets.dim, device=next(model.parameters()).device), *map(nets, images)]
    return gather(torch.cat(features), len(labels))


# ---- 2. Reward and advantage ----------------------------------------------------------------------------------------

BOUND = 5.0     # of advantages, in standard deviations


def rewards_of(learner, features, labels, groups, c, rng):
    """
    Reward of each subset of the rollout, (batch // subset,) float64, from all its features (batch, d). Its images enter
    the reference: before, if each has its own reward; after, if subsets share one (not with --refresh).
    """
    reference = learner.reference
    try:
        if c.subset == 1:
            reference.push(features)
            return image_rewards(features, labels, reference, c)
        parts = features.view(-1, c.subset, features.shape[1])
        gains = own_reward(c, parts, labels.view(-1, c.subset)) if c.reward.endswith(".py") else subset_rewards(
            learner, parts, labels, groups, rng)
        if not c.refresh:
            places = reference.push(features).cpu()
            learner.labels[places] = labels[-len(places):]
        return gains
    except ValueError as e:
        fail(f"{e}; raise --batch or --reference, or resume with a lower --lr", code=1)


def own_reward(c, features, labels):
    """
    A user's reward: the function reward(features, labels) of a file, of single images (n, d), (n,), or of subsets
    (K, n, d), (K, n) => a number for each. Exit code 1 for anything else.
    """
    with reading(c.reward, "gives no reward"):
        found = of_file(c.reward, "reward")(features.clone(), labels.to(features.device)).detach().double()
        if found.shape != (len(features),) or not found.isfinite().all():
            raise ValueError(f"needed are {len(features)} finite numbers, one each; it gave {tuple(found.shape)}")
    return found


def image_rewards(features, labels, reference, c):
    """How much larger the distance were without the image, among those of this rollout and what is left of earlier."""
    if c.objective == "pathwise":           # it follows the gradient of this
        return -reference.influence(features)
    if c.reward.endswith(".py"):
        return own_reward(c, features, labels)
    if c.reward == "sample":                # the contrast: log-density under the real Gaussian, up to a constant
        centred = (features.double() - reference.real_mu).T
        return -0.5 * torch.linalg.lstsq(reference.real_root, centred).solution.square().sum(0)
    return reference.leave_one_out(features)


def subset_rewards(learner, parts, labels, groups, rng):
    """
    The exact fall of the distance when a subset, of parts (K, n, d), takes the places of members of the reference set
    that have its labels; all subsets of a group take the same places.
    """
    gains, part_labels = torch.zeros(len(parts), dtype=torch.float64, device=parts.device), labels.view(len(parts), -1)
    for group in groups.unique():
        own = groups == group
        places = members_like(learner.labels, part_labels[own][0], rng)
        gains[own] = learner.reference.swap_gain(places, parts[own])
    return gains


def members_like(labels, wanted, rng):
    """Random members of a reference set with labels (N,), one for each label wanted (n,), none twice => (n,)."""
    slots = torch.empty(len(wanted), dtype=torch.int64)
    for k in wanted.unique():
        members, places = (labels == k).nonzero().flatten(), (wanted == k).nonzero().flatten()
        if len(places) > len(members):
            fail(f"the reference set has {len(members)} images of class {k}, a subset {len(places)}; raise --reference")
        slots[places] = members[torch.randperm(len(members), generator=rng)[:len(places)]]
    return slots


def advantages_of(reward, groups, advantage, top, rng):
    """
    Advantages like the rewards (n,): less the mean of the group, over the standard deviation of all, bounded, centred;
    then only the share `top` of the largest, 0 for the rest. Controls: the same shuffled, or -1 for all.
    """
    mean = torch.stack([reward[groups == k].mean() for k in range(groups.max() + 1)])
    centred = reward - mean[groups.to(mean.device)]
    scaled = (centred / centred.std().clamp(min=1e-12)).clamp(-BOUND, BOUND)
    scaled = scaled - scaled.mean()
    if advantage == "shuffled":
        scaled = scaled[torch.randperm(len(scaled), generator=rng).to(scaled.device)]
    elif advantage == "constant":
        scaled = torch.full_like(scaled, -1.0)
    if top < 1:
        rest = scaled.argsort(descending=True, stable=True)[max(1, round(top * len(scaled))):]
        scaled[rest] = 0.0
    return scaled


# ---- 3. Learn: for each objective, what is trained on, and the loss -------------------------------------------------

def ppo_pairs(rollout, learner, model, c, rng):
    """
    (image, step) pairs of this rank: `times` random noisy steps of each image (0: all). A dict of tensors whose first
    axis is the pair. The gradient of log p in v is (c / std) times the noise that was drawn: the last steps, of little
    noise, would drown the early ones, where more is decided, and leave a haze (see also E-GRPO, arXiv 2601.00423).
    """
    rank, world, noisy = dist.get_rank(), dist.get_world_size(), learner.plan.noisy
    noisy = noisy[:math.ceil(c.noisiest * len(noisy))]
    n, device = len(rollout.labels), rollout.labels.device
    scores = torch.rand(n * world, len(noisy), generator=rng)[rank::world]      # the same for any number of ranks
    k = noisy[scores.argsort(1)[:, :c.times or len(noisy)]].to(device)          # (n, times), no step twice
    i = torch.arange(n, device=device)[:, None].expand_as(k)
    k, i = k.T.flatten(), i.T.flatten()
    return dict(k=k, x=rollout.states[k, i], x_next=rollout.states[k + 1, i], y=rollout.labels[i],
                advantage=rollout.advantages[i].float())


def ppo_loss(model, part, old, learner, c):
    """-min(ratio A, clip(ratio) A), clip in nats. Returns loss (b,), log-probabilities (b,), share clipped."""
    plan, k = learner.plan, part["k"]
    v = model(part["x"], plan.t.to(part["x"].device)[k], part["y"]).float()
    log_p = log_prob(part["x_next"], *gaussian_step(plan, k, part["x"], v))
    log_ratio = log_p - (log_p.detach() if old is None else old)
    ratio, bounded = log_ratio.exp(), log_ratio.clamp(-c.clip, c.clip).exp()
    loss = -torch.minimum(ratio * part["advantage"], bounded * part["advantage"])
    return loss, log_p.detach(), (log_ratio.abs() > c.clip).float().mean()


OFFSET = 0.2        # added to the advantages of single images: some plain training on what the network draws


def forward_pairs(rollout, learner, model, c, rng):
    """
    Clean images of this rank, each re-noised at `times` random times. A dict as ppo_pairs'. The expected update is
    Cov(A, u | x_t) + E[A | x_t] (E[u | x_t] - v_old). The first term is the policy's improvement. The second is the
    network's own error on its images: with E[A] > 0 it is corrected, with E[A] < 0 amplified, and more so near the
    data, where x_t tells A. Hence the offset, and the noisiest times.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), rollout.labels.device
    times, n, shape = max(1, c.times), len(rollout.labels), rollout.states.shape[2:]
    noise = torch.cat([torch.randn(n * world, *shape, generator=rng)[rank::world] for _ in range(times)])
    uniform = c.noisiest * torch.cat([torch.rand(n * world, generator=rng)[rank::world] for _ in range(times)])
    uniform = uniform if model.family == "sit" else 1 - uniform                 # of EDM2 a large one is a large sigma
    x1, A = rollout.states[-1].repeat(times, 1, 1, 1), rollout.advantages.float()
    A = torch.where(A == 0, A, A + OFFSET * (c.subset == 1 and c.advantage != "constant"))
    x, t, u, weight = renoise(model, x1, noise.to(device), uniform.to(device))
    return dict(x=x, t=t, u=u, y=rollout.labels.repeat(times), advantage=A.repeat(times), weight=weight)


def forward_loss(model, part, old, learner, c):
    """
    -A (u - v_old) . v + |v - v_old|^2 / 2. Returns loss (b,), v_old, 0. A sum over dimensions: of a mean float16 would
    lose the gradients (EDM2-XS: a tenth of them), so learn() divides.
    EDM2: u = x1 and v = D, times 1 / c_out^2: as D = c_skip x + c_out F this is the same loss of its unit-variance F.
    """
    v = model(part["x"], part["t"], part["y"]).float()
    old = v.detach() if old is None else old
    gain = ((part["u"] - old) * v).flatten(1).sum(1)
    drift = (v - old).square().flatten(1).sum(1)
    return part["weight"] * (-part["advantage"] * gain + drift / 2), old, 0.0


def pathwise_pairs(rollout, learner, model, c, rng):
    """A dict as ppo_pairs': where the last `horizon` steps begin, and the noise (of heun: the correction) in each."""
    plan, states, K = learner.plan, rollout.states, len(learner.plan.t)
    noise = [states[k + 1] - gaussian_step(plan, k, states[k], rollout.outputs[k])[0] for k in range(K - c.horizon, K)]
    return dict(x=states[K - c.horizon], noise=torch.stack(noise, dim=1), y=rollout.labels)


def pathwise_loss(model, part, old, learner, c):
    """
    The gradient of the distance itself, as FD-loss (arXiv 2604.28190) takes it, through the features, the decoder
    (quantised: straight through) and, as DRaFT (arXiv 2309.17400) truncates, the last steps of the sampler on the same
    noise: first variation of each image. Returns loss (b,), None, 0.
    """
    plan, x, horizon = learner.plan, part["x"], part["noise"].shape[1]
    for j in range(horizon):
        k = len(plan.t) - horizon + j
        v = model(x, x.new_full((len(x),), plan.t[k].item()), part["y"]).float()
        x = gaussian_step(plan, k, x, v)[0] + part["noise"][:, j]
    images = decode(model.module, x, quantize=False)
    features = learner.nets(images + (images.to(torch.uint8) - images).detach())
    if not features.requires_grad:
        fail(f"{learner.nets.name} gives features without a gradient, which --objective=pathwise follows", code=1)
    return learner.reference.influence(features), None, 0.0


OBJECTIVES = {"ppo": (ppo_pairs, ppo_loss), "forward": (forward_pairs, forward_loss),
              "pathwise": (pathwise_pairs, pathwise_loss)}


def learn(c, ddp, learner, rollout, base, it, rng):
    """
    One update on this rank's rollout, within the trust region; returns what is logged. Random numbers are drawn for the
    whole batch, so that they do not depend on the ranks. Exit code 1 if the update is not finite.
    """
    model, ruler, params = ddp.module, learner.ruler, [p for p in ddp.parameters() if p.requires_grad]
    lr = c.lr * (0.5 + 0.5 * math.cos(math.pi * it / c.iters)) if c.cosine else c.lr
    learner.optimizer.param_groups[0]["lr"] = lr
    pairs_of, loss_of = OBJECTIVES[c.objective]
    pairs = pairs_of(rollout, learner, model, c, rng)
    if "advantage" in pairs:                # what was not selected is not trained on
        used = pairs["advantage"] != 0
        used[0] |= ~used.any()              # but a rank without any still takes part in the collective
        used = used.nonzero().flatten()
        pairs = {k: x[used] for k, x in pairs.items()}
    v_ratio = kl = kl_se = None
    if c.kl_limit:
        start = [p.detach().clone() for p in params]
        steps, chance = probed_steps(ruler, min(PROBED, c.batch), rng)
        before = probe(model, rollout, ruler, steps)
        torch._foreach_copy_([p.detach() for p in params], base)
        v_ratio = norm_ratio(before, probe(model, rollout, ruler, steps))
        torch._foreach_copy_([p.detach() for p in params], start)
    divisor = len(rollout.labels) * (math.prod(model.shape) if c.objective == "forward" else 1)
    with card_memory(c, len(pairs["y"]), quiet=it > 0):
        norm, clipped = optimize(ddp, learner, pairs, loss_of, c, 1 / divisor)
    halvings = 0
    if c.kl_limit:
        kl, kl_se = path_kl(ruler, steps, chance, before, probe(model, rollout, ruler, steps))
    if not (math.isfinite(norm) and math.isfinite(kl or 0)):
        fail(f"iteration {it}: gradient {norm}, path KL {kl}; --resume with a lower --lr", code=1)
    if kl:
        kl, halvings = trust_region(kl, c.kl_limit, params, start)
        kl_se = kl_se / 4**halvings
    return dict(kl=kl, kl_se=kl_se, v_ratio=v_ratio, halvings=halvings, clipped=clipped, grad_norm=norm, lr=lr)


def optimize(ddp, learner, pairs, loss_of, c, weight):
    """`epochs` Adam steps on the pairs; gradients are summed over micro-batches and averaged over ranks."""
    n = len(pairs["y"])
    parts = [{k: x[i:i + c.micro_batch] for k, x in pairs.items()} for i in range(0, n, c.micro_batch)]
    old = [None] * len(parts)
    for _ in range(c.epochs):
        learner.optimizer.zero_grad()
        clipped = 0.0
        for j, part in enumerate(parts):
            with nullcontext() if j == len(parts) - 1 else ddp.no_sync():
                loss, new_old, share = loss_of(ddp, part, old[j], learner, c)
                loss.sum().backward()       # the weight comes later: float16 has no room for gradients so small
            old[j] = new_old if old[j] is None else old[j]
            clipped += share / len(parts)
        torch._foreach_mul_([p.grad for p in ddp.parameters() if p.grad is not None], weight)
        # The gradient of FD itself has its own scale, which Adam takes out.
        norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), math.inf if c.objective == "pathwise" else 1.0).item()
        learner.optimizer.step()
    normalize_filters(ddp)
    return norm, float(clipped)


@contextmanager
def card_memory(c, pairs, quiet):
    """Around the first update on a GPU: what was taken at the peak, and how large a --micro_batch would fit."""
    if quiet or not torch.cuda.is_available():
        yield
        return
    start, draw, at_once = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated(), min(pairs, c.micro_batch)
    torch.cuda.reset_peak_memory_stats()
    yield
    update, kept = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    room = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    fits = at_once * (0.9 * room - kept) / max(1, update - start)           # activations grow with the micro-batch
    print0(f"memory: {draw / 2**30:.1f} GB to evaluate, draw and reward, {update / 2**30:.1f} to learn from {at_once} "
           f"pairs at once, of {room / 2**30:.1f}: some --micro_batch={max(1, int(fits))} would fit")


PROBED = 32     # (image, step) pairs that the path KL is measured on, to 4 to 11 %, in 2 % of the time


def probed_steps(plan, count, rng):
    """A noisy step for each of the first `count` images, and its chance (count,): in proportion to kappa^(1/2)."""
    chance = plan.kappa[plan.noisy].double().sqrt()
    chance = chance / chance.sum()
    place = (torch.arange(count) + torch.rand(1, generator=rng)) / count                # each step as often as expected
    k = torch.searchsorted(chance.cumsum(0), place.double()).clamp(max=len(chance) - 1)
    k = k[torch.randperm(count, generator=rng)]
    return plan.noisy[k], chance[k]


@torch.no_grad()
def probe(model, rollout, plan, steps):
    """What the network says at `steps` (count,) of the images of the smallest index, of which this rank has some."""
    model, own = copy.copy(model), steps[dist.get_rank()::dist.get_world_size()]
    model.bf16 = False                      # whose rounding alone is 0.1 nats of path KL and more
    i = torch.arange(len(own))
    x = rollout.states[own, i]
    return model(x, plan.t[own].to(x.device), rollout.labels[i])


def norm_ratio(v, of_base):
    """Norm of the outputs v over that of the base's at the same states: one that grows is a sign of a hacked reward."""
    squares = torch.stack([x.double().square().sum() for x in (v, of_base)])
    dist.all_reduce(squares)
    return (squares[0] / squares[1]).sqrt().item()


def path_kl(plan, steps, chance, before, after):
    """KL of an image's path, new policy against old, sum_t kappa_t |v - v_old|^2, and its standard error, in nats."""
    weight = (plan.kappa[steps] / chance)[dist.get_rank()::dist.get_world_size()]
    own = weight.to(after.device) * (after - before).double().square().flatten(1).sum(1)
    each = gather(own, len(steps))[steps.argsort()]                     # neighbours: steps alike
    return each.mean().item(), (each.diff().square().mean() / (2 * len(each))).sqrt().item()


@torch.no_grad()
def trust_region(kl, limit, params, start):
    """
    Shorten the step from `start` to the params by 2^-h, with the smallest h that brings its path KL below the limit: KL
    grows with the step's square (extrapolated, not measured again). Returns the KL left, in nats per image, and h.
    """
    halvings = max(0, math.ceil(math.log(kl / limit, 4)))
    if halvings:
        torch._foreach_lerp_(params, start, 1 - 0.5**halvings)
    return kl / 4**halvings, halvings


# ---- What a run leaves behind --------------------------------------------------------------------------------------

LEFT = ("ckpt.pt", f"ckpt-{5 * '[0-9]'}.pt", "result.json", "log.jsonl", "before.png", "after.png", "curve.png",
        "state.pt", "state.previous.pt")
FREE = ("out", "resume", "save_every", "keep", "judges", "num", "stream")       # options that are not of the training


def of_the_run(c):
    """What a checkpoint says of how it was made: the same whether the run was resumed or not."""
    return {k: versioned(v) for k, v in c.items() if k not in FREE}


def save_state(c, it, drawn, rows, model, average, learners):
    """The log, and all that a resumed run needs, atomically; the state before it is kept as state.previous.pt."""
    parts = {name: dict(optimizer=p.optimizer.state_dict(), reference=p.reference.state_dict(), labels=p.labels)
             for name, p in learners.items()}
    if dist.get_rank() == 0:
        with whole(os.path.join(c.out, "log.jsonl")) as f:
            f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        with whole(os.path.join(c.out, "state.pt"), previous=os.path.join(c.out, "state.previous.pt")) as f:
            torch.save(dict(
                config=of_the_run(c), it=it, drawn=drawn, rows=rows, learners=parts,
                model=model.model.state_dict(), average=average.model.state_dict()), f)


def read_state(c):
    """The newest whole state in OUT, or None. Options that differ from those it was made with are printed."""
    paths, now = [os.path.join(c.out, name) for name in ("state.pt", "state.previous.pt")], of_the_run(c)
    for path in filter(os.path.isfile, paths):
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            was = {k: state["config"].get(k) for k in now}
        except Exception as e:              # a file that was cut short can raise anything
            print0(f"note: {path} is cut short or damaged ({type(e).__name__}); trying the state before it")
            continue
        for name in ("samplers", "features", "reward", "subset"):
            if was[name] != now[name]:
                fail(f"{c.out} has {name} {was[name]}, now {now[name]}, and each has its own reference: resume with "
                     "the same, or start in another folder")
        changed = [f"{k}={v}, now {now[k]}" for k, v in was.items() if v != now[k]]
        if changed:
            print0(f"note: the run in {c.out} had {'; '.join(changed)}")
        return state
    print0(f"note: {c.out} holds no state to resume; starting from the beginning")
    return None


def restore(c, state, model, average, learners):
    """Put a state back; returns the iteration, the number of images drawn and the rows of the log."""
    found = gather(torch.tensor([state["it"]]), dist.get_world_size()).tolist()
    if len(set(found)) > 1:
        fail(f"the ranks found states of iterations {found} in {c.out}: needed is a folder that all nodes share")
    model.model.load_state_dict(state["model"])
    average.model.load_state_dict(state["average"])
    for name, kept in state["learners"].items():
        learners[name].optimizer.load_state_dict(kept["optimizer"])
        learners[name].optimizer.param_groups[0]["betas"] = (c.beta1, c.beta2)
        learners[name].reference.load_state_dict(kept["reference"])
    print0(f"resumed at iteration {state['it']}")
    return state["it"], state["drawn"], state["rows"]


def log(c, rows, row, seconds, bar):
    """The iteration's row; every so often it is printed."""
    bar.update()
    rows.append(row)
    if dist.get_rank() == 0 and (row["it"] % max(1, c.iters // 10) == 0 or row["it"] == c.iters - 1):
        kl = "      -" if row["kl"] is None else f"{row['kl']:.1e}"
        tqdm.write(f"{row['it']:5d}  {row['sampler']:10s}  fd {row['fd']:8.5g}  reward {row['reward']:+.1e} +- "
                   f"{row['reward_std']:.1e}  kl {kl}  clipped {row['clipped']:4.0%}  grad {row['grad_norm']:.1e}  "
                   f"{c.batch / seconds:6.0f} images/s")


if __name__ == "__main__":
    main()
