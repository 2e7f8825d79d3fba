"""Sources of a restored pixel: local attribution maps, keys, weights of branches.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first
"""

import functools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from einops import rearrange
from skimage import filters
from torch import Tensor, nn
from torch.nn import functional as F

from acla.config import Task
from acla.console import progress
from acla.kernels import reference
from acla.models.a2n import BranchWeights
from acla.models.attention import CrossLayerAttention, pointwise
from acla.models.backbones import Backbone

SIGMA = 1.2  # pixels, of the blur at the start of the path, as Gu and Dong have it
FLAT = 1e-20  # so that the gradient of a slope of 0 is 0
# A temperature at which masks have no gradient of their own: the network as it restores has masks
# that are steps; the slope of a sigmoid serves training alone.
FIXED_MASKS = 1e30


# The input


@dataclass(frozen=True)
class Scene:
    """A picture with a window and a query.

    low: [C,h,w] in 0..1, the network's input, or the part of it around the window; top, left: the
    part's corner, in low-quality pixels. window (y, x, side) and query (y, x) are in restored
    pixels of the whole picture.
    """

    low: Tensor
    top: int
    left: int
    window: tuple[int, int, int]
    query: tuple[int, int]
    task: Task

    @property
    def inner_window(self) -> tuple[int, int, int]:
        """The window in restored pixels of the part."""
        y, x, side = self.window
        return y - self.top * self.task.scale, x - self.left * self.task.scale, side

    @property
    def inner_query(self) -> tuple[int, int]:
        """The query on the part's grid, in low-quality pixels."""
        y, x = self.query
        return y // self.task.scale - self.top, x // self.task.scale - self.left


# Local attribution (Gu and Dong, Interpreting Super-Resolution Networks with Local Attribution
# Maps, CVPR 2021)


def detail(pictures: Tensor, window: tuple[int, int, int]) -> Tensor:
    """The detector D: Σ √(∂y² + ∂x²) over a window (y, x, side) of pictures [B,C,H,W], where ∂ is
    the difference to the next pixel below and to the right, 0 where the picture ends."""
    y, x, side = window
    dy = pictures.diff(dim=-2, append=pictures[..., -1:, :])
    dx = pictures.diff(dim=-1, append=pictures[..., -1:])
    slope = (dy.square() + dx.square() + FLAT).sqrt()
    return slope[..., y : y + side, x : x + side].sum()


def blurred(picture: Tensor, sigma: float) -> Tensor:
    """picture [C,H,W] under a Gaussian of sigma pixels, edges repeated."""
    plain = picture.cpu().numpy()
    soft = filters.gaussian(plain, sigma, mode="nearest", channel_axis=0)
    return torch.from_numpy(soft).to(picture)


def local_attribution(
    model: Backbone, picture: Tensor, window: tuple[int, int, int], steps: int = 50
) -> Tensor:
    """The local attribution map [C,H,W], float64, of a picture [C,H,W] for a window (y, x, side) of
    what is restored: what each value of the input adds to the detector D.

    The path γ(α) = G_{(1−α)σ} ∗ picture leads from the blurred input (α = 0) to the input (α = 1).
    The gradient of D behind the network F is integrated along it, by midpoints:

        a = Σ_{k=1..m} ∇D(F(γ((k−½)/m))) · (γ(k/m) − γ((k−1)/m))

    so that for many steps m the values of a add up to D(F(γ(1))) − D(F(γ(0))), but for the jumps of
    masks that switch on the way.
    """
    picture = picture.detach().double()
    total = torch.zeros_like(picture)
    for step in progress(range(steps), desc="attribution", unit="step", leave=False):
        here, middle, following = (
            blurred(picture, (1 - (step + part) / steps) * SIGMA) for part in (0, 0.5, 1)
        )
        middle.requires_grad_()
        with torch.enable_grad():
            restored, _ = model.forward_with_counts(
                middle.float().unsqueeze(0), temperature=FIXED_MASKS
            )
            (slope,) = torch.autograd.grad(detail(restored.double(), window), middle)
        total += slope * (following - here)
    return total


def diffusion_index(attribution: Tensor) -> float | None:
    """100 (1 − Gini coefficient) of an attribution [C,H,W] over pixels, each with Σ_c |a_c|: 100
    where all are equal, near 0 where one has all; None where all are 0, for a flat window.

    The coefficient is half the mean absolute difference of two pixels, over their mean; from sorted
    values x_1 ≤ … ≤ x_n it is Σ (2i − n − 1) x_i / (n Σ x_i).
    """
    x = attribution.abs().sum(0).flatten().double().sort().values
    n, total = len(x), x.sum()
    if total == 0:
        return None
    rank = torch.arange(1, n + 1, dtype=x.dtype, device=x.device)
    return 100 * (1 - (((2 * rank - n - 1) * x).sum() / (n * total)).item())


# The attention modules


class QueryKeys(NamedTuple):
    """The keys of one query. position: [L,K,2] as (y, x) on the grid, which may lie outside;
    weight: [L,K], which add to 1 in a layer; kept: [L,K], whether the mask keeps the key."""

    position: Tensor
    weight: Tensor
    kept: Tensor


def keys_of(
    module: CrossLayerAttention, query: Tensor, rows: Sequence[Tensor], y: int, x: int
) -> QueryKeys:
    """The keys that a module samples for the pixel (y, x), from the inputs of its forward pass:
    query [1,C,H,W], rows of L layers [1,H+2,W+2,C]. Masks without noise (Eq. 5 to 9)."""
    points = F.linear(query[0, :, y, x], module.points.weight, module.points.bias)
    dy, dx, logit = rearrange(points, "(l yxw k) -> yxw l k", l=module.layers, yxw=3)
    position = torch.stack([y + dy, x + dx], -1)
    kept = torch.ones_like(logit, dtype=torch.bool)
    if module.mask is not None:
        for l, row in enumerate(rows):
            mask_map = pointwise(row, module.mask[l], module.mask_bias[l])
            sampled = reference.sample(mask_map, position[l][None, None])  # key k in channel k
            kept[l] = sampled[0, 0].diagonal() > 0
    return QueryKeys(position, logit.softmax(-1), kept)


class Observed(NamedTuple):
    """restored: [C,H·scale,W·scale]; kept: {"position", "layer", "share"} for every module with
    keys and every layer it refers to, the share of all its keys there that masks keep, 0..1; keys:
    those of one query for each insert position; branches: A2N's weight of the branch with
    attention, 0..1, for each block."""

    restored: Tensor
    kept: list[dict[str, Any]]
    keys: dict[int, QueryKeys]
    branches: list[float]


@contextmanager
def module_inputs(model: Backbone) -> Iterator[dict[int, tuple]]:
    """Inside, the inputs of every module with keys in its last forward pass, by position."""
    noted: dict[int, tuple] = {}

    def note(position: int, module: nn.Module, inputs: tuple) -> None:
        noted[position] = inputs

    with ExitStack() as hooks:
        for position, module in model.attention.items():
            if isinstance(module, CrossLayerAttention):
                hook = functools.partial(note, int(position))
                hooks.callback(module.register_forward_pre_hook(hook).remove)
        yield noted


@torch.no_grad()
def observe(model: Backbone, picture: Tensor, y: int, x: int) -> Observed:
    """Restore a picture [C,H,W] and note the modules' keys, all and those of the pixel (y, x) of
    the input, and the weights of A2N's branches."""
    branches: list[float] = []

    def note_branch(module: nn.Module, inputs: tuple, weights: Tensor) -> None:
        branches.append(weights[0, 0].item())

    with module_inputs(model) as inputs, ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, BranchWeights):
                hooks.callback(module.register_forward_hook(note_branch).remove)
        restored, counts = model.forward_with_counts(picture.unsqueeze(0))
    keys = {p: keys_of(model.attention[str(p)], *given[:2], y, x) for p, given in inputs.items()}
    queries = picture[0].numel()
    kept = [
        {"position": position, "layer": layer, "share": count / (queries * model.config.keys)}
        for position in inputs
        for layer, count in zip(model.config.positions, counts[position][0].tolist(), strict=False)
    ]
    return Observed(restored[0], kept, keys, branches)
