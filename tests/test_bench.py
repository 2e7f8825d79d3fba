"""The benchmark: contenders agree, a wrong one is refused, rows and ratios are what they say."""

import json

import pytest
import torch

from kernels import bench, timing

TINY = ["--sizes", "1x6x5x8", "--seconds", "0"]
FIELDS = {
    *("device", "dtype", "B", "L", "K", "H", "W", "C", "keep", "backend", "pass"),
    *("ms_p20", "ms_p50", "ms_p80", "peak_mb", "commit"),
}


def test_rows_have_their_fields_and_every_contender(capsys):
    bench.main([*TINY, "--only", "operator", "--json", "-"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.keys() >= FIELDS for row in rows)
    names = {row["backend"] for row in rows}
    assert {"torch", "grid_sample per layer", "grid_sample per key", "conv3x3"} <= names
    assert all(0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows)
    kept = sorted({row["keep"] for row in rows})
    assert kept[-1] == 1
    assert kept[0] < 0.4


def test_ratios_are_printed_last(capsys):
    bench.main([*TINY, "--only", "operator"])
    out = capsys.readouterr().out
    assert "1 CPU thread(s)" in out
    assert "as the better grid_sample" in out
    assert "of its time with all" in out


@pytest.mark.parametrize("spoil", ["result", "gradient"])
def test_a_wrong_contender_is_never_timed(spoil):
    case = bench.make_case((1, 5, 4, 3), 0.5, torch.float32, "cpu")
    right = bench.by_grid_sample(per_key=True)
    bench.require_right("right", right, case)

    def wrong(case):
        out = right(case)
        return out * 1.001 if spoil == "result" else out.detach() + 0 * out

    with pytest.raises(SystemExit, match="wrong is wrong"):
        bench.require_right("wrong", wrong, case)


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_masks_keep_about_what_is_asked(keep):
    case = bench.make_case((2, 24, 24, 2), keep, torch.float32, "cpu")
    assert case.kept() == pytest.approx(keep, abs=0.03)


def test_paired_times_take_turns():
    calls = []
    works = {name: (lambda name=name: calls.append(name)) for name in "ab"}
    times = timing.paired(works, "cpu", 0.0, least=3)
    assert calls == ["a", "b"] * 4
    assert [len(t) for t in times.values()] == [3, 3]


def test_peak_memory_counts_what_was_alive_together():
    def work():
        first = torch.ones(1000, 250)  # 1 MB
        second = first + first
        del first
        return second + second

    assert timing.peak_mb(work, "cpu") == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize("sizes", ["1x2x3", "axbxcxd", "0x2x3x4", ""])
def test_impossible_sizes_are_refused(sizes, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--sizes", sizes])
    assert stopped.value.code == 2
    assert "BxHxWxC" in capsys.readouterr().err


def test_a_device_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "use --device cpu" in capsys.readouterr().err
