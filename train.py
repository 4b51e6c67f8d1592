"""Train the classifier on CIFAR-10's training images; save it after each epoch.

    python train.py                 # thirteen epochs, some minutes on a CPU
    python train.py --resume        # go on after a break, as if there had been none
    python train.py --synthetic     # synthetic images, into synthetic.pth

Measured: 90.0 % of the test images right (mean of three seeds) after three minutes on
two cores. The test images are not used here: that is what evaluation.py is for.
"""

import argparse
import sys
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.hub import tqdm  # the progress bar, without one more package
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dataset import (
    ImageDataset,
    cifar_dataset,
    command_line,
    fail,
    normalize,
    parse,
    run,
)
from model import (
    CNN,
    MAX_WIDTH,
    WIDTH,
    free_name,
    load_checkpoint,
    load_weights,
    pick_device,
    save_checkpoint,
    try_to_write,
    unusable,
)

EPOCHS = 13  # about as long as the lecture's 20 epochs of a small network take
BATCH_SIZE = 128  # images a step; 64 takes longer and is no better
# A tenth of every target goes to all classes alike, so that no logit has to grow for
# ever (Szegedy et al. 2016). One loss for each image: `choose` needs it.
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
SMALL_SIZE = 24  # px: most epochs see smaller images, in two thirds of the time
SMALL_EPOCHS = 0.7  # share of those epochs: +0.3 points (progressive resizing, fast.ai)
HARD = 0.3  # share of images that most epochs see for sure: +0.5 points (see `choose`)
WARM_UP = 0.15  # share of the steps in which the learning rate rises
# bfloat16 where the processor has instructions for it (AMD since Zen 4, Intel's servers):
# it takes a third less time. Elsewhere, or where an older torch cannot tell, float32.
FAST_BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
STOPPED = (
    "stopped: the same command with --resume goes on after the last epoch that it saved "
    "(if it saved none, start it again)"
)
WEIGHT_DECAY = 5e-4  # against overfitting; the usual value for CIFAR-10


class Choice(NamedTuple):
    """An optimizer that --optimizer offers."""

    make: type[torch.optim.Optimizer]
    lr: float  # the peak of the learning rate
    kept: int  # numbers that it keeps of each weight: they are in the checkpoint, too
    options: dict


# The lecture's five. Each one's rate and weight decay (0, a tenth of WEIGHT_DECAY, or all
# of it) gave the lowest loss on held-out training images after four epochs; momentum's
# 0.3 tied with 0.1.
OPTIMIZERS = {
    "sgd": Choice(SGD, 1.0, 0, {"weight_decay": WEIGHT_DECAY}),
    "momentum": Choice(
        SGD, 0.3, 1, {"weight_decay": WEIGHT_DECAY, "momentum": 0.9, "nesterov": True}
    ),
    "adagrad": Choice(Adagrad, 0.1, 1, {"weight_decay": WEIGHT_DECAY}),
    "rmsprop": Choice(RMSprop, 0.005, 1, {}),
    "adam": Choice(Adam, 0.02, 2, {"weight_decay": WEIGHT_DECAY / 10}),
}


def plan(epochs: int, batch_size: int, images: int) -> list[tuple[int, int]]:
    """How many images each epoch sees, and in which size (px)."""
    small, whole = int(SMALL_EPOCHS * epochs), max(1, epochs // 8)
    sizes = [SMALL_SIZE] * small + [32] * (epochs - small)
    some = [int((HARD + 1) / 2 * images)] * (epochs - 1 - whole)
    counts = [images, *some, *[images] * whole]  # the last eighth sees all again
    if not 1 < batch_size <= min(counts):
        most = f"{min(counts):,}, the images of an epoch"
        fail(f"--batch-size must be from 2 to {most}")
    return list(zip(counts[:epochs], sizes))


def choose(losses: torch.Tensor, count: int) -> list[int]:
    """The hardest images and half of the others: `count` of them in random order.

    `losses` are those of all images when they were last seen (0 before). An image of
    small loss teaches little, and without it there is time for more epochs. Source:
    InfoBatch (Qin et al., ICLR 2024), without its weights for those that remain.
    """
    order = losses.argsort(descending=True, stable=True)
    # hard + (all - hard) / 2 = count
    hard, others = order.tensor_split([2 * count - len(losses)])
    others = others[torch.randperm(len(others))[: count - len(hard)]]
    return torch.cat([hard, others])[torch.randperm(count)].tolist()


def make_optimizer(model: nn.Module, settings: dict) -> torch.optim.Optimizer:
    choice = OPTIMIZERS[settings["optimizer"]]
    return choice.make(model.parameters(), settings["lr"], **choice.options)


def learning_rate(step: int, steps: int) -> float:
    """The learning rate of a step (from 0) as a share of its peak: up, then down.

    Large first steps, from random weights, can make the loss explode; towards 0 the
    weights settle. It is the linear form of torch's OneCycleLR, as a function of the
    step alone, so that a checkpoint need not hold a schedule.
    """
    turn = max(WARM_UP * (steps + 1) - 1, 1e-3)
    return float(np.interp(step, [0, turn, steps], [0.04, 1, 4e-6]))


def train_epoch(model, loader, optimizer, scheduler, device):
    """One pass over the loader's images.

    Returns a row of the history (mean loss, accuracy from 0 to 1, learning rate at the
    end, seconds), and the loss of each image that it saw, float32, in their order.
    """
    model.train()
    start = time.perf_counter()
    correct, losses = 0, []
    with tqdm(total=len(loader), leave=False, disable=not sys.stderr.isatty()) as bar:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16, enabled=FAST_BFLOAT16):
                logits = model(images).float()
            loss = CRITERION(logits, labels)
            loss.mean().backward()
            optimizer.step()
            scheduler.step()
            losses.append(loss.detach().cpu())
            correct += (logits.argmax(1) == labels).sum().item()
            bar.update(1)
    losses = torch.cat(losses)
    row = {
        "loss": losses.mean().item(),
        "accuracy": correct / len(losses),
        "learning_rate": scheduler.get_last_lr()[0],
        "seconds": time.perf_counter() - start,
    }
    return row, losses


def freeze_first_layer(model: nn.Module, epoch: int):
    """After the first epoch the whitening layer's biases have settled.

    Its filters are fixed anyway, so the backward pass can end before this layer, which
    saves a tenth of the time.
    """
    if epoch > 0 and isinstance(model, CNN):
        model.whitening.requires_grad_(False)


def check_finite(model: nn.Module, losses: torch.Tensor):
    numbers = [losses.mean(), *model.state_dict().values()]
    if not all(tensor.isfinite().all() for tensor in numbers):
        fail("the loss is not a finite number any more: choose a smaller --lr")


def fit(model, train_data: ImageDataset, settings: dict, path: Path, resume, device):
    """Train `model` as `settings` say; write the checkpoint `path` after each epoch.

    With `resume` it goes on after the last finished epoch and ends, on a CPU, with the
    same bits as without the break: the random numbers of an epoch follow from seed and
    epoch alone, and the checkpoint holds all else that the next epoch depends on.
    """
    seed, batch_size = settings["seed"], settings["batch_size"]
    schedule = plan(settings["epochs"], batch_size, len(train_data))
    optimizer = make_optimizer(model.to(device), settings)
    parts = {"model": model, "optimizer": optimizer}  # all that has a state of its own
    history, image_losses = [], torch.zeros(len(train_data))
    if resume:
        history, image_losses = restore(path, parts, settings)
    elif path.exists():
        load_checkpoint(path)  # nothing else is replaced, such as a script or a photo
        old = free_name(path)
        print(f"{path} exists: the first epoch replaces it and keeps it as {old}")
    steps = [count // batch_size for count, _ in schedule]
    done = sum(steps[: len(history)])
    # What LambdaLR calls an epoch is a step here.
    scheduler = LambdaLR(
        optimizer, lambda step: learning_rate(step, sum(steps)), last_epoch=done - 1
    )
    for epoch in range(len(history), len(schedule)):
        torch.manual_seed(1000 * seed + epoch)
        count, size = schedule[epoch]
        train_data.set_epoch(epoch, size, seed)
        chosen = choose(image_losses, count)
        # drop_last: what batch norm finds in a last batch of a few images is noise.
        loader = DataLoader(train_data, batch_size, sampler=chosen, drop_last=True)
        freeze_first_layer(model, epoch)
        row, losses = train_epoch(model, loader, optimizer, scheduler, device)
        check_finite(model, losses)
        image_losses[chosen[: len(losses)]] = losses  # drop_last left the end out
        history.append(row)
        checkpoint = {"epoch": epoch, "loss": row["loss"], "settings": settings}
        checkpoint |= {"history": history, "image_losses": image_losses}
        for name, part in parts.items():
            checkpoint[f"{name}_state_dict"] = part.state_dict()
        save_checkpoint(checkpoint, path)
        print_epoch(history, schedule)


def restore(path: Path, parts: dict, settings: dict) -> tuple[list, torch.Tensor]:
    """Put all parts back as they were when the last finished epoch ended.

    Returns the history and the images' losses. Other settings than the checkpoint's are
    refused by name.
    """
    checkpoint = load_checkpoint(path)
    if "image_losses" not in checkpoint:
        unusable(path, "it is an older train.py's or the lecture's, so it cannot go on")
    for name, value in settings.items():
        if (was := checkpoint["settings"].get(name, "unknown")) != value:
            fail(f"{path} has {name} {was}, not {value}: use that or another file")
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            load_weights(part, checkpoint, path, name)
            continue
        try:
            part.load_state_dict(checkpoint[f"{name}_state_dict"])
        except (AttributeError, KeyError, TypeError, ValueError):
            unusable(path, f"the state of its {name} does not fit")
    history = checkpoint["history"]
    print(f"{path}: {len(history)} of {settings['epochs']} epochs are done")
    return history, checkpoint["image_losses"]


def print_epoch(history: list[dict], schedule: list[tuple[int, int]]):
    """The line of the epoch that has just been saved."""
    done, row = len(history), history[-1]
    pixels = [count * size**2 for count, size in schedule]  # they take the time
    spent = sum(past["seconds"] for past in history)
    left = spent * sum(pixels[done:]) / sum(pixels[:done])
    print(
        f"Epoch: {done}/{len(schedule)}, Loss: {row['loss']:.4f}, "
        f"Accuracy: {row['accuracy']:.2%}, Learning rate: {row['learning_rate']:.4f}, "
        f"{row['seconds']:.0f} s, {left:.0f} s left"
    )


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training run, checked, and the learning rate filled in."""
    add, default = parser.add_argument, "(default: %(default)s)"
    number, seed = {"type": int, "metavar": "N"}, "the same one gives the same bits"
    add("--epochs", **number, default=EPOCHS, help=f"passes over the images {default}")
    add("--batch-size", **number, default=BATCH_SIZE, help=f"images a step {default}")
    add("--seed", **number, default=1, help=f"{seed} {default}")
    add("--lr", type=float, metavar="X", help="peak of the learning rate")
    five = f"the lecture's five, each with its own --lr {default}"
    add("--optimizer", choices=OPTIMIZERS, default="momentum", help=five)
    add("--resume", action="store_true", help="go on after the last finished epoch")
    args = parse(parser)
    args.lr = OPTIMIZERS[args.optimizer].lr if args.lr is None else args.lr
    limits = {"epochs": (1, 10**6), "seed": (0, 2**32), "lr": (1e-9, 1000)}
    limits |= {"width": (1, MAX_WIDTH)}  # compare_resnet.py has none
    for name, (least, most) in limits.items():
        if name in args and not least <= getattr(args, name) <= most:
            fail(f"--{name} must be a number from {least} to {most:,}")
    return args


def check_room(model: nn.Module, path: Path, args: argparse.Namespace):
    """Refuse a checkpoint that cannot be written before time is spent on it.

    A new run leaves two files, the old one's copy and its own; and the next epoch of
    any run is written beside the last.
    """
    kept = OPTIMIZERS[args.optimizer].kept
    size = (1 + kept) * sum(weight.nbytes for weight in model.state_dict().values())
    size += 2**20  # the losses of 50,000 images, the history, the names
    try_to_write(path, size if args.resume else 2 * size)


def settings_of(args: argparse.Namespace, train_data: ImageDataset) -> dict:
    """What a run depends on: a resumed one must have the same."""
    names = ("epochs", "batch_size", "optimizer", "lr", "seed", "synthetic")
    settings = {name: getattr(args, name) for name in names}
    checksum = zlib.crc32(train_data.images[::25].contiguous().numpy())
    return settings | {"checksum of the images": checksum}


def main():
    parser = command_line(__doc__)
    width = f"channels of the first block (default: {WIDTH})"
    parser.add_argument("--width", type=int, default=WIDTH, metavar="N", help=width)
    args = parse_options(parser)
    path, device = args.checkpoint, pick_device(args.device)
    torch.manual_seed(args.seed)
    model = CNN(args.width)
    check_room(model, path, args)
    train_data, _ = cifar_dataset(args.data, args.synthetic)
    model.whiten(normalize(train_data.images[::25]))  # 2,000 images are plenty
    settings = settings_of(args, train_data) | {"model": "CNN", "width": args.width}
    fit(model, train_data, settings, path, args.resume, device)
    images = "--synthetic" if args.synthetic else f'--data "{args.data}"'
    command = f'python evaluation.py {images} --checkpoint "{path}"'
    print(f"{path} is finished. Next: {command}")


if __name__ == "__main__":
    run(main, STOPPED)
