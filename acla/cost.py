"""What attention costs: Eq. 12 and 13, one formula for the search's loss, the tables and
--describe.

N positions of a picture · C channels · K sampled keys per layer and query · kept keys selected by
the masks, over all N Everything is in FLOPs; a multiply-add is two. (The paper's "FLOPs (G)" are
multiply-adds.)

Eq. 12 prints the convolutions inside the sum over k; they are counted once a pair, which agrees
with Tables 4 to 8. Added to it: the query's offsets and weights, the output convolution, and the
value's bias, which every query weights anew, so that what is predicted is what is counted."""

from collections.abc import Sequence
from typing import Any


def pair_flops(n: int, width: int, keys: int, kept: Any, masked: bool) -> Any:
    """One query layer and one referred layer (the inner sum of Eq. 12): value and its bias, mask
    unit, offsets and weights, and the aggregation of the kept keys (at most N·K)."""
    convolutions = 2 * n * width * (width + 1 + 3 * keys + (keys if masked else 0))
    return convolutions + 6 * width * kept


def output_flops(n: int, width: int) -> int:
    """The output convolution h of one module."""
    return 2 * n * width * width


def attention_flops(
    gates: Any, n: int, width: int, keys: int, kept: Sequence[Any], masked: bool
) -> Any:
    """Eq. 13 over J insert positions: Σ_j s_j (output_j + pair_jj + Σ_{l<j} s_l pair_jl).

    gates: array [J] (numpy or torch) of 0 and 1, or of probabilities: draws are independent and
    s_j² = s_j, so that is the expected cost. kept[j]: array [j+1], the keys that module j keeps of
    each layer up to its own."""
    total = 0.0
    for j, count in enumerate(kept):
        pair = pair_flops(n, width, keys, count, masked)
        total = total + gates[j] * (output_flops(n, width) + pair[j] + (gates[:j] * pair[:j]).sum())
    return total


def full_attention_flops(modules: int, n: int, width: int, keys: int, masked: bool) -> int:
    """m modules that are all there and keep every key: m(m+1)/2 pairs."""
    pairs = modules * (modules + 1) // 2
    return modules * output_flops(n, width) + pairs * pair_flops(n, width, keys, n * keys, masked)
