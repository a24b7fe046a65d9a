"""
Evaluate generated images against real ones: FID, KID, precision / recall, density / coverage.

python fid.py --num 50000                                       # the tiny base: draw and evaluate
python fid.py --ckpt out/train_rl/ckpt.pt --num 10000 --features tiny2 tiny factors
python fid.py --images SAMPLES --real FOLDER                    # folders, zips or .npz of images
python fid.py --real FOLDER --stats real.npz                    # write statistics, to be used as --real real.npz
python fid.py --ckpt SiT-XL-2-256.pt --vae vae.safetensors --features inception --real VIRTUAL_imagenet256_labeled.npz

Left out on purpose: Inception score and sFID. Behind torchrun write `torchrun ... -- fid.py --num 50000`.
"""
import colorsys
import hashlib
import importlib.util
import math
import os
import pathlib
import posixpath
import sys
import time
import unicodedata
import zipfile
from contextlib import suppress
from functools import lru_cache, partial
from itertools import cycle
from json import dumps, loads
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from models import (ASSETS, SafeUnpickler, Stop, configure, exact, fail, gather, image_size, listed, note, one_line,
                    print0, read_checkpoint, read_pickle, reading, setup, whole, writable)
from reward import KernelSet, Moments, Spectrum, covariance_root, distance_to_root, standard_error
from sample import STREAMS, generate, image_seeds, in_words, load_guided, save_curves, save_grid, schedule, watched

# -----------------------------------------------------------------------------
ckpt = "" # model to draw from: .pt, .pkl or .safetensors, or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
images = "" # evaluate these instead: folder or zip of images, or .npz or .npy with uint8 (N, H, W, 3)
num = 0 # images to evaluate; 0: 50,000 drawn, or all of --images
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
features = [] # of inception (what FID means), dinov2, tiny, tiny2, factors, my_net.py; empty: tiny2 in the tiny world
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
num_real = 50000 # real images of the tiny world that are compared with; a folder is used whole
num_prdc = 5000 # images for KID and the neighbour metrics, a fixed random subset
sampler = "" # see sample.py; empty: flow for SiT, heun for EDM2
steps = 10 # of the sampler
noise = -1.0 # noise level of the sampler, 0: none; -1: 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # scale of the guidance by the null class, or by --guide; 1: none
guide = "" # autoguidance: a weaker network in place of the null class
bf16 = False # the network in 16 bits, SiT's bfloat16 and EDM2's float16, all else in float32
compile = False # compile the block that a SiT repeats: seconds to begin with, faster passes on a GPU
labels = "balanced" # of the drawn images: balanced (i % classes), or random (uniform, as for published FIDs)
seed = 0 # of the drawn images
stream = "report" # report; select: other images, to choose a sampler with
batch_size = 250 # images in one pass, per rank
stats = "" # write the statistics of --images if given, else of --real, and stop
json = "" # also write the numbers to this file, a line per feature network
# -----------------------------------------------------------------------------


# ---- The tiny world ------------------------------------------------------------------------------------------------

CLASSES = 10
SIZE = 16
FACTORS = {"size": (8.5, 11.5), "x": (6.5, 8.5), "y": (6.5, 8.5), "angle": (-15.0, 15.0), "stroke": (0, 3),
           "hue": (0.0, 1.0), "brightness": (0.5, 1.0)}     # px, px, px, degrees, quarters of a pixel, turns, 0..1


@lru_cache(maxsize=None)
def glyph(digit, stroke):
    """One digit of Pillow's own font on 72 x 72, centred; it is drawn once and then only turned and scaled."""
    mask = Image.new("L", (72, 72))
    font = ImageFont.load_default(size=48)
    ImageDraw.Draw(mask).text((36, 36), str(digit), font=font, fill=255, anchor="mm", stroke_width=stroke)
    return mask


def tiny_image(seed, stream, i):
    """Mask (16, 16) uint8 and the factors (7,) of image i: they depend on (seed, stream, i) alone."""
    u = np.random.SeedSequence((seed, STREAMS[stream], i)).generate_state(len(FACTORS)) / 2**32
    low, high = np.array(list(FACTORS.values())).T
    factors = low + u * (high - low)
    factors[4] = int(4 * u[4])                                          # stroke is one of 0, 1, 2, 3
    size, x, y, angle, stroke = factors[:5]
    scale = 34 / (4 * size)                                             # glyph pixels (34 high) per canvas pixel
    c, s = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    cx, cy = 4 * (x + 0.5), 4 * (y + 0.5)
    affine = (c, -s, 36 - c * cx + s * cy, s, c, 36 - s * cx - c * cy)
    canvas = glyph(i % CLASSES, int(stroke)).transform((4 * SIZE, 4 * SIZE), Image.AFFINE, affine, Image.BILINEAR)
    return np.asarray(canvas.reduce(4)), factors


def tiny_images(n, seed, stream="train", start=0, step=1):
    """Coloured digits start, start + step, ..: uint8 (n, 3, 16, 16), labels i % 10 (n,), FACTORS float64 (n, 7)."""
    indices = range(start, start + n * step, step)
    masks, factors = zip(*[tiny_image(seed, stream, i) for i in indices])
    masks, factors = np.stack(masks), np.stack(factors)
    colors = np.array([colorsys.hsv_to_rgb(hue, 0.75, brightness) for hue, brightness in factors[:, 5:]])
    pixels = colors[:, :, None, None] * masks[:, None].astype(np.float32) + 0.5
    return torch.from_numpy(pixels.astype(np.uint8)), torch.tensor(indices) % CLASSES, torch.from_numpy(factors)


# ---- Feature networks: uint8 (N, 3, H, W) => float32 (N, dim) -----------------------------------------------------

class FeatureNet(nn.Module):
    """tiny and tiny2, trained to predict every factor (heads: 10 logits, 8 numbers), so FD sees colour and pose."""
    def __init__(self, name):
        super().__init__()
        self.name, self.size = name, SIZE
        if name == "tiny":                                              # the reward's: strided convolutions, ReLU
            self.dim = 64
            self.body = nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, self.dim))
        else:                                                           # tiny2, held out: wide kernels, pooling, GELU
            self.dim = 128
            self.body = nn.Sequential(
                nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(32, 96, 3, padding=1), nn.GELU(),
                nn.AvgPool2d(2), nn.Conv2d(96, 96, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(96 * 16, 256),
                nn.GELU(), nn.Linear(256, self.dim))
        self.heads = nn.Sequential(nn.ReLU(), nn.Linear(self.dim, CLASSES + 8))

    @exact()
    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


class MeasuredFactors:
    """Amount of ink, its centre (x, y), spread, brightness and hue (cos, sin), each about of unit variance."""
    name, size, dim = "factors", SIZE, 7

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
KNOWN = ("tiny", "tiny2", "factors", *WEIGHTS)


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def published_weights(name, path=None):
    """Path and sha256 of a network's weights: the user's file or folder, or the pinned file, downloaded if need be."""
    file, digest, url = WEIGHTS[name]
    if path:
        found = os.path.join(path, file) if os.path.isdir(path) else path
        if not os.path.isfile(found):
            fail(f"no weights {found!r}; needed: {file} of {url}")
    else:
        found = os.path.join(torch.hub.get_dir(), "checkpoints", file)
        if not os.path.isfile(found) and os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                os.makedirs(os.path.dirname(found), exist_ok=True)
                torch.hub.download_url_to_file(url + file, found, digest, progress=False)
            except Exception as e:          # no network, a full disk, another file
                fail(f"cannot download {url}{file} ({one_line(e)}); bring it to {found} or --features_path", code=1)
        dist.barrier()                      # the other ranks wait for the download
    actual = sha256(found)
    if not actual.startswith(digest):
        differs = f"{found} has sha256 {actual[:8]}.., the published {name} {digest[:8]}.."
        if not path:
            fail(f"{differs}; delete it", code=1)
        print0(f"note: {differs}: a score of its own")
    return found, actual


def resize_tf1(x, size):
    """TensorFlow 1's bilinear resize of (N, C, H, W) to (height, width): no antialiasing, row i from i H / height."""
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
    pool_3 of FID's Inception v3 (Szegedy et al. 2015, graph of 2015-12-05): x (N, 3, 299, 299) in [-1, 1] => (N, 2048);
    w: tensors by name. Unlike torchvision's, mean pools leave out the padding, and the last block pools by maximum.
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
    """Class token of DINOv2, Oquab et al. 2023: x (N, 3, 14 rows, 14 columns), normalised => (N, D)."""
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
    """inception, or dinov2 preprocessed as for EDM2's FD-DINOv2. Images may have any size."""
    size = None

    def __init__(self, name, path, device):
        path, self.hash = published_weights(name, path)
        self.name = name
        try:
            self.w = {k: x.float().to(device) for k, x in read_checkpoint(path).items()}
            if name == "inception" and len(self.w["fc.bias"]) != 1008:
                raise ValueError(f"{len(self.w['fc.bias'])} classes, FID's network has 1008, torchvision's 1000")
            self.dim = self(torch.zeros(1, 3, 32, 32, dtype=torch.uint8, device=device)).shape[1]
        except (LookupError, AttributeError, RuntimeError, ValueError, TypeError) as e:
            fail(f"{path} does not hold {name}: {one_line(e)}; needed: {WEIGHTS[name][0]}", code=1)

    def features(self, images):             # uint8 (n, 3, H, W) => float32 (n, dim)
        if self.name == "inception":
            return inception(self.w, (resize_tf1(images.float(), (299, 299)) - 128) / 128)
        x = F.interpolate(images.float(), (224, 224), mode="bicubic", antialias=True) / 255
        mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]], device=x.device).view(2, 3, 1, 1)
        return dinov2(self.w, (x - mean) / std)

    def __call__(self, images):             # in parts that bound the memory and fill a GPU
        with exact(benchmark=len(images) >= 128):
            return torch.cat([self.features(part) for part in images.split(128 if images.is_cuda else 32)])


first_sha256 = lru_cache(maxsize=None)(sha256)      # of a Python file, which may be edited while a run goes on


def versioned(option):
    """The value of an option; with names of Python files goes the beginning of their hash."""
    if isinstance(option, list):
        return [versioned(value) for value in option]
    return f"{option} ({first_sha256(option)[:8]})" if str(option).endswith(".py") else option


@lru_cache(maxsize=None)
def of_file(path, name):
    """The function `name` of a user's Python file, which is run; exit code 2 if there is no file, 1 if it does not."""
    if not os.path.isfile(path):
        fail(f"no file {path!r}; needed: Python with a function {name}")
    first_sha256(path)
    with reading(path, f"gives no function {name}"):
        spec = importlib.util.spec_from_file_location(os.path.splitext(os.path.basename(path))[0], path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return getattr(module, name)


class OwnNet:
    """A user's file: its net(device) returns a callable, uint8 (n, 3, H, W) => float (n, d); .size, if it has one."""
    def __init__(self, path, device):
        self.path, self.name, self.dim = path, os.path.splitext(os.path.basename(path))[0], None
        with reading(path, "makes no network"):
            self.net = of_file(path, "net")(device)
        self.hash, self.size = first_sha256(path), getattr(self.net, "size", None)
        if self.size is not None and not (isinstance(self.size, int) and self.size > 0):
            fail(f"{path}: .size is {one_line(repr(self.size))}; needed is a whole number of pixels, or None", code=1)
        side = self.size or 32
        noise = torch.randint(256, (2, 3, side, side), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
        noise[1] //= 4                      # darker, which batch norm would see
        first = self(noise.to(device))
        self.dim = first.shape[1]
        for n, bound, why in ((2, 1e-3, "the second time (dropout?"), (1, 0.05, "in another batch (batch norm?")):
            if not torch.allclose(first[:n], self(noise[:n].to(device)), bound, bound * first.abs().max().item()):
                fail(f"{path}: the same images gave other features {why} eval mode is needed)", code=1)

    @exact()
    def __call__(self, images):
        with reading(self.path, "cannot take images"):
            f = torch.cat([self.net(part) for part in images.split(128 if images.is_cuda else 32)])
            if not f.is_floating_point() or f.dim() != 2 or f.shape != (len(images), self.dim or f.shape[1]):
                raise ValueError(f"{f.dtype} {tuple(f.shape)}, needed are floats ({len(images)}, {self.dim or 'd'})")
            if not f.isfinite().all():
                raise ValueError("features hold NaN or infinite values")
        return f.float()


def feature_net(name, path=None, device="cpu"):
    """A network with .name, .dim, .size (of images, in pixels; None: any); .hash: sha256 of its weights' file."""
    if name.endswith(".py"):
        return OwnNet(name, device)
    if name == "factors":
        return MeasuredFactors()
    if name in WEIGHTS:
        return PublishedNet(name, path, device)
    if name in ("tiny", "tiny2"):
        path = path or os.path.join(ASSETS, f"features-{name}.pt")
        parts = read_checkpoint(path)
        net = FeatureNet(name)
        net.load_state_dict({k: v.float() for k, v in parts["model"].items()})
        net.hash = sha256(path)
        return net.requires_grad_(False).eval().to(device)
    fail(f"unknown features {name!r}; choose {', '.join(KNOWN)} or a file of your own, my_net.py")


def feature_nets(names, path, device):
    """The networks of these names, each of another; path: weights of inception or dinov2."""
    nets = [feature_net(name, path if name in WEIGHTS else None, device) for name in names]
    if len({net.name for net in nets}) < len(nets):
        fail(f"features {' '.join(names)}: needed are networks of different names")
    return nets


# ---- Images from disk -----------------------------------------------------------------------------------------------

# Formats that Pillow knows by their first bytes and only decodes (for EPS it would start Ghostscript).
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "DDS", "ICO")


class Images(NamedTuple):
    """The images of a folder, a zip or an array file."""
    path: str                           # of the set, with the folders that all of its images are in
    names: list                         # below that path, "/" between folders, in hashed_order
    read: Callable                      # name => PIL image in RGB
    classes: list                       # of each image: its first folder, "" if flat, or its label in a dataset.json


def ending(path):
    return os.path.splitext(path)[1].lower()


def is_array_file(path):
    return ending(path) in (".npz", ".npy", ".pkl", ".pt", ".pth") and not os.path.isdir(path)


def is_statistics(path):
    """Whether real data are a file of statistics, not images. Exit code 2 if there is nothing of this name."""
    if path != "tiny" and not os.path.exists(path):
        fail(f"{path} does not exist; needed: a folder or .zip of images, an .npz of them, or statistics (mu, sigma)")
    return is_array_file(path) and not {"mu", "sigma", "fid", "fd_dinov2"}.isdisjoint(read_arrays(path).keys())


def features_of(real):
    """Name of the feature network that real data are seen by: what statistics tell, else inception."""
    name = str(read_arrays(real).get("features", "inception")) if is_statistics(real) else "inception"
    if name not in KNOWN:
        fail(f"{real} is of {name}, a network of one's own; add --features {name}.py, the file that made it")
    return name


def read_arrays(path):
    """What an array file holds, by name, without running code; an .npz is read only where it is asked for."""
    if ending(path) == ".pkl":
        found = read_pickle(path)
    elif ending(path) in (".pt", ".pth"):
        found = read_checkpoint(path)
    else:
        with reading(path), open(path, "rb") as f:
            try:
                found = np.load(path, allow_pickle=False)
            except ValueError:              # a dict in an .npy, which numpy pickles as an array of objects
                np.lib.format.read_magic(f)
                np.lib.format.read_array_header_1_0(f)
                found = SafeUnpickler(f).load().item()
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return dict(mu=found[0], sigma=found[1])
    return found if hasattr(found, "keys") else {"arr_0" if hasattr(found, "shape") else "": found}


def array_images(path):
    """Images uint8 (N, H, W, 3) of an array file, whatever their name, channels last or first (arr_0 before others)."""
    stored, others = read_arrays(path), []
    with reading(path):
        for name in sorted(stored.keys(), key=lambda name: name != "arr_0"):
            x = np.asarray(stored[name])
            if x.dtype == np.uint8 and x.ndim == 4 and len(x) and 3 in (x.shape[3], x.shape[1]):
                return x if x.shape[3] == 3 else x.transpose(0, 2, 3, 1)
            others.append(f"{name} {x.dtype} {x.shape}")
    fail(f"{path} holds {', '.join(others[:4]) or 'nothing'}; needed: uint8 (N, H, W, 3), or mu and sigma", code=1)


def stored_files(path):
    """{name: member} of the files in a folder or a zip that are not hidden, and a function that opens a member."""
    hidden = lambda name: any(part == "__MACOSX" or part.startswith(".") for part in name.split("/"))
    members, open_member = {}, partial(open, mode="rb")
    if os.path.isdir(path):
        unreadable = lambda e: fail(f"cannot read {e.filename}: {e.strerror}", code=1)
        for folder, inner, files in os.walk(path, onerror=unreadable, followlinks=True):
            above = {os.path.realpath(p) for p in (folder, *pathlib.Path(folder).parents)}      # links there are loops
            inner[:] = [k for k in inner if not hidden(k) and os.path.realpath(os.path.join(folder, k)) not in above]
            for k in files:
                members[os.path.join(folder[len(path):], k).replace(os.sep, "/")] = os.path.join(folder, k)
    elif zipfile.is_zipfile(path):
        with reading(path):
            archive = zipfile.ZipFile(path)     # members are read in place, never unpacked to where their names point
        open_member = archive.open
        for info in archive.infolist():
            name = info.filename
            if not info.flag_bits & 0x800:      # some writers set no mark for UTF-8, some put \\ between folders
                with suppress(UnicodeError):
                    name = name.encode("cp437").decode("utf-8")
            if not info.is_dir():
                members[name.replace("\\", "/")] = info
    else:
        fail(f"{path} is neither a folder nor a zip file; needed: images in one of these")
    clean = {posixpath.normpath("/" + name.lstrip("/"))[1:]: member for name, member in members.items()}
    return {name: member for name, member in clean.items() if not hidden(name)}, open_member


def hashed_order(names):
    """By a hash of the names: the first N, or every second one, are a random subset, the same on every machine."""
    key = lambda name: hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()
    return sorted(names, key=lambda name: (key(name), name))


def open_images(path):
    """The Images of a folder, a zip or an array file. Exit code 2 if it is none of these, 1 if it holds no image."""
    if is_array_file(path):
        array = array_images(path)
        names = hashed_order(map(str, range(len(array))))
        return Images(path, names, lambda name: Image.fromarray(array[int(name)]), [""] * len(names))
    stored, open_member = stored_files(path)
    endings = {end for end, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}
    members = [name for name in stored if ending(name) in endings]
    tables = [name for name in stored if posixpath.basename(name) == "dataset.json"]
    others = [ending(name) or "no ending" for name in {*stored} - {*members, *tables}]
    if others:
        kinds = ", ".join(sorted({*others})[:5])
        note(f"{path}: {len(members)} images; {len(others)} files of other kinds ({kinds}) were left out")
    if not members:
        fail(f"{path} holds no image that is not hidden; needed: png, jpg, .., flat or in sub-folders", code=1)

    # A set with a folder around it is the same set.
    around = posixpath.commonpath([posixpath.dirname(name) for name in members])
    inner = {name.removeprefix(around).lstrip("/"): name for name in members}
    names = hashed_order(inner)
    classes = [name.split("/")[0] if "/" in name else "" for name in names]
    if tables:
        table = min(tables, key=lambda name: name.count("/"))
        with reading(os.path.join(path, table)), open_member(stored[table]) as f:
            labels = tool_labels(loads(f.read()), [inner[name][len(table) - len("dataset.json"):] for name in names])
        classes = labels or classes

    def read(name):
        with open_member(stored[inner[name]]) as f:
            with Image.open(f, formats=[form for form in IMAGE_FORMATS if form in Image.OPEN]) as image:
                return in_rgb(image)

    return Images(os.path.join(path, around).rstrip("/"), names, read, classes)


def tool_labels(table, names):
    """Labels by the dataset.json of EDM2's and StyleGAN's dataset tool, all "" if it has none; None: another tool's."""
    try:
        known = {name.replace("\\", "/"): y for name, y in dict(table["labels"] or {}).items()}
    except (TypeError, ValueError, LookupError, AttributeError):
        return None
    one_hot = lambda y: isinstance(y, list) and y.count(1) == 1 and y.count(0) == len(y) - 1
    labels = [known.get(name) if known else "" for name in names]
    return None if all(y is None for y in labels) else [y.index(1) if one_hot(y) else y for y in labels]


def in_rgb(image):
    """An open image of any mode, read, in RGB."""
    if image.width * image.height > Image.MAX_IMAGE_PIXELS:
        raise ValueError(f"{image.width * image.height} pixels, the most is {Image.MAX_IMAGE_PIXELS}")
    if image.mode == "F" or image.mode == "I" and image.format not in ("PNG", "PPM"):
        raise ValueError("its pixels are of 32 bits; save it with 8 or 16")
    if image.mode.startswith("I"):          # 16 bits, which convert() would cut off at 255
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode == "P":                   # convert() to RGB warns where the palette has transparent colours
        image = image.convert("RGBA")
    return image.convert("RGB")


def image_classes(images):
    """Classes of Images (folders, in the order of numbers or letters, or labels; [] if flat), and labels int64 (N,)."""
    keys = images.classes
    if all(isinstance(k, str) for k in keys):
        numbers = all(k.isdecimal() for k in keys)
        classes = sorted(set(keys), key=lambda k: (int(k), k) if numbers else k)
        if len(classes) > 1 and "" in classes:
            name = images.names[keys.index("")]
            fail(f"{images.path} has images beside sub-folders ({name}); needed: all flat, or one per class", code=1)
        places = {k: i for i, k in enumerate(classes)}
        keys = [places[k] for k in keys]
    else:
        for name, k in zip(images.names, keys):
            if type(k) is not int or not 0 <= k < 2**20:
                fail(f"{images.path}: dataset.json gives {name} the label {k}, not 0, 1, ..; mend or remove it", code=1)
        classes = [str(k) for k in range(max(keys) + 1)]
        empty = sorted(set(range(max(keys))) - set(keys))
        if empty:
            note(f"{images.path}: dataset.json has labels up to {max(keys)}, but no image of class {listed(empty)}")
    return classes if len(classes) > 1 else [], torch.tensor(keys)


def check_classes(real, num_classes):
    """A folder with sub-folders must have as many as the model has classes; anything else has no classes to compare."""
    if real == "tiny" or is_statistics(real):
        return
    classes, _ = image_classes(open_images(real))
    if classes and len(classes) != num_classes:
        fail(f"{real} has {len(classes)} classes ({listed(classes)}), the model {num_classes}; "
             f"make a base for it: python lab/pretrain.py --real {real} --out base.pt", code=1)
    if classes:
        print0(f"{real}: {len(classes)} classes, in this order: {listed(classes)}")


def image_batches(images, size=None, names=None, batch_size=250):
    """Images, or some `names`, as uint8 (b, 3, H, W): their centre of size x size, or as they are, alike in a batch."""
    batch, pixels = [], 0
    for name in images.names if names is None else names:
        try:
            image = images.read(name)
            if size and image.size != (size, size):
                note(f"{images.path}: images are resized to {size} x {size} (short side, then the centre)")
                image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
        except MemoryError:
            raise
        except Exception as e:              # a damaged image can raise anything
            path = os.path.join(images.path, name)
            fail(f"{path} is not a readable image ({one_line(e)}); mend or remove it", code=1)
        x = torch.from_numpy(np.array(image).transpose(2, 0, 1))
        if batch and (len(batch) == batch_size or pixels >= 2**25 or x.shape != batch[0].shape):
            yield torch.stack(batch)
            batch, pixels = [], 0
        batch.append(x)
        pixels += image.width * image.height
    if batch:
        yield torch.stack(batch)


# ---- Real data ------------------------------------------------------------------------------------------------------

class Summary(NamedTuple):
    """What a set of images leaves behind: moments of all, features of some."""
    num: int                                # 0 if a file of statistics does not tell
    mu: torch.Tensor                        # (d,) float64
    cov: torch.Tensor                       # (d, d) float64
    features: Optional[torch.Tensor]        # (min(num, num_prdc), d) float32; None if only statistics are known
    size: str = ""                          # of the images, before a network resizes them; empty if unknown
    images: Optional[torch.Tensor] = None   # the first ones, uint8 (n, 3, H, W), if asked for


# What real images are for; what rewards and what evaluates share none.
# role: (stream of the tiny world; of a folder, in the order of Images: from which image on, every how many)
ROLES = {
    "train": ("train", 0, 2),           # the reward
    "report": ("report", 1, 2),         # evaluation before and after
    "floor": ("floor", 0, 2),           # real against real: as low as FD gets
    "select": ("select", 1, 2),         # choosing options
    "all": ("report", 0, 1),            # fid.py itself
}


@torch.no_grad()
def summarize(batches, nets, num_prdc, device="cpu", keep=0):
    """{net.name: Summary} of the uint8 batches (b, 3, H, W) of all ranks; image i is one of rank i % world."""
    rank, world = dist.get_rank(), dist.get_world_size()
    moments = {net.name: Moments(net.dim, device) for net in nets}
    kept = {net.name: [torch.empty(0, net.dim, device=device)] for net in nets}
    sizes, shown = set(), []
    for batch in batches:
        sizes.add(f"{batch.shape[3]} x {batch.shape[2]}")
        if sum(map(len, shown)) < keep:
            shown.append(batch)
        for net in nets:
            if net.size not in (None, batch.shape[3]):
                fail(f"{net.name} features need images of {net.size} pixels, not {batch.shape[3]}; inception takes any")
            f = net(batch.to(device))
            if sum(map(len, kept[net.name])) * world < num_prdc:
                kept[net.name].append(f)
            moments[net.name].add(f)
    everywhere = [None] * world
    dist.all_gather_object(everywhere, sizes)
    sizes = set().union(*everywhere)
    size = sizes.pop() if len(sizes) == 1 else "several sizes"
    images = gather(torch.cat(shown)[:len(range(rank, keep, world))], keep) if keep else None
    summaries = {}
    for name, m in moments.items():
        weight = torch.tensor([m.weight, m.squares], dtype=torch.float64, device=device)
        for part in (weight, m.sum, m.outer):
            dist.all_reduce(part)
        m.weight, m.squares = weight.tolist()
        if m.weight < 2:
            fail(f"{int(m.weight)} images have no covariance; needed are at least 2, better {10 * len(m.sum)}", code=1)
        first = min(int(m.weight), num_prdc)
        features = gather(torch.cat(kept[name])[:len(range(rank, first, world))], first)
        summaries[name] = Summary(int(m.weight), *m.gaussian(), features, size, images)
    return summaries


def real_summaries(real, nets, role, num_prdc, num, device="cpu", size=None, batch_size=250, keep=0):
    """{net.name: Summary} of num images, 0: all that are stored, of the size networks need, else `size` (None: any)."""
    if is_statistics(real):
        return {net.name: read_statistics(real, net, device) for net in nets}
    if real == "tiny" and (size or SIZE) != SIZE:
        fail(f"the model draws images of {size} pixels, the tiny world has {SIZE}; name real ones with --real")
    sizes = {net.size or size for net in nets}
    if len(sizes) > 1:
        fail(f"features of {' and '.join(net.name for net in nets)} need images of different sizes: name one at a time")
    rank, world, (stream, offset, stride) = dist.get_rank(), dist.get_world_size(), ROLES[role]
    if real == "tiny":
        batches = (tiny_images(min(1000, len(range(first, num, world))), 0, stream, first, world)[0]
                   for first in range(rank, num, 1000 * world))
    else:
        images = open_images(real)
        names = images.names[offset::stride][:num or None][rank::world]
        batches = image_batches(images, sizes.pop(), names, batch_size)
        batches = watched(batches, -(-len(names) // batch_size), desc=images.path, leave=False)
    return summarize(batches, nets, num_prdc, device, keep)


def read_statistics(path, net, device="cpu"):
    """Summary of mu (d,) and sigma (d, d), as most tools write them, or of EDM2's {num_images, fid, fd_dinov2}."""
    def numbers(x):                         # a float64 tensor; TypeError for what is no real number
        array = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
        return torch.from_numpy(array.astype(np.float64, casting="same_kind")).to(device)

    with reading(path):
        stored = parts = read_arrays(path)
        inner = {"inception": "fid", "dinov2": "fd_dinov2"}.get(net.name)
        if isinstance(parts.get(inner), dict):
            stored = dict(parts[inner], num=parts.get("num_images", 0))
        if not {"mu", "sigma"} <= set(stored.keys()):
            fail(f"{path} holds no mu and sigma of {net.name}, but {listed(list(stored.keys())) or 'nothing'}", code=1)
        mu, cov = numbers(stored["mu"]).squeeze(), numbers(stored["sigma"])                 # some write mu (1, d)
        name, digest, size = (str(stored.get(k, x)) for k, x in (("features", net.name), ("hash", ""), ("size", "")))
        num = max(0, int(np.asarray(stored.get("num", 0)).item()))
    if name != net.name or digest not in ("", getattr(net, "hash", "")):
        add = f"{name}, or name other weights by --features_path" if name in KNOWN else f"{name}.py of this hash"
        fail(f"{path} is of {name} {digest[:8]}, asked for is {net.name}; add --features {add}", code=1)
    if mu.shape != (net.dim,) or cov.shape != (net.dim, net.dim):
        fail(f"{path} has mu {(*mu.shape,)} and sigma {(*cov.shape,)}, {name} has {net.dim} dimensions", code=1)
    valid = mu.isfinite().all() and (cov - cov.T).abs().max() <= 1e-6 * cov.abs().max() < math.inf
    if not valid or (vals := torch.linalg.eigvalsh(cov))[0] < -1e-5 * vals[-1]:
        fail(f"{path}: NaN or infinite values, or sigma is not symmetric or has negative eigenvalues", code=1)
    return Summary(num, mu, cov, None, size)


def write_statistics(path, summary, net):
    """mu, sigma and where they come from, atomically."""
    with whole(path) as f:
        np.savez(f, mu=summary.mu.cpu().numpy(), sigma=summary.cov.cpu().numpy(), num=summary.num, features=net.name,
                 hash=getattr(net, "hash", ""), size=summary.size)


# ---- Metrics on features -------------------------------------------------------------------------------------------

@exact()
def prdc(real, fake):
    """
    Precision and recall (k = 3; a point on the edge counts; Kynkaanniemi et al. 2019), density and coverage (k = 5; it
    does not; Naeem et al. 2020). real (N, d), fake (M, d) => dict of floats.
    """
    def nearest(x):                         # (N, 6) distances to itself and the five nearest others
        return torch.cat([torch.cdist(rows, x).topk(6, largest=False).values for rows in x.split(1000)])

    real_3, real_5 = nearest(real).T[3::2]
    fake_3 = nearest(fake)[:, 3]
    precise, dense = 0, 0                                               # of the fakes; pairs of fake and real
    recalled = covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    for rows, radius in zip(fake.split(1000), fake_3.split(1000)):
        distance = torch.cdist(rows, real)                              # (m, N)
        precise += (distance <= real_3).any(1).sum().item()
        recalled = recalled | (distance <= radius[:, None]).any(0)
        dense += (distance < real_5).sum().item()
        covered = covered | (distance < real_5).any(0)
    return dict(precision=precise / len(fake), recall=recalled.double().mean().item(),
                density=dense / (5 * len(fake)), coverage=covered.double().mean().item())


def distance(fake, real):
    """Frechet distance of two Summaries; rounding may leave less than 0 where it is 0."""
    return max(0.0, distance_to_root(fake.mu, fake.cov, real.mu, covariance_root(real.cov)).item())


NEIGHBOURS = ("kid", "precision", "recall", "density", "coverage")


def metrics(fake, real, labels=None):
    """
    fid, its standard error fid_se (labels: of fake.features, if drawn in equal numbers), their first variation psi, and
    NEIGHBOURS; what needs real features is None if only statistics are known. Notes say what spoils a comparison.
    """
    for num, whose in ((fake.num, "evaluated"), (real.num, "real")):
        if 0 < num <= len(fake.mu):
            note(f"{num} {whose} images cannot fill the {len(fake.mu)} dimensions: compare FID only at equal numbers")
    if fake.size and real.size and fake.size != real.size:
        note(f"the real images are {real.size}, the evaluated ones {fake.size}: FID sees that")
    row = dict(num=fake.num, fid=distance(fake, real), fid_se=None, psi=None, **dict.fromkeys(NEIGHBOURS))
    with suppress(ValueError):              # singular covariances, like that of pixels that are always black
        row["psi"] = Spectrum(fake.mu, fake.cov, real.mu, covariance_root(real.cov)).influence(fake.features)
        row["fid_se"] = standard_error(row["psi"], labels) * math.sqrt(len(row["psi"]) / fake.num)
    if real.features is not None and min(len(fake.features), len(real.features)) > 5:
        row.update(kid=KernelSet(fake.features, real.features).fd, **prdc(real.features, fake.features))
    return row


def evaluate(model, nets, real, num, sampler="", steps=10, noise=None, seed=0, stream="report", labels="balanced",
             num_prdc=5000, batch_size=250, keep=0):
    """{net.name: row} of num drawn images against real {net.name: Summary}: metrics(), how and what was drawn."""
    sampler = schedule(sampler, steps, noise, model.sigmas).sampler
    indices = torch.arange(num)[dist.get_rank()::dist.get_world_size()]
    seeds, classes = image_seeds(seed, stream, indices), indices % model.num_classes
    if labels == "random":                  # the noise of an image takes the lower 32 bits of its seed
        classes = torch.tensor([(s >> 32) % model.num_classes for s in seeds], dtype=torch.int64)
    batches = generate(model, seeds, classes, sampler, steps, 1.0, batch_size, noise)
    batches = watched(batches, -(-len(indices) // batch_size), desc=f"drawing {num} ({sampler})", leave=False)
    rows, device = {}, next(model.parameters()).device
    for name, fake in summarize(batches, nets, num_prdc, device, keep).items():
        stratum = torch.arange(len(fake.features), device=device) % model.num_classes
        row = metrics(fake, real[name], stratum if labels == "balanced" else None)
        rows[name] = dict(row, features=name, sampler=sampler, steps=steps, seed=seed, mean=fake.mu, labels=stratum,
                          images=fake.images)
    return rows


# ---- A model before and after ---------------------------------------------------------------------------------------

NUM_REAL, NUM_PRDC = 20000, 3000        # for both RL scripts: real images of the tiny world; of the neighbour metrics


class Blue:
    """1 where the ink of an image is blue, with a measured hue of .50 to .72 turns, else 0; its mean is their share."""
    name, size, dim = "blue", SIZE, 1

    def __call__(self, images):
        cos, sin = MeasuredFactors()(images)[:, 5:].T
        hue = torch.atan2(sin, cos) / (2 * math.pi) % 1
        return ((hue > 0.50) & (hue < 0.72)).float()[:, None]


class Nets:
    """Several feature networks as one: their features side by side, each network's divided by its scale."""
    def __init__(self, nets, scales):
        self.nets, self.scales, self.dim = nets, scales, sum(net.dim for net in nets)
        self.name = " + ".join(net.name for net in nets)
        self.size = next((net.size for net in nets if net.size), None)

    def __call__(self, images):
        return torch.cat([net(images) / scale for net, scale in zip(self.nets, self.scales)], dim=1)


def reward_networks(c, model, device):
    """
    Feature network and real Summary of the reward; several networks are one, each scaled to a mean variance of 1. Fills
    in c.features and c.judges, of the reward and of the table: the tiny ones in the tiny world, else Inception.
    """
    tiny = c.real == "tiny"
    c["features"] = c.features or ["tiny" if tiny else features_of(c.real)]
    if not c.judges and c.num:
        c["judges"] = ["tiny2", "tiny", "factors"] if tiny else c.features
    if len(set(c.judges)) < len(c.judges):
        fail(f"features {c.judges}: needed are different feature networks")
    if c.judges == ["c2st"]:
        fail("--judges c2st is a judge beside others; name a feature network before it")
    if is_statistics(c.real) and len(c.features) > 1:
        fail(f"{c.real} has statistics of one feature network only, --features names {len(c.features)}")
    check_classes(c.real, model.num_classes)
    nets = feature_nets(c.features, c.features_path, device)
    net = nets[0] if len(nets) == 1 else Nets(nets, [1.0] * len(nets))
    real = real_summaries(c.real, [net], "train", NUM_PRDC, NUM_REAL if tiny else 0, device, image_size(model),
                          c.batch_size)[net.name]
    variances = real.cov.diagonal().split([n.dim for n in nets])
    for n, variance, mu in zip(nets, variances, real.mu.split([n.dim for n in nets])):
        if variance.sum() <= 1e-12 * mu.square().sum():                 # what is left is rounding
            fail(f"{n.name} gives all images of {c.real} the same features; needed are ones that differ", code=1)
    if len(nets) > 1:
        unit = torch.cat([v.mean().sqrt().expand(len(v)) for v in variances])               # (d,)
        net = Nets(nets, [v.mean().sqrt().item() for v in variances])
        features = (real.features / unit).float()
        real = real._replace(mu=real.mu / unit, cov=real.cov / unit.outer(unit), features=features)
    if 0 < real.num <= net.dim:
        fail(f"{c.real} has {real.num} images for the reward; {net.name} features need more than {net.dim}", code=1)
    return net, real


def two_sample_accuracy(fake, real, passes=10, batch=64):
    """
    Classifier two-sample test (Lopez-Paz & Oquab 2017): a small network learns to tell generated from real images,
    uint8 (N, 3, H, W), on one half; returns its share of right answers on the other, and the standard error of that.
    """
    n, rng = min(len(fake), len(real)) // 2 * 2, torch.Generator().manual_seed(0)
    mixed = [x[torch.randperm(len(x), generator=rng)[:n]] for x in (fake.cpu(), real.cpu())]    # classes come in turns
    x = torch.cat(mixed).to(fake.device).float() / 127.5 - 1
    x, y = F.adaptive_avg_pool2d(x, min(64, x.shape[3])), (torch.arange(2 * n, device=x.device) >= n).float()
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        convs = [layer for a, b in ((3, 32), (32, 64), (64, 128)) for layer in (nn.Conv2d(a, b, 3, 2, 1), nn.GELU())]
        net = nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 1)).to(x.device)
        optimizer, updates = torch.optim.Adam(net.parameters()), passes * -(-n // batch)
        rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=updates)
        for _ in range(updates):
            k = 2 * torch.randint(n, (batch,)).to(x.device)                     # the odd ones are held out
            loss = F.binary_cross_entropy_with_logits(net(x[k]).squeeze(1), y[k])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
        with torch.no_grad():
            right = torch.cat([net(part).squeeze(1) for part in x[1::2].split(500)]) > 0
    share = (right == (y[1::2] > 0)).double().mean().item()
    return dict(c2st=share, c2st_se=math.sqrt(share * (1 - share) / len(right)))


def table_of(c, model, device, stream="report", blue=False):
    """(model, label, sampler, steps) => rows, one for each of c.judges, from noise and real images never trained on."""
    judges = feature_nets([name for name in c.judges if name != "c2st"], c.features_path, device)
    size, num_real = image_size(model), NUM_REAL if c.real == "tiny" else 0
    nets = judges + [Blue()] if blue and c.real == "tiny" and size == SIZE else judges
    keep = NUM_PRDC if "c2st" in c.judges else 200
    real = real_summaries(c.real, nets, stream, NUM_PRDC, num_real, device, size, c.batch_size, keep)
    if "c2st" in c.judges and real[judges[0].name].images is None:
        fail(f"--judges c2st needs real images, {c.real} has statistics only")
    floor = {}                              # FD of other real images, as many as are drawn
    if not is_statistics(c.real):
        others = real_summaries(c.real, judges, "floor", NUM_PRDC, c.num, device, size)
        floor = {name: distance(x, real[name]) for name, x in others.items() if x.num == c.num}
        if not floor:
            note(f"no floor, as {c.real} has {others[judges[0].name].num} real images for it, not {c.num}")

    def rows_of(model, label, sampler, steps):
        rows = evaluate(model, nets, real, c.num, sampler, steps, c.noise, c.seed, stream, num_prdc=NUM_PRDC,
                        batch_size=c.batch_size, keep=min(c.num, keep))
        more = dict(blue=rows["blue"]["mean"].item(), blue_real=real["blue"].mu.item()) if "blue" in rows else {}
        if "c2st" in c.judges:
            more |= two_sample_accuracy(rows[judges[0].name]["images"], real[judges[0].name].images)
        return [dict(rows[net.name], label=label, floor=floor.get(net.name), **more) for net in judges]

    return rows_of


def compare(before, after):
    """A table; +- is a standard error (of the change: paired), down the share of FD above the floor that is gone."""
    lines = [f"{'':>10s} {'images':>6s} {'features':9s} {'FD before':>17s} {'after':>17s} {'change':>17s} "
             f"{'floor':>7s} {'down':>5s} {'precision':>13s} {'recall':>13s} {'coverage':>13s}"]
    with_error = lambda value, error: f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")
    pairs = list(zip(cycle(before), after))                 # all of several searches began at the same
    for b, a in pairs:
        paired, floor, down = None, "-", "-"
        if b["psi"] is not None and a["psi"] is not None:
            paired = standard_error(a["psi"] - b["psi"], b["labels"]) * math.sqrt(len(b["psi"]) / b["num"])
        if b.get("floor") is not None and b["fid"] > b["floor"]:
            floor, down = f"{b['floor']:.3f}", f"{1 - (a['fid'] - b['floor']) / (b['fid'] - b['floor']):.0%}"
        both = ["-" if b[k] is None else f"{b[k]:.3f} {a[k]:.3f}" for k in ("precision", "recall", "coverage")]
        lines.append(f"{a['label']:>10s} {b['num']:6d} {b['features']:9s} {with_error(b['fid'], b['fid_se']):>17s} "
                     f"{with_error(a['fid'], a['fid_se']):>17s} {with_error(a['fid'] - b['fid'], paired):>17s} "
                     f"{floor:>7s} {down:>5s} " + " ".join(f"{x:>13s}" for x in both))
    for label, (b, a) in {a["label"]: (b, a) for b, a in pairs if "blue" in a}.items():
        lines.append(f"{label}: {b['blue']:.0%} of the images are blue before, {a['blue']:.0%} after, "
                     f"{a['blue_real']:.0%} of the real ones")
    for label, (b, a) in {a["label"]: (b, a) for b, a in pairs if "c2st" in a}.items():
        shares = [f"{row['c2st']:.1%} +- {row['c2st_se']:.1%}" for row in (b, a)]
        lines.append(f"{label}: a classifier tells {shares[0]} of held-out images from real ones before, {shares[1]} "
                     "after; 50% is perfect")
    return "\n".join(lines)


def finish(c, before, after, curves, y_name, found):
    """What both RL scripts leave in OUT beside weights: after.png, curve.png, result.json; and the table is printed."""
    if after:
        save_grid(os.path.join(c.out, "after.png"), after[0]["images"][:200])
        print0(compare(before, after))
    if any(curves.values()):
        save_curves(os.path.join(c.out, "curve.png"), curves, "images", y_name)
    keys = ("label", "features", "sampler", "steps", "num", "fid", "fid_se", "floor", "kid", "precision", "recall",
            "density", "coverage", "blue", "blue_real", "c2st", "c2st_se")
    before, after = ([{k: row[k] for k in keys if k in row} for row in rows] for rows in (before, after))
    with whole(os.path.join(c.out, "result.json")) as f:
        f.write(dumps(dict(found, before=before, after=after)).encode())


def check_options(c, world):
    """What is wrong with the options of this script, before anything is loaded."""
    if c.num < 0 or 0 < c.num < 2 * world or min(c.num_prdc, c.num_real) < 10 or c.batch_size < 1:
        fail(f"num {c.num}, num_prdc {c.num_prdc}, num_real {c.num_real}, batch_size {c.batch_size}: "
             f"needed are 0 or at least {2 * world}, at least 10, 10 and 1")
    for name, choices in (("stream", ("report", "select")), ("labels", ("balanced", "random"))):
        if c[name] not in choices:
            fail(f"unknown {name} {c[name]!r}; choose {' or '.join(choices)}")
    if c.stats and not c.stats.lower().endswith(".npz"):
        fail(f"--stats={c.stats}: needed is a name that ends in .npz")
    for path in filter(None, (c.json, c.stats)):
        writable(path)
    if (is_statistics(c.real) or c.stats) and len(c.features) > 1:
        fail(f"statistics are those of one feature network, --features names {len(c.features)}")
    if c.images and is_statistics(c.images):
        fail(f"{c.images} holds statistics, where images are needed; statistics are for --real", code=1)
    if (c.images or c.stats) and "ckpt" in c.given:
        note(f"--ckpt does nothing beside {'--images' if c.images else '--stats'}")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        rank, world, device = setup()
        check_options(c, world)

        # What is evaluated decides on the features: those of the tiny world where both sides are of it.
        model = None if c.images or c.stats else load_guided(c, device)
        size = image_size(model) if model else None
        tiny = c.real == "tiny" and not c.images and (not model or size == SIZE and not model.classes)
        names = c.features or ["tiny2" if tiny else features_of(c.real)]
        if not c.features:
            print0(f"features: {names[0]}" + (", as both sides are the tiny world" if tiny else ""))
        if model:
            plan = schedule(c.sampler, c.steps, c.noise, model.sigmas)   # refuses before the real images are read
            check_classes(c.real, model.num_classes)
        nets = feature_nets(names, c.features_path, device)

        def stored(source, num=0):          # {net.name: Summary} of num images, 0: of all
            role = "select" if c.stream == "select" else "all"
            num = num or (c.num_real if source == "tiny" else 0)
            found = real_summaries(source, nets, role, c.num_prdc, num, device, size, c.batch_size)
            if found[nets[0].name].num < num:
                fail(f"{source} holds {found[nets[0].name].num} images, {num} are needed", code=1)
            return found

        if c.stats:
            source = c.images or c.real
            found = stored(source, c.num)[nets[0].name]
            if rank == 0:
                write_statistics(c.stats, found, nets[0])
            print0(f"wrote {c.stats}: {found.num} images of {source} ({found.size}), {nets[0].name} features; use it "
                   "as --real")
            return

        real, began = stored(c.real), time.time()
        if model:
            source = f"{in_words(plan, c.noise)}, {c.labels} labels, seed {c.seed}"
            rows = evaluate(model, nets, real, c.num or 50_000, plan.sampler, c.steps, c.noise, c.seed, c.stream,
                            c.labels, c.num_prdc, c.batch_size)
        else:
            source = c.images
            rows = {name: dict(metrics(x, real[name]), features=name) for name, x in stored(source, c.num).items()}
        if c.json and rank == 0:
            keys = ("fid", "fid_se", *NEIGHBOURS, "num", "features", "sampler", "steps", "seed")
            with whole(c.json) as f:
                f.write("".join(dumps({k: row.get(k) for k in keys}) + "\n" for row in rows.values()).encode())
        for name, row in rows.items():
            error = "-" if row["fid_se"] is None else f"{row['fid_se']:.3f}"
            print0(f"FID {row['fid']:.3f} +- {error}  ({row['num']} images, {source}; {name} features, real: {c.real}; "
                   f"{time.time() - began:.0f} s)")
            if row["kid"] is not None:
                print0(f"KID {row['kid']:.5f}  " + "  ".join(f"{k} {row[k]:.3f}" for k in NEIGHBOURS[1:])
                       + f"  (these on {min(row['num'], c.num_prdc)} of the images)")


if __name__ == "__main__":
    main()
