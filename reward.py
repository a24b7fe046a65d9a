"""
The reward: what does a subset of images do to the Frechet distance of a whole set?

Pure mathematics on features, of any network and any data; imports nothing of this project:

    reference = ReferenceSet(features, real_mu, real_cov)       # (N, d), (d,), (d, d)
    reference.fd                                                # Frechet distance of the set
    reference.swap_gain(slots, new)                             # exact fall of FD per candidate subset
    reference.influence(new)                                    # first variation: a reward for every single image

All of it in float64: float32 eigenvalues give errors of 1e-3, as large as the reward itself.

python reward.py                                                # checks and times itself
"""
import sys
import time

import torch

# -----------------------------------------------------------------------------
dim = 256 # features
num = 5000 # members of the reference set
subset = 50 # images of a candidate
candidates = 16 # candidate subsets
seed = 0 # of the synthetic features
# -----------------------------------------------------------------------------


def float64(x):
    return torch.as_tensor(x).to(torch.float64)


class Moments:
    """
    Weighted running sums of features (d): enough for mean and covariance, cheap to add to, take from and fade.
    effective is the number of equally weighted images that would be as good, (sum w)^2 / sum w^2.
    """
    def __init__(self, dim, device="cpu"):
        self.weight, self.squares = 0.0, 0.0
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, f, sign=1):                                   # f (n, d); sign -1 takes away what was added
        f = f.double()
        self.weight += sign * len(f)
        self.squares += sign * len(f)
        self.sum += sign * f.sum(0)
        self.outer += sign * f.T @ f
        return self

    def fade(self, rho):
        """Multiply the weight of everything so far by rho."""
        self.weight, self.squares, self.sum, self.outer = (
            rho * self.weight, rho**2 * self.squares, rho * self.sum, rho * self.outer)
        return self

    def copy(self):
        other = Moments(len(self.sum), self.sum.device)
        other.weight, other.squares, other.sum, other.outer = (
            self.weight, self.squares, self.sum.clone(), self.outer.clone())
        return other

    @property
    def effective(self):
        return self.weight**2 / self.squares

    def gaussian(self):
        """mu (d,), cov (d, d): the unbiased covariance, with N - 1 when all weights are 1."""
        mu = self.sum / self.weight
        cov = (self.outer - self.weight * torch.outer(mu, mu)) / (self.weight - self.squares / self.weight)
        return mu, (cov + cov.T) / 2


def covariance_root(cov):
    """L (d, d) with L L^T = cov: Cholesky, or if cov is singular the symmetric root with eigenvalues clamped at 0."""
    root, info = torch.linalg.cholesky_ex(cov)
    if info.item() == 0:
        return root
    vals, vecs = torch.linalg.eigh(cov)
    return vecs * vals.clamp(min=0).sqrt() @ vecs.T


def distance_to_root(mu1, cov1, mu2, root2):
    """Frechet distance with cov2 = root2 root2^T; mu1 (..., d) and cov1 (..., d, d) may be batched."""
    vals = torch.linalg.eigvalsh(root2.T @ cov1 @ root2).clamp(min=0)       # those of cov1 cov2
    trace = cov1.diagonal(dim1=-2, dim2=-1).sum(-1) + root2.square().sum()
    return (mu1 - mu2).square().sum(-1) + trace - 2 * vals.sqrt().sum(-1)


def check_moments(mu, cov):
    if mu.dim() != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(f"moments do not fit: mean {tuple(mu.shape)}, covariance {tuple(cov.shape)}")
    if not (mu.isfinite().all() and cov.isfinite().all()):
        raise ValueError("moments hold NaN or infinite values")


def frechet_distance(mu1, cov1, mu2, cov2):
    """
    |mu1 - mu2|^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), Heusel et al. 2017, eq. 6. mu (d,), cov (d, d); a float.
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    mu1, cov1, mu2, cov2 = map(float64, (mu1, cov1, mu2, cov2))
    check_moments(mu1, cov1)
    check_moments(mu2, cov2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"moments of {len(mu1)} and of {len(mu2)} dimensions cannot be compared")
    return distance_to_root(mu1, cov1, mu2, covariance_root(cov2)).item()


def influence(features, mu, cov, real_mu, real_root):
    """
    First variation of FD(., real) at the Gaussian (mu, cov), per image: the derivative of FD when a little weight moves
    from the set to that image; features (n, d) => psi (n,) float64, negative is good. Its mean over the set is about 0.
    psi(f) = (f-mu)^T (I-T) (f-mu) + 2 (mu-m)^T (f-mu) - tr((I-T) cov), T = L U w^(-1/2) U^T L^T, L^T cov L = U w U^T.
    Raises ValueError if cov is singular (fewer images than dimensions): psi is not finite then.
    """
    vals, vecs = torch.linalg.eigh(real_root.T @ cov @ real_root)
    if vals[0] <= 1e-12 * vals[-1]:
        raise ValueError("the generated covariance is singular, so no image has a first variation: "
                         "the set needs more images than features have dimensions, better five times as many")
    transport = real_root @ (vecs * vals.rsqrt()) @ vecs.T @ real_root.T
    bend = torch.eye(len(mu), dtype=torch.float64, device=mu.device) - transport
    f = features.double() - mu
    return ((f @ bend) * f).sum(1) + 2 * f @ (mu - real_mu) - (bend * cov).sum()


def standard_error(psi, labels=None):
    """
    Standard error of a FD from the first variation of its images, psi (n,): delta method. With labels (n,): drawn in
    equal numbers, so only the variance within classes counts. The same on a difference of psi: a paired comparison.
    """
    if labels is None:
        return (psi.var() / len(psi)).sqrt().item()
    classes = labels.unique()
    if len(psi) < 3 * len(classes):
        return standard_error(psi)
    squares = sum((psi[labels == k] - psi[labels == k].mean()).square().sum() for k in classes)
    return (squares / (len(psi) - len(classes)) / len(psi)).sqrt().item()


class ReferenceSet:
    """
    A generated set, features (N, d), against the Gaussian of real data, real_mu (d,), real_cov (d, d).
    Knows its Frechet distance and how much it would fall were some members replaced ("subset-replace").
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    def __init__(self, features, real_mu, real_cov):
        self.features = features.clone()
        self.real_mu, real_cov = float64(real_mu).to(features.device), float64(real_cov).to(features.device)
        check_moments(self.real_mu, real_cov)
        self.check(features, 2)
        self.real_root = covariance_root(real_cov)
        self.moments = Moments(len(self.real_mu), features.device).add(features)
        self.fd = distance_to_root(*self.moments.gaussian(), self.real_mu, self.real_root).item()

    def check(self, f, dims):
        if f.dim() != dims or f.shape[-1] != len(self.real_mu):
            raise ValueError(f"features {tuple(f.shape)}: needed are {dims} axes, the last of {len(self.real_mu)}")
        if not f.isfinite().all():
            raise ValueError("features hold NaN or infinite values")

    def swap_gain(self, slots, new):
        """
        FD before minus FD after, exactly, were the features new[k] (n, d) of candidate k to replace the members
        slots (n,), shared by all candidates, or slots[k] of a (K, n) tensor. new (K, n, d) => (K,) float64.
        Changes nothing.
        """
        self.check(new, 3)
        slots = slots.expand(len(new), -1) if slots.dim() == 1 else slots
        if slots.shape != new.shape[:2]:
            raise ValueError(f"slots {tuple(slots.shape)} do not fit new {tuple(new.shape)}")
        gains = []
        for members, candidate in zip(slots, new):
            after = self.moments.copy().add(self.features[members], -1).add(candidate).gaussian()
            gains.append(self.fd - distance_to_root(*after, self.real_mu, self.real_root))
        return torch.stack(gains)

    def influence(self, features):
        """First variation psi (n,) of FD for images with these features (n, d), see influence(). Negative is good."""
        self.check(features, 2)
        return influence(features, *self.moments.gaussian(), self.real_mu, self.real_root)

    def replace(self, slots, features):
        """Commit a swap: members slots (n,) become features (n, d)."""
        self.check(features, 2)
        self.moments.add(self.features[slots], -1).add(features)
        self.features[slots] = features.to(self.features.dtype)
        self.fd = distance_to_root(*self.moments.gaussian(), self.real_mu, self.real_root).item()


def main(argv=None):
    from models import configure, fail
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if min(c.dim, c.num, c.subset, c.candidates) < 1 or c.subset > c.num:
        fail(f"dim {c.dim}, num {c.num}, subset {c.subset}, candidates {c.candidates}: needed is 1 <= subset <= num")
    rng = torch.Generator().manual_seed(c.seed)
    spread = (torch.arange(c.dim) + 2.0).pow(-0.55).double()
    draw = lambda *shape: torch.randn(*shape, c.dim, generator=rng, dtype=torch.float64) * spread
    real = Moments(c.dim).add(draw(4 * c.num) + 0.1 * spread)
    features, new = draw(c.num) * 1.05, draw(c.candidates, c.subset)
    slots = torch.randperm(c.num, generator=rng)[:c.subset]

    rows, results = [], {}

    def timed(name, f, count):
        began = time.perf_counter()
        results[name] = f()
        rows.append((name, (time.perf_counter() - began) / count))

    reference = ReferenceSet(features, *real.gaussian())
    timed("Frechet distance from moments", lambda: frechet_distance(*reference.moments.gaussian(), *real.gaussian()), 1)
    timed("swap gain, per candidate", lambda: reference.swap_gain(slots, new), c.candidates)
    timed("first variation, per image", lambda: reference.influence(new.flatten(0, 1)), new.shape[0] * new.shape[1])

    def again():
        gains = []
        for candidate in new:
            f = features.clone()
            f[slots] = candidate
            gains.append(reference.fd - frechet_distance(*Moments(c.dim).add(f).gaussian(), *real.gaussian()))
        return torch.tensor(gains)

    timed("swap gain by starting again, per candidate", again, c.candidates)
    error = (results["swap gain, per candidate"] - results["swap gain by starting again, per candidate"]).abs().max()
    for name, seconds in rows:
        print(f"{name:45s} {1e3 * seconds:10.3f} ms")
    psi = reference.influence(torch.cat([features[slots], new.flatten(0, 1)]))
    first_order = (psi[:c.subset].mean() - psi[c.subset:].view(c.candidates, -1).mean(1)) * c.subset / c.num
    match = torch.corrcoef(torch.stack([first_order, results["swap gain, per candidate"]]))[0, 1]
    print(f"d {c.dim}, N {c.num}, {c.candidates} candidates of {c.subset}: largest error of a gain {error:.1e}, "
          f"correlation of its first order with it {match:.5f}")


if __name__ == "__main__":
    main()
