"""Figures: what is drawn where."""

import pytest
import torch

from acla.analysis import figures, plots
from acla.analysis.attribution import QueryKeys, Scene, diffusion_index
from acla.config import Task


@pytest.fixture
def pyplot():
    module = plots.require_pyplot()
    yield module
    module.close("all")


def scene(side: int = 24, scale: int = 1) -> Scene:
    task = Task("sr", scale) if scale > 1 else Task("car", 10)
    low = torch.rand(task.channels, side, side)
    return Scene(low, 10, 20, (14 * scale, 26 * scale, 8), (15 * scale, 27 * scale), task)


def sampled(*offsets: tuple[float, float], layers: int = 1) -> QueryKeys:
    """Keys of the scene's query, the first of them shut."""
    position = torch.tensor(offsets) + torch.tensor([5.0, 7.0])
    weight = torch.arange(1.0, len(offsets) + 1).softmax(0)
    kept = torch.arange(len(offsets)) > 0
    return QueryKeys(*(value.expand(layers, *value.shape) for value in (position, weight, kept)))


def panels(figure) -> list:
    return [axis for axis in figure.axes if axis.get_title()]


def test_some_of_many_positions_are_drawn(pyplot):
    keys = {position: sampled((0.0, 1.0), layers=position) for position in range(1, 33)}
    figure = figures.draw_keys(pyplot, scene(), keys)
    drawn = [1, 7, 13, 20, 26, 32]
    titles = [f"{i} → {j}" for i in drawn for j in drawn if j <= i]
    assert [axis.get_title() for axis in panels(figure)] == titles


def test_keys_stand_where_they_are(pyplot):
    offsets = [(2.0, -1.0), (-3.5, 4.0), (0.0, 0.5)]
    keys = {2: sampled(*offsets), 5: sampled(*offsets, layers=2)}
    figure = figures.draw_keys(pyplot, scene(), keys)
    assert [axis.get_title() for axis in panels(figure)] == ["2 → 2", "5 → 2", "5 → 5"]
    for axis in panels(figure):
        kept, shut = axis.collections
        assert kept.get_offsets().tolist() == [[11.0, 1.5], [7.5, 5.0]]  # x, y
        assert shut.get_offsets().tolist() == [[6.0, 7.0]]
        assert kept.get_array().tolist() == pytest.approx(keys[2].weight[0, 1:].tolist())
        assert axis.lines[0].get_xydata().tolist() == [[7, 5]]  # the query
        assert axis.get_xlim() == (-1, 15)
        assert axis.get_ylim() == (13, -1)


@pytest.mark.parametrize(
    ("offsets", "reach"),
    [
        ([(0.0, 0.0)], 8),
        ([(-20.0, 1.0), (20.0, 3.0)], 22),
        ([(torch.nan, 0.0), (1.0, 1.0)], 8),
        ([(1.0, 1.0)] * 99 + [(500.0, 0.0)], 8),
    ],
    ids=["near", "far", "nan", "one-far-out"],
)
def test_the_frame_holds_the_keys(pyplot, offsets, reach):
    figure = figures.draw_keys(pyplot, scene(80), {1: sampled(*offsets)})
    (axis,) = panels(figure)
    assert axis.get_xlim()[1] == pytest.approx(7 + reach)
    assert axis.get_ylim()[0] == pytest.approx(5 + reach)


def test_shares_are_cells(pyplot):
    kept = [
        {"position": 3, "layer": 3, "share": 1.0},
        {"position": 9, "layer": 3, "share": 0.25},
        {"position": 9, "layer": 9, "share": 0.5},
    ]
    axis = figures.draw_kept(pyplot, kept).axes[0]
    cells = {text.get_position(): text.get_text() for text in axis.texts}
    assert cells == {(0, 0): "100", (0, 1): "25", (1, 1): "50"}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["3", "9"]


@pytest.mark.parametrize("scale", [1, 2])
def test_the_window_is_framed_on_every_picture(pyplot, scale):
    given = scene(scale=scale)
    channels = given.task.channels
    restored = torch.rand(channels, 24 * scale, 24 * scale)
    found = torch.rand(channels, 24, 24)
    figure = figures.draw_attribution(pyplot, given, restored, found)
    wanted = [(6, 4, scale), (6 * scale, 4 * scale, 1), (6, 4, scale)]
    for axis, (x, y, factor) in zip(figure.axes, wanted, strict=False):
        (frame,) = axis.patches
        assert frame.get_xy() == (x - 0.5, y - 0.5)
        assert frame.get_width() == frame.get_height() == 8 / factor
    assert f"{diffusion_index(found):.2f}" in figure.get_suptitle()
    heat = figure.axes[2].images[1].get_array()
    strength = found.sum(0)
    torch.testing.assert_close(torch.as_tensor(heat) ** 2, strength / strength.max())


def test_branches_are_a_curve(pyplot):
    axis = figures.draw_branches(pyplot, [0.5, 0.6, 0.45]).axes[0]
    assert axis.lines[0].get_xydata().tolist() == [[1, 0.5], [2, 0.6], [3, 0.45]]
