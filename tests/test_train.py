"""What train.py promises: it learns, resumes to the bit and never loses work."""

import errno
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import SCRIPTS, SMALL, load, same_bits, start
from torch import nn

import dataset
import evaluation
import train
from model import CNN

ONCE = [*SMALL, "--epochs", "1"]


def start_train(*options, **how):  # batches for all 5,000 images
    options = [*SMALL, "--batch-size", "250", *options]
    return start(SCRIPTS / "train.py", *options, **how)


def test_one_line_an_epoch_and_the_same_bits_again(call, checkpoint):
    _, out, err = call(train, *SMALL, "--checkpoint", "again.pth")
    assert err == ""  # no bar in a pipe
    first, *epochs, last = out.splitlines()
    assert " parameters, 3 epochs on cpu, 1 threads, " in first
    assert [line[:17] for line in epochs] == [f"Epoch: {i}/3, Loss:" for i in (1, 2, 3)]
    assert all(", Accuracy: " in x and ", Rate: " in x and len(x) < 80 for x in epochs)
    assert last.endswith(" evaluation.py, same --checkpoint, same --synthetic")
    assert same_bits(checkpoint, "again.pth")
    call(train, *SMALL, "--checkpoint", "other.pth", "--seed", "2")
    one, other = (load(x)["model_state_dict"] for x in (checkpoint, "other.pth"))
    assert not torch.equal(one["linear.weight"], other["linear.weight"])
    filters, negatives = one["whitening.weight"].chunk(2)
    assert torch.equal(filters, -negatives)  # it was whitened


def test_on_a_terminal_a_bar_erases_itself(call, few_images, monkeypatch):
    monkeypatch.setattr(train, "on_terminal", lambda: True)
    _, out, err = call(train, *ONCE)
    shown = ""  # in the end
    for over in err.split("\r"):
        shown = over + shown[len(over) :]
    assert "[#" in err and "\n" not in err and not shown.strip()
    assert "\nEpoch: 1/1, " in out


def test_it_trains_without_stderr(call, few_images, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Windows' pythonw
    monkeypatch.setattr(sys, "__stderr__", None)
    assert "Epoch: 1/1" in call(train, *ONCE)[1]


def test_trying_never_touches_what_is_handed_in(call, few_images):
    Path("cifar_cnn.pth").write_bytes(b"mine")
    assert "synthetic.pth is finished" in call(train, *ONCE)[1]
    assert call(evaluation, "--synthetic")[1].startswith("Accuracy: ")
    assert Path("cifar_cnn.pth").read_bytes() == b"mine"
    assert sorted(os.listdir()) == ["cifar_cnn.pth", "synthetic.pth"]


def test_small_images_come_first_and_whole_epochs_last():
    for epochs in range(1, 40):
        counts, sizes = zip(*train.plan_epochs(epochs, 2, 1000))
        ends = len(counts), counts[0], counts[-1], sizes[-1]
        assert ends == (epochs, 1000, 1000, 32)
        assert list(sizes) == sorted(sizes)
        assert {*counts} <= {1000, round((train.HARD + (1 - train.HARD) / 2) * 1000)}


@pytest.mark.parametrize(("default", "jitter"), [(3, 0), (2, 0.14)])
def test_long_runs_jitter(call, few_images, monkeypatch, default, jitter):
    """Those that are longer than the default."""
    monkeypatch.setattr(train, "EPOCHS", default)
    watched = Mock(wraps=train.train_epoch)
    monkeypatch.setattr(train, "train_epoch", watched)
    call(train, *SMALL)  # three epochs
    assert {x.args[1].dataset.jitter for x in watched.call_args_list} == {jitter}


def test_images_that_no_epoch_has_seen_count_as_the_hardest():
    losses = torch.arange(1000.0)
    losses[:80] = torch.inf  # as `fit` begins; the first epoch dropped them
    chosen = train.choose_images(losses, 500)
    assert {*range(80), *range(780, 1000)} <= {*chosen} and len({*chosen}) == 500


def test_the_network_sees_what_the_readme_says(call, monkeypatch):
    """Watched at its door: which images come in, in which size, mirrored or not."""
    count = 1000
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    images[:, 0] = torch.arange(count).remainder(200).view(-1, 1, 1)  # its number,
    images[:, 1] = torch.arange(count).div(200).floor().view(-1, 1, 1)  # in two digits
    images[:, 2, :, :16] = 200  # the left half is blue
    labels = torch.arange(count) % 10
    data = dataset.ImageDataset(images, labels, augment=True)
    monkeypatch.setattr(train, "cifar_dataset", lambda *_, **__: (data, None))
    sizes, numbers, mirrored, losses = [], [], [], []

    def watch(network, inputs, logits):
        if not network.training:
            return
        red, green, blue = (inputs[0] * dataset.STD + dataset.MEAN).unbind(1)
        number = (red.mean((1, 2)) + 200 * green.mean((1, 2)).round()).round().long()
        sizes.append(red.shape[-1])
        numbers.append(number)
        mirrored.append(blue[:, :, -1].mean(1) > blue[:, :, 0].mean(1))
        losses.append(train.CRITERION(logits.float(), labels[number]).detach())

    class Watched(CNN):
        def __init__(self, width):
            super().__init__(width)
            self.register_forward_hook(watch)

    monkeypatch.setattr(evaluation, "CNN", Watched)
    call(train, *SMALL)
    plan = train.plan_epochs(3, 50, count)
    assert sizes == [size for seen, size in plan for _ in range(seen // 50)]
    steps = [seen // 50 for seen, _ in plan]
    numbers, mirrored, losses = (
        [torch.cat(x) for x in (y[: steps[0]], y[steps[0] : -steps[2]], y[-steps[2] :])]
        for y in (numbers, mirrored, losses)
    )
    assert [len(seen.unique()) for seen in numbers] == [50 * x for x in steps]
    assert steps[1] < steps[0]
    first_loss = torch.zeros(count).index_put_((numbers[0],), losses[0])
    hardest = set(first_loss.topk(int(train.HARD * count)).indices.tolist())
    left_out = plan[1][0] % 50  # an incomplete batch
    assert len(hardest - {*numbers[1].tolist()}) <= left_out
    # In turn mirrored and not.
    sides = [torch.zeros(count, dtype=torch.bool) for _ in plan]
    for side, number, flags in zip(sides, numbers, mirrored):
        side[number] = flags
    assert 400 < sides[0].sum() < 600
    assert torch.equal(sides[1][numbers[1]], ~sides[0][numbers[1]])
    assert torch.equal(sides[2], sides[0])


KEPT = {"sgd": set(), "momentum": {"momentum_buffer"}, "adagrad": {"sum"}}
KEPT |= {"rmsprop": {"square_avg"}, "adam": {"exp_avg", "exp_avg_sq"}}  # by each alone


@pytest.mark.parametrize("name", KEPT)
def test_each_optimizer_learns_and_resumes_to_the_bit(call, stopped, few_images, name):
    options = [*SMALL, "--optimizer", name, "--checkpoint"]
    call(train, *options, "whole.pth")
    checkpoint = load("whole.pth")
    assert checkpoint["history"][-1]["accuracy"] > 0.15  # chance is 0.1
    states = checkpoint["optimizer_state_dict"]["state"].values()
    # torch 2.2 keeps a momentum_buffer of None where there is no momentum.
    keys = {key for state in states for key, x in state.items() if x is not None}
    assert keys - {"step"} == KEPT[name]
    stopped(train, *options, "cut.pth")
    assert "1 of 3 epochs are done" in call(train, *options, "cut.pth", "--resume")[1]
    assert same_bits("cut.pth", "whole.pth")


def test_what_is_not_finite_stops_the_run(refused, checkpoint, trained, monkeypatch):
    assert "--lr" in refused(train, *SMALL, "--lr", "1000")
    whole_epoch = train.train_epoch

    def train_epoch(network, *args):  # whose last step spoils it
        row = whole_epoch(network, *args)
        network.linear.bias.data[3] = float("inf")
        return row

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    assert "--lr" in refused(train, *SMALL)
    assert (checkpoint.read_bytes(), os.listdir()) == (trained, ["synthetic.pth"])


def test_held_out_images(call, refused, few_images, monkeypatch):
    epochs = call(train, *SMALL, "--holdout")[1].splitlines()[1:4]
    history = load("synthetic.pth")["history"]
    for line, row in zip(epochs, history):
        assert f", held out {row['held_out']:.1%}, " in line
    accuracy = call(evaluation, "--synthetic", "--holdout")[1].splitlines()[0]
    assert accuracy.endswith(f" ({round(100 * history[-1]['held_out'])}/100)")
    assert "has holdout True, not False" in refused(train, *SMALL, "--resume")
    x, labels = dataset.synthetic_images()["train"]
    other = {"train": (torch.cat([x[:-1], 255 - x[-1:]]), labels)}  # a held-out one
    monkeypatch.setattr(dataset, "synthetic_images", lambda: other)
    assert "of the images" in refused(train, *SMALL, "--resume", "--holdout")


def test_the_longest_line_of_an_epoch_has_79_columns(capsys):
    row = {"loss": 1.2345, "accuracy": 0.999, "learning_rate": 0.0012, "seconds": 300}
    for more in ({}, {"held_out": 0.999}):
        train.print_epoch([row | more] * 11, [(1, 32)] * 26)
        assert len(capsys.readouterr().out) <= 79 + 1


def test_killed_and_resumed_ends_with_the_same_bits(call):
    options = [*SMALL, "--batch-size", "250"]
    call(train, *options)
    with start_train("--checkpoint", "killed.pth") as run:
        assert any(line.startswith("Epoch: 1/3") for line in run.stdout)
        time.sleep(random.Random(1).uniform(0, 1))  # while it trains, or writes
        run.kill()
    assert 1 <= len(load("killed.pth")["history"]) <= 3
    out = call(train, *options, "--checkpoint", "killed.pth", "--resume")[1]
    assert "of 3 epochs are done" in out
    assert same_bits("synthetic.pth", "killed.pth")


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_says_how_to_go_on():
    # A background job of a shell is deaf to SIGINT, and so would be what it starts.
    hears = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    with start_train(**hears) as run:
        assert any(line.startswith("Epoch: 1/3") for line in run.stdout)
        run.send_signal(signal.SIGINT)
        _, err = run.communicate()
    assert (run.returncode, "--resume" in err, "Traceback" in err) == (130, True, False)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
def test_a_closed_pipe_ends_without_a_traceback():
    with start_train() as run:
        run.stdout.readline()
        run.stdout.close()  # as `| head -1` does
        assert (run.wait(), run.stderr.read()) == (141, "")


def test_a_finished_run_refuses_other_options(call, refused, checkpoint, trained):
    out = call(train, *SMALL, "--resume")[1]
    assert "3 of 3 epochs are done" in out and "Epoch: " not in out
    others = {"width": 5, "epochs": 4, "batch_size": 125, "optimizer": "sgd", "seed": 2}
    for name, value in (others | {"lr": 0.123}).items():
        option = f"--{name.replace('_', '-')}"
        message = refused(train, *SMALL, "--resume", option, value)
        assert re.search(f"has {name} .*, not {value}: ", message)
    assert checkpoint.read_bytes() == trained


OTHERS = {
    "one less": lambda images, labels: (images[:-1], labels[:-1]),
    "an exchange": lambda x, labels: (torch.cat([x[:3], x[[4, 3]], x[5:]]), labels),
    "other labels": lambda images, labels: (images, (labels + 1) % 10),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_images_are_refused(refused, checkpoint, monkeypatch, kind):
    images = dataset.synthetic_images()
    images["train"] = OTHERS[kind](*images["train"])
    monkeypatch.setattr(dataset, "synthetic_images", lambda: dict(images))
    message = refused(train, *SMALL, "--resume")
    assert "images" in message and "--data" in message


def test_a_checkpoint_holds_cpu_tensors_alone(call, few_images, monkeypatch):
    """Wherever it was trained: all that is saved went through `on_cpu`."""
    elsewhere = Mock(spec=torch.Tensor)
    moved = train.on_cpu({"state": {0: {"sum": elsewhere, "step": 3}}})
    assert moved == {"state": {0: {"sum": elsewhere.cpu(), "step": 3}}}
    saved = {}
    monkeypatch.setattr(train, "on_cpu", lambda state: ["moved"])
    monkeypatch.setattr(train, "save_checkpoint", lambda x, *_: saved.update(x))
    call(train, *ONCE)
    assert saved["model_state_dict"] == saved["optimizer_state_dict"] == ["moved"]
    assert saved["image_losses"].device.type == "cpu"


def test_a_new_run_keeps_what_it_replaces(call, checkpoint, trained):
    assert "synthetic.old.pth" in call(train, *ONCE)[1]
    assert Path("synthetic.old.pth").read_bytes() == trained
    one_epoch = checkpoint.read_bytes()
    call(train, *ONCE, "--seed", "2")  # nor does a second one lose it
    assert Path("synthetic.old.pth").read_bytes() == trained
    assert Path("synthetic.old2.pth").read_bytes() == one_epoch


def test_two_runs_on_one_name_lose_no_epoch(call, refused, few_images, monkeypatch):
    """While this one trains its second epoch, another one writes."""
    call(train, *SMALL, "--seed", "2", "--checkpoint", "whole.pth")
    another = Mock(side_effect=lambda *_: shutil.copy("whole.pth", "synthetic.pth"))
    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", another)
        message = refused(train, *SMALL, "--seed", "2")
    assert "another run" in message
    assert "synthetic.new.pth: name that file and add --resume" in message
    assert Path("synthetic.pth").read_bytes() == Path("whole.pth").read_bytes()
    go_on = ["--seed", "2", "--resume", "--checkpoint", "synthetic.new.pth"]
    assert "2 of 3 epochs are done" in call(train, *SMALL, *go_on)[1]
    assert same_bits("synthetic.new.pth", "whole.pth")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such links and modes")
def test_a_link_is_written_through_and_the_mode_stays(call, few_images):
    Path("drive").mkdir()  # it stays when the machine goes
    Path("synthetic.pth").symlink_to("drive/mine.pth")
    call(train, *ONCE)
    for mode, kept in ((0o600, "mine.old.pth"), (0o664, "mine.old2.pth")):
        Path("drive/mine.pth").chmod(mode)
        call(train, *ONCE)
        assert Path("synthetic.pth").is_symlink()
        assert Path("drive", kept).exists()
        assert Path("drive/mine.pth").stat().st_mode & 0o777 == mode


FAILURES = [OSError(x, os.strerror(x)) for x in (errno.ENOSPC, errno.EDQUOT)]


@pytest.mark.parametrize("failure", [*FAILURES, KeyboardInterrupt()], ids=repr)
def test_what_stops_a_save_leaves_the_old_file(call, checkpoint, monkeypatch, failure):
    before = checkpoint.read_bytes()
    monkeypatch.setattr(train, "check_writable", lambda *_: None)
    monkeypatch.setattr(train.os, "fsync", Mock(side_effect=failure))
    status, _, err = call(train, *SMALL)
    assert (status, err.strip().count("\n")) == (2 if failure.args else 130, 0)
    assert "--resume" in err and getattr(failure, "strerror", "") in err
    assert (checkpoint.read_bytes(), os.listdir()) == (before, ["synthetic.pth"])


def lock(monkeypatch, reason, times):
    """So often synthetic.pth cannot be replaced."""
    failures, replace = [OSError(reason, "locked")] * times, os.replace

    def try_it(part, path):
        if Path(path).name == "synthetic.pth" and failures:
            raise failures.pop()
        replace(part, path)

    monkeypatch.setattr(train.os, "replace", try_it)
    monkeypatch.setattr(train.time, "sleep", Mock())


def test_an_odd_drive_and_a_virus_scanner_do_no_harm(call, few_images, monkeypatch):
    unable = OSError(errno.EINVAL, "Invalid argument")  # to say what is written
    monkeypatch.setattr(train.os, "fsync", Mock(side_effect=unable))
    lock(monkeypatch, errno.EACCES, 3)  # as on Windows, for a moment
    assert call(train, *ONCE)[0] == 0
    assert os.listdir() == ["synthetic.pth"]


@pytest.mark.parametrize("reason", [errno.EACCES, errno.EBUSY])  # EBUSY: Docker's
def test_what_stays_locked_costs_no_epoch(refused, few_images, monkeypatch, reason):
    lock(monkeypatch, reason, 99)
    assert "synthetic.new.pth" in refused(train, *ONCE)
    assert os.listdir() == ["synthetic.new.pth"]
    assert load("synthetic.new.pth")["epoch"] == 0


def test_what_cannot_be_written_is_named_before_training(refused, monkeypatch):
    monkeypatch.setattr(train, "cifar_dataset", None)
    for failure in (PermissionError(13, "no"), OSError(errno.ENOSPC, "no")):
        monkeypatch.setattr(train, "write_whole", Mock(side_effect=failure))
        assert "error: synthetic.pth cannot be used (no)" in refused(train, *SMALL)


def test_only_a_checkpoint_is_replaced(refused):
    Path("train.py").write_text("print()")  # whoever mixes up two names
    assert "train.py cannot" in refused(train, *SMALL, "--checkpoint", "train.py")
    assert (Path("train.py").read_text(), os.listdir()) == ("print()", ["train.py"])


MISTAKES = [
    *("--epochs 0", "--epochs many", "--lr nan", "--lr 0", "--lr inf", "--seed -1"),
    *("--batch-size 1", "--width -3", "--optimizer newton", "--unknown"),
    "--batch-size 950",  # the second epoch sees fewer images
    *("--device abacus", "--device meta", "--resume --checkpoint missing.pth"),
    *("--checkpoint .", "--checkpoint no_folder/a.pth", "--checkpoint ~nobody/a.pth"),
    *("--checkpoint synthetic.pth/a.pth", "--checkpoint 学習\u3000結果/a.pth"),
]


@pytest.mark.parametrize("options", MISTAKES)
def test_mistakes_end_in_one_line(refused, checkpoint, trained, options):
    message = refused(train, *SMALL, *options.split(" "))
    assert any(word in message for word in options.split(" "))
    assert (checkpoint.read_bytes(), os.listdir()) == (trained, ["synthetic.pth"])


def test_too_little_memory_is_named(call, refused, few_images, monkeypatch):
    for full in (lambda *_: torch.zeros(10**15), Mock(side_effect=MemoryError)):
        monkeypatch.setattr(train, "fit", full)
        assert "memory" in refused(train, *SMALL).lower()
    bug = Mock(side_effect=RuntimeError("refer to a single memory location"))
    monkeypatch.setattr(train, "fit", bug)
    status, _, err = call(train, *SMALL)
    assert status == 2 and "Traceback" in err and "single memory location" in err


def lenet():  # no width, no batch norm, 32 px alone; and no class
    first = nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(4), nn.Flatten()
    return nn.Sequential(*first, nn.LazyLinear(84), nn.Dropout(), nn.Linear(84, 10))


def test_a_network_of_one_s_own(call, refused, stopped, few_images, monkeypatch):
    monkeypatch.setattr(evaluation, "CNN", lenet)
    own = ["--synthetic", "--batch-size", "50", "--epochs", "3", "--lr", "0.03"]
    call(train, *own, "--checkpoint", "whole.pth")
    stopped(train, *own, "--checkpoint", "cut.pth")
    call(train, *own, "--checkpoint", "cut.pth", "--resume")
    assert same_bits("cut.pth", "whole.pth")
    out = call(evaluation, "--synthetic", "--checkpoint", "whole.pth")[1]
    model = lenet()
    model.load_state_dict(load("whole.pth")["model_state_dict"])
    _, test_data = dataset.cifar_dataset(synthetic=True)
    right = evaluation.accuracy(model, test_data, torch.device("cpu"))
    assert right > 0.15 and out.startswith(f"Accuracy: {right:.2%} ")
    assert "has no width (64)" in refused(train, *own, "--width", "64")
    monkeypatch.setattr(evaluation, "CNN", CNN)  # another than was trained
    message = refused(evaluation, "--synthetic", "--checkpoint", "whole.pth")
    assert "change model.py back" in message
    monkeypatch.setattr(evaluation, "CNN", lambda: nn.Flatten())
    assert "makes (2, 3072) of 2 images, not (2, 10)" in refused(train, *own)


@pytest.mark.parametrize("script", [train, evaluation])
def test_a_bug_in_model_py_has_its_traceback(call, checkpoint, monkeypatch, script):
    monkeypatch.setattr(evaluation, "CNN", lambda width: nn.Linear(1, 2, depth=3))
    options = SMALL if script is train else ["--synthetic"]
    status, _, err = call(script, *options)
    assert status == 2 and "Traceback" in err and "argument 'depth'" in err
    monkeypatch.setattr(dataset, "find_images", lambda *_: slip)  # noqa: F821
    status, _, err = call(train, "--checkpoint", "a.pth")
    assert status == 2 and "Traceback" in err and "'slip' is not defined" in err


def test_dev_mode_shows_what_is_behind_a_line():
    Path("a.pth").write_text("no checkpoint")
    command = [sys.executable, "-X", "dev", SCRIPTS / "evaluation.py"]
    for options in ([*command, "--checkpoint", "a.pth"], command):
        run = subprocess.run(options, check=False, capture_output=True, text=True)
        *lines, last = run.stderr.splitlines()
        assert (run.returncode, last[:7]) == (2, "error: ")
        assert any("Traceback" in line for line in lines) == ("a.pth" in options)
