"""Drawings of searches: what they show, and what is refused."""

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from acla.analysis import plots
from acla.config import ModelConfig, Task
from acla.errors import AclaError, UsageError
from acla.search.architecture import Architecture, Candidate


def write_log(folder: Path, steps: int = 3) -> Path:
    folder.mkdir()
    rows = [
        {
            "step": step,
            "alpha": [0.1 * step, -0.1 * step],
            "tau": 1 / step,
            "cost": 1e6 * step,
            "kept": 0.9,
            "val_psnr": 29 + 0.1 * step,
        }
        for step in range(1, steps + 1)
    ]
    (folder / "search.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_every_search_is_a_column(tmp_path, capsys):
    folders = [write_log(tmp_path / name) for name in "ab"]
    plots.main([str(folders[0])])
    plots.main([*map(str, folders), "--out", str(tmp_path / "both.png")])
    with Image.open(folders[0] / "search.png") as one, Image.open(tmp_path / "both.png") as two:
        assert two.size[0] == one.size[0] * 3 // 2
        assert len(two.convert("L").histogram()) - two.convert("L").histogram().count(0) > 20
    assert "both.png" in capsys.readouterr().out


def test_fronts_and_the_truth_are_gains_over_no_attention(tmp_path):
    from matplotlib import pyplot

    points = (Candidate((), 30.0, 0), Candidate((2,), 30.5, 4_000_000))
    model = ModelConfig(blocks=2, width=4, keys=2, channels=1)
    found = Architecture(Task(), model, 0.1, 0, (0.0, 0.0), 1.0, 16, {}, points)
    (tmp_path / "arch.json").write_text(found.to_json())
    networks = {(): 33.0, (1,): 33.1, (2,): 33.4, (1, 2): 33.3}
    rows = [
        {"positions": p, "seed": 0, "psnr": {"V": v}, "attention_macs_48x48": 4e6 * len(p)}
        for p, v in networks.items()
    ]
    lines = [json.dumps(row) + "\n" for row in ({"plan": {}}, *rows)]
    (tmp_path / "t.jsonl").write_text("".join(lines))
    _, axis = pyplot.subplots()
    plots.draw_fronts(axis, [tmp_path], tmp_path / "t.jsonl")
    front, truth = axis.lines
    assert list(front.get_xdata()) == [0, 4]
    assert list(front.get_ydata()) == [0, 0.5]
    assert list(truth.get_ydata()) == pytest.approx([0, 0.1, 0.4, 0.3])
    assert [text.get_text() for text in axis.texts] == ["none", "2"]
    pyplot.close()
    plots.main([str(tmp_path)])
    with Image.open(tmp_path / "search.png") as alone:
        assert alone.size == (660, 440)


def test_positions_that_end_open_are_named(tmp_path):
    from matplotlib import pyplot

    _, axis = pyplot.subplots()
    plots.draw_alpha(axis, plots.read_log(write_log(tmp_path / "a")))
    assert [text.get_text() for text in axis.texts] == ["1"]
    alpha = [list(line.get_ydata()) for line in axis.lines[:2]]
    assert alpha == [[0.1 * step for step in (1, 2, 3)], [-0.1 * step for step in (1, 2, 3)]]
    pyplot.close()


@pytest.mark.parametrize("text", ["{", '{"step": 1}\n', "5\n"])
def test_what_is_no_log_is_refused(tmp_path, text):
    (tmp_path / "search.jsonl").write_text(text)
    with pytest.raises(AclaError, match=r"search.jsonl: not a log of search.py"):
        plots.main([str(tmp_path)])


def test_other_formats_and_no_matplotlib_are_refused(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match="must end in"):
        plots.main([str(tmp_path), "--out", "x.txt"])
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UsageError, match=r"pip install '.\[report\]'"):
        plots.main([str(write_log(tmp_path / "a"))])
