"""search.py as a user calls it, and what its loss does to the gates."""

import json
import os
import signal
from collections.abc import Callable
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


def test_a_search_that_is_stopped_or_interrupted_loses_nothing(monkeypatch):
    search.main([*SMALL, *SHORT, "--out", "straight"])
    learn = Search.step

    def resumed(out: str, act: Callable[[], object], at: int, error: type, match: str) -> None:
        def step(self, number):
            if number == at:
                act()
            return learn(self, number)

        with monkeypatch.context() as patch:
            patch.setattr(Search, "step", step)
            with pytest.raises(error, match=match):
                search.main([*SMALL, *SHORT, "--out", out])
        if error is Stopped:
            assert load_state(Path(out, "supernet.safetensors"))[1]["step"] == at + 1
        search.main(["--out", out, "--resume"])
        require_same_search("straight", out)

    def interrupt():
        raise KeyboardInterrupt  # as a kill, after which nothing is written

    def ask():
        os.kill(os.getpid(), signal.SIGINT)

    resumed("interrupted", interrupt, 5, KeyboardInterrupt, "^$")
    for at in (4, 5):  # within an epoch, and at its end
        resumed(f"stopped-{at}", ask, at, Stopped, f"stopped after step {at + 1}; --resume")


def require_same_search(one: str, other: str) -> None:
    """State and log of two folders are equal, but for the time."""
    (a, _), (b, _) = (load_state(Path(f, "supernet.safetensors")) for f in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    timeless = [[{**row, "seconds": 0} for row in rows(f)] for f in (one, other)]
    assert timeless[0] == timeless[1]
    found, expected = (read_architecture(Path(f, "arch.json")) for f in (one, other))
    assert found == expected


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
