"""How far a batch of photos is: a bar over its pixels, and an estimate before it starts."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from acla.console import notice, plural, progress
from acla.data.image import opened
from acla.errors import AclaError
from acla.models.backbones import Backbone
from acla.restore.inference import TILE, default_tile, predict, tile_grid
from acla.restore.photo import READABLE

Sizes = dict[Path, tuple[int, int]]
BAR_FORMAT = (
    "{desc}: {percentage:3.0f}%|{bar}| {n:.1f}/{total:.1f} MP [{elapsed}<{remaining}, "
    "{rate_inv_fmt}]"
)
TIMED_SIDE = 128  # side, in pixels, of what a CPU is timed on


def sizes_of(paths: Iterable[Path], wanted: Callable[[Path], bool]) -> Sizes:
    """(height, width) of each photo that is `wanted`, as its file says, without what cannot be
    read."""
    sizes = {}
    for path in paths:
        try:
            if wanted(path):
                with opened(path, READABLE) as picture:
                    sizes[path] = picture.height, picture.width
        except (AclaError, OSError):
            continue  # restoring it says why
    return sizes


def digits(megapixels: float) -> int:
    """Decimals that so many megapixels are shown with."""
    return 1 if megapixels > 10 else 3


class PixelBar:
    """One bar over the megapixels of all photos, with seconds per megapixel and the time left."""

    def __init__(self, sizes: Sizes) -> None:
        self.megapixels = {path: height * width / 1e6 for path, (height, width) in sizes.items()}
        self.before = self.own = 0.0  # of the photos before this one, of this one
        total = sum(self.megapixels.values())
        options = {"total": total, "disable": total == 0, "unit": "MP", "leave": False}
        form = BAR_FORMAT.replace(".1f", f".{digits(total)}f")
        self.bar = progress(None, bar_format=form, smoothing=0, delay=1, **options)

    def begin(self, path: Path, label: str) -> None:
        """Go on with this photo."""
        self.own = self.megapixels.get(path, 0.0)
        self.bar.set_description_str(label, refresh=False)

    def advance(self, share: float) -> None:
        """This share, 0..1, of the photo is done; less than before where it had to begin anew."""
        if self.before == share == 0:  # reading the photo is no rate of its pixels
            self.bar.start_t = time.time()
        self.bar.update(self.before + share * self.own - self.bar.n)

    def end(self, restored: bool) -> None:
        """The photo is done; one that was not restored no longer counts."""
        if restored:
            self.before += self.own
        else:
            self.bar.total -= self.own
        self.bar.update(self.before - self.bar.n)


def announce(model: Backbone, sizes: Sizes, tile: int | None, ensemble: bool) -> None:
    """Announce how long photos of more than one tile take together, from the second of two calls
    on a gray one: of 128 × 128 pixels on a CPU, of a whole tile on a GPU, which small ones leave
    idle. tile: None for the default of each photo."""
    scale, total = model.config.scale, sum(height * width for height, width in sizes.values()) / 1e6
    if total * 1e6 <= TILE[scale] ** 2:
        return
    side = TIMED_SIDE if next(model.parameters()).device.type == "cpu" else tile or TILE[scale]
    gray = torch.full((model.config.channels, side, side), 0.5)
    with torch.no_grad():
        for _ in range(2):
            begun = time.perf_counter()
            predict(model, gray, ensemble)
            seconds = time.perf_counter() - begun
    pixels = 0
    for height, width in sizes.values():
        own = tile or default_tile(scale, height, width) or max(height, width)
        (rows, tops), (columns, lefts) = tile_grid(height, own), tile_grid(width, own)
        pixels += rows * len(tops) * columns * len(lefts)
    seconds *= pixels / side**2
    notice(
        f"{plural(len(sizes), 'picture')}, {total:.{digits(total)}f} megapixels: about "
        f"{duration(seconds)}, {seconds / total:.3g} s/MP"
    )


def duration(seconds: float) -> str:
    """40 s, 12 min, 3 h 05 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min"
