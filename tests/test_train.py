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
from acla import cli
from acla.config import RENAMED, Task
from acla.data.datasets import PatchSampler, Pictures
from acla.errors import AclaError, DataError, Stopped, UsageError
from acla.models.serialization import load_model, load_state, save_state
from acla.training import validation
from acla.training.trainer import Trainer

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
        (["--task", "denoise", "--sigma", "0-55"], Task("denoise", 0, 55)),
        (["--task", "demosaic"], Task("demosaic", 0)),
        (["--task", "sr", "--scale", "3"], Task("sr", 3)),
        (["--task", "sr", "--backbone", "rcan", "--group-blocks", "1"], Task("sr", 2)),
    ],
    ids=["car", "car-range", "denoise-gray", "denoise-range", "demosaic", "sr3", "sr2-rcan"],
)
def test_every_task_trains_and_its_network_comes_back(words, task, small_sets):
    train.main([*SMALL, *SHORT, *small_sets, *words, "--steps", "3"])
    saved = load_model(Path("runs/train/model.safetensors"))
    assert saved.task == task
    assert saved.config.positions == (1, 3)
    assert [row["step"] for row in rows("runs/train")] == [2, 3]
    assert all(row["val_psnr"] > 5 for row in rows("runs/train"))


@pytest.mark.parametrize("words", [["--ema", "--clip", "5"], ["--amp"]], ids=["ema clip", "amp"])
def test_a_resumed_run_equals_a_straight_one_to_the_bit(words, small_sets):
    words = [*SMALL, *SHORT, *small_sets, *words]
    train.main([*words, "--out", "straight"])
    train.main([*words, "--out", "parts", "--steps", "2"])
    train.main([*small_sets[-2:], "--out", "parts", "--resume", "--steps", "6"])
    assert same_state("straight", "parts")
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in ("straight", "parts")]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize("step", [1, 2], ids=["with a row", "after a row"])
def test_a_run_that_is_stopped_loses_nothing(step, small_sets, monkeypatch, capfd):
    words = [*SMALL, *SHORT, *small_sets, "--clip", "5", "--ema", "--steps", "4"]
    train.main([*words, "--out", "straight"])
    learn = Trainer.step

    def stopped(self, number, *batch):
        if number == step:
            os.kill(os.getpid(), signal.SIGTERM)
        learn(self, number, *batch)

    monkeypatch.setattr(Trainer, "step", stopped)
    with pytest.raises(Stopped, match=f"stopped after step {step + 1}; --resume") as stop:
        train.main([*words, "--out", "parts"])
    assert stop.value.status == 128 + signal.SIGTERM
    monkeypatch.setattr(Trainer, "step", learn)
    _, progress = load_state(Path("parts/state.safetensors"))
    assert progress["step"] == step + 1
    assert len(progress["losses"]) == len(progress["norms"]) == (step + 1) % 2
    if progress["losses"]:  # a run may not end between two rows
        with pytest.raises(UsageError, match=f"--steps {step + 1}: .* give more"):
            train.main([*small_sets[-2:], "--out", "parts", "--resume", "--steps", str(step + 1)])
    train.main([*small_sets[-2:], "--out", "parts", "--resume"])
    assert same_state("straight", "parts")
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in ("straight", "parts")]
    assert timeless[0] == timeless[1]


def test_a_run_that_diverged_keeps_its_checkpoint_when_it_is_stopped(small_sets, monkeypatch):
    learn = Trainer.step

    def diverging(self, number, *batch):
        learn(self, number, *batch)
        if number == 2:
            self.losses[-1] *= torch.nan
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Trainer, "step", diverging)
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
    words = [*SMALL, *SHORT, *small_sets, "--steps", "4"]
    for workers in "02":
        train.main([*words, "--out", workers, "--workers", workers])
        assert same_state("0", workers)


@pytest.mark.parametrize("workers", ["0", "2"])
def test_a_picture_that_breaks_is_named_in_one_line(small_sets, capsys, workers):
    Path("T/b.png").write_bytes(b"no picture")
    line = failing([*SMALL, *SHORT, *small_sets, "--workers", workers], capsys)
    assert "T/b.png" in line


def test_the_best_network_is_kept_beside_the_last(small_sets, monkeypatch, capsys):
    def score(*values: float) -> None:
        scores = iter(values)
        monkeypatch.setattr(validation, "each_psnr", lambda *_: [next(scores)])

    def kept(name: str) -> tuple[int, float]:
        info = load_model(Path("runs/train", name)).info
        return info["step"], info["val_psnr"]

    score(20.0, 30.0, 25.0)
    train.main([*SMALL, *SHORT, *small_sets])
    assert kept("best.safetensors") == (4, 30)
    assert kept("model.safetensors") == (6, 25)
    assert "best.safetensors, of step 4 " in capsys.readouterr().out
    score(30.0)  # no better
    train.main([*small_sets[-2:], "--resume", "--steps", "8"])
    assert kept("best.safetensors") == (4, 30)
    score(30.5)
    train.main([*small_sets[-2:], "--resume", "--steps", "10"])
    assert kept("best.safetensors") == kept("model.safetensors") == (10, 30.5)


def test_norms_of_clipped_gradients_are_logged(small_sets):
    words = [*SMALL, *SHORT, *small_sets, "--steps", "2"]
    train.main(words)
    assert "norm" not in rows("runs/train")[0]
    train.main([*words, "--clip", "1", "--out", "clipped"])
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


def test_a_full_disk_leaves_the_checkpoint_whole(small_sets, monkeypatch, capsys):
    words = [*SMALL, *SHORT, *small_sets]
    more = ["--resume", *small_sets[-2:], "--steps", "4"]
    train.main([*words, "--steps", "2"])
    state, replace = Path("runs/train/state.safetensors"), os.replace
    for file in ("model", "best", "state"):
        full = state.with_stem(file)
        before = [path.read_bytes() for path in (full, state)]

        def fail(source, target, full=full):
            if target == full:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            replace(source, target)

        with monkeypatch.context() as patched:
            patched.setattr(os, "replace", fail)
            patched.setattr(validation, "each_psnr", lambda *_: [1e3])  # the best so far
            line = failing(more, capsys)
        assert line.startswith(f"error: {full}: No space left on device")
        assert before == [path.read_bytes() for path in (full, state)]
        assert not list(state.parent.glob(".*"))
    train.main(more)
    train.main([*words, "--steps", "4", "--out", "straight"])
    assert same_state("straight", "runs/train")


def test_training_improves_on_the_input(small_sets):
    words = [*SMALL, *small_sets, "--batch-size", "4", "--patch-size", "24"]
    train.main([*words, "--steps", "80", "--val-every", "80", "--lr", "4e-3"])
    train.main([*words, "--steps", "1", "--val-every", "1", "--lr", "1e-9", "--out", "input"])
    assert rows("runs/train")[-1]["val_psnr"] > rows("input")[-1]["val_psnr"] + 0.05


def test_describe_prints_one_object_and_stops(capsys):
    train.main(["--describe", "--preset", "paper", "--task", "sr", "--arch", "none"])
    size = json.loads(capsys.readouterr().out)
    assert size["params"] == 40_729_627
    assert size["macs_48x48"] == pytest.approx(93.97e9, rel=0.002)
    assert size["attention_macs_48x48"] == 0
    assert size["positions"] == []
    assert not Path("runs").exists()


def test_the_built_in_set_and_the_protocol_are_named(capsys):
    train.main([*SMALL, *SHORT, "--data", "somewhere", "--steps", "1"])
    err = capsys.readouterr().err
    assert "--train-set NAME" in err
    assert "at most 256 × 256 pixels; car q10: Y" in err


def test_a_resumed_run_goes_on_as_it_was_begun(small_sets):
    words = [*SMALL, *SHORT, *small_sets, "--steps", "2"]
    train.main(words)
    with pytest.raises(UsageError, match="already holds a run"):
        train.main(words)
    for given in ("--width 8", "--no-ema", "--q 10", "--preset tiny", "--arch none", "--epochs 1"):
        flag = given.split()[0].replace("no-", "")
        with pytest.raises(UsageError, match=f"leave out {flag}; it takes --out, .*--steps"):
            train.main(["--resume", *given.split()])
    with pytest.raises(UsageError, match="--steps 1: the run is at step 2"):
        train.main(["--resume", "--steps", "1"])
    more = ["--resume", "--data", ".", "--device", "cpu", "--workers", "0", "--steps", "3"]
    train.main(more)
    assert [row["step"] for row in rows("runs/train")] == [2, 3]
    Path("T/a.png").write_bytes(Path("T/b.png").read_bytes())
    with pytest.raises(DataError, match="pictures for train are not those"):
        train.main(more)


def test_a_state_of_an_earlier_version_is_resumed_to_the_bit(small_sets):
    words = [*SMALL, *SHORT, *small_sets]
    train.main([*words, "--steps", "4", "--out", "straight"])
    train.main([*words, "--steps", "2", "--out", "early"])
    state = Path("early/state.safetensors")
    tensors, progress = load_state(state)
    earlier = {new: old for old, new in RENAMED.items()}
    for part, fields in progress["plan"].items():
        progress["plan"][part] = {earlier.get(name, name): v for name, v in fields.items()}
    assert "rate" in progress["plan"]["train"]
    flags = {"preset": "tiny", "arch": "paper", "inherit": None, "init": None}
    save_state(state, tensors, progress | {"flags": flags, "loss": 3.0, "rate": 2e-3})
    train.main(["--resume", "--data", ".", "--out", "early", "--steps", "4"])
    assert same_state("straight", "early")


def test_exit_status_and_one_line_errors(capsys):
    command = [sys.executable, ROOT / "train.py", "--train-set", "DIV2K"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines()[-1].startswith("error: set 'DIV2K' needs a folder")
    with pytest.raises(SystemExit) as exit:
        cli.run(train.main, ["--task", "car", "--scale", "2"])
    assert exit.value.code == 2
    assert "error: --scale belongs to --task sr" in capsys.readouterr().err


def test_a_loss_that_is_not_finite_stops_with_its_step_and_pictures(
    small_sets, monkeypatch, capsys
):
    train.main([*SMALL, *SHORT, *small_sets, "--steps", "3", "--val-every", "3"])
    before = {path.name: path.read_bytes() for path in Path("runs/train").iterdir()}
    step, nan = Trainer.step, float("nan")

    def lose(self, number, *given):
        step(self, number, *given)
        if number == 4:
            self.losses[-1] *= nan

    def explode(self, number, *given):  # the gradient was too long
        if number == 4:
            torch.nn.init.constant_(self.model.head[0].weight, nan)
        step(self, number, *given)

    sampler = PatchSampler(Pictures(sorted(Path("T").iterdir())), Task("car", 10), 16, 2)
    for diverge in (lose, explode):
        monkeypatch.setattr(Trainer, "step", diverge)
        line = failing(["--resume", *small_sets[-2:], "--steps", "6"], capsys)
        assert "the loss is nan in step 5, patches 8 to 9, of " in line
        assert "the last good checkpoint is runs/train/state.safetensors of step 3" in line
        assert ", ".join(sampler.names(4)) in line
        assert {path.name: path.read_bytes() for path in Path("runs/train").iterdir()} == before


def test_a_state_that_is_cut_short_or_of_another_version_is_refused(small_sets, capsys):
    train.main([*SMALL, *SHORT, *small_sets])
    state = Path("runs/train/state.safetensors")
    tensors, progress = load_state(state)
    del progress["plan"]["train"]["clip"]
    save_state(state, tensors, progress)
    line = failing(["--resume", *small_sets[-2:]], capsys)
    assert line.startswith(f"error: {state}: the plan inside is not valid")
    assert line.endswith("fields: clip; start over with --out DIR")
    state.write_bytes(state.read_bytes()[:-100])
    before = {path.name: path.read_bytes() for path in Path("runs/train").iterdir()}
    line = failing(["--resume", *small_sets[-2:]], capsys)
    assert line.startswith("error: runs/train/state.safetensors: not a whole safetensors file")
    assert {path.name: path.read_bytes() for path in Path("runs/train").iterdir()} == before


def test_a_folder_that_cannot_be_made_is_reported_before_training(small_sets, monkeypatch, capsys):
    monkeypatch.setattr(Trainer, "step", lambda *_: pytest.fail("trained"))
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
    assert seen[0] == ("runs/train/tensorboard", 1)
    assert set(seen[1:-1]) == set(named)
    assert seen[-1] == "flush"
