"""The result of a search, and its report."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from acla import console
from acla.config import format_positions
from acla.models.cost import full_attention_flops
from acla.search.architecture import SIDE, Architecture, Candidate, macs

MAX_SCORED = 16  # pictures for the PSNR of an epoch and of the last table


@dataclass(frozen=True)
class SearchResult:
    """The architecture; PSNR in dB of the derived network, with the supernet's weights, on each
    picture that scores; the share of keys kept by each module; for comparison, on the first
    MAX_SCORED pictures, the mean PSNR without attention and with a module behind every block; the
    share of the gates' noise at the end."""

    architecture: Architecture
    psnr: tuple[float, ...]
    kept: dict[int, float] = field(default_factory=dict)
    none_psnr: float = math.nan
    dense_psnr: float = math.nan
    noise: float = 1.0

    @property
    def chances(self) -> list[float]:
        """The probability that a gate drawn at the end is open."""
        return (torch.tensor(self.architecture.alpha) / self.noise).sigmoid().tolist()

    @property
    def mean_psnr(self) -> float:
        return sum(self.psnr) / len(self.psnr)

    @property
    def undecided(self) -> int:
        """Gates open with a probability of 0.1 to 0.9. A front has none."""
        if self.architecture.front:
            return 0
        return sum(0.1 < chance < 0.9 for chance in self.chances)


def search_table(result: SearchResult) -> str:
    """The positions or the networks of a front; then the cost of the network and what
    it gains, beside no attention and a module behind every block."""
    architecture, model = result.architecture, result.architecture.model
    front = architecture.front
    lines = [front_table(front) if front else gates_table(result), ""]
    size = architecture.patch
    network = model.attention, model.blocks, size**2, model.width, model.keys
    dense = full_attention_flops(*network)
    saved = 1 - architecture.cost / dense
    shown = console.plural(min(len(result.psnr), MAX_SCORED), "validation picture")
    lines += [
        f"positions: {format_positions(model.positions)}",
        f"attention costs {architecture.cost / 2e6:.1f} M multiply-adds for {size}×{size} pixels, "
        f"{saved:.1%} less than a module behind every block ({dense / 2e6:.1f} M)",
        f"{architecture.task}, PSNR on {shown} with the supernet's weights:",
    ]
    psnr = float(np.mean(result.psnr[:MAX_SCORED]))
    rows = [("none", 0, result.none_psnr), ("found", len(model.positions), psnr)]
    rows = [
        (name, str(modules), f"{macs(model, modules) / 1e6:.1f} M", psnr)
        for name, modules, psnr in [*rows, ("dense", model.blocks, result.dense_psnr)]
    ]
    head = ("network", "modules", f"multiply-adds of {SIDE}×{SIDE}", "PSNR, dB", "gain")
    gains = [(*cells, f"{psnr:.3f}", f"{psnr - result.none_psnr:+.3f}") for *cells, psnr in rows]
    return "\n".join([*lines, console.markdown(head, gains)])


def gates_table(result: SearchResult) -> str:
    """A row for each position."""
    alphas, rows = zip(result.architecture.alpha, result.chances, strict=True), []
    for j, (alpha, chance) in enumerate(alphas, 1):
        kept = f"{result.kept[j]:.1%}" if j in result.kept else "–"
        module = "open" if j in result.architecture.model.positions else "–"
        rows.append([str(j), f"{alpha:+.3f}", f"{chance:.2f}", kept, module])
    return console.markdown(("position", "alpha", "chance", "keys kept", "module"), rows)


def front_table(front: Sequence[Candidate]) -> str:
    """A row for each network."""
    rows = []
    for one in front:
        ms = f"{one.ms:.2f}" if one.ms else "–"
        positions = format_positions(one.positions)
        rows.append([f"{one.macs / 1e6:.1f} M", f"{one.psnr:.3f}", ms, positions])
    return console.markdown(("multiply-adds", "held-out PSNR, dB", "ms", "positions"), rows)
