"""Binary Gumbel gates as the network uses them: one seed an image for key masks, one draw a step
for insert positions."""

import torch
from torch import Tensor

from kernels import binary_gate, logistic_noise

# An odd multiplier sends the positions' seeds far apart (2^64 / golden ratio: Knuth's
# multiplicative hashing).
SPREAD = 0x9E3779B97F4A7C15


def position_seeds(seeds: Tensor | None, position: int) -> Tensor | None:
    """The images' seeds [B] int64 for the module at an insert position: every module draws noise of
    its own."""
    if seeds is None:
        return None
    step = position * SPREAD % 2**64
    return seeds + (step - 2**64 if step >= 2**63 else step)


def draw_gates(alpha: Tensor, seed: int | None, temperature: float) -> Tensor:
    """Insert-position gates s [J], exactly 0 or 1, for α [J] (Eq. 10); the gradient is the
    sigmoid's at τ.

    `seed` None draws without noise: s_j = 1 where α_j > 0, the derived architecture.
    """
    if seed is None:
        return binary_gate(alpha, 0.0, temperature)
    seeds = torch.tensor([seed], device=alpha.device)
    return binary_gate(alpha, logistic_noise(seeds, len(alpha))[0].to(alpha), temperature)


def expected_gates(alpha: Tensor) -> Tensor:
    """The probability that a drawn gate is open, σ(α) [J]: logistic noise exceeds −α that often, at
    any τ."""
    return alpha.sigmoid()
