"""Time whole networks, attention part by part, tiles, the supernet's step, and the loader.

    python -m acla.analysis.benchmark --only networks

networks: EDSR and RCAN with and without ACLA at Table 9's positions on a 48×48 picture, on a GPU
also as CUDA graphs; attention: EDSR 16 × 64's five modules by part, and a training step with and
without them; tiles: EDSR 16 × 64 on the tiles of a photo, by torch's own means for convolutions;
supernet: time and memory of a step; loader: patches per second by number of workers, beside what
training consumes. One JSON row for each measurement, then ratios.
"""

import argparse
import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from acla import cli
from acla.config import PAPER_POSITIONS, ModelConfig, Task, model_preset, train_preset
from acla.data.datasets import Loader, PatchSampler, Pictures, sample_set
from acla.distributed import Processes
from acla.kernels import attend, bench, runs_whole, to_rows
from acla.kernels.baselines import Case, Implementation, by_grid_sample, make_case
from acla.models.attention import CrossLayerAttention, mask_maps
from acla.models.backbones import Backbone
from acla.restore.inference import keep_memory
from acla.search.supernet import Supernet
from acla.training.step_graph import WARM_UP, StepGraph
from acla.training.trainer import Trainer

# EDSR 32 × 256, EDSR 16 × 64 and RCAN, for the task and preset that have their size
NETWORKS = {
    "edsr-32x256": ("sr", "paper", "edsr"),
    "edsr-16x64": ("car", "small", "edsr"),
    "rcan-10x20x64": ("sr", "paper", "rcan"),
}
SIDES = (48, 384)  # of the pictures on which attention is timed by part
TILE_SIDE = 192
WORKERS = (0, 1, 2)
BATCHES, STEPS = 50, 5  # of the loader and of training, that are timed


def network_rows(args: argparse.Namespace) -> Iterator[bench.Row]:
    """Inference with and without attention, in turns."""
    for name in NETWORKS:
        nets = pair_of_networks(name, args)
        config = nets[name].config
        picture = torch.rand(1, config.channels, 48, 48, device=args.device)
        calls = {k: functools.partial(without_gradients, net, picture) for k, net in nets.items()}
        for which in ("network", "replay")[: 1 + (args.device == "cuda")]:
            works = []
            for label, call in calls.items():
                row = bench.empty_row(label, (1, 48, 48, config.width), which, args)
                works.append((row, replayed(call, args.device) if which == "replay" else call))
            yield from bench.timed_rows(works, args)


def replayed(call: Callable[[], Tensor], device: str) -> Callable[[], None]:
    """The call as a CUDA graph, to be replayed on the same tensors."""
    step = StepGraph(lambda: (call(),), torch.device(device))
    for _ in range(WARM_UP + 1):
        step()
    return step.graph.replay


def pair_of_networks(name: str, args: argparse.Namespace) -> dict[str, Backbone]:
    """One of NETWORKS without and with attention, by name, fresh: with every mask open."""
    task, preset, backbone = NETWORKS[name]
    config = model_preset(preset, Task(task, {"sr": 2, "car": 10}[task]), backbone)
    inserted = replace(config, positions=PAPER_POSITIONS[task, backbone])
    return {
        label: Backbone(of).eval().to(args.device, memory_format=torch.channels_last)
        for label, of in ((name, config.plain), (f"{name} + acla", inserted))
    }


def attention_rows(args: argparse.Namespace) -> Iterator[bench.Row]:
    """The parts of the five modules' inference in turns, beside the modules as they run and the
    networks with and without them; then the networks' training steps, 8 patches of 64 × 64."""
    name, dtype = "edsr-16x64", getattr(torch, args.dtype)
    nets = pair_of_networks(name, args)
    modules = list(nets[f"{name} + acla"].attention.values())
    width = nets[name].config.width
    for side in SIDES:
        picture = torch.rand(1, 1, side, side, device=args.device)
        calls = {label: functools.partial(net, picture) for label, net in nets.items()}
        with mixed(args):
            parts = attention_parts(modules, (1, width, side, side), dtype, args.device)
        size, works = (1, side, side, width), []
        for label, call in (calls | parts).items():
            which = "network" if label in nets else "part"
            row = bench.empty_row(label, size, which, args, args.dtype)
            works.append((row, mixed(args)(call)))
        yield from bench.timed_rows(works, args)
    pictures = torch.rand(8, 1, 64, 64, device=args.device)
    seeds, works = torch.arange(8, device=args.device), []

    def step(net: Backbone) -> None:
        net(pictures, seeds).square().mean().backward()
        net.zero_grad(set_to_none=True)

    for label, net in nets.items():
        row = bench.empty_row(label, (8, 64, 64, width), "step", args, args.dtype)
        works.append((row, mixed(args, learns=True)(functools.partial(step, net.train()))))
    yield from bench.timed_rows(works, args)


@contextlib.contextmanager
def mixed(args: argparse.Namespace, learns: bool = False) -> Iterator[None]:
    """A context, and a decorator, of mixed precision where --dtype asks for it."""
    short = args.dtype != "float32"
    with (
        torch.set_grad_enabled(learns),
        torch.autocast(args.device, getattr(torch, args.dtype) if short else None, enabled=short),
    ):
        yield


def attention_parts(
    modules: list[CrossLayerAttention], size: tuple[int, ...], dtype: torch.dtype, device: str
) -> dict[str, Callable[[], object]]:
    """Calls of every part of the modules' inference, by name, on features [B,C,H,W] of this size.
    `planning` is `attend` with every mask shut."""
    features = [
        torch.randn(size, device=device).to(dtype, memory_format=torch.channels_last)
        for _ in modules
    ]
    rows = [to_rows(feature) for feature in features]
    maps = [mask_maps(modules[l:], l, one) for l, one in enumerate(rows)]
    given = []
    for j, (module, feature) in enumerate(zip(modules, features, strict=True)):
        own = [maps[l][j - l] for l in range(j + 1)]
        given.append((rows[: j + 1], module.locate(feature), own))
    shut = [(of, points, [-one.abs() - 1 for one in own]) for of, points, own in given]
    attended = [attend(*arguments, counts=False) for arguments in given]
    joined = list(zip(modules, features, given, strict=True))
    return {
        "rows": lambda: [to_rows(feature) for feature in features],
        "masks": lambda: [mask_maps(modules[l:], l, one) for l, one in enumerate(rows)],
        "points": lambda: [module.locate(feature) for module, feature, _ in joined],
        "planning": lambda: [attend(*arguments, counts=False) for arguments in shut],
        "planning, gather": lambda: [attend(*arguments, counts=False) for arguments in given],
        "output": lambda: [m.combine(one) for m, one in zip(modules, attended, strict=True)],
        "modules": lambda: [run_module(m, f, of) for m, f, (of, _, _) in joined],
    }


def run_module(module: CrossLayerAttention, query: Tensor, rows: list[Tensor]) -> Tensor:
    """x + h(y) as a network computes it, masks included."""
    if runs_whole(query, rows):
        return module.whole(query, rows)
    return query + module(query, rows, counts=False)[0]


def without_gradients(net: torch.nn.Module, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return net(picture)


def tile_rows(args: argparse.Namespace) -> Iterator[bench.Row]:
    """Four tiles through EDSR 16 × 64, one by one as `acla.restore` takes them, and in other ways;
    `first_s`: seconds of a way's first call, which may compile."""
    name = "edsr-16x64"
    net = pair_of_networks(name, args)[name]
    size = 4, TILE_SIDE, TILE_SIDE, net.config.width
    tiles = [*torch.rand(4, 1, net.config.channels, *size[1:3], device=args.device)]
    fresh = functools.partial(copy.deepcopy, net)
    ways = {
        "tiles": (net, tiles),
        "tiles, as a batch": (net, [torch.cat(tiles)]),
        "tiles, channels first": (fresh().to(memory_format=torch.contiguous_format), tiles),
        "tiles, compiled": (torch.compile(fresh()), tiles),
        "tiles, compiled and frozen": (torch.compile(fresh(), options={"freezing": True}), tiles),
    }
    works = []
    with torch.compiler.config.patch(force_disable_caches=True):
        for label, (way, batches) in ways.items():
            row = bench.empty_row(label, size, "tiles", args)
            call = functools.partial(map_without_gradients, way, batches)
            begun = time.perf_counter()
            call()
            works.append((row | {"first_s": round(time.perf_counter() - begun, 2)}, call))
    yield from bench.timed_rows(works, args)


def map_without_gradients(net: torch.nn.Module, pictures: list[Tensor]) -> list[Tensor]:
    return [without_gradients(net, picture) for picture in pictures]


def supernet_rows(args: argparse.Namespace) -> Iterator[bench.Row]:
    """A weight step of 16 blocks × 64, 136 pairs, batch 16, 48×48: with every gate open, and with
    every second one shut, its module computed nevertheless or skipped. Beside it the memory that
    `grid_sample` saves for backward in one pair, times the pairs."""
    size = (16, 48, 48, 64)
    net = Supernet(ModelConfig(blocks=16, width=64, channels=1)).train().to(args.device)
    pictures = torch.rand(16, 1, 48, 48, device=args.device)
    every = torch.ones(16, device=args.device)
    half = every * (torch.arange(16, device=args.device) % 2)
    seeds = torch.arange(16, device=args.device)

    def step(gates: Tensor) -> None:
        restored, counts = net(pictures, gates, seeds)
        (restored.square().mean() + net.cost(counts, 48 * 48).log()).backward()
        net.zero_grad(set_to_none=True)

    steps = {
        "supernet step": every,
        "supernet step, half shut, all computed": half.clone().requires_grad_(),
        "supernet step, half shut, skipped": half,
    }
    works = [
        (bench.empty_row(name, size, "both", args), functools.partial(step, gates))
        for name, gates in steps.items()
    ]
    yield from bench.timed_rows(works, args)
    case = make_case(size, 1.0, torch.float32, args.device)
    one = Case(case.features[:1], case.points[:, :, :, :1], case.mask_maps[:1], case.gradient)
    saved = min(saved_mb(by_grid_sample(per_key), one) for per_key in (False, True))
    pairs = 16 * 17 // 2
    row = bench.empty_row("grid_sample, saved tensors", size, "both", args)
    yield row | dict.fromkeys(("ms_p20", "ms_p50", "ms_p80")) | {"peak_mb": round(saved * pairs, 1)}


def saved_mb(implementation: Implementation, case: Case) -> float:
    """Megabytes that autograd keeps for the backward pass, each storage once, without inputs."""
    for tensor in case.inputs:
        tensor.requires_grad_()
    inputs = {tensor.untyped_storage().data_ptr() for tensor in case.inputs}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out = implementation(case)
    del out
    return sum(size for pointer, size in kept.items() if pointer not in inputs) / 1e6


def loader_rows(args: argparse.Namespace) -> Iterator[bench.Row]:
    """Patches per second, and this process's processor time for a batch: of the loader by number of
    workers, of training steps on one batch."""
    device = torch.device(args.device)
    task = Task()
    config = train_preset("small")
    sampler = PatchSampler(
        Pictures(sample_set("train")), task, config.patch_size, config.batch_size
    )
    positions = PAPER_POSITIONS[task.name, "edsr"]
    model = replace(model_preset("small", task), positions=positions)
    trainer = Trainer(model, config, Processes(device))
    batch = Loader(sampler, device, 0).batch(0)
    row = {"device": bench.device_name(args.device), "threads": torch.get_num_threads()}
    row |= {"task": str(task), "batch_size": config.batch_size, "patch_size": config.patch_size}
    calls = {f"loader, {n} workers": (Loader(sampler, device, n).batch, BATCHES) for n in WORKERS}
    calls["training"] = (lambda step: trainer.step(step, sampler.indices, *batch), STEPS)
    for name, (call, times) in calls.items():
        seconds, busy = seconds_of(call, times, device)
        rate = round(config.batch_size / seconds, 1)
        yield row | {"backend": name, "patches_per_second": rate, "own_ms": round(busy * 1e3, 2)}


def seconds_of(
    call: Callable[[int], object], times: int, device: torch.device
) -> tuple[float, float]:
    """Wall and processor time of a call, with 0, 1, 2 …; the first, which reads files, is not
    counted."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    call(0)
    wait()
    begun, busy = time.perf_counter(), time.process_time()
    for i in range(1, times + 1):
        call(i)
    wait()
    return (time.perf_counter() - begun) / times, (time.process_time() - busy) / times


def ratios(rows: list[bench.Row]) -> Iterator[str]:
    """Time with attention of the time without, and by part; a supernet's memory beside
    grid_sample's; patches per second of the loader beside training's."""
    by_name = {(row["backend"], row.get("pass")): row for row in rows}
    by_size = {(row["backend"], row.get("pass"), row.get("H")): row for row in rows}
    for (name, which, H), row in by_size.items():
        if inserted := by_size.get((f"{name} + acla", which, H)):
            mode = {"replay": " under graph replay", "step": " in training"}.get(which, "")
            share = inserted["ms_p50"] / row["ms_p50"]
            yield f"{name} + acla takes {share:.3f} of {name}'s time{mode} at {H}² (less is better)"
        if name == "planning":
            parts = {n: r["ms_p50"] for (n, p, h), r in by_size.items() if (p, h) == ("part", H)}
            parts["gather"] = parts.pop("planning, gather") - parts["planning"]
            yield f"attention at {H}², ms: " + ", ".join(f"{n} {t:.1f}" for n, t in parts.items())
    if alone := by_name.get(("tiles", "tiles")):
        for (name, which), row in by_name.items():
            if which == "tiles" and row is not alone:
                share = row["ms_p50"] / alone["ms_p50"]
                first = f"first call {row['first_s']} s"
                yield f"{name}: {share:.3f} of the time (less is better), {first}"
    if step := by_name.get(("supernet step", "both")):
        saved = by_name["grid_sample, saved tensors", "both"]["peak_mb"]
        yield f"a supernet step needs 1/{saved / step['peak_mb']:.1f} of grid_sample's memory"
        computed, skipped = (
            by_name[f"supernet step, half shut, {name}", "both"]
            for name in ("all computed", "skipped")
        )
        shares = (skipped[key] / computed[key] for key in ("ms_p50", "peak_mb"))
        yield "with shut modules skipped: {:.2f} of the time, {:.2f} of the memory".format(*shares)
    if training := by_name.get(("training", None)):
        for row in rows:
            if row["backend"].startswith("loader"):
                times = row["patches_per_second"] / training["patches_per_second"]
                line = f"{times:.1f}× the patches that training consumes"
                yield f"{row['backend']}: {line}, {row['own_ms']:.2f} ms a batch in this process"


BENCHMARKS = {
    "networks": network_rows,
    "attention": attention_rows,
    "tiles": tile_rows,
    "supernet": supernet_rows,
    "loader": loader_rows,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = cli.parser("acla.analysis.benchmark", __doc__)
    bench.add_bench_flags(parser)
    parser.add_argument("--only", choices=BENCHMARKS, help="one part (default: all)")
    text = "of attention's features; bfloat16 by automatic mixed precision (default: float32)"
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help=text)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    bench.check_flags(args)
    keep_memory(torch.device(args.device))  # as restoring and evaluating do
    chosen = [args.only] if args.only else BENCHMARKS
    rows = bench.stream_rows((row for part in chosen for row in BENCHMARKS[part](args)), args.json)
    bench.report(rows, ratios(rows), args)


if __name__ == "__main__":
    cli.run(main)
