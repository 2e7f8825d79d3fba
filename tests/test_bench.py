"""The benchmark: contenders agree, a wrong one is refused, rows and ratios are what they say."""

import argparse
import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

import kernels
from acla.config import ModelConfig
from acla.models.attention import CrossLayerAttention
from acla.models.backbones import Backbone
from kernels import bench, timing

TINY = ["--sizes", "1x6x5x8", "--seconds", "0"]
FIELDS = {
    *("device", "dtype", "B", "L", "K", "H", "W", "C", "keep", "backend", "pass"),
    *("ms_p20", "ms_p50", "ms_p80", "peak_mb", "commit"),
}


def test_rows_have_their_fields_and_every_contender(capsys):
    bench.main([*TINY, "--only", "operator", "--json", "-"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(row.keys() == FIELDS | {"threads"} for row in rows)  # on CPUs nothing else is known
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
    assert "(target: 0.45 or less, " in out


@pytest.mark.parametrize("spoil", ["result", "gradient"])
def test_a_wrong_contender_is_never_timed(capsys, spoil):
    case = bench.make_case((1, 5, 4, 3), 0.5, torch.float32, "cpu")
    right = bench.by_grid_sample(per_key=True)
    assert bench.what_is_wrong(right, case) is None

    def wrong(case):
        out = right(case)
        return out * 1.001 if spoil == "result" else out.detach() + 0 * out

    found = bench.right_ones({"right": right, "rival": wrong}, case)
    assert found == {"right": right}
    assert "rival is left out, for it is wrong" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="torch is wrong"):
        bench.right_ones({"torch": wrong}, case)


@pytest.mark.parametrize("per_key", [False, True], ids=["per-layer", "per-key"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_grid_sample_is_right_on_wide_features_of_sixteen_bits(dtype, per_key):
    case = bench.make_case((1, 5, 4, 256), 0.5, dtype, "cpu")
    assert bench.what_is_wrong(bench.by_grid_sample(per_key), case) is None


@pytest.mark.parametrize("keep", [1.0, 0.5, 0.25])
def test_masks_keep_about_what_is_asked(keep):
    case = bench.make_case((2, 24, 24, 2), keep, torch.float32, "cpu")
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


@pytest.mark.parametrize("sizes", ["1x2x3", "axbxcxd", "0x2x3x4", ""])
def test_impossible_sizes_are_refused(sizes, capsys):
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--sizes", sizes])
    assert stopped.value.code == 2
    assert "BxHxWxC" in capsys.readouterr().err


def test_rows_that_could_not_be_written_are_told_of_first(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(bench, "operator_rows", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        bench.main([*TINY, "--json", str(tmp_path / "none" / "rows.jsonl")])
    assert stopped.value.code == 2
    assert "there is no folder" in capsys.readouterr().err


def test_what_is_measured_outlives_a_later_failure(monkeypatch, tmp_path):
    made, sizes, path = bench.make_case, "1x6x5x8,1x7x5x8", tmp_path / "rows.jsonl"

    def make_case(size, *others):
        if size[1] == 7:
            raise MemoryError
        return made(size, *others)

    monkeypatch.setattr(bench, "make_case", make_case)
    with pytest.raises(MemoryError):
        bench.main([*TINY, "--only", "operator", "--sizes", sizes, "--json", str(path)])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert {row["H"] for row in rows} == {6}
    assert [row["pass"] for row in rows[-6:]] == ["forward"] * 3 + ["both"] * 3  # all of that size


def test_rows_replace_the_file_when_there_are_any(tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    path.write_text("old\n")
    assert bench.written([], str(path)) == []
    assert path.read_text() == "old\n"
    assert bench.written(iter([{"a": 1}, {"a": 2}]), str(path)) == [{"a": 1}, {"a": 2}]
    text = path.read_text()
    assert [json.loads(line)["a"] for line in text.splitlines()] == [1, 2]
    bench.written([{"a": 1}, {"a": 2}], "-")
    assert capsys.readouterr().out == text


def test_a_device_that_is_not_there_is_refused(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    with pytest.raises(SystemExit) as stopped:
        bench.main(["--device", "cuda"])
    assert stopped.value.code == 2
    assert "use --device cpu" in capsys.readouterr().err


# ---- GPUs

H100 = SimpleNamespace(
    **{"major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"clock_rate": 1_980_000, "memory_clock_rate": 2_619_000, "memory_bus_width": 5120},
    L2_cache_size=50,
)


class FakeCuda:
    """Notes, in order, what a program asks of a GPU that is not there."""

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
            "Stream": lambda: side,
            "current_stream": lambda: main,
            "stream": lambda stream: inside("side"),
            "CUDAGraph": lambda: graph,
            "graph": lambda graph: inside("capture"),
            "Event": lambda enable_timing: event,
            "_sleep": note("sleep"),
            "get_device_properties": lambda: H100,
            "get_device_name": lambda: "NVIDIA H100 80GB HBM3",
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)


def test_a_graph_is_warmed_up_on_a_side_stream_captured_once_and_replayed(monkeypatch):
    fake = FakeCuda(monkeypatch)
    run = timing.replay(lambda: fake.notes.append("work") or "result")
    before = ["side waits", "side begins", "work", "work", "work", "side ends", "main waits"]
    assert fake.notes == [*before, "capture begins", "work", "capture ends"]
    del fake.notes[:]
    assert [run(), run()] == ["result", "result"]
    assert fake.notes == ["replay", "replay"]


@pytest.mark.parametrize("queued", [True, False])
def test_queued_kernels_wait_in_line_before_the_clock_starts(monkeypatch, queued):
    fake = FakeCuda(monkeypatch)
    cache = SimpleNamespace(zero_=lambda: fake.notes.append("evict"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: cache)
    clock = timing.Clock("cuda", queued)
    assert clock(lambda: fake.notes.append("work")) == 0.25
    before = ["evict", "sleep"] if queued else []
    assert fake.notes == [*before, "event", "work", "event", "synchronize"]


def gpu_rows(monkeypatch, run):
    """The rows of a run on a GPU that is not there, each of its calls taking 0.25 ms."""

    def paired(works, *_, **__):
        for work in works:
            work()
        return [[0.25] * 3 for _ in works]

    FakeCuda(monkeypatch)
    monkeypatch.setattr(bench, "paired", paired)
    monkeypatch.setattr(bench, "peak_mb", lambda *_: 1.0)
    return list(run(argparse.Namespace(device="cuda", dtype="bfloat16", seconds=0.0)))


def test_operator_rows_of_a_gpu_tell_the_work_and_the_share_of_the_floor(monkeypatch):
    def run(args):
        cases = [(name, lambda case: None, None, 0.5) for name in ("triton", "conv3x3")]
        monkeypatch.setattr(bench, "run_pass", lambda *_: None)
        return bench.timed_cases(cases, (1, 48, 48, 256), "forward", args)

    ours, convolution = gpu_rows(monkeypatch, run)
    assert convolution.keys() == (FIELDS | {"threads"}) - {"commit"}
    assert ours.keys() - convolution.keys() == {"bytes", "flops", "floor_ms", "floor_share"}
    assert ours["flops"] == 6 * 256 * 48 * 48 * 80 // 2
    assert ours["floor_ms"] == 0.00599
    assert ours["floor_share"] == round(0.00599 / 0.25, 4)
    monkeypatch.setattr(H100, "major", 12)
    unknown, _ = gpu_rows(monkeypatch, run)
    assert unknown.keys() - convolution.keys() == {"bytes", "flops"}


def test_networks_run_on_a_gpu_piece_by_piece_and_as_graphs(monkeypatch):
    monkeypatch.setattr(bench, "NETWORKS", {"edsr-16x64": ("car", "tiny", "edsr")})
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, device: rand(*shape))
    monkeypatch.setattr(bench, "replay", lambda work: work)
    rows = gpu_rows(monkeypatch, bench.network_rows)
    assert [(row["backend"], row["pass"], row["peak_mb"]) for row in rows] == [
        ("edsr-16x64", "network", 1.0),
        ("edsr-16x64 + acla", "network", 1.0),
        ("edsr-16x64", "replay", None),
        ("edsr-16x64 + acla", "replay", None),
    ]
    assert {row["dtype"] for row in rows} == {"float32"}


def attending_network():
    """A network whose output depends on its attention, which adds nothing when it is fresh."""
    config = ModelConfig(blocks=3, width=16, channels=1, attention="acla", positions=(1, 3), keys=4)
    torch.manual_seed(0)
    net = Backbone(config).eval()
    torch.nn.init.normal_(net.tail[-1].weight, std=0.1)
    for module in net.modules():
        if isinstance(module, CrossLayerAttention):
            for layer in (module.points, module.output):
                torch.nn.init.normal_(layer.weight, std=0.3)
    return net


@pytest.mark.parametrize("spoiled", ["aggregate", "coverage"])
def test_the_network_that_is_replayed_depends_on_the_operator(monkeypatch, spoiled):
    net, picture = attending_network(), torch.rand(1, 1, 13, 10)
    expected = bench.without_gradients(net, picture)

    def garbage(*args, **options):
        out = kernels.attend(*args, **options)
        return out._replace(**{spoiled: torch.zeros_like(getattr(out, spoiled))})

    monkeypatch.setattr("acla.models.attention.attend", garbage)
    change = (bench.without_gradients(net, picture) - expected).abs().max()
    assert change > 0.01 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_network_gives_what_the_network_gives():
    net = attending_network().cuda()
    picture, other = torch.rand(2, 1, 1, 13, 10, device="cuda")
    expected = [bench.without_gradients(net, p.clone()) for p in (other, picture)]
    first = picture.clone()
    run = timing.replay(lambda: bench.without_gradients(net, picture))
    for given, right in zip((other, first), expected, strict=True):
        picture.copy_(given)
        torch.testing.assert_close(run(), right)
