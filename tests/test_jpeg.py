"""What a JPEG's own file says of its photo, and answers that are kept to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from restoring import CAR, call, write_network
from scipy.fft import dctn

from acla.data.jpeg import TRUST, WIDEST, LumaCells, decoded_levels, project, projected
from acla.restore import photo

ORIENTATION = 0x0112


def jpeg(path: Path, levels: np.ndarray, **options: object) -> Path:
    Image.fromarray(levels).save(path, "JPEG", **options)
    return path


def luma(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.atleast_3d(picture.convert("L" if picture.mode == "L" else "YCbCr"))[:, :, 0]


def blocks(y: np.ndarray) -> np.ndarray:
    """Coefficients of the whole blocks of Y [H, W], by another road than the module's."""
    rows = range(0, len(y) - 7, 8)
    columns = range(0, y.shape[1] - 7, 8)
    cut = [[y[i : i + 8, j : j + 8] - 128.0 for j in columns] for i in rows]
    return np.array([[dctn(block, norm="ortho") for block in row] for row in cut])


@pytest.mark.parametrize("progressive", [False, True], ids=["baseline", "progressive"])
@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("size", [(45, 61), (16, 24), (1, 1), (8, 9), (33, 17)], ids=str)
def test_every_block_is_known_beyond_the_edges(
    tmp_path, make_scene, size, subsampling, progressive
):
    options = {"quality": 40, "subsampling": subsampling, "progressive": progressive}
    path = jpeg(tmp_path / "a.jpg", make_scene(*size) // 2 + 60, **options)
    own, cells = photo.read(path, ycc=True), photo.read_cells(path)
    assert np.array_equal(cells.y[: size[0], : size[1]], own.levels[:, :, 0])
    assert cells.y.shape == tuple(-(-side // 8) * 8 for side in size)
    # Coefficients are multiples of the steps but for the rounding of pixels
    coefficients = blocks(cells.y.astype(float))
    apart = coefficients - cells.steps * np.rint(coefficients / cells.steps)
    assert np.abs(apart).max() < 4.1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("rows", [1, 5, 8, 100])
def test_a_turned_photo_is_projected_as_the_upright_one(tmp_path, make_scene, orientation, rows):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    levels = make_scene(45, 61)
    plain = jpeg(tmp_path / "a.jpg", levels, quality=20)
    path = jpeg(tmp_path / "b.jpg", levels, quality=20, exif=exif)
    noise = np.random.default_rng(0).normal(0, 30, levels.shape[:2]).astype(np.float32)

    def answer(path: Path, noise: np.ndarray) -> np.ndarray:
        y = photo.read(path, ycc=True).levels[:, :, 0] + noise
        strips = torch.from_numpy(y / 255)[None].split(rows, 1)
        cells = photo.read_cells(path)
        return torch.cat(list(projected(iter(strips), cells, len(y))), 1)[0].numpy()

    wanted = photo.turned(answer(plain, noise), orientation)
    assert np.allclose(answer(path, photo.turned(noise, orientation)), wanted, atol=1e-5)


@pytest.mark.parametrize("quality", [10, 75, 95])
def test_an_answer_is_moved_into_its_cells_and_no_further(tmp_path, make_scene, quality):
    clean = make_scene(40, 56, 1) // 2 + 60
    cells = photo.read_cells(jpeg(tmp_path / "a.jpg", clean, quality=quality))
    noise = np.random.default_rng(0).normal(0, 40, clean.shape)
    inside = project((clean + noise).astype(np.float32), cells)
    levels = np.rint(blocks(cells.y.astype(float)) / cells.steps)
    assert np.abs(blocks(inside) / cells.steps - levels).max() < WIDEST / 2 + 1e-3
    assert np.allclose(project(inside, cells), inside, atol=1e-3)
    near = inside.copy()
    near[:8, :8] += noise[:8, :8]
    assert np.array_equal(project(near, cells)[8:], project(inside, cells)[8:])


@pytest.mark.parametrize("distance", [0.1, 1.0, 30.0])
def test_the_further_an_answer_lies_the_less_it_moves(distance):
    y, steps = np.full((24, 24), 88, np.uint8), np.full((8, 8), 16, np.float32)
    y[8:16, 8:16] = 90  # not flat
    cells = LumaCells(y, steps)
    middle = project(y.astype(np.float32), cells)
    moved = project(middle + 2 * distance, cells) - middle  # the mean of a block: steps / 8
    # Distance is over 64 coefficients, of which one is moved
    width = min(WIDEST, TRUST * 8 / distance)
    assert np.allclose(moved, 2 * min(distance, width / 2), atol=1e-3)


def test_clipped_pixels_still_give_the_levels(tmp_path):
    """Where decoding went beyond white or black, the levels are found behind the clipped pixels."""
    clean = np.full((40, 56), 255, np.uint8)
    clean[11:14, 4:50] = clean[:, 20:23] = 40
    clean[19:22, 30:] = 120
    cells = photo.read_cells(jpeg(tmp_path / "a.jpg", clean, quality=60))
    wanted = np.rint(blocks(clean.astype(float)) / cells.steps)
    nearest = np.rint(blocks(cells.y.astype(float)) / cells.steps)
    wrong = (decoded_levels(cells.y, cells.steps) != wanted).sum()
    assert wrong < (nearest != wanted).sum() / 3


@pytest.mark.parametrize("level", [0, 90, 255])
def test_a_flat_area_stays_as_it_is(tmp_path, level):
    file = write_network(tmp_path / "car.safetensors", CAR, shift=-3 / 255 if level else 3 / 255)
    page = np.full((61, 70), level, np.uint8)
    page[:20, :20] = np.random.default_rng(0).integers(0, 255, (20, 20))
    path = jpeg(tmp_path / "a.jpg", page, quality=10)
    call(path, tmp_path / "b.png", "--checkpoint", file)
    assert (luma(tmp_path / "b.png")[32:, 32:] == luma(path)[32:, 32:]).all()
    assert (luma(tmp_path / "b.png")[:16, :16] != luma(path)[:16, :16]).mean() > 0.3


@pytest.mark.parametrize("quality", [10, 75, 95, 100])
@pytest.mark.parametrize("channels", [1, 3], ids=["gray", "420"])
def test_a_wrong_answer_goes_no_further_than_the_cells(tmp_path, make_scene, channels, quality):
    file = write_network(tmp_path / "car.safetensors", CAR, shift=60 / 255)
    path = jpeg(tmp_path / "a.jpg", make_scene(45, 61, channels) // 2 + 30, quality=quality)
    call(path, tmp_path / "out.png", "--checkpoint", file)
    moved = luma(tmp_path / "out.png").astype(int) - luma(path)
    most = photo.read_cells(path).steps[0, 0] / 8 * WIDEST / 2
    assert np.abs(moved[:40, :56].mean()) < most + 0.6
    for flags in (["--no-project"], ["--q", 99 if quality == 10 else 10]):
        call(path, tmp_path / "free.png", "--checkpoint", file, "--overwrite", *flags)
        free = luma(tmp_path / "free.png").astype(int) - luma(path)
        assert np.abs(free).mean() > 3 * np.abs(moved).mean()
