"""
Merge stored checkpoints of one model: RL over the coefficients, whose reward is a fall of FID.

Merged weights are sum_k w_k theta_k with sum_k w_k = 1 in each block, negatives allowed. Candidates are drawn with
the sampler that is used in the end, on common noise and labels; no SDE anywhere (arXiv 2607.02291, section on merging).

Left out on purpose: a softmax over coefficients (the best ones are often negative) and spherical interpolation. Rivals
at the same number of images, from the best single checkpoint to Neon: python lab/rivals.py

python merge_rl.py                                              # snapshots of the tiny SiT, two minutes on a CPU
python merge_rl.py --ckpts a.pt b.pt --real FOLDER              # yours; globs work
torchrun --nproc_per_node=8 -- merge_rl.py --preset=paper-edm2 --ckpts 'edm2-img512-xs-*.pkl' --vae vae.safetensors ..
"""
import glob
import os
import re
import sys
import time

import torch
import torch.distributed as dist
from tqdm import tqdm

from fid import finish, reward_networks, table_of, versioned
from models import (ASSETS, Stop, configure, fail, gather, move_aside, moved, print0, read_checkpoint,
                    save, setup, stored_parts, take_preset, whole, writable)
from reward import ReferenceSet, Stream, long_enough
from sample import generate, image_seeds, load_guided, save_grid, schedule

# -----------------------------------------------------------------------------
# files
ckpts = [] # checkpoints to merge, at least two, oldest first; globs; empty: the tiny SiT's snapshots
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
out = "out/merge_rl" # folder for merged.pt, result.json, before.png, after.png, curve.png
preset = "" # paper-edm2: the paper's options for EDM2, printed as the flags they stand for
seed = 0 # of the search; evaluation has noise of its own
resume = False # continue the search in OUT at the candidate it was stopped at
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
# search
budget = 24000 # images that may be drawn to search
per = "block" # coefficients for each block, for each stage, or for the whole model (all)
# rl
policy = "mean" # mean: the coefficients themselves are learned; net: the output of an MLP is, the paper's
images = 128 # per candidate
pairs = 4 # antithetic pairs of candidates per iteration
search_std = 0.2 # of the coefficients tried around the mean; falls to half
lr = 0.2 # of the mean; falls to 0
subset = 1 # 1: mean first variation of a candidate's images; more: exact gain of swapping in so many; the paper's: 50
reference = 1000 # images the reward starts from, of the last checkpoint: the reference set (subset > 1) or earlier ones
refresh = 10 # subset > 1: redraw the reference set every so many iterations
# sampler and reward
sampler = "" # see sample.py; empty: euler for SiT, heun for EDM2
steps = 0 # of the sampler; 0: 10, or 5 of heun, which evaluates the network twice a step
noise = -1.0 # noise level of a sampler that has noise; -1: 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # guidance scale; 1: none
guide = "" # autoguidance: a weaker network in place of the null class
bf16 = False # the network in 16 bits, SiT's bfloat16 and EDM2's float16, all else in float32
compile = False # compile the block that a SiT repeats: seconds to begin with, faster passes on a GPU
batch_size = 250 # images in one pass, per rank
features = [] # feature networks of the reward; empty: tiny for images of 16 px, else inception
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
# evaluation
judges = [] # feature nets of the table, the first held out; empty: tiny2, tiny, factors at 16 px, else inception
num = 10000 # fresh images per row of the table, all rows on the same noise and labels; 0: no evaluation
# -----------------------------------------------------------------------------

# The paper's settings for EDM2; 50 iterations are our choice. It has not been run on real weights yet.
PRESETS = {"paper-edm2": dict(policy="net", per="all", search_std=1.0, subset=50, images=50, reference=5000, refresh=10,
                              sampler="heun", steps=32, budget=50000, batch_size=50)}

MEMORY = 0.5        # subset 1: weight of earlier images in the moments, per iteration, if that keeps enough


def main(argv=None, methods=None):
    """methods: {name: function like rl}, searches to compare under one budget, of which the first is saved."""
    c, methods = configure(globals(), sys.argv[1:] if argv is None else argv), methods or {"rl": rl}
    rank, _, device = setup()
    began = time.time()
    take_preset(c, PRESETS)
    check(c)
    paths = find_checkpoints(c.ckpts)
    paths = [moved(path, c.out) for path in paths] if c.resume else paths
    c["ckpt"] = paths[0]
    model = load_guided(c, device)
    c["sampler"] = c.sampler or {"sit": "euler", "edm2": "heun"}[model.family]
    c["steps"] = c.steps or (5 if c.sampler == "heun" else 10)
    schedule(c.sampler, c.steps, c.noise, model.sigmas)                 # refuses what the model does not have
    basis = Basis(paths, c.per, model)
    alone = torch.eye(len(paths), dtype=torch.float64)[:, None].repeat(1, len(basis.groups), 1)     # (K, G, K)
    nets, real = reward_networks(c, model, device)
    print0(f"{len(paths)} checkpoints of {sum(p.numel() for p in model.model.parameters()) / 1e6:.2f} M parameters, "
           f"{len(basis.groups)} groups of coefficients; {', '.join(methods)} with {c.budget} images ({c.sampler}, "
           f"{c.steps} steps) in {nets.name}" + (f"; evaluated in {' '.join(c.judges)}" if c.num else ""))

    # Evaluate the last checkpoint first: if the real data do not fit, better to know before.
    judge = table_of(c, model, device) if c.num else lambda *args: []
    before = judge(basis.merge(alone[-1]), "last", c.sampler, c.steps)
    if not c.resume:                        # options and data are known to work
        move_aside(c.out, ("merged.pt", "result.json", "before.png", "after.png", "curve.png", "cache"))
        paths[:] = [moved(path, c.out) for path in paths]
    if before and rank == 0:
        save_grid(os.path.join(c.out, "before.png"), before[0]["images"][:200])

    # Search; then evaluate on fresh noise, as the best of noisy scores is no result.
    results, drawn, curves, candidates, after = {}, {}, {}, [], []
    with Stop("; continue with --resume"):  # at once: all that was drawn but the present candidate is in the cache
        for name, method in methods.items():
            with tqdm(total=c.budget, desc=name, unit="image", disable=rank > 0 or None) as bar:
                search = Search(c, basis, nets, real, name, bar)
                results[name] = method(search, c, alone)
            drawn[name] = search.drawn
            curves[name] = [(row["drawn"], row["fd"]) for row in search.log if "fd" in row]
            candidates += [dict(method=name, **row) for row in search.log]
        for name, w in results.items():
            after += judge(basis.merge(w), name, c.sampler, c.steps)

    first, w = next(iter(results.items()))
    if rank == 0:
        save(os.path.join(c.out, "merged.pt"), basis.merge(w).model, config=dict(c), coefficients=w.tolist())
        finish(c, before, after, curves, f"FD of the candidates in {nets.name}", dict(
            ckpts=basis.paths, groups=basis.groups, method=first, budget=c.budget, drawn=drawn, candidates=candidates,
            coefficients={name: x.tolist() for name, x in results.items()}, seed=c.seed, features=nets.name,
            sampler=c.sampler, steps=c.steps, seconds=time.time() - began, images=sum(drawn.values())))
    for group, row in list(zip(basis.groups, w.tolist()))[:12]:
        print0(f"{group}: " + " ".join(f"{x:+.3f}" for x in row))
    print0(f"{sum(drawn.values())} images, {time.time() - began:.0f} s; {c.out}/merged.pt, result.json, curve.png"
           + (", before.png, after.png" if after else ""))


# ---- Before the search ----------------------------------------------------------------------------------------------

def check(c):
    """What people get wrong on the command line, before anything is loaded."""
    for name, choices in dict(per=("all", "stage", "block"), policy=("mean", "net")).items():
        if c[name] not in choices:
            fail(f"unknown {name} {c[name]!r}; choose {', '.join(choices)}")
    for name, least in dict(images=2, pairs=1, batch_size=1, subset=1, refresh=1, reference=2 * c.images).items():
        if c[name] < least:
            fail(f"{name} {c[name]}: needed is at least {least}")
    if c.images % c.subset:
        fail(f"images {c.images} does not divide into subsets of {c.subset}")
    writable(os.path.join(c.out, "merged.pt"))


def find_checkpoints(patterns):
    """Paths of the checkpoints, globs expanded; the tiny SiT's snapshots if there is no pattern."""
    paths = []
    numbers = lambda path: [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", path)]
    for pattern in patterns or [os.path.join(ASSETS, "sit-tiny-[0-9]*.pt")]:
        # A file of that very name, then what the pattern matches: step9000 before step10000.
        found = [pattern] if os.path.exists(pattern) else sorted(glob.glob(pattern), key=numbers)
        if not found and glob.has_magic(pattern):
            fail(f"no file matches {pattern}")
        paths += found or [pattern]
    if len(paths) < 2:
        fail(f"merging needs at least 2 checkpoints, got {len(paths)}: python merge_rl.py --ckpts a.pt b.pt")
    return paths


# ---- Mixtures of stored checkpoints, and what they draw -------------------------------------------------------------

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
        self.paths, self.model, self.states = paths, model, []
        self.parameters = {name: p for name, p in model.model.named_parameters() if p.requires_grad}
        for path in paths:
            state = stored_parts(path)["ema"]
            for name, p in self.parameters.items():
                x = state.get(name, torch.empty(0))
                if x.shape != p.shape:
                    fail(f"{path} and {paths[0]} cannot be merged: {name} is {tuple(x.shape)}, not {tuple(p.shape)}", 1)
                if not x.isfinite().all():
                    fail(f"{path} holds NaN or infinite values in {name}; leave it out", 1)
            for name, b in model.model.named_buffers():         # Fourier frequencies, up to the rounding of float16
                if not torch.allclose(state[name].float(), b.cpu(), rtol=2e-3, atol=2e-3):
                    fail(f"{path} and {paths[0]} cannot be merged: they are of two training runs, {name} differs", 1)
            self.states.append(state)
        self.groups = list(dict.fromkeys(group_of(name, per) for name in self.parameters))
        self.rows = {name: self.groups.index(group_of(name, per)) for name in self.parameters}

    @torch.no_grad()
    def merge(self, w):
        """
        The guided model with parameters sum_k w[g, k] theta_k, w (G, K) with rows of sum 1, in float32: the checkpoint
        of the largest coefficient plus multiples of differences to it, so equal ones stay what they are, bit for bit.
        """
        for name, p in self.parameters.items():
            row = w[self.rows[name]]
            main = row.argmax().item()
            centre = self.states[main][name].to(p.device, torch.float32)
            total = centre.clone()
            for k in row.nonzero().flatten().tolist():
                if k != main:
                    total += row[k].item() * (self.states[k][name].to(p.device, torch.float32) - centre)
            p.copy_(total)
        return self.model


class Search:
    """
    Draws what candidates make and counts the images. Every candidate's features are kept in OUT/cache/METHOD, in the
    order in which they were drawn: a resumed search repeats its arithmetic on them, and draws only what is not there.
    """
    def __init__(self, c, basis, nets, real, method, bar):
        self.c, self.basis, self.nets, self.real, self.bar = c, basis, nets, real, bar
        self.drawn, self.log = 0, []
        self.folder = os.path.join(c.out, "cache", method)
        self.key = {name: versioned(c[name]) for name in c if name not in ("resume", "out", "preset", "num", "judges")}
        self.key["files"] = [os.path.basename(path) for path in basis.paths]        # that globs have found

    def stored(self, path):
        """What this very search has written to `path`, or None; the ranks agree, whatever each sees of the folder."""
        kept = read_checkpoint(path) if self.c.resume and os.path.exists(path) else None
        if kept and kept.get("key") != self.key:
            fail(f"{self.folder} belongs to another search; repeat its options and files, or leave out --resume", 1)
        everywhere = torch.tensor(int(kept is not None))
        dist.all_reduce(everywhere, dist.ReduceOp.MIN)
        return kept if everywhere else None

    def images_of(self, w, indices, decoded=True):
        """This rank's share of images `indices` (n,) of the training stream, in batches: uint8, or not decoded."""
        c, model, mine = self.c, self.basis.merge(w), indices[dist.get_rank()::dist.get_world_size()]
        return generate(model, image_seeds(c.seed, "train", mine), mine % model.num_classes, c.sampler, c.steps, 1.0,
                        c.batch_size, c.noise, decoded=decoded)

    @torch.no_grad()
    def draw(self, ws, count, first):
        """Features (m, count, d) of candidates ws (m, G, K), all on the images first .. of the training stream."""
        found, indices = [], torch.arange(first, first + count)
        for w in ws:
            path = os.path.join(self.folder, f"{self.drawn:07d}.pt")
            kept = self.stored(path)
            if kept is None:
                features = torch.cat([self.nets(x) for x in self.images_of(w, indices)])
                kept = dict(key=self.key, features=gather(features, count))
                if dist.get_rank() == 0:
                    with whole(path) as f:
                        torch.save(kept, f)
            found.append(kept["features"].to(self.real.mu.device))
            self.drawn += count
            self.bar.update(count)
            self.log.append(dict(candidate=len(self.log), drawn=self.drawn, images=count, w=w.tolist()))
        return torch.stack(found)


# ---- RL over the coefficients ---------------------------------------------------------------------------------------

def policy_net(rng, start):
    """The paper's policy, an MLP of 3 layers with a learned input: its parameters, and the mean, `start` at first."""
    randn = lambda *shape: torch.randn(shape, generator=rng, dtype=torch.float64)
    x, w1, w2, w3 = params = [torch.nn.Parameter(p) for p in (
        randn(64), randn(64, 64) / 8, randn(64, 64) / 8, 0 * randn(start.numel(), 64))]

    def mean():
        h = (w3 @ (w2 @ (w1 @ x).tanh()).tanh()).view(start.shape)
        return start + h - h.mean(1, keepdim=True)

    return params, mean


def evolve(reward_of, start, iters, pairs, std, lr, rng, policy="mean", momentum=0.5):
    """
    Natural evolution strategy on coefficients (G, K) whose rows sum to 1. reward_of(it, mean, ws (2 pairs, G, K)) =>
    rewards (2 pairs,); the second half of ws mirrors the first. With directions e of row sum 0 the step is
    g = sum dR e / (2 sum |dR|); std falls to half, lr to 0. Returns the mean of the iterates of the second half.
    """
    if policy == "net":
        (params, mean_of), lr = policy_net(rng, start), lr / 64     # a step of Adam moves the mean 64 times as far
        optimizer = torch.optim.Adam(params, lr)
    else:
        params = [torch.nn.Parameter(start.clone())]
        mean_of, optimizer = lambda: params[0], torch.optim.SGD(params, lr, momentum)
    iterates = []
    for it in range(iters):
        left, mean = 1 - it / iters, mean_of()
        e = torch.randn(pairs, *start.shape, generator=rng, dtype=torch.float64)
        e = e - e.mean(-1, keepdim=True)
        step = std * (1 + left) / 2 * e
        rewards = reward_of(it, mean.detach(), torch.cat([mean + step, mean - step]).detach()).double().cpu()
        change = rewards[:pairs] - rewards[pairs:]
        g = (change.view(-1, 1, 1) * e).sum(0) / (2 * change.abs().sum()).clamp(min=1e-300)
        optimizer.param_groups[0]["lr"] = lr * left
        optimizer.zero_grad()
        (-(g * mean).sum()).backward()
        optimizer.step()
        iterates.append(mean_of().detach().clone())
    return torch.stack(iterates[len(iterates) // 2:]).mean(0)


def rl(search, c, alone):
    """
    RL over the coefficients. Reward, subset 1: mean first variation of a candidate's images, in a stream of all images.
    subset > 1: how far FD falls if they take the places of members of the reference set, the same for all candidates.
    """
    d, real = search.nets.dim, search.real
    memory = long_enough(MEMORY, c.images, d)           # images on common noise count once
    if c.subset == 1 and memory > MEMORY:
        print0(f"note: {c.images} images are few for {d} dimensions; the moments keep {memory:.3f} of earlier ones")
    if c.budget < c.reference + 2 * c.pairs * c.images:
        fail(f"budget {c.budget} is less than the reference of {c.reference} and one iteration of {2 * c.pairs} "
             f"candidates of {c.images} images; raise it, or lower --images or --reference")
    if c.reference <= d:
        fail(f"reference {c.reference}: needed are more images than {search.nets.name} features have dimensions, {d}")
    first = search.draw(alone[-1:], c.reference, 0)[0]
    reference = Stream(first, real.mu, real.cov, memory) if c.subset == 1 else ReferenceSet(first, real.mu, real.cov)

    def reward_of(it, mean, ws):
        """Rewards (2 pairs,) of the candidates ws (2 pairs, G, K), all on the same new images."""
        redrawn = it // c.refresh if c.subset > 1 else 0
        first = c.reference * (1 + redrawn) + it * c.images             # new images in every iteration
        if redrawn and it % c.refresh == 0:
            reference.push(search.draw(mean[None], c.reference, first - c.reference)[0])
        f = search.draw(ws, c.images, first)            # (2 pairs, images, d)
        if c.subset == 1:
            reference.push(f.flatten(0, 1))
            try:
                rewards = -reference.influence(f.flatten(0, 1)).view(len(ws), c.images).mean(1)
            except ValueError as e:
                fail(f"{e}; raise --reference or --images", code=1)
        else:
            slots = (it * c.images + torch.arange(c.images, device=f.device)) % c.reference
            parts = zip(slots.split(c.subset), f.split(c.subset, dim=1))
            rewards = torch.stack([reference.swap_gain(places, new) for places, new in parts]).mean(0)
        for row, reward in zip(search.log[-len(ws):], rewards.tolist()):
            row |= dict(reward=reward, fd=reference.fd)
        return rewards

    redrawing = -(-c.reference // c.refresh) if c.subset > 1 else 0         # images per iteration, on average
    iters = max(1, (c.budget - c.reference) // (2 * c.pairs * c.images + redrawing))
    rng = torch.Generator().manual_seed(c.seed)
    return evolve(reward_of, alone[-1], iters, c.pairs, c.search_std, c.lr, rng, c.policy)


if __name__ == "__main__":
    main()
