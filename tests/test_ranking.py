"""Kendall's tau, regret and spread against a ground truth, where the answer is known."""

import itertools
import json
from pathlib import Path

import pytest
from searching import SHORT, SMALL, elsewhere  # noqa: F401

import search
from acla.analysis import ranking, truth
from acla.errors import UsageError
from acla.search import loop

NETWORKS = [p for n in range(4) for p in itertools.combinations((1, 2, 3), n)]
WORTH = {1: 0.1, 2: 0.4, 3: 0.2}
TRUTH = {p: 30 + sum(WORTH[j] for j in p) for p in NETWORKS}


def test_a_perfect_ranking_has_tau_1_and_no_regret_and_its_opposite_all_of_it():
    assert ranking.tau(TRUTH, TRUTH) == pytest.approx((1, 1))
    assert ranking.regret(ranking.best_by(TRUTH), TRUTH) == pytest.approx(0)
    opposite = {p: -psnr for p, psnr in TRUTH.items()}
    assert ranking.tau(opposite, TRUTH) == pytest.approx((-1, -1))
    # One module: 1 in place of 2; two: 1, 3 in place of 2, 3
    assert ranking.regret(ranking.best_by(opposite), TRUTH) == pytest.approx((0.3 + 0.3) / 4)


def test_more_modules_that_are_worse_are_regretted():
    worse = {p: 30 - 0.1 * len(p) for p in NETWORKS}
    assert ranking.regret(ranking.best_by(worse), worse) == pytest.approx((0.1 + 0.2 + 0.3) / 4)
    assert ranking.pareto(worse) == [()]
    assert ranking.pareto(TRUTH) == [(), (2,), (2, 3), (1, 2, 3)]


def test_the_spread_between_seeds_is_told_from_that_between_positions():
    def rows(noise: float, worth: float) -> list[dict]:
        # The networks of one cost change in turns; a seed's own level is no noise.
        return [
            {
                "positions": p,
                "seed": seed,
                "mean": 30 + seed + worth * TRUTH[p] + noise * (-1) ** (seed + sum(p)),
            }
            for p, seed in itertools.product(NETWORKS, (0, 1))
        ]

    alone = ranking.deviations(rows(0.0, 1.0))
    assert alone["seeds"] == pytest.approx(0, abs=1e-9)
    assert alone["positions"] == pytest.approx(0.153, abs=0.01)
    assert alone["at_most"] > alone["positions"]
    noisy = ranking.deviations(rows(1.0, 0.0))
    assert noisy["positions"] == 0
    assert noisy["seeds"] > 1


def test_chance_is_the_share_of_block_names_by_which_a_search_ranks_as_well(monkeypatch):
    assert ranking.chance([TRUTH], TRUTH, 3) == pytest.approx(1 / 6)
    opposite = {p: -psnr for p, psnr in TRUTH.items()}
    assert ranking.chance([opposite], TRUTH, 3) == 1
    monkeypatch.setattr(ranking, "EXACT", 2)  # two orders, one of them as it is
    assert ranking.chance([TRUTH], TRUTH, 3) in (0.5, 1)
    assert ranking.chance([opposite], TRUTH, 3) == 1


def test_searches_are_judged_by_the_truth(capsys, monkeypatch):
    monkeypatch.setattr(loop, "PATCHES", 4)
    flags = ["--blocks", "3", "--width", "8", "--keys", "3", *SHORT[:4], "--train-set", "few"]
    model = truth.plan_from_flags(truth.parse(["t.jsonl", *flags])).model
    with open("t.jsonl", "w") as file:
        file.write(json.dumps({"plan": {"model": truth.asdict(model)}}) + "\n")
        for p, seed in itertools.product(NETWORKS, (0, 1)):
            row = {"positions": p, "seed": seed, "psnr": {"V": TRUTH[p] + 0.01 * seed}}
            file.write(json.dumps(row) + "\n")
    for method in ("paper", "front"):
        search.main([*SMALL, *SHORT, "--method", method, "--out", method])
    capsys.readouterr()
    ranking.main(["t.jsonl", "paper", "front", "--json", "scores.jsonl"])
    shown = capsys.readouterr().out
    ranking.main(["t.jsonl", "scores.jsonl"])
    assert capsys.readouterr().out == shown
    names = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    assert names[2:] == [
        "paper: supernet",
        "paper: α",
        "front: supernet",
        "a seed of the truth",
        "the truth",
        "even positions",
        "random positions",
    ]
    rows = {line.split("|")[1].strip(): line.split("|")[2:-1] for line in shown.splitlines()[2:9]}
    assert [cell.strip() for cell in rows["a seed of the truth"]] == [
        "2",
        "1.000 ± 0.000",
        "1.000 ± 0.000",
        "–",
        "0.000 ± 0.000",
    ]
    assert rows["the truth"][-1].strip() == "0.000"
    # Even: 3; 2, 3; all. Random: 30.233, 30.467 on average of 30.4, 30.6
    assert rows["even positions"][-1].strip() == f"{0.2 / 4:.3f}"
    assert rows["random positions"][-1].strip() == f"{(0.4 - 0.7 / 3 + 0.6 - 1.4 / 3) / 4:.3f}"
    assert "2 (30.405 dB)" in shown
    search.main([*SMALL, *SHORT, "--keys", "2", "--out", "other"])
    with pytest.raises(UsageError, match="not a search of the truth's network"):
        ranking.main(["t.jsonl", "other"])
    lines = Path("t.jsonl").read_text().splitlines(keepends=True)
    Path("t.jsonl").write_text("".join(lines[:5]))
    with pytest.raises(UsageError, match="2 of 8 networks: go on"):
        ranking.main(["t.jsonl"])
