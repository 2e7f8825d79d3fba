"""evaluate.py with a network: its task, tiles, the ensemble, and which one is scored."""

import hashlib
import json

import pytest
import restoring
import torch
from evaluating import failure, results, write_network
from PIL import Image

import evaluate
from acla.config import ModelConfig, Task
from acla.data.degradations import generator_for, pair
from acla.data.image import load
from acla.models.backbones import Backbone
from acla.models.serialization import load_model, save_model
from acla.restore import pretrained


@pytest.mark.parametrize(
    "task", [Task("sr", 3), Task("denoise", 30), Task("car", 10), Task("demosaic", 0)], ids=str
)
def test_network_brings_its_task(capsys, root, tmp_path, task):
    file = write_network(tmp_path / "m.safetensors", task)
    flags = ["--dataset", "Mine", "--checkpoint", file, "--data", root]
    (row,) = results(capsys, *flags, "--save", tmp_path / "out", "--save-inputs", tmp_path / "in")
    assert (row["task"], row["setting"]) == (task.name, task.setting)
    assert row["model"]["checkpoint"] == str(file)
    assert row["model"]["width"] == 8
    assert row["model"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    names = {"colour.png", "gray.png", "withalpha.png"}
    assert {f.name for f in (tmp_path / "out").iterdir()} == names
    assert {f.name for f in (tmp_path / "in").iterdir()} == names
    clean = load(root / "Mine" / "colour.png")
    low, target = pair(clean, task, generator_for("colour"))
    assert load(tmp_path / "out" / "colour.png").shape == target.shape
    saved = load(tmp_path / "in" / "colour.png")
    assert (saved - low.clamp(0, 1)).abs().max() <= 0.5001 / 255
    flags = ["--dataset", "Mine", "--data", root, "--predictions", tmp_path / "out"]
    scale = ["--scale", 3] if task.name == "sr" else []
    (again,) = results(capsys, *flags, "--task", task.name, *scale)
    assert [i["psnr"] for i in again["images"]] == pytest.approx([i["psnr"] for i in row["images"]])


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_short_formats_are_near_and_named(capsys, root, tmp_path, precision):
    file = write_network(tmp_path / "m.safetensors", Task("sr", 2))
    flags = ["--dataset", "Mine", "--checkpoint", file, "--data", root, "--device", "cpu"]
    (row,) = results(capsys, *flags)
    (short,) = results(capsys, *flags, "--precision", precision)
    assert (row["model"]["precision"], short["model"]["precision"]) == ("fp32", precision)
    assert short["protocol"] == f"{row['protocol']}; network in {precision}"
    apart = [a["psnr"] - b["psnr"] for a, b in zip(row["images"], short["images"], strict=True)]
    assert any(apart)  # computed in it
    assert max(map(abs, apart)) < 0.05
    code, err = failure(capsys, *flags[:2], *flags[4:], "--baseline", "--precision", precision)
    assert (code, "leave out --baseline" in err) == (2, True)


@pytest.mark.parametrize("channels", [1, 3], ids=["Y", "colour"])
def test_projection_is_a_protocol_of_its_own(capsys, root, tmp_path, monkeypatch, channels):
    monkeypatch.setattr(
        evaluate.metrics, "published", lambda *_: {"Paper": {"psnr": 30.0, "ssim": 0.9}}
    )
    size = {"shift": 0.1, "channels": channels}
    file = restoring.write_network(tmp_path / "m.safetensors", Task("car", 10), **size)
    flags = ["--dataset", "Mine", "--data", root, "--task", "car", "--q", 90]
    network = [*flags, "--checkpoint", file]
    (row,), (own,) = (results(capsys, *network, *more) for more in ([], ["--project"]))
    (file_alone,) = results(capsys, *flags, "--baseline", *["--colour"] * (channels == 3))
    assert file_alone["protocol"] == row["protocol"]
    kind = "colour JPEG (4:2:0), quality 90" if channels == 3 else "grayscale JPEG, quality 90"
    assert f"input: {kind}, Pillow" in row["protocol"]
    assert own["protocol"].startswith(f"{row['protocol']}; projected onto the file's quantisation")
    assert (own["model"].pop("projected"), own["model"]) == (True, row["model"])
    # The papers' protocol is that of Y
    assert (list(row["published"]), own["published"]) == (["Paper"] * (channels == 1), {})
    for free, kept, jpeg in zip(row["images"], own["images"], file_alone["images"], strict=True):
        assert kept["psnr"] > jpeg["psnr"] - 0.5
        assert free["psnr"] < jpeg["psnr"] - 3
    code, err = failure(capsys, *flags, "--baseline", "--project")
    assert (code, "--project needs a network" in err) == (2, True)
    code, err = failure(capsys, *network, "--colour")
    assert (code, "--colour goes with --baseline" in err) == (2, True)
    code, err = failure(capsys, *network, "--project", "--q", "5-60")
    assert (code, "--project wants one quality" in err) == (2, True)
    file = write_network(tmp_path / "n.safetensors", Task("sr", 2))
    code, err = failure(capsys, *flags[:4], "--checkpoint", file, "--project")
    assert (code, "--project is for JPEG artifacts" in err) == (2, True)


def test_ensemble_averages_eight_and_is_told(capsys, root, tmp_path):
    file = write_network(tmp_path / "m.safetensors", Task("sr", 2))
    flags = ["--dataset", "Mine", "--checkpoint", file, "--data", root]
    (row,) = results(capsys, *flags, "--ensemble", "--save", tmp_path / "out")
    assert row["model"]["ensemble"] is True
    low, _ = pair(load(root / "Mine" / "colour.png"), Task("sr", 2))
    model = load_model(file).model
    with torch.no_grad():
        answers = [
            undo(model(turn(low)[None])[0])
            for k in range(4)
            for turn, undo in (
                (lambda x, k=k: x.rot90(k, (1, 2)), lambda x, k=k: x.rot90(-k, (1, 2))),
                (lambda x, k=k: x.mT.rot90(k, (1, 2)), lambda x, k=k: x.rot90(-k, (1, 2)).mT),
            )
        ]
    mean = sum(answers) / 8
    assert (answers[0] - mean).abs().max() > 1e-3
    saved = load(tmp_path / "out" / "colour.png")
    assert (saved - mean.clamp(0, 1)).abs().max() <= 0.5001 / 255
    evaluate.main([*map(str, flags), "--device", "cpu", "--ensemble"])
    assert f"network {file}, ensemble of 8 " in capsys.readouterr().out


def test_ensemble_is_refused_where_it_means_nothing(capsys, root, tmp_path):
    mosaics = write_network(tmp_path / "m.safetensors", Task("demosaic", 0))
    for flags in (["--baseline"], ["--checkpoint", mosaics]):
        status, message = failure(
            capsys, "--dataset", "Mine", "--data", root, "--ensemble", *flags, "--task", "demosaic"
        )
        assert (status, message.count("\n")) == (2, 1)
        assert message.startswith("error: --ensemble ")


def test_evaluation_goes_on_in_tiles_when_memory_runs_out(capsys, root, tmp_path, monkeypatch):
    Image.open(root / "Mine" / "colour.png").resize((150, 120)).save(root / "Mine" / "large.png")
    file = write_network(tmp_path / "m.safetensors", Task("denoise", 30))
    flags = ["--dataset", "Mine", "--checkpoint", file, "--data", root]
    (whole,) = results(capsys, *flags)
    forward = Backbone.forward

    def short(self, pictures):
        if pictures[0, 0].numel() > 10_000:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(self, pictures)

    monkeypatch.setattr(Backbone, "forward", short)
    evaluate.main([*map(str, flags), "--device", "cpu", "--json", str(tmp_path / "r.json")])
    assert "again with tiles of 96" in capsys.readouterr().err
    (tiled,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert tiled["mean"]["psnr"] == pytest.approx(whole["mean"]["psnr"])


def test_gray_network_scores_y(capsys, root, tmp_path):
    file = write_network(tmp_path / "m.safetensors", Task("sr", 2), channels=1)
    (row,) = results(capsys, "--dataset", "Mine", "--checkpoint", file, "--data", root)
    assert row["protocol"].startswith("sr x2: Y, range")


def test_other_setting_is_noted_and_other_task_refused(capsys, root, tmp_path):
    file = write_network(tmp_path / "m.safetensors", Task("car", 20))
    flags = ["--dataset", "Mine", "--checkpoint", file, "--data", root]
    evaluate.main([*map(str, flags), "--q", "10"])
    assert "was trained for car q20 and is scored on car q10" in capsys.readouterr().err
    (row,) = results(capsys, *flags, "--task", "car")
    assert row["setting"] == 20
    code, err = failure(capsys, *flags, "--task", "denoise")
    assert code == 2
    assert "was trained for car q20, not for denoise sigma30" in err


def test_other_scale_is_refused(capsys, root, tmp_path):
    file = write_network(tmp_path / "m.safetensors", Task("sr", 2))
    code, err = failure(
        capsys, "--dataset", "Mine", "--checkpoint", file, "--data", root, "--scale", 4
    )
    assert (code, "trained for sr x2, not for sr x4" in err) == (2, True)


def test_network_that_breaks_down_is_told(capsys, root, tmp_path):
    config = ModelConfig(blocks=1, width=8, attention="none", channels=1)
    model = Backbone(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(torch.nan)
    save_model(tmp_path / "nan.safetensors", model, config, Task("car", 10), {})
    code, err = failure(
        capsys, "--dataset", "Mine", "--checkpoint", tmp_path / "nan.safetensors", "--data", root
    )
    assert code == 1
    assert "colour.png: the network's output is not finite" in err


def test_a_network_for_many_qualities_is_scored_on_one(capsys, root, tmp_path):
    file = write_network(tmp_path / "many.safetensors", Task("car", 5, 60))
    evaluate.main(["--dataset", "Mine", "--data", str(root), "--checkpoint", str(file)])
    out, err = capsys.readouterr()
    assert "trained for car q5-60, is scored on car q10; --q changes it" in err
    assert "grayscale JPEG, quality 10" in out
    flags = ["--dataset", "Mine", "--data", str(root), "--checkpoint", str(file)]
    evaluate.main([*flags, "--q", "5-60"])
    assert "grayscale JPEG, quality 5-60" in capsys.readouterr().out
    evaluate.main([*flags, "--q", "70"])
    assert "was trained for car q5-60 and is scored on car q70" in capsys.readouterr().err
    high = write_network(tmp_path / "high.safetensors", Task("car", 30, 60))
    evaluate.main(["--dataset", "Mine", "--data", str(root), "--checkpoint", str(high)])
    assert "trained for car q30-60, is scored on car q30" in capsys.readouterr().err


def test_default_checkpoint(capsys, root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(pretrained, "FOLDERS", (tmp_path / "weights",))
    code, err = failure(capsys, "--dataset", "Mine", "--data", root)
    assert code == 2
    assert "no runs/train/model.safetensors, and no pretrained model for car q10" in err
    assert "give --baseline or --predictions DIR" in err
    write_network(tmp_path / "weights" / "car-q10-acla.safetensors", Task("car", 10))
    write_network(tmp_path / "weights" / "car-q5-60-acla.safetensors", Task("car", 5, 60))
    for flags, name in ((), "q10"), (("--q", "30"), "q5-60"), (("--q", "5-60"), "q5-60"):
        evaluate.main(["--dataset", "Mine", "--data", str(root), *flags])
        err = capsys.readouterr().err
        why = "since there is no runs/train/model.safetensors"
        assert f"weights/car-{name}-acla.safetensors: the default, {why}; --checkpoint" in err
        assert "is scored on" not in err
    code, err = failure(capsys, "--dataset", "Mine", "--data", root, "--task", "sr")
    assert (code, "python train.py --task sr" in err) == (2, True)
    write_network(tmp_path / "runs" / "train" / "model.safetensors", Task("car", 10))
    for flags, taken in (
        ((), "checkpoint runs/train/model.safetensors: the default; "),
        (("--task", "car"), "checkpoint runs/train/model.safetensors: the default; "),
        (
            ("--q", "30"),
            "q5-60-acla.safetensors: the default, since runs/train/model",
        ),
    ):
        evaluate.main(["--dataset", "Mine", "--data", str(root), *flags])
        assert taken in capsys.readouterr().err
    code, err = failure(capsys, "--dataset", "Mine", "--data", root, "--task", "sr")
    told = "error: runs/train/model.safetensors is for car q10, and no pretrained model for sr x2"
    assert (code, err.startswith(told)) == (2, True)
