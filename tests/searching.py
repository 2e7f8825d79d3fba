"""A small search on small pictures, for the tests of search.py."""

from pathlib import Path

import pytest
import torch

from acla.data.image import save

SMALL = ["--preset", "tiny", "--blocks", "3", "--width", "8", "--keys", "3", "--train-set", "few"]
SHORT = ["--batch-size", "2", "--patch-size", "16", "--steps", "8", "--epoch-steps", "2"]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Run in an empty folder, with a set `few` of ten pictures in another."""
    few = tmp_path / "data" / "few"
    few.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    for i in range(10):
        coarse = torch.rand(1, 3, 5, 5, generator=generator)
        save(torch.nn.functional.interpolate(coarse, size=40, mode="bilinear")[0], few / f"{i}.png")
    Path(tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("ACLA_DATA", str(tmp_path / "data"))
