"""
Truths, not calls: closed forms, invariances, independent implementations, and every command as a user types it.

python -m pytest -q test_all.py                                 # about three minutes on two cores
"""
import argparse
import contextlib
import dis
import inspect
import io
import json
import math
import os
import pickle
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
        guided = sample.Guided(model, float(g["cfg_scale"]), 3)(x[:n], t[:n], y[:n])
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
        loss, _, _ = train_rl.ppo_loss(model, part, None, plan, 0.2)
    loss.sum().backward()
    for i in range(2):
        h = torch.zeros(2, dtype=torch.float64)
        h[i] = 1e-5
        slope = (expected(model.p.detach() + h) - expected(model.p.detach() - h)) / 2e-5
        assert abs(-model.p.grad[i] - slope) < 1e-7, (i, model.p.grad, slope)


def rolled_out(n=20, name="flow"):
    model, plan = models.load(), sample.schedule(name, 4)
    indices = torch.arange(n)
    states, velocities = train_rl.roll_out(model, indices, indices % 10, plan, 0, 250)
    return model, plan, indices % 10, states, velocities


def test_ratio_is_one_before_the_first_update():
    model, plan, labels, states, _ = rolled_out()
    pairs = train_rl.ppo_pairs(states, labels, torch.ones(20), plan, 0, torch.Generator(), 0, 1)
    assert len(pairs["y"]) == 20 * 3
    loss, log_p, clipped = train_rl.ppo_loss(model, pairs, None, plan, 1e-4)
    assert (loss == -1).all() and clipped == 0
    again, _, clipped = train_rl.ppo_loss(model, pairs, log_p, plan, 1e-4)
    assert (again == -1).all() and clipped == 0
    assert (train_rl.ppo_loss(model, pairs, log_p - 1, plan, 0.2)[0] == -torch.tensor(0.2).exp()).all(), "clipped"


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
    assert train_rl.path_kl(model, states, velocities, labels, plan) < 1e-6
    moved = train_rl.path_kl(model, states, velocities + 0.1, labels, plan)
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
    credit = train_rl.SubsetCredit(f, y, real, 20, 0)
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
    pairs = train_rl.forward_pairs(model, states, labels, torch.ones(30), 2, torch.Generator().manual_seed(0), 0, 1)
    assert len(pairs["y"]) == 60
    xt = pairs["t"].view(-1, 1, 1, 1) * states[-1].repeat(2, 1, 1, 1)
    assert torch.allclose((pairs["x"] - xt) / (1 - pairs["t"]).view(-1, 1, 1, 1),
                          states[-1].repeat(2, 1, 1, 1) - pairs["u"], atol=1e-3)
    loss, old, _ = train_rl.forward_loss(model, pairs, None, 1.0)
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
                               "seconds"} <= set(rows[0])
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
    assert code == 0 and float(re.search(r"largest error of a gain (\S+),", out)[1]) < 1e-9


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
        (models, ["--real", loose, "--out", tmp_path / "b.pt"], 1, "beside"), (reward, ["--subset=9000"], 2, "subset <= num"),
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


# ---- EDM2, official checkpoints -------------------------------------------------------------------------------------

def golden_edm2():
    model, guide = (models.load(os.path.join(GOLDEN, f"edm2_tiny{k}.pkl")) for k in ("", "_gnet"))
    return model, guide, {k: torch.from_numpy(v) for k, v in golden("edm2_tiny.npz").items()}


def random_edm2(path=None, seed=0, **sizes):
    """A tiny EDM2 whose gains are not 0, as they are before training; with `path` its checkpoint."""
    torch.manual_seed(seed)
    model = models.EDM2(**dict(models.EDM2_TINY, **sizes)).eval()
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
        assert list(w.shape) == shape and math.isclose(w.sum(), total, abs_tol=1e-9) and math.isclose(w.square().sum(), squares)
    y = g["labels"].argmax(1)
    with torch.no_grad():
        outputs = dict(D_x=model(g["x"], g["sigma"], y), D_x_nolabel=model(g["x"], g["sigma"], torch.full_like(y, 10)),
                       D_x_scalar_sigma=model(g["x"][:2], torch.full((2,), 1.7), y[:2]),
                       gnet_D_x=guide(g["x"], g["sigma"], y))
        c_in = 1 / (0.25 + g["sigma"]**2).sqrt().view(-1, 1, 1, 1)
        outputs["F_x"] = model.unet(c_in * g["x"], g["sigma"].log() / 4, y)
        outputs["logvar"] = model.logvar_linear(model.logvar_fourier(g["sigma"].log() / 4))[:, 0]
    for name, out in outputs.items():
        assert error(out, g[name]) < 3e-6, name


def test_edm2_trajectories_golden():
    model, guide, g = golden_edm2()
    labels, churn = g["sample_labels"].argmax(1), tuple(g["churn_params"].tolist())
    for name, net, plan in (("sample", model, sample.schedule("", 8, sigmas=(0.002, 80.0))),
                            ("sample_guided", sample.Guided(model, float(g["guidance"]), 0, guide),
                             sample.schedule("heun", 8, sigmas=(0.002, 80.0))),
                            ("sample_churn", model, sample.schedule("heun", 8, sigmas=(0.002, 80.0), churn=churn))):
        recorded = [iter([g["noise"][i], *g["churn_noise"][:, i]]) for i in range(3)]
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "randn", lambda *a, generator=None, **k: next(recorded[generator.initial_seed()]))
            *_, (x, _) = sample.trajectory(net, [0, 1, 2], labels, plan)
        assert error(x, g[name]) < 1e-5, name
    assert error(torch.cat([sample.schedule("", 8, sigmas=(0.002, 80.0)).t, torch.zeros(1)]), g["t_steps"]) < 1e-6
    assert plan.kick.nonzero().flatten().tolist() == g["churn_step_index"].tolist()
    assert torch.equal(sample.decode(model, g["rgb_latent"]), g["rgb_decoded"])
    assert torch.equal(g["rgb_pixels"].float() / 127.5 - 1, g["rgb_encoded"]), "what pretrain puts in"
    seeds = g["seed_list"].tolist()
    assert torch.equal(sample.official_labels(model, seeds), g["seed_label"])
    with torch.no_grad():
        x, _ = next(sample.trajectory(model, seeds, g["seed_label"], sample.schedule("", 8, sigmas=(0.002, 80.0))))
    assert torch.equal(x, 80 * g["seed_noise"])


class GaussianDenoiser(GaussianData):
    """The exact denoiser of data N(m, s^2): E[x1 | x]."""
    family, sigmas = "edm2", (0.002, 80.0)

    def forward(self, x, sigma, y):
        sigma = sigma.view(-1, 1, 1, 1)
        return (self.s**2 * x + sigma**2 * self.m) / (self.s**2 + sigma**2)


@pytest.mark.parametrize("name, noise, churn", [("heun", 1.0, 0), ("euler", 1.0, 0), ("ancestral", 1.0, 0),
                                                ("ancestral", 0.5, 0), ("heun", 1.0, 40)])
def test_edm2_sampler_marginals_on_a_gaussian(name, noise, churn):
    model, plan = GaussianDenoiser(), sample.schedule(name, 200, noise, 0.0, GaussianDenoiser.sigmas, (churn, 0.05, 50, 1.0))
    with torch.no_grad():
        xs = [x for x, _ in sample.trajectory(model, sample.image_seeds(0, "select", range(60)), torch.zeros(60).long(), plan)]
    for k in (len(xs) // 2, len(xs) - 1):
        sigma = plan.t[k] if k < len(plan.t) else torch.zeros(())
        std = (model.s**2 + sigma**2).sqrt()
        assert abs(xs[k].mean() - model.m) < 0.02 * max(1, std) and abs(xs[k].std() / std - 1) < 0.04, (name, k)


def test_ancestral_is_the_formula_and_without_noise_the_ode():
    plan, x, D = sample.schedule("ancestral", 6, 0.8, 0.0, (0.1, 10.0)), *torch.randn(2, 4, 3, 8, 8).double()
    assert len(plan.noisy) == 5 and plan.end[-1] == 0
    for k in range(6):
        s, to = plan.t[k].double(), plan.end[k].double()
        std = min(to, 0.8 * (to**2 * (s**2 - to**2) / s**2).sqrt())
        mean, found = sample.gaussian_step(plan, k, x, D)
        assert torch.allclose(mean, x + (x - D) / s * ((to**2 - std**2).sqrt() - s), atol=1e-5) and abs(found - std) < 1e-5
    a, b = (sample.schedule(name, 6, 0.0, 0.0, (0.1, 10.0)) for name in ("ancestral", "euler"))
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


def test_filters_are_never_stale():
    model = random_edm2(img_resolution=4, channel_mult=[1])
    x, sigma, y = torch.randn(2, 3, 4, 4), torch.tensor([0.3, 2.0]), torch.tensor([1, 2])
    conv = model.unet.enc["4x4_block0"].conv_res0
    other = torch.randn_like(conv.weight)

    def step():
        conv.weight.grad = other.clone()
        torch.optim.Adam([conv.weight], lr=0.5).step()

    def replaced():
        conv.weight.data = conv.weight.data + other

    state = {k: v + 0.3 * torch.randn_like(v) for k, v in model.state_dict().items()}
    for change in (lambda: conv.weight.copy_(other), lambda: torch._foreach_lerp_([conv.weight], [other * 2 - 1], 0.5), step,
                   lambda: conv.weight.data.add_(other), replaced, lambda: model.load_state_dict(state),
                   lambda: conv.weight.detach().numpy().__imul__(other.numpy())):
        with torch.no_grad():
            before = model(x, sigma, y)
            assert torch.equal(before, model(x, sigma, y))
            change()
            after = model(x, sigma, y)
        fresh = model(x, sigma, y).detach()                     # with gradients nothing is kept
        assert not torch.equal(before, after) and torch.allclose(after, fresh, atol=1e-6)
    with torch.no_grad():
        twin = models.copy.deepcopy(model)
        conv.weight.copy_(other)
        twin.unet.enc["4x4_block0"].conv_res0.weight.copy_(-other)
        assert not torch.allclose(model(x, sigma, y), twin(x, sigma, y)), "a copy keeps filters of its own"
        for candidate in (other, other + 1, other):             # temporary weights, as in merging
            out = torch.func.functional_call(model, {"unet.enc.4x4_block0.conv_res0.weight": candidate.clone()}, (x, sigma, y))
            conv.weight.copy_(candidate)
            assert torch.equal(out, model(x, sigma, y))


def test_forward_objective_of_edm2_is_that_of_its_unit_variance_output():
    model = random_edm2()
    noise, uniform = torch.randn(8, 3, 16, 16), torch.rand(8)
    x1, y, A = torch.randn(8, 3, 16, 16).clamp(-1, 1), torch.arange(8), torch.randn(8)
    x, sigma, u, weight = models.renoise(model, x1, noise, uniform)
    part = dict(x=x, t=sigma, u=u, y=y, advantage=A, weight=weight)
    old = model(x, sigma, y).detach() + 0.1 * torch.randn_like(x)
    loss, _, _ = train_rl.forward_loss(model, part, old, 0.7)
    s, total = sigma.view(-1, 1, 1, 1), (sigma.view(-1, 1, 1, 1)**2 + 0.25).sqrt()
    as_F = lambda D: (D - 0.25 / total**2 * x) / (0.5 * s / total)
    F_new, F_old, F_target = as_F(model(x, sigma, y)), as_F(old), as_F(x1)
    exact = (-A.view(-1, 1, 1, 1) * (F_target - F_old) * F_new + 0.35 * (F_new - F_old).square()).mean((1, 2, 3))
    grads = [torch.autograd.grad(z.sum(), model.unet.out_conv.weight, retain_graph=True)[0] for z in (loss, exact)]
    assert error(*grads) < 1e-4
    assert abs(as_F(x1).var() - 1) < 0.8 and models.renoise(model, x1, noise, torch.zeros(8))[0].isfinite().all()


class Call:
    """Pickles as a call of `name` with `args`, whatever `name` is."""
    def __init__(self, f, *args):
        self.f, self.args = f, args

    def __reduce__(self):
        return self.f, self.args


def hostile_pickles(path):
    """{name: (object, the global that its refusal names, as protocol 4 spells it)}; run, most would leave PWNED behind."""
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
            "code": (Call(os.chdir, "/"), "posix.chdir"), "method": (Call(torch.Tensor.numpy, torch.ones(1)), "getattr"),
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
    for wrong, said in (dict(model_channels=2**20), "another shape"), (dict(num_blocks=10**9), "num_blocks"), \
            (dict(model_channels=2**40), "overflow"), (dict(res_balance=0.5), "res_balance"):
        torch.save(dict(ema=model.state_dict(), init_kwargs=dict(model.init_kwargs, **wrong)), tmp_path / "d.pt")
        code, line = mistakes(sample, "--ckpt", tmp_path / "d.pt")
        assert code == 1 and said in line, line


def test_statistics_of_edm2_are_arrays():
    g = models.read_pickle(os.path.join(GOLDEN, "ref_edm2.pkl"))
    assert g["num_images"] == 900 and g["fid"]["sigma"].shape == (64, 64) and g["fid"]["sigma"].dtype == np.float64
    for array in (np.arange(6.0).reshape(2, 3).T, np.array([1, 2], ">i4"), np.array([True]), np.zeros((0, 3), np.float16)):
        again = models.restore(models.RecordReader(io.BytesIO(pickle.dumps(array, 4))).load(), {})
        assert np.array_equal(again, array) and again.dtype == array.dtype.newbyteorder("=")


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
    table = [(wrong, ["lacks blocks.2.attn.qkv.bias (1 in", "has unknown blocks.2.attn.qkv.bais"]),
             (dict(state, pos_embed=state["pos_embed"][:, :, :32]), ["another shape pos_embed"]),
             ({k: v for k, v in state.items() if "t_embedder" not in k}, ["lacks t_embedder.mlp.0.bias", "(4 in all)"]),
             ({k: v for k, v in state.items() if k != "pos_embed"}, ["no 'pos_embed'"]), ([1], ["no SiT"])]
    for bad, said in table:
        torch.save(dict(ema=bad), path)
        code, line = mistakes(sample, "--ckpt", path)
        assert code == 1 and all(words in line for words in said), line
    torch.save(dict(state, x=Call(os.system, "touch PWNED")), path)
    assert "posix.system" in mistakes(sample, "--ckpt", path)[1]


def test_checkpoints_from_urls(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = tmp_path / "a b.pt"
    random_edm2(path)
    url, digest = path.as_uri(), models.sha256(path)
    code, out, err = run(sample, "--ckpt", f"{url}#sha256={digest}", "--num=4", "--steps=2", "--out", tmp_path / "o")
    assert code == 0 and digest in out and "heun, 2 steps" in out, err
    path.unlink()
    assert models.load(url).family == "edm2" and len(os.listdir(tmp_path / "cache" / "distribution-wise-rewards")) == 1
    for bad, code, said in ((f"{url}#sha256={64 * '0'}", 1, digest), (f"{url}#sha256=12", 2, "64 hex"),
                            (f"{url}x", 1, "bring the file"), ("https://localhost:1/a.pt", 1, "bring the file")):
        found, line = mistakes(sample, "--ckpt", bad)
        assert found == code and said in line, line
    assert len(os.listdir(tmp_path / "cache" / "distribution-wise-rewards")) == 1


def test_edm2_as_typed(tmp_path):
    path, weak = tmp_path / "e.pt", tmp_path / "g.pt"
    random_edm2(path, model_channels=4, channel_mult=[1, 2], attn_resolutions=[8])
    random_edm2(weak, 1, label_dim=0, model_channels=4, channel_mult=[1, 1], attn_resolutions=[])
    for options in ([], ["--guide", weak, "--guidance=2", "--objective=ppo"], ["--cfg=1.5", "--cfg_channels=2", "--times=1"]):
        quick = [o for o in QUICK if "forward_every" not in o or "--objective=ppo" not in options]
        code, out, err = run(train_rl, *quick, "--num=20", "--judges=factors", "--ckpt", path, "--out", tmp_path / "o", *options)
        assert code == 0 and "ppo on ancestral" in out and "heun-2" in out, err
        base, tuned = models.load(str(path)), models.load(str(tmp_path / "o" / "ckpt.pt"))
        moved = [k for k, v in base.state_dict().items() if not torch.equal(v, tuned.state_dict()[k])]
        assert tuned.family == "edm2" and len(moved) > 30 and not any("fourier" in k for k in moved)
    code, out, err = run(fid, "--ckpt", path, "--guide", weak, "--num=20", "--num_real=20", "--num_prdc=10", "--features=factors",
                         "--steps=2")
    assert code == 0 and "heun, 2 steps" in out, err
    draw = lambda *options: run(sample, "--ckpt", path, "--num=6", "--steps=3", "--out", tmp_path, "--npz", tmp_path / "s.npz",
                                *options)[0] or np.load(tmp_path / "s.npz")["arr_0"].astype(int)
    assert abs(draw("--official") - draw("--official", "--batch_size=4")).max() <= 1
    assert (draw() != draw("--S_churn=30")).any() and (draw() != draw("--official")).any()


def test_edm2_mistakes(tmp_path):
    path, sit = tmp_path / "e.pt", os.path.join(models.ASSETS, "sit-tiny.pt")
    random_edm2(path)
    table = [(["--sampler=flow"], 2, "heun, euler, ancestral"), (["--last=20"], 2, "first noise level, 10.0"), (["--guide", sit], 1, "sit for"),
             (["--guide", path, "--cfg=2"], 2, "two ways"), (["--guidance=2"], 2, "missing"),
             (["--S_churn=5", "--sampler=euler"], 2, "S_churn")]
    for argv, code, said in table:
        found, line = mistakes(sample, "--ckpt", path, "--num=2", "--out", tmp_path, *argv)
        assert found == code and said in line, (argv, line)
    assert "no sampler" in mistakes(sample, "--sampler=ancestral")[1]
    assert "no noise" in mistakes(train_rl, "--ckpt", path, "--sampler=heun", "--out", tmp_path / "o")[1]
    assert "sit or edm2" in mistakes(models, "--family=dit")[1]


def test_pretraining_of_edm2_learns(tmp_path):
    torch.manual_seed(0)
    model, (x, y, _) = models.EDM2(**dict(models.EDM2_TINY, img_resolution=8, channel_mult=[1, 2])), models.tiny_images(200, 0)
    x = x[:, :, ::2, ::2]
    xt, t, u, weight = models.renoise(model, x / 127.5 - 1, torch.randn(x.shape), torch.rand(200))
    losses = []

    @torch.no_grad()
    def snapshot(seen, averages):
        losses.append(((averages[0.05](xt, t, y) - u).square().mean((1, 2, 3)) * weight).mean().item())

    models.pretrain(model, x, y, 0, 0.3, 1e9, 50, snapshot, total=2000)
    assert len(losses) == 8 and losses[-1] < 0.8 * losses[0], losses
    w = model.unet.out_conv.weight
    assert torch.allclose(w.square().mean((1, 2, 3)), torch.ones(3), atol=1e-3), "forced weight normalisation"


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
