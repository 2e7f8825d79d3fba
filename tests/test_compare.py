"""Runs side by side: what is grouped, what is said to differ, means, spreads and gains."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest

from acla.analysis import compare
from acla.cli import run
from acla.config import ModelConfig, Task, TrainConfig
from acla.errors import AclaError
from acla.models.factory import build_network, describe
from acla.models.serialization import save_model

RESULTS = Path(__file__).parents[1] / "results"
SIZE = {"blocks": 2, "width": 4, "channels": 1}


@pytest.fixture
def write(tmp_path):
    """A function that writes the folder of a run with given scores."""

    def write(
        name,
        seed,
        psnr,
        seconds=5.0,
        sets=("LIVE1",),
        begun=None,
        data="a",
        pictures=None,
        tile=None,
        **fields,
    ):
        pictures = pictures or {}
        fields = SIZE | {"attention": "none", "keys": 0} | fields
        config, folder = ModelConfig(**fields), tmp_path / name
        folder.mkdir()
        train = vars(TrainConfig(seed=seed))
        info = {"train": train, "step": 10, "seconds": seconds, "data": {"train": data}}
        info["begun_with"] = begun and {"file": "plain.safetensors", "sha256": begun}
        file = folder / "model.safetensors"
        save_model(file, build_network(config), config, Task(), info)
        common = {"task": "car", "setting": 10, "published": {}, "protocol": "car q10: Y"}
        model = {"kind": "network", "checkpoint": str(file), "ensemble": False, "tile": tile}
        results = [
            {
                "dataset": s,
                "model": model,
                "mean": {"psnr": psnr, "ssim": 0.8},
                "images": [{"name": name, "psnr": value} for name, value in pictures.items()],
                **common,
            }
            for s in sets
        ]
        (folder / "scores.json").write_text(json.dumps({"results": results}))
        return str(folder)

    return write


def table(capsys, *argv):
    compare.main(list(argv))
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
    assert head == [
        "",
        "seeds",
        "parameters",
        "multiply-adds",
        "s/step",
        "LIVE1 q10",
        "gain",
    ]
    assert one[0] == "attention none, positions –"
    assert one[1:] == [
        "2",
        f"{describe(ModelConfig(attention='none', keys=0, **SIZE))['params']:,}",
        "0.002 G",
        "1.000",
        "29.100 ± 0.141",
        "–",
    ]
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
        compare.main([plain[0], other])


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
        compare.main([file, file])


@pytest.mark.parametrize("text", ["", "[]", '{"runs": [1]}', '{"runs": [{"model": {}}]}', "\x00"])
def test_a_file_of_anything_else_is_refused(tmp_path, text):
    (tmp_path / "kept.json").write_text(text)
    with pytest.raises(AclaError, match="not a file of acla"):
        compare.main([str(tmp_path / "kept.json")])


def test_scores_of_an_older_network_are_refused(capsys, write, tmp_path):
    folder = write("a", 0, 29.0)
    file = tmp_path / "a" / "scores.json"
    found = json.loads(file.read_text())
    network = (tmp_path / "a" / "model.safetensors").read_bytes()
    found["results"][0]["model"]["sha256"] = hashlib.sha256(network).hexdigest()
    file.write_text(json.dumps(found))
    assert len(table(capsys, folder)) == 3
    found["results"][0]["model"]["sha256"] = "0"
    file.write_text(json.dumps(found))
    with pytest.raises(AclaError, match="written anew since: score it again"):
        compare.main([folder])


def test_scores_must_be_the_runs_own(capsys, write, tmp_path):
    one, two = write("a", 0, 29.0), write("b", 1, None)
    other = (tmp_path / "b" / "scores.json").read_text()
    with pytest.raises(AclaError, match="PSNR has no mean"):
        compare.main([two])
    three = write("c", 0, 29.0, pictures={"x": 28.0, "exact": None})
    with pytest.raises(AclaError, match="PSNR has no mean"):
        compare.main([three])
    (tmp_path / "a" / "scores.json").write_text(other)
    with pytest.raises(AclaError, match=r"the scores of .*b/model.safetensors, not of"):
        compare.main([one])
    found = json.loads(other)
    found["results"][0]["model"] = {"kind": "baseline"}
    (tmp_path / "a" / "scores.json").write_text(json.dumps(found))
    with pytest.raises(AclaError, match="not of"):
        compare.main([one])


def test_the_same_run_twice_or_other_sets_are_refused(capsys, write, tmp_path):
    one, two = write("a", 0, 29.0), write("b", 0, 29.0)
    other = write("c", 1, 29.0, sets=("Classic5",))
    bare = tmp_path / "bare"
    bare.mkdir()
    for argv, message in (
        ((one, two), "are the same run"),
        ((one, other), "scored on other pictures"),
        ((str(bare),), "holds no scores.json: python evaluate.py"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(compare.main, list(argv))
        assert stop.value.code == 1
        assert message in capsys.readouterr().err


def test_a_network_that_train_did_not_write_is_refused(capsys, write, tmp_path):
    folder = write("a", 0, 29.0)
    config = ModelConfig(attention="none", keys=0, **SIZE)
    save_model(tmp_path / "a" / "model.safetensors", build_network(config), config, Task(), {})
    with pytest.raises(SystemExit):
        run(compare.main, [folder])
    assert "train.py did not write it" in capsys.readouterr().err


@pytest.mark.parametrize("file", sorted(RESULTS.glob("trial-*.json")), ids=lambda path: path.stem)
def test_the_tables_of_the_trials_are_those_of_their_runs(capsys, file):
    text = (RESULTS / "README.md").read_text(encoding="utf-8")
    assert f"python -m acla.analysis.compare results/{file.name}\n" in text
    compare.main([str(file)])
    assert capsys.readouterr().out in text
