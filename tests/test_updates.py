"""The learning of a network's parts."""

import json
import math

import pytest
import torch

from acla.analysis import updates
from acla.config import ModelConfig
from acla.errors import UsageError
from acla.models.attention import rings
from acla.models.backbones import Backbone

FLAGS = ["--preset", "tiny", "--task", "demosaic", "--blocks", "2", "--width", "4", "--keys", "3"]
FLAGS += ["--batch-size", "2", "--patch-size", "16", "--device", "cpu", "--positions", "1,2"]
NET = Backbone(ModelConfig(blocks=2, width=4, keys=3, positions=(1, 2)))


def test_every_weight_belongs_to_one_part():
    parts = updates.weights_of(NET)
    assert set(parts) == {"backbone", "offsets", "logits", "values g", "masks", "output h"}
    trained = sum(p.numel() for p in NET.parameters() if p.requires_grad)
    assert sum(len(part) for part in parts.values()) == trained
    assert len(parts["offsets"]) == 2 * len(parts["logits"]) == 3 * 2 * 3 * (4 + 1)
    rings_of_all = rings(3, 2.0).norm().square() * 3
    assert parts["offsets"].square().sum() == pytest.approx(rings_of_all.item())


def test_updates_and_gradients_of_the_last_steps_are_measured():
    window = updates.StepStatistics({"a": torch.tensor([3.0, 4.0])})
    window.before = {"a": torch.tensor([3.0, 5.0])}
    window.gradients = [{"a": torch.tensor([1.0, 0.0])}, {"a": torch.tensor([0.0, 1.0])}]
    window.updates = [{"a": torch.tensor([0.0, 0.5])}] * 2
    (row,) = window.rows()
    size = math.sqrt(34 / 2)
    assert row["weights"] == pytest.approx(size)
    assert row["agreement"] == pytest.approx(1 / math.sqrt(2))
    assert row["gradient"] == pytest.approx(math.sqrt(0.5))
    assert row["update"] == pytest.approx(math.sqrt(0.125) / size)
    assert row["moved"] == pytest.approx(math.sqrt(0.5) / size)


def test_keys_that_move_alike_have_no_spread():
    net = Backbone(NET.config)
    with torch.no_grad():
        net.attention["2"].points.bias[:3] += 3  # dy of layer 1's keys
        net.attention["2"].points.weight.zero_()
        net.attention["2"].points.bias[6:9] = torch.tensor([50.0, 0, 0])  # one key has all weight
        net.attention["1"].mask_bias.fill_(-1)
    first, second = updates.key_rows(net, torch.rand(3, 7, 5))
    assert (first["module"], second["module"]) == (1, 2)
    assert second["moved_px"] == pytest.approx(1.5)  # of one layer of two
    still = first["moved_px"], first["spread_px"], second["spread_px"]
    assert still == pytest.approx((0, 0, 0), abs=1e-5)
    assert second["effective_keys"] < 3 > first["effective_keys"] > 1
    assert (first["kept"], second["kept"]) == (0, 1)


def test_the_command_prints_and_writes_its_rows(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    steps = ["--steps", "3", "--val-every", "3", "--json", str(path)]
    with pytest.raises(UsageError, match="--val-every 3: give more than"):
        updates.main([*FLAGS, *steps])
    updates.main([*FLAGS, "--steps", "42", "--val-every", "21", *steps[-2:]])
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows] == [21] * 8 + [42] * 8
    moved = {row["part"]: row["moved"] for row in rows[:6]}
    assert all(0 < value < 2 for value in moved.values())
    assert moved["output h"] == pytest.approx(1)  # it begins at zero
    printed = capsys.readouterr().out
    assert printed.count("| offsets ") == 2
    assert printed.count("kept") == 1
