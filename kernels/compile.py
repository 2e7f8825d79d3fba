"""Compile every Triton kernel ahead of time, without a GPU: `python -m kernels.compile`.

Every kernel, in every configuration of launch.py, for each named GPU: its registers, spills,
shared memory and widest load, and what its machine code holds: instructions, how many of them a
warp issues for one key against the least (`floor`; 0 where all is done once a key and none once a
channel), barriers, loads of 16, 8 and fewer bytes, atomic additions. The exit status is 1 if a
kernel spills, or if the gathers do not load 16 bytes at a time.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch

from . import autotune, floor, launch, output
from .cache import why_not_written
from .launch import VECTOR

# The name → Triton's backend and architecture, and the lanes of a warp.
TARGETS = {"sm_80": ("cuda", 80, 32), "sm_90": ("cuda", 90, 32), "gfx942": ("hip", "gfx942", 64)}
GATHERS = {"_aggregate": 4, "_dots": 5}  # wide loads to a tile: four corners, and the gradient
TRITON_TYPES = {torch.float32: "fp32", torch.float64: "fp64", torch.float16: "fp16"}
TRITON_TYPES |= {torch.bfloat16: "bf16", torch.int32: "i32", torch.int64: "i64"}
LAYERS, KEYS, CHANNELS = 2, 16, (64, 256)
WIDE_LOAD = r"LDG\.E\S*\.128|(global|buffer)_load_dwordx4"
BARRIER, ATOMIC = "BAR|s_barrier", "RED\\.|REDG|ATOM|global_atomic|buffer_atomic"
NVIDIA_WIDTHS = {"128": 16, "64": 8, "": 4, "U16": 2, "S16": 2, "U8": 1, "S8": 1}
AMD_WIDTHS = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "ushort": 2, "short": 2}


class Job(NamedTuple):
    """One compilation, in terms that travel between processes."""

    kernel: str
    module: str
    variant: str  # among the kernel's launches
    target: str
    config: launch.Config
    signature: dict[str, Any]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], list]
    wide_loads: int  # that a thread must do; 0 where the width does not matter
    keys: float  # that a warp has done after a trip of its loop, or after its whole program
    chunks: int  # trips of a loop within that loop; 0 without loops
    floor: float  # instructions of a warp for one key, at least


class Compiled(NamedTuple):
    """The result of a job."""

    target: str
    kernel: str
    variant: str
    rows: int
    channels: int
    warps: int
    registers: int
    spills: int  # bytes on NVIDIA, registers on AMD
    shared: int  # bytes
    load: int  # bytes of the widest load; of a gather's feature loads, all of them
    instructions: int
    per_key: float  # of them, in a warp
    floor: float
    barriers: int
    loads: str  # of 16/8/fewer bytes
    atomics: int
    problem: str


class Code(NamedTuple):
    """What a compiler made."""

    registers: int
    spills: int
    operations: list[str]
    loops: list[tuple[int, int]]  # the first and the last operation of each
    widths: Counter[int]  # bytes → loads

    def count(self, pattern: str, first: int = 0, last: int | None = None) -> int:
        """Operations that begin like this, from the first to the last."""
        part = self.operations[first : None if last is None else last + 1]
        return sum(re.match(pattern, operation) is not None for operation in part)

    def per_key(self, job: Job) -> float:
        """Instructions of a warp for one key, 0 where the loop is not known. (Of several loops only
        one is run, but for those over the four corners in `sum_rows` and `sum_maps`.)"""
        if not job.chunks:
            return len(self.operations) / job.keys
        loops = self.loops
        outer = [a for a in loops if not any(b[0] <= a[0] < a[1] < b[1] for b in loops)]
        trips = []
        for first, last in outer:
            size = last - first + 1
            for begin, end in loops:
                if first <= begin < end < last:  # over chunks of channels, perhaps unrolled
                    wide = max(1, self.count(WIDE_LOAD, begin, end))
                    again = max(1, job.chunks * job.wide_loads // wide) - 1
                    size += again * (end - begin + 1)
            trips.append(size)
        whole = sum(trips) if job.kernel.startswith("_sum") else max(trips, default=0)
        return whole / job.keys


def jobs(targets: Sequence[str], quick: bool) -> list[Job]:
    """All compilations without repetition. Quick: only each kernel's default."""
    jobs_by_key: dict[tuple, Job] = {}
    for dtype in (torch.float32, torch.bfloat16):
        for C in CHANNELS:
            inputs = autotune.problem((1, 4, 4, C, LAYERS, KEYS), dtype, "cpu")
            for call in autotune.trace(inputs, run=False):
                for target in targets:
                    configs = autotune.candidates(call, TARGETS[target][2])
                    for config in configs[:1] if quick else configs:
                        job = job_of(call, target, config)
                        key = (job.kernel, str(job.signature), str(job.constants), target, config)
                        jobs_by_key.setdefault(key, job)
    return list(jobs_by_key.values())


def job_of(call: launch.Launch, target: str, config: launch.Config) -> Job:
    """A launch as Triton's compiler takes it, specialised as at the launch."""
    lanes = TARGETS[target][2]
    blocks = call.blocks(config, lanes)
    values = {**call.arguments, **blocks}
    signature, constants, attributes = {}, {}, {}

    def type_of(value: Any, path: tuple[int, ...]) -> Any:
        if isinstance(value, tuple):
            types = [type_of(v, (*path, i)) for i, v in enumerate(value)]
            return type(value)(*types) if hasattr(value, "_fields") else tuple(types)
        if isinstance(value, torch.Tensor):
            if value.data_ptr() % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return f"*{TRITON_TYPES[value.dtype]}"
        if isinstance(value, float):
            return "fp32"
        if isinstance(value, int) and len(path) == 1:
            return "i32"  # not specialised
        if isinstance(value, int) and value != 1:
            if value % 16 == 0:
                attributes[path] = [["tt.divisibility", 16]]
            return "i32"
        constants[path] = value
        return "constexpr"

    for index, parameter in enumerate(call.kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr:
            constants[(index,)] = value
            signature[parameter.name] = "constexpr"
        else:
            signature[parameter.name] = type_of(value, (index,))
    variant = ""
    wide_loads, chunks, least = 0, 1, 0.0
    rows = blocks.get("BLOCK_N", 0) or blocks["BLOCK_E"]
    keys = rows / config.warps
    if "BLOCK_C" in blocks:
        C, dtype = values["C"], call.dtype
        variant = f"{TRITON_TYPES[dtype]} C{C}"
        share = blocks["BLOCK_C"] * blocks.get("BLOCK_N", 0) * dtype.itemsize
        whole = share // (lanes * config.warps * VECTOR)  # wide loads of a tile to a thread
        if values.get("UNIT", 1) > 1:  # else rows start anywhere, and narrow loads are right
            wide_loads = GATHERS.get(call.name, 0) * whole
        chunks = -(-C // blocks["BLOCK_C"])
        if call.name != "_dots":  # a program to each chunk
            keys, chunks = keys / chunks, 1
        adding = 1 + floor.REAL / VECTOR
        each = {"_scatter": adding, "_pad": 0}.get(call.name, floor.per_value(dtype))
        least = floor.CORNERS * C * each / lanes
    elif "BLOCK_N" in blocks:
        keys, chunks = keys * values["K"], 0
        if "plan" in values:
            variant = "forward" if values["plan"].key is None else "backward"
    if "grad_mask_ptr" in values or ("grads" in values and values["grads"].masks is not None):
        variant = "ordered"
    fn = call.kernel.fn
    name = (fn.__name__, fn.__module__, variant, target, config)
    return Job(*name, signature, constants, attributes, wide_loads, keys, chunks, least)


def compile_job(job: Job) -> Compiled:
    """Compile and read registers, spills and load widths from what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel = getattr(importlib.import_module(job.module), job.kernel)
    source = ASTSource(kernel, job.signature, job.constants, job.attributes)
    target, options = GPUTarget(*TARGETS[job.target]), launch.options_of(job.config)
    compiled = triton.compile(source, target=target, options=options)
    asm = compiled.asm
    code = read_nvidia(asm["cubin"]) if "cubin" in asm else read_amd(asm["amdgcn"])
    widths = code.widths
    load = max(widths, default=0)
    if job.wide_loads and widths[VECTOR] < job.wide_loads:
        load = max((width for width in widths if width < VECTOR), default=0)
    problems = [f"spills {code.spills}"] if code.spills else []
    if job.wide_loads and load < VECTOR:
        problems.append(f"loads {load} bytes at a time")
    narrow = widths.total() - widths[VECTOR] - widths[VECTOR // 2]
    return Compiled(
        *(job.target, job.kernel.strip("_"), job.variant, *job.config),
        *(code.registers, code.spills, compiled.metadata.shared, load),
        *(len(code.operations), round(code.per_key(job), 1), round(job.floor, 1)),
        *(code.count(BARRIER), f"{widths[VECTOR]}/{widths[VECTOR // 2]}/{narrow}"),
        *(code.count(ATOMIC), " and ".join(problems)),
    )


def read_nvidia(cubin: bytes) -> Code:
    """From the disassembly; spills are in bytes."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(tool), "--dump-resource-usage", "--dump-sass", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {k: int(v) for k, v in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@\S+\s+)?([A-Z][\w.]*)([^;]*);", text)
    lines = [line for line in lines if line[1] != "NOP"]  # they fill up the end
    at = {int(address, 16): i for i, (address, _, _) in enumerate(lines)}
    operations = [operation for _, operation, _ in lines]
    jumps = [
        (at[int(target[1], 16)], i)
        for i, (_, operation, operands) in enumerate(lines)
        if operation == "BRA" and (target := re.search(r"0x([0-9a-f]+)", operands))
    ]
    loads = (operation.split(".") for operation in operations if operation.startswith("LDG"))
    widths = (set(load) & NVIDIA_WIDTHS.keys() - {""} for load in loads)
    counted = Counter(NVIDIA_WIDTHS[next(iter(width), "")] for width in widths)
    loops = [(begin, end) for begin, end in jumps if begin < end]
    return Code(usage["REG"], usage["STACK"] + usage["LOCAL"], operations, loops, counted)


def read_amd(text: str) -> Code:
    """From the assembly, without loops; spills are in registers."""
    numbers = {k: int(v) for k, v in re.findall(r"\.([a-z_]+_count):\s+(\d+)", text)}
    operations = re.findall(r"^\t((?:s|v|ds|global|buffer|flat|scratch)_\w+)", text, re.M)
    loads = re.findall(r"\b(?:global|buffer|flat)_load_([a-z0-9]+)", text)
    spills = numbers["vgpr_spill_count"] + numbers["sgpr_spill_count"]
    counted = Counter(AMD_WIDTHS.get(load, 1) for load in loads)
    return Code(numbers["vgpr_count"], spills, operations, [], counted)


def compile_all(todo: Sequence[Job], workers: int) -> list[Compiled]:
    """Compile in several processes, with a cache directory that is thrown away."""
    with tempfile.TemporaryDirectory(prefix="compile-") as cache:
        context = multiprocessing.get_context("spawn")  # processes that have not imported Triton
        with ProcessPoolExecutor(workers, context, set_cache, (cache,)) as pool:
            return list(pool.map(compile_job, todo))


def set_cache(directory: str) -> None:
    """Tell a process, before it imports Triton, where to keep what it compiles."""
    os.environ["TRITON_CACHE_DIR"] = directory


def aligned(rows: Sequence[NamedTuple]) -> str:
    """Aligned columns under the fields' names."""
    lines = [rows[0]._fields, *([str(value) for value in row] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = ("  ".join(v.ljust(w) for v, w in zip(row, widths, strict=True)) for row in lines)
    return "\n".join(line.rstrip() for line in padded)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog=f"python -m {__spec__.name}", description=__doc__)
    known, add = ",".join(TARGETS), parser.add_argument
    add("--target", default=known, help=f"GPUs, comma-separated (default: {known})")
    add("--quick", action="store_true", help="only each kernel's default configuration")
    text = "processes (default: one a processor)"
    add("--workers", type=int, default=os.cpu_count(), help=text)
    add("--json", metavar="FILE", help="write the rows here too; - is the output")
    options = parser.parse_args(arguments)
    if reason := why_not_written(options.json):
        parser.error(f"--json {options.json}: {reason}")
    if options.workers is not None and options.workers < 1:
        parser.error(f"--workers must be 1 or more, not {options.workers}")
    options.target = options.target.split(",")
    unknown = set(options.target) - TARGETS.keys()
    if unknown:
        parser.error(f"unknown target {', '.join(sorted(unknown))}; known: {known}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    options = parse(arguments)
    if importlib.util.find_spec("triton") is None:
        print("Triton is not installed: nothing to compile", file=sys.stderr)
        return 1
    from triton import knobs

    if knobs.runtime.interpret:
        print("TRITON_INTERPRET is set: the interpreter compiles nothing", file=sys.stderr)
        return 1
    rows = compile_all(jobs(options.target, options.quick), options.workers)
    text = json.dumps([row._asdict() for row in rows], indent=1)
    if options.json == "-":
        print(text)
    else:
        print(aligned(rows))
        if options.json:
            Path(options.json).write_text(text + "\n", encoding="utf-8")
    bad = [row for row in rows if row.problem]
    for row in bad:
        name = " ".join(map(str, row[: Compiled._fields.index("registers")]))
        print(f"{name}: {row.problem}", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(output.run(main))
