"""The Triton kernels against the float64 reference, forward and every gradient.

Without a GPU they run through Triton's interpreter, all cases in one child process, whose
environment says so before Triton is imported; with one, the same cases run on it too.
"""

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # in the child this file is the script

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from operator_cases import FAR, Inputs, far_apart, gate_terms, sparse_memory  # noqa: E402
from triton.runtime import interpreter  # noqa: E402
from triton_cases import CASES, NAMES, Case, small_cases  # noqa: E402

from acla.kernels import accounting, padding, to_rows, triton_backend  # noqa: E402
from acla.kernels.inputs import Inputs as Arguments  # noqa: E402
from acla.kernels.inputs import Leaves  # noqa: E402
from acla.kernels.primitives import logistic_noise  # noqa: E402


def named(features, points, mask_maps, gates) -> dict[str, torch.Tensor]:
    """Tensors or gradients by name, as `Inputs.leaves` has them; None is left out."""
    leaves = Inputs(features, points, mask_maps, gates, None, 1.0).leaves()
    return {name: tensor for name, tensor in leaves.items() if tensor is not None}


def moved(value, device: str):
    """A tensor or a list of them on the device, as it lies in memory, with what is around it."""
    if isinstance(value, list):
        return [moved(tensor, device) for tensor in value]
    if value is None:
        return None
    around = torch.zeros(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
    return around.to(device).as_strided(value.size(), value.stride(), value.storage_offset())


def arguments_of(inputs: Inputs, device: str) -> Arguments:
    """What `triton_backend.forward` takes, on the device."""
    given = (inputs.features, inputs.points, inputs.mask_maps, inputs.gates, inputs.seeds)
    return Arguments(*(moved(value, device) for value in given), inputs.temperature)


def by_kernels(inputs: Inputs, case: Case, device: str) -> dict[str, torch.Tensor]:
    """Results and wanted gradients of the kernels, on the CPU."""
    arguments = arguments_of(inputs, device)
    wanted = Leaves(
        ["features" in case.wanted] * len(arguments.features),
        "points" in case.wanted,
        ["mask_maps" in case.wanted] * len(arguments.mask_maps or ()),
        "gates" in case.wanted and arguments.gates is not None,
    )
    with filled_memory():
        out = triton_backend.forward(arguments)
        pairs = zip(out, inputs.cotangents, strict=True)
        gradients = [None if c is None else c.to(o) for o, c in pairs]
        grads = triton_backend.backward(arguments, gradients, wanted)
        if case.ordered and device != "cpu":  # the interpreter's order never varies
            again = named(*triton_backend.backward(arguments, gradients, wanted))
            for name, gradient in named(*grads).items():
                assert torch.equal(gradient, again[name]), f"{name} varies"
    grads, leaves = named(*grads), inputs.leaves()
    expected = {name for name in leaves if name.split("[")[0] in case.wanted}
    assert grads.keys() == expected, f"gradients {sorted(grads)}, wanted {sorted(expected)}"
    results = dict(zip(NAMES, out, strict=True))
    for name, gradient in grads.items():
        assert gradient.shape == leaves[name].shape, name
        results[f"∂{name}"] = gradient.to(leaves[name].dtype)
    return {name: tensor.cpu() for name, tensor in results.items()}


@contextlib.contextmanager
def filled_memory() -> Iterator[None]:
    """torch.empty holds NaN, and integers that no index may be."""
    empty = torch.empty

    def filled(*args, **options):
        tensor = empty(*args, **options)
        wrong = torch.nan if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 3
        return tensor.fill_(wrong)

    torch.empty = filled
    try:
        yield
    finally:
        torch.empty = empty


@contextlib.contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """torch.use_deterministic_algorithms inside, and as before after it."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(wanted)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


def check(case: Case, device: str) -> None:
    """The kernels err no more than torch does in the same types, but for rounding: another order of
    the same sums may double an error, a result is rounded once to its own type, and a GPU's
    exponentials and divisions are good to two units in float32's last place, a few of which may
    add up; of the largest term where the terms may cancel."""
    inputs = case.build()
    with deterministic(case.ordered):
        results = by_kernels(inputs, case, device)
    exact = inputs.to(torch.float64).run("reference")
    peer = inputs.run("reference")
    assert torch.equal(results["kept"], exact["kept"]), "kept differs"
    for name, result in results.items():
        zero = torch.zeros_like(result)  # the gradient of what no result depends on
        truth, own = (zero if run[name] is None else run[name].double() for run in (exact, peer))
        error = (result.double() - truth).abs().max()
        largest = gate_terms(inputs) if name == "∂gates" else truth.abs().max()
        rounding = torch.finfo(result.dtype).eps + 8 * torch.finfo(torch.float32).eps
        allowed = 2 * (own - truth).abs().max() + rounding * largest
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


@settings(max_examples=5, deadline=None, derandomize=True, database=None)
@given(case=small_cases())
def check_random(device: str, case: Case) -> None:
    check(case, device)


def check_attend(device: str) -> None:
    """The public operator reaches the kernels, forward and backward."""
    inputs = Case(2, 3, 3, 4, 5, 8, gates=(1, 0, 1)).build()
    expected = inputs.run("reference")
    given = Inputs(*arguments_of(inputs, device), moved(inputs.cotangents, device))
    for name, value in given.run("triton").items():
        torch.testing.assert_close(value.cpu(), expected[name])


def check_pad(device: str) -> None:
    """Rows of features of any type and layout, to the bit."""
    for B, C, H, W in ((1, 1, 1, 1), (2, 3, 5, 4), (1, 70, 3, 9), (3, 64, 2, 17)):
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            feature = torch.randn(B, 2 * C, W, H).to(dtype).mT[:, ::2]  # gaps, columns before rows
            for memory in (torch.contiguous_format, torch.channels_last, torch.preserve_format):
                there = moved(feature.clone(memory_format=memory), device)
                with filled_memory():
                    assert torch.equal(padding.pad(there).cpu(), to_rows(feature))
            assert torch.equal(padding.pad(moved(feature, device)).cpu(), to_rows(feature))


def check_shut_layers_are_not_read(device: str) -> None:
    """A gate of 0 that needs no gradient costs no gather: NaN in its layer goes nowhere."""
    inputs = Case(1, 2, 3, 4, 5, 8, gates=(0, 1)).build()
    inputs.features[0].fill_(torch.nan)
    arguments = arguments_of(inputs, device)
    out = triton_backend.forward(arguments)
    gradients = tuple(torch.ones_like(result) for result in out)
    wanted = Leaves([True, True], True, [True, True], False)
    grads = named(*triton_backend.backward(arguments, gradients, wanted))
    assert all(tensor.isfinite().all() for tensor in (*out, *grads.values()))


def check_count(device: str) -> None:
    """The accounting kernel alone counts what the forward pass counts."""
    inputs = Case(3, 2, 5, 9, 7, 1).build()
    inputs.seeds = torch.stack([inputs.seeds, inputs.seeds + 1], 1).flatten()[::2]
    _, points, maps, _, seeds, _ = arguments_of(inputs, device)
    assert torch.equal(accounting.count(points, maps, seeds).cpu(), inputs.attend("reference").kept)


def check_far_apart(device: str) -> None:
    """Rows and images so far apart that 32 bits cannot count it give the bits of dense ones."""
    case = Case(2, 2, 3, 2, 3, 5, ordered=True)
    inputs = case.build()
    with deterministic(True), tempfile.TemporaryDirectory() as folder:
        expected = by_kernels(inputs, case, device)
        if device == "cpu":
            memory = sparse_memory(Path(folder, "memory"))
        elif torch.cuda.mem_get_info()[0] < 5 * FAR:
            pytest.skip(f"{4 * FAR / 1e9:.0f} GB are too much for this GPU")
        else:
            memory = torch.zeros(FAR, device=device)
        for name, value in by_kernels(far_apart(inputs, memory), case, device).items():
            assert torch.equal(value, expected[name]), name


def check_rough_arithmetic(device: str) -> None:
    """Exponentials, logarithms and quotients that are off by up to two units in the last place, as
    a GPU's are, make no kernel wrong. (The interpreter's are as good as the reference's.)"""
    drawn = np.random.default_rng(0)

    def rough(function: Callable) -> Callable:
        def near(*operands: np.ndarray) -> np.ndarray:
            exact = function(*operands)
            units = drawn.integers(-2, 3, exact.shape).astype(exact.dtype)
            return exact * (1 + units * np.finfo(exact.dtype).eps)

        return near

    with pytest.MonkeyPatch.context() as patch:
        for name, method in {
            "create_exp": lambda self, value: self.unary_op(value, rough(np.exp)),
            "create_log": lambda self, value: self.unary_op(value, rough(np.log)),
            "create_fdiv": lambda self, a, b: self.binary_op(a, b, rough(np.divide)),
        }.items():
            patch.setattr(interpreter.InterpreterBuilder, name, method)
        for name in ("only-coverage-sent", "gates-without-mask", "bf16"):
            check(CASES[name], device)


@triton.jit
def draw(seed_ptr, counter_ptr, out_ptr, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    noise = logistic_noise(tl.load(seed_ptr), tl.load(counter_ptr + i))
    tl.store(out_ptr + i, noise)


def check_noise(device: str) -> None:
    """Draws for counters and seeds that need both halves of 64 bits, by Philox on whole numbers."""

    def philox(seed: int, counter: int) -> float:
        low = 0xFFFFFFFF
        c, k = [counter & low, counter >> 32, 0, 0], [seed & low, seed >> 32 & low]
        for _ in range(10):
            p, q = c[0] * 0xD2511F53, c[2] * 0xCD9E8D57
            c = [q >> 32 ^ c[1] ^ k[0], q & low, p >> 32 ^ c[3] ^ k[1], p & low]
            k = [(k[0] + 0x9E3779B9) & low, (k[1] + 0xBB67AE85) & low]
        u = ((c[0] >> 9) + 0.5) / 2**23
        return math.log(u / (1 - u))

    counters = [0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**32, 2**32 + 5, 2**40 + 3]
    for seed in (0, -1, 2**40 + 7, -(2**63)):
        out = torch.full((8,), torch.nan, device=device)
        seeds, numbers = (torch.tensor(v, device=device) for v in ([seed], counters))
        draw[(1,)](seeds, numbers, out, COUNT=8)
        exact = torch.tensor([philox(seed, counter) for counter in counters])
        torch.testing.assert_close(out.cpu(), exact, rtol=1e-5, atol=1e-6)


CHECKS = {
    **{name: lambda device, case=case: check(case, device) for name, case in CASES.items()},
    "random": check_random,
    "attend": check_attend,
    "shut-layers-are-not-read": check_shut_layers_are_not_read,
    "count": check_count,
    "pad": check_pad,
    "far-apart-in-memory": check_far_apart,
    "noise": check_noise,
}
INTERPRETED = {**CHECKS, "rough-arithmetic": check_rough_arithmetic}


PARTS = 2  # child processes, which run side by side


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_interpreted(part):
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__)), str(part)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    failures = json.loads(done.stdout)
    assert len(failures) == len([*INTERPRETED][part::PARTS])
    assert not any(failures.values()), "\n".join(filter(None, failures.values()))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name):
    CHECKS[name]("cuda")


def test_what_is_moved_lies_as_it_lay():
    inputs = CASES["rows-off-sixteen-bytes"].build()
    for device in ("cpu", "meta"):
        (there,) = moved(inputs.features, device)
        assert there.storage_offset() == 1
        assert there.stride() == inputs.features[0].stride()
        assert there.device.type == device
    assert torch.equal(moved(inputs.features, "cpu")[0], inputs.features[0])


def mend_interpreter() -> None:
    """Let `range` take a reduction's result in the interpreters of Triton before 3.7, whose int()
    of an array of one element numpy 2.4 refuses. And let a function that a kernel calls patch the
    language at its first call rather than at every one, which takes a third of the time."""
    original = interpreter._patch_lang_tensor

    def patched(tensor: type, *scope: object) -> None:
        original(tensor, *scope)
        tensor.__index__ = lambda self: self.handle.data.item()

    interpreter._patch_lang_tensor = patched
    patch_once = functools.cache(interpreter._patch_lang)

    def call(self, *arguments, **named):
        patch_once(self.fn)
        return self.rewrite()(*arguments, **named)

    interpreter.InterpretedFunction.__call__ = call


def child(part: int) -> None:
    """Run a part of the checks through the interpreter; print the failure of each as JSON."""
    torch.set_num_threads(1)
    mend_interpreter()
    failures = {}
    for name in [*INTERPRETED][part::PARTS]:
        try:
            INTERPRETED[name]("cpu")
            failures[name] = ""
        except Exception:
            failures[name] = f"{name}: {traceback.format_exc(limit=-6)}"
    print(json.dumps(failures))


if __name__ == "__main__":
    child(int(sys.argv[1]))
