"""16 bits per channel in colour, or in gray beside alpha: what Pillow would read as 8 bits."""

import io
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from PIL import Image
from PIL.ExifTags import IFD, Base
from PIL.PngImagePlugin import putchunk
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from acla.errors import PictureError

EXIF = b"Exif\0\0"  # what EXIF begins with in a JPEG
IO16 = "16 bits per channel in a colour PNG need the extra io16: pip install '.[io16]'"
# What a TIFF's own table says about the photo and not about how the file stores it
DESCRIPTIVE = (Base.ImageDescription, Base.Make, Base.Model, Base.Software, Base.DateTime)
DESCRIPTIVE += (Base.Artist, Base.Copyright)
LAYOUT_NOTES = ('{"shape"', "ImageJ=")  # of how the file stores it, by tifffile and ImageJ
IFDS = (IFD.Exif, IFD.GPSInfo)
TIFF_SAMPLES = {tifffile.PHOTOMETRIC.RGB: (3, 4), tifffile.PHOTOMETRIC.MINISBLACK: (2,)}


def is_deep_colour(picture: Image.Image, path: str | Path) -> bool:
    """Whether an opened PNG or TIFF holds 16 bits per channel in colour or beside alpha."""
    if picture.format == "PNG":
        with open(path, "rb") as file:
            depth, colour = file.read(26)[24:26]  # of its first chunk, IHDR
        return depth == 16 and colour != 0
    if picture.format == "TIFF":
        bits = picture.tag_v2.get(Base.BitsPerSample, (1,))  # one for each channel
        return len(bits) > 1 and max(bits) > 8
    return False


def read_deep(picture: Image.Image, path: str | Path) -> tuple[np.ndarray, np.ndarray | None]:
    """16-bit colour as it is stored: levels uint16 [H, W, 1 or 3], and alpha [H, W] or None.

    A PNG needs the extra io16. Raises PictureError, or what `acla.data.image.opened` turns into
    one.
    """
    try:
        if picture.format == "TIFF":
            planes = tiff_planes(path)
        else:
            planes = require_imagecodecs(path).png_decode(Path(path).read_bytes())
    except RuntimeError as error:  # those of imagecodecs
        raise PictureError(f"{path}: not a readable picture ({error})") from error
    height, width, samples = planes.shape
    if planes.dtype != np.uint16 or height * width != picture.width * picture.height:
        raise PictureError(f"{path}: not a readable picture of 16 bits")
    colours = samples - 1 + samples % 2
    levels = np.ascontiguousarray(planes[:, :, :colours])
    return levels, planes[:, :, colours].copy() if colours < samples else None


def tiff_planes(path: str | Path) -> np.ndarray:
    """The samples [H, W, 2, 3 or 4] of a TIFF's first picture. Raises PictureError for other
    layouts than RGB and gray, what tifffile raises for a damaged file."""
    with tifffile.TiffFile(path) as file:
        page = file.pages.first
        bits, kind = page.bitspersample, tifffile.PHOTOMETRIC(page.photometric)
        if bits != 16 or page.samplesperpixel not in TIFF_SAMPLES.get(kind, ()):
            raise PictureError(
                f"{path}: a TIFF of {page.samplesperpixel} channels ({kind.name}) of {bits} bits; "
                "convert it to RGB of 16 or 8 bits"
            )
        separate = page.planarconfig == tifffile.PLANARCONFIG.SEPARATE
        return np.moveaxis(page.asarray(), 0, 2) if separate else page.asarray()


def require_imagecodecs(path: str | Path) -> Any:
    """The module imagecodecs. Raises PictureError without it."""
    try:
        import imagecodecs
    except ImportError as error:
        raise PictureError(f"{path}: {IO16}") from error
    return imagecodecs


def encode_deep(
    path: Path,
    levels: np.ndarray,
    alpha: np.ndarray | None,
    exif: bytes,
    icc: bytes,
    dpi: tuple[float, float] | None,
) -> bytes:
    """The bytes of a PNG or TIFF, as `path` says, from levels uint16 [H, W, 1 or 3] and alpha
    [H, W], with EXIF, ICC profile and pixels per inch.

    A TIFF is not compressed; gray beside alpha becomes RGB in it. Raises PictureError for a PNG
    without the extra io16.
    """
    if path.suffix.lower() == ".png":
        planes = levels if alpha is None else np.dstack([levels, alpha])
        data = require_imagecodecs(path).png_encode(np.ascontiguousarray(planes))
        chunks = io.BytesIO()
        if icc:
            putchunk(chunks, b"iCCP", b"ICC Profile\0\0", zlib.compress(icc))
        if dpi:
            across, down = (round(value / 0.0254) for value in dpi)  # pixels per metre
            putchunk(chunks, b"pHYs", struct.pack(">IIB", across, down, 1))
        if exif:
            putchunk(chunks, b"eXIf", exif.removeprefix(EXIF))
        return data[:33] + chunks.getvalue() + data[33:]  # behind IHDR
    levels = levels.repeat(3, 2) if levels.shape[2] == 1 else levels
    planes = levels if alpha is None else np.dstack([levels, alpha])
    return tiff_table(planes, exif, icc, dpi) + planes.astype("<u2").tobytes()


def descriptive(exif: Image.Exif) -> dict[int, object]:
    """What EXIF, or a TIFF's own table, says about the photo, by tags: no layout of the file."""
    values = {tag: exif[tag] for tag in DESCRIPTIVE if tag in exif}
    if str(values.get(Base.ImageDescription, "")).startswith(LAYOUT_NOTES):
        del values[Base.ImageDescription]
    return values | {part: dict(exif.get_ifd(part)) for part in IFDS if part in exif}


def tiff_table(
    planes: np.ndarray, exif: bytes, icc: bytes, dpi: tuple[float, float] | None
) -> bytes:
    """A TIFF of planes uint16 [H, W, 3 or 4], the fourth alpha, up to its samples.

    By Pillow, which writes every table, because tifffile writes no EXIF. Raises ValueError,
    struct.error … for what no table holds.
    """
    height, width, samples = planes.shape
    source = Image.Exif()
    source.load(exif)
    values = descriptive(source)
    values |= {Base.InterColorProfile: icc} if icc else {}
    if dpi:
        values |= {Base.XResolution: dpi[0], Base.YResolution: dpi[1]}
        values |= {Base.ResolutionUnit: 2}  # inch
    values |= {Base.ExtraSamples: 2} if samples == 4 else {}  # alpha, not multiplied into colours
    values |= {
        Base.ImageWidth: width,
        Base.ImageLength: height,
        Base.BitsPerSample: (16,) * samples,
        Base.Compression: 1,  # none
        Base.PhotometricInterpretation: 2,  # RGB
        Base.StripOffsets: 0,  # behind the table, which Pillow adds
        Base.SamplesPerPixel: samples,
        Base.RowsPerStrip: height,
        Base.StripByteCounts: planes.nbytes,
        Base.PlanarConfiguration: 1,  # R, G, B of a pixel together
    }
    table = ImageFileDirectory_v2()
    for name, value in values.items():
        table[name] = value
    file = io.BytesIO()
    table.save(file)
    return file.getvalue()
