"""
Pre-training: the tiny feature networks, the tiny bases with their snapshots, a base for anyone's images.

python lab/pretrain.py                                          # all of assets/ but the skewed base (hours)
python lab/pretrain.py --only=base --family=edm2                # the tiny EDM2
python lab/pretrain.py --real FOLDER --out base.pt --minutes 10 # a tiny base for your own images
python lab/pretrain.py --ckpt sit-tiny --out more.pt --minutes 3 # more pre-training, the plainest rival of RL

A base that lacks nothing but diversity: the tiny base goes on with a training set that is 86 % blue (five minutes).

python lab/pretrain.py --ckpt sit-tiny --skew=0.045 --out assets/sit-tiny-skewed.pt --images=400000 --lr=1e-3 \
    --lr_matrices=3e-3 --ema=0.1

Left out on purpose: dropout, mixed precision (slower on a CPU at this size), torch.compile (a minute to warm up).
"""
import copy
import glob
import math
import os
import sys
import time

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import (CLASSES, FACTORS, SIZE, FeatureNet, evaluate, feature_net, image_batches, image_classes, open_images,
                 real_summaries, tiny_images)
from lab.rivals import ema_exponent
from models import (EDM2, SIT_SIZES, Config, MPConv, SiT, Stop, configure, fail, listed, load, move_aside,
                    read_checkpoint, save, setup, whole, writable)
from sample import renoise

# -----------------------------------------------------------------------------
real = "tiny" # images to train on: "tiny" (the procedural world), or a folder or zip of images
out = "assets" # folder for all tiny assets; with --real FOLDER or --ckpt a file, for example base.pt
ckpt = "" # continue from this checkpoint, asset or our own base, instead of from scratch
heads = 0 # attention heads of --ckpt, a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of --ckpt, a SiT; 0: as its file says, else all rows of its table but one, the null class
family = "" # network of a new base: sit, edm2; empty: one after the other (tiny world), sit (a folder)
minutes = 0.0 # train a base for this long; 0: for `images` (tiny world), 10 minutes (a folder)
images = 0 # images seen in pre-training, unless minutes says otherwise; 0: 6 M for SiT, 1.6 M for EDM2
batch_size = 0 # images per pre-training update; 0: 256 for SiT, 128 for EDM2
lr = 0.0 # Adam; 0: 6e-3 for SiT, 1e-2 for EDM2
lr_matrices = 0.02 # Muon, for the matrices of SiT's blocks
lr_knee = 500_000 # images after which both learning rates fall as 1/sqrt(images)
ema = 0.05 # length of the average of the weights that becomes the base, a share of the training: 0.05 or 0.1
skew = 1.0 # share of the tiny world's images that are kept for training unless they are blue; 1: all
resume = False # continue from the state beside the base (OUT.state), perhaps with more --images or --minutes
only = "all" # which assets to make: all, features, base
seed = 0 # weights, order of images, noise
# -----------------------------------------------------------------------------

EDM2_TINY = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=8, channel_mult=[1, 2, 4],
                 channel_mult_noise=4, num_blocks=1, attn_resolutions=[4], channels_per_head=16, sigmas=[0.1, 10.0])
PRETRAINING = {"sit": dict(images=6_000_000, batch_size=256, lr=6e-3),
               "edm2": dict(images=1_600_000, batch_size=128, lr=1e-2)}
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


def random_loss(model, x, y, batch, rng):
    """
    The training loss of `batch` random images of x (N, C, H, W) uint8, labels y (N,): flow matching at logit-normal
    times (SiT), denoising at log-normal noise levels (EDM2). A tenth of the labels is dropped, for guidance.
    """
    k = torch.randint(len(x), (batch,), generator=rng)
    x1 = x[k].float() / 127.5 - 1
    noise, z = torch.randn(x1.shape, generator=rng), torch.randn(batch, generator=rng)
    dropped = torch.rand(batch, generator=rng) < 0.1
    labels = y[k].masked_fill(dropped, model.num_classes) if model.null else y[k]
    uniform = z.sigmoid() if model.family == "sit" else torch.special.ndtr(z)
    device = next(model.parameters()).device
    xt, t, u, weight = renoise(model, *(part.to(device) for part in (x1, noise, uniform)))
    return ((model(xt, t, labels.to(device)) - u).square().mean((1, 2, 3)) * weight).mean()


def pretrain(model, x, y, seed, lr, lr_matrices, lr_knee, batch, snapshot, total=0, minutes=0.0, state_path=""):
    """
    Train on images x uint8 (N, C, H, W), labels y (N,), for `total` images or for `minutes`. EDM2's stored weights are
    normalised after every update (Karras et al. 2024, 2.3). Two power-function averages of the weights are tracked;
    snapshot(eighth, images_seen, {std: model}) is called at every eighth of the run. The rates fall as 1/sqrt(images),
    so nothing but the last snapshot knows when the run ends. With a state_path everything is kept there at every
    eighth, and a run that finds it resumes from it.
    """
    rng = torch.Generator().manual_seed(seed)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizers = optimizers_of(model, lr, lr_matrices)
    averages = {std: copy.deepcopy(model).requires_grad_(False).eval() for std in EMA_STDS}
    gammas = {std: ema_exponent(std) for std in EMA_STDS}
    slow_params = {std: [q for q, p in zip(average.parameters(), model.parameters()) if p.requires_grad]
                   for std, average in averages.items()}
    convs = [m for m in model.modules() if isinstance(m, MPConv) and m.weight.requires_grad]
    stateful = [model, *averages.values(), *(optimizer for optimizer, _ in optimizers)]
    seen, earlier = 0, 0.0
    if state_path and os.path.exists(state_path):
        state = read_checkpoint(state_path)
        seen, earlier = state["seen"], state["seconds"]
        rng.set_state(state["rng"])
        for thing, part in zip(stateful, state["parts"]):
            thing.load_state_dict(part)
    began = time.time() - earlier

    def eighths_done():
        return math.floor(8 * ((time.time() - began) / (60 * minutes) if minutes else seen / total))

    eighths = eighths_done()
    bar = tqdm(total=total or None, initial=seen, desc="pre-training", unit="image", mininterval=5, disable=None)
    while eighths < 8:
        loss = random_loss(model, x, y, batch, rng)
        model.zero_grad()
        loss.backward()
        seen += batch
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(seen / 50_000, 1) / math.sqrt(max(seen / lr_knee, 1))
            optimizer.step()
        with torch.no_grad():
            for m in convs:
                m.weight.copy_(m.normalized())
        for std, slow in slow_params.items():
            torch._foreach_lerp_(slow, params, 1 - (1 - batch / seen) ** (gammas[std] + 1))
        bar.update(batch)
        if eighths_done() > eighths:
            eighths = min(8, eighths_done())
            snapshot(eighths, seen, averages)
            if state_path:
                with whole(state_path) as f:
                    torch.save(dict(seen=seen, seconds=time.time() - began, rng=rng.get_state(),
                                    parts=[thing.state_dict() for thing in stateful]), f)
        if seen % (200 * batch) == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()


# ---- The script -----------------------------------------------------------------------------------------------------

def training_images(c):
    """Names of the classes ([] without sub-folders), images uint8 (N, 3, 16, 16) and labels (N,) of --real."""
    if c.real != "tiny":
        found = open_images(c.real)
        names, y = image_classes(found)
        batches = image_batches(found, SIZE)
        x = torch.cat(list(tqdm(batches, total=-(-len(found.names) // 250), desc="reading", unit="batch",
                                disable=None)))
    else:
        names, (x, y, factors) = [], tiny_images(TRAINING_IMAGES if c.skew == 1 else SKEWED_IMAGES, c.seed, "train")
        if c.skew < 1:
            hue = factors[:, 5]
            blue = (BLUE[0] < hue) & (hue < BLUE[1])
            kept = blue | torch.from_numpy(np.random.default_rng(c.seed).random(len(x)) < c.skew)
            print(f"skewed: {blue[kept].double().mean():.1%} of {kept.sum()} images are blue")
            x, y = x[kept], y[kept]
    if len(x) < 2:
        fail(f"{c.real} holds {len(x)} image; needed are at least 2", code=1)
    print(f"{len(x)} images of {c.real} at {SIZE} x {SIZE}, {len(names) or int(y.max()) + 1} classes"
          + (f", in this order: {listed(names)}" if names else ""))
    return names, x, y


def make_model(c, family, given, names, num_classes):
    """The network to train: --ckpt, or a new one of this family."""
    torch.manual_seed(c.seed)
    if given:
        model = given
    elif family == "sit":
        model = init_sit(SiT(*SIT_SIZES["tiny"], (3, SIZE, SIZE), 4, num_classes))
    else:
        model = EDM2(**dict(EDM2_TINY, label_dim=num_classes))
    if names and len(names) != model.num_classes:
        fail(f"{c.real} has {len(names)} classes, {c.ckpt} {model.num_classes}", code=1)
    model.classes = names or model.classes
    return model


def make_base(c, family, path, make_assets):
    """
    Pre-train a base of this family, or train --ckpt further, evaluated at every eighth; writes `path`, as an asset also
    its snapshots.
    """
    state_path, folder = path + ".state", os.path.dirname(path)
    files = [os.path.basename(path), os.path.basename(state_path)]
    given = load(c.ckpt, heads=c.heads, classes=c.classes) if c.ckpt else None      # before images are read or drawn
    names, x, y = training_images(c)
    model = make_model(c, family, given, names, len(names) or int(y.max()) + 1)
    c = Config(c, **{name: c[name] or value for name, value in PRETRAINING[model.family].items()})

    # When twice the images change FD by less than 5 %, more pre-training is no rival to RL.
    net = feature_net("tiny2", os.path.join(c.out, "features-tiny2.pt") if make_assets else None)
    real = real_summaries(c.real, [net], "select", 1, 50_000 if c.real == "tiny" else 0)
    num, steps = (10_000, 10) if model.family == "sit" else (2_500, 5)      # heun evaluates twice
    num = num if c.real == "tiny" else 1_000

    def snapshot(eighth, seen, averages):
        for std, average in averages.items():
            if not make_assets and std != c.ema:
                continue
            row = evaluate(average, [net], real, num, steps=steps, num_prdc=num, stream="select")["tiny2"]
            print(f"{seen:9d} images, EMA {std:.3f}: FD {row['fid']:.2f} +- {row['fid_se'] or math.nan:.2f} "
                  f"(tiny2, {num} images, {row['sampler']}, {row['steps']} steps)", flush=True)
            if make_assets and eighth > 4:              # snapshots for merge_rl.py
                save(path.replace(".pt", f"-{seen // 1000:05d}-{std:.3f}.pt"), average, torch.float16, images=seen)
        # The skewed base is an asset of half the size: rounding it changes its FD by less than its standard error.
        save(path, averages[c.ema], torch.float16 if c.skew < 1 else None, images=seen)

    minutes = c.minutes or (0.0 if c.real == "tiny" else 10.0)
    if not (make_assets or c.resume):
        move_aside(folder, map(glob.escape, files))
    if os.path.exists(state_path) and not c.resume:
        os.remove(state_path)
    pretrain(model, x, y, c.seed, c.lr, c.lr_matrices, c.lr_knee, c.batch_size, snapshot, c.images, minutes, state_path)
    print(f"wrote {path}: {sum(p.numel() for p in model.parameters())} parameters, {model.family}-tiny, "
          f"{model.num_classes} classes; next: python train_rl.py --ckpt {path} --real {c.real}")


def check(c):
    """Mistakes of the command line, before anything is loaded."""
    if c.only not in ("all", "features", "base"):
        fail(f"only {c.only!r}: choose all, features or base")
    if c.family not in ("", *PRETRAINING) or (c.ckpt and c.family):
        fail(f"family {c.family!r}: choose sit or edm2 for a new base; with --ckpt leave it out")
    if c.ema not in EMA_STDS:
        fail(f"ema {c.ema}: choose {' or '.join(map(str, EMA_STDS))}")
    if not 0 <= c.skew <= 1 or c.skew < 1 and c.real != "tiny":
        fail(f"skew {c.skew}: needed is a share from 0 to 1, and --real=tiny, whose hues are known")
    if min(c.images, c.batch_size, c.minutes, c.lr, c.lr_knee) < 0:
        fail(f"images {c.images}, batch_size {c.batch_size}, minutes {c.minutes}, lr {c.lr}, lr_knee {c.lr_knee}: "
             "none may be negative")


def run(c):
    """Make what the options c ask for: the script."""
    check(c)
    make_assets = c.real == "tiny" and not c.ckpt and c.skew == 1
    if not make_assets and not c.out.endswith(".pt"):
        fail(f"--out={c.out}: this makes one base, so one file is needed, for example --out base.pt")
    families = [c.family] if c.family else list(PRETRAINING) if make_assets else ["sit"]
    paths = [os.path.join(c.out, f"{family}-tiny.pt") if make_assets else c.out for family in families]
    for path in paths:
        writable(path)
    setup()

    # The tiny world's base is evaluated in tiny2, so the feature networks come first.
    if make_assets and c.only != "base" and not c.resume:
        for name, net_seed in (("tiny", c.seed), ("tiny2", c.seed + 1)):
            net, found = train_features(name, net_seed)
            print(found)
            with whole(os.path.join(c.out, f"features-{name}.pt")) as f:
                torch.save(dict(model=net.state_dict(), found=found), f)
    if c.only != "features":
        for family, path in zip(families, paths):
            make_base(c, family, path, make_assets)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop("; repeat the command with --resume to continue from the last eighth"):
        run(c)


if __name__ == "__main__":
    main()
