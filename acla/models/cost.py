"""The cost of attention: Eq. 12 and 13, one formula for the search's loss, the tables and
--describe; and the baselines' cost.

N positions of a picture · C channels · K sampled keys per layer and query · kept: keys selected by
the masks, over all N · L referred layers. Everything is in FLOPs; a multiply-add is two. (The
paper's "FLOPs (G)" are multiply-adds.)

Eq. 12 prints the convolutions inside the sum over k; they are counted once a pair, in agreement
with Tables 4 to 8. Added to it, so that the predicted cost is the counted cost: the query's offsets
and weights, the output convolution, and the value's bias, which every query weights anew.

Of the baselines, convolutions and matrix products are counted, including the small layers of
squeeze-and-excitation and relative positions. As in the network's count, softmax, sigmoid, means
and sums are not, nor are the one-hot channels that replace sums in the training of multi-head
attention."""

from collections.abc import Sequence
from typing import Any

from acla.config import ATTENTIONS

# Inner sizes of the baselines

# Largest offset, in pixels, with a relative position of its own; below the smallest patch size of
# the presets (24), so that every one is trained.
RADIUS = 16


def embedded_width(width: int) -> int:
    """Embedded channels of NL and CLNL."""
    return max(1, width // 2)


def squeezed_width(width: int) -> int:
    """Inner channels of squeeze-and-excitation."""
    return max(1, width // 16)


def head_count(width: int) -> int:
    """Heads of multi-head attention: the most of 8, 4 and 2 with 16 channels or more, else 1."""
    return next((h for h in (8, 4, 2) if width % h == 0 and width // h >= 16), 1)


# Eq. 12 and 13


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
    each layer up to its own. Returns FLOPs for one picture, of the type of the inputs."""
    total = 0.0
    for j, count in enumerate(kept):
        pair = pair_flops(n, width, keys, count, masked)
        total = total + gates[j] * (output_flops(n, width) + pair[j] + (gates[:j] * pair[:j]).sum())
    return total


# Any attention


def full_attention_flops(attention: str, modules: int, n: int, width: int, keys: int) -> int:
    """FLOPs of all modules of a network, each of which refers to those before it; no key closed."""
    return sum(module_flops(attention, l + 1, n, width, keys) for l in range(modules))


def module_flops(attention: str, layers: int, n: int, width: int, keys: int) -> int:
    """FLOPs of a module that refers to `layers` layers, every key kept, for n positions."""
    kind = ATTENTIONS[attention]
    match kind.module:
        case "cla" | "acla":
            pair = pair_flops(n, width, keys, n * keys, kind.masked)
            return output_flops(n, width) + layers * pair
        case "acla+se":
            return sum(module_flops(part, layers, n, width, keys) for part in ("acla", "se"))
        case "nl":
            return module_flops("clnl", 1, n, width, keys)
        case "clnl":
            inner = embedded_width(width)
            convolutions = (2 * layers + 2) * n * width * inner  # θ, φ_l and g_l, h
            return 2 * convolutions + 2 * 2 * n * (layers * n) * inner
        case "se":
            return 2 * 2 * width * squeezed_width(width)
        case _:  # mha
            relative = 2 * n * width * (2 * RADIUS + 1)  # each axis, then read for every offset
            return 2 * (4 * n * width**2 + 2 * n**2 * width + relative)
