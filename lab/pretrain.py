"""
Pre-training: the tiny feature networks, the tiny bases with their snapshots, a base for anyone's images.

python lab/pretrain.py                                          # all of assets/ but the skewed base (hours)
python lab/pretrain.py --only=base --family=edm2                # the tiny EDM2
python lab/pretrain.py --real FOLDER --out base.pt --minutes 10 # a tiny base for your own images, of 16 px
python lab/pretrain.py --real FOLDER --size 32 --width 384 --depth 12 --heads 6 --patch 2 --out base.pt --minutes 60
torchrun --nproc_per_node=8 -- lab/pretrain.py --preset=B/4 --size=64 --bf16 --real FOLDER --out base.pt --minutes 600
python lab/pretrain.py --ckpt sit-tiny --out more.pt --minutes 3 # more pre-training, the plainest rival of RL

A base that lacks nothing but diversity: the tiny base goes on with a training set that is 86 % blue (five minutes).

python lab/pretrain.py --ckpt sit-tiny --skew=0.045 --out assets/sit-tiny-skewed.pt --images=400000 --lr=1e-3 \
    --lr_matrices=3e-3 --ema=0.1

Left out on purpose: dropout, latents (an SD-VAE's encoder). All images are kept in memory, as uint8.
"""
import copy
import glob
import math
import os
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import (CLASSES, FACTORS, SIZE, FeatureNet, evaluate, feature_net, image_batches, image_classes, open_images,
                 real_summaries, tiny_images)
from lab.rivals import ema_exponent
from models import (EDM2, SIT_SIZES, Config, SiT, Stop, configure, fail, gather, listed, load, move_aside,
                    normalize_filters, print0, read_checkpoint, save, setup, take_preset, whole, writable)
from sample import HALF, renoise

# -----------------------------------------------------------------------------
real = "tiny" # images to train on: "tiny" (the procedural world), or a folder or zip of images
out = "assets" # folder for all tiny assets; with --real FOLDER or --ckpt a file, for example base.pt
ckpt = "" # continue from this checkpoint, asset or our own base, instead of from scratch
preset = "" # width, depth, heads and patch of a SiT by its name: S/2, B/4, ..
size = 16 # pixels of a new base; images are resized, their centre is cut out
width = 64 # of a new SiT
depth = 4 # blocks of a new SiT
heads = 0 # attention heads; 0: official for the width, else width / 64; of --ckpt as its file says
patch = 4 # pixels along a side of a token of a new SiT
mirror = False # also train on mirror images
bf16 = False # the network in 16 bits, SiT's bfloat16 and EDM2's float16
classes = 0 # classes of --ckpt, a SiT; 0: as its file says, else all rows of its table but one, the null class
family = "" # network of a new base: sit, edm2; empty: one after the other (tiny world), sit (a folder)
minutes = 0.0 # train a base for this long; 0: for `images` (tiny world), 10 minutes (a folder)
images = 0 # images seen in pre-training, unless minutes says otherwise; 0: 6 M for SiT, 1.6 M for EDM2
batch_size = 0 # images per pre-training update; 0: 256 for SiT, 128 for EDM2
lr = 0.0 # Adam; 0: 6e-3 x 64 / width for SiT, 1e-2 for EDM2
lr_matrices = 0.02 # Muon, for the matrices of SiT's blocks
lr_knee = 500_000 # images after which both learning rates fall as 1/sqrt(images)
ema = 0.05 # length of the average of the weights that becomes the base, a share of the training: 0.05 or 0.1
skew = 1.0 # share of the tiny world's images that are kept for training unless they are blue; 1: all
resume = False # continue from the state beside the base (OUT.state), perhaps with more --images or --minutes
features = [] # feature network of the FD at every eighth; empty: tiny2 in the tiny world, else inception
features_path = "" # weights of inception or dinov2; empty: the published files, in torch's cache
num = 0 # images drawn for that; 0: 10,000 in the tiny world (EDM2: 2,500), else 1,000
only = "all" # which assets to make: all, features, base
seed = 0 # weights, order of images, noise
# -----------------------------------------------------------------------------

EDM2_TINY = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=8, channel_mult=[1, 2, 4],
                 channel_mult_noise=4, num_blocks=1, attn_resolutions=[4], channels_per_head=16, sigmas=[0.1, 10.0])
PRETRAINING = {"sit": dict(images=6_000_000, batch_size=256, lr=6e-3, num=10_000),
               "edm2": dict(images=1_600_000, batch_size=128, lr=1e-2, num=2_500)}
PRESETS = {f"{name}/{patch}": dict(depth=depth, width=width, heads=heads, patch=patch)
           for name, (depth, width, heads) in SIT_SIZES.items() if name != "tiny" for patch in (1, 2, 4, 8)}
TRAINING_IMAGES = 200_000       # a fixed set: the tiny base cannot memorise it, and drawing it takes 15 seconds
SKEWED_IMAGES = 120_000         # of which a skewed training set is selected
BLUE = (0.50, 0.72)             # hues, in turns, that a skewed training set keeps
EMA_STDS = (0.05, 0.10)         # lengths of the two tracked averages


# ---- Tiny feature networks ------------------------------------------------------------------------------------------

def factor_targets(factors):
    """(N, 7) factors => (N, 8) targets of unit variance; hue is a circle: cos and sin."""
    low, high = torch.tensor(list(FACTORS.values()), dtype=torch.float64).T
    z = (2 * (factors - low) / (high - low) - 1) * math.sqrt(3)
    turn = 2 * math.pi * factors[:, 5:6]
    return torch.cat([z[:, :5], z[:, 6:], math.sqrt(2) * turn.cos(), math.sqrt(2) * turn.sin()], dim=1).float()


def train_features(name, seed, updates=12000, batch=128):
    """Train one tiny feature network on its own stream of images; returns it with its test error as a text."""
    torch.manual_seed(seed)
    net = FeatureNet(name)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    stream = "features" if name == "tiny" else "features2"
    x, y, factors = tiny_images(100_000, seed, stream)
    z = factor_targets(factors)
    for i in tqdm(range(updates), desc=f"features {name}", unit="update", mininterval=5, disable=None):
        k = torch.randint(len(x), (batch,))
        prediction = net.heads(net(x[k]))
        loss = F.cross_entropy(prediction[:, :CLASSES], y[k]) + (prediction[:, CLASSES:] - z[k]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False).eval()
    x, y, factors = tiny_images(10_000, seed, stream, start=len(x))
    # Mean variance 1, as KID's kernel expects; the heads begin with a ReLU, which lets the scale pass.
    scale = net(x).var(0).mean().sqrt()
    net.body[-1].weight /= scale
    net.body[-1].bias /= scale
    net.heads[1].weight *= scale
    prediction = net.heads(net(x))
    correct = (prediction[:, :CLASSES].argmax(1) == y).double().mean()
    error = (prediction[:, CLASSES:] - factor_targets(factors)).square().mean()
    return net, f"features {name}: class right {correct:.2%}, variance of the factors left unexplained {error:.2%}"


# ---- Networks and their training ------------------------------------------------------------------------------------

def init_sit(model):
    """The official initialisation: Xavier, zero modulation and final layer, so that a block starts as identity."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.x_embedder.proj.weight.shape[0], -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for w in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        nn.init.normal_(w, std=0.02)
    for layer in [b.adaLN_modulation[1] for b in model.blocks] + [model.final_layer.adaLN_modulation[1],
                                                                  model.final_layer.linear]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def optimizers_of(model, lr, lr_matrices):
    """[(optimizer, rate)]: Muon (Jordan et al. 2024) for the matrices of SiT's blocks, Adam for the rest."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in named if name.startswith("blocks.") and p.dim() == 2]
    rest = [p for name, p in named if not (name.startswith("blocks.") and p.dim() == 2)]
    optimizers = [(torch.optim.Adam(rest, betas=(0.9, 0.99)), lr)]
    if matrices:
        optimizers.append((torch.optim.Muon(matrices, weight_decay=0.0), lr_matrices))
    return optimizers


def random_loss(model, x, y, batch, rng, mirror=False, bf16=False, ddp=None):
    """
    The training loss of `batch` random images of x (N, C, H, W) uint8, labels y (N,): flow matching at logit-normal
    times (SiT), denoising at log-normal noise levels (EDM2). A tenth of the labels is dropped, for guidance. All are
    on the device of the generator rng.
    """
    of = dict(generator=rng, device=x.device)
    k = torch.randint(len(x), (batch,), **of)
    x1 = x[k].float() / 127.5 - 1
    noise, z = torch.randn(x1.shape, **of), torch.randn(batch, **of)
    dropped = torch.rand(batch, **of) < 0.1
    if mirror:
        x1 = torch.where((torch.rand(batch, **of) < 0.5).view(-1, 1, 1, 1), x1.flip(3), x1)
    labels = y[k].masked_fill(dropped, model.num_classes) if model.null else y[k]
    uniform = z.sigmoid() if model.family == "sit" else torch.special.ndtr(z)
    xt, t, u, weight = renoise(model, x1, noise, uniform)
    with torch.autocast(x.device.type, HALF[model.family], enabled=bf16):
        v = (ddp or model)(xt, t, labels).float()
    return ((v - u).square().mean((1, 2, 3)) * weight).mean()


def pretrain(model, x, y, seed, lr, lr_matrices, lr_knee, batch, snapshot, total=0, minutes=0.0, state_path="",
             mirror=False, bf16=False, made=None):
    """
    Train on images x uint8 (N, C, H, W), labels y (N,), for `total` images or for `minutes`. EDM2's stored weights are
    normalised after every update (Karras et al. 2024, 2.3). Two power-function averages of the weights are tracked;
    snapshot(eighth, images_seen, {std: model}) is called at every eighth of the run. The rates fall as 1/sqrt(images),
    so nothing but the last snapshot knows when the run ends. With a state_path everything is kept there at every
    eighth, and a run that finds it, `made` by the same options, resumes. Every rank draws its share of a batch.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if batch % world:
        fail(f"batch_size {batch} does not divide over {world} ranks")
    rng = torch.Generator(x.device).manual_seed(seed + 1_000_003 * rank)
    ddp = DistributedDataParallel(model, gradient_as_bucket_view=True)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = optimizers_of(model, lr, lr_matrices)
    averages = {std: copy.deepcopy(model).requires_grad_(False).eval() for std in EMA_STDS}
    gammas = {std: ema_exponent(std) for std in EMA_STDS}
    slow_params = {std: [q for q, p in zip(average.parameters(), model.parameters()) if p.requires_grad]
                   for std, average in averages.items()}
    stateful = [model, *averages.values(), *(optimizer for optimizer, _ in optimizers)]
    seen, earlier = 0, 0.0
    if state_path and os.path.exists(state_path):
        state = read_checkpoint(state_path)
        differ = [f"{k} {v}, now {made[k]}" for k, v in (state.get("made") or {}).items() if v != made[k]]
        if differ:
            fail(f"{state_path} is of a base of {'; '.join(differ)}: repeat these options, or leave out --resume")
        seen, earlier = state["seen"], state["seconds"]
        rng.manual_seed(seed + 1_000_003 * rank + seen)                 # of a rank that was not there before
        if rank < len(state["rng"]):
            rng.set_state(state["rng"][rank].clone())                   # of a view torch reads the start
        for thing, part in zip(stateful, state["parts"]):
            thing.load_state_dict(part)
    began = time.time() - earlier

    def eighths_done():                     # by the clock of the slowest rank
        done = torch.tensor(math.floor(8 * ((time.time() - began) / (60 * minutes) if minutes else seen / total)))
        dist.all_reduce(done, dist.ReduceOp.MIN)
        return done.item()

    eighths = eighths_done()
    bar = tqdm(total=total or None, initial=seen, desc="pre-training", unit="image", mininterval=5,
               disable=rank > 0 or None)
    while eighths < 8:
        loss = random_loss(model, x, y, batch // world, rng, mirror, bf16, ddp)
        model.zero_grad()
        loss.backward()
        seen += batch
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(seen / 50_000, 1) / math.sqrt(max(seen / lr_knee, 1))
            optimizer.step()
        normalize_filters(model)
        for std, slow in slow_params.items():
            torch._foreach_lerp_(slow, params, 1 - (1 - batch / seen) ** (gammas[std] + 1))
        bar.update(batch)
        if eighths_done() > eighths:
            eighths = min(8, eighths_done())
            snapshot(eighths, seen, averages)
            states = gather(rng.get_state()[None], world)
            if state_path and rank == 0:
                with whole(state_path) as f:
                    torch.save(dict(seen=seen, seconds=time.time() - began, rng=states, made=made,
                                    parts=[thing.state_dict() for thing in stateful]), f)
        if seen % (200 * batch) == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()


# ---- The script -----------------------------------------------------------------------------------------------------

def training_images(c):
    """Names of the classes ([] without sub-folders), images uint8 (N, 3, H, W) and labels (N,) of --real."""
    if c.real != "tiny":
        found = open_images(c.real)
        names, y = image_classes(found)
        batches = image_batches(found, c.size)
        x = torch.cat(list(tqdm(batches, total=-(-len(found.names) // 250), desc="reading", unit="batch",
                                disable=None)))
    else:
        names, (x, y, factors) = [], tiny_images(TRAINING_IMAGES if c.skew == 1 else SKEWED_IMAGES, c.seed, "train")
        if c.skew < 1:
            hue = factors[:, 5]
            blue = (BLUE[0] < hue) & (hue < BLUE[1])
            kept = blue | torch.from_numpy(np.random.default_rng(c.seed).random(len(x)) < c.skew)
            print0(f"skewed: {blue[kept].double().mean():.1%} of {kept.sum()} images are blue")
            x, y = x[kept], y[kept]
    if len(x) < 2:
        fail(f"{c.real} holds {len(x)} image; needed are at least 2", code=1)
    print0(f"{len(x)} images of {c.real} at {x.shape[3]} x {x.shape[2]}, {len(names) or int(y.max()) + 1} classes"
          + (f", in this order: {listed(names)}" if names else ""))
    return names, x, y


def make_model(c, family, given, names, num_classes):
    """The network to train: --ckpt, or a new one of this family."""
    torch.manual_seed(c.seed)
    if given:
        model = given
    elif family == "sit":
        heads = c.heads or {w: h for _, w, h in SIT_SIZES.values()}.get(c.width) or max(1, c.width // 64)
        if c.size % c.patch or c.width % heads or c.width % 4:
            fail(f"size {c.size} does not divide into patches of {c.patch}, or width {c.width} into {heads} heads")
        model = init_sit(SiT(c.depth, c.width, heads, (3, c.size, c.size), c.patch, num_classes))
    else:
        model = EDM2(**dict(EDM2_TINY, label_dim=num_classes, img_resolution=c.size))
    if names and len(names) != model.num_classes:
        fail(f"{c.real} has {len(names)} classes, {c.ckpt} {model.num_classes}", code=1)
    model.classes = names or model.classes
    return model


def make_base(c, family, path, make_assets, device):
    """
    Pre-train a base of this family, or train --ckpt further, evaluated at every eighth; writes `path`, as an asset also
    its snapshots.
    """
    state_path, folder = path + ".state", os.path.dirname(path)
    files = [os.path.basename(path), os.path.basename(state_path)]
    given = load(c.ckpt, heads=c.heads, classes=c.classes) if c.ckpt else None      # before images are read or drawn
    tiny, minutes = c.real == "tiny", c.minutes or (0.0 if c.real == "tiny" or c.images else 10.0)
    c = Config(c, size=given.shape[-1] if given else c.size)
    names, x, y = training_images(c)
    model = make_model(c, family, given, names, len(names) or int(y.max()) + 1).to(device)
    usual = dict(PRETRAINING[model.family])
    if model.family == "sit":
        usual["lr"] *= 64 / model.pos_embed.shape[2]
    c.update({name: c[name] or value for name, value in usual.items() if name != "num" or tiny})

    # When twice the images change FD by less than 5 %, more pre-training is no rival to RL.
    name = (c.features or ["tiny2" if tiny else "inception"])[0]
    net = feature_net(name, os.path.join(c.out, "features-tiny2.pt") if make_assets else c.features_path, device)
    real = real_summaries(c.real, [net], "select", 1, 50_000 if tiny else 0, device, c.size)
    num, steps = c.num or 1_000, 10 if model.family == "sit" else 5        # heun evaluates twice

    def snapshot(eighth, seen, averages):
        # The skewed base is an asset of half the size: rounding it changes its FD by less than its standard error.
        if dist.get_rank() == 0:
            save(path, averages[c.ema], torch.float16 if c.skew < 1 else None, images=seen)
        for std, average in averages.items():
            if not make_assets and std != c.ema:
                continue
            row = evaluate(average, [net], real, num, steps=steps, num_prdc=num, stream="select")[net.name]
            print0(f"{seen:9d} images, EMA {std:.3f}: FD {row['fid']:.2f} +- {row['fid_se'] or math.nan:.2f} "
                   f"({net.name}, {num} images, {row['sampler']}, {row['steps']} steps)")
            if make_assets and eighth > 4 and dist.get_rank() == 0:         # snapshots for merge_rl.py
                save(path.replace(".pt", f"-{seen // 1000:05d}-{std:.3f}.pt"), average, torch.float16, images=seen)

    there = gather(torch.tensor([int(os.path.exists(state_path))]), dist.get_world_size())
    if there.any() != there.all():
        fail(f"some ranks find {state_path} and some do not: needed is a folder that all nodes share")
    if c.resume and not there.all():
        print0(f"note: there is no {state_path} to resume; starting from the beginning")
        c["resume"] = False
    if not (make_assets or c.resume):
        move_aside(folder, map(glob.escape, files))
    if os.path.exists(state_path) and not c.resume and dist.get_rank() == 0:
        os.remove(state_path)
    dist.barrier()
    made = {k: c[k] for k in ("ckpt", "size", "width", "depth", "heads", "patch")}
    made.update(real=os.path.normpath(c.real), family=model.family, classes=model.num_classes)
    pretrain(model, x.to(device), y.to(device), c.seed, c.lr, c.lr_matrices, c.lr_knee, c.batch_size, snapshot,
             c.images, minutes, state_path, c.mirror, c.bf16, made)
    form = f"{model.family}, {c.size} px, " + (f"patches of {model.patch}, " if model.family == "sit" else "")
    print0(f"wrote {path}: {sum(p.numel() for p in model.parameters()) / 1e6:.2f} M parameters, {form}"
           f"{model.num_classes} classes; next: python train_rl.py --ckpt {path} --real {c.real}")


def check(c):
    """Mistakes of the command line, before anything is loaded."""
    if c.only not in ("all", "features", "base"):
        fail(f"only {c.only!r}: choose all, features or base")
    if c.family not in ("", *PRETRAINING) or (c.ckpt and c.family):
        fail(f"family {c.family!r}: choose sit or edm2 for a new base; with --ckpt leave it out")
    fixed = c.given & {"preset", "width", "depth", "patch", "size" if c.ckpt else "heads"}
    if fixed and (c.ckpt or c.family == "edm2"):
        fail(f"--{' --'.join(sorted(fixed))}: {'--ckpt has its own' if c.ckpt else 'of a SiT only'}; leave it out")
    if c.family == "edm2" and c.size % 4:
        fail(f"size {c.size}: needed is a multiple of 4, as edm2 halves images twice")
    if c.ema not in EMA_STDS:
        fail(f"ema {c.ema}: choose {' or '.join(map(str, EMA_STDS))}")
    if not 0 <= c.skew <= 1 or c.skew < 1 and c.real != "tiny":
        fail(f"skew {c.skew}: needed is a share from 0 to 1, and --real=tiny, whose hues are known")
    if min(c.images, c.batch_size, c.minutes, c.lr, c.lr_knee, c.num, c.heads) < 0:
        fail(f"images {c.images}, batch_size {c.batch_size}, minutes {c.minutes}, lr {c.lr}, lr_knee {c.lr_knee}, num "
             f"{c.num}, heads {c.heads}: none may be negative")
    if min(c.size, c.width, c.depth, c.patch) < 1 or len(c.features) > 1 or c.num == 1:
        fail(f"size {c.size}, width {c.width}, depth {c.depth}, patch {c.patch}, num {c.num}, features {c.features}: "
             "needed are at least 1, two images for FD, and one feature network")


def run(c):
    """Make what the options c ask for: the script."""
    take_preset(c, PRESETS)
    check(c)
    make_assets = c.real == "tiny" and not c.ckpt and c.skew == 1
    if make_assets == c.out.endswith(".pt"):
        fail(f"--out={c.out}: " + ("without --real this makes all assets, so a folder is needed" if make_assets else
                                   "this makes one base, so one file is needed, for example --out base.pt"))
    families = [c.family] if c.family else list(PRETRAINING) if make_assets else ["sit"]
    paths = [os.path.join(c.out, f"{family}-tiny.pt") if make_assets else c.out for family in families]
    for path in paths:
        writable(path)
    device = setup()[2]

    # The tiny world's base is evaluated in tiny2, so the feature networks come first.
    if make_assets and c.only != "base" and not c.resume:
        for name, net_seed in (("tiny", c.seed), ("tiny2", c.seed + 1)):
            net, found = train_features(name, net_seed)
            print(found)
            with whole(os.path.join(c.out, f"features-{name}.pt")) as f:
                torch.save(dict(model=net.state_dict(), found=found), f)
    if c.only != "features":
        for family, path in zip(families, paths):
            make_base(c, family, path, make_assets, device)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop("; repeat the command with --resume to continue from the last eighth"):
        run(c)


if __name__ == "__main__":
    main()
