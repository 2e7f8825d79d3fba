"""What every backend is given, and the order in which gradients are asked for and returned.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor


class Inputs(NamedTuple):
    """The arguments of `kernels.attend`, which describes them."""

    features: Sequence[Tensor]  # L × [B,H+2,W+2,C]
    points: Tensor  # [B,H,W,L,3,K]
    mask_maps: Sequence[Tensor] | None = None  # L × [B,H+2,W+2,K]
    gates: Tensor | None = None  # [L]
    seeds: Tensor | None = None  # [B]
    temperature: float = 1.0


class Leaves(NamedTuple):
    """Something for each input that can have a gradient: the input, its gradient (None where not
    wanted), or whether that is wanted."""

    features: Sequence[Any]
    points: Any
    mask_maps: Sequence[Any]  # empty without maps
    gates: Any

    @classmethod
    def split(cls, flat: Sequence[Any], layers: int) -> "Leaves":
        """From one list, as `flat` makes it."""
        return cls(flat[:layers], flat[layers], flat[layers + 1 : -1], flat[-1])

    def flat(self) -> list[Any]:
        return [*self.features, self.points, *self.mask_maps, self.gates]
