"""The ground truth of a small space: every subset is trained once, and a file is gone on with."""

import json
from pathlib import Path

import pytest
from running import SHORT

from acla.analysis import truth
from acla.errors import AclaError, UsageError

pytestmark = pytest.mark.usefixtures("elsewhere")
TINY = ["t.jsonl", "--task", "demosaic", "--blocks", "2", "--width", "4", "--keys", "3"]
TINY += [*SHORT[:4], "--steps", "3"]
EVERY = {(), (1,), (2,), (1, 2)}


@pytest.fixture
def flags(small_sets):
    return [*TINY, *small_sets]


def test_every_subset_is_trained_and_grouping_changes_no_bit(flags):
    truth.main([*flags, "--seeds", "2"])
    plan, rows = truth.read_truth(Path("t.jsonl"))
    assert {(row["positions"], row["seed"]) for row in rows} == {
        (p, s) for p in EVERY for s in (0, 1)
    }
    assert len(rows) == 8
    assert plan["model"]["width"] == 4
    by_positions = {row["positions"]: row for row in rows if row["seed"] == 0}
    assert by_positions[()]["attention_macs_48x48"] == 0
    assert by_positions[1, 2]["params"] > by_positions[2,]["params"] > by_positions[()]["params"]
    assert all(5 < row["mean"] == row["psnr"]["V"] for row in rows)
    truth.main([*flags, "--seeds", "2", "--together", "3"])  # nothing is left
    assert len(truth.read_truth(Path("t.jsonl"))[1]) == 8
    Path("t.jsonl").rename("alone.jsonl")
    truth.main([*flags, "--seeds", "2", "--together", "3"])
    psnr = [
        {(row["positions"], row["seed"]): row["psnr"] for row in truth.read_truth(Path(file))[1]}
        for file in ("alone.jsonl", "t.jsonl")
    ]
    assert psnr[0] == psnr[1]


def test_a_file_cut_short_is_completed_and_another_plan_is_refused(flags):
    truth.main(flags)
    whole = Path("t.jsonl").read_text()
    Path("t.jsonl").write_text(whole[:-40])
    truth.main(flags)
    before, after = whole.splitlines(), Path("t.jsonl").read_text().splitlines()
    assert [row.partition(', "seconds"')[0] for row in after] == [
        row.partition(', "seconds"')[0] for row in before
    ]
    with pytest.raises(UsageError, match=r"t\.jsonl holds networks of another plan"):
        truth.main([*flags, "--width", "6"])
    assert json.loads(whole.splitlines()[0])["plan"]["data"] == {"V": 1, "train": 3}


@pytest.mark.slow
def test_processes_train_the_same_networks(flags):
    truth.main([*flags, "--jobs", "2"])
    assert {row["positions"] for row in truth.read_truth(Path("t.jsonl"))[1]} == EVERY


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--blocks", "13"], "at most --blocks 12"),
        (["--attention", "none", "--keys", "0"], "every subset .* none"),
        (["--jobs", "0"], "--jobs must be 1 or more"),
    ],
)
def test_spaces_too_large_or_empty_are_refused(flags, words, message):
    with pytest.raises(UsageError, match=message):
        truth.main([*flags, *words])
    assert not Path("t.jsonl").exists()


def test_another_file_is_refused(flags):
    Path("t.jsonl").write_text("[]\n")
    with pytest.raises(AclaError, match=r"t\.jsonl: not a file of acla\.analysis\.truth"):
        truth.main(flags)
