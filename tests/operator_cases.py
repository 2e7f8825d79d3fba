"""Inputs for tests of the operator: made up in float64, with masks that rounding cannot flip.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from acla.kernels import Attended, attend, logistic_noise
from acla.kernels.reference import sample

Size = tuple[int, int, int, int, int, int]  # B, H, W, L, K, C


@dataclass
class Inputs:
    """Arguments of `attend`, and a gradient for each of its three results (None: not sent)."""

    features: list[Tensor]
    points: Tensor
    mask_maps: list[Tensor] | None
    gates: Tensor | None
    seeds: Tensor | None
    temperature: float
    cotangents: list[Tensor | None] = field(default_factory=list)

    def to(self, dtype: torch.dtype) -> "Inputs":
        """Features in this type, the rest in the type of the arithmetic that goes with it."""
        rest = torch.float64 if dtype == torch.float64 else torch.float32
        return Inputs(
            [f.detach().to(dtype) for f in self.features],
            self.points.detach().to(rest),
            self.mask_maps and [m.detach().to(rest) for m in self.mask_maps],
            None if self.gates is None else self.gates.detach().to(rest),
            self.seeds,
            self.temperature,
            self.cotangents,
        )

    def leaves(self) -> dict[str, Tensor]:
        """Everything that can have a gradient, by name."""
        named = {f"features[{l}]": f for l, f in enumerate(self.features)}
        named |= {f"mask_maps[{l}]": m for l, m in enumerate(self.mask_maps or ())}
        named["points"] = self.points
        if self.gates is not None:
            named["gates"] = self.gates
        return named

    def attend(self, backend: str) -> Attended:
        return attend(
            self.features,
            self.points,
            self.mask_maps,
            self.gates,
            seeds=self.seeds,
            temperature=self.temperature,
            backend=backend,
        )

    def run(self, backend: str, wanted: set[str] | None = None) -> dict[str, Tensor]:
        """Results and the gradients of those wanted (all of them by default), detached, by name."""
        leaves = self.leaves()
        wanted = leaves.keys() if wanted is None else wanted
        for name, leaf in leaves.items():
            leaf.requires_grad_(name in wanted)
            leaf.grad = None
        out = self.attend(backend)
        pairs = [
            (o, c.to(o.dtype))
            for o, c in zip(out, self.cotangents, strict=True)
            if o.requires_grad and c is not None
        ]
        if pairs:
            torch.autograd.backward(*zip(*pairs, strict=True))
        results = {name: result.detach() for name, result in out._asdict().items()}
        return results | {f"∂{name}": leaf.grad for name, leaf in leaves.items()}


def make(
    size: Size,
    *,
    deviation: float = 2.0,
    masks: bool = True,
    mask_sign: int = 0,
    gates: list[float] | None = None,
    seeds: bool = False,
    seed: int = 0,
) -> Inputs:
    """Random inputs; `deviation` is the offsets' standard deviation in pixels; mask logits all have
    the sign `mask_sign` unless it is 0."""
    B, H, W, L, K, C = size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        # Multiples of 1/256, so that every type of arithmetic starts from the same numbers.
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64)
        return (drawn * 256).round() / 256

    points = normal(B, H, W, L, 3, K)
    offsets = points[..., :2, :]  # never whole numbers, where the derivative jumps
    offsets.copy_((offsets * deviation * 256).round() / 256 + 1 / 512)
    # Features and their gradients are bfloat16's values: the same numbers in narrow types too.
    drawn = [normal(B, H + 2, W + 2, C).bfloat16().double() for _ in range(L)]
    maps = [normal(B, H + 2, W + 2, K) for _ in range(L)]
    if mask_sign:
        maps = [mask_sign * (m.abs() + 1 / 16) for m in maps]
    return Inputs(
        features=drawn,
        points=points,
        mask_maps=maps if masks else None,
        gates=None if gates is None else torch.tensor(gates, dtype=torch.float64),
        seeds=torch.randint(-(2**62), 2**62, (B,), generator=generator) if seeds else None,
        temperature=0.7,
        cotangents=[
            normal(B, H, W, L, C).bfloat16().double(),
            normal(B, H, W, L),
            normal(B, L),
        ],
    )


def gate_terms(inputs: Inputs) -> float:
    """The sum of the magnitudes of what adds up to a gate's gradient, the largest of all layers."""
    L = len(inputs.features)
    opened = replace(inputs, gates=torch.ones(L)).to(torch.float64)
    with torch.no_grad():
        results = opened.attend("reference")
    terms = torch.zeros(L, dtype=torch.float64)
    for result, sent in zip(results[:2], inputs.cotangents[:2], strict=True):
        if sent is not None:
            terms += (result * sent).abs().movedim(3, 0).flatten(1).sum(1)
    return terms.max().item()


IMAGES_APART, ROWS_APART = 1 << 32, 1 << 30  # elements: more than 32 bits count
FAR = IMAGES_APART + 4 * ROWS_APART  # for two images of four rows, border included


def sparse_memory(path: Path) -> Tensor:
    """float32 [FAR] in a file of which only those pages take place that are written."""
    return torch.from_numpy(np.memmap(path, np.float32, "w+", shape=(FAR,)))


def far_apart(inputs: Inputs, memory: Tensor) -> Inputs:
    """Inputs whose features, mask maps and points lie in this memory [FAR], far apart."""
    free = 0

    def place(tensor: Tensor) -> Tensor:
        nonlocal free
        inner = torch.empty(tensor.shape[2:], device="meta").stride()
        view = memory.as_strided(tensor.shape, (IMAGES_APART, ROWS_APART, *inner), free)
        free += tensor[0, 0].numel()
        return view.copy_(tensor.detach())

    return replace(
        inputs,
        features=[place(f) for f in inputs.features],
        mask_maps=[place(m) for m in inputs.mask_maps],
        points=place(inputs.points),
    )


def margin(inputs: Inputs) -> float:
    """How near a mask's logit comes to 0, where rounding could decide whether a key is open."""
    if inputs.mask_maps is None:
        return float("inf")
    B, H, W, L, _, K = inputs.points.shape
    points = inputs.points.detach()
    grid = torch.stack(torch.meshgrid(torch.arange(H), torch.arange(W), indexing="ij"), -1)
    logits = torch.stack(
        [
            torch.stack(
                [
                    sample(m.detach()[..., k : k + 1], grid + points[..., l, :2, k])[..., 0]
                    for k in range(K)
                ],
                -1,
            )
            for l, m in enumerate(inputs.mask_maps)
        ],
        3,
    )
    if inputs.seeds is not None:
        logits = logits + logistic_noise(inputs.seeds, H * W * L * K).view(B, H, W, L, K)
    return logits.abs().min().item()


def make_clear(size: Size, *, around: float = 1e-5, **options: object) -> Inputs:
    """As `make`, from the first seed whose masks are all decided by more than this."""
    for seed in range(100):
        inputs = make(size, seed=seed, **options)
        if margin(inputs) > around:
            return inputs
    raise AssertionError("no seed keeps the masks clear of 0")
