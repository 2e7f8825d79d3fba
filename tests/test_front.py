"""search.py --method front: fair sampling, elimination, the choice; train.py --budget."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from searching import SHORT, SMALL, elsewhere  # noqa: F401

import search
import train
from acla.config import ModelConfig, Task
from acla.errors import UsageError
from acla.models.serialization import load_model
from acla.search import front, loop
from acla.search.architecture import Architecture, Candidate, macs, read_architecture

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def few_patches(monkeypatch):
    monkeypatch.setattr(loop, "PATCHES", 4)
    monkeypatch.setattr(front, "SECONDS", 0.0)


def test_two_steps_train_every_module_once_and_every_size_is_drawn():
    sizes = set()
    for step in range(0, 200, 2):
        first, second = (front.fair_gates(5, 3, s, CPU) for s in (step, step + 1))
        assert torch.equal(first + second, torch.ones(5))
        sizes.add(int(first.sum()))
    assert sizes == set(range(6))


def test_elimination_drops_what_costs_least():
    worth = {1: 0.1, 2: 0.5, 3: -0.2, 4: 0.3}
    chain = front.eliminate((1, 2, 3, 4), lambda at: np.array([sum(worth[p] for p in at)]))
    assert [positions for positions, _ in chain] == [(1, 2, 3, 4), (1, 2, 4), (2, 4), (2,), ()]


@pytest.mark.parametrize(
    ("budget", "noise", "chosen"),
    [(None, 0.0, (2, 3)), (None, 5.0, ()), (1, 0.0, (2,)), (0, 0.0, ())],
    ids=["best", "cheapest-within-an-error", "one-module", "nothing-fits"],
)
def test_the_front_has_no_network_worse_than_a_cheaper_one(monkeypatch, budget, noise, chosen):
    worth, noises = {1: -0.1, 2: 0.5, 3: 0.3}, np.array([-1.0, 1.0, 0.0]) * noise

    def psnr(net, batches, processes, at):
        return 30 + sum(worth[p] for p in at) + len(at) * noises

    monkeypatch.setattr(front, "patch_psnr", psnr)
    net = front.Supernet(ModelConfig(blocks=3, width=4, keys=2, channels=1))
    limit = None if budget is None else macs(net.config, budget)
    best, points = front.search_front(net, [], None, "macs", limit)
    assert [one.positions for one in points] == [(), (2,), (2, 3)]
    assert [one.macs for one in points] == [macs(net.config, n) for n in range(3)]
    assert best.positions == chosen


def test_train_takes_the_best_network_within_a_budget(capsys):
    words = [*SMALL, *SHORT, "--method", "front", "--cost", "ms"]
    search.main(words)
    shown = capsys.readouterr()
    assert "undecided" not in shown.err
    first = [line.split()[1] for line in shown.out.splitlines() if line.startswith("| ")]
    assert first[-5:] == ["network", "-------", "none", "found", "dense"]
    assert first[0] == "multiply-adds"  # of the front's networks
    found = read_architecture(Path("runs/search/arch.json"))
    assert load_model(Path("runs/search/model.safetensors")).config == found.model
    assert all(one.ms > 0 for one in found.front)
    assert found.alpha == (0, 0, 0)
    for one in found.front:
        train.main(["--arch", "runs/search/arch.json", "--budget", str(one.macs), "--describe"])
        described = json.loads(capsys.readouterr().out)
        allowed = [o for o in found.front if o.macs <= one.macs]
        assert described["positions"] == list(max(allowed, key=lambda o: o.psnr).positions)
        assert described["attention_macs_48x48"] <= one.macs


def test_a_resumed_front_equals_a_straight_one():
    words = [*SMALL, *SHORT, "--method", "front"]
    search.main([*words, "--out", "straight"])
    search.main([*words, "--out", "again"])
    Path("again/arch.json").unlink()
    search.main(["--resume", "--out", "again"])
    one, other = (read_architecture(Path(name, "arch.json")) for name in ("straight", "again"))
    assert one.front == other.front
    assert one.model == other.model


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--arch", "none", "--budget", "1e6"], "--budget goes with a front"),
        (["--arch", "arch.json", "--budget", "5"], "cheapest network of the front has 10"),
        (["--arch", "old.json", "--budget", "5"], "front is missing.*--method front"),
    ],
)
def test_a_budget_without_a_network_is_refused(words, message):
    model = ModelConfig(blocks=2, width=4, keys=2, channels=1)
    points = (Candidate((1,), 30.0, 10), Candidate((1, 2), 31.0, 20, 0.5))
    for name, own in (("arch.json", points), ("old.json", ())):
        written = Architecture(Task(), model, 0.1, 0, (0.0, 0.0), 1.0, 16, {}, own)
        Path(name).write_text(written.to_json())
        assert read_architecture(Path(name)) == written
    with pytest.raises(UsageError, match=message):
        train.main([*words, "--preset", "tiny", "--describe"])


def test_a_front_has_no_cross_validation():
    with pytest.raises(UsageError, match="--lambda auto is for --method paper"):
        search.main([*SMALL, *SHORT, "--method", "front", "--lambda", "auto"])
