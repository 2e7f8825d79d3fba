"""The benchmark of networks, supernet and loader: rows, ratios, graphs."""

import json

import pytest
import torch

from acla import kernels
from acla.analysis import benchmark
from acla.config import ModelConfig
from acla.kernels import bench
from acla.models.attention import CrossLayerAttention
from acla.models.backbones import Backbone
from acla.training.step_graph import WARM_UP, StepGraph


def row(backend, ms, which="network", **others):
    return {"backend": backend, "pass": which, "ms_p50": ms, "H": 48, **others}


def test_ratios_by_hand():
    rows = [row(name, ms, which) for which in ("network", "replay") for name, ms in
            (("edsr", 1.0), ("edsr + acla", 1.06))]  # fmt: skip
    rows += [row("edsr", 2.0, "step"), row("edsr + acla", 2.5, "step")]
    rows += [row("planning", 3.0, "part"), row("planning, gather", 7.0, "part")]
    rows += [row("supernet step", 9.0, "both", peak_mb=100.0)]
    rows += [row("supernet step, half shut, all computed", 8.0, "both", peak_mb=80.0)]
    rows += [row("supernet step, half shut, skipped", 2.0, "both", peak_mb=40.0)]
    rows += [row("grid_sample, saved tensors", None, "both", peak_mb=1600.0)]
    rows += [row("tiles", 4.0, "tiles"), row("tiles, compiled", 3.0, "tiles", first_s=20.5)]
    rows += [{"backend": "loader, 1 workers", "patches_per_second": 300.0, "own_ms": 0.5}]
    rows += [{"backend": "training", "patches_per_second": 10.0}]
    network, replayed, step, parts, compiled, memory, skipped, loader = benchmark.ratios(rows)
    assert "edsr + acla takes 1.060 of edsr's time at 48² (" in network
    assert "1.060 of edsr's time under graph replay" in replayed
    assert "1.250 of edsr's time in training" in step
    assert parts == "attention at 48², ms: planning 3.0, gather 4.0"
    assert compiled.startswith("tiles, compiled: 0.750 of")
    assert "20.5 s" in compiled
    assert "1/16.0 of" in memory
    assert "0.25 of the time, 0.50 of the memory" in skipped
    assert loader.startswith("loader, 1 workers: 30.0×")
    assert loader.endswith(", 0.50 ms a batch in this process")


def test_networks_on_a_gpu_run_piece_by_piece_and_as_graphs(monkeypatch, capsys):
    """The GPU is not there: its calls run on the CPU and take 0.25 ms each."""
    monkeypatch.setattr(benchmark, "NETWORKS", {"edsr-16x64": ("car", "tiny", "edsr")})
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, *_, **__: self)
    rand = torch.rand
    monkeypatch.setattr(torch, "rand", lambda *shape, device: rand(*shape))
    monkeypatch.setattr(benchmark, "replayed", lambda call, device: call)
    monkeypatch.setattr(bench, "peak_mb", lambda *_: 1.0)

    def paired(works, *_, **__):
        for work in works:
            work()
        return [[0.25] * 3 for _ in works]

    monkeypatch.setattr(bench, "paired", paired)
    benchmark.main(["--only", "networks", "--device", "cuda", "--json", "-"])
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(row["backend"], row["pass"], row["peak_mb"]) for row in rows] == [
        ("edsr-16x64", "network", 1.0),
        ("edsr-16x64 + acla", "network", 1.0),
        ("edsr-16x64", "replay", None),
        ("edsr-16x64 + acla", "replay", None),
    ]
    assert {row["dtype"] for row in rows} == {"float32"}


def test_attention_by_part_beside_the_networks_and_their_training(monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "NETWORKS", {"edsr-16x64": ("car", "tiny", "edsr")})
    monkeypatch.setattr(benchmark, "SIDES", (7,))
    monkeypatch.setattr(
        bench, "paired", lambda works, *_, **__: [[(w(), 0.25)[1]] * 3 for w in works]
    )
    monkeypatch.setattr(bench, "peak_mb", lambda *_: 1.0)
    benchmark.main(["--only", "attention"])
    out = capsys.readouterr().out
    for part in ("rows", "masks", "points", "planning", "gather", "output", "modules"):
        assert f"{part} " in out
    assert "at 7² (" in out
    assert "in training at 64² (" in out


def test_the_loader_beside_training(monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(benchmark, "BATCHES", 3)
    monkeypatch.setattr(benchmark, "WORKERS", (0,))
    monkeypatch.setattr(benchmark.Trainer, "step", lambda self, step, *_: calls.append(step))
    benchmark.main(["--only", "loader"])
    out = capsys.readouterr().out
    assert calls == list(range(benchmark.STEPS + 1))
    assert "loader, 0 workers: " in out


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


def test_every_way_with_tiles_gives_the_same_picture(monkeypatch):
    monkeypatch.setattr(benchmark, "pair_of_networks", lambda name, _: {name: attending_network()})
    monkeypatch.setattr(benchmark, "TILE_SIDE", 12)
    monkeypatch.setattr(torch, "compile", lambda net, options=None: net)  # half a minute each
    given = []

    def timed_rows(works, _):
        given.extend(works)
        return [row for row, _ in works]

    monkeypatch.setattr(bench, "timed_rows", timed_rows)
    args = benchmark.parse(["--only", "tiles"])
    names = [row["backend"] for row in benchmark.tile_rows(args)]
    assert names[0] == "tiles"
    assert len(set(names)) == 5
    results = [torch.cat(work()) for _, work in given]
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@pytest.mark.parametrize("part", ["aggregate", "coverage"])
def test_the_network_that_is_replayed_depends_on_the_operator(monkeypatch, part):
    monkeypatch.setenv("ACLA_BACKEND", "torch")  # of the modules, not of their whole
    net, picture = attending_network(), torch.rand(1, 1, 13, 10)
    expected = benchmark.without_gradients(net, picture)

    def without_part(*args, **options):
        out = kernels.attend(*args, **options)
        return out._replace(**{part: torch.zeros_like(getattr(out, part))})

    monkeypatch.setattr("acla.models.attention.attend", without_part)
    change = (benchmark.without_gradients(net, picture) - expected).abs().max()
    assert change > 0.01 * expected.abs().max()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_replayed_network_gives_what_the_network_gives():
    net = attending_network().cuda()
    picture, other = torch.rand(2, 1, 1, 13, 10, device="cuda")
    expected = [benchmark.without_gradients(net, p.clone()) for p in (other, picture)]
    first = picture.clone()
    step = StepGraph(lambda: (benchmark.without_gradients(net, picture),), picture.device)
    for _ in range(WARM_UP):
        step()
    for given, right in zip((other, first), expected, strict=True):
        picture.copy_(given)
        torch.testing.assert_close(step()[0], right)
