"""
How fast and how exact is the reward? Its figures beside the usual way to compute them, on synthetic features.

python lab/bench.py --dim=512 --num=2000                        # seconds
python lab/bench.py --dim=2048 --num=5000                       # Inception's features: two minutes, 1 GB
"""
import copy
import os
import resource
import sys
import time

import torch
from scipy.linalg import sqrtm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from models import configure, fail
from reward import Moments, ReferenceSet, covariance_root, distance_to_root

# -----------------------------------------------------------------------------
dim = 2048 # features
num = 5000 # members of the reference set
subset = 50 # images of a candidate
candidates = 16 # candidate subsets, for the same members
seed = 0 # of the synthetic features
# -----------------------------------------------------------------------------

GAIN_ERROR = 1e-9 # allowed of a gain, a credit and a FD, over the traces of both covariances


def timed(name, f, count=1, exact=None, usual=None, repeats=1):
    """
    Time f, which does `count` of something, and print a line: seconds of one, largest error from `exact` (what the
    usual way says of the first few), and how many times faster than `usual` seconds. Returns result, seconds, error.
    """
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        result = f()
        times.append((time.perf_counter() - began) / count)
    seconds = min(times)
    error = None if exact is None else (result[:len(exact)] - exact).abs().max().item()
    print(f"{name:44s} {1e3 * seconds:10.2f} ms"
          + (f" {error:9.1e}" if error is not None else "") + (f" {usual / seconds:8.0f} x" if usual else ""))
    return result, seconds, error


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if min(c.dim, c.subset, c.candidates) < 1 or c.num < max(c.subset, 2 * c.dim):
        fail(f"dim {c.dim}, num {c.num}, subset {c.subset}, candidates {c.candidates}: needed is subset <= num and "
             "2 dim <= num")
    torch.set_num_threads(1)

    # Features whose covariance has the eigenvalues of a power law, (i + 2)^-1.1, as those of networks do.
    rng = torch.Generator().manual_seed(c.seed)
    scales = (torch.arange(c.dim) + 2.0)**-0.55
    real_mu, real_cov = Moments(c.dim).add((torch.randn(2 * c.num, c.dim, generator=rng) + 0.1) * scales).gaussian()
    features = torch.randn(c.num, c.dim, generator=rng) * scales * 1.05
    new = torch.randn(c.candidates, c.subset, c.dim, generator=rng) * scales
    slots = torch.randperm(c.num, generator=rng)[:c.subset]
    members, few = features[slots], min(3, c.candidates)

    print(f"d {c.dim}, N {c.num}, {c.candidates} candidates of {c.subset} images, one thread of torch\n"
          f"{'':44s} {'time':>13s} {'error':>9s} {'faster':>10s}")
    reference, counting, _ = timed("moments of all", lambda: ReferenceSet(features, real_mu, real_cov))
    fd, *_ = timed("a new state: one eigendecomposition", lambda: reference.fd)
    real_root, moments = covariance_root(real_cov), reference.moments
    whole = lambda m: distance_to_root(*m.gaussian(), real_mu, real_root)
    changed = lambda removed, new: copy.deepcopy(moments).add(removed, -1).add(new)

    # The usual way: change the moments, and evaluate the whole distance again.
    gains, usual, _ = timed("gain: covariance and eigenvalues", lambda: torch.stack(
        [fd - whole(changed(members, f)) for f in new[:few]]), few)
    _, gain_seconds, gain_error = timed("gain: determinants", lambda: reference.swap_gain(slots, new), c.candidates,
                                        gains, usual, repeats=3)
    credit, usual, _ = timed("leave-one-out: covariance and eigenvalues", lambda: torch.stack(
        [whole(changed(f[None], features[:0])) - fd for f in members[:few]]), len(members[:few]))
    *_, credit_error = timed("leave-one-out: determinants, per image", lambda: reference.leave_one_out(members),
                             c.subset, credit, usual)
    timed("first variation, per image", lambda: reference.influence(members), c.subset)
    mu, cov = moments.gaussian()
    timed("committing a swap", lambda: reference.replace(slots, new[0]))

    # Independent of all of it: the matrix root that most implementations of FID take.
    root, usual, _ = timed("FD: scipy.linalg.sqrtm", lambda: sqrtm((cov @ real_cov).numpy()).trace().real)
    exact = (mu - real_mu).square().sum() + cov.trace() + real_cov.trace() - 2 * root
    *_, fd_error = timed("FD: eigenvalues", lambda: whole(moments)[None], 1, exact[None], usual)
    print(f"gain: {(counting + usual) / gain_seconds:.0f} x faster than all features again and sqrtm; "
          f"memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    allowed = GAIN_ERROR * (cov.trace() + real_cov.trace()).item()
    if max(gain_error, credit_error, fd_error) > allowed:
        fail(f"errors of a gain {gain_error:.1e}, a credit {credit_error:.1e} and a FD {fd_error:.1e}: allowed is "
             f"{allowed:.1e}", 1)


if __name__ == "__main__":
    main()
