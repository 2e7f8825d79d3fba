"""The operator in torch alone, for machines without a compiler: a query's keys are a bag of rows.

B batch · L referred layers · K sampled keys per layer and query · H,W grid · C channels
N queries of a chunk · S its open keys · queries count over [B,H,W], pixels over [B,H+2,W+2]

Works layer by layer and in chunks of queries, so that temporary memory does not grow with the
picture. A key is known by the upper left of its four pixels; the other three are the same row of a
table that starts later. Every sum has a fixed order on CPUs; on GPUs the mask maps' gradient has
one under `torch.use_deterministic_algorithms`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from . import philox
from .inputs import Inputs, Leaves

CHUNK = 1 << 16  # keys worked on at a time: some 30 MB of temporaries


def forward(inputs: Inputs, counts: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """The three results of `kernels.attend`: aggregate, coverage, kept, whose count is free."""
    features, points = inputs[:2]
    B, H, W, L, _, _ = points.shape
    N, C, device = B * H * W, features[0].shape[-1], points.device
    aggregate = torch.empty(N, L, C, dtype=features[0].dtype, device=device)
    coverage = torch.empty(N, L, dtype=points.dtype, device=device)
    counted = torch.empty(N, L, dtype=torch.int64, device=device)
    for l, gate in enumerate(gate_values(inputs)):
        layer = Layer.of(inputs, l)
        for chunk in layer.chunks():
            now = slice(chunk.begin, chunk.end)
            counted[now, l] = chunk.open.sum(1)
            aggregate[now, l] = gate * layer.sums(chunk).to(aggregate.dtype) if gate else 0
            coverage[now, l] = gate * chunk.coverage().to(coverage.dtype) if gate else 0
    kept = counted.view(B, H * W, L).sum(1).double()
    return aggregate.view(B, H, W, L, -1), coverage.view(B, H, W, L), kept


def backward(
    inputs: Inputs, gradients: tuple[Tensor | None, Tensor | None, Tensor | None], wanted: Leaves
) -> Leaves:
    """The gradients that are `wanted`, from those of the three results of `forward`; of these None
    means zero."""
    features, points, mask_maps, gates, _, temperature = inputs
    rows = torch.contiguous_format
    grad_points = torch.empty_like(points, memory_format=rows) if wanted.points else None
    grad_gates = torch.zeros_like(gates) if wanted.gates else None
    grad_features, grad_maps = [], []
    for l, gate in enumerate(gate_values(inputs)):
        layer = Layer.of(inputs, l)
        grad_table = torch.zeros_like(layer.table) if wanted.features[l] else None
        grad_map = torch.zeros_like(layer.mask_map) if mask_maps and wanted.mask_maps[l] else None
        for chunk in layer.chunks():
            given = layer.given(chunk, gradients)
            if wanted.gates and not gate:
                grad_gates[l] += layer.sent(chunk, given)
            if gate and grad_table is not None and given.aggregate is not None:
                layer.scatter(chunk, given.aggregate, gate, grad_table)
            if not (wanted.points or grad_map is not None or (wanted.gates and gate)):
                continue
            of_points, of_mask, of_gate = layer.slopes(chunk, given, gate, temperature)
            if wanted.points:
                grad_points.flatten(0, 2)[chunk.begin : chunk.end, l] = of_points
            if wanted.gates and gate:
                grad_gates[l] += of_gate
            if grad_map is not None:
                layer.scatter_mask(chunk, of_mask, grad_map)
        grad_features.append(None if grad_table is None else grad_table.view(features[l].shape))
        if mask_maps:
            grad_maps.append(None if grad_map is None else grad_map.view(mask_maps[l].shape))
    return Leaves(grad_features, grad_points, grad_maps, grad_gates)


@dataclass
class Chunk:
    """The keys of queries begin .. end - 1, [N,K] each, and the mask around them."""

    begin: int
    end: int
    size: tuple[int, int]  # H, W
    position: tuple[Tensor, Tensor]  # y and x in pixels
    y: Tensor  # the same, clamped to the border
    x: Tensor
    y0: Tensor  # the pixel above and to the left of it, -1 .. H - 1 and -1 .. W - 1
    x0: Tensor
    pixel: Tensor  # the same, counted over [B,H+2,W+2]; int32 where that suffices
    weight: Tensor  # softmax over the keys
    open: Tensor  # bool
    logit: Tensor | None = None  # of the mask, noise included
    corners: tuple[Tensor, ...] = ()  # the mask map's four values

    def within(self) -> tuple[Tensor, Tensor]:
        """Position between the four pixels, 0 to 1 along y and along x."""
        return self.y - self.y0, self.x - self.x0

    def coverage(self) -> Tensor:
        """Share of the open keys' weight that lies inside the image, [N]."""
        H, W = self.size
        y = torch.minimum(self.y + 1, H - self.y).clamp(max=1)
        x = torch.minimum(self.x + 1, W - self.x).clamp(max=1)
        return (self.weight * y * x * self.open).sum(1)


@dataclass
class Bags:
    """A chunk's open keys, query by query."""

    pixel: Tensor  # [S]
    query: Tensor  # [S], from the chunk's begin
    begins: Tensor  # [N+1] where each query's keys begin
    weights: tuple[Tensor, ...]  # 4 × [S], softmax times the share of each pixel


@dataclass
class Given:
    """The results' gradients for a chunk; None means zero."""

    aggregate: Tensor | None  # [N,C]
    coverage: Tensor | None  # [N]
    kept: Tensor | None  # [N]


@dataclass
class Layer:
    """One referred layer's inputs in the type of the arithmetic, as flat tables."""

    table: Tensor  # [pixels,C]
    mask_map: Tensor | None  # [pixels,K]
    points: Tensor  # [B·H·W,3,K]
    seeds: Tensor | None  # [B]
    shape: tuple[int, int, int]  # B, H, W
    place: tuple[int, int]  # l, L

    @classmethod
    def of(cls, inputs: Inputs, l: int) -> "Layer":
        features, points, mask_maps, _, seeds, _ = inputs
        B, H, W, L, _, K = points.shape
        dtype = torch.float64 if features[0].dtype == torch.float64 else torch.float32
        table = features[l].detach().to(dtype).reshape(-1, features[l].shape[-1])
        mask_map = None  # copied where it is a slice of several modules' maps
        if mask_maps:
            mask_map = mask_maps[l].detach().to(dtype).reshape(-1, K).contiguous()
        flat = points.detach().reshape(-1, L, 3, K)[:, l]
        return cls(table.contiguous(), mask_map, flat, seeds, (B, H, W), (l, L))

    def chunks(self) -> Iterator[Chunk]:
        """All keys, located and decided, at most CHUNK at a time."""
        queries, _, K = self.points.shape
        step = max(1, CHUNK // K)
        for begin in range(0, queries, step):
            yield self.chunk(begin, min(begin + step, queries))

    def chunk(self, begin: int, end: int) -> Chunk:
        """Softmax, corners and masks of queries begin .. end - 1."""
        _, H, W = self.shape
        points = self.points[begin:end].to(self.table.dtype)
        query = torch.arange(begin, end, device=points.device).unsqueeze(1)
        image, row, column = query // (H * W), query // W % H, query % W
        position = row.to(points.dtype) + points[:, 0], column.to(points.dtype) + points[:, 1]
        y = position[0].nan_to_num(-1.0, H, -1.0).clamp(-1, H)
        x = position[1].nan_to_num(-1.0, W, -1.0).clamp(-1, W)
        y0, x0 = y.floor().clamp(max=H - 1), x.floor().clamp(max=W - 1)
        start = (image * (H + 2) + 1) * (W + 2) + 1
        pixel = y0.to(self.index) * (W + 2) + x0.to(self.index) + start.to(self.index)
        chunk = Chunk(
            *(begin, end, (H, W), position, y, x, y0, x0, pixel),
            weight=points[:, 2].softmax(1),
            open=torch.ones_like(pixel, dtype=torch.bool),
        )
        if self.mask_map is not None:
            spot = self.spots(chunk)
            flat = self.mask_map.view(-1)
            chunk.corners = tuple(
                flat[shift * y.shape[1] :].index_select(0, spot).view(y.shape)
                for shift in self.shifts
            )
            chunk.logit = bilinear(chunk.corners, *chunk.within())[0]
            if self.seeds is not None:
                K, (l, L) = y.shape[1], self.place
                counter = (query % (H * W) * L + l) * K + torch.arange(K, device=query.device)
                chunk.logit = chunk.logit + philox.draw(self.seeds[image], counter)
            chunk.open = chunk.logit > 0
        return chunk

    @property
    def shifts(self) -> tuple[int, int, int, int]:
        """From a key's pixel to its four: upper left, upper right, lower left, lower right."""
        W = self.shape[2]
        return 0, 1, W + 2, W + 3

    @property
    def index(self) -> torch.dtype:
        """int32 where it counts every entry of the tables: half the memory traffic."""
        widest = max(self.table.numel(), 0 if self.mask_map is None else self.mask_map.numel())
        return torch.int32 if widest < 1 << 31 else torch.int64

    def spots(self, chunk: Chunk) -> Tensor:
        """Where the flat mask map holds the keys' logits, [N·K]: key k reads channel k."""
        K = chunk.pixel.shape[1]
        channel = torch.arange(K, device=chunk.pixel.device, dtype=chunk.pixel.dtype)
        return (chunk.pixel * K + channel).flatten()

    def bags(self, chunk: Chunk) -> Bags:
        """The open keys."""
        K = chunk.open.shape[1]
        picked = chunk.open.flatten().nonzero().squeeze(1)
        y, x = (t.flatten().index_select(0, picked) for t in chunk.within())
        f = chunk.weight.flatten().index_select(0, picked)
        top, bottom = f * (1 - y), f * y
        return Bags(
            pixel=chunk.pixel.flatten().index_select(0, picked),
            query=picked // K,
            begins=torch.nn.functional.pad(chunk.open.sum(1).cumsum(0), (1, 0)),
            weights=(top * (1 - x), top * x, bottom * (1 - x), bottom * x),
        )

    def sums(self, chunk: Chunk) -> Tensor:
        """Weighted sums of the open keys, [N,C]."""
        bags = self.bags(chunk)
        first, *rest = (
            bag_sums(self.table[shift:], bags.pixel, weight, bags.begins)
            for shift, weight in zip(self.shifts, bags.weights, strict=True)
        )
        for part in rest:
            first += part
        return first

    def given(self, chunk: Chunk, gradients: tuple[Tensor | None, ...]) -> Given:
        """The results' gradients [B,H,W,L,C], [B,H,W,L], [B,L] for the queries of a chunk."""
        aggregate, coverage, kept = gradients
        l, now, dtype = self.place[0], slice(chunk.begin, chunk.end), self.table.dtype
        if aggregate is not None:
            aggregate = aggregate[..., l, :].reshape(-1, aggregate.shape[-1])[now]
            aggregate = aggregate.to(dtype).contiguous()
        if coverage is not None:
            coverage = coverage[..., l].reshape(-1)[now].to(dtype)
        if kept is not None:
            _, H, W = self.shape
            kept = kept[:, l].repeat_interleave(H * W)[now].to(dtype)
        return Given(aggregate, coverage, kept)

    def sent(self, chunk: Chunk, given: Given) -> Tensor:
        """The gradient of a gate that is shut, []: given times what the layer would have sent."""
        total = self.table.new_zeros(())
        if given.aggregate is not None:
            total = total + (self.sums(chunk) * given.aggregate).sum()
        if given.coverage is not None:
            total = total + (chunk.coverage() * given.coverage).sum()
        return total

    def scatter(self, chunk: Chunk, gradient: Tensor, gate: float, grad_table: Tensor) -> None:
        """Add the open keys' gradients to the pixels they read; sorted, each pixel is one bag."""
        bags = self.bags(chunk)
        pixel, order = torch.cat([bags.pixel + shift for shift in self.shifts]).sort(stable=True)
        weight = gate * torch.cat(bags.weights).index_select(0, order)
        query = bags.query.repeat(4).index_select(0, order)
        pixel, counts = pixel.unique_consecutive(return_counts=True)
        begins = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        grad_table.index_add_(0, pixel, bag_sums(gradient, query, weight, begins))

    def scatter_mask(self, chunk: Chunk, gradient: Tensor, grad_map: Tensor) -> None:
        """Add the gradients [N,K] of the mask's logits to the four pixels of each key."""
        y, x = chunk.within()
        spot, K = self.spots(chunk), y.shape[1]
        top, bottom = gradient * (1 - y), gradient * y
        terms = (top * (1 - x), top * x, bottom * (1 - x), bottom * x)
        for shift, term in zip(self.shifts, terms, strict=True):
            grad_map.view(-1)[shift * K :].index_add_(0, spot, term.flatten())

    def slopes(
        self, chunk: Chunk, given: Given, gate: float, temperature: float
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Gradients of points [N,3,K], mask logits [N,K] and gate [], from four dots a key."""
        H, W = chunk.size
        if gate and given.aggregate is not None:
            dots = self.dots(chunk, given.aggregate)
        else:
            dots = [torch.zeros_like(chunk.weight)] * 4
        if given.coverage is not None:
            top, bottom = chunk.y0 >= 0, chunk.y0 < H - 1
            left, right = chunk.x0 >= 0, chunk.x0 < W - 1
            seen = (top & left, top & right, bottom & left, bottom & right)
            dots = [d + given.coverage.unsqueeze(1) * s for d, s in zip(dots, seen, strict=True)]
        y, x = chunk.within()
        value, value_y, value_x = bilinear(dots, y, x)
        weight = gate * chunk.weight
        grad_y, grad_x = weight * chunk.open * value_y, weight * chunk.open * value_x
        mask = None
        if chunk.logit is not None:
            soft = (chunk.logit / temperature).sigmoid()
            mask = weight * value
            if given.kept is not None:
                mask = mask + given.kept.unsqueeze(1)
            mask = mask * soft * (1 - soft) / temperature  # straight-through: the sigmoid's
            _, beta_y, beta_x = bilinear(chunk.corners, y, x)
            grad_y, grad_x = grad_y + mask * beta_y, grad_x + mask * beta_x
        opened = chunk.open * value
        share = (chunk.weight * opened).sum(1, keepdim=True)
        grad_logit = weight * (opened - share)
        # Farther out, moving changes nothing.
        free_y, free_x = ((p >= -1) & (p <= s) for p, s in zip(chunk.position, (H, W), strict=True))
        grads = torch.stack([grad_y * free_y, grad_x * free_x, grad_logit], 1)
        return grads, mask, share.sum()

    def dots(self, chunk: Chunk, gradient: Tensor) -> list[Tensor]:
        """gradient · feature at the four corners of all keys, [N,K] each."""
        N, K = chunk.pixel.shape
        pixel = chunk.pixel.flatten()
        bag = torch.arange(N, device=pixel.device, dtype=pixel.dtype)
        # What autograd calls for the weights of an embedding_bag: a dot a row, no copies of rows.
        dot = torch.ops.aten._embedding_bag_per_sample_weights_backward
        begins, owner = bag * K, bag.repeat_interleave(K)
        return [
            dot(gradient, self.table[shift:], pixel, begins, owner, 0).view(N, K)
            for shift in self.shifts
        ]


def bilinear(corners: Sequence[Tensor], y: Tensor, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Value between four corners, and its derivatives along y and x."""
    a, b, c, d = corners
    top, bottom = a + x * (b - a), c + x * (d - c)
    return top + y * (bottom - top), bottom - top, (1 - y) * (b - a) + y * (d - c)


def bag_sums(table: Tensor, rows: Tensor, weights: Tensor, begins: Tensor) -> Tensor:
    """Weighted sums of the table's rows; bag i is rows[begins[i] : begins[i + 1]]."""
    return torch.nn.functional.embedding_bag(
        rows,
        table,
        begins.to(rows.dtype),
        mode="sum",
        per_sample_weights=weights,
        include_last_offset=True,
    )


def gate_values(inputs: Inputs) -> list[float]:
    """The gates as numbers; 1 where there are none."""
    return [1.0] * len(inputs.features) if inputs.gates is None else inputs.gates.tolist()
