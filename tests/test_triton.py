"""The Triton kernels against the float64 reference, forward and every gradient.

Without a GPU they run through Triton's interpreter, all cases in one child process, whose
environment says so before Triton is imported; with one, the same cases run on it too.
"""

import contextlib
import json
import math
import os
import random
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # in the child this file is the script

pytest.importorskip("triton", reason="Triton is not installed")

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from kernels import accounting, gpu, reference  # noqa: E402
from kernels.bilinear import logistic_noise  # noqa: E402

ALL = ("features", "points", "maps", "gates")
NAMES = ("aggregate", "coverage", "kept")
TEMPERATURE = 0.7


@dataclass(frozen=True)
class Case:
    """A problem; `change` may spoil its inputs before they are used."""

    B: int
    L: int
    K: int
    H: int
    W: int
    C: int
    dtype: torch.dtype = torch.float32
    masked: bool = True
    gates: tuple[float, ...] | None = None
    seeded: bool = True
    spread: float = 2.0  # pixels, of the offsets
    wanted: tuple[str, ...] = ALL
    sent: tuple[str, ...] = NAMES  # results that have a gradient
    ordered: bool = False
    change: Callable[["Inputs"], None] | None = None


@dataclass
class Inputs:
    features: list[torch.Tensor]
    points: torch.Tensor
    maps: list[torch.Tensor] | None
    gates: torch.Tensor | None
    seeds: torch.Tensor | None


def round_offsets(inputs: Inputs) -> None:
    inputs.points[..., :2, :] = inputs.points[..., :2, :].round()


def on_the_edges(inputs: Inputs) -> None:
    """Positions exactly at -1, H and W, and half a pixel outside."""
    H, W, K = inputs.points.shape[1], inputs.points.shape[2], inputs.points.shape[5]
    y, x = torch.arange(H).view(-1, 1, 1, 1), torch.arange(W).view(1, -1, 1, 1)
    choice = torch.arange(K) % 4
    inputs.points[..., 0, :] = torch.tensor([-1.0, H, -0.5, H - 0.5])[choice] - y
    inputs.points[..., 1, :] = torch.tensor([W, -1.0, W - 0.5, -0.5])[choice] - x


def not_numbers(inputs: Inputs) -> None:
    offsets = inputs.points[..., :2, :]
    kind = torch.randint(0, 8, offsets.shape)
    for value, which in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 2), (1e30, 3)):
        offsets[kind == which] = value


def shut_all(inputs: Inputs) -> None:
    inputs.maps = [m - 100 for m in inputs.maps]


def open_all(inputs: Inputs) -> None:
    inputs.maps = [m + 100 for m in inputs.maps]


def scatter_in_memory(inputs: Inputs) -> None:
    """Every tensor in a buffer of its own, with gaps, some starting off 16 bytes."""

    def move(tensor: torch.Tensor, gap: int) -> torch.Tensor:
        shape = [size + gap for size in tensor.shape]
        buffer = torch.full(shape, torch.nan, dtype=tensor.dtype)
        place = buffer[tuple(slice(gap, gap + size) for size in tensor.shape)]
        return place.copy_(tensor)

    inputs.features = [move(f, 1 + i) for i, f in enumerate(inputs.features)]
    inputs.maps = [move(m, 2 - i % 2) for i, m in enumerate(inputs.maps)]
    moved = inputs.points.permute(3, 0, 2, 1, 5, 4).contiguous()
    inputs.points = moved.permute(1, 3, 2, 0, 5, 4)
    if inputs.gates is not None:
        inputs.gates = torch.stack([inputs.gates, inputs.gates + 1], 1)[:, 0]
    inputs.seeds = torch.stack([inputs.seeds, inputs.seeds + 1], 1)[:, 0]


def channels_first(inputs: Inputs) -> None:
    inputs.features = [
        f.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for f in inputs.features
    ]


def other_types(inputs: Inputs) -> None:
    """What autocast makes of a module: narrow features and maps, wide points."""
    inputs.maps = [m.to(torch.bfloat16) for m in inputs.maps]


bf16, fp16 = torch.bfloat16, torch.float16
CASES = {
    "odd-rectangle-smaller-than-block": Case(1, 2, 3, 5, 7, 3),
    "one-pixel": Case(1, 1, 4, 1, 1, 1),
    "one-row-longer-than-block": Case(1, 2, 3, 1, 70, 3),
    "one-column": Case(2, 1, 2, 37, 1, 4),
    "off-the-block": Case(1, 2, 5, 9, 11, 96),
    "one-key": Case(1, 2, 1, 4, 3, 5),
    "sixteen-keys": Case(1, 3, 16, 6, 7, 64),
    "many-channels": Case(1, 1, 5, 3, 4, 256),
    "fifteen-images-and-layers": Case(5, 3, 3, 3, 4, 3, gates=(1, 0, 1)),
    "fifteen-layers-of-one-image": Case(1, 15, 2, 3, 4, 8),
    "far-outside": Case(1, 2, 6, 5, 4, 8, spread=60),
    "whole-pixels": Case(1, 2, 4, 5, 6, 3, change=round_offsets),
    "on-the-edges": Case(1, 2, 4, 5, 6, 3, change=on_the_edges),
    "nan-and-infinity": Case(1, 2, 5, 5, 6, 3, change=not_numbers),
    "all-masked": Case(1, 2, 3, 4, 5, 3, change=shut_all),
    "all-kept": Case(1, 2, 3, 4, 5, 3, change=open_all),
    "no-mask": Case(1, 2, 3, 4, 5, 3, masked=False, seeded=False),
    "no-noise": Case(2, 2, 3, 4, 5, 3, seeded=False),
    "gates-with-gradient": Case(2, 4, 3, 4, 5, 8, gates=(0, 1, 0, 1)),
    "gates-without-gradient": Case(2, 3, 3, 4, 5, 8, gates=(0, 1, 1), wanted=ALL[:3]),
    "gates-in-between": Case(1, 2, 3, 4, 5, 8, gates=(0.5, 2)),
    "gates-all-shut": Case(1, 2, 3, 4, 5, 8, gates=(0, 0)),
    "gates-without-mask": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), masked=False),
    "only-features-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("features",)),
    "only-points-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("points",)),
    "only-maps-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("maps",)),
    "only-gates-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("gates",)),
    "only-aggregate-sent": Case(1, 2, 3, 4, 5, 8, sent=("aggregate",)),
    "only-coverage-sent": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), sent=("coverage",)),
    "only-kept-sent": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), sent=("kept",)),
    "own-addresses-and-gaps": Case(2, 3, 3, 4, 5, 8, gates=(1, 0, 2), change=scatter_in_memory),
    "channels-first-in-memory": Case(1, 2, 3, 4, 5, 8, change=channels_first),
    "bf16": Case(1, 2, 5, 6, 7, 16, dtype=bf16, gates=(1, 1)),
    "fp16": Case(1, 2, 5, 6, 7, 16, dtype=fp16),
    "bf16-maps-too": Case(1, 2, 5, 6, 7, 16, dtype=bf16, change=other_types),
    "ordered": Case(2, 2, 3, 3, 4, 5, ordered=True, gates=(1, 0)),
    "ordered-sixteen-keys": Case(1, 1, 16, 3, 2, 64, ordered=True),
    "ordered-outside-without-mask": Case(1, 2, 3, 3, 2, 8, ordered=True, masked=False, spread=9),
    "ordered-gaps-bf16": Case(1, 2, 3, 3, 2, 8, dtype=bf16, ordered=True, change=scatter_in_memory),
}


def random_case(seed: int) -> Case:
    """Any small problem, of any type."""
    draw = random.Random(seed)
    L = draw.randint(1, 3)
    return Case(
        *(draw.randint(1, 2), L, draw.randint(1, 9), draw.randint(1, 7), draw.randint(1, 7)),
        draw.choice([1, 2, 3, 7, 8, 20, 33]),
        dtype=draw.choice([torch.float32, bf16, fp16]),
        masked=draw.random() < 0.8,
        gates=draw.choice([None, tuple(draw.randint(0, 1) for _ in range(L))]),
        seeded=draw.random() < 0.5,
        spread=draw.choice([0.1, 1, 3, 20]),
        ordered=draw.random() < 0.2,
    )


CASES |= {f"random-{seed}": random_case(seed) for seed in range(10)}


def build(case: Case) -> Inputs:
    """The case's inputs in float32 and the features' type, on the CPU."""
    torch.manual_seed(3)
    B, L, K, H, W, C = case.B, case.L, case.K, case.H, case.W, case.C
    inputs = Inputs(
        features=[torch.randn(B, H + 2, W + 2, C).to(case.dtype) for _ in range(L)],
        points=case.spread * torch.randn(B, H, W, L, 3, K),
        maps=[torch.randn(B, H + 2, W + 2, K) for _ in range(L)] if case.masked else None,
        gates=None if case.gates is None else torch.tensor(case.gates, dtype=torch.float32),
        seeds=torch.randint(-(2**63), 2**63 - 1, (B,)) if case.seeded else None,
    )
    if case.change:
        case.change(inputs)
    return inputs


def flatten(features, points, maps, gates) -> dict[str, torch.Tensor]:
    """Tensors or gradients by name; None is left out."""
    named = {"points": points, "gates": gates}
    named |= {f"features[{l}]": f for l, f in enumerate(features)}
    named |= {f"maps[{l}]": m for l, m in enumerate(maps or ())}
    return {name: tensor for name, tensor in named.items() if tensor is not None}


def by_reference(inputs: Inputs, case: Case, sent, dtype: torch.dtype | None):
    """Results and gradients of the reference in a type, or in the inputs' own."""

    def own(tensor):
        copy = tensor.detach().cpu().clone()
        return (copy if dtype is None else copy.to(dtype)).requires_grad_()

    features = [own(f) for f in inputs.features]
    maps = None if inputs.maps is None else [own(m) for m in inputs.maps]
    points = own(inputs.points)
    gates = None if inputs.gates is None else own(inputs.gates)
    out = reference.attend(features, points, maps, gates, inputs.seeds, TEMPERATURE)
    named = flatten(features, points, maps, gates)
    pairs = [(r, g.to(r.dtype)) for r, g in zip(out, sent, strict=True) if g is not None]
    pairs = [(result, gradient) for result, gradient in pairs if result.requires_grad]
    results, gradients = zip(*pairs, strict=True) if pairs else ((), ())
    found = torch.autograd.grad(results, named.values(), gradients, allow_unused=True)
    zeros = [torch.zeros_like(t) if g is None else g for t, g in zip(named.values(), found)]  # noqa: B905
    return dict(zip(NAMES, out, strict=True)) | {
        f"gradient of {name}": g for name, g in zip(named, zeros, strict=True)
    }


def by_kernels(inputs: Inputs, case: Case, sent, device: str) -> dict[str, torch.Tensor]:
    """Results and wanted gradients of the kernels, on the CPU."""

    def move(value):
        if isinstance(value, list):
            return [move(tensor) for tensor in value]
        if value is None or device == "cpu":
            return value  # as it lies in memory
        place = torch.empty_strided(value.size(), value.stride(), dtype=value.dtype, device=device)
        return place.copy_(value)

    arguments = [move(v) for v in vars(inputs).values()]
    features, _, maps, gates, _ = arguments
    wanted = (
        ["features" in case.wanted] * len(features),
        "points" in case.wanted,
        ["maps" in case.wanted] * len(maps or ()),
        "gates" in case.wanted and gates is not None,
    )
    with filled_memory():
        out = gpu.forward(*arguments)
        gradients = [g if g is None else g.to(device) for g in sent]
        found = gpu.backward(*arguments, TEMPERATURE, gradients, wanted)
        if case.ordered:
            again = gpu.backward(*arguments, TEMPERATURE, gradients, wanted)
            for name, gradient in flatten(*found).items():
                assert torch.equal(gradient, flatten(*again)[name]), f"{name} varies"
    named = flatten(*found)
    inputs_by_name = flatten(inputs.features, inputs.points, inputs.maps, inputs.gates)
    expected = {name for name in inputs_by_name if name.split("[")[0] in case.wanted}
    assert named.keys() == expected, f"gradients {sorted(named)}, wanted {sorted(expected)}"
    for name, gradient in named.items():
        like = inputs_by_name[name]
        assert (gradient.dtype, gradient.shape) == (like.dtype, like.shape), name
    found = dict(zip(NAMES, out, strict=True))
    found |= {f"gradient of {name}": g for name, g in named.items()}
    return {name: tensor.cpu() for name, tensor in found.items()}


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


def check(case: Case, device: str) -> None:
    """The kernels err no more than torch does in the same types, but for rounding: another order of
    the same sums may double an error, and a result is rounded once to its own type."""
    inputs = build(case)
    B, L, H, W, C = case.B, case.L, case.H, case.W, case.C
    sent = (
        torch.randn(B, H, W, L, C).to(case.dtype),
        torch.randn(B, H, W, L),
        torch.randn(B, L, dtype=torch.float64),
    )
    sent = [g if name in case.sent else None for name, g in zip(NAMES, sent, strict=True)]
    exact = by_reference(inputs, case, sent, torch.float64)
    torch_own = by_reference(inputs, case, sent, None)
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(case.ordered)
    try:
        found = by_kernels(inputs, case, sent, device)
    finally:
        torch.use_deterministic_algorithms(before)
    assert torch.equal(found["kept"], exact["kept"]), "kept differs"
    for name, result in found.items():
        truth = exact[name].detach()
        error = (result.double() - truth).abs().max()
        allowed = 2 * (torch_own[name].detach().double() - truth).abs().max()
        allowed = allowed + torch.finfo(result.dtype).eps * truth.abs().max()
        assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def check_shut_layers_are_not_read(device: str) -> None:
    """A gate of 0 that needs no gradient costs no gather: NaN in its layer goes nowhere."""
    inputs = build(Case(1, 2, 3, 4, 5, 8, gates=(0, 1)))
    inputs.features[0].fill_(torch.nan)
    values = [
        [t.to(device) for t in v] if isinstance(v, list) else v.to(device)
        for v in vars(inputs).values()
    ]
    out = gpu.forward(*values)
    gradients = tuple(torch.ones_like(result) for result in out)
    wanted = ([True, True], True, [True, True], False)
    found = flatten(*gpu.backward(*values, TEMPERATURE, gradients, wanted))
    assert all(tensor.isfinite().all() for tensor in (*out, *found.values()))


def check_count(device: str) -> None:
    """The accounting kernel alone counts what the forward pass counts."""
    inputs = build(Case(3, 2, 5, 9, 7, 1))
    maps, seeds = [m.to(device) for m in inputs.maps], inputs.seeds.to(device)
    counted = accounting.count(inputs.points.to(device), maps, seeds)
    exact = reference.attend(inputs.features, inputs.points, inputs.maps, None, inputs.seeds)[2]
    assert torch.equal(counted.cpu(), exact)


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
    "shut-layers-are-not-read": check_shut_layers_are_not_read,
    "count": check_count,
    "noise": check_noise,
}


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str]:
    """What the child process found: the name of each check, and how it failed or nothing."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(Path(__file__))]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("name", CHECKS)
def test_interpreted(interpreted, name):
    assert interpreted[name] == ""


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", CHECKS)
def test_on_gpu(name):
    CHECKS[name]("cuda")


def test_refusals_give_their_reason(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    points = torch.zeros(1, 1, 1, 1, 3, 1)
    assert gpu.why_not_triton(points) == "tensors are on cpu, triton needs cuda"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.why_not_triton(points) is None
    assert "float64" in gpu.why_not_triton(points.double())
    assert "float64" in gpu.why_not_triton(points, [points.double()])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert gpu.why_not_triton(points) == "Triton is not installed"


def child() -> None:
    """Run every check through the interpreter; print what failed as JSON."""
    torch.set_num_threads(1)
    found = {}
    for name, run in CHECKS.items():
        try:
            run("cpu")
            found[name] = ""
        except Exception:
            found[name] = traceback.format_exc(limit=-6)
    print(json.dumps(found))


if __name__ == "__main__":
    child()
