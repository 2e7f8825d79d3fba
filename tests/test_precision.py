"""How far short formats move PSNR: what is scored, and that nothing but the format changes."""

import json
from pathlib import Path

import torch
from restoring import CAR, DOUBLE, tiny

from acla.analysis import precision
from acla.config import Task
from acla.data.datasets import sample_set
from acla.models.serialization import Checkpoint, load_model, save_model
from acla.restore import pretrained


def written(path: Path, task: Task) -> Checkpoint:
    """A network whose answer is more than its input, in a file and read from it."""
    model = tiny(task)
    torch.nn.init.normal_(model.tail[-1].weight, std=0.02)
    save_model(path, model, model.config, task, {})
    return load_model(path)


def test_a_range_is_scored_at_its_ends_and_at_the_usual_setting():
    assert precision.tasks(Task("sr", 3)) == [Task("sr", 3)]
    assert [task.setting for task in precision.tasks(Task("car", 5, 60))] == [5, 10, 60]
    assert [task.setting for task in precision.tasks(Task("denoise", 40, 55))] == [40, 55]
    assert [task.setting for task in precision.tasks(Task("denoise", 0, 30))] == [1, 30]


def test_every_network_of_the_package_on_the_sets_of_its_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(precision, "SETS", {"car": ("sample",), "sr": ("sample",)})
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path,))
    for task in (CAR, DOUBLE):
        written(tmp_path / f"{task.name}.safetensors", task)
    precision.main(["--crop", "33", "--json", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["network"], row["task"]) for row in rows] == [("car", "car q10"), ("sr", "sr x2")]
    for row in rows:
        assert row["least"] <= row["change"] <= row["most"]
        assert row["least"] < row["most"]
        assert abs(row["change"]) < 0.1
    out = capsys.readouterr().out
    assert f"{rows[0]['change']:+.4f}" in out
    monkeypatch.setattr(precision, "SETS", {})
    named = ["--checkpoint", str(tmp_path / "sr.safetensors"), "--dataset", "sample"]
    precision.main([*named, "--crop", "33", "--json", str(tmp_path / "one.jsonl")])
    assert json.loads((tmp_path / "one.jsonl").read_text()) == rows[1]


def test_without_a_short_format_nothing_changes(tmp_path):
    network, paths = written(tmp_path / "car.safetensors", CAR), sample_set("test")
    score = [precision.psnrs(network, CAR, name, paths, 24) for name in ("fp32", "fp32", "bf16")]
    assert score[0] == score[1]
    assert score[0] != score[2]
    assert len(score[0]) == len(paths)
