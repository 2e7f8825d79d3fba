"""evaluate.py from flags to figures: the papers' untouched inputs, and every wrong call."""

import json
import os
import sys

import numpy as np
import pytest
import torch
from evaluating import failure, results
from PIL import Image

import evaluate
from acla.config import Task
from acla.data.degradations import pair
from acla.data.image import load, save
from acla.files import provenance

# The untouched inputs must score what the papers print

JPEG = {
    "LIVE1": {10: "27.77", 40: "32.35"},
    "Classic5": {10: "27.82", 20: "30.12", 30: "31.48", 40: "32.43"},
}
BICUBIC = {
    2: {"Set5": ("33.66", "0.9299"), "Set14": ("30.23", "0.8687")},
    3: {"Set5": ("30.39", "0.8682"), "Set14": ("27.54", "0.7736")},
    4: {"Set5": ("28.42", "0.8104"), "Set14": ("26.00", "0.7019")},
}
MOSAIC = {
    "McMaster18": ("9.17", "0.1674"),
    "Kodak24": ("8.56", "0.0682"),
}


def printed(result: dict) -> tuple[str, str]:
    return f"{result['mean']['psnr']:.2f}", f"{result['mean']['ssim']:.4f}"


@pytest.mark.parametrize(
    ("q", "names"),
    [
        *((q, ["Classic5"]) for q in (20, 30)),
        *(pytest.param(q, ["LIVE1", "Classic5"], marks=pytest.mark.slow) for q in (10, 40)),
    ],
)
def test_jpeg_rows(capsys, shared_data, q, names):
    flags = ["--q", q, "--baseline", "--data", shared_data]
    rows = results(capsys, "--dataset", ",".join(names), *flags)
    assert {row["dataset"]: printed(row)[0] for row in rows} == {n: JPEG[n][q] for n in names}
    for row in rows:
        assert len(row["images"]) == {"LIVE1": 29, "Classic5": 5}[row["dataset"]]
        assert row["published"]["JPEG"]["psnr"] == float(JPEG[row["dataset"]][q])


@pytest.mark.parametrize("scale", [2, 3, 4])
def test_bicubic_rows(capsys, shared_data, scale):
    flags = ["--task", "sr", "--scale", scale, "--baseline", "--data", shared_data]
    rows = results(capsys, "--dataset", "Set5,Set14", *flags)
    assert {row["dataset"]: printed(row) for row in rows} == BICUBIC[scale]


@pytest.mark.slow
def test_mosaic_rows(capsys, shared_data):
    flags = ["--task", "demosaic", "--baseline", "--data", shared_data]
    rows = results(capsys, "--dataset", ",".join(MOSAIC), *flags)
    assert {row["dataset"]: printed(row) for row in rows} == MOSAIC


# What comes out


def test_json_has_every_field(capsys, root):
    flags = ["--dataset", "Mine", "--q", "20", "--baseline", "--data", str(root)]
    evaluate.main([*flags, "--device", "cpu", "--seed", "3", "--json", "-"])
    found = json.loads(capsys.readouterr().out)
    assert found["seed"] == 3
    assert found["provenance"] == provenance(torch.device("cpu"))
    (row,) = found["results"]
    assert (row["dataset"], row["task"], row["setting"]) == ("Mine", "car", 20)
    assert "quality 20" in row["protocol"]
    assert row["model"] == {"kind": "baseline"}
    assert [image["name"] for image in row["images"]] == ["colour.png", "gray.bmp", "withalpha.png"]
    assert all(set(image) == {"name", "psnr", "ssim", "seconds"} for image in row["images"])
    for key in ("psnr", "ssim"):
        assert row["mean"][key] == pytest.approx(np.mean([i[key] for i in row["images"]]))
    assert row["published"] == {}


def test_table_and_json_file(capsys, root, tmp_path):
    flags = ["--dataset", "Mine", "--sigma", "25", "--baseline", "--data", str(root)]
    evaluate.main([*flags, "--json", str(tmp_path / "r.json")])
    out, err = capsys.readouterr()
    (row,) = json.loads((tmp_path / "r.json").read_text())["results"]
    assert out.startswith("denoise sigma25: RGB, range 0..255, no border cut")
    ours = next(line.split() for line in out.splitlines() if line.startswith("| untouched input"))
    assert ours[4::2] == [f"{row['mean']['psnr']:.2f}", f"{row['mean']['ssim']:.4f}", "|"]
    assert "psnr" not in err


def test_noise_seed_is_a_flag_and_repeats(capsys, root):
    flags = ["--dataset", "Mine", "--sigma", "25", "--baseline", "--data", root, "--seed"]
    psnr = [results(capsys, *flags, seed)[0]["mean"]["psnr"] for seed in (0, 0, 1)]
    assert psnr[0] == psnr[1] != psnr[2]


def test_set_names_its_task(capsys, root):
    (root / "Mine").rename(root / "McMaster18")
    (row,) = results(capsys, "--dataset", "McMaster18", "--baseline", "--data", root)
    assert row["task"] == "demosaic"
    assert row["published"]["Mosaiced"]["psnr"] == 9.17


def test_sample_needs_no_files(capsys, monkeypatch):
    monkeypatch.delenv("ACLA_DATA", raising=False)
    (row,) = results(capsys, "--dataset", "sample", "--baseline")
    assert len(row["images"]) == 3
    assert 27 < row["mean"]["psnr"] < 31


def test_tiny_pictures_are_scored(capsys, tmp_path):
    folder = tmp_path / "Tiny"
    folder.mkdir()
    Image.new("RGB", (1, 1), (9, 9, 9)).save(folder / "one.png")
    Image.new("L", (1, 40), 9).save(folder / "line.png")
    flags = ["--dataset", "Tiny", "--baseline", "--data", str(tmp_path)]
    evaluate.main([*flags, "--q", "10", "--json", "-"])
    out, err = capsys.readouterr()
    (row,) = json.loads(out)["results"]
    assert row["mean"]["ssim"] is None
    assert "2 of 2 pictures are too small for SSIM" in err
    message = "error: line.png: a picture of 40×1 pixels is smaller than the scale 2\n"
    assert failure(capsys, *flags, "--scale", "2") == (1, message)


# Somebody else's pictures


def test_predictions_in_y_rgb_and_several_sets(capsys, root, tmp_path):
    for name in ("A", "B"):
        (tmp_path / "p" / name).mkdir(parents=True)
    (root / "Mine").rename(root / "A")
    (root / "B").mkdir()
    (root / "A" / "gray.bmp").rename(root / "B" / "gray.bmp")
    task = Task("sr", 2)
    for path in [*(root / "A").iterdir(), *(root / "B").iterdir()]:
        target = pair(load(path), task)[1]
        save(target, tmp_path / "p" / path.parent.name / f"{path.stem}_SRx2.png")
    flags = ["--dataset", "A,B", "--predictions", tmp_path / "p", "--data", root, "--scale", 2]
    rows = results(capsys, *flags)
    assert [image["psnr"] for row in rows for image in row["images"]] == [None] * 3  # equal
    assert rows[0]["mean"] == {"psnr": None, "ssim": pytest.approx(1)}
    gray = load(root / "B" / "gray.bmp")
    save(gray[:, :, :40], tmp_path / "p" / "B" / "gray_SRx2.png")
    assert results(capsys, *flags)[1]["images"][0]["psnr"] is None


def test_wrong_prediction_size_is_named(capsys, root, tmp_path):
    for name in ("colour", "gray", "withalpha"):
        save(torch.zeros(3, 8, 9), tmp_path / f"{name}.png")
    flags = ["--dataset", "Mine", "--predictions", tmp_path, "--data", root, "--q", "10"]
    code, err = failure(capsys, *flags)
    assert code == 1
    assert "colour.png: 9×8 pixels, but 30×37 are wanted for colour.png (car q10)" in err


# Calls that are wrong


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (["--dataset", "None"], 1, "fix: name one of these sets"),
        (["--dataset", ""], 2, "is no name of a set"),
        (["--dataset", "Mine"], 2, "no task is known for set 'Mine'"),
        (["--dataset", "Mine", "--q", "0"], 2, "--q must be a whole number of 1 to 100"),
        (["--dataset", "Mine", "--sigma", "-1"], 2, "--sigma must be above 0"),
        (["--dataset", "Mine", "--scale", "5"], 2, "--scale must be 2, 3 or 4"),
        (["--dataset", "Mine", "--q", "10", "--task", "sr"], 2, "--q belongs to --task car"),
        (["--dataset", "Mine", "--q", "10", "--tile", "0"], 2, "--tile must be 32 pixels or more"),
        (["--dataset", "Mine", "--task", "blur"], 2, "invalid choice: 'blur'"),
        (["--dataset", "Mine", "--q", "10", "--json", "none/r.json"], 2, "there is no folder none"),
        (["--dataset", "Mine", "--predictions", "none"], 2, "not allowed with argument"),
        ([], 2, "--dataset"),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else None,
)
def test_wrong_calls(capsys, root, flags, code, message):
    status, err = failure(capsys, *flags, "--baseline", "--data", root)
    assert status == code
    assert message in err


def test_broken_picture_and_checkpoint_are_named(capsys, root, tmp_path):
    (root / "Mine" / "bad.png").write_bytes(b"")
    code, err = failure(capsys, "--dataset", "Mine", "--q", "10", "--baseline", "--data", root)
    assert code == 1
    assert "bad.png: not a readable picture" in err
    assert err.splitlines()[-1].startswith("error: ")
    code, err = failure(
        capsys, "--dataset", "Mine", "--checkpoint", tmp_path / "no", "--data", root
    )
    assert (code, err) == (1, f"error: {tmp_path / 'no'}: there is no such file\n")


def test_originals_are_never_overwritten(capsys, root, tmp_path):
    flags = ["--dataset", "Mine", "--q", "10", "--baseline", "--data", root]
    before = (root / "Mine" / "colour.png").read_bytes()
    code, err = failure(capsys, *flags, "--save", root / "Mine")
    assert (code, "would be overwritten there" in err) == (2, True)
    code, err = failure(capsys, *flags, "--save", tmp_path / "x", "--save-inputs", tmp_path / "x")
    assert (code, "must be two folders" in err) == (2, True)
    Image.new("L", (9, 9)).save(root / "Mine" / "gray.png")
    code, err = failure(capsys, *flags, "--save", tmp_path / "x")
    assert (code, "stems that differ" in err) == (2, True)
    assert (root / "Mine" / "colour.png").read_bytes() == before


@pytest.mark.skipif(sys.platform != "linux", reason="file names of any bytes")
def test_file_names_may_hold_any_bytes(capsys, tmp_path, make_scene):
    (tmp_path / "Mine").mkdir()
    path = tmp_path / "Mine" / os.fsdecode(b"caf\xe9.png")
    Image.fromarray(make_scene(24, 31)).save(path)
    flags = ["--dataset", "Mine", "--task", "denoise", "--baseline", "--data", tmp_path]
    (row,) = results(capsys, *flags)
    assert [image["name"] for image in row["images"]] == [path.name]
    evaluate.main([*map(str, flags), "--device", "cpu", "--json", str(tmp_path / "scores.json")])
    (again,) = json.loads((tmp_path / "scores.json").read_text(encoding="utf-8"))["results"]
    assert again["images"][0]["name"] == path.name
