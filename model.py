"""The network, and the checkpoint as a file.

    model = CNN()                       # or CNN(width=64) for a network twice as wide
    model.whiten(images)                # optional: sets the first layer from images
    logits = model(images)              # (N, 3, 32, 32) -> (N, 10)

A checkpoint is a dict of numbers, strings and tensors with the lecture's keys `epoch`
(from 0), `model_state_dict`, `optimizer_state_dict` and `loss`; ours adds `settings`,
`history` and what a resume needs. It is written whole or not at all (`write_whole`), and
reading it takes three steps: the file is sound (`read_file`), it is a checkpoint
(`load_checkpoint`), and its weights fit the network (`load_weights`).
"""

from __future__ import annotations  # for Python 3.9, which macOS brings along

import codecs
import errno
import io
import itertools
import math
import os
import re
import shutil
import tarfile
import tempfile
import time
import warnings
import zipfile
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present

from dataset import fail, what_it_is

WIDTH = 32  # channels of the first block; the next have 2 and 4 times as many
MAX_WIDTH = 1024  # two gigabytes of weights: more is a slip or an attack
PATCH = 2  # px: the first layer looks at 2x2 patches, as in hlb-CIFAR10


def conv_norm(channels_in: int, channels: int) -> list[nn.Module]:
    conv = nn.Conv2d(channels_in, channels, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(channels)]


class Block(nn.Module):
    """A 3x3 convolution and a pooling to half the size, then `depth` more convolutions.

    Pooling comes before norm and GELU and leaves them a quarter of the work, as in
    KellerJordan/cifar10-airbench. A shortcut adds the halved features to what the
    `depth` convolutions make of them (He et al. 2015). Depths 1, 2, 2 instead of 1, 1, 1
    are worth 0.7 points for a tenth more time.
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
        features = self.blocks(features).amax((2, 3))  # so any size of image fits
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


# The checkpoint as a file.


def cannot_write(path: Path, error: OSError) -> NoReturn:
    fail(f"cannot write {path}: {error.strerror}. Name another file or make room")


def write_whole(path: Path, content: bytes, keep: Path | None = None):
    """Write the file `path` whole or not at all: cut short, the old one stays.

    `keep` is where a copy of the old one goes. A disk without room raises OSError;
    neither that nor Ctrl-C leaves anything else behind. Where another program holds the
    old file (on Windows a virus scanner or OneDrive), it is tried again for 1.5 s.
    """
    part = path.with_name(f"{path.name}.part")
    try:
        with open(part, "wb") as file:
            file.write(content)
            file.flush()
            sync(file)
        if keep and path.exists():
            shutil.copyfile(path, keep)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    for wait in (0.1, 0.2, 0.4, 0.8):  # s
        try:
            return os.replace(part, path)
        except PermissionError:
            time.sleep(wait)
    fail(
        f"another program holds {path}: close it, rename {part}, which holds the new "
        f"epoch, to {path.name}, and go on with --resume"
    )


def sync(file):
    """Wait until the file is on the disk, before it takes the old one's name."""
    try:
        os.fsync(file.fileno())
    except OSError as error:  # some network drives cannot say
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise


def free_name(path: Path) -> Path:
    """Where the old file is kept: cifar_cnn.old.pth, or .old2.pth where that is taken."""
    for number in itertools.count(1):
        old = f".old{number if number > 1 else ''}"
        free = path.with_name(f"{path.stem}{old}{path.suffix}")
        if not free.exists():
            return free


def save_checkpoint(checkpoint: dict, path: Path):
    """Write a checkpoint; the first epoch of a new run keeps what it replaces."""
    buffer = io.BytesIO()  # torch.save itself would call a full disk a RuntimeError
    torch.save(checkpoint, buffer)
    keep = free_name(path) if checkpoint["epoch"] == 0 else None
    try:
        write_whole(path, buffer.getbuffer(), keep)
    except OSError as error:
        cannot_write(path, error)


def try_to_write(path: Path, room: int):
    """Before time is spent: can `room` bytes be written beside the checkpoint `path`?"""
    try:
        if path.exists() and not path.is_file():
            fail(f"{path} is not a file: name one")
        with tempfile.TemporaryFile(dir=path.parent) as file:  # no crash leaves it
            file.write(bytes(room))
    except OSError as error:
        cannot_write(path, error)


def unusable(path: Path, reason: str) -> NoReturn:
    fail(
        f"{path} cannot be used: {reason}. Name another, or move it away and train again"
    )


def numpy_floats():
    """Where torch.load accepts NumPy's plain floats, too, each name allowed by itself.

    (From torch 2.6 on. They are what np.mean(losses) returns, so many checkpoints have
    one as their loss.)
    """
    if not hasattr(torch.serialization, "get_unsafe_globals_in_checkpoint"):
        return nullcontext()
    scalar = np.float64().__reduce__()[0]  # NumPy 1 and 2 call it by different names
    names = [(scalar, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]
    types = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]
    return torch.serialization.safe_globals([*names, *types, codecs.encode])


def read_file(path: Path):
    """What `torch.save` wrote, on the CPU; all bytes are checked, no code in it runs.

    (Files of torch before 1.6, or written so on purpose, have no checksums to check; its
    oldest, tars, could run code up to torch 2.5: CVE-2025-32434.)
    """
    if path.is_dir():
        unusable(path, "it is a folder (was the file unpacked?)")
    if not path.is_file():  # a pipe would be waited for
        fail(f"there is no {path.absolute()}: run train.py first, without --resume")
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
                if archive.testzip():
                    unusable(path, "its bytes have changed")
        elif tarfile.is_tarfile(path):
            unusable(path, "it is a tar")
        with warnings.catch_warnings(), numpy_floats():
            warnings.simplefilter("ignore")  # of torch's formats that we refuse anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        # torch's own words advise to let the file run code; ours never do.
        named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if named:
        unusable(
            path,
            f"it holds {named[1]}, not only tensors and plain numbers (a whole model?): "
            "save model.state_dict() and float(loss), as the lecture's train.py does",
        )
    unusable(path, f"it is no whole file of torch.save, but {what_it_is(path)}")


def load_checkpoint(path: Path) -> dict:
    """The checkpoint `path`, ours or the lecture's, checked but for its weights.

    `settings`, what train.py was called with, and `history`, a row for each epoch, are
    empty in the lecture's. What is no checkpoint ends in one line (see `fail`).
    """
    found = read_file(path)
    if not isinstance(found, dict):
        unusable(path, f"it holds a {type(found).__name__}, not a dict")
    if found and all(isinstance(value, torch.Tensor) for value in found.values()):
        wrapped = "{'epoch': 0, 'loss': 0.0, 'model_state_dict': model.state_dict()}"
        unusable(path, f"it holds bare weights: save {wrapped} instead")
    checkpoint = {"settings": {}, "history": [], **found}
    for key in ("epoch", "loss"):
        checkpoint[key] = plain_number(checkpoint.get(key))
    kinds = {"model_state_dict": dict, "epoch": int, "loss": (int, float)}
    for key, kind in (kinds | {"settings": dict, "history": list}).items():
        if not isinstance(checkpoint.get(key), kind):
            keys = ", ".join(map(str, found))
            unusable(
                path, f"its {key} is missing or of another kind (it has {keys[:200]})"
            )
    epoch, history = checkpoint["epoch"], checkpoint["history"]
    if epoch < 0 or (checkpoint["settings"] and len(history) != epoch + 1):
        unusable(path, "its epoch and its history do not agree")
    numbers = [checkpoint["loss"]]
    for row in history:
        numbers += row.values() if isinstance(row, dict) else [None]
    if not all(isinstance(x, (int, float)) and math.isfinite(x) for x in numbers):
        unusable(path, "its loss or its history is not all finite numbers")
    return checkpoint


def plain_number(value):
    """Python's own number for NumPy's, such as np.mean(losses), or a tensor of one."""
    single = isinstance(value, torch.Tensor) and value.numel() == 1
    return value.item() if single or isinstance(value, np.generic) else value


def load_weights(model: nn.Module, checkpoint: dict, path: Path, part: str = "model"):
    """Put the weights of a `part` of the checkpoint into `model`; they must fit exactly.

    Only what torch.compile and DataParallel put before each name may be there. Every
    evaluation reads the default part.
    """
    weights, own = checkpoint.get(f"{part}_state_dict"), model.state_dict()
    if not isinstance(weights, dict):
        unusable(path, f"it has no {part}_state_dict")
    for prefix in ("module.", "_orig_mod.", "module."):  # either may be the outer one
        if not any(name.startswith(prefix) for name in own):
            consume_prefix_in_state_dict_if_present(weights, prefix)
    if different := own.keys() ^ weights.keys():
        unusable(path, f"it is of another network: {min(different, key=str)} differs")
    for name, tensor in own.items():
        given = weights[name]
        if not isinstance(given, torch.Tensor) or form(given) != form(tensor):
            unusable(path, f"it is of another network: {name} differs")
        if not given.isfinite().all():
            unusable(path, f"{name} has a number that is not finite")
    model.load_state_dict(weights)


def form(tensor: torch.Tensor) -> tuple:
    return tensor.shape, tensor.is_floating_point(), tensor.layout


def load_cnn(path: Path) -> tuple[CNN, dict]:
    """The network of a checkpoint of ours or of the lecture's, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    name = checkpoint["settings"].get("model", "CNN")
    width = checkpoint["settings"].get("width", WIDTH)  # the lecture's has the default
    if name != "CNN":
        unusable(path, f"it holds {name}, not our CNN")
    if not isinstance(width, int) or not 0 < width <= MAX_WIDTH:
        unusable(path, f"its width is not from 1 to {MAX_WIDTH}")
    model = CNN(width)
    load_weights(model, checkpoint, path)
    return model, checkpoint


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one CUDA's where it works, or else the CPU.

    Never Apple's by itself: many versions of torch compute wrong gradients there for
    channels_last (github.com/pytorch/pytorch/issues/175189), and the CPU is fast enough.
    """
    best = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name or best)
        (torch.ones(1, device=device) + 1).item()  # does it really compute?
        return device
    except (RuntimeError, AssertionError):
        if name:
            fail(f"no device {name} here: try --device cpu")
        print("the GPU does not work with this version of PyTorch: the CPU is used")
        return torch.device("cpu")
