"""The paper's tables: the printed figures, our sizes, why they differ, scores and times."""

import csv
import itertools
import json
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from evaluating import results, write_network

from acla.analysis import tables
from acla.config import Task, model_preset

DOUBLE = Task("sr", 2)
TINY = replace(model_preset("tiny", DOUBLE), attention="none", keys=0)
METRICS = {"flops_G_at_48x48": "macs_G", "inference_ms_V100_48x48": "ms"}

# At the paper's size: channels, positions of 48×48, EDSR's parameters and multiply-adds
C, N, EDSR = 256, 48 * 48, 40_729_627
EDSR_MACS = 9 * N * (3 * C + 65 * C * C + 4 * C * C + 4 * 3 * C) + 9 * N + 9 * 4 * N
HIDDEN = 2 * N * N * C  # multiply-adds of queries times keys and weights times values, all channels


def cells(capsys: pytest.CaptureFixture, *argv: object) -> list[list[str]]:
    """The cells of what the command prints as a table."""
    tables.main([*map(str, argv), "--device", "cpu"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1  # aligned
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.fixture(scope="module")
def paper():
    """{(table, method): row} of the tables whose sizes the paper prints."""
    rows = [row for table in (4, 5, 6, 7, 8, 11) for row in tables.make_rows(table, "paper")]
    return {(row.table, row.method): row for row in rows}


# The printed figures


def test_figures_are_the_papers(shared_data):
    source = shared_data.parent / "paper" / "results.csv"
    if not source.is_file():
        pytest.skip(f"the paper's figures are not there: {source}")
    printed, ours = {}, {}
    with open(source, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if int(row["table"]) in tables.TABLES:
                key = row["table"], row["method"]
                printed.setdefault(key, {})[METRICS.get(row["metric"], row["dataset"])] = row[
                    "value"
                ]
                if row["params_M"]:
                    printed[key]["params_M"] = row["params_M"]
    for row in tables.printed_rows():
        names = ("params_M", "macs_G", "ms", *tables.SETS)
        figures = {name: row[name] for name in names if row[name]}
        ours[row["table"], row["method"]] = figures
    assert list(ours) == list(printed)
    assert ours == printed


# Our sizes, and why they differ


def test_known_sizes(paper):
    plain, acla = paper[4, "EDSR"], paper[4, "ACLA (Ours)"]
    assert plain.ours == {"params": 40_729_627, "macs": EDSR_MACS}
    assert acla.ours["params"] == 42_292_187
    assert acla.ours["macs"] / 1e9 == pytest.approx(97.87, abs=0.005)
    assert plain.paper == {"params": 40.73e6, "macs": 93.97e9, "Set5": 38.11}
    assert paper[6, "CLA-I"].network.positions == (3, 12, 26, 31, 32)
    assert paper[6, "CLA-K"].network.positions == (8, 16, 24, 32)


@pytest.mark.parametrize(("L", "pairs"), [(4, 10), (8, 36), (16, 136), (32, 528)])
def test_evenly_spread_modules(paper, L, pairs):
    row = paper[5, f"CLA L={L}"]
    assert len(row.network.positions) == L
    steps = [b - a for a, b in itertools.pairwise((0, *row.network.positions))]
    assert steps == [32 // L] * L
    assert row.ours["params"] == EDSR + L * (C + 1) * C + pairs * (C + 1) * (C + 3 * 8)


def test_every_figure_that_differs_has_its_reason_and_no_other(paper):
    differ = {
        (*key, kind)
        for key, row in paper.items()
        for kind, most in (("params", 0.01), ("macs", 0.03))
        if abs(row.ours[kind] / row.paper[kind] - 1) > most
    }
    assert differ == {(*key, kind) for key, row in paper.items() for kind in row.notes}
    lines = tables.remarks(list(paper.values()))
    assert len(lines) == len(differ) == 16
    assert not [line for line in lines if line.count("\n") or not line.endswith(".")]
    assert lines[0].startswith(
        "- Table 4, NL, parameters: ours 41.26 M, the paper's 43.56 M (-5.3 %): 0.708 M a module"
    )


def linear(inputs: int, outputs: int) -> int:
    return (inputs + 1) * outputs


def says(row: tables.TableRow, kind: str, facts: dict[str, float]) -> None:
    """Every text stands in the reason, and its number is the value, to the digits that it has."""
    for text, value in facts.items():
        number = re.search(r"[0-9.]+", text)[0]
        assert text in row.notes[kind]
        assert f"{value:.{len(number.partition('.')[2])}f}" == number, text


def over(row: tables.TableRow, params: float = EDSR, macs: float = 93.97e9) -> tuple[float, float]:
    """What the paper prints more than that, by default than EDSR."""
    return row.paper["params"] - params, row.paper["macs"] - macs


def test_reasons_for_non_local_attention(paper):
    nl, clnl = paper[4, "NL"], paper[4, "CLNL"]
    full = 4 * linear(C, C), 4 * N * C * C + HIDDEN  # θ, φ, g, h of a module
    pair = 2 * linear(C, C), 2 * N * C * C + HIDDEN  # φ, g
    params, _ = over(nl)
    says(nl, "params", {"0.708 M": params / 4e6, "10.8 C²": params / 4 / C**2})
    totals = EDSR + 4 * full[0], EDSR_MACS + 4 * full[1]
    says(nl, "macs", {"107.14 G": totals[1] / 1e9, "41.78 M": totals[0] / 1e6})
    params, macs = over(clnl, nl.paper["params"], nl.paper["macs"])
    says(clnl, "params", {"0.385 M": params / 6e6, "5.9 C²": params / 6 / C**2})
    says(clnl, "macs", {"1.51 G": pair[1] / 2e9, "3.02 G": pair[1] / 1e9})
    says(clnl, "macs", {"2.2 G": macs / 6e9, "125.25 G": (totals[1] + 6 * pair[1]) / 1e9})
    says(clnl, "macs", {"42.57 M": (totals[0] + 6 * pair[0]) / 1e6})


def test_reasons_for_the_number_of_modules(paper):
    rows = {L: paper[5, f"CLA L={L}"] for L in (8, 16, 32)}
    pairs = {L: L * (L + 1) / 2 for L in rows}
    each = {L: (over(row)[0] - L * linear(C, C)) / pairs[L] / 1e3 for L, row in rows.items()}
    facts = {"85.9 k": each[8], "71.2 k": each[16], "69.0 k": each[32]}
    facts |= {"72.0 k": linear(C, C + 3 * 8) / 1e3}
    says(rows[32], "params", facts)
    says(rows[8], "params", facts | {"42.14 M": five_modules(8) / 1e6})
    # One price for a pair and one for a module, from the last two rows, miss the first by far
    prices = np.linalg.solve(
        [[pairs[16], 16], [pairs[32], 32]], [over(rows[L])[0] for L in (16, 32)]
    )
    assert over(rows[8])[0] - prices @ (pairs[8], 8) > 0.3e6
    params, macs = over(rows[32])
    aggregation = 3 * N * C * 8 * pairs[32]
    says(rows[32], "macs", {"88.96 G": macs / 1e9, "2307 for": macs / params, "N = 2304": N})
    rest = rows[32].ours["macs"] - aggregation
    says(rows[32], "macs", {"7.47 G": aggregation / 1e9, "186.19 G": rest / 1e9})


def five_modules(keys: int, per_key: int = 3) -> int:
    """EDSR with five modules, 15 pairs; ACLA has four outputs for a key."""
    return EDSR + 5 * linear(C, C) + 15 * linear(C, C + per_key * keys)


def test_reasons_for_the_number_of_keys(paper):
    says(paper[6, "CLA-K"], "params", {"42.29 M": five_modules(16, 4) / 1e6})
    for keys, text in {16: "42.23 M", 32: "42.42 M", 64: "42.79 M"}.items():
        row, total = paper[7, f"CLA K={keys}"], five_modules(keys)
        says(row, "params", {text: total / 1e6})
        assert abs(total / row.paper["params"] - 1) < 0.0015  # "to 0.1 %"
    last = paper[8, "ACLA K=128"]
    counts = [(keys, paper[8, f"ACLA K={keys}"].paper["params"]) for keys in (8, 16, 32, 64, 128)]
    steps = [(b - a) / (n - m) / 1e3 for (m, a), (n, b) in itertools.pairwise(counts)]
    texts = ("13.8, 7.5, 8.8 and 5.2 k", "7.5, 8.8 and 5.2 k", "8.8 and 5.2 k", "5.2 k")
    says(last, "params", dict(zip(texts, steps, strict=True)))
    says(last, "params", {"15.4 k": 15 * linear(C, 4) / 1e3})
    convolutions = N * (5 * C * C + 15 * (C * (C + 1) + 4 * 128 * C))
    says(last, "macs", {"3.40 G": 15 * 3 * N * C * 128 / 1e9, "7.56 G": convolutions / 1e9})
    says(last, "macs", {"5.20 G": over(last)[1] / 1e9})


def test_reasons_for_other_attention(paper):
    mha, se, both = (paper[11, f"EDSR + {name}"] for name in ("MHA", "SE", "ACLA + SE"))
    relative = 2 * 33  # offsets −16..16 on either axis, eight heads
    params = 3 * linear(C, C // 2) + linear(C // 2, C) + relative * C // 2 // 8
    macs = N * (2 * C * C + relative * C // 2) + HIDDEN // 2
    says(mha, "macs", {"1.56 G": over(mha)[1] / 4e9, "2.72 G": HIDDEN / 1e9})
    says(mha, "macs", {"100.57 G": (EDSR_MACS + 4 * macs) / 1e9})
    says(mha, "macs", {"41.26 M": (EDSR + 4 * params) / 1e6})
    params, macs = (more / 4 for more in over(se))
    squeezed = linear(C, C // 16) + linear(C // 16, C)
    says(se, "params", {"0.265 M": params / 1e6, "4.0 C²": params / C**2, "0.54 G": macs / 1e9})
    says(se, "params", {"8.5 k": squeezed / 1e3})
    more = (both.paper["params"] - five_modules(16, 4)) / 5
    says(both, "params", {"0.236 M": more / 1e6, "3.6 C²": more / C**2, "4.0 C²": params / C**2})


# The command


@pytest.mark.parametrize("table", [4, 5, 12])
def test_tables_are_printed(capsys, table):
    head, rule, *lines = cells(capsys, table, "--preset", "tiny")
    assert head[:3] == ["", "parameters, M", "multiply-adds, G"]
    assert set("".join(rule)) == {"-"}
    assert [line[0] for line in lines] == [r.method for r in tables.make_rows(table, "tiny")]
    assert ("ms (on a V100)" in head) == (table == 12)


def test_ours_stand_beside_the_papers(capsys):
    table = {line[0]: line[1:] for line in cells(capsys, "11", "--preset", "tiny")}
    macs = sum(c * k for c, k in ((3 * 16, 9), (65 * 256, 9), (4 * 256, 9), (4 * 16 * 3, 9)))
    assert table["EDSR"] == [
        "0.16 (40.73)",
        f"{48 * 48 * macs / 1e9:.2f} (93.97)",
        *(f"– ({psnr})" for psnr in ("38.11", "33.92", "32.32", "32.93", "39.10")),
    ]


def test_times_are_medians_over_turns(monkeypatch):
    """The machine is slow in the second round and slower still in the third."""
    rows = tables.make_rows(12, "tiny")
    timed = []

    def turns(calls, device, seconds, rounds):
        timed.append(len(calls))
        for call in calls:
            assert call().shape == (1, 3, 96, 96)
        return [[(i + 1) * t for t in (10, 20, 90)] for i in range(len(calls))]

    monkeypatch.setattr(tables, "paired", turns)
    tables.add_times(rows, torch.device("cpu"))
    assert {row.method: (row.ours.get("ms"), row.ours.get("ratio")) for row in rows} == {
        "RCAN": (20, 1),
        "HAN": (40, 2),
        "SAN": (None, None),
        "RCAN+ACLA": (60, 3),
        "EDSR": (20, 1),
        "EDSR+ACLA": (40, 2),
    }
    assert timed == [3, 2]
    assert rows[3].paper["ratio"] == pytest.approx(36.9 / 32.7)


def test_times_are_two_columns_more(capsys, monkeypatch):
    monkeypatch.setattr(tables, "paired", lambda calls, *_: [[20.0, 30.0, 40.0]] * len(calls))
    head, _, *lines = cells(capsys, 11, "--preset", "tiny", "--time")
    assert head[-2:] == ["ms (on a V100)", "time over backbone's"]
    assert lines[0][-2:] == ["30.00 (–)", "1.00 (–)"]


@pytest.fixture
def scores(capsys, root, tmp_path):
    """A function that scores a network on a set named Set5: the file, and the PSNR in dB."""
    (root / "Mine").rename(root / "Set5")

    def score(name, task=DOUBLE, flags=(), **fields):
        config = {name: value for name, value in vars(TINY).items() if name != "channels"}
        file = write_network(tmp_path / f"{name}.safetensors", task, **(config | fields))
        found = results(capsys, "--dataset", "Set5", "--checkpoint", file, "--data", root, *flags)
        (tmp_path / f"{name}.json").write_text(json.dumps({"results": found}))
        return tmp_path / f"{name}.json", found[0]["mean"]["psnr"]

    return score


SEARCHED = {"attention": "cla", "keys": 8, "positions": (3, 12, 26, 31, 32), "offset_radius": 6.0}


def test_a_scored_network_stands_where_it_belongs(capsys, scores):
    plain, psnr = scores("plain", keys=16, offset_radius=3.0)
    searched, other = scores("cla-i", **SEARCHED)
    flags = ["--preset", "tiny", "--scores", plain, searched]
    rows = {line[0]: line[3:] for line in cells(capsys, 11, *flags)[2:]}
    rest = ["– (33.92)", "– (32.32)", "– (32.93)", "– (39.10)"]
    assert rows.pop("EDSR") == [f"{psnr:.2f} (38.11)", *rest]
    assert all(cell.startswith("–") for line in rows.values() for cell in line)
    rows = {line[0]: line[3] for line in cells(capsys, 6, *flags)[2:]}
    assert rows.pop("CLA-I").startswith(f"{other:.2f} (")
    assert all(cell.startswith("–") for cell in rows.values())


@pytest.mark.parametrize(
    "fields",
    [
        {"width": 8},
        {"blocks": 31},
        {"residual_scale": 0.5},
        {"task": Task("sr", 3), "scale": 3},
        {"attention": "acla", "keys": 8, "positions": (3, 12, 26, 31, 32)},
        {"attention": "acla", "keys": 16, "positions": (3, 12, 26, 31)},
        {"flags": ["--ensemble"]},
    ],
    ids=str,
)
def test_other_networks_are_not(capsys, scores, fields):
    file, _ = scores("other", **fields)
    lines = cells(capsys, 4, "--preset", "tiny", "--scores", file)[2:]
    assert all(line[3].startswith("–") for line in lines)


def test_of_two_networks_alike_the_first_counts(capsys, scores):
    first, psnr = scores("a")
    second, _ = scores("b", keys=16, offset_radius=3.0)
    tables.main(["11", "--preset", "tiny", "--scores", str(first), str(second)])
    out, err = capsys.readouterr()
    assert f"{psnr:.2f} (38.11)" in out
    assert "left out: Set5 x2 of ours: b: the second of its kind" in err


def test_unknown_tables_are_refused(capsys):
    with pytest.raises(SystemExit):
        tables.main(["9"])
    assert "choose from 4, 5, 6, 7, 8, 11, 12" in capsys.readouterr().err
