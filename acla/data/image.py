"""File to tensor and back: the only door to 0..255.

Inside, a picture is float32 [C, H, W] in 0..1.
"""

import io
import os
import struct
import warnings
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from PIL.PngImagePlugin import putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2
from torch import Tensor

from acla.errors import PictureError

SUFFIXES = (".png", ".bmp", ".tif", ".tiff", ".jpg", ".jpeg")
FORMATS = {
    ".png": "PNG",
    ".bmp": "BMP",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
}
GRAY_MODES = ("1", "L", "LA", "La")
BROKEN = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    AttributeError,
    AssertionError,
    OverflowError,
    ZeroDivisionError,
    struct.error,
    zlib.error,
)
EXIF = b"Exif\0\0"  # what EXIF begins with in a JPEG
IO16 = "16 bits per channel in colour need the extra io16 (opencv-python-headless)"
ORIENTATION = 0x0112  # the EXIF tag
# What a TIFF's own table says about the photo and not about how the file stores it
DESCRIPTIVE = (
    ExifTags.Base.ImageDescription,
    ExifTags.Base.Make,
    ExifTags.Base.Model,
    ExifTags.Base.Software,
    ExifTags.Base.DateTime,
    ExifTags.Base.Artist,
    ExifTags.Base.Copyright,
)
PARTS = (ExifTags.IFD.Exif, ExifTags.IFD.GPSInfo)
LUMA = (65.481, 128.553, 24.966)


def load(path: str | Path) -> Tensor:
    """Read a picture as float32 [C, H, W] in 0..1.

    C is 1 for gray files (16-bit gray keeps its depth) and 3 for all others: palettes and CMYK
    become RGB, alpha is dropped. The pixels come as they are stored; an EXIF orientation is not
    applied. 16-bit colour needs the extra io16. Raises PictureError, which names the file, for
    anything that is not a whole picture.
    """
    with opened(path) as picture:
        if is_deep_colour(picture, path):
            levels, _ = read_deep(picture, path)
        else:
            levels = to_array(picture, path)
    return from_levels(np.atleast_3d(levels).transpose(2, 0, 1))


@contextmanager
def opened(path: str | Path, formats: tuple[str, ...] | None = None) -> Iterator[Image.Image]:
    """A Pillow picture for as long as the block lasts, its pixels not decoded yet.

    formats: those of Pillow that are tried, by default all. What Pillow raises in the block on
    account of the file becomes a PictureError, which names it.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd metadata, many pixels: the picture decides
            with Image.open(path, formats=formats) as picture:
                yield picture
    except FileNotFoundError as error:
        raise PictureError(f"{path}: there is no such file") from error
    except Image.DecompressionBombError as error:
        raise PictureError(f"{path}: more pixels than Pillow accepts ({error})") from error
    except BROKEN as error:
        raise PictureError(f"{path}: not a readable picture ({one_line(error)})") from error


def is_deep_colour(picture: Image.Image, path: str | Path) -> bool:
    """Whether an opened file holds 16 bits per channel in colour or beside alpha, which Pillow
    would silently read as 8."""
    if picture.format == "PNG":
        depth, colour = png_type(path)
        return depth == 16 and colour != 0
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(258, (1,))  # BitsPerSample, one for each channel
        return len(bits) > 1 and max(bits) > 8
    return False


def png_type(path: str | Path) -> tuple[int, int]:
    """(bits per sample, colour type) of a PNG: 0 gray, 2 RGB, 3 palette, 4 and 6 with alpha."""
    with open(path, "rb") as file:
        depth, colour = file.read(26)[24:26]  # of its first chunk, IHDR
    return depth, colour


def read_deep(picture: Image.Image, path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """16-bit colour as it is stored: levels uint16 [H, W, 1 or 3], and alpha [H, W] or None.

    Raises PictureError without the extra io16.
    """
    try:
        import cv2
    except ImportError as error:
        raise PictureError(f"{path}: {IO16}") from error
    data, size = bytearray(Path(path).read_bytes()), picture.size
    if picture.format == "TIFF":
        forget_orientation(data)  # OpenCV would turn the picture
        size = (picture.tag_v2[ExifTags.Base.ImageWidth], picture.tag_v2[ExifTags.Base.ImageLength])
    try:
        levels = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error as error:
        raise PictureError(f"{path}: not a readable picture ({one_line(error)})") from error
    whole = levels is not None and levels.dtype == np.uint16 and levels.ndim == 3
    if not whole or levels.shape[1::-1] != size:
        raise PictureError(f"{path}: not a readable picture of 16 bits (OpenCV)")
    gray = picture.format == "PNG" and png_type(path)[1] == 4  # R = G = B, OpenCV makes of it
    colour = levels[:, :, :1] if gray else levels[:, :, 2::-1]
    return np.ascontiguousarray(colour), levels[:, :, 3].copy() if levels.shape[2] == 4 else None


def forget_orientation(data: bytearray) -> None:
    """Say in the table of a TIFF's first picture, in place, that it is stored upright. Raises
    struct.error for a table that the file does not hold."""
    order = "<" if data[:2] == b"II" else ">"
    big = struct.unpack_from(f"{order}H", data, 2)[0] == 43  # BigTIFF
    number, head, entry = ("Q", "Q", "HHQ") if big else ("L", "H", "HHL")  # tag, type, count
    (start,) = struct.unpack_from(order + number, data, 8 if big else 4)
    (entries,) = struct.unpack_from(order + head, data, start)
    start, length = start + struct.calcsize(f"<{head}"), struct.calcsize(f"<{entry}{number}")
    for place in range(start, start + entries * length, length):
        if struct.unpack_from(f"{order}H", data, place)[0] == ORIENTATION:
            struct.pack_into(f"{order}{entry}H", data, place, ORIENTATION, 3, 1, 1)  # one SHORT


def write_deep(
    levels: np.ndarray,
    alpha: np.ndarray | None,
    suffix: str,
    exif: bytes,
    icc: bytes,
    dpi: tuple[float, float] | None,
) -> bytes:
    """The bytes of a PNG or TIFF of 16 bits per channel, from levels uint16 [H, W, 1 or 3] and
    alpha, with what belongs to the photo; gray beside alpha becomes RGB.

    A PNG needs the extra io16. Raises PictureError.
    """
    if levels.shape[2] == 1:
        levels = levels.repeat(3, 2)  # OpenCV has no gray with alpha
    planes = levels if alpha is None else np.dstack([levels, alpha])
    try:
        if suffix == ".png":
            return deep_png(planes, exif, icc, dpi)
        return deep_tiff(planes, exif, icc, dpi)
    except BROKEN as error:
        raise PictureError(f"cannot be written ({one_line(error)})") from error


def descriptive(exif: Image.Exif) -> dict[int, object]:
    """What EXIF, or a TIFF's own table, says about the photo, by tags: no layout of the file."""
    found = {tag: exif[tag] for tag in DESCRIPTIVE if tag in exif}
    return found | {part: dict(exif.get_ifd(part)) for part in PARTS if part in exif}


def deep_png(planes: np.ndarray, exif: bytes, icc: bytes, dpi: tuple[float, float] | None) -> bytes:
    """The bytes of a PNG of planes uint16 [H, W, 3 or 4], the fourth alpha. Raises PictureError."""
    try:
        import cv2
    except ImportError as error:
        raise PictureError(IO16) from error
    order = [2, 1, 0, 3][: planes.shape[2]]
    carried = {cv2.IMAGE_METADATA_EXIF: exif.removeprefix(EXIF), cv2.IMAGE_METADATA_ICCP: icc}
    carried = {kind: np.frombuffer(part, np.uint8) for kind, part in carried.items() if part}
    try:
        done, data = cv2.imencodeWithMetadata(
            ".png", np.ascontiguousarray(planes[:, :, order]), [*carried], [*carried.values()]
        )
    except cv2.error as error:
        raise PictureError(f"cannot be written ({one_line(error)})") from error
    if not done:
        raise PictureError("cannot be written (OpenCV)")
    resolution = io.BytesIO()
    if dpi:
        across, down = (round(value / 0.0254) for value in dpi)  # pixels per metre
        putchunk(resolution, b"pHYs", struct.pack(">IIB", across, down, 1))
    return data[:33].tobytes() + resolution.getvalue() + data[33:].tobytes()  # behind IHDR


def deep_tiff(
    planes: np.ndarray, exif: bytes, icc: bytes, dpi: tuple[float, float] | None
) -> bytes:
    """The bytes of a TIFF, not compressed, of planes uint16 [H, W, 3 or 4], the fourth alpha.

    Pillow writes no 16-bit colour, but every table. Raises one of BROKEN for what no table holds.
    """
    tag, (height, width, samples) = ExifTags.Base, planes.shape
    told = Image.Exif()
    told.load(exif)
    values = descriptive(told)
    values |= {tag.InterColorProfile: icc} if icc else {}
    if dpi:
        values |= {tag.XResolution: dpi[0], tag.YResolution: dpi[1], tag.ResolutionUnit: 2}  # inch
    values |= {tag.ExtraSamples: 2} if samples == 4 else {}  # alpha, not multiplied into colours
    values |= {
        tag.ImageWidth: width,
        tag.ImageLength: height,
        tag.BitsPerSample: (16,) * samples,
        tag.Compression: 1,  # none
        tag.PhotometricInterpretation: 2,  # RGB
        tag.StripOffsets: 0,  # behind the table, which Pillow adds
        tag.SamplesPerPixel: samples,
        tag.RowsPerStrip: height,
        tag.StripByteCounts: planes.nbytes,
        tag.PlanarConfiguration: 1,  # R, G, B of a pixel together
    }
    table = ImageFileDirectory_v2()
    for name, value in values.items():
        table[name] = value
    file = io.BytesIO()
    table.save(file)
    return file.getvalue() + planes.astype("<u2").tobytes()


def to_array(picture: Image.Image, path: str | Path) -> np.ndarray:
    """The levels of an opened picture [H, W] or [H, W, 3]: uint16 for 16-bit gray, else uint8."""
    if picture.mode.startswith("I"):
        levels = np.asarray(picture)
        if levels.min() < 0 or levels.max() > 65535:
            raise PictureError(f"{path}: gray values outside 16 bits (0..65535)")
        return levels.astype(np.uint16)
    if picture.mode == "F":
        raise PictureError(f"{path}: gray values in floating point; convert it to 8 or 16 bits")
    gray = picture.mode in GRAY_MODES
    return np.asarray(picture.convert("L" if gray else "RGB"))


def save(image: Tensor, path: str | Path) -> None:
    """Write a picture [1 or 3, H, W] in 0..1, rounded to 8 bit and clipped.

    The suffix names the format. The file appears whole or not at all. Raises PictureError, which
    names the file.
    """
    if not torch.isfinite(image).all():
        raise PictureError(f"{path}: the picture holds values that are not finite")
    write(Image.fromarray(to_levels(image)), path)


def write(picture: Image.Image, path: str | Path, **options: object) -> None:
    """Write a Pillow picture whole or not at all: to a temporary file, which is then renamed.

    `options` go to Pillow (quality, exif, icc_profile …). Raises PictureError, which names the
    file.
    """
    path = Path(path)
    if path.suffix.lower() not in FORMATS:
        raise PictureError(f"{path}: unknown suffix {path.suffix!r}; known: {', '.join(SUFFIXES)}")
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        picture.save(part, format=FORMATS[path.suffix.lower()], **options)
        os.replace(part, path)
    except BROKEN as error:
        raise PictureError(f"{path}: cannot be written ({one_line(error)})") from error
    finally:
        part.unlink(missing_ok=True)


def one_line(error: Exception) -> str:
    """An error's reason without line breaks, for a one-line message."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(reason.split())


def from_levels(levels: np.ndarray) -> Tensor:
    """uint8 or uint16 [C, H, W] levels as a float32 picture in 0..1."""
    return torch.from_numpy(levels.astype(np.float32, order="C")).div_(np.iinfo(levels.dtype).max)


def to_levels(image: Tensor, dtype: type = np.uint8) -> np.ndarray:
    """Picture [1 or 3, H, W] in 0..1 → uint8 or uint16 [H, W] or [H, W, 3], rounded and clipped."""
    top = np.iinfo(dtype).max
    levels = (image.detach().float().cpu() * top).round_().clamp_(0, top).numpy().astype(dtype)
    return levels[0] if len(levels) == 1 else np.ascontiguousarray(levels.transpose(1, 2, 0))


def round_8bit(image: Tensor) -> Tensor:
    """The nearest values k/255, k = 0..255: what an 8-bit file can hold."""
    return (image * 255).round().clamp(0, 255) / 255


def luma(rgb: Tensor) -> Tensor:
    """Y of BT.601 in studio range (16..235 of 255), not rounded: [3, H, W] → [1, H, W] in 0..1.

    Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 on 0..255 values.
    """
    weights = torch.tensor(LUMA, dtype=torch.float64, device=rgb.device)
    y = (rgb.double() * weights[:, None, None]).sum(0, keepdim=True)
    return ((16 + y) / 255).to(rgb.dtype)


def to_studio(y: Tensor) -> Tensor:
    """Y of a JPEG, full range, as `luma` has it: 0..1 → 16/255..235/255."""
    return (16 + 219 * y) / 255


def to_full(y: Tensor) -> Tensor:
    """The reverse of `to_studio`."""
    return (255 * y - 16) / 219


def ycc_to_rgb(ycc: Tensor) -> Tensor:
    """Y, Cb, Cr of a JPEG (JFIF, full range) → RGB, [3, H, W] in 0..1, neither rounded nor
    clipped."""
    y, cb, cr = ycc[0], ycc[1] - 128 / 255, ycc[2] - 128 / 255
    return torch.stack([y + 1.402 * cr, y - 0.34414 * cb - 0.71414 * cr, y + 1.772 * cb])


def to_rgb(image: Tensor) -> Tensor:
    """Gray [1, H, W] repeated to three channels; RGB as it is."""
    return image.expand(3, -1, -1) if len(image) == 1 else image


def fit_channels(image: Tensor, channels: int) -> Tensor:
    """The picture with 1 or 3 channels: colour becomes Y, unrounded; gray stays or is repeated."""
    if channels == 3:
        return to_rgb(image)
    return image if len(image) == 1 else luma(image)
