"""The table that is made from results of evaluate.py."""

import json

import pytest

from acla.analysis import results
from acla.errors import AclaError, UsageError


def result(dataset="LIVE1", q=10, checkpoint="weights/car-q10-a.safetensors", psnr=29.4567, **more):
    return {
        "dataset": dataset,
        "task": "car",
        "setting": q,
        "model": {"kind": "network", "checkpoint": checkpoint, "ensemble": False},
        "mean": {"psnr": psnr, "ssim": 0.81234},
        "images": [{"name": "a.png", "psnr": psnr}],
        "published": {"JPEG": {"psnr": 27.77}, "DnCNN": {"psnr": 29.19, "ssim": 0.8123}},
        "protocol": f"car q{q}: Y",
    } | more


@pytest.fixture
def write(tmp_path):
    def write(name, *results):
        (tmp_path / name).write_text(json.dumps({"results": list(results)}))
        return str(tmp_path / name)

    return write


def table(capsys, *argv):
    results.main(["scores", *argv])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_short_table_has_a_row_for_each_result(capsys, write):
    paper = {"EDSR+ACLA": {"psnr": 38.31}, "EDSR": {"psnr": 38.11}, "RDN": {"psnr": 38.24}}
    one = write("a.json", result(), result("Classic5"))
    enlarged = {"task": "sr", "published": paper, "protocol": "sr x2: Y"}
    other = write("b.json", result("Set5", 2, "sr.safetensors", 37.4022, **enlarged))
    head, *rows = table(capsys, "--short", "--dataset", "LIVE1,Set5", one, other)
    assert head[2:] == ["the paper's EDSR", "the paper's EDSR + ACLA", "ours"]
    assert rows[1:] == [
        ["car LIVE1 q10", "29.19", "–", "–", "29.46"],
        ["sr Set5 x2", "–", "38.11", "38.31", "37.40"],
    ]
    with pytest.raises(UsageError, match=r"--dataset: .*Set14"):
        results.main(["scores", "--dataset", "Set14,LIVE1", one])
    with pytest.raises(AclaError, match="LIVE1 q10 is there twice"):
        results.main(["scores", "--short", one, one])
    untouched = write("c.json", result(model={"kind": "baseline"}))
    with pytest.raises(UsageError, match="--short"):
        results.main(["scores", "--short", untouched])


def test_methods_are_rows_and_sets_are_columns(capsys, write):
    one = write("a.json", result(), result("Classic5", published={"JPEG": {"psnr": 27.82}}))
    two = write("b.json", result(q=20, published={"JPEG": {"psnr": 30.07}}, psnr=31.0))
    three = write("c.json", result(checkpoint="runs/other.safetensors", psnr=None))
    assert table(capsys, one, two, three) == [
        ["", "LIVE1 q10", "Classic5 q10", "LIVE1 q20"],
        ["-" * 15, "-" * 9, "-" * 12, "-" * 9],
        ["JPEG", "27.77", "27.82", "30.07"],
        ["DnCNN", "29.19", "–", "–"],
        ["ours: car-q10-a", "29.46", "29.46", "31.00"],
        ["ours: other", "–", "–", "–"],
    ]
    assert table(capsys, one, "--metric", "ssim")[3:] == [
        ["DnCNN", "0.8123", "–"],
        ["ours: car-q10-a", "0.8123", "0.8123"],
    ]


def test_scores_on_rgb_have_a_column_of_their_own(capsys, write):
    rgb = result(published={}, protocol="car q10: RGB; input: colour JPEG (4:2:0), quality 10")
    (head, _, *rows) = table(capsys, write("a.json", result(), rgb))
    assert head == ["", "LIVE1 q10", "LIVE1 q10 RGB"]
    assert rows[0] == ["JPEG", "27.77", "–"]
    assert rows[-1] == ["ours: car-q10-a", "29.46", "29.46"]


def test_a_line_for_each_protocol_is_below_the_table(capsys, write):
    results.main(
        ["scores", write("a.json", result(), result("Classic5")), write("b.json", result(q=20))]
    )
    assert capsys.readouterr().out.endswith(" |\n\n- car q10: Y\n- car q20: Y\n")


def test_what_is_no_network_is_named_by_its_kind(capsys, write):
    plain = result(model={"kind": "baseline"}, task="demosaic", setting=0, published={})
    assert table(capsys, write("a.json", plain))[0] == ["", "LIVE1"]
    assert table(capsys, write("a.json", plain))[2][0] == "untouched input"
    theirs = [
        result(dataset, model={"kind": "predictions", "folder": f"elsewhere/{folder}"})
        for folder, dataset in (("swinir", "LIVE1"), ("fbcnn", "Classic5"))
    ]
    rows = table(capsys, write("b.json", *theirs))[-2:]
    assert [row[0] for row in rows] == ["predictions: swinir", "predictions: fbcnn"]
    assert [row[1:] for row in rows] == [["29.46", "–"], ["–", "29.46"]]


def test_runs_are_told_apart_by_their_folders(capsys, write):
    runs = [
        result(dataset, checkpoint=f"runs/{run}/model.safetensors")
        for run, dataset in (("plain", "LIVE1"), ("warm", "LIVE1"), ("warm", "Classic5"))
    ]
    rows = table(capsys, write("a.json", *runs))[-2:]
    assert [row[0] for row in rows] == ["ours: plain/model", "ours: warm/model"]
    alike = write("b.json", runs[0], result(q=20, checkpoint="old/plain/model.safetensors"))
    rows = table(capsys, alike)[-2:]
    assert rows == [["ours: plain/model", "29.46", "–"], ["ours: plain/model", "–", "29.46"]]


def test_a_range_of_qualities_is_no_single_one(capsys, write):
    many = write("a.json", result(q=5, until=60), result(q=5))
    assert table(capsys, many)[0] == ["", "LIVE1 q5-60", "LIVE1 q5"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a file of evaluate.py"),
        ("{}", "not a file of evaluate.py"),
        ('{"results": [{"dataset": "LIVE1"}]}', "not a file of evaluate.py"),
        ('{"results": 5}', "not a file of evaluate.py"),
        (json.dumps({"results": [result(q=0)]}), "not a file of evaluate.py"),
        (json.dumps({"results": [result() | {"images": [{}]}]}), "not a file of evaluate.py"),
        (json.dumps({"results": [result(), result()]}), "LIVE1 q10 of ours: car-q10-a is there"),
    ],
)
def test_other_files_are_refused(tmp_path, text, message):
    path = tmp_path / "r.json"
    path.write_text(text)
    with pytest.raises(AclaError, match=message):
        results.main(["scores", str(path)])
