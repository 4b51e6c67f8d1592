"""What evaluation.py and checkpoints promise: right figures, and nothing unsafe."""

import errno
import os
import random
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from operator import delitem
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image

import dataset
import evaluation
import model
import train
from dataset import CLASSES, cifar_dataset

SYNTHETIC = "--synthetic"


def test_report_agrees_with_a_plain_count(call, checkpoint):
    status, out, _ = call(evaluation, SYNTHETIC)
    network, _ = evaluation.load_cnn(checkpoint)
    network.eval()
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
    passed = correct >= 550
    assert status == (0 if passed else 1)
    assert lines[-1].startswith("PASS" if passed else "FAIL")
    assert "says nothing of CIFAR-10" in lines[-1]


def test_below_the_target_it_fails_with_status_1(call, checkpoint, monkeypatch):
    monkeypatch.setattr(evaluation, "TARGET", 1.01)
    status, out, _ = call(evaluation, SYNTHETIC)
    assert status == 1
    assert out.splitlines()[-1].startswith("FAIL")
    monkeypatch.setattr(evaluation, "report", lambda *_: 1.01)
    status, out, _ = call(evaluation, SYNTHETIC)
    assert status == 0  # just reached
    assert "epochs" not in out
    saved(lambda saved: saved["settings"].update(epochs=9))(checkpoint)
    assert "synthetic.pth holds 3 of 9 epochs" in call(evaluation, SYNTHETIC)[1]


def test_a_test_set_that_is_not_whole_is_named(call, checkpoint, monkeypatch):
    saved(lambda saved: saved["settings"].update(synthetic=False))(checkpoint)
    few = cifar_dataset(synthetic=True)
    monkeypatch.setattr(evaluation, "cifar_dataset", lambda *_, **__: few)
    out = call(evaluation, "--checkpoint", "synthetic.pth")[1]
    assert "of only 1,000 images" in out.splitlines()[-1]


def test_mistakes_and_a_photo_of_any_size(call, refused, checkpoint):
    call(evaluation, SYNTHETIC, "--mistakes", "mistakes.png")
    with Image.open("mistakes.png") as sheet:
        sheet = np.asarray(sheet)
    network, _ = evaluation.load_cnn(checkpoint)
    _, test_data = cifar_dataset(synthetic=True)
    logits = evaluation.predict(network, test_data, torch.device("cpu"))
    confidence, taken_for = logits.softmax(1).max(1)
    label = test_data.labels[taken_for != test_data.labels][0]
    wrong = (test_data.labels == label) & (taken_for != label)
    worst = test_data.images[torch.where(wrong, confidence, 0).argmax()]
    top = 40 + 120 * label
    first = sheet[top : top + 96 : 3, 120:216:3]  # of its row, at a third of its size
    assert (first == worst.permute(1, 2, 0).numpy()).all()
    # A test image, ten times as large, in the middle of a black photo.
    photo = Image.new("RGB", (640, 320))
    pixels = Image.fromarray(test_data.images[7].permute(1, 2, 0).numpy())
    photo.paste(pixels.resize((320, 320), Image.Resampling.NEAREST), (160, 0))
    photo.save("square.png")
    best = zip(*logits[7].softmax(0).topk(3))
    expected = [f"{share:7.2%}  {CLASSES[label]}" for share, label in best]
    out = call(evaluation, SYNTHETIC, "--image", "square.png")[1]
    assert out.splitlines() == ["square.png:", *expected]
    for size in ((1, 1), (3, 700), (640, 480)):
        Image.new("L", size, 128).save("a photo.jpg")
        status, out, _ = call(evaluation, SYNTHETIC, "--image", "a photo.jpg")
        assert status == 0
        name, *lines = out.splitlines()
        assert (name, len(lines)) == ("a photo.jpg:", 3)
        assert all(line.split()[1] in CLASSES for line in lines)
    assert "synthetic.pth" in refused(evaluation, SYNTHETIC, "--image", "synthetic.pth")
    assert "missing" in refused(evaluation, SYNTHETIC, "--image", "missing.jpg")
    assert "add --synthetic" in refused(
        evaluation, "--image", "a photo.jpg", "--checkpoint", "synthetic.pth"
    )
    refused(evaluation, SYNTHETIC, "--mistakes", "no folder/mistakes.png")


def test_curves_are_drawn_from_the_history(call, checkpoint):
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.close("all")
    out = call(evaluation, SYNTHETIC, "--curves", "curves.png")[1]
    assert "curves.png" in out
    assert "Accuracy: " in out
    with Image.open("curves.png") as curves:
        assert curves.size == (1500, 600)
    history = torch.load(checkpoint, weights_only=True)["history"]
    for panel, key in zip(pyplot.gcf().axes, ("loss", "accuracy")):
        line = panel.lines[0]
        assert line.get_xydata().tolist() == [
            [i + 1, x[key]] for i, x in enumerate(history)
        ]
    checkpoint = torch.load("synthetic.pth", weights_only=True)
    for row in checkpoint["history"]:  # as another's train.py may keep it
        del row["accuracy"], row["size"], row["images"]
    torch.save(checkpoint, "other.pth")
    call(evaluation, SYNTHETIC, "--curves", "curves.png", "other.pth")
    names = [text.get_text() for text in pyplot.gcf().axes[1].get_legend().get_texts()]
    assert names == [" synthetic.pth", " other.pth"]


def test_curves_are_drawn_whatever_a_notebook_has_set(checkpoint):
    pytest.importorskip("matplotlib")
    name = checkpoint.rename("_学習$$.pth")
    Path("matplotlibrc").write_text("text.usetex: True")  # needs LaTeX
    script = os.path.join(os.path.dirname(evaluation.__file__), "evaluation.py")
    command = [sys.executable, script, SYNTHETIC, "--checkpoint", name]
    run = subprocess.run(
        [*command, "--curves", "curves"],
        env={**os.environ, "MPLBACKEND": "module://matplotlib_inline.backend_inline"},
        capture_output=True,
        check=False,
    )
    assert (run.returncode, run.stderr) == (0, b"")
    assert Path("curves.png").exists()
    from matplotlib import pyplot

    evaluation.draw_curves({"_\udc8a$$.pth": [{"loss": 1.0}]}, "curves.png")
    [text] = pyplot.gcf().axes[1].get_legend().get_texts()
    assert text.get_text() == r" _?\$\$.pth"


def test_what_a_drawing_lacks_is_said_before_the_evaluation(
    refused, checkpoint, monkeypatch
):
    monkeypatch.setattr(evaluation, "cifar_dataset", None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    message = refused(evaluation, SYNTHETIC, "--curves", "a.png")
    assert "pip install matplotlib" in message
    monkeypatch.setitem(sys.modules, "matplotlib", Mock())
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", Mock())
    saved(lambda saved: delitem(saved, "history"))(checkpoint)  # as the lecture's
    assert "no history" in refused(evaluation, SYNTHETIC, "--curves", "a.png")


def test_whitening_makes_the_outputs_uncorrelated():
    train_data, _ = cifar_dataset(synthetic=True)
    images = torch.stack([train_data[i][0] for i in range(500)])
    network = model.CNN()
    network.whiten(images)
    with torch.no_grad():
        outputs = network.whitening(images).transpose(0, 1).flatten(1)
    torch.testing.assert_close(outputs[:12].cov(), torch.eye(12), rtol=0, atol=0.02)
    torch.testing.assert_close(outputs[12:], -outputs[:12])
    assert not network.whitening.weight.requires_grad


def test_the_default_network_is_under_a_million_parameters():
    parameters = sum(weight.numel() for weight in model.CNN().parameters())
    assert parameters == 479_810  # the assignment allows 1,000,000


class Code:
    def __reduce__(self):
        return open, ("it ran", "w")


def saved(change):
    """A damage to a checkpoint: load it, `change` it in place, save it again."""

    def damage(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return damage


def head_bias(values):
    return saved(lambda saved: saved["model_state_dict"].update({"head.bias": values}))


DAMAGES = {
    "missing": lambda path: path.unlink(),
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-2000]),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "foreign": lambda path: path.write_text("a letter to grandmother"),
    "code": saved(lambda saved: saved.update(extra=Code())),
    "a tar": lambda path: tarfile.open(path, "w").close(),
    "a list": lambda path: torch.save([1, 2, 3], path),
    "no weights": saved(lambda saved: delitem(saved, "model_state_dict")),
    "no epoch": saved(lambda saved: delitem(saved, "epoch")),
    "a text as epoch": saved(lambda saved: saved.update(epoch="two")),
    "negative epoch": saved(
        lambda saved: saved.update(
            epoch=-1, history=[], settings={"width": 8, "synthetic": True}
        )
    ),
    "nan in history": saved(lambda s: s["history"][0].update(loss=float("nan"))),
    "a lost layer": saved(lambda s: delitem(s["model_state_dict"], "head.bias")),
    "shape": head_bias(torch.zeros(11)),
    "nan": head_bias(torch.full((10,), float("nan"))),
    "width": saved(lambda saved: saved["settings"].update(width=10**9)),
    "other model": saved(lambda saved: saved["settings"].update(model="resnet18")),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_unusable_checkpoints_are_refused_and_never_run_code(
    refused, checkpoint, tmp_path, damage
):
    damage(checkpoint)
    assert "synthetic.pth" in refused(evaluation, SYNTHETIC)
    assert not (tmp_path / "it ran").exists()


NOT_OURS = {  # what it holds, and what is said of it
    "a whole model": (lambda network, saved: network, "holds model.CNN"),
    "bare weights": (
        lambda network, saved: network.state_dict(),
        "no epoch, loss, model_state_dict, but whit",
    ),
    "other names": (lambda network, saved: {"net": {}, "acc": 1.0}, "net, acc"),
    "a list as loss": (lambda network, saved: saved | {"loss": [1.0]}, "'list'"),
    "NumPy arrays": (lambda network, saved: saved | {"x": np.ones(3)}, "numpy"),
    "NumPy's loss": (lambda network, saved: saved | {"loss": np.mean([1])}, "numpy"),
}


@pytest.mark.parametrize(("make", "said"), NOT_OURS.values(), ids=NOT_OURS.keys())
def test_what_others_save_is_refused_in_plain_words(refused, checkpoint, make, said):
    network, loaded = evaluation.load_cnn(checkpoint)
    torch.save(make(network, loaded), checkpoint)
    message = refused(evaluation, SYNTHETIC)
    assert said in message
    assert "weights_only" not in message
    assert "\x1b" not in message


def renamed(prefix):
    def rename(saved):
        weights = saved["model_state_dict"]
        saved["model_state_dict"] = {prefix + name: x for name, x in weights.items()}

    return rename


READABLE = {
    "tensors": lambda saved: saved.update(
        loss=torch.tensor(1.0), epoch=torch.tensor(2)
    ),
    "DataParallel": renamed("module."),
    "torch.compile": renamed("_orig_mod."),
    "both": renamed("_orig_mod.module."),
    "extra": lambda saved: saved.update(note="mine"),
    "Keras's history": lambda saved: saved.update(history={"loss": [2.0, 1.0]}),
    "a loss with gradient": lambda s: s.update(loss=torch.ones(1).requires_grad_()),
}


@pytest.mark.parametrize("change", READABLE.values(), ids=READABLE.keys())
def test_what_others_save_is_read_where_it_is_clear(call, checkpoint, change):
    expected = call(evaluation, SYNTHETIC)
    loaded = torch.load(checkpoint, weights_only=True)
    change(loaded)
    torch.save(loaded, checkpoint)
    assert call(evaluation, SYNTHETIC) == expected
    torch.save(loaded, checkpoint, _use_new_zipfile_serialization=False)  # before 1.6
    assert call(evaluation, SYNTHETIC) == expected


def test_a_checkpoint_without_checksums_is_read(call, checkpoint):
    expected = call(evaluation, SYNTHETIC)
    data = checkpoint.read_bytes()
    with zipfile.ZipFile(checkpoint) as archive:
        for entry in archive.infolist():  # as torch writes with compute_crc32=False
            data = data.replace(entry.CRC.to_bytes(4, "little"), bytes(4))
    checkpoint.write_bytes(data)
    with zipfile.ZipFile(checkpoint) as archive:
        assert not any(entry.CRC for entry in archive.infolist())
    assert call(evaluation, SYNTHETIC) == expected


def save_zip(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("letter.txt", "to grandmother")


SOUND = {
    "TorchScript": lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path.name),
    "a zip": save_zip,
    "safetensors": lambda path: path.write_bytes(b"\2\0\0\0\0\0\0\0{}"),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("save", SOUND.values(), ids=SOUND.keys())
def test_a_sound_file_is_not_called_damaged(refused, checkpoint, save):
    save(checkpoint)
    message = refused(evaluation, SYNTHETIC)
    size = checkpoint.stat().st_size
    assert f"torch.load finds no checkpoint in its {size:,} bytes" in message
    assert not any(word in message for word in ("changed", "altered", "cut off"))


def test_randomly_changed_bytes_are_refused_or_harmless(checkpoint, trained):
    whole, _ = evaluation.load_cnn(checkpoint)
    chance, refusals = random.Random(0), 0
    for _ in range(100):
        data = bytearray(trained)
        data[chance.randrange(len(data))] ^= 1 << chance.randrange(8)
        checkpoint.write_bytes(data)
        try:
            loaded, _ = evaluation.load_cnn(checkpoint)
        except SystemExit as stop:
            assert stop.code == 2
            refusals += 1
        else:
            for name, tensor in loaded.state_dict().items():
                assert torch.equal(tensor, whole.state_dict()[name])
    assert refusals > 50  # most bytes are weights


def test_kinds_of_images_are_not_mixed(refused, checkpoint, tmp_path):
    assert "add --synthetic" in refused(evaluation, "--checkpoint", "synthetic.pth")
    saved(lambda saved: saved["settings"].update(synthetic=False))(checkpoint)
    assert "leave out --synthetic" in refused(evaluation, SYNTHETIC)
    saved(lambda saved: saved["settings"].update(synthetic=True))(checkpoint)
    assert "leave out --holdout" in refused(evaluation, SYNTHETIC, "--holdout")
    saved(lambda saved: saved["settings"].update(holdout=True))(checkpoint)
    assert "add --holdout" in refused(evaluation, SYNTHETIC)


def test_ctrl_c_while_saving_leaves_the_old_checkpoint(
    checkpoint, trained, monkeypatch
):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(train.os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train.save_checkpoint({"epoch": 0}, checkpoint, trained)
    assert os.listdir() == ["synthetic.pth"]
    assert checkpoint.read_bytes() == trained


@pytest.mark.parametrize(
    ("times", "reason"),  # Windows; a file that Docker has mounted by itself
    [(4, errno.EACCES), (99, errno.EACCES), (99, errno.EBUSY)],
)
def test_a_file_that_is_locked_is_tried_again(
    checkpoint, trained, monkeypatch, capsys, times, reason
):
    replace, tried = os.replace, []

    def locked(*names):
        tried.append(names)
        if len(tried) <= times:
            raise OSError(reason, "it cannot be replaced")
        replace(*names)

    monkeypatch.setattr(train.os, "replace", locked)
    waits = []
    monkeypatch.setattr(train.time, "sleep", waits.append)
    if times == 4:  # it is free after 1.5 s
        train.save_checkpoint({"epoch": 1}, checkpoint, checkpoint.read_bytes())
        assert torch.load(checkpoint, weights_only=True) == {"epoch": 1}
        assert os.listdir() == ["synthetic.pth"]
        assert sum(waits) == pytest.approx(1.5)
        return

    def held(*_, **__):
        raise PermissionError(errno.EACCES, "it is in use")

    monkeypatch.setattr(Path, "unlink", held)  # a scanner reads the new file, too
    with pytest.raises(SystemExit, match="2"):
        train.save_checkpoint({"epoch": 1}, checkpoint, checkpoint.read_bytes())
    assert "synthetic.new.pth" in capsys.readouterr().err
    assert torch.load("synthetic.new.pth", weights_only=True) == {"epoch": 1}
    assert checkpoint.read_bytes() == trained


def test_a_disk_that_cannot_say_when_it_has_written_is_used(checkpoint, monkeypatch):
    def unable(descriptor):
        raise OSError(errno.EINVAL, "Invalid argument")

    monkeypatch.setattr(train.os, "fsync", unable)
    train.save_checkpoint({"epoch": 1}, checkpoint, checkpoint.read_bytes())
    assert torch.load(checkpoint, weights_only=True) == {"epoch": 1}


def test_a_gpu_that_does_not_work_is_not_taken_unasked(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert torch.cuda.device_count() == 0  # the tests hide it, see conftest.py
    assert dataset.pick_device(None).type == "cpu"
    assert "GPU does not work" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        dataset.pick_device("cuda")
