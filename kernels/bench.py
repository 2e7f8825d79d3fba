"""Time the operator: `python -m kernels.bench`. A wrong implementation is not timed.

Every backend of `attend` runs beside what users write today: `grid_sample`, once per layer and once
per key (the faster one counts), `deform_conv2d` with an identity kernel per key where torchvision
is installed, and one 3×3 convolution of the same width. They take turns within each comparison: the
state of the machine is the same for all. One JSON row for each measurement, then ratios.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

import argparse
import functools
import json
import platform
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import NoReturn

import torch
from torch import Tensor

from . import BACKENDS, floor, output
from .baselines import (
    KEYS,
    LAYERS,
    Case,
    Implementation,
    by_backend,
    by_convolution,
    implementations,
    make_case,
)
from .cache import why_not_written
from .timing import commit, paired, peak_mb, percentiles

SIZES = ("1x48x48x256", "1x256x256x64", "16x48x48x64", "1x96x96x128")
KEEP = (1.0, 0.5, 0.25)
PASSES = ("forward", "both")
Row = dict[str, object]


# Correctness


def run_pass(implementation: Implementation, case: Case, which: str) -> list[Tensor]:
    """The result of a forward pass, and with a backward pass ("both") every gradient."""
    if which == "forward":
        with torch.no_grad():
            return [implementation(case)]
    inputs = [tensor.requires_grad_() for tensor in case.inputs]
    try:
        out = implementation(case)
        gradient = case.gradient
        if out.shape != gradient.shape:  # the convolution's
            gradient = gradient[..., 0, :].permute(0, 3, 1, 2)
        grads = torch.autograd.grad(out, inputs, gradient, allow_unused=True)
    finally:
        for tensor in inputs:
            tensor.requires_grad_(False)
    return [out.detach(), *(g for g in grads if g is not None)]


def error_of(implementation: Implementation, case: Case) -> str | None:
    """The first tensor, of the result and every gradient, that differs from the float64 reference,
    and by how much; None if all are right."""
    exact_case = Case(
        [f.double() for f in case.features],
        case.points.double(),
        [m.double() for m in case.mask_maps],
        case.gradient.double(),
    )
    exact = run_pass(by_backend("reference"), exact_case, "both")
    # A few roundings of the widest sum that leads to an element, in the features' type.
    tolerance = 64 * torch.finfo(case.features[0].dtype).eps
    results = run_pass(implementation, case, "both")
    for i, (result, right) in enumerate(zip(results, exact, strict=True)):
        if 1 <= i <= LAYERS:  # the border's gradient leads nowhere: `to_rows` drops it
            result, right = result[:, 1:-1, 1:-1], right[:, 1:-1, 1:-1]
        error = (result.double() - right).abs().max() / right.abs().max().clamp(min=1e-30)
        if not error <= tolerance:
            name = "the result" if i == 0 else f"gradient {i}"
            return f"{name} is off by {error:.1e}, where {tolerance:.1e} is allowed"
    return None


def working(by_name: dict[str, Implementation], case: Case) -> dict[str, Implementation]:
    """The implementations that are right on a small case. The others are left out, with the reason
    on standard error: kernels have bugs that come and go with versions, types and sizes."""
    right = {}
    for name, implementation in by_name.items():
        try:
            reason = error_of(implementation, case)
        except Exception as error:  # whatever a kernel raises; the other rows do not depend on it
            reason = f"{type(error).__name__}: {error}"
        if reason:
            print(f"{name} is left out: {reason}", file=sys.stderr)
        else:
            right[name] = implementation
    return right


# Rows


def operator_rows(size: tuple[int, int, int, int], args: argparse.Namespace) -> Iterator[Row]:
    """Every implementation on one size, forward and forward and backward, half of the keys kept;
    then our fastest backend at every share of kept keys."""
    dtype = getattr(torch, args.dtype)
    small = make_case((1, 13, 11, size[3]), 0.5, dtype, args.device)
    by_name = implementations(args.device)
    ours = [name for name in by_name if name in BACKENDS]
    right = working(by_name, small)
    args.failed += [name for name in ours if name not in right]
    timed = right | {"conv3x3": by_convolution}
    for which in PASSES:
        case = make_case(size, 0.5, dtype, args.device)
        keep = case.kept()
        cases = [(name, implementation, case, keep) for name, implementation in timed.items()]
        yield from operator_pass_rows(cases, size, which, args)
    best = next((name for name in ours if name in right), None)
    for which in PASSES if best else ():
        cases = [make_case(size, keep, dtype, args.device) for keep in KEEP]
        cases = [(best, right[best], case, case.kept()) for case in cases]
        yield from operator_pass_rows(cases, size, which, args)


def operator_pass_rows(
    cases: list[tuple[str, Implementation, Case, float]],
    size: tuple[int, int, int, int],
    which: str,
    args: argparse.Namespace,
) -> Iterator[Row]:
    """A row for each (name, implementation, case, share of kept keys), all of one size; on a GPU
    with bytes, FLOPs and, where its limits are known, the floor in milliseconds."""
    B, H, W, C = size
    works = []
    for name, implementation, case, keep in cases:
        row = empty_row(name, size, which, args, args.dtype, keep)
        if args.device == "cuda" and name != "conv3x3":
            dtype = getattr(torch, args.dtype)
            passes = floor.works(B, LAYERS, KEYS, H, W, C, keep, dtype, which)
            row |= {field: sum(getattr(w, field) for w in passes) for field in ("bytes", "flops")}
            if args.limits:
                row["floor_ms"] = round(floor.floor_ms(passes, args.limits), 5)
        works.append((row, functools.partial(run_pass, implementation, case, which)))
    yield from timed_rows(works, args, queued=True)


def empty_row(
    name: str,
    size: tuple[int, int, int, int],
    which: str,
    args: argparse.Namespace,
    dtype: str = "float32",
    keep: float = 1.0,
) -> Row:
    """A row before its measurement."""
    B, H, W, C = size
    row = {"device": device_name(args.device), "threads": torch.get_num_threads()}
    row |= {"dtype": dtype, "B": B, "L": LAYERS, "K": KEYS, "H": H, "W": W, "C": C}
    return row | {"keep": round(keep, 4), "backend": name, "pass": which}


def timed_rows(
    works: list[tuple[Row, Callable[[], object]]], args: argparse.Namespace, queued: bool = False
) -> Iterator[Row]:
    """The rows with times, taken in turns, and memory."""
    times = paired([work for _, work in works], args.device, args.seconds, queued=queued)
    for (row, work), taken in zip(works, times, strict=True):
        row = row | percentiles(taken)
        # A graph has its memory from the start.
        row["peak_mb"] = None if row["pass"] == "replay" else peak_mb(work, args.device)
        if "floor_ms" in row:
            row["floor_share"] = round(row["floor_ms"] / row["ms_p50"], 4)
        yield row


def device_name(device: str) -> str:
    """The GPU's name, or the processor's architecture."""
    return torch.cuda.get_device_name() if device == "cuda" else f"cpu {platform.machine()}"


def stream_rows(rows: Iterable[Row], path: str | None) -> list[Row]:
    """The rows, each of which is on standard error and in the file (or on the output, "-") as soon
    as it is measured: a later failure, for want of memory for instance, takes none with it. A file
    is replaced at the first row."""
    stamp, done = {"commit": commit()}, []
    for row in rows:
        print(" ".join(f"{key}={value}" for key, value in row.items()), file=sys.stderr, flush=True)
        line = json.dumps(stamp | row)
        if path == "-":
            print(line, flush=True)
        elif path:
            with open(path, "a" if done else "w", encoding="utf-8") as file:
                file.write(line + "\n")
        done.append(row)
    return done


# Ratios


def ratios(rows: list[Row]) -> Iterator[str]:
    """Our backends beside the others, a share of the keys beside all, a time beside its floor."""
    groups: dict[tuple, dict[str, Row]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("B", "H", "W", "C", "pass", "keep"))
        groups.setdefault(key, {}).setdefault(row["backend"], row)  # the first had the same turns
    for group in groups.values():
        grid = [row["ms_p50"] for name, row in group.items() if name.startswith("grid_sample")]
        for name in ("cpp", "torch", "triton"):
            if not grid or name not in group:
                continue
            row = group[name]
            line = f"{name} is {min(grid) / row['ms_p50']:.1f}× as fast as the better grid_sample"
            for other in ("deform_conv2d", "conv3x3"):
                if other in group:
                    line += f", {group[other]['ms_p50'] / row['ms_p50']:.2f}× as {other}"
            yield f"{title(row)}: {line}"
    for row in rows:
        if "floor_share" in row:
            yield f"{title(row)}: {row['backend']} reaches {row['floor_share']:.2f} of the floor"
    for row in (row for row in rows if row["keep"] > 0.99):
        same = ("B", "H", "W", "C", "backend", "pass")
        for other in (r for r in rows if r["keep"] < 0.3 and all(r[k] == row[k] for k in same)):
            share = other["ms_p50"] / row["ms_p50"]
            yield (
                f"{title(other)}: {row['backend']} takes {share:.2f} of its time with all keys "
                "(less is better)"
            )


def title(row: Row) -> str:
    """Size, pass and share of kept keys, as a line begins."""
    size = f"{row['B']}×{row['H']}×{row['W']}, C {row['C']}"
    return f"{size}, {row['pass']}, {row['keep']:.0%} of the keys"


# The command


def add_bench_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of a benchmark: device, threads, length and output."""
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--threads", type=int, default=1, help="CPU threads (default: 1)")
    text = "least time for each comparison (default: 3)"
    add("--seconds", type=float, default=3.0, help=text)
    add("--json", metavar="FILE|-", help="write the rows there; - is standard output")


def parse(argv: list[str] | None) -> argparse.Namespace:
    summary, sizes = __doc__.splitlines()[0], ",".join(SIZES)
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=summary)
    add_bench_flags(parser)
    add = parser.add_argument
    add("--sizes", default=sizes, help=f"BxHxWxC, several with commas (default: {sizes})")
    types, text = ("float32", "bfloat16", "float16"), "of the features (default: float32)"
    add("--dtype", choices=types, default=types[0], help=text)
    return parser.parse_args(argv)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse impossible flags before anything is measured, and set the threads."""
    if args.device == "cuda" and not torch.cuda.is_available():
        refuse("--device cuda: no CUDA device is available; use --device cpu")
    if reason := why_not_written(args.json):
        refuse(f"--json {args.json}: {reason}")
    if args.threads < 1:
        refuse(f"--threads must be 1 or more, not {args.threads}")
    torch.set_num_threads(args.threads)


def refuse(message: str) -> NoReturn:
    """Stop: the call was wrong."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def report(rows: list[Row], lines: Iterable[str], args: argparse.Namespace) -> None:
    """Print the machine and the ratios, unless standard output holds the rows."""
    if args.json == "-":
        return
    clock = "processor time" if args.threads == 1 else "wall time"
    clock = "GPU time" if args.device == "cuda" else clock
    print(f"{device_name(args.device)}, {args.threads} CPU thread(s), medians of {clock}")
    print("\n".join(lines))


def main(argv: list[str] | None = None) -> int:
    """The command; returns its exit status: 1 where a backend of ours is wrong or raises."""
    args = parse(argv)
    try:
        sizes = [tuple(map(int, size.split("x"))) for size in args.sizes.split(",")]
        if any(len(size) != 4 or min(size) < 1 for size in sizes):
            raise ValueError
    except ValueError:
        refuse(f"--sizes {args.sizes}: sizes are BxHxWxC, for instance {SIZES[0]}")
    check_flags(args)
    args.failed, args.limits = [], None
    if args.device == "cuda":
        try:
            args.limits = floor.gpu_of(torch.device("cuda", torch.cuda.current_device()))
        except LookupError as reason:
            print(f"no floor: {reason}", file=sys.stderr)
    rows = stream_rows((row for size in sizes for row in operator_rows(size, args)), args.json)
    report(rows, ratios(rows), args)
    return 1 if args.failed else 0


if __name__ == "__main__":
    sys.exit(output.run(main))
