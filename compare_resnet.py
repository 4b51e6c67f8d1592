"""Train torchvision's ResNet18 by the same loop; compare it with our own model.

    python train.py             # first: the model that is compared
    python compare_resnet.py    # trains ResNet18, or takes the finished one

    python compare_resnet.py --small-stem    # for 32x32 images: an hour
    python compare_resnet.py --plot a.png    # needs: pip install matplotlib

ResNet18 starts from random weights, as ours does: no pretrained part.
`--checkpoint` is our model and only read; `--resnet-checkpoint` is written,
and the options of training are for ResNet18.
"""

import math
import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # both as in train.py
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

import dataset
import evaluation
from dataset import CLASSES, ImageDataset, cifar_dataset
from evaluation import load_checkpoint, load_cnn, predict
from model import LOGIT_DIVISOR
from train import STOPPED, check_room, fit, parse_options, settings_of


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
    # Our recipe needs the divided logits and fixed norm weights; a hook renames no weight.
    resnet.fc.register_forward_hook(lambda *call: call[2] / LOGIT_DIVISOR)
    for module in resnet.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.requires_grad_(False)
    return resnet.to(memory_format=torch.channels_last)


def measure(model, checkpoint: dict, path: Path, test_data: ImageDataset, device):
    """The figures of a model, as texts: in all, then its accuracy in each class."""
    with FlopCounterMode(display=False) as counter:
        model.cpu().eval()(torch.zeros(1, 3, 32, 32))
    logits = predict(model, test_data, device)
    table = evaluation.confusions(logits, test_data.labels)
    # The lecture's checkpoints have no history.
    trained = sum(row.get("seconds", math.nan) for row in checkpoint["history"])
    figures = {
        "test accuracy": f"{table.trace() / table.sum():.2%}",
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "MACs per image": f"{counter.get_total_flops() // 2:,}",
        "training seconds": f"{trained or math.nan:,.0f}",
        "training epochs": f"{checkpoint['epoch'] + 1}",
        "checkpoint (MB)": f"{path.stat().st_size / 1e6:.1f}",
    }
    of_classes = table.diagonal() / table.sum(1)
    return figures | {x: f"{y:.2%}" for x, y in zip(CLASSES, of_classes.tolist())}


def main():
    parser = dataset.command_line(__doc__)
    add = parser.add_argument
    file = "ResNet18's checkpoint (default: resnet18_cifar.pth)"
    add("--resnet-checkpoint", metavar="FILE", help=file)
    add("--small-stem", action="store_true", help="the form for 32x32 images, slower")
    add("--plot", metavar="FILE", help="draw both histories (needs matplotlib)")
    args = parse_options(parser)
    default = "resnet18_small_stem" if args.small_stem else "resnet18_cifar"
    default += "_synthetic" if args.synthetic else ""
    path, device = args.checkpoint, dataset.pick_device(args.device)
    resnet_path = dataset.file_path(args.resnet_checkpoint or f"{default}.pth")
    cnn, checkpoint = load_cnn(path)
    evaluation.check_kind(checkpoint, args)
    if args.plot:
        evaluation.check_drawing("--plot", {"our CNN": checkpoint["history"]})
    source = args.data, args.synthetic, dataset.SPLITS, args.holdout
    train_data, test_data = cifar_dataset(*source)
    name = "ResNet18 with the small stem" if args.small_stem else "ResNet18"
    settings = {"model": name, **settings_of(args, train_data)}
    resume = args.resume  # a finished one, too: no epoch is left, it is only read
    if resnet_path.exists():
        found = load_checkpoint(resnet_path)
        resume = resume or found["epoch"] + 1 == found["settings"].get("epochs")
    torch.manual_seed(args.seed)
    resnet = make_resnet(args.small_stem)
    check_room(resnet, resnet_path, resume)
    trained = fit(resnet, train_data, settings, resnet_path, resume, device)
    ours = measure(cnn, checkpoint, path, test_data, device)
    theirs = measure(resnet, trained, resnet_path, test_data, device)
    print(f"\n{'':24}{'our CNN':>14}{name:>30}")
    for figure, value in ours.items():
        print(f"{figure:24}{value:>14}{theirs[figure]:>30}")
    if args.plot:
        histories = {"our CNN": checkpoint["history"], name: trained["history"]}
        evaluation.draw_curves(histories, args.plot)


if __name__ == "__main__":
    dataset.run(main, STOPPED)
