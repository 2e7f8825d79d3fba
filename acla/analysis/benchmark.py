"""Time whole networks, the supernet's training step, and the loader.

    python -m acla.analysis.benchmark --only networks

networks: EDSR and RCAN with and without ACLA at Table 9's positions on a 48×48 picture, on a GPU
also as CUDA graphs; supernet: time and memory of a step; loader: patches per second by number of
workers, beside what training consumes. One JSON row for each measurement, then ratios.
"""

import argparse
import functools
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
from torch import Tensor

from acla.cli import run
from acla.config import PAPER_POSITIONS, ModelConfig, Task, model_preset, train_preset
from acla.data.datasets import Loader, PatchSampler, Pictures, sample
from acla.distributed import Processes
from acla.kernels.baselines import Case, Implementation, by_grid_sample, make_case
from acla.kernels.bench import (
    Row,
    add_flags,
    check,
    device_name,
    empty_row,
    report,
    timed_rows,
    write_rows,
)
from acla.kernels.timing import replay
from acla.models.backbones import Backbone
from acla.search.supernet import Supernet
from acla.training.trainer import Trainer

PARTS = ("networks", "supernet", "loader")
# EDSR 32 × 256, EDSR 16 × 64 and RCAN, for the task and preset that have their size
NETWORKS = {
    "edsr-32x256": ("sr", "paper", "edsr"),
    "edsr-16x64": ("car", "small", "edsr"),
    "rcan-10x20x64": ("sr", "paper", "rcan"),
}
WORKERS = (0, 1, 2)
BATCHES, STEPS = 50, 5  # of the loader and of training, that are timed


def network_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Inference with and without attention, in turns."""
    for name, (task, preset, backbone) in NETWORKS.items():
        config = model_preset(preset, Task(task, {"sr": 2, "car": 10}[task]), backbone)
        plain = replace(config, attention="none", keys=0)
        inserted = replace(config, positions=PAPER_POSITIONS[task, backbone])
        picture = torch.rand(1, config.channels, 48, 48, device=args.device)
        calls = {}
        for label, network in ((name, plain), (f"{name} + acla", inserted)):
            net = Backbone(network).eval().to(args.device, memory_format=torch.channels_last)
            calls[label] = functools.partial(without_gradients, net, picture)
        for which in ("network", "replay")[: 1 + (args.device == "cuda")]:
            works = []
            for label, call in calls.items():
                row = empty_row(label, (1, 48, 48, config.width), which, args)
                works.append((row, replay(call) if which == "replay" else call))
            yield from timed_rows(works, args)


def without_gradients(net: torch.nn.Module, picture: Tensor) -> Tensor:
    with torch.no_grad():
        return net(picture)


def supernet_rows(args: argparse.Namespace) -> Iterator[Row]:
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
        (empty_row(name, size, "both", args), functools.partial(step, gates))
        for name, gates in steps.items()
    ]
    yield from timed_rows(works, args)
    case = make_case(size, 1.0, torch.float32, args.device)
    one = Case(case.features[:1], case.points[:, :, :, :1], case.mask_maps[:1], case.gradient)
    saved = min(saved_mb(by_grid_sample(per_key), one) for per_key in (False, True))
    pairs = 16 * 17 // 2
    row = empty_row("grid_sample, saved tensors", size, "both", args)
    yield row | dict.fromkeys(("ms_p20", "ms_p50", "ms_p80")) | {"peak_mb": round(saved * pairs, 1)}


def saved_mb(implementation: Implementation, case: Case) -> float:
    """Megabytes that autograd keeps for the backward pass, every storage once, the inputs left
    out."""
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


def loader_rows(args: argparse.Namespace) -> Iterator[Row]:
    """Patches per second of the built-in pictures: of the loader for each number of workers, and of
    training steps on one batch."""
    device = torch.device(args.device)
    task = Task()
    config = train_preset("small")
    sampler = PatchSampler(Pictures(sample("train")), task, config.patch_size, config.batch_size)
    positions = PAPER_POSITIONS[task.name, "edsr"]
    model = replace(model_preset("small", task), positions=positions)
    trainer = Trainer(model, config, Processes(device))
    batch = Loader(sampler, device, 0).batch(0)
    row = {"device": device_name(args.device), "threads": torch.get_num_threads()}
    row |= {"task": str(task), "batch_size": config.batch_size, "patch_size": config.patch_size}
    calls = {f"loader, {n} workers": (Loader(sampler, device, n).batch, BATCHES) for n in WORKERS}
    calls["training"] = (lambda step: trainer.step(step, sampler.indices, *batch), STEPS)
    for name, (call, times) in calls.items():
        rate = round(per_second(call, times, device) * config.batch_size, 1)
        yield row | {"backend": name, "patches_per_second": rate}


def per_second(call: Callable[[int], object], times: int, device: torch.device) -> float:
    """Calls a second, with 0, 1, 2 …; the first call, which reads files, is not counted."""
    wait = functools.partial(torch.cuda.synchronize, device) if device.type == "cuda" else bool
    call(0)
    wait()
    begun = time.perf_counter()
    for i in range(1, times + 1):
        call(i)
    wait()
    return times / (time.perf_counter() - begun)


def ratios(rows: list[Row]) -> Iterator[str]:
    """Time with attention of the time without; a supernet's memory beside grid_sample's; patches
    per second of the loader beside training's."""
    by_name = {(row["backend"], row.get("pass")): row for row in rows}
    for (name, which), row in by_name.items():
        if inserted := by_name.get((f"{name} + acla", which)):
            replayed = " under graph replay" if which == "replay" else ""
            share = inserted["ms_p50"] / row["ms_p50"]
            yield f"{name} + acla takes {share:.3f} of {name}'s time{replayed} (less is better)"
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
                yield f"{row['backend']}: {times:.1f}× the patches that training consumes"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m acla.analysis.benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_flags(parser)
    parser.add_argument("--only", choices=PARTS, help="one part (default: all three)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    check(args)
    parts = {"networks": network_rows, "supernet": supernet_rows, "loader": loader_rows}
    chosen = [args.only] if args.only else PARTS
    rows = write_rows((row for part in chosen for row in parts[part](args)), args.json)
    report(rows, ratios(rows), args)


if __name__ == "__main__":
    run(main)
