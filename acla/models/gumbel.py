"""Binary Gumbel gates: seeds of the key masks (Eq. 7 to 9), insert positions' gates (Eq. 10).

The gate itself, hard forward and with the sigmoid's gradient at temperature τ backward (the
straight-through estimator), is `binary_gate` in kernels/reference.py, which gates of insert
positions call here. Key masks are drawn from their seeds inside `kernels.attend`, by the same
noise: `logistic_noise`, the difference of two Gumbel draws as a function of seed and place."""

import torch
from torch import Tensor

from acla.kernels import binary_gate, logistic_noise

# Odd, and 2^64 / golden ratio: positions get seeds far apart (Knuth's multiplicative hashing)
SEED_STEP = 0x9E3779B97F4A7C15


def position_seeds(seeds: Tensor | None, position: int) -> Tensor | None:
    """The images' seeds [B] int64 at an insert position: modules draw different noise."""
    if seeds is None:
        return None
    step = position * SEED_STEP % 2**64
    return seeds + (step - 2**64 if step >= 2**63 else step)


def draw_gates(
    alpha: Tensor, seed: int | None, temperature: float, opposite: bool = False
) -> Tensor:
    """Insert-position gates s [J], 0 or 1, for α [J] (Eq. 10); the gradient is the sigmoid's at τ.

    `seed` None draws without noise: s_j = 1 where α_j > 0, the derived architecture. opposite: the
    seed's noise with the other sign, which is as likely.
    """
    if seed is None:
        return binary_gate(alpha, 0.0, temperature)
    seeds = torch.tensor([seed], device=alpha.device)
    noise = logistic_noise(seeds, len(alpha))[0].to(alpha)
    return binary_gate(alpha, -noise if opposite else noise, temperature)


def expected_gates(alpha: Tensor) -> Tensor:
    """The chance that a drawn gate is open, σ(α) [J]: logistic noise exceeds −α that often."""
    return alpha.sigmoid()
