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
import math
import os
import posixpath
import sys
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from functools import lru_cache
from json import dumps, loads
from typing import Callable, NamedTuple, Optional

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps

from models import (ASSETS, SafeUnpickler, Stop, configure, fail, gather, image_size, listed, note, one_line, print0,
                    read_checkpoint, read_pickle, setup, whole, writable)
from reward import Moments, covariance_root, distance_to_root, influence, standard_error
from sample import NOISE, STREAMS, generate, image_seeds, in_words, load_guided, schedule, watched

# -----------------------------------------------------------------------------
ckpt = "" # model to draw from: .pt, .pkl or .safetensors, or the name of an asset; empty: the tiny base
heads = 0 # attention heads of a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of a SiT; 0: as its file says, else all rows of its table but one, the null class
vae = "" # decoder of a model that draws latents: .safetensors or .bin of an SD-VAE
images = "" # evaluate these instead: folder or zip of images, or .npz or .npy with uint8 (N, H, W, 3)
num = 0 # images to evaluate; 0: 50,000 drawn, or all of --images
real = "tiny" # real images: "tiny", a folder, a zip, an .npz, or a file of their statistics (mu, sigma)
features = [] # some of inception (what FID means), dinov2, tiny, tiny2, factors; empty: tiny2 in the tiny world
features_path = "" # weights of inception or dinov2, or the folder of both; empty: the published files, in torch's cache
num_real = 50000 # real images of the tiny world that are compared with; a folder is used whole
num_prdc = 5000 # images for KID and the neighbour metrics, a fixed random subset
sampler = "" # see sample.py; empty: flow for SiT, heun for EDM2
steps = 10 # of the sampler
noise = -1.0 # noise level of the sampler, 0: none; -1: 0.5 for SiT, 0.7 for EDM2
cfg = 1.0 # scale of the guidance by the null class, or by --guide; 1: none
guide = "" # autoguidance: a weaker network in place of the null class
labels = "balanced" # of the drawn images: balanced (i % classes), or random (uniform, as for published FIDs)
seed = 0 # of the drawn images
stream = "report" # report; select: other images, to choose a sampler with
batch_size = 250 # images in one pass, per rank
stats = "" # write the statistics of --images if given, else of what --ckpt draws if given, else of --real, and stop
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
    """
    Procedural images start, start + step, .. of a stream: coloured digits, random in all of FACTORS.
    Returns images uint8 (n, 3, 16, 16), labels int64 (n,) with label i % 10, factors float64 (n, 7) in FACTORS' order.
    """
    indices = range(start, start + n * step, step)
    masks, factors = zip(*[tiny_image(seed, stream, i) for i in indices])
    masks, factors = np.stack(masks), np.stack(factors)
    colors = np.array([colorsys.hsv_to_rgb(hue, 0.75, brightness) for hue, brightness in factors[:, 5:]])
    pixels = colors[:, :, None, None] * masks[:, None].astype(np.float32) + 0.5
    return torch.from_numpy(pixels.astype(np.uint8)), torch.tensor(indices) % CLASSES, torch.from_numpy(factors)


# ---- Feature networks: uint8 (N, 3, H, W) => float32 (N, dim) -----------------------------------------------------

class FeatureNet(nn.Module):
    """
    Tiny networks trained to predict every factor of an image, so that FD sees colour and pose and not the class alone.
    uint8 (N, 3, 16, 16) => float32 (N, dim) features. heads(features): 10 logits and 8 standardised factors.
    """
    def __init__(self, name):
        super().__init__()
        self.name, self.size = name, SIZE
        if name == "tiny":                                              # the reward's: strided convolutions, ReLU
            self.dim = 64
            self.body = nn.Sequential(
                nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 48, 3, stride=2, padding=1), nn.ReLU(),
                nn.Conv2d(48, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 16, self.dim))
        elif name == "tiny2":                                           # held out: wide kernels, pooling, GELU
            self.dim = 128
            self.body = nn.Sequential(
                nn.Conv2d(3, 32, 5, stride=2, padding=2), nn.GELU(), nn.Conv2d(32, 96, 3, padding=1), nn.GELU(),
                nn.AvgPool2d(2), nn.Conv2d(96, 96, 3, padding=1), nn.GELU(), nn.Flatten(), nn.Linear(96 * 16, 256),
                nn.GELU(), nn.Linear(256, self.dim))
        else:
            fail(f"unknown tiny feature network {name!r}; choose tiny or tiny2")
        self.heads = nn.Sequential(nn.ReLU(), nn.Linear(self.dim, CLASSES + 8))

    def forward(self, images):
        return self.body(images.float() / 127.5 - 1)


class MeasuredFactors:
    """
    What can be measured in an image without a network: amount of ink, centre (x, y), spread, brightness and hue (as
    cos, sin), each roughly of unit variance in the tiny world.
    """
    name, size, dim, hash = "factors", SIZE, 7, ""

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


def sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def published_weights(name, path=None):
    """
    Path and sha256 of a published network's weights. path: a file or a folder of the user's, whose hash may differ (a
    note says so); without one the file in torch's cache, downloaded if need be, whose hash may not.
    """
    file, digest, url = WEIGHTS[name]
    cached = os.path.join(torch.hub.get_dir(), "checkpoints", file)
    found = os.path.join(path, file) if path and os.path.isdir(path) else path or cached
    if not path:
        if not os.path.isfile(cached) and os.environ.get("LOCAL_RANK", "0") == "0":
            try:
                os.makedirs(os.path.dirname(cached), exist_ok=True)
                torch.hub.download_url_to_file(url + file, cached, digest, progress=False)
            except Exception as e:          # no network, a full disk, another file
                fail(f"cannot download {url}{file} ({one_line(e)}); bring it to {cached}, or name it by "
                     "--features_path", code=1)
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

    def __call__(self, images):
        with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):       # TF32 would cost FID its third digit
            return torch.cat([self.features(part) for part in images.split(32)])


def feature_net(name, path=None, device="cpu"):
    """
    A callable uint8 images (N, 3, H, W) => float32 features (N, dim), with .name, .dim, .size (in pixels; None: any)
    and .hash (sha256 of its weights' file, "" without one). path: that file.
    """
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
    fail(f"unknown features {name!r}; choose tiny, tiny2, factors, inception or dinov2")


# ---- Images from disk -----------------------------------------------------------------------------------------------

# Formats that Pillow only decodes (for EPS it would start Ghostscript). The last two cannot be told by their first
# bytes: they are read only from files of their own ending.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "DDS", "ICO",
                 "SGI", "PSD", "PCX", "TGA")
ARRAY_ENDINGS = (".npz", ".npy", ".pkl", ".pt", ".pth")


class Images(NamedTuple):
    """
    The images of a folder, a zip or an array file, in the order of a hash of their names within the set: the first N of
    them, or every second one, are a fixed random subset, the same on every machine.
    """
    path: str
    names: list                         # "/" between folders, without the folders that all of them are in
    read: Callable                      # name => PIL image
    around: str = ""                    # the folders that all of them are in
    labels: object = None               # {name: label} of a dataset.json, empty if it has none; None without the file


def is_array_file(path):
    return path.lower().endswith(ARRAY_ENDINGS) and not os.path.isdir(path)


@contextmanager
def reading(path):
    """Whatever a damaged file raises ends the script with one line and exit code 1."""
    try:
        yield
    except Exception as e:
        kind = os.path.splitext(path)[1].lower()
        fail(f"{path} is not a readable {kind} ({one_line(e) or type(e).__name__})", code=1)


def read_arrays(path):
    """
    What an .npz, .npy, .pt or .pkl holds, by name, without running code; an .npz is read only where it is asked for.
    The dict of an .npy, which numpy pickles, is read too; an array alone is named arr_0.
    """
    ending = os.path.splitext(path)[1].lower()
    if ending == ".pkl":
        found = read_pickle(path)
    elif ending in (".pt", ".pth"):
        found = read_checkpoint(path)
    else:
        with reading(path), open(path, "rb") as f:
            try:
                found = np.load(path, allow_pickle=False)
            except ValueError:              # an array of objects is how numpy saves a dict
                np.lib.format.read_magic(f)
                np.lib.format.read_array_header_1_0(f)
                found = SafeUnpickler(f).load().item()
    if isinstance(found, (np.ndarray, torch.Tensor)):
        return {"arr_0": found}
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return dict(mu=found[0], sigma=found[1])
    return found if hasattr(found, "keys") else {"": found}


def array_images(path):
    """Images uint8 (N, H, W, 3) of an array file, whatever their name, channels last or first (arr_0 before others)."""
    stored, others = read_arrays(path), []
    if {"mu", "sigma"} <= set(stored.keys()):
        fail(f"{path} holds statistics, where images are needed; statistics are for --real", code=1)
    with reading(path):
        for name in sorted(stored.keys(), key=lambda name: name != "arr_0"):
            array = stored[name]
            if not isinstance(array, (np.ndarray, torch.Tensor)):
                others.append(f"{name} ({type(array).__name__})".strip())
                continue
            array = np.asarray(array)
            if array.dtype == np.uint8 and array.ndim == 4 and 3 in (array.shape[3], array.shape[1]) and len(array):
                return array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)
            others.append(f"{name} {array.dtype} {array.shape}")
    fail(f"{path} holds {', '.join(others[:4]) or 'nothing'}; needed are images, uint8 (N, H, W, 3), or statistics, "
         "mu (d,) and sigma (d, d)", code=1)


def hidden(name):
    return any(part == "__MACOSX" or part.startswith(".") and part not in (".", "..") for part in name.split("/"))


def files_below(folder, name="", above=()):
    """
    Names of the files below a folder that are not hidden, "/" between folders. Links are followed, but never to a
    folder that the way there leads through.
    """
    try:
        here = os.stat(os.path.join(folder, name))
        entries = os.listdir(os.path.join(folder, name))
    except OSError as e:
        fail(f"cannot read {os.path.join(folder, name)}: {e.strerror}", code=1)
    here = here.st_dev, here.st_ino
    for entry in entries if here not in above else ():
        if not hidden(entry):
            inner = f"{name}/{entry}" if name else entry
            if os.path.isdir(os.path.join(folder, inner)):
                yield from files_below(folder, inner, (*above, here))
            else:
                yield inner


def zip_name(info):
    """Name of a zip's member as it was meant: some writers set no mark for UTF-8, some put \\ between folders."""
    name = info.filename
    if not info.flag_bits & 0x800:
        try:
            name = name.encode("cp437").decode("utf-8")
        except UnicodeError:                # of an unknown alphabet, where a \\ may be half a letter
            return name
    return name.replace("\\", "/")


def hashed_order(names):
    """The names (list of str) in the order of a hash of theirs in Unicode's NFC."""
    key = lambda name: hashlib.sha256(unicodedata.normalize("NFC", name).encode("utf-8", "surrogateescape")).digest()
    return sorted(sorted(names), key=key)


def stored_files(path):
    """{name: member} of what a folder or a zip holds, but for hidden files, and open_member(member)."""
    if os.path.isdir(path):
        return {name: os.path.join(path, name) for name in files_below(path)}, lambda member: open(member, "rb")
    if not zipfile.is_zipfile(path):
        fail(f"{path} is neither a folder nor a zip file; needed: images in one of these")
    with reading(path):                     # members are read in place, never unpacked to where their names point
        archive = zipfile.ZipFile(path)
    stored = {zip_name(info): info for info in archive.infolist() if not info.is_dir()}
    shown = {name: info for name, info in stored.items() if not hidden(name)}
    if stored and not shown:
        fail(f"{path} holds hidden files only, which do not count", code=1)
    return shown, archive.open


def open_images(path):
    """
    The Images of a folder, a zip or an array file. Counted are all files of IMAGE_FORMATS but hidden ones; a note tells
    how many others there are. Exit code 2 if there is no such file, 1 if it holds no image.
    """
    if not os.path.exists(path):
        fail(f"{path} does not exist; needed: a folder or a .zip of images, or an .npz of them")
    if is_array_file(path):
        array = array_images(path)
        return Images(path, hashed_order(map(str, range(len(array)))), lambda name: Image.fromarray(array[int(name)]))
    stored, open_member = stored_files(path)
    formats = {ending: form for ending, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}
    ending = lambda name: os.path.splitext(name)[1].lower()
    names = [name for name in stored if ending(name) in formats]
    jsons = sorted((name for name in stored if posixpath.basename(name) == "dataset.json"), key=lambda k: k.count("/"))
    others = Counter(ending(name) or "no ending" for name in stored if ending(name) not in formats)
    others[".json"] -= len(jsons)
    left_out = f"{others.total()} files of other kinds ({', '.join(sorted(+others)[:5])})" if others.total() else ""
    if not names:
        fail(f"{path} holds no image{left_out and ', but ' + left_out}; needed: png, jpg, webp or other images, flat "
             "or in one sub-folder per class", code=1)
    if left_out:
        note(f"{path}: {len(names)} images; {left_out} were left out")

    # A set that was zipped with the folder around it is the same set.
    clean = {posixpath.normpath("/" + name.lstrip("/")): name for name in names}
    around = posixpath.commonpath(posixpath.dirname(name) for name in clean).rstrip("/")
    inner = {name[len(around) + 1:]: member for name, member in clean.items()}
    labels = None
    if jsons:
        with reading(os.path.join(path, jsons[0])), open_member(stored[jsons[0]]) as f:
            labels = tool_labels(loads(f.read()), jsons[0], inner)

    def read(name):
        allowed = dict.fromkeys((formats[ending(name)], *IMAGE_FORMATS[:-2]))       # some files have a wrong ending
        with open_member(stored[inner[name]]) as f:
            with Image.open(f, formats=[form for form in allowed if form in Image.OPEN]) as image:
                return in_rgb(image)

    return Images(path, hashed_order(inner), read, around.lstrip("/"), labels)


def tool_labels(found, where, inner):
    """
    {name: label} of a dataset.json, as the dataset tool of StyleGAN and EDM2 writes it: pairs of a name, from the
    folder of the file `where`, and a label. inner: {name in the set: name in the folder or zip}. None if it is another
    tool's file.
    """
    try:
        known = {name.replace("\\", "/"): label for name, label in dict(found["labels"] or {}).items()}
    except (TypeError, ValueError, LookupError, AttributeError):
        return None
    top = len(where) - len("dataset.json")
    labels = {name: known.get(member[top:]) for name, member in inner.items()} if known else {}
    return None if known and all(label is None for label in labels.values()) else labels


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
    """
    Classes of Images ([] if flat) and labels int64 (N,). The classes are the sub-folders of the set, in the order of
    numbers if all are numbers, else of the alphabet; or what dataset.json says, whose labels are numbers from 0 on.
    """
    if images.labels == {}:
        return [], torch.zeros(len(images.names), dtype=torch.int64)
    if images.labels:
        return labelled_classes(images)
    folders = [name.split("/")[0] if "/" in name else "" for name in images.names]
    classes = sorted(set(folders))
    if len(classes) > 1 and "" in classes:
        fail(f"{images.path} has images beside sub-folders ({images.names[folders.index('')]}); needed: all images "
             "flat, or all in one sub-folder per class", code=1)
    if all(k.isdecimal() for k in classes):
        classes.sort(key=lambda k: (int(k), k))
    places = {k: i for i, k in enumerate(classes)}
    return classes if len(classes) > 1 else [], torch.tensor([places[k] for k in folders])


def labelled_classes(images):
    """image_classes by the labels of a dataset.json: numbers, or one-hot."""
    labels = [images.labels[name] for name in images.names]
    if None in labels:
        unlabelled = images.names[labels.index(None)]
        fail(f"{images.path}: dataset.json has no label for {unlabelled}; mend or remove it", code=1)
    if all(isinstance(y, list) and sorted(y)[-1:] == [1] and sum(map(bool, y)) == 1 for y in labels):
        labels = [y.index(1) for y in labels]
    if not all(isinstance(y, int) and 0 <= y < 2**20 for y in labels):
        fail(f"{images.path}: the labels of dataset.json are no classes, numbers from 0 on; remove it", code=1)
    empty = sorted(set(range(max(labels))) - set(labels))
    if empty:
        note(f"{images.path}: dataset.json has labels up to {max(labels)}, but no image of class {listed(empty)}")
    return [str(k) for k in range(max(labels) + 1)], torch.tensor(labels)


def is_statistics(real):
    """Whether real data are a file of statistics, not images; a file that is not there counts by its ending."""
    if real == "tiny" or not is_array_file(real):
        return False
    return not os.path.isfile(real) or not {"mu", "sigma", "fid", "fd_dinov2"}.isdisjoint(read_arrays(real).keys())


def check_classes(real, num_classes):
    """A folder with sub-folders must have as many as the model has classes; anything else has no classes to compare."""
    if real != "tiny" and not is_statistics(real):
        classes, _ = image_classes(open_images(real))
        if classes and len(classes) != num_classes:
            fail(f"{real} has {len(classes)} classes ({listed(classes)}), the model {num_classes}; "
                 f"make a base for it: python lab/pretrain.py --real {real} --out base.pt", code=1)
        if classes:
            print0(f"{real}: {len(classes)} classes, in this order: {listed(classes)}")


def image_batches(images, size=None, start=0, step=1, limit=0, batch_size=250):
    """
    Yields images start, start + step, .. of Images (at most `limit`), short side resized to `size` and centre-cropped
    (None: as they are), as uint8 (b, 3, H, W). b is batch_size, or less if the images are large or the next one is of
    another size. An image that cannot be read ends the script with exit code 1 and its name.
    """
    batch, pixels = [], 0
    for name in images.names[start::step][:limit or None]:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                image = images.read(name)
                if size and image.size != (size, size):
                    note(f"{images.path}: images are resized to {size} x {size} (short side, then the centre)")
                    image = ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)
            except MemoryError:
                raise
            except Exception as e:          # a damaged image can raise anything
                path = os.path.join(images.path, images.around, name)
                fail(f"{path} is not a readable image ({one_line(e)}); mend or remove it", code=1)
        for w in warned:
            note(f"{images.path}: {one_line(w.message)} (shown once)")
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


class Nets:
    """Feature networks as one: their features side by side, each network's divided by its scale."""
    def __init__(self, nets):
        self.nets = nets
        self.dims = [net.dim for net in nets]
        self.dim = sum(self.dims)
        self.name = " + ".join(net.name for net in nets)
        self.hash = " + ".join(net.hash for net in nets)
        self.size = next((net.size for net in nets if net.size), None)
        self.scales = [1.0] * len(nets)

    def __call__(self, images):
        return torch.cat([net(images) / scale for net, scale in zip(self.nets, self.scales)], dim=1)

    def rescale(self, real):
        """
        Several networks count alike: scales that make the mean variance of the real features 1 in each, from the
        Summary of all side by side. Returns that Summary in the new units. One network keeps its own, those of its FID.
        """
        if len(self.nets) == 1:
            return real
        scales = [variances.mean().sqrt() for variances in real.cov.diagonal().split(self.dims)]
        unit = torch.cat([scale.expand(dim) for scale, dim in zip(scales, self.dims)])      # (d,)
        self.scales = [scale.item() for scale in scales]
        features = None if real.features is None else (real.features / unit).float()
        return real._replace(mu=real.mu / unit, cov=real.cov / unit.outer(unit), features=features)


# What real images are for; what rewards and what evaluates share none.
# role: (stream of the tiny world; of a folder, in the order of Images: from which image on, every how many)
ROLES = {
    "train": ("train", 0, 2),           # the reward
    "report": ("report", 1, 2),         # evaluation before and after
    "floor": ("floor", 0, 2),           # real against real: as low as FD gets
    "select": ("select", 0, 1),         # choosing a base or a sampler
    "all": ("report", 0, 1),            # fid.py itself
}


def set_batches(source, size, role, num, batch_size=250):
    """
    This rank's share (image i of rank i % world) of a set for a role, as uint8 batches: num images of the tiny world,
    or at most num (0: all) of a folder, a zip or an array file, as image_batches, behind a progress bar.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    stream, offset, stride = ROLES[role]
    if source == "tiny":
        mine = range(rank, num, world)
        for k in range(0, len(mine), 1000):
            part = mine[k:k + 1000]
            yield tiny_images(len(part), 0, stream, part.start, world)[0]
        return
    images = open_images(source)
    first, step = offset + stride * rank, stride * world
    limit = len(range(rank, num, world)) if num else 0
    mine = min(limit or len(images.names), len(range(first, len(images.names), step)))
    batches = image_batches(images, size, first, step, limit, batch_size)
    yield from watched(batches, -(-mine // batch_size), desc=images.path, leave=False)


@torch.no_grad()
def summarize(batches, nets, num_prdc, device="cpu"):
    """
    {net.name: Summary} of uint8 batches (b, 3, H, W), in one pass: float64 sums of all features, and the first num_prdc
    features themselves. Every rank brings its share, image i of rank i % world, and gets the whole.
    """
    rank, world = dist.get_rank(), dist.get_world_size()
    moments = {net.name: Moments(net.dim, device) for net in nets}
    kept = {net.name: [torch.empty(0, net.dim, device=device)] for net in nets}
    sizes = set()
    for batch in batches:
        sizes.add(f"{batch.shape[3]} x {batch.shape[2]}")
        for net in nets:
            f = net(batch.to(device))
            if sum(map(len, kept[net.name])) * world < num_prdc:
                kept[net.name].append(f)
            moments[net.name].add(f)
    everywhere = [None] * world
    dist.all_gather_object(everywhere, sizes)
    sizes = sorted(set().union(*everywhere))
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
        summaries[name] = Summary(int(m.weight), *m.gaussian(), features,
                                  sizes[0] if len(sizes) == 1 else "several sizes")
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
    return summarize(set_batches(real, size, role, num, batch_size), nets, num_prdc, device)


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
        stored = {k: parts[k] for k in ("mu", "sigma", "features", "hash", "num", "size") if k in parts}
        inner = {"inception": "fid", "dinov2": "fd_dinov2"}.get(net.name)
        if isinstance(parts.get(inner), dict):
            stored = dict(parts[inner], num=parts.get("num_images", 0))
    if "mu" not in stored or "sigma" not in stored:
        fail(f"{path} holds no statistics of {net.name}: mu and sigma are needed, and it has "
             f"{', '.join(map(str, list(parts.keys())[:5])) or 'nothing'}", code=1)
    try:
        mu, cov = as_float64(stored["mu"]), as_float64(stored["sigma"])
        name, digest, size = (str(stored.get(k, x)) for k, x in (("features", net.name), ("hash", ""), ("size", "")))
        num = max(0, int(np.asarray(stored.get("num", 0)).item()))
    except Exception as e:                  # numpy's text may hold what is no character
        fail(f"{path}: mu, sigma or num are not numbers, or features no name ({one_line(e)})", code=1)
    mu = mu.flatten() if mu.numel() == max(mu.shape, default=0) else mu        # some write (1, d)
    if name != net.name:
        fail(f"{path} holds statistics of {name}, asked for is {net.name}; add --features {name}", code=1)
    if mu.shape != (net.dim,) or cov.shape != (net.dim, net.dim):
        fail(f"{path} has mu {tuple(mu.shape)} and sigma {tuple(cov.shape)}, {net.name} has {net.dim} dimensions: name "
             "the network that it was made with by --features", code=1)
    if digest and net.hash and digest != net.hash:
        fail(f"{path} was made with other weights of {name} (sha256 {digest[:8]}.., these are {net.hash[:8]}..): make "
             "it again with --stats, or name the weights by --features_path", code=1)
    if not (mu.isfinite().all() and cov.isfinite().all()):
        fail(f"{path} holds NaN or infinite values", code=1)
    symmetric = (cov - cov.T).abs().max() <= 1e-6 * cov.abs().max()
    if not symmetric or torch.linalg.cholesky_ex(cov).info and (v := torch.linalg.eigvalsh(cov))[0] < -1e-5 * v[-1]:
        fail(f"{path}: sigma is no covariance; it is not symmetric, or has negative eigenvalues", code=1)
    return Summary(num, mu.to(device), cov.to(device), None, size)


def as_float64(x):
    """Numbers of an array or a tensor, of any real type, as a float64 tensor; TypeError if they are no real numbers."""
    array = x.detach().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
    return torch.from_numpy(array.astype(np.float64, casting="same_kind"))


def write_statistics(path, summary, net):
    """mu, sigma and where they come from, atomically."""
    with whole(path) as f:
        np.savez(f, mu=summary.mu.cpu().numpy(), sigma=summary.cov.cpu().numpy(), num=summary.num, features=net.name,
                 hash=net.hash, size=summary.size)


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


def prdc(real, fake):
    """
    Precision and recall (k = 3; a point on the edge counts; Kynkaanniemi et al. 2019), density and coverage (k = 5; it
    does not; Naeem et al. 2020). real (N, d), fake (M, d) => dict of floats.
    """
    real_3, real_5 = neighbour_radii(real, (3, 5))
    fake_3, = neighbour_radii(fake, (3,))
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


def judge(fake, real, labels=None):
    """
    All metrics of one Summary against another: fid, fid_se (its standard error; labels are those of fake.features if
    they were drawn in equal numbers), NEIGHBOURS; also psi, the first variation of the kept features. What needs real
    features is None if only statistics are known.
    """
    row = dict(num=fake.num, num_real=real.num, size=fake.size, size_real=real.size, fid=distance(fake, real),
               fid_se=None, psi=None, **dict.fromkeys(NEIGHBOURS))
    with suppress(ValueError):              # singular covariances, like that of pixels that are always black
        row["psi"] = influence(fake.features, fake.mu, fake.cov, real.mu, covariance_root(real.cov))
        row["fid_se"] = standard_error(row["psi"], labels) * math.sqrt(len(row["psi"]) / fake.num)
    if real.features is not None and min(len(fake.features), len(real.features)) > 5:
        row.update(kid=kid(real.features, fake.features), **prdc(real.features, fake.features))
    return row


def notes_on(row, dim):
    """Print what a reader of judge()'s row has to know, in features of `dim` dimensions."""
    for num, whose in ((row["num"], "evaluated"), (row["num_real"], "real")):
        if 0 < num <= dim:
            note(f"{num} {whose} images cannot fill the {dim} dimensions of {row['features']}: compare this FID only "
                 "with others of the same numbers of images")
    if row["size"] and row["size_real"] and row["size"] != row["size_real"]:
        note(f"the real images are {row['size_real']}, the evaluated ones {row['size']}: resized to one size before, "
             "they would give another FID")


# ---- A model against real data -------------------------------------------------------------------------------------

@torch.no_grad()
def drawn_summaries(model, nets, num, sampler="", steps=10, noise=None, seed=0, stream="report", num_prdc=5000,
                    batch_size=250, keep=0, labels="balanced"):
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
    batches = generate(model, seeds, classes, sampler, steps, 1.0, batch_size, noise)
    shown = []

    def keeping():
        total, title = -(-len(indices) // batch_size), f"drawing {num}" + (f" ({sampler})" if sampler else "")
        for batch in watched(batches, total, desc=title, leave=False):
            if sum(map(len, shown)) < keep:
                shown.append(batch)
            yield batch

    summaries = summarize(keeping(), nets, num_prdc, device)
    return summaries, gather(torch.cat(shown)[:len(range(rank, keep, world))], keep) if keep else None


def evaluate(model, nets, real, num, sampler="", steps=10, noise=None, seed=0, labels="balanced", **how):
    """
    Draw num images (how: see drawn_summaries) and compare them in every net with real {net.name: Summary}. Returns
    {net.name: row}, a row being judge()'s with features, sampler, steps and seed; "images": the first `keep`.
    """
    sampler = schedule(sampler, steps, noise, 0.0, model.sigmas).sampler
    summaries, images = drawn_summaries(model, nets, num, sampler, steps, noise, seed, labels=labels, **how)
    rows = {} if images is None else dict(images=images)
    for name, fake in summaries.items():
        stratum = torch.arange(len(fake.features), device=fake.features.device) % model.num_classes
        row = judge(fake, real[name], stratum if labels == "balanced" else None)
        rows[name] = dict(features=name, sampler=sampler, steps=steps, seed=seed, **row, kept=fake.features,
                          mean=fake.mu, labels=stratum)
    return rows


def check_features(names, path):
    """Mistakes in the names of feature networks, or in the path of their weights."""
    if len(set(names)) < len(names):
        fail(f"features {names}: needed are different feature networks")
    if path and not set(names) & set(WEIGHTS):
        fail(f"--features_path does nothing without {' or '.join(WEIGHTS)} as features; leave it out")


def choose_networks(c, size, judges):
    """
    The feature networks of a search, c.features, and of its table, c.judges: those named; else the tiny ones (`judges`)
    for images of 16 px, which a note tells if they are not the tiny world's, and Inception for all others.
    """
    tiny, named = c.real == "tiny" or size == SIZE, c.features and c.judges
    c["features"] = c.features or (["tiny"] if tiny else ["inception"])
    if not c.judges and c.num:
        c["judges"] = c.features if is_statistics(c.real) else judges if tiny else ["inception"]
    for names in (c.features, c.judges):
        check_features(names, "")
    check_features({*c.features, *c.judges}, c.features_path)
    if is_statistics(c.real) and (len(c.features) > 1 or c.num and c.judges != c.features):
        fail(f"{c.real} has statistics of one feature network only; add --judges {c.features[0]}, or --num=0")
    if c.real != "tiny" and {"tiny", "tiny2"} & {*c.features, *c.judges} and not named:
        note("the tiny feature networks know only the digits of the tiny world; for images of your own name --features "
             "and --judges: inception or dinov2")


# ---- A model before and after ---------------------------------------------------------------------------------------

class Blue:
    """1 where the ink of an image is blue, with a measured hue of .50 to .72 turns, else 0; its mean is their share."""
    name, size, dim, hash = "blue", SIZE, 1, ""

    def __call__(self, images):
        cos, sin = MeasuredFactors()(images)[:, 5:].T
        hue = torch.atan2(sin, cos) / (2 * math.pi) % 1
        return ((hue > 0.50) & (hue < 0.72)).float()[:, None]


def floors(real, nets, known, num, num_prdc, device, size):
    """{net.name: FD of num other real images against the real ones known}; {} if there are too few."""
    if is_statistics(real):
        return {}
    found = real_summaries(real, nets, "floor", num_prdc, num, device, size)
    if found[nets[0].name].num < num:
        note(f"no floor, as {real} has {found[nets[0].name].num} real images for it, not {num}")
        return {}
    return {name: distance(x, known[name]) for name, x in found.items()}


NUM_REAL, NUM_PRDC = 20000, 3000        # for both RL scripts: real images of the tiny world; of the neighbour metrics


def reward_networks(c, model, device):
    """The feature networks of the reward as one, and the Summary of the real images that reward, in their features."""
    choose_networks(c, image_size(model), ["tiny2", "tiny", "factors"])
    check_classes(c.real, model.num_classes)
    nets = Nets([feature_net(name, c.features_path if name in WEIGHTS else None, device) for name in c.features])
    found = real_summaries(c.real, [nets], "train", NUM_PRDC, NUM_REAL if c.real == "tiny" else 0, device,
                           image_size(model), c.batch_size)
    real = nets.rescale(found[nets.name])
    if 0 < real.num <= nets.dim:
        fail(f"{c.real} has {real.num} images for the reward; {nets.name} features need more than {nets.dim}", code=1)
    return nets, real


def table_of(c, model, device, stream="report", blue=False):
    """
    A function of a model, a label, a sampler and steps: rows of the table, one for each judge, with the first images.
    These are drawn from noise, and compared with real images, that training never uses.
    """
    judges = [feature_net(name, c.features_path if name in WEIGHTS else None, device) for name in c.judges]
    size = image_size(model)
    counted = [Blue()] if blue and c.real == "tiny" and size == Blue.size else []
    num_real = NUM_REAL if c.real == "tiny" else 0
    real = real_summaries(c.real, judges + counted, stream, NUM_PRDC, num_real, device, size, c.batch_size)
    floor = floors(c.real, judges, real, c.num, NUM_PRDC, device, size)

    def judge(model, label, sampler, steps):
        found = evaluate(model, judges + counted, real, c.num, sampler, steps, c.noise, seed=c.seed, stream=stream,
                         num_prdc=NUM_PRDC, batch_size=c.batch_size, keep=min(c.num, 200))
        shares = {"blue": found["blue"]["mean"].item(), "blue_real": real["blue"].mu.item()} if counted else {}
        for net in judges:
            notes_on(found[net.name], net.dim)
        return [dict(found[net.name], label=label, floor=floor.get(net.name), images=found["images"], **shares)
                for net in judges]

    return judge


def public(row):
    """What OUT/result.json keeps of a row."""
    keys = ("label", "features", "sampler", "steps", "num", "fid", "fid_se", "floor", "kid", "precision", "recall",
            "density", "coverage", "blue", "blue_real")
    return {k: row[k] for k in keys if k in row}


def compare(before, after):
    """
    A table: rows of evaluate() before and after, on the same noise and labels. +- is one standard error, that of the
    change is paired; down is the share of the FD above the floor that is gone.
    """
    lines = [f"{'':>10s} {'images':>6s} {'features':9s} {'FD before':>17s} {'after':>17s} {'change':>17s} "
             f"{'floor':>7s} {'down':>5s} {'precision':>13s} {'recall':>13s} {'coverage':>13s}"]
    with_error = lambda value, error: f"{value:.3f}" + ("" if error is None else f" +- {error:.3f}")
    for b, a in zip(before, after):
        paired, floor, down = None, "-", "-"
        if b["psi"] is not None and a["psi"] is not None:
            paired = standard_error(a["psi"] - b["psi"], b["labels"]) * math.sqrt(len(b["psi"]) / b["num"])
        if b.get("floor") is not None and b["fid"] > b["floor"]:
            floor, down = f"{b['floor']:.3f}", f"{1 - (a['fid'] - b['floor']) / (b['fid'] - b['floor']):.0%}"
        both = ["-" if b[k] is None else f"{b[k]:.3f} {a[k]:.3f}" for k in ("precision", "recall", "coverage")]
        lines.append(f"{a['label']:>10s} {b['num']:6d} {b['features']:9s} "
                     f"{with_error(b['fid'], b['fid_se']):>17s} {with_error(a['fid'], a['fid_se']):>17s} "
                     f"{with_error(a['fid'] - b['fid'], paired):>17s} {floor:>7s} {down:>5s} "
                     + " ".join(f"{x:>13s}" for x in both))
    for label, (b, a) in {a["label"]: (b, a) for b, a in zip(before, after) if "blue" in a}.items():
        lines.append(f"{label}: {b['blue']:.0%} of the images are blue before, {a['blue']:.0%} after, "
                     f"{a['blue_real']:.0%} of the real ones")
    return "\n".join(lines)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        rank, world, device = setup()
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

        # What is evaluated decides on the features: those of the tiny world where both sides are of it.
        model = load_guided(c, device) if not c.images and (not c.stats or "ckpt" in c.given) else None
        if c.images and "ckpt" in c.given and not c.stats:
            note("--ckpt does nothing beside --images")
        tiny = c.real == "tiny" and not c.images and (not model or image_size(model) == SIZE and not model.classes)
        names = c.features or (["tiny2"] if tiny else ["inception"])
        check_features(names, c.features_path)
        if len(names) > 1 and (c.stats or is_statistics(c.real)):
            fail(f"statistics are those of one feature network, --features names {len(names)}")
        if not c.features:
            print0("features: " + ("tiny2, as both sides are the tiny world" if tiny else "inception"))
        if model:
            noise = NOISE[model.family] if c.noise == -1 else c.noise
            plan = schedule(c.sampler, c.steps, noise, 0.0, model.sigmas)   # refuses before the real images are read
            how = dict(num=c.num or 50_000, sampler=plan.sampler, steps=c.steps, noise=noise, seed=c.seed,
                       stream=c.stream, num_prdc=c.num_prdc, batch_size=c.batch_size, labels=c.labels)
            if not c.stats:
                check_classes(c.real, model.num_classes)
        nets = [feature_net(name, c.features_path if name in WEIGHTS else None, device) for name in names]
        if c.images and len({net.size for net in nets}) > 1:
            fail(f"features of {' and '.join(names)} need images of different sizes: name one at a time")

        def of_real(num):
            role, size = "select" if c.stream == "select" else "all", image_size(model) if model else None
            num = num or (c.num_real if c.real == "tiny" else 0)
            return real_summaries(c.real, nets, role, c.num_prdc, num, device, size, c.batch_size)

        def of_images():
            found, needed = len(open_images(c.images).names), max(c.num, 2 * world)
            if found < needed:
                fail(f"{c.images} holds {found} images, {needed} are needed; FID depends on the number", code=1)
            return real_summaries(c.images, nets, "all", c.num_prdc, c.num, device, None, c.batch_size)

        if c.stats:
            if model:
                found, what = drawn_summaries(model, nets, **how)[0], c.ckpt or "the tiny base"
            else:
                found, what = (of_images(), c.images) if c.images else (of_real(c.num), c.real)
            found = found[names[0]]
            if rank == 0:
                write_statistics(c.stats, found, nets[0])
            print0(f"wrote {c.stats}: {found.num} images of {what} ({found.size}), {names[0]} features; use it as "
                   "--real")
            return

        real, began = of_real(0), time.time()
        if model:
            source = f"{in_words(plan, noise)}, {c.labels} labels, seed {c.seed}"
            rows = evaluate(model, nets, real, **how)
        else:
            source, none = c.images, dict(sampler=None, steps=None, seed=None)
            rows = {name: dict(features=name, **none, **judge(x, real[name])) for name, x in of_images().items()}
        if c.json and rank == 0:
            keys = ("fid", "fid_se", *NEIGHBOURS, "num", "features", "sampler", "steps", "seed")
            with whole(c.json) as f:
                f.write("".join(dumps({k: rows[name][k] for k in keys}) + "\n" for name in names).encode())
        for net in nets:
            row = rows[net.name]
            notes_on(row, net.dim)
            error = "-" if row["fid_se"] is None else f"{row['fid_se']:.3f}"
            print0(f"FID {row['fid']:.3f} +- {error}  ({row['num']} images, {source}; {net.name} features, real: "
                   f"{c.real}; {time.time() - began:.0f} s)")
            if row["kid"] is not None:
                print0(f"KID {row['kid']:.5f}  " + "  ".join(f"{k} {row[k]:.3f}" for k in NEIGHBOURS[1:])
                       + f"  (these on {min(row['num'], c.num_prdc)} of the images)")


if __name__ == "__main__":
    main()
