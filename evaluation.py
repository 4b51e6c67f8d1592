"""Report how well a trained checkpoint does on CIFAR-10's 10,000 test images.

    python evaluation.py                            # exit status 0 from 55 % on, else 1
    python evaluation.py --mistakes mistakes.png    # draw what it gets wrong
    python evaluation.py --curves curves.png        # draw how it was trained
    python evaluation.py --image photo.jpg          # ask it about a photo of one's own

It also reads the checkpoints of the lecture's train.py. Each image is classified
once, as it is (no test-time augmentation).
"""

import argparse
import math
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

import dataset
from dataset import CLASSES, ImageDataset, cifar_dataset, fail, usable
from model import CNN, WIDTH

TARGET = 0.55  # the accuracy that the assignment asks for
BATCH_SIZE = 500  # images at a time: little memory, and larger is no faster
BAR = 40  # characters for 100 %: a line fits a terminal of 80
WORST = 8  # mistakes drawn of each class: the sheet is 910 px wide
MAX_WIDTH = 1024  # two gigabytes of weights: more is a slip or an attack
CHOOSE = "name another, or move it away and train again"  # instead of a bad checkpoint


@torch.no_grad()
def predict(model, data: ImageDataset, device) -> torch.Tensor:
    """The logits of all images, float32 (N, 10), on the CPU."""
    model.to(device).eval()
    loader = DataLoader(data, BATCH_SIZE)
    return torch.cat([model(images.to(device)).cpu() for images, _ in loader])


def check_kind(checkpoint: dict, args: argparse.Namespace):
    """Refuse a checkpoint on images of another kind than it was trained for."""
    for name in ("synthetic", "holdout"):
        given = getattr(args, name)
        if checkpoint["settings"].get(name, False) != given:
            was, hint = ("without", "leave out") if given else ("with", "add")
            fail(f"{args.checkpoint} was trained {was} --{name}: {hint} --{name}")


def confusions(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """How often images of each class were taken for which: int64 (true, taken for)."""
    pairs = 10 * labels + logits.argmax(1)  # a number 0..99 for each pair
    return torch.bincount(pairs, minlength=100).view(10, 10)


def report(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Print accuracy, loss, a bar for each class and the most frequent confusions.

    Returns the accuracy (0 to 1).
    """
    confusion = confusions(logits, labels)
    correct, count = confusion.trace().item(), len(labels)
    print(f"Accuracy: {correct / count:.2%} ({correct}/{count})")
    print(f"Loss: {F.cross_entropy(logits, labels):.4f}")
    print("Accuracy of each class:")
    for name, row, right in zip(CLASSES, confusion, confusion.diagonal()):
        share = (right / row.sum().clamp(min=1)).item()
        print(f"  {name:10} {share:7.2%}  {'#' * round(BAR * share)}")
    print("Most frequent confusions:")
    wrong = confusion.clone().fill_diagonal_(0)
    for cell in wrong.flatten().argsort(descending=True, stable=True)[:5].tolist():
        if times := wrong.flatten()[cell].item():
            true, taken = CLASSES[cell // 10], CLASSES[cell % 10]
            print(f"  {times:4} x {true} taken for {taken}")
    return correct / count


def draw_mistakes(logits: torch.Tensor, data: ImageDataset, path: Path):
    """Draw a row for each class: its images that were mistaken most confidently."""
    cell, margin = 100, 110  # px: an image with its gap; the class's name
    side = 96  # px: an image, three times as large
    sheet = Image.new("RGB", (margin + WORST * cell, 10 * (cell + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    confidence, predicted = logits.softmax(1).max(1)
    for label, name in enumerate(CLASSES):
        top = label * (cell + 20)
        draw.text((6, top + cell // 2), f"{name}:", fill="black", font_size=16)
        wrong = ((data.labels == label) & (predicted != label)).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:WORST]
        for column, i in enumerate(wrong.tolist()):
            left = margin + column * cell
            image = Image.fromarray(data.images[i].permute(1, 2, 0).numpy())
            sheet.paste(image.resize((side, side), Image.NEAREST), (left, top))
            caption = f"{CLASSES[predicted[i]]} {confidence[i]:.0%}"
            draw.text((left, top + cell - 2), caption, fill="firebrick", font_size=12)
    with usable(path, "name another, such as mistakes.png"):
        sheet.save(path)
    print(f"{path}: each row one class, under each image what it was taken for")


def check_matplotlib(option: str):
    """Say at once, not after minutes of training, that a drawing needs one more package."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    try:
        import matplotlib.pyplot  # noqa: F401 - is it there, and whole?
    except ImportError as error:
        fail(f"{option} needs matplotlib ({error}): pip install matplotlib")


def draw_curves(histories: dict[str, list[dict]], path: Path):
    """Draw loss, training accuracy and learning rate of each epoch; a line for each name."""
    if not all(histories.values()):
        fail("a checkpoint of the lecture's train.py has no history to draw")
    from matplotlib import pyplot  # not a requirement of the scripts

    pyplot.rcdefaults()  # not with somebody's LaTeX
    warnings.filterwarnings("ignore", message="Glyph")  # that the font has not
    kinds = {"loss": "training loss", "accuracy": "training accuracy"}
    kinds |= {"learning_rate": "learning rate"}
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.5), constrained_layout=True)
    for panel, (kind, label) in zip(panels, kinds.items()):
        for history in histories.values():
            # Older checkpoints lack some.
            values = [row.get(kind, math.nan) for row in history]
            panel.plot(range(1, len(history) + 1), values, ".-")
        panel.set(xlabel="epoch", ylabel=label)
        panel.grid(alpha=0.3)
    # Set afterwards: a label that begins with _ would be left out.
    texts = panels[0].legend(panels[0].lines, ["-"] * len(histories)).get_texts()
    for text, (name, history) in zip(texts, histories.items()):
        seconds = sum(row.get("seconds", math.nan) for row in history)
        legend = name if math.isnan(seconds) else f"{name}, {seconds:,.0f} s"
        legend = legend.encode("utf-8", "replace").decode()  # a Shift-JIS name
        text.set_text(legend.replace("$", r"\$"))  # no formula
    with usable(path, "name another, such as curves.png"):
        figure.savefig(path, dpi=150, format=Path(path).suffix[1:] or "png")
    print(f"{path}: loss, accuracy and learning rate of each epoch of training")


def classify_photo(model, photo: str, device):
    """Print the three likeliest classes of an image file of any size."""
    # The network knows 32x32 alone, so the central square is made as small.
    small = ImageOps.fit(dataset.read_image(photo), (32, 32), Image.BOX)
    data = ImageDataset(pil_to_tensor(small)[None], labels=[0])  # any label
    for share, label in zip(*predict(model, data, device)[0].softmax(0).topk(3)):
        print(f"{share:7.2%}  {CLASSES[label]}")


# Reading a checkpoint: a dict of numbers, strings and tensors with the lecture's keys
# `epoch` (from 0), `model_state_dict`, `optimizer_state_dict` and `loss`; train.py adds
# `settings`, `history` and what a resume needs.


def read_file(path: Path):
    """What `torch.save` wrote, on the CPU; no code in it runs.

    Checksums are compared where there are some: not in files of torch before 1.6, nor
    in those written with compute_crc32=False. (torch's oldest files, tars, could run
    code up to torch 2.5: CVE-2025-32434.)
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            checked = any(entry.CRC for entry in archive.infolist())
            if checked and (changed := archive.testzip()):
                raise ValueError(f"the bytes of its {changed} have changed")
    elif tarfile.is_tarfile(path):
        raise ValueError("it is a tar")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        # torch's own words advise to let the file run code; ours never do.
        named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if named:
        raise ValueError(
            f"it holds {named[1]}, not only tensors and plain numbers: save "
            "model.state_dict() and float(loss), as the lecture's train.py does"
        )
    raise ValueError(
        f"torch.load finds no checkpoint in its {dataset.what_it_is(path)}"
    )


def load_checkpoint(path: Path) -> dict:
    """The checkpoint `path`, ours or the lecture's, checked but for its weights.

    `settings`, what train.py was called with, and `history`, a row for each epoch, are
    empty in the lecture's. What is no checkpoint ends in one line (see `usable`).
    """
    if not path.exists():
        fail(f"there is no {path.absolute()}: run train.py first, without --resume")
    with usable(path, CHOOSE):
        found = read_file(path)
        if not isinstance(found, dict):
            raise TypeError(f"it holds a {type(found).__name__}, not a dict")
        if missing := {"epoch", "loss", "model_state_dict"} - found.keys():
            keys = ", ".join(map(str, found))[:200]
            raise ValueError(f"it has no {', '.join(sorted(missing))}, but {keys}")
        numbers = {"epoch": int(found["epoch"]), "loss": float(found["loss"])}
        history = [row for row in found.get("history", []) if isinstance(row, dict)]
        checkpoint = {"settings": {}, **found, **numbers, "history": history}
        values = [x for row in history for x in row.values()]
        if not all(math.isfinite(x) for x in [*values, *numbers.values()]):
            raise ValueError("its loss or its history is not all finite numbers")
        if numbers["epoch"] < 0 or not isinstance(checkpoint["settings"], dict):
            raise ValueError("its epoch or its settings are of another kind")
    return checkpoint


def load_weights(model: nn.Module, weights: dict):
    """Put `weights` into `model`; they must fit exactly and be finite, or it raises.

    Only what torch.compile and DataParallel put before each name may be there.
    """
    for prefix in ("module.", "_orig_mod.", "module."):  # either may be the outer one
        consume_prefix_in_state_dict_if_present(weights, prefix)
    model.load_state_dict(weights)
    if not all(tensor.isfinite().all() for tensor in model.state_dict().values()):
        raise ValueError("its weights are not all finite numbers")


def load_cnn(path: Path) -> tuple[CNN, dict]:
    """The network of a checkpoint of ours or of the lecture's, and the checkpoint."""
    checkpoint = load_checkpoint(path)
    with usable(path, CHOOSE):
        name = checkpoint["settings"].get("model", "CNN")
        width = checkpoint["settings"].get("width", WIDTH)  # the lecture's has none
        if name != "CNN":
            raise ValueError(f"it holds {name}, not our CNN")
        if width not in range(1, MAX_WIDTH + 1):
            raise ValueError(f"its width is not from 1 to {MAX_WIDTH}")
        model = CNN(width)
        load_weights(model, checkpoint["model_state_dict"])
    return model, checkpoint


def parse_options() -> argparse.Namespace:
    parser = dataset.command_line(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--mistakes", metavar="FILE", help="draw the most confident mistakes")
    add("--curves", metavar="FILE", help="draw the history (needs matplotlib)")
    add("--image", metavar="FILE", help="name the likeliest classes of this photo")
    return dataset.parse(parser)


def main():
    args = parse_options()
    path, device = args.checkpoint, dataset.pick_device(args.device)
    if args.curves:
        check_matplotlib("--curves")
    model, checkpoint = load_cnn(path)
    check_kind(checkpoint, args)
    if args.image:
        classify_photo(model, args.image, device)
        return 0
    if args.curves:
        draw_curves({path.name: checkpoint["history"]}, args.curves)
    _, test_data = cifar_dataset(args.data, args.synthetic, ["test"], args.holdout)
    logits = predict(model, test_data, device)
    accuracy = report(logits, test_data.labels)
    if args.mistakes:
        draw_mistakes(logits, test_data, Path(args.mistakes))
    done, epochs = checkpoint["epoch"] + 1, checkpoint["settings"].get("epochs")
    if epochs and done < epochs:
        print(f"{path} holds {done} of {epochs} epochs: go on with train.py --resume")
    kind = "" if len(test_data) == 10_000 else f" of only {len(test_data):,} images"
    if args.holdout:
        kind = f" of {len(test_data):,} held-out training images"
    if args.synthetic:
        kind = " on synthetic images, which says nothing of CIFAR-10"
    verdict = "PASS" if accuracy >= TARGET else "FAIL"
    print(f"{verdict}: {accuracy:.2%}{kind} (the target is {TARGET:.0%})")
    return 0 if accuracy >= TARGET else 1


if __name__ == "__main__":
    dataset.run(main)
