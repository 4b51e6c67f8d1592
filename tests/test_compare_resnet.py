"""What compare_resnet.py promises: ResNet18 by the same loop, beside our own model."""

import shutil
import sys
from unittest.mock import Mock

import pytest
import torch
from conftest import same_bits
from torchvision.models import ResNet18_Weights, resnet18

import compare_resnet
import train
from dataset import CLASSES, ImageDataset, cifar_dataset

# Momentum, for Muon's steps of ResNet18's 11 million weights take long.
SHORT = ["--synthetic", "--batch-size", "25", "--epochs", "2"]
SHORT += ["--optimizer", "momentum"]


@pytest.fixture(autouse=True)
def few_images(monkeypatch):
    """Only 50 of the synthetic images: ResNet18 is slow."""

    def few(*args, **kwargs):
        train_data, test_data = cifar_dataset(*args, **kwargs)
        small = ImageDataset(train_data.images[:50], train_data.labels[:50], True)
        return small, ImageDataset(test_data.images[:50], test_data.labels[:50])

    monkeypatch.setattr(compare_resnet, "cifar_dataset", few)


def cut_to_one_epoch(monkeypatch):
    """Stop a run as Ctrl-C in its second epoch would."""
    whole_epoch, calls = train.train_epoch, []

    def train_epoch(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return whole_epoch(*args)

    monkeypatch.setattr(train, "train_epoch", train_epoch)


def test_trains_compares_and_reuses_what_is_finished(call, checkpoint, monkeypatch):
    status, out, err = call(compare_resnet, *SHORT)
    assert (status, err) == (0, "")
    assert out.count("Epoch: ") == 2
    written = torch.load("resnet18_cifar_synthetic.pth", weights_only=True)
    reference = resnet18(num_classes=10)
    reference.load_state_dict(written["model_state_dict"])
    _, test_data = compare_resnet.cifar_dataset("data", True)
    with torch.no_grad():
        images = torch.stack([image for image, _ in test_data])
        taken_for = reference.eval()(images).argmax(1)
    table = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    accuracy = (taken_for == test_data.labels).float().mean().item()
    assert table["test accuracy"][1] == f"{accuracy:.2%}"
    ships = (taken_for == test_data.labels)[test_data.labels == CLASSES.index("ship")]
    assert table["ship"][1] == f"{ships.float().mean().item():.2%}"
    expected = sum(weight.numel() for weight in reference.parameters())
    assert table["parameters"][1] == f"{expected:,}" == "11,181,642"
    # torchvision's own count for 224x224 images, which have 49 times as many pixels.
    published = ResNet18_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 / 49
    counted = int(table["MACs per image"][1].replace(",", ""))
    assert counted == pytest.approx(published, rel=1e-3)

    before = (checkpoint.parent / "resnet18_cifar_synthetic.pth").read_bytes()
    assert "Epoch: " not in call(compare_resnet, *SHORT)[1]
    assert (checkpoint.parent / "resnet18_cifar_synthetic.pth").read_bytes() == before

    with monkeypatch.context() as patch:
        cut_to_one_epoch(patch)
        cut = call(compare_resnet, *SHORT, "--resnet-checkpoint", "cut.pth")
    assert cut[0] == 130
    shutil.copy("cut.pth", "half.pth")
    out = call(compare_resnet, *SHORT, "--resnet-checkpoint", "half.pth")[1]
    assert "half.pth exists: the first epoch keeps it as" in out
    assert same_bits("half.pth", "resnet18_cifar_synthetic.pth")
    out = call(compare_resnet, *SHORT, "--resnet-checkpoint", "cut.pth", "--resume")[1]
    assert out.split("1 of 2 epochs are done")[1].count("Epoch: ") == 1
    assert same_bits("cut.pth", "resnet18_cifar_synthetic.pth")


def test_one_form_is_refused_for_the_other_by_name(call, refused, checkpoint):
    call(compare_resnet, *SHORT)
    before = (checkpoint.parent / "resnet18_cifar_synthetic.pth").read_bytes()
    plain = ["--resnet-checkpoint", "resnet18_cifar_synthetic.pth"]
    message = refused(compare_resnet, *SHORT, "--small-stem", *plain)
    assert "has model ResNet18, not ResNet18 with the small stem" in message
    same = ["--resnet-checkpoint", "synthetic.pth"]
    assert "has model CNN, not ResNet18" in refused(compare_resnet, *SHORT, *same)
    assert "has epochs 2, not 3" in refused(compare_resnet, *SHORT, "--epochs", "3")
    assert (checkpoint.parent / "resnet18_cifar_synthetic.pth").read_bytes() == before


def test_small_stem_keeps_all_pixels():
    images = torch.zeros(1, 3, 32, 32)
    seen = []
    for small in (False, True):
        resnet = compare_resnet.make_resnet(small)
        resnet.layer1.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
        assert resnet.eval()(images).shape == (1, 10)
    assert seen == [(1, 64, 8, 8), (1, 64, 32, 32)]


def test_what_is_missing_is_named_before_any_training(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(compare_resnet, "fit", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    assert "pip install matplotlib" in refused(
        compare_resnet, *SHORT, "--plot", "a.png"
    )
    monkeypatch.setitem(sys.modules, "matplotlib", Mock())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", Mock())
    saved = torch.load(checkpoint, weights_only=True)
    torch.save({**saved, "history": []}, checkpoint)
    assert "no history" in refused(compare_resnet, *SHORT, "--plot", "a.png")
    checkpoint.unlink()
    assert "train first" in refused(compare_resnet, *SHORT)


def test_nothing_is_trained_where_a_run_should_go_on(refused, checkpoint):
    missing = ["--resnet-checkpoint", "missing.pth"]
    assert "missing.pth" in refused(compare_resnet, *SHORT, *missing, "--resume")
