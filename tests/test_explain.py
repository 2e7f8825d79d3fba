"""The command: its window, result and figures, and the calls it refuses."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from restoring import CAR, DOUBLE, MOSAIC, NOISE, write_network

from acla.analysis import explain
from acla.cli import run
from acla.config import ModelConfig, Task
from acla.data.degradations import generator_for, mosaic, pair
from acla.data.image import load
from acla.models.attention import rings
from acla.models.factory import build_network
from acla.models.serialization import load_model, save_model


def result(capsys: pytest.CaptureFixture, *argv: object) -> dict:
    """The result of a call in this process."""
    explain.main([*map(str, argv), "--device", "cpu", "--steps", "2", "--json", "-"])
    return json.loads(capsys.readouterr().out)


def failure(capsys: pytest.CaptureFixture, *argv: object) -> tuple[int, str]:
    """The exit status and the message of a call that must fail."""
    with pytest.raises(SystemExit) as stop:
        run(explain.main, [*map(str, argv), "--device", "cpu"])
    return stop.value.code, capsys.readouterr().err


def attentive(path: Path, task: Task) -> Path:
    return write_network(path, task, blocks=2, attention="acla", keys=4, positions=(1, 2))


@pytest.fixture
def picture(tmp_path, make_scene) -> Path:
    path = tmp_path / "in.png"
    Image.fromarray(make_scene(37, 30)).save(path)
    return path


# Where it looks


def test_the_window_is_where_detail_varies_most():
    torch.manual_seed(0)
    noisy = torch.full((1, 20, 26), 0.5) + 0.01 * torch.rand(1, 20, 26)
    noisy[0, 7:14, 12:19] += torch.rand(7, 7)
    padded = np.pad(noisy[0].double().numpy(), 1, mode="edge")
    blocks = np.lib.stride_tricks.sliding_window_view(padded, (3, 3))
    detail = noisy[0].double().numpy() - blocks.mean((2, 3))
    variance = np.lib.stride_tricks.sliding_window_view(detail, (7, 7)).var((2, 3))
    wanted = np.unravel_index(variance.argmax(), variance.shape)
    assert explain.most_varied(noisy, 7) == tuple(wanted)
    assert np.abs(np.array(wanted) - (7, 12)).max() <= 1
    assert explain.most_varied(torch.zeros(3, 9, 9), 4) == (0, 0)


@pytest.mark.parametrize("scale", [1, 2, 3])
@pytest.mark.parametrize("length", [6, 17, 40])
@pytest.mark.parametrize("crop", [4, 9, 30, 500])
def test_the_part_holds_the_window_and_begins_at_an_even_pixel(scale, length, crop):
    for side in range(2, min(crop, length * scale) + 1, 3):
        for start in range(length * scale - side + 1):
            first, last = explain.span(start, side, scale, length, crop)
            assert 0 <= first <= start // scale
            assert math.ceil((start + side) / scale) <= last <= length
            assert first % 2 == 0
            assert last - first <= max(crop // scale, math.ceil(side / scale) + 1) + 1
            assert last - first >= min(crop // scale, length) - 1


def test_numbers_are_in_pixels_of_the_whole_picture(tmp_path, capsys, picture):
    file = attentive(tmp_path / "sr.safetensors", DOUBLE)
    found = result(capsys, picture, "--checkpoint", file, "--at", 24, 20, "--crop", 20)
    assert (found["window"], found["query"]) == ([16, 12, 16], [24, 20])
    assert found["part"] == [6, 4, 10, 10]
    assert [(keys["position"], keys["layer"]) for keys in found["keys"]] == [(1, 1), (2, 1), (2, 2)]
    for keys in found["keys"]:  # those of new modules lie on rings
        offsets = torch.tensor([keys["y"], keys["x"]]) - torch.tensor([[12], [10]])
        torch.testing.assert_close(offsets, rings(4, 2.0), rtol=0, atol=1e-5)
        assert sum(keys["weight"]) == pytest.approx(1)
        assert keys["kept"] == [True] * 4
    assert [row["share"] for row in found["kept"]] == [1, 1, 1]
    assert found["branches"] == []
    assert found["task"] == "sr x2"


def test_the_input_is_evaluates(tmp_path, picture):
    for task in (NOISE, CAR, DOUBLE, MOSAIC):
        network = load_model(write_network(tmp_path / "n.safetensors", task))
        low, seen, same = explain.read_input(picture, network, as_is=False)
        wanted, target = pair(load(picture), task, generator_for("in"))
        assert torch.equal(low, wanted)
        assert torch.equal(seen, target)
        assert same == task


def test_a_range_of_qualities_is_drawn_once(tmp_path, picture):
    network = load_model(write_network(tmp_path / "n.safetensors", Task("car", 5, 60)))
    low, _, task = explain.read_input(picture, network, as_is=False)
    assert task.until == 0
    assert 5 <= task.setting <= 60
    assert torch.equal(low, pair(load(picture), task)[0])
    assert torch.equal(low, pair(load(picture), network.task, generator_for("in"))[0])


def test_a_mosaic_stays_one_when_it_is_cut(tmp_path, capsys, picture):
    file = write_network(tmp_path / "m.safetensors", MOSAIC)
    argv = [str(picture), "--checkpoint", str(file), "--crop", "16", "--window", "13", "9", "5"]
    scene = explain.find_scene(explain.parse(argv), load_model(file))
    assert scene.low.shape == (3, 16, 16)
    assert torch.equal(mosaic(scene.low), scene.low)
    assert "16×16 of 37×30 low-quality pixels" in capsys.readouterr().err
    y, x, side = scene.inner_window
    whole = pair(load(picture), MOSAIC)[0]
    assert torch.equal(scene.low[:, y : y + side, x : x + side], whole[:, 13:18, 9:14])


def test_a_degraded_picture_is_taken_as_it_is(tmp_path, capsys, picture):
    file = write_network(tmp_path / "sr.safetensors", DOUBLE)
    found = result(capsys, picture, "--checkpoint", file, "--as-is")
    assert found["part"] == [0, 0, 37, 30]
    y, x, side = found["window"]
    assert (y % 2, x % 2, side) == (0, 0, 16)
    assert 0 <= y <= 74 - 16
    assert 0 <= x <= 60 - 16
    network = load_model(file)
    low, seen, _ = explain.read_input(picture, network, as_is=True)
    assert torch.equal(low, load(picture))
    assert explain.most_varied(seen, 8) == (y // 2, x // 2)
    file = write_network(tmp_path / "m.safetensors", MOSAIC)
    status, err = failure(capsys, picture, "--checkpoint", file, "--as-is")
    assert status == 1
    assert "an ordinary photo" in err


# What it tells and writes


def test_it_tells_numbers_without_matplotlib(tmp_path, capsys, monkeypatch, picture):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    file = attentive(tmp_path / "car.safetensors", CAR)
    argv = [picture, "--checkpoint", file, "--steps", 2]
    status, err = failure(capsys, *argv, "--out", tmp_path / "figures")
    assert status == 2
    assert "pip install '.[report]'" in err
    assert not (tmp_path / "figures").exists()
    explain.main([*map(str, argv), "--json", str(tmp_path / "n.json"), "--device", "cpu"])
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "n.json").read_text())
    index = found["diffusion_index"]
    # The network is the identity, so that the window and what is next to it alone matter
    assert 0 < index < 100 * 17 * 17 / (37 * 30)
    assert f"diffusion index {index:.2f}" in out
    assert "| 2                     | 100.0 | 100.0 |" in out


def test_figures_are_those_that_apply(tmp_path, capsys, picture):
    out = tmp_path / "new" / "out"
    file = attentive(tmp_path / "car.safetensors", CAR)
    argv = [picture, "--steps", 1, "--out", out, "--checkpoint"]
    explain.main([*map(str, [*argv, file, "--json", out / "n.json"]), "--device", "cpu"])
    assert {path.name for path in out.iterdir()} == {
        "attribution.png",
        "kept.png",
        "keys.png",
        "n.json",
    }
    with Image.open(out / "attribution.png") as figure:
        assert np.unique(np.asarray(figure)).size > 50
    status, err = failure(capsys, *argv, file)
    assert status == 2
    assert "holds attribution.png; --overwrite " in err
    config = ModelConfig("a2n", blocks=2, width=8, attention="none", keys=0, channels=1)
    file = tmp_path / "a2n.safetensors"
    save_model(file, build_network(config), config, CAR, {})
    explain.main([*map(str, [*argv, file, "--overwrite"]), "--device", "cpu"])
    text = capsys.readouterr()
    assert "weight of the branch with attention, block by block: 0." in text.out
    assert "attention none: samples no keys" in text.err
    assert (out / "branches.png").is_file()


def test_a_flat_window_has_no_index(tmp_path, capsys):
    Image.new("L", (20, 18), 100).save(tmp_path / "flat.png")
    file = write_network(tmp_path / "car.safetensors", CAR)
    found = result(capsys, tmp_path / "flat.png", "--checkpoint", file)
    assert found["diffusion_index"] is None
    assert found["window"] == [0, 0, 16]
    explain.main([str(tmp_path / "flat.png"), "--checkpoint", str(file), "--steps", "1"])
    assert "diffusion index none: the window is flat" in capsys.readouterr().out


def test_small_pictures_have_small_windows(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "sr.safetensors", Task("sr", 3))
    Image.fromarray(make_scene(11, 40)).save(tmp_path / "low.png")
    found = result(capsys, tmp_path / "low.png", "--checkpoint", file)
    assert (found["window"][0], found["window"][2]) == (0, 9)
    file = write_network(tmp_path / "car.safetensors", CAR)
    Image.new("L", (1, 9)).save(tmp_path / "line.png")
    assert result(capsys, tmp_path / "line.png", "--checkpoint", file)["window"] == [0, 0, 1]


# What it refuses


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--window", 0, 15, 16], "outside the restored picture, 37×30 pixels"),
        (["--window", 0, 0, 0], "outside"),
        (["--window", 22, 0, 16], "outside"),
        (["--at", 37, 0], "outside"),
        (["--at", -1, 0], "outside"),
        (["--steps", 0], "--steps must be above 0"),
        (["--json", "no/where.json"], "there is no folder no"),
    ],
)
def test_impossible_calls_are_refused(tmp_path, capsys, picture, flags, reason):
    file = write_network(tmp_path / "car.safetensors", CAR)
    code, err = failure(capsys, picture, "--checkpoint", file, *flags)
    assert (code, err.count("\n")) == (2, 1)
    assert reason in err


def test_a_picture_below_the_scale_is_refused(tmp_path, capsys):
    Image.new("L", (1, 9)).save(tmp_path / "line.png")
    file = write_network(tmp_path / "sr.safetensors", DOUBLE)
    code, err = failure(capsys, tmp_path / "line.png", "--checkpoint", file)
    assert code == 1
    assert "a picture of 9×1 pixels is smaller than the scale 2" in err
