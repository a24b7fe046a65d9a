"""
Fine-tuning of an image generator by reinforcement learning whose reward is an improvement of FID.

One iteration: seeds -> noise -> steps -> images -> features -> moments -> FD -> advantage -> update. The reward is a
property of the whole set: how much FD falls if a subset of a generated reference set is replaced (--credit=subset, the
paper, arXiv 2607.02291), or its first variation for every single image (--credit=image, the default). --reward=kid or
mmd put another distance in place of FD; --reward=sample is the contrast, a classifier that sees one image at a time.
Three objectives learn from it. ppo is the paper's policy gradient through the noisy steps of the SDE. forward re-noises
rewarded images, so that any sampler can draw them. pathwise, the default, follows the gradient of the first variation
through the feature network and the sampler's last steps: it learns fastest, and needs networks that have a gradient. It
starts with rejection sampling, a few iterations that learn to draw the best quarter of the images again, for a little
more precision. With --neon=1 a run first steps away from self-training (Neon, arXiv 2510.03597), which needs no reward.

Left out on purpose: a value network (the mean of an image's class is the baseline) and a KL term in the loss (steps are
small, their KL is exact, printed and bounded).

python train_rl.py                                              # tiny model, minutes on two CPU cores
python train_rl.py --ckpt=edm2-tiny                             # the same for EDM2
python train_rl.py --ckpt base.pt --real FOLDER                 # your images, after python models.py --real FOLDER
python train_rl.py --ckpt SiT-XL-2-256.pt --vae vae.safetensors --features inception --real stats.npz --judges inception
torchrun --nproc_per_node=8 train_rl.py                         # any number of ranks draws the same images
"""
import copy
import math
import os
import signal
import sys
import time
from collections import defaultdict
from contextlib import nullcontext
from json import dumps
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from fid import (WEIGHTS, Nets, choose_networks, distance, evaluate, feature_net, histogram_distance, notes_on,
                 real_summaries, stored_moments)
from models import (CLASSES, Config, Recomputed, Stop, check_classes, configure, fail, gather, holds_run,
                    image_size, is_statistics, move_aside, of_the_run_before, peak_memory, print0, read_checkpoint,
                    renoise, save, setup, share_cores, whole, writable, write)
from reward import KernelSet, ReferenceSet, Stream, SumSet, gaussian_kernel, long_enough, standard_error
from sample import (NOISE, Guided, Schedule, decode, gaussian_step, image_seeds, load_guided, log_prob, save_grid,
                    schedule, self_trained, trajectory)

# -----------------------------------------------------------------------------
ckpt = "" # .pt, .pkl or .safetensors file, its URL or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
out = "out/train_rl" # folder for ckpt.pt, before.png, after.png, log.jsonl
json = "" # also write the table before / after to this file
seed = 0 # of rollouts; evaluation has its own stream
resume = False # go on with the run in OUT; torchrun's restarts do so by themselves
changed = False # resume although options differ from those of the run in OUT
save_every = 10 # iterations between two states to resume from
# what is drawn
iters = 75 # rollouts, each with `epochs` updates
batch = 480 # images per rollout, over all ranks
sampler = "" # of evaluation and of ppo's rollouts, see sample.py; empty: flow for SiT, ancestral for EDM2
steps = 10 # network evaluations: heun, which needs two for a step, has half as many steps
noise = 0.0 # its noise level; 0: 0.5 for SiT, 0.7 for EDM2
last = 0.0 # its noise-free last step, see sample.py
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels; 0: all
guide = "" # autoguidance: a weaker network in place of the null class
guidance = 1.4 # its scale
rollout = [] # samplers of the rollouts, in turn (not ppo); flow-30: of 30 steps; empty: SDE, ODE, both at 3x STEPS too
batch_size = 250 # images in one pass, per rank
bf16 = False # the network of rollouts and updates in bfloat16, all else in float32; rounding blurs clip if epochs > 1
# what is rewarded
reward = "fd" # fd; kid, mmd: kernel distances; sample: the classifier's log-probability of the image's label
features = [] # feature networks of the reward; several: changes are summed, each over its distance; empty: see judges
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
credit = "image" # image: first variation of the distance; subset: the exact gain of its subset for each of its images
subset = 20 # images per subset, with the labels of the members they replace (credit=subset)
reference = 2000 # images of the generated reference set: its size, or its start (credit=image, if memory > 0)
moments = "" # start from statistics (fid.py --images .. --stats) instead (credit=image, if memory > 0)
memory = 0.0 # weight of the past in the streaming moments, per iteration (reward=fd, credit=image); raised if need be
refresh = 0 # redraw a reference set after so many of its iterations; 0: a queue fed by rollouts (credit=subset)
advantage = "reward" # reward; controls: zero, random (shuffled), constant (-1), rejection (1 for the best `top`)
offset = 0.2 # forward, credit=image: added to advantages: the model keeps to what it draws; below 0 it drifts away
top = 1.0 # train on this share of the images (or subsets), those with the largest absolute advantages
bound = 5.0 # advantages are bounded to so many standard deviations
# how it is learned
neon = 0.0 # first a step away from self-training, so many times what that changes (OUT/start.pt); 0: none
neon_images = 4000 # its own images that self-training uses, by each sampler of the rollouts
objective = "pathwise" # pathwise: the reward's own gradient; forward: re-noised clean images; ppo: policy gradient
times = 2 # random noisy steps (ppo; 0: all) or re-noised times (forward, rejection) of each image that are trained on
epochs = 1 # updates per rollout
clip = 0.2 # ppo: of the log-ratio, in nats; acts only if epochs > 1
horizon = 3 # pathwise: steps of the sampler, the last ones, that the gradient passes
rejection = 0.13 # pathwise: this share of the iterations, the first, learns to draw the best quarter; EDM2's own is 0
noisiest = 0.5 # forward, rejection: re-noise only to this share of the times, the noisiest, see forward_pairs
proximal = 1.0 # forward, rejection: weight of |v - v_old|^2; acts only if epochs > 1
lr = 0.0 # Adam; 0: 1e-4 for SiT, 1e-3 for EDM2
beta1 = 0.5 # Adam's momentum
cosine = True # lr falls to 0 over the run; --cosine=false: it stays
grad_clip = 1.0 # bound on the gradient's norm (not on pathwise's own)
kl_limit = 0.2 # nats per iteration and image, on noisy rollouts; a longer update is halved until it fits
pull = 0.1 # after an update weights go this share (falls with lr) back to base or rejection; less: lower FD, precision
ema = 0.9 # weight average per iteration; the average is what is evaluated and saved
micro_batch = 500 # (image, step) pairs in one backward pass, per rank
checkpointing = False # recompute activations in the backward pass: a fraction of their memory, 30 to 50 % slower
# how it is judged
judges = [] # feature nets of the table, the first held out; empty: tiny ones at 16 px, else inception (features too)
num = 10000 # images before and after, on the same noise and labels; 0: no evaluation
stream = "report" # which noise and real images judge: report, or select to choose options by
num_real = 20000 # real images of the tiny world, each for reward and judging; of a folder each gets half
num_prdc = 3000 # KID and the neighbour metrics use so many of the images, a fixed random subset
eval_full = False # also evaluate a fifth of the images with 5 times the steps
# -----------------------------------------------------------------------------


# What is left open above, by family; EDM2's weights are of magnitude 1, ten times SiT's. Only SiT's were tuned.
FAMILIES = {"sit": dict(sampler="flow", noise=NOISE["sit"], rollout=["flow", "euler"], ode="euler", lr=1e-4,
                    rejection=rejection),
            "edm2": dict(sampler="ancestral", noise=NOISE["edm2"], rollout=["ancestral", "heun"], ode="heun",
                     lr=1e-3, rejection=0.0)}


# ---- Rollout --------------------------------------------------------------------------------------------------------

@torch.no_grad()
def roll_out(model, indices, labels, plan, seed, batch_size):
    """
    Images `indices` (n,) of the training stream: states (K+1, n, C, H, W) from noise to clean, velocities (or denoised
    images, for EDM2) (K, n, C, H, W) at their starts.
    """
    seeds = image_seeds(seed, "train", indices)
    states, velocities = [], []
    for i in range(0, len(seeds), batch_size):
        xs, vs = zip(*trajectory(model, seeds[i:i + batch_size], labels[i:i + batch_size], plan))
        states.append(torch.stack(xs))
        velocities.append(torch.stack(vs[:-1]))
    return torch.cat(states, dim=1), torch.cat(velocities, dim=1)


def draw_features(model, net, first, count, plan, seed, batch_size, device):
    """Features (count, d), on every rank, and labels of images first .. first + count - 1 of the training stream."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = torch.arange(first, first + count)[rank::world]
    kept = []
    for part in mine.split(batch_size):
        states, _ = roll_out(model, part, part.to(device) % model.num_classes, plan, seed, batch_size)
        kept.append(net(decode(model, states[-1])))
    features = torch.cat(kept) if kept else torch.empty(0, net.dim, device=device)
    return gather(features, count), torch.arange(first, first + count, device=device) % model.num_classes


# ---- Reward ---------------------------------------------------------------------------------------------------------

def normalize(reward, labels, bound):
    """
    Advantages (n,): reward minus the mean of its class (of all, if classes have fewer than 8 images or labels is None),
    over the standard deviation, bounded, and centred again: a constant left over would be a reward-free drift.
    """
    centred = reward - reward.mean()
    if labels is not None:
        count = torch.bincount(labels)
        if count[count > 0].min() >= 8:
            mean = torch.zeros_like(count, dtype=reward.dtype).index_add_(0, labels, reward) / count.clamp(min=1)
            centred = reward - mean[labels]
    scaled = (centred / centred.std().clamp(min=1e-12)).clamp(-bound, bound)
    return scaled - scaled.mean()


def strongest(advantages, top):
    """Advantages (n,) of the share `top` with the largest absolute values, centred again; 0 for the rest."""
    kept = advantages.abs().argsort(descending=True, stable=True)[:max(2, round(top * len(advantages)))]
    selected = torch.zeros_like(advantages)
    selected[kept] = advantages[kept] - advantages[kept].mean()
    return selected


class ImageCredit:
    """
    Each image's own reward: minus the first variation of the distance of a stream or queue, the new images included.
    gap: the share of the variance of the exact credit, leave-one-out, that the first variation misses.
    """
    def __init__(self, reference):
        self.reference = reference

    def __call__(self, features, labels, bound):
        self.reference.push(features)
        reward, exact = -self.reference.influence(features), self.reference.leave_one_out(features)
        self.checks = dict(gap=1 - torch.corrcoef(torch.stack([reward, exact]))[0, 1].square().item())
        return normalize(reward, labels, bound), reward

    @property
    def fd(self):
        return self.reference.value

    def state_dict(self):
        return dict(reference=self.reference.state_dict())

    def load_state_dict(self, state):
        self.reference.load_state_dict(state["reference"])


class SampleCredit(ImageCredit):
    """The contrast: the classifier's log-probability of each image's label. The distance of the set is only watched."""
    def __init__(self, reference, heads):
        self.reference, self.heads, self.checks = reference, heads, {}

    def __call__(self, features, labels, bound):
        self.reference.push(features)
        log_p = self.heads(features)[:, :CLASSES].double().log_softmax(1)
        reward = log_p.gather(1, labels[:, None])[:, 0]
        return normalize(reward, labels, bound), reward


class SubsetCredit:
    """
    The paper's reward: the exact fall of the distance when a subset replaces reference images of the same labels.
    deviation: of one gain from the whole evaluation.
    """
    def __init__(self, reference, labels, subset, seed):
        self.reference, self.labels, self.subset = reference, labels.cpu(), subset
        self.rng = torch.Generator().manual_seed(seed)

    def slots_like(self, labels):           # (n,) labels => (n,) members of the same labels, drawn without replacement
        slots = torch.empty(len(labels), dtype=torch.int64)
        for k in labels.unique():
            members = (self.labels == k).nonzero().flatten()
            wanted = (labels == k).sum().item()
            if wanted > len(members):
                fail(f"the reference set has {len(members)} images of class {k}, a subset {wanted}; raise --reference")
            slots[labels == k] = members[torch.randperm(len(members), generator=self.rng)[:wanted]]
        return slots

    def __call__(self, features, labels, bound):
        groups, group_labels = features.view(-1, self.subset, features.shape[1]), labels.cpu().view(-1, self.subset)
        # Subsets of the same labels compete for the same members: what is removed then tells nothing about them.
        if (group_labels == group_labels[0]).all():
            slots = self.slots_like(group_labels[0])
        else:
            slots = torch.stack([self.slots_like(y) for y in group_labels])
        gains = self.reference.swap_gain(slots, groups)
        self.checks = dict(deviation=self.reference.deviation)
        return normalize(gains, None, bound), gains

    def push(self, features, labels):
        places = self.reference.push(features)
        self.labels[places] = labels.cpu()[-len(places):]

    @property
    def fd(self):
        return self.reference.value

    def state_dict(self):
        return dict(reference=self.reference.state_dict(), labels=self.labels, rng=self.rng.get_state())

    def load_state_dict(self, state):
        self.reference.load_state_dict(state["reference"])
        self.labels = state["labels"]
        self.rng.set_state(state["rng"])


def advantages_of(reward_of, features, labels, c, rng):
    """Advantages (n,) of the rollout's images, and the rewards behind them: per image, or per subset."""
    try:
        advantages, reward = reward_of(features, labels, c.bound)
    except ValueError as e:
        fail(f"{e}; raise --batch or --reference, or try another --credit or --features", code=1)
    if c.advantage == "rejection":
        advantages = (reward >= reward.quantile(1 - c.top)).to(reward)
    elif c.advantage == "random":
        advantages = advantages[torch.randperm(len(advantages), generator=rng).to(advantages.device)]
    elif c.advantage != "reward":
        advantages = torch.full_like(advantages, -1.0 if c.advantage == "constant" else 0.0)
    elif c.top < 1:
        advantages = strongest(advantages, c.top)
    return advantages.repeat_interleave(len(features) // len(advantages)), reward   # a subset's images share its gain


# ---- Update ---------------------------------------------------------------------------------------------------------

def ppo_pairs(states, labels, advantages, plan, times, rng, rank, world):
    """
    (image, step) pairs of this rank to train on: `times` random noisy steps of each image (0: all). A dict of tensors
    whose first axis is the pair.
    """
    n = states.shape[1]
    noisy = plan.noisy
    scores = torch.rand(n * world, len(noisy), generator=rng)[rank::world]      # the same for any number of ranks
    k = noisy[scores.argsort(1)[:, :times or len(noisy)]].to(states.device)     # (n, times), no step twice
    i = torch.arange(n, device=states.device)[:, None].expand_as(k)
    k, i = k.T.flatten(), i.T.flatten()
    return dict(k=k, x=states[k, i], x_next=states[k + 1, i], y=labels[i], advantage=advantages[i].float())


def forward_pairs(model, states, labels, advantages, times, noisiest, rng, rank, world):
    """
    Clean images of this rank, each re-noised at `times` random times of the share `noisiest`. A dict as ppo_pairs'.
    E[A (u - v_old) | x_t] = Cov(A, u | x_t) + E[A | x_t] (E[u | x_t] - v_old): the first is the policy's improvement,
    the second what the network gets wrong about its own images, and more near the data, where x_t tells A. Where A > 0
    it closes that gap, where A < 0 it opens it, and an open gap grows by itself: an offset > 0 keeps it closed.
    """
    x1 = states[-1].repeat(times, 1, 1, 1)
    n = states.shape[1]
    noise = torch.cat([torch.randn(n * world, *x1.shape[1:], generator=rng)[rank::world] for _ in range(times)])
    uniform = torch.cat([torch.rand(n * world, generator=rng)[rank::world] for _ in range(times)])
    uniform = noisiest * uniform if model.family == "sit" else 1 - noisiest * uniform
    x, t, u, weight = renoise(model, x1, noise.to(x1.device), uniform.to(x1.device))
    return dict(x=x, t=t, u=u, y=labels.repeat(times), advantage=advantages.float().repeat(times), weight=weight)


def ppo_loss(model, part, old, plan, clip):
    """-min(ratio A, clip(ratio) A) per pair; clip in nats. Returns loss (b,), log-probabilities (b,), share clipped."""
    v = model(part["x"], plan.t.to(part["x"].device)[part["k"]], part["y"]).float()
    log_p = log_prob(part["x_next"], *gaussian_step(plan, part["k"], part["x"], v))
    log_ratio = log_p - (log_p.detach() if old is None else old)
    ratio, bounded = log_ratio.exp(), log_ratio.clamp(-clip, clip).exp()
    loss = -torch.minimum(ratio * part["advantage"], bounded * part["advantage"])
    return loss, log_p.detach(), (log_ratio.abs() > clip).float().mean().item()


def forward_loss(model, part, old, proximal):
    """
    -A (u - v_old) . v + (b/2) |v - v_old|^2, mean over dimensions. Returns loss (b,), v_old, 0.
    EDM2: u = x1 and v = D, times 1 / c_out^2: as D = c_skip x + c_out F this is the same loss of its unit-variance F.
    """
    v = model(part["x"], part["t"], part["y"]).float()
    old = v.detach() if old is None else old
    pull = ((part["u"] - old) * v).flatten(1).mean(1)
    push = (v - old).square().flatten(1).mean(1)
    return part["weight"] * (-part["advantage"] * pull + proximal / 2 * push), old, 0.0


def pathwise_pairs(states, velocities, labels, plan, horizon):
    """
    Where each image's last `horizon` steps begin, and the noise of these steps, to which a corrector (heun) counts. A
    dict as ppo_pairs'.
    """
    K = len(plan.t)
    noise = [states[k + 1] - gaussian_step(plan, k, states[k], velocities[k])[0] for k in range(K - horizon, K)]
    return dict(x=states[K - horizon], noise=torch.stack(noise, dim=1), y=labels)


def pathwise_loss(model, generator, part, plan, net, reference):
    """
    First variation of each image with its gradient through the features, the decoder (quantised: straight through) and
    the last steps of the sampler on the same noise: the gradient of the distance itself. Returns loss (b,), None, 0.
    """
    x, horizon = part["x"], part["noise"].shape[1]
    for j in range(horizon):
        k = len(plan.t) - horizon + j
        v = model(x, x.new_full((len(x),), plan.t[k].item()), part["y"]).float()
        x = gaussian_step(plan, k, x, v)[0] + part["noise"][:, j]
    images = decode(generator, x, quantize=False)
    return reference.influence(net(images + (images.to(torch.uint8) - images).detach())), None, 0.0


def update(ddp, optimizer, pairs, loss_of, epochs, micro_batch, weight, grad_clip):
    """`epochs` Adam steps on the pairs; gradients are summed over micro-batches and averaged over ranks."""
    n = len(pairs["y"])
    parts = [{k: x[i:i + micro_batch] for k, x in pairs.items()} for i in range(0, n, micro_batch)]
    old = [None] * len(parts)
    for _ in range(epochs):
        optimizer.zero_grad()
        clipped = 0.0
        for j, part in enumerate(parts):
            with nullcontext() if j == len(parts) - 1 else ddp.no_sync():
                loss, new_old, share = loss_of(ddp, part, old[j])
                (loss.sum() * weight).backward()
            old[j] = new_old if old[j] is None else old[j]
            clipped += share / len(parts)
        norm = torch.nn.utils.clip_grad_norm_(ddp.parameters(), grad_clip).item()
        if not math.isfinite(norm):
            break
        optimizer.step()
    return norm, clipped


def exact(model):
    """The same network without bfloat16, whose rounding alone is 0.1 nats of path KL and more."""
    model = copy.copy(model)
    model.bf16 = False
    return model


@torch.no_grad()
def outputs(model, states, labels, plan):
    """What the network says at the start of each step: (K + 1, n, C, H, W) => (K, n, C, H, W)."""
    return torch.stack([model(x, x.new_full((len(x),), t), labels) for x, t in zip(states, plan.t.tolist())])


@torch.no_grad()
def path_kl(model, states, velocities, labels, plan):
    """Exact KL of the sampled paths, new policy against old: sum_t kappa_t |v - v_old|^2, mean over images, in nats."""
    kl = torch.zeros((), device=states.device)
    for k in plan.noisy.tolist():
        t = torch.full((states.shape[1],), plan.t[k].item(), device=states.device)
        change = model(states[k], t, labels).float() - velocities[k]
        kl += plan.kappa[k].item() * change.square().sum() / states.shape[1]
    dist.all_reduce(kl)
    return kl.item() / dist.get_world_size()


@torch.no_grad()
def guard(model, params, start, probe, plan, kl_limit):
    """
    Take the step from `start` to the present params back, by halves, until its path KL is within the limit; it grows
    with the square of the step. Returns the KL of what is left, in nats (None without noise), and the halvings. A KL
    that is not finite is returned as it is.
    """
    if not len(plan.noisy):
        return None, 0
    kl = path_kl(model, *probe, plan)
    if not math.isfinite(kl):
        return kl, 0
    halvings = max(0, math.ceil(math.log(max(kl, 1e-12) / kl_limit, 4)))
    if halvings:
        torch._foreach_lerp_(params, start, 1 - 0.5**halvings)
    return kl / 4**halvings, halvings


# ---- Judging --------------------------------------------------------------------------------------------------------

KEYS = ("features", "sampler", "steps", "num", "fid", "fid_se", "floor", "kid", "precision", "recall", "density",
        "coverage", "histogram", "histogram_floor")


def judge_model(model, nets, real, floors, samplers, c):
    """Rows of the table, every (sampler, steps, num) judged in every net, and the first images of the first sampler."""
    rows, images = [], None
    for name, steps, num in samplers:
        last = c.last * samplers[0][1] / steps if name == c.sampler else 0.0    # its grid was chosen for the first row
        found = evaluate(exact(model), nets, real, num, name, steps, c.noise, last, c.seed, c.stream, c.num_prdc,
                         c.batch_size, keep=min(num, 200))
        images = found["images"] if images is None else images
        for net in nets:
            kept = found[net.name]["kept"]
            labels = torch.arange(len(kept), device=images.device) % model.num_classes
            known = real[net.name].features if net.name == "factors" else None
            histogram = None if known is None else histogram_distance(known, kept)
            rows.append(dict(found[net.name], labels=labels, histogram=histogram, **floors[num][net.name]))
    return rows, images


def floors_of(c, judges, real, num, device, size):
    """{net.name: floor and histogram_floor}: what real images, `num` of them, differ by from the real images `real`."""
    none = {net.name: dict(floor=None, histogram_floor=None) for net in judges}
    if is_statistics(c.real):
        return none
    own = real_summaries(c.real, judges, "floor", c.num_prdc, num, device, size)
    found = own[judges[0].name].num
    if found < num:
        print0(f"note: no floor, as {c.real} has {found} real images for it, not {num}")
        return none
    return {name: dict(floor=distance(x, real[name]), histogram_floor=histogram_distance(
        real[name].features, x.features) if name == "factors" else None) for name, x in own.items()}


def table(before, after):
    """Lines for people: every row before and after, on the same noise and labels; +- is one standard error."""
    lines = [f"{'sampler':>9s} {'images':>6s} {'features':8s} {'FD before':>17s} {'after':>17s} {'change':>17s} "
             f"{'floor':>7s} {'down':>5s} {'precision':>13s} {'recall':>13s} {'coverage':>13s}"]

    def with_error(value, error):
        return f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")

    for b, a in zip(before, after):
        paired = None
        if b["psi"] is not None and a["psi"] is not None:
            paired = standard_error(a["psi"] - b["psi"], b["labels"]) * math.sqrt(len(b["psi"]) / b["num"])
        floor, down = "-", "-"
        if b["floor"] is not None and b["fid"] > b["floor"]:
            floor, down = f"{b['floor']:.3f}", f"{1 - (a['fid'] - b['floor']) / (b['fid'] - b['floor']):.0%}"
        both = ["-" if b[k] is None else f"{b[k]:.3f} {a[k]:.3f}" for k in ("precision", "recall", "coverage")]
        lines.append(f"{b['sampler'] + '-' + str(b['steps']):>9s} {b['num']:6d} {b['features']:8s} "
                     f"{with_error(b['fid'], b['fid_se']):>17s} {with_error(a['fid'], a['fid_se']):>17s} "
                     f"{with_error(a['fid'] - b['fid'], paired):>17s} {floor:>7s} {down:>5s} "
                     + " ".join(f"{x:>13s}" for x in both))
    return "\n".join(lines)


def histograms(before, after):
    """Lines for the views that no network learned: KID on raw pixels, histograms of the measured factors."""
    lines = []
    for b, a in zip(before, after):
        name = f"{b['sampler']}-{b['steps']}"
        if b["features"] == "pixels" and b["kid"] is not None:
            lines.append(f"{name}: KID on raw pixels {b['kid']:.4f} -> {a['kid']:.4f}")
        if b["histogram"] is not None:
            floor = "" if b["histogram_floor"] is None else f" (floor {b['histogram_floor']:.4f})"
            lines.append(f"{name}: histograms of the factors differ from real by {b['histogram']:.4f} -> "
                         f"{a['histogram']:.4f}{floor}")
    return "".join(line + "\n" for line in lines)


def check(c, world):
    """Everything on the command line that cannot work, before anything is loaded."""
    for name, choices in (("reward", ("fd", "kid", "mmd", "sample")), ("credit", ("image", "subset")),
                          ("objective", ("forward", "ppo", "pathwise")), ("stream", ("report", "select")),
                          ("advantage", ("reward", "zero", "random", "constant", "rejection"))):
        if c[name] not in choices:
            fail(f"unknown {name} {c[name]!r}; choose {' or '.join(choices)}")
    if c.batch % world:
        fail(f"batch {c.batch} does not divide over {world} ranks; try {max(1, c.batch // world) * world}")
    if c.credit == "subset" and (c.subset < 1 or c.batch % c.subset or c.batch == c.subset):
        fail(f"batch {c.batch} does not divide into at least two subsets of {c.subset}")
    if c.credit == "subset" and c.reference < c.subset:
        fail(f"reference {c.reference} is smaller than subset {c.subset}")
    if c.advantage in ("constant", "rejection") and c.objective != "forward":
        fail(f"advantages that are not centred only add noise to ppo: --advantage={c.advantage} needs "
             "--objective=forward")
    if c.advantage == "rejection" and c.top == 1:
        fail("--advantage=rejection trains on the best share of the images: needed is --top below 1, for example 0.25")
    if c.objective == "pathwise" and (c.credit != "image" or c.reward == "sample"):
        fail("--objective=pathwise needs --credit=image and a distribution-wise --reward; or add --objective=forward")
    for name, least in dict(iters=1, epochs=1, batch_size=1, micro_batch=1, num_prdc=10, num_real=10, save_every=1,
                            refresh=0, times=int(c.objective != "ppo"), batch=2 * world, reference=2 * world).items():
        if c[name] < least:
            fail(f"{name} {c[name]}: needed is at least {least}")
    if c.num and c.num < 2 * world:
        fail(f"num {c.num}: needed is 0 (no evaluation) or at least {2 * world}")
    shares = [c[name] for name in ("memory", "ema", "pull", "beta1", "rejection")]
    if not (0 < c.top <= 1 and 0 < c.noisiest <= 1 and 0 <= min(shares) and max(shares) < 1):
        fail(f"memory {c.memory}, ema {c.ema}, pull {c.pull}, beta1 {c.beta1} and rejection {c.rejection} must lie in "
             f"[0, 1), top {c.top} and noisiest {c.noisiest} in (0, 1]")
    if c.rejection and "rejection" in c.given and not 0 < round(c.rejection * c.iters) < c.iters:
        fail(f"rejection {c.rejection} is {round(c.rejection * c.iters)} of {c.iters} iterations: needed is 0, or at "
             "least one and not all")
    for name in ("bound", "clip", "kl_limit", "grad_clip"):
        if c[name] <= 0:
            fail(f"{name} {c[name]}: needed is more than 0")
    if c.neon < 0 or c.neon and c.neon_images < world:
        fail(f"neon {c.neon} must not be negative, and neon_images {c.neon_images} at least {world}")
    if not c.neon and "neon_images" in c.given:
        fail("--neon_images does nothing with --neon=0; leave it out")
    if c.lr < 0:
        fail(f"lr {c.lr}: needed is more than 0, or 0 for the family's own")
    if is_statistics(c.real) and c.reward in ("kid", "mmd"):
        fail(f"{c.real} has statistics only, {c.reward} needs real images: --real=tiny, a folder or a zip")
    if c.moments and c.reward != "fd":
        fail("--moments are for --reward=fd")
    if c.reward == "sample" and (c.credit != "image" or c.real != "tiny"):
        fail("a sample-wise reward is an image's own, by a network that knows the classes: --credit=image, --real=tiny")
    if c.json and not c.num:
        fail("--json writes the table before / after, and with --num=0 there is none")
    # An option that would do nothing is a mistake too.
    idle = {"reward=kid": ("memory",), "reward=mmd": ("memory",), "credit=image": ("subset", "refresh"),
            "credit=subset": ("memory", "moments", "offset"), "moments": ("reference",),
            "objective=ppo": ("proximal", "rollout", "offset", "horizon", "rejection", "noisiest"),
            "objective=forward": ("clip", "horizon", "rejection"),
            "objective=pathwise": ("offset", "clip", "top", "advantage", "bound"),
            "rejection=0": ("proximal", "times", "noisiest", "grad_clip")}
    chosen = [f"{name}={c[name]}" for name in ("reward", "credit", "objective")] + ["moments"] * bool(c.moments)
    chosen += ["rejection=0"] * (c.objective == "pathwise" and c.rejection == 0)
    for where in chosen:
        for name in set(idle.get(where, ())) & set(c.given):
            other = ", or add --objective=forward" if where == "objective=pathwise" else ""
            fail(f"--{name} does nothing with --{where}; leave it out{other}")
    for path in filter(None, (os.path.join(c.out, "ckpt.pt"), c.json)):
        writable(path)


def step_away(c, model, plans):
    """
    The first part, which needs no reward: `model` in place steps away from what it becomes when it is trained on images
    by each of `plans` (Neon, see sample.self_trained). Kept in OUT/start.pt, from where a resumed run takes it.
    """
    path, params = os.path.join(c.out, "start.pt"), [p for p in model.parameters() if p.requires_grad]
    kept = read_checkpoint(path) if c.resume and os.path.isfile(path) else {}
    same = torch.tensor(int(bool(kept) and (c.changed or kept.get("config") == of_the_run(c))))
    dist.all_reduce(same, dist.ReduceOp.MIN)
    if same:
        model.model.load_state_dict(kept["ema"])
        return
    trained = self_trained(model, plans.values(), c.neon_images, c.seed, c.batch_size)
    with torch.no_grad():
        torch._foreach_lerp_(params, [p for p in trained.parameters() if p.requires_grad], -c.neon)
    if dist.get_rank() == 0:
        save(path, model.model, config=of_the_run(c))


def rollout_plan(c, name, steps_of, sigmas):
    """Schedule of the rollouts `name`: a sampler, with `steps` or with a number of its own (flow-30)."""
    kind, _, number = name.rpartition("-")
    kind, steps = (kind, int(number)) if kind and number.isdecimal() else (name, steps_of(name))
    last = c.last * steps_of(kind) / steps if kind == c.sampler else 0.0    # as judge_model: a share of a step
    return schedule(kind, steps, c.noise, last, sigmas)


class Course(NamedTuple):
    """What an iteration does: the sampler of its rollouts, and the state that belongs to it."""
    plan: Schedule
    reward_of: object                       # ImageCredit, SubsetCredit, ..: each sampler has its own reference set
    optimizer: torch.optim.Adam


def begin(c, plan, features, labels, stored, real, nets, params):
    """A Course whose reference set starts from features (N, d), labels (N,), or from stored Moments."""
    parts = []
    for f, net in zip(features.split(nets.dims, dim=1), nets.nets):
        known = real[net.name]
        if c.reward == "kid":
            parts.append(KernelSet(f, known.features))
        elif c.reward == "mmd":
            parts.append(KernelSet(f, known.features, gaussian_kernel(known.features)))
        elif c.credit == "image":
            stream = Stream(f, known.mu, known.cov, c.memory)
            parts.append(stream.set(copy.copy(stored)) if stored else stream)
        else:
            parts.append(ReferenceSet(f[dist.get_rank()::dist.get_world_size()], known.mu, known.cov, sharded=True))
    reference = SumSet(parts, nets.dims) if len(parts) > 1 else parts[0]
    if c.reward == "sample":
        reward_of = SampleCredit(reference, nets.nets[0].heads)
    elif c.credit == "image":
        reward_of = ImageCredit(reference)
    else:
        reward_of = SubsetCredit(reference, labels, c.subset, c.seed)
    return Course(plan, reward_of, torch.optim.Adam(params, lr=c.lr, betas=(c.beta1, 0.99)))


def learn(c, ddp, course, net, states, velocities, mine, advantages, it, rng):
    """
    The update on this rank's rollout, labels `mine`, and its guard; all randomness is drawn for the whole batch, so
    that it does not depend on the ranks. A step that is not finite is taken back. Returns what is logged, and seconds.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    params = [p for p in ddp.parameters() if p.requires_grad]
    clock, start = [time.perf_counter()], [p.detach().clone() for p in params]
    if c.objective == "ppo":
        pairs = ppo_pairs(states, mine, advantages[rank::world], course.plan, c.times, rng, rank, world)
        loss_of = lambda m, part, old: ppo_loss(m, part, old, course.plan, c.clip)
    elif c.objective == "pathwise":
        pairs = pathwise_pairs(states, velocities, mine, course.plan, c.horizon)
        loss_of = lambda m, part, old: pathwise_loss(m, ddp.module, part, course.plan, net, course.reward_of.reference)
    else:
        advantages = advantages + (c.offset if c.credit == "image" else 0.0)
        pairs = forward_pairs(ddp.module, states, mine, advantages[rank::world], c.times, c.noisiest, rng, rank,
                              world)
        loss_of = lambda m, part, old: forward_loss(m, part, old, c.proximal)
    lr = c.lr * (0.5 + 0.5 * math.cos(math.pi * it / c.iters)) if c.cosine else c.lr
    course.optimizer.param_groups[0]["lr"] = lr
    few = max(1, 64 // world)
    probe = states[:, :few], velocities[:, :few], mine[:few]
    if c.bf16:
        probe = states[:, :few], outputs(exact(ddp.module), states[:, :few], mine[:few], course.plan), mine[:few]
    bound = math.inf if c.objective == "pathwise" else c.grad_clip
    norm, clipped = update(ddp, course.optimizer, pairs, loss_of, c.epochs, c.micro_batch, 1 / len(mine), bound)
    clock.append(time.perf_counter())

    kl, halvings = guard(exact(ddp.module), params, start, probe, course.plan, c.kl_limit)
    if not (math.isfinite(norm) and math.isfinite(kl or 0)):
        torch._foreach_copy_([p.detach() for p in params], start)
    clock.append(time.perf_counter())
    return dict(kl=kl, halvings=halvings, clipped=clipped, grad_norm=norm, lr=lr), [
        ("update", clock[1] - clock[0]), ("guard", clock[2] - clock[1])]


def train(c, model, nets, real, plans, stop, stored=None):
    """
    The iterations, on rollouts by the Schedules in `plans` {sampler: Schedule} in turn: fine-tunes `model` in place
    and writes OUT/log.jsonl, OUT/times.jsonl and OUT/state.pt. The reference set is drawn, or known by its `stored`
    Moments. An iteration whose features, gradient or path KL are not finite is skipped and counted. When `stop` holds a
    signal the state is saved and the script ends. Returns the average of the weights (a model), and the images drawn.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    draw = lambda first, plan: draw_features(model, nets, first, c.reference, plan, c.seed, c.batch_size, device)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)      # one copy of the gradients, not two
    params = [p for p in model.parameters() if p.requires_grad]

    # The reference sets are drawn by the base, with the first images of the training stream, unless they are known.
    state, count = read_state(c) if c.resume else None, 0 if stored else c.reference
    found = gather(torch.tensor([state["at"]["it"] if state else 0]), world).tolist()
    if len(set(found)) > 1:
        fail(f"the ranks found states of iterations {found} in {c.out}: needed is a folder that all nodes share")
    blank = torch.zeros(count, nets.dim, device=device), torch.arange(count, device=device)
    used = len(plans) * c.neon_images if c.neon else 0
    courses = {name: begin(c, plan, *(blank if state or not count else draw(used + i * count, plan)), stored, real,
                           nets, params) for i, (name, plan) in enumerate(plans.items())}
    average = copy.deepcopy(model)
    rejecting = Config(c, objective="forward", advantage="rejection", top=0.25, offset=0.0, pull=0.0)
    first = round(c.rejection * c.iters)
    base_params = [p.detach().clone() for p in params] if c.pull or first else []
    average_params = [p for p in average.parameters() if p.requires_grad]
    at = dict(it=0, drawn=used + len(courses) * count, turns=dict.fromkeys(courses, 0), skipped=0, in_a_row=0, log=0,
              first=first)
    if state:
        at = state["at"]
        first = at.setdefault("first", 0)   # as the run began, whatever --changed says now
        model.model.load_state_dict(state["model"])
        average.model.load_state_dict(state["average"])
        if first and base_params:
            torch._foreach_copy_(base_params, state["base"])
        if set(courses) != set(state["courses"]):
            fail(f"{c.out} has rollouts by {' '.join(state['courses'])}, now by {' '.join(courses)}; each has "
                 "its own reference set and optimizer: resume with the same, or start in another folder")
        for name, kept in state["courses"].items():
            courses[name].optimizer.load_state_dict(kept["optimizer"])
            courses[name].reward_of.load_state_dict(kept["reward"])
        print0(f"resumed at iteration {at['it']}")
    log = Log(c.out, at["log"]) if rank == 0 else None

    def keep():
        parts = {name: dict(optimizer=course.optimizer.state_dict(), reward=course.reward_of.state_dict())
                 for name, course in courses.items()}
        if rank == 0:
            at["log"] = log.position()
            write(os.path.join(c.out, "state.pt"), dict(config=of_the_run(c), at=at, model=model.model.state_dict(),
                  average=average.model.state_dict(), base=base_params if first else [], courses=parts),
                  previous=os.path.join(c.out, "state.previous.pt"))

    stop.patient = True
    for it in tqdm(range(at["it"], c.iters), desc="training", unit="iteration", disable=rank > 0 or None):
        clock = [time.perf_counter()]
        now = rejecting if it < first else c
        if it == first > 0:                 # the gradient starts afresh, and is pulled back to what rejection has made
            if base_params:
                torch._foreach_copy_(base_params, [p.detach() for p in average_params])
            for course in courses.values():
                course.optimizer.state.clear()
        name = c.rollout[it % len(c.rollout)]
        course = courses[name]
        if c.refresh and at["turns"][name] and at["turns"][name] % c.refresh == 0:
            course.reward_of.push(*draw(at["drawn"], course.plan))
            at["drawn"] += c.reference
        at["turns"][name] += 1

        # Every rank draws its share, and sees the features of all.
        indices = torch.arange(at["drawn"], at["drawn"] + c.batch)
        labels = indices.to(device) % model.num_classes
        mine = labels[rank::world]
        states, velocities = roll_out(model, indices[rank::world], mine, course.plan, c.seed, c.batch_size)
        at["drawn"] += c.batch
        clock.append(time.perf_counter())
        features = gather(nets(decode(model, states[-1])), c.batch)
        rng = torch.Generator().manual_seed(image_seeds(c.seed, "update", [it])[0])
        row, finite, seconds = dict(it=it, sampler=name), bool(features.isfinite().all()), []
        if finite:
            advantages, reward = advantages_of(course.reward_of, features, labels, now, rng)
            if c.credit == "subset" and not c.refresh:
                course.reward_of.push(features, labels)
            row |= {"fd" if c.reward == "sample" else c.reward: course.reward_of.fd, "reward": reward.mean().item(),
                    "reward_std": reward.std().item(), **course.reward_of.checks}
        clock.append(time.perf_counter())
        if finite:
            learned, seconds = learn(now, ddp, course, nets, states, velocities, mine, advantages, it, rng)
            row |= learned
            finite = math.isfinite(row["grad_norm"]) and math.isfinite(row["kl"] or 0)
        if finite:
            with torch.no_grad():
                if now.pull:
                    torch._foreach_lerp_(params, base_params, now.pull * row["lr"] / c.lr)
                torch._foreach_lerp_(average_params, params, 1 - min(c.ema, (1 + it) / (10 + it)))
        at.update(it=it + 1, skipped=at["skipped"] + (not finite), in_a_row=0 if finite else at["in_a_row"] + 1)

        seconds = dict([("rollout", clock[1] - clock[0]), ("reward", clock[2] - clock[1]), *seconds])
        if rank == 0:
            log.write(dict(row, skipped=at["skipped"], images=at["drawn"]), seconds, c)
        if at["in_a_row"] == 5:
            fail("5 iterations in a row had features, a gradient or a path KL that are not finite; "
                 f"{last_state(c.out)}: go on with a lower --lr by --resume --changed", code=1)
        number = torch.tensor(stop.number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        if number or at["it"] == c.iters or at["it"] % c.save_every == 0:
            keep()
        if number:
            print0(f"stopped by {signal.Signals(number.item()).name} after {at['it']} iterations; go on with --resume")
            raise SystemExit(128 + number.item())
    stop.patient = False
    return average.eval(), at["drawn"], log


# ---- What a run leaves behind --------------------------------------------------------------------------------------

LEFT = ("ckpt.pt", "before.png", "after.png", "log.jsonl", "times.jsonl", "state.pt", "state.previous.pt", "before.pt",
        "start.pt")

# Options that a resumed run may change without being told: they are not of the training.
FREE = ("out", "json", "resume", "changed", "save_every", "judges", "num", "stream", "num_prdc", "eval_full")


def of_the_run(c):
    return {name: value for name, value in c.items() if name not in FREE}


def read_state(c):
    """The newest whole state in OUT, or None; options that differ from those it was made with end the script."""
    for name in ("state.pt", "state.previous.pt"):
        path = os.path.join(c.out, name)
        if not os.path.isfile(path):
            continue
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            was = {k: state["config"].get(k) for k in of_the_run(c)}
        except Exception as e:              # a file that was cut short can raise anything
            print0(f"note: {path} is cut short or damaged ({type(e).__name__}); trying the state before it")
            continue
        odd = [f"{k}={was[k]}, now {v}" for k, v in of_the_run(c).items() if was[k] != v]
        if odd and not c.changed:
            fail(f"the run in {c.out} has {'; '.join(odd)}: repeat its options, or add --changed")
        return state
    print0(f"note: {c.out} holds no state to resume from; starting from the beginning")
    return None


def judged_before(c):
    """The rows of the base that the run in OUT judged with the same options, or None."""
    path = os.path.join(c.out, "before.pt")
    kept = read_checkpoint(path) if c.resume and os.path.isfile(path) else {}
    same = torch.tensor(int(kept.get("config") == dict(c, resume=False)))
    dist.all_reduce(same, dist.ReduceOp.MIN)            # OUT may be a folder of one node alone
    return kept["rows"] if same else None


def last_state(out):
    """Where the last good state is, for people."""
    paths = [os.path.join(out, name) for name in ("state.pt", "state.previous.pt")]
    there = [path for path in paths if os.path.isfile(path)]
    return f"the last good state is {there[0]}" if there else f"no state was saved in {out} yet"


class Log:
    """
    OUT/log.jsonl, a line per iteration, which is the same however often a run is stopped and resumed (from `position`,
    in bytes), and OUT/times.jsonl, which is not. Every twentieth line is shown.
    """
    def __init__(self, out, position):
        self.path, self.phases, self.rows = os.path.join(out, "log.jsonl"), defaultdict(float), 0
        try:
            self.file = open(self.path, "r+b" if position else "wb")
            self.times = open(os.path.join(out, "times.jsonl"), "a" if position else "w")
        except OSError as e:
            fail(f"cannot write {e.filename} ({e.strerror}); start again without --resume, in a folder of its own", 1)
        if self.file.seek(0, os.SEEK_END) < position:
            fail(f"{self.path} is shorter than the state beside it says; start again without --resume", code=1)
        self.file.seek(position)
        self.file.truncate()

    def position(self):
        os.fsync(self.file.fileno())
        return self.file.tell()

    def write(self, row, seconds, c):
        """The iteration's row and its seconds by phase."""
        total = sum(seconds.values())
        try:
            self.file.write(dumps(row).encode() + b"\n")
            self.file.flush()
            timing = dict(it=row["it"], images_per_second=c.batch / total, seconds=seconds)
            print(dumps(timing), file=self.times, flush=True)
        except OSError as e:
            fail(f"cannot write {self.path} ({e.strerror}); {last_state(c.out)}", code=1)
        for phase, s in seconds.items():
            self.phases[phase] += s
        if "grad_norm" not in row:
            tqdm.write(f"{row['it']:5d}  {row['sampler']:12s}  skipped: features are not finite")
        elif row["it"] % max(1, c.iters // 20) == 0 or row["it"] == c.iters - 1:
            kl = "      -" if row["kl"] is None else f"{row['kl']:.1e}"
            distance, = (f"{k} {row[k]:8.5g}" for k in ("fd", "kid", "mmd") if k in row)
            checks = "".join(f"  {k} {row[k]:.0e}" for k in ("gap", "deviation") if k in row)
            tqdm.write(f"{row['it']:5d}  {row['sampler']:12s}  {distance}  reward {row['reward']:+.1e} "
                       f"+- {row['reward_std']:.1e}{checks}  kl {kl}  clipped {row['clipped']:4.0%}  "
                       f"grad {row['grad_norm']:.1e}  {c.batch / total:6.0f} images/s"
                       + (f"  skipped {row['skipped']}" if row["skipped"] else ""))
        self.rows += 1
        left = c.iters - row["it"] - 1
        if self.rows == len(c.rollout) and left:                            # each sampler once
            total = sum(self.phases.values())
            tqdm.write(f"{self.rows} iterations took {total:.1f} s: {left} more in about "
                       f"{total * left / self.rows / 60:.1f} minutes; memory so far {peak_memory():.2f} GB")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if argv is None:
        share_cores(c, c.batch)
    with Stop("; go on with --resume", "--batch_size and --micro_batch") as stop:
        run(c, stop)


def run(c, stop):
    """Judge, train, judge again: the script, with its options c and a Stop."""
    rank, world, device = setup()
    began = time.time()
    check(c, world)
    met = not c.resume and holds_run(c.out, ("ckpt.pt", "state.pt", "state.previous.pt"), [c.ckpt, c.guide, c.moments])
    if c.resume:
        c["ckpt"] = of_the_run_before(c.ckpt, c.out)
    model = load_guided(c, device)
    own, given = FAMILIES[model.family], c.given
    c = Config(c, **{name: c[name] or own[name] for name in ("sampler", "noise", "lr")})
    steps_of = lambda sampler: max(2, c.steps // 2) if sampler == "heun" else c.steps
    plans = {c.sampler: schedule(c.sampler, steps_of(c.sampler), c.noise, c.last, model.sigmas)}
    if "rejection" not in given:
        c["rejection"] = own["rejection"] if c.objective == "pathwise" else 0.0
    if c.objective == "ppo":
        c["rollout"] = [c.sampler]
    else:                                   # a third of the step size too, or other numbers of steps gain less
        c["rollout"] = c.rollout or own["rollout"] + [f"{name}-{3 * steps_of(name)}" for name in own["rollout"]]
        plans = {name: rollout_plan(c, name, steps_of, model.sigmas) for name in c.rollout}
    if c.objective == "ppo" and not len(plans[c.sampler].noisy):
        fail(f"{c.sampler} has no noise, so ppo has no policy; leave --sampler out, or add --objective=forward")
    fewest = min(len(plan.t) for plan in plans.values())
    c["horizon"] = c.horizon if "horizon" in given else min(c.horizon, fewest)
    if c.objective == "pathwise" and not 1 <= c.horizon <= fewest:
        fail(f"horizon {c.horizon}: needed is 1 to {fewest}, the sampler's steps")
    choose_networks(c, image_size(model), ["tiny2", "tiny", "pixels", "factors"])
    if len(c.features) > 1 and (c.moments or c.reward == "sample"):
        fail(f"--moments and --reward=sample are for one feature network, --features names {len(c.features)}")
    check_classes(c.real, model.num_classes)
    for block in model.modules():
        if isinstance(block, Recomputed):
            block.checkpointing = c.checkpointing
    made = {name: feature_net(name, c.features_path if name in WEIGHTS else None, device)
            for name in dict.fromkeys([*c.features, *c.judges])}
    nets, judges = Nets([made[name] for name in c.features]), [made[name] for name in c.judges]
    if c.reward == "sample" and not hasattr(nets.nets[0], "heads"):
        fail(f"{nets.name} features have no classifier; --reward=sample needs --features=tiny or tiny2")
    if c.credit == "image" and c.reward in ("fd", "sample"):
        memory = long_enough(c.memory, c.batch, max(nets.dims))
        if memory > c.memory:
            print0(f"note: image credit in {max(nets.dims)} dimensions needs an effective number of "
                   f"{5 * max(nets.dims)} images, {c.batch} a rollout at memory {c.memory} are fewer: memory is raised "
                   f"to {memory:.5g}")
        for name in {"reference", "moments"} & set(given) if memory == 0 else ():
            fail(f"--{name} does nothing at memory 0, where the moments are those of each rollout alone; leave it out, "
                 "or add --memory=0.5")
        c = Config(c, memory=memory, reference=c.reference if memory else 0)
    after = f" after {round(c.rejection * c.iters)} of rejection" if c.rejection else ""
    print0(f"{sum(p.numel() for p in model.model.parameters()) / 1e6:.2f} M parameters, images {model.shape}, "
           f"{model.num_classes} classes; {c.iters} iterations of {c.batch} images, {c.batch // world} per rank, "
           f"{c.steps} steps: {c.objective}{after} on {' '.join(c.rollout)}; {c.credit} credit of "
           f"{c.reward} in {nets.name} ({nets.dim}-d)" + (f", judged in {' '.join(c.judges)}" if c.num else ""))

    # Judge the base first: if the real data do not fit, better to know before training.
    num_real, size = c.num_real if c.real == "tiny" else 0, image_size(model)
    kept = c.num_prdc if c.reward in ("kid", "mmd") else 1
    real_train = real_summaries(c.real, nets.nets, "train", kept, num_real, device, size)
    for net in nets.nets:
        if 0 < real_train[net.name].num <= net.dim:
            fail(f"{c.real} has {real_train[net.name].num} images for the reward; {net.name} features need more than "
                 f"{net.dim}", 1)
    stored = stored_moments(c.moments, nets.nets[0], device) if c.moments else None
    if c.num:
        samplers = [(name, steps_of(name), c.num) for name in (c.sampler, own["ode"])]
        if c.eval_full:
            samplers += [(name, 5 * steps, max(2 * world, c.num // 5)) for name, steps, _ in samplers]
        samplers = list(dict.fromkeys(samplers))
        real_report = real_summaries(c.real, judges, c.stream, c.num_prdc, num_real, device, size)
        floors = {num: floors_of(c, judges, real_report, num, device, size)
                  for num in dict.fromkeys(num for _, _, num in samplers)}
        before, images = judged_before(c), None
        if before is None:
            before, images = judge_model(model, judges, real_report, floors, samplers, c)
        if met:                             # the options and the data are known to work
            move_aside(c.out, LEFT)
            c["ckpt"] = of_the_run_before(c.ckpt, c.out)
        if images is not None:
            if rank == 0:
                save_grid(os.path.join(c.out, "before.png"), images)
                write(os.path.join(c.out, "before.pt"), dict(config=dict(c, resume=False), rows=before))
        for row in before:
            notes_on(row, made[row["features"]].dim)
        print0(f"base judged after {time.time() - began:.0f} s")

    elif met:
        move_aside(c.out, LEFT)
        c["ckpt"] = of_the_run_before(c.ckpt, c.out)
    train_began = time.time()
    if c.neon:
        step_away(c, model, plans)
        print0(f"stepped away from self-training after {time.time() - train_began:.0f} s")
    average, drawn, log = train(c, model, nets, real_train, plans, stop, stored)
    train_seconds = time.time() - train_began
    if rank == 0:
        save(os.path.join(c.out, "ckpt.pt"), average.model, config=of_the_run(c))
        print0(f"{drawn} images in {train_seconds:.0f} s: " + ", ".join(
            f"{phase} {s:.1f} s ({s / sum(log.phases.values()):.1%})" for phase, s in log.phases.items()))
    if not c.num:
        print0(f"wrote {os.path.join(c.out, 'ckpt.pt')} and log.jsonl")
        return

    after, images = judge_model(average, judges, real_report, floors, samplers, c)
    print0(table(before, after) + "\n" + histograms(before, after).rstrip())
    if rank == 0:
        save_grid(os.path.join(c.out, "after.png"), images)
        if c.json:
            keep = lambda rows: [{k: row[k] for k in KEYS} for row in rows]
            with whole(c.json) as f:
                f.write(dumps(dict(before=keep(before), after=keep(after), seconds=time.time() - began,
                                   train_seconds=train_seconds, images=drawn)).encode())
    b, a = before[0], after[0]
    print0(f"FD {b['fid']:.3f} -> {a['fid']:.3f} ({b['features']}, {b['sampler']}, {b['steps']} steps, {c.num} images) "
           f"in {time.time() - began:.0f} s in all; {os.path.join(c.out, 'ckpt.pt')}, before.png, after.png, log.jsonl")


if __name__ == "__main__":
    main()
