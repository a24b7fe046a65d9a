"""
Everything with weights: SiT, EDM2, the VAE decoder, the tiny world (procedural images, tiny configurations, tiny
feature networks and the training of them all), loading and saving, and, in the last section, the plumbing that every
script shares.

python models.py                                                # all of assets/ again: feature nets, both bases (hours)
python models.py --only=base --family=edm2                      # the tiny EDM2
python models.py --real FOLDER --out base.pt --minutes 10       # a tiny base for your own images
python models.py --ckpt sit-tiny --out more.pt --minutes 3      # more pre-training, the plainest rival of RL

Left out on purpose: dropout, mixed precision (slower on a CPU at this size), torch.compile (a minute to warm up).
"""
import argparse
import atexit
import colorsys
import copy
import difflib
import glob
import hashlib
import http.client
import io
import itertools
import json
import math
import os
import pickle
import posixpath
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import unicodedata
import warnings
import zipfile
from collections import Counter
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import lru_cache
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

try:
    import resource
except ImportError:                     # Windows has none
    resource = None

# -----------------------------------------------------------------------------
real = "tiny" # images to train on: "tiny" (the procedural world), or a folder or zip of images
out = "assets" # folder for all tiny assets; with --real FOLDER or --ckpt a file, for example base.pt
ckpt = "" # continue from this checkpoint, asset or our own base, instead of from scratch
heads = 0 # attention heads of --ckpt, a SiT whose file does not tell; 0: as the file says, or official for its width
classes = 0 # classes of --ckpt, a SiT; 0: as its file says, else all rows of its table but one, the null class
family = "" # network of a new base: sit, edm2; empty: one after the other (tiny world), sit (a folder)
minutes = 0.0 # train a base for this long; 0: for `images` (tiny world), 10 minutes (a folder)
images = 0 # images seen in pre-training, unless minutes says otherwise; 0: 6 M for SiT, 1.6 M for EDM2
batch_size = 0 # images per pre-training update; 0: 256 for SiT, 128 for EDM2
lr = 0.0 # Adam; 0: 6e-3 for SiT, 1e-2 for EDM2
lr_matrices = 0.02 # Muon, for the matrices of SiT's blocks
lr_knee = 500_000 # images after which both learning rates fall as 1/sqrt(images)
resume = False # go on from the state beside the base (OUT.state), perhaps with more --images or --minutes
only = "all" # which assets to make: all, features, base
seed = 0 # weights, order of images, noise
# -----------------------------------------------------------------------------

ASSETS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "assets")


# ---- SiT ------------------------------------------------------------------------------------------------------------

SIT_SIZES = {"S": (12, 384, 6), "B": (12, 768, 12), "L": (24, 1024, 16), "XL": (28, 1152, 16), "tiny": (4, 64, 4)}


def modulate(x, shift, scale):          # x (B, T, D); shift, scale (B, D)
    return torch.addcmul(shift.unsqueeze(1), x, 1 + scale.unsqueeze(1))


class TimeEmbedding(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):               # (B,) in [0, 1], never times 1000 => (B, D)
        freqs = torch.exp(-math.log(10000) * torch.arange(128, device=t.device) / 128)
        angles = t[:, None].float() * freqs
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=1))


class LabelEmbedding(nn.Module):
    def __init__(self, rows, width):
        super().__init__()
        self.embedding_table = nn.Embedding(rows, width)                # the last row is the null class of guidance

    def forward(self, y):               # (B,) int64 => (B, D)
        return self.embedding_table(y)


class PatchEmbedding(nn.Module):
    def __init__(self, patch, channels, width):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, patch, stride=patch)

    def forward(self, x):               # (B, C, H, W) => (B, T, D), T = H W / patch^2
        return self.proj(x).flatten(2).transpose(1, 2).contiguous()    # or all blocks inherit the layout


class Attention(nn.Module):
    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        B, T, D = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.heads, D // self.heads).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(q, k, v)                     # (B, heads, T, D / heads)
        return self.proj(x.transpose(1, 2).reshape(B, T, D))


FUSED_GELU = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


class MLP(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        drawing = not torch.is_grad_enabled() and not torch.is_autocast_enabled("cpu")
        if drawing and x.device.type == "cpu" and x.dtype == torch.float32 and FUSED_GELU:
            # oneDNN's GELU within the matrix product: the tiny network draws 13 to 27 % faster
            h = torch.ops.mkldnn._linear_pointwise(x, self.fc1.weight, self.fc1.bias, "gelu", [], "tanh")
        else:
            h = F.gelu(self.fc1(x), approximate="tanh")
        return self.fc2(h)


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
        self.attn = Attention(width, heads)
        self.mlp = MLP(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):            # x (B, T, D), c (B, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift_msa, scale_msa)
        x = torch.addcmul(x, gate_msa.unsqueeze(1), self.attn(h))
        h = modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift_mlp, scale_mlp)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.mlp(h))


class FinalLayer(nn.Module):
    def __init__(self, width, patch, channels):
        super().__init__()
        self.linear = nn.Linear(width, patch * patch * channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x, c):
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=1)
        return self.linear(modulate(F.layer_norm(x, x.shape[-1:], eps=1e-6), shift, scale))


def position_table(width, grid):
    """Sin-cos table (1, grid^2, width): first half the column, second half the row; in each half sin, then cos."""
    freqs = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = np.mgrid[:grid, :grid].reshape(2, -1, 1) * freqs
    table = np.concatenate([np.sin(columns), np.cos(columns), np.sin(rows), np.cos(rows)], axis=1)
    return torch.from_numpy(table).float().unsqueeze(0)


class SiT(nn.Module):
    """
    Ma et al. 2024, with official parameter names. x (B, C, H, W), t (B,) in [0, 1], y (B,) => velocity like x.
    null: whether label num_classes is the null class, which guidance needs. classes: their names, if known.
    """
    family, sigmas = "sit", None

    def __init__(self, depth, width, heads, shape, patch, num_classes, learn_sigma=False, null=True):
        super().__init__()
        C, H, _ = shape
        self.shape, self.patch, self.num_classes, self.null, self.classes = tuple(shape), patch, num_classes, null, []
        self.out_channels = 2 * C if learn_sigma else C
        self.x_embedder = PatchEmbedding(patch, C, width)
        self.t_embedder = TimeEmbedding(width)
        self.y_embedder = LabelEmbedding(num_classes + null, width)
        self.pos_embed = nn.Parameter(position_table(width, H // patch), requires_grad=False)
        self.blocks = nn.ModuleList([Block(width, heads) for _ in range(depth)])
        self.final_layer = FinalLayer(width, patch, self.out_channels)

    def forward(self, x, t, y):
        B, C, H, W = x.shape
        p = self.patch
        c = self.t_embedder(t) + self.y_embedder(y)                     # (B, D)
        h = self.x_embedder(x) + self.pos_embed                         # (B, T, D)
        for block in self.blocks:
            h = block(h, c)
        h = self.final_layer(h, c).view(B, H // p, W // p, p, p, self.out_channels)     # channel innermost
        return h.permute(0, 5, 1, 3, 2, 4).reshape(B, self.out_channels, H, W)[:, :C]   # drop the learned sigma


def init_sit(model):
    """The official initialisation: Xavier, zero modulation and final layer, so that a block starts as identity."""
    for m in model.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)
    nn.init.xavier_uniform_(model.x_embedder.proj.weight.view(model.x_embedder.proj.weight.shape[0], -1))
    nn.init.zeros_(model.x_embedder.proj.bias)
    for w in (model.y_embedder.embedding_table.weight, model.t_embedder.mlp[0].weight, model.t_embedder.mlp[2].weight):
        nn.init.normal_(w, std=0.02)
    for layer in [b.adaLN_modulation[1] for b in model.blocks] + [model.final_layer.adaLN_modulation[1],
                                                                  model.final_layer.linear]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


# ---- EDM2 -----------------------------------------------------------------------------------------------------------

EDM2_TINY = dict(img_resolution=16, img_channels=3, label_dim=10, model_channels=8, channel_mult=[1, 2, 4],
                 channel_mult_noise=4, num_blocks=1, attn_resolutions=[4], channels_per_head=16, sigmas=[0.1, 10.0])


def normalize(x, dim, eps=1e-4):
    """x over its root mean square along `dim`: unit magnitude."""
    return x / (x.square().mean(dim, keepdim=True).sqrt() + eps)


def mp_silu(x):
    """SiLU that keeps unit magnitude. Karras et al. 2024, eq. 81."""
    return F.silu(x).div_(0.596)


def mp_sum(a, b, t):
    """Weighted sum that keeps unit magnitude, eq. 88."""
    return a.lerp(b, t).div_(math.hypot(1 - t, t))


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
    """
    Convolution, or a linear layer if size is 0, by filters of unit norm: only a weight's direction counts, eq. 66.
    Without gradients the filters are computed once for each value of the weight. Its version tells of every write but
    one through .data, its sum of that one as well, so that a stale filter cannot be met.
    """
    def __init__(self, cin, cout, size=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(cout, cin, size, size) if size else torch.randn(cout, cin))
        self.seen, self.kept = None, None

    def normalized(self):
        return normalize(self.weight.flatten(1), 1).view_as(self.weight)

    def filters(self):
        w = self.weight
        if torch.is_grad_enabled() and w.requires_grad:
            return self.normalized() / math.sqrt(w[0].numel())
        now = w._version, w.dtype, w.device, w.sum().item()
        if now != self.seen:
            self.seen, self.kept = now, self.normalized() / math.sqrt(w[0].numel())
        return self.kept

    def forward(self, x, gain=None):    # (B, cin, ...) => (B, cout, ...)
        w = self.filters() if gain is None else self.filters() * gain
        return x @ w.T if w.dim() == 2 else F.conv2d(x, w, padding=w.shape[-1] // 2)


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
            q, k, v = normalize(qkv, 2).permute(3, 0, 1, 4, 2)                          # (B, heads, HW, C / heads)
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
        self.label_dim = label_dim
        self.out_gain = nn.Parameter(torch.zeros([]))
        self.emb_fourier = MPFourier(cnoise)
        self.emb_noise = MPConv(cnoise, cemb)
        self.emb_label = MPConv(label_dim, cemb) if label_dim else None
        self.enc, self.dec = nn.ModuleDict(), nn.ModuleDict()
        levels = [(f"{R}x{R}_", width, width // channels_per_head if R in attn_resolutions else 0)
                  for R, width in ((img_resolution >> k, width) for k, width in enumerate(widths))]
        x, skips = widths[0], []                                        # x: the number of channels so far
        for level, width, heads in levels:
            first = UNetBlock(x, x, cemb, resample="down") if self.enc else MPConv(img_channels + 1, x, 3)
            self.enc[level + ("down" if self.enc else "conv")] = first
            skips.append(x)
            for i in range(num_blocks):
                self.enc[f"{level}block{i}"] = UNetBlock(x, width, cemb, heads=heads)
                x = width
                skips.append(x)
        for level, width, heads in reversed(levels):
            if self.dec:
                self.dec[f"{level}up"] = UNetBlock(x, x, cemb, decoder=True, resample="up")
            else:
                self.dec[f"{level}in0"] = UNetBlock(x, x, cemb, decoder=True, heads=x // channels_per_head)
                self.dec[f"{level}in1"] = UNetBlock(x, x, cemb, decoder=True)
            for i in range(num_blocks + 1):
                self.dec[f"{level}block{i}"] = UNetBlock(x + skips.pop(), width, cemb, decoder=True, heads=heads)
                x = width
        self.out_conv = MPConv(x, img_channels, 3)

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
    """
    Karras et al. 2024, with official parameter names and arguments; those the official file leaves out have its
    defaults. x (B, C, H, W), sigma (B,), y (B,) => denoised like x. The plain float32 network: weights stored in
    float16 are cast first, where the official code rounds the quotient of a float16 gain (a difference of 1e-4).
    sigmas: the noise levels at which samplers begin their last and their first step; not in official files.
    """
    family = "edm2"

    def __init__(self, img_resolution, img_channels, label_dim, sigma_data=0.5, logvar_channels=128,
                 sigmas=(0.002, 80.0), **unet):
        super().__init__()
        self.init_kwargs = dict(img_resolution=img_resolution, img_channels=img_channels, label_dim=label_dim,
                                sigma_data=sigma_data, logvar_channels=logvar_channels, sigmas=sigmas, **unet)
        self.shape, self.sigmas = (img_channels, img_resolution, img_resolution), sigmas
        self.num_classes, self.sigma_data = label_dim or 1, sigma_data      # without labels all images are of one class
        self.null, self.classes = label_dim > 0, []
        self.unet = UNet(img_resolution, img_channels, label_dim, **unet)
        self.logvar_fourier = MPFourier(logvar_channels)                    # kept for the file, used by nothing here
        self.logvar_linear = MPConv(logvar_channels, 1).requires_grad_(False)

    def forward(self, x, sigma, y):
        s, sd = sigma.view(-1, 1, 1, 1), self.sigma_data
        total = (s**2 + sd**2).sqrt()
        return (sd / total)**2 * x + s * sd / total * self.unet(x / total, sigma.log() / 4, y)


# ---- VAE decoder ----------------------------------------------------------------------------------------------------

SAFETENSORS_TYPES = dict(F64=torch.float64, F32=torch.float32, F16=torch.float16, BF16=torch.bfloat16, I64=torch.int64,
                         I32=torch.int32, I16=torch.int16, I8=torch.int8, U8=torch.uint8, BOOL=torch.bool)


def read_safetensors(path):
    """
    {name: tensor} of a .safetensors file: 8 bytes length, a JSON header {name: {dtype, shape, data_offsets}}, raw data.
    Exit code 1 unless the tensors fill the data exactly, without gap or overlap; nothing is allocated before that.
    """
    with open(path, "rb") as f:
        size = os.fstat(f.fileno()).st_size - 8
        length = int.from_bytes(f.read(8), "little")
        try:
            if length > size:
                raise ValueError(f"a header of {length} bytes in a file of {size + 8}")
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            rows = sorted((*e["data_offsets"], k, SAFETENSORS_TYPES[e["dtype"]], e["shape"]) for k, e in header.items())
            end = 0
            for first, last, name, dtype, shape in rows:
                if first != end or min(shape, default=0) < 0 or last - first != math.prod(shape) * dtype.itemsize:
                    raise ValueError(f"bytes {first} to {last} do not fit {name}, or what is before it")
                end = last
            if end != size - length:
                raise ValueError(f"tensors of {end} bytes, data of {size - length}")
            tensors = {}
            for first, last, name, dtype, shape in rows:
                raw = torch.empty(last - first, dtype=torch.uint8)
                f.readinto(raw.numpy())
                tensors[name] = raw.view(dtype).view(shape)
        except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError) as e:
            fail(f"{path} is not a whole .safetensors file: {' '.join(str(e).split())[:120]}", code=1)
    return tensors


def read_vae(path):
    """
    The decoder's tensors {name: float32} in a diffusers AutoencoderKL (SD-VAE) file, .safetensors or .bin, of either
    spelling of the attention; its encoder is ignored. Exit code 1 if one is missing, too many or of a wrong shape.
    """
    if not os.path.isfile(path):
        fail(f"no VAE decoder {path!r}; needed: a diffusion_pytorch_model.safetensors or .bin")
    state = read_safetensors(path) if path.endswith(".safetensors") else read_checkpoint(path)
    spelling = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
    try:
        w = {re.sub(r"\.(query|key|value|proj_attn)\.", lambda m: f".{spelling[m[1]]}.", name): x.float()
             for name, x in state.items() if name.startswith(("decoder.", "post_quant_conv."))}
        w = {name: x.flatten(1) if ".to_" in name and x.dim() == 4 else x for name, x in w.items()}
        vae_decode(w, torch.zeros(1, 4, 2, 2))
        count = sum("conv_shortcut" not in name for name in w)
        if count != 136:
            raise ValueError(f"{count} tensors beside the shortcuts, not 136")
    except (KeyError, AttributeError, RuntimeError, ValueError) as e:
        fail(f"{path} is not an SD-VAE decoder: {' '.join(str(e).split())[:200]}", code=1)
    return w


def vae_decode(w, z):
    """
    The decoder of diffusers' AutoencoderKL, Rombach et al. 2022: raw latents (B, 4, h, w) => images (B, 3, 8h, 8w).
    w: its tensors by name, which also give the sizes.
    """
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
        h = F.scaled_dot_product_attention(*(F.linear(h, *get(f"{name}.to_{k}")) for k in "qkv"))
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
LATENTS = {
    "sit": dict(vae="stabilityai/sd-vae-ft-ema", scale=[0.18215], mean=[0.0], gain=127.5, offset=128),
    "edm2": dict(vae="stabilityai/sd-vae-ft-mse", scale=[0.5 / std for std in (4.17, 4.62, 3.71, 3.28)],
                 mean=[5.81, 3.25, 0.12, -2.15], gain=255, offset=0),
}


def attach_vae(model, path):
    """
    Give a latent model its decoder from a file: model.vae takes its latents (B, 4, h, w) => images (B, 3, 8h, 8w) from
    0 to 255, float32, by the conventions of its family. A function, not a module: neither trained, nor saved, nor
    counted. Returns the model. Exit code 2 if a latent model gets no file, or a pixel model gets one.
    """
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
    w = {name: x.to(device) for name, x in read_vae(path).items()}
    scale, mean = (torch.tensor(convention[k], device=device).view(1, -1, 1, 1) for k in ("scale", "mean"))

    def vae(x):
        chunk = max(1, 2**13 // x[0, 0].numel())        # 8 images of 256 px in one pass: some 2 GB
        images = torch.cat([vae_decode(w, part / scale + mean) for part in x.float().split(chunk)])
        return (convention["gain"] * images + convention["offset"]).clamp(0, 255)

    model.vae = vae
    return model


def image_size(model):
    """Pixels along a side of the model's images; a latent stands for 8 x 8 of them."""
    return model.shape[-1] * (1 if model.shape[0] == 3 else 8)


# ---- The tiny world ------------------------------------------------------------------------------------------------

# What an image is made for is part of its seed, so that training, selection and reporting never share an image.
STREAMS = {"train": 0, "select": 1, "report": 2, "floor": 3, "features": 4, "features2": 5, "update": 6}
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
        elif name == "tiny2":                                           # the judge: wide kernels, pooling, GELU
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


def factor_targets(factors):
    """(N, 7) factors => (N, 8) targets of unit variance; hue is a circle: cos and sin."""
    low, high = torch.tensor(list(FACTORS.values()), dtype=torch.float64).T
    z = (2 * (factors - low) / (high - low) - 1) * math.sqrt(3)
    turn = 2 * math.pi * factors[:, 5:6]
    return torch.cat([z[:, :5], z[:, 6:], math.sqrt(2) * turn.cos(), math.sqrt(2) * turn.sin()], dim=1).float()


def train_features(name, seed, updates=12000, batch=128):
    """Train one tiny feature network on its own stream of images; returns it with its test error as a text."""
    torch.manual_seed(seed)
    net = FeatureNet(name)
    optimizer = torch.optim.Adam(net.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=updates)
    stream = "features" if name == "tiny" else "features2"
    x, y, factors = tiny_images(100_000, seed, stream)
    z = factor_targets(factors)
    for i in tqdm(range(updates), desc=f"features {name}", unit="update", mininterval=5, disable=None):
        k = torch.randint(len(x), (batch,))
        prediction = net.heads(net(x[k]))
        loss = F.cross_entropy(prediction[:, :CLASSES], y[k]) + (prediction[:, CLASSES:] - z[k]).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    net.requires_grad_(False).eval()
    x, y, factors = tiny_images(10_000, seed, stream, start=len(x))
    # Mean variance 1, as KID's kernel expects; the heads begin with a ReLU, which lets the scale pass.
    scale = net(x).var(0).mean().sqrt()
    net.body[-1].weight /= scale
    net.body[-1].bias /= scale
    net.heads[1].weight *= scale
    prediction = net.heads(net(x))
    correct = (prediction[:, :CLASSES].argmax(1) == y).double().mean()
    error = (prediction[:, CLASSES:] - factor_targets(factors)).square().mean()
    return net, f"features {name}: class right {correct:.2%}, variance of the factors left unexplained {error:.2%}"


# ---- Pre-training ---------------------------------------------------------------------------------------------------

TRAINING_IMAGES = 200_000       # a fixed set: the tiny base cannot memorise it, and drawing it takes 15 seconds
EMA_STDS = (0.05, 0.10)         # lengths of the two tracked averages, as a share of the training so far
BASE_EMA = 0.05                 # the one that becomes the base
PRETRAINING = {"sit": dict(images=6_000_000, batch_size=256, lr=6e-3),
               "edm2": dict(images=1_600_000, batch_size=128, lr=1e-2)}
SIGMA_MEAN, SIGMA_STD = -0.4, 1.2       # of ln sigma in EDM2's training


def ema_exponent(std):
    """gamma of the power-function average of relative width std: std^2 (g+2)^2 (g+3) = g+1 (Karras et al. 2024)."""
    roots = np.roots([1, 7, 16 - std**-2, 12 - std**-2])
    return roots.real.max()


def renoise(model, x1, noise, uniform):
    """
    What a network is trained on: clean x1 (B, C, H, W) and standard normal noise like it, mixed at times drawn by
    uniform (B,) in [0, 1). Returns x_t, t (B,), target u of the network, and the weight (B,) of |network - u|^2 that
    makes it the error of an output of unit variance.
    SiT: u = x1 - x0. EDM2: u = x1, and as D = c_skip x + c_out F, |dF|^2 = |dD|^2 / c_out^2: weight 1 / c_out^2.
    """
    if model.family == "sit":
        t = uniform.view(-1, 1, 1, 1)
        return t * x1 + (1 - t) * noise, uniform, x1 - noise, torch.ones_like(uniform)
    sigma = (SIGMA_MEAN + SIGMA_STD * torch.special.ndtri(uniform.clamp(1e-6, 1 - 1e-6))).exp()
    weight = (sigma**2 + model.sigma_data**2) / (sigma * model.sigma_data) ** 2
    return x1 + sigma.view(-1, 1, 1, 1) * noise, sigma, x1, weight


def pretrain(model, x, y, seed, lr, lr_matrices, lr_knee, batch, snapshot, total=0, minutes=0.0, state_path=""):
    """
    Flow matching (SiT, at logit-normal times) or denoising (EDM2, at log-normal noise levels) on images x uint8
    (N, C, H, W), or what the model draws in float32, labels y (N,), for `total` images or for `minutes`. Muon (Jordan
    et al. 2024) for the matrices of SiT's blocks, Adam for the rest; EDM2's stored weights are normalised after every
    update (Karras et al. 2024, 2.3). Two power-function averages of the weights are tracked; snapshot(eighth,
    images_seen, {std: model}) is called at every eighth of the run. The rates fall as 1/sqrt(images), so nothing but
    the last snapshot knows when the run ends. With a state_path everything is kept there at every eighth, and a run
    that finds it goes on from it.
    """
    rng = torch.Generator().manual_seed(seed)
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    params = list(named.values())
    matrices = [p for name, p in named.items() if name.startswith("blocks.") and p.dim() == 2]
    others = [p for name, p in named.items() if not (name.startswith("blocks.") and p.dim() == 2)]
    optimizers = [(torch.optim.Adam(others, betas=(0.9, 0.99)), lr)]
    if matrices:
        optimizers.append((torch.optim.Muon(matrices, weight_decay=0.0), lr_matrices))
    averages = {std: copy.deepcopy(model).requires_grad_(False).eval() for std in EMA_STDS}
    pairs = {std: ([q for q, p in zip(a.parameters(), model.parameters()) if p.requires_grad], ema_exponent(std))
             for std, a in averages.items()}
    convs = [m for m in model.modules() if isinstance(m, MPConv) and m.weight.requires_grad]
    keepers = [model, *averages.values(), *(optimizer for optimizer, _ in optimizers)]
    seen, earlier = 0, 0.0
    if state_path and os.path.exists(state_path):
        state = read_checkpoint(state_path)
        seen, earlier = state["seen"], state["seconds"]
        rng.set_state(state["rng"])
        for keeper, part in zip(keepers, state["parts"]):
            keeper.load_state_dict(part)
    began = time.time() - earlier
    done = lambda: (time.time() - began) / (60 * minutes) if minutes else seen / total
    eighths = math.floor(8 * done())
    bar = tqdm(total=total or None, initial=seen, desc="pre-training", unit="image", mininterval=5,
               disable=dist.is_initialized() and dist.get_rank() > 0 or None)
    while eighths < 8:
        k = torch.randint(len(x), (batch,), generator=rng)
        x1 = x[k] if x.is_floating_point() else x[k].float() / 127.5 - 1
        noise, z = torch.randn(x1.shape, generator=rng), torch.randn(batch, generator=rng)
        dropped = torch.rand(batch, generator=rng) < 0.1                                        # for guidance
        labels = y[k].masked_fill(dropped, model.num_classes) if model.null else y[k]
        uniform = z.sigmoid() if model.family == "sit" else torch.special.ndtr(z)
        x1, noise, uniform, labels = (part.to(params[0].device) for part in (x1, noise, uniform, labels))
        xt, t, u, weight = renoise(model, x1, noise, uniform)
        loss = ((model(xt, t, labels) - u).square().mean((1, 2, 3)) * weight).mean()
        model.zero_grad()
        loss.backward()
        seen += batch
        for optimizer, rate in optimizers:
            optimizer.param_groups[0]["lr"] = rate * min(seen / 50_000, 1) / math.sqrt(max(seen / lr_knee, 1))
            optimizer.step()
        with torch.no_grad():
            for m in convs:
                m.weight.copy_(m.normalized())
        for slow, gamma in pairs.values():
            torch._foreach_lerp_(slow, params, 1 - (1 - batch / seen) ** (gamma + 1))
        bar.update(batch)
        if done() >= (eighths + 1) / 8:
            eighths = min(8, max(eighths + 1, math.floor(8 * done())))
            snapshot(eighths, seen, averages)
            if state_path:
                write(state_path, dict(seen=seen, seconds=time.time() - began, rng=rng.get_state(),
                                       parts=[keeper.state_dict() for keeper in keepers]))
        if seen % (200 * batch) == 0:
            bar.set_postfix(loss=f"{loss.item():.4f}")
    bar.close()


# ---- Images from disk -----------------------------------------------------------------------------------------------

# Formats that Pillow only decodes (for EPS it would start Ghostscript). The last two cannot be told by their first
# bytes: they are read only from files of their own ending.
IMAGE_FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "GIF", "BMP", "TIFF", "JPEG2000", "PPM", "QOI", "DDS", "ICO",
                 "SGI", "PSD", "PCX", "TGA")
ARRAY_ENDINGS = (".npz", ".npy", ".pkl", ".pt", ".pth")
WARNED = set()                          # what Pillow has warned of so far


class Images(NamedTuple):
    """
    The images of a folder, a zip or an array file, in the order of a hash of their names within the set: the first so
    many of them, or every second one, are a fixed random subset, the same on every machine.
    """
    path: str
    names: list                         # "/" between folders, without the folders that all of them are in
    read: Callable                      # name => PIL image
    place: Callable                     # name => its path, for people
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
        fail(f"{path} is not a readable {kind} ({' '.join(str(e).split())[:80] or type(e).__name__})", code=1)


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
        with reading(path):
            with open(path, "rb") as f:
                if f.read(6) != b"\x93NUMPY":
                    found = np.load(path, allow_pickle=False)
                else:
                    f.seek(0)
                    _, _, dtype = getattr(np.lib.format, f"read_array_header_{np.lib.format.read_magic(f)[0]}_0")(f)
                    found = restore(RecordReader(f).load(), {}) if dtype.hasobject else np.load(path)
            found = found.item() if isinstance(found, np.ndarray) and found.dtype.hasobject else found
    if isinstance(found, (np.ndarray, torch.Tensor)):
        return {"arr_0": found}
    if isinstance(found, (tuple, list)) and len(found) == 2:
        return dict(mu=found[0], sigma=found[1])
    return found if hasattr(found, "keys") else {"": found}


def array_images(path):
    """Images uint8 (N, H, W, 3) of an array file, whatever their name, channels last or first (arr_0 before others)."""
    stored, found = read_arrays(path), []
    if {"mu", "sigma"} <= set(stored.keys()):
        fail(f"{path} holds statistics, where images are needed; statistics are for --real", code=1)
    with reading(path):
        for name in sorted(stored.keys(), key=lambda name: name != "arr_0"):
            array = stored[name]
            if isinstance(array, (np.ndarray, torch.Tensor)):
                array = np.asarray(array)
                if array.dtype == np.uint8 and array.ndim == 4 and 3 in (array.shape[3], array.shape[1]) and len(array):
                    return array if array.shape[3] == 3 else array.transpose(0, 2, 3, 1)
                found.append(f"{name} {array.dtype} {array.shape}")
            else:
                found.append(f"{name} ({type(array).__name__})".strip())
    fail(f"{path} holds {', '.join(found[:4]) or 'nothing'}; needed are images, uint8 (N, H, W, 3), or statistics, "
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


def open_images(path):
    """
    The Images of a folder, a zip or an array file. Counted are all files of IMAGE_FORMATS but hidden ones; a note tells
    how many others there are. Exit code 2 if there is no such file, 1 if it holds no image.
    """
    if not os.path.exists(path):
        fail(f"{path} does not exist; needed: a folder or a .zip of images, or an .npz of them")
    if is_array_file(path):
        array = array_images(path)
        return Images(path, hashed_order(map(str, range(len(array)))),
                      lambda name: Image.fromarray(array[int(name)]), lambda name: f"{path}, image {name}")
    if os.path.isdir(path):
        stored, unseen = {name: os.path.join(path, name) for name in files_below(path)}, ""
        opener = lambda member: open(member, "rb")
    elif zipfile.is_zipfile(path):          # its members are read, never unpacked to where their names point
        try:
            archive = zipfile.ZipFile(path)
        except Exception as e:              # a damaged directory can raise anything
            fail(f"{path} is not a readable zip ({str(e)[:80]})", code=1)
        every = {zip_name(info): info for info in archive.infolist() if not info.is_dir()}
        stored = {name: info for name, info in every.items() if not hidden(name)}
        unseen = f" ({len(every) - len(stored)} hidden files do not count)" if len(every) > len(stored) else ""
        opener = archive.open
    else:
        fail(f"{path} is neither a folder nor a zip file; needed: images in one of these")

    formats = {ending: form for ending, form in Image.registered_extensions().items() if form in IMAGE_FORMATS}
    ending = lambda name: os.path.splitext(name)[1].lower()
    names = [name for name in stored if ending(name) in formats]
    jsons = sorted((name for name in stored if posixpath.basename(name) == "dataset.json"), key=lambda k: k.count("/"))
    others = Counter(ending(name) or "no ending" for name in stored if ending(name) not in formats)
    others[".json"] -= len(jsons)
    left_out = f"{others.total()} files of other kinds ({', '.join(sorted(+others)[:5])})"
    if not names:
        fail(f"{path} holds no image{f', but {left_out}' if others.total() else ''}{unseen}; needed: png, jpg, webp or "
             "other images that are not hidden, flat or in one sub-folder per class", code=1)
    if others.total():
        note(f"{path}: {len(names)} images; {left_out} were left out")

    # A set that was zipped with the folder around it is the same set.
    clean = {posixpath.normpath("/" + name.lstrip("/")): name for name in names}
    around = posixpath.commonpath(posixpath.dirname(name) for name in clean).rstrip("/")
    inner = {name[len(around) + 1:]: member for name, member in clean.items()}
    labels = None
    if jsons:
        with reading(os.path.join(path, jsons[0])), opener(stored[jsons[0]]) as f:
            labels = tool_labels(json.load(f), jsons[0], inner)

    def read(name):
        with opener(stored[inner[name]]) as f:
            own = formats[ending(name)]
            allowed = [form for form in dict.fromkeys((own, *IMAGE_FORMATS[:-2])) if form in Image.OPEN]
            with Image.open(f, formats=allowed) as image:
                return in_rgb(image)

    return Images(path, hashed_order(inner), read, lambda name: os.path.join(path, inner[name]), labels)


def tool_labels(found, where, inner):
    """
    {name: label} of a dataset.json, as the dataset tool of StyleGAN and EDM2 writes it: pairs of a name, from the
    folder of the file `where`, and a label. inner: {name in the set: name in the folder or zip}. None if it is another
    file.
    """
    if not isinstance(found, dict) or "labels" not in found:
        return None
    pairs = found["labels"] or []
    pairs = list(pairs.items()) if isinstance(pairs, dict) else pairs
    named = lambda pair: isinstance(pair, (list, tuple)) and len(pair) == 2 and isinstance(pair[0], str)
    if not isinstance(pairs, list) or not all(map(named, pairs)):
        return None
    top = len(where) - len("dataset.json")
    known = {name.replace("\\", "/"): label for name, label in pairs}
    labels = {name: known.get(member[top:]) for name, member in inner.items()}
    if known and all(label is None for label in labels.values()):        # names of something else
        return None
    return labels if known else {}


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
    if images.labels is not None:
        labels = [images.labels.get(name) for name in images.names]
        if not images.labels:
            return [], torch.zeros(len(labels), dtype=torch.int64)
        if None in labels:
            fail(f"{images.path}: dataset.json has no label for {images.place(images.names[labels.index(None)])}; mend "
                 "or remove it", code=1)
        if all(isinstance(y, list) and sorted(y)[-1:] == [1] and sum(map(bool, y)) == 1 for y in labels):
            labels = [y.index(1) for y in labels]                       # one-hot
        if not all(isinstance(y, int) and 0 <= y < 2**20 for y in labels):
            fail(f"{images.path}: the labels of dataset.json are no classes, numbers from 0 on; remove it", code=1)
        empty = sorted(set(range(max(labels))) - set(labels))
        if empty:
            note(f"{images.path}: dataset.json has labels up to {max(labels)}, but no image of class {listed(empty)}")
        return [str(k) for k in range(max(labels) + 1)], torch.tensor(labels)
    folders = [name.split("/")[0] if "/" in name else "" for name in images.names]
    classes = sorted(set(folders))
    if len(classes) > 1 and "" in classes:
        fail(f"{images.path} has images beside sub-folders ({images.place(images.names[folders.index('')])}); "
             "needed: all images flat, or all in one sub-folder per class", code=1)
    if all(k.isdecimal() for k in classes):
        classes.sort(key=lambda k: (int(k), k))
    places = {k: i for i, k in enumerate(classes)}
    return classes if len(classes) > 1 else [], torch.tensor([places[k] for k in folders])


def listed(classes):
    """Names of classes for people: all, or the first ten and the last."""
    return ", ".join(map(str, classes if len(classes) <= 12 else [*classes[:10], "..", classes[-1]]))


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
                 f"make a base for it: python models.py --real {real} --out base.pt", code=1)
        if classes:
            print0(f"{real}: {len(classes)} classes, in this order: {listed(classes)}")


def image_batches(images, size=None, start=0, step=1, limit=0, batch_size=250):
    """
    Yields images start, start + step, .. of Images (at most `limit`), short side resized to `size` and centre-cropped:
    uint8 (b, 3, size, size). size None: as they are; a batch of several sizes is a list of uint8 (3, H, W). One that
    cannot be read ends the script with exit code 1 and its name. b is batch_size, or less if the images are large.
    """
    batch, pixels = [], 0
    names = images.names[start::step][:limit or None]
    for name in names:
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
                fail(f"{images.place(name)} is not a readable image ({str(e)[:80]}); mend or remove it", code=1)
        for w in warned:
            if str(w.message) not in WARNED:
                WARNED.add(str(w.message))
                note(f"{images.place(name)}: {' '.join(str(w.message).split())} (said once)")
        batch.append(torch.from_numpy(np.array(image).transpose(2, 0, 1)))
        pixels += image.width * image.height
        if len(batch) == batch_size or pixels >= 2**25 or name is names[-1]:
            yield torch.stack(batch) if len({x.shape for x in batch}) == 1 else batch
            batch, pixels = [], 0


# ---- Load and save --------------------------------------------------------------------------------------------------

def refusal(e):
    """Why a file was refused, in a few words: the global it asked for, or the kind of damage."""
    asked = re.search(r"GLOBAL (\S+)", str(e))
    if asked:
        return f"it asks for {asked[1]!r}, which is not run"
    return f"{type(e).__name__}: {' '.join(str(e).split())[:80]}"


def read_checkpoint(path):
    """The dict in a .pt file, without running code. Exit code 2 if there is no such file, 1 if it is no checkpoint."""
    if not os.path.isfile(path):
        fail(f"no checkpoint {path!r}; needed: a .pt or .pkl file, its URL, or the name of one in {ASSETS}")
    numbers = [np.dtype(kind) for kind in ("f8", "f4", "f2", "i8", "i4", "u1")]
    arrays = [np.zeros(1).__reduce__()[0], np.ndarray, np.dtype, *map(type, numbers)]
    named = [(arrays[0], f"numpy.{core}.multiarray._reconstruct") for core in ("core", "_core")]
    try:                                    # SiT's train.py keeps its arguments, others keep arrays of numpy
        with torch.serialization.safe_globals([argparse.Namespace, *arrays, *named]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:                  # a damaged file can raise anything
        fail(f"{path} is not a PyTorch checkpoint of tensors alone ({refusal(e)})", code=1)


# Globals that official .pkl files name. None is imported or called: restore() knows what each would have made.
ADMITTED = {
    "collections.OrderedDict", "dnnlib.util.EasyDict", "torch_utils.persistence._reconstruct_persistent_obj",
    "torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList", "torch.nn.parameter.Parameter",
    "torch._utils._rebuild_tensor_v2", "torch._utils._rebuild_parameter", "torch._utils._rebuild_parameter_with_state",
    "torch.storage._load_from_bytes", "numpy.dtype", "numpy.ndarray", "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct"}


class Record(dict):
    """What stands in a pickle for a call of a global: its arguments, items and state. Nothing is called."""
    args, state = (), None

    def __init__(self, *args):
        self.args = args

    def __setstate__(self, state):
        self.state = state


class RecordReader(pickle._Unpickler):      # the one in C allocates gigabytes for a wrong byte
    def find_class(self, module, name):
        if f"{module}.{name}" not in ADMITTED:
            raise pickle.UnpicklingError(f"GLOBAL {module}.{name}")
        return type(name, (Record,), {})


def restore(x, done):
    """Records as dicts, arrays and tensors; done {id: result} makes shared parts once."""
    if not isinstance(x, (dict, list, tuple)):
        return x
    if id(x) not in done:
        kind = type(x).__name__
        if isinstance(x, (list, tuple)):
            found = type(x)(restore(v, done) for v in x)
        elif kind == "dict" or kind in ("OrderedDict", "EasyDict") and not x.args:
            found = {k: restore(v, done) for k, v in x.items()}
        elif kind in ("_reconstruct_persistent_obj", "_rebuild_parameter", "_rebuild_parameter_with_state"):
            found = restore(x.args[0], done)
        elif kind in ("ModuleDict", "ModuleList", "Parameter"):
            found = dict(class_name=kind, state=restore(x.state, done))
        elif kind == "_load_from_bytes":
            storage = torch.load(io.BytesIO(x.args[0]), map_location="cpu", weights_only=True)
            found = torch.empty(0, dtype=storage.dtype).set_(storage._untyped_storage)
        elif kind == "_rebuild_tensor_v2":
            flat, (offset, size, stride) = restore(x.args[0], done), x.args[1:4]
            if math.prod(size) > len(flat):
                raise ValueError(f"a tensor of shape {size} from {len(flat)} values")
            found = flat.as_strided(size, stride, offset)
        elif kind == "_reconstruct":
            _, shape, dtype, fortran, data = x.state
            if dtype.args[0] == "O8" and shape == ():                   # how numpy saves a dict
                return restore(data[0], done)
            if not re.fullmatch(r"[fiu][1248]|b1", dtype.args[0]) or dtype.state[1] not in "<>|":
                raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({dtype.args[0]!r})")
            values = np.frombuffer(data, dtype.state[1] + dtype.args[0]).reshape(shape, order="F" if fortran else "C")
            found = values.astype(values.dtype.newbyteorder("="))
        else:
            raise ValueError(f"{kind} out of its place")
        done[id(x)] = found
    return done[id(x)]


def read_pickle(path):
    """
    What is in an official .pkl (a network of EDM2, statistics), as dicts, lists, numpy arrays and tensors; an object is
    a dict with class_name and state. Runs no code: any global beyond the ADMITTED ends the script with its name.
    """
    if not os.path.isfile(path):
        fail(f"no file {path!r}; needed: a .pkl as EDM2 writes it")
    try:
        with open(path, "rb") as f, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return restore(RecordReader(f).load(), {})
    except Exception as e:                  # a damaged pickle can raise anything
        fail(f"{path} is refused: {refusal(e)}", code=1)


def sha256(path):
    digest = hashlib.sha256()
    with open(path, "rb") as f:
        while chunk := f.read(2**20):
            digest.update(chunk)
    return digest.hexdigest()


def fetch(url):
    """
    Path of the file behind a URL (https or file), which is downloaded once, into ~/.cache or $XDG_CACHE_HOME. Its
    sha256 is printed, and checked if the URL ends in #sha256=HEX. On several ranks the first of each machine downloads.
    """
    address, mark, wanted = url.partition("#")
    if mark and not re.fullmatch(r"sha256=[0-9a-f]{64}", wanted):
        fail(f"{url}: behind # needed is sha256= and 64 hexadecimal digits")
    folder = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    name = f"{hashlib.sha256(address.encode()).hexdigest()[:12]}-{os.path.basename(address.split('?')[0])}"
    path = os.path.join(folder, "distribution-wise-rewards", name)
    if not os.path.isfile(path) and os.environ.get("LOCAL_RANK", "0") == "0":
        writable(path)
        try:
            torch.hub.download_url_to_file(address, path, progress=sys.stderr.isatty())
        except (OSError, ValueError, http.client.HTTPException) as e:
            fail(f"cannot download {address} ({str(e)[:80]}); bring the file here and give its path instead", code=1)
    if dist.is_initialized():
        dist.barrier()
    found = sha256(path)
    print0(f"{path}: sha256 {found}")
    if mark and wanted != f"sha256={found}":
        fail(f"{path} has sha256 {found}, not {wanted[7:]}; delete it to download it again", code=1)
    return path


def stored_parts(path):
    """
    What a checkpoint holds: ema {name: tensor in the file's dtype}, and init_kwargs (EDM2), heads, args, .. as far as
    the file has them. Of several sets of weights the averaged one is taken; names lose what wrappers put before them.
    """
    asset = os.path.join(ASSETS, f"{path or 'sit-tiny'}.pt")
    path = asset if os.path.isfile(asset) else fetch(path) if path.startswith(("https://", "file://")) else path
    if path.lower().endswith(".pkl"):
        network = read_pickle(path)
        try:
            return dict(ema=module_tensors(network["ema"]), init_kwargs=network["ema"]["state"]["_init_kwargs"])
        except Exception as e:
            fail(f"{path} holds no EDM2 network ({type(e).__name__}: {str(e)[:80]})", code=1)
    if path.lower().endswith(".safetensors") and os.path.isfile(path):
        parts = read_safetensors(path)
    else:
        parts = read_checkpoint(path)
    # {model, ema}, {state_dict}, {ema: {module}}: the weights are in the file's dict or in one inside it.
    inside = [(str(k), v) for k, v in parts.items() if isinstance(v, dict)] if isinstance(parts, dict) else []
    inside += [(f"{k}.{inner}", v) for k, outer in inside for inner, v in outer.items() if isinstance(v, dict)]
    inside.sort(key=lambda kv: ("ema" not in kv[0], kv[0] not in ("state_dict", "model")))
    for where, state in [*inside, ("", parts if isinstance(parts, dict) else {})]:
        # module.x_embedder.proj.weight: what is before the name is a wrapper's; ema_model. goes before model.
        found = [k.removesuffix(last) for k in state if isinstance(k, str)
                 for last in ("x_embedder.proj.weight", "unet.out_gain") if k == last or k.endswith("." + last)]
        if found:
            prefix = min(found, key=lambda prefix: ("ema" not in prefix, len(prefix)))
            if any("ema" in str(k) for k in parts) and "ema" not in where + prefix and where:
                note(f"{path} has averaged weights in a form unknown here; those of {where!r} are used")
            weights = {k.removeprefix(prefix): v for k, v in state.items() if str(k).startswith(prefix)}
            weights = {k: v for k, v in weights.items() if not k.startswith("projectors.")}     # of REPA's training
            return dict(parts if where else {}, ema=weights)
    if not isinstance(parts, dict) or not isinstance(parts.get("ema", parts), dict):
        fail(f"{path} is no SiT or EDM2 of this version: needed is a dict of tensors, flat or under 'ema'", code=1)
    return parts if "ema" in parts else dict(ema=parts)


def load(path="", device="cpu", heads=0, classes=0):
    """
    A model in eval mode from '' (the tiny base), the name of a file in assets/, an official SiT .pt or EDM2 .pkl, one
    of ours, a .safetensors, or the URL of one. It has .family, .shape (C, H, W), .num_classes and .classes, their names
    if known; labels run from 0, and num_classes is the null class if .null. heads and classes of a SiT: what its file
    does not tell, or tells wrongly; 0: as the file says, else the official number for its width, and a null class.
    """
    parts = stored_parts(path)
    state = parts["ema"]
    try:
        with torch.device("meta"):          # no memory until all shapes are known to fit
            edm2 = "init_kwargs" in parts
            model = edm2_like(state, parts["init_kwargs"]) if edm2 else sit_like(parts, heads, classes)
        wanted = model.state_dict()
        misshapen = {k for k in wanted.keys() & state.keys() if wanted[k].shape != state[k].shape}
        wrong = {"lacks": wanted.keys() - state.keys(), "has unknown": state.keys() - wanted.keys(),
                 "has in another shape": misshapen}
        if not any(wrong.values()):
            wrong["has NaN or infinite values in"] = {k for k, v in state.items() if not v.isfinite().all()}
        said = [f"{verb} {', '.join(sorted(keys)[:3])} ({len(keys)} in all)" for verb, keys in wrong.items() if keys]
        if said:
            raise ValueError("; ".join(said))
        model.load_state_dict({k: v.to(torch.float32, copy=True) for k, v in state.items()}, assign=True)
        model.classes = [str(k) for k in parts.get("classes") or []]
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RuntimeError, TypeError, ValueError) as e:
        said = f"it has no {e}" if isinstance(e, KeyError) else " ".join(str(e).split())[:300]
        fail(f"{path} is no SiT or EDM2 of this version: {said}", code=1)
    return model.to(device).eval()


def module_tensors(module):
    """{name: tensor} of a module that read_pickle returned, as its state_dict would be."""
    state = module["state"]
    found = {**state["_parameters"], **state["_buffers"]}
    for name, child in state["_modules"].items():
        if child is not None:
            found.update({f"{name}.{k}": v for k, v in module_tensors(child).items()})
    return found


def sit_like(parts, heads, classes):
    """A SiT whose sizes are those of the tensors in a checkpoint's parts; heads, classes: as load()'s."""
    state, args = parts["ema"], {}
    for told in (parts.get(key) for key in ("config", "hyper_parameters", "args")):
        args |= vars(told) if isinstance(told, argparse.Namespace) else told if isinstance(told, dict) else {}
    kind = [str(args.get(key) or usual) for key, usual in (("path_type", "Linear"), ("prediction", "velocity"))]
    if kind[0].lower() != "linear" or kind[1].lower() not in ("velocity", "v"):
        raise ValueError(f"its args say path {kind[0]} and prediction {kind[1]}; needed are Linear and velocity")
    width, C, patch, _ = state["x_embedder.proj.weight"].shape
    grid = math.isqrt(state["pos_embed"].shape[1])
    rows = state["final_layer.linear.weight"].shape[0]
    depth = len({k.split(".")[1] for k in state if k.startswith("blocks.")})
    heads = heads or parts.get("heads") or {w: h for _, w, h in SIT_SIZES.values()}.get(width)
    if heads is None:
        raise ValueError(f"its width, {width}, is none of the official ones, and nothing tells the heads; add --heads")
    if heads < 1 or width % heads:
        raise ValueError(f"{heads} heads for width {width}")
    labels = state["y_embedder.embedding_table.weight"].shape[0]
    if labels < 1:
        raise ValueError("its table has no labels")
    told = int(classes or args.get("num_classes") or parts.get("num_classes") or max(1, labels - 1))
    if told not in (labels, labels - 1) and (classes or labels > 1):
        raise ValueError(f"its table has {labels} labels, neither {told} classes nor {told} and a null class; add "
                         f"--classes {labels - 1}, or {labels} if there is no null class")
    told = min(told, labels)                            # of a single label the args of an official file still say 1000
    side = grid * patch
    return SiT(depth, width, heads, (C, side, side), patch, told, rows == 2 * patch**2 * C, told < labels)


def edm2_like(state, init_kwargs):
    """An EDM2 of the arguments in its file, but those of training (dropout) and of GPUs (use_fp16)."""
    sizes = {k: v for k, v in init_kwargs.items() if k not in ("dropout", "use_fp16")}
    if sizes.get("num_blocks", 3) > len(state):
        raise ValueError(f"num_blocks {sizes['num_blocks']} for {len(state)} tensors")
    return EDM2(**sizes)


@contextmanager
def whole(path, previous=""):
    """
    A binary file that becomes `path` when all of it is on the disk: an interrupted write leaves the old file whole, and
    a full disk ends the script with one line. With `previous` the old file is kept under that name.
    """
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
        fail(f"cannot write {path} ({str(e)[:80]}); what was there before is whole", code=1)
    finally:                                # also of a signal, which leaves by SystemExit
        with suppress(OSError):
            os.remove(path + ".part")


def write(path, parts, previous=""):
    """torch.save, `whole`."""
    with whole(path, previous) as f:
        torch.save(parts, f)


def save(path, model, dtype=None, **extra):
    """
    A checkpoint that load() reads, and SiT's own code (under 'ema'); dtype torch.float16 halves it (not the buffers:
    they are the frequencies of EDM2's embedding). Atomic.
    """
    params = dict(model.named_parameters())
    state = {k: v.to(dtype if dtype and k in params else v.dtype) for k, v in model.state_dict().items()}
    sizes = dict(init_kwargs=model.init_kwargs) if model.family == "edm2" else dict(
        heads=model.blocks[0].attn.heads, num_classes=model.num_classes)
    write(path, dict(ema=state, classes=model.classes, **sizes, **extra))


# ---- What every script shares: command line, process group, printing ------------------------------------------------

def fail(message, code=2):
    """End the script with one line on stderr: code 2 for a mistake on the command line, 1 where data is at fault."""
    message = "".join(c if c.isprintable() else "?" for c in message)
    if "COPY_OF_RANK_0" in os.environ:
        time.sleep(3)                       # what is true for all rank 0 has said by now, and ended this one
    if code == 1 or os.environ.get("RANK", "0") == "0":         # the command line is the same on all ranks
        tqdm.write(f"error: {message}", file=sys.stderr)        # below a progress bar, not behind it
    raise SystemExit(code)


class Config(dict):
    """Constants by name, config.lr, of which config.given were named on the command line."""
    __getattr__ = dict.__getitem__
    given = ()


def constants(namespace):
    """[(name, default, note)]: the lines `name = value # note` between the first two rule lines of a script."""
    with open(namespace["__file__"], encoding="utf-8") as f:
        block = re.split(r"^# -{70,}$", f.read(), flags=re.M)[1]
    rows = re.findall(r"^(\w+) = .*?(?:  ?# (.*))?$", block, flags=re.M)
    return [(name, namespace[name], note) for name, note in rows]


def parse(name, default, text):
    """`text` as a value of the default's type; a mistake ends the script."""
    if isinstance(default, bool):
        if text.lower() in ("true", "1", "yes", "false", "0", "no"):
            return text.lower() in ("true", "1", "yes")
        fail(f"--{name}={text}: needed is true or false")
    if isinstance(default, str):
        return os.path.expanduser(text)                                 # --real=~/images reaches us as it is
    try:
        value = type(default)(text)
    except ValueError:
        fail(f"--{name}={text}: needed is a value of type {type(default).__name__}, like {default}")
    if isinstance(value, float) and not math.isfinite(value):
        fail(f"--{name}={text}: needed is a finite number")
    return value


def configure(namespace, argv):
    """
    A script's constants, overridden by its command line: --key=value, --key value, --flag, --list a b c.
    An unknown key, a wrong type or a stray word ends the script with one line and exit code 2.
    """
    rows = constants(namespace)
    config = Config((name, default) for name, default, _ in rows)
    words, named = list(argv), set()
    while words:
        key, given, value = words.pop(0).partition("=")
        if key in ("--help", "-h"):
            width = max(len(f"{n}={d}") for n, d, _ in rows)
            print(namespace["__doc__"].strip() + "\n")
            print("\n".join(f"  --{f'{n}={d}':{width}}  {note}" for n, d, note in rows))
            raise SystemExit(0)
        name = key[2:]
        if not key.startswith("--") or name not in config:
            near = difflib.get_close_matches(name, config, 1)
            hint = f"did you mean --{near[0]}?" if near else "--help lists what there is"
            fail(f"{key!r} is not an option of {os.path.basename(namespace['__file__'])}; {hint}")
        named.add(name)
        following = list(itertools.takewhile(lambda w: not w.startswith("--"), words))
        if isinstance(config[name], list):
            taken = value.split(",") if given else following
            config[name] = [os.path.expanduser(w) for w in taken if w]
            words = words if given else words[len(following):]
        elif isinstance(config[name], bool) and not given:
            config[name] = True
        elif not given and not following:
            fail(f"--{name} needs a value, like --{name}={config[name]}")
        else:
            config[name] = parse(name, config[name], value if given else words.pop(0))
    config.given = named
    if "resume" in config:                  # torchrun --max_restarts goes on by itself
        config["resume"] |= os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    if not 0 <= config.get("seed", 0) < 2**63:
        fail(f"seed {config.seed}: needed is a number that is not negative, below 2^63")
    return config


def writable(path):
    """The folder of an output file, made now: better to know before the work than after it."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as e:
        fail(f"cannot write {path}: {e.strerror}")
    if os.path.exists(path) and not os.path.isfile(path) or not os.access(folder, os.W_OK):
        fail(f"cannot write {path}: needed is a file name in a folder that can be written to")


def holds_run(folder, precious, used=()):
    """
    Whether a run that is about to start meets one of the `precious` files of another in its folder; it says so. `used`
    are files that it starts from: they may not be those that would be lost.
    """
    found, before = [name for name in precious if os.path.exists(os.path.join(folder, name))], os.path.join(
        folder, "previous")
    for path in used if found else ():
        if os.path.realpath(os.path.dirname(path)) == os.path.realpath(before):
            fail(f"{path} is in {before}, which the run in {folder} is about to take; copy it elsewhere, or name "
                 "another --out")
    if found:
        print0(f"{os.path.join(folder, found[0])} is of a run before: as this one starts, its files move to {before}, "
               "in place of what is there")
    return bool(found)


def move_aside(folder, names):
    """Files `names` of the run before go to folder/previous, one generation. Rank 0 moves, the others wait."""
    before = os.path.join(folder, "previous")
    if dist.get_rank() == 0:
        try:
            os.makedirs(before, exist_ok=True)
            for name in names:
                old, new = os.path.join(before, name), os.path.join(folder, name)
                shutil.rmtree(old) if os.path.isdir(old) else os.path.exists(old) and os.remove(old)
                os.path.exists(new) and os.replace(new, old)
        except OSError as e:
            fail(f"cannot move the run in {folder} to {before} ({e.strerror}); name another --out")
    dist.barrier()


def of_the_run_before(path, folder):
    """Where move_aside() has put a file of the folder; any other path as it is."""
    moved = os.path.join(folder, "previous", os.path.basename(path))
    inside = os.path.abspath(os.path.dirname(path)) == os.path.abspath(folder)
    return moved if inside and os.path.isfile(moved) else path


class Stop:
    """
    SIGTERM and SIGINT end the script with one line and exit code 128 + number; while it is .patient, the first only
    leaves its .number, so that a loop can end where everything is whole. So does a lack of memory, with code 1.
    """
    def __init__(self, then="", smaller="--batch_size"):
        self.number, self.patient, self.then, self.smaller = 0, False, then, smaller

    def __enter__(self):
        self.before = {number: signal.signal(number, self.came) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, kind, error, trace):
        for number, handler in self.before.items():
            signal.signal(number, handler)
        said = " ".join(str(error).split())
        full = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if full or isinstance(error, RuntimeError) and "DefaultCPUAllocator" in said:
            fail(f"out of memory ({said[:100] or kind.__name__}); lower {self.smaller}", code=1)

    def came(self, number, frame):
        if not self.patient or self.number:
            fail(f"stopped by {signal.Signals(number).name}{self.then}", code=128 + number)
        self.number = number


def lost(kind, error, trace):
    """Instead of a traceback one line where another rank ended, which names the cause itself unless it was killed."""
    time.sleep(3 if "COPY_OF_RANK_0" in os.environ else 1)                  # as in fail()
    codes = [other.poll() or 0 for other in others]
    killed = [abs(code) % 128 for code in codes if code < 0 or code > 128]
    if isinstance(error, RuntimeError) and killed:
        print(f"error: {signal.Signals(killed[0]).name} ended a process of this run (out of memory?); with "
              "OMP_NUM_THREADS=1 it is one process", file=sys.stderr)
    elif isinstance(error, RuntimeError) and re.search("by peer|Broken pipe|remote process exited", str(error)):
        print(f"note: rank {os.environ['RANK']} ends, as another rank has ended", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def share_cores(c, divides=0):
    """
    A script typed by hand on a CPU goes on as rank 0 of several, at most 4, whose number divides `divides`: processes
    of one thread draw small images faster than threads of one process. The others are copies of this one, run the same
    command, and end with it. Nothing under torchrun, with a GPU, with one thread (OMP_NUM_THREADS=1), or for a large
    network or file, which uses threads well and should be in memory once.
    """
    if "COPY_OF_RANK_0" in os.environ:      # its standard input ends when rank 0 does, by any means
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
        threading.Thread(target=lambda: (os.read(0, 1), os._exit(1)), daemon=True).start()
    threads = 1 if os.environ.get("OMP_NUM_THREADS") == "1" else torch.get_num_threads()
    world = max(n for n in range(1, min(4, threads) + 1) if divides % n == 0)
    named = [c.get(name, "") for name in ("ckpt", "ckpts", "guide", "images", "features", "judges")]
    words = [word for value in named for word in (value if isinstance(value, list) else [str(value)])]
    files = [path for word in words for path in glob.glob(word) if os.path.exists(path)]
    large = c.vae or {"inception", "dinov2"} & set(words) or sum(map(os.path.getsize, files)) > 2**26 or any(
        word.startswith(("http", "file://")) for word in words)
    if world == 1 or large or "RANK" in os.environ or torch.cuda.is_available() or not os.path.isfile(sys.argv[0]):
        return
    with socket.create_server(("127.0.0.1", 0)) as free:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free.getsockname()[1]), WORLD_SIZE=str(world),
                          RANK="0", LOCAL_RANK="0")
    torch.set_num_threads(threads // world)
    for rank in range(1, world):
        environment = dict(os.environ, RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS=str(threads // world),
                           COPY_OF_RANK_0="1", PYTHONBREAKPOINT="0")
        # A session of its own: Ctrl-C reaches rank 0 alone, which tells the others.
        others.append(subprocess.Popen([sys.executable, *sys.argv], env=environment, stdin=subprocess.PIPE,
                                       start_new_session=True))
    threading.Thread(target=missed, daemon=True).start()


others = []                                 # what share_cores started: kept, as their standard input is


def missed():
    """A copy that ends before it joins would be waited for in vain."""
    while not dist.is_initialized():
        time.sleep(0.2)
        if any(other.poll() for other in others):
            time.sleep(4)                   # else rank 0 may name the cause itself
            print("error: a process for another core did not start; use one with OMP_NUM_THREADS=1", file=sys.stderr)
            os._exit(1)


def setup():
    """Rank, world size, device. Under torchrun its process group; alone a group of one, so collectives just work."""
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
        if "RANK" in os.environ:            # a restart must not find the addresses of those who died
            store, rank, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=30)))
            store = dist.PrefixStore("restart " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)
            dist.init_process_group(backend, store=store, rank=rank, world_size=world, timeout=timedelta(minutes=30))
            sys.excepthook = lost
        else:
            dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        atexit.register(dist.destroy_process_group)         # else gloo's threads may abort at exit
    device = "cpu"
    if torch.cuda.is_available():
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        torch.cuda.set_device(device)
    return dist.get_rank(), dist.get_world_size(), torch.device(device)


def gather(x, total):
    """Rows of all ranks in one tensor, on every rank: row i of the result is row i // world of rank i % world."""
    world = dist.get_world_size()
    padded = x.new_zeros(-(-total // world), *x.shape[1:])
    padded[:len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return torch.stack(parts, dim=1).flatten(0, 1)[:total]


def encodable(text):
    """The text with a ? for what the screen cannot show: names of files may hold anything."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "replace").decode(encoding)


def print0(text):
    """Print on rank 0 only."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(encodable(text), flush=True)


@lru_cache(maxsize=None)
def note(text):
    """A line for people from rank 0, once, however often it comes up."""
    if not dist.is_initialized() or dist.get_rank() == 0:
        tqdm.write(encodable(f"note: {text}"))


def peak_memory():
    """The most memory this process has held, in GB (on a GPU the card's); nan where the system does not tell."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    scale = 2**30 if sys.platform == "darwin" else 2**20                # bytes there, kilobytes elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale if resource else math.nan


def announce(done, total, unit, seconds):
    """Say how long all of a run will take, if over three minutes, after its first part, and the memory that it took."""
    if done < total and seconds * total / done > 180 and dist.get_rank() == 0:
        tqdm.write(f"first {done} of {total} {unit} in {seconds:.1f} s: all in about {seconds * total / done / 60:.1f} "
                   f"minutes; memory so far {peak_memory():.2f} GB")


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop("; repeat the command with --resume to go on from the last eighth"):
        run(c)


def run(c):
    """Make what the options c ask for: the script."""
    if c.only not in ("all", "features", "base"):
        fail(f"only {c.only!r}: choose all, features or base")
    if c.family not in ("", *PRETRAINING) or (c.ckpt and c.family):
        fail(f"family {c.family!r}: choose sit or edm2 for a new base; with --ckpt leave it out")
    if min(c.images, c.batch_size, c.minutes, c.lr, c.lr_knee) < 0:
        fail(f"images {c.images}, batch_size {c.batch_size}, minutes {c.minutes}, lr {c.lr}, lr_knee {c.lr_knee}: "
             "none may be negative")
    make_assets = c.real == "tiny" and not c.ckpt
    if not make_assets and not c.out.endswith(".pt"):
        fail(f"--out={c.out}: this makes one base, so one file is needed, for example --out base.pt")
    families = [c.family] if c.family else list(PRETRAINING) if make_assets else ["sit"]
    paths = [os.path.join(c.out, f"{family}-tiny.pt") if make_assets else c.out for family in families]
    for path in paths:
        writable(path)
    setup()

    # The tiny world's base is judged by tiny2, so the feature networks come first.
    if make_assets and c.only != "base" and not c.resume:
        for name, net_seed in (("tiny", c.seed), ("tiny2", c.seed + 1)):
            net, found = train_features(name, net_seed)
            print(found)
            write(os.path.join(c.out, f"features-{name}.pt"), dict(model=net.state_dict(), found=found))
    if c.only != "features":
        for family, path in zip(families, paths):
            make_base(c, family, path, make_assets)


def make_base(c, family, path, make_assets):
    """Pre-train a base of this family (or go on with --ckpt), judged at every eighth; writes `path`, as an asset also
    its snapshots."""
    from fid import evaluate, feature_net, real_summaries
    names = [os.path.basename(path), os.path.basename(path) + ".state"]
    met = not (make_assets or c.resume) and holds_run(os.path.dirname(path), names, [c.ckpt])
    given = load(c.ckpt, heads=c.heads, classes=c.classes) if c.ckpt else None      # before images are read or drawn
    if c.real == "tiny":
        classes, (x, y, _) = [], tiny_images(TRAINING_IMAGES, c.seed, "train")
    else:
        found = open_images(c.real)
        classes, y = image_classes(found)
        batches = tqdm(image_batches(found, SIZE), total=-(-len(found.names) // 250), desc="reading", unit="batch",
                       disable=None)
        x = torch.cat(list(batches))
    num_classes = len(classes) or int(y.max()) + 1
    if len(x) < 2:
        fail(f"{c.real} holds {len(x)} image; needed are at least 2", code=1)
    print0(f"{len(x)} images of {c.real} at {SIZE} x {SIZE}, {num_classes} classes"
           + (f", in this order: {listed(classes)}" if classes else ""))

    torch.manual_seed(c.seed)
    if c.ckpt:
        model = given
    elif family == "sit":
        model = init_sit(SiT(*SIT_SIZES["tiny"], (3, SIZE, SIZE), 4, num_classes))
    else:
        model = EDM2(**dict(EDM2_TINY, label_dim=num_classes))
    if classes and len(classes) != model.num_classes:
        fail(f"{c.real} has {len(classes)} classes, {c.ckpt} {model.num_classes}", code=1)
    model.classes = classes or model.classes
    c = Config(c, **{name: c[name] or value for name, value in PRETRAINING[model.family].items()})

    # When twice the images change FD by less than 5 %, more pre-training is no rival to RL.
    net = feature_net("tiny2", os.path.join(c.out, "features-tiny2.pt") if make_assets else None)
    judged = real_summaries(c.real, [net], "select", 1, 50_000 if c.real == "tiny" else 0)
    num, steps = (10_000, 10) if model.family == "sit" else (2_500, 5)      # heun evaluates twice
    num = num if c.real == "tiny" else 1_000

    def snapshot(eighth, seen, averages):
        for std, model in averages.items():
            if not make_assets and std != BASE_EMA:
                continue
            row = evaluate(model, [net], judged, num, steps=steps, num_prdc=num, stream="select")["tiny2"]
            print(f"{seen:9d} images, EMA {std:.3f}: FD {row['fid']:.2f} +- {row['fid_se'] or math.nan:.2f} "
                  f"(tiny2, {num} images, {row['sampler']}, {row['steps']} steps)", flush=True)
            if make_assets and eighth > 4:              # snapshots for merge_rl.py
                save(path.replace(".pt", f"-{seen // 1000:05d}-{std:.3f}.pt"), model, torch.float16, images=seen)
        save(path, averages[BASE_EMA], images=seen)

    minutes = c.minutes or (0.0 if c.real == "tiny" else 10.0)
    state_path = path + ".state"
    if met:
        move_aside(os.path.dirname(path), names)
    if os.path.exists(state_path) and not c.resume:
        os.remove(state_path)
    pretrain(model, x, y, c.seed, c.lr, c.lr_matrices, c.lr_knee, c.batch_size, snapshot, c.images, minutes, state_path)
    print(f"wrote {path}: {sum(p.numel() for p in model.parameters())} parameters, {model.family}-tiny, "
          f"{num_classes} classes; next: python train_rl.py --ckpt {path} --real {c.real}")


if __name__ == "__main__":
    main()
