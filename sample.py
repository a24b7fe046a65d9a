"""
Draw images: from seeds and labels through a sampler to uint8.

Every step of every sampler but Heun's is one Gaussian, mean = a x + c v and std, with numbers a, c, std that depend on
the time alone: a table of them (`schedule`) is all that sampling, log-probabilities and the path KL need. v is what the
network says: the velocity for SiT, whose time runs from 0 to 1, the denoised image for EDM2, whose time is sigma.

python sample.py                                                # 100 images of the tiny base as a grid
python sample.py --ckpt SiT-XL-2-256.pt --num 50000 --sampler sigma --steps 250 --npz samples.npz
python sample.py --ckpt edm2-img512-xs.pkl --steps 32 --guide edm2-img512-xxs-uncond.pkl --cfg 1.4

Left out on purpose: adaptive solvers (dopri5 makes an image depend on its batch).
"""
import math
import os
import sys
import time
from collections import namedtuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
from PIL import Image, ImageDraw, ImageOps
from tqdm import tqdm

from models import LATENTS, Stop, attach_vae, configure, fail, gather, listed, load, print0, setup, whole, writable

# -----------------------------------------------------------------------------
ckpt = "" # .pt, .pkl or .safetensors file, or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
num = 100 # images to draw
sampler = "" # SiT: flow (or any other of FORMS below), euler, heun; EDM2: heun, euler, ancestral; empty: the first
steps = 10 # steps of the sampler: network evaluations, two each for heun
noise = -1.0 # of SDE and ancestral samplers (see schedule), 0: none; -1: the family's own, 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # guidance scale: guide + cfg (main - guide), the guide being the null class or --guide; 1: none
guide = "" # autoguidance: a weaker network in place of the null class, named like ckpt
bf16 = False # the network in 16 bits, SiT's bfloat16 and EDM2's float16, all else in float32
compile = False # compile the block that a SiT repeats: seconds to begin with, faster passes on a GPU
label = -1 # draw this class only; -1: all in turn
seed = 0 # image i depends on (seed, i) and its label alone
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

# What an image is made for is part of its seed, so that training, selection and reporting never share an image.
STREAMS = {"train": 0, "select": 1, "report": 2, "floor": 3, "features": 4, "features2": 5, "update": 6}
SAMPLERS = {"sit": (*FORMS, "euler", "heun"), "edm2": ("heun", "euler", "ancestral")}    # the first is the default
NOISE = {"sit": 0.5, "edm2": 0.7}
HALF = {"sit": torch.bfloat16, "edm2": torch.float16}   # EDM2 bounds its activations, as its official network for this
LAST = 0.04                             # length of the noise-free last step of SiT's own forms; of flow and ODE 1/steps
RHO = 7                                 # of EDM2's noise levels
SIGMA_MEAN, SIGMA_STD = -0.4, 1.2       # of ln sigma in EDM2's training


class Schedule(namedtuple("Schedule", "sampler t end a c std kick")):
    """
    Per step, from time t[k] to end[k]: EDM2's churn adds noise of std kick[k], then x becomes N(a[k] x + c[k] v,
    std[k]^2), without noise if std is 0. sampler: its name; the others (K,) float32.
    """
    @property
    def noisy(self):                        # indices of the steps that are a policy
        return self.std.nonzero().flatten()

    @property
    def kappa(self):                        # KL of one step between two policies = kappa ||dv||^2, in nats
        return self.c**2 / (2 * self.std**2)


def schedule(sampler, steps, noise=None, sigmas=None, last=0.0, churn=(0.0, 0.0, math.inf, 1.0)):
    """
    The table of a sampler ('': the family's first) of SiT or, given the noise levels that it starts its last and its
    first step from, of EDM2. noise (None: the family's own): the diffusion coefficient of SiT's forms is multiplied by
    its square, ancestral's std by itself. last: length of SiT's last step (0: the usual one). churn: (S_churn, S_min,
    S_max, S_noise) of EDM2's heun. Exit code 2 if these do not go together.
    """
    family = "edm2" if sigmas else "sit"
    sampler = sampler or SAMPLERS[family][0]
    noise = NOISE[family] if noise is None else noise
    if sampler not in SAMPLERS[family]:
        fail(f"unknown sampler {sampler!r}, no sampler of this network; choose one of {', '.join(SAMPLERS[family])}")
    if steps < 2 or noise < 0:
        fail(f"steps {steps}, noise {noise}: needed are at least 2 steps, and noise that is not negative")
    rows = edm2_rows(sampler, steps, noise, sigmas, churn) if sigmas else sit_rows(sampler, steps, noise, last)
    return Schedule(sampler, *torch.tensor(rows, dtype=torch.float32).T)


def sit_rows(sampler, steps, noise, last):
    """
    Times: linspace(0, 1 - last, steps), then 1, as in SiT; the last step has no noise.
    With s = (t v - x) / (1 - t) a step x + dt (v + w s) is linear in x and v. SiT's forms keep w s in the last step
    ("Mean"); flow drops it, so that its last step is the clean estimate x + (1 - t) v.
    w is floored where it is singular: flow and sbdm see max(t, dt/2).
    """
    ode = sampler in ("euler", "heun")
    last = last or (1 / steps if ode or sampler == "flow" else LAST)
    times = np.append(np.linspace(0, 1 - last, steps), 1.0)
    rows = []
    for k, (t, dt) in enumerate(zip(times, np.diff(times))):
        w = 0.0 if ode else noise**2 * FORMS[sampler](max(t, dt / 2) if sampler in ("flow", "sbdm") else t)
        noisy = k < steps - 1
        drift = 0.0 if sampler == "flow" and not noisy else w
        std = math.sqrt(2 * w * dt) * noisy
        rows.append((t, t + dt, 1 - dt * drift / (1 - t), dt * (1 + drift * t / (1 - t)), std, 0.0))
    return rows


def edm2_rows(sampler, steps, noise, sigmas, churn):
    """
    Karras et al. 2022, eq. 5 and algorithm 2: from sigma to the next, x + (x - D) / sigma (down - sigma) is linear in x
    and the denoised D. ancestral goes down further and comes back by noise; the last step ends at D.
    """
    S_churn, S_min, S_max, S_noise = churn
    low, high = (sigma ** (1 / RHO) for sigma in sigmas)
    levels = np.linspace(high, low, steps) ** RHO
    rows = []
    for level, end in zip(levels, np.append(levels[1:], 0.0)):
        churned = sampler == "heun" and S_min <= level <= S_max
        sigma = level * (1 + min(S_churn / steps, math.sqrt(2) - 1) * churned)
        eta = noise if sampler == "ancestral" else 0.0
        std = min(end, eta * math.sqrt(end**2 * (sigma**2 - end**2) / sigma**2))
        down = math.sqrt(end**2 - std**2)
        rows.append((sigma, end, down / sigma, 1 - down / sigma, std, S_noise * math.sqrt(sigma**2 - level**2)))
    return rows


def in_words(plan, noise):
    """Sampler, steps and noise for a printed line."""
    return f"{plan.sampler}, {len(plan.t)} steps" + (f", noise {noise:g}" if len(plan.noisy) else "")


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


def renoise(model, x1, noise, uniform):
    """
    What a network is trained on: clean x1 (B, C, H, W) and standard normal noise like it, mixed at times drawn by
    uniform (B,) in [0, 1). Returns x_t, t (B,), target u of the network, and the weight (B,) of |network - u|^2 that
    makes it the error of an output of unit variance.
    SiT: u = x1 - x0. EDM2: u = x1, and as D = c_skip x + c_out F, |dF|^2 = |dD|^2 / c_out^2: weight 1 / c_out^2.
    """
    if model.family == "sit":
        t = uniform.view(-1, 1, 1, 1)
        return t * x1 + (1 - t) * noise, uniform, x1 - noise, torch.ones_like(uniform)
    sigma = (SIGMA_MEAN + SIGMA_STD * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))).exp()
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    return x1 + sigma.view(-1, 1, 1, 1) * noise, sigma, x1, weight


class Guided(nn.Module):
    """
    A network under guidance, called like it, and with its attributes: weak + scale (network - weak), where weak is the
    guide (Karras et al. 2024b) or, without one, the network's own null class. Of latents as many channels are guided as
    the family's own code guides. bf16: its passes run under autocast to the family's HALF, the rest in float32.
    """
    def __init__(self, model, scale=1.0, guide=None, bf16=False):
        super().__init__()
        self.model, self.scale, self.guide, self.bf16 = model, scale, guide, bf16

    def __getattr__(self, name):            # of what is not set here
        return super().__getattr__(name) if name in ("model", "guide") else getattr(self.model, name)

    def forward(self, x, t, y):
        with torch.autocast(x.device.type, HALF[self.family], enabled=self.bf16):
            if self.scale == 1.0:
                return self.model(x, t, y).float()
            if self.guide is None:
                null = torch.full_like(y, self.num_classes)
                main, weak = self.model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).float().chunk(2)
            else:
                weak = self.guide(x, t, y if self.guide.num_classes > 1 else torch.zeros_like(y)).float()
                main = self.model(x, t, y).float()
        channels = LATENTS[self.family]["guided"] if x.shape[1] == 4 else x.shape[1]
        guided = weak[:, :channels] + self.scale * (main - weak)[:, :channels]
        return torch.cat([guided, main[:, channels:]], dim=1)


def load_guided(c, device):
    """The network of --ckpt, with its --vae, under the guidance of --cfg and --guide; fills in c.noise."""
    if c.guide and c.cfg == 1.0:
        fail("--guide needs the scale of guidance as well, for example --cfg=1.4; 1 is none")
    model, guide = attach_vae(load(c.ckpt, device, c.heads, c.classes), c.vae), None
    if c.guide:
        guide = load(c.guide, device).requires_grad_(False)
        fits = (guide.family, guide.shape) == (model.family, model.shape)
        if not fits or guide.num_classes not in (1, model.num_classes):
            fail(f"guide {c.guide} is {guide.family} for {guide.shape} and {guide.num_classes} classes; "
                 f"needed are {model.family}, {model.shape} and {model.num_classes}, or none", code=1)
    elif c.cfg != 1.0 and not model.null:
        fail(f"--cfg={c.cfg}: the model has no null class to guide with; leave it out, or name a network by --guide")
    if c.compile and model.family != "sit":
        fail(f"--compile is for a SiT, whose blocks are alike; {c.ckpt} is {model.family}")
    c["noise"] = NOISE[model.family] if c.noise == -1 else c.noise
    return compiled(Guided(model, c.cfg, guide, c.bf16), c.compile)


def compiled(model, wanted=True):
    """The model; if wanted, with its blocks compiled, in one graph for all. A copy is not, until it comes here too."""
    for block in model.model.blocks if wanted else []:
        block.compile()
    return model


def image_seeds(seed, stream, indices):
    """
    One seed per image, hashed, so that neighbouring seeds or streams share no image but by chance: torch's generator
    uses 32 bits of it, so that any two of 50,000 images coincide with a chance of about 1 in 4.
    """
    key = STREAMS[stream]
    return [int(np.random.SeedSequence((seed, key, int(i))).generate_state(1, np.uint64)[0]) for i in indices]


def noise_of(seeds, count, shape):
    """Standard normal noise (B, count, *shape): of each seed the first `count` draws of its own generator."""
    noise, generator = torch.empty(len(seeds), count, *shape), torch.Generator()
    for seed, draws in zip(seeds, noise):
        generator.manual_seed(seed)
        # torch draws 16 numbers at a time: draws of a multiple of that are the same one by one and all at once.
        for part in draws if math.prod(shape) % 16 else [draws]:
            part.normal_(generator=generator)
    return noise


def trajectory(model, seeds, labels, plan):
    """
    Yields the states x_0 (noise) .. x_K (clean) of one batch, each (B, C, H, W), each with the network's output there
    (None for the last). All randomness of an image comes from its own generator, so the batch does not matter.
    """
    table = list(zip(*(row.tolist() for row in plan[1:])))              # numbers: no copies to a GPU in the loop
    count = 1 + sum((std > 0) + (kick > 0) for *_, std, kick in table)
    noise = iter(noise_of(seeds, count, model.shape).to(labels.device).unbind(1))
    edm2 = model.family == "edm2"
    x = next(noise) * model.sigmas[1] if edm2 else next(noise)
    for t, end, a, c, std, kick in table:
        x = x + kick * next(noise) if kick > 0 else x
        v = model(x, x.new_full((len(x),), t), labels).float()
        yield x, v
        if plan.sampler == "heun" and not (edm2 and end == 0):
            slope = (x - v) / t if edm2 else v                          # dx/dt of the ODE
            ahead = x + (end - t) * slope
            v = model(ahead, x.new_full((len(x),), end), labels).float()
            x = x + (end - t) / 2 * (slope + ((ahead - v) / end if edm2 else v))
            continue
        x = a * x + c * v
        x = x + std * next(noise) if std > 0 else x
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
def generate(model, seeds, labels=None, sampler="", steps=10, cfg=1.0, batch_size=250, noise=None, decoded=True):
    """
    Yields uint8 batches (b, 3, H, W), one image per seed. labels (N,) int64; None: 0, 1, .. in turn. sampler, noise: as
    in schedule; decoded False: what decode() takes. An image depends on its seed and label alone, up to rounding.
    """
    model = model if cfg == 1.0 else Guided(model, cfg)
    device = next(model.parameters()).device
    labels = torch.arange(len(seeds)) % model.num_classes if labels is None else labels
    plan = schedule(sampler, steps, noise, model.sigmas)
    for i in range(0, len(seeds), batch_size):
        for x, _ in trajectory(model, seeds[i:i + batch_size], labels[i:i + batch_size].to(device), plan):
            pass
        yield decode(model, x) if decoded else x


def watched(batches, total, **bar):
    """The same batches behind a progress bar."""
    return tqdm(batches, total=total, unit="batch", disable=dist.get_rank() > 0 or None, **bar)


def save_grid(path, images):
    """uint8 (N, 3, H, W) => one png, row by row, 20 images or some 2000 pixels wide, enlarged to be seen."""
    N, C, H, W = images.shape
    columns = min(20, N, max(4, 2000 // W))
    rows = -(-N // columns)
    sheet = torch.zeros(rows * columns, C, H, W, dtype=torch.uint8)
    sheet[:N] = images.cpu()
    sheet = sheet.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    with whole(path) as f:
        ImageOps.scale(Image.fromarray(sheet.numpy()), max(1, 48 // H), Image.Resampling.NEAREST).save(f, "png")


def save_curves(path, curves, x_name, y_name):
    """{name: [(x, y), ..]} => one png: a line each, over axes that begin at 0 or below, with six numbers on each."""
    points = np.array([p for curve in curves.values() for p in curve], dtype=float)
    low, high = np.minimum(points.min(0), 0), np.maximum(points.max(0), points.min(0) + 1e-9)
    sheet = Image.new("RGB", (920, 460), "white")
    pen = ImageDraw.Draw(sheet)

    def place(p):                           # pixels; the axes are 600 wide and 340 high
        x, y = (np.array(p) - low) / (high - low)
        return 60 + 600 * x, 400 - 340 * y

    for x, y in np.linspace(low, high, 6):
        pen.line((*place((x, low[1])), *place((x, high[1]))), fill="gainsboro")
        pen.line((*place((low[0], y)), *place((high[0], y))), fill="gainsboro")
        pen.text(place((x, low[1])), f"\n{x:.4g}", fill="black", anchor="ma")
        pen.text(place((low[0], y)), f"{y:.3g}  ", fill="black", anchor="rm")
    for i, (name, curve) in enumerate(curves.items()):
        color = f"hsv({360 * i // len(curves)}, 90%, 75%)"
        pen.line([place(p) for p in curve], fill=color, width=2)
        pen.text((674, 60 + 18 * i), name, fill=color)
    pen.text((360, 450), x_name, fill="black", anchor="ms")
    pen.text((60, 46), y_name, fill="black", anchor="ls")
    with whole(path) as f:
        sheet.save(f, "png")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        rank, world, device = setup()
        model = load_guided(c, device)
        plan = schedule(c.sampler, c.steps, c.noise, model.sigmas)
        if c.num < world or c.batch_size < 1:
            fail(f"num {c.num} must be at least {world} (one per rank), batch_size {c.batch_size} at least 1")
        if not -1 <= c.label < model.num_classes:
            names = f" ({listed(model.classes)})" if model.classes else ""
            fail(f"label {c.label}: the model has classes 0 to {model.num_classes - 1}{names}")
        grid = os.path.join(c.out, "grid.png")
        for path in filter(None, (grid, c.npz)):
            writable(path)

        began = time.time()
        indices = torch.arange(c.num)[rank::world]
        labels = indices % model.num_classes if c.label < 0 else torch.full_like(indices, c.label)
        seeds = image_seeds(c.seed, "select", indices)
        batches = generate(model, seeds, labels, c.sampler, c.steps, 1.0, c.batch_size, c.noise)
        batches = watched(batches, -(-len(indices) // c.batch_size))
        images = gather(torch.cat([batch.cpu() for batch in batches]), c.num)
        seconds = time.time() - began
        if rank == 0:
            save_grid(grid, images[:400])
            if c.npz:
                with whole(c.npz) as f:
                    np.savez(f, arr_0=images.permute(0, 2, 3, 1).cpu().numpy())
        what = "images" if c.label < 0 else f"images of class {model.classes[c.label] if model.classes else c.label}"
        print0(f"{c.num} {what} ({in_words(plan, c.noise)}, seed {c.seed}) in {seconds:.1f} s, "
               f"{c.num / seconds:.3g} images/s; {grid}" + (f" and {c.npz}" if c.npz else ""))


if __name__ == "__main__":
    main()
