"""The supernet: behind every block a module with an architecture parameter (Section 3.2)."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from acla.config import ATTENTIONS, ModelConfig
from acla.errors import UsageError
from acla.models.backbones import Backbone
from acla.models.cost import attention_flops
from acla.models.factory import build_network
from acla.models.gumbel import expected_gates

SAMPLE_LIMIT = 256 * 2**20  # bytes


class Supernet(nn.Module):
    """A backbone with attention behind every block and α [J], one per insert position, initially 0:
    open or shut with equal probability.

    `config.positions` is ignored. `density` [J,J] keeps the share of keys that module j last kept
    of layer l, for the modules that a step skips. Raises UsageError for an attention that Eq. 11
    to 13 do not describe."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        if not config.kind.searchable:
            known = " and ".join(name for name, kind in ATTENTIONS.items() if kind.searchable)
            raise UsageError(f"a search is for {known}, not for --attention {config.attention}")
        everywhere = tuple(range(1, config.blocks + 1))
        self.backbone = build_network(replace(config, positions=everywhere))
        self.backbone.sample_limit = SAMPLE_LIMIT
        # w of Eq. 14; the mean shifts are fixed.
        self.weights = [p for p in self.backbone.parameters() if p.requires_grad]
        self.alpha = nn.Parameter(torch.zeros(config.blocks))
        self.register_buffer("density", torch.ones(config.blocks, config.blocks))

    @property
    def config(self) -> ModelConfig:
        return self.backbone.config

    @contextlib.contextmanager
    def weights_fixed(self) -> Iterator[None]:
        """Inside, no gradient is computed for the weights."""
        for parameter in self.weights:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in self.weights:
                parameter.requires_grad_(True)

    def forward(
        self, pictures: Tensor, gates: Tensor, seeds: Tensor | None = None, temperature: float = 1.0
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Pictures [B,C,H,W] through the modules whose gate [J] is open: the restored pictures, and
        the keys kept in each module that ran, {position: [B,L]}."""
        return self.backbone.forward_with_counts(pictures, seeds, gates, temperature)

    def cost(self, kept: dict[int, Tensor], n: int, gates: Tensor | None = None) -> Tensor:
        """Eq. 12 and 13 in FLOPs for a picture of n positions, at the mask density of `kept`.

        Expected over the gates σ(α) unless gates [J] are given. Gradients reach α and, through the
        keys kept, the masks. Updates `density`."""
        keys = self.config.keys
        s = expected_gates(self.alpha) if gates is None else gates
        counts = [row[: j + 1] * (n * keys) for j, row in enumerate(self.density.double())]
        for position, count in kept.items():
            counts[position - 1] = count.mean(0)
            self.density[position - 1, :position] = count.detach().mean(0) / (n * keys)
        masked = self.config.kind.masked
        return attention_flops(s.double(), n, self.config.width, keys, counts, masked)

    def open_positions(self) -> tuple[int, ...]:
        """Positions whose gate is open without noise: s_j > 0.5, that is α_j > 0."""
        return tuple(j + 1 for j, a in enumerate(self.alpha.tolist()) if a > 0)

    def derive(self, positions: tuple[int, ...] | None = None) -> Backbone:
        """The network with modules at these positions only (default: the open ones), with the
        supernet's weights. It equals the supernet whose other gates are shut, to rounding."""
        positions = self.open_positions() if positions is None else positions
        derived = build_network(replace(self.config, positions=positions)).to(self.alpha)
        state = {
            name: tensor
            for name, tensor in self.backbone.state_dict().items()
            if not name.startswith("attention.")
        }
        for count, position in enumerate(positions, 1):
            module = self.backbone.attention[str(position)]
            layers = [p - 1 for p in positions[:count]]
            for name, tensor in module.select(layers).items():
                state[f"attention.{position}.{name}"] = tensor
        derived.load_state_dict(state)
        return derived
