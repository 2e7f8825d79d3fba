"""Sets found by name, and batches that depend on (seed, step) alone."""

from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from acla.config import Task
from acla.data import datasets
from acla.data.datasets import (
    SAMPLE,
    UNKNOWN_MEMORY,
    PatchSampler,
    Pictures,
    augment,
    cut_window,
    find_set,
    match_stems,
    quarter_of_memory,
    split_every,
    training_sets,
)
from acla.data.degradations import mosaic, pair, patch_offset
from acla.data.image import from_levels, luma, round_8bit
from acla.errors import DataError, PictureError, UsageError

TASKS = [Task("sr", 2), Task("sr", 3), Task("denoise", 30), Task("car", 10), Task("demosaic", 0)]


def write_pictures(folder: Path, *names: str, size: tuple[int, int] = (6, 4)) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", size, (10, 20, 30)).save(folder / name)


@pytest.fixture
def pictures(tmp_path, make_scene):
    """Five pictures: two in colour, one gray, one small, one a pixel wide."""
    sizes = [(90, 120, 3), (130, 100, 3), (101, 95, 1), (11, 30, 3), (64, 1, 3)]
    for i, (height, width, channels) in enumerate(sizes):
        Image.fromarray(make_scene(height, width, channels, i)).save(tmp_path / f"{i}.png")
    return Pictures(sorted(tmp_path.glob("*.png")))


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("Set5", "Set5"),
        ("benchmark/Set5", "Set5"),
        ("train/BSD400", "BSD400"),
        ("benchmark/Set5/HR", "Set5"),
        ("Set5/GTmod12", "Set5"),
        ("DIV2K/DIV2K_train_HR", "DIV2K"),
    ],
)
def test_every_layout_is_found(tmp_path, folder, name):
    write_pictures(tmp_path / folder, "b.PNG", "a.jpg", "c.BMP", "d.Tiff", ".hidden.png")
    (tmp_path / folder / "notes.txt").write_text("no picture")
    found = find_set(name, tmp_path)
    assert [path.name for path in found] == ["a.jpg", "b.PNG", "c.BMP", "d.Tiff"]


def test_missing_set_shows_expected_found_and_fix(tmp_path):
    write_pictures(tmp_path / "benchmark" / "Set14", "a.png")
    (tmp_path / "Set5").mkdir()
    with pytest.raises(DataError) as error:
        find_set("Set5", tmp_path)
    text = str(error.value)
    assert f"{tmp_path}/benchmark/Set5/HR/*.png" in text
    assert f"{tmp_path}/Set5 holds no picture" in text
    assert "sets: Set14" in text
    assert "--data DIR or the variable ACLA_DATA" in text


def test_missing_root_is_reported(tmp_path):
    with pytest.raises(DataError, match="only 'sample' is built in"):
        find_set("Set5", None)
    with pytest.raises(DataError, match="none is no folder"):
        find_set("Set5", tmp_path / "none")


def test_sample_is_natural_disjoint_and_offline(monkeypatch):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_: pytest.fail("no download"))
    splits = {name: find_set("sample", None, name) for name in SAMPLE}
    files = [path for paths in splits.values() for path in paths]
    assert len(set(files)) == len(files)
    assert all(path.parent == Path(skimage.data_dir) for path in files)
    assert find_set("sample", None) == splits["test"]
    assert len(Pictures(splits["val"])[0]) == 1  # coins are gray
    with pytest.raises(UsageError, match="known: train, val, test"):
        find_set("sample", None, "training")
    holders = [n for n, paths in splits.items() if any("motorcycle" in p.name for p in paths)]
    assert holders == ["train"]


def test_splits_are_disjoint_and_stable():
    paths = [Path(f"{i:03}.png") for i in range(43)]
    for nth, count in ((10, 4), (5, 8)):
        rest, apart = split_every(paths[::-1], nth)
        assert len(apart) == count
        assert sorted(rest + apart) == paths
        assert split_every(paths, nth) == (rest, apart)
    assert split_every(paths[:3], 10) == (paths[:2], paths[2:3])
    with pytest.raises(DataError, match="--val-set"):
        split_every(paths[:1], 10)


def test_training_sets(tmp_path):
    write_pictures(tmp_path / "train" / "T", *(f"{i}.png" for i in range(10)))
    write_pictures(tmp_path / "V", "v.png")
    training, validation = training_sets("T", None, tmp_path)
    assert (len(training), [path.name for path in validation["T"]]) == (9, ["9.png"])
    write_pictures(tmp_path / "W", "w.png", "x.png")
    training, validation = training_sets("T", "V,W", tmp_path)
    assert (len(training), list(validation)) == (10, ["V", "W"])
    assert [path.name for path in validation["W"]] == ["w.png", "x.png"]
    training, validation = training_sets("sample", None, None)
    assert validation == {"sample": find_set("sample", None, "val")}
    with pytest.raises(DataError, match="set 'X' was not found"):
        training_sets("T", "V,X", tmp_path)


def test_pictures_stay_within_memory(tmp_path):
    write_pictures(tmp_path, *(f"{i}.png" for i in range(5)), size=(10, 10))  # 300 bytes each
    held = Pictures(sorted(tmp_path.iterdir()), memory=700)
    for i in (0, 1, 0, 2, 3, 4, 4):
        assert held[i].shape == (3, 10, 10)
        assert held.used == sum(levels.nbytes for levels in held.kept.values()) <= 700
    assert list(held.kept) == [3, 4]
    assert Pictures(held.paths, memory=100)[0].shape == (3, 10, 10)


def test_memory_is_bounded_where_the_system_does_not_report_its_size(monkeypatch):
    assert quarter_of_memory() > 0
    monkeypatch.delattr("os.sysconf")
    assert quarter_of_memory() == UNKNOWN_MEMORY // 4


def test_unreadable_picture_is_named(tmp_path):
    write_pictures(tmp_path, "a.png")
    (tmp_path / "b.png").write_bytes(b"")
    held = Pictures(sorted(tmp_path.iterdir()))
    assert len(held) == 2
    with pytest.raises(PictureError, match=r"b\.png"):
        held[1]
    with pytest.raises(DataError):
        Pictures([])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_batch_is_a_function_of_seed_and_step(pictures, task):
    sampler = PatchSampler(pictures, task, patch=12, batch=6, seed=7)
    first = sampler.batch(3)
    for step in range(3):
        sampler.batch(step)
    again = PatchSampler(Pictures(pictures.paths), task, 12, 6, seed=7).batch(3)
    for a, b, c in zip(first, sampler.batch(3), again, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
    assert first[0].shape == (6, task.channels, 12, 12)
    assert first[1].shape == (6, task.channels, 12 * task.scale, 12 * task.scale)
    assert first[0].dtype == first[1].dtype == torch.float32
    other = PatchSampler(pictures, task, 12, 6, seed=8).batch(3)
    assert not torch.equal(first[0], other[0])
    assert not torch.equal(first[0], sampler.batch(4)[0])


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_processes_share_one_batch(pictures, task):
    whole = PatchSampler(pictures, task, 10, 6, seed=1).batch(5)
    for world in (2, 3):
        parts = [
            PatchSampler(pictures, task, 10, 6, 1, rank, world).batch(5) for rank in range(world)
        ]
        for i in range(2):
            assert torch.equal(whole[i], torch.cat([part[i] for part in parts]))


def test_the_pictures_of_a_step_are_named(tmp_path):
    for i in range(5):
        Image.new("L", (20, 20), 40 * i).save(tmp_path / f"{i}.png")
    paths = sorted(tmp_path.iterdir())
    sampler = PatchSampler(Pictures(paths), Task("demosaic", 0), 4, 6, seed=3, rank=1, world=2)
    whole = PatchSampler(Pictures(paths), Task("demosaic", 0), 4, 6, seed=3)
    for step in (0, 7):
        levels = [int(t.max() * 255 + 0.5) // 40 for t in whole.batch(step)[1]]
        assert sampler.names(step) == [f"{level}.png" for level in levels]


def test_each_pass_takes_every_picture_once(tmp_path):
    for i in range(5):
        Image.new("L", (20, 20), 40 * i).save(tmp_path / f"{i}.png")
    sampler = PatchSampler(Pictures(sorted(tmp_path.iterdir())), Task("demosaic", 0), 4, 2, seed=3)
    levels = [int(t.max() * 255 + 0.5) // 40 for step in range(10) for t in sampler.batch(step)[1]]
    walks = [levels[i : i + 5] for i in range(0, 20, 5)]
    assert all(sorted(walk) == [0, 1, 2, 3, 4] for walk in walks)
    assert len({tuple(walk) for walk in walks}) > 1


@pytest.mark.parametrize("task", [t for t in TASKS if t.name != "denoise"], ids=str)
def test_patch_is_degraded_like_the_whole_picture(pictures, monkeypatch, task):
    y, x = 24, 48  # on the grids of JPEG blocks, Bayer cells and both scales
    monkeypatch.setattr(datasets, "augment", lambda picture, which: picture)
    monkeypatch.setattr(
        datasets, "cut_window", lambda p, side, rng: p[:, y : y + side, x : x + side]
    )
    one = Pictures(pictures.paths[:1])
    clean = from_levels(one[0])
    whole, truth = pair(clean, task)
    patch, s = 8, task.scale
    low, target = PatchSampler(one, task, patch, 4).batch(0)
    reach = {"sr": [(2, 2)], "demosaic": [(0, 0)]}
    phases = reach.get(task.name, [(i, j) for i in range(8) for j in range(8)])
    for i in range(4):
        spots = [(y // s + dy, x // s + dx) for dy, dx in phases]
        found = [
            (a, b)
            for a, b in spots
            if torch.equal(target[i], truth[:, a * s : (a + patch) * s, b * s : (b + patch) * s])
        ]
        assert len(found) == 1
        a, b = found[0]
        assert torch.equal(low[i], whole[:, a : a + patch, b : b + patch])


def test_every_jpeg_phase_occurs():
    rng = np.random.default_rng(0)
    assert len({patch_offset(Task("car", 10), rng, 1) for _ in range(2000)}) == 64
    assert len({patch_offset(Task("car", 10), rng, 3) for _ in range(4000)}) == 256
    assert {patch_offset(Task("sr", 4), rng, 3) for _ in range(20)} == {(2, 2)}


def test_augmentation_happens_before_degradation(pictures):
    sampler = PatchSampler(pictures, Task("demosaic", 0), 9, 40)
    low, target = sampler.batch(0)
    assert torch.equal(low, mosaic(target))  # GRBG from the top left, whatever the rotation


def test_eight_augmentations_differ():
    picture = np.arange(24).reshape(2, 3, 4)
    square = np.arange(18).reshape(2, 3, 3)
    assert len({augment(square, which).tobytes() for which in range(8)}) == 8
    assert augment(picture, 1).shape == (2, 4, 3)
    assert np.array_equal(augment(picture, 0), picture)


def test_small_pictures_are_mirrored():
    line = np.arange(3, dtype=np.uint8).reshape(1, 1, 3)
    window = cut_window(line, 7, np.random.default_rng(0))
    assert window[0].tolist() == [[0, 1, 2, 2, 1, 0, 0]] * 7


def test_noise_level_and_car_input(pictures):
    low, target = PatchSampler(pictures, Task("denoise", 30), 32, 16).batch(0)
    assert (low - target).std().item() * 255 == pytest.approx(30, rel=0.03)
    low, target = PatchSampler(pictures, Task("car", 10), 16, 8).batch(0)
    assert torch.equal(target, round_8bit(target))
    assert torch.equal(low, round_8bit(low))


@pytest.mark.parametrize("task", [Task("denoise", 30), Task("car", 5, 60)], ids=str)
def test_every_patch_of_every_step_is_degraded_in_its_own_way(tmp_path, task):
    # All windows of a picture with the period of a JPEG block that is cut at one phase are equal
    tile = np.random.default_rng(0).integers(0, 256, (1, 1), dtype=np.uint8)
    tile = np.kron(np.indices((8, 8)).sum(0) % 2, tile).astype(np.uint8)
    Image.fromarray(np.tile(tile, (6, 6))).save(tmp_path / "a.png")
    sampler = PatchSampler(Pictures([tmp_path / "a.png"]), task, 16, 4, channels=1)
    lows = torch.cat([sampler.batch(step)[0] for step in range(3)])
    assert len({low.numpy().tobytes() for low in lows}) == 12


def test_gray_network_and_negative_seed(pictures):
    one = Pictures(pictures.paths[:1])
    _, target = PatchSampler(one, Task("sr", 2), 8, 2, seed=-1, channels=1).batch(0)
    assert target.shape == (2, 1, 16, 16)
    lumas = luma(from_levels(one[0]))
    assert target.min() >= lumas.min()
    assert target.max() <= lumas.max()


def test_predictions_match_by_stem(tmp_path):
    originals = [Path("img_1.png"), Path("img_10.png"), Path("baby.bmp")]
    write_pictures(
        tmp_path, "img_1_x2.png", "img_10_x2.png", "baby.png", "baby_x4.png", "extra.png"
    )
    found = match_stems(originals, tmp_path)
    assert [found[path].name for path in originals] == ["img_1_x2.png", "img_10_x2.png", "baby.png"]


def test_missing_and_ambiguous_predictions_are_named(tmp_path):
    write_pictures(tmp_path, "a_x2.png", "a_x3.png")
    with pytest.raises(DataError, match=r"no prediction for b\.png \(of 2 pictures"):
        match_stems([Path("a.png"), Path("b.png")], tmp_path)
    with pytest.raises(DataError, match=r"more than one .* a\.png \(a_x2\.png, a_x3\.png\)"):
        match_stems([Path("a.png")], tmp_path)
