"""The figures of `explain` (extra `report`): attribution, keys kept, keys of one pixel."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acla import console
from acla.analysis.attribution import Attribution, Keys, Observed, Scene
from acla.console import printable

FIGURES = ("attribution.png", "kept.png", "keys.png", "branches.png")
DRAWN = 6  # insert positions in keys.png; more would be too small to read


def shown(picture: Tensor) -> np.ndarray:
    """A picture [1 or 3,H,W] as imshow takes it: [H,W,3] in 0..1."""
    return picture.float().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def draw_attribution(
    pyplot: Any, scene: Scene, restored: Tensor, found: Attribution, index: float | None
) -> Any:
    """The input and the restored picture with the window, and over the input what each of its
    pixels adds."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
    strength = found.map.abs().sum(0).cpu().numpy()
    strength = strength / (strength.max() or 1)
    y, x, side = scene.inner_window
    scale = scene.task.scale
    for axis, picture, factor, title in (
        (axes[0], scene.low, scale, f"input ({scene.task})"),
        (axes[1], restored, 1, "restored"),
        (axes[2], scene.low.mean(0, keepdim=True), scale, "attribution"),
    ):
        axis.imshow(shown(picture), interpolation="nearest")
        corner = (x / factor - 0.5, y / factor - 0.5)
        axis.add_patch(
            pyplot.Rectangle(corner, side / factor, side / factor, fill=False, ec="cyan", lw=1.5)
        )
        axis.set(title=title, xticks=[], yticks=[])
    # A square root, for a few pixels have most of it
    heat = axes[2].imshow(strength**0.5, cmap="hot", alpha=strength**0.25, vmin=0, vmax=1)
    bar = figure.colorbar(
        heat, ax=axes[2], shrink=0.8, ticks=np.array([0, 0.01, 0.1, 0.5, 1]) ** 0.5
    )
    bar.ax.set_yticklabels(["0", "0.01", "0.1", "0.5", "1"])
    bar.set_label("share of the greatest")
    told = "none, the window is flat" if index is None else f"{index:.2f}"
    figure.suptitle(f"What the window (cyan) is restored from: diffusion index {told}")
    return figure


def draw_kept(pyplot: Any, kept: list[dict[str, Any]]) -> Any:
    """The share of keys kept: rows are query positions, columns referred positions."""
    positions = sorted({row["position"] for row in kept})
    shares = np.full((len(positions),) * 2, np.nan)
    for row in kept:
        shares[positions.index(row["position"]), positions.index(row["layer"])] = row["share"]
    size = min(max(0.8 * len(positions), 3), 14)
    figure, axis = pyplot.subplots(figsize=(size + 2, size + 0.6), layout="constrained")
    heat = axis.imshow(100 * shares, cmap="viridis", vmin=0, vmax=100)
    if len(positions) <= 16:  # more would not be readable
        for (i, j), share in np.ndenumerate(shares):
            if np.isfinite(share):
                colour = "black" if share > 0.6 else "white"
                axis.text(j, i, f"{100 * share:.0f}", ha="center", va="center", color=colour)
    ticks = range(len(positions))
    axis.set_xticks(ticks, positions)
    axis.set_yticks(ticks, positions)
    axis.set(xlabel="referred position", ylabel="query position", title="keys kept")
    figure.colorbar(heat, ax=axis, label="% of the sampled keys", shrink=0.9)
    return figure


def spread(items: list[int], most: int) -> list[int]:
    """At most so many of the items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return items
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def draw_keys(pyplot: Any, scene: Scene, keys: dict[int, Keys]) -> Any:
    """The keys of the query (Figures 2 and 4 of the paper): a row for each query position, a column
    for each referred one, spread over the depth where there are many."""
    positions, drawn = list(keys), spread(list(keys), DRAWN)
    top = max(found.weight.max().item() for found in keys.values())
    (y, x), reach = scene.inner_query, frame(scene, [keys[position] for position in drawn])
    size = (2.6 * len(drawn) + 2, 2.6 * len(drawn) + 1)
    figure, axes = pyplot.subplots(
        len(drawn), len(drawn), figsize=size, squeeze=False, layout="constrained"
    )
    style = {"cmap": "cool", "vmin": 0, "vmax": top, "s": 42, "zorder": 3}
    for (i, j), axis in np.ndenumerate(axes):
        if j > i:
            axis.axis("off")
            continue
        l = positions.index(drawn[j])
        at, weight, kept = (value[l].cpu().numpy() for value in keys[drawn[i]])
        axis.imshow(shown(scene.low.mean(0, keepdim=True)), interpolation="nearest")
        dots = axis.scatter(*at[kept].T[::-1], c=weight[kept], edgecolors="white", lw=0.8, **style)
        axis.scatter(*at[~kept].T[::-1], c=weight[~kept], marker="x", lw=1.4, **style)
        axis.plot(x, y, "+", color="lime", ms=12, mew=2.2, zorder=4)
        height, width = scene.low.shape[1:]
        axis.set(
            title=f"{drawn[i]} → {drawn[j]}",
            xlim=(max(x - reach, -1), min(x + reach, width)),
            ylim=(min(y + reach, height), max(y - reach, -1)),
            xticks=[],
            yticks=[],
        )
    label = "attention weight (circle: kept, ×: shut by the mask)"
    figure.colorbar(dots, ax=axes, label=label, shrink=0.7, aspect=30)
    figure.suptitle(
        f"keys of the pixel ({scene.query[0]}, {scene.query[1]}), the green cross: "
        "query position → referred position"
    )
    return figure


def frame(scene: Scene, keys: list[Keys]) -> float:
    """How far around the query to look, in low-quality pixels: all keys, but for a few far out."""
    points = torch.cat([found.position.flatten(0, 1) for found in keys]).cpu()
    away = (points - torch.tensor(scene.inner_query)).abs().amax(1)
    return max(away.nan_to_num(0, 0, 0).quantile(0.98).item() + 2, 8)


def draw_branches(pyplot: Any, branches: list[float]) -> Any:
    """A2N's weight of the branch with attention over the depth of the network, around the half."""
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(branches) + 1), branches, "o-")
    axis.axhline(0.5, color="black", lw=0.5, ls="--")
    reach = max(0.05, 1.1 * max(abs(weight - 0.5) for weight in branches))
    axis.set(
        ylim=(0.5 - reach, 0.5 + reach),
        xlabel="block",
        ylabel="weight of the branch with attention",
        title="attention in attention",
    )
    axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def write_figures(
    pyplot: Any,
    folder: Path,
    scene: Scene,
    found: Attribution,
    observed: Observed,
    index: float | None,
) -> None:
    """The figures that apply, into a folder."""
    figures = {"attribution.png": draw_attribution(pyplot, scene, observed.restored, found, index)}
    if observed.keys:
        figures["kept.png"] = draw_kept(pyplot, observed.kept)
        figures["keys.png"] = draw_keys(pyplot, scene, observed.keys)
    if observed.branches:
        figures["branches.png"] = draw_branches(pyplot, observed.branches)
    for name, figure in figures.items():
        figure.savefig(folder / name, dpi=110)
        pyplot.close(figure)
        console.notice(printable(f"written: {folder / name}"))
