"""
Which classes does a generator draw? A small classifier, trained on a folder with a sub-folder for each, counts them.

python lab/shares.py --real FOLDER --ckpts base.pt out/train_rl/ckpt.pt
"""
import os
import sys

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from fid import image_batches, image_classes, open_images
from models import Stop, configure, fail, image_size, load, print0, setup
from sample import generate, image_seeds

# -----------------------------------------------------------------------------
real = "" # folder or zip of images with a sub-folder for each class
ckpts = [] # generators of images of one size
num = 10000 # images of each generator
sampler = "" # see sample.py; empty: the family's first
steps = 10 # of the sampler
updates = 4000 # of the classifier, 128 images each
seed = 0 # of the classifier and of the images
# -----------------------------------------------------------------------------


def classifier(x, y, classes, c):
    """A network uint8 (n, 3, H, W) => logits (n, classes), trained on images x with labels y, mirrored by chance."""
    torch.manual_seed(c.seed)
    widths = (3, 64, 128, 256)
    net = nn.Sequential(*[layer for a, b in zip(widths, widths[1:]) for layer in (
        nn.Conv2d(a, b, 3, padding=1), nn.BatchNorm2d(b), nn.ReLU(), nn.Conv2d(b, b, 3, 2, 1), nn.BatchNorm2d(b),
        nn.ReLU())], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes)).to(x.device)
    optimizer = torch.optim.AdamW(net.parameters(), weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=c.updates)
    of_images = lambda images: net(images.float() / 127.5 - 1)
    for _ in range(c.updates):
        k = torch.randint(len(x), (128,)).to(x.device)
        images = torch.where(torch.rand(128, 1, 1, 1).to(x.device) < 0.5, x[k].flip(3), x[k])
        loss = F.cross_entropy(of_images(images), y[k])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rates.step()
    net.eval()
    return of_images


@torch.no_grad()
def shares(of_images, batches, classes):
    """Share of each class (classes,) among uint8 batches."""
    found = torch.cat([of_images(batch).argmax(1).cpu() for batch in batches])
    return found.bincount(minlength=classes).double() / len(found)


def main(argv=None):
    c = configure(globals(), sys.argv[1:] if argv is None else argv)
    with Stop():
        device = setup()[2]
        if not c.ckpts:
            fail("no generators; name them by --ckpts a.pt b.pt")
        if not c.real or min(c.updates, c.num) < 1:
            fail(f"real {c.real!r}, updates {c.updates}, num {c.num}: needed are a folder, and at least 1")
        models = [load(path, device) for path in c.ckpts]
        if len({model.shape for model in models}) > 1:
            fail(f"the generators draw {', '.join(str(model.shape) for model in models)}; needed is one size", code=1)
        images = open_images(c.real)
        names, y = image_classes(images)
        if not names:
            fail(f"{c.real} has no classes; needed is a sub-folder for each", code=1)
        x, y = torch.cat(list(image_batches(images, image_size(models[0])))).to(device), y.to(device)
        held_out = torch.arange(len(x), device=device) % 10 == 0
        of_images = classifier(x[~held_out], y[~held_out], len(names), c)
        with torch.no_grad():
            right = torch.cat([of_images(part).argmax(1) for part in x[held_out].split(500)]) == y[held_out]
        print0(f"{right.double().mean():.1%} of {len(right)} held-out images right; shares by its own verdict:")
        rows = {"real": shares(of_images, x[held_out].split(500), len(names))}
        for path, model in zip(c.ckpts, models):
            seeds = image_seeds(c.seed, "report", torch.arange(c.num))
            rows[path] = shares(of_images, generate(model, seeds, sampler=c.sampler, steps=c.steps), len(names))
        width = max(map(len, rows))
        print0(" " * width + "".join(f"{name[:9]:>10s}" for name in names) + "  off by")
        for name, share in rows.items():
            off = (share - rows["real"]).abs().sum().item() / 2
            print0(f"{name:{width}s}" + "".join(f"{s:10.1%}" for s in share.tolist()) + f"{off:8.1%}")


if __name__ == "__main__":
    main()
