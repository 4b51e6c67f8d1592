"""Train torchvision's ResNet18 by the same loop; compare it with our own model.

    python train.py             # first: the model that is compared
    python compare_resnet.py    # trains ResNet18, or takes the finished one
    python compare_resnet.py --small-stem    # for 32x32 images: one to four hours
    python evaluation.py --curves a.png resnet18_cifar.pth    # draws both

ResNet18 starts from random weights, as ours does: no pretrained part.
`--checkpoint` is our model and only read; `--resnet-checkpoint` is written,
and the options of training are for ResNet18.
"""

import math
from pathlib import Path

from dataset import CHECKPOINTS, CLASSES, ImageDataset, cifar_dataset  # isort: skip
import torch  # after dataset.py, which sets its environment
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models import resnet18

from dataset import command_line, run
from evaluation import confusions, load_checkpoint, load_cnn, load_weights, predict
from train import add_options, check_writable, fit, settings_of


def make_resnet(small_stem: bool) -> nn.Module:
    """ResNet18 for ten classes (He et al. 2015), weights drawn at random.

    Its stem is made for 224x224 images and leaves 8x8 of 32x32 pixels. With
    `small_stem` (3x3, stride 1, no pooling, as the paper's own networks for CIFAR-10
    begin) all 32x32 enter the first block.
    """
    resnet = resnet18(num_classes=len(CLASSES))
    if small_stem:
        resnet.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        resnet.maxpool = nn.Identity()
    return resnet.to(memory_format=torch.channels_last)


def measure(model, path: Path, test_data: ImageDataset, device) -> dict[str, str]:
    """The figures of a model and its checkpoint: in all, then accuracy in each class."""
    checkpoint = load_checkpoint(path)
    load_weights(model, checkpoint["model_state_dict"])  # maybe not memory's: averaged
    with FlopCounterMode(display=False) as counter:
        model.cpu().eval()(torch.zeros(1, 3, 32, 32))
    table = confusions(predict(model, test_data, device), test_data.targets)
    # The lecture's checkpoints have no history.
    trained = sum(row.get("seconds", math.nan) for row in checkpoint["history"])
    figures = {
        "accuracy": f"{table.trace() / table.sum():.2%}",
        "parameters": f"{sum(weight.numel() for weight in model.parameters()):,}",
        "MACs per image": f"{counter.get_total_flops() // 2:,}",
        "training seconds": f"{trained or math.nan:,.0f}",
        "training epochs": f"{checkpoint['epoch'] + 1}",
        "checkpoint (MB)": f"{path.stat().st_size / 1e6:.1f}",
    }
    of_classes = table.diagonal() / table.sum(1)
    return figures | {x: f"{y:.2%}" for x, y in zip(CLASSES, of_classes.tolist())}


def main():
    parser = command_line(__doc__)
    add_options(parser)
    add = parser.add_argument
    add("--resnet-checkpoint", type=Path, metavar="FILE", help="ResNet18's, written")
    add("--small-stem", action="store_true", help="the form for 32x32 images, slower")
    args = parser.parse_args()
    default = "resnet18_small_stem" if args.small_stem else "resnet18_cifar"
    default += "_synthetic" if args.synthetic else ""
    path = args.checkpoint or CHECKPOINTS[args.synthetic]
    resnet_path = args.resnet_checkpoint or Path(f"{default}.pth")
    kind = {"synthetic": args.synthetic, "holdout": args.holdout}
    cnn, _ = load_cnn(path, **kind)
    train_data, test_data = cifar_dataset(args.data, **kind)
    held_out = test_data if args.holdout else None  # never the test images
    name = "ResNet18 with the small stem" if args.small_stem else "ResNet18"
    settings = {"model": name, **settings_of(args, train_data, held_out)}
    resume = args.resume or resnet_path.exists()  # of a finished one no epoch is left
    check_writable(resnet_path, resume)
    torch.manual_seed(args.seed)
    resnet = make_resnet(args.small_stem)
    ours = measure(cnn, path, test_data, args.device)
    fit(resnet, train_data, held_out, settings, resnet_path, resume, args.device)
    theirs = measure(resnet, resnet_path, test_data, args.device)
    print(f"\n{'':24}{'our CNN':>14}{name:>30}")
    for figure, value in ours.items():
        print(f"{figure:24}{value:>14}{theirs[figure]:>30}")


if __name__ == "__main__":
    run(main)
