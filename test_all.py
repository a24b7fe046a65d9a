"""
Truths, not calls: closed forms, invariances, independent implementations, and every command as a user types it.

python -m pytest -q test_all.py                                 # about three minutes on two cores
"""
import contextlib
import dis
import inspect
import io
import json
import math
import os
import re
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import fid
import models
import reward
import sample
import train_rl

ROOT = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(ROOT, "assets", "golden")
SCRIPTS = (models, sample, reward, fid, train_rl)
torch.manual_seed(0)


def golden(name):
    return np.load(os.path.join(GOLDEN, name))


def error(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.fixture(scope="session", autouse=True)
def group():
    models.setup()


def run(script, *argv):
    """Exit code, stdout, stderr of a script called in-process as a user types it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def mistakes(script, *argv):
    code, _, err = run(script, *argv)
    lines = [line for line in re.split(r"[\r\n]", err) if line.startswith("error: ")]
    assert code in (1, 2) and len(lines) == 1 and "Traceback" not in err, (argv, code, err)
    return code, lines[0]


# ---- The Frechet distance and its changes --------------------------------------------------------------------------

def spd(d, rng):
    a = torch.randn(d, 2 * d, generator=rng, dtype=torch.float64)
    return a @ a.T / d


def test_frechet_distance_closed_forms():
    eye, zero = torch.eye(5).double(), torch.zeros(5).double()
    assert abs(reward.frechet_distance(zero, eye, zero + 2, eye) - 5 * 2**2) < 1e-9        # shift by 2 in 5 dimensions
    assert abs(reward.frechet_distance(zero, eye, zero, 9 * eye) - 5 * (3 - 1)**2) < 1e-9  # scale by 3
    diag = lambda *x: torch.diag(torch.tensor(x).double())
    assert abs(reward.frechet_distance(torch.tensor([1., 2, 2]), diag(1., 4, 9), torch.zeros(3), diag(4., 1, 16)) - 12) < 1e-9
    two = torch.tensor([[2., 1], [1, 2]])
    exact = 9 - 2 * math.sqrt(10 + 4 * math.sqrt(3))
    assert abs(reward.frechet_distance(torch.zeros(2), two, torch.zeros(2), diag(1., 4)) - exact) < 1e-9
    rng = torch.Generator().manual_seed(1)
    T, S = spd(6, rng), spd(6, rng)                                                        # S1 = T S2 T
    exact = torch.trace((T - torch.eye(6)) @ (T - torch.eye(6)) @ S).item()
    assert abs(reward.frechet_distance(torch.zeros(6), T @ S @ T, torch.zeros(6), S) - exact) < 1e-8


def test_frechet_distance_golden():
    g = golden("frechet.npz")
    for name in ("tiny3", "tiny2", "d16", "d64_full", "d64_same", "d64_singular", "d64_both_singular"):
        fd = reward.frechet_distance(*(g[f"{name}.{k}"] for k in ("mu1", "sigma1", "mu2", "sigma2")))
        assert abs(fd - g[f"{name}.fid"]) < (1e-5 if "singular" in name else 1e-9), name


def test_swap_golden():
    g = golden("frechet.npz")
    features = torch.from_numpy(g["swap.x_int16"] / 256)
    reference = reward.ReferenceSet(features, g["swap.mu_ref"], g["swap.sigma_ref"])
    assert abs(reference.fd - g["swap.fid_base"]) < 1e-10
    for q in range(5):
        slots, new = torch.from_numpy(g[f"swap.{q}.idx"]).long(), torch.from_numpy(g[f"swap.{q}.new_int16"] / 256)
        assert abs(reference.swap_gain(slots, new[None]).item() + g["swap.delta"][q]) < 1e-10, q
    base = reference.fd
    for q in range(3):
        reference.replace(torch.from_numpy(g[f"swap.{q}.idx"]).long(), torch.from_numpy(g[f"swap.{q}.new_int16"] / 256))
        assert abs(reference.fd - base - g["swap.chain_delta"][q]) < 1e-10, q


@pytest.mark.parametrize("d, N, n, K", [(3, 40, 1, 2), (8, 100, 7, 3), (16, 60, 30, 4), (5, 500, 50, 2)])
def test_swap_gain_is_recomputation_and_changes_nothing(d, N, n, K):
    rng = torch.Generator().manual_seed(d)
    features, new = torch.randn(N, d, generator=rng), torch.randn(K, n, d, generator=rng) + 0.3
    mu, cov = torch.randn(d, generator=rng).double(), spd(d, rng)
    reference = reward.ReferenceSet(features, mu, cov)
    own = torch.stack([torch.randperm(N, generator=rng)[:n] for _ in range(K)])
    for slots in (own[0], own):
        gains = reference.swap_gain(slots, new)
        for k in range(K):
            f = features.clone().double()
            f[own[k] if slots.dim() == 2 else slots] = new[k].double()
            again = reward.frechet_distance(f.mean(0), torch.cov(f.T), mu, cov)
            assert abs(reference.fd - again - gains[k]) < 1e-9
    assert torch.equal(reference.features, features)
    order = torch.randperm(n, generator=rng)
    assert torch.allclose(reference.swap_gain(own[0][order], new[:, order.flip(0)]), reference.swap_gain(own[0], new),
                          atol=1e-10), "members of a subset have no order"


def test_replace_and_take_back():
    rng = torch.Generator().manual_seed(2)
    features, new = torch.randn(200, 6, generator=rng), torch.randn(20, 6, generator=rng) + 1
    reference = reward.ReferenceSet(features, torch.zeros(6), torch.eye(6))
    slots = torch.randperm(200, generator=rng)[:20]
    promised = reference.fd - reference.swap_gain(slots, new[None])[0]
    before = reference.fd
    reference.replace(slots, new)
    assert abs(reference.fd - promised) < 1e-10
    reference.replace(slots, features[slots])
    assert abs(reference.fd - before) < 1e-10


def test_first_variation_is_the_derivative():
    rng = torch.Generator().manual_seed(3)
    d = 6
    f = torch.randn(300, d, generator=rng).double()
    mu, cov, m, C = f.mean(0), torch.cov(f.T, correction=0), torch.randn(d, generator=rng).double(), spd(d, rng)
    x = torch.randn(4, d, generator=rng).double() * 2
    psi = reward.influence(x, mu, cov, m, reward.covariance_root(C))
    for i in range(4):
        def mixture(h):                                         # (1-h) p + h delta_x
            mean = (1 - h) * mu + h * x[i]
            second = (1 - h) * (cov + torch.outer(mu, mu)) + h * torch.outer(x[i], x[i])
            return reward.frechet_distance(mean, second - torch.outer(mean, mean), m, C)
        slope = (mixture(1e-5) - mixture(-1e-5)) / 2e-5
        assert abs(slope - psi[i].item()) < 1e-5 * max(1, abs(slope))
    assert abs(reward.influence(f, mu, cov, m, reward.covariance_root(C)).mean()) < 1e-10, "its mean over the set is 0"


def test_first_variation_predicts_swaps_and_the_standard_error():
    rng = torch.Generator().manual_seed(4)
    features, new = torch.randn(4000, 8, generator=rng), torch.randn(20, 40, 8, generator=rng) * 1.2
    reference = reward.ReferenceSet(features, torch.ones(8) * 0.2, 1.1 * torch.eye(8))
    slots = torch.arange(40)
    psi_new, psi_old = reference.influence(new.flatten(0, 1)).view(20, 40), reference.influence(features[slots])
    first_order = 40 / 4000 * (psi_old.mean() - psi_new.mean(1))
    gains = reference.swap_gain(slots, new)
    assert torch.corrcoef(torch.stack([first_order, gains]))[0, 1] > 0.99
    fds = [reward.ReferenceSet(torch.randn(1000, 8, generator=rng), torch.ones(8) * 0.2, 1.1 * torch.eye(8)).fd
           for _ in range(200)]
    predicted = reward.standard_error(reference.influence(features)) * 2                  # 1000 images, not 4000
    assert 0.8 < np.std(fds) / predicted < 1.25, (np.std(fds), predicted)


def test_moments_add_take_and_fade():
    rng = torch.Generator().manual_seed(5)
    old, new = torch.randn(40, 6, generator=rng), torch.randn(5, 6, generator=rng)
    a = reward.Moments(6).add(old).add(old[:5], -1).add(new)
    f = torch.cat([new, old[5:]]).double()
    assert torch.allclose(a.gaussian()[0], f.mean(0)) and torch.allclose(a.gaussian()[1], torch.cov(f.T))
    b = reward.Moments(6).add(old).fade(0.5).add(new)
    weights = torch.cat([torch.full((40,), 0.5), torch.ones(5)])
    f = torch.cat([old, new]).double()
    assert torch.allclose(b.gaussian()[1], torch.cov(f.T, aweights=weights.double()))
    assert math.isclose(b.effective, (weights.sum()**2 / weights.square().sum()).item(), rel_tol=1e-6)


@pytest.mark.parametrize("features, mu, cov, said", [
    (torch.full((10, 3), math.nan), torch.zeros(3), torch.eye(3), "NaN"),
    (torch.randn(10, 4), torch.zeros(3), torch.eye(3), "needed are 2 axes"),
    (torch.randn(10, 3), torch.zeros(3), torch.eye(4), "do not fit"),
    (torch.randn(10, 3), torch.zeros(3), torch.eye(3) * math.inf, "NaN or infinite"),
])
def test_reward_refuses(features, mu, cov, said):
    with pytest.raises(ValueError, match=said):
        reward.ReferenceSet(features, mu, cov)


def test_influence_refuses_too_few_images():
    with pytest.raises(ValueError, match="more images than"):
        reward.ReferenceSet(torch.randn(5, 8), torch.zeros(8), torch.eye(8)).influence(torch.randn(2, 8))


def test_kid_and_neighbours_golden():
    g = golden("metrics.npz")
    real, gen = torch.from_numpy(g["real"]).double(), torch.from_numpy(g["gen"]).double()
    assert abs(fid.kid(real, gen) - g["kid_poly3_unbiased"]) < 1e-12
    found = fid.prdc(real, gen)
    assert all(abs(found[k] - g[k]) < 1e-9 for k in ("precision", "recall", "density", "coverage")), found
    ties = fid.prdc(torch.from_numpy(g["ties_real"]).double(), torch.from_numpy(g["ties_gen"]).double())
    assert abs(ties["precision"] - g["ties_le_precision"]) < 1e-9 and abs(ties["recall"] - g["ties_le_recall"]) < 1e-9
    assert abs(ties["density"] - g["ties_lt_density"]) < 1e-9 and abs(ties["coverage"] - g["ties_lt_coverage"]) < 1e-9


def test_histogram_distance():
    x = torch.rand(5000, 3)
    assert fid.histogram_distance(x, x) == 0
    assert 0.45 < fid.histogram_distance(x, x / 2) < 0.55 and fid.histogram_distance(x, x + 2) > 0.94


# ---- The reward engine ----------------------------------------------------------------------------------------------

def again(features, slots, new, mu, cov):
    """FD after a swap, all of it once more."""
    return reward.frechet_distance(*reward.Moments(len(mu)).add(features.index_copy(0, slots, new)).gaussian(), mu, cov)


def swapped_rows(spectrum, N, n, K, rng, shared=True):
    """vals, new (K, n, d), removed: rows in the axes of M = diag(vals), removed of N members whose covariance is M."""
    x = torch.randn(N, len(spectrum), generator=rng, dtype=torch.float64) @ spectrum.sqrt().diag()
    vals, axes = torch.linalg.eigh(torch.cov(x.T))
    members = (x - x.mean(0)) @ axes
    new = torch.randn(K, n, len(vals), generator=rng, dtype=torch.float64) * vals.sqrt() * 1.3
    own = torch.stack([torch.randperm(N, generator=rng)[:n] for _ in new])
    return vals, new, members[:n] if shared else members[own]


@pytest.mark.parametrize("spectrum", [
    (torch.arange(60) + 2.0)**-2.2, torch.ones(60), torch.logspace(0, -11, 60), torch.tensor([1.0, 1e-9]).repeat(30),
], ids=["power law", "flat", "geometric", "two levels"])
def test_quadrature_error_is_within_its_proof(spectrum, monkeypatch):
    proven, quadrature = [], reward.quadrature

    def watched(*a, **k):
        proven.append(quadrature(*a, **k))
        return proven[-1]

    monkeypatch.setattr(reward, "quadrature", watched)
    for N, n, shared in ((70, 3, True), (200, 1, False), (200, 12, True), (3000, 12, False), (3000, 60, True)):
        rng = torch.Generator().manual_seed(N)
        vals, new, removed = swapped_rows(spectrum.double(), N, n, 3, rng, shared)
        exact, nodes = reward.root_trace_change(vals, new, removed, N, largest=0)
        assert nodes == 0
        for tolerance in (math.inf, 1e-4, reward.QUADRATURE_ERROR):
            monkeypatch.setattr(reward, "QUADRATURE_ERROR", tolerance)
            found, nodes = reward.root_trace_change(vals, new, removed, N, largest=n)
            error = proven[-1][2] if nodes else 0.0
            assert (found - exact).abs().max() <= error + 1e-11, (N, n, nodes, error)
        assert N == 70 or nodes >= 10 or spectrum[-1] < 1e-10, "determinants where the set has images to spare"


def test_swap_golden_by_determinants(monkeypatch):
    g = golden("frechet.npz")
    monkeypatch.setattr(reward, "QUADRATURE_ERROR", 1e-9)
    reference = reward.ReferenceSet(torch.from_numpy(g["swap.x_int16"] / 256), g["swap.mu_ref"], g["swap.sigma_ref"])
    change = reward.root_trace_change
    for largest in (0, 200):                                    # eigenvalues, determinants
        monkeypatch.setattr(reward, "root_trace_change", lambda *a: change(*a, largest=largest))
        for q in range(5):
            slots, new = torch.from_numpy(g[f"swap.{q}.idx"]).long(), torch.from_numpy(g[f"swap.{q}.new_int16"] / 256)
            assert abs(reference.swap_gain(slots, new[None]).item() + g["swap.delta"][q]) < 1e-10, q
            assert (reference.nodes > 0) == (largest > 0)


@pytest.mark.parametrize("kind, d, N, n", [
    ("plain", 40, 300, 8), ("plain", 5, 12, 2), ("power law", 48, 400, 12), ("fewer than d", 20, 12, 3),
    ("d + 1", 12, 13, 2),
    ("constant feature", 10, 80, 2), ("all constant", 6, 30, 2), ("duplicates", 24, 200, 5), ("far mean", 16, 100, 4),
    ("real singular", 24, 150, 4), ("all but two", 4, 9, 7)])
def test_gain_and_leave_one_out_are_recomputation(kind, d, N, n):
    rng = torch.Generator().manual_seed(d * N)
    f, new = torch.randn(N, d, generator=rng), torch.randn(3, n, d, generator=rng) + 0.4
    mu, cov = torch.randn(d, generator=rng).double(), spd(d, rng)
    scale = (torch.arange(d) + 2.0)**-0.55 if kind == "power law" else torch.ones(d)
    f, new, cov = f * scale, new * scale, cov * scale[:, None] * scale
    if kind == "constant feature":
        f[:, 3], new[..., 3] = 1.5, 1.5
    elif kind == "all constant":
        f, new = torch.ones(N, d), torch.ones(3, n, d)
    elif kind == "duplicates":
        f[N // 2:], new[:, 1] = f[:N // 2].clone(), new[:, 0]
    elif kind == "far mean":
        f, new = f + 1000, new + 1000
    elif kind == "real singular":
        cov[:, 0] = cov[0] = 0
    reference = reward.ReferenceSet(f, mu, cov)
    order = torch.randperm(N, generator=rng)
    shuffled = reward.ReferenceSet(f[order], mu, cov)
    singular = reference.stream.base.singular
    assert singular == (kind in ("fewer than d", "constant feature", "all constant", "real singular"))
    near = (1e-6 if singular else 1e-9) * max(1, reference.stream.base.traces, (f[0] - mu).square().sum() / 100)
    own = torch.stack([torch.randperm(N, generator=rng)[:n] for _ in new])
    for slots in (own[0], own):
        gains = reference.swap_gain(slots, new)
        for s, x, gain in zip(slots.expand(3, n), new, gains):
            assert abs(reference.fd - again(f, s, x, mu, cov) - gain) < near
        moved = order.argsort()[slots]
        assert (shuffled.swap_gain(moved, new) - gains).abs().max() < near, "members have no order"
    if singular or kind == "d + 1":
        with pytest.raises(ValueError, match="more images than"):
            reference.leave_one_out(f[:3])
    else:
        for i, change in enumerate(reference.leave_one_out(f[:3])):
            without = reward.Moments(d).add(torch.cat([f[:i], f[i + 1:]])).gaussian()
            assert abs(reward.frechet_distance(*without, mu, cov) - reference.fd - change) < near


def test_leave_one_out_adds_up_to_second_order():
    rng = torch.Generator().manual_seed(9)
    f, mu, cov = torch.randn(1000, 6, generator=rng).double() * 1.2, torch.zeros(6), torch.eye(6)
    reference = reward.ReferenceSet(f, mu, cov)
    single, psi = reference.leave_one_out(f), reference.influence(f)
    assert torch.corrcoef(torch.stack([single, -psi]))[0, 1] > 0.9999
    rest = []
    for n in (10, 20, 40):
        subsets = torch.stack([torch.randperm(1000, generator=rng)[:n] for _ in range(60)])
        without = [reward.Moments(6).add(f).add(f[s], -1).gaussian() for s in subsets]
        change = torch.tensor([reward.frechet_distance(*m, mu, cov) - reference.fd for m in without])
        rest.append((change - single[subsets].sum(1)).square().mean().sqrt() / change.square().mean().sqrt())
    assert rest[2] < 0.2 and all(1.2 < b / a < 2.5 for a, b in zip(rest, rest[1:])), rest


def test_stream_leaves_out_at_its_weights():
    rng = torch.Generator().manual_seed(10)
    old, new = torch.randn(100, 4, generator=rng), torch.randn(60, 4, generator=rng) + 0.2
    stream = reward.Stream(old, torch.zeros(4), torch.eye(4), memory=0.25)
    stream.push(new)
    weights, f = torch.cat([torch.full((100,), 0.25), torch.ones(60)]).double(), torch.cat([old, new]).double()
    moments = lambda w: (f.T @ w / w.sum(), torch.cov(f.T, aweights=w))
    distance = lambda w: reward.frechet_distance(*moments(w), torch.zeros(4), torch.eye(4))
    assert abs(stream.value - distance(weights)) < 1e-12
    for i in range(3):
        out = weights.clone()
        out[100 + i] = 0
        assert abs(distance(out) - stream.value - stream.leave_one_out(new)[i]) < 1e-12


def test_fd_at_infinity():
    rng = torch.Generator().manual_seed(11)
    mu, cov = torch.zeros(20), 1.3 * torch.eye(20).double()
    exact = reward.frechet_distance(mu, torch.eye(20), mu, cov)
    streams = [reward.Stream(torch.randn(400, 20, generator=rng), mu, cov) for _ in range(10)]
    plug_in = np.mean([s.value for s in streams]) - exact
    corrected = np.mean([s.at_infinity(torch.randn(2000, 20, generator=rng)) for s in streams]) - exact
    assert plug_in > 0.1 and abs(corrected) < 0.3 * plug_in, (plug_in, corrected)
    with pytest.raises(ValueError, match="10 d = 200"):
        reward.Stream(torch.randn(190, 20), mu, cov).at_infinity(torch.randn(5, 20))


def state(reference):
    return reference.features.clone(), reference.moments.sum, reference.moments.outer, torch.tensor(
        [reference.num, reference.oldest, reference.fd, reference.moments.weight]).double()


def test_undo_is_bit_for_bit_and_state_goes_through_a_file(tmp_path):
    rng = torch.Generator().manual_seed(12)
    reference = reward.ReferenceSet(torch.randn(50, 7, generator=rng), torch.zeros(7), torch.eye(7))
    new, slots = torch.randn(2, 6, 7, generator=rng).double() / 3, torch.randperm(50, generator=rng)[:6]
    reference.push(new[1])
    for change in (lambda: reference.replace(slots, new[0]), lambda: reference.push(new[0]),
                   lambda: reference.add(new[0]), lambda: (reference.propose(slots, new), reference.commit(1))):
        before, gains = state(reference), reference.swap_gain(slots, new)
        change()
        assert not torch.equal(reference.moments.outer, before[2]) and reference.audit() < 1e-14
        reference.undo()
        assert all(torch.equal(a, b) for a, b in zip(state(reference), before))
        assert torch.equal(reference.swap_gain(slots, new), gains)
        with pytest.raises(ValueError, match="no change to undo"):
            reference.undo()
    gains = reference.propose(slots, new)
    promised = reference.fd - gains.max().item()
    reference.commit(gains.argmax())
    assert abs(reference.fd - promised) < 1e-6, "float32 rounds what is stored"
    with pytest.raises(ValueError, match="no proposal"):
        reference.commit(0)
    torch.save(reference.state_dict(), tmp_path / "state.pt")
    other = reward.ReferenceSet(torch.ones(50, 7), torch.zeros(7), torch.eye(7))
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(reference.push(new[0]), other.push(new[0]))
    assert all(torch.equal(a, b) for a, b in zip(state(reference), state(other)))
    with pytest.raises(ValueError, match="needed are"):
        reward.ReferenceSet(torch.ones(50, 6), torch.zeros(6), torch.eye(6)).load_state_dict(reference.state_dict())


def test_no_drift_in_ten_thousand_swaps():
    rng = torch.Generator().manual_seed(13)
    f = torch.randn(300, 256, generator=rng) + 1
    reference = reward.ReferenceSet(f, torch.zeros(256), torch.eye(256))
    pool = torch.randn(2000, 256, generator=rng) * 1.5 + 1
    for i in range(10000):
        reference.replace(torch.tensor([7 * i % 300]), pool[i % 2000, None])
    assert reference.audit(1e-9) < 1e-11
    fresh = reward.ReferenceSet(reference.features, torch.zeros(256), torch.eye(256))
    assert abs(reference.fd / fresh.fd - 1) < 1e-9
    reference.moments.outer[0, 0] += 1
    with pytest.raises(AssertionError, match="drifted"):
        reference.audit()


def sharded_figures(path):
    """All a set that is spread over the ranks can say, written to a file: the same on every rank."""
    rank, world, _ = models.setup()
    rng = torch.Generator().manual_seed(0)
    f, new, more = (torch.randn(*shape, 12, generator=rng) for shape in ((90,), (3, 3), (7,)))
    reference = reward.ReferenceSet(f[rank::world], torch.zeros(12), torch.eye(12), sharded=True)
    own = torch.randperm(90, generator=rng)[:9].view(3, 3)
    found = [torch.tensor([reference.fd]), reference.swap_gain(own, new), reference.swap_gain(own[0], new)]
    reference.propose(own, new)
    reference.commit(2)
    places = reference.push(more)
    reference.add(more[:4])
    found += [torch.tensor([reference.fd, reference.audit() < 1e-13]), reference.influence(more),
              reference.leave_one_out(more)]
    reference.undo()
    found += [reference.rows(torch.arange(90)), torch.tensor([reference.fd]), reference.swap_gain(places[:3], new)]
    found, everyone = torch.cat([x.double().flatten() for x in found]), [None] * world
    torch.distributed.all_gather_object(everyone, found)
    assert all(torch.equal(x, found) for x in everyone), "the ranks disagree"
    torch.save(found, path)


def test_sharded_over_ranks_is_the_same_set(tmp_path):
    sharded_figures(tmp_path / "1.pt")
    for world in (2, 4):
        done = torchrun(world, "test_all.py", tmp_path / f"{world}.pt")
        assert done.returncode == 0, done.stderr[-2000:]
    one, two, four = (torch.load(tmp_path / f"{world}.pt", weights_only=True) for world in (1, 2, 4))
    assert len(one) > 1000 and all(torch.allclose(one, x, rtol=1e-12, atol=1e-12) for x in (two, four))


@pytest.mark.parametrize("change, said", [
    (lambda r: r.swap_gain(torch.arange(3), torch.full((2, 3, 4), math.nan)), "NaN"),
    (lambda r: r.swap_gain(torch.arange(3), torch.zeros(2, 3, 5)), "the last of 4"),
    (lambda r: r.swap_gain(torch.arange(2), torch.zeros(2, 3, 4)), "do not fit"),
    (lambda r: r.swap_gain(torch.tensor([1, 1, 2]), torch.zeros(2, 3, 4)), "different members"),
    (lambda r: r.swap_gain(torch.tensor([1, 2, 30]), torch.zeros(2, 3, 4)), "0 .. 29"),
    (lambda r: r.replace(torch.tensor([1]), torch.full((1, 4), math.inf)), "infinite"),
    (lambda r: r.push(torch.zeros(3, 5)), "the last of 4"), (lambda r: r.influence(torch.zeros(3)), "2 axes"),
])
def test_sets_refuse_in_one_line(change, said):
    for reference in (reward.ReferenceSet(torch.randn(30, 4), torch.zeros(4), torch.eye(4)),
                      reward.KernelSet(torch.randn(30, 4), torch.randn(20, 4))):
        if hasattr(reference, "replace") or "infinite" not in said:
            with pytest.raises(ValueError, match=said) as refusal:
                change(reference)
            assert "\n" not in str(refusal.value)


def test_a_gain_that_fails_its_check_is_refused(monkeypatch):
    by_determinants = reward.by_determinants
    monkeypatch.setattr(reward, "by_determinants", lambda *a: by_determinants(*a) * 1.01)
    reference = reward.ReferenceSet(torch.randn(200, 40), torch.zeros(40), torch.eye(40))
    with pytest.raises(ValueError, match="deviates by"):
        reference.swap_gain(torch.arange(5), 2 * torch.randn(2, 5, 40))


def test_kernel_distances():
    g = golden("metrics.npz")
    real, gen = torch.from_numpy(g["real"]), torch.from_numpy(g["gen"])
    assert abs(reward.KernelSet(gen, real).value - g["kid_poly3_unbiased"]) < 1e-12
    rng = torch.Generator().manual_seed(14)
    f, new, real = (torch.randn(*shape, 5, generator=rng) for shape in ((90,), (3, 8), (70,)))
    for kernel in (reward.cubic_kernel, reward.gaussian_kernel(real)):
        whole = lambda x: reward.KernelSet(x, real, kernel)
        reference, own = whole(f), torch.stack([torch.randperm(90, generator=rng)[:8] for _ in new])
        for slots in (own[0], own):
            for s, x, gain in zip(slots.expand(3, 8), new, reference.swap_gain(slots, new)):
                assert abs(reference.value - whole(f.index_copy(0, s, x)).value - gain) < 1e-12
        for i, change in enumerate(reference.leave_one_out(f[:3])):
            assert abs(whole(torch.cat([f[:i], f[i + 1:]])).value - reference.value - change) < 1e-12
        psi = reference.influence(torch.cat([f, new[0]]))
        assert abs(psi[:90].mean()) < 1e-12, "its mean over the set is 0"
        # With all pairs, k(f, f) too, the distance is a parabola in the weight that moves to one image, psi its slope.
        biased = lambda x: kernel(x, x).mean() - 2 * kernel(x, real.double()).mean()
        mixture = [biased(torch.cat([f, *copies]).double()) for copies in ([], [new[0, :1]], [new[0, :1]] * 2)]
        (h, slope), (g, steeper) = ((k / (90 + k), (mixture[k] - mixture[0]) / (k / (90 + k))) for k in (1, 2))
        assert abs((g * slope - h * steeper) / (g - h) - psi[90]) < 1e-10
        assert torch.equal(torch.cat([reference.push(new[0]), reference.push(new[1])]), torch.arange(16))
        assert abs(reference.value - whole(torch.cat([new[0], new[1], f[16:]])).value) < 1e-12


def test_several_networks_and_classes():
    rng = torch.Generator().manual_seed(15)
    f, new, slots = torch.randn(200, 9, generator=rng), torch.randn(2, 6, 9, generator=rng) + 0.5, torch.arange(6) * 3
    parts = lambda x: [reward.ReferenceSet(x[:, :4], torch.zeros(4), torch.eye(4)),
                       reward.ReferenceSet(x[:, 4:], torch.ones(5), 90 * torch.eye(5))]
    both, (a, b) = reward.SumSet(parts(f), [4, 5]), parts(f)
    gains = a.swap_gain(slots, new[..., :4]) / a.fd + b.swap_gain(slots, new[..., 4:]) / b.fd
    assert torch.equal(both.swap_gain(slots, new), gains) and math.isclose(both.value, math.sqrt(a.fd * b.fd))
    psi = a.influence(new[0, :, :4]) / a.fd + b.influence(new[0, :, 4:]) / b.fd
    assert torch.equal(both.influence(new[0]), psi) and len(both.leave_one_out(f)) == 200
    both.push(new[0])
    assert math.isclose(both.value, reward.SumSet(parts(torch.cat([new[0], f[6:]])), [4, 5]).value, rel_tol=1e-9)

    labels = torch.arange(200) % 4
    streams = lambda classes: [reward.Stream(f[labels == k], torch.zeros(9), torch.eye(9)) for k in range(classes)]
    within = reward.ClassSet(streams(4))
    assert math.isclose(within.value, np.mean([s.value for s in streams(4)]))
    assert torch.equal(within.influence(f, labels)[labels == 2], streams(4)[2].influence(f[labels == 2]))
    within.push(f, labels)
    assert within.parts[3].moments.weight == 100
    with pytest.raises(ValueError, match="class 1 has 40 images, its FD needs 45"):
        reward.ClassSet([within.parts[0], reward.Stream(f[:40], torch.zeros(9), torch.eye(9))])


def test_credits_of_the_trainer():
    rng = torch.Generator().manual_seed(16)
    f, y, x = torch.randn(2000, 6, generator=rng), torch.arange(2000) % 10, torch.randn(500, 6, generator=rng) * 1.2
    credit = train_rl.ImageCredit(reward.Stream(f, torch.zeros(6), torch.eye(6), 0.5))
    advantages, r = credit(x, y[:500], 5.0)
    assert 0 < credit.checks["gap"] < 0.01 and torch.corrcoef(torch.stack([advantages, r]))[0, 1] > 0.95
    assert train_rl.long_enough(0.5, 1000, 64) == 0.5
    memory = train_rl.long_enough(0.5, 1000, 2048)
    assert math.isclose(1000 * (1 + memory) / (1 - memory), 5 * 2048)
    net = fid.feature_net("tiny")
    images, labels, _ = models.tiny_images(100, 3)
    features = net(images)
    sample_wise = train_rl.SampleCredit(reward.Stream(features, torch.zeros(64), torch.eye(64)), net.heads)
    right, wrong = (sample_wise(features, k, 5.0)[1] for k in (labels, (labels + 1) % 10))
    assert right.mean() > -0.1 and wrong.mean() < -3


# ---- Samplers -------------------------------------------------------------------------------------------------------

def golden_sit():
    return models.load(os.path.join(GOLDEN, "sit_tiny.pt")), golden("sit_tiny.npz")


def test_sit_golden():
    model, g = golden_sit()
    assert model.shape == (4, 8, 8) and model.num_classes == 10 and model.family == "sit"
    with torch.no_grad():
        out = model(*(torch.from_numpy(g[k]) for k in ("x", "t", "y")))
        x, t, y = (torch.from_numpy(g[k]) for k in ("cfg_x", "cfg_t", "cfg_y"))
        n = len(x) // 2
        guided = sample.velocity(model, x[:n], t[:n], y[:n], float(g["cfg_scale"]), cfg_channels=3)
    assert error(out, g["out"]) < 3e-6
    assert error(guided, g["cfg_out"][:n]) < 3e-6


def replay(model, g, plan, noise, labels):
    """A sampler's states with the recorded normals in place of its own."""
    x, xs = torch.from_numpy(g["init_noise"]), []
    with torch.no_grad():
        for k in range(len(plan.t)):
            mean, std = sample.gaussian_step(plan, k, x, model(x, plan.t[k].expand(len(x)), labels))
            x = mean + std * torch.from_numpy(noise[k]) if plan.std[k] > 0 else mean
            xs.append(x)
    return torch.stack(xs)


def test_sde_golden():
    model, g = golden_sit()
    labels = torch.from_numpy(g["labels"])
    plan = sample.schedule("sigma", 12)
    assert error(plan.t, g["sde_t"]) < 1e-6
    assert error(replay(model, g, plan, g["sde_noise"], labels), g["sde_sigma_xs"]) < 1e-5
    for form in ("linear", "decreasing", "constant"):
        xs = replay(model, g, sample.schedule(form, 12), g["sde_noise"], labels)
        assert error(xs[[0, 6, 10, 11]], g[f"sde_{form}_xs"]) < 1e-5, form


def test_ode_golden():
    model, g = golden_sit()
    labels = torch.from_numpy(g["labels"])
    assert error(replay(model, g, sample.schedule("euler", 9), None, labels), g["ode_euler_xs"][1:]) < 1e-5
    start = torch.from_numpy(g["init_noise"])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(torch, "randn", lambda *a, generator=None, **k: start[generator.initial_seed()])
        xs = [x for x, _ in sample.trajectory(model, list(range(len(start))), labels, sample.schedule("heun", 9))]
    assert error(torch.stack(xs), g["ode_heun_xs"]) < 1e-5


def test_sigma_form_is_its_closed_form():
    plan, x, v = sample.schedule("sigma", 7), torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    for k in range(6):
        t, dt = plan.t[k], plan.t[k + 1] - plan.t[k]
        mean, std = sample.gaussian_step(plan, k, x, v)
        assert torch.allclose(mean, x + dt * ((1 + t) * v - x), atol=1e-6)
        assert torch.allclose(std, (2 * (1 - t) * dt).sqrt())


def test_log_prob_is_torch_distributions():
    x, mean, std = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.rand(6, 1, 1, 1) + 0.1
    exact = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(sample.log_prob(x, mean, std), exact, rtol=1e-5)
    assert torch.allclose(sample.log_prob(x, mean, 0.3), torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3)),
                          rtol=1e-5)


class GaussianData(torch.nn.Module):
    """The exact velocity of data N(m, s^2): E[x1 - x0 | x_t]."""
    family, shape, num_classes, m, s = "sit", (3, 16, 16), 10, 0.7, 0.4

    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, y):
        t = t.view(-1, 1, 1, 1)
        var = t**2 * self.s**2 + (1 - t)**2
        return self.m + (t * self.s**2 - (1 - t)) / var * (x - t * self.m)


@pytest.mark.parametrize("name", list(sample.FORMS) + ["euler", "heun"])
def test_sampler_marginals_on_a_gaussian(name):
    model, plan = GaussianData(), sample.schedule(name, 300, last=1 / 300)         # fine, last step included
    seeds = sample.image_seeds(0, "select", range(100))
    with torch.no_grad():
        xs = [x for x, _ in sample.trajectory(model, seeds, torch.zeros(100, dtype=torch.int64), plan)]
    t = torch.cat([plan.t, torch.ones(1)])
    for k in (len(xs) // 2, len(xs) - 2, len(xs) - 1):
        mean, std = t[k] * model.m, (t[k]**2 * model.s**2 + (1 - t[k])**2).sqrt()
        assert abs(xs[k].mean() - mean) < 0.02 and abs(xs[k].std() / std - 1) < 0.04, (name, k, xs[k].mean(), xs[k].std(), std)


def test_no_noise_is_the_ode():
    a, b = sample.schedule("flow", 8, noise=0.0), sample.schedule("euler", 8)
    assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
    assert len(a.noisy) == 0 and len(sample.schedule("flow", 8).noisy) == 7


def test_image_is_its_seed():
    model = models.load()
    seeds = sample.image_seeds(0, "select", range(12))
    whole = torch.cat(list(sample.generate(model, seeds, batch_size=12))).int()
    parts = torch.cat(list(sample.generate(model, seeds, batch_size=5))).int()
    assert (whole - parts).abs().max() <= 1 and (whole != parts).float().mean() <= 1e-4
    alone = torch.cat(list(sample.generate(model, seeds[7:8], torch.tensor([7])))).int()
    assert (whole[7] - alone[0]).abs().max() <= 1
    assert len(set(sample.image_seeds(0, "train", range(1000)) + sample.image_seeds(0, "report", range(1000))
                   + sample.image_seeds(1, "report", range(1000)))) == 3000


# ---- Policy gradient ------------------------------------------------------------------------------------------------

class TwoParameters(torch.nn.Module):
    """v = p0 + p1 x in one dimension."""
    shape, num_classes = (1, 1, 1), 1

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, x, t, y):
        return self.p[0] + self.p[1] * x


def test_surrogate_gradient_is_that_of_the_expected_reward():
    """One noisy step from x = 0.5; the expectation by Gauss-Hermite nodes, so that both sides are exact."""
    model, plan = TwoParameters(), sample.schedule("sigma", 2)
    plan = plan._replace(**{k: getattr(plan, k).double() for k in ("t", "a", "c", "std")})
    nodes, weights = (torch.from_numpy(z) for z in np.polynomial.hermite_e.hermegauss(40))
    weights = weights / weights.sum()
    x = torch.full((40, 1, 1, 1), 0.5, dtype=torch.float64)
    reward_of = lambda z: torch.sin(2 * z) + z**2

    def expected(p):
        mean = plan.a[0] * 0.5 + plan.c[0] * (p[0] + p[1] * 0.5)
        return (weights * reward_of(mean + plan.std[0] * nodes)).sum()

    with torch.no_grad():
        mean, std = sample.gaussian_step(plan, 0, x, model(x, None, None))
        x_next = mean + std * nodes.view(-1, 1, 1, 1)
    part = dict(x=x, x_next=x_next, k=torch.zeros(40, dtype=torch.int64), y=torch.zeros(40, dtype=torch.int64),
                advantage=weights * reward_of(x_next.flatten()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)       # the loss in float64, for the finite difference
        loss, _, _ = train_rl.ppo_loss(model, part, None, plan, 1.0, 0.2)
    loss.sum().backward()
    for i in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[i] = 1e-5
        slope = (expected(model.p.detach() + h) - expected(model.p.detach() - h)) / 2e-5
        assert abs(-model.p.grad[i] - slope) < 1e-7, (i, model.p.grad, slope)


def rolled_out(n=20, name="flow"):
    model, plan = models.load(), sample.schedule(name, 4)
    indices = torch.arange(n)
    states, velocities = train_rl.roll_out(model, indices, indices % 10, plan, 0, 1.0, 250)
    return model, plan, indices % 10, states, velocities


def test_ratio_is_one_before_the_first_update():
    model, plan, labels, states, _ = rolled_out()
    pairs = train_rl.ppo_pairs(states, labels, torch.ones(20), plan, 0, torch.Generator(), 0, 1)
    assert len(pairs["y"]) == 20 * 3
    loss, log_p, clipped = train_rl.ppo_loss(model, pairs, None, plan, 1.0, 1e-4)
    assert (loss == -1).all() and clipped == 0
    again, _, clipped = train_rl.ppo_loss(model, pairs, log_p, plan, 1.0, 1e-4)
    assert (again == -1).all() and clipped == 0
    assert (train_rl.ppo_loss(model, pairs, log_p - 1, plan, 1.0, 0.2)[0] == -torch.tensor(0.2).exp()).all(), "clipped"


def test_pairs_hold_what_the_sampler_did():
    model, plan, labels, states, velocities = rolled_out()
    pairs = train_rl.ppo_pairs(states, labels, torch.arange(20.0), plan, 2, torch.Generator(), 0, 1)
    i = pairs["advantage"].long()
    assert torch.equal(pairs["x"], states[pairs["k"], i]) and torch.equal(pairs["x_next"], states[pairs["k"] + 1, i])
    assert all(len(set(pairs["k"][i == j].tolist())) == 2 for j in range(20)), "two different steps of each image"
    mean, std = sample.gaussian_step(plan, pairs["k"], pairs["x"], velocities[pairs["k"], i])
    z = (pairs["x_next"] - mean) / std
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02, "the noise that was drawn is standard normal"


def test_path_kl_of_a_known_change():
    model, plan, labels, states, velocities = rolled_out()
    assert train_rl.path_kl(model, states, velocities, labels, plan, 1.0) < 1e-6
    moved = train_rl.path_kl(model, states, velocities + 0.1, labels, plan, 1.0)
    exact = sum(plan.kappa[k].item() * 0.01 * 768 for k in plan.noisy)
    assert math.isclose(moved, exact, rel_tol=1e-4)
    x, v, k = states[1], velocities[1], 1
    p, q = (torch.distributions.Normal(sample.gaussian_step(plan, k, x, u)[0], plan.std[k]) for u in (v, v + 0.1))
    assert math.isclose(torch.distributions.kl_divergence(p, q).sum((1, 2, 3)).mean().item(),
                        plan.kappa[k].item() * 0.01 * 768, rel_tol=1e-4)


def test_advantages_are_centred_and_bounded():
    rng = torch.Generator().manual_seed(6)
    labels, r = torch.arange(200) % 10, torch.randn(200, generator=rng).double().exp()
    a = train_rl.normalize(r + 100.0 * labels, labels, 3.0)
    assert abs(a.mean()) < 1e-12 and a.abs().max() < 3.2
    assert torch.allclose(a, train_rl.normalize(r, labels, 3.0)), "the baseline takes what differs between classes"
    few = train_rl.normalize(r[:20], torch.arange(20) % 10, 3.0)
    assert torch.allclose(few, train_rl.normalize(r[:20], None, 3.0)), "two images per class are no baseline"


def test_selection_stays_centred():
    a = torch.randn(100, generator=torch.Generator().manual_seed(8)).double().exp()
    kept = train_rl.strongest(a - a.mean(), 0.25)
    assert (kept != 0).sum() == 25 and abs(kept.sum()) < 1e-12


def test_subset_credit_is_the_exact_gain_and_keeps_labels():
    rng = torch.Generator().manual_seed(7)
    f, y = torch.randn(200, 5, generator=rng), torch.arange(200) % 10
    real = fid.Summary(1000, torch.zeros(5).double(), torch.eye(5).double(), None)
    credit = train_rl.SubsetCredit(reward.ReferenceSet(f, real.mu, real.cov), y, 20, 0)
    new, labels = torch.randn(60, 5, generator=rng) * 1.3, torch.arange(60) % 10
    slots = credit.slots_like(labels[:20])
    assert torch.equal(y[slots], labels[:20]) and len(slots.unique()) == 20
    advantages, gains = credit(new, labels, 5.0)
    assert len(gains) == 3 and torch.equal(advantages.argsort(), gains.argsort())
    credit.push(new, labels)
    fresh = reward.ReferenceSet(torch.cat([new, f[60:]]), torch.zeros(5), torch.eye(5))
    assert abs(credit.fd - fresh.fd) < 1e-9, "the queue forgets the oldest"


def test_forward_objective_moves_towards_good_images():
    model, plan, labels, states, _ = rolled_out(30, "euler")
    pairs = train_rl.forward_pairs(states, labels, torch.ones(30), 2, torch.Generator().manual_seed(0), 0, 1)
    assert len(pairs["y"]) == 60
    xt = pairs["t"].view(-1, 1, 1, 1) * states[-1].repeat(2, 1, 1, 1)
    assert torch.allclose((pairs["x"] - xt) / (1 - pairs["t"]).view(-1, 1, 1, 1),
                          states[-1].repeat(2, 1, 1, 1) - pairs["u"], atol=1e-3)
    loss, old, _ = train_rl.forward_loss(model, pairs, None, 1.0, 1.0)
    loss.mean().backward()
    with torch.no_grad():
        fit = lambda: (model(pairs["x"], pairs["t"], pairs["y"]) - pairs["u"]).square().mean()
        before = fit()
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad / p.grad.norm()
        assert fit() < before, "a positive advantage fits the velocity to the image"


# ---- Data, checkpoints ----------------------------------------------------------------------------------------------

def test_tiny_world_is_its_index():
    a, labels, factors = models.tiny_images(30, 0, "train")
    b, _, _ = models.tiny_images(10, 0, "train", start=20)
    c, strided, _ = models.tiny_images(10, 0, "train", start=1, step=3)
    assert torch.equal(a[20:], b) and torch.equal(a[1:30:3], c) and torch.equal(strided, labels[1:30:3])
    assert not torch.equal(a, models.tiny_images(30, 1, "train")[0])
    assert not torch.equal(a, models.tiny_images(30, 0, "report")[0])
    low, high = np.array(list(models.FACTORS.values())).T
    assert (factors.numpy() >= low).all() and (factors.numpy() <= high).all()
    assert torch.equal(labels, torch.arange(30) % 10)


def test_feature_networks_know_the_factors():
    images, labels, factors = models.tiny_images(2000, 0, "report")
    for name in ("tiny", "tiny2"):
        net = fid.feature_net(name)
        prediction = net.heads(net(images))
        assert (prediction[:, :10].argmax(1) == labels).float().mean() > 0.99
        error = (prediction[:, 10:] - models.factor_targets(factors)).square().mean(0)
        assert error.max() < 0.1, (name, error)         # variance unexplained, of each factor
    measured = fid.feature_net("factors")(images)
    for column, factor in ((1, 1), (2, 2), (4, 6)):     # centre x, y, brightness
        assert torch.corrcoef(torch.stack([measured[:, column].double(), factors[:, factor]]))[0, 1] > 0.8, column
    turns = torch.atan2(measured[:, 6], measured[:, 5]) / (2 * math.pi) % 1
    assert ((turns - factors[:, 5] + 0.5) % 1 - 0.5).abs().median() < 0.02


def make_folder(path, n=30, classes=2, size=20):
    images, _, _ = models.tiny_images(n, 9)
    for i, image in enumerate(images):
        place = os.path.join(path, f"class{i % classes}") if classes else path
        os.makedirs(place, exist_ok=True)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((size + i % 3, size))
        picture.save(os.path.join(place, f"{i:03d}.{('png', 'webp', 'jpg')[i % 3]}"))
    return str(path)


def test_folder_and_zip_are_the_same(tmp_path):
    folder = make_folder(tmp_path / "f")
    with zipfile.ZipFile(tmp_path / "f.zip", "w") as z:
        for d, _, files in os.walk(folder):
            for f in files:
                z.write(os.path.join(d, f), os.path.relpath(os.path.join(d, f), folder))
    a, b = (torch.cat(list(models.image_batches(str(p), 16))) for p in (folder, tmp_path / "f.zip"))
    assert a.shape == (30, 3, 16, 16) and a.dtype == torch.uint8 and torch.equal(a, b)
    classes, labels = models.image_classes(folder, models.list_images(folder)[0])
    assert classes == ["class0", "class1"] and labels.sum() == 15
    parts = [torch.cat(list(models.image_batches(folder, 16, k, 2))) for k in (0, 1)]
    assert torch.equal(parts[0], a[::2]) and torch.equal(parts[1], a[1::2]), "halves share no image"


def test_each_course_redraws_its_own_reference_set(tmp_path):
    quick = [o for o in QUICK if not o.startswith(("--iters", "--forward_every", "--num="))]
    code, _, err = run(train_rl, *quick, "--iters=6", "--forward_every=3", "--credit=subset", "--subset=10", "--refresh=2",
                       "--num=0", "--out", tmp_path)
    assert code == 0, err
    images = [json.loads(line)["images"] for line in open(tmp_path / "log.jsonl")]
    # Turns of ppo: iterations 0 1 3 4, of forward: 2 5; ppo redraws 200 images at its third turn, forward has two only.
    assert [b - a for a, b in zip([400] + images, images)] == [120, 120, 120, 320, 120, 120]


def test_checkpoint_round_trip(tmp_path):
    model = models.load()
    path = str(tmp_path / "m.pt")
    models.save(path, model, note=1)
    again = models.load(path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values()))
    assert os.listdir(tmp_path) == ["m.pt"] and not again.training
    models.save(path, model, torch.float16)
    assert error(next(models.load(path).parameters()), next(model.parameters())) < 1e-3
    torch.save({"weights": 1}, path)
    assert run(sample, "--ckpt", path)[0] == 1


def test_ema_exponents_golden():
    g = golden("phema.npz")
    assert error(np.array([models.ema_exponent(s) for s in g["std"]]), g["std_to_exp"]) < 1e-9


# ---- Command lines --------------------------------------------------------------------------------------------------

QUICK = ["--iters=2", "--forward_every=2", "--batch=120", "--reference=200", "--num=200", "--num_real=300",
         "--num_prdc=50", "--steps=4"]


def test_train_rl_as_typed(tmp_path):
    code, out, err = run(train_rl, *QUICK, "--out", tmp_path / "o", "--json", tmp_path / "r.json")
    assert code == 0, err
    assert sorted(os.listdir(tmp_path / "o")) == ["after.png", "before.png", "ckpt.pt", "log.jsonl"]
    rows = [json.loads(line) for line in open(tmp_path / "o" / "log.jsonl")]
    assert len(rows) == 2 and {"fd", "reward", "reward_std", "kl", "clipped", "grad_norm", "images_per_second",
                               "seconds", "gap"} <= set(rows[0])
    assert "note: image credit" not in out, "120 images a rollout are enough at memory 0.5"
    result = json.load(open(tmp_path / "r.json"))
    assert {"before", "after", "seconds", "images"} <= set(result) and result["images"] == 2 * 200 + 2 * 120
    first = result["after"][0]
    assert {"features", "sampler", "steps", "num", "fid", "fid_se", "floor", "precision", "recall", "coverage"} <= set(first)
    assert (first["features"], first["sampler"], first["num"]) == ("tiny2", "flow", 200)
    judged = fid.evaluate(models.load(str(tmp_path / "o" / "ckpt.pt")), [fid.feature_net("tiny2")], fid.real_summaries(
        "tiny", [fid.feature_net("tiny2")], "report", 50, 300), 200, steps=4, num_prdc=50)["tiny2"]
    assert math.isclose(judged["fid"], first["fid"], rel_tol=1e-4), "the table is what the saved checkpoint scores"


@pytest.mark.parametrize("options", [
    ["--objective=ppo"], ["--credit=subset", "--subset=10"],
    ["--credit=subset", "--subset=10", "--refresh=1", "--top=0.5"],
    ["--objective=forward", "--rollout=flow", "--times=3"], ["--objective=forward", "--advantage=constant"], ["--top=0.3"],
    ["--reward=mmd", "--credit=subset", "--subset=10"], ["--reward=sample"],
    ["--features=tiny,tiny2"], ["--reward=kid", "--features=tiny,factors"],
    ["--features=tiny,tiny2", "--credit=subset", "--subset=10", "--refresh=1"],
    ["--epochs=2", "--times=0", "--cosine", "--objective=ppo"], ["--sampler=sigma", "--cfg=1.5", "--micro_batch=33"], ["--kl_limit=1e-6"]])
def test_train_rl_variants(tmp_path, options):
    quick = [o for o in QUICK if "forward_every" not in o or not any("objective" in p for p in options)]
    code, out, err = run(train_rl, *quick, "--num=0", "--out", tmp_path, *options)
    assert code == 0, err
    base, tuned = models.load(), models.load(str(tmp_path / "ckpt.pt"))
    change = sum((a - b).abs().sum() for a, b in zip(base.state_dict().values(), tuned.state_dict().values()))
    assert change > 0 and math.isfinite(change)
    first = [json.loads(line) for line in open(tmp_path / "log.jsonl")][0]
    assert (first["halvings"] > 0) == ("--kl_limit=1e-6" in options)


def test_sample_as_typed(tmp_path):
    code, out, _ = run(sample, "--num=12", "--out", tmp_path, "--npz", tmp_path / "s.npz", "--label", "3")
    assert code == 0 and "images/s" in out
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (12, 16, 16, 3)
    assert Image.open(tmp_path / "grid.png").size[0] > 12 * 16


def test_fid_as_typed(tmp_path):
    code, out, err = run(fid, "--num", "300", "--num_real=400", "--num_prdc=100", "--json", tmp_path / "f.json")
    assert code == 0, err
    result = json.load(open(tmp_path / "f.json"))
    assert {"fid", "kid", "precision", "recall", "density", "coverage", "num", "features", "sampler", "steps", "seed"} \
        <= set(result) and result["num"] == 300
    folder = make_folder(tmp_path / "f", 60, 0)
    assert run(fid, "--real", folder, "--stats", tmp_path / "r.npz", "--features=factors")[0] == 0
    code, out, err = run(fid, "--images", folder, "--real", tmp_path / "r.npz", "--features=factors", "--json", tmp_path / "g.json")
    assert code == 0 and json.load(open(tmp_path / "g.json"))["fid"] < 1e-6, "a set against its own statistics"
    np.savez(tmp_path / "i.npz", arr_0=torch.cat(list(models.image_batches(folder, 16))).permute(0, 2, 3, 1).numpy())
    code, out, err = run(fid, "--images", tmp_path / "i.npz", "--real", folder, "--features=factors", "--json", tmp_path / "g.json")
    assert code == 0 and json.load(open(tmp_path / "g.json"))["fid"] < 1e-6, err


def test_reward_as_typed():
    code, out, _ = run(reward, "--dim=16", "--num=200", "--subset=5", "--candidates=3")
    errors = re.findall(r"^gain: determinants +\S+ ms +(\S+)", out, flags=re.M)
    assert code == 0 and len(errors) == 2 and max(map(float, errors)) < 1e-9, out


def test_readme_only_the_reward_and_only_the_fid(tmp_path, monkeypatch):
    readme = open(os.path.join(ROOT, "README.md")).read()
    python, = re.findall(r"## Only the reward\n.*?```python\n(.*?)```", readme, flags=re.S)
    shell, = re.findall(r"## Only the FID\n.*?```bash\n(.*?)```", readme, flags=re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(python, "README.md", "exec"), {})
    assert said.getvalue().startswith("FD ") and len(python.strip().split("\n")) <= 13
    make_folder(tmp_path / "FOLDER", 150)
    make_folder(tmp_path / "SAMPLES", 140, 0)
    monkeypatch.chdir(tmp_path)
    for line in shell.strip().split("\n"):
        _, script, *argv = line.partition("#")[0].split()
        code, _, err = run({"fid.py": fid}[script], *argv)
        assert code == 0, (line, err)
    assert json.load(open("fid.json"))["num"] == 140


def test_own_images_end_to_end(tmp_path):
    folder = make_folder(tmp_path / "f", 300, 3)
    code, out, err = run(models, "--real", folder, "--out", tmp_path / "base.pt", "--minutes=0.03")
    assert code == 0, err
    assert models.load(str(tmp_path / "base.pt")).num_classes == 3
    code, out, err = run(train_rl, *QUICK, "--ckpt", tmp_path / "base.pt", "--real", folder, "--num=100", "--out", tmp_path / "o")
    assert code == 0 and "ckpt.pt" in out, err
    code, out, err = run(fid, "--ckpt", tmp_path / "o" / "ckpt.pt", "--real", folder, "--num=100", "--features=tiny")
    assert code == 0 and "FID" in out, err


def test_mistakes_end_in_one_line(tmp_path):
    text, empty, broken, loose = tmp_path / "text.pt", tmp_path / "empty", tmp_path / "broken", tmp_path / "loose"
    text.write_text("not a checkpoint")
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG....")
    make_folder(loose, 4)
    Image.new("RGB", (9, 9)).save(loose / "beside.png")
    few = make_folder(tmp_path / "few", 20, 0)
    np.savez(tmp_path / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(tmp_path / "keys.npz", a=1)
    np.savez(tmp_path / "big.npz", arr_0=np.zeros((40, 32, 32, 3), np.uint8))
    nothing = tmp_path / "nothing.pt"
    nothing.write_bytes(b"")
    (tmp_path / "not.npz").write_bytes(b"PK\x03\x04 cut short")
    table = [
        (train_rl, ["--iterz=3"], 2, "--iters"), (train_rl, ["--iters=many"], 2, "int"), (train_rl, ["stray"], 2, "stray"),
        (train_rl, ["--lr"], 2, "needs a value"), (train_rl, ["--lr=nan"], 2, "finite"), (train_rl, ["--cosine=perhaps"], 2, "true"),
        (train_rl, ["--credit=both"], 2, "image or subset"), (train_rl, ["--sampler=euler"], 2, "no noise"),
        (train_rl, ["--credit=subset", "--subset=7"], 2, "does not divide"), (train_rl, ["--features=resnet"], 2, "choose"),
        (train_rl, ["--advantage=constant"], 2, "forward"), (train_rl, ["--batch=0"], 2, "at least 2"),
        (train_rl, ["--seed=-1"], 2, "not negative"), (train_rl, ["--judges="], 2, "at least one"),
        (train_rl, ["--reward=clip"], 2, "fd or kid or mmd or sample"), (train_rl, ["--features="], 2, "at least one"),
        (train_rl, ["--reward=kid", "--memory=0.1"], 2, "does nothing"),
        (train_rl, ["--reward=sample", "--credit=subset"], 2, "an image's own"),
        (train_rl, ["--reward=sample", "--features=pixels"], 2, "no classifier"),
        (train_rl, ["--reward=mmd", "--real", tmp_path / "wrong.npz", "--judges=tiny"], 2, "needs real images"),
        (train_rl, ["--features=tiny,tiny2", "--real", tmp_path / "wrong.npz"], 2, "one feature network"),
        (train_rl, ["--refresh=2"], 2, "does nothing"), (train_rl, ["--kl_limit=0"], 2, "more than 0"),
        (train_rl, ["--num=0", "--json", tmp_path / "x"], 2, "--json"), (train_rl, ["--num=1"], 2, "at least 2"),
        (train_rl, ["--ckpt", nothing], 1, "not a PyTorch"), (sample, ["--out", text], 2, "cannot write"),
        (train_rl, ["--batch=20", "--reference=20", "--num=0"], 1, "more images than"),
        (fid, ["--real", nothing], 2, "neither"), (fid, ["--real", tmp_path / "not.npz"], 1, "not a readable .npz"),
        (fid, ["--images", tmp_path / "big.npz"], 1, "16, 16"),
        (train_rl, ["--ckpt", tmp_path / "none.pt"], 2, "no checkpoint"), (train_rl, ["--ckpt", text], 1, "not a PyTorch"),
        (train_rl, ["--real", tmp_path / "none"], 2, "does not exist"), (train_rl, ["--real", empty], 1, "no image"),
        (train_rl, ["--real", broken], 1, "not a readable image"), (train_rl, ["--real", loose], 1, "beside"),
        (train_rl, ["--real", few], 1, "need more than 64"), (train_rl, ["--real", tmp_path / "wrong.npz", "--judges=tiny"], 1, "3-d"),
        (sample, ["--sampler=ddim"], 2, "unknown sampler"), (sample, ["--label=10"], 2, "classes 0 to 9"),
        (sample, ["--steps=1"], 2, "at least 2"), (sample, ["--num=0"], 2, "at least 1"), (sample, ["--noise=-1"], 2, "negative"),
        (fid, ["--images", few, "--num=50", "--features=factors"], 1, "holds 20 images"), (fid, ["--images", tmp_path / "keys.npz"], 1, "arr_0"),
        (fid, ["--real", tmp_path / "keys.npz"], 1, "mu and sigma"), (fid, ["--real", text], 2, "neither"),
        (models, ["--real", few, "--out=folder"], 2, ".pt"), (models, ["--only=vae"], 2, "choose"),
        (models, ["--real", loose, "--out", tmp_path / "b.pt"], 1, "beside"), (reward, ["--subset=9000"], 2, "subset <= num"), (reward, ["--num=100"], 2, "2 dim <= num"),
    ]
    for script, argv, code, said in table:
        found, line = mistakes(script, *argv, *(["--num_real=100", "--out", tmp_path / "o"] if script is train_rl else []),
                               *(["--num_real=100"] if script is fid else []))
        assert found == code and said in line, (argv, found, line)
    assert not (tmp_path / "o").exists() or not any(f.endswith(".part") for f in os.listdir(tmp_path / "o"))


def test_classes_that_do_not_match(tmp_path):
    code, line = mistakes(train_rl, "--real", make_folder(tmp_path / "f", 300, 3), "--num=0")
    assert code == 1 and "3 classes" in line and "10" in line


def test_help_lists_every_constant():
    for script in SCRIPTS:
        code, out, _ = run(script, "--help")
        assert code == 0 and all(f"--{name}=" in out for name, _, _ in models.constants(dict(vars(script))))
        assert all(note for _, _, note in models.constants(dict(vars(script)))), f"a constant of {script.__name__} has no note"


def test_command_line_forms():
    space = dict(vars(train_rl))
    c = models.configure(space, ["--judges", "tiny", "pixels", "--lr", "1e-3", "--cosine", "--iters=7"])
    assert (c.judges, c.lr, c.cosine, c.iters) == (["tiny", "pixels"], 1e-3, True, 7)
    assert models.configure(space, ["--judges=tiny,pixels", "--cosine=false"]).judges == ["tiny", "pixels"]
    assert train_rl.iters == models.configure(space, []).iters, "the file's own constants are not changed"


def torchrun(world, script, *argv, timeout=200):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--", script,
               *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))


@pytest.mark.parametrize("credit", [["--credit=image"], ["--credit=subset", "--subset=10"]])
def test_two_ranks_are_one(tmp_path, credit):
    argv = ["--iters=3", "--batch=100", "--reference=200", "--num=0", "--num_real=300", "--steps=4", *credit]
    assert run(train_rl, *argv, "--out", tmp_path / "1")[0] == 0
    two = torchrun(2, "train_rl.py", *argv, "--out", tmp_path / "2")
    assert two.returncode == 0, two.stderr[-2000:]
    logs = [[json.loads(line) for line in open(tmp_path / k / "log.jsonl")] for k in "12"]
    for a, b in zip(*logs):
        assert math.isclose(a["fd"], b["fd"], rel_tol=1e-5) and a["images"] == b["images"]
    states = [models.load(str(tmp_path / k / "ckpt.pt")).state_dict() for k in "12"]
    worst = max((states[0][k] - states[1][k]).abs().max().item() for k in states[0])
    assert worst < 1e-5 * max(v.abs().max() for v in states[0].values()), worst


def test_fid_through_torchrun(tmp_path):
    argv = ["--num=201", "--num_real=301", "--num_prdc=77", "--features=factors"]
    assert run(fid, *argv, "--json", tmp_path / "1.json")[0] == 0
    two = torchrun(2, "fid.py", *argv, "--json", tmp_path / "2.json")
    assert two.returncode == 0, two.stderr[-2000:]
    one, two = (json.load(open(tmp_path / f"{k}.json")) for k in "12")
    assert math.isclose(one["fid"], two["fid"], rel_tol=1e-3) and one["num"] == two["num"] == 201
    assert abs(one["coverage"] - two["coverage"]) < 0.03


# ---- The architecture itself ---------------------------------------------------------------------------------------

def test_only_main_reads_the_constants():
    for module in SCRIPTS:
        constants = set(models.configure(dict(vars(module)), []))
        for name, f in inspect.getmembers(module, inspect.isfunction):
            if f.__module__ == module.__name__ and name != "main":
                read = {i.argval for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL"} & constants
                assert not read, f"{module.__name__}.{name} reads {read}; pass it instead"


def test_import_direction():
    allowed = {"reward": set(), "models": set(), "sample": {"models"}, "fid": {"models", "sample", "reward"},
               "train_rl": {"models", "sample", "reward", "fid"}}
    for name, may in allowed.items():
        with open(os.path.join(ROOT, f"{name}.py")) as f:
            top = re.findall(r"^(?:from|import) (\w+)", f.read(), flags=re.M)
        assert set(top) & set(allowed) <= may, name


def test_import_is_silent():
    done = subprocess.run([sys.executable, "-c", "import sample, fid, reward, models, train_rl", "--bogus"], cwd=ROOT,
                          capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_torchrun_swallows_only_num():
    from torch.distributed.run import get_args_parser
    options = [o for a in get_args_parser()._actions for o in a.option_strings]
    constants = set().union(*(models.configure(dict(vars(m)), []) for m in SCRIPTS))
    eaten = {c for c in constants if sum(o.startswith(f"--{c}") for o in options) > 1}
    assert eaten <= {"num"}, f"torchrun rejects {eaten} behind a script; rename them"


def test_a_fork_works(tmp_path):
    for f in os.listdir(ROOT):
        if f.endswith(".py"):
            shutil.copy(os.path.join(ROOT, f), tmp_path)
    os.symlink(os.path.join(ROOT, "assets"), tmp_path / "assets")
    source = (tmp_path / "train_rl.py").read_text()
    (tmp_path / "mine.py").write_text(re.sub(r"^iters = \d+", "iters = 1", source, flags=re.M))
    done = subprocess.run([sys.executable, "mine.py", "--batch=50", "--reference=100", "--num=0", "--num_real=200",
                           "--out=o"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "; 1 iterations of 50 images" in done.stdout, done.stderr[-2000:]


def test_every_command_of_the_readme_exists():
    readme = open(os.path.join(ROOT, "README.md")).read()
    by_name = {f"{m.__name__}.py": set(models.configure(dict(vars(m)), [])) for m in SCRIPTS}
    commands = re.findall(r"(\w+\.py)((?: +--?[\w=./,-]+(?: [\w./,]+)*)*)", readme)
    used = [(script, o) for script, rest in commands if script in by_name for o in re.findall(r"--(\w+)", rest)]
    assert len(used) > 10
    for script, option in used:
        assert option in by_name[script], f"README: {script} has no --{option}"


if __name__ == "__main__":                  # under torchrun, by test_sharded_over_ranks_is_the_same_set
    sharded_figures(sys.argv[1])
