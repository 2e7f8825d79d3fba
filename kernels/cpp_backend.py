"""The operator on CPUs: the C++ kernel cpu.cpp, compiled on first use, and its launchers.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels

Environment: CXX names the compiler, ACLA_CACHE the directory that keeps what it makes.
"""

import ctypes
import functools
import hashlib
import logging
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from .cache import cache_directory, is_writable
from .inputs import Inputs, Leaves

logger = logging.getLogger(__name__)

SOURCE = Path(__file__).with_name("cpu.cpp")
HEADERS = [SOURCE.with_name(name) for name in ("features.h", "plan.h", "vectors.h")]
# Neither flag changes what NaN and infinity do; both let the compiler vectorise.
FLAGS = ("-std=c++17", "-O3", "-fno-math-errno", "-fno-trapping-math", "-shared", "-fPIC")
# Tried in this order: not every compiler knows the processor by name or has OpenMP's library.
EXTRAS = (("-march=native", "-fopenmp"), ("-march=native", "-fopenmp-simd"))
EXTRAS += (("-fopenmp",), ("-fopenmp-simd",), ())
TYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}


class Problem(ctypes.Structure):
    """The argument of every function in the library; mirrors `Problem` in plan.h."""

    _fields_ = (
        *((name, ctypes.c_int64) for name in ("B", "H", "W", "L", "K", "C", "threads")),
        ("temperature", ctypes.c_double),
        *(
            (name, ctypes.c_void_p)
            for name in (
                *("features", "feature_strides", "points", "mask_maps", "mask_strides", "gates"),
                *("seeds", "aggregate", "coverage", "kept"),
                *("grad_features", "grad_points", "grad_mask_maps", "grad_gates"),
                *("query", "query_strides", "weight", "bias"),
                *("mask_weight", "mask_bias", "mask_memory"),
                *("output", "output_bias", "result"),
            )
        ),
    )


def why_not_cpp(points: Tensor) -> str | None:
    """None where the C++ kernel runs on this tensor's device, else the reason why it does not."""
    if points.device.type != "cpu":
        return f"tensors are on {points.device}, cpp needs cpu"
    loaded = library()
    return loaded if isinstance(loaded, str) else None


def forward(inputs: Inputs, counts: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The results of `kernels.attend`, in the arithmetic's types: aggregate, coverage, kept."""
    B, H, W, L, _, _ = inputs.points.shape
    call = LibraryCall(inputs, inputs.points.shape)
    aggregate = torch.empty(B, H, W, L, inputs.features[0].shape[-1], dtype=call.storage)
    coverage = torch.empty(B, H, W, L, dtype=call.arithmetic)
    kept = torch.empty(B, L, dtype=torch.float64)
    call.run("forward", aggregate=aggregate, coverage=coverage, kept=kept)
    return aggregate, coverage, kept


def attend_module(query: Tensor, features: Sequence[Tensor], *weights: Tensor | None) -> Tensor:
    """`kernels.attend_module`."""
    B, H, W, C = query.shape
    L = len(features)
    K = len(weights[1]) // (3 * L)
    call = LibraryCall(Inputs(features, None, None), (B, H, W, L, 3, K))
    query = rows(query, call.storage)
    names = "weight", "bias", "mask_weight", "mask_bias", "output", "output_bias"
    given = dict(zip(names, weights, strict=True))
    result = torch.empty(B, H, W, C, dtype=call.storage)
    masked = given["mask_weight"] is not None
    call.run(
        "module",
        query=query,
        query_strides=strides([query]),
        **{n: None if t is None else t.to(call.arithmetic).contiguous() for n, t in given.items()},
        mask_memory=torch.empty(L, B, H + 2, W + 2, K, dtype=call.arithmetic) if masked else None,
        result=result,
    )
    return result


def backward(
    inputs: Inputs, gradients: tuple[Tensor | None, Tensor | None, Tensor | None], wanted: Leaves
) -> Leaves:
    """The gradients that are `wanted`, from those of the three results of `forward`; of these None
    means zero."""
    features, points, mask_maps = inputs[:3]
    call = LibraryCall(inputs, points.shape)
    types = (call.storage, call.arithmetic, torch.float64)
    given = [
        None if gradient is None else gradient.to(dtype).contiguous()
        for gradient, dtype in zip(gradients, types, strict=True)
    ]

    def empty_like(
        tensor: Tensor, wanted: bool, dtype: torch.dtype = call.arithmetic
    ) -> Tensor | None:
        return torch.empty(tensor.shape, dtype=dtype) if wanted else None

    grad_features = [
        empty_like(f, w, call.storage) for f, w in zip(features, wanted.features, strict=True)
    ]
    grad_points = empty_like(points, wanted.points)
    grad_maps = [empty_like(m, w) for m, w in zip(mask_maps or (), wanted.mask_maps, strict=True)]
    shape = points.shape[0], len(features)
    grad_gates = torch.empty(shape, dtype=torch.float64) if wanted.gates else None
    call.run(
        "backward",
        **dict(zip(("aggregate", "coverage", "kept"), given, strict=True)),
        grad_features=grad_features,
        grad_points=grad_points,
        grad_mask_maps=grad_maps,
        grad_gates=grad_gates,
    )
    return Leaves(
        grad_features, grad_points, grad_maps, grad_gates.sum(0) if wanted.gates else None
    )


class LibraryCall:
    """One call of the library: the inputs in the types and layouts it reads, kept alive."""

    def __init__(self, inputs: Inputs, shape: Sequence[int]) -> None:
        """shape: that of the points, which need not be there."""
        B, H, W, L, _, K = shape
        features, points, mask_maps, gates, seeds, temperature = inputs
        dtype = features[0].dtype
        self.storage = dtype if dtype in TYPE_NAMES else torch.float32
        self.arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
        sizes = B, H, W, L, K, features[0].shape[-1]
        self.problem = Problem(*sizes, torch.get_num_threads(), temperature)
        self.alive: list[object] = []
        self.set("features", [rows(f, self.storage) for f in features])
        self.set("feature_strides", strides(self.alive[-1]))
        if points is not None:
            self.set("points", points.to(self.arithmetic).contiguous())
        if mask_maps is not None:
            self.set("mask_maps", [rows(m, self.arithmetic) for m in mask_maps])
            self.set("mask_strides", strides(self.alive[-1]))
        self.set("gates", None if gates is None else gates.double().contiguous())
        self.set("seeds", None if seeds is None else seeds.contiguous())

    def set(self, name: str, value: Tensor | list[Tensor | None] | ctypes.Array | None) -> None:
        """Point a field at a tensor's data, at an array of such pointers, or at a C array."""
        if isinstance(value, Tensor):
            setattr(self.problem, name, value.data_ptr())
        elif value is not None:
            array = value
            if isinstance(value, list):
                pointers = [None if t is None else t.data_ptr() for t in value]
                array = (ctypes.c_void_p * len(pointers))(*pointers)
                self.alive.append(array)
            setattr(self.problem, name, ctypes.addressof(array))
        self.alive.append(value)

    def run(
        self, function: str, **fields: Tensor | list[Tensor | None] | ctypes.Array | None
    ) -> None:
        """Call `function` with the results to write (or their gradients to read)."""
        for name, value in fields.items():
            self.set(name, value)
        loaded = library()
        if isinstance(loaded, str):
            raise RuntimeError(loaded)
        getattr(loaded, f"{function}_{TYPE_NAMES[self.storage]}")(ctypes.byref(self.problem))


def rows(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """The tensor in this type, with its last dimension dense; itself where that is already so."""
    tensor = tensor.to(dtype)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def strides(tensors: list[Tensor]) -> ctypes.Array:
    """Strides of image, row and column of each tensor, as int64 [L,3]."""
    values = [s for tensor in tensors for s in tensor.stride()[:3]]
    return (ctypes.c_int64 * len(values))(*values)


@functools.cache
def library() -> ctypes.CDLL | str:
    """The compiled kernel, or the reason why there is none. Tried once per process."""
    compiler = find_compiler()
    if compiler is None:
        return "no C++ compiler was found (set CXX)"
    reason = "no combination of flags worked"
    sources = [path.read_text(encoding="utf-8") for path in (SOURCE, *HEADERS)]
    for extras in EXTRAS:
        command = [*compiler, *FLAGS, *extras]
        try:
            # The predefined macros name the compiler's version and the instructions it may use.
            macros = run_compiler([*command, "-dM", "-E", "-x", "c++", os.devnull])
            key = hashlib.sha256("\0".join((*sources, *command, macros)).encode())
            return cached(command, key.hexdigest()[:32])
        except (OSError, subprocess.SubprocessError) as error:
            reason = f"{shlex.join(compiler)} failed: {reason_of(error)}"
    return reason


def find_compiler() -> list[str] | None:
    """$CXX with its arguments, or the first of the usual names that exists."""
    if os.environ.get("CXX"):
        return shlex.split(os.environ["CXX"])
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def cached(command: list[str], key: str) -> ctypes.CDLL:
    """The library under this key, from the cache or compiled into it.

    A file's name carries the hash of its content, so one that was cut short is never loaded; files
    appear by renaming, so processes that compile at once cannot disturb each other.
    """
    directory = cache_directory()
    for path in sorted(directory.glob(f"cpu-{key}-*.so")):
        if path.stem.endswith(content_hash(path)):
            return ctypes.CDLL(str(path))
    keep = is_writable(directory)
    with tempfile.TemporaryDirectory(prefix="compile-", dir=directory if keep else None) as scratch:
        path = Path(scratch, "cpu.so")
        often = "once" if keep else f"for this process alone: {directory} cannot be written"
        logger.warning("compiling the C++ kernel, %s; it takes about half a minute", often)
        run_compiler([*command, str(SOURCE), "-o", str(path)])
        if keep:
            path = path.rename(directory / f"cpu-{key}-{content_hash(path)}.so")
        return ctypes.CDLL(str(path))  # once loaded it needs no file


def content_hash(path: Path) -> str:
    """A short hash of the file's content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def run_compiler(command: list[str]) -> str:
    """The command's output; its errors are raised."""
    quiet = {"capture_output": True, "stdin": subprocess.DEVNULL}
    readable = {"encoding": "utf-8", "errors": "replace"}
    return subprocess.run(command, check=True, timeout=600, **quiet, **readable).stdout


def reason_of(error: Exception) -> str:
    """The line in which a failed command names its error, its last one, or the error itself."""
    lines = (getattr(error, "stderr", None) or "").strip().splitlines()
    errors = [line for line in lines if "error" in line]
    return (errors or lines[-1:] or [str(error)])[0]
