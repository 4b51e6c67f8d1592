"""Train the classifier on CIFAR-10's training pictures; save it after each epoch.

    python train.py                 # thirteen epochs, some minutes on a CPU
    python train.py --resume        # go on after a break, as if there had been none
    python train.py --synthetic --checkpoint synthetic.pth    # made-up pictures

Measured: 90.0 % of the test pictures right (mean of three seeds) after three minutes on
two cores. The test pictures are not used here: that is what evaluation.py is for.
"""

import argparse
import sys
import time
import zlib
from pathlib import Path

import torch
from torch import nn
from torch.hub import tqdm  # the progress bar, without one more package
from torch.optim import SGD, Adagrad, Adam, RMSprop
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import resize

from dataset import Pictures, cifar_dataset, fail, normalize, run
from model import (
    CNN,
    MAX_WIDTH,
    OLD,
    WIDTH,
    load_checkpoint,
    pick_device,
    save_checkpoint,
    try_to_write,
)

EPOCHS = 13  # about as long as the lecture's 20 epochs of a small network take
BATCH_SIZE = 128  # pictures a step; 64 takes longer and is no better
# A tenth of every target goes to all classes alike, so that no logit has to grow for
# ever (Szegedy et al. 2016). One loss for each picture: `choose` needs it.
CRITERION = nn.CrossEntropyLoss(label_smoothing=0.1, reduction="none")
SMALL_SIZE = 24  # px: most epochs see smaller pictures, in two thirds of the time
SMALL_EPOCHS = 0.7  # share of those epochs: +0.3 points (progressive resizing, fast.ai)
SEEN = 0.65  # share of the pictures that most epochs see: +0.5 points (see `choose`)
# The learning rate rises for 15 % of the run, because large first steps, from random
# weights, can make the loss explode, and falls to about 0, where the weights settle. The
# momentum stays as it is (AdaGrad has none).
SCHEDULE = {"pct_start": 0.15, "anneal_strategy": "linear", "cycle_momentum": False}
# bfloat16 where the processor has instructions for it (AMD since Zen 4, Intel's servers):
# it takes a third less time. Elsewhere, or where an older torch cannot tell, float32.
FAST_BFLOAT16 = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
STOPPED = "stopped: the same command with --resume goes on after the last whole epoch"
DECAY = {"weight_decay": 5e-4}  # against overfitting; the usual value for CIFAR-10

# The lecture's five: the class, the peak of the learning rate, the other arguments.
OPTIMIZERS = {
    "sgd": (SGD, 1.0, DECAY),
    "momentum": (SGD, 0.3, DECAY | {"momentum": 0.9, "nesterov": True}),
    "adagrad": (Adagrad, 0.02, {}),
    "rmsprop": (RMSprop, 0.002, {}),
    "adam": (Adam, 0.002, {}),
}


def plan(epochs: int, pictures: int) -> list[tuple[int, int]]:
    """How many pictures each epoch sees, and in which size (px)."""
    small, whole = int(SMALL_EPOCHS * epochs), max(1, epochs // 8)
    sizes = [SMALL_SIZE] * small + [32] * (epochs - small)
    some = [int(SEEN * pictures)] * (epochs - 1 - whole)
    counts = [pictures, *some, *[pictures] * whole]  # the last eighth sees all again
    return list(zip(counts[:epochs], sizes))


def choose(losses: torch.Tensor, count: int) -> list[int]:
    """The hardest pictures and half of the others: `count` of them in random order.

    `losses` are those of all pictures when they were last seen (0 before). A picture of
    small loss teaches little, and without it there is time for more epochs. Source:
    InfoBatch (Qin et al., ICLR 2024), without its weights for those that remain.
    """
    order = losses.argsort(descending=True, stable=True)
    # hard + (all - hard) / 2 = count
    hard, others = order.tensor_split([2 * count - len(losses)])
    others = others[torch.randperm(len(others))[: count - len(hard)]]
    return torch.cat([hard, others])[torch.randperm(count)].tolist()


def make_optimizer(model, settings: dict, steps: int):
    """The optimizer that `settings` name, and the schedule of its learning rate."""
    make, _, options = OPTIMIZERS[settings["optimizer"]]
    optimizer = make(model.parameters(), settings["lr"], **options)
    # One more: scheduler.step() follows the last step, too, and past its end the line
    # falls below 0.
    return optimizer, OneCycleLR(optimizer, settings["lr"], steps + 1, **SCHEDULE)


def train_epoch(model, loader, size, optimizer, scheduler, device):
    """One pass over the loader's pictures, made `size` px wide and high.

    Returns a row of the history (mean loss, accuracy from 0 to 1, seconds), and the loss
    of each picture.
    """
    model.train()
    start = time.perf_counter()
    correct, losses = 0, []
    with tqdm(total=len(loader), leave=False, disable=not sys.stderr.isatty()) as bar:
        for images, labels in loader:
            images, labels = resize(images, [size, size]).to(device), labels.to(device)
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
    losses, seconds = torch.cat(losses), time.perf_counter() - start
    loss, accuracy = losses.mean().item(), correct / len(losses)
    return {"loss": loss, "accuracy": accuracy, "seconds": seconds}, losses


def fit(model, train_data: Pictures, settings: dict, path: Path, resume: bool, device):
    """Train `model` as `settings` say; write the checkpoint `path` after each epoch.

    With `resume` it goes on after the last finished epoch and ends, on a CPU, with the
    same bits as without the break: the random numbers of an epoch follow from seed and
    epoch alone, and the checkpoint holds all else that the next epoch depends on.
    """
    batch_size, epochs = settings["batch_size"], settings["epochs"]
    epochs_plan = plan(epochs, len(train_data))
    fewest = min(count for count, _ in epochs_plan)
    if not 1 < batch_size <= fewest:
        fail(f"--batch-size must be from 2 to {fewest:,}, the pictures of an epoch")
    steps = sum(count // batch_size for count, _ in epochs_plan)
    optimizer, scheduler = make_optimizer(model.to(device), settings, steps)
    history, losses = [], torch.zeros(len(train_data))
    if resume:
        history = restore(path, model, optimizer, scheduler, losses, settings)
        print(f"{path}: {len(history)} of {epochs} epochs are done")
    elif path.exists():
        old = path.with_suffix(OLD)
        print(f"{path} exists: the first epoch replaces it and keeps it as {old}")
    generator = torch.Generator().manual_seed(settings["seed"])
    mirrored = torch.rand(len(train_data), generator=generator) < 0.5
    for epoch in range(len(history), epochs):
        torch.manual_seed(1000 * settings["seed"] + epoch)
        count, size = epochs_plan[epoch]
        order = choose(losses, count)
        # Mirrored in every other epoch, so that two epochs in a row show both sides of
        # a picture: +0.3 points (KellerJordan/cifar10-airbench).
        train_data.mirrored = mirrored ^ bool(epoch % 2)
        # drop_last: what batch norm finds in a last batch of a few pictures is noise.
        loader = DataLoader(train_data, batch_size, sampler=order, drop_last=True)
        if epoch > 0 and isinstance(model, CNN):
            # Its filters are fixed and its biases have settled: now the backward pass
            # can end before this layer, which saves a tenth of the time.
            model.whitening.requires_grad_(False)
        row, seen = train_epoch(model, loader, size, optimizer, scheduler, device)
        numbers = [seen.mean(), *model.state_dict().values()]
        if not all(tensor.isfinite().all() for tensor in numbers):
            fail("the loss is not a finite number any more: choose a smaller --lr")
        losses[order[: len(seen)]] = seen
        history.append(row)
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "scheduler_state_dict": scheduler.state_dict(),
            "loss": row["loss"],
            "settings": settings,
            "history": history,
            "picture_losses": losses,
        }
        save_checkpoint(checkpoint, path)
        print_epoch(history, epochs_plan, scheduler.get_last_lr()[0])


def print_epoch(history: list[dict], epochs_plan: list, rate: float):
    """The line of the epoch that has just been saved."""
    done, row = len(history), history[-1]
    pixels = [count * size**2 for count, size in epochs_plan]  # they take the time
    spent = sum(epoch["seconds"] for epoch in history)
    left = spent * sum(pixels[done:]) / sum(pixels[:done])
    print(
        f"Epoch: {done}/{len(epochs_plan)}, Loss: {row['loss']:.4f}, "
        f"Accuracy: {row['accuracy']:.2%}, Learning rate: {rate:.4f}, "
        f"{row['seconds']:.0f} s, {left:.0f} s left"
    )


def restore(path: Path, model, optimizer, scheduler, losses, settings: dict) -> list:
    """Put all back as it was when the last finished epoch ended; returns its history."""

    def put_back(checkpoint: dict):  # load_checkpoint says in one line what this raises
        for name, value in settings.items():
            if (was := checkpoint["settings"].get(name, "unknown")) != value:
                fail(f"{path} has {name} {was}, not {value}: use that or another file")
        optimizer.load_state_dict(checkpoint["optimizer_state_dict"])
        scheduler.load_state_dict(checkpoint["scheduler_state_dict"])
        losses.copy_(checkpoint["picture_losses"])
        return model

    return load_checkpoint(path, put_back)[1]["history"]


def parse_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options of a training run, checked, and the learning rate filled in."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.error = fail  # one line, like all mistakes
    add, default = parser.add_argument, "default: %(default)s"
    add("--epochs", type=int, default=EPOCHS, metavar="N", help=default)
    add("--batch-size", type=int, default=BATCH_SIZE, metavar="N", help=default)
    add("--optimizer", choices=OPTIMIZERS, default="momentum", help=default)
    add("--lr", type=float, metavar="X", help="peak, default: the optimizer's own")
    add("--seed", type=int, default=1, metavar="N", help=default)
    add("--data", default="data", metavar="DIR", help=f"pictures' folder, {default}")
    add("--synthetic", action="store_true", help="made-up pictures, no download")
    add("--checkpoint", default="cifar_cnn.pth", metavar="FILE", help=default)
    add("--resume", action="store_true", help="go on after the last finished epoch")
    add("--device", metavar="NAME", help="cpu, cuda, ... default: cuda, or else cpu")
    args = parser.parse_args()
    args.lr = OPTIMIZERS[args.optimizer][1] if args.lr is None else args.lr
    limits = {"epochs": (1, 10**6), "seed": (0, 2**32), "lr": (1e-9, 1000)}
    limits |= {"width": (1, MAX_WIDTH)}  # compare_resnet.py has none
    for name, (least, most) in limits.items():
        if name in args and not least <= getattr(args, name) <= most:
            fail(f"--{name} must be a number from {least} to {most:,}")
    return args


def settings_of(args: argparse.Namespace, train_data: Pictures) -> dict:
    """What a run depends on: a resumed one must have the same."""
    names = ("epochs", "batch_size", "optimizer", "lr", "seed", "synthetic")
    settings = {name: getattr(args, name) for name in names}
    checksum = zlib.crc32(train_data.images[::25].contiguous().numpy())
    return settings | {"checksum of the pictures": checksum}


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    width_help = "channels of the first block, default: %(default)s"
    parser.add_argument("--width", type=int, default=WIDTH, help=width_help)
    args = parse_options(parser)
    path, device = Path(args.checkpoint), pick_device(args.device)
    torch.manual_seed(args.seed)
    model = CNN(args.width)
    try_to_write(path, model, args.resume)
    train_data, _ = cifar_dataset(args.data, args.synthetic)
    model.whiten(normalize(train_data.images[::25]))  # 2,000 pictures are plenty
    settings = settings_of(args, train_data) | {"model": "CNN", "width": args.width}
    fit(model, train_data, settings, path, args.resume, device)
    same = " --synthetic" if args.synthetic else f' --data "{args.data}"'
    print(f'{path} is finished. Next: python evaluation.py --checkpoint "{path}"{same}')


if __name__ == "__main__":
    run(main, STOPPED)
