"""
The reward: what does a subset of images do to the Frechet distance of a whole set?

Pure mathematics on features, of any network and any data; imports nothing of this project:

    reference = ReferenceSet(features, real_mu, real_cov)       # (N, d), (d,), (d, d)
    reference.fd                                                # Frechet distance of the set
    reference.swap_gain(slots, new)                             # exact fall of FD per candidate subset
    reference.influence(new)                                    # first variation: a reward for every single image
    reference.leave_one_out(members)                            # exact change of FD without that image
    reference.replace(slots, new), .push(new), .undo()          # the set moves on, or back

A distribution-wise reward is a class with some of these names, and .value for its distance: Stream (FD of moments that
fade), ReferenceSet (FD), KernelSet (KID, MMD), SumSet (several feature networks), ClassSet (FD within classes).

All of it in float64: float32 eigenvalues give errors of 1e-3, as large as the reward itself.

OMP_NUM_THREADS=1 python reward.py                              # checks and times itself, two minutes
"""
import copy
import math
import sys
import time

import numpy as np
import torch
import torch.distributed as dist
from scipy.special import ellipj, ellipkm1

# -----------------------------------------------------------------------------
dim = 2048 # features
num = 5000 # members of the reference set; everything is done again with ten times as many
subset = 50 # images of a candidate
candidates = 16 # candidate subsets
seed = 0 # of the synthetic features
# -----------------------------------------------------------------------------

# Of one image: proven, of tr(M^(-1/2) |E|) / 2 for a change E of M. For n images sqrt(n) times as much, as the ripples
# of the quadrature cancel over an image's directions, and all the more over those of many: seen are below 1e-8 of it.
QUADRATURE_ERROR = 2e-7
RANK_FLOOR = 1e-12          # of the largest variance: less is rounding, that of features in float32 included
SELF_CHECK_ERROR = 1e-9     # of one gain from the whole evaluation, in traces of both covariances; more is refused


def float64(x):
    return torch.as_tensor(x).to(torch.float64)


def check_features(f, axes, dim):
    if f.dim() != axes or f.shape[-1] != dim:
        raise ValueError(f"features {tuple(f.shape)}: needed are {axes} axes, the last of {dim}")
    if not all(rows.isfinite().all() for rows in f.split(4096)):
        raise ValueError("features hold NaN or infinite values")


def check_swap(slots, new, num, dim):
    """For new features (n, d) or (K, n, d): slots (n,) or (K, n) are different members of num."""
    check_features(new, new.dim(), dim)
    if slots.shape not in (new.shape[:-1], new.shape[-2:-1]) or not new.numel():
        raise ValueError(f"slots {tuple(slots.shape)} do not fit new features {tuple(new.shape)}")
    ordered = slots.sort(-1).values
    if ordered.min() < 0 or ordered.max() >= num or (ordered.diff(dim=-1) == 0).any():
        raise ValueError(f"slots must be different members of 0 .. {num - 1}")


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
        for rows in f.split(4096):                              # many features in float32 are never all in float64
            rows = rows.double()
            self.weight += sign * len(rows)
            self.squares += sign * len(rows)
            self.sum += sign * rows.sum(0)
            self.outer.addmm_(rows.T, rows, alpha=sign)
        return self

    def fade(self, rho):
        """Multiply the weight of everything so far by rho."""
        self.weight, self.squares, self.sum, self.outer = (
            rho * self.weight, rho**2 * self.squares, rho * self.sum, rho * self.outer)
        return self

    def replace(self, removed, new):
        """Other moments, without rows removed (n, d) and with rows new (m, d); these stay, for undo."""
        other, rows = copy.copy(self), torch.cat([removed, new]).double()
        signs = torch.cat([-torch.ones(len(removed)), torch.ones(len(new))]).to(rows)
        other.weight, other.squares = (x + len(new) - len(removed) for x in (self.weight, self.squares))
        other.sum, other.outer = self.sum + signs @ rows, torch.addmm(self.outer, rows.T * signs, rows)
        return other

    @property
    def effective(self):
        return self.weight**2 / self.squares

    def gaussian(self):
        """mu (d,), cov (d, d): the unbiased covariance, with N - 1 when all weights are 1."""
        mu = self.sum / self.weight
        cov = torch.addr(self.outer, mu, mu, alpha=-self.weight).div_(self.weight - self.squares / self.weight)
        return mu, (cov + cov.T).div_(2)


def long_enough(memory, batch, dim):
    """Memory of moments whose effective number of images, batch (1 + memory) / (1 - memory), is at least 5 dim."""
    return max(memory, (5 * dim - batch) / (5 * dim + batch))


def covariance_root(cov):
    """
    L (d, r) with L L^T = cov: Cholesky or, if cov is near singular, its r eigenvectors of variance above RANK_FLOOR of
    the largest. FD needs no more: where real data do not vary, as along the normal of the hyperplane that a last layer
    norm puts features in, generated variance adds its trace, and all that is done with L is exact.
    """
    root, info = torch.linalg.cholesky_ex(cov)
    pivots = root.diagonal().square()
    if info.item() == 0 and pivots.min() > 1e3 * RANK_FLOOR * pivots.max():
        return root
    vals, vecs = torch.linalg.eigh(cov)
    kept = vals >= RANK_FLOOR * vals[-1]
    return vecs[:, kept] * vals[kept].sqrt()


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
    return Base(mu, cov, real_mu, real_root).influence(features)


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


# ---- What the removal and arrival of images do, around one eigendecomposition ----------------------------------------

class Base:
    """
    A Gaussian (mu, cov) seen from the real one, real_root = L with L L^T = real_cov: L^T cov L = U diag(vals) U^T, vals
    (r,) ascending, axes = L U (d, r); r = d unless real_cov is singular.
    """
    def __init__(self, mu, cov, real_mu, real_root):
        vals, vecs = torch.linalg.eigh(real_root.T @ cov @ real_root)
        self.mu, self.shift, self.vals, self.axes = mu, mu - real_mu, vals.clamp(min=0), real_root @ vecs
        self.singular = vals[0].item() <= 1e-12 * vals[-1].item()
        self.trace, self.roots = cov.trace().item(), self.vals.sqrt().sum().item()
        self.traces = self.trace + real_root.square().sum().item()
        self.fd = self.shift.square().sum().item() + self.traces - 2 * self.roots

    def influence(self, features):
        """See the function of this name."""
        if self.singular:
            raise ValueError("the generated covariance is singular, so no image has a first variation: "
                             "the set needs more images than features have dimensions, better five times as many")
        f = features - self.mu
        moved = (f @ self.axes).square() @ self.vals.rsqrt()                # f^T T f
        return f.square().sum(1) - moved + 2 * f @ self.shift - self.trace + self.roots


def quadrature(low, high, curvature, tolerance, most):
    """
    t, c (nodes,) of x^(-1/2) = sum_j c_j / (x + t_j), low <= x <= high: 10 nodes, or more until the error is within the
    tolerance, at most `most`; and that error: of the mean over 0 <= s <= 1 of tr(M_s^(-1/2) E) / 2, M_s = M + s E, less
    its value at s = 0. The proof: let e(x) be the error at x. Its divided differences are at most max|e'(z) z^(3/2)|
    (x y)^(-3/4), so the mean errs by at most that maximum times half the integral of (1 - s) tr((M_s^(-3/4) E)^2). With
    M_s >= (1 - s loss) M this is at most curvature = tr((M^(-3/4) E)^2) / (1 + sqrt(1 - loss))^2.
    Hale, Higham and Trefethen 2008, method 3; its upper half by t -> low high / t, as ellipj has no digits left there.
    """
    x = np.geomspace(low, high, 400)[:, None]
    for nodes in range(10, most + 1, 2):
        K = ellipkm1(low / high)
        sn, cn, dn, _ = ellipj((np.arange(nodes // 2) + 0.5) * K / nodes, 1 - low / high)
        t = np.concatenate([low * (sn / cn)**2, high * (cn / sn)**2])
        c = 2 * K / (math.pi * nodes) * np.concatenate([low**0.5 * dn / cn**2, high**0.5 * dn / sn**2])
        error = np.abs(0.5 - (c / (x + t)**2).sum(1) * x[:, 0]**1.5).max() * curvature
        if error <= tolerance:
            break
    return torch.from_numpy(t), torch.from_numpy(c), error


def by_determinants(vals, new, removed, middle, t, c):
    """
    What root_trace_change computes, less its first order: half the sum of c_j (log det(I + D G_j) - tr(D G_j)), with
    D = middle and G_j = Y diag(1 / (vals + t_j)) Y^T (2n, 2n). What all candidates share is computed once.
    """
    n, scale = new.shape[1], 1 / (vals + t[:, None])[:, None]
    scaled, G = new.new_empty(len(t), *new.shape[1:]), new.new_empty(len(t), 2 * n, 2 * n)

    def gram(a, b):                         # (n, d), (m, d) => (nodes, n, m)
        return (torch.mul(a, scale, out=scaled).flatten(0, 1) @ b.T).view(len(t), n, len(b))

    changes, shared = [], removed.dim() == 2
    if shared:
        G[:, n:, n:] = gram(removed, removed)
    for k, added in enumerate(new):
        taken = removed if shared else removed[k]
        G[:, :n] = gram(added, torch.cat([added, taken]))
        G[:, n:, :n] = G[:, :n, n:].mT
        if not shared:
            G[:, n:, n:] = gram(taken, taken)
        X = middle @ G
        first = X.diagonal(dim1=1, dim2=2).sum(1)
        X.diagonal(dim1=1, dim2=2).add_(1)
        changes.append(c @ (torch.linalg.slogdet(X).logabsdet - first) / 2)
    return torch.stack(changes)


def root_trace_change(vals, new, removed, num, largest=None):
    """
    tr sqrt(M') - tr sqrt(M) (K,) where rows removed (n, d) or (K, n, d) of num make way for new (K, n, d), centred and
    in the axes where M = diag(vals). Also the nodes of the quadrature, 0 if eigenvalues were computed: for n above
    `largest` (None: d / 4, where they become faster), or if its error is not proven within sqrt(n) QUADRATURE_ERROR.
    M' = M + Y^T D Y, Y = [new; removed], D = (diag(v) - v v^T / num) / (num - 1), v = 1 for new, -1 for removed rows.
    """
    n, d = new.shape[1:]
    v = torch.cat([torch.ones(n), -torch.ones(n)]).to(vals)
    middle = (v.diag() - v[:, None] * v / num) / (num - 1)
    if n <= (d // 4 if largest is None else largest):
        added, taken = new.square().sum(1), removed.square().sum(-2)
        shift = (new.sum(1) - removed.sum(-2)).square() / num
        # What is removed lowers the spectrum to no less than (1 - loss) of it; what is new raises its upper end.
        gram = torch.linalg.eigvalsh(removed / vals @ removed.mT)[..., -1]
        loss = ((gram + shift @ (1 / vals)) / (num - 1)).max().item()
        if loss < 0.99:
            weights, slope = vals**-0.75, vals.rsqrt() / 2 / (num - 1)
            norm_new, norm_removed = ((x * weights @ x.mT).norm(dim=(-2, -1)) for x in (new, removed))
            curvature = norm_new.square() + (norm_removed + shift @ weights).square()
            curvature = curvature.max().item() / (num - 1)**2 / (1 + (1 - loss)**0.5)**2
            low, high = (1 - loss) * vals[0].item(), (vals[-1] + added.sum(1).max() / (num - 1)).item()
            tolerance = QUADRATURE_ERROR * n**0.5 * ((added + taken + shift) @ slope).min().item()
            t, c, error = quadrature(low, high, curvature, tolerance, most=40)
            if error <= tolerance:
                change = by_determinants(vals, new, removed, middle, t.to(vals), c.to(vals))
                return (added - taken - shift) @ slope + change, len(t)
    rows = torch.cat([new, removed.expand(new.shape)], dim=1)
    changed = torch.stack([torch.linalg.eigvalsh(vals.diag() + y.T @ middle @ y) for y in rows])
    return changed.clamp(min=0).sqrt().sum(1) - vals.sqrt().sum(), 0


class Stream:
    """
    The Frechet distance of a stream of images, which begins with features (N, d), to the Gaussian of real data,
    real_mu (d,), real_cov (d, d): moments whose past fades by `memory` with every push; no image is kept.
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    def __init__(self, features, real_mu, real_cov, memory=1.0):
        self.real_mu, real_cov = float64(real_mu).to(features.device), float64(real_cov).to(features.device)
        check_moments(self.real_mu, real_cov)
        check_features(features, 2, len(self.real_mu))
        self.real_root, self.memory = covariance_root(real_cov), memory
        self.set(Moments(len(self.real_mu), features.device).add(features))

    def set(self, moments):
        self.moments, self.known = moments, None
        return self

    @property
    def base(self):
        if self.known is None:
            self.known = Base(*self.moments.gaussian(), self.real_mu, self.real_root)
        return self.known

    @property
    def value(self):
        return self.base.fd

    def push(self, features):
        """New images, features (n, d), at full weight."""
        check_features(features, 2, len(self.real_mu))
        self.set(self.moments.fade(self.memory).add(features))

    def state_dict(self):
        return dict(vars(self.moments))

    def load_state_dict(self, state):
        moments = Moments(len(self.real_mu), self.moments.sum.device)
        for name, x in state.items():
            setattr(moments, name, x.to(moments.sum) if torch.is_tensor(x) else x)
        self.set(moments)

    def influence(self, features):
        """First variation psi (n,) of FD for images with these features (n, d), see influence(). Negative is good."""
        check_features(features, 2, len(self.real_mu))
        return self.base.influence(features)

    def leave_one_out(self, features):
        """
        Exact change of FD were one image of weight 1 left out, for each of the features (n, d) => (n,): positive is
        good, and to first order -psi / (weight - 1). The covariance becomes grow (cov - drop g g^T), g = f - mu, so
        that all determinants are 1 - drop g^T (..) g. Raises ValueError if one of these covariances is near singular.
        """
        psi, base, W, left = self.influence(features), self.base, self.moments.weight, self.moments.weight - 1
        freedom = W - self.moments.squares / W          # the covariance's denominator: N - 1 when all weights are 1
        grow, drop = freedom / (left - (self.moments.squares - 1) / left), W / (left * freedom)
        g = features - base.mu
        squares, norm = drop * (g @ base.axes).square(), g.square().sum(1)
        least = 1 - (squares @ (1 / base.vals)).max().item()
        if least < 1e-3:
            raise ValueError("without one of these images the generated covariance would be near singular: "
                             "the set needs more images than features have dimensions, better five times as many")
        first = -squares @ base.vals.rsqrt() / 2
        curvature = (squares @ base.vals**-0.75).square().max().item() / (1 + least**0.5)**2
        t, c, _ = quadrature(least * base.vals[0].item(), base.vals[-1].item(), curvature,
                             1e-3 * QUADRATURE_ERROR * first.abs().min().item(), most=60)
        x = squares @ (1 / (base.vals[:, None] + t.to(psi)))                # (n, nodes)
        change = first + ((-x).log1p() + x) @ c.to(psi) / 2
        mean = (norm / left - 2 * g @ base.shift) / left
        roots = (grow**0.5 - 1) * base.roots + grow**0.5 * change
        return mean + (grow - 1) * base.trace - grow * drop * norm - 2 * roots

    def at_infinity(self, fresh):
        """FD of infinitely many such images, from features (n, d) of images that are not in: FD + mean psi / 2."""
        if self.moments.effective < 10 * len(self.real_mu):
            raise ValueError(f"FD at infinity needs 10 d = {10 * len(self.real_mu)} images, "
                             f"here is an effective number of {self.moments.effective:.0f}")
        return self.value + self.influence(fresh).mean().item() / 2


class ReferenceSet:
    """
    A generated set, features (N, d), against the Gaussian of real data, real_mu (d,), real_cov (d, d).
    Knows its Frechet distance and how much it would fall were some members replaced ("subset-replace").
    sharded: the features are members rank, rank + world, .. of one set over all ranks; whatever else goes in or comes
    out is the same on every rank. own: the tensor is taken over, not copied.
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    def __init__(self, features, real_mu, real_cov, sharded=False, own=False):
        self.rank, self.world = (dist.get_rank(), dist.get_world_size()) if sharded else (0, 1)
        self.stream, self.features = Stream(features, real_mu, real_cov), features if own else features.clone()
        self.num, self.oldest, self.before, self.proposed = self.all_ranks(self.moments), 0, None, None
        self.nodes, self.deviation, self.checked = 0, 0.0, None             # of the last gains, of the last self-check
        if self.num < 2 or len(features) != len(range(self.rank, self.num, self.world)):
            raise ValueError(f"{len(features)} of {self.num} members: needed are at least 2, every {self.world}th here")

    @property
    def moments(self):
        return self.stream.moments

    @property
    def fd(self):
        return self.stream.value

    value = fd

    def influence(self, features):          # as Stream's, of any images
        return self.stream.influence(features)

    def leave_one_out(self, features):      # as Stream's, of members
        return self.stream.leave_one_out(features)

    def all_reduce(self, x):
        if self.world > 1:
            dist.all_reduce(x)
        return x

    def all_ranks(self, moments):
        """Make moments of this rank's members those of all; returns how many they are."""
        moments.weight = self.all_reduce(torch.full_like(moments.sum[:1], moments.weight)).item()
        moments.squares = moments.weight
        self.all_reduce(moments.sum)
        self.all_reduce(moments.outer)
        return int(moments.weight)

    def rows(self, slots):
        """Features (.., d) of members slots (..), on every rank."""
        flat, rows = slots.flatten(), self.features.new_zeros(slots.numel(), self.features.shape[1])
        mine = flat % self.world == self.rank
        rows[mine] = self.features[flat[mine] // self.world]
        return self.all_reduce(rows).view(*slots.shape, -1)

    def write(self, slots, rows):
        mine = slots % self.world == self.rank
        self.features[slots[mine] // self.world] = rows[mine]

    def swap_gain(self, slots, new):
        """
        FD before minus FD after, exactly, were the features new[k] (n, d) of candidate k to replace the members
        slots (n,), shared by all candidates, or slots[k] of a (K, n) tensor. new (K, n, d) => (K,) float64.
        Changes nothing. The first gain from a new state of the set is checked against the whole evaluation: ValueError
        if it deviates by more than SELF_CHECK_ERROR.
        """
        check_swap(slots, new, self.num, self.features.shape[1])
        base, N, removed = self.stream.base, self.num, self.rows(slots.to(self.features.device))

        def whole(k):
            after = self.moments.replace(removed if removed.dim() == 2 else removed[k], new[k]).gaussian()
            return base.fd - distance_to_root(*after, self.stream.real_mu, self.stream.real_root)

        if base.singular:                   # N <= d, or features that are linearly dependent
            return torch.stack([whole(k) for k in range(len(new))])
        f, g = new - base.mu, removed - base.mu
        roots, self.nodes = root_trace_change(base.vals, f @ base.axes, g @ base.axes, N)
        shift = f.sum(1) - g.sum(-2)
        mean = (2 * shift @ base.shift + shift.square().sum(1) / N) / N
        trace = (f.norm(dim=(1, 2)).square() - g.norm(dim=(-2, -1)).square() - shift.square().sum(1) / N) / (N - 1)
        gains = 2 * roots - mean - trace
        if self.checked is not base:
            self.checked, self.deviation = base, (gains[0] - whole(0)).abs().item()
            if not self.deviation <= SELF_CHECK_ERROR * base.traces:
                raise ValueError(f"a gain deviates by {self.deviation:.1e} from the whole evaluation, more than "
                                 f"{SELF_CHECK_ERROR * base.traces:.1e}: the covariances are too near to singular")
        return gains

    def replace(self, slots, features):
        """Commit a swap: members slots (n,) become features (n, d)."""
        check_swap(slots, features, self.num, self.features.shape[1])
        features, slots = features.to(self.features), slots.to(self.features.device)    # what is stored is what counts
        removed = self.rows(slots)
        self.before = self.stream, self.num, self.oldest, slots, removed
        self.stream = copy.copy(self.stream).set(self.moments.replace(removed, features))
        self.write(slots, features)

    def add(self, features):
        """The set grows by features (n, d)."""
        check_features(features, 2, self.features.shape[1])
        features, slots = features.to(self.features), torch.arange(self.num, self.num + len(features))
        self.before = self.stream, self.num, self.oldest, slots[:0], features[:0]
        self.stream = copy.copy(self.stream).set(self.moments.replace(features[:0], features))
        self.features = torch.cat([self.features, features[slots % self.world == self.rank]])
        self.num += len(features)

    def push(self, features):
        """The queue: features (n, d) take the places of the oldest members. Returns the places (n,)."""
        features = features[-self.num:]
        slots = (self.oldest + torch.arange(len(features))) % self.num
        self.replace(slots, features)
        self.oldest = (self.oldest + len(features)) % self.num
        return slots

    def propose(self, slots, new):
        """swap_gain, and the candidates are remembered for commit(k)."""
        gains, self.proposed = self.swap_gain(slots, new), (slots.expand(new.shape[:2]), new)
        return gains

    def commit(self, k):
        """Replace by candidate k of the last proposal."""
        if self.proposed is None:
            raise ValueError("there is no proposal to commit")
        (slots, new), self.proposed = self.proposed, None
        self.replace(slots[k], new[k])

    def undo(self):
        """Take the last replace, add, push or commit back, bit for bit. One is remembered."""
        if self.before is None:
            raise ValueError("there is no change to undo")
        self.stream, self.num, self.oldest, slots, rows = self.before
        self.features = self.features[:len(range(self.rank, self.num, self.world))]
        self.write(slots, rows)
        self.before = self.proposed = None

    def state_dict(self):
        """Tensors and numbers, for torch.load(weights_only=True); of the whole set, for any number of ranks."""
        return dict(features=self.rows(torch.arange(self.num)), num=self.num, oldest=self.oldest,
                    deviation=self.deviation, checked=self.checked is self.stream.base, stream=self.stream.state_dict())

    def load_state_dict(self, state):
        shape = state["num"], self.features.shape[1]
        if state["features"].shape != shape:
            raise ValueError(f"features {tuple(state['features'].shape)}: needed are {shape}")
        self.features = state["features"][self.rank::self.world].to(self.features).clone()
        self.num, self.oldest, self.before, self.proposed = state["num"], state["oldest"], None, None
        self.stream = copy.copy(self.stream)
        self.stream.load_state_dict(state["stream"])
        self.checked, self.deviation = self.stream.base if state["checked"] else None, state["deviation"]

    def audit(self, bound=1e-9):
        """The relative drift of the moments from what the features say, asserted to be within the bound."""
        fresh = Moments(self.features.shape[1], self.features.device).add(self.features)
        self.all_ranks(fresh)
        pairs = zip(self.moments.gaussian(), fresh.gaussian())
        drift = max(((kept - again).norm() / again.norm().clamp(min=1e-300)).item() for kept, again in pairs)
        assert drift <= bound, f"the moments have drifted by {drift:.1e} from the features, more than {bound:.1e}"
        return drift


# ---- Other distances behind the same names ---------------------------------------------------------------------------

def cubic_kernel(x, y):
    """(x.y / d + 1)^3 as in KID, Binkowski et al. 2018. (.., n, d), (.., m, d) => (.., n, m)."""
    return (x @ y.mT / x.shape[-1] + 1)**3


def gaussian_kernel(real_features):
    """exp(-|x - y|^2 / 2 h^2) with h the median distance between the first 1000 real images."""
    h = torch.pdist(real_features[:1000].double()).median()
    return lambda x, y: (-torch.cdist(x, y).square() / (2 * h * h)).exp()


class KernelSet:
    """
    Unbiased MMD^2 between a generated set, features (N, d), and real images, real_features (M, d); KID with
    cubic_kernel. All names mean what ReferenceSet's do.
    """
    def __init__(self, features, real_features, kernel=cubic_kernel):
        for f in (features, real_features):
            check_features(f, 2, features.shape[-1])
            if len(f) < 2:
                raise ValueError(f"{len(f)} images: a kernel distance needs at least 2 generated and 2 real ones")
        self.features, self.real, self.kernel = features.clone(), real_features.double(), kernel
        self.num, self.oldest, self.deviation, M = len(features), 0, 0.0, len(real_features)
        self.real_term = (self.sums(self.real, self.real) - self.own(self.real)).sum() / (M * (M - 1))
        self.totals = torch.stack([self.own(features).sum(), self.sums(features, features).sum(),
                                   self.sums(features, self.real).sum()])   # k(f, f), with the set, with real images

    def state_dict(self):
        return dict(features=self.features, totals=self.totals, oldest=self.oldest)

    def load_state_dict(self, state):
        self.features, self.totals, self.oldest = (
            state["features"].to(self.features), state["totals"].to(self.totals), state["oldest"])

    def sums(self, f, others):              # (n, d), (m, d) => (n,): kernel sums with all of others
        return torch.cat([self.kernel(rows.double(), others.double()).sum(1) for rows in f.split(1000)])

    def own(self, f):                       # (n, d) => (n,): k(f, f)
        return self.kernel(f.double()[:, None], f.double()[:, None]).flatten()

    def distance(self, totals, num):        # (.., 3) => (..)
        own, within, across = totals.unbind(-1)
        return (within - own) / (num * (num - 1)) + self.real_term - 2 * across / (num * len(self.real))

    @property
    def value(self):
        return self.distance(self.totals, self.num).item()

    def change(self, slots, new):           # (n,), (n, d) => (3,): of the totals
        old, rows = self.features[slots], torch.cat([new, self.features[slots].to(new)])
        signs = torch.cat([torch.ones(len(new)), -torch.ones(len(old))]).to(self.real)
        within = 2 * signs @ self.sums(rows, self.features) + signs @ self.kernel(rows.double(), rows.double()) @ signs
        return torch.stack([signs @ self.own(rows), within, signs @ self.sums(rows, self.real)])

    def swap_gain(self, slots, new):
        check_swap(slots, new, self.num, self.features.shape[1])
        changes = torch.stack([self.change(*pair) for pair in zip(slots.expand(new.shape[:2]), new)])
        return self.value - self.distance(self.totals + changes, self.num)

    def influence(self, features):          # mean kernel with the set, less that with real images
        check_features(features, 2, self.features.shape[1])
        _, within, across = self.totals / self.num
        members, real = (self.sums(features, x) for x in (self.features, self.real))
        return 2 * ((members - within) / self.num - (real - across) / len(self.real))

    def leave_one_out(self, features):
        own, within, across = self.own(features), self.sums(features, self.features), self.sums(features, self.real)
        return self.distance(self.totals - torch.stack([own, 2 * within - own, across], 1), self.num - 1) - self.value

    def push(self, features):
        features = features[-self.num:].to(self.features)
        slots = (self.oldest + torch.arange(len(features))) % self.num
        check_swap(slots, features, self.num, self.features.shape[1])
        self.totals = self.totals + self.change(slots, features)
        self.features[slots], self.oldest = features, (self.oldest + len(features)) % self.num
        return slots


class SumSet:
    """
    Several feature networks, features side by side: parts[i], a set or stream, has the next dims[i] columns. A change
    is the sum of the changes of all parts, each over the part's present value; the value is their geometric mean.
    """
    def __init__(self, parts, dims):
        self.parts, self.dims = parts, dims

    def state_dict(self):
        return dict(parts=[part.state_dict() for part in self.parts])

    def load_state_dict(self, state):
        for part, kept in zip(self.parts, state["parts"]):
            part.load_state_dict(kept)

    @property
    def values(self):
        values = [part.value for part in self.parts]
        if min(values) <= 0:
            raise ValueError(f"a distance of {min(values):.1e} is no unit for its changes: use one feature network")
        return values

    @property
    def value(self):
        return math.prod(self.values)**(1 / len(self.parts))

    @property
    def deviation(self):
        return max(part.deviation for part in self.parts)

    def total(self, change, features):      # change(part, its columns)
        columns = features.split(self.dims, dim=-1)
        return sum(change(part, f) / value for part, f, value in zip(self.parts, columns, self.values))

    def swap_gain(self, slots, new):
        return self.total(lambda part, f: part.swap_gain(slots, f), new)

    def influence(self, features):
        return self.total(lambda part, f: part.influence(f), features)

    def leave_one_out(self, features):
        return self.total(lambda part, f: part.leave_one_out(f), features)

    def push(self, features):
        return [part.push(f) for part, f in zip(self.parts, features.split(self.dims, dim=-1))][0]


class ClassSet:
    """The mean of FD within each class: parts[k], a Stream or ReferenceSet, holds class k, at least 5 d images."""
    def __init__(self, parts):
        self.parts = parts
        for k, moments in enumerate(part.moments for part in parts):
            if moments.effective < 5 * len(moments.sum):
                raise ValueError(f"class {k} has {moments.effective:.0f} images, its FD needs {5 * len(moments.sum)}")

    @property
    def value(self):
        return sum(part.value for part in self.parts) / len(self.parts)

    def influence(self, features, labels):  # (n, d), (n,) => (n,)
        psi = torch.zeros(len(features), dtype=torch.float64, device=features.device)
        for k in labels.unique():
            psi[labels == k] = self.parts[k].influence(features[labels == k])
        return psi

    def push(self, features, labels):
        for k in labels.unique():
            self.parts[k].push(features[labels == k])


def main(argv=None):
    from resource import RUSAGE_SELF, getrusage
    from models import configure, fail
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    if min(c.dim, c.subset, c.candidates) < 1 or c.num < max(c.subset, 2 * c.dim):
        fail(f"dim {c.dim}, num {c.num}, subset {c.subset}, candidates {c.candidates}: needed is subset <= num and "
             "2 dim <= num")
    torch.set_num_threads(1)
    rng, few, usual = torch.Generator().manual_seed(c.seed), min(3, c.candidates), []
    spread = (torch.arange(c.dim) + 2.0)**-0.55                             # a covariance with eigenvalues (i + 2)^-1.1
    draw = lambda *shape: torch.randn(*shape, c.dim, generator=rng) * spread
    real_mu, real_cov = Moments(c.dim).add(draw(2 * c.num) + 0.1 * spread).gaussian()
    real_root = covariance_root(real_cov)
    distance = lambda mu, cov: distance_to_root(mu, cov, real_mu, real_root)

    def row(name, f, count=1, exact=None, slow=None, repeats=1):
        """Time f, which does `count` of something, and print its line. Returns its result and the best time of one."""
        times = []
        for _ in range(repeats):
            began = time.perf_counter()
            result = f()
            times.append((time.perf_counter() - began) / count)
        seconds = min(times)
        error = "" if exact is None else f"{(result[:len(exact)] - exact).abs().max():.1e}"
        print(f"{name:42s} {1e3 * seconds:10.2f} ms {error:>9s}" + (f" {slow / seconds:8.0f} x" if slow else ""))
        return result, seconds

    print(f"d {c.dim}, {c.candidates} candidates of {c.subset} images for the same members, torch on one thread\n"
          f"{'':42s} {'time':>13s} {'error':>9s} {'faster':>10s}")
    for num in (c.num, 10 * c.num):
        print(f"N = {num}")
        reference = moments = features = None                               # before the memory is needed again
        features = torch.empty(num, c.dim)
        for part in features.split(c.num):
            part.copy_(draw(len(part)) * 1.05)
        slots, new = torch.randperm(num, generator=rng)[:c.subset], draw(c.candidates, c.subset)
        members, none = features[slots], features[:0]
        real_cov = real_root @ real_root.T                                  # kept only where it is needed
        reference, counting = row("moments of all", lambda: ReferenceSet(features, real_mu, real_cov, own=True))
        real_cov = None
        fd, _ = row("a new base: one eigendecomposition", lambda: reference.fd)
        moments = reference.moments
        gains, slow = row("gain: covariance and eigenvalues", lambda: torch.stack(
            [fd - distance(*moments.replace(members, f).gaussian()) for f in new[:few]]), few, repeats=2)
        reference.swap_gain(slots, new[:1])                                 # checks itself once
        _, gaining = row("gain: determinants", lambda: reference.swap_gain(slots, new), c.candidates, gains, slow, 5)
        print(f"{'  their nodes; deviation of the self-check':42s} {reference.nodes:10d}    {reference.deviation:9.1e}")
        credit, slow = row("leave-one-out: covariance and eigenvalues", lambda: torch.stack(
            [distance(*moments.replace(f[None], none).gaussian()) - fd for f in members[:few]]), few)
        row("leave-one-out: determinants, per image", lambda: reference.leave_one_out(members), c.subset, credit, slow)
        row("first variation, per image", lambda: reference.influence(members), c.subset)
        row("committing a swap", lambda: reference.replace(slots, new[0]))
        usual.append((num, counting, gaining))
    print(f"peak memory {getrusage(RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")
    from scipy.linalg import sqrtm
    (mu, cov), real_cov = moments.gaussian(), real_root @ real_root.T
    root, slow = row("FD: scipy.linalg.sqrtm", lambda: sqrtm((cov @ real_cov).numpy()).trace().real)
    fd = (mu - real_mu).square().sum() + cov.trace() + real_cov.trace() - 2 * root
    row("FD: eigenvalues", lambda: distance(mu, cov)[None], 1, fd[None], slow)
    for num, counting, gaining in usual:
        print(f"gain, N = {num}: {(counting + slow) / gaining:.0f} x faster than all features again and sqrtm")


if __name__ == "__main__":
    main()
