"""Train the classifier on CIFAR-10's training images; save it after each epoch.

    python train.py                 # thirteen epochs, some minutes on a CPU
    python train.py --resume        # go on after a break, as if there had been none
    python train.py --synthetic     # synthetic images, into synthetic.pth

Measured: 90.0 % of the test images right (mean of three seeds) after three minutes on
two cores. The test images are not used here: that is what evaluation.py is for.
"""

import argparse
import errno
import io
import itertools
import os
import shlex
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

# Beside a busy browser each thread spins while it waits for the other and keeps it from
# its core: fewer turns, set before torch is loaded, train two to seven times as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import dataset
from dataset import ImageDataset, cifar_dataset, fail, normalize, usable
from evaluation import CHOOSE, MAX_WIDTH, load_checkpoint, load_weights
from model import CNN, WIDTH

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
STOPPED = "stopped: add --resume to go on after the last saved epoch, if there is one"
MAKE_ROOM = "name another by --checkpoint, in a folder that is there and has room"
WEIGHT_DECAY = 5e-4  # against overfitting; the usual value for CIFAR-10
# The lecture's five. Each one's rate and weight decay (0, a tenth of WEIGHT_DECAY, or all
# of it) gave the lowest loss on held-out training images after four epochs; momentum's
# 0.3 tied with 0.1. `lr` is the peak of the learning rate.
OPTIMIZERS = {
    "sgd": partial(SGD, lr=1.0, weight_decay=WEIGHT_DECAY),
    "momentum": partial(
        SGD, lr=0.3, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    ),
    "adagrad": partial(Adagrad, lr=0.1, weight_decay=WEIGHT_DECAY),
    "rmsprop": partial(RMSprop, lr=0.005),
    "adam": partial(Adam, lr=0.02, weight_decay=WEIGHT_DECAY / 10),
}


def train_epoch(model, loader, optimizer, scheduler, device):
    """One pass over the loader's images.

    Returns a row of the history (mean loss, accuracy from 0 to 1, learning rate at the
    end, seconds), and the loss of each image that it saw, float32, in their order.
    """
    model.train()
    start = time.perf_counter()
    correct, losses = 0, []
    for images, labels in progress(loader):
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
    losses = torch.cat(losses)
    row = {
        "loss": losses.mean().item(),
        "accuracy": correct / len(losses),
        "learning_rate": scheduler.get_last_lr()[0],
        "seconds": time.perf_counter() - start,
    }
    return row, losses


def fit(model, train_data: ImageDataset, settings: dict, path: Path, resume, device):
    """Train `model` as `settings` say; write the checkpoint `path` after each epoch.

    With `resume` it goes on after the last finished epoch and ends, on a CPU, with the
    same bits as without the break: the random numbers of an epoch follow from seed and
    epoch alone, and the checkpoint holds all else that the next epoch depends on.
    Returns the last checkpoint.
    """
    seed, batch_size = settings["seed"], settings["batch_size"]
    schedule = plan(settings["epochs"], batch_size, len(train_data))
    make_optimizer = OPTIMIZERS[settings["optimizer"]]
    optimizer = make_optimizer(model.to(device).parameters(), lr=settings["lr"])
    if resume:
        checkpoint = restore(path, model, optimizer, settings)
    else:
        checkpoint = start_anew(path, len(train_data))
    history, image_losses = checkpoint["history"], checkpoint["image_losses"]
    written = path.read_bytes() if path.exists() else None  # what it may replace
    scheduler = make_scheduler(optimizer, schedule, batch_size, len(history))
    for epoch in range(len(history), len(schedule)):
        torch.manual_seed(1000 * seed + epoch)
        count, size = schedule[epoch]
        train_data.set_epoch(epoch, size, seed)
        chosen = choose(image_losses, count)
        # drop_last: what batch norm finds in a last batch of a few images is noise.
        loader = DataLoader(train_data, batch_size, sampler=chosen, drop_last=True)
        freeze_first_layer(model, epoch)
        row, losses = train_epoch(model, loader, optimizer, scheduler, device)
        numbers = [losses, *model.state_dict().values()]
        if not all(tensor.isfinite().all() for tensor in numbers):
            fail("the loss is not a finite number any more: choose a smaller --lr")
        image_losses[chosen[: len(losses)]] = losses  # drop_last left the end out
        history.append(row)
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": row["loss"],
            "settings": settings,
            "history": history,
            "image_losses": image_losses,
        }
        written = save_checkpoint(checkpoint, path, written)
        print_epoch(history, schedule)
    return checkpoint


def progress(loader: DataLoader):
    """The loader's batches; on a terminal with a bar, which erases itself."""
    shown = dataset.on_terminal()
    for number, batch in enumerate(loader):
        if shown:
            bar = "#" * (20 * number // len(loader))
            text = f"\r[{bar:20}] {number}/{len(loader)}"
            with suppress(OSError):  # the terminal was closed; the run goes on
                print(text, end="", file=sys.stderr, flush=True)
        yield batch
    if shown:
        with suppress(OSError):
            print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)


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


# The recipe's plan: which images, in which size, at which learning rate.


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


def make_scheduler(optimizer, schedule, batch_size: int, done: int) -> LambdaLR:
    """The learning rate of each step, from the first one after `done` epochs on.

    It rises, then falls: large first steps, from random weights, can make the loss
    explode; towards 0 the weights settle. It is the linear form of torch's OneCycleLR as
    a function of the step alone, so that a checkpoint need not hold a schedule.
    """
    steps = [count // batch_size for count, _ in schedule]
    total = sum(steps)
    turn = max(WARM_UP * (total + 1) - 1, 1e-3)

    def share_of_peak(step: int) -> float:
        return float(np.interp(step, [0, turn, total], [0.04, 1, 4e-6]))

    # What LambdaLR calls an epoch is a step here.
    return LambdaLR(optimizer, share_of_peak, last_epoch=sum(steps[:done]) - 1)


def freeze_first_layer(model: nn.Module, epoch: int):
    """After the first epoch the whitening layer's biases have settled.

    Its filters are fixed anyway, so the backward pass can end before this layer, which
    saves a tenth of the time.
    """
    if epoch > 0 and isinstance(model, CNN):
        model.whitening.requires_grad_(False)


# Writing a checkpoint, whole or not at all, and going on from it.


def save_checkpoint(checkpoint: dict, path: Path, before) -> bytes:
    """Write a checkpoint over the bytes `before` (None: no file); return its own.

    The first epoch of a new run keeps what it replaces. Other bytes than `before` are
    another run's: this run saves to a new file and stops, so that neither
    loses work.
    """
    buffer = io.BytesIO()  # torch.save itself would call a full disk a RuntimeError
    torch.save(checkpoint, buffer)
    with usable(path, MAKE_ROOM):
        if path.exists() and path.read_bytes() != before:
            go_on = keep_beside(path, buffer.getbuffer())  # before anything can fail
            others, own = load_checkpoint(path)["settings"], checkpoint["settings"]
            unlike = [f"{x} {y}" for x, y in others.items() if own.get(x) != y]
            run = ", ".join(unlike) or "of the same settings"
            fail(f"{path} is written by another run ({run}), too. {go_on}")
        if checkpoint["epoch"] == 0 and path.exists():
            write_whole(free_name(path, "old"), path.read_bytes())
        write_whole(path, buffer.getbuffer())
    return buffer.getvalue()


def free_name(path: Path, word: str) -> Path:
    """A file beside `path`: cifar_cnn.old.pth, or .old2.pth where that is taken."""
    numbers = itertools.chain([""], itertools.count(2))
    names = (f"{path.stem}.{word}{number}{path.suffix}" for number in numbers)
    return next(path.with_name(x) for x in names if not path.with_name(x).exists())


def keep_beside(path: Path, content) -> str:
    """Keep the epoch that cannot take the place of `path`; return how to go on."""
    new = free_name(path, "new")
    new.write_bytes(content)
    return f"This run's last epoch is {new}: to go on add --resume --checkpoint {new}"


@contextmanager
def part_of(path: Path):
    """A new file beside `path` to write into; nothing of it stays behind.

    (`tempfile` tries two thousand million names where a folder on Windows may not be
    written: github.com/python/cpython/issues/66305.)
    """
    part = dataset.new_part(path)
    try:
        with open(part, "xb") as file:
            yield file
    finally:
        part.unlink(missing_ok=True)


def write_whole(path: Path, content):
    """Write the file `path` whole or not at all: cut short, the old one stays.

    Where another program holds the old file (on Windows a virus scanner or OneDrive),
    it is tried again for 1.5 s.
    """
    with part_of(path) as file:
        file.write(content)
        file.flush()
        try:
            os.fsync(file.fileno())  # on the disk, before it takes the old one's name
        except OSError as error:  # some network drives cannot say
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        file.close()
        for wait in (0.1, 0.2, 0.4, 0.8):  # s
            try:
                return os.replace(file.name, path)
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EPERM, errno.EBUSY):
                    raise
                time.sleep(wait)
    go_on = keep_beside(path, content)
    fail(f"{path} is held by another program, or by Docker as a mount. {go_on}")


def check_room(model: nn.Module, path: Path, resume: bool):
    """Refuse a checkpoint that cannot be written before time is spent on it.

    It holds three numbers of each weight at most: adam keeps two beside it. A new run
    leaves two files, the old one's copy and its own; and the next epoch of any run is
    written beside the last.
    """
    size = 3 * sum(weight.nbytes for weight in model.state_dict().values())
    size += 2**20  # the losses of 50,000 images, the history, the names
    with usable(path, MAKE_ROOM), part_of(path) as file:
        file.write(bytes(size if resume else 2 * size))


def start_anew(path: Path, images: int) -> dict:
    """What a new run starts from; nothing is replaced but a checkpoint."""
    if path.exists():
        load_checkpoint(path)  # not a script or a photo
        old = free_name(path, "old")
        print(f"{path} exists: the first epoch replaces it and keeps it as {old}")
    return {"history": [], "image_losses": torch.zeros(images)}


def restore(path: Path, model, optimizer, settings: dict) -> dict:
    """Put model and optimizer back as they were when the last finished epoch ended.

    Returns the checkpoint. Other settings than its own are refused by name.
    """
    checkpoint = load_checkpoint(path)
    with usable(path, CHOOSE):
        if "image_losses" not in checkpoint:
            raise ValueError("an older train.py's or the lecture's: it cannot go on")
        for name, value in settings.items():
            if (was := checkpoint["settings"].get(name, "unknown")) != value:
                fail(f"{path} has {name} {was}, not {value}: use that or another file")
        load_weights(model, checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    done = len(checkpoint["history"])
    print(f"{path}: {done} of {settings['epochs']} epochs are done")
    return checkpoint


# The command line.


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
    args = dataset.parse(parser)
    args.lr = OPTIMIZERS[args.optimizer].keywords["lr"] if args.lr is None else args.lr
    limits = {"epochs": (1, 10**6), "seed": (0, 2**32), "lr": (1e-9, 1000)}
    limits |= {"width": (1, MAX_WIDTH)}  # compare_resnet.py has none
    for name, (least, most) in limits.items():
        if name in args and not least <= getattr(args, name) <= most:
            fail(f"--{name} must be a number from {least} to {most:,}")
    return args


def settings_of(args: argparse.Namespace, train_data: ImageDataset) -> dict:
    """What a run depends on: a resumed one must have the same."""
    names = ("epochs", "batch_size", "optimizer", "lr", "seed", "synthetic", "holdout")
    settings = {name: getattr(args, name) for name in names}
    checksum = zlib.crc32(train_data.images[::25].contiguous().numpy())
    return settings | {"checksum of the images": checksum}


def next_command(args: argparse.Namespace) -> str:
    """How this run's checkpoint is evaluated, to be copied into any terminal."""
    command = ["python", "evaluation.py", *["--synthetic"] * args.synthetic]
    command += ["--holdout"] * args.holdout
    if args.data != "data":
        command += ["--data", args.data]
    if str(args.checkpoint) != dataset.CHECKPOINTS[args.synthetic]:
        command += ["--checkpoint", str(args.checkpoint)]
    return subprocess.list2cmdline(command) if os.name == "nt" else shlex.join(command)


def main():
    parser = dataset.command_line(__doc__)
    width = f"channels of the first block (default: {WIDTH})"
    parser.add_argument("--width", type=int, default=WIDTH, metavar="N", help=width)
    args = parse_options(parser)
    path, device = args.checkpoint, dataset.pick_device(args.device)
    torch.manual_seed(args.seed)
    model = CNN(args.width)
    check_room(model, path, args.resume)
    train_data, _ = cifar_dataset(args.data, args.synthetic, ["train"], args.holdout)
    model.whiten(normalize(train_data.images[::25]))  # 2,000 images are plenty
    settings = {"model": "CNN", "width": args.width, **settings_of(args, train_data)}
    fit(model, train_data, settings, path, args.resume, device)
    print(f"{path} is finished. Next: {next_command(args)}")


if __name__ == "__main__":
    dataset.run(main, STOPPED)
