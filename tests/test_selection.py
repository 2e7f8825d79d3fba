"""Choosing λ by cross-validation and by budget, and agreement over seeds."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from searching import SHORT, SMALL, elsewhere  # noqa: F401

import search
from acla.config import ModelConfig, Task
from acla.data.image import save
from acla.errors import AclaError, DataError, UsageError
from acla.search import lambda_selection
from acla.search.architecture import Architecture, read_architecture
from acla.search.result import SearchResult


def result(
    positions: tuple[int, ...], psnr: list[float], lam: float = 0.1, seed: int = 0
) -> SearchResult:
    model = ModelConfig(blocks=4, width=8, keys=3, channels=1, positions=positions)
    alpha = tuple(1.0 if j in positions else -1.0 for j in range(1, 5))
    cost = 1e6 * len(positions)
    return SearchResult(Architecture(Task(), model, lam, seed, alpha, cost, 16), tuple(psnr))


def answers(monkeypatch, by_lambda):
    """Let every search find what `by_lambda` says; returns the λ asked for, in order."""
    asked = []

    def run(plan, sets, out, *_, **__):
        asked.append(plan.search.lam)
        out.mkdir(parents=True, exist_ok=True)
        for name in ("search.jsonl", "model.safetensors"):
            (out / name).write_text(str(plan.search.lam))
        return by_lambda(plan.search.lam)

    monkeypatch.setattr(lambda_selection, "run_search", run)
    return asked


# Cross-validation


@pytest.mark.parametrize(
    ("psnr", "chosen"),
    [
        ({0.1: [30, 31, 32], 0.2: [29, 30, 31], 0.4: [28, 29, 30]}, 0.1),
        ({0.1: [30, 31, 32], 0.2: [30.1, 30.9, 31.9], 0.4: [28, 29, 30]}, 0.2),
        ({0.1: [30, 31, 32], 0.2: [29, 30, 31], 0.4: [30, 31, 32]}, 0.4),
        ({0.1: [28, 28, 28], 0.2: [29, 29, 29], 0.4: [28, 29, 28]}, 0.2),
    ],
    ids=["clearly-best", "within-a-standard-error", "equal", "best-in-the-middle"],
)
def test_the_largest_lambda_that_is_not_measurably_worse_is_chosen(monkeypatch, psnr, chosen):
    answers(monkeypatch, lambda lam: result((1, 2), psnr[lam], lam))
    plan = search.plan_from_flags(search.parse([*SMALL, *SHORT]), "tiny")
    lam, rows = lambda_selection.cross_validate(
        plan, Path("../data"), Path("trials"), tuple(psnr), None
    )
    assert lam == chosen
    assert [row["lambda"] for row in rows] == sorted(psnr)
    assert rows[0]["psnr"] == pytest.approx(np.mean(psnr[0.1]))
    assert all(len(row["macs"]) == lambda_selection.FOLDS for row in rows)


def test_folds_use_a_fifth_of_the_pictures_and_keep_the_scored_ones_apart(tmp_path):
    from PIL import Image

    (tmp_path / "many").mkdir()
    for i in range(45):
        Image.new("L", (16, 16), i).save(tmp_path / "many" / f"{i:02d}.png")
    folds = lambda_selection.fold_sets("many", tmp_path)
    used = {path for sets in folds for part in vars(sets).values() for path in part}
    assert len(used) == 9
    scored = [path for sets in folds for path in sets.score]
    assert sorted(scored) == sorted(used)
    for sets in folds:
        parts = [set(sets.weights), set(sets.alpha), set(sets.score)]
        assert all(parts)
        assert sum(map(len, parts)) == len(used)


def test_too_few_pictures_to_cross_validate_are_refused(tmp_path):
    from PIL import Image

    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.new("L", (16, 16), i).save(tmp_path / "few" / f"{i}.png")
    with pytest.raises(DataError, match="too few to cross-validate"):
        lambda_selection.fold_sets("few", tmp_path)


def test_lambda_auto_keeps_its_table_in_arch_json(capsys):
    words = ["--lambda", "auto", "--grid", "0.01,1", "--steps", "10"]
    search.main([*SMALL, *SHORT, *words])
    architecture = read_architecture(Path("runs/search/arch.json"))
    rows = architecture.evidence["cross_validation"]
    assert [row["lambda"] for row in rows] == [0.01, 1.0]
    assert architecture.lam in (0.01, 1.0)
    assert "below the best" in capsys.readouterr().out
    folds = sorted(path.name for path in Path("runs/search/trials").iterdir())
    assert folds == [f"lambda-{lam}-fold-{i}" for lam in ("0.01", "1") for i in (1, 2)]
    before = Path("runs/search/arch.json").read_text()
    search.main(["--resume"])  # finished trials are not searched again
    assert Path("runs/search/arch.json").read_text() == before


# Budget


def test_a_budget_is_met_as_closely_as_modules_allow(monkeypatch):
    # The smaller λ, the more modules; λ = 0.02 of the tiny preset finds all four.
    def by_lambda(lam):
        count = int(np.clip(4 - np.floor(np.log2(lam / 0.02)), 0, 4))
        return result(tuple(range(1, count + 1)), [30.0], lam)

    asked = answers(monkeypatch, by_lambda)
    plan = search.plan_from_flags(search.parse([*SMALL, *SHORT, "--blocks", "4"]), "tiny")
    two = lambda_selection.macs(plan.model, 2)
    processes = search.join(search.cli.pick_device("cpu"))
    for budget, count in ((two, 2), (two * 1.2, 2), (two - 1, 1), (1, 0), (1e12, 4)):
        asked.clear()
        best = lambda_selection.within_budget(plan, None, Path(), budget, processes, {})
        assert len(best.architecture.model.positions) == count
        rows = best.architecture.evidence["budget"]["trials"]
        assert [row["lambda"] for row in rows] == asked
        assert len(asked) <= lambda_selection.BUDGET_TRIALS
        assert read_architecture(Path("arch.json")) == best.architecture


def test_a_budget_that_no_lambda_meets_says_what_was_tried(monkeypatch):
    asked = answers(monkeypatch, lambda lam: result((1, 2, 3), [30.0], lam))
    plan = search.plan_from_flags(search.parse([*SMALL, *SHORT]), "tiny")
    processes = search.join(search.cli.pick_device("cpu"))
    with pytest.raises(AclaError, match=r"no λ up to .* raise --budget"):
        lambda_selection.within_budget(plan, None, Path(), 1, processes, {})
    assert asked == sorted(asked)


def test_a_budget_search_shares_its_first_stage():
    words = ["--budget", "1", "--warmup", "0.5", "--alpha-lr", "0.5", "--steps", "24"]
    search.main([*SMALL, *SHORT, *words, "--lambda", "1e5"])
    assert read_architecture(Path("runs/search/arch.json")).model.positions == ()
    trials = sorted(Path("runs/search/trials").glob("lambda-*"))
    assert trials
    assert Path("runs/search/trials/first-stage.safetensors").is_file()
    assert Path("runs/search/model.safetensors").is_file()


def test_every_trial_of_a_budget_has_the_rows_of_the_first_stage(monkeypatch):
    monkeypatch.setattr(lambda_selection, "BUDGET_TRIALS", 2)
    words = ["--budget", "1", "--warmup", "0.5", "--steps", "8", "--epoch-steps", "2"]
    with pytest.raises(AclaError, match="no λ up to"):
        search.main([*SMALL, *SHORT, *words, "--lambda", "1e-9"])
    logs = sorted(Path("runs/search/trials").glob("lambda-*/search.jsonl"))
    rows = [[json.loads(line) for line in log.read_text().splitlines()] for log in logs]
    assert [[row["step"] for row in one] for one in rows] == [[2, 4, 6, 8]] * 2
    assert rows[0][:2] == rows[1][:2]


# Seeds


def test_agreement_counts_positions_and_spread():
    report = lambda_selection.agreement(
        [result((1, 2), [30.0, 31.0], seed=4), result((2, 3), [30.5, 31.5], seed=5)]
    )
    assert report["seeds"] == [4, 5]
    assert report["runs_by_position"] == {"1": 1, "2": 2, "3": 1}
    assert report["overlap"] == pytest.approx(1 / 3)
    assert (report["cost_mean"], report["cost_std"]) == (2e6, 0.0)
    assert report["psnr_mean"] == pytest.approx(30.75)
    assert report["psnr_std"] == pytest.approx(np.std([30.5, 31.0], ddof=1))
    text = lambda_selection.agreement_table(report)
    assert "2 in 2 of 2; 1, 3 in 1 of 2" in text
    nothing = lambda_selection.agreement([result((), [30.0]), result((), [30.0])])
    assert nothing["overlap"] == 1
    assert "no position is open in any run" in lambda_selection.agreement_table(nothing)


def test_several_seeds_are_searched_and_compared_and_resumed_with_no_other_plan(capsys):
    search.main([*SMALL, *SHORT, "--seeds", "2", "--seed", "3"])
    shown = capsys.readouterr().out
    assert "agreement:" in shown
    best = read_architecture(Path("runs/search/arch.json"))
    each = [read_architecture(Path(f"runs/search/seed-{s}/arch.json")) for s in (3, 4)]
    assert [one.seed for one in each] == [3, 4]
    assert best.alpha == max(each, key=lambda one: one.evidence["val_psnr"]).alpha
    assert best.evidence["agreement"]["seeds"] == [3, 4]
    log = Path(f"runs/search/seed-{best.seed}/search.jsonl").read_text()
    assert Path("runs/search/search.jsonl").read_text() == log
    alone = [*SMALL, *SHORT, "--seed", "4", "--out", "alone"]
    search.main(alone)
    assert read_architecture(Path("alone/arch.json")).alpha == each[1].alpha
    with pytest.raises(UsageError, match="leave out --seeds"):
        search.main(["--resume", "--seeds", "3"])
    with pytest.raises(UsageError, match="leave out --lambda"):
        search.main(["--resume", "--lambda", "auto"])
    plan = json.loads(Path("runs/search/plan.json").read_text())
    Path("runs/search/plan.json").write_text(json.dumps({**plan, "plan": 3}))
    with pytest.raises(AclaError, match="not valid"):
        search.main(["--resume"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--grid", "1"], "--grid goes with --lambda auto"),
        (["--lambda", "auto", "--budget", "1e6"], "both choose λ"),
        (["--budget", "0"], "--budget must be above 0"),
        (["--seeds", "0"], "--seeds must be 1 to 100"),
        (["--residual-scale", "nan"], "--residual-scale must be finite, not nan"),
    ],
)
def test_contradictions_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        search.main([*SMALL, *SHORT, *words])
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lambda", "much"], "wants a number or auto, not 'much'"),
        (["--grid", "1,x"], "wants numbers of 0 or more, 0.1,0.2, not '1,x'"),
        (["--grid", "-1"], "wants numbers of 0 or more"),
    ],
)
def test_what_is_no_number_is_refused_with_what_is_wanted(capsys, words, message):
    with pytest.raises(SystemExit):
        search.parse(["--lambda", "auto", *words])
    assert message in capsys.readouterr().err


def test_pictures_that_cannot_be_scored_are_found_before_the_search(tmp_path):
    (tmp_path / "Mine").mkdir()
    for name in "abcde":
        save(torch.rand(3, 40, 40), tmp_path / "Mine" / f"{name}.png")
    save(torch.rand(3, 4, 4), tmp_path / "Mine" / "e.png")
    words = ["--task", "sr", "--data", str(tmp_path), "--train-set", "Mine"]
    with pytest.raises(DataError, match=r"Mine/e\.png: .*without a border"):
        search.main([*SMALL, *SHORT, *words])
    assert not Path("runs/search/search.jsonl").exists()
