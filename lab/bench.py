"""
How fast and how exact? Networks, iterations and the reward, on a GPU with weights of the official sizes made by rule.

python lab/bench.py                                             # all; on a GPU some five minutes, on a CPU small sizes
python lab/bench.py --parts reward --dim=512 --num=2000         # the reward beside the usual way to compute it, seconds
python lab/bench.py --parts parity                              # the same job on this GPU and on its CPU
"""
import contextlib
import copy
import io
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import zlib

import numpy as np
import torch
from scipy.linalg import sqrtm

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train_rl
from fid import PublishedNet, feature_net
from models import (EDM2, SIT_SIZES, SiT, Stop, attach_vae, configure, exact, fail, load, normalize_filters, save,
                    setup)
from reward import Moments, ReferenceSet, covariance_root, distance_to_root
from sample import HALF, Guided, compiled, decode, generate, image_seeds

# -----------------------------------------------------------------------------
parts = [] # of networks, iterations, parity, reward; empty: all
dim = 2048 # reward: features
num = 5000 # reward: members of the reference set
subset = 50 # reward: images of a candidate
candidates = 16 # reward: candidate subsets, for the same members
seed = 0 # of weights, noise and synthetic features
# -----------------------------------------------------------------------------

GAIN_ERROR = 1e-9 # allowed of a gain, a credit and a FD, over the traces of both covariances

# On a GPU the official sizes: SiT-XL/2 and EDM2-XS with the decoder for 256 and 512 px. On a CPU the same in small.
FULL = dict(sit="XL", latent=32, channels=128, edm2_latent=64, vae=128, images=64, paper=200, pathwise=32)
SMALL = dict(sit="S", latent=8, channels=32, edm2_latent=16, vae=32, images=8, paper=8, pathwise=4)


# ---- Weights made by rule -------------------------------------------------------------------------------------------

def sit_of(c, device):
    """SiT-XL/2 of 1000 classes for latents, every layer at torch's own random start."""
    with torch.device(device):
        return SiT(*SIT_SIZES[c.sit], (4, c.latent, c.latent), 2, 1000, learn_sigma=True).to(device).eval()


def edm2_of(c, device):
    """EDM2-XS, with gains of 1, which at its own start are 0."""
    with torch.device(device):
        model = EDM2(c.edm2_latent, 4, 1000, model_channels=c.channels, channel_mult=[1, 2, 3, 4], num_blocks=3,
                     attn_resolutions=[c.edm2_latent // 4, c.edm2_latent // 8], channels_per_head=min(64, c.channels))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.fill_(1.0) if name.endswith("gain") else None
    normalize_filters(model)
    return model.eval()


def vae_weights(width):
    """The decoder of an SD-VAE, whose width is 128, by its official names."""
    shapes, channels = {"post_quant_conv": (4, 4, 1, 1), "decoder.conv_in": (4 * width, 4, 3, 3)}, 4 * width

    def resnet(name, cin, cout):
        shapes.update({f"{name}.norm1": (cin,), f"{name}.conv1": (cout, cin, 3, 3), f"{name}.norm2": (cout,),
                       f"{name}.conv2": (cout, cout, 3, 3)})
        if cin != cout:
            shapes[f"{name}.conv_shortcut"] = (cout, cin, 1, 1)

    for i in range(2):
        resnet(f"decoder.mid_block.resnets.{i}", channels, channels)
    shapes["decoder.mid_block.attentions.0.group_norm"] = (channels,)
    for name in ("to_q", "to_k", "to_v", "to_out.0"):
        shapes[f"decoder.mid_block.attentions.0.{name}"] = (channels, channels)
    for i, out in enumerate((4 * width, 4 * width, 2 * width, width)):
        for j in range(3):
            resnet(f"decoder.up_blocks.{i}.resnets.{j}", channels, out)
            channels = out
        if i < 3:
            shapes[f"decoder.up_blocks.{i}.upsamplers.0.conv"] = (out, out, 3, 3)
    shapes |= {"decoder.conv_norm_out": (width,), "decoder.conv_out": (3, width, 3, 3)}
    rng, w = torch.Generator().manual_seed(0), {}
    for name, shape in shapes.items():
        weight = torch.randn(shape, generator=rng) / max(1, torch.Size(shape[1:]).numel())**0.5
        w[f"{name}.weight"] = 1 + weight / 10 if len(shape) == 1 else weight
        w[f"{name}.bias"] = torch.randn(shape[0], generator=rng) / 10
    w["decoder.conv_out.weight"] /= 3       # images mostly within -1 to 1
    return w


INCEPTION = {       # block: its layers, each with channels out, channels in and the kernel if it is not 1x1
    "Conv2d_": "1a_3x3 32 3 3x3, 2a_3x3 32 32 3x3, 2b_3x3 64 32 3x3, 3b_1x1 80 64, 4a_3x3 192 80 3x3",
    **{f"Mixed_5{b}.branch": f"1x1 64 {i}, 5x5_1 48 {i}, 5x5_2 64 48 5x5, 3x3dbl_1 64 {i}, 3x3dbl_2 96 64 3x3, "
       f"3x3dbl_3 96 96 3x3, _pool {p} {i}" for b, i, p in (("b", 192, 32), ("c", 256, 64), ("d", 288, 64))},
    "Mixed_6a.branch": "3x3 384 288 3x3, 3x3dbl_1 64 288, 3x3dbl_2 96 64 3x3, 3x3dbl_3 96 96 3x3",
    **{f"Mixed_6{b}.branch": f"1x1 192 768, 7x7_1 {c} 768, 7x7_2 {c} {c} 1x7, 7x7_3 192 {c} 7x1, 7x7dbl_1 {c} 768, "
       f"7x7dbl_2 {c} {c} 7x1, 7x7dbl_3 {c} {c} 1x7, 7x7dbl_4 {c} {c} 7x1, 7x7dbl_5 192 {c} 1x7, _pool 192 768"
       for b, c in (("b", 128), ("c", 160), ("d", 160), ("e", 192))},
    "Mixed_7a.branch": "3x3_1 192 768, 3x3_2 320 192 3x3, 7x7x3_1 192 768, 7x7x3_2 192 192 1x7, 7x7x3_3 192 192 7x1, "
                       "7x7x3_4 192 192 3x3",
    **{f"Mixed_7{b}.branch": f"1x1 320 {i}, 3x3_1 384 {i}, 3x3_2a 384 384 1x3, 3x3_2b 384 384 3x1, 3x3dbl_1 448 {i}, "
       f"3x3dbl_2 384 448 3x3, 3x3dbl_3a 384 384 1x3, 3x3dbl_3b 384 384 3x1, _pool 192 {i}"
       for b, i in (("b", 1280), ("c", 2048))},
}


def inception_weights():
    """FID's Inception by its published names and shapes, a random number generator for each tensor."""
    shapes = {"fc.weight": (1008, 2048), "fc.bias": (1008,)}
    for block, rows in INCEPTION.items():
        for layer, channels, *rest in map(str.split, rows.split(", ")):
            inputs, kernel = rest[0], rest[1] if rest[1:] else "1x1"
            shapes[f"{block}{layer}.conv.weight"] = tuple(map(int, (channels, inputs, *kernel.split("x"))))
            for k in ("weight", "bias", "running_mean", "running_var"):
                shapes[f"{block}{layer}.bn.{k}"] = (int(channels),)
            shapes[f"{block}{layer}.bn.num_batches_tracked"] = ()
    normal = lambda std: lambda r, shape: r.standard_normal(shape) * std
    uniform = lambda low, high: lambda r, shape: r.uniform(low, high, shape)
    rules = {"conv.weight": lambda r, shape: r.standard_normal(shape) * np.sqrt(2 / np.prod(shape[1:])),
             "bn.weight": uniform(0.7, 1.3), "bn.bias": normal(0.1), "bn.running_mean": normal(0.1),
             "bn.running_var": uniform(0.6, 1.4), "bn.num_batches_tracked": lambda r, shape: 0,
             "fc.weight": normal(np.sqrt(1 / 2048)), "fc.bias": normal(0.5)}
    weights = {}
    for k, shape in shapes.items():
        drawn = rules[".".join(k.split(".")[-2:])](np.random.RandomState(zlib.crc32(k.encode())), shape)
        weights[k] = torch.from_numpy(np.asarray(drawn, np.float32 if shape else np.int64))
    return weights


def write_files(c, folder, device):
    """SiT, decoder, Inception and statistics of real images as the files that a user has."""
    save(os.path.join(folder, "sit.pt"), sit_of(c, device), torch.float16)
    torch.save(vae_weights(c.vae), os.path.join(folder, "vae.bin"))
    torch.save(inception_weights(), os.path.join(folder, "inception.pth"))
    scales = (torch.arange(2048) + 2.0)**-0.55
    mu, cov = Moments(2048).add(torch.randn(4500, 2048) * scales).gaussian()
    np.savez(os.path.join(folder, "real.npz"), mu=mu.numpy(), sigma=cov.numpy())


# ---- Networks -------------------------------------------------------------------------------------------------------

def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(f, repeats=5):
    """Seconds of f: of the first call, which warms up, and the median of `repeats` more."""
    times = []
    for _ in range(1 + repeats):
        wait()
        began = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - began)
    return times[0], statistics.median(times[1:])


def error(x, exact):
    """Relative error, the norm over all."""
    return ((x - exact).double().norm() / exact.double().norm()).item()


def row(name, value, note=""):
    print(f"{name:58s} {value:>14s}  {note}", flush=True)


def of_network(name, model, images, few):
    """Rows of a network: forward of `images`, forward and backward of `few`, in every precision; returns seconds."""
    device, seconds = next(model.parameters()).device, {}
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(images, *model.shape, generator=rng).to(device)
    t, y = torch.linspace(0.1, 0.9, images, device=device), torch.arange(images, device=device)
    params = [p for p in model.parameters() if p.requires_grad]
    half = str(HALF[model.family]).removeprefix("torch.")
    forms, outputs, gradients = {"float32": (False, exact)}, {}, {}
    if device.type == "cuda":
        forms["TF32"] = (False, contextlib.nullcontext)
    for form, (bf16, how) in (forms | {half: (True, contextlib.nullcontext)}).items():
        network = Guided(model, bf16=bf16)

        def learn():                        # the gradient in the output is as large as that of --objective=forward
            loss = (network(x[:few], t[:few], y[:few]) * x[:few].flip(0)).sum()
            gradients[form] = torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)])

        with how():
            with torch.no_grad():
                outputs[form] = network(x, t, y)
                seconds[form] = seconds_of(lambda: network(x, t, y))[1]
            both = seconds_of(learn, 3)[1]
        row(f"{name}: forward, {images} latents, {form}", f"{1e3 * seconds[form]:.1f} ms",
            f"error {error(outputs[form], outputs['float32']):.1e}")
        row(f"{name}: forward + backward, {few} latents, {form}", f"{1e3 * both:.1f} ms",
            f"error of the gradient {error(gradients[form], gradients['float32']):.1e}")
    if model.family == "sit":
        network = compiled(Guided(model, bf16=True))
        with torch.no_grad():
            first, seconds["compiled"] = seconds_of(lambda: network(x, t, y))
            found = error(network(x, t, y), outputs["float32"])
        row(f"{name}: forward, {images} latents, {half}, --compile", f"{1e3 * seconds['compiled']:.1f} ms",
            f"error {found:.1e}; {first:.1f} s of warm-up, {seconds[half] / seconds['compiled']:.2f} times as fast")
    return seconds


@torch.no_grad()
def networks(c, folder, device):
    """Forwards in every precision, Inception, the decoder, and what FID of 50,000 images would take."""
    with torch.enable_grad():
        sit = of_network(f"SiT-{c.sit}/2", sit_of(c, device), c.images, c.images // 4)
        of_network("EDM2-XS" if c.channels == 128 else "EDM2", edm2_of(c, device), c.images // 2, c.images // 4)
    pixels = 8 * c.latent
    images = torch.randint(256, (8 * c.images, 3, pixels, pixels), dtype=torch.uint8).to(device)
    with contextlib.redirect_stdout(io.StringIO()):
        net = feature_net("inception", os.path.join(folder, "inception.pth"), device)
    inception = len(images) / seconds_of(lambda: net(images), 3)[1]
    row(f"Inception, {len(images)} images of {pixels} px, float32", f"{inception:.0f} images/s")

    model = attach_vae(SiT(1, 32, 2, (4, c.latent, c.latent), 2, 10).to(device), os.path.join(folder, "vae.bin"))
    latents = torch.randn(c.images, *model.shape).to(device)
    decoder = c.images / seconds_of(lambda: decode(model, latents), 3)[1]
    with torch.enable_grad(), exact():
        wanted = torch.cat([decode(model, part).detach() for part in latents.split(8)]).short()
        slow = c.images / seconds_of(lambda: [decode(model, part) for part in latents.split(8)], 1)[1]
    off = (decode(model, latents).short() - wanted).abs()
    by_one, by_more = (x.double().mean().item() for x in (off == 1, off > 1))
    row(f"decoder, {c.images} latents to {pixels} px", f"{decoder:.1f} images/s",
        f"in float32 {slow:.1f}; {by_one:.1e} of the uint8 values differ by 1, {by_more:.1e} by more")
    for form, seconds in sit.items():
        hours = 50_000 * (250 * seconds / c.images + 1 / decoder + 1 / inception) / 3600
        row(f"FID-50K of 250 steps, projected, {form}", f"{hours:.1f} h")


# ---- Iterations of train_rl.py, by phase ----------------------------------------------------------------------------

class Phases:
    """Seconds of the named functions of a module or class, call by call, while inside."""
    def __init__(self, *named):
        self.named, self.seconds, self.within = named, {name: [] for _, name in named}, False

    def timed(self, f, name):
        def timed(*args, **kwargs):
            if self.within and name != "probe":         # of a phase that is already timed
                return f(*args, **kwargs)
            self.within = name == "optimize"
            wait()
            began = time.perf_counter()
            found = f(*args, **kwargs)
            wait()
            self.seconds[name].append(time.perf_counter() - began)
            self.within = False
            return found
        return timed

    def __enter__(self):
        self.before = [getattr(owner, name) for owner, name in self.named]
        for (owner, name), f in zip(self.named, self.before):
            setattr(owner, name, self.timed(f, name))
        return self

    def __exit__(self, *error):
        for (owner, name), f in zip(self.named, self.before):
            setattr(owner, name, f)


@contextlib.contextmanager
def without_files():
    """train_rl.py, with a reference of synthetic features, and without the gigabytes that a run leaves behind."""
    kept = {name: getattr(train_rl, name) for name in ("draw_features", "save_state", "save")}
    scales = (torch.arange(2048) + 2.0)**-0.55
    train_rl.draw_features = lambda c, model, nets, plan, first, labels: (
        torch.randn(len(labels), 2048) * scales).to(next(model.parameters()).device)
    train_rl.save_state = train_rl.save = lambda *args, **kwargs: None
    try:
        yield
    finally:
        vars(train_rl).update(kept)


def iteration(name, folder, *options):
    """The last of three iterations of train_rl.py, which prints the rest itself."""
    files = [f"--ckpt={folder}/sit.pt", f"--vae={folder}/vae.bin", f"--features_path={folder}/inception.pth",
             f"--real={folder}/real.npz", f"--out={folder}/out", "--features=inception", "--num=0", "--iters=3"]
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    clock = Phases((train_rl, "roll_out"), (train_rl, "decode"), (PublishedNet, "__call__"), (train_rl, "rewards_of"),
                   (train_rl, "optimize"), (train_rl, "probe"), (train_rl, "learn"))
    said = io.StringIO()
    with without_files(), clock, contextlib.redirect_stdout(said):
        try:
            train_rl.main([*files, *options])
        except SystemExit:
            print(said.getvalue(), file=sys.stderr)
            raise
    draw, decoding, features, reward, update, learn = (clock.seconds[k][-1] for k in (
        "roll_out", "decode", "__call__", "rewards_of", "optimize", "learn"))
    probes = sum(clock.seconds["probe"][-3::2])         # between them is the base's pass, for the norm ratio
    total = draw + decoding + features + reward + learn
    row(name, f"{total:.2f} s", f"draw {draw:.2f}, decode {decoding:.2f}, features {features:.2f}, "
        f"reward {reward:.2f}, update {update:.2f}, trust region {probes:.3f} ({probes / total:.1%})")
    for line in said.getvalue().splitlines():
        if line.startswith("memory"):
            print(f"  {line}")


def iterations(c, folder, device):
    """One iteration of ppo, of the paper's setting and of pathwise."""
    common = ["--bf16", "--steps=20", "--micro_batch=64", f"--batch_size={c.images}", "--lr=1e-5"]
    iteration(f"ppo, {c.images} images, 20 steps of which 4 are trained, --bf16", folder, *common,
              f"--batch={c.images}", "--times=4", "--reference=2560")
    iteration(f"--preset=paper, {c.paper} images, --bf16", folder, "--preset=paper", "--bf16", "--micro_batch=64",
              f"--batch={c.paper}", f"--batch_size={c.paper // 2}", f"--subset={c.paper // 4}", "--reference=5000")
    iteration(f"pathwise, {c.pathwise} images, horizon 2, --bf16", folder, *common, f"--batch={c.pathwise}",
              "--objective=pathwise", "--horizon=2", "--micro_batch=8", "--reference=2560")


# ---- The same on a GPU and on a CPU ---------------------------------------------------------------------------------

def parity(device):
    """
    The same small job on a CPU and on `device`, both in float32. Returns the share of uint8 values that differ, their
    largest difference, and the relative errors of features, of exact gains and of what an update changes.
    """
    torch.cuda.empty_cache()
    found, cpu = {}, torch.device("cpu")
    for place in (cpu, device):
        model = load("sit-tiny-skewed", place)
        with exact():
            images = torch.cat(list(generate(model, image_seeds(0, "select", torch.arange(200))))).cpu()
        same = found[cpu][0] if found else images
        features = feature_net("tiny", device=place)(same.to(place))
        kept = (found[cpu][1] if found else features).to(place)
        mu, cov = Moments(64, place).add(kept[:150] + 0.1).gaussian()
        reference = ReferenceSet(kept[:150], mu, cov)
        gains = reference.swap_gain(torch.arange(10), kept[150:].view(5, 10, 64))
        found[place] = images, features.cpu(), gains.cpu(), update_of(place)
    a, b = found[cpu], found[device]
    off = (a[0].short() - b[0].short()).abs()
    return ((off > 0).double().mean().item(), off.max().item(), *(error(y, x) for x, y in zip(a[1:], b[1:])))


def update_of(device):
    """How one iteration of train_rl.py, as a process of its own, without TF32, changes the weights (n,)."""
    environment = dict(os.environ, NVIDIA_TF32_OVERRIDE="0")
    if device.type == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with tempfile.TemporaryDirectory() as out:
        done = subprocess.run([sys.executable, train_rl.__file__, "--iters=1", "--num=0", "--ema=0", "--batch=200",
                               f"--out={out}"], env=environment, capture_output=True, text=True)
        if done.returncode:
            fail(f"train_rl.py on {device}: {done.stderr[-2000:]}", code=1)
        after, before = (load(path).parameters() for path in (os.path.join(out, "ckpt.pt"), "sit-tiny-skewed"))
        return torch.cat([(p - q).detach().flatten() for p, q in zip(after, before)])


def print_parity(device):
    if device.type == "cpu":
        return row("the same on a GPU", "-", "no GPU: nothing to compare")
    share, largest, features, gains, update = parity(device)
    row("images that differ from the CPU's, of uint8 values", f"{share:.1e}", f"by at most {largest}")
    row("features, relative error", f"{features:.1e}")
    row("exact gains, relative error", f"{gains:.1e}")
    row("one update of the weights, relative error", f"{update:.1e}")


# ---- The reward beside the usual way --------------------------------------------------------------------------------

def timed(name, f, count=1, wanted=None, usual=None, repeats=1):
    """
    Time f, which does `count` of something, and print a row: seconds of one, largest error from `wanted` (what the
    usual way says of the first few), and how many times faster than `usual` seconds. Returns result, seconds, error.
    """
    times = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        result = f()
        wait()
        times.append((time.perf_counter() - began) / count)
    seconds = min(times)
    off = None if wanted is None else (result[:len(wanted)] - wanted).abs().max().item()
    row(name, f"{1e3 * seconds:.2f} ms", " ".join(filter(None, (
        off is not None and f"error {off:.1e}", usual and f"{usual / seconds:.0f} x faster"))))
    return result, seconds, off


def reward(c, device):
    """Exact gains and credits on synthetic features, against the change of moments and a distance evaluated anew."""
    # Features whose covariance has the eigenvalues of a power law, (i + 2)^-1.1, as those of networks do.
    rng = torch.Generator().manual_seed(c.seed)
    scales = (torch.arange(c.dim) + 2.0)**-0.55
    real = (torch.randn(2 * c.num, c.dim, generator=rng) + 0.1) * scales
    real_mu, real_cov = Moments(c.dim, device).add(real.to(device)).gaussian()
    features = (torch.randn(c.num, c.dim, generator=rng) * scales * 1.05).to(device)
    new = (torch.randn(c.candidates, c.subset, c.dim, generator=rng) * scales).to(device)
    slots = torch.randperm(c.num, generator=rng)[:c.subset].to(device)
    members, few = features[slots], min(3, c.candidates)

    print(f"reward: d {c.dim}, N {c.num}, {c.candidates} candidates of {c.subset} images")
    for first in (torch.linalg.eigvalsh, torch.linalg.cholesky, torch.linalg.slogdet):      # libraries are loaded
        first(torch.eye(64, dtype=torch.float64, device=device))
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
    root, usual, _ = timed("FD: scipy.linalg.sqrtm", lambda: sqrtm((cov @ real_cov).cpu().numpy()).trace().real)
    exact_fd = (mu - real_mu).square().sum() + cov.trace() + real_cov.trace() - 2 * root
    *_, fd_error = timed("FD: eigenvalues", lambda: whole(moments)[None], 1, exact_fd[None], usual)
    print(f"gain: {(counting + usual) / gain_seconds:.0f} x faster than all features again and sqrtm")
    allowed = GAIN_ERROR * (cov.trace() + real_cov.trace()).item()
    if max(gain_error, credit_error, fd_error) > allowed:
        fail(f"errors of a gain {gain_error:.1e}, a credit {credit_error:.1e} and a FD {fd_error:.1e}: allowed is "
             f"{allowed:.1e}", 1)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    known = ("networks", "iterations", "parity", "reward")
    if unknown := set(c.parts) - set(known):
        fail(f"unknown parts {' '.join(sorted(unknown))}; choose {', '.join(known)}")
    if min(c.dim, c.subset, c.candidates) < 1 or c.num < max(c.subset, 2 * c.dim):
        fail(f"dim {c.dim}, num {c.num}, subset {c.subset}, candidates {c.candidates}: needed is subset <= num and "
             "2 dim <= num")
    with Stop(), tempfile.TemporaryDirectory() as folder:
        device = setup()[2]
        gpu = device.type == "cuda"
        c.update(FULL if gpu else SMALL)
        if not gpu:
            torch.set_num_threads(1)
        torch.manual_seed(c.seed)
        print(f"torch {torch.__version__}, " + (torch.cuda.get_device_name() if gpu else "one thread of a CPU"))
        if not c.parts or {"networks", "iterations"} & set(c.parts):
            write_files(c, folder, device)
        for name, part in (("parity", lambda: print_parity(device)), ("reward", lambda: reward(c, device)),
                           ("networks", lambda: networks(c, folder, device)),
                           ("iterations", lambda: iterations(c, folder, device))):
            if not c.parts or name in c.parts:
                part()
    print(f"memory at the peak: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GB")


if __name__ == "__main__":
    main()
