"""
Rivals of merge_rl.py: other ways to merge checkpoints, at the same number of drawn images.

python lab/rivals.py                                            # rl and all of them, on the tiny SiT's snapshots
python lab/rivals.py neon greedy --ckpts a.pt b.pt              # these; options are those of merge_rl.py
"""
import copy
import os
import re
import sys

import numpy as np
import torch
import torch.distributed as dist

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import merge_rl
from models import configure, fail, gather, normalize_filters, print0, save
from reward import Moments, covariance_root, distance_to_root
from sample import renoise

SNAPSHOT = re.compile(r"-(\d+)-(\d+\.\d+)\.\w+$")      # images and EMA width in edm2-img512-xs-0134217-0.050.pkl


def main(argv=None):
    argv = sys.argv[1:] if argv is None else list(argv)
    names = []
    while argv and not argv[0].startswith("-"):
        names.append(argv.pop(0))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        fail(f"unknown method {unknown[0]!r}; choose {', '.join(METHODS)}")
    paths = merge_rl.find_checkpoints(configure(vars(merge_rl), argv).ckpts)
    snapshots = all(map(SNAPSHOT.search, paths))
    names = names or [name for name in METHODS if name != "ema" or snapshots]
    if "ema" in names and not snapshots:
        fail(f"ema needs snapshots named NAME-IMAGES-STD.pt, not {', '.join(paths)}")
    merge_rl.main(["--out=out/rivals", *argv], {name: METHODS[name] for name in names})


# ---- Each gets a Search and c.budget images, and returns coefficients (G, K) ----------------------------------------

def scores(search, ws, count, first=0):
    """FD (m,) of every candidate from `count` images, the same noise and labels in every call."""
    if count < 2:
        fail(f"budget {search.c.budget} leaves {len(ws)} candidates {count} images each; needed are at least 2")
    real, root = search.real, covariance_root(search.real.cov)
    moments = [Moments(search.nets.dim, f.device).add(f) for f in search.draw(ws, count, first)]
    fds = [distance_to_root(*m.gaussian(), real.mu, root).item() for m in moments]
    for row, fd in zip(search.log[-len(ws):], fds):
        row["fd"] = fd
    return fds


def best(search, ws, count, first=0):
    """The candidate of the lowest FD."""
    return ws[int(np.argmin(scores(search, ws, count, first)))]


def greedy(search, c, alone):
    """Greedy soup (Wortsman et al. 2022): checkpoints join, best first, if the mean of the members gets better."""
    count = c.budget // (2 * len(alone))
    fds = scores(search, alone, count)
    first, *others = np.argsort(fds).tolist()
    members, best = [first], fds[first]
    for k in others:
        fd = scores(search, alone[members + [k]].mean(0)[None], count)[0]
        if fd < best:
            members, best = members + [k], fd
    return alone[members].mean(0)


def random(search, c, alone):
    """The best of random coefficients around the last checkpoint, at three scales, with 500 images for each."""
    count, rng = min(500, c.budget), torch.Generator().manual_seed(c.seed)
    e = torch.randn(c.budget // count, *alone[-1].shape, generator=rng, dtype=torch.float64)
    scale = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)[torch.arange(len(e)) % 3].view(-1, 1, 1)
    return best(search, alone[-1] + scale * (e - e.mean(-1, keepdim=True)), count)


def ema(search, c, alone):
    """The best of 16 EMA lengths, made afterwards from the snapshots (Karras et al. 2024, section 3.2)."""
    ends, stds = np.array([[float(x) for x in SNAPSHOT.search(path).groups()] for path in search.basis.paths]).T
    ws = [posthoc_coefficients(ends, stds, ends.max(), std) for std in np.geomspace(0.02, 0.25, 16)]
    return best(search, torch.from_numpy(np.stack(ws))[:, None].repeat(1, alone.shape[1], 1), c.budget // 16)


def ema_exponent(std):
    """gamma of the power-function average of relative width std: std^2 (g+2)^2 (g+3) = g+1 (Karras et al. 2024)."""
    return np.roots([1, 7, 16 - std**-2, 12 - std**-2]).real.max()


def posthoc_coefficients(ends, stds, end, std):
    """
    Coefficients (K,) of power-function averages that ended at `ends` with relative widths `stds`, whose mixture is
    nearest to the average that ends at `end` with width `std`. float64, sum 1; Karras et al. 2024, algorithm 3.
    """
    gammas = np.array([ema_exponent(s) for s in stds])

    def inner(ta, a, tb, b):
        return (a + 1) * (b + 1) * (ta / tb) ** np.where(ta < tb, b, -a) / ((a + b + 1) * np.maximum(ta, tb))

    A = inner(ends[:, None], gammas[:, None], ends, gammas)
    B = inner(ends, gammas, float(end), ema_exponent(std))
    X = np.linalg.solve(A, B)
    return X / X.sum()


def neon(search, c, alone, scales=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0)):
    """
    One step away from self-training (Neon, arXiv 2510.03597): a copy of the last checkpoint is trained on its images,
    half of the budget, joins the basis, and theta - s (theta_self - theta) is tried for several s.
    """
    basis, half, path = search.basis, c.budget // 2, os.path.join(search.folder, "self.pt")
    kept = search.stored(path)
    if kept is None:
        images = gather(torch.cat(list(search.images_of(alone[-1], torch.arange(half), decoded=False))), half)
        trained = self_trained(basis.model, images, c.seed, c.batch_size)
        kept = dict(ema=trained.state_dict())
        if dist.get_rank() == 0:
            save(path, trained, key=search.key)
    basis.states.append(kept["ema"])
    basis.paths.append(path)
    p, q = (torch.cat([state[name].flatten().double().cpu() for name in basis.parameters])
            for state in basis.states[-2:])
    print0(f"neon: the copy is {(p - q).norm() / p.norm():.2%} of the weights' norm away, the unit of its scales")
    search.drawn += half
    search.bar.update(half)
    w = torch.nn.functional.pad(alone[-1], (0, 1))
    ws = torch.stack([w + s * (w - w.roll(1, 1)) for s in scales])
    return best(search, ws, half // len(scales), first=half)         # not on the noise that the copy was trained on


def self_trained(model, images, seed, batch_size, lr=5e-5, passes=3, batch=250):
    """
    A copy of the network that was trained on images (N, C, H, W) of its own, image i of class i % classes; what it gets
    wrong the copy gets more wrong. Every rank trains on its share of each batch, batch_size images in one pass.
    """
    rank, world, device = dist.get_rank(), dist.get_world_size(), images.device
    rng, trained = torch.Generator().manual_seed(seed), copy.deepcopy(getattr(model, "model", model))
    params = [p for p in trained.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(params, lr, betas=(0.9, 0.99))
    for _ in range(-(-passes * len(images) // batch)):
        k = torch.randint(len(images), (batch,), generator=rng)
        noise, z = torch.randn(batch, *model.shape, generator=rng), torch.randn(batch, generator=rng)
        uniform = z.sigmoid() if model.family == "sit" else torch.special.ndtr(z)               # as in pre-training
        dropped = torch.rand(batch, generator=rng) < (0.1 if model.null else 0)                 # for guidance
        labels = (k % model.num_classes).masked_fill(dropped, model.num_classes)
        optimizer.zero_grad()
        for part in torch.arange(batch)[rank::world].split(batch_size):
            x, t, u, weight = renoise(model, images[k[part]], noise[part].to(device), uniform[part].to(device))
            errors = (trained(x, t, labels[part].to(device)) - u).square().mean((1, 2, 3)) * weight
            (errors.sum() / batch).backward()
        for p in params:
            dist.all_reduce(p.grad)
        optimizer.step()
        normalize_filters(trained)
    return trained


METHODS = {
    "rl": merge_rl.rl,
    "single": lambda search, c, alone: best(search, alone, c.budget // len(alone)),      # the best single checkpoint
    "uniform": lambda search, c, alone: alone.mean(0),              # of all (Wortsman et al. 2022); draws nothing
    "greedy": greedy, "ema": ema, "random": random, "neon": neon,
}


if __name__ == "__main__":
    main()
