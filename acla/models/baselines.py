"""The paper's baseline attention modules (Section 4.5, A.3): NL, CLNL, SE, MHA, ACLA with SE.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · N = H·W · C channels
E embedded channels of NL and CLNL

All have the interface of `CrossLayerAttention`: query [B,C,H,W], the rows of the L layers that an
insert position may refer to [B,H+2,W+2,C], the query's own last, gates [L] (the own layer's is 1),
seeds and temperature; modules that sample keys take mask maps and `counts` as well. They return the
increment of the query [B,C,H,W], and the keys read of each layer [B,L], summed over the queries: N²
of a layer attended to as a whole, 0 of others.

Attention over all positions needs memory that grows with N, or with N·(H + W) where multi-head
attention is trained, never with N²."""

from collections.abc import Sequence
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from acla.models.attention import CrossLayerAttention, zero
from acla.models.cost import RADIUS, embedded_width, head_count, squeezed_width

MAX_LOGITS = 2**24  # of multi-head attention held at once, without gradients


class NonLocal(nn.Module):
    """Non-local attention to every position of the last `layers` layers: NL (Eq. 1) with one, the
    query's own, and CLNL (Eq. 3) with all.

        y_i = Σ_l s_l Σ_n f_l(i, n) g_l(x^l_n) / Σ_l s_l Σ_n f_l(i, n)
        f_l(i, n) = exp(θ(x_i)·φ_l(x^l_n))

    the embedded Gaussian of Wang et al. (2018), without a factor on the product, normalised once
    over all layers and positions. A layer whose gate s_l is 0 is in neither sum, so that the others
    receive what they would without it. θ, φ_l and g_l are 1×1 convolutions C → E = C/2, and h is
    one E → C that starts at zero.

    Parameters: (2L + 1)·(CE + E) + EC + C."""

    def __init__(self, width: int, layers: int):
        super().__init__()
        inner = embedded_width(width)
        self.layers = layers
        self.theta = nn.Linear(width, inner)
        self.referred = nn.ModuleList(nn.Linear(width, 2 * inner) for _ in range(layers))  # φ, g
        self.output = zero(nn.Linear(inner, width))

    def forward(
        self, query: Tensor, rows: Sequence[Tensor], gates: Tensor | None = None, *unused: object
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results: see the module docstring."""
        H, W = query.shape[2:]
        first = len(rows) - self.layers
        read = list(range(first, len(rows)))
        if gates is not None and not gates.requires_grad:
            opened = gates.tolist()
            read, gates = [l for l in read if opened[l]], None
        embedded = [self.referred[l - first](rows[l][:, 1:-1, 1:-1]) for l in read]
        keys, values = (
            torch.cat([part.flatten(1, 2) for part in parts], 1)[:, None]  # [B,1,L·N,E]
            for parts in zip(*(pair.chunk(2, -1) for pair in embedded), strict=True)
        )
        theta = self.theta(query.permute(0, 2, 3, 1)).flatten(1, 2)[:, None]  # [B,1,N,E]
        if gates is None:
            y = F.scaled_dot_product_attention(theta, keys, values, scale=1.0)
        else:
            s = gates[first:].to(values.dtype).repeat_interleave(H * W)[:, None]  # [L·N,1]
            y = gated_attention(theta, keys, values, s)
        z = self.output(y[:, 0]).unflatten(1, (H, W)).permute(0, 3, 1, 2)
        return z, keys_read(query, len(rows), read)


class MultiHeadAttention(nn.Module):
    """Self-attention of several heads with relative positions (Bello et al. 2019): of every
    position p to every position n of the query's own layer, head by head,

        softmax_n(q_p·(k_n + r^y(y_n − y_p) + r^x(x_n − x_p)) / √d) v_n

    r^y and r^x are learned for the offsets −RADIUS..RADIUS, shared by the heads; a larger offset
    takes the outermost one (clipped as in Shaw et al. 2018), so that a picture may have any size.
    There are 8, 4 or 2 heads, the most that have 16 channels or more, else one, each of d = C /
    heads channels. q, k, v and the output are 1×1 convolutions; the output's starts at zero.

    Parameters: 4·(C² + C) + 2·(2·RADIUS + 1)·d."""

    def __init__(self, width: int, heads: int | None = None):
        super().__init__()
        self.heads = heads or head_count(width)
        per_head = width // self.heads
        self.project = nn.Linear(width, 3 * width)  # q, k, v
        self.vertical = nn.Parameter(torch.empty(2 * RADIUS + 1, per_head))  # r^y
        self.horizontal = nn.Parameter(torch.empty(2 * RADIUS + 1, per_head))  # r^x
        self.output = zero(nn.Linear(width, width))
        nn.init.normal_(self.vertical, std=per_head**-0.5)
        nn.init.normal_(self.horizontal, std=per_head**-0.5)

    def forward(
        self, query: Tensor, rows: Sequence[Tensor], *unused: object
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results: see the module docstring."""
        H, W = query.shape[2:]
        projected = self.project(query.permute(0, 2, 3, 1))
        pattern = "b y x (qkv h d) -> qkv b h (y x) d"
        q, k, v = rearrange(projected, pattern, qkv=3, h=self.heads)
        q = q * q.shape[-1] ** -0.5
        attend = self.at_once if torch.is_grad_enabled() else self.part_by_part
        y = rearrange(attend(q, k, v, H, W), "b h n d -> b n (h d)")
        z = self.output(y).unflatten(1, (H, W)).permute(0, 3, 1, 2)
        return z, keys_read(query, len(rows), [len(rows) - 1])

    def at_once(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int) -> Tensor:
        """Attention of q to k and v [B,h,N,d], with gradients.

        A relative logit depends on the query and on the key's row or column alone: it is the
        product of the query's logits for all rows with the key's row as a one-hot vector. So with
        H + W more channels, a kernel that never holds N × N logits computes them. GPU kernels need
        multiples of 8 channels, and all need as many in queries, keys and values."""
        place = torch.arange(H * W, device=q.device)
        one_hot = torch.cat([F.one_hot(place // W, H), F.one_hot(place % W, W)], -1).to(k.dtype)
        extended_q = torch.cat([q, *self.relative_logits(q, place, H, W)], -1)
        extended_k = torch.cat([k, one_hot.expand(*k.shape[:2], -1, -1)], -1)
        channels = -(-extended_q.shape[-1] // 8) * 8
        q, k, v = (F.pad(x, (0, channels - x.shape[-1])) for x in (extended_q, extended_k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., : self.vertical.shape[1]]

    def part_by_part(self, q: Tensor, k: Tensor, v: Tensor, H: int, W: int) -> Tensor:
        """The same without gradients, faster on large pictures: at most MAX_LOGITS at a time."""
        B, heads, N, _ = q.shape
        count, parts = max(1, MAX_LOGITS // (B * heads * N)), []
        for place in torch.arange(N, device=q.device).split(count):
            some = q[:, :, len(parts) * count :][:, :, :count]
            of_rows, of_columns = self.relative_logits(some, place, H, W)
            logits = (of_rows[..., None] + of_columns[..., None, :]).flatten(3)  # [B,h,n,N]
            parts.append(F.scaled_dot_product_attention(some, k, v, attn_mask=logits, scale=1.0))
        return torch.cat(parts, 2)

    def relative_logits(self, q: Tensor, place: Tensor, H: int, W: int) -> tuple[Tensor, Tensor]:
        """q·r^y for all rows [B,h,n,H] and q·r^x for all columns [B,h,n,W], of queries [B,h,n,d] at
        the given places [n] in 0..N−1."""

        def along(embedding: Tensor, start: Tensor, length: int) -> Tensor:
            offset = torch.arange(length, device=q.device) - start[:, None]
            chosen = offset.clamp(-RADIUS, RADIUS) + RADIUS
            return (q @ embedding.T).gather(-1, chosen.expand(*q.shape[:2], -1, -1))

        return along(self.vertical, place // W, H), along(self.horizontal, place % W, W)


class SqueezeExcitation(nn.Module):
    """A factor in 0..1 for each channel from the channels' means (Hu et al. 2018): z = s·x, so that
    the increment is x·(s − 1). It refers to no other position or layer: the keys read are 0.

    The only kind of module that does not start as the identity: its factors start near ½.

    Parameters: CI + I + IC + C with I = max(1, C // 16)."""

    def __init__(self, width: int):
        super().__init__()
        inner = squeezed_width(width)
        self.squeeze = nn.Linear(width, inner)
        self.excite = nn.Linear(inner, width)

    def forward(
        self, query: Tensor, rows: Sequence[Tensor], *unused: object
    ) -> tuple[Tensor, Tensor]:
        """Arguments and results: see the module docstring."""
        s = self.excite(self.squeeze(query.mean((2, 3))).relu()).sigmoid()
        return query * (s - 1)[..., None, None], keys_read(query, len(rows), [])


class SqueezedAttention(CrossLayerAttention):
    """ACLA followed by SE: z = s(x + h(y))·(x + h(y)). It starts as SE starts; the keys read are
    ACLA's. Arguments: those of CrossLayerAttention."""

    def __init__(self, width: int, *args: object, **initial: float):
        super().__init__(width, *args, **initial)
        self.excitation = SqueezeExcitation(width)

    def forward(
        self, query: Tensor, rows: Sequence[Tensor], *others: Any, **named: Any
    ) -> tuple[Tensor, Tensor | None]:
        """Arguments and results: see the module docstring."""
        added, kept = super().forward(query, rows, *others, **named)
        return added + self.excitation(query + added, rows)[0], kept

    def whole(self, query: Tensor, rows: Sequence[Tensor]) -> Tensor:
        """As CrossLayerAttention's."""
        z = super().whole(query, rows)
        return z + self.excitation(z, rows)[0]


def gated_attention(query: Tensor, keys: Tensor, values: Tensor, gates: Tensor) -> Tensor:
    """Σ_n s_n f_n v_n / Σ_n s_n f_n with f = exp(q·k), for gates s [n,1] that need a gradient, shut
    ones too: both sums, divided by Σ_n f_n, in one call.

    All channels grow by one, since the memory-saving kernels need as many everywhere. A shut layer
    that outweighs the open ones by more than the number format's range gives 0."""
    weighted = torch.cat([values * gates, gates.expand(*values.shape[:-1], 1)], -1)
    query, keys = F.pad(query, (0, 1)), F.pad(keys, (0, 1))
    y = F.scaled_dot_product_attention(query, keys, weighted, scale=1.0)
    return y[..., :-1] / y[..., -1:].clamp_min(torch.finfo(y.dtype).tiny)


def keys_read(query: Tensor, layers: int, read: Sequence[int]) -> Tensor:
    """[B,L] float64: N queries times N keys of the layers that were read, 0 of the others."""
    B, _, H, W = query.shape
    kept = query.new_zeros(B, layers, dtype=torch.float64)
    for l in read:  # an index made of the list would be a copy, which no CUDA graph can hold
        kept[:, l] = (H * W) ** 2
    return kept
