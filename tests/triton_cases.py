"""The problems that the Triton kernels are tested on: sizes, types and inputs that are awkward.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from operator_cases import Inputs, make_clear

ALL = ("features", "points", "mask_maps", "gates")
NAMES = ("aggregate", "coverage", "kept")


@dataclass(frozen=True)
class Case:
    """A problem; `change` alters its inputs before use."""

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
    deviation: float = 2.0  # of the offsets, in pixels
    wanted: tuple[str, ...] = ALL
    sent: tuple[str, ...] = NAMES  # results that have a gradient
    ordered: bool = False
    change: Callable[[Inputs], None] | None = None

    def build(self) -> Inputs:
        """Inputs on the CPU: features in the case's type, the rest in float32."""
        inputs = make_clear(
            (self.B, self.H, self.W, self.L, self.K, self.C),
            deviation=self.deviation,
            masks=self.masked,
            gates=self.gates,
            seeds=self.seeded,
        ).to(self.dtype)
        sent = zip(NAMES, inputs.cotangents, strict=True)
        inputs.cotangents = [c if name in self.sent else None for name, c in sent]
        if self.change:
            self.change(inputs)
        return inputs


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
    kind = torch.randint(0, 8, offsets.shape, generator=torch.Generator().manual_seed(3))
    for value, which in ((torch.nan, 0), (torch.inf, 1), (-torch.inf, 2), (1e30, 3)):
        offsets[kind == which] = value


def shut_all(inputs: Inputs) -> None:
    inputs.mask_maps = [m - 100 for m in inputs.mask_maps]


def open_all(inputs: Inputs) -> None:
    inputs.mask_maps = [m + 100 for m in inputs.mask_maps]


def scatter_in_memory(inputs: Inputs) -> None:
    """Every tensor in a buffer of its own, with gaps, some starting off 16 bytes."""

    def move(tensor: torch.Tensor, gap: int) -> torch.Tensor:
        shape = [size + gap for size in tensor.shape]
        buffer = torch.full(shape, torch.nan, dtype=tensor.dtype)
        place = buffer[tuple(slice(gap, gap + size) for size in tensor.shape)]
        return place.copy_(tensor)

    inputs.features = [move(f, 1 + i) for i, f in enumerate(inputs.features)]
    inputs.mask_maps = [move(m, 2 - i % 2) for i, m in enumerate(inputs.mask_maps)]
    moved = inputs.points.permute(3, 0, 2, 1, 5, 4).contiguous()
    inputs.points = moved.permute(1, 3, 2, 0, 5, 4)
    if inputs.gates is not None:
        inputs.gates = torch.stack([inputs.gates, inputs.gates + 1], 1)[:, 0]
    inputs.seeds = torch.stack([inputs.seeds, inputs.seeds + 1], 1)[:, 0]


def off_sixteen_bytes(inputs: Inputs) -> None:
    """Rows that are whole multiples of 16 bytes apart, and all start off one."""

    def shift(tensor: torch.Tensor) -> torch.Tensor:
        C = tensor.shape[-1]
        wide = torch.full((*tensor.shape[:-1], 2 * C), torch.nan, dtype=tensor.dtype)
        return wide[..., 1 : C + 1].copy_(tensor)

    inputs.features = [shift(f) for f in inputs.features]


def steep(inputs: Inputs) -> None:
    """Logits so far apart that one key has all the weight, and exponentials of most are 0."""
    inputs.points[..., 2, :] *= 200


def channels_first(inputs: Inputs) -> None:
    inputs.features = [
        f.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1) for f in inputs.features
    ]


def other_types(inputs: Inputs) -> None:
    """What autocast makes of a module: narrow features and maps, wide points."""
    inputs.mask_maps = [m.to(torch.bfloat16) for m in inputs.mask_maps]


bf16, fp16 = torch.bfloat16, torch.float16
CASES = {
    "odd-rectangle-smaller-than-block": Case(1, 2, 3, 5, 7, 3),
    "one-pixel": Case(1, 1, 4, 1, 1, 1),
    "one-channel": Case(1, 2, 3, 4, 5, 1),
    "channels-off-the-block": Case(1, 2, 3, 5, 4, 33),
    "one-row-longer-than-block": Case(1, 1, 3, 1, 70, 3),
    "one-column": Case(2, 1, 2, 37, 1, 4),
    "off-the-block": Case(1, 1, 5, 3, 7, 96),
    "one-key": Case(1, 2, 1, 4, 3, 5),
    "sixteen-keys": Case(1, 2, 16, 2, 5, 64),
    "many-channels": Case(1, 1, 5, 3, 4, 256),
    "nine-layers-of-one-image": Case(1, 9, 2, 1, 3, 8),
    "far-outside": Case(1, 2, 6, 5, 4, 8, deviation=60),
    "whole-pixels": Case(1, 2, 4, 5, 6, 3, change=round_offsets),
    "on-the-edges": Case(1, 2, 4, 5, 6, 3, change=on_the_edges),
    "nan-and-infinity": Case(1, 2, 5, 5, 6, 3, change=not_numbers),
    "all-masked": Case(1, 2, 3, 4, 5, 3, change=shut_all),
    "all-kept": Case(1, 2, 3, 4, 5, 3, change=open_all),
    "steep-logits": Case(1, 2, 5, 4, 5, 3, change=steep),
    "no-mask": Case(1, 2, 3, 4, 5, 3, masked=False, seeded=False),
    "no-noise": Case(2, 2, 3, 4, 5, 3, seeded=False),
    "gates-with-gradient": Case(2, 4, 3, 4, 5, 8, gates=(0, 1, 0, 1)),
    "gates-without-gradient": Case(2, 3, 3, 4, 5, 8, gates=(0, 1, 1), wanted=ALL[:3]),
    "gates-in-between": Case(1, 2, 3, 4, 5, 8, gates=(0.5, 2)),
    "gates-all-shut": Case(1, 2, 3, 4, 5, 8, gates=(0, 0)),
    "gates-without-mask": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), masked=False),
    "only-features-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("features",)),
    "only-points-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("points",)),
    "only-maps-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("mask_maps",)),
    "only-gates-wanted": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), wanted=("gates",)),
    "only-aggregate-sent": Case(1, 2, 3, 4, 5, 8, sent=("aggregate",)),
    "only-coverage-sent": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), sent=("coverage",)),
    "only-kept-sent": Case(1, 2, 3, 4, 5, 8, gates=(0, 1), sent=("kept",)),
    "own-addresses-and-gaps": Case(2, 3, 3, 4, 5, 8, gates=(1, 0, 2), change=scatter_in_memory),
    "rows-off-sixteen-bytes": Case(1, 1, 3, 3, 4, 64, change=off_sixteen_bytes),
    "channels-first-in-memory": Case(1, 2, 3, 4, 5, 8, change=channels_first),
    "bf16": Case(1, 2, 5, 6, 7, 16, dtype=bf16, gates=(1, 1)),
    "fp16": Case(1, 2, 5, 6, 7, 16, dtype=fp16),
    "bf16-many-channels": Case(1, 1, 5, 3, 4, 256, dtype=bf16),
    "fp16-off-the-block": Case(1, 2, 5, 9, 3, 33, dtype=fp16, deviation=5),
    "bf16-maps-too": Case(1, 2, 5, 6, 7, 16, dtype=bf16, change=other_types),
    "ordered": Case(2, 3, 3, 2, 1, 5, ordered=True, gates=(1, 0, 1)),
    "ordered-one-pixel": Case(1, 1, 4, 1, 1, 1, ordered=True),
    "ordered-many-to-a-pixel": Case(1, 1, 16, 1, 2, 96, ordered=True, deviation=0.3),
    "ordered-whole-pixels": Case(1, 1, 4, 2, 3, 3, ordered=True, change=round_offsets),
    "ordered-all-masked": Case(1, 1, 3, 1, 2, 3, ordered=True, change=shut_all),
    "ordered-outside-without-mask": Case(1, 1, 3, 3, 2, 8, ordered=True, masked=False, deviation=9),
    "ordered-gaps-bf16": Case(1, 2, 3, 2, 1, 8, dtype=bf16, ordered=True, change=scatter_in_memory),
}


@st.composite
def small_cases(draw: st.DrawFn) -> Case:
    """Any small problem, of any type."""
    L = draw(st.integers(1, 3), label="L")
    gates = st.none() | st.tuples(*[st.sampled_from([0.0, 1.0])] * L)
    return Case(
        B=draw(st.integers(1, 2), label="B"),
        L=L,
        K=draw(st.integers(1, 9), label="K"),
        H=draw(st.integers(1, 4), label="H"),
        W=draw(st.integers(1, 5), label="W"),
        C=draw(st.sampled_from([1, 2, 3, 7, 8, 20, 33]), label="C"),
        dtype=draw(st.sampled_from([torch.float32, bf16, fp16]), label="dtype"),
        masked=draw(st.booleans(), label="masked"),
        gates=draw(gates, label="gates"),
        seeded=draw(st.booleans(), label="seeded"),
        deviation=draw(st.sampled_from([0.1, 1, 3, 20]), label="deviation"),
        ordered=draw(st.sampled_from([False, False, False, True]), label="ordered"),
    )
