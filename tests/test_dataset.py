"""What dataset.py promises: the fast path, and where the images come from."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import pickle
import shutil
import tarfile
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import all_images
from PIL import Image
from torch.utils.data import DataLoader
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


def test_batch_path_and_single_path_agree_with_torchvision(data):
    images, labels = next(iter(DataLoader(data, batch_size=20)))
    mean, std = (
        [125.3 / 255, 123 / 255, 113.9 / 255],
        [63 / 255, 62.1 / 255, 66.7 / 255],
    )
    for i in range(20):
        image, label = data[i]
        assert torch.equal(image, images[i])
        assert label == labels[i] == LABELS[i]
        expected = F.normalize(F.to_image(PIXELS[i]) / 255, mean, std)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-5)


def test_training_batches_have_the_lecture_s_form(monkeypatch):
    monkeypatch.setattr(dataset, "synthetic_images", all_images)
    train_data, test_data = cifar_dataset(synthetic=True)
    images, labels = next(iter(DataLoader(train_data, batch_size=64, shuffle=True)))
    assert (images.shape, images.dtype) == ((64, 3, 32, 32), torch.float32)
    assert (labels.shape, labels.dtype) == ((64,), torch.int64)
    assert (len(train_data), len(test_data)) == (5000, 1000)
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
    first, _ = next(iter(DataLoader(copies, batch_size=2000)))
    assert torch.equal(first.unique(dim=0), possible.unique(dim=0))
    torch.manual_seed(3)
    again, _ = next(iter(DataLoader(copies, batch_size=2000)))
    assert torch.equal(again, first)

    seen = []  # of each copy: is it mirrored?
    for epoch in range(3):
        copies.set_epoch(epoch, 32, seed=1)
        images, _ = next(iter(DataLoader(copies, batch_size=2000)))
        seen.append((images[:, None] == possible[None, 25:]).flatten(2).all(2).any(1))
    assert 900 < seen[0].sum() < 1100
    assert torch.equal(seen[1], ~seen[0])
    assert torch.equal(seen[2], seen[0])
    copies.set_epoch(0, 24, seed=2)
    images, _ = next(iter(DataLoader(copies, batch_size=2000)))
    assert images.shape == (2000, 3, 24, 24)


# The official archive, small: two images of each class for training, two for testing.


def md5(data: bytes) -> str:
    return hashlib.md5(data).hexdigest()


@pytest.fixture
def archive(monkeypatch) -> bytes:
    """A small archive of the official layout; torchvision's md5s are set to its own."""
    batch, test_batch = (
        pickle.dumps(
            {"data": x.transpose(0, 3, 1, 2).reshape(20, -1), "labels": LABELS}
        )
        for x in SPLITS.values()
    )
    meta = pickle.dumps({"label_names": CLASSES})
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        files = {"data_batch_1": batch, "test_batch": test_batch, "batches.meta": meta}
        for name, data in files.items():
            info = tarfile.TarInfo(f"{CIFAR10.base_folder}/{name}")
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    monkeypatch.setattr(CIFAR10, "train_list", [["data_batch_1", md5(batch)]])
    monkeypatch.setattr(CIFAR10, "test_list", [["test_batch", md5(test_batch)]])
    monkeypatch.setattr(CIFAR10, "meta", CIFAR10.meta | {"md5": md5(meta)})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(packed.getvalue()))
    return packed.getvalue()


def assert_all_images(root):
    for data, expected_pixels in zip(cifar_dataset(root), SPLITS.values()):
        order = torch.argsort(data.labels, stable=True)
        expected = np.argsort(LABELS, kind="stable")
        assert data.labels[order].tolist() == sorted(LABELS)
        pixels = data.images[order].permute(0, 2, 3, 1).numpy()
        assert (pixels == expected_pixels[expected]).all()


def test_a_damaged_folder_stands_in_no_archive_s_way(archive, tmp_path):
    extracted(tmp_path, archive)
    (tmp_path / CIFAR10.base_folder / "test_batch").write_bytes(b"half")
    (tmp_path / CIFAR10.filename).write_bytes(archive)
    assert_all_images(tmp_path)


def test_altered_official_files_are_never_unpickled(archive, tmp_path, capsys):
    class Code:
        def __reduce__(self):
            return open, (str(tmp_path / "it ran"), "w")

    extracted(tmp_path, archive)
    (tmp_path / CIFAR10.filename).write_bytes(archive[: len(archive) // 2])
    (tmp_path / CIFAR10.base_folder / "test_batch").write_bytes(pickle.dumps(Code()))
    shutil.make_archive("own", "gztar", tmp_path, CIFAR10.base_folder)
    for root in (tmp_path, tmp_path / "own.tar.gz"):
        with pytest.raises(SystemExit, match="2"):
            cifar_dataset(root)
        assert "wrong md5" in capsys.readouterr().err
        assert not (tmp_path / "it ran").exists()


def gunzipped(root, archive):
    (root / "cifar-10-python.tar").write_bytes(gzip.decompress(archive))  # as Safari
    return root


def extracted(folder, archive):
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        tar.extractall(folder)
    return folder


def named(name, root, archive):
    (root / name).write_bytes(archive)
    return root


LAYOUTS = {
    "an archive": partial(named, CIFAR10.filename),
    "a second download": partial(named, "cifar-10-python (1).tar.gz"),
    "Safari's tar": gunzipped,
    "the folder": extracted,
    "the folder itself": lambda root, x: extracted(root, x) / CIFAR10.base_folder,
    "a renamed folder": lambda root, x: (
        extracted(root, x) / CIFAR10.base_folder
    ).rename(root / "CIFAR10"),
    "7-Zip's folder": lambda root, x: extracted(root / "cifar-10-python", x).parent,
    "the file itself": lambda root, x: named("mine.bin", root, x) / "mine.bin",
    "a path in quotes": lambda root, x: f'"{extracted(root, x)}"',
    "the tar itself": lambda root, x: gunzipped(root, x) / "cifar-10-python.tar",
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_what_a_person_s_tools_leave_is_found(archive, tmp_path, monkeypatch, layout):
    monkeypatch.setattr(dataset, "URLS", [])  # a download would fail
    root = layout(tmp_path, archive)
    before = sorted(tmp_path.rglob("*"))
    assert_all_images(root)
    assert sorted(tmp_path.rglob("*")) == before  # read where it lies


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"<!DOCTYPE html>", "15 bytes that begin with b'<!DOCTYPE html>'"),
        (b"version https://git-lfs.github.com/spec/v1", "b'version https://"),
        (b"", "0 bytes"),
        (b"\x1f\x8b half of it", "13 bytes"),
    ],
)
def test_an_archive_that_is_none_is_named(tmp_path, capsys, content, said):
    (tmp_path / CIFAR10.filename).write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        cifar_dataset(tmp_path)
    assert said in capsys.readouterr().err


def test_a_slip_in_the_archive_s_name_downloads_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(dataset, "download", None)
    with pytest.raises(SystemExit):
        dataset.cifar_dataset(tmp_path / "cifar-10-pyton.tar.gz")
    assert "there is no" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


# Images in class folders.


@pytest.fixture
def tree(tmp_path):
    for split, all_pixels in SPLITS.items():
        for i, (pixels, label) in enumerate(zip(all_pixels, LABELS)):
            folder = tmp_path / "my data" / split / CLASSES[label]
            folder.mkdir(parents=True, exist_ok=True)
            name = f"{i:04}.png" if i < 10 else f"{i:04}.webp"
            Image.fromarray(pixels).save(folder / name, lossless=True)
            for left_behind in (".DS_Store", "Thumbs.db", "desktop.ini"):
                (folder / left_behind).touch()
        (tmp_path / "my data" / split / "cat").rename(folder.parent / "Cat")
    return tmp_path / "my data"


def test_class_folders_hold_the_same_images(tree):
    assert_all_images(tree)
    assert_all_images(tree / "train")
    assert_all_images(tree.parent)


def test_another_data_set_beside_it_is_passed_over(tree, monkeypatch, capsys):
    for name in ("cat", "dog"):
        (tree.parent / "a/train" / name).mkdir(parents=True)
        Image.new("RGB", (200, 100)).save(tree.parent / "a/train" / name / "0.jpg")
    assert_all_images(tree.parent)
    (tree / "train" / "@eaDir").mkdir()  # as a NAS makes
    (tree / "train" / "@eaDir" / "0.jpg").write_bytes(b"no image")
    (tree / "train" / "dog" / "list.txt").write_text("1, 2")
    assert_all_images(tree)
    monkeypatch.setattr(dataset, "URLS", [])
    with pytest.raises(SystemExit, match="2"):
        cifar_dataset(tree.parent / "a")
    assert "no mirror has CIFAR-10 now" in capsys.readouterr().err


def test_only_the_split_that_is_needed_is_read(tree, capsys):
    shutil.rmtree(tree / "train")
    train_data, test_data = cifar_dataset(tree, splits=["test"])
    assert (train_data, len(test_data)) == (None, 20)


def cut(path):
    path.write_bytes(path.read_bytes()[:-200])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda train: shutil.rmtree(train / "ship"), "ship"),
        (lambda train: [p.unlink() for p in (train / "ship").iterdir()], "ship"),
        (lambda train: (train / "dog" / "a.png").write_bytes(b"no"), "a.png"),
        (lambda train: cut(train / "dog" / "0005.png"), "0005.png"),
        (lambda train: (train / "dog" / "b.png").mkdir(), "b.png"),
        (lambda train: Image.new("RGB", (40, 40)).save(train / "dog/c.png"), "40"),
        (shutil.rmtree, "train"),
    ],
)
def test_unusable_class_folders_are_refused_by_name(tree, capsys, damage, named):
    damage(tree / "train")
    with pytest.raises(SystemExit, match="2"):
        cifar_dataset(tree)
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


# The download, from a server of this test.


@pytest.fixture
def server(archive):
    """http://127.0.0.1:port/<kind> sends the archive well or badly."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            kind, body = self.path.strip("/"), archive
            if kind == "missing":
                return self.send_error(404)
            if kind == "chatter":
                return self.wfile.write(b"this is not HTTP\r\n")
            if kind == "page":
                body = b"<!DOCTYPE html><title>Sign in</title>"
            if kind == "altered":
                body = archive[:-20] + bytes(20)
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            half = kind in ("cut", "stalling")
            self.wfile.write(body[: len(body) // 2] if half else body)
            if kind == "stalling":
                self.wfile.flush()
                time.sleep(3)

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_download_names_what_fails_and_takes_the_next(
    server, archive, tmp_path, monkeypatch, capsys
):
    reasons = {
        "missing": "404",
        "cut": f"cut off or altered (wrong md5): {len(archive) // 2:,} bytes",
        "stalling": "timed out",
        "page": "b'<!DOCTYPE html>",
        "altered": f"cut off or altered (wrong md5): {len(archive):,} bytes",
        "chatter": "this is not HTTP",
    }
    nobody = "http://127.0.0.1:9/"
    mirrors = [nobody, "http://a..b/", *(server + kind for kind in reasons)]
    monkeypatch.setattr(dataset, "STALL", 1)
    monkeypatch.setattr(dataset, "URLS", [*mirrors, server + "good"])
    root = tmp_path / "new folder"
    root.mkdir()
    left_behind = root / f"{CIFAR10.filename}.0a1b2c3d.part"  # by a killed run
    left_behind.touch()
    os.utime(left_behind, (0, 0))
    growing = root / f"{CIFAR10.filename}.9c8b7a6d.part"  # another process's
    growing.touch()
    assert_all_images(root)
    out = capsys.readouterr().out
    for kind, reason in reasons.items():
        assert reason in out.split(server + kind)[1].split("http:")[0]
    assert {path.name for path in root.iterdir()} == {CIFAR10.filename, growing.name}

    shutil.rmtree(root)
    monkeypatch.setattr(dataset, "URLS", mirrors)
    with pytest.raises(SystemExit, match="2"):
        cifar_dataset(root)
    err = capsys.readouterr().err
    assert all(way in err for way in (CIFAR10.filename, "--data", "--synthetic"))
    assert list(root.iterdir()) == []


@pytest.mark.parametrize("reason", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_is_not_blamed_on_the_mirrors(
    tmp_path, monkeypatch, capsys, reason
):
    def full(*args, **kwargs):
        raise OSError(reason, "No space left on device")

    monkeypatch.setattr(torch.hub, "download_url_to_file", full)
    with pytest.raises(SystemExit, match="2"):
        cifar_dataset(tmp_path)
    out, err = capsys.readouterr()
    assert out.count("Downloading") == 1
    assert "No space left" in err


# Photos.


def test_a_photo_is_read_as_a_viewer_shows_it(tmp_path):
    grey = RANDOM.integers(0, 256, (40, 30), dtype=np.uint8)
    Image.fromarray(grey.astype(np.uint16) * 257).save("grey16.png")
    Image.fromarray(grey.astype(np.uint16) * 256).save("grey16.tif")
    for name in ("grey16.png", "grey16.tif"):
        pixels = np.asarray(dataset.read_image(name))
        assert (pixels == grey[:, :, None]).all()

    hidden = Image.fromarray(RANDOM.integers(0, 256, (40, 30, 3), dtype=np.uint8))
    shown = Image.new("L", hidden.size)
    shown.paste(255, (5, 5, 20, 30))
    for mode in ("RGB", "L"):
        white = Image.new(mode, hidden.size, "white")
        expected = Image.composite(hidden.convert(mode), white, shown).convert("RGB")
        cut_out = hidden.convert(mode)
        cut_out.putalpha(shown)
        cut_out.save("cut_out.png")
        pixels = np.asarray(dataset.read_image("cut_out.png"))
        assert (pixels == np.asarray(expected)).all()
    palette = hidden.quantize(255)
    palette.save("palette.png", transparency=7)
    clear = np.asarray(palette) == 7
    pixels = np.asarray(dataset.read_image("palette.png"))
    assert clear.any()
    assert (pixels[clear] == 255).all()
    assert (pixels[~clear] == np.asarray(palette.convert("RGB"))[~clear]).all()

    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: turned by 90 degrees
    hidden.save("turned.png", exif=turned)
    expected = np.rot90(np.asarray(hidden), -1)
    assert (np.asarray(dataset.read_image("turned.png")) == expected).all()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("photo.jpg", b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"),
        ("photo.png", b""),
        ("photo.tif", np.full((4, 4), 0.5, np.float32)),
        ("photo.tiff", np.full((4, 4), 2**20, np.int32)),
    ],
)
def test_a_photo_that_cannot_be_read_has_a_way_out(capsys, name, content):
    if isinstance(content, bytes):
        Path(name).write_bytes(content)
    else:
        Image.fromarray(content).save(name)
    with pytest.raises(SystemExit, match="2"):
        dataset.read_image(name)
    assert "save it as JPEG or PNG" in capsys.readouterr().err
