"""search.py as a user calls it, and what its loss does to the gates."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from searching import SHORT, SMALL, elsewhere  # noqa: F401

import evaluate
import search
import train
from acla.config import Task
from acla.errors import Stopped, UsageError
from acla.models.serialization import load_model, load_state
from acla.search.architecture import read_architecture
from acla.search.loop import Search, search_sets

ROOT = Path(__file__).parents[1]


def rows(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "search.jsonl").read_text().splitlines()]


def final_alpha(*words: str) -> list[float]:
    search.main([*SMALL, *SHORT, *words])
    return rows("runs/search")[-1]["alpha"]


def test_the_chain_runs_with_its_defaults(capsys):
    words = ["--task", "car", "--q", "30", "--seed", "4", "--train-set", "sample"]
    search.main([*SMALL, *SHORT, *words, "--epoch-steps", "4"])
    assert "positions:" in capsys.readouterr().out
    found = read_architecture(Path("runs/search/arch.json"))
    assert (found.task, found.seed, found.lam) == (Task("car", 30), 4, pytest.approx(0.02))
    assert found.model.positions == tuple(j for j, a in enumerate(found.alpha, 1) if a > 0)
    log = rows("runs/search")
    assert [(row["epoch"], row["step"]) for row in log] == [(1, 4), (2, 8)]
    assert log[0]["alpha"] == [0, 0, 0]  # the first stage leaves α alone
    assert all(a != 0 for a in log[-1]["alpha"])
    assert log[-1]["tau"] == pytest.approx(0.1)

    train.main(["--batch-size", "2", "--patch-size", "16", "--steps", "2", "--device", "cpu"])
    trained = load_model(Path("runs/train/model.safetensors"))
    assert (trained.task, trained.config) == (found.task, found.model)
    capsys.readouterr()
    evaluate.main(["--dataset", "sample", "--json", "-"])
    scored = json.loads(capsys.readouterr().out)["results"][0]
    assert scored["setting"] in ("q30", 30)
    assert scored["mean"]["psnr"] > 20


@pytest.mark.parametrize(
    "words",
    [
        ["--task", "sr", "--scale", "2"],
        ["--task", "sr", "--backbone", "rcan", "--group-blocks", "1"],
        ["--task", "denoise"],
        ["--task", "demosaic"],
    ],
    ids=["sr", "sr-rcan", "denoise", "demosaic"],
)
def test_every_task_and_backbone_is_searched(words):
    search.main([*SMALL, *SHORT, *words])
    found = read_architecture(Path("runs/search/arch.json"))
    derived = load_model(Path("runs/search/model.safetensors"))
    assert derived.config == found.model


def test_a_large_lambda_shuts_every_gate_and_lowers_cost():
    words = ["--alpha-lr", "0.5", "--steps", "30", "--epoch-steps", "6", "--warmup", "0.2"]
    assert max(final_alpha(*words, "--lambda", "1e6")) < -1
    assert read_architecture(Path("runs/search/arch.json")).model.positions == ()
    costs = [row["cost"] for row in rows("runs/search")]
    assert costs == sorted(costs, reverse=True)
    assert costs[-1] < costs[0] / 2


def test_without_a_gradient_from_the_picture_zero_lambda_leaves_alpha():
    # Fresh output convolutions are zero: at a rate of nearly 0 the picture says nothing of a gate.
    quiet = ["--lr", "1e-30", "--lambda", "0"]
    assert final_alpha(*quiet) == pytest.approx([0, 0, 0], abs=1e-3)
    costs = [row["cost"] for row in rows("runs/search")]
    assert costs[-1] == pytest.approx(costs[0], rel=0.02)  # the masks' density moves a little


def test_a_resumed_search_equals_a_straight_one_to_the_bit(monkeypatch):
    search.main([*SMALL, *SHORT, "--out", "straight"])
    step = Search.weight_step

    def interrupted(self, number):
        if number == 5:
            monkeypatch.setattr(Search, "weight_step", step)
            raise KeyboardInterrupt
        return step(self, number)

    monkeypatch.setattr(Search, "weight_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        search.main([*SMALL, *SHORT, "--out", "parts"])
    search.main(["--out", "parts", "--resume"])
    require_same_search("straight", "parts")


@pytest.mark.parametrize("number", [4, 5], ids=["within an epoch", "at its end"])
def test_a_search_that_is_stopped_loses_nothing(number, monkeypatch):
    search.main([*SMALL, *SHORT, "--out", "straight"])
    learn = Search.step

    def stopped(self, step):
        if step == number:
            os.kill(os.getpid(), signal.SIGINT)
        return learn(self, step)

    monkeypatch.setattr(Search, "step", stopped)
    with pytest.raises(Stopped, match=f"stopped after step {number + 1}; --resume"):
        search.main([*SMALL, *SHORT, "--out", "parts"])
    monkeypatch.setattr(Search, "step", learn)
    assert load_state(Path("parts/supernet.safetensors"))[1]["step"] == number + 1
    search.main(["--out", "parts", "--resume"])
    require_same_search("straight", "parts")


def require_same_search(one: str, other: str) -> None:
    """State and log of two folders are equal, but for the time."""
    (a, _), (b, _) = (load_state(Path(f, "supernet.safetensors")) for f in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in (one, other)]
    assert timeless[0] == timeless[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "demosaic", "--channels", "1"], "demosaic has 3 by its protocol"),
        (["--lambda", "-1"], "--lambda must be 0 or more"),
        (["--resume"], "holds no plan"),
        (["--warmup", "1"], "--warmup must be"),
    ],
)
def test_wrong_calls_say_what_to_do_and_leave_nothing(words, message):
    with pytest.raises(UsageError, match=message):
        search.main([*words, "--preset", "tiny"])
    assert not Path("runs").exists()


def test_weights_and_alpha_see_disjoint_pictures():
    sets = search_sets("sample", None)
    assert sets.weights
    assert sets.alpha
    assert not set(sets.weights) & set(sets.alpha)


@pytest.mark.slow
def test_a_killed_search_resumed_equals_a_straight_one_to_the_bit():
    words = [*SMALL, *SHORT, "--steps", "40"]
    search.main([*words, "--out", "straight"])
    command = [sys.executable, str(ROOT / "search.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    log = Path("killed/search.jsonl")
    child = subprocess.Popen(
        [*command, *words, "--out", "killed"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text().count("\n") >= 12):
        assert child.poll() is None, "the search ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.01)
    child.kill()
    child.wait()
    assert len(rows("killed")) < 20
    done = subprocess.run(
        [*command, "--out", "killed", "--resume"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (a, _), (b, _) = (load_state(Path(f, "supernet.safetensors")) for f in ("straight", "killed"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert read_architecture(Path("straight/arch.json")) == read_architecture(
        Path("killed/arch.json")
    )
