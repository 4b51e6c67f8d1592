"""Train the classifier on CIFAR-10's training pictures; save it after each epoch.

    python train.py                 # five epochs, some minutes on a CPU
    python train.py --resume        # go on after a break, as if there had been none
    python train.py --synthetic     # try it on made-up pictures: no download

The test pictures are not looked at here: that is what evaluation.py is for.
"""

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.hub import tqdm
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dataset import Pictures, cifar_dataset, fail, normalize, run
from model import (
    CNN,
    WIDTH,
    load_checkpoint,
    pick_device,
    save_checkpoint,
    try_to_write,
)

EPOCHS = 5  # about as long as the lecture's 20 epochs of a small network take
BATCH_SIZE = 128  # pictures a step; 64 takes longer and is no better
LABEL_SMOOTHING = 0.1  # share of every target that goes to all ten classes alike
WARM_UP = 0.2  # share of the run in which the learning rate rises to its peak
DECAY = {"weight_decay": 5e-4}  # pulls weights to 0; the usual value for CIFAR-10

# The lecture's five: the class, the peak of the learning rate, the other arguments.
OPTIMIZERS = {
    "sgd": (SGD, 1.0, DECAY),
    "momentum": (SGD, 0.3, DECAY | {"momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, 0.02, {}),
    "rmsprop": (RMSprop, 0.002, {}),
    "adam": (Adam, 0.002, {}),
}


def make_optimizer(model: nn.Module, settings: dict, steps: int):
    """The optimizer, and the schedule that lifts its rate and then lowers it to 0."""
    make, _, options = OPTIMIZERS[settings["optimizer"]]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = make(weights, settings["lr"], **options)
    rise = WARM_UP * steps
    return optimizer, LambdaLR(
        optimizer, lambda step: min((step + 1) / rise, (steps - step) / (steps - rise))
    )


def train_epoch(model, loader, criterion, optimizer, scheduler, device) -> dict:
    """One pass over the training pictures: its mean loss, accuracy (0 to 1), seconds."""
    model.train()
    start = time.perf_counter()
    train_loss = correct = 0
    with tqdm(total=len(loader), leave=False, disable=not sys.stderr.isatty()) as bar:
        for images, labels in loader:
            images, labels = images.to(device), labels.to(device)
            optimizer.zero_grad()
            logits = model(images)
            loss = criterion(logits, labels)
            loss.backward()
            optimizer.step()
            scheduler.step()
            if not loss.isfinite():
                fail("the loss is not a finite number any more: choose a smaller --lr")
            train_loss += loss.item()
            correct += (logits.argmax(1) == labels).sum().item()
            bar.update(1)
    return {
        "loss": train_loss / len(loader),
        "accuracy": correct / (len(loader) * loader.batch_size),
        "seconds": time.perf_counter() - start,
    }


def fit(model, train_data: Pictures, settings: dict, path: Path, resume: bool, device):
    """Train `model` as `settings` say; write the checkpoint `path` after each epoch.

    With `resume` it goes on after the last finished epoch and ends with the same bits as
    without the break: the random numbers of an epoch follow from seed and epoch alone,
    and the checkpoint holds the state of the optimizer and of the schedule.
    """
    # drop_last, because batch norm cannot average over a last batch of one picture.
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    loader = DataLoader(train_data, batch_size, shuffle=True, drop_last=True)
    if len(loader) == 0:
        fail(f"--batch-size {batch_size} is more than the {len(train_data)} pictures")
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    optimizer, scheduler = make_optimizer(
        model.to(device), settings, epochs * len(loader)
    )
    history = []
    if resume:
        history = restore(path, model, optimizer, scheduler, settings)
        print(f"{path}: {len(history)} of {epochs} epochs are done")
    elif path.exists():
        print(f"{path} exists and is replaced when the first epoch is done")
    try:
        for epoch in range(len(history), epochs):
            torch.manual_seed(1000 * settings["seed"] + epoch)
            row = train_epoch(model, loader, criterion, optimizer, scheduler, device)
            checkpoint = {
                "epoch": epoch,
                "model_state_dict": model.state_dict(),
                "optimizer_state_dict": optimizer.state_dict(),
                "scheduler_state_dict": scheduler.state_dict(),
                "loss": row["loss"],
                "settings": settings,
                "history": [*history, row],
            }
            save_checkpoint(checkpoint, path)
            history.append(row)
            print_epoch(history, epochs, scheduler.get_last_lr()[0])
    except KeyboardInterrupt:
        if not history:
            raise
        done = f"{len(history)} of {epochs} epochs are saved in {path}"
        raise KeyboardInterrupt(f"{done}; go on with the same command and --resume")


def print_epoch(history: list[dict], epochs: int, rate: float):
    """The line of the epoch that has just been saved."""
    done, row = len(history), history[-1]
    left = sum(row["seconds"] for row in history) * (epochs / done - 1)
    print(
        f"Epoch: {done}/{epochs}, Loss: {row['loss']:.4f}, "
        f"Accuracy: {row['accuracy']:.2%}, Learning rate: {rate:.4f}, "
        f"{row['seconds']:.0f} s, {left:.0f} s left",
        flush=True,
    )


def restore(path: Path, model, optimizer, scheduler, settings: dict) -> list[dict]:
    """Put all back as it was when the last finished epoch ended; returns its history."""

    def same_model(saved: dict):
        for name, value in settings.items():
            if saved.get(name) != value:
                change = f"{name} was {saved.get(name)} and is now {value}"
                fail(f"{path} is of another run ({change}): use the options it had")
        return model

    _, checkpoint = load_checkpoint(path, same_model)
    try:
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        fail(f"{path} cannot be resumed ({error!r}): start without --resume")
    return checkpoint["history"]


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training run, checked, and the learning rate filled in."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail  # one line, like all mistakes
    add, default = parser.add_argument, "default: %(default)s"
    add("--epochs", type=int, default=EPOCHS, metavar="N", help=default)
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=default)
    add("--optimizer", choices=OPTIMIZERS, default="momentum", help=default)
    add("--lr", type=float, metavar="X", help="peak, default: the optimizer's own")
    add("--seed", type=int, default=1, metavar="N", help=f"of all chance, {default}")
    add("--data", default="data", metavar="DIR", help=f"the pictures, {default}")
    add("--synthetic", action="store_true", help="made-up pictures, no download")
    add("--checkpoint", default="cifar_cnn.pth", metavar="FILE", help=default)
    add("--resume", action="store_true", help="go on after the last finished epoch")
    add("--device", metavar="NAME", help="cpu, cuda, mps, ... default: the fastest")
    args = parser.parse_args()
    limits = {"epochs": 10**6, "batch_size": 10**6, "seed": 2**32, "width": 1024}
    for name, most in limits.items():
        if not 0 < getattr(args, name, 1) <= most:  # compare_resnet.py has no width
            fail(f"--{name.replace('_', '-')} must be above 0 and at most {most:,}")
    args.lr = OPTIMIZERS[args.optimizer][1] if args.lr is None else args.lr
    if not 0 < args.lr < float("inf"):
        fail("--lr must be a number above 0, such as 0.1")
    return args


def settings_of(args: argparse.Namespace, train_data: Pictures) -> dict:
    """What a run depends on: a resumed one must have the same."""
    names = ("epochs", "batch_size", "optimizer", "lr", "seed", "synthetic")
    return {name: getattr(args, name) for name in names} | {"pictures": len(train_data)}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--width", type=int, default=WIDTH, metavar="N", help="channels"
    )
    args = parse_options(parser)
    path, device = Path(args.checkpoint), pick_device(args.device)
    torch.manual_seed(args.seed)
    model = CNN(args.width)
    try_to_write(path, model)
    train_data, _ = cifar_dataset(args.data, args.synthetic)
    model.whiten(normalize(train_data.images[::25]))  # 2,000 pictures are plenty
    settings = settings_of(args, train_data) | {"model": "CNN", "width": args.width}
    fit(model, train_data, settings, path, args.resume, device)
    same = " --synthetic" if args.synthetic else ""
    print(f"{path} is finished. Next: python evaluation.py --checkpoint {path}{same}")


if __name__ == "__main__":
    run(main)
