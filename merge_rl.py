"""
Merge stored checkpoints of one model: RL over the coefficients, whose reward is an improvement of FID.

Merged weights are sum_k w_k theta_k with sum_k w_k = 1 in each block, negatives allowed. Candidates are drawn with
the sampler that is used in the end, on common noise and labels; no SDE anywhere (arXiv 2607.02291, section on merging).

Left out on purpose: a softmax over coefficients (the best ones are often negative) and spherical interpolation.

python merge_rl.py                                              # snapshots of the tiny SiT
python merge_rl.py --ckpts a.pt b.pt                            # yours; globs work
python merge_rl.py --method=all                                 # every method at the same number of drawn images
torchrun --nproc_per_node=8 merge_rl.py --ckpts 'edm2-img512-xs-*.pkl'
"""
import glob
import math
import os
import re
import shutil
import sys
import time
from json import dumps

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image, ImageDraw
from tqdm import tqdm

from fid import WEIGHTS, Nets, choose_networks, evaluate, feature_net, notes_on, real_summaries, stored_moments
from models import (ASSETS, Config, Stop, announce, check_classes, configure, ema_exponent, fail, holds_run,
                    image_size, move_aside, of_the_run_before, print0, read_checkpoint, save, setup, share_cores,
                    stored_parts, whole, writable, write)
from reward import Moments, ReferenceSet, Stream, SumSet, covariance_root, distance_to_root, long_enough, standard_error
from sample import NOISE, generate, image_seeds, load_guided, save_curves, save_grid, schedule, self_trained

# -----------------------------------------------------------------------------
ckpts = [] # checkpoints to merge, at least two, oldest first; globs; empty: the tiny SiT's snapshots
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
out = "out/merge_rl" # folder for merged.pt, merge.json, coefficients.png, before.png, after.png; line.png
json = "" # also write the numbers to this file
seed = 0 # of the search; evaluation has its own stream
resume = False # go on with the search in OUT at the candidate it was stopped at
# the search
method = "rl" # rl, single, uniform, greedy, ema, random, neon, line; all: every one that applies, with a table
budget = 24000 # images each method may draw to search
per = "block" # coefficients for each block, for each stage, or for the whole model (all: the paper's)
policy = "mean" # mean: the coefficients themselves are learned; net: the output of an MLP is (the paper's)
credit = "image" # image: mean first variation of a candidate's images; subset: exact gain of swapping them in
images = 128 # per candidate
pairs = 4 # antithetic pairs of candidates per iteration
search_std = 0.2 # of the coefficients tried around the mean; falls to half
lr = 0.2 # of the mean; falls to 0
reference = 1000 # images of the reference set at the start
moments = "" # start from these statistics of generated images (fid.py --images .. --stats) instead (credit=image)
memory = 0.5 # weight of the past in the streaming moments, per iteration; raised if need be (credit=image)
# how images are drawn and judged
sampler = "" # see sample.py; empty: euler for SiT, heun for EDM2
steps = 0 # of the sampler; 0: 10, or 5 of heun, which evaluates twice
noise = 0.0 # its noise level, if it has noise; 0: 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels (3 in SiT's own code); 0: all
guide = "" # weaker network to guide with instead (autoguidance)
guidance = 1.4 # scale of the guide
batch_size = 250 # images in one pass, per rank
features = [] # feature networks of the search; of several the geometric mean of FD counts; empty: see judges
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
judges = [] # feature nets of the table, the first held out; empty: tiny ones at 16 px, else inception (features too)
num = 10000 # fresh images per row of the table; 0: no evaluation
num_real = 50000 # real images of the tiny world, each for search and judging; of a folder each gets half
num_prdc = 3000 # the neighbour metrics use so many of the images, a fixed random subset
# -----------------------------------------------------------------------------

LEFT = ("merged.pt", "merge.json", "coefficients.png", "before.png", "after.png", "line.png", "cache")
KEYS = ("features", "sampler", "steps", "num", "fid", "fid_se", "kid", "precision", "recall", "density", "coverage")


# ---- Stored checkpoints ---------------------------------------------------------------------------------------------

def find_checkpoints(patterns):
    """Paths of the checkpoints, globs expanded; the tiny SiT's snapshots if there is no pattern."""
    patterns = patterns or [os.path.join(ASSETS, "sit-tiny-*.pt")]
    paths = []
    numbers = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
    for pattern in patterns:
        # A file of that very name, then what the pattern matches: step9000 before step10000.
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern), key=numbers)
        if not found and glob.has_magic(pattern):
            fail(f"no file matches {pattern}")
        paths += found or [pattern]
    if len(paths) < 2:
        fail(f"merging needs at least 2 checkpoints, got {len(paths)}: python merge_rl.py --ckpts a.pt b.pt")
    return paths


def group_of(name, per):
    """The group of coefficients that a parameter belongs to, from its official name."""
    if per == "all":
        return "all"
    parts = name.split(".")
    if parts[0] == "unet" and len(parts) > 2:                           # unet.enc.16x16_block0.conv_res0.weight
        block = ".".join(parts[:3])
        return block.split("_")[0] if per == "stage" else block
    return ".".join(parts[:2]) if per == "block" and parts[0] == "blocks" else parts[0]


class Basis:
    """K checkpoints of one architecture, each kept in its file's dtype, and one model that holds their mixtures."""
    def __init__(self, paths, per, model):
        self.paths, self.model, self.states, self.copies = paths, model, [], []
        shapes = {name: p.shape for name, p in model.model.named_parameters() if p.requires_grad}
        fixed = {name: b.cpu() for name, b in model.model.named_buffers()}
        for path in paths:
            state = stored_parts(path)["ema"]
            found = {name: state[name].shape for name in shapes if name in state}
            odd = [name for name in shapes if found.get(name) != shapes[name]]
            if odd:
                fail(f"{path} and {paths[0]} cannot be merged: {odd[0]} is {tuple(found.get(odd[0], ()))}, "
                     f"not {tuple(shapes[odd[0]])}", code=1)
            odd = [name for name in fixed if not torch.allclose(state[name].float(), fixed[name], rtol=2e-3, atol=2e-3)]
            if odd:                         # up to the rounding of a copy in float16
                fail(f"{path} and {paths[0]} cannot be merged: they are of two training runs, {odd[0]} differs", code=1)
            broken = [name for name in shapes if not state[name].isfinite().all()]
            if broken:
                fail(f"{path} holds NaN or infinite values in {broken[0]}; leave it out", code=1)
            self.states.append(state)
        groups = [group_of(name, per) for name in shapes]
        self.groups = list(dict.fromkeys(groups))
        self.rows = dict(zip(shapes, map(self.groups.index, groups)))

    @torch.no_grad()
    def merge(self, w):
        """
        The guided model with parameters sum_k w[g, k] theta_k, w (G, K) with rows of sum 1, in float32. Written as the
        checkpoint of the largest coefficient plus multiples of differences to it: equal checkpoints stay what they are,
        bit for bit. Buffers and the position table are those of the first checkpoint.
        """
        parameters = dict(self.model.model.named_parameters())
        for name, g in self.rows.items():
            p, row = parameters[name], w[g]
            main = row.argmax().item()
            centre = self.states[main][name].to(p.device, torch.float32)
            total = centre.clone()
            for k in row.nonzero().flatten().tolist():
                if k != main:
                    total += row[k].item() * (self.states[k][name].to(p.device, torch.float32) - centre)
            p.copy_(total)
        return self.model


# ---- Drawing candidates ---------------------------------------------------------------------------------------------

class Search:
    """
    Draws what candidates make and counts the images. Every candidate's features are kept in OUT/cache, in the order in
    which they were drawn: a resumed search repeats its arithmetic on them, and draws only what is not there yet.
    """
    def __init__(self, c, basis, nets, real, folder, bar):
        self.c, self.basis, self.nets, self.folder, self.bar = c, basis, nets, folder, bar
        self.real = [real[net.name] for net in nets.nets]
        self.device, self.roots = self.real[0].mu.device, [covariance_root(known.cov) for known in self.real]
        self.drawn, self.log, self.announced = 0, [], False
        self.key = {name: c[name] for name in c if name not in ("resume", "json", "out", "num", "judges", "num_prdc")}

    @torch.no_grad()
    def features_of(self, indices):
        model, c = self.basis.model, self.c
        labels = indices % model.num_classes
        batches = generate(model, image_seeds(c.seed, "train", indices), labels, c.sampler, c.steps, 1.0, c.batch_size,
                           c.noise)
        return torch.cat([self.nets(x.to(self.device)) for x in batches])

    def draw(self, ws, count, first):
        """Features (len(ws), count, d) of candidates ws (m, G, K), all on images first .. of the training stream."""
        rank, world, c = dist.get_rank(), dist.get_world_size(), self.c
        indices, found = torch.arange(first, first + count), []
        for i in range(0, len(ws), world):
            began = time.time()
            part = ws[i:i + world]
            mine = torch.zeros(count, self.nets.dim, device=self.device)
            if rank < len(part):
                path = os.path.join(self.folder, f"{self.drawn + rank * count:07d}.pt")
                if c.resume and os.path.exists(path):
                    kept = read_checkpoint(path)
                    # On another number of ranks real moments, and so the rewards, are rounded differently.
                    if kept.get("key") != self.key or (kept["w"] - part[rank]).abs().max() > 1e-6:
                        fail(f"{self.folder} belongs to another search; repeat its options, or leave out --resume", 1)
                    mine = kept["features"].to(self.device)
                else:
                    self.basis.merge(part[rank])
                    mine = self.features_of(indices)
                    write(path, dict(key=self.key, w=part[rank], features=mine.cpu()))
            features = [torch.empty_like(mine) for _ in range(world)]
            dist.all_gather(features, mine)
            features = torch.stack(features)[:len(part)]
            if not self.announced:
                announce(len(part) * count, c.budget - self.drawn, "images", time.time() - began)
                self.announced = True
            self.drawn += len(part) * count
            self.bar.update(len(part) * count)
            found.append(features)
        return torch.cat(found)

    def scores(self, ws, count):
        """FD (m,) of every candidate from `count` images, the same noise and labels in every call."""
        fds = []
        for features in self.draw(ws, count, 0):
            parts = zip(features.split(self.nets.dims, dim=1), self.real, self.roots)
            each = [distance_to_root(*Moments(f.shape[1], f.device).add(f).gaussian(), known.mu, root).item()
                    for f, known, root in parts]
            fds.append(math.prod(each) ** (1 / len(each)))
        for w, fd in zip(ws, fds):
            self.record(w, images=count, fd=fd)
        return fds

    def record(self, w, **row):
        self.log.append(dict(candidate=len(self.log), drawn=self.drawn, w=w.tolist(), **row))


def one_hot(k, G, K):
    return torch.eye(K, dtype=torch.float64)[k].expand(G, K).clone()


# ---- The policy -----------------------------------------------------------------------------------------------------

class PolicyNet(torch.nn.Module):
    """The paper's policy: a 3-layer MLP with a learned input gives the mean of the coefficients."""
    def __init__(self, rng, G, K, width=64):
        super().__init__()
        sizes = [width, width, width, G * K]
        self.input = torch.nn.Parameter(torch.randn(width, generator=rng, dtype=torch.float64))
        self.weights = torch.nn.ParameterList(
            torch.randn(b, a, generator=rng, dtype=torch.float64) / math.sqrt(a) * (1 if b == width else 0.1)
            for a, b in zip(sizes, sizes[1:]))
        self.shape = G, K

    def forward(self):
        h = self.input
        for i, w in enumerate(self.weights):
            h = w @ (h if i == 0 else h.tanh())
        h = h.view(self.shape)
        return h - h.mean(1, keepdim=True)


def evolve(reward_of, start, iters, pairs, std, lr, rng, policy="mean", momentum=0.5):
    """
    Natural evolution strategy on coefficients (G, K) whose rows sum to 1. reward_of(it, mean, ws (2 pairs, G, K)) =>
    rewards (2 pairs,); the second half of ws mirrors the first. With directions e of row sum 0 the step is
    g = sum dR e / (2 sum |dR|); std falls to half, lr to 0. Returns the mean of the iterates of the second half.
    """
    mean, velocity, iterates = start.clone(), torch.zeros_like(start), []
    if policy == "net":
        net = PolicyNet(rng, *start.shape)
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1 * lr)
        with torch.no_grad():
            shift = start - net()
    for it in range(iters):
        left = 1 - it / iters
        e = torch.randn(pairs, *start.shape, generator=rng, dtype=torch.float64)
        e = e - e.mean(-1, keepdim=True)
        step = std * (1 + left) / 2 * e
        rewards = reward_of(it, mean, torch.cat([mean + step, mean - step])).double().cpu()
        change = rewards[:pairs] - rewards[pairs:]
        g = (change.view(-1, 1, 1) * e).sum(0) / (2 * change.abs().sum()).clamp(min=1e-300)
        if policy == "net":
            optimizer.param_groups[0]["lr"] = 0.1 * lr * left
            optimizer.zero_grad()
            (-(g * net()).sum()).backward()
            optimizer.step()
            mean = (net() + shift).detach()
        else:
            velocity = momentum * velocity + g
            mean = mean + lr * left * velocity
        iterates.append(mean)
    return torch.stack(iterates[len(iterates) // 2:]).mean(0)


# ---- Methods: each gets a Search and c.budget images, and returns coefficients (G, K) -------------------------------

def rl(search, c, G, K):
    """RL over the coefficients with the distribution-wise reward."""
    start = one_hot(K - 1, G, K)
    classes, d = search.basis.model.num_classes, max(search.nets.dims)
    first = None if c.moments else search.draw(start[None], c.reference, 0)[0]
    per_iteration = (2 * c.pairs + (c.credit == "subset")) * c.images
    iters, memory = (c.budget - search.drawn) // per_iteration, long_enough(c.memory, per_iteration, d)
    if memory > c.memory and c.credit == "image":
        print0(f"note: memory is raised to {memory:.3f}, for an effective number of {5 * d} images in {d} dimensions")
    if c.moments:
        known = search.real[0]
        reference = Stream(torch.empty(0, d, device=search.device), known.mu, known.cov, memory)
        reference.set(stored_moments(c.moments, search.nets.nets[0], search.device))
    else:
        parts = [Stream(f, known.mu, known.cov, memory) if c.credit == "image" else
                 ReferenceSet(f, known.mu, known.cov)
                 for f, known in zip(first.split(search.nets.dims, dim=1), search.real)]
        reference = SumSet(parts, search.nets.dims) if len(parts) > 1 else parts[0]

    def by_image(it, mean, ws):
        f = search.draw(ws, c.images, c.reference + it * c.images)
        reference.push(f.flatten(0, 1))
        rewards = -reference.influence(f.flatten(0, 1)).view(len(ws), c.images).mean(1)
        for w, reward in zip(ws, rewards.tolist()):
            search.record(w, images=c.images, reward=reward)
        return rewards

    def by_swap(it, mean, ws):
        """Each candidate's images in the places of the oldest members; then the mean's own images take them."""
        f = search.draw(torch.cat([ws, mean[None]]), c.images, c.reference + it * c.images)
        slots = (it * c.images + torch.arange(c.images, device=f.device)) % c.reference
        rewards = reference.swap_gain(slots, f[:-1])
        reference.push(f[-1])
        for w, reward in zip(ws, rewards.tolist()):
            search.record(w, images=c.images, reward=reward)
        return rewards

    if not c.moments and c.reference % classes or c.images % classes and c.credit == "subset":
        print0(f"note: reference {c.reference} and images {c.images} are not multiples of the {classes} classes")
    rng = torch.Generator().manual_seed(c.seed)
    reward_of = by_image if c.credit == "image" else by_swap
    return evolve(reward_of, start, iters, c.pairs, c.search_std, c.lr, rng, c.policy)


def single(search, c, G, K):
    """The best single checkpoint."""
    fds = search.scores(torch.stack([one_hot(k, G, K) for k in range(K)]), c.budget // K)
    return one_hot(int(np.argmin(fds)), G, K)


def uniform(search, c, G, K):
    """The mean of all checkpoints (Wortsman et al. 2022); draws nothing."""
    return torch.full((G, K), 1 / K, dtype=torch.float64)


def greedy(search, c, G, K):
    """Greedy soup (Wortsman et al. 2022): checkpoints join, best first, if the mean of the members gets better."""
    count = c.budget // (2 * K)
    fds = search.scores(torch.stack([one_hot(k, G, K) for k in range(K)]), count)
    order = np.argsort(fds)
    members, best = [order[0]], fds[order[0]]
    for k in order[1:]:
        trial = torch.stack([one_hot(m, G, K) for m in members + [k]]).mean(0)
        fd = search.scores(trial[None], count)[0]
        if fd < best:
            members, best = members + [k], fd
    return torch.stack([one_hot(m, G, K) for m in members]).mean(0)


def snapshot_name(path):
    """Match with the groups images and EMA width of a name like edm2-img512-xs-0134217-0.050.pkl; None for others."""
    return re.search(r"-(\d+)-(\d+\.\d+)\.\w+$", path)


def ema(search, c, G, K, candidates=16):
    """The best EMA length of a sweep, made afterwards from the snapshots (Karras et al. 2024, section 3.2)."""
    ends, stds = np.array([[float(x) for x in snapshot_name(path).groups()] for path in search.basis.paths]).T
    lengths = np.geomspace(0.02, 0.25, candidates)
    ws = [torch.from_numpy(posthoc_coefficients(ends, stds, ends.max(), std)).expand(G, K) for std in lengths]
    fds = search.scores(torch.stack(ws), c.budget // candidates)
    return ws[int(np.argmin(fds))].clone()


def random(search, c, G, K, count=500):
    """The best of random coefficients around the last checkpoint, at three scales."""
    rng = torch.Generator().manual_seed(c.seed)
    m = c.budget // count
    e = torch.randn(m, G, K, generator=rng, dtype=torch.float64)
    scale = torch.tensor([0.1, 0.3, 1.0], dtype=torch.float64)[torch.arange(m) % 3].view(-1, 1, 1)
    ws = one_hot(K - 1, G, K) + scale * (e - e.mean(-1, keepdim=True))
    return ws[int(np.argmin(search.scores(ws, count)))]


def posthoc_coefficients(ends, stds, end, std):
    """
    Coefficients (K,) of power-function averages that ended at `ends` with relative widths `stds`, whose mixture is
    nearest to the average that ends at `end` with width `std`. float64, sum 1; Karras et al. 2024, algorithm 3.
    """
    gammas = np.array([ema_exponent(s) for s in stds])

    def inner(ta, a, tb, b):
        ratio = ta / tb
        return (a + 1) * (b + 1) * ratio ** np.where(ta < tb, b, -a) / ((a + b + 1) * np.maximum(ta, tb))

    A = inner(ends[:, None], gammas[:, None], ends, gammas)
    B = inner(ends, gammas, float(end), ema_exponent(std))
    X = np.linalg.solve(A, B)
    return X / X.sum()


def neon(search, c, G, K, scales=(0.5, 1.0, 2.0, 4.0, 8.0, 16.0)):
    """
    One step away from self-training (arXiv 2510.03597): the last checkpoint is trained on its own images, the copy
    joins the basis, and theta - s (theta_self - theta) is tried for several s. Half of the images are for training.
    """
    basis, half = search.basis, c.budget // 2
    path = os.path.join(search.folder, "self.pt")
    kept = read_checkpoint(path) if c.resume and os.path.exists(path) else {}
    same = torch.tensor(int(kept.get("key") == search.key))
    dist.all_reduce(same, dist.ReduceOp.MIN)                            # nodes may see a shared folder at other times
    if same:
        copied = kept["ema"]
    else:
        plan = schedule(c.sampler, c.steps, c.noise, 0.0, basis.model.sigmas)
        trained = self_trained(basis.merge(one_hot(K - 1, G, K)), [plan], half, c.seed, c.batch_size)
        copied = trained.state_dict()
        if dist.get_rank() == 0:
            save(path, trained, key=search.key)
    basis.states.append(copied)
    basis.copies.append(path)
    search.drawn += half
    search.bar.update(half)
    ws = torch.stack([(1 + s) * one_hot(K - 1, G, K + 1) - s * one_hot(K, G, K + 1) for s in scales])
    return ws[int(np.argmin(search.scores(ws, half // len(scales))))]


def line(search, c, G, K, candidates=13):
    """The best point on the line through two checkpoints (a base and a tuned one, say), beyond both ends too."""
    ws = [(1 - a) * one_hot(0, G, 2) + a * one_hot(1, G, 2) for a in np.linspace(-0.5, 2.5, candidates)]
    return ws[int(np.argmin(search.scores(torch.stack(ws), c.budget // candidates)))]


METHODS = {f.__name__: f for f in (rl, single, uniform, greedy, ema, random, neon, line)}


def obstacle(name, paths):
    """Why a method cannot be used on these checkpoints; empty if it can."""
    odd = [path for path in paths if not snapshot_name(path)]
    if name == "ema" and odd:
        return f"an EMA length can only be made from snapshots named NAME-IMAGES-STD.pt, and {odd[0]} is not"
    if name == "line" and len(paths) != 2:
        return f"a line goes through 2 checkpoints, not {len(paths)}"
    return ""


# ---- Judging --------------------------------------------------------------------------------------------------------

def judge_all(basis, results, judges, real, c):
    """Rows {name: {net: row}} of the last checkpoint and every method's result, on the same fresh noise and labels."""
    G, K = len(basis.groups), len(basis.paths)
    rows = {}
    for name, w in {"last": one_hot(K - 1, G, K), **results}.items():
        rows[name] = evaluate(basis.merge(w), judges, real, c.num, c.sampler, c.steps, c.noise, seed=c.seed,
                              num_prdc=c.num_prdc, batch_size=c.batch_size, keep=min(c.num, 200))
    return rows


def difference(a, b, labels):
    """FD of row a minus that of row b, which were drawn on the same noise, and its standard error (None if unknown)."""
    if a["psi"] is None or b["psi"] is None:
        return a["fid"] - b["fid"], None
    paired = standard_error(a["psi"] - b["psi"], labels) * math.sqrt(len(a["psi"]) / a["num"])
    return a["fid"] - b["fid"], paired


def table(rows, best, drawn, judges, num_classes):
    """Lines for people; differences are to the row `best`, +- is one standard error."""
    first, *others = [net.name for net in judges]
    with_error = lambda value, error: f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")
    lines = [f"{'method':>8s} {'drawn':>6s} {'FD ' + first:>17s} {'minus ' + best:>17s} {'recall':>6s} {'coverage':>8s}"
             + "".join(f" {'FD ' + name:>17s} {'minus ' + best:>17s}" for name in others)]
    for name, row in rows.items():
        cells = [f"{name:>8s} {drawn.get(name, 0):6d}"]
        for net in (first, *others):
            psi = row[net]["psi"]
            labels = None if psi is None else torch.arange(len(psi), device=psi.device) % num_classes
            cells += [f"{with_error(row[net]['fid'], row[net]['fid_se']):>17s}",
                      f"{'-' if name == best else with_error(*difference(row[net], rows[best][net], labels)):>17s}"]
            if net == first:
                cells += ["     -        -" if row[net]["recall"] is None else
                          f"{row[net]['recall']:6.3f} {row[net]['coverage']:8.3f}"]
        lines.append(" ".join(cells))
    return "\n".join(lines)


def save_bars(path, w, groups, names):
    """Coefficients (G, K) as a bar picture, one row of bars per group."""
    G, K = w.shape
    row, column = 90, max(24, min(80, 1200 // K))
    width = max(240, K * column)
    sheet = Image.new("RGB", (width, 16 * K + G * row), "white")
    pen, high = ImageDraw.Draw(sheet), w.abs().max().item() or 1.0
    for k, name in enumerate(names):
        pen.text((4, 16 * k), f"{k}: {os.path.basename(name)}", fill="black")
    for g, group in enumerate(groups):
        zero = 16 * K + g * row + row // 2
        for k, x in enumerate(w[g].tolist()):
            tip = zero - x / high * (row // 2 - 14)
            pen.rectangle((k * column + 3, min(tip, zero), (k + 1) * column - 3, max(tip, zero)),
                          fill="steelblue" if x >= 0 else "indianred")
            pen.text((k * column + 3, (tip - 12) if x >= 0 else tip + 1), f"{x:.2f}", fill="black")
        pen.line((0, zero, width, zero), fill="black")
        pen.text((4, zero - row // 2), group, fill="gray")
    with whole(path) as f:
        sheet.save(f, "png")


def check(c, world):
    """Everything on the command line that cannot work, before anything is loaded."""
    for name, choices in (("method", (*METHODS, "all")), ("per", ("all", "stage", "block")),
                          ("policy", ("mean", "net")), ("credit", ("image", "subset"))):
        if c[name] not in choices:
            fail(f"unknown {name} {c[name]!r}; choose {', '.join(choices)}")
    for name, least in dict(images=2, pairs=1, batch_size=1, num_prdc=10, num_real=10, reference=2 * c.images).items():
        if c[name] < least:
            fail(f"{name} {c[name]}: needed is at least {least}")
    if c.method == "neon" and c.budget < max(24, 2 * world):
        fail(f"budget {c.budget}: --method=neon needs at least {max(24, 2 * world)}")
    first = 0 if c.moments else c.reference
    if c.method in ("rl", "all") and c.budget < first + (2 * c.pairs + (c.credit == "subset")) * c.images:
        fail(f"budget {c.budget} is less than one iteration of {2 * c.pairs} candidates of {c.images} images "
             f"and the reference of {first}; raise it, or lower --images or --reference")
    if c.moments and (c.method not in ("rl", "all") or c.credit != "image" or "reference" in c.given):
        fail("--moments are in place of a reference, for --method=rl with --credit=image and one of --features")
    if not (0 <= c.memory < 1 and c.search_std > 0 and c.lr > 0):
        fail(f"memory {c.memory} must lie in [0, 1), search_std {c.search_std} and lr {c.lr} above 0")
    if c.num and c.num < 2 * world:
        fail(f"num {c.num}: needed is 0 (no evaluation) or at least {2 * world}")
    for path in filter(None, (os.path.join(c.out, "merged.pt"), c.json)):
        writable(path)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if argv is None:
        share_cores(c)
    with Stop("; go on with --resume"):     # at once: all that was drawn but the present candidates is in the cache
        run(c)


def run(c):
    """Search, judge, write: the script, with its options c."""
    rank, world, device = setup()
    began = time.time()
    check(c, world)
    paths = find_checkpoints(c.ckpts)
    met = not c.resume and holds_run(c.out, ("merged.pt", "cache"), [*paths, c.guide, c.moments])
    paths = [of_the_run_before(path, c.out) for path in paths] if c.resume else paths
    c["ckpt"] = paths[0]
    guided = load_guided(c, device)
    sampler_of = {"sit": "euler", "edm2": "heun"}[guided.family]
    c = Config(c, sampler=c.sampler or sampler_of, noise=c.noise or NOISE[guided.family])
    c = Config(c, steps=c.steps or (5 if c.sampler == "heun" else 10))
    schedule(c.sampler, c.steps, c.noise, 0.0, guided.sigmas)
    choose_networks(c, image_size(guided), ["tiny2", "tiny"])
    if c.moments and len(c.features) > 1:
        fail(f"--moments are for one feature network, --features names {len(c.features)}")
    check_classes(c.real, guided.num_classes)
    basis = Basis(paths, c.per, guided)
    G, K = len(basis.groups), len(paths)
    methods = [name for name in METHODS if not obstacle(name, paths)] if c.method == "all" else [c.method]
    if obstacle(methods[0], paths):
        fail(f"--method={c.method}: {obstacle(methods[0], paths)}")
    made = {name: feature_net(name, c.features_path if name in WEIGHTS else None, device)
            for name in dict.fromkeys([*c.features, *c.judges])}
    nets, judges = Nets([made[name] for name in c.features]), [made[name] for name in c.judges]
    if met:
        move_aside(c.out, LEFT)
        paths[:] = [of_the_run_before(path, c.out) for path in paths]
    print0(f"{K} checkpoints of {sum(p.numel() for p in guided.model.parameters()) / 1e6:.2f} M parameters, {G} groups "
           f"of coefficients; {', '.join(methods)} with {c.budget} images ({c.sampler}, {c.steps} steps) in "
           f"{nets.name}" + (f", judged in {' '.join(c.judges)}" if c.num else ""))
    num_real, size = c.num_real if c.real == "tiny" else 0, image_size(guided)
    real_train = real_summaries(c.real, nets.nets, "train", 1, num_real, device, size)
    real_report = real_summaries(c.real, judges, "report", c.num_prdc, num_real, device, size) if c.num else None

    results, drawn, log = {}, {}, []
    for name in methods:
        folder = os.path.join(c.out, "cache", name)
        if rank == 0:
            if not c.resume:
                shutil.rmtree(folder, ignore_errors=True)
            os.makedirs(folder, exist_ok=True)
        dist.barrier()
        with tqdm(total=c.budget, desc=name, unit="image", disable=rank > 0 or None) as bar:
            search = Search(c, basis, nets, real_train, folder, bar)
            try:
                results[name] = METHODS[name](search, c, G, K)
            except ValueError as e:
                fail(f"{e}; raise --reference or --images, or try --moments or --credit=subset", code=1)
        drawn[name] = search.drawn
        log += [dict(method=name, **row) for row in search.log]
    searched = time.time() - began
    best = methods[0]
    w = results[best]

    rows = judge_all(basis, results, judges, real_report, c) if c.num else {}
    found = dict(ckpts=[*paths, *basis.copies], groups=basis.groups, method=best,
                 coefficients={k: v.tolist() for k, v in results.items()}, budget=c.budget, drawn=drawn, seed=c.seed,
                 features=nets.name, sampler=c.sampler, steps=c.steps,
                 rows=[{k: row[k] for k in KEYS} | dict(method=name) for name, judged in rows.items()
                       for row in (judged[judge.name] for judge in judges)], seconds=time.time() - began)
    if rank == 0:
        save(os.path.join(c.out, "merged.pt"), basis.merge(w).model, config=dict(c), coefficients=w.tolist())
        save_bars(os.path.join(c.out, "coefficients.png"), w, basis.groups,
                  [*paths, *basis.copies][:w.shape[1]])
        for path in filter(None, (os.path.join(c.out, "merge.json"), c.json)):
            with whole(path) as f:
                f.write(dumps(dict(found, candidates=log)).encode())
        if "line" in methods:
            points = [(row["w"][0][1], row["fd"]) for row in log if row["method"] == "line"]
            save_curves(os.path.join(c.out, "line.png"), {f"FD in {nets.name}": points},
                        f"share of {os.path.basename(paths[1])}, the rest {os.path.basename(paths[0])}", "FD")
        for name, picture in (("last", "before.png"), (best, "after.png")):
            if rows:
                save_grid(os.path.join(c.out, picture), rows[name]["images"])
    if rows:
        for judge in judges:
            notes_on(rows["last"][judge.name], judge.dim)
        print0(table(rows, best, drawn, judges, guided.num_classes))
    for g, group in enumerate(basis.groups[:12]):
        print0(f"{group}: " + " ".join(f"{x:+.3f}" for x in w[g].tolist()))
    print0(f"searched for {searched:.0f} s, {time.time() - began:.0f} s in all; {os.path.join(c.out, 'merged.pt')}, "
           "merge.json, coefficients.png")


if __name__ == "__main__":
    main()
