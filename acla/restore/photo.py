"""A photo file with everything it carries: depth, alpha, EXIF, ICC profile, JPEG quality.

Levels stay as they were decoded, uint8 or uint16 [H, W, C], upright.
"""

import dataclasses
import functools
import io
import math
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image, ImageOps

from acla.data import image
from acla.data.deep_colour import EXIF, descriptive, encode_deep, is_deep_colour, read_deep
from acla.data.jpeg import END, Cells, Plane, decode_cells, steps_of
from acla.errors import PictureError, one_line
from acla.files import write_atomically
from acla.restore.metadata import LONGEST, fitting, note_options, read_notes

ORIENTATION = ExifTags.Base.Orientation
JPEG_BEGIN = b"\xff\xd8\xff"
# Formats of photos; others of Pillow's readers start programs (EPS) or draw (WMF)
READABLE = ("PNG", "BMP", "DIB", "TIFF", "JPEG", "GIF", "WEBP", "PPM")
FRAMES = "several frames: the first is restored"
READ_SUFFIXES = {end for end, kind in Image.registered_extensions().items() if kind in READABLE}


@dataclass
class Photo:
    """levels: [H, W, 1] gray, or [H, W, 3] RGB or, where `ycc`, a JPEG's own Y, Cb, Cr; alpha
    [H, W] of the same type; exif and icc: bytes, empty without; notices: what did not survive;
    notes: XMP, IPTC, comments and texts (`read_notes`); quality: of the JPEG it may become."""

    levels: np.ndarray
    ycc: bool = False
    alpha: np.ndarray | None = None
    exif: bytes = b""
    icc: bytes = b""
    dpi: tuple[float, float] | None = None
    notices: list[str] = field(default_factory=list)
    notes: list[tuple[str, bytes]] = field(default_factory=list)
    quality: int = 95


# Reading


@functools.cache
def luma_tables() -> np.ndarray:
    """The luma quantisation tables of qualities 1..100 (IJG), logarithms [100, 64], read from files
    that Pillow writes."""
    tables = []
    for quality in range(1, 101):
        file = io.BytesIO()
        Image.new("L", (8, 8)).save(file, "JPEG", quality=quality)
        with Image.open(file) as picture:
            tables.append(picture.quantization[0])
    return np.log(np.array(tables, np.float64))


def jpeg_quality(path: Path) -> int | None:
    """The quality 1..100 whose luma quantisation table is nearest to a JPEG's, None for other
    formats.

    Exact for IJG's encoders; for others least squares over the logarithms. Raises PictureError.
    """
    with image.opened(path, READABLE) as picture:
        steps = steps_of(picture)
        if steps is None:
            return None
        table = np.log(steps.reshape(-1).astype(np.float64))
        return int(((luma_tables() - table) ** 2).sum(1).argmin()) + 1


def in_colour(path: Path) -> bool:
    """Whether a photo has colour. Raises PictureError."""
    with image.opened(path, READABLE) as picture:
        return picture.mode not in image.GRAY_MODES and picture.mode[0] not in "IF"


def read(path: Path, ycc: bool = False) -> Photo:
    """Read a photo, turned as its EXIF orientation says; the EXIF then says that it is upright.

    ycc: keep the Y, Cb, Cr that a colour JPEG holds, chroma at full resolution. Palettes and CMYK
    become RGB; of several frames the first is read. A JPEG that ends early is read as far as it
    goes. Raises PictureError, which names the file.
    """
    try:
        return read_whole(path, ycc)
    except PictureError as error:
        data = path.read_bytes() if path.is_file() else b""
        if not data.startswith(JPEG_BEGIN):
            raise
        try:
            own = read_whole(path, ycc, data + END)
        except PictureError:
            raise error from None
        own.notices.append("the file ends early: what is missing is gray, or as decoded so far")
        return own


def read_whole(path: Path, ycc: bool, data: bytes | None = None) -> Photo:
    """`read` of a file that is whole, or of its bytes, made whole."""
    with image.opened(path, READABLE, data) as picture:
        notices: list[str] = []
        if getattr(picture, "is_animated", False):
            notices.append(FRAMES)
        ycc = ycc and stores_ycc(picture)
        if ycc:
            picture.draft("YCbCr", None)
        exif, orientation = read_exif(picture, notices)
        icc = picture.info.get("icc_profile") or b""
        dpi = read_dpi(picture)
        if is_deep_colour(picture, path):
            levels, alpha = read_deep(picture, path)
            if orientation != 1:
                levels = np.dstack([turned(p, orientation) for p in np.moveaxis(levels, 2, 0)])
                alpha = None if alpha is None else turned(alpha, orientation)
            return Photo(levels, False, alpha, exif, icc, dpi, notices, read_notes(picture))
        picture.load()  # a TIFF is turned here, and loses its orientation
        notes = read_notes(picture)
        if orientation > 1 and picture.getexif().get(ORIENTATION) == orientation:
            picture = ImageOps.exif_transpose(picture)
        if picture.mode == "CMYK":
            notices.append("CMYK becomes RGB" + (", without its ICC profile" if icc else ""))
            icc = b""
        if ycc:
            return Photo(np.asarray(picture), True, None, exif, icc, dpi, notices, notes)
        alpha = None
        if picture.has_transparency_data:
            if picture.mode.startswith("I"):
                notices.append("one transparent gray level is not kept")
            else:
                gray = picture.mode in image.GRAY_MODES
                picture = picture.convert("LA" if gray else "RGBA")
                alpha = np.asarray(picture.getchannel("A"))
        levels = image.to_array(picture, path)
    return Photo(np.atleast_3d(levels), False, alpha, exif, icc, dpi, notices, notes)


def has_cells(path: Path) -> bool:
    """Whether a file is a JPEG that holds Y at full size. Raises PictureError."""
    with image.opened(path, READABLE) as picture:
        if not (steps_of(picture) is not None and (picture.mode == "L" or stores_ycc(picture))):
            return False
        sampling = np.array([layer[1:3] for layer in picture.layer])
        return bool((sampling[0] >= sampling).all())


def read_cells(path: Path) -> Cells | None:
    """The cells of a JPEG's Y, Cb, Cr, turned as `read` turns it.

    Y alone where those of chroma are not known; None where `has_cells` denies those of Y. Raises
    PictureError.
    """
    if not has_cells(path):
        return None
    with image.opened(path, READABLE) as picture:
        _, orientation = read_exif(picture, [])
        size = picture.height, picture.width
        cells = decode_cells(path, path.read_bytes())
    down, across = np.subtract(cells.planes[0].levels.shape, size)
    top = {3: down, 4: down, 7: across, 8: across}.get(orientation, 0)
    left = {2: across, 3: across, 6: down, 7: down}.get(orientation, 0)
    planes = [
        Plane(turned(p.levels, orientation), p.steps.T if orientation > 4 else p.steps)
        for p in cells.planes
    ]
    return Cells(planes, int(top), int(left), cells.ratio)


def stores_ycc(picture: Image.Image) -> bool:
    """Whether a file is a JPEG that holds Y, Cb, Cr (and not gray, CMYK or RGB)."""
    if picture.format not in ("JPEG", "MPO") or picture.mode not in ("RGB", "YCbCr"):
        return False
    if "jfif" in picture.info:
        return True
    if "adobe_transform" in picture.info:
        return picture.info["adobe_transform"] != 0
    return bytes(layer[0] for layer in picture.layer) != b"RGB"


def read_exif(picture: Image.Image, notices: list[str]) -> tuple[bytes, int]:
    """(EXIF for the upright picture, the orientation 1..8 of the stored one).

    An upright picture's EXIF is passed on to the byte, but for a TIFF's, which is mixed with its
    layout. Broken EXIF is dropped, with a notice.
    """
    if picture.format == "PNG":
        picture.load()  # getexif does, and what is damaged is no matter of EXIF
    try:
        stored = picture.getexif()
        orientation = stored.get(ORIENTATION, 1)
        orientation = orientation if orientation in range(2, 9) else 1
        if picture.format == "TIFF":
            kept = Image.Exif()
            kept.update(descriptive(stored))
            return (kept.tobytes() if len(kept) else b""), orientation
        raw = picture.info.get("exif") or (stored.tobytes() if len(stored) else b"")
        if orientation > 1:
            upright = Image.Exif()
            upright.load(raw)
            upright[ORIENTATION] = 1
            raw = upright.tobytes()
        return (raw if not raw or raw.startswith(EXIF) else EXIF + raw), orientation
    except image.BROKEN:
        notices.append("EXIF that cannot be read is dropped")
        return b"", 1


def read_dpi(picture: Image.Image) -> tuple[float, float] | None:
    """Pixels per inch, if they are numbers that every format can hold."""
    try:
        across, down = (float(value) for value in picture.info["dpi"])
    except image.BROKEN:
        return None
    sound = all(math.isfinite(value) and 1 <= value < 65535 for value in (across, down))
    return (across, down) if sound else None


def turned(plane: np.ndarray, orientation: int) -> np.ndarray:
    """A plane [H, W] turned upright from an EXIF orientation 1..8."""
    picture = Image.fromarray(plane)
    picture.getexif()[ORIENTATION] = orientation
    return np.asarray(ImageOps.exif_transpose(picture))


# Enlarging chroma and alpha


def resized(photo: Photo, scale: int) -> Photo:
    """The photo `scale` times larger by Pillow's bicubic, with the new size in its EXIF."""
    if scale == 1:
        return photo
    planes = [enlarged(plane, scale) for plane in np.moveaxis(photo.levels, 2, 0)]
    alpha = None if photo.alpha is None else enlarged(photo.alpha, scale)
    notices = [*photo.notices]
    levels = np.stack(planes, 2)
    exif = sized_exif(photo.exif, levels.shape[1], levels.shape[0], notices)
    return dataclasses.replace(photo, levels=levels, alpha=alpha, exif=exif, notices=notices)


def enlarged(plane: np.ndarray, scale: int) -> np.ndarray:
    """Levels [H, W], uint8 or uint16, enlarged by Pillow's bicubic."""
    height, width = plane.shape
    size = (width * scale, height * scale)
    if plane.dtype == np.uint8:
        return np.asarray(Image.fromarray(plane).resize(size, Image.Resampling.BICUBIC))
    larger = Image.fromarray(plane.astype(np.float32)).resize(size, Image.Resampling.BICUBIC)
    return np.asarray(larger).round().clip(0, 65535).astype(np.uint16)


def sized_exif(exif: bytes, width: int, height: int, notices: list[str]) -> bytes:
    """EXIF with the given picture size, where it holds a size."""
    try:
        data = Image.Exif()
        data.load(exif)
        part = data.get_ifd(ExifTags.IFD.Exif)
        sizes = {ExifTags.Base.ExifImageWidth: width, ExifTags.Base.ExifImageHeight: height}
        if not part.keys() & sizes.keys():
            return exif
        part.update({tag: size for tag, size in sizes.items() if tag in part})
        return data.tobytes()
    except image.BROKEN:
        notices.append("EXIF that cannot be read is passed on with the old size")
        return exif


# Writing


def copy(source: Path, path: Path) -> Photo:
    """Write a photo as it is: to the byte where the suffix names its own format, else by `save`.

    Raises PictureError for what is no whole picture, or cannot be written.
    """
    own = read(source)
    with image.opened(source, READABLE) as picture:
        kind = "JPEG" if picture.format == "MPO" else picture.format
        if kind == "TIFF" and picture.mode.startswith("I"):
            kind = None  # 12 bits, or white as 0, which many programs misread
    if kind == image.FORMATS.get(path.suffix.lower()):
        own.notices.clear()
        write_atomically(path, source.read_bytes())
    else:
        save(own, path)
    return own


def in_8_bits(levels: np.ndarray) -> np.ndarray:
    """Levels uint8 as they are, and uint16 rounded to uint8."""
    if levels.dtype == np.uint8:
        return levels
    return ((levels.astype(np.uint32) + 128) // 257).astype(np.uint8)


def save(photo: Photo, path: Path) -> None:
    """Write a photo whole or not at all, in the format that the suffix names.

    A photo in `ycc` can become a JPEG alone. What the format cannot hold is dropped, with a notice
    in the photo's list. Raises PictureError, which names the file.
    """
    kind = image.format_of(path)
    levels, alpha = photo.levels, photo.alpha
    if kind in ("JPEG", "BMP"):
        if alpha is not None:
            photo.notices.append(f"{kind} holds no alpha here: it is dropped")
            alpha = None
        if levels.dtype == np.uint16:
            photo.notices.append(f"{kind} holds 8 bits: the other 8 are rounded away")
            levels = in_8_bits(levels)
    deep = levels.dtype == np.uint16 and (levels.shape[2] == 3 or alpha is not None)
    options, lost = note_options(photo.notes, "" if deep else kind)
    if lost:
        photo.notices.append(f"not kept in this {kind}: {', '.join(lost)}")
    if deep:
        try:
            data = encode_deep(path, levels, alpha, photo.exif, photo.icc, photo.dpi)
            write_atomically(path, data)
        except image.BROKEN as error:
            raise PictureError(f"{path}: cannot be written ({one_line(error)})") from error
        return
    options |= {"dpi": photo.dpi} if photo.dpi else {}
    if kind == "BMP" and (photo.exif or photo.icc):
        photo.notices.append("BMP is written without EXIF and ICC profile here")
    elif kind != "BMP":
        exif = fitting_exif(photo) if kind == "JPEG" else photo.exif
        options |= {"exif": exif} if exif else {}
        options |= {"icc_profile": photo.icc} if photo.icc else {}
    if kind == "JPEG":  # 4:4:4: no second loss of colour
        options |= {"quality": photo.quality, "subsampling": 0}
    image.write(to_pillow(levels, photo.ycc, alpha), path, **options)


def fitting_exif(photo: Photo) -> bytes:
    """A photo's EXIF, or as much of it as a JPEG holds, with a notice in the photo's list."""
    if len(photo.exif) <= LONGEST:
        return photo.exif
    photo.notices.append(
        f"{len(photo.exif)} bytes of EXIF are too long for a JPEG: what fits is kept"
    )
    try:
        return fitting(photo.exif)
    except image.BROKEN:
        return b""


def to_pillow(levels: np.ndarray, ycc: bool, alpha: np.ndarray | None) -> Image.Image:
    """A Pillow picture of levels [H, W, 1 or 3] and alpha [H, W]."""
    if levels.shape[2] == 1:
        picture = Image.fromarray(levels[:, :, 0])
    else:
        size = levels.shape[1::-1]
        mode = "YCbCr" if ycc else "RGB"
        picture = Image.frombuffer(mode, size, np.ascontiguousarray(levels), "raw", mode, 0, 1)
    if alpha is not None:
        picture.putalpha(Image.fromarray(alpha))
    return picture
