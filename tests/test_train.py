"""train.py as a user calls it."""

import errno
import json
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from running import SHORT, SMALL, rows

import train
from acla import cli, files
from acla.config import Task
from acla.data.datasets import PatchSampler, Pictures
from acla.errors import AclaError, DataError, Stopped, UsageError
from acla.models import serialization
from acla.models.serialization import load_model, load_state, save_state
from acla.training import validation
from acla.training.trainer import Learner

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.usefixtures("elsewhere")


def same_state(one: str, other: str) -> bool:
    (a, _), (b, _) = (load_state(Path(folder, "state.safetensors")) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["--task", "car", "--q", "20"], Task("car", 20)),
        (["--task", "car", "--q", "5-60"], Task("car", 5, 60)),
        (["--task", "denoise", "--sigma", "50", "--channels", "1"], Task("denoise", 50)),
        (["--task", "demosaic"], Task("demosaic", 0)),
        (["--task", "sr", "--scale", "3"], Task("sr", 3)),
        (["--task", "sr", "--backbone", "rcan", "--group-blocks", "1"], Task("sr", 2)),
    ],
    ids=["car", "car-range", "denoise-gray", "demosaic", "sr3", "sr2-rcan"],
)
def test_every_task_trains_and_its_network_comes_back(words, task):
    train.main([*SMALL, *SHORT, *words])
    found = load_model(Path("runs/train/model.safetensors"))
    assert found.task == task
    assert found.config.positions == (1, 3)
    assert [row["step"] for row in rows("runs/train")] == [2, 4, 6]
    assert all(row["val_psnr"] > 5 for row in rows("runs/train"))


@pytest.mark.parametrize(
    "words",
    [[], ["--ema"], ["--amp"], ["--clip", "5"]],
    ids=["plain", "ema", "amp", "clip"],
)
def test_a_resumed_run_equals_a_straight_one_to_the_bit(words, small_sets):
    words = [*SMALL, *SHORT, *small_sets, *words]
    train.main([*words, "--out", "straight"])
    train.main([*words, "--out", "parts", "--steps", "2"])
    train.main([*small_sets, "--out", "parts", "--resume", "--steps", "6"])
    assert same_state("straight", "parts")
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in ("straight", "parts")]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("step", [0, 1, 3], ids=["before a row", "with a row", "after a row"])
def test_a_run_that_is_stopped_loses_nothing(step, small_sets, monkeypatch, capfd):
    words = [*SMALL, *SHORT, *small_sets, "--clip", "5", "--ema"]
    train.main([*words, "--out", "straight"])
    learn = Learner.step

    def stopped(self, number, *batch):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        learn(self, number, *batch)

    monkeypatch.setattr(Learner, "step", stopped)
    with pytest.raises(Stopped, match=f"stopped after step {step + 1}; --resume") as stop:
        train.main([*words, "--out", "parts"])
    assert stop.value.status == 128 + signal.SIGTERM
    monkeypatch.setattr(Learner, "step", learn)
    _, progress = load_state(Path("parts/state.safetensors"))
    assert progress["step"] == step + 1
    assert len(progress["losses"]) == len(progress["norms"]) == (step + 1) % 2
    if progress["losses"]:  # a run may not end between two rows
        with pytest.raises(UsageError, match="goes on as it was begun, with --steps 6"):
            train.main([*small_sets, "--out", "parts", "--resume", "--steps", str(step + 1)])
    train.main([*small_sets, "--out", "parts", "--resume"])
    assert same_state("straight", "parts")
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in ("straight", "parts")]
    assert timeless[0] == timeless[1]


def test_a_run_that_diverged_keeps_its_checkpoint_when_it_is_stopped(small_sets, monkeypatch):
    learn = Learner.step

    def diverging(self, number, *batch):
        learn(self, number, *batch)
        if number == 2:
            self.losses[-1] *= torch.nan
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Learner, "step", diverging)
    with pytest.raises(AclaError, match=r"the loss is nan in step 3, .* of step 2"):
        train.main([*SMALL, *SHORT, *small_sets])
    assert load_state(Path("runs/train/state.safetensors"))[1]["step"] == 2


def test_several_sets_validate(small_sets, tmp_path, make_scene):
    (tmp_path / "W").mkdir()
    for seed in (1, 2):
        Image.fromarray(make_scene(20, 20, seed=seed)).save(tmp_path / "W" / f"{seed}.png")
    train.main([*SMALL, *SHORT, *small_sets, "--val-set", "V,W"])
    for row in rows("runs/train"):
        one, two = row["val_psnr_V"], row["val_psnr_W"]
        assert one != two
        assert row["val_psnr"] == pytest.approx((one + 2 * two) / 3)


def test_workers_change_no_bit(small_sets):
    train.main([*SMALL, *SHORT, *small_sets, "--out", "none"])
    train.main([*SMALL, *SHORT, *small_sets, "--out", "three", "--workers", "3"])
    assert same_state("none", "three")


def test_the_best_network_is_kept_beside_the_last(small_sets, monkeypatch, capsys):
    def score(*values: float) -> None:
        found = iter(values)
        monkeypatch.setattr(validation, "each_psnr", lambda *_: [next(found)])

    def kept(name: str) -> tuple[int, float]:
        info = load_model(Path("runs/train", name)).info
        return info["step"], info["val_psnr"]

    score(20.0, 30.0, 25.0)
    train.main([*SMALL, *SHORT, *small_sets])
    assert kept("best.safetensors") == (4, 30)
    assert kept("model.safetensors") == (6, 25)
    assert "best.safetensors, of step 4 " in capsys.readouterr().out
    score(30.0)  # no better
    train.main([*small_sets, "--resume", "--steps", "8"])
    assert kept("best.safetensors") == (4, 30)
    score(30.5)
    train.main([*small_sets, "--resume", "--steps", "10"])
    assert kept("best.safetensors") == kept("model.safetensors") == (10, 30.5)


def test_norms_of_clipped_gradients_are_told(small_sets):
    train.main([*SMALL, *SHORT, *small_sets])
    assert "norm" not in rows("runs/train")[0]
    train.main([*SMALL, *SHORT, *small_sets, "--clip", "1", "--out", "clipped"])
    assert all(row["norm"] > 1 for row in rows("clipped"))
    assert not same_state("runs/train", "clipped")


def failing(words: list[str], capsys) -> str:
    """The one line that a run which fails says, after its notices."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        cli.run(train.main, words)
    assert exit.value.code == 1
    said = capsys.readouterr()
    assert said.out == ""
    (line,) = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert said.err.endswith(line + "\n")
    return line


@pytest.mark.parametrize(
    ("file", "module", "function", "code", "reason"),
    [
        ("model", os, "fsync", errno.ENOSPC, "No space left on device"),
        ("best", serialization, "open", errno.EROFS, "Read-only file system"),
        ("state", os, "fsync", errno.ENOSPC, "No space left on device"),
    ],
    ids=["full-disk-model", "read-only-best", "full-disk-state"],
)
def test_a_write_that_fails_leaves_the_checkpoint_whole(
    small_sets, monkeypatch, capsys, file, module, function, code, reason
):
    words = [*SMALL, *SHORT, *small_sets]
    train.main([*words, "--steps", "2"])
    failed = Path(f"runs/train/{file}.safetensors")
    before = [path.read_bytes() for path in (failed, Path("runs/train/state.safetensors"))]
    write = files.write_atomically

    def fail(*_, **__):
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:

        def write_until(path, data):
            if path == failed:
                patched.setattr(module, function, fail, raising=False)
            write(path, data)

        patched.setattr(files, "write_atomically", write_until)
        patched.setattr(validation, "each_psnr", lambda *_: [1e3])  # the best so far
        line = failing(["--resume", *small_sets, "--steps", "4"], capsys)
    assert line.startswith(f"error: {failed}: {reason}; check the path")
    after = [path.read_bytes() for path in (failed, Path("runs/train/state.safetensors"))]
    assert after == before
    assert not list(Path("runs/train").glob(".*"))
    train.main(["--resume", *small_sets, "--steps", "4"])
    train.main([*words, "--steps", "4", "--out", "straight"])
    assert same_state("straight", "runs/train")


def test_training_improves_on_the_input():
    train.main(
        [*SMALL, "--steps", "120", "--val-every", "60", "--batch-size", "4", "--patch-size", "32"]
    )
    plain = [*SMALL, *SHORT, "--steps", "1", "--val-every", "1", "--lr", "1e-9", "--out", "input"]
    train.main(plain)
    assert rows("runs/train")[-1]["val_psnr"] > rows("input")[-1]["val_psnr"] + 0.05


def test_describe_prints_one_object_and_stops(capsys):
    train.main(["--describe", "--preset", "paper", "--task", "sr", "--arch", "none"])
    size = json.loads(capsys.readouterr().out)
    assert size["params"] == 40_729_627
    assert size["macs_48x48"] == pytest.approx(93.97e9, rel=0.002)
    assert size["attention_macs_48x48"] == 0
    assert size["positions"] == []
    assert not Path("runs").exists()


def test_pictures_that_are_not_used_are_told_of(capsys):
    train.main([*SMALL, *SHORT, "--data", "somewhere"])
    err = capsys.readouterr().err
    assert "--train-set NAME takes a set of somewhere" in err
    assert "validation: the middle of each picture, at most 256 × 256 pixels; car q10: Y" in err


def test_a_resumed_run_goes_on_as_it_was_begun():
    train.main([*SMALL, *SHORT])
    with pytest.raises(UsageError, match="already holds a run"):
        train.main([*SMALL, *SHORT])
    for flag, told in (
        (["--width", "9"], "--width 8"),
        (["--positions", "1,2"], "--positions 1,3"),
        (["--ema", "--clip", "1"], "--clip 0.0, --no-ema"),
        (["--val-set", "sample"], "no --val-set"),
    ):
        with pytest.raises(UsageError, match=f"goes on as it was begun, with {told}$"):
            train.main(["--resume", *flag])
    with pytest.raises(UsageError, match="--width 8"):
        train.main(["--resume", "--width", "9"])
    with pytest.raises(UsageError, match="begun with --preset tiny, not small"):
        train.main(["--resume", "--preset", "small"])
    with pytest.raises(UsageError, match="begun with --arch paper, not none"):
        train.main(["--resume", "--arch", "none"])
    with pytest.raises(UsageError, match="begun without --init: leave it out"):
        train.main(["--resume", "--init", "some.safetensors"])
    train.main(["--resume", "--epochs", "1"])  # an epoch of this preset is longer than the run was
    assert rows("runs/train")[-1]["step"] == 20
    with pytest.raises(UsageError, match="is for car q10"):
        train.main(["--resume", "--q", "20"])
    state = Path("runs/train/state.safetensors")
    tensors, progress = load_state(state)
    progress["data"]["train"] = "another"
    save_state(state, tensors, progress)
    with pytest.raises(DataError, match="pictures for train are not those"):
        train.main(["--resume", "--steps", "30"])


def test_flags_may_repeat_what_a_run_does_already(small_sets):
    # The preset is the device's
    train.main([*SMALL[2:], *SHORT, *small_sets, "--device", "cpu", "--q", "20"])
    words = ["--resume", *small_sets, "--steps", "8"]
    repeated = ["--preset", "tiny", "--arch", "paper", "--width", "8", "--task", "car"]
    train.main([*words, *repeated])
    assert rows("runs/train")[-1]["step"] == 8
    with pytest.raises(UsageError, match="for car q20, not for car q10"):
        train.main([*words, "--q", "10"])
    with pytest.raises(UsageError, match="begun with --preset tiny, not small"):
        train.main([*words, "--preset", "small"])
    state = Path("runs/train/state.safetensors")
    tensors, progress = load_state(state)
    progress["flags"]["preset"] = None  # as older runs noted it
    save_state(state, tensors, progress)
    with pytest.raises(UsageError, match="begun without --preset: leave it out"):
        train.main([*words, "--preset", "tiny"])
    train.main(words)


@pytest.mark.parametrize(
    ("words", "status", "message"),
    [
        (["--preset", "huge"], 2, "invalid choice: 'huge'"),
        (["--task", "car", "--scale", "2"], 2, "error: --scale belongs to --task sr"),
        (["--train-set", "DIV2K"], 1, "error: set 'DIV2K' needs a folder"),
    ],
)
def test_exit_status_and_one_line_errors(words, status, message):
    command = [sys.executable, ROOT / "train.py", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("bad", ["loss", "weights"])
def test_a_loss_that_is_not_finite_stops_with_its_step_and_pictures(
    small_sets, monkeypatch, capsys, bad
):
    train.main([*SMALL, *SHORT, *small_sets, "--steps", "3", "--val-every", "3"])
    before = {path.name: path.read_bytes() for path in Path("runs/train").iterdir()}
    step, nan = Learner.step, float("nan")

    def diverge(self, number, *given):
        if number == 4 and bad == "weights":  # its gradient was too long
            torch.nn.init.constant_(self.model.head[0].weight, nan)
        step(self, number, *given)
        if number == 4 and bad == "loss":
            self.losses[-1] *= nan

    monkeypatch.setattr(Learner, "step", diverge)
    line = failing(["--resume", *small_sets, "--steps", "6"], capsys)
    assert "the loss is nan in step 5, patches 8 to 9, of " in line
    assert "the last good checkpoint is runs/train/state.safetensors of step 3" in line
    sampler = PatchSampler(Pictures(sorted(Path("T").iterdir())), Task("car", 10), 16, 2)
    assert ", ".join(sampler.names(4)) in line
    assert {path.name: path.read_bytes() for path in Path("runs/train").iterdir()} == before


def test_a_state_that_is_cut_short_or_of_another_version_is_refused(small_sets, capsys):
    train.main([*SMALL, *SHORT, *small_sets])
    state = Path("runs/train/state.safetensors")
    tensors, progress = load_state(state)
    del progress["plan"]["train"]["clip"]
    save_state(state, tensors, progress)
    line = failing(["--resume", *small_sets], capsys)
    assert line.startswith(f"error: {state}: the plan inside is not valid or of another version")
    assert line.endswith("missing or unknown fields: clip; begin anew with --out DIR")
    state.write_bytes(state.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in Path("runs/train").iterdir()}
    line = failing(["--resume", *small_sets], capsys)
    assert line.startswith("error: runs/train/state.safetensors: not a whole safetensors file")
    assert {path.name: path.read_bytes() for path in Path("runs/train").iterdir()} == before


def test_a_folder_that_cannot_be_made_is_told_of_before_training(small_sets, monkeypatch, capsys):
    monkeypatch.setattr(Learner, "step", lambda *_: pytest.fail("trained"))
    Path("file").touch()
    line = failing([*SMALL, *SHORT, *small_sets, "--out", "file/below"], capsys)
    assert line.startswith("error: file/below: Not a directory; check the path")


def test_rows_are_logged_for_tensorboard_too(small_sets, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UsageError, match="--log needs TensorBoard"):
        train.main([*SMALL, *SHORT, *small_sets, "--log"])
    assert not Path("runs").exists()
    seen = []

    class Writer:
        def __init__(self, folder, purge_step):
            seen.append((str(folder), purge_step))

        def add_scalar(self, *scalar):
            seen.append(scalar)

        def flush(self):
            seen.append("flush")

    module = types.SimpleNamespace(SummaryWriter=Writer)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    train.main([*SMALL, *SHORT, *small_sets, "--steps", "2", "--log"])
    (row,) = rows("runs/train")
    named = [(name, row[name], 2) for name in ("loss", "lr", "val_psnr")]
    assert seen == [("runs/train/tensorboard", 1), *named, "flush"]
