"""Report how well a trained checkpoint does on CIFAR-10's 10,000 test images.

    python evaluation.py                        # exit status 0 from 55 % on
    python evaluation.py --mistakes a.png       # draw what it gets wrong
    python evaluation.py --curves a.png         # draw how it was trained
    python evaluation.py --image photo.jpg      # ask it about your own photo

It also reads what the course's own train.py ("the lecture's") saves of our network.
There is no test-time augmentation.
"""

import math
import os
import re
import tarfile
import warnings
import zipfile
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

import dataset
from dataset import CLASSES, ImageDataset, cifar_dataset, fail, usable, what_it_is
from model import CNN, WIDTH

TARGET = 0.55  # the accuracy that the assignment asks for
WORST = 8  # mistakes drawn of each class: the sheet is 920 px wide
MAX_WIDTH = 1024  # two gigabytes of weights: more is a slip or an attack
CHOOSE = "name another, or move it away and train again"  # instead of a bad checkpoint


@torch.no_grad()
def predict(model, data: ImageDataset, device) -> torch.Tensor:
    """The logits of all images, float32 (N, 10), on the CPU."""
    model.to(device).eval()
    loader = DataLoader(data.to(device), 500)  # little memory, and more is no faster
    return torch.cat([model(images.to(device)) for images, _ in loader]).cpu()


def check_kind(checkpoint: dict, args):
    """Refuse a checkpoint that was trained with another --synthetic or --holdout."""
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
    """Print and return the accuracy (0 to 1); print loss, classes and confusions."""
    confusion = confusions(logits, labels)
    correct, count = confusion.trace().item(), len(labels)
    print(f"Accuracy: {correct / count:.2%} ({correct}/{count})")
    print(f"Loss: {torch.nn.functional.cross_entropy(logits, labels):.4f}")
    print("Accuracy of each class:")
    for name, row, right in zip(CLASSES, confusion, confusion.diagonal()):
        share = (right / row.sum()).item()
        print(f"  {name:10} {share:7.2%}  {'#' * round(40 * share)}")  # fits 80
    print("Most frequent confusions:")
    wrong = confusion.fill_diagonal_(0).flatten()
    for pair in wrong.argsort(descending=True, stable=True)[:5].tolist():
        if wrong[pair]:
            true, taken = CLASSES[pair // 10], CLASSES[pair % 10]
            print(f"  {wrong[pair]:4} x {true} taken for {taken}")
    return correct / count


def draw_mistakes(logits: torch.Tensor, data: ImageDataset, path: Path):
    """Draw a row for each class: its images that were mistaken most confidently."""
    column, row = 100, 120  # px: an image, three times as large, with its caption
    left, top = 120, 40  # px: the names of the classes, the title
    sheet = Image.new("RGB", (left + WORST * column, top + 10 * row), "white")
    draw = ImageDraw.Draw(sheet)
    title = "row: true class; red: what it was taken for, and the confidence"
    draw.text((left, 10), title, fill="black", font_size=16)
    confidence, predicted = logits.softmax(1).max(1)
    for label, name in enumerate(CLASSES):
        y = top + label * row
        draw.text((10, y + 40), name, fill="black", font_size=16)
        wrong = ((data.labels == label) & (predicted != label)).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:WORST]
        for x, i in zip(range(left, sheet.width, column), wrong.tolist()):
            image = Image.fromarray(data.images[i].permute(1, 2, 0).cpu().numpy())
            sheet.paste(image.resize((96, 96), Image.NEAREST), (x, y))
            caption = f"{CLASSES[predicted[i]]} {confidence[i]:.0%}"
            draw.text((x, y + 98), caption, fill="firebrick", font_size=12)
    with usable(path, "name another, such as mistakes.png"):
        sheet.save(path)
    print(f"{path}: the most confident mistakes of each class")


def check_drawing(option: str, histories: dict[str, list[dict]]):
    """Say at once, not after an hour of training, what is missing for a drawing."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    try:
        import matplotlib.pyplot  # noqa: F401 - is it there, and whole?
    except ImportError as error:
        fail(f"{option} needs matplotlib ({error}): pip install matplotlib")
    if empty := [name for name, history in histories.items() if not history]:
        fail(f"{option}: {', '.join(empty)} has no history (the lecture's have none)")


def draw_curves(histories: dict[str, list[dict]], file: str, title: str = ""):
    """Draw training loss and accuracy of each epoch; a line for each name."""
    from matplotlib import pyplot  # not a requirement of the scripts

    pyplot.rcdefaults()  # not with somebody's LaTeX
    warnings.filterwarnings("ignore", message="Glyph")  # that the font has not
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    figure.suptitle(plain(title))
    for panel, key in zip(panels, ("loss", "accuracy")):
        for name, history in histories.items():
            values = [row.get(key, math.nan) for row in history]  # others' may lack it
            label = " " + plain(name)  # a _ in front would hide it
            panel.plot(range(1, len(history) + 1), values, ".-", label=label)
        panel.set(xlabel="epoch", ylabel=f"training {key}")
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    panels[1].yaxis.set_major_formatter("{x:.0%}")
    history = next(iter(histories.values()))
    for epoch in range(2, len(history)):  # why the loss jumps: larger or more images
        for key, change in (("size", "now 32 px"), ("images", "now all images")):
            if history[epoch].get(key, 0) > history[epoch - 1].get(key, 0):
                panels[0].axvline(epoch + 0.5, color="gray", linestyle=":")
                where = {"x": epoch + 0.5, "y": history[0]["loss"]}
                panels[0].text(s=change, **where, rotation=90, ha="right", va="top")
    panels[1].legend()
    path = Path(file)
    with usable(file, "name another, such as curves.png"):
        path = path if path.suffix else path.with_suffix(".png")  # not over `run1`
        figure.savefig(path, dpi=150)
    print(f"{path}: loss and accuracy of each epoch of training")


def plain(name: str) -> str:
    """For matplotlib: no formula between two $, no byte of a Shift-JIS file name."""
    return name.encode("utf-8", "replace").decode().replace("$", r"\$")


def classify_photo(model, photo: str, device):
    """Print the three likeliest classes of an image file of any size."""
    # The network knows 32x32 alone, so the central square is made as small.
    small = ImageOps.fit(dataset.read_image(photo), (32, 32), Image.BOX)
    data = ImageDataset(pil_to_tensor(small)[None], labels=[0])  # any label
    print(f"{photo}:")
    for share, label in zip(*predict(model, data, device)[0].softmax(0).topk(3)):
        print(f"{share:7.2%}  {CLASSES[label]}")


# Reading a checkpoint: a dict of numbers, strings and tensors with the lecture's keys
# `epoch` (from 0), `model_state_dict`, `optimizer_state_dict` and `loss`; train.py adds
# `settings`, `history` and what a resume needs.


def read_file(path: Path):
    """What `torch.save` wrote, on the CPU; no code in it runs.

    Checksums are compared where there are some: not in files of torch before 1.6, nor
    in those written with compute_crc32=False.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            checked = any(entry.CRC for entry in archive.infolist())
            if checked and (changed := archive.testzip()):
                raise ValueError(f"the bytes of its {changed} have changed")
    elif tarfile.is_tarfile(path):
        raise ValueError("it is a tar")  # may run code up to torch 2.5: CVE-2025-32434
    named = None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of formats that are refused anyway
            found = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(found, dict):  # torch 2.2 reads TorchScript, too
            return found
    except Exception as error:  # noqa: BLE001 - damaged files raise a dozen kinds
        # torch's own words advise to let the file run code; ours never do.
        named = re.search(r"Unsupported (?:global: GLOBAL|class) (\S+)", str(error))
    if named:
        hint = "save model.state_dict() and float(loss), as the lecture does"
        raise ValueError(f"it holds {named[1]}, not only tensors and numbers: {hint}")
    raise ValueError(f"torch.load finds no checkpoint in its {what_it_is(path)}")


def load_checkpoint(path: Path) -> dict:
    """The checkpoint `path`, checked but for its weights, or a one-line error.

    `settings` and `history`, a row for each epoch, are empty in the lecture's.
    """
    if not path.exists():
        fail(f"there is no {path.absolute()}: train first, without --resume")
    with usable(path, CHOOSE):
        found = read_file(path)
        if missing := {"epoch", "loss", "model_state_dict"} - found.keys():
            keys = ", ".join(map(str, found))[:200]
            raise ValueError(f"it has no {', '.join(sorted(missing))}, but {keys}")
        numbers = {"epoch": int(found["epoch"]), "loss": float(found["loss"])}
        settings = dict(found.get("settings", {}))
        history = [row for row in found.get("history", []) if isinstance(row, dict)]
        values = [numbers["loss"], *(x for row in history for x in row.values())]
        if numbers["epoch"] < 0 or not all(math.isfinite(x) for x in values):
            raise ValueError("its epoch is negative, or its loss or history not finite")
        return {**found, **numbers, "settings": settings, "history": history}


def load_weights(model: torch.nn.Module, weights: dict):
    """Put `weights` into `model`; they must fit exactly and be finite, or it raises."""
    prefix = r"^((module|_orig_mod)\.)+"  # of DataParallel and torch.compile
    model.load_state_dict({re.sub(prefix, "", x): y for x, y in weights.items()})
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


def main():
    parser = dataset.command_line(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--mistakes", metavar="FILE", help="draw the most confident mistakes")
    more, beside = ("FILE", "CHECKPOINT"), "and of other checkpoints (needs matplotlib)"
    add("--curves", nargs="+", metavar=more, help=f"draw the history, {beside}")
    add("--image", metavar="FILE", help="name the likeliest classes of this photo")
    args = dataset.parse(parser)
    path, device = args.checkpoint, dataset.pick_device(args.device)
    model, checkpoint = load_cnn(path)
    check_kind(checkpoint, args)
    if args.image:
        classify_photo(model, args.image, device)
        return 0
    others = [Path(x) for x in (args.curves or [])[1:]]  # read before time is spent
    histories = {str(x): load_checkpoint(x)["history"] for x in others}
    histories = {str(path): checkpoint["history"], **histories}
    if args.curves:
        check_drawing("--curves", histories)
    _, test_data = cifar_dataset(args.data, args.synthetic, ["test"], args.holdout)
    logits = predict(model, test_data, device)
    accuracy = report(logits, test_data.labels)
    if args.curves:
        title = f"{path.name}: {accuracy:.2%} of {len(test_data):,} images"
        draw_curves(histories, args.curves[0], title)
    if args.mistakes:
        draw_mistakes(logits, test_data, Path(args.mistakes))
    done, epochs = checkpoint["epoch"] + 1, checkpoint["settings"].get("epochs", 0)
    if done < epochs:
        print(f"{path} holds {done} of {epochs} epochs: train.py --resume goes on")
    images = "" if len(test_data) == 10_000 else f" of only {len(test_data):,} images"
    if args.holdout:
        images = f" of {len(test_data):,} held-out training images"
    if args.synthetic:
        images = " on synthetic images, which says nothing of CIFAR-10"
    verdict = "PASS" if accuracy >= TARGET else "FAIL"
    print(f"{verdict}: {accuracy:.2%}{images} (the target is {TARGET:.0%})")
    return 0 if accuracy >= TARGET else 1


if __name__ == "__main__":
    dataset.run(main)
