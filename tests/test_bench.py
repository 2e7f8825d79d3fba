"""The operator's benchmark: implementations agree, a wrong one is left out, rows and ratios hold
what they say."""

import argparse
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from acla.kernels import bench, timing
from acla.kernels.baselines import by_grid_sample, make_case
from acla.kernels.floor import Gpu
from acla.training.step_graph import WARM_UP, StepGraph

TINY = ["--sizes", "1x6x5x8", "--seconds", "0"]
FIELDS = {
    *("device", "threads", "dtype", "B", "L", "K", "H", "W", "C", "keep", "backend", "pass"),
    *("ms_p20", "ms_p50", "ms_p80", "peak_mb"),
}


def test_rows_have_their_fields_and_every_implementation(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    assert bench.main([*TINY, "--json", str(path)]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert all(row.keys() == FIELDS | {"commit"} for row in rows)  # on CPUs no floor
    names = {row["backend"] for row in rows}
    assert {"torch", "grid_sample per layer", "grid_sample per key", "conv3x3"} <= names
    assert all(0 < row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] for row in rows)
    kept = sorted({row["keep"] for row in rows})
    assert kept[-1] == 1
    assert kept[0] < 0.4
    out = capsys.readouterr().out
    assert "1 CPU thread(s)" in out
    assert "as the better grid_sample" in out
    assert "of its time with all keys" in out


def test_rows_alone_are_on_standard_output(capsys):
    rows = bench.stream_rows([{"a": 1}, {"a": 2}], "-")
    lines = capsys.readouterr().out.splitlines()
    assert [json.loads(line)["a"] for line in lines] == [row["a"] for row in rows] == [1, 2]


@pytest.mark.parametrize("fault", ["result", "gradient", "raises"])
def test_a_faulty_implementation_is_never_timed(capsys, fault, monkeypatch):
    case = make_case((1, 5, 4, 3), 0.5, torch.float32, "cpu")
    right = by_grid_sample(per_key=True)

    def faulty(case):
        out = right(case)
        if fault == "raises":
            raise RuntimeError("no kernel image")
        return out * 1.001 if fault == "result" else out.detach() + 0 * out

    assert bench.working({"right": right, "other": faulty}, case) == {"right": right}
    assert "other is left out: " in capsys.readouterr().err
    monkeypatch.setattr(bench, "implementations", lambda device: {"torch": faulty, "grid": right})
    assert bench.main(TINY) == 1  # a backend of ours; the other rows are there
    assert "backend=grid" in capsys.readouterr().err


@pytest.mark.parametrize("per_key", [False, True], ids=["per-layer", "per-key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grid_sample_is_right_on_wide_features_of_sixteen_bits(dtype, per_key):
    case = make_case((1, 5, 4, 256), 0.5, dtype, "cpu")
    assert bench.error_of(by_grid_sample(per_key), case) is None


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_masks_keep_about_what_is_asked(keep):
    case = make_case((2, 24, 24, 2), keep, torch.float32, "cpu")
    assert case.kept() == pytest.approx(keep, abs=0.03)


def test_paired_times_take_turns():
    calls = []
    works = [lambda: calls.append("a"), lambda: calls.append("b")]
    times = timing.paired(works, "cpu", 0.0, least=3, queued=True)
    assert calls == ["a", "b"] * 4
    assert [len(taken) for taken in times] == [3, 3]


def test_peak_memory_counts_what_was_alive_together():
    def work():
        first = torch.ones(1000, 250)  # 1 MB
        second = first + first
        del first
        return second + second

    assert timing.peak_mb(work, "cpu") == pytest.approx(2, abs=0.1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--sizes", "1x2x3"], "BxHxWxC"),
        (["--sizes", "axbxcxd"], "BxHxWxC"),
        (["--sizes", "0x2x3x4"], "BxHxWxC"),
        (["--json", "nowhere/rows.jsonl"], "there is no folder"),
        (["--json", "."], "that is a folder"),
        (["--threads", "0"], "--threads must be 1 or more"),
        (["--device", "cuda"], "use --device cpu"),
    ],
)
def test_impossible_calls_are_refused_before_anything_is_measured(
    words, message, capsys, monkeypatch
):
    monkeypatch.setattr(bench, "operator_rows", lambda *_: pytest.fail("measured"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as stopped:
        bench.main(words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_rows_outlive_a_later_failure(monkeypatch, tmp_path):
    sizes, path = "1x6x5x8,1x7x5x8", tmp_path / "rows.jsonl"

    def make(size, *others):
        if size[1] == 7:
            raise MemoryError
        return make_case(size, *others)

    monkeypatch.setattr(bench, "make_case", make)
    with pytest.raises(MemoryError):
        bench.main(["--seconds", "0", "--sizes", sizes, "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["H"] for row in rows} == {6}
    assert [row["pass"] for row in rows[-6:]] == ["forward"] * 3 + ["both"] * 3  # all of that size


# Ratios


def row(backend, ms, which="forward", keep=0.5, **others):
    size = {"B": 1, "H": 48, "W": 48, "C": 64, "keep": keep, "pass": which}
    return size | {"backend": backend, "ms_p50": ms, **others}


def test_ratios_by_hand():
    rows = [row("grid_sample per layer", 30.0), row("grid_sample per key", 40.0)]
    rows += [row("conv3x3", 1.0), row("deform_conv2d", 32.0)]
    rows += [row("triton", 2.0, floor_share=0.4), row("triton", 3.0)]  # of another comparison
    rows += [row("cpp", 1.0, "both", 1.0), row("cpp", 0.7, "both"), row("cpp", 0.45, "both", 0.25)]
    title = "1×48×48, C 64, forward, 50% of the keys"
    times = "15.0× as fast as the better grid_sample, 16.00× as deform_conv2d, 0.50× as conv3x3"
    assert list(bench.ratios(rows)) == [
        f"{title}: triton is {times}",
        f"{title}: triton reaches 0.40 of the floor",
        "1×48×48, C 64, both, 25% of the keys: cpp takes 0.45 of its time with all keys "
        "(less is better)",
    ]


# GPUs


class FakeCuda:
    """Notes, in order, the calls to a GPU that is not there."""

    def __init__(self, monkeypatch):
        self.notes = []

        def note(name):
            return lambda *_: self.notes.append(name)

        @contextlib.contextmanager
        def inside(name):
            self.notes.append(f"{name} begins")
            yield
            self.notes.append(f"{name} ends")

        side = SimpleNamespace(wait_stream=note("side waits"))
        main = SimpleNamespace(wait_stream=note("main waits"))
        graph = SimpleNamespace(replay=note("replay"))
        event = SimpleNamespace(
            record=note("event"), synchronize=note("synchronize"), elapsed_time=lambda end: 0.25
        )
        for name, value in {
            "Stream": lambda device: side,
            "current_stream": lambda: main,
            "stream": lambda stream: inside("side"),
            "CUDAGraph": lambda: graph,
            "graph": lambda graph, **_: inside("capture"),
            "Event": lambda enable_timing: event,
            "_sleep": note("sleep"),
            "get_device_properties": lambda: SimpleNamespace(L2_cache_size=50),
            "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_warmed_up_on_a_side_stream_captured_once_and_replayed(monkeypatch):
    fake = FakeCuda(monkeypatch)
    result = torch.ones(1)
    step = StepGraph(lambda: fake.notes.append("work") or (result,), torch.device("cuda"))
    results = [step() for _ in range(WARM_UP + 2)]
    before = WARM_UP * ["side waits", "side begins", "work", "side ends", "main waits"]
    assert fake.notes == [*before, "capture begins", "work", "capture ends", "replay", "replay"]
    assert results == [(result,)] * (WARM_UP + 2)


@pytest.mark.parametrize("queued", [True, False])
def test_queued_kernels_wait_in_line_before_the_clock_starts(monkeypatch, queued):
    fake = FakeCuda(monkeypatch)
    cache = SimpleNamespace(zero_=lambda: fake.notes.append("evict"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: cache)
    clock = timing.Clock("cuda", queued)
    assert clock(lambda: fake.notes.append("work")) == 0.25
    before = ["evict", "sleep"] if queued else []
    assert fake.notes == [*before, "event", "work", "event", "synchronize"]


@pytest.mark.parametrize("known", [True, False])
def test_operator_rows_of_a_gpu_have_the_work_and_the_share_of_the_floor(monkeypatch, known):
    FakeCuda(monkeypatch)
    monkeypatch.setattr(bench, "paired", lambda works, *_, **__: [[0.25] * 3 for _ in works])
    monkeypatch.setattr(bench, "peak_mb", lambda *_: 1.0)
    h100 = Gpu(memory=3.352e12, cache=132 * 1.98e9 * 128, lanes=132 * 1.98e9 * 128)
    args = argparse.Namespace(device="cuda", dtype="bfloat16", seconds=0.0)
    args.limits = h100 if known else None
    cases = [(name, lambda case: None, None, 0.5) for name in ("triton", "conv3x3")]
    ours, convolution = bench.operator_pass_rows(cases, (1, 48, 48, 256), "forward", args)
    assert convolution.keys() == FIELDS
    floor = {"floor_ms": 0.00599, "floor_share": round(0.00599 / 0.25, 4)} if known else {}
    assert ours.keys() == FIELDS | {"bytes", "flops"} | floor.keys()
    assert ours["flops"] == 6 * 256 * 48 * 48 * 80 // 2
    assert {name: ours[name] for name in floor} == floor
