"""
The reward: by how much does the Frechet distance of a set of images fall when some of its members are replaced?

    reference = ReferenceSet(features, real_mu, real_cov)       # (N, d), (d,), (d, d)
    reference.fd                                                # Frechet distance of the set
    reference.swap_gain(slots, new)                             # exact fall of FD per candidate subset
    reference.influence(new)                                    # first variation: a reward for every single image
    reference.leave_one_out(members)                            # exact change of FD without that image
    reference.replace(slots, new), reference.push(new)          # the set moves on

Pure mathematics on features, of any network and any data. Stream (moments that fade, no image is kept) and KernelSet
(KID) have the same names. Left out on purpose: several feature networks (concatenate their features), sharding.
N members of a set, K candidates of n images, d features, r <= d axes in which real images vary. All in float64: float32
eigenvalues give errors of 1e-3, as large as the reward itself.
"""
import copy

import numpy as np
import torch
from scipy.special import ellipj, ellipkm1

# Error allowed to the quadrature for one image, relative to the first-order change of tr M^(1/2). For n images it is
# sqrt(n) times as much, because errors of different directions partly cancel. Measured errors are below 1e-8.
QUADRATURE_ERROR = 2e-7
# Variance below this fraction of the largest is rounding (that of features in float32 included), not data.
RANK_FLOOR = 1e-12
AT_ONCE = 2**17     # numbers in the buffer of by_determinants


def check_features(f, axes, dim, least=0):
    if f.dim() != axes or f.shape[-1] != dim:
        raise ValueError(f"features {tuple(f.shape)}: needed are {axes} axes, the last of {dim}")
    if not all(rows.isfinite().all() for rows in f.split(4096)):
        raise ValueError("features hold NaN or infinite values")
    if len(f) < least:
        raise ValueError(f"{len(f)} images: needed are at least {least}")


def checked_moments(mu, cov, device=None):
    """Mean (d,) and covariance (d, d), tensors or arrays, as float64 tensors."""
    mu, cov = (torch.as_tensor(x).to(device, torch.float64) for x in (mu, cov))
    if mu.dim() != 1 or cov.shape != (len(mu), len(mu)):
        raise ValueError(f"moments do not fit: mean {tuple(mu.shape)}, covariance {tuple(cov.shape)}")
    if not (mu.isfinite().all() and cov.isfinite().all()):
        raise ValueError("moments hold NaN or infinite values")
    return mu, cov


def check_swap(slots, new, num, dim):
    """For new features (n, d) or (K, n, d): slots (n,) or (K, n) have to be different members of num."""
    check_features(new, new.dim(), dim)
    if slots.shape not in (new.shape[:-1], new.shape[-2:-1]) or not new.numel():
        raise ValueError(f"slots {tuple(slots.shape)} do not fit new features {tuple(new.shape)}")
    ordered = slots.sort(-1).values
    if ordered.min() < 0 or ordered.max() >= num or (ordered.diff(dim=-1) == 0).any():
        raise ValueError(f"slots must be different members of 0 .. {num - 1}")


# ---- Moments, and the Frechet distance of two Gaussians -------------------------------------------------------------

class Moments:
    """Weighted running sums of features (d,): enough for mean and covariance, cheap to add to, take from and fade."""
    def __init__(self, dim, device="cpu"):
        self.weight = 0.0                                       # sum of the images' weights
        self.squares = 0.0                                      # sum of their squares
        self.sum = torch.zeros(dim, dtype=torch.float64, device=device)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)

    def add(self, f, sign=1):
        """Add features (n, d) at weight 1, or with sign=-1 take away what was added."""
        for rows in f.split(4096):                              # many features in float32 are never all in float64
            rows = rows.double()
            self.weight += sign * len(rows)
            self.squares += sign * len(rows)
            self.sum += sign * rows.sum(0)
            self.outer.addmm_(rows.T, rows, alpha=sign)
        return self

    def fade(self, rho):                    # multiply the weight of everything so far by rho
        self.weight *= rho
        self.squares *= rho**2
        self.sum = rho * self.sum
        self.outer = rho * self.outer
        return self

    def gaussian(self):
        """mu (d,), cov (d, d): the unbiased covariance, whose denominator is N - 1 when all weights are 1."""
        mu = self.sum / self.weight
        cov = (self.outer - self.weight * mu.outer(mu)) / (self.weight - self.squares / self.weight)
        return mu, (cov + cov.T) / 2


def long_enough(memory, batch, dim):
    """Memory of moments whose effective number of images, batch (1 + memory) / (1 - memory), is at least 5 dim."""
    return max(memory, (5 * dim - batch) / (5 * dim + batch))


def covariance_root(cov):
    """
    L (d, r) with L L^T = cov: Cholesky or, if cov is near singular, its r eigenvectors of variance above RANK_FLOOR of
    the largest. Where real data do not vary, as along the normal of the hyperplane that a last layer norm puts features
    in, generated variance only adds its trace to FD, so that all that is done with this L is exact.
    """
    root, info = torch.linalg.cholesky_ex(cov)
    pivots = root.diagonal().square()
    if info.item() == 0 and pivots.min() > 1e3 * RANK_FLOOR * pivots.max():
        return root
    vals, vecs = torch.linalg.eigh(cov)
    kept = vals >= RANK_FLOOR * vals[-1]
    return vecs[:, kept] * vals[kept].sqrt()


def distance_to_root(mu1, cov1, mu2, root2):
    """Frechet distance (a 0-d tensor) with cov2 = root2 root2^T, see covariance_root."""
    vals = torch.linalg.eigvalsh(root2.T @ cov1 @ root2).clamp(min=0)       # those of cov1 cov2
    return (mu1 - mu2).square().sum() + cov1.trace() + root2.square().sum() - 2 * vals.sqrt().sum()


def frechet_distance(mu1, cov1, mu2, cov2):
    """
    ||mu1 - mu2||^2 + Tr(cov1 + cov2 - 2 (cov1 cov2)^(1/2)), Heusel et al. 2017, eq. 6. mu (d,), cov (d, d); a float.
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    mu1, cov1 = checked_moments(mu1, cov1)
    mu2, cov2 = checked_moments(mu2, cov2)
    if mu1.shape != mu2.shape:
        raise ValueError(f"moments of {len(mu1)} and of {len(mu2)} dimensions cannot be compared")
    return distance_to_root(mu1, cov1, mu2, covariance_root(cov2)).item()


class Spectrum:
    """
    A generated Gaussian (mu, cov) seen from the real one, with real_root = L, L L^T = real_cov: it is M = L^T cov L =
    U diag(vals) U^T, vals (r,) ascending, axes = L U (d, r), and FD needs tr M^(1/2) = sum sqrt(vals). One
    eigendecomposition, around which all small changes of the set are cheap.
    """
    def __init__(self, mu, cov, real_mu, real_root):
        vals, vecs = torch.linalg.eigh(real_root.T @ cov @ real_root)
        self.singular = vals[0].item() <= RANK_FLOOR * vals[-1].item()
        self.vals = vals.clamp(min=0)
        self.axes = real_root @ vecs
        self.mu = mu
        self.shift = mu - real_mu
        self.trace = cov.trace()
        self.root_trace = self.vals.sqrt().sum()
        self.fd = (self.shift.square().sum() + self.trace + real_root.square().sum() - 2 * self.root_trace).item()

    def influence(self, features):
        """
        First variation of FD(., real), per image: the derivative of FD when a little weight moves from the set to that
        image. Features (n, d) => psi (n,) float64, in units of FD; negative is good, and the mean over the set is about
        0. With m = real_mu and T = L U w^(-1/2) U^T L^T, the optimal transport from (mu, cov) to the real Gaussian,
        psi(f) = (f-mu)^T (I-T) (f-mu) + 2 (mu-m)^T (f-mu) - tr((I-T) cov). Raises ValueError if cov is singular (fewer
        images than dimensions): psi is not finite then.
        """
        if self.singular:
            raise ValueError("the generated covariance is singular, so no image has a first variation: "
                             "the set needs more images than features have dimensions, better five times as many")
        f = features - self.mu
        transported = (f @ self.axes).square() @ self.vals.rsqrt()          # f^T T f
        return f.square().sum(1) - transported + 2 * f @ self.shift - self.trace + self.root_trace


def standard_error(psi, labels=None):
    """
    Standard error of a FD from the first variation of its images, psi (n,): delta method. With labels (n,): images were
    drawn in equal numbers per class, so only the variance within classes counts. Of a difference of psi: it is paired.
    """
    if labels is None or len(psi) < 3 * len(labels.unique()):               # too few to know the variance of a class
        labels = torch.zeros_like(psi)
    classes = labels.unique()
    squares = sum((psi[labels == k] - psi[labels == k].mean()).square().sum() for k in classes)
    return (squares / (len(psi) - len(classes)) / len(psi)).sqrt().item()


# ---- The change of tr M^(1/2), by small determinants ----------------------------------------------------------------

# What is computed. FD feels a change of the set through tr (M + E)^(1/2) - tr M^(1/2), with M = diag(vals) (r, r) and
# E = Y^T D Y of few rows Y (m, r), one for every image that comes (D = 1) or goes (D = -1). With M_s = M + s E it is
#     1/2 int_0^1 tr(M_s^(-1/2) E) ds.
# Put a sum of poles, sum_j c_j / (x + t_j), for x^(-1/2). The integral of a pole is the log of a small determinant:
#     int_0^1 tr((M_s + t)^(-1) E) ds = log det(I + D G),  G = Y (M + t)^(-1) Y^T  (m, m).
# The first order, tr(M^(-1/2) E) / 2, is known exactly, so poles serve only for the rest: log det(I + D G) - tr(D G).
#
# Why the error is bounded. Let e(x) be the poles' error of x^(-1/2): the change is off by
#     1/2 int_0^1 tr((e(M_s) - e(M)) E) ds.
# In the eigenvectors of M_s, d/ds tr(e(M_s) E) = sum_ik e[x_i, x_k] E_ik^2, and these divided differences are at most
# ripple (x_i x_k)^(-3/4), ripple = max |e'(x)| x^(3/2). Where E takes away at most the fraction `shrink` of M, that is
# M_s >= (1 - s shrink) M, the integral over s gives
#     error <= ripple * curvature,  curvature = tr((M^(-3/4) E)^2) / (1 + (1 - shrink)^(1/2))^2.

def quadrature(low, high, curvature, allowed):
    """
    Poles t, c (nodes,) for a spectrum in [low, high], 10 to 60 as the allowed errors (K,) need, and bounds (K,) of the
    errors of changes of these curvatures (K,), by the ripple at 400 points. Hale, Higham, Trefethen 2008, method 3.
    """
    x, K = np.geomspace(low, high, 400), ellipkm1(low / high)
    for nodes in range(10, 61, 2):
        sn, cn, dn, _ = ellipj((np.arange(nodes // 2) + 0.5) * K / nodes, 1 - low / high)
        # The upper half mirrors the lower by t -> low high / t, as ellipj has no digits left there.
        t = np.concatenate([low * (sn / cn)**2, high * (cn / sn)**2])
        c = 2 * K / (np.pi * nodes) * np.concatenate([low**0.5 * dn / cn**2, high**0.5 * dn / sn**2])
        slope = 0.5 - (c / (x[:, None] + t)**2).sum(1) * x**1.5             # e'(x) x^(3/2)
        error = np.abs(slope).max() * curvature
        if (error <= allowed).all():
            break
    return torch.from_numpy(t).to(curvature), torch.from_numpy(c).to(curvature), error


def higher_orders(vals, rows, signs, shared, t, c):
    """Half the sum of c_j (log det(I + D G_j) - tr(D G_j)) per candidate, D = diag(signs): (K,)."""
    K, m, r = rows.shape
    own, nodes = m - shared, len(t)
    scale = 1 / (vals + t[:, None, None])                                   # (nodes, 1, r)
    some = max(1, AT_ONCE // (nodes * own * r))                             # candidates at once
    scaled = rows.new_empty(some, nodes, own, r)                            # one buffer for all: half of the time
    G, eye = rows.new_empty(some, nodes, m, m), torch.eye(m).to(rows)
    if shared:                              # what all candidates share needs its Gram matrices once
        G[:, :, own:, own:] = rows[0, own:] * scale @ rows[0, own:].T
    changes = []
    for Y in rows.split(some):                                              # (k, m, r)
        k = len(Y)
        torch.mul(Y[:, None, :own], scale, out=scaled[:k])
        G[:k, :, :own] = (scaled[:k].flatten(1, 2) @ Y.mT).view(k, nodes, own, m)
        G[:k, :, own:, :own] = G[:k, :, :own, own:].mT
        X = signs[:, None] * G[:k]                                          # D G
        log_det = torch.linalg.slogdet(eye + X).logabsdet                   # (k, nodes)
        changes.append((log_det - X.diagonal(dim1=2, dim2=3).sum(2)) @ c / 2)
    return torch.cat(changes)


def by_determinants(vals, rows, added, shared=0, tolerance=QUADRATURE_ERROR):
    """See root_trace_change; None where the error's bound is too large."""
    kept = vals > RANK_FLOOR * vals[-1]     # axes in which images vary, as a feature that is always 0 does not
    if not kept.any() or rows[..., ~kept].square().sum() > 1e-20 * rows.square().sum():         # new images do
        return None
    vals, rows = vals[kept], rows[..., kept]
    signs = torch.where(torch.arange(rows.shape[1]) < added, 1.0, -1.0).to(vals)
    new, gone = rows[:, :added], rows[:, added:]
    shrink = torch.linalg.eigvalsh(gone / vals @ gone.mT)[:, -1].max().item()
    if shrink > 0.99:
        return None
    # New and gone rows as if they were of different directions: the true curvature is less.
    curvature = sum((Y * vals**-0.75 @ Y.mT).square().sum((1, 2)) for Y in (new, gone)) / (1 + (1 - shrink)**0.5)**2
    half_inverse_root = vals.rsqrt() / 2
    allowed = (tolerance * max(added, 1)**0.5 * rows.square().sum(1) @ half_inverse_root).cpu()
    low = (1 - shrink) * vals[0].item()
    high = vals[-1].item() + new.square().sum((1, 2)).max().item()
    t, c, error = quadrature(low, high, curvature.cpu(), allowed)           # a GPU is asked once
    if not (error <= allowed).all():
        return None
    first_order = signs @ rows.square() @ half_inverse_root
    return first_order + higher_orders(vals, rows, signs, shared, t.to(vals), c.to(vals))


def by_eigenvalues(vals, rows, added):      # see root_trace_change
    changed = [vals.diag() + Y[:added].T @ Y[:added] - Y[added:].T @ Y[added:] for Y in rows]
    return torch.stack([torch.linalg.eigvalsh(M).clamp(min=0).sqrt().sum() for M in changed]) - vals.sqrt().sum()


def root_trace_change(vals, rows, added, shared=0, tolerance=QUADRATURE_ERROR):
    """
    tr (M + E)^(1/2) - tr M^(1/2) (K,), M = diag(vals), for candidates with rows Y (K, m, r): the first `added` come,
    the others go, the last `shared` are the same for all. By determinants where they are faster and the bound of their
    error is small, else by all eigenvalues.
    """
    m, r = rows.shape[1:]
    change = by_determinants(vals, rows, added, shared, tolerance) if m <= r // 2 + 1 else None
    return by_eigenvalues(vals, rows, added) if change is None else change


def swap_rows(new, removed, num):
    """Rows Y (K, 2n + 1, r) where new (K, n, r) replace removed (n, r) or (K, n, r) of num, centred at the old mean."""
    moved = (new.sum(1) - removed.sum(-2))[:, None] / num**0.5              # one more that goes, as the mean moves
    return torch.cat([new, moved, removed.expand(new.shape)], dim=1) / (num - 1)**0.5


# ---- Sets of images that can be asked for their distance and its changes ---------------------------------------------

class Stream:
    """
    The Frechet distance of a stream of images, which begins with features (N, d), to the Gaussian of real data,
    real_mu (d,), real_cov (d, d): moments whose past fades by `memory` with every push; no image is kept.
    Raises ValueError for shapes that do not fit or values that are not finite.
    """
    def __init__(self, features, real_mu, real_cov, memory=1.0):
        self.real_mu, real_cov = checked_moments(real_mu, real_cov, features.device)
        check_features(features, 2, len(self.real_mu))
        self.real_root = covariance_root(real_cov)
        self.memory = memory
        self.set(Moments(len(self.real_mu), features.device).add(features))

    def set(self, moments):                 # go on from these Moments
        self.moments = moments
        self.known_spectrum = None

    @property
    def spectrum(self):
        if self.known_spectrum is None:
            self.known_spectrum = Spectrum(*self.moments.gaussian(), self.real_mu, self.real_root)
        return self.known_spectrum

    @property
    def fd(self):
        return self.spectrum.fd

    def push(self, features):               # new images (n, d), at weight 1
        check_features(features, 2, len(self.real_mu))
        self.set(self.moments.fade(self.memory).add(features))

    def influence(self, features):
        """First variation psi (n,) of FD for images with features (n, d), see Spectrum. Negative is good."""
        check_features(features, 2, len(self.real_mu))
        return self.spectrum.influence(features)

    def leave_one_out(self, members):
        """
        Exact change of FD were one image of weight 1 left out, for each of the features members (n, d) => (n,):
        positive is good, to first order -psi / (weight - 1).
        """
        check_features(members, 2, len(self.real_mu))
        spectrum, W, Q = self.spectrum, self.moments.weight, self.moments.squares
        g = members - spectrum.mu
        norm = g.square().sum(1)
        # Without the image the mean is mu - g / (W - 1), and the covariance grow (cov - drop g g^T).
        drop = W / ((W - 1) * (W - Q / W))
        grow = (W - Q / W) / (W - 1 - (Q - 1) / (W - 1))
        rows = drop**0.5 * (g @ spectrum.axes)[:, None]         # (n, 1, r)
        change = root_trace_change(spectrum.vals, rows, added=0, tolerance=1e-3 * QUADRATURE_ERROR)
        mean = norm / (W - 1)**2 - 2 * g @ spectrum.shift / (W - 1)
        trace = (grow - 1) * spectrum.trace - grow * drop * norm
        root_trace = (grow**0.5 - 1) * spectrum.root_trace + grow**0.5 * change
        return mean + trace - 2 * root_trace

    def state_dict(self):
        return dict(vars(self.moments))                         # for torch.load(weights_only=True)

    def load_state_dict(self, state):
        moments = copy.copy(self.moments)
        for name, x in state.items():
            setattr(moments, name, x.to(moments.sum) if torch.is_tensor(x) else x)
        self.set(moments)


class ReferenceSet(Stream):
    """
    A generated set, features (N, d), against the Gaussian of real data, real_mu (d,), real_cov (d, d): a stream that
    keeps all images at weight 1, and knows how far FD falls if some are replaced, the subset-replace reward of arXiv
    2607.02291. Raises ValueError for shapes that do not fit, values that are not finite, or less than 2 members.
    """
    def __init__(self, features, real_mu, real_cov):
        super().__init__(features, real_mu, real_cov)
        check_features(features, 2, len(self.real_mu), least=2)
        self.features = features.clone()
        self.oldest = 0                                         # the member that push replaces next

    def swap_gain(self, slots, new):
        """
        FD before minus FD after, exactly, were the features new[k] (n, d) of candidate k to replace the members
        slots (n,), shared by all candidates, or slots[k] of a (K, n) tensor. new (K, n, d) => (K,) float64.
        Changes nothing. Raises ValueError for slots or features that do not fit or are not finite.
        """
        check_swap(slots, new, *self.features.shape)
        spectrum, N = self.spectrum, len(self.features)
        removed = self.features[slots]                          # (n, d) or (K, n, d)
        f, g = new - spectrum.mu, removed - spectrum.mu
        step = (f.sum(1) - g.sum(-2)) / N                       # (K, d) of the mean
        mean = 2 * step @ spectrum.shift + step.square().sum(1)
        trace = (f.square().sum((1, 2)) - g.square().sum((-2, -1)) - N * step.square().sum(1)) / (N - 1)
        rows = swap_rows(f @ spectrum.axes, g @ spectrum.axes, N)
        shared = len(slots) if slots.dim() == 1 else 0
        return 2 * root_trace_change(spectrum.vals, rows, new.shape[1], shared) - mean - trace

    def replace(self, slots, features):
        """Commit a swap: members slots (n,) become features (n, d)."""
        check_swap(slots, features, *self.features.shape)
        features = features.to(self.features)                   # what is stored, perhaps in float32, is what counts
        self.set(copy.deepcopy(self.moments).add(self.features[slots], -1).add(features))
        self.features[slots] = features

    def push(self, features):
        """The queue: features (n, d) take the places of the oldest members. Returns these slots (n,)."""
        features = features[-len(self.features):]
        slots = (self.oldest + torch.arange(len(features))) % len(self.features)
        self.replace(slots, features)
        self.oldest = (self.oldest + len(slots)) % len(self.features)
        return slots

    def state_dict(self):
        return dict(features=self.features, oldest=self.oldest, stream=super().state_dict())

    def load_state_dict(self, state):       # ValueError if of another number of members or of other features
        if state["features"].shape != self.features.shape:
            raise ValueError(f"features {tuple(state['features'].shape)}: needed are {tuple(self.features.shape)}")
        self.features = state["features"].to(self.features).clone()
        self.oldest = state["oldest"]
        super().load_state_dict(state["stream"])


def kernel_sums(f, others):
    """Sums (n,) of KID's kernel, (x.y / d + 1)^3, of features (n, d) with all others (m, d)."""
    scaled = others.double().T / others.shape[1]
    return torch.cat([(rows.double() @ scaled + 1).pow(3).sum(1) for rows in f.split(1000)])


def own_kernel(f):                          # of each image with itself (n,)
    return (f.double().square().mean(1) + 1).pow(3)


class KernelSet:
    """
    KID, the unbiased MMD^2 of Binkowski et al. 2018, between a generated set, features (N, d), and real images,
    real_features (M, d). All names, fd for its distance included, mean what ReferenceSet's do, and raise the same.
    """
    def __init__(self, features, real_features):
        for f in (features, real_features):
            check_features(f, 2, features.shape[1], least=2)
        self.real = real_features.double()
        self.oldest = 0
        within = kernel_sums(self.real, self.real).sum() - own_kernel(self.real).sum()
        self.real_term = within / (len(self.real) * (len(self.real) - 1))
        self.set(features.clone())

    def set(self, features):
        self.features = features
        self.totals = self.sums(features).sum(0)

    def sums(self, f):
        """The kernel of images (n, d) with themselves, summed over the set, summed over the real images: (n, 3)."""
        return torch.stack([own_kernel(f), kernel_sums(f, self.features), kernel_sums(f, self.real)], dim=1)

    def distance(self, totals, num):
        """KID of num images from the three sums over all of them, totals (.., 3) => (..)."""
        diagonal, within, across = totals.unbind(-1)
        return (within - diagonal) / (num * (num - 1)) + self.real_term - 2 * across / (num * len(self.real))

    @property
    def fd(self):
        return self.distance(self.totals, len(self.features)).item()

    def influence(self, features):
        """First variation (n,): the mean kernel with the set less that with real images; its mean over the set is 0."""
        check_features(features, 2, self.features.shape[1])
        _, with_set, with_real = (self.sums(features) - self.totals / len(self.features)).unbind(1)
        return 2 * (with_set / len(self.features) - with_real / len(self.real))

    def leave_one_out(self, members):
        itself, with_set, with_real = self.sums(members).unbind(1)
        share = torch.stack([itself, 2 * with_set - itself, with_real], dim=1)
        return self.distance(self.totals - share, len(self.features) - 1) - self.fd

    def swap_gain(self, slots, new):
        check_swap(slots, new, *self.features.shape)
        gains = []
        for places, f in zip(slots.to(new.device).expand(new.shape[:2]), new):
            changed = copy.copy(self)
            changed.set(self.features.index_copy(0, places, f.to(self.features)))
            gains.append(self.fd - changed.fd)
        return torch.tensor(gains, dtype=torch.float64, device=new.device)

    def replace(self, slots, features):
        check_swap(slots, features, *self.features.shape)
        self.set(self.features.index_copy(0, slots.to(features.device), features.to(self.features)))

    push = ReferenceSet.push                # the same queue

    def state_dict(self):
        return dict(features=self.features, oldest=self.oldest)

    def load_state_dict(self, state):
        self.oldest = state["oldest"]
        self.set(state["features"].to(self.features))
