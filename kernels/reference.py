"""The operator as the paper writes it, which defines what is right: plain loops, any type.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
offsets are (dy, dx) in pixels, y first · equation numbers are the paper's
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .philox import logistic_noise


def attend(
    features: Sequence[Tensor],
    points: Tensor,
    mask_maps: Sequence[Tensor] | None = None,
    gates: Tensor | None = None,
    seeds: Tensor | None = None,
    temperature: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sampled, masked, weighted sums of each layer (Eq. 6 and 11 before g and the sum over l).

    Arguments and results are those of `kernels.attend`, which checks them.
    """
    B, H, W, L, _, K = points.shape
    y, x = torch.arange(H, device=points.device), torch.arange(W, device=points.device)
    query = torch.stack(torch.meshgrid(y, x, indexing="ij"), -1)  # [H,W,2]
    inside = torch.nn.functional.pad(points.new_ones(1, H, W, 1), (0, 0, 1, 1, 1, 1))
    noise = points.new_zeros(B, H, W, L, K)
    if seeds is not None:
        noise = logistic_noise(seeds, H * W * L * K).view(B, H, W, L, K).to(points.dtype)

    aggregate, coverage, kept = [], [], []
    for l in range(L):
        weight = points[..., l, 2, :].softmax(-1)  # f, over the K keys of this layer
        total, covered, count = 0.0, 0.0, 0.0
        for k in range(K):
            position = query + points[..., l, :2, k]  # p_i + Δp_ik
            m = torch.ones_like(weight[..., k])
            if mask_maps is not None:
                beta = sample(mask_maps[l][..., k : k + 1], position)[..., 0]  # Eq. 8
                m = binary_gate(beta, noise[..., l, k], temperature)  # Eq. 7 and 9
            mf = (m * weight[..., k]).unsqueeze(-1)
            total = total + mf * sample(features[l], position)  # Eq. 6
            covered = covered + mf * sample(inside.expand(B, -1, -1, -1), position)
            count = count + m.double().sum((1, 2))
        s = 1.0 if gates is None else gates[l]  # s_l of Eq. 11
        aggregate.append(s * total)
        coverage.append(s * covered[..., 0])
        kept.append(count)
    return torch.stack(aggregate, 3), torch.stack(coverage, 3), torch.stack(kept, 1)


def sample(rows: Tensor, position: Tensor) -> Tensor:
    """Bilinear samples. rows [B,H+2,W+2,C] with its border, position [B,H,W,2] as (y, x) →
    [B,H,W,C].

    A pixel or more outside, it reads the border alone, without gradient; NaN counts as outside."""
    B, H, W = rows.shape[0], rows.shape[1] - 2, rows.shape[2] - 2
    y = position[..., 0].nan_to_num(-1.0, H, -1.0).clamp(-1, H)
    x = position[..., 1].nan_to_num(-1.0, W, -1.0).clamp(-1, W)
    y0 = y.detach().floor().clamp(max=H - 1)
    x0 = x.detach().floor().clamp(max=W - 1)
    dy, dx = (y - y0).unsqueeze(-1), (x - x0).unsqueeze(-1)
    image = torch.arange(B, device=rows.device).view(B, 1, 1)
    row, column = y0.long() + 1, x0.long() + 1
    return (
        (1 - dy) * (1 - dx) * rows[image, row, column]
        + (1 - dy) * dx * rows[image, row, column + 1]
        + dy * (1 - dx) * rows[image, row + 1, column]
        + dy * dx * rows[image, row + 1, column + 1]
    )


def binary_gate(logit: Tensor, noise: Tensor | float, temperature: float) -> Tensor:
    """Simplified binary Gumbel-softmax, straight-through (Eq. 7, 9, 10): exactly 0 or 1 forward,
    the sigmoid at `temperature` backward. `noise` is the difference of two Gumbel draws; 0 in
    evaluation."""
    soft = ((logit + noise) / temperature).sigmoid()
    hard = (logit + noise > 0).to(soft.dtype)
    return hard + (soft - soft.detach())
