"""The noise of Eq. 7 for masks: a counter-based generator, so that every backend, and every split
of a batch over processes, draws the same."""

import torch
from torch import Tensor

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
WEYL = (0x9E3779B9, 0xBB67AE85)
LOW = 0xFFFFFFFF


def logistic_noise(seeds: Tensor, count: int) -> Tensor:
    """ε1 − ε2 of Eq. 7: `count` draws for each of B seeds (int64) → [B,count], float32."""
    return draw(seeds.unsqueeze(1), torch.arange(count, device=seeds.device))


def draw(seeds: Tensor, counters: Tensor) -> Tensor:
    """The difference of two Gumbel draws, float32, of int64 seeds and counters that broadcast.

    Philox4x32-10 with the seed as key and the counter as its first two words; 23 bits of the first
    word make u in (0, 1)."""
    k0, k1 = seeds & LOW, seeds >> 32 & LOW
    c0, c1 = counters & LOW, counters >> 32
    c2, c3 = torch.zeros_like(counters), torch.zeros_like(counters)
    for _ in range(10):
        # int64 products wrap, but their bits are those of the unsigned product
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c2 = (p1 >> 32 & LOW) ^ c1 ^ k0, (p0 >> 32 & LOW) ^ c3 ^ k1
        c1, c3 = p1 & LOW, p0 & LOW
        k0, k1 = (k0 + WEYL[0]) & LOW, (k1 + WEYL[1]) & LOW
    u = ((c0 >> 9).float() + 0.5) * 2.0**-23
    return u.log() - (1 - u).log()
