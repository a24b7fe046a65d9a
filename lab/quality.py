"""
How good are the gradient and the reward, before any training? Both at the skewed base, of the tiny world.

python lab/quality.py                                           # both tables, half an hour on one thread
python lab/quality.py --parts reward
"""
import contextlib
import io
import math
import os
import sys
import tempfile
from unittest import mock

import torch

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_rl
from fid import NUM_REAL, feature_net, real_summaries
from models import Stop, configure, fail, load, setup
from reward import Moments, ReferenceSet, frechet_distance
from sample import generate, image_seeds

# -----------------------------------------------------------------------------
parts = [] # of gradients, reward; empty: both
ckpt = "sit-tiny-skewed" # the policy
better = "sit-tiny" # a policy that is known to be better
share = 0.1 # the better policy's weights are those of ckpt, moved by this share towards `better`
updates = 20 # gradients of each estimator; three times as many of subsets
images = 40000 # of the policy, an eighth of which is the reference set
seed = 0 # of the noise
# -----------------------------------------------------------------------------

# What an update of each row learns from; all steps, if not said.
ALL = ["--noisiest=1", "--times=0"]
ESTIMATORS = {
    "ppo, n = 1": ["--batch=800", *ALL],
    "ppo, n = 1, noisier half of the steps": ["--batch=800", "--times=0"],
    "ppo, n = 1, two steps of the noisier half, the default": ["--batch=800"],
    "ppo, n = 1, best quarter": ["--batch=800", "--top=0.25", *ALL],
    **{f"ppo, n = {n}": [f"--batch={800 // n * n}", f"--subset={n}", "--reference=5000", *ALL]
       for n in (4, 10, 20, 50, 100)},
    "ppo, n = 50, noisier half of the steps": ["--batch=800", "--subset=50", "--reference=5000", "--times=0"],
    "ppo, n = 50, best quarter": ["--batch=800", "--subset=50", "--reference=5000", "--top=0.25", *ALL],
    **{f"ppo, n = 10, noisier half, reference of {n}": ["--batch=800", "--subset=10", f"--reference={n}", "--times=0"]
       for n in (500, 2000, 5000, 20000)},
    "forward": ["--batch=800", "--objective=forward"],
    "forward, all times": ["--batch=800", "--objective=forward", "--noisiest=1"],
    **{f"pathwise, horizon {h}": ["--batch=800", "--objective=pathwise", f"--horizon={h}"] for h in (1, 3, 10)},
}
TRUTH = ["--batch=2000", "--objective=pathwise", "--horizon=10"]        # the gradient of FD of 2,000 images


def gradients(c, options, count, seed):
    """(count, parameters) float64: gradients of `count` rollouts of the policy, which stays as it is."""
    found = []

    def keep(params, most):
        found.append(torch.cat([p.grad.flatten() for p in params if p.grad is not None]).double())
        return found[-1].norm()

    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()), \
            mock.patch("torch.nn.utils.clip_grad_norm_", keep), mock.patch("torch.optim.Adam.step"):
        train_rl.main([f"--ckpt={c.ckpt}", f"--iters={count}", f"--seed={seed}", "--num=0", "--kl_limit=0",
                       "--anchor=0", f"--out={out}", *options])
    return torch.stack(found)


def print_gradients(c):
    """
    Cosine with the pathwise gradient through the whole sampler of the mean of all, its noise taken out, and of one
    update; signal to noise of 1,000 images: the squared mean along that gradient over the variance of the whole vector.
    Updates of subsets share most of their reference, so their errors are larger than printed.
    """
    true = gradients(c, TRUTH, 10, c.seed + 1)
    spread = (true - true.mean(0)).square().sum() / (len(true) * (len(true) - 1))
    print(f"pathwise gradient: 10 x 2,000 images, its noise {(spread.sqrt() / true.mean(0).norm()).item():.1%}")
    true = true.mean(0) / true.mean(0).norm()
    print(f"{'estimator':56s} {'cosine of the mean':>18s} {'of one update':>16s} {'signal to noise':>20s}")
    for name, options in ESTIMATORS.items():
        given = dict(option[2:].split("=") for option in options)
        g = gradients(c, options, c.updates * (3 if "subset" in given else 1), c.seed)
        mean, variance = g.mean(0), (g - g.mean(0)).square().sum() / (len(g) - 1)
        along = g @ true
        each, error = along / g.norm(dim=1), along.std() / math.sqrt(len(g))
        scale = 1000 / int(given["batch"]) / variance
        signal = scale * (along.mean().square() - error**2)
        its_error = scale * error * (4 * along.mean().square() + 2 * error**2).sqrt()
        length = (mean.square().sum() - variance / len(g)).clamp(min=0).sqrt()              # less what the noise adds
        cosine = f"{along.mean() / length:.2f}" if along.mean() > 4 * error else "-"
        print(f"{name:56s} {cosine:>18s} {each.mean():8.3f} +- {each.std() / math.sqrt(len(g)):.3f} "
              f"{signal:10.2g} +- {its_error:.1g}", flush=True)


@torch.no_grad()
def print_reward(c):
    """Spread of a subset's FD against n, the bias of FD with N, and how often n images order two policies."""
    device = setup()[2]
    net, policy, goal = feature_net("tiny", device=device), load(c.ckpt, device), load(c.better, device)
    real = real_summaries("tiny", [net], "train", 0, NUM_REAL, device)["tiny"]

    def features(model, count, first):
        labels = torch.arange(count) % model.num_classes
        seeds = image_seeds(c.seed, "train", torch.arange(first, first + count))
        return torch.cat([net(x) for x in generate(model, seeds, labels, "flow", 10)])

    pool = features(policy, c.images, 0)
    for p, q in zip(policy.parameters(), goal.parameters()):
        p.lerp_(q, c.share)
    half, eighth = c.images // 2, c.images // 8
    improved = features(policy, half, c.images)
    fd = lambda f: frechet_distance(*Moments(net.dim, device).add(f).gaussian(), real.mu, real.cov)
    print(f"FD of {half} images of the policy {fd(pool[:half]):.3f}, of the better one {fd(improved):.3f}")

    for n in (half // 40, half // 20, half // 10, half // 4, half):
        found = torch.tensor([fd(f) for f in pool.split(n) if len(f) == n])
        print(f"FD of {n:5d} images {found.mean():.3f} +- {found.std() / math.sqrt(len(found)):.3f}")
    reference, rest = ReferenceSet(pool[:eighth], real.mu, real.cov), pool[eighth:eighth + half]
    print(f"   n  variation of the FD of {eighth:5d} images, n of them new  n images order the policies")
    for n in (1, 4, 8, 16, 32, 50, 100):
        slots, every = torch.arange(n, device=device), -(-n // 10) * 10         # the same members, of the same labels
        gain = [reference.swap_gain(slots, f[:half // every * every].view(-1, every, net.dim)[:, :n])
                for f in (rest, improved)]
        variation = gain[0].std() / (reference.fd - gain[0].mean())
        right = torch.stack([(gain[0] < g).double().mean() for g in gain[1]]).mean()
        print(f"{n:4d} {variation.item():53.3%} {right.item():28.1%}", flush=True)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if unknown := set(c.parts) - {"gradients", "reward"}:
        fail(f"unknown parts {' '.join(sorted(unknown))}; choose gradients, reward")
    with Stop():
        for name, part in (("reward", print_reward), ("gradients", print_gradients)):
            if not c.parts or name in c.parts:
                part(c)


if __name__ == "__main__":
    main()
