"""Train the classifier on CIFAR-10's training images; save it after each epoch.

    python train.py                 # some minutes on a CPU
    python train.py --resume        # go on after a break, with the same result
    python train.py --synthetic     # synthetic images, into synthetic.pth

The test images are evaluation.py's. "The lecture" is this assignment's course.
"""

import argparse
import errno
import io
import os
import shutil
import sys
import time
import zlib
from contextlib import suppress
from functools import partial
from pathlib import Path

from dataset import CHECKPOINTS, CLASSES, SPLITS, ImageDataset, cifar_dataset, to_device  # isort: skip
import torch  # after dataset.py, which sets its environment
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from dataset import command_line, fail, normalize, on_terminal, reason, run, usable
from evaluation import accuracy, check_settings, load_checkpoint, load_weights, make_cnn

EPOCHS = 14  # about as long as the lecture's 20 epochs of a small network take
BATCH_SIZE = 128  # images a step
# A fifth of each label's weight goes to all classes alike, so that no logit has to grow
# for ever (Szegedy et al. 2016). One loss for each image: choose_images needs it.
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
SMALL_SIZE = 24  # px: smaller images take half the time
SMALL_EPOCHS = 0.7  # share of the epochs, the first, that see them: +0.3 (fast.ai)
ALL_EPOCHS = 1 / 6  # share of the epochs, the last, that see all images; the first does
HARD = 0.3  # share of images, the hardest, that all epochs see: +0.5 points
JITTER = 0.14  # of brightness and contrast, in runs longer than EPOCHS: +0.4 (hiverge)
WARM_UP = 0.2  # share of the steps: large steps from random weights go astray

# The lecture's five. Rate (`lr`, the highest) and weight decay are chosen among
# three or more each, on held-out training images.
OPTIMIZERS = {
    "sgd": partial(SGD, lr=2.0, weight_decay=5e-4),
    "momentum": partial(SGD, lr=0.3, momentum=0.9, nesterov=True, weight_decay=5e-4),
    "adagrad": partial(Adagrad, lr=0.1, weight_decay=5e-4),
    "rmsprop": partial(RMSprop, lr=0.005),
    "adam": partial(Adam, lr=0.01, weight_decay=5e-5),
}


def fast_bfloat16(device: torch.device) -> bool:
    """Does the device have bfloat16 instructions? With them a step takes a third less."""
    if device.type == "cuda":  # NVIDIA's since Ampere
        return torch.cuda.get_device_capability(device) >= (8, 0)
    # AMD's CPUs since Zen 4, Intel's for servers; an older torch cannot tell.
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fatal = os.name == "nt" and cpu.get("amx_tile")  # uxlfoundation/oneDNN issue 5689
    return device.type == "cpu" and cpu.get("avx512_bf16", False) and not fatal


def train_epoch(model, loader, optimizer, scheduler, device):
    """One pass over the loader's images.

    Returns a row of the history, and the loss of each image that it saw, float32, in
    their order. Loss and accuracy (0 to 1) are of augmented, mostly hard images.
    """
    model.train()
    start, rates = time.perf_counter(), []
    fast = fast_bfloat16(device)
    autocast_device = device.type if fast else "cpu"  # of some others it knows nothing
    correct, losses = 0, []  # on the device: no step waits for their numbers
    for images, labels in progress(loader):
        images, labels = to_device(images, device), to_device(labels, device)
        optimizer.zero_grad()
        with torch.autocast(autocast_device, torch.bfloat16, enabled=fast):
            logits = model(images).float()
        loss = CRITERION(logits, labels)  # of each image
        loss.mean().backward()
        optimizer.step()
        rates += scheduler.get_last_lr()
        scheduler.step()
        losses.append(loss.detach())
        correct += (logits.argmax(1) == labels).sum()
    losses = torch.cat(losses).cpu()
    row = {
        "loss": losses.mean().item(),
        "accuracy": correct.item() / len(losses),
        "learning_rate": sum(rates) / len(rates),
        "seconds": time.perf_counter() - start,
    }
    return row, losses


def fit(model, train_data, held_out, settings: dict, path: Path, resume, device):
    """Train `model` with `settings`; write the checkpoint `path` after each epoch.

    `held_out`: images that are looked at after each epoch, or None. A resumed run ends,
    on a CPU, with the same bits as without the break (where all chance is torch's).
    """
    seed, batch_size = settings["seed"], settings["batch_size"]
    small = first_size(model.to(device), device)
    plan = plan_epochs(settings["epochs"], batch_size, len(train_data), small)
    train_data.images = train_data.images.to(device)  # augmented there, too
    train_data.jitter = JITTER if len(plan) > EPOCHS else 0  # a short run would lose
    optimizer = OPTIMIZERS[settings["optimizer"]](model.parameters(), lr=settings["lr"])
    image_losses = torch.full([len(train_data)], torch.inf)  # no epoch has seen them
    history, checksum = [], None  # the checksum is of what this run wrote last
    if resume:
        history, image_losses, checksum = restore(path, model, optimizer, settings)
    scheduler = make_scheduler(optimizer, plan, batch_size, len(history))
    print_start(model, len(plan), device)
    for epoch, (count, size) in enumerate(plan[len(history) :], len(history)):
        torch.manual_seed(1000 * seed + epoch)  # for a resumed run, too
        train_data.set_epoch(epoch, size, seed)
        chosen = choose_images(image_losses, count)
        # drop_last: what batch norm finds in a last batch of a few images is noise.
        loader = DataLoader(train_data, batch_size, sampler=chosen, drop_last=True)
        row, losses = train_epoch(model, loader, optimizer, scheduler, device)
        finite = ((x < torch.inf).all() for x in [losses, *model.state_dict().values()])
        if not all(finite):
            fail("the loss is not a finite number any more: choose a smaller --lr")
        image_losses[chosen[: len(losses)]] = losses  # drop_last left out the end
        if held_out:
            row["held_out"] = accuracy(model, held_out, device)
        history.append(row)
        checkpoint = {  # all of a run's state
            "epoch": epoch,
            "model_state_dict": on_cpu(model.state_dict()),
            "optimizer_state_dict": on_cpu(optimizer.state_dict()),
            "loss": row["loss"],
            "settings": settings,
            "history": history,
            "image_losses": image_losses,
        }
        checksum = save_checkpoint(checkpoint, path, checksum)
        print_epoch(history, plan)


def on_cpu(state):
    """A state dict with all its tensors on the CPU, where any machine can load them."""
    if isinstance(state, dict):
        return {key: on_cpu(value) for key, value in state.items()}
    return state.cpu() if isinstance(state, torch.Tensor) else state


def progress(loader: DataLoader):
    """The loader's batches; on a terminal with a bar, which erases itself."""
    for number, batch in enumerate(loader):
        if on_terminal():
            bar = f"[{'#' * (20 * number // len(loader)):20}] {number}/{len(loader)}"
            print(f"\r{bar}", end="", file=sys.stderr, flush=True)
        yield batch
    if on_terminal():
        print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)


def print_start(model: nn.Module, epochs: int, device: torch.device):
    """Print what runs, and on what."""
    weights = sum(weight.numel() for weight in model.parameters())
    precision = "bfloat16" if fast_bfloat16(device) else "float32"
    where = f"{device}, {torch.get_num_threads()} threads, {precision}"
    print(f"{weights:,} parameters, {epochs} epochs on {where}")


def print_epoch(history: list[dict], plan: list[tuple[int, int]]):
    """The line of the epoch that has just been saved, in at most 79 columns."""
    done, row = len(history), history[-1]
    pixels = [count * size**2 for count, size in plan]  # the time grows with them
    spent = sum(past.get("seconds", 0) for past in history)
    left = spent * sum(pixels[done:]) / sum(pixels[:done])
    shown = f"{row['accuracy']:.2%}, Rate: {row['learning_rate']:.2g}"
    if "held_out" in row:  # there is no room for both
        shown = f"{row['accuracy']:.1%}, held out {row['held_out']:.1%}"
    first = f"Epoch: {done}/{len(plan)}, Loss: {row['loss']:.4f}, Accuracy: {shown}"
    print(f"{first}, {row['seconds']:.0f} s, {left:.0f} s left")


# The recipe: which images, in which size, at which learning rates.


@torch.no_grad()
def first_size(model: nn.Module, device: torch.device) -> int:
    """The size (px) of the first epochs' images: 32 for a network that takes 32 alone."""
    shape = model.eval()(torch.randn(2, 3, 32, 32, device=device)).shape
    if shape != (2, len(CLASSES)):
        fail(f"model.py's CNN makes {(*shape,)} of 2 images, not (2, {len(CLASSES)})")
    try:
        model(torch.randn(2, 3, SMALL_SIZE, SMALL_SIZE, device=device))
        return SMALL_SIZE
    except Exception:  # noqa: BLE001 - whatever it raises: it took 32 px
        return 32


def plan_epochs(epochs, batch_size, images, small=SMALL_SIZE) -> list[tuple[int, int]]:
    """How many images each epoch sees, and in which size (px): the first in `small`."""
    hard_and_half_the_others = round((HARD + (1 - HARD) / 2) * images)
    counts = [hard_and_half_the_others] * epochs
    for epoch in [0, *range(epochs - max(1, int(ALL_EPOCHS * epochs)), epochs)]:
        counts[epoch] = images
    if batch_size > min(counts):
        fail(f"--batch-size must be at most {min(counts):,}, the images of an epoch")
    first = int(SMALL_EPOCHS * epochs)
    return list(zip(counts, [small] * first + [32] * (epochs - first)))


def choose_images(losses: torch.Tensor, count: int) -> list[int]:
    """The hardest images and as many of the others as make `count`, in random order.

    `losses`: those of all images when they were last seen; a small one teaches little.
    Source: InfoBatch (Qin et al., ICLR 2024), without its weights for those that remain.
    """
    order = losses.argsort(descending=True, stable=True)
    hard, others = order.tensor_split([int(HARD * len(losses))])
    others = others[torch.randperm(len(others))[: count - len(hard)]]
    return torch.cat([hard, others])[torch.randperm(count)].tolist()


def make_scheduler(optimizer, plan, batch_size: int, done: int) -> LambdaLR:
    """The learning rate of each step after `done` epochs: it rises, then falls to 0.

    It follows from the step alone, so that a checkpoint need not hold a schedule.
    """
    steps = [count // batch_size for count, _ in plan]  # of each epoch
    total, done_steps = sum(steps), sum(steps[:done])

    def factor(step: int) -> float:
        x = (step + 1) / (total + 1)
        return min(x / WARM_UP, (1 - x) / (1 - WARM_UP))

    return LambdaLR(optimizer, factor, done_steps - 1)  # the last step done, from 0


# Writing a checkpoint, whole or not at all, and going on from it.


def save_checkpoint(checkpoint: dict, path: Path, checksum) -> int:
    """Write a checkpoint and return the checksum of its bytes.

    `checksum`: of what this run wrote last; None: nothing yet, and what the file holds
    is kept beside it. Where another run has written since, or the file cannot be
    replaced, this run saves to a new file and stops, so that neither loses work.
    """
    buffer = io.BytesIO()  # torch.save itself would call a full disk a RuntimeError
    torch.save(checkpoint, buffer)
    content = buffer.getvalue()
    torch.load(io.BytesIO(content), weights_only=True)  # or nobody could read it
    file = Path(os.path.realpath(path))  # a link is not replaced
    with usable(path, "make room and add --resume to go on after the last saved epoch"):
        found = file.read_bytes() if file.exists() else None
        try:
            if found is not None and checksum is None:
                write_whole(old := free_name(file, "old"), found)
                print(f"what {path} held is kept as {old}")
            elif found is not None and zlib.crc32(found) != checksum:
                raise FileExistsError("another run writes it, too")
            write_whole(file, content)
        except OSError as error:
            new = free_name(file, "new")
            write_whole(new, content)  # fails, too, where the disk is full
            go_on = f"this epoch is kept as {new}: name that file and add --resume"
            fail(f"{path} cannot be replaced ({reason(error)}): {go_on}")
    return zlib.crc32(content)


def free_name(path: Path, word: str) -> Path:
    """A file beside `path`: cifar_cnn.old.pth, or .old2.pth where that is taken."""
    names = (f"{path.stem}.{word}{i}{path.suffix}" for i in ["", *range(2, 10_000)])
    return next(x for x in map(path.with_name, names) if not x.exists())


def write_whole(path: Path, content: bytes):
    """Write the file `path` whole or not at all: cut short, the old one stays."""
    # A name of our own; `tempfile` may hang on Windows (python/cpython#66305).
    part = path.with_name(f"{path.name}.{os.urandom(4).hex()}.part")
    try:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            try:  # on the disk, before it takes the old one's name
                os.fsync(file.fileno())
            except OSError as error:  # some network drives cannot say
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
        with suppress(OSError):  # nothing is there yet, or the drive knows no modes
            shutil.copymode(path, part)
        for wait in (0.1, 0.2, 0.4, 0.8):  # s: on Windows a virus scanner may hold it
            with suppress(PermissionError):
                return os.replace(part, path)
            time.sleep(wait)
        os.replace(part, path)
    finally:
        with suppress(OSError):  # a virus scanner may hold it, too
            part.unlink()


def check_writable(path: Path, resume: bool):
    """Refuse a checkpoint that cannot be written before time is spent on it."""
    with usable(path, "name another file, in a folder that has room"):
        trial = free_name(Path(os.path.realpath(path)), "trial-to-write")
        write_whole(trial, bytes(2**22))  # as many as a checkpoint of ours, about
        trial.unlink(missing_ok=True)
    if resume or path.exists():
        load_checkpoint(path)  # nothing else is replaced: no script, no photo


def restore(path: Path, model, optimizer, settings: dict):
    """Put model and optimizer back as they were when the last finished epoch ended.

    Returns history, image losses and the checksum for `save_checkpoint`.
    """
    with usable(path, "train anew, without --resume"):
        checksum = zlib.crc32(path.read_bytes())  # first: another run may write it now
        checkpoint = load_checkpoint(path)
        image_losses = checkpoint["image_losses"]  # the lecture's have none
        check_settings(path, checkpoint, settings)
        load_weights(model, checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    print(f"{path}: {checkpoint['epoch'] + 1} of {settings['epochs']} epochs are done")
    return checkpoint["history"], image_losses, checksum


# The command line.


def add_number(parser, name: str, default, least, most, what: str):
    """Add an option that is a number, of the type of `least` and in that range."""

    def number(text: str):  # argparse calls what it cannot read an "invalid number"
        if not least <= (value := type(least)(text)) <= most:
            raise argparse.ArgumentTypeError(f"must be from {least} to {most:,}")
        return value

    how = {"type": number, "default": default, "metavar": "N"}
    what += f" (default: {default or 'its own'})"
    parser.add_argument(f"--{name}", **how, help=what)


def add_options(parser: argparse.ArgumentParser):
    """The options of a training run."""
    add_number(parser, "epochs", EPOCHS, 1, 10**6, "passes over the images")
    add_number(parser, "batch-size", BATCH_SIZE, 2, 10**6, "images a step")
    add_number(parser, "seed", 1, 0, 2**32, "the same one gives the same bits")
    add_number(parser, "lr", None, 1e-9, 1000, "highest learning rate")
    five = {"choices": OPTIMIZERS, "default": "momentum"}
    parser.add_argument("--optimizer", **five, help="(default: momentum)")
    parser.add_argument("--resume", action="store_true", help="go on after a break")


def settings_of(args: argparse.Namespace, *all_data: ImageDataset) -> dict:
    """What a run depends on: a resumed one must have the same."""
    names = ("epochs", "batch_size", "optimizer", "seed", "synthetic", "holdout")
    settings = {name: getattr(args, name) for name in names}
    settings["lr"] = args.lr or OPTIMIZERS[args.optimizer].keywords["lr"]
    checksum = 0
    for data in filter(None, all_data):  # to train on, and held out
        images, labels = data.images.numpy(), torch.tensor(data.targets).numpy()
        checksum = zlib.crc32(images, zlib.crc32(labels, checksum))
    return settings | {"checksum of the images": checksum}


def main():
    parser = command_line(__doc__)
    add_options(parser)
    add_number(parser, "width", None, 1, 1024, "channels of the first block")
    args = parser.parse_args()
    path = args.checkpoint or CHECKPOINTS[args.synthetic]
    check_writable(path, args.resume)
    splits = SPLITS if args.holdout else ["train"]  # never the test images
    images = {"synthetic": args.synthetic, "holdout": args.holdout}
    train_data, held_out = both = cifar_dataset(args.data, splits=splits, **images)
    torch.manual_seed(args.seed)
    model = make_cnn(args.width)
    if hasattr(model, "whiten"):  # a network of your own need not
        model.whiten(normalize(train_data.images[::25]))  # more change nothing
    settings = {"model": "CNN", "width": args.width, **settings_of(args, *both)}
    fit(model, train_data, held_out, settings, path, args.resume, args.device)
    names = ("data", "checkpoint", "synthetic", "holdout")
    same = [f"same --{x}" for x in names if getattr(args, x) != parser.get_default(x)]
    print(", ".join([f"{path} is finished. Next: python evaluation.py", *same]))


if __name__ == "__main__":
    run(main)
