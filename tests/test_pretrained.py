"""The model that a photo gets."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from restoring import DOUBLE, call, failure, stored, write_network

from acla.config import Task
from acla.restore import pretrained


@pytest.fixture
def networks(tmp_path, monkeypatch):
    """A folder of models for qualities 10, 20 and 40 and for ×2."""
    folder = tmp_path / "weights"
    files = {Task("car", q): f"car-q{q}-paper.safetensors" for q in (10, 20, 40)}
    for task, name in files.items():
        write_network(folder / name, task, shift=task.setting / 255)
    write_network(folder / "sr-x2-paper.safetensors", DOUBLE)
    provide(monkeypatch, folder, files | {DOUBLE: "sr-x2-paper.safetensors"})
    return folder


def provide(monkeypatch: pytest.MonkeyPatch, folder: Path, files: dict[Task, str]) -> None:
    """Make these the pretrained models."""
    monkeypatch.setattr(pretrained, "FOLDERS", (folder,))
    monkeypatch.setattr(pretrained, "FILES", files)


@pytest.mark.parametrize(
    ("quality", "nearest", "outside"),
    [
        (5, 10, False),
        (4, 10, True),
        (13, 10, False),
        (19, 20, False),
        (44, 40, False),
        (90, 40, True),
    ],
)
def test_the_quality_of_the_file_picks_the_network(
    tmp_path, capsys, make_scene, networks, quality, nearest, outside
):
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.png", "--no-project")
    before, after = stored(tmp_path / "in.jpg"), stored(tmp_path / "out.png")
    assert np.array_equal(after, before + nearest)
    out, err = capsys.readouterr()
    assert f"car q{nearest}, {networks}/car-q{nearest}-paper.safetensors" in out
    assert (f"JPEG quality {quality} is outside what the network was trained for" in err) == outside


@pytest.mark.parametrize(
    ("quality", "chosen", "outside"),
    [
        (4, "q5-60", True),
        (5, "q10", False),
        (13, "q10", False),
        (28, "q5-60", False),
        (60, "q5-60", False),
        (61, "q5-60", True),
        (65, "q5-60", True),
        (80, "q5-60", True),
    ],
)
def test_a_network_for_many_qualities_takes_what_no_other_serves(
    tmp_path, capsys, monkeypatch, make_scene, quality, chosen, outside
):
    for task, name in pretrained.FILES.items():
        write_network(tmp_path / "weights" / name, task)
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "weights",))
    Image.fromarray(make_scene(16, 16, 1)).save(tmp_path / "in.jpg", quality=quality)
    call(tmp_path / "in.jpg", tmp_path / "out.png")
    out, err = capsys.readouterr()
    assert f"car {chosen}, " in out
    assert ("is outside what the network was trained for (car q5-60)" in err) == outside
    Image.fromarray(make_scene(16, 16, 1)).save(tmp_path / "in.png")
    call(tmp_path / "in.png", tmp_path / "of-unknown-quality.png", "--task", "car")
    assert "car q5-60, " in capsys.readouterr().out
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", "--q", "5-60")
    assert (status, "a photo has one of them" in err) == (2, True)


def test_flags_name_the_network(tmp_path, capsys, make_scene, networks):
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.jpg", quality=80)
    Image.fromarray(make_scene(16, 16, 1) // 2).save(tmp_path / "in.png")
    for name in ("in.jpg", "in.png"):
        call(tmp_path / name, tmp_path / "out.png", "--q", 20, "--overwrite")
        assert np.array_equal(stored(tmp_path / "out.png"), stored(tmp_path / name) + 20)
    assert capsys.readouterr().err == ""
    call(tmp_path / "in.png", tmp_path / "large.png", "--task", "sr")
    assert stored(tmp_path / "large.png").shape == (32, 32)
    flags = ["--task", "car"]
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", *flags)
    assert (status, "in.png: not a JPEG" in err) == (1, True)
    checkpoint = networks / "sr-x2-paper.safetensors"
    flags = ["--checkpoint", checkpoint, "--q", 20]
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "no.png", *flags)
    assert (status, "was trained for sr x2, not for car q20" in err) == (2, True)


def test_other_tasks_ignore_the_quality(tmp_path, capsys, make_scene):
    file = write_network(tmp_path / "net.safetensors", Task("denoise", 30))
    Image.fromarray(make_scene(16, 16)).save(tmp_path / "in.jpg", quality=80)
    call(tmp_path / "in.jpg", tmp_path / "out.png", "--checkpoint", file)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("flags", "advice"),
    [
        ([], "python train.py --task car --q 10"),
        (["--task", "sr", "--scale", 3], "python train.py --task sr --scale 3"),
        (["--sigma", 25], "python train.py --task denoise --sigma 25"),
        (["--task", "demosaic"], "python train.py --task demosaic "),
    ],
)
def test_a_missing_model_names_the_command_that_trains_it(
    tmp_path, capsys, monkeypatch, flags, advice
):
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "none",))
    (tmp_path / "in.png").touch()
    status, err = failure(capsys, tmp_path / "in.png", tmp_path / "out.png", *flags)
    assert (status, err.count("\n")) == (2, 1)
    assert advice in err
    assert "--checkpoint" in err
