"""The network, and how a checkpoint of it is written and read.

model = CNN()                       # or CNN(width=64) for a network twice as wide
model.whiten(images)                # optional: sets the first layer from pictures
logits = model(images)              # (N, 3, 32, 32) -> (N, 10)
"""

import io
import math
import os
import shutil
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import torch
from torch import nn
from torch.nn import functional as F

from dataset import fail

WIDTH = 32  # channels of the first block; the next have 2 and 4 times as many
MAX_WIDTH = 1024  # two gigabytes of weights: more is a slip or an attack
OLD = ".old.pth"  # what a new run replaces is kept with this ending
HISTORY = ("loss", "accuracy", "seconds")  # of each epoch in a checkpoint
PATCH = 2  # px: the first layer looks at 2x2 patches, as in hlb-CIFAR10


def conv_norm(channels_in: int, channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """A 3x3 convolution and a pooling to half the size, then `depth` more convolutions.

    Pooling before the norm and the activation leaves them a quarter of the work (the
    order is that of KellerJordan/cifar10-airbench). What the later ones find is added to
    what they were given: a shortcut (He et al. 2015). Two of them in the second and third
    block, one in the first: 0.7 points more than one everywhere, for a tenth more time.
    """

    def __init__(self, channels_in: int, channels: int, depth: int):
        super().__init__()
        conv, norm = conv_norm(channels_in, channels)
        self.halve = nn.Sequential(conv, nn.MaxPool2d(2), norm, nn.GELU())
        refine = conv_norm(channels, channels)
        for _ in range(depth - 1):
            refine += [nn.GELU(), *conv_norm(channels, channels)]
        self.refine = nn.Sequential(*refine)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = self.halve(features)
        return F.gelu(features + self.refine(features))


class CNN(nn.Module):
    """Ten-class classifier: a whitening layer, three blocks, max pooling, one linear.

    (N, 3, H, W) float32, normalised, -> (N, 10) logits. 479,810 parameters at the
    default width; `width` scales the blocks.
    """

    def __init__(self, width: int = WIDTH):
        super().__init__()
        filters = 2 * 3 * PATCH**2  # one for each number of a patch, and its negative
        self.whitening = nn.Conv2d(3, filters, PATCH)
        self.blocks = nn.Sequential(
            Block(filters, width, depth=1),
            Block(width, 2 * width, depth=2),
            Block(2 * width, 4 * width, depth=2),
        )
        self.head = nn.Linear(4 * width, 10)
        # Convolutions on a CPU are up to twice as fast in this memory format.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        # This layer makes small differences between neighbouring pixels large: in
        # train.py's bfloat16 they would be rounded away.
        with torch.autocast("cpu", enabled=False):
            features = F.gelu(self.whitening(images))
        features = self.blocks(features).amax((2, 3))  # so any size of picture fits
        return self.head(features)

    @torch.no_grad()
    def whiten(self, images: torch.Tensor):
        """Set the first layer's filters so that their outputs are uncorrelated; freeze them.

        Neighbouring pixels are nearly equal, so brightness drowns edges and colours.
        The eigenvectors of the 2x2 patches' covariance, each divided by the root of its
        eigenvalue, have outputs of the same variance; each filter comes with its
        negative because GELU lets next to nothing below 0 through. `images`: normalised.
        Source: tysam-code/hlb-CIFAR10; 85.7 % instead of 82.8 % after 4 epochs.
        """
        patches = F.unfold(images, PATCH).transpose(1, 2).reshape(-1, 3 * PATCH**2)
        eigenvalues, eigenvectors = torch.linalg.eigh(patches.T.cov())
        tiny = 5e-4  # or what is only noise would be made as large as the rest
        filters = eigenvectors.T / (eigenvalues + tiny).sqrt().unsqueeze(1)
        filters = filters.view(-1, 3, PATCH, PATCH)
        self.whitening.weight.copy_(torch.cat([filters, -filters]))
        self.whitening.weight.requires_grad_(False)
        nn.init.zeros_(self.whitening.bias)


def cannot_write(path: Path, error: OSError) -> NoReturn:
    fail(f"cannot write {path}: {error.strerror}. Name another file or make room")


def save_checkpoint(checkpoint: dict, path: Path):
    """Write `path` whole or not at all: whenever it is cut short, the old file stays.

    The first epoch of a new run keeps what it replaces (see OLD).
    """
    part = path.with_name(f"{path.name}.part")
    buffer = io.BytesIO()  # torch.save itself would call a full disk a RuntimeError
    torch.save(checkpoint, buffer)
    try:
        with open(part, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())  # on the disk before it takes the old one's name
        if checkpoint["epoch"] == 0 and path.exists():
            shutil.copyfile(path, path.with_suffix(OLD))
        os.replace(part, path)
    except OSError as error:
        cannot_write(path, error)
    finally:
        part.unlink(missing_ok=True)


def try_to_write(path: Path, model: nn.Module, resume: bool):
    """Before time is spent: can a checkpoint of `model` be written to `path`?"""
    size = sum(weight.nbytes for weight in model.parameters())
    try:
        if path.exists() and not path.is_file():
            fail(f"{path} is not a file: name one")
        # Weights and momentum; a new run leaves room for two files, the old and the new.
        room = size * (2 if resume else 4)
        with tempfile.TemporaryFile(dir=path.parent) as file:  # no crash leaves it
            file.write(bytes(room))
    except OSError as error:
        cannot_write(path, error)


def load_checkpoint(path: Path, build: Callable[[dict], nn.Module]):
    """Read a checkpoint into the model that `build(checkpoint)` makes; return both.

    All bytes are checked, no code in the file ever runs, and the weights have to fit to
    the letter; else it ends in one line (see `fail`). `settings` is what `train.py` was
    called with and `history` its epochs; both are empty in the lecture's checkpoints.
    """
    try:
        if not path.is_file():  # a pipe would be waited for
            fail(f"there is no checkpoint {path}: run train.py first, without --resume")
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            if archive.testzip():
                raise ValueError("its bytes have changed")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint = {"settings": {}, "history": [], **checkpoint}
        model, weights = build(checkpoint), checkpoint["model_state_dict"]
        model.load_state_dict(weights)
        for name, tensor in model.state_dict().items():
            if weights[name].dtype != tensor.dtype or not tensor.isfinite().all():
                raise ValueError(f"no finite {tensor.dtype} numbers in {name}")
        epoch, history = checkpoint["epoch"], checkpoint["history"]
        if epoch < 0 or (checkpoint["settings"] and len(history) != epoch + 1):
            raise ValueError("its epoch and its history do not agree")
        numbers = [row[key] for row in history for key in HISTORY]
        if not all(map(math.isfinite, [checkpoint["loss"], *numbers])):
            raise ValueError("no finite numbers in its history")
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        fail(f"{path} cannot be used: {str(error)[:200]}. Name another or train again")
    return model, checkpoint


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one CUDA's, or else the CPU.

    Never Apple's by itself: many versions of torch compute wrong gradients there for
    channels_last (github.com/pytorch/pytorch/issues/175189), and the CPU is fast enough.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        torch.zeros(1, device=device).item()  # is it really there?
        return device
    except (RuntimeError, AssertionError):
        fail(f"no device {name or best} here: try --device cpu")
