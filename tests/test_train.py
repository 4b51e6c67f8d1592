"""What train.py promises: it learns, resumes to the bit and never loses work."""

import errno
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import SMALL, all_images, same_bits
from torch import nn
from torch.utils.data import DataLoader

import dataset
import evaluation
import train
from model import CNN

SCRIPTS = Path(train.__file__).parent


def start(*options, **how):
    """train.py as a process of its own."""
    return subprocess.Popen(
        [sys.executable, SCRIPTS / "train.py", *SMALL, *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **how,
    )


def wait_for_first_epoch(run):
    assert any(line.startswith("Epoch: 1/3") for line in run.stdout)


def test_one_line_an_epoch_no_bar_in_a_pipe_and_the_same_bits_again(call, checkpoint):
    status, out, err = call(train, *SMALL, "--checkpoint", "again.pth")
    first, *epochs, _ = out.splitlines()
    assert (status, err) == (0, "")
    assert first.startswith("32,066 parameters, 3 epochs on cpu, 1 threads, ")
    assert [line[:9] for line in epochs] == ["Epoch: 1/", "Epoch: 2/", "Epoch: 3/"]
    assert all(len(line) < 80 for line in epochs)
    assert epochs[2].startswith("Epoch: 3/3, Loss: ")
    assert ", Rate: 0.12, " in epochs[0]
    assert same_bits(checkpoint, "again.pth")
    call(train, *SMALL, "--checkpoint", "other.pth", "--seed", "2")
    first, other = (
        torch.load(path, weights_only=True)["model_state_dict"]
        for path in (checkpoint, "other.pth")
    )
    assert not torch.equal(first["head.weight"], other["head.weight"])
    CNN(width=8).load_state_dict(first)  # as the lecture's evaluation.py does
    filters, negatives = first["whitening.weight"].chunk(2)
    assert torch.equal(filters, -negatives)  # it was whitened


def test_killed_and_resumed_ends_with_the_same_bits(call, monkeypatch):
    monkeypatch.setattr(dataset, "synthetic_images", all_images)  # as the process has
    call(train, *SMALL)
    run = start("--checkpoint", "killed.pth")
    wait_for_first_epoch(run)
    delay = random.uniform(0, 1)  # s: anywhere, training or writing
    print(f"killed {delay:.2f} s after the first epoch")
    time.sleep(delay)
    run.kill()
    run.communicate()
    assert 1 <= len(torch.load("killed.pth", weights_only=True)["history"]) <= 3
    status, out, err = call(train, *SMALL, "--checkpoint", "killed.pth", "--resume")
    assert "of 3 epochs are done" in out.splitlines()[1]  # after the delay
    assert (status, err) == (0, "")
    assert same_bits("synthetic.pth", "killed.pth")


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C to whole consoles")
def test_ctrl_c_says_how_to_go_on():
    # A background job of a shell is deaf to SIGINT, and so would be what it starts.
    run = start(preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    wait_for_first_epoch(run)
    run.send_signal(signal.SIGINT)
    _, err = run.communicate()
    assert run.returncode == 130
    assert "--resume" in err
    assert "Traceback" not in err


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such signal")
@pytest.mark.parametrize("lines", [0, 1])
def test_a_closed_pipe_ends_without_a_traceback(lines):
    run = start()
    for _ in range(lines):
        run.stdout.readline()
    run.stdout.close()  # as `| head -1` does
    assert (run.wait(), run.stderr.read()) == (141, "")


def test_small_images_come_first_and_the_last_epoch_sees_all_of_them_whole():
    twelve = [(1000, 24), *[(650, 24)] * 7, *[(650, 32)] * 2, *[(1000, 32)] * 2]
    assert train.plan_epochs(12, 2, 1000) == twelve
    for epochs in range(1, 40):
        steps = train.plan_epochs(epochs, 2, 1000)
        assert len(steps) == epochs
        assert (steps[0][0], steps[-1]) == (1000, (1000, 32))


def test_an_epoch_sees_the_hardest_images_and_half_of_the_others():
    losses = torch.rand(1000)
    hardest = set(losses.topk(300).indices.tolist())
    seen = [train.choose(losses, 650) for _ in range(200)]
    for order in seen:
        assert len(order) == len(set(order)) == 650
        assert hardest < set(order)
    times = torch.bincount(torch.tensor(seen).flatten(), minlength=1000)
    others = times[[i for i in range(1000) if i not in hardest]]
    assert 50 < others.min() and others.max() < 150  # about 100 of 200
    first = torch.tensor([order[0] for order in seen])
    assert len(first.unique()) > 100  # in random order
    assert sorted(train.choose(losses, 1000)) == list(range(1000))


def test_the_network_sees_what_the_readme_says(call, monkeypatch):
    """Watched at its door: which images come in, in which size, mirrored or not."""
    count = 1000
    images = torch.zeros(count, 3, 32, 32, dtype=torch.uint8)
    images[:, 0] = torch.arange(count).remainder(200).view(-1, 1, 1)  # its number,
    images[:, 1] = torch.arange(count).div(200).floor().view(-1, 1, 1)  # in two digits
    images[:, 2, :, :16] = 200  # the left half is blue
    labels = torch.arange(count) % 10
    data = dataset.ImageDataset(images, labels, augment=True)
    monkeypatch.setattr(train, "cifar_dataset", lambda *_: (data, None))
    sizes, numbers, mirrored, losses = [], [], [], []

    def watch(network, inputs, logits):
        pixels = inputs[0] * dataset.STD + dataset.MEAN
        red, green, blue = pixels.unbind(1)
        number = (red.mean((1, 2)) + 200 * green.mean((1, 2)).round()).round().long()
        loss = nn.functional.cross_entropy(
            logits.float(), labels[number], reduction="none", label_smoothing=0.2
        )
        sizes.append(pixels.shape[-1])
        numbers.append(number)
        mirrored.append(blue[:, :, -1].mean(1) > blue[:, :, 0].mean(1))
        losses.append(loss)

    class Watched(CNN):
        def __init__(self, *args):
            super().__init__(*args)
            self.register_forward_hook(watch)

    monkeypatch.setattr(train, "CNN", Watched)
    call(train, *SMALL, "--batch-size", "50")
    # Small images first, all of them whole at last; in between the hardest and a half.
    assert sizes == [24] * 20 + [24] * 13 + [32] * 20
    epochs = [torch.cat(numbers[i:j]) for i, j in ((0, 20), (20, 33), (33, 53))]
    assert [len(seen.unique()) for seen in epochs] == [1000, 650, 1000]
    first_loss = torch.zeros(count)
    first_loss[epochs[0]] = torch.cat(losses[:20]).detach()
    assert set(first_loss.topk(300).indices.tolist()) < set(epochs[1].tolist())
    # In turn mirrored and not.
    sides = torch.zeros(3, count, dtype=torch.bool)
    for epoch, (i, j) in enumerate(((0, 20), (20, 33), (33, 53))):
        sides[epoch, epochs[epoch]] = torch.cat(mirrored[i:j])
    assert 400 < sides[0].sum() < 600
    assert torch.equal(sides[1, epochs[1]], ~sides[0, epochs[1]])
    assert torch.equal(sides[2], sides[0])


CPU = getattr(torch.cpu, "get_capabilities", dict)()


@pytest.mark.skipif(
    not train.fast_bfloat16(torch.device("cpu"))
    and bool(CPU.get("avx_ne_convert") or CPU.get("amx_tile")),
    reason="Intel's Core Ultra 200 refuses the backward pass, AMX on Windows crashes",
)
def test_bfloat16_computes_nearly_the_same_and_saves_float32(call, monkeypatch):
    """Also on smooth images, whose whitened differences are small ones made large."""
    torch.manual_seed(0)
    images = nn.functional.interpolate(torch.randn(100, 3, 4, 4), 32, mode="bicubic")
    images += 0.02 * torch.randn(images.shape)
    network = CNN()
    network.whiten(images)
    with torch.no_grad():
        exact = network(images)
        with torch.autocast("cpu", torch.bfloat16):
            short = network(images).float()
    spread = (exact - exact.mean(0)).norm()
    assert 0 < (short - exact).norm() < 0.05 * spread

    losses = []
    for fast in (True, False):
        monkeypatch.setattr(train, "fast_bfloat16", lambda _, fast=fast: fast)
        call(train, *SMALL, "--epochs", "1")
        checkpoint = torch.load("synthetic.pth", weights_only=True)
        weights = checkpoint["model_state_dict"]
        assert weights["head.weight"].dtype == torch.float32
        losses.append(checkpoint["history"][0]["loss"])
    assert losses[0] != losses[1]


def test_a_new_run_keeps_what_it_replaces(call, checkpoint, trained):
    out = call(train, *SMALL, "--epochs", "1")[1]
    assert "keeps it as synthetic.old.pth" in out
    assert Path("synthetic.old.pth").read_bytes() == trained
    one_epoch = checkpoint.read_bytes()
    assert one_epoch != trained
    call(train, *SMALL, "--epochs", "1", "--seed", "2")  # nor does a second one lose it
    assert Path("synthetic.old.pth").read_bytes() == trained
    assert Path("synthetic.old2.pth").read_bytes() == one_epoch


def test_two_runs_that_write_one_checkpoint_lose_no_epoch(
    call, refused, checkpoint, trained, monkeypatch
):
    """While this one trains its second epoch, another one finishes."""
    call(train, *SMALL, "--seed", "2", "--checkpoint", "whole.pth")
    checkpoint.unlink()
    print_epoch = train.print_epoch

    def then_another(history, plan):
        print_epoch(history, plan)
        checkpoint.write_bytes(trained)

    with monkeypatch.context() as patch:
        patch.setattr(train, "print_epoch", then_another)
        message = refused(train, *SMALL, "--seed", "2")
    assert "another run" in message
    assert "synthetic.new.pth: name that file and add --resume" in message
    assert checkpoint.read_bytes() == trained
    with pytest.raises(SystemExit, match="2"):  # and where the other is no checkpoint
        checkpoint.write_bytes(b"a letter")
        train.save_checkpoint({"epoch": 1, "settings": {}}, checkpoint, None)
    assert torch.load("synthetic.new2.pth", weights_only=True)["epoch"] == 1
    go_on = ["--seed", "2", "--resume", "--checkpoint", "synthetic.new.pth"]
    assert "2 of 3 epochs are done" in call(train, *SMALL, *go_on)[1]
    assert same_bits("synthetic.new.pth", "whole.pth")


def test_two_runs_write_into_files_of_their_own(tmp_path, monkeypatch):
    path, replace, parts = tmp_path / "synthetic.pth", os.replace, []

    def then_another(part, path):
        parts.append(part)
        if len(parts) == 1:  # it writes before this one has the name
            train.write_whole(path, b"other")
        replace(part, path)

    monkeypatch.setattr(train.os, "replace", then_another)
    Path("synthetic.pth.0a1b2c3d.part").touch()  # as a killed run leaves it
    os.utime("synthetic.pth.0a1b2c3d.part", (0, 0))
    Path("synthetic.pth.zip.part1").touch()  # somebody's
    os.utime("synthetic.pth.zip.part1", (0, 0))
    train.write_whole(path, b"one")
    assert parts[0] != parts[1]
    assert path.read_bytes() == b"one"
    assert sorted(os.listdir()) == ["synthetic.pth", "synthetic.pth.zip.part1"]


@pytest.mark.skipif(os.name == "nt", reason="links need rights on Windows")
def test_a_link_is_written_through(call, tmp_path, trained):
    """To a drive that stays when the machine goes."""
    (tmp_path / "drive").mkdir()
    Path("synthetic.pth").symlink_to("drive/mine.pth")
    for kept in ([], ["mine.old.pth"]):
        call(train, *SMALL, "--epochs", "1")
        assert Path("synthetic.pth").is_symlink()
        assert sorted(os.listdir("drive")) == sorted(["mine.pth", *kept])
    Path("resnet.pth").symlink_to("drive/resnet.pth")
    assert dataset.file_path("resnet.pth") == tmp_path / "drive/resnet.pth"


def test_a_folder_that_may_not_be_written_is_named_at_once(refused, monkeypatch):
    def denied(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(Path, "write_bytes", denied)
    monkeypatch.setattr(train, "cifar_dataset", None)
    assert "synthetic.pth cannot be used (Permission denied)" in refused(train, *SMALL)


def test_it_trains_without_stderr(call, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Windows' pythonw
    monkeypatch.setattr(sys, "__stderr__", None)
    status, out, _ = call(train, *SMALL, "--epochs", "1")
    assert (status, "Epoch: 1/1" in out) == (0, True)


def test_the_next_command_can_be_pasted(monkeypatch):
    args = Namespace(
        synthetic=False, holdout=False, data="data", checkpoint=Path("cifar_cnn.pth")
    )
    assert train.next_command(args) == "python evaluation.py"
    args.data, args.checkpoint = "my data\\", Path("it's $HOME.pth")
    expected = ["--data", "my data\\", "--checkpoint", "it's $HOME.pth"]
    assert shlex.split(train.next_command(args))[2:] == expected
    monkeypatch.setattr(train.os, "name", "nt")
    assert '--data "my data\\\\" --checkpoint "it\'s' in train.next_command(args)


def test_a_path_is_named_as_it_is_written(refused):
    folder = "学習\u3000結果"  # a wide blank
    assert folder in refused(train, *SMALL, "--checkpoint", f"{folder}/a.pth")


def test_only_a_checkpoint_is_replaced(refused):
    script = Path("train.py")  # whoever mixes up two names
    script.write_text("print()")
    assert "train.py cannot be used" in refused(train, *SMALL, "--checkpoint", script)
    assert [*script.parent.glob("train*")] == [script]
    assert script.read_text() == "print()"


@pytest.mark.parametrize(
    ("name", "kept"),  # what only this one keeps of each weight
    [
        ("muon", {"past", "momentum_buffer"}),
        ("sgd", set()),
        ("momentum", {"momentum_buffer"}),
        ("adagrad", {"sum"}),
        ("rmsprop", {"square_avg"}),
        ("adam", {"exp_avg", "exp_avg_sq"}),
    ],
)
def test_the_optimizers_learn_at_their_own_rate(call, name, kept):
    call(train, *SMALL, "--batch-size", "50", "--optimizer", name)
    checkpoint = torch.load("synthetic.pth", weights_only=True)
    assert checkpoint["history"][-1]["accuracy"] > 0.3  # chance is 0.1
    states = checkpoint["optimizer_state_dict"]["state"].values()
    # torch 2.2 keeps a momentum_buffer of None where there is no momentum.
    keys = {key for state in states for key, x in state.items() if x is not None}
    assert keys - {"step"} == kept


def test_muon_s_steps_are_orthogonal():
    """Against the singular value decomposition, whose values would all become 1."""
    for shape in ((16, 48), (48, 16)):
        matrix = torch.randn(shape)
        u, _, vh = torch.linalg.svd(matrix, full_matrices=False)
        step = train.orthogonal(matrix)
        alike = nn.functional.cosine_similarity(step.flatten(), (u @ vh).flatten(), 0)
        assert alike > 0.95
        values = torch.linalg.svdvals(step)
        assert 0.5 < values.min() and values.max() < 1.3
    filters = nn.Parameter(torch.randn(8, 3, 3, 3))
    weight, bias = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2))
    optimizer = train.Muon([filters, weight, bias], lr=0.1)
    (filters.sum() + (filters**2).sum() + weight.sum() + bias.sum()).backward()
    before = filters * 8**0.5 / filters.norm()
    expected = train.orthogonal(filters.grad.flatten(1)).view_as(filters)
    optimizer.step()
    # bfloat16 rounds; a step is 0.1 long in each of its eight directions
    torch.testing.assert_close(before - 0.1 * expected, filters, rtol=0, atol=5e-3)


def spoil_loss(network, losses):
    losses[7] = float("nan")


def spoil_weights(network, losses):
    network.head.bias.data[3] = float("inf")


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_weights])
def test_a_loss_that_is_not_finite_stops_the_run(
    refused, checkpoint, trained, monkeypatch, spoil
):
    whole_epoch = train.train_epoch

    def train_epoch(network, *args):
        row, losses = whole_epoch(network, *args)
        spoil(network, losses)
        return row, losses

    monkeypatch.setattr(train, "train_epoch", train_epoch)
    assert "--lr" in refused(train, *SMALL)
    assert checkpoint.read_bytes() == trained


def test_a_learning_rate_that_is_too_large_is_named(refused, checkpoint, trained):
    assert "--lr" in refused(train, *SMALL, "--lr", "1000")
    assert checkpoint.read_bytes() == trained


def test_held_out_images_are_tested_and_not_trained_on(call, refused):
    out = call(train, *SMALL, "--epochs", "1", "--holdout")[1]
    assert "Next: python evaluation.py --synthetic --holdout" in out
    out = call(evaluation, "--synthetic", "--holdout")[1]
    assert out.splitlines()[0].endswith("/200)")
    (train_data, held), (all_data, _) = (
        dataset.cifar_dataset(synthetic=True, holdout=holdout)
        for holdout in (True, False)
    )
    trained_on = {image.numpy().tobytes() for image in train_data.images}
    for label in range(10):
        of_class = all_data.images[all_data.labels == label]
        assert torch.equal(held.images[held.labels == label], of_class[-20:])
        assert all(image.numpy().tobytes() in trained_on for image in of_class[:-20])
        assert not any(x.numpy().tobytes() in trained_on for x in of_class[-20:])
    assert "has holdout True, not False" in refused(
        train, *SMALL, "--epochs", "1", "--resume"
    )


def test_a_finished_run_says_so_and_other_options_are_refused(
    call, refused, checkpoint, trained
):
    assert "3 of 3 epochs" in call(train, *SMALL, "--resume")[1]
    assert "has lr 0.12, not 0.1" in refused(train, *SMALL, "--resume", "--lr", "0.1")
    others = {"width": 5, "epochs": 4, "batch-size": 125, "optimizer": "sgd", "seed": 2}
    for name, value in others.items():
        message = refused(train, *SMALL, "--resume", f"--{name}", value)
        assert f"{name.replace('-', '_')} " in message
        assert f"not {value}" in message
    assert checkpoint.read_bytes() == trained


@pytest.mark.parametrize(
    "options",
    [
        ["--epochs", "0"],
        ["--epochs", "many"],
        ["--lr", "nan"],
        ["--lr", "0"],
        ["--lr", "inf"],
        ["--batch-size", "0"],
        ["--batch-size", "1"],
        ["--batch-size", "1500"],  # the second epoch sees 1,300 images
        ["--width", "-3"],
        ["--seed", "-1"],
        ["--optimizer", "newton"],
        ["--device", "abacus"],
        ["--device", "meta"],
        ["--checkpoint", "."],
        ["--checkpoint", "no folder/synthetic.pth"],
        ["--checkpoint", "~nobody/synthetic.pth"],
        ["--checkpoint", "synthetic.pth/synthetic.pth"],
        ["--resume", "--checkpoint", "missing.pth"],
        ["--unknown"],
    ],
    ids=" ".join,
)
def test_mistakes_end_in_one_line(refused, checkpoint, trained, options):
    refused(train, *SMALL, *options)
    assert checkpoint.read_bytes() == trained
    assert os.listdir() == ["synthetic.pth"]


def test_trying_never_touches_what_is_handed_in(call):
    Path("cifar_cnn.pth").write_bytes(b"mine")
    assert "synthetic.pth is finished" in call(train, *SMALL, "--epochs", "1")[1]
    assert call(evaluation, "--synthetic")[1].startswith("Accuracy: ")
    assert Path("cifar_cnn.pth").read_bytes() == b"mine"
    assert sorted(os.listdir()) == ["cifar_cnn.pth", "synthetic.pth"]


def test_in_a_notebook_s_cell_it_says_how_it_is_started(refused, monkeypatch):
    monkeypatch.delattr(sys.modules["__main__"], "__file__")
    assert "!python train.py" in refused(train, "-f", "/root/kernel-1.json")


def test_too_little_memory_is_named(refused, monkeypatch):
    def allocate(*args):
        torch.zeros(10**15)

    monkeypatch.setattr(train, "fit", allocate)
    assert "not enough memory" in refused(train, *SMALL)

    def use_up(*args):
        raise MemoryError

    monkeypatch.setattr(Path, "write_bytes", use_up)  # the file is not at fault
    assert "not enough memory" in refused(train, *SMALL)


def test_a_full_disk_leaves_the_old_checkpoint(
    refused, checkpoint, trained, monkeypatch
):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:  # full while an epoch is saved
        patch.setattr(train.os, "fsync", full)
        message = refused(train, *SMALL)
        assert "No space left" in message and "add --resume" in message

    write = Path.write_bytes

    def almost_full(path, data):
        write(path, data[:1000])
        full()

    with monkeypatch.context() as patch:  # too full before the run begins
        patch.setattr(Path, "write_bytes", almost_full)
        patch.setattr(train, "cifar_dataset", None)
        assert "No space left" in refused(train, *SMALL)
    assert checkpoint.read_bytes() == trained
    assert os.listdir() == ["synthetic.pth"]


@pytest.mark.parametrize("name", ["muon", "sgd", "adam"])
def test_the_room_asked_for_is_enough(call, monkeypatch, name):
    options = [*SMALL, "--width", "32", "--batch-size", "1000", "--optimizer", name]
    monkeypatch.setattr(train, "plan_epochs", lambda *_: [(1000, 16)])
    call(train, *options)
    asked = []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", lambda _, zeros: asked.append(len(zeros)))
        for resume in (True, False):
            train.check_room(CNN(32), Path("synthetic.pth"), resume)
    size = os.path.getsize("synthetic.pth")
    assert size <= asked[0] <= 3.3 * size + 2**20
    assert asked[1] == 2 * asked[0]  # a new run leaves two files


def test_the_lecture_s_loop_runs_on_our_data_and_model(tmp_path, monkeypatch):
    """Its train.py line by line, on synthetic images; evaluation.py reads the end."""
    monkeypatch.setattr(dataset, "synthetic_images", all_images)
    torch.manual_seed(0)
    train_data, test_data = dataset.cifar_dataset(synthetic=True)
    train_loader = DataLoader(train_data, batch_size=64, shuffle=True)
    network = CNN()
    criterion = nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    network.train()
    train_loss = 0
    for images, labels in train_loader:
        optimizer.zero_grad()
        outputs = network(images)
        loss = criterion(outputs, labels)
        train_loss += loss.item()
        loss.backward()
        optimizer.step()
    torch.save(
        {
            "epoch": 0,
            "model_state_dict": network.state_dict(),
            "optimizer_state_dict": optimizer.state_dict(),
            "loss": train_loss / len(train_loader),
        },
        "synthetic.pth",
    )
    network.eval()
    with torch.no_grad():
        correct = sum(
            (network(images).max(1)[1] == labels).sum().item()
            for images, labels in DataLoader(test_data, batch_size=64)
        )
    # It says nothing of its images, so they count as real ones; here they are not.
    loaded, _ = evaluation.load_cnn(tmp_path / "synthetic.pth")
    logits = evaluation.predict(loaded, test_data, torch.device("cpu"))
    assert (logits.argmax(1) == test_data.labels).sum().item() == correct
    assert correct > 150  # chance is 100 +- 10; the network suits larger steps
