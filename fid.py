"""
Judge generated images against real ones: FID, KID, precision / recall, density / coverage.

python fid.py --num 50000                                       # the tiny base: draw and judge
python fid.py --ckpt out/train_rl/ckpt.pt --num 10000 --features tiny2 tiny factors
python fid.py --images SAMPLES --real FOLDER                    # folders, zips or .npz of images
python fid.py --real FOLDER --stats real.npz                    # write statistics, to be used as --real real.npz
python fid.py --ckpt SiT-XL-2-256.pt --vae vae.safetensors --features inception --real VIRTUAL_imagenet256_labeled.npz

Left out on purpose: Inception score and sFID. Behind torchrun write `torchrun ... -- fid.py --num 50000`.
"""
import http.client
import math
import os
import sys
import time
from json import dumps
from typing import NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F

from models import (ASSETS, SIZE, FeatureNet, Stop, check_classes, configure, fail, gather, image_batches, image_size,
                    is_statistics, note, open_images, print0, read_arrays, read_checkpoint, reading, setup, sha256,
                    share_cores, tiny_images, whole, writable)
from reward import Moments, covariance_root, distance_to_root, influence, standard_error
from sample import NOISE, generate, image_seeds, load_guided, schedule, watched

# -----------------------------------------------------------------------------
ckpt = "" # model to draw from: .pt, .pkl or .safetensors, its URL or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
images = "" # judge these instead: folder or zip of images, or .npz or .npy with uint8 (N, H, W, 3)
num = 0 # images to judge; 0: 50,000 drawn, or all of --images
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
features = [] # some of inception (what FID means), dinov2, tiny, tiny2, pixels, factors; empty: tiny2 in the tiny world
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
num_real = 50000 # real images of the tiny world that are compared with; a folder is used whole
num_prdc = 5000 # KID and the neighbour metrics use so many of the images, a fixed random subset
sampler = "" # see sample.py; empty: flow for SiT, heun for EDM2
steps = 10 # of the sampler
noise = 0.0 # noise level of the sampler; 0: 0.5 for SiT, 0.7 for EDM2
last = 0.0 # its noise-free last step, see sample.py
cfg = 1.0 # guidance scale; 1: none
cfg_channels = 0 # guide only the first so many channels; 0: all
guide = "" # autoguidance: a weaker network in place of the null class
guidance = 1.4 # its scale
labels = "balanced" # of the drawn images: balanced (i % classes), or random (uniform, as for published FIDs)
seed = 0 # of the drawn images
stream = "report" # report; select: other images, to choose a sampler with
batch_size = 250 # images in one pass, per rank
stats = "" # write the statistics of --images if given, else of what --ckpt draws if given, else of --real, and stop
json = "" # also write the numbers to this file, a line per feature network
# -----------------------------------------------------------------------------


# ---- Feature networks: uint8 (N, 3, H, W) => float32 (N, dim) -----------------------------------------------------

class Pixels:
    """Raw pixels in [-1, 1]: a view that no network learned."""
    name, size, dim, hash, resize = "pixels", SIZE, 768, "", "none"

    def __call__(self, images):
        return images.float().flatten(1) / 127.5 - 1


class MeasuredFactors:
    """
    What can be measured in an image without a network: amount of ink, centre (x, y), spread, brightness and hue (as
    cos, sin), each roughly of unit variance in the tiny world.
    """
    name, size, dim, hash, resize = "factors", SIZE, 7, "", "none"

    def __call__(self, images):
        x = images.float() / 255
        ink = x.amax(1)                                                 # (N, H, W)
        total = ink.sum((1, 2)) + 1e-3
        place = torch.arange(ink.shape[-1], device=x.device).float()
        cx, cy = ((ink.sum(d) * place).sum(1) / total for d in (1, 2))
        far = (place - cx[:, None]).square()[:, None, :] + (place - cy[:, None]).square()[:, :, None]
        spread = ((ink * far).sum((1, 2)) / total).sqrt()
        brightness = ink.flatten(1).topk(10, dim=1).values.mean(1)
        red, green, blue = (x * ink[:, None]).sum((2, 3)).T / total
        hue = torch.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue)
        columns = [(total - 35) / 16, (cx - 7.6) / 0.65, (cy - 7.8) / 0.7, (spread - 3.7) / 0.42,
                   (brightness - 0.72) / 0.15, 1.4 * hue.cos(), 1.4 * hue.sin()]
        return torch.stack(columns, dim=1)


# Published networks: file, sha256 or its beginning, where it comes from.
WEIGHTS = {
    "inception": ("pt_inception-2015-12-05-6726825d.pth", "6726825d",
                  "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/"),
    "dinov2": ("dinov2_vitl14_pretrain.pth", "d5383ea8f4877b2472eb973e0fd72d557c7da5d3611bd527ceeb1d7162cbf428",
               "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/"),
}


def published_weights(name, path=None):
    """
    Path and sha256 of a published network's weights. path: a file or a folder of the user's, whose hash may differ (a
    note says so); without one the file in torch's cache, downloaded if need be, whose hash may not.
    """
    file, digest, url = WEIGHTS[name]
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", file)
    found = os.path.join(path, file) if path and os.path.isdir(path) else path or cached
    if not path and not os.path.isfile(cached) and os.environ.get("LOCAL_RANK", "0") == "0":
        try:
            os.makedirs(os.path.dirname(cached), exist_ok=True)
            torch.hub.download_url_to_file(url + file, cached, digest, progress=False)
        except (OSError, ValueError, RuntimeError, http.client.HTTPException) as e:
            fail(f"cannot download {url}{file} ({str(e)[:80]}); bring it to {cached}, or name it by --features_path", 1)
    if not path:
        dist.barrier()                      # the other ranks wait for the download
    if not os.path.isfile(found):
        fail(f"no weights {found!r}; needed: {file} of {url}")
    actual = sha256(found)
    if not actual.startswith(digest):
        if not path:
            fail(f"{found} is not the published {name} (sha256 {actual[:8]}.., not {digest[:8]}..); delete it", code=1)
        print0(f"note: {found} has sha256 {actual[:8]}.., the published {name} {digest[:8]}..: a score of its own")
    return found, actual


def resize_tf1(x, size):
    """
    TensorFlow 1's bilinear resize of float (N, C, H, W) to size (height, width): row i comes from i H / height, without
    half-pixel shift, without antialiasing.
    """
    for dim, length in zip((2, 3), size):
        position = torch.arange(length, device=x.device) * torch.tensor(x.shape[dim] / length, device=x.device)
        low = position.long()
        high = (low + 1).clamp(max=x.shape[dim] - 1)
        shape = (-1, 1) if dim == 2 else (-1,)
        a, b = x.index_select(dim, low), x.index_select(dim, high)
        x = a + (b - a) * (position - low).view(shape)
    return x


def inception(w, x):
    """
    pool_3 of the Inception v3 that FID means (Szegedy et al. 2015, graph of 2015-12-05): x (N, 3, 299, 299) in [-1, 1]
    => (N, 2048); w: its tensors by name. Unlike torchvision's, mean pools leave out the padding, and the last block
    pools by maximum.
    """
    def conv(x, name, stride=1, pad=True):
        weight = w[f"{name}.conv.weight"]
        x = F.conv2d(x, weight, None, stride, [k // 2 for k in weight.shape[2:]] if pad else 0)
        norm = (w[f"{name}.bn.{k}"] for k in ("running_mean", "running_var", "weight", "bias"))
        return F.batch_norm(x, *norm, eps=1e-3).relu_()

    def chain(x, stem, ends, reduce=False):             # "12": convolutions stem1, stem2; reduce: the last halves
        for end in ends:
            x = conv(x, stem + end, *((2, False) if reduce and end == ends[-1] else ()))
        return x

    mean_pool = lambda x: F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    max_pool = lambda x: F.max_pool2d(x, 3, 1, 1)
    halve = lambda x: F.max_pool2d(x, 3, 2)

    x = conv(conv(x, "Conv2d_1a_3x3", 2, False), "Conv2d_2a_3x3", 1, False)
    x = conv(halve(conv(x, "Conv2d_2b_3x3")), "Conv2d_3b_1x1")
    x = halve(conv(x, "Conv2d_4a_3x3", 1, False))                                               # (N, 192, 35, 35)
    for b in ("Mixed_5b.", "Mixed_5c.", "Mixed_5d."):
        x = torch.cat([conv(x, b + "branch1x1"), chain(x, b + "branch5x5_", "12"),
                       chain(x, b + "branch3x3dbl_", "123"), conv(mean_pool(x), b + "branch_pool")], 1)
    b = "Mixed_6a."
    x = torch.cat([conv(x, b + "branch3x3", 2, False), chain(x, b + "branch3x3dbl_", "123", True), halve(x)], 1)
    for b in ("Mixed_6b.", "Mixed_6c.", "Mixed_6d.", "Mixed_6e."):                              # (N, 768, 17, 17)
        x = torch.cat([conv(x, b + "branch1x1"), chain(x, b + "branch7x7_", "123"),
                       chain(x, b + "branch7x7dbl_", "12345"), conv(mean_pool(x), b + "branch_pool")], 1)
    b = "Mixed_7a."
    x = torch.cat([chain(x, b + "branch3x3_", "12", True), chain(x, b + "branch7x7x3_", "1234", True), halve(x)], 1)
    for b, pool in (("Mixed_7b.", mean_pool), ("Mixed_7c.", max_pool)):                         # (N, 2048, 8, 8)
        fork, double = conv(x, b + "branch3x3_1"), chain(x, b + "branch3x3dbl_", "12")
        x = torch.cat([conv(x, b + "branch1x1"), conv(fork, b + "branch3x3_2a"), conv(fork, b + "branch3x3_2b"),
                       conv(double, b + "branch3x3dbl_3a"), conv(double, b + "branch3x3dbl_3b"),
                       conv(pool(x), b + "branch_pool")], 1)
    return x.mean((2, 3))


def dinov2(w, x):
    """
    The class token of DINOv2's ViT, Oquab et al. 2023: x (N, 3, H, W), sides multiples of 14, normalised => (N, width);
    w: its tensors by name, which also give the sizes.
    """
    def norm(name, x):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], eps=1e-6)

    def linear(name, x):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    x = F.conv2d(x, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=14)
    N, D, rows, columns = x.shape
    heads = max(2, D // 64)                 # the tensors do not tell; 64 wide in every published size
    place = w["pos_embed"]                  # (1, 1 + side^2, D)
    side = math.isqrt(place.shape[1] - 1)
    if (rows, columns) != (side, side):     # the official code stretches by (rows + 0.1) / side, not to a size
        grid = place[:, 1:].view(1, side, side, D).permute(0, 3, 1, 2)
        grid = F.interpolate(grid, scale_factor=((rows + 0.1) / side, (columns + 0.1) / side), mode="bicubic")
        place = torch.cat([place[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
    x = torch.cat([w["cls_token"].expand(N, -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + place
    for i in range(1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))):
        b = f"blocks.{i}."
        q, k, v = linear(b + "attn.qkv", norm(b + "norm1", x)).view(N, -1, 3, heads, D // heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(N, -1, D)
        x = x + w[b + "ls1.gamma"] * linear(b + "attn.proj", h)
        h = linear(b + "mlp.fc2", F.gelu(linear(b + "mlp.fc1", norm(b + "norm2", x))))
        x = x + w[b + "ls2.gamma"] * h
    return norm("norm", x)[:, 0]


class PublishedNet:
    """
    inception, or dinov2 preprocessed as for EDM2's FD-DINOv2. Images may have any size; they pass in chunks, which
    bounds the memory.
    """
    size = None

    def __init__(self, name, path, device):
        path, self.hash = published_weights(name, path)
        self.name = name
        self.resize = {"inception": "TF1 bilinear to 299", "dinov2": "bicubic to 224, antialiased, not rounded"}[name]
        try:
            self.w = {k: x.float().to(device) for k, x in read_checkpoint(path).items()}
            if name == "inception" and len(self.w["fc.bias"]) != 1008:
                raise ValueError(f"{len(self.w['fc.bias'])} classes, FID's network has 1008, torchvision's 1000")
            self.dim = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]
        except (LookupError, AttributeError, RuntimeError, ValueError, TypeError) as e:
            fail(f"{path} does not hold {name}: {' '.join(str(e).split())[:200]}; needed: {WEIGHTS[name][0]}", code=1)

    def features(self, images):             # uint8 (n, 3, H, W) => float32 (n, dim)
        if self.name == "inception":
            return inception(self.w, (resize_tf1(images.float(), (299, 299)) - 128) / 128)
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=x.device).view(2, 3, 1, 1)
        return dinov2(self.w, (x - mean) / std)

    def __call__(self, images):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):       # TF32 would cost FID its third digit
            return torch.cat([self.features(part) for part in images.split(32)])


def feature_net(name, path=None, device="cpu"):
    """
    A callable uint8 images (N, 3, H, W) => float32 features (N, dim), with .name, .dim, .size (in pixels; None: any),
    .hash (sha256 of its weights' file, "" without one) and .resize (what it does to images). path: that file.
    """
    if name == "pixels":
        return Pixels()
    if name == "factors":
        return MeasuredFactors()
    if name in WEIGHTS:
        return PublishedNet(name, path, device)
    if name in ("tiny", "tiny2"):
        path = path or os.path.join(ASSETS, f"features-{name}.pt")
        parts = read_checkpoint(path)
        net = FeatureNet(name)
        net.load_state_dict({k: v.float() for k, v in parts["model"].items()})
        net.hash, net.resize = sha256(path), "none"
        return net.requires_grad_(False).eval().to(device)
    fail(f"unknown features {name!r}; choose tiny, tiny2, pixels, factors, inception or dinov2")


# ---- Real data ------------------------------------------------------------------------------------------------------

class Summary(NamedTuple):
    """What a set of images leaves behind: moments of all, features of some."""
    num: int                                # 0 if a file of statistics does not tell
    mu: torch.Tensor                        # (d,) float64
    cov: torch.Tensor                       # (d, d) float64
    features: Optional[torch.Tensor]        # (min(num, num_prdc), d) float32; None if only statistics are known
    size: str = ""                          # of the images, before a network resizes them; empty if unknown


class Nets:
    """Feature networks as one: their features side by side."""
    def __init__(self, nets):
        self.nets, self.dims, self.name = nets, [net.dim for net in nets], " + ".join(net.name for net in nets)
        self.dim = sum(self.dims)

    def __call__(self, images):
        return torch.cat([net(images) for net in self.nets], dim=1)


def real_batches(real, size, role, num, batch_size=250):
    """
    This rank's share (image i of rank i % world) of real images, as uint8 batches: num of the tiny world, at most num
    of a folder (0: all). What rewards and what judges share no image: "train" is for the reward, "report" for judging,
    "floor" for real against real, "select" for choosing a base or a sampler. Of a folder "report" has every second
    image in the order of Images, "train" and "floor" the others, "all" and "select" all.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    if real == "tiny":
        mine = range(rank, num, world)
        for k in range(0, len(mine), 1000):
            part = mine[k:k + 1000]
            yield tiny_images(len(part), 0, "report" if role == "all" else role, part.start, world)[0]
    else:
        offset, stride = {"all": (0, 1), "select": (0, 1), "train": (0, 2), "floor": (0, 2), "report": (1, 2)}[role]
        limit = len(range(rank, num, world)) if num else 0
        found = open_images(real)
        mine = min(limit or len(found.names), len(range(offset + stride * rank, len(found.names), stride * world)))
        batches = image_batches(found, size, offset + stride * rank, stride * world, limit, batch_size)
        yield from watched(batches, -(-mine // batch_size), desc=f"{real} ({role})", leave=False)


def features_of(net, images):
    """Features (N, dim) of a uint8 batch (N, 3, H, W), or of a list of images (3, H, W) of several sizes."""
    if isinstance(images, torch.Tensor):
        return net(images)
    features = torch.empty(len(images), net.dim, device=images[0].device)
    for shape in {x.shape for x in images}:
        rows = [i for i, x in enumerate(images) if x.shape == shape]
        features[rows] = net(torch.stack([images[i] for i in rows]))
    return features


@torch.no_grad()
def summarize(batches, nets, num_prdc, device="cpu"):
    """
    {net.name: Summary} of batches of uint8 images, in one pass: float64 sums of all features, and the first num_prdc
    features themselves. Every rank brings its share, image i of rank i % world, and gets the whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    moments = {net.name: Moments(net.dim, device) for net in nets}
    kept = {net.name: [torch.empty(0, net.dim, device=device)] for net in nets}
    sizes = torch.tensor([[10**9, 10**9], [-1, -1]], device=device)        # least and largest width and height
    for batch in batches:
        batch = batch.to(device) if isinstance(batch, torch.Tensor) else [x.to(device) for x in batch]
        for x in batch[:1] if isinstance(batch, torch.Tensor) else batch:
            size = torch.tensor([x.shape[-1], x.shape[-2]], device=device)
            sizes = torch.stack([sizes[0].minimum(size), sizes[1].maximum(size)])
        for net in nets:
            f = features_of(net, batch)
            if sum(map(len, kept[net.name])) * world < num_prdc:
                kept[net.name].append(f)
            moments[net.name].add(f)
    sizes[1] *= -1
    dist.all_reduce(sizes, dist.ReduceOp.MIN)
    least, largest = sizes[0].tolist(), (-sizes[1]).tolist()
    size = f"{least[0]} x {least[1]}" if least == largest else "several sizes"
    summaries = {}
    for name, m in moments.items():
        weight = torch.tensor([m.weight, m.squares], dtype=torch.float64, device=device)
        for part in (weight, m.sum, m.outer):
            dist.all_reduce(part)
        m.weight, m.squares = weight.tolist()
        if m.weight < 2:
            fail(f"{int(m.weight)} images have no covariance; needed are at least 2, better {10 * len(m.sum)}", code=1)
        first = min(int(m.weight), num_prdc)
        features = torch.cat(kept[name])[:len(range(rank, first, world))]
        summaries[name] = Summary(int(m.weight), *m.gaussian(), gather(features, first), size)
    return summaries


def real_summaries(real, nets, role, num_prdc, num, device="cpu", size=None, batch_size=250):
    """
    {net.name: Summary} of real data: the tiny world, a folder, a zip, or a file of statistics. Images of a folder are
    resized as the networks need them; if those take any size, to `size` pixels, as the model draws (None: not at all).
    """
    if is_statistics(real):
        return {net.name: read_statistics(real, net, device) for net in nets}
    if real == "tiny" and (size or SIZE) != SIZE:
        fail(f"the model draws images of {size} pixels, the tiny world has {SIZE}; name real ones with --real")
    size = next((net.size for net in nets if net.size), size)
    return summarize(real_batches(real, size, role, num, batch_size), nets, num_prdc, device)


def read_statistics(path, net, device="cpu"):
    """
    Summary of the images behind mu (d,) and sigma (d, d) in an .npz, .npy, .pt or .pkl, of pytorch-fid, ADM (whose
    arr_0 are some of them only), torch-fidelity or write_statistics, or in EDM2's .pkl {num_images, fid, fd_dinov2}.
    Exit code 1 if they are of other features or other weights than `net`, do not fit it, or are no covariance.
    """
    if not os.path.isfile(path):
        fail(f"no statistics {path!r}; needed: an .npz with mu and sigma, or a .pkl of EDM2")
    parts = read_arrays(path)
    with reading(path):
        inner = {"inception": "fid", "dinov2": "fd_dinov2"}.get(net.name)
        if inner in parts and isinstance(parts[inner], dict):
            stored = dict(parts[inner], num=parts.get("num_images", 0))
        else:
            stored = {k: parts[k] for k in ("mu", "sigma", "features", "hash", "num", "size") if k in parts}
    if "mu" not in stored or "sigma" not in stored:
        fail(f"{path} holds no statistics of {net.name}: mu and sigma are needed, and it has "
             f"{', '.join(map(str, list(parts.keys())[:5])) or 'nothing'}", code=1)
    try:
        mu, cov = (x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else torch.from_numpy(
            np.asarray(x).astype(np.float64, casting="same_kind")) for x in (stored["mu"], stored["sigma"]))
        name, digest, size = (str(stored.get(k, x)).encode().decode() for k, x in (
            ("features", net.name), ("hash", ""), ("size", "")))
        num = max(0, int(np.asarray(stored.get("num", 0)).item()))
    except Exception as e:                  # numpy's text may hold what is no character
        fail(f"{path}: mu, sigma or num are not numbers, or features no name ({str(e)[:80]})", code=1)
    mu = mu.flatten() if mu.numel() == max(mu.shape, default=0) else mu        # some write (1, d)
    if name != net.name:
        fail(f"{path} holds statistics of {name}, asked for is {net.name}; add --features {name}", code=1)
    if mu.shape != (net.dim,) or cov.shape != (net.dim, net.dim):
        fail(f"{path} has mu {tuple(mu.shape)} and sigma {tuple(cov.shape)}, {net.name} has {net.dim} dimensions: name "
             "the network that it was made with by --features", code=1)
    if digest and net.hash and digest != net.hash:
        fail(f"{path} was made with other weights of {name} (sha256 {digest[:8]}.., these are {net.hash[:8]}..): "
             "make it again with --stats" + ", or name the old ones with --features_path" * (name in WEIGHTS), code=1)
    if not (mu.isfinite().all() and cov.isfinite().all()):
        fail(f"{path} holds NaN or infinite values", code=1)
    if (cov - cov.T).abs().max() > 1e-6 * cov.abs().max():
        fail(f"{path}: sigma is not symmetric, so it is no covariance", code=1)
    if torch.linalg.cholesky_ex(cov).info and (vals := torch.linalg.eigvalsh(cov))[0] < -1e-5 * vals[-1]:
        fail(f"{path}: sigma has negative eigenvalues, so it is no covariance", code=1)
    return Summary(num, mu.to(device), cov.to(device), None, size)


def stored_moments(path, net, device):
    """Moments as the images behind a file of statistics left them; their number has to be in it."""
    num, mu, cov, *_ = read_statistics(path, net, device)
    if num <= net.dim:
        fail(f"{path} says it describes {num} images; {net.dim}-d moments need more than {net.dim}, better 5 times", 1)
    moments = Moments(net.dim, device)
    moments.weight = moments.squares = float(num)
    moments.sum, moments.outer = num * mu, (num - 1) * cov + num * torch.outer(mu, mu)
    return moments


def write_statistics(path, summary, net):
    """mu, sigma and where they come from, atomically."""
    with whole(path) as f:
        np.savez(f, mu=summary.mu.cpu().numpy(), sigma=summary.cov.cpu().numpy(), num=summary.num, features=net.name,
                 hash=net.hash, size=summary.size, resize=net.resize, quantisation="uint8")


# ---- Metrics on features -------------------------------------------------------------------------------------------

def kid(real, fake):
    """Unbiased MMD^2 with the kernel (x.y / d + 1)^3 on all pairs; Binkowski et al. 2018. (N, d), (M, d) => float."""
    real, fake = real.double(), fake.double()
    N, M, d = len(real), len(fake), real.shape[1]

    def total(a, b):
        return sum((rows @ b.T / d + 1).pow(3).sum() for rows in a.split(1000))

    own_real = total(real, real) - (real.square().sum(1) / d + 1).pow(3).sum()
    own_fake = total(fake, fake) - (fake.square().sum(1) / d + 1).pow(3).sum()
    return (own_real / (N * (N - 1)) + own_fake / (M * (M - 1)) - 2 * total(real, fake) / (N * M)).item()


def neighbour_radii(x, ks):
    """[(N,) distance to the k-th other point of the same set, for k in ks]."""
    nearest = torch.cat([torch.cdist(rows, x).topk(max(ks) + 1, largest=False).values for rows in x.split(1000)])
    return [nearest[:, k] for k in ks]


def prdc(real, fake, k_precision=3, k_density=5):
    """
    Precision and recall (k 3; a point on the edge counts; Kynkaanniemi et al. 2019), density and coverage (k 5; it does
    not; Naeem et al. 2020). real (N, d), fake (M, d) => dict of floats.
    """
    real_3, real_5 = neighbour_radii(real, (k_precision, k_density))
    fake_3, = neighbour_radii(fake, (k_precision,))
    inside, within, covered, recalled = 0, 0, torch.zeros(len(real), dtype=bool), torch.zeros(len(real), dtype=bool)
    covered, recalled = covered.to(real.device), recalled.to(real.device)
    for rows, radius in zip(fake.split(1000), fake_3.split(1000)):
        distance = torch.cdist(rows, real)                              # (m, N)
        inside += (distance <= real_3).any(1).sum().item()
        recalled |= (distance <= radius[:, None]).any(0)
        near = distance < real_5
        within += near.sum().item()
        covered |= near.any(0)
    return dict(precision=inside / len(fake), recall=recalled.double().mean().item(),
                density=within / (k_density * len(fake)), coverage=covered.double().mean().item())


def histogram_distance(real, fake, bins=20):
    """Total variation between histograms, mean over columns: (N, d), (M, d) => 0 .. 1. Bins hold equal real mass."""
    cuts = torch.quantile(real, torch.linspace(0, 1, bins + 1)[1:-1].to(real), dim=0)       # (bins - 1, d)

    def shares(x):
        columns = zip(x.T.contiguous(), cuts.T.contiguous())
        places = torch.stack([torch.bucketize(column, edges) for column, edges in columns])  # (d, N)
        return torch.stack([(places == b).double().mean(1) for b in range(bins)])           # (bins, d)

    return (shares(real) - shares(fake)).abs().sum(0).mean().item() / 2


def distance(fake, real):
    """Frechet distance of two Summaries; rounding may leave less than 0 where it is 0."""
    return max(0.0, distance_to_root(fake.mu, fake.cov, real.mu, covariance_root(real.cov)).item())


def judge(fake, real, labels=None):
    """
    All metrics of one Summary against another: fid, fid_se (its standard error; labels are those of fake.features if
    they were drawn in equal numbers), kid, precision, recall, density, coverage; also psi, the first variation of the
    kept features. What needs real features is None if only statistics are known.
    """
    row = dict(num=fake.num, num_real=real.num, size=fake.size, size_real=real.size, fid=distance(fake, real),
               fid_se=None, psi=None)
    try:
        row["psi"] = influence(fake.features, fake.mu, fake.cov, real.mu, covariance_root(real.cov))
        row["fid_se"] = standard_error(row["psi"], labels) * math.sqrt(len(row["psi"]) / fake.num)
    except ValueError:                      # singular covariances, like that of pixels that are always black
        pass
    row.update(kid=None, precision=None, recall=None, density=None, coverage=None)
    if real.features is not None and min(len(fake.features), len(real.features)) > 5:
        row.update(kid=kid(real.features, fake.features), **prdc(real.features, fake.features))
    return row


def notes_on(row, dim):
    """Print what a reader of judge()'s row has to know, in features of `dim` dimensions."""
    for num, whose in ((row["num"], "judged"), (row["num_real"], "real")):
        if 0 < num <= dim:
            note(f"{num} {whose} images cannot fill the {dim} dimensions of {row['features']}: compare this FID only "
                 "with others of the same numbers of images")
    if row["size"] and row["size_real"] and row["size"] != row["size_real"]:
        note(f"the real images are {row['size_real']}, the judged ones {row['size']}: resized to one size beforehand "
             "they would give another FID")


# ---- A model against real data -------------------------------------------------------------------------------------

@torch.no_grad()
def drawn_summaries(model, nets, num, sampler="", steps=10, noise=0.5, last=0.0, seed=0, stream="report",
                    num_prdc=5000, batch_size=250, keep=0, labels="balanced"):
    """
    {net.name: Summary} of num images that the model draws, and the first `keep` of them. The images are split over the
    ranks; image i depends on (seed, stream, i) and its label alone, which is i % classes or, if random, of that hash.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    device = next(model.parameters()).device
    for net in nets:
        if net.size and image_size(model) != net.size:
            fail(f"{net.name} features are for images of {net.size} pixels, the model draws {image_size(model)}; "
                 "inception and dinov2 take any size")
    indices = torch.arange(num)[rank::world]
    seeds = image_seeds(seed, stream, indices)
    classes = indices % model.num_classes
    if labels == "random":                  # the noise takes the lower 32 bits
        classes = torch.tensor([(s >> 32) % model.num_classes for s in seeds], dtype=torch.int64)
    batches = generate(model, seeds, classes, sampler, steps, 1.0, batch_size, noise, last)
    shown, total = [], -(-len(indices) // batch_size)

    def keeping():
        for batch in watched(batches, total, desc=f"drawing {num}" + (f" ({sampler})" if sampler else ""), leave=False):
            if sum(map(len, shown)) < keep:
                shown.append(batch)
            yield batch

    summaries = summarize(keeping(), nets, num_prdc, device)
    return summaries, gather(torch.cat(shown)[:len(range(rank, keep, world))], keep) if keep else None


def evaluate(model, nets, real, num, sampler="", steps=10, noise=0.5, last=0.0, seed=0, stream="report",
             num_prdc=5000, batch_size=250, keep=0, labels="balanced"):
    """
    Draw num images (see drawn_summaries) and judge them in every net against real {net.name: Summary}. Returns
    {net.name: row}, a row being judge()'s with features, sampler, steps and seed; "images": the first `keep`.
    """
    sampler = schedule(sampler, steps, noise, last, model.sigmas).sampler
    summaries, images = drawn_summaries(model, nets, num, sampler, steps, noise, last, seed, stream, num_prdc,
                                        batch_size, keep, labels)
    rows = dict(images=images) if keep else {}
    for name, fake in summaries.items():
        stratum = torch.arange(len(fake.features), device=fake.features.device) % model.num_classes
        row = judge(fake, real[name], stratum if labels == "balanced" else None)
        rows[name] = dict(features=name, sampler=sampler, steps=steps, seed=seed, **row, kept=fake.features)
    return rows


def images_summaries(images, num, num_prdc, nets, device, batch_size=250):
    """{net.name: Summary} of the images in a folder, a zip or an array file: num of them, a fixed random subset, or all
    (0)."""
    rank, world = dist.get_rank(), dist.get_world_size()
    size, *others = {net.size for net in nets}
    if others:
        fail(f"features of {' and '.join(net.name for net in nets)} need images of different sizes: name one at a time")
    found = open_images(images)
    if len(found.names) < max(num, 2 * world):
        fail(f"{images} holds {len(found.names)} images, {max(num, 2 * world)} are needed; FID depends on the number",
             code=1)
    limit = len(range(rank, num, world)) if num else 0
    mine = limit or len(range(rank, len(found.names), world))
    batches = image_batches(found, size, rank, world, limit, batch_size)
    return summarize(watched(batches, -(-mine // batch_size), desc=images, leave=False), nets, num_prdc, device)


def choose_networks(c, size, judges):
    """
    The feature networks of a search, c.features, and of its table, c.judges: those named; else the tiny ones (`judges`)
    for images of 16 px, which a note tells if they are not the tiny world's, and Inception for all others.
    """
    tiny, named = c.real == "tiny" or size == SIZE, c.features and c.judges
    c["features"] = c.features or (["tiny"] if tiny else ["inception"])
    if not c.judges and c.num:
        c["judges"] = c.features if is_statistics(c.real) else judges if tiny else ["inception"]
    for name in ("features", "judges"):
        if len(set(c[name])) < len(c[name]):
            fail(f"{name} {c[name]}: needed are different feature networks")
    if c.features_path and not {*c.features, *c.judges} & set(WEIGHTS):
        fail(f"--features_path does nothing without {' or '.join(WEIGHTS)} among --features and --judges; leave it out")
    if is_statistics(c.real) and (len(c.features) > 1 or c.num and c.judges != c.features):
        fail(f"{c.real} has statistics of one feature network only; add --judges {c.features[0]}, or --num=0")
    if c.real != "tiny" and {"tiny", "tiny2"} & {*c.features, *c.judges} and not named:
        note("the tiny feature networks know only the digits of the tiny world; for images of your own name --features "
             "and --judges: inception or dinov2")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    c["features"] = c.features or (["tiny2"] if c.real == "tiny" and not c.images else ["inception"])
    if argv is None:
        share_cores(c)
    with Stop():
        run(c)


def run(c):
    """Judge, and say how: the script, with its options c."""
    rank, world, device = setup()
    if c.num < 0 or 0 < c.num < 2 * world or min(c.num_prdc, c.num_real) < 10 or c.batch_size < 1:
        fail(f"num {c.num}, num_prdc {c.num_prdc}, num_real {c.num_real}, batch_size {c.batch_size}: "
             f"needed are 0 or at least {2 * world}, at least 10, 10 and 1")
    if c.stream not in ("report", "select"):
        fail(f"unknown stream {c.stream!r}; choose report or select")
    if c.labels not in ("balanced", "random"):
        fail(f"unknown labels {c.labels!r}; choose balanced or random")
    if len(set(c.features)) < len(c.features):
        fail(f"features {c.features}: needed are different feature networks")
    if len(c.features) > 1 and (c.stats or is_statistics(c.real)):
        fail(f"statistics are those of one feature network, --features names {len(c.features)}")
    if c.stats and not c.stats.lower().endswith(".npz"):
        fail(f"--stats={c.stats}: needed is a name that ends in .npz")
    for path in filter(None, (c.json, c.stats)):
        writable(path)
    drawing = not c.images and (not c.stats or "ckpt" in c.given)
    model = load_guided(c, device) if drawing else None
    own = model and (image_size(model) != SIZE or model.classes)        # a model of other images than the tiny world's
    if own and "features" not in c.given:
        c["features"] = ["inception"]
    if c.images and "ckpt" in c.given and not c.stats:
        note("--ckpt does nothing beside --images")
    if c.features_path and not set(c.features) & set(WEIGHTS):
        fail(f"--features_path does nothing without {' or '.join(WEIGHTS)} among --features; leave it out")
    if model:
        noise = c.noise or NOISE[model.family]
        schedule(c.sampler, c.steps, noise, c.last, model.sigmas)       # better to know before the real images are read
        if not c.stats:
            check_classes(c.real, model.num_classes)
    if "features" not in c.given:
        print0("features: " + ("tiny2, as both sides are the tiny world" if c.features == ["tiny2"] else "inception"))
    nets = [feature_net(name, c.features_path if name in WEIGHTS else None, device) for name in c.features]
    num_real = c.num_real if c.real == "tiny" else 0
    role = "select" if c.stream == "select" else "all"
    num, began = c.num or 50_000, time.time()
    if c.stats:
        if model:
            found, _ = drawn_summaries(model, nets, num, c.sampler, c.steps, noise, c.last, c.seed, c.stream,
                                       c.num_prdc, c.batch_size, labels=c.labels)
            what = c.ckpt or "the tiny base"
        elif c.images:
            found, what = images_summaries(c.images, c.num, c.num_prdc, nets, device, c.batch_size), c.images
        else:
            found, what = real_summaries(c.real, nets, role, c.num_prdc, c.num or num_real, device, None,
                                         c.batch_size), c.real
        found = found[nets[0].name]
        if rank == 0:
            write_statistics(c.stats, found, nets[0])
        print0(f"wrote {c.stats}: {found.num} images of {what} ({found.size}), {nets[0].name} features; use it as "
               "--real")
        return

    size = image_size(model) if model else None
    real_sets = real_summaries(c.real, nets, role, c.num_prdc, num_real, device, size, c.batch_size)
    began = time.time()
    if c.images:
        fakes = images_summaries(c.images, c.num, c.num_prdc, nets, device, c.batch_size)
        rows = [dict(features=name, sampler=None, steps=None, seed=None, **judge(fake, real_sets[name]))
                for name, fake in fakes.items()]
    else:
        found = evaluate(model, nets, real_sets, num, c.sampler, c.steps, noise, c.last, c.seed, c.stream,
                         c.num_prdc, c.batch_size, labels=c.labels)
        rows = [found[net.name] for net in nets]
    if c.json and rank == 0:
        keys = ("fid", "fid_se", "kid", "precision", "recall", "density", "coverage", "num", "features", "sampler",
                "steps", "seed")
        with whole(c.json) as f:
            f.write("".join(dumps({k: row[k] for k in keys}) + "\n" for row in rows).encode())
    for net, row in zip(nets, rows):
        notes_on(row, net.dim)
        show = lambda key, form: "-" if row[key] is None else format(row[key], form)
        source = c.images or f"{row['sampler']}, {c.steps} steps, {c.labels} labels, seed {c.seed}"
        print0(f"FID {show('fid', '.3f')} +- {show('fid_se', '.3f')}  ({row['num']} images, {source}; {net.name} "
               f"features, real: {c.real}; {time.time() - began:.0f} s)")
        if row["kid"] is not None:
            print0(f"KID {show('kid', '.5f')}  precision {show('precision', '.3f')}  recall {show('recall', '.3f')}  "
                   f"density {show('density', '.3f')}  coverage {show('coverage', '.3f')}  "
                   f"(these on {min(row['num'], c.num_prdc)} of the images)")


if __name__ == "__main__":
    main()
