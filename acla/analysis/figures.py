"""The figures of `explain` (extra `report`): attribution, keys kept, keys of a pixel, branches."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from acla import console
from acla.analysis import plots
from acla.analysis.attribution import Observed, QueryKeys, Scene, diffusion_index

DRAWN = 6  # insert positions in keys.png; more would be too small to read


def as_image(picture: Tensor) -> np.ndarray:
    """A picture [1 or 3,H,W] for imshow: [H,W,3] in 0..1."""
    return picture.float().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()


def draw_attribution(pyplot: Any, scene: Scene, restored: Tensor, attribution: Tensor) -> Any:
    """The input and the restored picture with the window, and over the input the share that each of
    its pixels has in the window, relative to the largest."""
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 5.4), layout="constrained")
    y, x, side = scene.inner_window
    scale, gray = scene.task.scale, scene.low.mean(0, keepdim=True)
    pictures = ((scene.low, scale), (restored, 1), (gray, scale))
    titles = (f"input ({scene.task})", "restored", "attribution")
    for axis, (picture, factor), title in zip(axes, pictures, titles, strict=True):
        axis.imshow(as_image(picture), interpolation="nearest")
        corner, length = (x / factor - 0.5, y / factor - 0.5), side / factor
        axis.add_patch(pyplot.Rectangle(corner, length, length, fill=False, ec="cyan", lw=1.5))
        axis.set(title=title, xticks=[], yticks=[])
    strength = attribution.abs().sum(0).cpu().numpy()
    strength /= strength.max() or 1
    # A square root, because a few pixels have most of it
    heat = axes[2].imshow(strength**0.5, cmap="hot", alpha=strength**0.25, vmin=0, vmax=1)
    figure.colorbar(heat, ax=axes[2], shrink=0.8, label="√ of the share of the largest")
    index = diffusion_index(attribution)
    shown = "none, the window is flat" if index is None else f"{index:.2f}"
    figure.suptitle(f"Sources of the window (cyan): diffusion index {shown}")
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
    for i, j in np.argwhere(np.isfinite(shares)) if len(positions) <= 16 else ():
        colour = "black" if shares[i, j] > 0.6 else "white"
        axis.text(j, i, f"{100 * shares[i, j]:.0f}", ha="center", va="center", color=colour)
    axis.set_xticks(range(len(positions)), positions)
    axis.set_yticks(range(len(positions)), positions)
    axis.set(xlabel="referred position", ylabel="query position", title="keys kept")
    figure.colorbar(heat, ax=axis, label="% of the sampled keys", shrink=0.9)
    return figure


def draw_keys(pyplot: Any, scene: Scene, keys: dict[int, QueryKeys]) -> Any:
    """The keys of the query (Figures 2 and 4 of the paper): a row for each query position, a column
    for each referred one; of many positions some, spread over the depth. All keys lie in the
    frames, but for 2 % far out."""
    positions = list(keys)
    count = min(len(positions), DRAWN)
    drawn = [positions[round(i)] for i in np.linspace(0, len(positions) - 1, count)]
    points = torch.cat([keys[position].position.flatten(0, 1) for position in drawn]).cpu()
    distance = (points - torch.tensor(scene.inner_query)).abs().amax(1).nan_to_num(0, 0, 0)
    reach = max(distance.quantile(0.98).item() + 2, 8)  # low-quality pixels
    (y, x), (height, width) = scene.inner_query, scene.low.shape[1:]
    size = (2.6 * count + 2, 2.6 * count + 1)
    figure, axes = pyplot.subplots(count, count, figsize=size, squeeze=False, layout="constrained")
    top = max(one.weight.max().item() for one in keys.values())
    style = {"cmap": "cool", "vmin": 0, "vmax": top, "s": 42, "zorder": 3}
    for (i, j), axis in np.ndenumerate(axes):
        if j > i:
            axis.axis("off")
            continue
        l = positions.index(drawn[j])
        at, weight, kept = (value[l].cpu().numpy() for value in keys[drawn[i]])
        axis.imshow(as_image(scene.low.mean(0, keepdim=True)), interpolation="nearest")
        dots = axis.scatter(*at[kept].T[::-1], c=weight[kept], edgecolors="white", lw=0.8, **style)
        axis.scatter(*at[~kept].T[::-1], c=weight[~kept], marker="x", lw=1.4, **style)
        axis.plot(x, y, "+", color="lime", ms=12, mew=2.2, zorder=4)
        axis.set(title=f"{drawn[i]} → {drawn[j]}", xticks=[], yticks=[])
        axis.set(xlim=(max(x - reach, -1), min(x + reach, width)))
        axis.set(ylim=(min(y + reach, height), max(y - reach, -1)))
    label = "attention weight (circle: kept, ×: masked)"
    figure.colorbar(dots, ax=axes, label=label, shrink=0.7, aspect=30)
    title = f"keys of the pixel {scene.query}, the green cross: query → referred position"
    figure.suptitle(title)
    return figure


def draw_branches(pyplot: Any, branches: list[float]) -> Any:
    """A2N's weight of the branch with attention over the depth of the network."""
    figure, axis = pyplot.subplots(figsize=(7, 4), layout="constrained")
    axis.plot(range(1, len(branches) + 1), branches, "o-")
    axis.axhline(0.5, color="black", lw=0.5, ls="--")
    axis.set(xlabel="block", ylabel="weight of the branch with attention")
    axis.xaxis.get_major_locator().set_params(integer=True)
    return figure


def write_figures(
    pyplot: Any, folder: Path, scene: Scene, attribution: Tensor, observed: Observed
) -> None:
    """The figures that apply, into a folder."""
    figures = {"attribution": draw_attribution(pyplot, scene, observed.restored, attribution)}
    if observed.keys:
        figures["kept"] = draw_kept(pyplot, observed.kept)
        figures["keys"] = draw_keys(pyplot, scene, observed.keys)
    if observed.branches:
        figures["branches"] = draw_branches(pyplot, observed.branches)
    for name, figure in figures.items():
        plots.save_figure(figure, folder / f"{name}.png")
        console.notice(console.printable(f"written: {folder / name}.png"))
