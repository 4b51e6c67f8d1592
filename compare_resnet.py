"""Train torchvision's ResNet18 by the same loop and compare it with our own model.

    python train.py             # first: the model that is compared
    python compare_resnet.py    # trains resnet18_cifar.pth, or takes the finished one

    python compare_resnet.py --small-stem       # made for 32x32 images: an hour on a CPU
    python compare_resnet.py --plot curves.png  # needs: pip install matplotlib

ResNet18 starts from random weights, as ours does: no pretrained part. `--checkpoint` is
our model and only read; `--resnet-checkpoint` is written, and the options of training
are for ResNet18.
"""

import argparse
import math
import time
from pathlib import Path

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from dataset import CLASSES, ImageDataset, cifar_dataset, command_line, run
from evaluation import (
    check_kind,
    check_matplotlib,
    confusions,
    draw_curves,
    predict,
)
from model import load_checkpoint, load_cnn, load_weights, pick_device, unusable
from train import STOPPED, check_room, fit, parse_options, settings_of

SMALL_STEM = "ResNet18 with the small stem"  # its name in settings and tables


def make_resnet(small_stem: bool) -> nn.Module:
    """ResNet18 for ten classes (He et al. 2015), weights drawn at random.

    Its stem is made for 224x224 images and leaves 8x8 of 32x32 pixels. With
    `small_stem` (3x3, stride 1, no pooling, as the paper's own networks for CIFAR-10
    begin) all 32x32 enter the first block.
    """
    resnet = resnet18(num_classes=10)
    if small_stem:
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    return resnet.to(memory_format=torch.channels_last)


def load_resnet(path: Path, settings: dict) -> tuple[nn.Module, dict]:
    """The ResNet18 of a checkpoint, in the form that `settings` name, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    found, name = checkpoint["settings"].get("model", "CNN"), settings["model"]
    if found != name:
        unusable(path, f"it holds {found}, not {name}")
    resnet = make_resnet(name == SMALL_STEM)
    load_weights(resnet, checkpoint, path)
    return resnet, checkpoint


def train_resnet(args: argparse.Namespace, train_data: ImageDataset, path, device):
    """Train the checkpoint `path` unless it is finished; return model and checkpoint."""
    name = SMALL_STEM if args.small_stem else "ResNet18"
    settings = settings_of(args, train_data) | {"model": name}
    resume = args.resume
    if path.exists():
        _, checkpoint = load_resnet(path, settings)
        done, epochs = checkpoint["epoch"] + 1, checkpoint["settings"].get("epochs")
        resume = resume or done == epochs
    torch.manual_seed(args.seed)
    resnet = make_resnet(args.small_stem)
    check_room(resnet, path, args)
    fit(resnet, train_data, settings, path, resume, device)
    return load_resnet(path, settings)


def measure(model, checkpoint: dict, path: Path, test_data: ImageDataset, device):
    """The figures of a model and its accuracy in each class (0 to 1).

    Each figure comes with its form, and with whether more is better (None: neither).
    """
    with FlopCounterMode(display=False) as counter:
        model.cpu().eval()(torch.zeros(1, 3, 32, 32))
    few = ImageDataset(test_data.images[:500], test_data.labels[:500])
    predict(model, few, device)  # what is slow only once is not timed
    start = time.perf_counter()
    logits = predict(model, test_data, device)
    seconds = time.perf_counter() - start
    table = confusions(logits, test_data.labels)
    # The lecture's checkpoints have no history.
    seconds_of = [row.get("seconds", math.nan) for row in checkpoint["history"]]
    trained = sum(seconds_of) or math.nan
    parameters = sum(weight.numel() for weight in model.parameters())
    figures = {
        "test accuracy": ((table.trace() / table.sum()).item(), ".2%", True),
        "parameters": (parameters, ",", False),
        "MACs an image": (counter.get_total_flops() // 2, ",", False),
        "training seconds": (trained, ",.0f", False),
        "training epochs": (checkpoint["epoch"] + 1, "", None),
        # One run differs from the next by 10 %.
        "images a second": (len(test_data) / seconds, ",.0f", None),
        "checkpoint (MB)": (path.stat().st_size / 1e6, ".1f", False),
    }
    return figures, (table.diagonal() / table.sum(1).clamp(min=1)).tolist()


def compare(ours, theirs, name: str):
    """Print the two models' figures side by side, and who is ahead on what."""
    (figures, classes), (their_figures, their_classes) = ours, theirs
    print(f"\n{'':24}{'our CNN':>14}{name:>30}")
    ahead = {"our CNN": [], name: []}
    for figure, (a, form, more) in figures.items():
        b = their_figures[figure][0]
        print(f"{figure:24}{a:>14{form}}{b:>30{form}}")
        if more is not None and (a > b or a < b):  # neither with nan
            ahead["our CNN" if (a > b) == more else name].append(figure)
    print("\naccuracy of each class")
    for label, a, b in zip(CLASSES, classes, their_classes):
        print(f"{label:24}{a:>14.2%}{b:>30.2%}")
    sides = [
        f"{who} is ahead on {', '.join(what) or 'nothing'}"
        for who, what in ahead.items()
    ]
    print(f"\n{'; '.join(sides)}.")


def main():
    parser = command_line(__doc__)
    add = parser.add_argument
    file = "ResNet18's checkpoint (default: resnet18_cifar.pth)"
    add("--resnet-checkpoint", metavar="FILE", help=file)
    add("--small-stem", action="store_true", help="the form for 32x32 images, slower")
    add("--plot", metavar="FILE", help="draw both histories (needs matplotlib)")
    args = parse_options(parser)
    if args.plot:
        check_matplotlib("--plot")
    default = "resnet18_small_stem" if args.small_stem else "resnet18_cifar"
    default += "_synthetic" if args.synthetic else ""
    resnet_path = Path(args.resnet_checkpoint or f"{default}.pth")
    path, device = args.checkpoint, pick_device(args.device)
    cnn, checkpoint = load_cnn(path)
    check_kind(checkpoint, args.synthetic, path)
    train_data, test_data = cifar_dataset(args.data, args.synthetic)
    resnet, resnet_checkpoint = train_resnet(args, train_data, resnet_path, device)
    ours = measure(cnn, checkpoint, path, test_data, device)
    name = resnet_checkpoint["settings"]["model"]
    theirs = measure(resnet, resnet_checkpoint, resnet_path, test_data, device)
    compare(ours, theirs, name)
    if args.plot:
        both = {"our CNN": checkpoint["history"], name: resnet_checkpoint["history"]}
        draw_curves(both, args.plot)


if __name__ == "__main__":
    run(main, STOPPED)
