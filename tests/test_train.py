"""train.py as a user calls it."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import search
import train
from acla.checkpoint import load_model, load_state, save_state
from acla.config import Task
from acla.errors import DataError, UsageError

ROOT = Path(__file__).parents[1]
SMALL = ["--preset", "tiny", "--blocks", "3", "--width", "8", "--keys", "3", "--positions", "1,3"]
SHORT = ["--batch", "2", "--patch", "16", "--steps", "6", "--validate", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in a folder of its own, where runs/ begins empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ACLA_DATA", raising=False)


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "train.jsonl").read_text().splitlines()]


def same_state(one: str, other: str) -> bool:
    (a, _), (b, _) = (load_state(Path(folder, "state.safetensors")) for folder in (one, other))
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    ("words", "task"),
    [
        (["--task", "car", "--q", "20"], Task("car", 20)),
        (["--task", "denoise", "--sigma", "50", "--channels", "1"], Task("denoise", 50)),
        (["--task", "demosaic"], Task("demosaic", 0)),
        (["--task", "sr", "--scale", "3"], Task("sr", 3)),
        (["--task", "sr", "--backbone", "rcan", "--group-blocks", "1"], Task("sr", 2)),
    ],
    ids=["car", "denoise-gray", "demosaic", "sr3", "sr2-rcan"],
)
def test_every_task_trains_and_its_network_comes_back(words, task):
    train.main([*SMALL, *SHORT, *words])
    found = load_model(Path("runs/train/model.safetensors"))
    assert found.task == task
    assert found.config.positions == (1, 3)
    assert [row["step"] for row in rows("runs/train")] == [2, 4, 6]
    assert all(row["val_psnr"] > 5 for row in rows("runs/train"))


@pytest.mark.parametrize("words", [[], ["--ema"], ["--amp"]], ids=["plain", "ema", "amp"])
def test_a_resumed_run_equals_a_straight_one_to_the_bit(words):
    train.main([*SMALL, *SHORT, *words, "--out", "straight"])
    train.main([*SMALL, *SHORT, *words, "--out", "parts", "--steps", "2"])
    train.main(["--out", "parts", "--resume", "--steps", "6"])
    assert same_state("straight", "parts")
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in ("straight", "parts")]
    assert timeless[0] == timeless[1]


def test_a_killed_run_resumes_to_the_bit():
    words = [*SMALL, *SHORT, "--steps", "40", "--validate", "3"]
    command = [sys.executable, ROOT / "train.py", *words, "--out", "killed"]
    threads = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    quiet = {"stderr": subprocess.DEVNULL, "stdout": subprocess.DEVNULL}
    process = subprocess.Popen(command, env=threads, **quiet)
    state = Path("killed/state.safetensors")
    while not state.is_file() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    train.main(["--out", "killed", "--resume"])
    train.main([*words, "--out", "straight"])
    assert same_state("straight", "killed")
    assert len(rows("killed")) == 14


def test_training_improves_on_the_input():
    train.main([*SMALL, "--steps", "120", "--validate", "60", "--batch", "4", "--patch", "32"])
    plain = [*SMALL, *SHORT, "--steps", "1", "--validate", "1", "--rate", "1e-9", "--out", "input"]
    train.main(plain)
    assert rows("runs/train")[-1]["val_psnr"] > rows("input")[-1]["val_psnr"] + 0.1


def test_describe_prints_one_object_and_stops(capsys):
    train.main(["--describe", "--preset", "paper", "--task", "sr", "--arch", "none"])
    size = json.loads(capsys.readouterr().out)
    assert size["params"] == 40_729_627
    assert size["macs_48x48"] == pytest.approx(93.97e9, rel=0.002)
    assert size["attention_macs_48x48"] == 0
    assert size["positions"] == []
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        (["--resume"], UsageError, "holds no state"),
        (["--positions", "3,99"], UsageError, "do not fit"),
        (["--task", "sr", "--q", "10"], UsageError, "--q belongs"),
        (["--device", "cuda"], UsageError, "no CUDA device"),
        (["--seed", "9" * 30], UsageError, "--seed must be 0 or more and below"),
        (["--train-set", "DIV2K"], DataError, "--data DIR"),
        (["--train-set", "DIV2K", "--data", "nowhere"], DataError, "nowhere is no folder"),
        (["--arch", "nowhere.json"], Exception, "no such file"),
    ],
)
def test_wrong_calls_say_what_to_do_and_leave_nothing(words, error, message):
    if "cuda" in words and torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(error, match=message):
        train.main([*words, "--preset", "tiny"])
    assert not Path("runs").exists()


def test_inheriting_begins_with_the_supernets_weights():
    search.main([*SMALL[:-2], "--batch", "2", "--patch", "16", "--steps", "4", "--lambda", "0"])
    found = load_model(Path("runs/search/model.safetensors"))
    still = ["--rate", "1e-30", "--batch", "2", "--patch", "16", "--steps", "1", "--ema"]
    train.main(["--inherit", *still])
    trained = load_model(Path("runs/train/model.safetensors"))
    assert trained.config == found.config
    ours, theirs = trained.model.state_dict(), found.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for words, message in (
        (["--inherit", "--arch", "paper"], "--inherit goes with a searched architecture"),
        (["--inherit", "--keys", "5"], "holds another network"),
    ):
        with pytest.raises(UsageError, match=message):
            train.main([*words, *still, "--out", "other"])
    assert not Path("other").exists()


def test_unknown_backends_are_refused(monkeypatch):
    monkeypatch.setenv("ACLA_BACKEND", "nope")
    with pytest.raises(UsageError, match="ACLA_BACKEND names no backend: 'nope'"):
        train.main([*SMALL, *SHORT])
    assert not Path("runs").exists()


def test_pictures_that_are_not_used_are_told_of(capsys):
    train.main([*SMALL, *SHORT, "--data", "somewhere"])
    assert "--train-set NAME takes a set of somewhere" in capsys.readouterr().err


def test_a_resumed_run_goes_on_as_it_was_begun():
    train.main([*SMALL, *SHORT])
    with pytest.raises(UsageError, match="already holds a run"):
        train.main([*SMALL, *SHORT])
    with pytest.raises(UsageError, match="--width 8"):
        train.main(["--resume", "--width", "9"])
    with pytest.raises(UsageError, match="begun with --preset tiny, not small"):
        train.main(["--resume", "--preset", "small"])
    with pytest.raises(UsageError, match="begun with --arch None, not none"):
        train.main(["--resume", "--arch", "none"])
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
