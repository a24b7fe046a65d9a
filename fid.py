"""
Judge generated images against real ones: FID, KID, precision / recall, density / coverage.

python fid.py --num 50000                                       # the tiny base: draw and judge
python fid.py --ckpt out/train_rl/ckpt.pt --num 10000
python fid.py --images FOLDER --real FOLDER                     # a folder, a zip or an .npz of images
python fid.py --real FOLDER --stats real.npz                    # write statistics, to be used as --real real.npz

Left out on purpose: Inception score and sFID. Behind torchrun write `torchrun ... -- fid.py --num 50000`.
"""
import math
import os
import sys
import time
import zipfile
import zlib
from json import dumps
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

from models import (ASSETS, FeatureNet, check_classes, configure, fail, gather, image_batches, list_images, print0,
                    read_checkpoint, setup, tiny_images, writable)
from reward import Moments, covariance_root, distance_to_root, influence, standard_error
from sample import NOISE, generate, image_seeds, load_guided, schedule

# -----------------------------------------------------------------------------
ckpt = "" # model to draw from: .pt or .pkl file, its URL or the name of an asset; empty: the tiny base
images = "" # judge these instead: folder or zip of images, or .npz with arr_0 (N, H, W, 3) uint8
num = 0 # images to judge; 0: 50,000 drawn, or all of --images
real = "tiny" # real images: "tiny", a folder, a zip, or an .npz of their statistics (mu, sigma)
features = "tiny2" # tiny, tiny2, pixels, factors
num_real = 50000 # real images of the tiny world that are compared with; a folder is used whole
num_prdc = 5000 # KID and the neighbour metrics use the first so many images
sampler = "" # see sample.py; empty: flow for SiT, heun for EDM2
steps = 10 # of the sampler
noise = 0.0 # noise level of the sampler; 0: 1.2 for SiT, 0.7 for EDM2
last = 0.0 # its noise-free last step, see sample.py
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels; 0: all
guide = "" # autoguidance: a weaker network in place of the null class
guidance = 1.4 # its scale
seed = 0 # of the drawn images
stream = "report" # report; select: other images, to choose a sampler with
batch_size = 250 # images in one pass, per rank
stats = "" # write the statistics of --real to this .npz and stop
json = "" # also write the numbers to this file
# -----------------------------------------------------------------------------


# ---- Feature networks: uint8 (N, 3, H, W) => float32 (N, dim) -----------------------------------------------------

class Pixels:
    """Raw pixels in [-1, 1]: a view that no network learned."""
    name, size, dim = "pixels", 16, 768

    def __call__(self, images):
        return images.float().flatten(1) / 127.5 - 1


class MeasuredFactors:
    """
    What can be measured in an image without a network: amount of ink, centre (x, y), spread, brightness and hue (as
    cos, sin), each roughly of unit variance in the tiny world.
    """
    name, size, dim = "factors", 16, 7

    def __call__(self, images):
        x = images.float() / 255
        ink = x.amax(1)                                                 # (N, H, W)
        total = ink.sum((1, 2)) + 1e-3
        place = torch.arange(ink.shape[-1], device=x.device).float()
        cx, cy = ((ink.sum(d) * place).sum(1) / total for d in (1, 2))
        far = (place - cx[:, None]).square()[:, None, :] + (place - cy[:, None]).square()[:, :, None]
        spread = ((ink * far).sum((1, 2)) / total).sqrt()
        brightness = ink.flatten(1).topk(10, dim=1).values.mean(1)
        red, green, blue = (x * ink[:, None]).sum((2, 3)).T / total
        hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
        columns = [(total - 32) / 16, (cx - 7.5) / 1.2, (cy - 7.5) / 1.2, (spread - 3.5) / 0.5,
                   (brightness - 0.72) / 0.15, 1.4 * hue.cos(), 1.4 * hue.sin()]
        return torch.stack(columns, dim=1)


def feature_net(name, path=None, device="cpu"):
    """A callable uint8 images (N, 3, H, W) => float32 features (N, dim), with .name, .dim and .size (in pixels)."""
    if name == "pixels":
        return Pixels()
    if name == "factors":
        return MeasuredFactors()
    if name in ("tiny", "tiny2"):
        parts = read_checkpoint(path or os.path.join(ASSETS, f"features-{name}.pt"))
        net = FeatureNet(name)
        net.load_state_dict({k: v.float() for k, v in parts["model"].items()})
        return net.requires_grad_(False).eval().to(device)
    fail(f"unknown features {name!r}; choose tiny, tiny2, pixels or factors")


# ---- Real data ------------------------------------------------------------------------------------------------------

class Summary(NamedTuple):
    """What a set of images leaves behind: moments of all, features of the first few."""
    num: int
    mu: torch.Tensor                        # (d,) float64
    cov: torch.Tensor                       # (d, d) float64
    features: Optional[torch.Tensor]        # (min(num, num_prdc), d) float32; None if only statistics are known


def real_batches(real, size, role, num):
    """
    This rank's share (image i of rank i % world) of real images, as uint8 batches: num of the tiny world, at most num
    of a folder (0: all). What rewards and what judges share no image: "train" is for the reward, "report" for judging,
    "floor" for real against real, "select" for choosing a base or a sampler. Of a folder "report" has the odd images,
    "train" and "floor" the even ones, "all" and "select" all.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if real == "tiny":
        mine = range(rank, num, world)
        for k in range(0, len(mine), 1000):
            part = mine[k:k + 1000]
            yield tiny_images(len(part), 0, "report" if role == "all" else role, part.start, world)[0]
    else:
        offset, stride = {"all": (0, 1), "select": (0, 1), "train": (0, 2), "floor": (0, 2), "report": (1, 2)}[role]
        limit = len(range(rank, num, world)) if num else 0
        yield from image_batches(real, size, offset + stride * rank, stride * world, limit)


@torch.no_grad()
def summarize(batches, nets, num_prdc, device="cpu"):
    """
    {net.name: Summary} of batches of uint8 images, in one pass: float64 sums of all features, and the first num_prdc
    features themselves. Every rank brings its share, image i of rank i % world, and gets the whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    moments = {net.name: Moments(net.dim, device) for net in nets}
    kept = {net.name: [torch.empty(0, net.dim, device=device)] for net in nets}
    for batch in batches:
        for net in nets:
            f = net(batch.to(device))
            if sum(map(len, kept[net.name])) * world < num_prdc:
                kept[net.name].append(f)
            moments[net.name].add(f)
    summaries = {}
    for name, m in moments.items():
        weight = torch.tensor([m.weight, m.squares], dtype=torch.float64, device=device)
        for part in (weight, m.sum, m.outer):
            dist.all_reduce(part)
        m.weight, m.squares = weight.tolist()
        if m.weight < 2:
            fail(f"{int(m.weight)} images have no covariance; needed are at least 2, better {10 * len(m.sum)}", code=1)
        first = min(int(m.weight), num_prdc)
        features = torch.cat(kept[name])[:len(range(rank, first, world))]
        summaries[name] = Summary(int(m.weight), *m.gaussian(), gather(features, first))
    return summaries


def real_summaries(real, nets, role, num_prdc, num, device="cpu"):
    """{net.name: Summary} of real data: the tiny world, a folder, a zip, or an .npz of statistics (mu, sigma)."""
    if real.endswith(".npz"):
        return {net.name: read_statistics(real, net, device) for net in nets}
    size = next((net.size for net in nets if net.size), None)
    return summarize(real_batches(real, size, role, num), nets, num_prdc, device)


def read_statistics(path, net, device="cpu"):
    """Summary from an .npz with mu (d,) and sigma (d, d), as pytorch-fid, ADM and write_statistics leave it."""
    if not os.path.isfile(path):
        fail(f"no statistics {path!r}; needed: an .npz with mu and sigma")
    try:
        with np.load(path, allow_pickle=False) as f:
            stored = {k: f[k] for k in ("mu", "sigma", "features", "num") if k in f.files}
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        fail(f"{path} is not a readable .npz ({str(e)[:80]})", code=1)
    if "mu" not in stored or "sigma" not in stored:
        fail(f"{path} holds no statistics: mu and sigma are needed", code=1)
    mu, cov = torch.from_numpy(stored["mu"]).double(), torch.from_numpy(stored["sigma"]).double()
    name = str(stored.get("features", net.name))
    if name != net.name or mu.shape != (net.dim,) or cov.shape != (net.dim, net.dim):
        fail(f"{path} describes {len(mu)}-d features of {name}, asked for is {net.name} ({net.dim}-d)", code=1)
    if not (mu.isfinite().all() and cov.isfinite().all()):
        fail(f"{path} holds NaN or infinite values", code=1)
    return Summary(int(stored.get("num", 0)), mu.to(device), cov.to(device), None)


def write_statistics(path, summary, net):
    """mu, sigma and where they come from, atomically."""
    with open(path + ".part", "wb") as f:
        np.savez(f, mu=summary.mu.cpu().numpy(), sigma=summary.cov.cpu().numpy(), num=summary.num, features=net.name)
    os.replace(path + ".part", path)


# ---- Metrics on features -------------------------------------------------------------------------------------------

def kid(real, fake):
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3 on all pairs; Binkowski et al. 2018. (N, d), (M, d) => float."""
    real, fake = real.double(), fake.double()
    N, M, d = len(real), len(fake), real.shape[1]

    def total(a, b):
        return sum((rows @ b.T / d + 1).pow(3).sum() for rows in a.split(1000))

    own_real = total(real, real) - (real.square().sum(1) / d + 1).pow(3).sum()
    own_fake = total(fake, fake) - (fake.square().sum(1) / d + 1).pow(3).sum()
    return (own_real / (N * (N - 1)) + own_fake / (M * (M - 1)) - 2 * total(real, fake) / (N * M)).item()


def neighbour_radii(x, ks):
    """[(N,) distance to the k-th other point of the same set, for k in ks]."""
    nearest = torch.cat([torch.cdist(rows, x).topk(max(ks) + 1, largest=False).values for rows in x.split(1000)])
    return [nearest[:, k] for k in ks]


def prdc(real, fake, k_precision=3, k_density=5):
    """
    Precision and recall (k 3; a point on the edge counts; Kynkaanniemi et al. 2019), density and coverage (k 5; it does
    not; Naeem et al. 2020). real (N, d), fake (M, d) => dict of floats.
    """
    real_3, real_5 = neighbour_radii(real, (k_precision, k_density))
    fake_3, = neighbour_radii(fake, (k_precision,))
    inside, within, covered, recalled = 0, 0, torch.zeros(len(real), dtype=bool), torch.zeros(len(real), dtype=bool)
    covered, recalled = covered.to(real.device), recalled.to(real.device)
    for rows, radius in zip(fake.split(1000), fake_3.split(1000)):
        distance = torch.cdist(rows, real)                              # (m, N)
        inside += (distance <= real_3).any(1).sum().item()
        recalled |= (distance <= radius[:, None]).any(0)
        near = distance < real_5
        within += near.sum().item()
        covered |= near.any(0)
    return dict(precision=inside / len(fake), recall=recalled.double().mean().item(),
                density=within / (k_density * len(fake)), coverage=covered.double().mean().item())


def histogram_distance(real, fake, bins=20):
    """Total variation between histograms, mean over columns: (N, d), (M, d) => 0 .. 1. Bins hold equal real mass."""
    cuts = torch.quantile(real, torch.linspace(0, 1, bins + 1)[1:-1].to(real), dim=0)       # (bins - 1, d)

    def shares(x):
        columns = zip(x.T.contiguous(), cuts.T.contiguous())
        places = torch.stack([torch.bucketize(column, edges) for column, edges in columns])  # (d, N)
        return torch.stack([(places == b).double().mean(1) for b in range(bins)])           # (bins, d)

    return (shares(real) - shares(fake)).abs().sum(0).mean().item() / 2


def distance(fake, real):
    """Frechet distance of two Summaries."""
    return distance_to_root(fake.mu, fake.cov, real.mu, covariance_root(real.cov)).item()


def judge(fake, real, labels=None):
    """
    All metrics of one Summary against another: fid, fid_se (its standard error; labels are those of fake.features if
    they were drawn in equal numbers), kid, precision, recall, density, coverage; also psi, the first variation of the
    kept features. What needs real features is None if only statistics are known.
    """
    row = dict(num=fake.num, fid=distance(fake, real), fid_se=None, psi=None)
    try:
        row["psi"] = influence(fake.features, fake.mu, fake.cov, real.mu, covariance_root(real.cov))
        row["fid_se"] = standard_error(row["psi"], labels) * math.sqrt(len(row["psi"]) / fake.num)
    except ValueError:                      # singular covariances, like that of pixels that are always black
        pass
    row.update(kid=None, precision=None, recall=None, density=None, coverage=None)
    if real.features is not None and min(len(fake.features), len(real.features)) > 5:
        row.update(kid=kid(real.features, fake.features), **prdc(real.features, fake.features))
    return row


# ---- A model against real data -------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(model, nets, real, num, sampler="", steps=10, noise=1.2, last=0.0, seed=0, stream="report",
             num_prdc=5000, batch_size=250, keep=0):
    """
    Draw num images and judge them in every net against real {net.name: Summary}. The images are split over the ranks;
    image i depends on (seed, stream, i) and its label i % classes alone.
    Returns {net.name: row}, a row being judge()'s with features, sampler, steps and seed; "images": the first `keep`.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    for net in nets:
        if net.size and model.shape[-1] != net.size:
            fail(f"{net.name} features are for images of {net.size} pixels, the model draws {model.shape[-1]}")
    indices = torch.arange(num)[rank::world]
    labels = indices % model.num_classes
    sampler = schedule(sampler, steps, noise, last, model.sigmas).sampler
    batches = generate(model, image_seeds(seed, stream, indices), labels, sampler, steps, 1.0, batch_size, noise, last)
    bar = tqdm(batches, total=-(-len(indices) // batch_size), desc=f"drawing {num} ({sampler})", unit="batch",
               disable=rank > 0 or None, leave=False)
    shown = []

    def keeping():
        for batch in bar:
            if sum(map(len, shown)) < keep:
                shown.append(batch)
            yield batch

    rows = {}
    for name, fake in summarize(keeping(), nets, num_prdc, device).items():
        row = judge(fake, real[name], torch.arange(len(fake.features), device=device) % model.num_classes)
        rows[name] = dict(features=name, sampler=sampler, steps=steps, seed=seed, **row, kept=fake.features)
    if keep:
        rows["images"] = gather(torch.cat(shown)[:len(range(rank, keep, world))], keep)
    return rows


def npz_images(path, num, size):
    """uint8 batches of this rank's share of arr_0 (N, H, W, 3) in an .npz."""
    rank, world = dist.get_rank(), dist.get_world_size()
    try:
        with np.load(path, allow_pickle=False) as f:
            array = f["arr_0"]
    except (OSError, ValueError, EOFError, LookupError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error) as e:
        fail(f"{path} holds no images: arr_0 is needed, uint8 (N, H, W, 3) ({str(e)[:80]})", code=1)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[1:] != (size, size, 3):
        fail(f"{path}: arr_0 is {array.dtype} {array.shape}; needed is uint8 (N, {size}, {size}, 3)", code=1)
    if len(array) < max(num, 2 * world):
        fail(f"{path} holds {len(array)} images, {max(num, 2 * world)} are needed; FID depends on the number", code=1)
    return torch.from_numpy(array[:num or None][rank::world]).permute(0, 3, 1, 2).split(250)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    rank, world, device = setup()
    if c.num < 0 or 0 < c.num < 2 * world or min(c.num_prdc, c.num_real) < 10 or c.batch_size < 1:
        fail(f"num {c.num}, num_prdc {c.num_prdc}, num_real {c.num_real}, batch_size {c.batch_size}: "
             f"needed are 0 or at least {2 * world}, at least 10, 10 and 1")
    if c.stream not in ("report", "select"):
        fail(f"unknown stream {c.stream!r}; choose report or select")
    for path in filter(None, (c.json, c.stats)):
        writable(path)
    net = feature_net(c.features, device=device)
    model = None if c.images else load_guided(c, device)
    if model:
        noise = c.noise or NOISE[model.family]
        schedule(c.sampler, c.steps, noise, c.last, model.sigmas)       # better to know before the real images are read
        check_classes(c.real, model.num_classes)
    role = "select" if c.stream == "select" else "all"
    real_set = real_summaries(c.real, [net], role, c.num_prdc, c.num_real if c.real == "tiny" else 0, device)
    if c.stats:
        if rank == 0:
            write_statistics(c.stats, real_set[net.name], net)
        print0(f"wrote {c.stats}: {real_set[net.name].num} images of {c.real}, {net.name} features; use it as --real")
        return

    began = time.time()
    if c.images:
        if c.images.endswith(".npz"):
            batches = npz_images(c.images, c.num, net.size)
        else:
            found = len(list_images(c.images)[0])
            if found < c.num:
                fail(f"{c.images} holds {found} images, {c.num} are asked for; FID depends on the number", code=1)
            batches = image_batches(c.images, net.size, rank, world, len(range(rank, c.num, world)) if c.num else 0)
        fake = summarize(batches, [net], c.num_prdc, device)[net.name]
        row = dict(features=net.name, sampler=None, steps=None, seed=None, **judge(fake, real_set[net.name]))
    else:
        row = evaluate(model, [net], real_set, c.num or 50_000, c.sampler, c.steps, noise, c.last,
                       c.seed, c.stream, c.num_prdc, c.batch_size)[net.name]
    keys = ("fid", "fid_se", "kid", "precision", "recall", "density", "coverage", "num", "features", "sampler", "steps",
            "seed")
    if c.json and rank == 0:
        with open(c.json, "w") as f:
            f.write(dumps({k: row[k] for k in keys}) + "\n")
    show = lambda key, form: "-" if row[key] is None else format(row[key], form)
    if c.num and c.num <= net.dim:
        print0(f"note: {c.num} images cannot fill {net.dim} dimensions; compare only with FIDs of the same num")
    source = c.images or f"{row['sampler']}, {c.steps} steps, seed {c.seed}"
    print0(f"FID {show('fid', '.3f')} +- {show('fid_se', '.3f')}  ({row['num']} images, {source}; {net.name} features, "
           f"real: {c.real}; {time.time() - began:.0f} s)\n"
           f"KID {show('kid', '.5f')}  precision {show('precision', '.3f')}  recall {show('recall', '.3f')}  "
           f"density {show('density', '.3f')}  coverage {show('coverage', '.3f')}  "
           f"(these on the first {min(row['num'], c.num_prdc)})")


if __name__ == "__main__":
    main()
