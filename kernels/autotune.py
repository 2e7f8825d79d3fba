"""Time every tile size on the GPU at hand: `python -m kernels.autotune`. The fastest are saved
(`kernels.launch` says where and for what).

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import argparse
import functools
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from . import launch, output
from .cache import is_writable
from .inputs import Inputs, Leaves

# Usual sizes, as (B, H, W, C, L, K): a patch, a batch of patches, a picture; EDSR, RCAN, CLA.
SIZES = [
    (B, H, W, C, L, K)
    for C, L, K in ((256, 5, 16), (64, 4, 16), (128, 5, 16), (256, 5, 8), (64, 4, 8))
    for B, H, W in ((1, 48, 48), (16, 48, 48), (1, 256, 256))
]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def candidates(call: launch.Launch, lanes: int) -> list[launch.Config]:
    """The configurations worth timing: each tile once, the default first."""
    tiles: dict[tuple, launch.Config] = {}
    for config in launch.CONFIGS[call.name]:
        tiles.setdefault((*call.blocks(config, lanes).values(), config.warps), config)
    return list(tiles.values())


def tune(
    calls: Sequence[launch.Launch], lanes: int, timer: Callable[[Callable[[], None]], float]
) -> dict[str, dict[launch.Config, float]]:
    """The time of each configuration by `timer` (any unit), fastest first, for each kernel and kind
    of size: the sum counts where a kernel is launched more than once."""
    tried = {}
    for key, group in itertools.groupby(sorted(calls, key=launch.call_key), launch.call_key):
        group = list(group)

        def time(config: launch.Config, group: list[launch.Launch] = group) -> float:
            # A scatter adds to its buffer again and again, which takes as long as the first time.
            return sum(timer(functools.partial(call.run, config, lanes)) for call in group)

        times = {config: time(config) for config in candidates(group[0], lanes)}
        tried[key] = dict(sorted(times.items(), key=lambda item: item[1]))
    return tried


def problem(size: tuple[int, ...], dtype: torch.dtype, device: torch.device | str) -> Inputs:
    """Inputs of (B, H, W, C, L, K): offsets of a few pixels, half of the keys kept."""
    B, H, W, C, L, K = size
    generator = torch.Generator(device).manual_seed(0)
    made = {"generator": generator, "device": device}
    features = [torch.randn(B, H + 2, W + 2, C, **made).to(dtype) for _ in range(L)]
    points = 2 * torch.randn(B, H, W, L, 3, K, **made)
    maps = [torch.randn(B, H + 2, W + 2, K, **made) for _ in range(L)]
    gates, seeds = torch.ones(L, device=device), torch.arange(B, device=device)
    return Inputs(features, points, maps, gates, seeds)


def trace(inputs: Inputs, run: bool) -> list[launch.Launch]:
    """The launches of a forward pass, of both backward passes and of a count. Where they do not
    `run`, they are only listed, and no GPU is needed."""
    from . import accounting, padding, triton_backend

    features, points, maps, _, seeds, _ = inputs
    wanted = Leaves([True] * len(features), True, [True] * len(maps), True)
    calls: list[launch.Launch] = []

    def note(call: launch.Launch) -> None:
        calls.append(call)
        if run:  # the next launches read what this one writes
            call.run(launch.CONFIGS[call.name][0], launch.hardware(points.device)[1])

    before = torch.are_deterministic_algorithms_enabled()
    with launch.recording(note):
        try:
            padding.pad(features[0][:, 1:-1, 1:-1].permute(0, 3, 1, 2))
            gradients = tuple(torch.ones_like(result) for result in triton_backend.forward(inputs))
            accounting.count(points, maps, seeds)
            for deterministic in (False, True):
                torch.use_deterministic_algorithms(deterministic)
                triton_backend.backward(inputs, gradients, wanted)
        finally:
            torch.use_deterministic_algorithms(before)
    return calls


def precompile(kinds: Sequence[tuple], device: torch.device, workers: int) -> None:
    """Compile what `tune` will time, in processes. kinds: (size, type) of each problem."""
    shares = [(i, workers, kinds, device) for i in range(workers)]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        pool.starmap(compile_share, shares, 1)


def compile_share(
    share: int, workers: int, kinds: Sequence[tuple], device: torch.device
) -> list[tuple[str, launch.Config]]:
    """One process's part of the compilations; returns their keys and configurations. Grids are
    arguments of the kernels, so that a small one does for all."""
    lanes, todo = launch.hardware(device)[1], []
    for C, L, K, dtype in sorted({(*size[3:], str(dtype)) for size, dtype in kinds}):
        inputs = problem((1, 4, 4, C, L, K), getattr(torch, dtype.removeprefix("torch.")), device)
        for call in trace(inputs, run=False):
            todo += [(call, config) for config in candidates(call, lanes)]
    mine = todo[share::workers]
    for call, config in mine:
        call.compile(config, lanes)
    return [(launch.call_key(call), config) for call, config in mine]


def save_choices(path: Path, gpu: str, chosen: dict[str, list[int]]) -> None:
    """Add choices to a file, which appears whole or not at all."""
    choices = launch.read_choices(path)
    choices[gpu] = {**choices.get(gpu, {}), **chosen}
    rows = (
        f"  {json.dumps(name)}: {{\n"
        + ",\n".join(f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in sorted(table.items()))
        + "\n  }"
        for name, table in sorted(choices.items())
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, delete=False, encoding="utf-8") as file:
        file.write("{\n" + ",\n".join(rows) + "\n}\n")
    os.replace(file.name, path)
    launch.choose_config.cache_clear()


def saved_choices() -> str:
    """The saved choices and where they lie, and the defaults."""
    lines = []
    for path in (launch.user_copy(), launch.REPOSITORY_COPY):
        choices = launch.read_choices(path)
        lines.append(f"{path}: {', '.join(choices) or 'nothing'}")
        for gpu, table in choices.items():
            lines += [f"  {gpu}: {key}: {tuple(saved)}" for key, saved in sorted(table.items())]
    lines.append("without a saved choice (queries or entries, channels, warps):")
    lines += [f"  {name.strip('_')}: {tuple(listed[0])}" for name, listed in launch.CONFIGS.items()]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    text = "Find the fastest tiles for this GPU."
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=text)
    add = parser.add_argument
    add("--device", default="cuda", help="the GPU to tune for (default: cuda)")
    add("--out", type=Path, default=launch.user_copy(), help="where to save (default: %(default)s)")
    options = {"type": parse_sizes, "default": SIZES, "metavar": "BxHxWxCxLxK[,...]"}
    add("--sizes", help=f"sizes to tune for (default: {len(SIZES)} usual ones)", **options)
    text = "types of the features (default: all three)"
    add("--dtypes", nargs="+", choices=DTYPES, default=[*DTYPES], help=text)
    add("--show", action="store_true", help="print the choices and stop")
    return parser.parse_args(arguments)


def parse_sizes(text: str) -> list[tuple[int, ...]]:
    """'1x48x48x64x5x16,...' → [(1, 48, 48, 64, 5, 16), ...]"""
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in text.split(",")]
    except ValueError:
        sizes = [()]
    if any(len(size) != 6 or min(size) < 1 for size in sizes):
        raise argparse.ArgumentTypeError(f"wants BxHxWxCxLxK, 1x48x48x64x5x16, not {text!r}")
    return sizes


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if options.show:
        print(saved_choices())
        return 0
    if not options.device.startswith("cuda") or not torch.cuda.is_available():
        print(
            f"There is no GPU to tune for on {options.device!r}. The kernels run with their default"
            " tiles, or with those of kernels/tuned.json for GPUs listed there (--show).",
            file=sys.stderr,
        )
        return 1
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: there is nothing to tune", file=sys.stderr)
        return 1
    if not is_writable(options.out.parent):
        print(f"{options.out} cannot be written; name a file with --out", file=sys.stderr)
        return 2
    from triton.testing import do_bench_cudagraph

    device = torch.device(options.device)
    gpu, lanes = launch.hardware(device)
    # Graphs, since a launch takes longer than most of these kernels
    timer = functools.partial(do_bench_cudagraph, rep=20, return_mode="median")
    kinds = [*itertools.product(options.sizes, [DTYPES[name] for name in options.dtypes])]
    with torch.cuda.device(device):
        precompile(kinds, device, os.cpu_count() or 1)
        for size, dtype in kinds:
            tried = tune(trace(problem(size, dtype, device), run=True), lanes, timer)
            save_choices(options.out, gpu, {key: list(next(iter(t))) for key, t in tried.items()})
            for key, times in tried.items():
                best, default = next(iter(times)), launch.CONFIGS[f"_{key.split()[0]}"][0]
                first = times.get(default, math.nan)  # its tile may be another's with this K or C
                took = f"{1e3 * times[best]:.1f} µs; by default {1e3 * first:.1f} µs"
                print(f"{gpu}: {key}: {tuple(best)} {took}")
    return 0


if __name__ == "__main__":
    sys.exit(output.run(main))
