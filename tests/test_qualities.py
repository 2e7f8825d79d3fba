"""The gain over JPEG quality, measured through the command."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from restoring import tiny, write_network

from acla.analysis import qualities
from acla.config import Task
from acla.models.serialization import save_model
from acla.restore import pretrained

ROOT = Path(__file__).parents[1]


@pytest.fixture
def data(tmp_path, monkeypatch, make_scene):
    """A set of a gray and a colour picture, and a network that adds `shift`."""
    for name, channels in (("a", 1), ("b", 3)):
        (tmp_path / "Mine").mkdir(exist_ok=True)
        Image.fromarray(make_scene(45, 61, channels)).save(tmp_path / f"Mine/{name}.png")
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path,))

    def provide(shift: float) -> list[str]:
        write_network(tmp_path / "net.safetensors", Task("car", 5, 60), shift)
        return ["--dataset", "Mine", "--data", str(tmp_path), "--device", "cpu"]

    return provide


def test_a_network_that_changes_nothing_gains_nothing(tmp_path, capsys, data):
    pytest.importorskip("matplotlib", reason="needs the extra report")
    files = ["--json", str(tmp_path / "r.json"), "--plot", str(tmp_path / "r.png")]
    qualities.main([*data(0), "--q", "10", "90", *files])
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [row["quality"] for row in rows] == [10, 90]
    for row in rows:
        assert row["jpeg"].keys() == {"Mine-a", "Mine-b"}
        assert qualities.gains(row) == pytest.approx([0, 0], abs=0.1)
    flags = ["--q", "10", "--suffix", ".jpg", "--json", "-"]
    told = capsys.readouterr().out
    qualities.main([*data(0), *flags])
    again = json.loads(capsys.readouterr().out)["rows"][0]
    assert again["jpeg"] == rows[0]["jpeg"]
    assert qualities.gains(again) != qualities.gains(rows[0])
    lines = told.splitlines()
    assert lines[0] == "2 pictures of Mine"
    assert [line.split("|")[1].strip() for line in lines[4:]] == ["10", "90"]
    assert np.asarray(Image.open(tmp_path / "r.png")).std() > 1


def test_projection_keeps_what_a_bad_network_would_lose(tmp_path, capsys, data):
    loss = {}
    for flag in ("--project", "--no-project"):
        qualities.main([*data(0.2), "--q", "95", "--crop", "32", "--json", "-", flag])
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        loss[flag] = min(qualities.gains(row))
    assert loss["--no-project"] < -10
    assert loss["--project"] > -1


def test_a_network_of_colour_is_scored_on_rgb(tmp_path, capsys, data):
    flags = [*data(0), "--rgb", "--checkpoint", str(tmp_path / "net.safetensors"), "--json", "-"]
    model = tiny(Task("car", 5, 60), channels=3)
    model.tail[-1].bias.data = torch.tensor([40.0, 0.0, -40.0]) / 255
    save_model(tmp_path / "net.safetensors", model, model.config, Task("car", 5, 60), {})
    gain = {}
    for extra in ([], ["--no-project"]):
        qualities.main([*flags, "--q", "50", *extra])
        (row,) = json.loads(capsys.readouterr().out)["rows"]
        gain[bool(extra)] = qualities.gains(row)[1]
    assert gain[True] < gain[False] - 1
    assert gain[False] > -1


@pytest.mark.parametrize("name", ["qualities", "qualities-jpeg"])
def test_the_table_of_the_document_is_the_measured_one(name):
    text = (ROOT / f"results/{name}.json").read_text(encoding="utf-8")
    rows = json.loads(text)["rows"]
    assert qualities.gains_table(rows) in (ROOT / "docs/restoring.md").read_text(encoding="utf-8")
    assert min(min(qualities.gains(row)) for row in rows) > -0.05
