"""What dataset.py promises: the fast path, and where the images come from."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import socket
import tarfile
import threading
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import BatchSampler, DataLoader, Subset, random_split
from torchvision.datasets import CIFAR10
from torchvision.transforms.v2 import functional as F

import dataset
from dataset import CLASSES, ImageDataset, cifar_dataset

RANDOM = np.random.default_rng(0)
PIXELS = RANDOM.integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)  # two of each class
SPLITS = {"train": PIXELS, "test": 255 - PIXELS}
LABELS = list(range(10)) * 2


@pytest.fixture
def data():
    return ImageDataset(torch.from_numpy(PIXELS).permute(0, 3, 1, 2), LABELS)


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.setattr(dataset, "download", lambda _: pytest.fail("it downloads"))


def test_batch_path_and_single_path_agree_with_torchvision(data):
    images, labels = next(iter(DataLoader(data, batch_size=20)))
    mean, std = (np.divide(x, 255) for x in ([125.3, 123, 113.9], [63, 62.1, 66.7]))
    for i in range(20):
        image, label = data[i]
        assert torch.equal(image, images[i])
        assert label == labels[i] == LABELS[i]
        expected = F.normalize(F.to_image(PIXELS[i]) / 255, mean, std)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_data_and_batches_have_the_form_of_the_lecture_s_and_torchvision_s():
    train_data, test_data = cifar_dataset(synthetic=True)
    images, labels = next(iter(DataLoader(train_data, batch_size=64, shuffle=True)))
    assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert (len(train_data), len(test_data)) == (5000, 1000)
    assert type(test_data.targets) is list and {*map(type, test_data.targets)} == {int}
    assert (test_data.classes, test_data.targets[:11]) == (CLASSES, [*range(10), 0])
    assert [test_data.class_to_idx[name] for name in CLASSES] == [*range(10)]
    with pytest.raises(AttributeError):
        test_data.transform = print  # it would change nothing
    assert any(not torch.equal(train_data[0][0], train_data[0][0]) for _ in range(20))
    assert torch.equal(test_data[0][0], test_data[0][0])


def test_each_image_draws_its_own_mirror_and_shift(data):
    padded = np.pad(PIXELS[0], ((2, 2), (2, 2), (0, 0)), mode="reflect")
    crops = [padded[y : y + 32, x : x + 32] for y in range(5) for x in range(5)]
    possible = torch.from_numpy(np.stack([crops, np.flip(crops, 2)])).flatten(0, 1)
    possible = dataset.normalize(possible.permute(0, 3, 1, 2))
    assert len(possible.unique(dim=0)) == 50
    copies = ImageDataset(data.images[:1].expand(2000, -1, -1, -1), [0] * 2000, True)
    torch.manual_seed(3)
    first = read_all(copies)
    assert torch.equal(first.unique(dim=0), possible.unique(dim=0))
    torch.manual_seed(3)
    assert torch.equal(read_all(copies), first)  # a seed fixes them

    mirrored = []  # of each copy: is it, in this epoch?
    for epoch in range(3):
        copies.set_epoch(epoch, 32, seed=1)
        matches = read_all(copies)[:, None] == possible[None, 25:]
        mirrored.append(matches.flatten(2).all(2).any(1))
    assert 900 < mirrored[0].sum() < 1100
    assert torch.equal(mirrored[1], ~mirrored[0])
    assert torch.equal(mirrored[2], mirrored[0])
    copies.set_epoch(0, 24, seed=2)
    assert read_all(copies).shape == (2000, 3, 24, 24)


def test_each_image_draws_its_own_brightness_and_contrast(monkeypatch):
    monkeypatch.setattr(dataset, "SHIFT", 0)
    two_tones = torch.tensor([50, 200], dtype=torch.uint8).repeat(16)
    data = ImageDataset(two_tones.expand(500, 3, 32, 32), [0] * 500, augment=True)
    data.jitter = 0.14
    torch.manual_seed(4)
    low, high = read_all(data).flatten(2).aminmax(dim=2)
    dark, bright = dataset.normalize(data.images[:1])[0, :, 0, :2].unbind(1)
    contrast = (high - low) / (bright - dark)
    light = low / contrast - dark
    for x, middle in ((contrast, 1), (light, 0)):  # of all three colours alike
        torch.testing.assert_close(x, x[:, :1].expand(-1, 3), rtol=0, atol=1e-5)
        assert -0.14 < (x - middle).min() < -0.13 < 0.13 < (x - middle).max() < 0.14
    assert abs(torch.corrcoef(torch.stack([contrast[:, 0], light[:, 0]]))[0, 1]) < 0.2


def read_all(data) -> torch.Tensor:
    return next(iter(DataLoader(data, batch_size=len(data))))[0]


# What others' code expects of a torchvision data set.
@pytest.mark.parametrize("index", [torch.tensor(3), np.int64(3), np.uint8(3), -17])
def test_an_index_is_any_number(data, index):
    image, label = data[index]
    assert torch.equal(image, data[3][0]) and label == 3 and type(label) is int


@pytest.mark.parametrize("index", [slice(0, 4), [0, 1, 2], "1", 1.0, 20], ids=str)
def test_other_indices_are_errors(data, index):
    with pytest.raises(IndexError if index == 20 else TypeError):
        data[index]


def test_subsets_and_samplers_give_the_images_they_name(data):
    def read(*how, of=data, **more):
        return [labels.tolist() for _, labels in DataLoader(of, *how, **more)]

    many = ImageDataset(data.images.repeat(4, 1, 1, 1), LABELS * 4)
    batches = read(60, of=Subset(many, torch.arange(64)))
    assert batches == [[i % 10 for i in range(60)], [0, 1, 2, 3]]  # a short last one
    assert read(3, sampler=torch.tensor([7, 11, 19, 4])) == [[7, 1, 9], [4]]
    assert read(batch_sampler=[(5, 16), (np.int64(17),)]) == [[5, 6], [7]]
    tensors = BatchSampler(torch.tensor([8, 12, 3]), 2, drop_last=True)
    assert read(batch_sampler=tensors) == [[8, 2]]


@pytest.mark.filterwarnings("ignore:.*fork")
def test_random_splits_and_workers(data):
    parts = random_split(data, [15, 5])
    assert sorted(i for part in parts for i in part.indices) == list(range(20))
    for part in parts:
        here, there = (list(DataLoader(part, 4, num_workers=n)) for n in (0, 2))
        assert str(here) == str(there)


# The official archive, small: two images of each class for training, two for testing.
def pack(files: dict[str, bytes]) -> bytes:
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return packed.getvalue()


def batch(pixels) -> bytes:
    rows = pixels.transpose(0, 3, 1, 2).reshape(20, -1)
    return pickle.dumps({"data": rows, "labels": LABELS})


FILES = {"data_batch_1": batch(PIXELS), "test_batch": batch(255 - PIXELS)}


@pytest.fixture
def archive(monkeypatch) -> bytes:
    """A small archive of the official layout; torchvision's md5s are set to its own."""
    for name, of in zip(FILES, ("train_list", "test_list")):
        md5 = hashlib.md5(FILES[name]).hexdigest()
        monkeypatch.setattr(CIFAR10, of, [[name, md5]])
    return pack(FILES | {"batches.meta": pickle.dumps({"label_names": CLASSES})})


def assert_all_images(root):
    for data, expected in zip(cifar_dataset(root), SPLITS.values()):
        order, of_all = (np.argsort(x, kind="stable") for x in (data.targets, LABELS))
        assert sorted(data.targets) == sorted(LABELS)
        pixels = data.images[order].permute(0, 2, 3, 1).numpy()
        assert (pixels == expected[of_all]).all()


def named(name, root, archive):
    (root / name).write_bytes(archive)
    return root


def itself(root, _):  # the folder
    (folder := root / CIFAR10.base_folder).mkdir(parents=True)
    for name, content in FILES.items():
        (folder / name).write_bytes(content)
    return folder


def extracted(root, _):
    return itself(root, _).parent


def gunzipped(root, archive):  # as Safari does
    return named("cifar-10-python.tar", root, gzip.decompress(archive))


LAYOUTS = {
    "an archive": partial(named, CIFAR10.filename),
    "a second download": partial(named, "cifar-10-python (1).tar.gz"),
    "Safari's tar": gunzipped,
    "the folder": extracted,
    "the folder itself": itself,
    "7-Zip's folder": lambda root, x: extracted(root / "cifar-10-python", x).parent,
    "the file itself": lambda root, x: named("mine.bin", root, x) / "mine.bin",
    "the tar itself": lambda root, x: gunzipped(root, x) / "cifar-10-python.tar",
    "half a download, too": lambda root, x: named(
        CIFAR10.filename, named(f"{CIFAR10.filename}.crdownload", root, x[:99]), x
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_a_person_s_tools_leave_is_found(archive, tmp_path, no_download, layout):
    root = layout(tmp_path, archive)
    before = sorted(tmp_path.rglob("*"))
    assert_all_images(root)
    assert sorted(tmp_path.rglob("*")) == before  # read where it lies


def test_altered_files_are_never_unpickled(archive, tmp_path, no_download, refused):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    folder = itself(tmp_path, archive)
    named(CIFAR10.filename, tmp_path, archive)  # the first place found is the one read
    (folder / "test_batch").write_bytes(pickle.dumps(Code()))
    shutil.make_archive("own", "gztar", tmp_path, CIFAR10.base_folder)
    for root, place in ((tmp_path, folder), ("own.tar.gz", "own.tar.gz")):
        message = refused(cifar_dataset, root)
        assert f"error: {place} cannot be used (test_batch is altered" in message
        assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    "content", [b"<!DOCTYPE html>", b"", b"\x1f\x8b half of it", pack({})]
)
def test_an_archive_that_is_none_is_named(tmp_path, no_download, refused, content):
    named(CIFAR10.filename, tmp_path, content)
    assert f"{CIFAR10.filename} cannot be used" in refused(cifar_dataset, tmp_path)


def test_a_slip_in_a_name_downloads_nothing(tmp_path, no_download, refused):
    for slip in ("cifar-10-pyton.tar.gz", "no folder/data"):
        assert slip in refused(cifar_dataset, tmp_path / slip).replace("\\", "/")
        assert not any(tmp_path.iterdir())


# Images in class folders.
@pytest.fixture
def tree(tmp_path, no_download):
    for split, all_pixels in SPLITS.items():
        for i, (pixels, label) in enumerate(zip(all_pixels, LABELS)):
            folder = tmp_path / "my data" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{i:04}{['.png', '.webp', '.bmp'][i % 3]}"
            Image.fromarray(pixels).save(folder / name, lossless=True)
            for left_behind in (".DS_Store", "Thumbs.db", "desktop.ini"):
                (folder / left_behind).touch()
    return tmp_path / "my data"


def test_class_folders_hold_the_same_images(tree):
    assert_all_images(tree)
    assert_all_images(tree.parent)
    for split in SPLITS:
        (tree / split / "cat").rename(tree / split / "Cat")
        (tree / split).rename(tree / split.capitalize())
    assert_all_images(tree)
    shutil.rmtree(tree / "Train")
    train_data, test_data = cifar_dataset(tree, splits=["test"])
    assert (train_data, len(test_data)) == (None, 20)  # only what is needed is read


def test_what_is_not_ours_is_passed_over(tree, refused):
    for name in ("cat", "dog"):  # another data set, beside ours
        (tree.parent / "a/train" / name).mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(tree.parent / "a/train" / name / "0.jpg")
    assert_all_images(tree.parent)
    (tree / "train" / "@eaDir").mkdir()  # as a NAS makes
    (tree / "train" / "@eaDir" / "0.jpg").write_bytes(b"no image")
    (tree / "train" / "dog" / "list.txt").write_text("1, 2")
    assert_all_images(tree)
    assert "nothing of it is read: train" in refused(cifar_dataset, tree.parent / "a")
    for number, name in enumerate(CLASSES):
        for split in SPLITS:
            (tree / split / name).rename(tree / split / str(number))
    assert "airplane/ to truck/" in refused(cifar_dataset, tree)


@pytest.mark.parametrize("place", [".", "data", "a/b"])
def test_of_two_sets_of_images_none_is_guessed(archive, tree, refused, place):
    (tree / place).mkdir(parents=True, exist_ok=True)
    named(CIFAR10.filename, tree / place, archive)
    message = refused(cifar_dataset, tree, splits=["test"])
    assert f"both {tree / place / CIFAR10.filename} and {tree / 'test'}" in message


# A grader's own images in a form that is not read, and a folder named `data` of that.
HIDDEN = ["airplane/1.png", "training/airplane/1.png", "val/cat/1.png", "1.png"]
HIDDEN += ["test/1.png", "cifar10.zip", "cifar-10-batches-bin/test_batch.bin"]


@pytest.mark.parametrize("name", HIDDEN)
def test_a_named_folder_is_never_answered_for_by_others(no_download, refused, name):
    file = Path("hidden", name)
    file.parent.mkdir(parents=True)
    file.touch()
    message = refused(cifar_dataset, "hidden", splits=["test"])
    assert f"nothing of it is read: {name.split('/')[0]})" in message
    assert CIFAR10.filename in message and "test/" in message
    if name.startswith("test/"):
        Path("hidden").rename("data")  # the default
        assert "nothing of it is read" in refused(cifar_dataset)


def test_an_empty_folder_gets_the_download(monkeypatch):
    monkeypatch.setattr(dataset, "download", lambda root: {"test": (PIXELS, LABELS)})
    Path("new").mkdir()
    Path("new/.DS_Store").touch()
    Path("data/MNIST").mkdir(parents=True)  # the default may hold other data sets
    for root in ("new", "data"):
        assert len(cifar_dataset(root, splits=["test"])[1]) == 20


def test_held_out_images_are_the_last_tenth_of_each_class(few_images):
    kept, held = cifar_dataset(synthetic=True, holdout=True)
    whole, _ = cifar_dataset(synthetic=True)
    for label in range(10):
        all_data = (whole, kept, held)
        images, *parts = (x.images[torch.tensor(x.targets) == label] for x in all_data)
        assert torch.equal(torch.cat(parts), images)
        assert len(parts[1]) == len(images) // 10
    assert (kept.augment, held.augment) == (True, False)


UNUSABLE = {
    "no ship": lambda train: shutil.rmtree(train / "ship"),
    "dog/no_image.png": lambda train: (train / "dog/no_image.png").write_bytes(b"no"),
    "dog/0005.bmp": lambda train: os.truncate(train / "dog/0005.bmp", 1000),
    "dog/folder.png": lambda train: (train / "dog/folder.png").mkdir(),
    "dog/c.png": lambda train: Image.new("RGB", (40, 40)).save(train / "dog/c.png"),
    "train": shutil.rmtree,
    ".png": lambda train: [x.rename(f"{x}.tif") for x in train.glob("cat/*")],
}


@pytest.mark.parametrize("what", UNUSABLE)
def test_unusable_class_folders_are_refused_by_name(tree, refused, what):
    UNUSABLE[what](tree / "train")
    assert what.split()[-1] in refused(cifar_dataset, tree).replace("\\", "/")


# The download, from a server of this test.
@pytest.fixture
def server(archive):
    """http://127.0.0.1:port/<kind> sends the archive well or badly."""
    over = threading.Event()

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, body = self.path.strip("/"), archive
            if kind == "chatter":
                return self.wfile.write(b"this is not HTTP\r\n")
            if kind == "page":
                body = b"<!DOCTYPE html><title>Sign in</title>"
            if kind == "altered":
                body = pack({"data_batch_1": b"x", "test_batch": b"y"})
            self.send_response(404 if kind == "missing" else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            half = len(body) // 2 if kind in ("cut", "stalling") else None
            self.wfile.write(body[:half])
            if kind == "stalling":
                over.wait(30)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        over.set()
        server.shutdown()
    socket.setdefaulttimeout(None)


def test_a_mirror_that_fails_is_named(server, monkeypatch, capsys, refused):
    """And the next is tried; where all fail, there are three ways out."""
    reasons = {"missing": "404", "stalling": "timed out", "cut": "", "page": ""}
    reasons |= {"altered": "data_batch_1 is altered", "chatter": "this is not HTTP"}
    bad = ["http://127.0.0.1:9/", "http://a..b/", *(server + kind for kind in reasons)]
    monkeypatch.setattr(dataset, "STALL", 1)
    monkeypatch.setattr(dataset, "URLS", [*bad, server + "good"])
    Path("data").mkdir()
    assert_all_images("data")
    out = capsys.readouterr().out
    assert out.count("  failed: ") == len(bad)
    for kind, reason in reasons.items():
        assert reason in out.split(server + kind)[1].split("Downloading")[0]
    assert [path.name for path in Path("data").iterdir()] == [CIFAR10.filename]

    monkeypatch.setattr(dataset, "URLS", [server + "missing", server + "page"])
    assert_all_images("data")  # not a second time
    refused(dataset.download, Path("data"))  # nor is another process's touched
    assert [path.name for path in Path("data").iterdir()] == [CIFAR10.filename]
    Path("data", CIFAR10.filename).unlink()
    message = refused(cifar_dataset)
    assert all(way in message for way in (CIFAR10.filename, "--data", "--synthetic"))
    assert list(Path("data").iterdir()) == []


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT, errno.EACCES])
def test_our_disk_is_not_the_mirrors_fault(tmp_path, monkeypatch, refused, reason):
    fails = Mock(side_effect=OSError(reason, "no way"))
    for module, name in ((torch.hub, "download_url_to_file"), (Path, "mkdir")):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, fails)
            message = refused(cifar_dataset, tmp_path)
        assert f"error: {tmp_path} cannot be used (no way)" in message


# Photos.
def pixels(name) -> np.ndarray:
    return np.asarray(dataset.read_image(name))


@pytest.fixture
def photo() -> Image.Image:
    return Image.fromarray(RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8))


def test_transparency_is_laid_on_white(photo):
    shown = Image.new("L", photo.size)
    shown.paste(255, (5, 5, 20, 30))
    for mode in ("RGB", "L"):
        cut_out, white = photo.convert(mode), Image.new(mode, photo.size, "white")
        expected = Image.composite(cut_out, white, shown).convert("RGB")
        cut_out.putalpha(shown)
        cut_out.save("cut_out.png")
        assert (pixels("cut_out.png") == np.asarray(expected)).all()
    palette = photo.quantize(255)
    palette.save("palette.png", transparency=7)
    clear = np.asarray(palette) == 7
    found = pixels("palette.png")
    assert clear.any() and (found[clear] == 255).all()
    assert (found[~clear] == np.asarray(palette.convert("RGB"))[~clear]).all()


def test_a_photo_is_turned_as_its_exif_says(photo):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turned by 90 degrees
    photo.save("turned.png", exif=turned)
    assert (pixels("turned.png") == np.rot90(np.asarray(photo), -1)).all()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32, None])
def test_a_photo_that_cannot_be_read_has_a_way_out(refused, kind):
    if kind:  # of more than 8 bits
        Image.fromarray(np.full((4, 4), 40_000, kind)).save("photo.tif")
    else:
        Path("photo.tif").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    message = refused(dataset.read_image, "photo.tif")
    assert "photo.tif" in message and "save it as JPEG or PNG" in message


def test_a_gpu_that_does_not_work_is_named(monkeypatch, refused):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch.cuda.device_count() == 0  # the tests hide it, see conftest.py
    message = refused(dataset.command_line("").parse_args, [])
    assert "device cuda cannot be used" in message and "--device cpu" in message
