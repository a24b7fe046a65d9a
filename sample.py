"""
Draw images: from seeds and labels through a sampler to uint8.

Every step of every sampler but Heun's is one Gaussian, mean = a x + c v and std, with numbers a, c, std that depend on
the time alone: a table of them (`schedule`) is all that sampling, log-probabilities and the path KL need.

python sample.py                                                # 100 images of the tiny base as a grid
python sample.py --ckpt SiT-XL-2-256.pt --num 50000 --sampler sigma --steps 250 --npz samples.npz

Left out on purpose: adaptive solvers (dopri5 makes an image depend on its batch).
"""
import math
import os
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from models import STREAMS, attach_vae, configure, fail, gather, load, print0, setup, writable

# -----------------------------------------------------------------------------
ckpt = "" # .pt file or the name of an asset; empty: the tiny base
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
num = 100 # images to draw
sampler = "flow" # flow, sigma, linear, constant, sbdm, decreasing, increasing-decreasing, euler, heun
steps = 10 # steps of the sampler: network evaluations, two each for heun
noise = 1.2 # noise level: multiplies the form's diffusion by its square; 0 is the ODE
last = 0.0 # length of the noise-free last step; 0: the form's own (1/steps for flow, 0.04 for SiT's)
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels (3 in SiT's own code); 0: all
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


class Schedule(NamedTuple):
    """One row per step: x at t[k] becomes N(a[k] x + c[k] v, std[k]^2). Each (K,) float32; std 0: no noise."""
    sampler: str
    t: torch.Tensor
    a: torch.Tensor
    c: torch.Tensor
    std: torch.Tensor

    @property
    def noisy(self):                        # indices of the steps that are a policy
        return self.std.nonzero().flatten()

    @property
    def kappa(self):                        # KL of one step between two policies = kappa ||dv||^2, in nats
        return self.c**2 / (2 * self.std**2)


def schedule(sampler, steps, noise=1.0, last=0.0):
    """
    The table of a sampler. Times: linspace(0, 1 - last, steps), then 1, as in SiT; the last step has no noise.
    With s = (t v - x) / (1 - t) a step x + dt (v + w s) is linear in x and v. SiT's forms keep w s in the last step
    ("Mean"); flow drops it, so that its last step is the clean estimate x + (1 - t) v.
    w is floored where it is singular: flow and sbdm see max(t, dt/2).
    """
    if sampler not in FORMS and sampler not in ("euler", "heun"):
        fail(f"unknown sampler {sampler!r}; choose one of {', '.join(FORMS)}, euler, heun")
    if steps < 2:
        fail(f"steps {steps}: needed are at least 2")
    ode = sampler in ("euler", "heun")
    last = last or (1 / steps if ode or sampler == "flow" else 0.04)
    if not 0 < last < 1 or noise < 0:
        fail(f"last {last} must lie between 0 and 1, noise {noise} must not be negative")
    times = np.append(np.linspace(0, 1 - last, steps), 1.0)
    rows = []
    for k, (t, dt) in enumerate(zip(times, np.diff(times))):
        w = 0.0 if ode else noise**2 * FORMS[sampler](max(t, dt / 2) if sampler in ("flow", "sbdm") else t)
        noisy = k < steps - 1
        drift = 0.0 if sampler == "flow" and not noisy else w
        rows.append((t, 1 - dt * drift / (1 - t), dt * (1 + drift * t / (1 - t)), math.sqrt(2 * w * dt) * noisy))
    return Schedule(sampler, *torch.tensor(rows, dtype=torch.float32).T)


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


def velocity(model, x, t, y, cfg=1.0, cfg_channels=0):
    """Velocity (B, C, H, W) at times t (B,); guided: null + cfg (conditional - null), on the first channels or all."""
    if cfg == 1.0:
        return model(x, t, y)
    null = torch.full_like(y, model.num_classes)
    conditional, unconditional = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([y, null])).chunk(2)
    guided = unconditional + cfg * (conditional - unconditional)
    if cfg_channels:
        guided = torch.cat([guided[:, :cfg_channels], conditional[:, cfg_channels:]], dim=1)
    return guided


def image_seeds(seed, stream, indices):
    """
    One seed per image, hashed, so that neighbouring seeds or streams share no image but by chance: torch's generator
    uses 32 bits of it, which is one pair among 50,000 images in one run of four.
    """
    key = STREAMS[stream]
    return [int(np.random.SeedSequence((seed, key, int(i))).generate_state(1, np.uint64)[0]) for i in indices]


def trajectory(model, seeds, labels, plan, cfg=1.0, cfg_channels=0):
    """
    Yields the states x_0 (noise) .. x_K (clean) of one batch, each (B, C, H, W), each with the velocity at its start
    (None for the last). All randomness of an image comes from its own generator, so the batch does not matter.
    """
    device = labels.device
    generators = [torch.Generator().manual_seed(s) for s in seeds]

    def randn():
        return torch.stack([torch.randn(model.shape, generator=g) for g in generators]).to(device)

    x = randn()
    times = torch.cat([plan.t, plan.t.new_ones(1)]).tolist()
    for k, (t, t_next) in enumerate(zip(times, times[1:])):
        v = velocity(model, x, x.new_full((len(x),), t), labels, cfg, cfg_channels).float()
        yield x, v
        if plan.sampler == "heun":
            ahead = velocity(model, x + (t_next - t) * v, x.new_full((len(x),), t_next), labels, cfg, cfg_channels)
            x = x + (t_next - t) / 2 * (v + ahead)
            continue
        mean, std = gaussian_step(plan, k, x, v)
        x = mean + std * randn() if plan.std[k] > 0 else mean
    yield x, None


def decode(model, x):
    """
    What a model draws, (B, 3, H, W) in [-1, 1] or latents (B, 4, h, w) => uint8 images, as EDM2's and SiT's code:
    truncated, not rounded. Exit code 2 if latents have no decoder.
    """
    if model.shape[0] == 3:
        return (x * 127.5 + 128).clamp(0, 255).to(torch.uint8)
    return (model if hasattr(model, "vae") else attach_vae(model, "")).vae(x)


@torch.no_grad()
def generate(model, seeds, labels=None, sampler="flow", steps=10, cfg=1.0, batch_size=250, noise=1.0, last=0.0,
             cfg_channels=0):
    """
    Yields uint8 batches (b, 3, H, W), one image per seed. labels (N,) int64; None: 0, 1, .. in turn.
    An image depends on its seed and label alone, up to float rounding.
    """
    device = next(model.parameters()).device
    labels = torch.arange(len(seeds)) % model.num_classes if labels is None else labels
    plan = schedule(sampler, steps, noise, last)
    for i in range(0, len(seeds), batch_size):
        for x, _ in trajectory(model, seeds[i:i + batch_size], labels[i:i + batch_size].to(device), plan, cfg,
                               cfg_channels):
            pass
        yield decode(model, x)


def save_grid(path, images, columns=20):
    """uint8 (N, 3, H, W) => one png, row by row, enlarged to be seen."""
    N, C, H, W = images.shape
    columns = min(columns, N)
    rows = -(-N // columns)
    sheet = torch.zeros(rows * columns, C, H, W, dtype=torch.uint8)
    sheet[:N] = images.cpu()
    sheet = sheet.view(rows, columns, C, H, W).permute(0, 3, 1, 4, 2).reshape(rows * H, columns * W, C)
    zoom = max(1, 48 // H)
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    Image.fromarray(sheet.numpy()).resize((columns * W * zoom, rows * H * zoom), Image.Resampling.NEAREST).save(path)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    rank, world, device = setup()
    schedule(c.sampler, c.steps, c.noise, c.last)           # a wrong sampler ends the script before anything is loaded
    model = attach_vae(load(c.ckpt, device), c.vae)
    if c.num < world or c.batch_size < 1:
        fail(f"num {c.num} must be at least {world} (one per rank), batch_size {c.batch_size} at least 1")
    if not -1 <= c.label < model.num_classes:
        fail(f"label {c.label}: the model has classes 0 to {model.num_classes - 1}")
    writable(os.path.join(c.out, "grid.png"))
    if c.npz:
        writable(c.npz)
    indices = torch.arange(c.num)[rank::world]
    labels = indices % model.num_classes if c.label < 0 else torch.full_like(indices, c.label)

    began = time.time()
    batches = generate(model, image_seeds(c.seed, "select", indices), labels, c.sampler, c.steps, c.cfg, c.batch_size,
                       c.noise, c.last, c.cfg_channels)
    bar = tqdm(batches, total=-(-len(indices) // c.batch_size), unit="batch", disable=rank > 0 or None)
    images = gather(torch.cat(list(bar)), c.num)
    seconds = time.time() - began

    if rank == 0:
        grid = os.path.join(c.out, "grid.png")
        save_grid(grid, images[:400])
        if c.npz:
            np.savez(c.npz, arr_0=images.permute(0, 2, 3, 1).cpu().numpy())
    print0(f"{c.num} images ({c.sampler}, {c.steps} steps, seed {c.seed}) in {seconds:.1f} s, "
           f"{c.num / seconds:.0f} images/s; {os.path.join(c.out, 'grid.png')}" + (f" and {c.npz}" if c.npz else ""))


if __name__ == "__main__":
    main()
