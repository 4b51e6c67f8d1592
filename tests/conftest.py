"""What several tests share: calling a script as a user does, and small runs."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest

# One thread, here and in the processes that tests start: the runs are small, and two
# threads wait for each other for ages when the machine is busy. Before torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # or lines would come at once in any case
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bits are promised on a CPU alone
os.environ["no_proxy"] = "*"  # the tests' server is on this machine
SCRIPTS = Path(__file__).resolve().parents[1]
# For plain `pytest`, and `--import-mode=importlib`, which finds no conftest otherwise.
sys.path[:0] = [str(SCRIPTS), str(SCRIPTS / "tests")]

import torch

import dataset
import train

if Path(train.__file__).resolve().parent != SCRIPTS:
    pytest.exit(f"start pytest in {SCRIPTS} alone", returncode=2)

# Runs that are to be small: a narrow network, and with `few_images` some 50 steps.
SMALL = ["--synthetic", "--width", "8", "--batch-size", "50", "--epochs", "3"]
CPU = torch.device("cpu")


@functools.cache
def some_images() -> dict:
    """1,000 of the synthetic images to train on, all 1,000 to test with."""
    images = dataset.synthetic_images()
    return images | {"train": tuple(x[:1000] for x in images["train"])}


@pytest.fixture
def few_images(monkeypatch):
    """In this test the scripts have fewer synthetic images; a process has them all."""
    images = some_images()
    monkeypatch.setattr(dataset, "synthetic_images", lambda: dict(images))


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    """Each test works in an empty folder of its own."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def call(monkeypatch, capsys):
    """call(script, *options) -> exit status, stdout, stderr."""

    def call(script, *options):
        monkeypatch.setattr(sys, "argv", [script.__name__ + ".py", *map(str, options)])
        with pytest.raises(SystemExit) as stop:
            dataset.run(script.main)
        return stop.value.code or 0, *capsys.readouterr()

    return call


@pytest.fixture
def refused(call, capsys):
    """The same for a user's mistake, in a function's arguments, too -> the one line."""

    def refused(what, *options, **named):
        if hasattr(what, "main"):
            status, _, err = call(what, *options)
        else:
            with pytest.raises(SystemExit) as stop:
                what(*options, **named)
            status, err = stop.value.code, capsys.readouterr().err
        assert (status, err[:7], err.count("\n")) == (2, "error: ", 1)
        assert "weights_only" not in err and "\x1b" not in err
        return err

    return refused


@pytest.fixture
def stopped(call, monkeypatch):
    """The same for a run that Ctrl-C stops when its first epoch is saved."""

    def stopped(script, *options):
        with monkeypatch.context() as patch:
            patch.setattr(train, "print_epoch", Mock(side_effect=KeyboardInterrupt))
            assert call(script, *options)[0] == 130

    return stopped


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The bytes of a checkpoint that train.py made of `few_images`."""
    path = tmp_path_factory.mktemp("trained") / "synthetic.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--checkpoint", str(path)])
        images = some_images()
        patch.setattr(dataset, "synthetic_images", lambda: dict(images))
        train.main()
    return path.read_bytes()


@pytest.fixture
def checkpoint(trained, few_images, tmp_path):
    """That checkpoint as ./synthetic.pth, and the images that it was made of."""
    path = tmp_path / "synthetic.pth"
    path.write_bytes(trained)
    return path


def start(script, *options, **how) -> subprocess.Popen:
    """A script as a process of its own; to be used in a `with`."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, script, *options], **pipes, **how)


def load(path) -> dict:
    return torch.load(path, weights_only=True)


def same_bits(first, second) -> bool:
    """Are two checkpoints equal in all but the seconds that they took?"""
    return plain(load(first)) == plain(load(second))


def plain(value):
    if isinstance(value, torch.Tensor):
        return value.dtype, value.shape, value.numpy().tobytes()
    if isinstance(value, dict):
        return {key: plain(x) for key, x in value.items() if key != "seconds"}
    return [plain(x) for x in value] if isinstance(value, list) else value
