"""Runs side by side: what is grouped, what is said to differ, means, spreads and gains."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from acla.analysis import results
from acla.config import ModelConfig, Task, TrainConfig
from acla.errors import AclaError
from acla.models.factory import build_network, describe
from acla.models.serialization import save_model


def sha256(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


RESULTS = Path(__file__).parents[1] / "results"
SIZE = {"blocks": 2, "width": 4, "channels": 1}


@pytest.fixture
def write(tmp_path):
    """A function that writes the folder of a run with given scores."""

    def write(
        name,
        seed,
        psnr,
        *,
        seconds=5.0,
        sets=("LIVE1",),
        begun=None,
        data="a",
        pictures=None,
        tile=None,
        **fields,
    ):
        config = ModelConfig(**(SIZE | {"attention": "none", "keys": 0} | fields))
        folder = tmp_path / name
        folder.mkdir()
        info = {"train": vars(TrainConfig(seed=seed)), "data": {"train": data}}
        info |= {"step": 10, "seconds": seconds}
        info["begun_with"] = begun and {"file": "plain.safetensors", "sha256": begun}
        file = folder / "model.safetensors"
        save_model(file, build_network(config), config, Task(), info)
        result = {"task": "car", "setting": 10, "published": {}, "protocol": "car q10: Y"}
        result["model"] = {"kind": "network", "checkpoint": str(file), "ensemble": False}
        result["model"] |= {"tile": tile, "sha256": sha256(file)}
        result["mean"] = {"psnr": psnr, "ssim": 0.8}
        result["images"] = [{"name": n, "psnr": value} for n, value in (pictures or {}).items()]
        scores = {"results": [result | {"dataset": name} for name in sets]}
        (folder / "scores.json").write_text(json.dumps(scores))
        return str(folder)

    return write


def table(capsys, *argv):
    results.main(["compare", *argv])
    out = capsys.readouterr().out
    assert out.endswith(" |\n\n- car q10: Y\n")
    lines = out.splitlines()[:-2]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_seeds_are_put_together_and_gains_are_paired(capsys, write):
    plain = [write("a0", 0, 29.0), write("a1", 1, 29.2, seconds=15.0)]
    attended = {"attention": "acla", "keys": 3, "positions": (1, 2)}
    more = [write("b0", 0, 29.1, **attended), write("b1", 1, 29.25, **attended)]
    alone = write("c2", 2, 30.0, attention="cla", keys=3, positions=(1,))
    head, _, one, two, three = table(capsys, *plain, *more, alone)
    assert head[1:] == ["seeds", "parameters", "multiply-adds", "s/step", "LIVE1 q10", "gain"]
    assert one[0] == "attention none, positions –"
    params = describe(ModelConfig(attention="none", keys=0, **SIZE))["params"]
    assert one[1:] == ["2", f"{params:,}", "0.002 G", "1.000", "29.100 ± 0.141", "–"]
    assert two[0] == "attention acla, keys 3, positions 1 2"
    assert two[5:] == ["29.175 ± 0.106", "+0.075 ± 0.025"]
    assert three[0] == "attention cla, keys 3, positions 1"
    assert three[5:] == ["30.000", "–"]  # no run of the first row has its seed


def test_a_gain_from_one_seed_has_no_spread(capsys, write):
    runs = write("a", 0, 29.0), write("b", 0, 29.5, width=8)
    assert table(capsys, *runs)[3][-2:] == ["29.500", "+0.500"]
    assert table(capsys, *runs)[3][0] == "width 8"


def test_pictures_are_sorted_by_what_they_gain(capsys, write):
    plain = [write(f"a{seed}", seed, 29.0, pictures={"x": 28.0, "y": 30.0}) for seed in (0, 1)]
    more = [
        write(f"b{seed}", seed, 29.1, pictures={"x": 27.9, "y": 30.1 + 0.1 * seed}, width=8)
        for seed in (0, 1)
    ]
    lines = table(capsys, *plain, *more, "--pictures")
    assert lines[5:] == [
        ["", "picture", "width 8"],
        lines[6],
        ["LIVE1 q10", "y", "+0.150 ± 0.050"],
        ["LIVE1 q10", "x", "-0.100 ± 0.000"],
    ]
    other = write("c", 0, 29.0, pictures={"x": 28.0, "z": 30.0}, width=8)
    with pytest.raises(AclaError, match="other pictures"):
        results.main(["compare", plain[0], other])


def test_runs_that_began_otherwise_are_no_seeds_of_one(capsys, write):
    runs = (
        write("a", 0, 29.0),
        write("b", 1, 29.5, begun="52ee06d27a"),
        write("c", 1, 29.5, begun="8194871dc8"),
        write("d", 0, 30.0, data="b"),
    )
    rows = table(capsys, *runs)[2:]
    assert [row[1] for row in rows] == ["1", "1", "1", "1"]
    assert rows[1][0] == "begun_with plain.safetensors 52ee06d2, pictures a"


def test_scores_of_tiles_are_no_others(capsys, write):
    runs = write("a", 0, 29.0), write("b", 1, 29.5), write("c", 1, 29.4, tile=48)
    rows = table(capsys, *runs)[2:]
    assert [row[:2] for row in rows] == [["tile –", "2"], ["tile 48", "1"]]


def test_runs_are_kept_in_a_file_that_is_read_again(capsys, write, tmp_path):
    pictures = {"x": 28.0, "y": 30.0}
    runs = [
        write("a0", 0, 29.0, pictures=pictures),
        write("a1", 1, 29.2, pictures=pictures),
        write("b0", 0, 29.1, pictures=pictures, attention="acla", keys=3, positions=(1, 2)),
    ]
    file = str(tmp_path / "kept.json")
    rows = table(capsys, *runs, "--pictures", "--json", file)
    for folder in ("a0", "a1", "b0"):
        shutil.rmtree(tmp_path / folder)
    assert table(capsys, file, "--pictures") == rows
    more = write("c0", 0, 29.3, pictures=pictures, width=8)
    assert len(table(capsys, file, more)) == len(table(capsys, file)) + 1
    with pytest.raises(AclaError, match="are the same run"):
        results.main(["compare", file, file])


@pytest.mark.parametrize("text", ["", "[]", '{"runs": [1]}', '{"runs": [{"model": {}}]}', "\x00"])
def test_a_file_of_anything_else_is_refused(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(AclaError, match=r"not a file of .* compare --json"):
        results.main(["compare", str(tmp_path / "kept.json")])


@pytest.mark.parametrize("model", [{"sha256": "0"}, {"kind": "baseline", "sha256": None}])
def test_scores_must_be_the_networks_own(write, tmp_path, model):
    folder, file = write("a", 0, 29.0), tmp_path / "a" / "scores.json"
    found = json.loads(file.read_text())
    found["results"][0]["model"] |= model
    file.write_text(json.dumps(found))
    with pytest.raises(AclaError, match=r"not the scores of .* score it again"):
        results.main(["compare", folder])


def test_the_same_run_twice_and_what_is_no_scored_run_are_refused(write, tmp_path):
    one, two = write("a", 0, 29.0), write("b", 0, 29.0)
    other = write("c", 1, 29.0, sets=("Classic5",))
    (tmp_path / "bare").mkdir()
    imported = write("d", 0, 29.0)
    config = ModelConfig(attention="none", keys=0, **SIZE)
    save_model(tmp_path / "d" / "model.safetensors", build_network(config), config, Task(), {})
    for paths, message in (
        ((one, two), "are the same run"),
        ((one, other), "scored on other pictures"),
        ((str(tmp_path / "bare"),), "holds no scores.json: python evaluate.py"),
        ((imported,), "train.py did not write it"),
    ):
        with pytest.raises(AclaError, match=message):
            results.main(["compare", *paths])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("trial-*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_trials_are_those_of_their_runs(capsys, file):
    documents = (RESULTS.parent / "docs" / "results.md", RESULTS / "README.md")
    text = "".join(path.read_text(encoding="utf-8") for path in documents if path.is_file())
    assert f"python -m acla.analysis.results compare results/{file.name}\n" in text
    results.main(["compare", str(file)])
    assert capsys.readouterr().out in text
