"""What compare_resnet.py promises: ResNet18 by the same loop, beside our own model."""

from pathlib import Path

import pytest
import torch
from conftest import load, same_bits
from torchvision.models import ResNet18_Weights, resnet18

import compare_resnet
import train
from dataset import CLASSES, ImageDataset, cifar_dataset

SHORT = ["--synthetic", "--batch-size", "25", "--epochs", "2"]
RESNET = Path("resnet18_cifar_synthetic.pth")


@pytest.fixture(autouse=True)
def very_few_images(monkeypatch):
    """Only 50 of the synthetic images: ResNet18 is slow."""

    def few(*args, **kwargs):
        both = cifar_dataset(*args, **kwargs)
        return (ImageDataset(x.images[:50], x.targets[:50], x.augment) for x in both)

    monkeypatch.setattr(compare_resnet, "cifar_dataset", few)


def test_trains_compares_and_reuses(call, refused, stopped, checkpoint, trained):
    status, out, err = call(compare_resnet, *SHORT)
    assert (status, err, out.count("Epoch: ")) == (0, "", 2)
    reference = resnet18(num_classes=10)
    reference.load_state_dict(load(RESNET)["model_state_dict"])
    _, test_data = compare_resnet.cifar_dataset("data", True)
    with torch.no_grad():
        images = torch.stack([image for image, _ in test_data])
        taken_for = reference.eval()(images).argmax(1)
    table = {line[:24].strip(): line[24:].split() for line in out.splitlines()}
    targets = torch.tensor(test_data.targets)
    right = (taken_for == targets).float()
    assert table["accuracy"][1] == f"{right.mean().item():.2%}"
    of_ships = right[targets == CLASSES.index("ship")]
    assert table["ship"][1] == f"{of_ships.mean().item():.2%}"
    expected = sum(weight.numel() for weight in reference.parameters())
    assert table["parameters"][1] == f"{expected:,}" == "11,181,642"
    # torchvision's own count for 224x224 images, which have 49 times as many pixels.
    published = ResNet18_Weights.IMAGENET1K_V1.meta["_ops"] * 1e9 / 49
    counted = int(table["MACs per image"][1].replace(",", ""))
    assert counted == pytest.approx(published, rel=1e-3)

    before = RESNET.read_bytes()
    assert "Epoch: " not in call(compare_resnet, *SHORT)[1]
    assert "has epochs 2, not 3" in refused(compare_resnet, *SHORT, "--epochs", "3")
    other_form = ["--small-stem", "--resnet-checkpoint", RESNET]
    message = refused(compare_resnet, *SHORT, *other_form)
    assert "has model ResNet18, not ResNet18 with the small stem" in message
    assert (RESNET.read_bytes(), checkpoint.read_bytes()) == (before, trained)

    stopped(compare_resnet, *SHORT, "--resnet-checkpoint", "cut.pth")
    out = call(compare_resnet, *SHORT, "--resnet-checkpoint", "cut.pth")[1]
    assert out.split("1 of 2 epochs are done")[1].count("Epoch: ") == 1
    assert same_bits("cut.pth", RESNET)


def test_small_stem_keeps_all_pixels():
    images = torch.zeros(1, 3, 32, 32)
    seen = []
    for small in (False, True):
        resnet = compare_resnet.make_resnet(small)
        resnet.layer1.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))
        assert resnet.eval()(images).shape == (1, 10)
    assert seen == [(1, 64, 8, 8), (1, 64, 32, 32)]


def test_what_is_missing_is_named_before_any_training(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(train, "train_epoch", None)
    same = ["--resnet-checkpoint", "synthetic.pth"]
    assert "has model CNN, not ResNet18" in refused(compare_resnet, *SHORT, *same)
    missing = ["--resnet-checkpoint", "missing.pth", "--resume"]
    assert "missing.pth" in refused(compare_resnet, *SHORT, *missing)
    checkpoint.unlink()
    assert "train first" in refused(compare_resnet, *SHORT)
