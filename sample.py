"""
Draw images: from seeds and labels through a sampler to uint8.

Every step of every sampler but Heun's is one Gaussian, mean = a x + c v and std, with numbers a, c, std that depend on
the time alone: a table of them (`schedule`) is all that sampling, log-probabilities and the path KL need. v is what the
network says: the velocity for SiT, whose time runs from 0 to 1, the denoised image for EDM2, whose time is sigma.

python sample.py                                                # 100 images of the tiny base as a grid
python sample.py --ckpt SiT-XL-2-256.pt --num 50000 --sampler sigma --steps 250 --npz samples.npz
python sample.py --ckpt edm2-img512-xs.pkl --steps 32 --guide edm2-img512-xxs-uncond.pkl --guidance 1.4

Left out on purpose: adaptive solvers (dopri5 makes an image depend on its batch).
"""
import colorsys
import copy
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw
from tqdm import tqdm

from models import (STREAMS, Stop, announce, attach_vae, configure, fail, gather, listed, load, pretrain, print0, setup,
                    whole, writable)

# -----------------------------------------------------------------------------
ckpt = "" # .pt, .pkl or .safetensors file, its URL or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
num = 100 # images to draw
sampler = "" # SiT: flow (or any other of FORMS below), euler, heun; EDM2: heun, euler, ancestral; empty: the first
steps = 10 # steps of the sampler: network evaluations, two each for heun
noise = 0.0 # noise level: its square times the form's diffusion, itself times ancestral's std; 0: 0.5 SiT, 0.7 EDM2
last = 0.0 # noise-free last step: its length (0: 1/steps for flow, 0.04 for SiT's forms), or sigma at its start (EDM2)
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels (3 in SiT's own code); 0: all
guide = "" # autoguidance: a weaker network in place of the null class, named like ckpt
guidance = 1.4 # its scale: guide + guidance (main - guide)
S_churn = 0.0 # EDM2's heun: noise added on the way, over all steps
S_min = 0.0 # at noise levels of at least this
S_max = 1e9 # and at most this
S_noise = 1.0 # in units of what the level needs
label = -1 # draw this class only; -1: all in turn
seed = 0 # image i depends on (seed, i) and its label alone
official = False # EDM2's own way: image i has seed seed + i, and its label is drawn after its noise
batch_size = 250 # images in one pass, per rank
out = "out/sample" # folder for grid.png
npz = "" # also write all images to this file, as ADM's evaluator reads them
# -----------------------------------------------------------------------------

# w(t) of dx = [v + w s] dt + sqrt(2 w) dW; Ma et al. 2024, table 2, and Liu et al. 2025 (flow)
FORMS = {
    "flow": lambda t: (1 - t) / (2 * t),
    "sigma": lambda t: 1 - t,
    "linear": lambda t: 1 - t,
    "constant": lambda t: 1.0,
    "sbdm": lambda t: (1 - t) / t,
    "decreasing": lambda t: 0.25 * (math.cos(math.pi * t) + 1) ** 2,
    "increasing-decreasing": lambda t: math.sin(math.pi * t) ** 2,
}


SAMPLERS = {"sit": (*FORMS, "euler", "heun"), "edm2": ("heun", "euler", "ancestral")}    # the first is the default
NOISE = {"sit": 0.5, "edm2": 0.7}
RHO = 7                                         # of EDM2's noise levels


class Schedule(NamedTuple):
    """
    One row per step, which takes x from time t[k] to end[k]: x becomes N(a[k] x + c[k] v, std[k]^2). Each (K,) float32;
    std 0: no noise. Before the network sees x, EDM2's churn adds noise of std kick[k].
    """
    sampler: str
    t: torch.Tensor
    end: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor
    std: torch.Tensor
    kick: torch.Tensor

    @property
    def noisy(self):                        # indices of the steps that are a policy
        return self.std.nonzero().flatten()

    @property
    def kappa(self):                        # KL of one step between two policies = kappa ||dv||^2, in nats
        return self.c**2 / (2 * self.std**2)


def schedule(sampler, steps, noise=1.0, last=0.0, sigmas=None, churn=(0.0, 0.0, math.inf, 1.0)):
    """
    The table of a sampler ('': the family's first) of SiT or, given the noise levels that it starts its last and its
    first step from, of EDM2. churn is (S_churn, S_min, S_max, S_noise), for EDM2's heun.
    """
    family = "edm2" if sigmas else "sit"
    sampler = sampler or SAMPLERS[family][0]
    if sampler not in sum(SAMPLERS.values(), ()):
        fail(f"unknown sampler {sampler!r}; choose one of {', '.join(SAMPLERS['sit'])}, or for EDM2 ancestral")
    if sampler not in SAMPLERS[family]:
        fail(f"{sampler} is no sampler of this network; choose one of {', '.join(SAMPLERS[family])}")
    if steps < 2:
        fail(f"steps {steps}: needed are at least 2")
    if churn[0] and (family, sampler) != ("edm2", "heun"):
        fail(f"S_churn {churn[0]} is for EDM2's heun, not for {sampler}")
    if noise < 0 or churn[0] < 0:
        fail(f"noise {noise} and S_churn {churn[0]} must not be negative")
    if sigmas:
        rows = edm2_rows(sampler, steps, noise, last or sigmas[0], sigmas[1], churn)
    else:
        rows = sit_rows(sampler, steps, noise, last)
    return Schedule(sampler, *torch.tensor(rows, dtype=torch.float32).T)


def sit_rows(sampler, steps, noise, last):
    """
    Times: linspace(0, 1 - last, steps), then 1, as in SiT; the last step has no noise.
    With s = (t v - x) / (1 - t) a step x + dt (v + w s) is linear in x and v. SiT's forms keep w s in the last step
    ("Mean"); flow drops it, so that its last step is the clean estimate x + (1 - t) v.
    w is floored where it is singular: flow and sbdm see max(t, dt/2).
    """
    ode = sampler in ("euler", "heun")
    last = last or (1 / steps if ode or sampler == "flow" else 0.04)
    if not 0 < last < 1:
        fail(f"last {last} must lie between 0 and 1")
    times = np.append(np.linspace(0, 1 - last, steps), 1.0)
    rows = []
    for k, (t, dt) in enumerate(zip(times, np.diff(times))):
        w = 0.0 if ode else noise**2 * FORMS[sampler](max(t, dt / 2) if sampler in ("flow", "sbdm") else t)
        noisy = k < steps - 1
        drift = 0.0 if sampler == "flow" and not noisy else w
        std = math.sqrt(2 * w * dt) * noisy
        rows.append((t, t + dt, 1 - dt * drift / (1 - t), dt * (1 + drift * t / (1 - t)), std, 0.0))
    return rows


def edm2_rows(sampler, steps, noise, last, first, churn):
    """
    Karras et al. 2022, eq. 5 and algorithm 2: from sigma to the next, x + (x - D) / sigma (down - sigma) is linear in x
    and the denoised D. ancestral goes down further and comes back by noise; the last step ends at D.
    """
    if not 0 < last < first:
        fail(f"last {last} must lie between 0 and the first noise level, {first}")
    S_churn, S_min, S_max, S_noise = churn
    sigmas = np.linspace(first ** (1 / RHO), last ** (1 / RHO), steps) ** RHO
    rows = []
    for low, end in zip(sigmas, np.append(sigmas[1:], 0.0)):
        sigma = low * (1 + min(S_churn / steps, math.sqrt(2) - 1) * (S_min <= low <= S_max))
        eta = noise if sampler == "ancestral" else 0.0
        std = min(end, eta * math.sqrt(end**2 * (sigma**2 - end**2) / sigma**2))
        down = math.sqrt(end**2 - std**2)
        rows.append((sigma, end, down / sigma, 1 - down / sigma, std, S_noise * math.sqrt(sigma**2 - low**2)))
    return rows


def gaussian_step(plan, k, x, v):
    """(mean like x, std) of step k, an int or one index per image (B,)."""
    shape = (-1,) + (1,) * (x.dim() - 1)
    a, c, std = (row.to(x.device)[k].view(shape) for row in (plan.a, plan.c, plan.std))
    return a * x + c * v, std


def log_prob(x, mean, std):
    """log N(x; mean, std^2), summed over all dimensions but the first: (B, ...) => (B,), in nats."""
    z = (x - mean) / std
    constant = math.log(2 * math.pi) / 2 * x[0].numel()
    std = torch.as_tensor(std, dtype=x.dtype).expand(len(x), *[1] * (x.dim() - 1)).flatten()
    return -0.5 * z.square().flatten(1).sum(1) - x[0].numel() * std.log() - constant


class Guided(nn.Module):
    """
    A network under guidance, called like it: weak + scale (network - weak), on the first `channels` or on all (0); weak
    is the guide (Karras et al. 2024b) or, without one, the network's own null class. Attributes are the network's.
    bf16: its passes run under autocast to bfloat16; what is done with its output is in float32.
    """
    def __init__(self, model, scale=1.0, channels=0, guide=None, bf16=False):
        super().__init__()
        self.model, self.scale, self.channels, self.guide, self.bf16 = model, scale, channels, guide, bf16

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("model"), name)

    def forward(self, x, t, y):
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.bf16):
            return self.guided(x, t, y).float()

    def guided(self, x, t, y):
        if self.scale == 1.0:
            return self.model(x, t, y)
        if self.guide is None:
            null = torch.full_like(y, self.num_classes)
            main, weak = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
        else:
            main, weak = self.model(x, t, y), self.guide(x, t, y if self.guide.num_classes > 1 else torch.zeros_like(y))
        guided = weak + self.scale * (main - weak)
        if self.channels:
            guided = torch.cat([guided[:, :self.channels], main[:, self.channels:]], dim=1)
        return guided


def load_guided(c, device):
    """The network of --ckpt, with its --vae, under the guidance of --cfg, --cfg_channels, --guide and --guidance."""
    if c.guide and c.cfg != 1.0:
        fail("--cfg and --guide are two ways to guide; choose one")
    if "guidance" in c.given and not c.guide:
        fail("--guidance is the scale of --guide, which is missing; the scale of the null class is --cfg")
    model, guide = attach_vae(load(c.ckpt, device, c.heads, c.classes), c.vae), None
    if c.cfg != 1.0 and not model.null:
        fail(f"--cfg={c.cfg}: the model has no null class to guide with; leave it out, or name a network by --guide")
    if not 0 <= c.cfg_channels <= model.shape[0]:
        fail(f"cfg_channels {c.cfg_channels}: the model has {model.shape[0]} channels; 0 means all")
    if c.guide:
        guide = load(c.guide, device).requires_grad_(False)
        fits = (guide.family, guide.shape) == (model.family, model.shape)
        if not fits or guide.num_classes not in (1, model.num_classes):
            fail(f"guide {c.guide} is {guide.family} for {guide.shape} and {guide.num_classes} classes; "
                 f"needed are {model.family}, {model.shape} and {model.num_classes}, or none", code=1)
    return Guided(model, c.guidance if c.guide else c.cfg, c.cfg_channels, guide, c.get("bf16", False))


def image_seeds(seed, stream, indices):
    """
    One seed per image, hashed, so that neighbouring seeds or streams share no image but by chance: torch's generator
    uses 32 bits of it, which is one pair among 50,000 images in one run of four.
    """
    key = STREAMS[stream]
    return [int(np.random.SeedSequence((seed, key, int(i))).generate_state(1, np.uint64)[0]) for i in indices]


def official_labels(model, seeds):
    """EDM2's labels (N,): of each image's generator the noise is drawn first, then the label."""
    generators = [torch.Generator().manual_seed(s) for s in seeds]
    for g in generators:
        torch.randn(model.shape, generator=g)
    return torch.cat([torch.randint(model.num_classes, (1,), generator=g) for g in generators])


def trajectory(model, seeds, labels, plan):
    """
    Yields the states x_0 (noise) .. x_K (clean) of one batch, each (B, C, H, W), each with the network's output there
    (None for the last). All randomness of an image comes from its own generator, so the batch does not matter.
    """
    device = labels.device
    generators = [torch.Generator().manual_seed(s) for s in seeds]

    def randn():
        return torch.stack([torch.randn(model.shape, generator=g) for g in generators]).to(device)

    edm2 = model.family == "edm2"
    x = randn() * model.sigmas[1] if edm2 else randn()
    for k, (t, end) in enumerate(zip(plan.t.tolist(), plan.end.tolist())):
        if plan.kick[k] > 0:
            x = x + plan.kick[k].to(device) * randn()
        v = model(x, x.new_full((len(x),), t), labels).float()
        yield x, v
        if plan.sampler == "heun" and not (edm2 and end == 0):
            slope = (x - v) / t if edm2 else v                          # dx/dt of the ODE
            ahead = x + (end - t) * slope
            v = model(ahead, x.new_full((len(x),), end), labels).float()
            x = x + (end - t) / 2 * (slope + ((ahead - v) / end if edm2 else v))
            continue
        mean, std = gaussian_step(plan, k, x, v)
        x = mean + std * randn() if plan.std[k] > 0 else mean
    yield x, None


def decode(model, x, quantize=True):
    """
    What a model draws, (B, 3, H, W) in [-1, 1] or latents (B, 4, h, w) => uint8 images, as EDM2's and SiT's code:
    truncated, not rounded; or float32 from 0 to 255, not quantised. Exit code 2 if latents have no decoder.
    """
    if model.shape[0] == 3:
        images = (x * 127.5 + 128).clamp(0, 255)
    else:
        images = (model if hasattr(model, "vae") else attach_vae(model, "")).vae(x)
    return images.to(torch.uint8) if quantize else images


@torch.no_grad()
def generate(model, seeds, labels=None, sampler="", steps=10, cfg=1.0, batch_size=250, noise=1.0, last=0.0,
             churn=(0.0, 0.0, math.inf, 1.0)):
    """
    Yields uint8 batches (b, 3, H, W), one image per seed. labels (N,) int64; None: 0, 1, .. in turn. sampler '': the
    family's own. An image depends on its seed and label alone, up to float rounding.
    """
    model = model if cfg == 1.0 else Guided(model, cfg)
    device = next(model.parameters()).device
    labels = torch.arange(len(seeds)) % model.num_classes if labels is None else labels
    plan = schedule(sampler, steps, noise, last, model.sigmas, churn)
    for i in range(0, len(seeds), batch_size):
        for x, _ in trajectory(model, seeds[i:i + batch_size], labels[i:i + batch_size].to(device), plan):
            pass
        yield decode(model, x)


def self_trained(model, plans, count, seed, batch_size, lr=1e-4, passes=3, batch=250):
    """
    A copy of the network that was trained on its own images, `count` by each Schedule, the first of the training
    stream. What the network gets wrong the copy gets more wrong, so theta - s (theta_self - theta) gets it less wrong
    (Neon, arXiv 2510.03597). Each rank draws its share, and all train the same copy.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), next(model.parameters()).device
    drawn = []
    for i, plan in enumerate(plans):
        mine = []
        for part in torch.arange(i * count, (i + 1) * count)[rank::world].split(batch_size):
            seeds, labels = image_seeds(seed, "train", part), part.to(device) % model.num_classes
            with torch.no_grad():
                *_, (x, _) = trajectory(model, seeds, labels, plan)
            mine.append(x)
        drawn.append(gather(torch.cat(mine), count))
    images = torch.cat(drawn).cpu()
    trained = copy.deepcopy(getattr(model, "model", model))
    pretrain(trained, images, torch.arange(len(images)) % model.num_classes, seed, lr=lr, lr_matrices=3 * lr,
             lr_knee=math.inf, batch=batch, snapshot=lambda *_: None, total=passes * len(images))
    return trained


def watched(batches, total, **bar):
    """The same batches behind a progress bar; after the first, and what was done with it, a long run is announced."""
    began = time.time()
    for i, batch in enumerate(tqdm(batches, total=total, unit="batch", disable=dist.get_rank() > 0 or None, **bar)):
        yield batch
        if i == 0:
            announce(1, total, "batches", time.time() - began)


def save_grid(path, images, columns=20):
    """uint8 (N, 3, H, W) => one png, row by row, enlarged to be seen."""
    N, C, H, W = images.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    sheet = torch.zeros(rows * columns, C, H, W, dtype=torch.uint8)
    sheet[:N] = images.cpu()
    sheet = sheet.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    zoom = max(1, 48 // H)
    with whole(path) as f:
        grid = Image.fromarray(sheet.numpy())
        grid.resize((columns * W * zoom, rows * H * zoom), Image.Resampling.NEAREST).save(f, "png")


def ticks(low, high):
    """Three to seven round numbers from low to high."""
    step = 10.0 ** math.floor(math.log10((high - low) / 3))
    step *= max(k for k in (1, 2, 5) if k * step <= (high - low) / 3)
    return np.arange(math.ceil(low / step), math.floor(high / step) + 1) * step


def save_curves(path, curves, x_name, y_name):
    """{name: [(x, y), ..]} => one png: curves over axes that start at 0 or below."""
    width, height, edge = 720, 460, 50
    points = np.array([p for curve in curves.values() for p in curve], dtype=float)
    low, high = np.minimum(points.min(0), 0), np.maximum(points.max(0), points.min(0) + 1e-9)
    place = lambda x, y: (edge + (x - low[0]) / (high[0] - low[0]) * (width - 2 * edge),
                          height - edge - (y - low[1]) / (high[1] - low[1]) * (height - 2 * edge))
    sheet = Image.new("RGB", (width + 200, height), "white")
    pen = ImageDraw.Draw(sheet)
    for x in ticks(low[0], high[0]):
        pen.line((*place(x, low[1]), *place(x, high[1])), fill="gainsboro")
        pen.text((place(x, 0)[0], height - edge + 6), f"{x:g}", fill="black", anchor="mt")
    for y in ticks(low[1], high[1]):
        pen.line((*place(low[0], y), *place(high[0], y)), fill="gainsboro")
        pen.text((edge - 6, place(0, y)[1]), f"{y:g}", fill="black", anchor="rm")
    for i, (name, curve) in enumerate(curves.items()):
        color = tuple(round(255 * v) for v in colorsys.hsv_to_rgb(i / len(curves), 0.9, 0.75))
        pen.line([place(*p) for p in curve], fill=color, width=2)
        pen.text((width - edge + 14, edge + 18 * i), name, fill=color)
    pen.text((width // 2, height - 10), x_name, fill="black", anchor="ms")
    pen.text((edge, edge - 14), y_name, fill="black", anchor="ls")
    with whole(path) as f:
        sheet.save(f, "png")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        run(c)


def run(c):
    """Draw and save: the script, with its options c."""
    rank, world, device = setup()
    model = load_guided(c, device)
    noise, churn = c.noise or NOISE[model.family], (c.S_churn, c.S_min, c.S_max, c.S_noise)
    plan = schedule(c.sampler, c.steps, noise, c.last, model.sigmas, churn)
    if c.num < world or c.batch_size < 1:
        fail(f"num {c.num} must be at least {world} (one per rank), batch_size {c.batch_size} at least 1")
    if not -1 <= c.label < model.num_classes:
        fail(f"label {c.label}: the model has classes 0 to {model.num_classes - 1}"
             + (f" ({listed(model.classes)})" if model.classes else ""))
    writable(os.path.join(c.out, "grid.png"))
    if c.npz:
        writable(c.npz)
    indices = torch.arange(c.num)[rank::world]
    seeds = (c.seed + indices).tolist() if c.official else image_seeds(c.seed, "select", indices)
    labels = official_labels(model, seeds) if c.official else indices % model.num_classes
    labels = labels if c.label < 0 else torch.full_like(labels, c.label)

    began = time.time()
    batches = generate(model, seeds, labels, c.sampler, c.steps, 1.0, c.batch_size, noise, c.last, churn)
    images = gather(torch.cat(list(watched(batches, -(-len(indices) // c.batch_size)))), c.num)
    seconds = time.time() - began

    if rank == 0:
        grid = os.path.join(c.out, "grid.png")
        save_grid(grid, images[:400])
        if c.npz:
            with whole(c.npz) as f:
                np.savez(f, arr_0=images.permute(0, 2, 3, 1).cpu().numpy())
    of = "" if c.label < 0 else f" of class {model.classes[c.label] if model.classes else c.label}"
    print0(f"{c.num} images{of} ({plan.sampler}, {c.steps} steps, seed {c.seed}) in {seconds:.1f} s, "
           f"{c.num / seconds:.3g} images/s; {os.path.join(c.out, 'grid.png')}" + (f" and {c.npz}" if c.npz else ""))


if __name__ == "__main__":
    main()
