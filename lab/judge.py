"""
Judge many checkpoints of the tiny world alike: FD, precision, recall, coverage, by several samplers and networks.

python lab/judge.py --ckpts sit-tiny-skewed 'out/ppo-4?/ckpt.pt' --base sit-tiny-skewed
python lab/judge.py --ckpts sit-tiny 'out/tiny-ppo-*-4?/ckpt.pt' --by flow-10 flow-50-0.8 heun-25 --num_prdc=10000
python lab/judge.py --ckpts sit-tiny --away 'out/neon-4?/cache/neon/self.pt' --scales 0.25 0.5 1     # and Neon's scales

OUT/NAME-4?/ckpt.pt are seeds of one row: a mean, +- its standard error over the seeds, at least that of the evaluation
(which alone it is for one seed). What is named in another way is drawn with every seed of --seeds.
"""
import glob
import json
import math
import os
import re
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import Blue, distance, evaluate, feature_net, real_summaries, two_sample_accuracy
from models import Stop, configure, fail, load, print0, setup, stored_parts, whole
from sample import NOISE, save_curves

# -----------------------------------------------------------------------------
ckpts = ["sit-tiny-skewed"] # checkpoints, globs, or names of assets
base = "" # one of them: `down` is the share of its FD above the floor that is gone; empty: the first
away = [] # Neon: weights a step away from these copies of the first checkpoint; globs
scales = ["1"] # of that step, in distances of the copy
by = ["flow-10", "euler-10"] # SAMPLER-STEPS or SAMPLER-STEPS-NOISE
judges = ["tiny2", "tiny", "factors"] # networks, pixels, random (an untrained network), and c2st, a classifier
num = 10000 # images of each
num_prdc = 3000 # of these and of the real ones for the metrics of neighbours
seeds = ["40"] # of the noise, of what is not named NAME-SEED
stream = "report" # which noise and real images: report, or select to choose by
out = "out/judge.json" # all numbers, a line for each checkpoint, sampler and network; beside it a picture, OUT.png
# -----------------------------------------------------------------------------


class Pixels:
    """The image itself, uint8 (n, 3, H, W) => (n, 3 H W) from -1 to 1."""
    name, size, dim = "pixels", 16, 768

    def __call__(self, images):
        return images.flatten(1).float() / 127.5 - 1


class Untrained:
    """Random convolutions that nobody has trained: uint8 (n, 3, H, W) => (n, 64)."""
    name, size, dim = "random", 16, 64

    def __init__(self, device):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Conv2d(3, 64, 3, 2, 1), nn.GELU(), nn.Conv2d(64, 128, 3, 2, 1), nn.GELU(),
                                     nn.Conv2d(128, 64, 3, 2, 1), nn.GELU()).to(device).requires_grad_(False)

    def __call__(self, images):
        return F.adaptive_avg_pool2d(self.net(images.float() / 127.5 - 1), 1).flatten(1) * 100


def found(patterns):
    """Paths that the globs match; a pattern that is no glob stays what it is, as `sit-tiny`."""
    paths = [path for pattern in patterns for path in sorted(glob.glob(pattern)) or [pattern]]
    if missing := [path for path in paths if glob.has_magic(path)]:
        fail(f"no file matches {missing[0]}")
    return paths


def row_and_seed(path):
    """("ppo", 40) of out/ppo-40/ckpt.pt, ("ppo/ckpt-00050", 40) of out/ppo-40/ckpt-00050.pt, (path, None) of others."""
    match = re.match(r"(?:.*/)?([^/]+)-(\d+)/(?:.*/)?([^/]+)\.pt$", path)
    if not match:
        return path, None
    return match[1] + ("" if match[3] in ("ckpt", "self") else f"/{match[3]}"), int(match[2])


def stepped_away(model, path, scale):
    """Neon (arXiv 2510.03597): the model's parameters move by scale (theta - theta_self)."""
    copy = stored_parts(path)["ema"]
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.add_(scale * (p - copy[name].to(p.device, torch.float32)))
    return model


def mean_and_error(values, errors):
    """A mean over seeds and its standard error, at least that of the evaluation."""
    values, errors = (torch.tensor(x, dtype=torch.float64) for x in (values, errors))
    own = errors.square().mean().sqrt() / math.sqrt(len(values))
    spread = values.std() / math.sqrt(len(values)) if len(values) > 1 else torch.tensor(0.0)
    return values.mean().item(), max(own, spread).item()


def print_table(c, rows, floor):
    """A line for each row and sampler: FD of the first judge, how far down, its neighbours, the others' FD .."""
    cells = {}
    for row in rows:
        cells.setdefault((row["by"], row["row"]), {}).setdefault(row["features"], []).append(row)
    networks = [name for name in c.judges if name != "c2st"]
    base = row_and_seed(c.base)[0]
    of_base = {(row["by"], row["features"], row["seed"]): row["fid"] for row in rows if row["row"] == base}
    columns = [f"FD {networks[0]}", "down", "precision", "recall", "coverage"]
    columns += [x for name in networks[1:] for x in (f"FD {name}", "down")]
    columns += ["KID pixels"] * ("pixels" in networks) + ["c2st"] * ("c2st" in c.judges) + ["blue"]
    print0("| by | row | seeds | " + " | ".join(columns) + " |\n" + "|---" * (3 + len(columns)) + "|")
    for (by, name), of in cells.items():
        line = []
        for network in networks:
            each = of[network]
            fd, error = mean_and_error([r["fid"] for r in each], [r["fid_se"] or 0.0 for r in each])
            room = [of_base.get((by, network, r["seed"]), math.nan) - floor[network] for r in each]
            down, spread = mean_and_error([100 * (1 - (r["fid"] - floor[network]) / x) for r, x in zip(each, room)],
                                          [100 * (r["fid_se"] or 0.0) / x for r, x in zip(each, room)])
            line += [f"{fd:.3f} +- {error:.3f}", "-" if math.isnan(down) else f"{down:.1f} +- {spread:.1f}%"]
            if network == networks[0]:
                line += ["{:.3f} +- {:.3f}".format(*mean_and_error(
                    [r[k] for r in each], [math.sqrt(max(0.0, r[k] * (1 - r[k])) / c.num_prdc) for r in each]))
                    for k in ("precision", "recall", "coverage")]
        if "pixels" in networks:
            line.append(f"{1e4 * mean_and_error([r['kid'] for r in of['pixels']], [0.0])[0]:.1f}")
        if "c2st" in c.judges:
            line.append("{:.1%} +- {:.1%}".format(*mean_and_error(*zip(*[(r["c2st"], r["c2st_se"]) for r in each]))))
        line.append("{:.1%}".format(mean_and_error([r["blue"] for r in each], [0.0])[0]))
        print0(f"| {by} | {name} | {len(each)} | " + " | ".join(line) + " |")


def save_frontier(c, rows, path):
    """FD against the precision lost: for each sampler a line from the base through the rows NAME-1, NAME-2 .."""
    points, network, base = {}, c.judges[0], row_and_seed(c.base)[0]
    for row in rows:
        if row["features"] == network:
            points.setdefault(row["by"], {}).setdefault(row["row"], []).append((row["precision"], row["fid"]))
    curves = {}
    for by, of in points.items():
        mean = {name: torch.tensor(each).mean(0).tolist() for name, each in of.items()}
        begin, fd = mean.get(base, (0.0, 0.0))
        for name, (precision, y) in mean.items():
            if name != base:
                series = re.sub(r"(-| x )[\d.]+$", "", name)
                curves.setdefault(f"{series}, {by}", [(0.0, fd)]).append((begin - precision, y))
    if curves:
        curves = {name: sorted(points) for name, points in curves.items()}
        save_curves(path, curves, "precision lost", f"FD in {network}")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        device = setup()[2]
        wrong = [x for x in c.by if not re.fullmatch(r"[a-z]+-\d+(-[\d.]+)?", x)]
        wrong += [x for x in c.scales + c.seeds if not re.fullmatch(r"[\d.]+", x)]
        wrong += [x for x in c.judges[:1] if x == "c2st"]
        if wrong:
            fail(f"{wrong[0]!r}: needed is SAMPLER-STEPS or SAMPLER-STEPS-NOISE in --by, numbers in --scales and "
                 "--seeds, a network first in --judges")
        paths, copies = found(c.ckpts), found(c.away)
        c["base"] = c.base or paths[0]
        for path in paths + copies:     # a missing one is said before the real images take their time
            stored_parts(path)
        networks = [Pixels() if name == "pixels" else Untrained(device) if name == "random" else
                    feature_net(name, device=device) for name in c.judges if name != "c2st"] + [Blue()]
        keep = 3000 if "c2st" in c.judges else 0
        real = real_summaries("tiny", networks, c.stream, c.num_prdc, 20000, device, keep=keep)
        floor = {name: distance(x, real[name]) for name, x in
                 real_summaries("tiny", networks[:-1], "floor", 10, c.num, device).items()}
        print0("floor: " + ", ".join(f"{name} {fd:.3f}" for name, fd in floor.items()))
        todo = [(path, None, 0.0) for path in paths] + [(paths[0], path, float(s)) for path in copies for s in c.scales]
        rows = []
        for path, copy, scale in todo:
            model = load(path, device)
            name, seed = row_and_seed(copy or path)
            if copy:
                name, model = f"{name} x {scale:g}", stepped_away(model, copy, scale)
            for seed in [seed] if seed is not None else map(int, c.seeds):
                for by in c.by:
                    sampler, steps, *noise = by.split("-")
                    noise = float(noise[0]) if noise else NOISE[model.family]
                    drawn = evaluate(model, networks, real, c.num, sampler, int(steps), noise, seed, c.stream,
                                     num_prdc=c.num_prdc, batch_size=1000, keep=keep)
                    more = dict(row=name, seed=seed, by=by, blue=drawn["blue"]["mean"].item())
                    if keep:
                        more |= two_sample_accuracy(drawn[networks[0].name]["images"], real[networks[0].name].images)
                    skip = ("psi", "mean", "labels", "images")
                    rows += [{k: v for k, v in drawn[n.name].items() if k not in skip} | more for n in networks[:-1]]
                    with whole(c.out) as f:
                        f.write("".join(json.dumps(row) + "\n" for row in rows).encode())
        print_table(c, rows, floor)
        save_frontier(c, rows, os.path.splitext(c.out)[0] + ".png")


if __name__ == "__main__":
    main()
