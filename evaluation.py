"""Report how well a trained checkpoint does on CIFAR-10's 10,000 test images.

    python evaluation.py                        # exit status 0 from 55 % on
    python evaluation.py --mistakes a.png       # draw what it gets wrong
    python evaluation.py --curves a.png         # draw how it was trained
    python evaluation.py --image photo.jpg      # ask it about your own photo

It also reads what the course's own train.py ("the lecture's") saves of our network.
There is no test-time augmentation.
"""

import inspect
import os
import tarfile
import zipfile
from pathlib import Path

from dataset import CHECKPOINTS, CLASSES, ImageDataset, cifar_dataset  # isort: skip
import torch  # after dataset.py, which sets its environment
from PIL import Image, ImageDraw, ImageOps
from torch.utils.data import DataLoader
from torchvision.transforms.v2.functional import pil_to_tensor

from dataset import command_line, fail, read_image, run, usable
from model import CNN

GOAL = 0.55  # the accuracy that the assignment asks for
WORST = 8  # mistakes drawn of each class: the sheet is 920 px wide
LECTURE = {"model": "CNN", "synthetic": False, "holdout": False}  # saves no settings
TRAIN_ANEW = "name what train.py has saved, or move it away and train anew"
CHANGED = f"change model.py back to the network that was saved, {TRAIN_ANEW}"
FONTS = ["DejaVu Sans", "Yu Gothic", "Hiragino Sans", "Noto Sans CJK JP"]  # Japanese


@torch.no_grad()
def predict(model, data: ImageDataset, device) -> torch.Tensor:
    """The logits of all images, float32 (N, 10), on the CPU."""
    model.to(device).eval()
    data.images = data.images.to(device)
    loader = DataLoader(data, 500)  # little memory, and more is no faster
    return torch.cat([model(images) for images, _ in loader]).cpu()


def accuracy(model, data: ImageDataset, device) -> float:
    """The share of the images that are classified right, from 0 to 1."""
    right = predict(model, data, device).argmax(1) == torch.tensor(data.targets)
    return right.float().mean().item()


def confusions(logits: torch.Tensor, targets: list[int]) -> torch.Tensor:
    """How often images of each class were taken for which: int64 (true, taken for)."""
    pairs = len(CLASSES) * torch.tensor(targets) + logits.argmax(1)  # 0..99
    return torch.bincount(pairs, minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)


def report(logits: torch.Tensor, targets: list[int]) -> float:
    """Print and return the accuracy (0 to 1); print loss, classes and confusions."""
    confusion = confusions(logits, targets)
    correct, count = confusion.trace().item(), len(targets)
    loss = torch.nn.functional.cross_entropy(logits, torch.tensor(targets))
    print(f"Accuracy: {correct / count:.2%} ({correct}/{count})")
    print(f"Loss: {loss:.4f}")
    print("Accuracy of each class:")
    for name, row, right in zip(CLASSES, confusion, confusion.diagonal()):
        share = (right / row.sum()).item()
        print(f"  {name:10} {share:7.2%}  {'#' * round(40 * share)}")
    print("Most frequent confusions:")
    wrong = confusion.fill_diagonal_(0).flatten()
    for pair in wrong.argsort(descending=True, stable=True)[:5].tolist():
        if wrong[pair]:
            true, taken = (CLASSES[i] for i in divmod(pair, len(CLASSES)))
            print(f"  {wrong[pair]:4} x {true} taken for {taken}")
    return correct / count


def draw_mistakes(logits: torch.Tensor, data: ImageDataset, file: str):
    """Draw a row for each class: its images that were mistaken most confidently."""
    column, row = 100, 120  # px: an image, three times as large, with its caption
    left, top = 120, 40  # px: the names of the classes, the title
    sheet = Image.new("RGB", (left + WORST * column, top + len(CLASSES) * row), "white")
    draw = ImageDraw.Draw(sheet)
    title = "row: true class; red: what it was taken for, and the confidence"
    draw.text((left, 10), title, fill="black", font_size=16)
    confidence, predicted = logits.softmax(1).max(1)
    targets = torch.tensor(data.targets)
    for label, name in enumerate(CLASSES):
        y = top + label * row
        draw.text((10, y + 40), name, fill="black", font_size=16)
        wrong = ((targets == label) & (predicted != label)).nonzero().flatten()
        wrong = wrong[confidence[wrong].argsort(descending=True)][:WORST]
        for x, i in zip(range(left, sheet.width, column), wrong.tolist()):
            image = Image.fromarray(data.images[i].permute(1, 2, 0).cpu().numpy())
            sheet.paste(image.resize((96, 96), Image.NEAREST), (x, y))
            caption = f"{CLASSES[predicted[i]]} {confidence[i]:.0%}"
            draw.text((x, y + 98), caption, fill="firebrick", font_size=12)
    with usable(file, "name another, such as mistakes.png"):
        sheet.save(file)
    print(f"{file}: the most confident mistakes of each class")


def draw_curves(histories: dict[str, list[dict]], file: str):
    """Draw loss and accuracy of each epoch of training; a line for each name."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's own may be missing here
    with usable("matplotlib", "pip install matplotlib"):  # not in requirements.txt
        from matplotlib import font_manager, pyplot, ticker
    pyplot.rcdefaults()  # not with somebody's LaTeX
    pyplot.rcParams["text.parse_math"] = False  # of a name between two $
    known = font_manager.get_font_names()
    pyplot.rcParams["font.family"] = [font for font in FONTS if font in known]
    figure, panels = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, history) in enumerate(histories.items()):
        if not history:
            fail(f"{name} has no history, as the lecture's: draw another's curves")
        for panel, key in enumerate(["loss", "accuracy", "held_out"]):
            points = [(n, x[key]) for n, x in enumerate(history, 1) if key in x]
            label = f" {name}" + ", held out" * (panel > 1)  # a _ would hide it
            style = {"marker": ".", "color": f"C{i}", "ls": "--" if panel > 1 else "-"}
            if points:
                panels[min(panel, 1)].plot(*zip(*points), **style, label=label)
    for panel, what in zip(panels, ("loss", "accuracy")):
        panel.set(xlabel="epoch", ylabel=f"training {what}")
        panel.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        panel.grid(alpha=0.3)
    panels[1].yaxis.set_major_formatter(ticker.PercentFormatter(1))
    panels[1].legend()
    with usable(file, "name it curves.png, say"):
        file = Path(file).with_suffix(Path(file).suffix or ".png")
        figure.savefig(file, dpi=150)
    print(f"{file}: loss and accuracy of each epoch of training")


def classify_photo(model, photo: str, device):
    """Print the three likeliest classes of an image file of any size."""
    # The network knows 32x32 alone, so the central square is made as small.
    small = ImageOps.fit(read_image(photo), (32, 32), Image.BOX)
    data = ImageDataset(pil_to_tensor(small)[None], [0])  # any label
    print(f"{photo}:")
    for share, label in zip(*predict(model, data, device)[0].softmax(0).topk(3)):
        print(f"{share:7.2%}  {CLASSES[label]}")


# Reading a checkpoint: a dict of numbers, strings and tensors with the lecture's keys
# `epoch` (from 0), `model_state_dict`, `optimizer_state_dict` and `loss`; train.py adds
# `settings`, `history` and what a resume needs.


def read_file(path: Path) -> dict:
    """What `torch.save` wrote, on the CPU; no code in it runs."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:  # torch.load looks at no checksum
            if archive.testzip():
                raise ValueError("its checksums are wrong or missing")
    elif tarfile.is_tarfile(path):  # it may run code up to torch 2.5: CVE-2025-32434
        raise ValueError("torch.save has not made it")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(path: Path) -> dict:
    """The checkpoint `path`, checked but for its weights, or a one-line error.

    `history` has the numbers of each epoch, and is empty in others' than train.py's.
    """
    with usable(path, TRAIN_ANEW):
        if not path.exists():
            fail(f"there is no {path.absolute()}: train first, or name another file")
        found = read_file(path)
        return {
            **found,
            "epoch": int(found["epoch"]),
            "settings": {**LECTURE, **found.get("settings", {})},
            "history": found["history"] if "image_losses" in found else [],
        }


def check_settings(path: Path, checkpoint: dict, wanted: dict):
    """Refuse, by name, a checkpoint of another network, other images or options."""
    for name, value in wanted.items():
        if (was := checkpoint["settings"].get(name)) != value:
            same = "give the same options, --data too, or name another file"
            fail(f"{path} has {name} {was}, not {value}: {same}")


def load_weights(model: torch.nn.Module, weights: dict):
    """Put `weights` into `model`; they must fit and be finite, or it raises."""
    model.load_state_dict(weights)
    if not all((x < torch.inf).all() for x in model.state_dict().values()):
        raise ValueError("its weights are not all finite numbers")  # -inf: a mask's


def make_cnn(width=None) -> torch.nn.Module:
    """The network of model.py; one of your own need not have a width."""
    if width is None:
        return CNN()
    if "width" not in inspect.signature(CNN).parameters:
        fail(f"model.py's CNN has no width ({width}): leave it out, or change it back")
    return CNN(width=width)


def load_cnn(path: Path, **kind) -> tuple[torch.nn.Module, dict]:
    """The network of a checkpoint of ours or of the lecture's, and the checkpoint.

    `kind`: synthetic and holdout, as it must have been trained.
    """
    checkpoint = load_checkpoint(path)
    check_settings(path, checkpoint, {"model": "CNN", **kind})
    model = make_cnn(checkpoint["settings"].get("width"))
    with usable(path, CHANGED):
        load_weights(model, checkpoint["model_state_dict"])
    return model, checkpoint


def main():
    parser = command_line(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--mistakes", metavar="FILE", help="draw the most confident mistakes")
    more, beside = ("FILE", "CHECKPOINT"), "and of other checkpoints (needs matplotlib)"
    add("--curves", nargs="+", metavar=more, help=f"draw the history, {beside}")
    add("--image", metavar="FILE", help="name the likeliest classes of this photo")
    args = parser.parse_args()
    path = args.checkpoint or CHECKPOINTS[args.synthetic]
    kind = {"synthetic": args.synthetic, "holdout": args.holdout}
    model, checkpoint = load_cnn(path, **kind)
    if args.image is not None:
        classify_photo(model, args.image, args.device)
        return 0
    if args.curves:
        file, *others = args.curves
        histories = {x: load_checkpoint(Path(x))["history"] for x in others}
        draw_curves({str(path): checkpoint["history"], **histories}, file)
    _, test_data = cifar_dataset(args.data, splits=["test"], **kind)
    logits = predict(model, test_data, args.device)
    right = report(logits, test_data.targets)
    if args.mistakes is not None:
        draw_mistakes(logits, test_data, args.mistakes)
    done, epochs = checkpoint["epoch"] + 1, checkpoint["settings"].get("epochs")
    if isinstance(epochs, int) and done < epochs:
        print(f"{path} holds {done} of {epochs} epochs: train.py --resume goes on")
    images = "synthetic" if args.synthetic else "held-out" if args.holdout else "test"
    verdict = "PASS" if right >= GOAL else "FAIL"
    share = f"{right:.2%} of {len(test_data):,} {images} images"
    print(f"{verdict}: {share} (the target is {GOAL:.0%})")
    return 0 if right >= GOAL else 1


if __name__ == "__main__":
    run(main)
