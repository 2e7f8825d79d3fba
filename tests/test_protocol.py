"""Scoring by task, and the paper's figures."""

import math

import numpy as np
import pytest
import torch

from acla.config import Task
from acla.data.image import luma, round_8bit, to_levels
from acla.data.metrics import (
    protocol_line,
    psnr,
    published,
    published_rows,
    result_table,
    score,
    ssim,
    task_of_set,
)
from acla.errors import DataError, UsageError


@pytest.fixture
def two(make_picture):
    clean = make_picture(24, 20)
    noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    return clean + 0.04 * noise, clean


def test_rgb_tasks_round_and_clip_the_prediction(two):
    prediction, clean = two
    expected = psnr(to_levels(prediction), to_levels(clean))
    for task in (Task("denoise", 30), Task("demosaic", 0)):
        assert score(prediction, clean, task)[0] == pytest.approx(expected)
    assert score(prediction, clean, task)[1] == pytest.approx(
        ssim(to_levels(prediction), to_levels(clean))
    )


def test_sr_scores_float_y_inside_the_border(two):
    prediction, clean = two
    y = [(255 * luma(round_8bit(image.double())))[0].numpy() for image in (prediction, clean)]
    assert score(prediction, clean, Task("sr", 4)) == pytest.approx((psnr(*y, 4), ssim(*y, 4)))
    assert not np.array_equal(y[0], y[0].round())


def test_sr_takes_y_predictions_as_they_are(two):
    prediction, clean = (luma(image) for image in two)
    ours = score(prediction, clean, Task("sr", 2))
    assert ours == pytest.approx(score(prediction, two[1], Task("sr", 2)), rel=1e-6)


def test_car_has_no_border(make_picture):
    clean = make_picture(12, 12, 1)
    prediction = clean.clone()
    clean[0, 0, 0], prediction[0, 0, 0] = 0, 100 / 255
    expected = 10 * math.log10(255**2 / (100**2 / 144))
    assert score(prediction, clean, Task("car", 10))[0] == pytest.approx(expected)


def test_equal_and_tiny_pictures(make_picture):
    tiny = make_picture(3, 1, 1)
    assert score(tiny, tiny, Task("car", 10)) == (math.inf, None)
    with pytest.raises(DataError, match="nothing is left"):
        score(make_picture(4, 4), make_picture(4, 4), Task("sr", 2))
    with pytest.raises(DataError, match="differ in shape"):
        score(make_picture(4, 4), make_picture(4, 5), Task("denoise", 30))


@pytest.mark.parametrize(
    ("task", "words"),
    [
        (Task("sr", 3), ["Y in floating point", "0..255", "border of 3 px", "imresize"]),
        (Task("denoise", 50), ["RGB", "σ = 50", "no border"]),
        (Task("car", 20), ["Y", "quality 20", "Pillow", "no border"]),
        (Task("demosaic", 0), ["RGB", "GRBG"]),
    ],
    ids=str,
)
def test_protocol_line_says_what_matters(task, words):
    text = protocol_line(task)
    assert "\n" not in text
    assert all(word in text for word in [str(task), *words])


def test_baseline_and_gray_lines_differ():
    assert "without rounding in between" in protocol_line(Task("sr", 2), baseline=True)
    assert "RGB" not in protocol_line(Task("denoise", 30), channels=1)


def test_tasks_of_known_sets():
    assert task_of_set("LIVE1") == Task("car", 10)
    assert task_of_set("Manga109") == Task("sr", 2)
    assert task_of_set("McMaster18") == Task("demosaic", 0)
    assert task_of_set("BSD68") == Task("denoise", 30)
    with pytest.raises(UsageError, match="'mine': give --task"):
        task_of_set("mine")


def test_published_figures():
    set5 = published("Set5", Task("sr", 2))
    assert set5["Bicubic"] == {"psnr": 33.66, "ssim": 0.9299}
    assert set5["EDSR+ACLA"]["psnr"] > set5["EDSR"]["psnr"]
    assert published("LIVE1", Task("car", 10))["JPEG"] == {"psnr": 27.77}
    assert "ACLA" in published("Kodak24", Task("denoise", 10))
    assert "Mosaiced" in published("Urban100", Task("demosaic", 0))
    assert published("Set5", Task("car", 10)) == {}
    assert published("mine", Task("sr", 2)) == {}


def test_misprints_keep_the_printed_value_and_say_so():
    noted = [row for row in published_rows() if row["note"]]
    assert {(row["method"], row["dataset"], row["setting"]) for row in noted} == {
        ("VDSR", "B100", "x4"),
        ("baseline", "LIVE1", "q40"),
        ("CLA", "LIVE1", "q40"),
        ("ACLA", "LIVE1", "q40"),
    }
    assert published("B100", Task("sr", 4))["VDSR"]["ssim"] == 0.0726


def test_table_puts_the_paper_below_ours():
    task = Task("car", 40)
    result = {
        "dataset": "LIVE1",
        "images": [{}] * 29,
        "protocol": protocol_line(task),
        "mean": {"psnr": 32.354, "ssim": None},
        "published": published("LIVE1", task),
    }
    lines = result_table("untouched input", result).splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert lines[0] == protocol_line(task)
    assert cells[0][:3] == ["LIVE1, 29 pictures", "PSNR, dB", "SSIM"]
    assert cells[2] == ["untouched input", "32.35", "–", ""]
    assert cells[3] == ["paper: JPEG", "32.35", "–", ""]
    assert cells[-1][1:] == ["35.55", "–", "misprint in the paper"]
