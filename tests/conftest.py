"""What several tests share: calling a script as a user does, and a few images."""

import functools
import os
import sys
from pathlib import Path

import pytest

# One thread, here and in the processes that tests start: the runs are small, and two
# threads wait for each other for ages when the machine is busy. Before torch is loaded.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.pop("PYTHONUNBUFFERED", None)  # or lines would come at once in any case
os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the same bits are promised on a CPU alone
os.environ["no_proxy"] = "*"  # the tests' server is on this machine
sys.path.insert(0, str(Path(__file__).parents[1]))  # plain `pytest` finds them, too

import torch

import dataset
import train

if Path(train.__file__).parent != Path(__file__).parents[1]:
    pytest.exit(f"start pytest in {Path(__file__).parents[1]} alone", returncode=2)

# Runs that are to be small: 20 steps in a whole epoch and a narrow network.
SMALL = ["--synthetic", "--width", "8", "--batch-size", "100", "--epochs", "3"]
all_images = dataset.synthetic_images


@functools.cache
def few_images():
    """2,000 of the synthetic images to train on, 1,000 to test with: in less time."""
    images = all_images()
    images["train"] = tuple(x[:2000] for x in images["train"])
    return images


dataset.synthetic_images = few_images  # here, not in the processes that tests start


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
def refused(call):
    """The same for a user's mistake: one line on stderr and status 2; returns it."""

    def refused(script, *options):
        status, _, err = call(script, *options)
        assert status == 2
        assert err.startswith("error: ")
        assert err.count("\n") == 1
        return err

    return refused


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """The bytes of a checkpoint that train.py made on synthetic images."""
    path = tmp_path_factory.mktemp("trained") / "synthetic.pth"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *SMALL, "--checkpoint", str(path)])
        train.main()
    return path.read_bytes()


@pytest.fixture
def checkpoint(trained, tmp_path):
    """That checkpoint as ./synthetic.pth."""
    path = tmp_path / "synthetic.pth"
    path.write_bytes(trained)
    return path


def same_bits(first, second) -> bool:
    """Are two checkpoints equal in all but the seconds that they took?"""
    first, second = (torch.load(path, weights_only=True) for path in (first, second))
    for row in first["history"] + second["history"]:
        row.pop("seconds")

    def equal(a, b):
        if isinstance(a, torch.Tensor):
            return torch.equal(a, b)
        if isinstance(a, dict):
            return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
        if isinstance(a, list):
            return len(a) == len(b) and all(map(equal, a, b))
        return a == b

    return equal(first, second)
