"""Train the classifier on CIFAR-10's training images; save it after each epoch.

    python train.py                 # twelve epochs, some minutes on a CPU
    python train.py --resume        # go on after a break, with the same result
    python train.py --synthetic     # synthetic images, into synthetic.pth

Measured: 90.3 % of the test images right (mean of five seeds) after three
minutes on two cores of a server. The test images are not used here: that is
what evaluation.py is for. "The lecture" is this assignment's course.
"""

import argparse
import errno
import io
import os
import shlex
import subprocess
import sys
import time
import zlib
from functools import partial
from pathlib import Path

# Both before torch is loaded. Waiting threads spin and, beside a busy browser, take the
# core from those that work: spinning for less time trains two to seven times as fast.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # Linux: large pages, 6 % less time

import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

import dataset
from dataset import ImageDataset, cifar_dataset, fail, normalize, usable
from evaluation import CHOOSE, MAX_WIDTH, load_checkpoint, load_weights
from model import CNN, WIDTH

EPOCHS = 12  # about as long as the lecture's 20 epochs of a small network take
BATCH_SIZE = 512  # images a step, as in cifar10-airbench; a GPU needs that many
# A fifth of every target goes to all classes alike, so that no logit has to grow for
# ever (Szegedy et al. 2016). One loss for each image: `choose` needs it.
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.2, reduction="none")
SMALL_SIZE = 24  # px: smaller images take half the time
SMALL_EPOCHS = 0.7  # share of the epochs that see them: +0.3 points (fast.ai)
ALL_EPOCHS = 1 / 6  # share of the epochs, the last ones, that see all images
HARD = 0.3  # share of images, the hardest, that the others always see: +0.5 points
STOPPED = "stopped: add --resume to go on after the last saved epoch, if there is one"
MAKE_ROOM = "make room, or name another file, in a folder that is there"


def fast_bfloat16(device: torch.device) -> bool:
    """Does the device have bfloat16 instructions? With them a step takes a third less.

    NVIDIA's GPUs since Ampere have, and CPUs: AMD's since Zen 4, Intel's for servers
    (an older torch cannot tell).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    cpu = getattr(torch.cpu, "get_capabilities", dict)()
    fatal = os.name == "nt" and cpu.get("amx_tile")  # uxlfoundation/oneDNN issue 5689
    return device.type == "cpu" and cpu.get("avx512_bf16", False) and not fatal


def orthogonal(matrix: torch.Tensor) -> torch.Tensor:
    """The nearest matrix with orthogonal rows (or columns) of length 1, roughly.

    Three Newton-Schulz steps bring singular values to about 0.7 to 1.2, tiny ones less.
    """
    x = matrix.bfloat16() if fast_bfloat16(matrix.device) else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(3):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.to(matrix.dtype)


class Muon(SGD):
    """Orthogonal steps for the filters; momentum, at rates of their own, for the rest.

    A filter bank's gradient, as a matrix, is mostly a few directions that many images
    share; made orthogonal, the step goes equally far in every direction: +0.6 points
    (Jordan et al. 2024, kellerjordan.github.io/posts/muon; torch.optim.Muon takes
    matrices only). The numbers, including the large multiples of `lr` (the filters' rate),
    follow KellerJordan/cifar10-airbench.
    """

    def __init__(self, parameters, lr: float):
        *parameters, weight, bias = parameters  # the last two are the last layer's
        filters = [x for x in parameters if x.ndim > 1]
        biases = [x for x in parameters if x.ndim < 2]
        usual = {"momentum": 0.85, "nesterov": True}
        groups = [
            {"params": filters},
            {"params": biases, "lr": 225 * lr, "weight_decay": 4e-5, **usual},
            {"params": [weight, bias], "lr": 6 * lr, "weight_decay": 1.4e-3, **usual},
        ]
        super().__init__(groups, lr=lr)

    @torch.no_grad()
    def step(self):
        for filters in self.param_groups[0]["params"]:
            state = self.state[filters]
            state["past"] = past = 0.6 * state.get("past", 0) + filters.grad
            step = orthogonal((filters.grad + 0.6 * past).flatten(1))  # Nesterov's
            filters.mul_(len(filters) ** 0.5 / filters.norm())  # no decay
            filters.grad = step.view_as(filters)
        super().step()


# Muon and the lecture's five. For these, rate (`lr`, of the first step) and weight decay
# are chosen among three or more each, on held-out training images.
OPTIMIZERS = {
    "muon": partial(Muon, lr=0.12),
    "sgd": partial(SGD, lr=3.0, weight_decay=2e-3),
    "momentum": partial(SGD, lr=0.5, momentum=0.9, nesterov=True, weight_decay=2e-3),
    "adagrad": partial(Adagrad, lr=0.03, weight_decay=2e-3),
    "rmsprop": partial(RMSprop, lr=0.003, weight_decay=2e-3),
    "adam": partial(Adam, lr=0.01, weight_decay=5e-4),
}


def train_epoch(model, loader, optimizer, scheduler, device):
    """One pass over the loader's images.

    Returns a row of the history (mean loss, accuracy from 0 to 1, first learning rate,
    seconds), and the loss of each image that it saw, float32, in their order. Loss and
    accuracy are of augmented, mostly hard images; the loss is smoothed (CRITERION).
    """
    model.train()
    start, rate = time.perf_counter(), scheduler.get_last_lr()[0]
    fast = fast_bfloat16(device)
    correct, losses = 0, []  # on the device: no step waits for their numbers
    for images, labels in progress(loader):
        images, labels = images.to(device), labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(device.type if fast else "cpu", torch.bfloat16, fast):
            logits = model(images).float()
        loss = CRITERION(logits, labels)  # of each image
        loss.mean().backward()
        optimizer.step()
        scheduler.step()
        losses.append(loss.detach())
        correct += (logits.argmax(1) == labels).sum()
    losses = torch.cat(losses).cpu()
    row = {
        "loss": losses.mean().item(),
        "accuracy": correct.item() / len(losses),
        "learning_rate": rate,
        "seconds": time.perf_counter() - start,
    }
    return row, losses


def fit(model, train_data: ImageDataset, settings: dict, path: Path, resume, device):
    """Train `model` with `settings`; write the checkpoint `path` after each epoch.

    With `resume` it goes on after the last finished epoch and ends, on a CPU, with the
    same bits as without the break. Returns the last checkpoint.
    """
    seed, batch_size = settings["seed"], settings["batch_size"]
    before = path.read_bytes() if path.exists() else None  # all that it may replace
    plan = plan_epochs(settings["epochs"], batch_size, len(train_data))
    parameters = [x for x in model.to(device).parameters() if x.requires_grad]
    optimizer = OPTIMIZERS[settings["optimizer"]](parameters, lr=settings["lr"])
    new = {"history": [], "image_losses": torch.zeros(len(train_data))}
    checkpoint = restore(path, model, optimizer, settings) if resume else new
    history, image_losses = checkpoint["history"], checkpoint["image_losses"]
    scheduler = make_scheduler(optimizer, plan, batch_size, len(history))
    print_start(model, len(plan), device)
    for epoch, (count, size) in list(enumerate(plan))[len(history) :]:
        torch.manual_seed(1000 * seed + epoch)  # for a resumed run, too
        train_data.to(device).set_epoch(epoch, size, seed)
        chosen = choose(image_losses, count)
        # drop_last: what batch norm finds in a last batch of a few images is noise.
        loader = DataLoader(train_data, batch_size, sampler=chosen, drop_last=True)
        if epoch > 0 and isinstance(model, CNN):  # settled, and a tenth less time
            model.whitening.requires_grad_(False)
        row, losses = train_epoch(model, loader, optimizer, scheduler, device)
        check_finite(losses, model)
        image_losses[chosen[: len(losses)]] = losses  # drop_last left the end out
        history.append({**row, "images": count, "size": size})
        checkpoint = {  # all of a run's state; check_room knows its size
            "epoch": epoch,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": row["loss"],
            "settings": settings,
            "history": history,
            "image_losses": image_losses,
        }
        before = save_checkpoint(checkpoint, path, before)
        print_epoch(history, plan)
    return checkpoint


def check_finite(losses: torch.Tensor, model: nn.Module):
    """Stop before an epoch that is lost takes the place of the last good one."""
    numbers = [losses, *model.state_dict().values()]
    if not all(tensor.isfinite().all() for tensor in numbers):
        fail("the loss is not a finite number any more: choose a smaller --lr")


def progress(loader: DataLoader):
    """The loader's batches; on a terminal with a bar, which erases itself."""

    def show(text: str):
        if dataset.on_terminal():
            print(f"\r{text}", end="", file=sys.stderr, flush=True)

    for number, batch in enumerate(loader):
        show(f"[{'#' * (20 * number // len(loader)):20}] {number}/{len(loader)}")
        yield batch
    show(f"{'':40}\r")


def print_start(model: nn.Module, epochs: int, device: torch.device):
    """What runs, to find the README's row that applies."""
    weights = sum(weight.numel() for weight in model.parameters())
    precision = "bfloat16" if fast_bfloat16(device) else "float32"
    where = f"{device}, {torch.get_num_threads()} threads, {precision}"
    print(f"{weights:,} parameters, {epochs} epochs on {where}")


def print_epoch(history: list[dict], plan: list[tuple[int, int]]):
    """The line of the epoch that has just been saved."""
    done, row = len(history), history[-1]
    pixels = [count * size**2 for count, size in plan]  # the time grows with them
    spent = sum(past["seconds"] for past in history)
    left = spent * sum(pixels[done:]) / sum(pixels[:done])
    print(
        f"Epoch: {done}/{len(plan)}, Loss: {row['loss']:.4f}, "
        f"Accuracy: {row['accuracy']:.2%}, Rate: {row['learning_rate']:.2g}, "
        f"{row['seconds']:.0f} s, {left:.0f} s left"
    )


# The recipe's plan: which images, in which size, at which learning rate.


def plan_epochs(epochs: int, batch_size: int, images: int) -> list[tuple[int, int]]:
    """How many images each epoch sees, and in which size (px)."""
    hard_and_half_the_others = round((HARD + (1 - HARD) / 2) * images)
    counts = [hard_and_half_the_others] * epochs
    for epoch in [0, *range(epochs - max(1, int(ALL_EPOCHS * epochs)), epochs)]:
        counts[epoch] = images
    if not 1 < batch_size <= min(counts):
        fail(f"--batch-size must be from 2 to {min(counts):,}, the images of an epoch")
    small = int(SMALL_EPOCHS * epochs)
    return list(zip(counts, [SMALL_SIZE] * small + [32] * (epochs - small)))


def choose(losses: torch.Tensor, count: int) -> list[int]:
    """The hardest images and as many of the others as make `count`, in random order.

    `losses`: those of all images when they were last seen. An image of small loss
    teaches little, and without it there is time for more epochs. Source: InfoBatch (Qin
    et al., ICLR 2024), without its weights for those that remain.
    """
    order = losses.argsort(descending=True, stable=True)
    hard, others = order.tensor_split([int(HARD * len(losses))])
    others = others[torch.randperm(len(others))[: count - len(hard)]]
    return torch.cat([hard, others])[torch.randperm(count)].tolist()


def make_scheduler(optimizer, plan, batch_size: int, done: int) -> LambdaLR:
    """The learning rate of each step after `done` epochs: it falls evenly to 0.

    It follows from the step alone, so that a checkpoint need not hold a schedule.
    """
    steps = [count // batch_size for count, _ in plan]  # of each epoch
    done_steps = sum(steps[:done])  # what LambdaLR calls an epoch is a step here
    return LambdaLR(optimizer, lambda step: 1 - step / sum(steps), done_steps - 1)


# Writing a checkpoint, whole or not at all, and going on from it.


def save_checkpoint(checkpoint: dict, path: Path, before) -> bytes:
    """Write a checkpoint over `before`, what the file held last (None: no file).

    Returns the bytes written. The first epoch of a new run keeps what it replaces. Other
    bytes than `before` are another run's: this run saves to a new file and stops, so that
    neither loses work.
    """
    buffer = io.BytesIO()  # torch.save itself would call a full disk a RuntimeError
    torch.save(checkpoint, buffer)
    content = buffer.getvalue()
    with usable(path, "make room and add --resume to go on after the last saved epoch"):
        if path.exists() and path.read_bytes() != before:
            fail(f"{path} is written by another run, too. {keep_beside(path, content)}")
        if checkpoint["epoch"] == 0 and path.exists():
            write_whole(free_name(path, "old"), before)
        write_whole(path, content)
    return content


def free_name(path: Path, word: str) -> Path:
    """A file beside `path`: cifar_cnn.old.pth, or .old2.pth where that is taken."""
    names = (f"{path.stem}.{word}{i}{path.suffix}" for i in ["", *range(2, 10_000)])
    return next(x for x in map(path.with_name, names) if not x.exists())


def keep_beside(path: Path, content: bytes) -> str:
    """Keep the epoch that cannot take the place of `path`; return how to go on."""
    new = free_name(path, "new")
    new.write_bytes(content)
    return f"This epoch is kept as {new}: name that file and add --resume to go on"


def write_whole(path: Path, content: bytes):
    """Write the file `path` whole or not at all: cut short, the old one stays.

    Where another program holds the old file (on Windows a virus scanner or OneDrive),
    it is tried again for 1.5 s.
    """
    with dataset.new_part(path) as part:
        with open(part, "xb") as file:
            file.write(content)
            file.flush()
            try:  # on the disk, before it takes the old one's name
                os.fsync(file.fileno())
            except OSError as error:  # some network drives cannot say
                if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                    raise
        for wait in (0.1, 0.2, 0.4, 0.8, 0):  # s
            try:
                return os.replace(part, path)
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
    with usable(path, MAKE_ROOM), dataset.new_part(path) as trial:
        trial.write_bytes(bytes(size if resume else 2 * size))
    if path.exists() and not resume:
        load_checkpoint(path)  # nothing else is replaced: no script, no photo
        print(f"{path} exists: the first epoch keeps it as {free_name(path, 'old')}")


def restore(path: Path, model, optimizer, settings: dict) -> dict:
    """Put model and optimizer back as they were when the last finished epoch ended.

    Returns the checkpoint. Other settings than its own are refused by name.
    """
    checkpoint = load_checkpoint(path)
    same = "give the same options, --data too, or name another file"
    with usable(path, CHOOSE):
        if "image_losses" not in checkpoint:  # the newest key
            raise ValueError("an older train.py's or the lecture's: it cannot go on")
        for name, value in settings.items():
            if (was := checkpoint["settings"].get(name, "unknown")) != value:
                fail(f"{path} has {name} {was}, not {value}: {same}")
        load_weights(model, checkpoint["model_state_dict"])
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
    print(f"{path}: {checkpoint['epoch'] + 1} of {settings['epochs']} epochs are done")
    return checkpoint


# The command line.


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training run, checked, and the learning rate filled in."""
    add, default = parser.add_argument, "(default: %(default)s)"
    number, seed = {"type": int, "metavar": "N"}, "the same one gives the same bits"
    add("--epochs", **number, default=EPOCHS, help=f"passes over the images {default}")
    add("--batch-size", **number, default=BATCH_SIZE, help=f"images a step {default}")
    add("--seed", **number, default=1, help=f"{seed} {default}")
    add("--lr", type=float, metavar="X", help="first learning rate")
    own = f"or one of the lecture's five, each with its own --lr {default}"
    add("--optimizer", choices=OPTIMIZERS, default="muon", help=own)
    add("--resume", action="store_true", help="go on after the last finished epoch")
    args = dataset.parse(parser)
    args.lr = OPTIMIZERS[args.optimizer].keywords["lr"] if args.lr is None else args.lr
    limits = {"epochs": (1, 10**6), "seed": (0, 2**32), "lr": (1e-9, 1000)}
    limits["width"] = (1, MAX_WIDTH)  # compare_resnet.py has none
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
    model.whiten(normalize(train_data.images[::25]))  # more change nothing
    settings = {"model": "CNN", "width": args.width, **settings_of(args, train_data)}
    fit(model, train_data, settings, path, args.resume, device)
    print(f"{path} is finished. Next: {next_command(args)}")


if __name__ == "__main__":
    dataset.run(main, STOPPED)
