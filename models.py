"""
Everything with weights: SiT, EDM2, the VAE decoder, reading official files and ours, writing ours; and, in the last
section, what every script shares: options, errors, the process group, atomic files. Pre-training is lab/pretrain.py.
"""
import argparse
import atexit
import glob
import io
import json
import math
import os
import pickle
import re
import signal
import sys
import time
import warnings
from collections import OrderedDict
from contextlib import ContextDecorator, contextmanager, suppress
from datetime import timedelta
from functools import lru_cache

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")


# ---- SiT ------------------------------------------------------------------------------------------------------------

SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "tiny": (4, 64, 4)}


def modulate(x, shift, scale):          # x (B, T, D); shift, scale (B, D)
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


def time_features(t):                   # (B,) in [0, 1], never times 1000 => (B, 256)
    freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
    angles = t[:, None].float() * freqs
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class Recomputed(nn.Module):
    """A block which, while `checkpointing`, keeps its input alone and computes the rest again in the backward pass."""
    checkpointing = False

    def __call__(self, *args):
        if self.checkpointing and torch.is_grad_enabled():
            return checkpoint(super().__call__, *args, use_reentrant=False, preserve_rng_state=False)
        return super().__call__(*args)


class Block(Recomputed):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.attn = nn.ModuleDict({"qkv": nn.Linear(width, 3 * width), "proj": nn.Linear(width, width)})
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(width, 4 * width), act=nn.GELU("tanh"), fc2=nn.Linear(4 * width, width)))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):            # x (B, T, D), c (B, D)
        B, T, D = x.shape
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift_msa, scale_msa)
        q, k, v = self.attn.qkv(h).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, T, D)    # from (B, heads, T, D / heads)
        x = torch.addcmul(x, gate_msa.unsqueeze(1), self.attn.proj(h))
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift_mlp, scale_mlp)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(h))


def position_table(width, grid):
    """Sin-cos table (1, grid^2, width): first half the column, second half the row; in each half sin, then cos."""
    freqs = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.mgrid[:grid, :grid].reshape(2, -1, 1) * freqs
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return torch.from_numpy(table).float().unsqueeze(0)


class SiT(nn.Module):
    """Ma et al. 2024, with official parameter names. x (B, C, H, W), t (B,) in [0, 1], y (B,) => velocity like x."""
    family, sigmas = "sit", None

    def __init__(self, depth, width, heads, shape, patch, num_classes, learn_sigma=False, null=True):
        super().__init__()
        C, H, _ = shape
        self.shape, self.patch, self.num_classes, self.null, self.classes = tuple(shape), patch, num_classes, null, []
        self.out_channels = 2 * C if learn_sigma else C
        self.x_embedder = nn.ModuleDict({"proj": nn.Conv2d(C, width, patch, stride=patch)})
        self.t_embedder = nn.ModuleDict({"mlp": nn.Sequential(
            nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))})
        self.y_embedder = nn.ModuleDict({"embedding_table": nn.Embedding(num_classes + null, width)})
        self.pos_embed = nn.Parameter(position_table(width, H // patch), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = nn.ModuleDict({"linear": nn.Linear(width, patch * patch * self.out_channels),
                                          "adaLN_modulation": nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))})

    def forward(self, x, t, y):
        B, C, H, W = x.shape
        p = self.patch
        c = self.t_embedder.mlp(time_features(t)) + self.y_embedder.embedding_table(y)                  # (B, D)
        h = self.x_embedder.proj(x).flatten(2).transpose(1, 2).contiguous()         # or all blocks inherit the layout
        h = h + self.pos_embed                                                      # (B, T, D), T = H W / p^2
        for block in self.blocks:
            h = block(h, c)
        shift, scale = self.final_layer.adaLN_modulation(c).chunk(2, dim=1)
        h = self.final_layer.linear(modulate(F.layer_norm(h, h.shape[-1:], eps=1e-6), shift, scale))
        h = h.view(B, H // p, W // p, p, p, self.out_channels)                      # channels innermost
        return h.permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_channels, H, W)[:, :C]   # drop the learned sigma


# ---- EDM2 -----------------------------------------------------------------------------------------------------------

def normalize(x, dim, eps=1e-4):
    """x over its root mean square along `dim`: unit magnitude."""
    return x / (x.square().mean(dim, keepdim=True).sqrt() + eps).to(x.dtype)        # autocast squares in float32


def mp_silu(x):
    """SiLU that keeps unit magnitude. Karras et al. 2024, eq. 81."""
    return F.silu(x).div_(0.596)


def mp_sum(a, b, t):
    """Weighted sum that keeps unit magnitude, eq. 88."""
    return a.lerp(b.to(a.dtype), t).div_(math.hypot(1 - t, t))


def mp_cat(a, b):
    """Concatenation of channels in which both inputs weigh the same, eq. 103 with t = 0.5."""
    half = (a.shape[1] + b.shape[1]) / 2
    return torch.cat([math.sqrt(half / a.shape[1]) * a, math.sqrt(half / b.shape[1]) * b], dim=1)


class MPFourier(nn.Module):
    """Random Fourier features of unit magnitude, eq. 75: (B,) => (B, D)."""
    def __init__(self, width):
        super().__init__()
        self.register_buffer("freqs", 2 * math.pi * torch.randn(width))
        self.register_buffer("phases", 2 * math.pi * torch.rand(width))

    def forward(self, x):
        return math.sqrt(2) * torch.cos(x[:, None] * self.freqs + self.phases)


class MPConv(nn.Module):
    """Convolution, or a linear layer if size is 0, by filters of unit norm: only their direction counts, eq. 66."""
    def __init__(self, cin, cout, size=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, size, size) if size else torch.randn(cout, cin))

    def normalized(self):
        return normalize(self.weight.flatten(1), 1).view_as(self.weight)

    def forward(self, x, gain=None):    # (B, cin, ...) => (B, cout, ...)
        w = self.normalized() / math.sqrt(self.weight[0].numel())
        w = w if gain is None else w * gain
        return x @ w.T if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


@torch.no_grad()
def normalize_filters(model):
    """After an update, as only the direction of EDM2's filters counts; Karras et al. 2024, section 2.3."""
    for m in model.modules():
        if isinstance(m, MPConv) and m.weight.requires_grad:
            m.weight.copy_(m.normalized())


class UNetBlock(Recomputed):
    def __init__(self, cin, cout, cemb, decoder=False, resample="", heads=0):
        super().__init__()
        self.decoder, self.resample, self.heads = decoder, resample, heads
        self.emb_gain = nn.Parameter(torch.zeros([]))
        self.conv_res0 = MPConv(cin if decoder else cout, cout, 3)
        self.emb_linear = MPConv(cemb, cout)
        self.conv_res1 = MPConv(cout, cout, 3)
        self.conv_skip = MPConv(cin, cout, 1) if cin != cout else nn.Identity()
        if heads:
            self.attn_qkv = MPConv(cout, 3 * cout, 1)
            self.attn_proj = MPConv(cout, cout, 1)

    def forward(self, x, emb):          # x (B, cin, H, W), emb (B, cemb) => (B, cout, H, W), after resampling
        if self.resample:
            x = F.avg_pool2d(x, 2) if self.resample == "down" else F.interpolate(x, scale_factor=2)
        if not self.decoder:
            x = normalize(self.conv_skip(x), 1)
        c = self.emb_linear(emb, self.emb_gain) + 1
        y = self.conv_res0(mp_silu(x))
        y = self.conv_res1(mp_silu(y * c[:, :, None, None]))
        x = mp_sum(self.conv_skip(x) if self.decoder else x, y, 0.3)
        if self.heads:
            B, C, H, W = x.shape
            qkv = self.attn_qkv(x).view(B, self.heads, C // self.heads, 3, H * W)       # q, k, v innermost of channels
            q, k, v = normalize(qkv, 2).permute(3, 0, 1, 4, 2).contiguous()             # (B, heads, HW, C / heads)
            y = F.scaled_dot_product_attention(q, k, v).transpose(2, 3).reshape(B, C, H, W)
            x = mp_sum(x, self.attn_proj(y), 0.3)
        return x.clamp(-256, 256)


class UNet(nn.Module):
    def __init__(self, img_resolution, img_channels, label_dim, model_channels=192, channel_mult=(1, 2, 3, 4),
                 channel_mult_noise=None, channel_mult_emb=None, num_blocks=3, attn_resolutions=(16, 8),
                 channels_per_head=64):
        super().__init__()
        widths = [model_channels * m for m in channel_mult]
        cnoise = model_channels * (channel_mult_noise or channel_mult[0])
        cemb = model_channels * (channel_mult_emb or max(channel_mult))
        names = [f"{img_resolution >> level}x{img_resolution >> level}_" for level in range(len(widths))]
        heads = [width // channels_per_head if img_resolution >> level in attn_resolutions else 0
                 for level, width in enumerate(widths)]
        self.label_dim = label_dim
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim else None

        # Encoder: what every layer returns is kept as a skip connection.
        self.enc, channels, skips = nn.ModuleDict(), widths[0], []
        for level, width in enumerate(widths):
            if level == 0:
                self.enc[names[level] + "conv"] = MPConv(img_channels + 1, channels, 3)
            else:
                self.enc[names[level] + "down"] = UNetBlock(channels, channels, cemb, resample="down")
            skips.append(channels)
            for i in range(num_blocks):
                self.enc[names[level] + f"block{i}"] = UNetBlock(channels, width, cemb, heads=heads[level])
                channels = width
                skips.append(channels)

        # Decoder: from the lowest resolution up; every block takes one skip connection, the last kept first.
        self.dec = nn.ModuleDict()
        for level in reversed(range(len(widths))):
            if level == len(widths) - 1:
                self.dec[names[level] + "in0"] = UNetBlock(channels, channels, cemb, decoder=True,
                                                           heads=channels // channels_per_head)
                self.dec[names[level] + "in1"] = UNetBlock(channels, channels, cemb, decoder=True)
            else:
                self.dec[names[level] + "up"] = UNetBlock(channels, channels, cemb, decoder=True, resample="up")
            for i in range(num_blocks + 1):
                self.dec[names[level] + f"block{i}"] = UNetBlock(channels + skips.pop(), widths[level], cemb,
                                                                 decoder=True, heads=heads[level])
                channels = widths[level]
        self.out_conv = MPConv(channels, img_channels, 3)

    def forward(self, x, noise, y):
        emb = self.emb_noise(self.emb_fourier(noise))
        if self.label_dim:              # the null class is a row of zeros
            label = F.one_hot(y, self.label_dim + 1)[:, :-1].to(x.dtype) * math.sqrt(self.label_dim)
            emb = mp_sum(emb, self.emb_label(label), 0.5)
        emb, skips = mp_silu(emb), []
        x = torch.cat([x, torch.ones_like(x[:, :1])], dim=1).contiguous(memory_format=torch.channels_last)  # faster
        for block in self.enc.values():
            x = block(x, emb) if isinstance(block, UNetBlock) else block(x)
            skips.append(x)
        for name, block in self.dec.items():
            x = block(mp_cat(x, skips.pop()) if "block" in name else x, emb)
        return self.out_conv(x, self.out_gain)


class EDM2(nn.Module):
    """Karras et al. 2024, with official parameter names. x (B, C, H, W), sigma (B,), y (B,) => denoised like x."""
    family = "edm2"

    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5, logvar_channels=128,
                 sigmas=(0.002, 80.0), dropout=0, use_fp16=False, **unet):      # those two: of training, of GPUs
        super().__init__()
        self.init_kwargs = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                                sigma_data=sigma_data, logvar_channels=logvar_channels, sigmas=sigmas, **unet)
        # Samplers begin their last and their first step at the noise levels sigmas, which official files do not tell.
        self.shape, self.sigmas = (img_channels, img_resolution, img_resolution), sigmas
        self.num_classes, self.sigma_data = label_dim or 1, sigma_data      # without labels all images are of one class
        self.null, self.classes = label_dim > 0, []
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet)
        self.logvar_fourier = MPFourier(logvar_channels)                    # kept for the file, used by nothing here
        self.logvar_linear = MPConv(logvar_channels, 1).requires_grad_(False)

    def forward(self, x, sigma, y):
        s, sd = sigma.view(-1, 1, 1, 1), self.sigma_data
        total = (s**2 + sd**2).sqrt()       # all in float32: the official code rounds float16 gains, by up to 1e-4
        return (sd / total)**2 * x + s * sd / total * self.unet(x / total, sigma.log() / 4, y)


# ---- VAE decoder ----------------------------------------------------------------------------------------------------

def read_vae(path):
    """The decoder's tensors {name: float32} in a diffusers AutoencoderKL (SD-VAE) file; exit code 1 if it is none."""
    state, w = read_checkpoint(path), {}
    spelling = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    with reading(path, "is not an SD-VAE decoder"):
        for name, x in state.items():
            if name.startswith(("decoder.", "post_quant_conv.")):
                name = ".".join(spelling.get(word, word) for word in name.split("."))
                w[name] = x.float().flatten(1) if ".to_" in name and x.dim() == 4 else x.float()
        vae_decode(w, torch.zeros(1, 4, 2, 2))
        count = sum("conv_shortcut" not in name for name in w)
        if count != 136:
            raise ValueError(f"{count} tensors beside the shortcuts, not 136")
    return w


def vae_decode(w, z):
    """Rombach et al. 2022: the decoder of tensors w by name, raw latents (B, 4, h, w) => images (B, 3, 8h, 8w)."""
    def get(name):
        return w[f"{name}.weight"], w[f"{name}.bias"]

    def conv(name, x):
        weight, bias = get(name)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2)

    def norm(name, x):
        return F.group_norm(x, 32, *get(name), eps=1e-6)

    def resnet(name, x):
        h = conv(f"{name}.conv1", F.silu(norm(f"{name}.norm1", x)))
        h = conv(f"{name}.conv2", F.silu(norm(f"{name}.norm2", h)))
        return h + (conv(f"{name}.conv_shortcut", x) if f"{name}.conv_shortcut.weight" in w else x)

    def attention(name, x):                 # one head over all positions
        h = norm(f"{name}.group_norm", x).flatten(2).transpose(1, 2)                    # (B, h w, C)
        h = F.scaled_dot_product_attention(*(F.linear(h, *get(f"{name}.to_{k}"))[:, None] for k in "qkv"))[:, 0]
        return x + F.linear(h, *get(f"{name}.to_out.0")).transpose(1, 2).reshape(x.shape)

    x = conv("decoder.conv_in", conv("post_quant_conv", z))
    x = attention("decoder.mid_block.attentions.0", resnet("decoder.mid_block.resnets.0", x))
    x = resnet("decoder.mid_block.resnets.1", x)
    for i in range(4):
        for j in range(3):
            x = resnet(f"decoder.up_blocks.{i}.resnets.{j}", x)
        if i < 3:
            x = conv(f"decoder.up_blocks.{i}.upsamplers.0.conv", F.interpolate(x, scale_factor=2.0))
    return conv("decoder.conv_out", F.silu(norm("decoder.conv_norm_out", x)))


# What a family was trained on: VAE; raw latents = x / scale + mean, per channel; uint8 = trunc(gain image + offset).
# guided: the latent channels that guidance reaches. SiT's own code guides 3 of 4, and its published FIDs are of that.
LATENTS = {
    "sit": dict(vae="stabilityai/sd-vae-ft-ema", scale=[0.18215], mean=[0.0], gain=127.5, offset=128, guided=3),
    "edm2": dict(vae="stabilityai/sd-vae-ft-mse", scale=[0.5 / std for std in (4.17, 4.62, 3.71, 3.28)],
                 mean=[5.81, 3.25, 0.12, -2.15], gain=255, offset=0, guided=4),
}


def attach_vae(model, path):
    """Give the model its decoder, model.vae: latents (B, 4, h, w) => float32 images (B, 3, 8h, 8w) from 0 to 255."""
    if model.shape[0] == 3:
        if path:
            fail(f"--vae={path}: the model draws pixels and needs no VAE decoder; leave it out")
        return model
    if model.shape[0] != 4:
        fail(f"the model draws {model.shape[0]} channels; needed are 3 (pixels) or the 4 latents of an SD-VAE", code=1)
    convention = LATENTS[model.family]
    if not path:
        fail(f"the model draws latents; name its decoder with --vae: diffusion_pytorch_model.safetensors of "
             f"{convention['vae']}")
    device = next(model.parameters()).device
    w = half = {name: x.to(device) for name, x in read_vae(path).items()}
    if device.type == "cuda":               # to draw; lab/bench.py counts the uint8 values that differ
        half = {name: halved(x) for name, x in w.items()}
    scale, mean = (torch.tensor(convention[k], device=device).view(1, -1, 1, 1) for k in ("scale", "mean"))

    def vae(x):
        chunk = max(1, 2**13 // x[0, 0].numel())        # 8 images of 256 px in one pass: some 2 GB
        own = w if torch.is_grad_enabled() else half
        with torch.backends.cudnn.flags(enabled=True, benchmark=not torch.are_deterministic_algorithms_enabled(),
                                        allow_tf32=torch.backends.cudnn.allow_tf32):
            images = torch.cat([vae_decode(own, (part / scale + mean).to(own["post_quant_conv.bias"])).float()
                                for part in x.float().split(chunk)])
        return (convention["gain"] * images + convention["offset"]).clamp(0, 255)

    model.vae = vae                         # a function, not a module: neither trained nor saved
    return model


def halved(x):
    """A decoder's tensor in float16, filters with channels last."""
    return x.half().contiguous(memory_format=torch.channels_last if x.dim() == 4 else torch.contiguous_format)


def image_size(model):
    """Pixels along a side of the model's images; a latent stands for 8 x 8 of them."""
    return model.shape[-1] * (1 if model.shape[0] == 3 else 8)


# ---- Load and save --------------------------------------------------------------------------------------------------

def one_line(error):
    """What an exception says, in one line of at most 200 characters."""
    return " ".join(str(error).split())[:200]


@contextmanager
def reading(path, trouble=""):
    """Whatever a damaged file raises ends the script with one line and exit code 1."""
    trouble = trouble or f"is not a readable {os.path.splitext(path)[1].lower() or 'folder'}"
    try:
        yield
    except Exception as e:
        asked = re.search(r"GLOBAL (\S+)", str(e))
        reason = f"it asks for {asked[1]!r}, which is not run" if asked else one_line(e) or type(e).__name__
        fail(f"{path} {trouble}: {f'it has no {e}' if isinstance(e, KeyError) else reason}", code=1)


def read_safetensors(path):
    """{name: tensor} of a .safetensors file: 8 bytes length, JSON {name: {dtype, shape, data_offsets}}, raw data."""
    types = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, BOOL=torch.bool,
                 I64=torch.int64, I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8)
    tensors, end = {}, 0
    with reading(path, "is not a whole .safetensors file"):
        file = np.memmap(path, mode="r")    # a slice ends with the file, whatever length is asked for
        length = int.from_bytes(file[:8].tobytes(), "little")
        header, data = json.loads(file[8:8 + length].tobytes()), file[8 + length:]
        header.pop("__metadata__", None)
        for first, last, name in sorted((*entry["data_offsets"], name) for name, entry in header.items()):
            dtype, shape = types[header[name]["dtype"]], header[name]["shape"]
            if first != end or last > len(data) or last - first != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"bytes {first} to {last} of {len(data)} are not {name}")
            tensors[name], end = torch.tensor(data[first:last]).view(dtype).view(shape), last
        if end != len(data):
            raise ValueError(f"tensors of {end} bytes, data of {len(data)}")
    return tensors


def read_checkpoint(path):
    """The dict in a .pt, .bin or .safetensors file; no code is run. Exit code 2 if there is no file, 1 if damaged."""
    if not os.path.isfile(path):
        fail(f"no checkpoint {path!r}; needed: a .pt, .pkl or .safetensors file, or the name of one in {ASSETS}")
    if str(path).lower().endswith(".safetensors"):
        return read_safetensors(path)
    # SiT's train.py keeps its arguments, others keep arrays of numpy, whose module of _reconstruct has two names.
    make = np.zeros(1).__reduce__()[0]
    known = [argparse.Namespace, np.ndarray, np.dtype, *(type(np.dtype(kind)) for kind in "f8 f4 f2 i8 i4 u1".split()),
             *((make, f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core"))]
    with reading(path, "is not a PyTorch checkpoint of tensors alone"), torch.serialization.safe_globals(known):
        return torch.load(path, map_location="cpu", weights_only=True)


class SafeUnpickler(pickle._Unpickler):     # the one in C allocates gigabytes for a wrong byte
    """Reads what official .pkl files hold and runs no code; any other global is an UnpicklingError with its name."""
    def find_class(self, module, name):     # what is called in its place, made anew, as a file may change it
        class Stored(dict):                 # a dtype, or one of torch's own modules
            def __setstate__(self, state):
                self["state"] = state

        class Array(np.ndarray):
            def __setstate__(self, state):
                _, shape, dtype, fortran, data = state
                kind, order = dtype["kind"], dtype["state"][1]
                lone = kind == "O8" and shape == ()                     # how numpy saves a dict
                if not lone and not re.fullmatch(r"[<|]([fiu][1248]|b1)", order + kind):
                    raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({kind!r})")
                super().__setstate__((1, shape, np.dtype(kind), fortran, list(data) if lone else data))

        def tensor(stored, offset, size, stride, *rest):
            flat = torch.empty(0, dtype=stored.dtype).set_(stored.untyped())
            if math.prod(size) > len(flat):                             # strides of 0 would be a way to gigabytes
                raise ValueError(f"a tensor of shape {tuple(size)} from {len(flat)} values")
            return flat.as_strided(size, stride, offset)

        storage = lambda data: torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        first = lambda thing, *rest: thing
        dtype = lambda kind, *flags: Stored(kind=kind)
        array = lambda *args: np.ndarray.__new__(Array, (0,), np.uint8)
        known = {
            "collections.OrderedDict": dict, "dnnlib.util.EasyDict": dict, "numpy.ndarray": None, "numpy.dtype": dtype,
            "numpy.core.multiarray._reconstruct": array, "numpy._core.multiarray._reconstruct": array,
            "torch.nn.modules.container.ModuleDict": Stored, "torch.nn.modules.container.ModuleList": Stored,
            "torch.nn.parameter.Parameter": Stored, "torch_utils.persistence._reconstruct_persistent_obj": first,
            "torch._utils._rebuild_parameter": first, "torch._utils._rebuild_parameter_with_state": first,
            "torch._utils._rebuild_tensor_v2": tensor, "torch.storage._load_from_bytes": storage}
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return known[f"{module}.{name}"]


def read_pickle(path):
    """What is in an official .pkl (a network of EDM2, statistics); an object is a dict with its state. Runs no code."""
    with reading(path, "is refused"), open(path, "rb") as f, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return SafeUnpickler(f).load()


def tensors_in(tree, depth):
    """{a.b.c: tensor} of the tensors in dicts within a dict, so many levels down."""
    found = {str(k): x for k, x in tree.items() if isinstance(x, torch.Tensor)}
    for k, inner in tree.items():
        if isinstance(inner, dict) and depth:
            found.update({f"{k}.{name}": x for name, x in tensors_in(inner, depth - 1).items()})
    return found


def stored_parts(path):
    """The dict in a checkpoint, its weights (of several sets the averaged one) as ema: {official name: tensor}."""
    asset = os.path.join(ASSETS, f"{path or 'sit-tiny'}.pt")
    path = asset if os.path.isfile(asset) else path
    pickled = path.lower().endswith(".pkl")
    parts = read_pickle(path) if pickled else read_checkpoint(path)
    with reading(path, "holds no EDM2 network" if pickled else "is no SiT or EDM2 of this version"):
        if pickled:
            parts["init_kwargs"] = parts["ema"]["state"]["_init_kwargs"]
        # Whatever is before the network's own names is a wrapper's: {model, ema}, {state_dict}, {ema: {module}}.
        flat = tensors_in(parts, 20 if pickled else 2) if isinstance(parts, dict) else {}
        flat = {re.sub(r"\b(state|_modules|_parameters|_buffers)\.", "", k): x for k, x in flat.items()}
        prefixes = [k.removesuffix(own) for k in flat for own in ("x_embedder.proj.weight", "unet.out_gain")
                    if k == own or k.endswith("." + own)]
        if not prefixes:
            raise ValueError("needed is a dict of their tensors")
    averaged = lambda name: re.search(r"(^|[._])ema", str(name)) is not None
    prefix = min(prefixes, key=lambda prefix: (not averaged(prefix), len(prefix)))
    if not averaged(prefix) and any(map(averaged, parts)):
        note(f"{path} has averaged weights in a form unknown here; those of {prefix.rstrip('.')!r} are used")
    own = [k for k in flat if k.startswith(prefix) and not k.startswith(prefix + "projectors.")]     # REPA trains those
    return dict(parts, ema={k.removeprefix(prefix): flat[k] for k in own})


def load(path="", device="cpu", heads=0, classes=0):
    """
    A model in eval mode from '' (the tiny base), a name in assets/, an official SiT .pt or EDM2 .pkl, one of ours, or a
    .safetensors: .family, .shape (C, H, W), .num_classes, .null (num_classes is the null label), .classes (names).
    heads, classes: what a SiT's file does not tell, or wrongly. Exit code 2 if there is no file, 1 if it is no network.
    """
    parts = stored_parts(path)
    state, sizes = parts["ema"], parts.get("init_kwargs")
    with reading(path, "is no SiT or EDM2 of this version"):
        if sizes and sizes.get("num_blocks", 3) > len(state):
            raise ValueError(f"num_blocks {sizes['num_blocks']} for {len(state)} tensors")
        with torch.device("meta"):          # no memory until all shapes are known to fit
            model = EDM2(**sizes) if sizes else sit_like(parts, heads, classes)
        model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
        broken = [k for k, v in state.items() if not v.isfinite().all()]
        if broken:
            raise ValueError(f"NaN or infinite values in {broken[0]}")
        model.classes = [str(k) for k in parts.get("classes") or []]
    return model.to(device).eval()


def sit_like(parts, heads, classes):
    """A SiT whose sizes are those of the tensors in a checkpoint's parts; heads, classes: as load()'s."""
    state, args = parts["ema"], {}
    for found in (parts.get(key) for key in ("config", "hyper_parameters", "args")):
        args |= vars(found) if isinstance(found, argparse.Namespace) else found if isinstance(found, dict) else {}
    path, prediction = str(args.get("path_type") or "Linear"), str(args.get("prediction") or "velocity")
    if path.lower() != "linear" or prediction.lower() not in ("velocity", "v"):
        raise ValueError(f"its args say path {path} and prediction {prediction}; needed are Linear and velocity")
    width, C, patch, _ = state["x_embedder.proj.weight"].shape
    side = math.isqrt(state["pos_embed"].shape[1]) * patch
    learn_sigma = state["final_layer.linear.weight"].shape[0] == 2 * patch**2 * C
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    heads = heads or parts.get("heads") or {w: h for _, w, h in SIT_SIZES.values()}.get(width, 0)
    if heads < 1 or width % heads:
        raise ValueError(f"{heads or 'nothing tells the'} heads for width {width}; add --heads")
    labels = state["y_embedder.embedding_table.weight"].shape[0]
    told = int(classes or args.get("num_classes") or parts.get("num_classes") or max(1, labels - 1))
    if told not in (labels, labels - 1) and (classes or labels > 1):
        raise ValueError(f"its table has {labels} labels, neither {told} classes nor {told} and a null class; add "
                         f"--classes {labels - 1}, or {labels} if there is no null class")
    told = min(told, labels)                            # of a single label the args of an official file still say 1000
    return SiT(depth, width, heads, (C, side, side), patch, told, learn_sigma, null=told < labels)


def writable(path):
    """Make the folder of an output file before the work; exit code 2 if the file cannot be written there."""
    folder = os.path.dirname(os.path.abspath(path))
    with suppress(OSError):
        os.makedirs(folder, exist_ok=True)
        if os.access(folder, os.W_OK) and (os.path.isfile(path) or not os.path.exists(path)):
            return
    fail(f"cannot write {path}: needed is a file name in a folder that can be written to")


@contextmanager
def whole(path, previous=""):
    """A binary file that becomes `path` when all of it is on the disk; the old one becomes `previous`, or goes."""
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
        with open(path + ".part", "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())
        if previous and os.path.exists(path):
            os.replace(path, previous)
        os.replace(path + ".part", path)
    except (OSError, RuntimeError) as e:    # torch's writer turns a full disk into a RuntimeError
        fail(f"cannot write {path} ({one_line(e)}); what was there before is whole", code=1)
    finally:                                # also of a signal, which leaves by SystemExit
        with suppress(OSError):
            os.remove(path + ".part")


def save(path, model, dtype=None, **extra):
    """Write what load() and SiT's own code (under 'ema') read; dtype torch.float16 halves all but the buffers."""
    params = dict(model.named_parameters())
    state = {k: v.to(dtype if dtype and k in params else v.dtype) for k, v in model.state_dict().items()}
    sizes = dict(init_kwargs=model.init_kwargs) if model.family == "edm2" else dict(
        heads=model.blocks[0].heads, num_classes=model.num_classes)
    with whole(path) as f:
        torch.save(dict(ema=state, classes=model.classes, **sizes, **extra), f)


# ---- What every script shares: command line, process group, printing ------------------------------------------------

def fail(message, code=2):
    """End the script with one line on stderr. Code 2: the command line is wrong, said once a node; 1: data are."""
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        message = "".join(c if c.isprintable() else "?" for c in message)
        tqdm.write(f"error: {message}", file=sys.stderr)        # above a progress bar, not behind it
    raise SystemExit(code)


class Config(dict):
    """Options by name, config.lr, of which config.given were named on the command line."""
    def __getattr__(self, name):
        if name not in self:
            raise AttributeError(name)
        return self[name]


def configure(namespace, argv):
    """The Config of a script: lines `name = value # note` between its first two rule lines, and the command line."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        block = re.split(r"^# -{70,}$", f.read(), flags=re.M)[1]
    notes = dict(re.findall(r"^(\w+) = .*?(?:  ?# (.*))?$", block, flags=re.M))
    defaults = {name: namespace[name] for name in notes}
    # expanduser: the shell leaves the ~ of --real=~/images as it is
    truth = {"true": True, "1": True, "false": False, "0": False}
    kinds = {int: dict(type=int), float: dict(type=float), str: dict(type=os.path.expanduser), list: dict(nargs="*"),
             bool: dict(type=lambda word: truth.get(word.lower(), word), choices=(True, False), nargs="?", const=True)}
    parser = argparse.ArgumentParser(description=namespace["__doc__"], argument_default=argparse.SUPPRESS,
                                     usage=argparse.SUPPRESS, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: fail(f"{message.removeprefix('argument ')}; --help lists the options")
    for name, default in defaults.items():
        told = f"{notes[name]} (default: {default})".replace("%", "%%")
        parser.add_argument(f"--{name}", help=told, **kinds[type(default)])
    given = vars(parser.parse_args(argv))
    for name, value in given.items():
        if isinstance(value, list):         # --name a b c, or --name=a,b,c
            given[name] = [os.path.expanduser(part) for word in value for part in word.split(",") if part]
        if isinstance(value, float) and not math.isfinite(value):
            fail(f"{name} {value}: needed is a finite number")
    config = Config(defaults | given)
    config.given = set(given)
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0" and "resume" in config:
        config["resume"] = True             # torchrun --max_restarts resumes by itself
    if not 0 <= config.get("seed", 0) < 2**63:
        fail(f"seed {config.seed}: needed is a number that is not negative, below 2^63")
    return config


def take_preset(c, presets):
    """Options of --preset that were not given, printed as the flags they stand for."""
    if c.preset and c.preset not in presets:
        fail(f"unknown preset {c.preset!r}; choose {' or '.join(presets)}")
    chosen = {name: value for name, value in presets.get(c.preset, {}).items() if name not in c.given}
    c.update(chosen)
    if chosen:
        flags = [f"--{k}={','.join(v) if isinstance(v, list) else str(v).lower()}" for k, v in chosen.items()]
        print0(f"--preset={c.preset} stands for {' '.join(flags)}")


def listed(names):
    """Names in one line: all, or the first ten and the last."""
    return ", ".join(map(str, names if len(names) <= 12 else [*names[:10], "..", names[-1]]))


def newest_run(folder):
    """The highest N of the folders run-N into which move_aside() has moved runs; 0 if there is none."""
    return max((int(name[4:]) for name in os.listdir(folder or ".") if re.fullmatch(r"run-\d+", name)), default=0)


def move_aside(folder, names):
    """Before a new run writes in a folder: the files `names` (globs) of a run before move to a new run-N, by rank 0."""
    found = [path for name in names for path in glob.glob(os.path.join(glob.escape(folder), name))]
    if found and dist.get_rank() == 0:
        aside = os.path.join(folder, f"run-{newest_run(folder) + 1}")
        os.mkdir(aside)
        for path in found:
            os.replace(path, os.path.join(aside, os.path.basename(path)))
        print0(f"{folder or '.'} held a run before, now in {aside}")
    dist.barrier()


def moved(path, folder):
    """Where a file of the folder is now: in the newest run-N, if move_aside() has put it there, else where it was."""
    aside = os.path.join(folder, f"run-{newest_run(folder)}", os.path.basename(path))
    inside = os.path.abspath(os.path.dirname(path)) == os.path.abspath(folder)
    return aside if inside and os.path.isfile(aside) else path


class Stop(ContextDecorator):
    """Signals and a lack of memory end the script with one line; while .patient, the first only sets .number."""
    def __init__(self, then="", smaller="--batch_size"):
        self.then, self.smaller = then, smaller

    def __enter__(self):
        self.number, self.patient = 0, False
        self.before = {number: signal.signal(number, self.came) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "DefaultCPUAllocator" in str(error):
            fail(f"out of memory ({one_line(error) or kind.__name__}); lower {self.smaller}", code=1)

    def came(self, number, frame):
        if not self.patient or self.number:
            fail(f"stopped by {signal.Signals(number).name}{self.then}", code=128 + number)
        self.number = number


def setup():
    """
    Rank, world size, device. Under torchrun its process group; alone a group of one, so collectives just work. On a GPU
    networks draw and learn in TF32, as SiT's own code; see exact().
    """
    if not dist.is_initialized():
        store, rank, world = dist.HashStore(), 0, 1
        if "RANK" in os.environ:            # a restart must not find the addresses of those who died
            store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
            store = dist.PrefixStore("restart " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
        atexit.register(dist.destroy_process_group)         # else gloo's threads may abort at exit, as they do
        atexit.register(time.sleep, 0.2 * (world > 1))      # if one still holds the last result when Python ends
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    return dist.get_rank(), dist.get_world_size(), device


@contextmanager
def exact(benchmark=False):
    """
    What is measured: products in float32 on a GPU too, where TF32 would cost FID its third digit. benchmark: ways to
    convolve are tried out, once for every shape, and the fastest is kept.
    """
    matmul, benchmark = torch.backends.cuda.matmul, benchmark and not torch.are_deterministic_algorithms_enabled()
    before, matmul.allow_tf32 = matmul.allow_tf32, False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=benchmark, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


def gather(x, total):
    """Rows of all ranks in one tensor, on every rank: row i of the result is row i // world of rank i % world."""
    world = dist.get_world_size()
    padded = x.new_zeros(-(-total // world), *x.shape[1:])
    padded[:len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def print0(text):
    """Print on rank 0 only; a ? for what the screen cannot show, as names of files may hold anything."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        encoding = sys.stdout.encoding or "utf-8"
        tqdm.write(text.encode(encoding, "replace").decode(encoding))       # above a progress bar
        sys.stdout.flush()


@lru_cache(maxsize=None)
def note(text):
    """Print a note on rank 0, once, however often it comes up."""
    print0(f"note: {text}")
