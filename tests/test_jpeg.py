"""What a JPEG's own file says of its photo, and answers that are kept to it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from restoring import CAR, call, tiny, write_network
from scipy.fft import dctn

from acla.data.jpeg import TRUST, WIDEST, Plane, decoded_levels, project, projected
from acla.models.serialization import save_model
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
    y = cells.planes[0].levels
    assert np.array_equal(y[: size[0], : size[1]], own.levels[:, :, 0])
    assert len(cells.planes) == (1 if subsampling == 1 else 3)
    side = 8 * cells.ratio
    assert y.shape == tuple(-(-length // side) * side for length in size)
    assert cells.ratio == (2 if subsampling == 2 else 1)
    for plane, whole in zip(cells.planes, (8, side, side), strict=False):
        height, width = (-(-length // whole) * whole for length in size)
        levels = plane.levels[:height, :width]
        assert plane.levels.shape == y.shape or plane.levels.shape == (height // 2, width // 2)
        # Coefficients are multiples of the steps but for the rounding of pixels
        coefficients = blocks(levels.astype(float))
        apart = coefficients - plane.steps * np.rint(coefficients / plane.steps)
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

    def answer(path: Path, noise: np.ndarray, count: int) -> np.ndarray:
        own = photo.read(path, ycc=True).levels[:, :, :count].transpose(2, 0, 1) + noise
        strips = torch.from_numpy(own / 255).split(rows, 1)
        cells = photo.read_cells(path)
        return torch.cat(list(projected(iter(strips), cells, own.shape[1])), 1).numpy()

    y = answer(plain, noise, 1)
    wanted = photo.turned(y[0], orientation)
    assert np.allclose(answer(path, photo.turned(noise, orientation), 1), wanted, atol=1e-5)
    planes = answer(path, photo.turned(noise, orientation), 3)
    assert np.array_equal(planes[:1], answer(path, photo.turned(noise, orientation), 1))
    for plane, own in zip(planes, answer(plain, noise, 3), strict=True):
        assert np.allclose(plane, photo.turned(own, orientation), atol=1 / 255)


@pytest.mark.parametrize("quality", [10, 75, 95])
def test_an_answer_is_moved_into_its_cells_and_no_further(tmp_path, make_scene, quality):
    clean = make_scene(40, 56, 1) // 2 + 60
    cells = photo.read_cells(jpeg(tmp_path / "a.jpg", clean, quality=quality))
    noise = np.random.default_rng(0).normal(0, 40, clean.shape)
    (plane,) = cells.planes
    inside = project((clean + noise).astype(np.float32), plane)
    levels = np.rint(blocks(plane.levels.astype(float)) / plane.steps)
    assert np.abs(blocks(inside) / plane.steps - levels).max() < WIDEST / 2 + 1e-3
    assert np.allclose(project(inside, plane), inside, atol=1e-3)
    near = inside.copy()
    near[:8, :8] += noise[:8, :8]
    assert np.array_equal(project(near, plane)[8:], project(inside, plane)[8:])


@pytest.mark.parametrize("distance", [0.1, 1.0, 30.0])
def test_the_further_an_answer_lies_the_less_it_moves(distance):
    y, steps = np.full((24, 24), 88, np.uint8), np.full((8, 8), 16, np.float32)
    y[8:16, 8:16] = 90  # not flat
    cells = Plane(y, steps)
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
    (plane,) = photo.read_cells(jpeg(tmp_path / "a.jpg", clean, quality=60)).planes
    wanted = np.rint(blocks(clean.astype(float)) / plane.steps)
    nearest = np.rint(blocks(plane.levels.astype(float)) / plane.steps)
    wrong = (decoded_levels(plane.levels, plane.steps) != wanted).sum()
    assert wrong < (nearest != wanted).sum() / 3


def test_steps_of_zero_are_no_trouble(tmp_path, make_scene):
    file = write_network(tmp_path / "car.safetensors", CAR)
    path = jpeg(tmp_path / "a.jpg", make_scene(40, 56, 1) // 2 + 60, quality=60)
    damaged = bytearray(path.read_bytes())
    at = damaged.index(b"\xff\xdb") + 6
    damaged[at : at + 3] = bytes(3)
    path.write_bytes(damaged)
    with np.errstate(all="raise"):
        call(path, tmp_path / "out.png", "--checkpoint", file)
    assert np.abs(luma(tmp_path / "out.png").astype(int) - luma(path)).max() <= 1


@pytest.mark.parametrize("stray", [b"\xff\xd0", b"\xff\xff\xff"], ids=["restart", "filling"])
def test_stray_markers_before_the_frame_hide_no_cells(tmp_path, make_scene, stray):
    path = jpeg(tmp_path / "a.jpg", make_scene(40, 56, 1), quality=60)
    expected = photo.read_cells(path).planes[0]
    data = path.read_bytes()
    path.write_bytes(data[:2] + stray + data[2:])
    plane = photo.read_cells(path).planes[0]
    np.testing.assert_array_equal(plane.levels, expected.levels)
    np.testing.assert_array_equal(plane.steps, expected.steps)


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
    most = photo.read_cells(path).planes[0].steps[0, 0] / 8 * WIDEST / 2
    assert np.abs(moved[:40, :56].mean()) < most + 0.6
    for flags in (["--no-project"], ["--q", 99 if quality == 10 else 10]):
        call(path, tmp_path / "free.png", "--checkpoint", file, "--overwrite", *flags)
        free = luma(tmp_path / "free.png").astype(int) - luma(path)
        assert np.abs(free).mean() > 3 * np.abs(moved).mean()


@pytest.fixture
def tinted(tmp_path) -> Path:
    """A network of colour that moves red up and blue down."""
    model = tiny(CAR, channels=3)
    model.tail[-1].bias.data = torch.tensor([10.0, 0.0, -10.0]) / 255
    save_model(tmp_path / "colour.safetensors", model, model.config, CAR, {})
    return tmp_path / "colour.safetensors"


def chroma(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture.convert("YCbCr"))[:, :, 1:].astype(int)


@pytest.mark.parametrize("subsampling", [0, 1, 2], ids=["444", "422", "420"])
@pytest.mark.parametrize("name", ["out.png", "out.jpg"])
def test_chroma_goes_no_further_than_its_cells(tmp_path, make_scene, tinted, subsampling, name):
    options = {"quality": 20, "subsampling": subsampling}
    path = jpeg(tmp_path / "a.jpg", make_scene(45, 61) // 3 + 80, **options)
    call(path, tmp_path / name, "--checkpoint", tinted)
    moved = (chroma(tmp_path / name) - chroma(path))[:32, :48].mean((0, 1))
    known = photo.read_cells(path).planes[1:]
    most = known[0].steps[0, 0] / 8 * WIDEST / 2 if known else 0
    assert np.abs(moved).max() < most + 0.6
    assert not known or np.abs(moved).max() > most / 2
    call(path, tmp_path / f"free-{name}", "--checkpoint", tinted, "--no-project")
    free = chroma(tmp_path / f"free-{name}") - chroma(path)
    assert np.abs(free.mean((0, 1))).min() > 4


def test_a_gray_jpeg_through_a_network_of_colour_stays_gray(tmp_path, make_scene, tinted):
    path = jpeg(tmp_path / "a.jpg", make_scene(45, 61, 1) // 3 + 80, quality=50)
    call(path, tmp_path / "out.png", "--checkpoint", tinted)
    assert photo.read(tmp_path / "out.png").levels.shape == (45, 61, 1)
    assert np.abs(luma(tmp_path / "out.png").astype(int) - luma(path)).max() <= 1
