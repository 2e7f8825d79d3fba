"""XMP, IPTC, comments and texts of a picture file, and EXIF that is too long for a JPEG."""

import re

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from acla.data.deep_colour import IFDS, descriptive

XMP, LONG_XMP = b"http://ns.adobe.com/xap/1.0/\0", b"http://ns.adobe.com/xmp/extension/\0"
PHOTOSHOP = b"Photoshop 3.0\0"  # a segment with IPTC
PNG_XMP = "XML:com.adobe.xmp"
MARKERS = {"XMP": b"\xff\xe1", "IPTC": b"\xff\xed", "comment": b"\xff\xfe"}
TIFF_IPTC = (33723, 34377)  # tags: IPTC, Photoshop's blocks
LONGEST = 65533  # bytes in a segment of a JPEG


def read_notes(picture: Image.Image) -> list[tuple[str, bytes]]:
    """(kind, bytes) of what an opened and loaded picture carries besides EXIF and ICC profile.

    XMP, IPTC and comment are as segments of a JPEG hold them; a text is key, zero byte, value. No
    bytes: nothing that could be passed on. The XMP is upright, as `acla.restore.photo` reads.
    """
    notes: list[tuple[str, bytes]] = []
    for name, data in getattr(picture, "applist", ()):
        if name == "COM":
            notes.append(("comment", data))
        elif name == "APP1" and data.startswith((XMP, LONG_XMP)):
            notes.append(("XMP", data))
        elif name == "APP13" and data.startswith(PHOTOSHOP):
            notes.append(("IPTC", data))
    if not hasattr(picture, "applist"):
        if isinstance(xmp := picture.info.get("xmp"), bytes):
            notes.append(("XMP", XMP + xmp))
        if isinstance(comment := picture.info.get("comment"), bytes):
            notes.append(("comment", comment))
        texts = {
            key: value for key, value in getattr(picture, "text", {}).items() if key != PNG_XMP
        }
        notes += [("text", f"{key}\0{value}".encode()) for key, value in texts.items()]
        notes += [("IPTC", b"") for tag in TIFF_IPTC if tag in getattr(picture, "tag_v2", ())]
    upright = re.compile(rb"(tiff:Orientation(?:=[\"']|>))[2-8]")
    return [(kind, upright.sub(rb"\g<1>1", x) if kind == "XMP" else x) for kind, x in notes]


def note_options(notes: list[tuple[str, bytes]], kind: str) -> tuple[dict[str, object], list[str]]:
    """(options of Pillow's writer for a format, the kinds of notes that it cannot hold)."""
    info, segments, lost = PngInfo(), b"", []
    for name, data in notes:
        if kind == "JPEG" and name in MARKERS and 0 < len(data) <= LONGEST:
            segments += MARKERS[name] + (len(data) + 2).to_bytes(2) + data
        elif kind == "PNG" and name == "XMP" and data.startswith(XMP):
            info.add_itxt(PNG_XMP, data[len(XMP) :].decode("utf-8", "replace"))
        elif kind == "PNG" and name in ("comment", "text"):
            text = data.decode("utf-8", "replace")
            info.add_text(*(("Comment", text) if name == "comment" else text.split("\0", 1)))
        else:
            lost.append(name)
    options = {"extra": segments} if segments else {"pnginfo": info} if info.chunks else {}
    return options, sorted(set(lost))


def fitting(exif: bytes) -> bytes:
    """EXIF that fits into a JPEG: without its longest values. Raises what Pillow raises for broken
    EXIF."""
    source, kept = Image.Exif(), Image.Exif()
    source.load(exif)
    kept.update(descriptive(source))
    while len(data := kept.tobytes()) > LONGEST:
        parts = [kept, *(kept[part] for part in IFDS if part in kept)]
        values = [(part, tag) for part in parts for tag in part if tag not in IFDS]
        part, tag = max(values, key=lambda at: getattr(at[0][at[1]], "__len__", int)())
        del part[tag]
    return data
