"""Report how well a trained checkpoint does on CIFAR-10's 10,000 test images.

    python evaluation.py                            # exit status 0 from 55 % on, else 1
    python evaluation.py --mistakes mistakes.png    # draw what it gets wrong
    python evaluation.py --curves curves.png        # draw how it was trained
    python evaluation.py --image photo.jpg          # ask it about a photo of one's own

It also reads the checkpoints of the lecture's train.py. Each image is classified
once, as it is (no test-time augmentation).
"""

import argparse
import importlib.util
import math
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.nn import functional as F
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from dataset import (
    CLASSES,
    ImageDataset,
    cifar_dataset,
    command_line,
    fail,
    parse,
    read_image,
    run,
)
from model import load_cnn, pick_device

TARGET = 0.55  # the accuracy that the assignment asks for
BATCH_SIZE = 500  # images at a time: little memory, and larger is no faster
BAR = 40  # characters for 100 %: a line fits a terminal of 80
WORST = 8  # mistakes drawn of each class: the sheet is 910 px wide


@torch.no_grad()
def predict(model, data: ImageDataset, device) -> torch.Tensor:
    """The logits of all images, float32 (N, 10), on the CPU."""
    model.to(device).eval()
    loader = DataLoader(data, BATCH_SIZE)
    return torch.cat([model(images.to(device)).cpu() for images, _ in loader])


def check_kind(checkpoint: dict, synthetic: bool, path: Path):
    """Refuse a checkpoint of real images on made-up ones, and the other way round."""
    if checkpoint["settings"].get("synthetic", False) != synthetic:
        kind, hint = ("real", "leave out") if synthetic else ("synthetic", "add")
        fail(f"{path} was trained on {kind} images: {hint} --synthetic")


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
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be drawn: {error}. Name another, such as mistakes.png")
    print(f"{path}: each row one class, under each image what it was taken for")


def check_matplotlib(option: str):
    """Say at once, not after minutes of training, that a drawing needs one more package."""
    if not importlib.util.find_spec("matplotlib"):
        fail(f"{option} needs matplotlib: pip install matplotlib")


def draw_curves(histories: dict[str, list[dict]], path: Path):
    """Draw loss, training accuracy and learning rate of each epoch; a line for each name."""
    if not all(histories.values()):
        fail("a checkpoint of the lecture's train.py has no history to draw")
    from matplotlib import pyplot  # not a requirement of the scripts

    kinds = {"loss": "training loss", "accuracy": "training accuracy"}
    kinds |= {"learning_rate": "learning rate"}
    figure, panels = pyplot.subplots(1, 3, figsize=(12, 3.5), layout="constrained")
    for name, history in histories.items():
        epochs = range(1, len(history) + 1)
        seconds = sum(row.get("seconds", math.nan) for row in history)
        legend = name if math.isnan(seconds) else f"{name}, {seconds:,.0f} s"
        for panel, kind in zip(panels, kinds):
            # Older checkpoints lack some.
            values = [row.get(kind, math.nan) for row in history]
            panel.plot(epochs, values, ".-", label=legend)
    for panel, label in zip(panels, kinds.values()):
        panel.set(xlabel="epoch", ylabel=label)
        panel.grid(alpha=0.3)
    panels[0].legend()
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:
        fail(f"{path} cannot be drawn: {error}. Name another, such as curves.png")
    print(f"{path}: loss, accuracy and learning rate of each epoch of training")


def classify_photo(model, photo: str, device):
    """Print the three likeliest classes of an image file of any size."""
    # The network knows 32x32 alone, so the central square is made as small.
    small = ImageOps.fit(read_image(photo), (32, 32), Image.Resampling.BOX)
    data = ImageDataset(pil_to_tensor(small)[None], labels=[0])  # any label
    for share, label in zip(*predict(model, data, device)[0].softmax(0).topk(3)):
        print(f"{share:7.2%}  {CLASSES[label]}")


def parse_options() -> argparse.Namespace:
    parser = command_line(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--mistakes", metavar="FILE", help="draw the most confident mistakes")
    add("--curves", metavar="FILE", help="draw the history (needs matplotlib)")
    add("--image", metavar="FILE", help="name the likeliest classes of this photo")
    return parse(parser)


def main():
    args = parse_options()
    path, device = args.checkpoint, pick_device(args.device)
    if args.curves:
        check_matplotlib("--curves")
    model, checkpoint = load_cnn(path)
    check_kind(checkpoint, args.synthetic, path)
    if args.image:
        classify_photo(model, args.image, device)
        return 0
    if args.curves:
        draw_curves({path.name: checkpoint["history"]}, args.curves)
    _, test_data = cifar_dataset(args.data, args.synthetic)
    logits = predict(model, test_data, device)
    accuracy = report(logits, test_data.labels)
    if args.mistakes:
        draw_mistakes(logits, test_data, Path(args.mistakes))
    done, epochs = checkpoint["epoch"] + 1, checkpoint["settings"].get("epochs")
    if epochs and done < epochs:
        print(f"{path} holds {done} of {epochs} epochs: go on with train.py --resume")
    kind = ""
    if args.synthetic:
        kind = " on synthetic images, which says nothing of CIFAR-10"
    verdict = "PASS" if accuracy >= TARGET else "FAIL"
    print(f"{verdict}: {accuracy:.2%}{kind} (the target is {TARGET:.0%})")
    return 0 if accuracy >= TARGET else 1


if __name__ == "__main__":
    run(main)
