"""What evaluation.py promises: right figures, and nothing unsafe from a checkpoint."""

import os
import pickle
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CPU, SCRIPTS, load, start
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader

import evaluation
from dataset import CLASSES, cifar_dataset
from model import CNN

SYNTHETIC = "--synthetic"


def logits_of(checkpoint):
    """What the network of a checkpoint says of the test images, and those."""
    network, _ = evaluation.load_cnn(checkpoint)
    _, test_data = cifar_dataset(synthetic=True)
    return evaluation.predict(network, test_data, CPU), test_data


def test_report_agrees_with_a_plain_count(call, checkpoint):
    status, out, _ = call(evaluation, SYNTHETIC)
    network = CNN(8).eval()
    network.load_state_dict(load(checkpoint)["model_state_dict"])
    _, test_data = cifar_dataset(synthetic=True)
    correct, loss, right_of, mistakes = 0, 0, Counter(), Counter()
    with torch.no_grad():
        for image, label in test_data:
            logits = network(image[None])[0]
            loss -= logits.log_softmax(0)[label].item() / 1000
            true, taken = CLASSES[label], CLASSES[logits.argmax()]
            correct += true == taken
            right_of[true] += true == taken
            if true != taken:
                mistakes[f"{true} taken for {taken}"] += 1
    lines = out.splitlines()
    assert lines[0] == f"Accuracy: {correct / 1000:.2%} ({correct}/1000)"
    assert float(lines[1].split()[1]) == pytest.approx(loss, abs=2e-4)
    for name, line in zip(CLASSES, lines[3:13]):  # of 100 images each
        bar = "#" * round(0.4 * right_of[name])
        assert line.split() == [name, f"{right_of[name]}.00%", *bar.split()]
    worst = [line.strip().split(" x ") for line in lines[14:19]]
    assert [int(times) for times, _ in worst] == sorted(mistakes.values())[:-6:-1]
    assert all(mistakes[mistake] == int(times) for times, mistake in worst)
    assert f": {correct / 1000:.2%} of 1,000 synthetic images (" in lines[-1]
    assert status == (0 if correct >= 550 else 1)


def test_the_status_is_the_verdict(call, checkpoint, monkeypatch):
    for accuracy, status, word in ((0.55, 0, "PASS"), (0.5499, 1, "FAIL")):
        monkeypatch.setattr(evaluation, "report", lambda *_, x=accuracy: x)
        found, out, _ = call(evaluation, SYNTHETIC)
        assert (found, out[:4], "epochs" in out) == (status, word, False)
    change(checkpoint, lambda saved: saved["settings"].update(epochs=9))
    assert "synthetic.pth holds 3 of 9 epochs" in call(evaluation, SYNTHETIC)[1]


def test_a_grader_in_another_folder_is_told_what_was_looked_for(refused, tmp_path):
    message = refused(evaluation, SYNTHETIC)
    assert str(tmp_path / "synthetic.pth") in message and "name another" in message


# Drawings and photos.
def test_mistakes_are_drawn_the_most_confident_first(call, refused, checkpoint):
    call(evaluation, SYNTHETIC, "--mistakes", "mistakes.png")
    with Image.open("mistakes.png") as sheet:
        sheet = np.asarray(sheet)
    logits, test_data = logits_of(checkpoint)
    targets = torch.tensor(test_data.targets)
    confidence, taken_for = logits.softmax(1).max(1)
    label = targets[taken_for != targets][0]
    wrong = (targets == label) & (taken_for != label)
    worst = test_data.images[torch.where(wrong, confidence, 0).argmax()]
    top = 40 + 120 * label
    first = sheet[top : top + 96 : 3, 120:216:3]  # of its row, at a third of its size
    assert (first == worst.permute(1, 2, 0).numpy()).all()
    refused(evaluation, SYNTHETIC, "--mistakes", "no folder/mistakes.png")


def test_a_photo_of_any_size_is_classified(call, refused, checkpoint):
    logits, test_data = logits_of(checkpoint)
    photo = Image.new("RGB", (640, 320))  # ten times a test image in its middle
    pixels = Image.fromarray(test_data.images[7].permute(1, 2, 0).numpy())
    photo.paste(pixels.resize((320, 320), Image.Resampling.NEAREST), (160, 0))
    photo.save("square.png")
    best = zip(*logits[7].softmax(0).topk(3))
    expected = [f"{share:7.2%}  {CLASSES[label]}" for share, label in best]
    out = call(evaluation, SYNTHETIC, "--image", "square.png")[1]
    assert out.splitlines() == ["square.png:", *expected]
    for size in ((1, 1), (3, 700)):
        Image.new("L", size, 128).save("a photo.jpg")
        assert call(evaluation, SYNTHETIC, "--image", "a photo.jpg")[0] == 0
    assert "missing.jpg" in refused(evaluation, SYNTHETIC, "--image", "missing.jpg")


def test_curves_are_drawn_from_the_history(call, checkpoint):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close("all")
    other = load(checkpoint)
    for row in other["history"]:
        row["held_out"] = row.pop("loss") / 10  # as with --holdout, and without a loss
    torch.save(other, "other.pth")
    assert "curves.png: " in call(evaluation, SYNTHETIC, "--curves", "curves")[1]
    call(evaluation, SYNTHETIC, "--curves", "curves.png", "other.pth")
    with Image.open("curves.png") as curves:
        assert curves.size == (1500, 600)
    left, right = pyplot.gcf().axes
    assert (len(left.lines), len(right.lines)) == (1, 3)
    history = load(checkpoint)["history"]
    drawn = [("loss", history, left.lines[0]), ("accuracy", history, right.lines[0])]
    drawn += [("accuracy", other["history"], right.lines[1])]
    drawn += [("held_out", other["history"], right.lines[2])]
    for key, rows, line in drawn:
        style = "--" if key == "held_out" else "-"
        points = [[i + 1, row[key]] for i, row in enumerate(rows)]
        assert (line.get_xydata().tolist(), line.get_linestyle()) == (points, style)
    names = [text.get_text().strip() for text in right.get_legend().get_texts()]
    assert names == ["synthetic.pth", "other.pth", "other.pth, held out"]


def test_curves_are_drawn_whatever_a_notebook_has_set(checkpoint):
    pytest.importorskip("matplotlib")
    name = checkpoint.rename("_学習$$.pth").name
    Path("matplotlibrc").write_text("text.usetex: True")  # needs LaTeX
    options = [SYNTHETIC, "--checkpoint", name, "--curves", "curves.png"]
    env = {**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    env["PYTHONWARNINGS"] = ""  # matplotlib's font lacks the glyphs
    with start(SCRIPTS / "evaluation.py", *options, env=env) as run:
        assert run.communicate()[1] == ""
    assert Path("curves.png").exists()


def test_what_a_drawing_lacks_is_said_at_once(refused, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluation, "cifar_dataset", None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib", None)
        patch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
        message = refused(evaluation, SYNTHETIC, "--curves", "a.png")
    assert "pip install matplotlib" in message
    pytest.importorskip("matplotlib")
    change(checkpoint, lambda saved: saved.pop("image_losses"))  # as the lecture's
    assert "no history" in refused(evaluation, SYNTHETIC, "--curves", "a.png")


# Checkpoints.
def change(path, how=lambda saved: None, **form):
    """Load a checkpoint, change it in place, save it again."""
    how(saved := load(path))
    torch.save(saved, path, **form)


class Code:
    def __reduce__(self):
        return open, ("it ran", "w")


def flip_a_bit_of_a_weight(path):
    content = bytearray(path.read_bytes())
    weight = load(path)["model_state_dict"]["linear.weight"]
    content[content.index(weight.numpy().tobytes())] ^= 1
    path.write_bytes(content)


def tar_with_code(path):  # torch before 1.0 wrote tars
    Path("storages").write_bytes(pickle.dumps(Code()))
    with tarfile.open(path, "w") as tar:
        tar.add("storages")


def changed(how):
    return lambda path: change(path, how)


def weight(name, x):
    return changed(lambda saved: saved["model_state_dict"].update({name: x}))


DAMAGES = {
    "cut off": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "altered": flip_a_bit_of_a_weight,
    "a web page": lambda path: path.write_text("<!DOCTYPE html>"),
    "code": changed(lambda saved: saved.update(extra=Code())),
    "code in a tar": tar_with_code,
    "a whole model": lambda path: torch.save(CNN(8), path),
    "bare weights": lambda path: torch.save(CNN(8).state_dict(), path),
    "NumPy's": changed(lambda saved: saved.update(loss=np.mean([1]))),
    "not finite": weight("linear.bias", torch.full((10,), float("nan"))),
    "a variance of inf": weight("blocks.0.halve.2.running_var", torch.ones(8) / 0),
    "a wrong shape": weight("linear.bias", torch.ones(9)),
    "another model's": changed(lambda x: x["settings"].update(model="ResNet18")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_bad_checkpoints_are_refused_and_run_no_code(refused, checkpoint, damage):
    DAMAGES[damage](checkpoint)
    assert "error: synthetic.pth " in refused(evaluation, SYNTHETIC)
    assert not Path("it ran").exists()


READABLE = {
    "tensors": lambda s: s.update(loss=torch.ones(1), epoch=torch.tensor(2)),
    "more than ours": lambda saved: saved.update(history={"loss": [2.0]}, note="mine"),
    "no epochs": lambda saved: saved["settings"].update(epochs=None),
    "epochs in a text": lambda saved: saved["settings"].update(epochs="12"),
}


@pytest.mark.parametrize("kind", READABLE)
def test_what_others_save_is_read_where_it_is_clear(call, checkpoint, kind):
    expected = call(evaluation, SYNTHETIC)
    assert expected[0] in (0, 1)
    change(checkpoint, READABLE[kind])
    assert call(evaluation, SYNTHETIC) == expected
    change(checkpoint, _use_new_zipfile_serialization=False)  # as torch before 1.6
    assert call(evaluation, SYNTHETIC) == expected


def test_kinds_of_images_are_not_mixed(refused, checkpoint):
    own = ["--checkpoint", "synthetic.pth"]
    assert "has synthetic True, not False" in refused(evaluation, *own)
    assert "has holdout False" in refused(evaluation, SYNTHETIC, "--holdout")
    change(checkpoint, lambda s: s["settings"].update(synthetic=False, holdout=True))
    assert "has holdout True, not False" in refused(evaluation, *own)


# The lecture's own loops, as printed.
def the_lecture_s_training(train_data, path):
    train_loader = DataLoader(train_data, batch_size=64, shuffle=True)
    model = CNN()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for epoch in range(3):
        train_loss = 0
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            outputs = model(images)
            loss = criterion(outputs, labels)
            train_loss += loss.item()
            loss.backward()
            optimizer.step()
        checkpoint = {
            "epoch": epoch,
            "model_state_dict": model.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": train_loss / len(train_loader),
        }
        torch.save(checkpoint, path)


def the_lecture_s_evaluation(test_data, path, model) -> int:
    checkpoint = torch.load(path)
    model.load_state_dict(checkpoint["model_state_dict"])
    model.eval()
    correct = 0
    with torch.no_grad():
        for images, labels in DataLoader(test_data, batch_size=64, shuffle=False):
            correct += (model(images).max(1)[1] == labels).sum().item()
    return correct


@pytest.mark.filterwarnings("ignore:.*weights_only")  # torch 2.4 and 2.5
def test_the_lecture_s_checkpoints_go_both_ways(call, checkpoint, monkeypatch):
    train_data, test_data = cifar_dataset(synthetic=True)
    correct = the_lecture_s_evaluation(test_data, checkpoint, CNN(8))
    assert f"({correct}/1000)" in call(evaluation, SYNTHETIC)[1]
    torch.manual_seed(0)
    the_lecture_s_training(train_data, "cifar_cnn.pth")
    correct = the_lecture_s_evaluation(test_data, "cifar_cnn.pth", CNN())
    assert correct > 150  # chance is 100 +- 10
    # It says nothing of its images, so they count as real ones; here they are not.
    monkeypatch.setattr(evaluation, "cifar_dataset", lambda *_, **__: (None, test_data))
    assert f"({correct}/1000)" in call(evaluation)[1]
