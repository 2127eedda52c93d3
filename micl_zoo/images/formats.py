"""Tells what a file is by its first bytes: a format that is read, or another one and the way from it to a picture."""

from __future__ import annotations

import functools
import importlib
import re
import struct
from typing import NamedTuple

from ..errors import Refused


class Format(NamedTuple):
    """A format that is read."""

    suffixes: tuple[str, ...]
    start: bytes  # of its files, a regular expression; empty: none that tells it from others


# By Pillow's names. EPS and the like are left out: they start other programs. HEIF and AVIF are there also where this
# Pillow cannot read them: what is listed must not depend on the packages of the machine, and such files are refused by
# name.
FORMATS = {
    "JPEG": Format((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), rb"\xff\xd8\xff"),
    "PNG": Format((".png", ".apng"), rb"\x89PNG\r\n\x1a\n"),
    "WEBP": Format((".webp",), rb"RIFF.{4}WEBP"),
    "GIF": Format((".gif",), rb"GIF8[79]a"),
    "BMP": Format((".bmp",), rb"BM.{12}[\x0c\x10(48@l|]\0\0\0"),
    "TIFF": Format((".tif", ".tiff"), rb"II[*+]\0|MM\0[*+]"),
    "AVIF": Format((".avif", ".avifs"), rb".{4}ftypavi[fs]"),
    "HEIF": Format((".heic", ".heics", ".heif", ".heifs", ".hif"), rb".{4}ftyp(?:he[iv][cxms]|mif1|msf1)"),
    "JPEG2000": Format((".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c"), rb"\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"),
    "PPM": Format((".ppm", ".pgm", ".pbm", ".pnm", ".pfm"), rb"P(?:[1-6]\s{0,99}[#0-9]|[Ff]\s{1,99}[0-9])"),
    "ICO": Format((".ico",), rb"\0\0\x01\0"),
    "TGA": Format((".tga", ".icb", ".vda", ".vst"), rb""),
}
SUFFIXES = tuple(suffix for one in FORMATS.values() for suffix in one.suffixes)
_START = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), one.start) for name, one in FORMATS.items() if one.start), re.S
)
_TGA_END = b"TRUEVISION-XFILE.\0"
_BRANDS = 256  # bytes at the start of an AVIF or HEIC in which it says what it is compatible with

_PICTURES = "save it as PNG or JPEG"
CONVERT = "convert it to PNG or JPEG, with ImageMagick for example"
_FRAMES = "take pictures out of it, with ffmpeg for example"
_UNPACK = "unpack it, or give tar or zip archives of images as sources"
_PAGES = "convert its pages to PNG, with pdftoppm for example"
_DEVELOP = "develop it to JPEG, PNG or 8-bit TIFF, with darktable or dcraw for example"
_PAGE = "the address or the download gave a page in place of a picture"
# What else people have under names of images: what it is called, how it begins, what to do.
# fmt: off
_OTHERS = (
    ("a JPEG XL", rb"\xff\x0a|\0\0\0\x0cJXL \r\n\x87\n", "convert it to PNG or JPEG, with djxl for example"),
    ("a JPEG XR", rb"II\xbc[\0\x01]", CONVERT),
    ("a Photoshop document (PSD)", rb"8BPS", _PICTURES),
    ("a GIMP picture (XCF)", rb"gimp xcf", _PICTURES),
    ("a PDF", rb"%PDF-", _PAGES),
    ("a PostScript file (PS, EPS)", rb"%!PS|\xc5\xd0\xd3\xc6|\x04%!PS", _PAGES),
    ("a DjVu document", rb"AT&TFORM", _PAGES),
    ("an SVG drawing", rb"(?i)[\xef\xbb\xbf\s]*<(?:svg\b|[?!][^\0]*?<svg\b)",
     "convert it to PNG, with rsvg-convert for example"),
    ("a web page (HTML)", rb"(?i)[\xef\xbb\xbf\s]*<(?:!doctype html|(?:html|head|body|title|script|style|meta|link|"
     rb"div|span|p|a|h[1-6]|center|table|br|pre|iframe|img|form)(?=[\s/>])|[?!][^\0]*?<html\b)", _PAGE),
    ("an XML document", rb"[\xef\xbb\xbf\s]*<\?xml\b", _PAGE),
    ("a JSON document", rb"\s*(?:\{\s*[\"}]|\[\s*[\"{\[])", _PAGE),
    ("a Git LFS pointer", rb"version https://git-lfs", "fetch the file with `git lfs pull`"),
    ("a camera's RAW file", rb".{4}ftypcrx |FUJIFILMCCD-RAW|FOVb|\0MRM|II(?:RO|RS|U\0|\x1a\0)|MMOR", _DEVELOP),
    ("a MP4, QuickTime or 3GP video", rb".{4}(?:ftyp|moov|mdat|wide)", _FRAMES),
    ("a Matroska or WebM video", rb"\x1a\x45\xdf\xa3", _FRAMES),
    ("an AVI video", rb"RIFF.{4}AVI ", _FRAMES),
    ("a MPEG video", rb"\0\0\x01[\xb3\xba]|\x47.{187}\x47", _FRAMES),
    ("a Flash or Windows Media video", rb"FLV\x01|[CFZ]WS[\x01-\x30]|\x30\x26\xb2\x75\x8e\x66\xcf\x11", _FRAMES),
    ("an animation of PNGs or JPEGs (MNG, JNG)", rb"\x8a[MJ]NG\r\n|\x8bJNG\r\n", _FRAMES),
    ("a sound", rb"RIFF.{4}WAVE|ID3|OggS|fLaC|\xff[\xfb\xf3\xf2]", "images alone are embedded"),
    ("a zip archive or an Office document", rb"PK(?:\x03\x04|\x05\x06)", _UNPACK),
    ("a gzip file", rb"\x1f\x8b", _UNPACK),
    ("a compressed file (bzip2, xz, zstd, 7z or rar)", rb"BZh[1-9]|\xfd7zXZ|\x28\xb5\x2f\xfd|7z\xbc\xaf|Rar!\x1a",
     _UNPACK),
    ("a tar archive", rb".{257}ustar", _UNPACK),
    ("an OpenEXR or Radiance picture of unlimited range", rb"v/1\x01|#\?R(?:ADIANCE|GBE)",
     "convert it to 8 bits, with a white of your choice"),
    ("a DICOM file", rb".{128}DICM", "export its frames as PNG: which values are black and white is yours to choose"),
    ("a FITS file", rb"SIMPLE  =", "export it as PNG: which values are black and white is yours to choose"),
    ("an icon of macOS (ICNS)", rb"icns", CONVERT),
    ("a cursor of Windows (CUR, ANI)", rb"\0\0\x02\0[^\0]\0|RIFF.{4}ACON", CONVERT),
    ("a DirectDraw, KTX or PVR texture", rb"DDS |\xabKTX |PVR\x03", CONVERT),
    ("a picture in a rare format (QOI, PCX, FLIF, BPG, SGI, Sun)",
     rb"qoif|\x0a[\0\x02\x03\x05]\x01[\x01\x02\x04\x08]|FLIF|BPG\xfb|\x01\xda[\0\x01]|\x59\xa6\x6a\x95", CONVERT),
    ("a PAM", rb"P7\n", CONVERT),
    ("an X bitmap or pixmap (XBM, XPM)", rb"/\* XPM \*/|(?:/\*[^\0]*?\*/)?\s*#define\s+\S+_width\s+\d", CONVERT),
    ("a film scan (DPX, Cineon)", rb"SDPX|XPDS|\x80\x2a\x5f\xd7|\xd7\x5f\x2a\x80", CONVERT),
    ("a picture of another program (MIFF, VICAR, VIFF, farbfeld, BLP, IM)",
     rb"id=ImageMagick|LBLSIZE=|\xab\x01\x01|farbfeld|BLP[12]|Image type: ", CONVERT),
    ("a screenshot of X (XWD)", rb"\0\0\0[\x64-\xff]\0\0\0\x07\0\0\0[\0-\x02]", CONVERT),
    ("a picture of old Macs (PICT)", rb".{522}\0\x11\x02\xff", CONVERT),
    ("a Windows metafile (WMF, EMF)", rb"\xd7\xcd\xc6\x9a|\x01\0\0\0.{36} EMF", CONVERT),
    ("an array of NumPy", rb"\x93NUMPY", _PICTURES),
    ("a parquet table", rb"PAR1", "give it as a source of its own"),
    ("an Arrow table", rb"ARROW1", "write it as parquet, with pyarrow for example, and give that as a source"),
    ("a HDF5, MATLAB or SQLite file", rb"\x89HDF\r\n|MATLAB 5|SQLite format 3", "take the pictures out of it"),
    ("an old Office document or thumbnails of Windows (OLE)", rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", _PICTURES),
    ("a companion file that macOS writes (AppleDouble)", rb"\0\x05\x16[\0\x07]",
     "the picture is in the file without ._ before its name"),
    ("a program", rb"\x7fELF|MZ.{58}", "images alone are embedded"),
)
# fmt: on
_LOOKED_AT = 4096  # bytes


def kind_of(data: bytes) -> str | None:
    """Return the name in FORMATS, None where no format that is read begins so."""
    match = _START.match(data)
    if match is None:
        return "TGA" if data.endswith(_TGA_END) or 0 < len(data) == _tga_size(data) else None
    if match.lastgroup == "HEIF":  # in AVIF the brand that comes first may be one for both
        size = int.from_bytes(data[:4], "big")
        return "AVIF" if re.search(rb"avi[fs]", data[16 : min(size, _BRANDS)]) else "HEIF"
    return match.lastgroup


def unknown_format(data: bytes) -> Refused:
    """Say what a file is that is in no format that is read."""
    for name, start, cure in _OTHERS:
        if re.compile(start, re.S).match(data, 0, _LOOKED_AT):
            return Refused("unsupported", f"{name}: {cure}")
    if _is_tga(data):
        return Refused(
            "unsupported",
            "a TGA without the footer of version 2, whose length is not that of its pixels, cannot be told from other "
            "bytes: convert it to PNG",
        )
    return Refused("not_an_image", f"no known image format in {len(data):,} bytes")


def _is_tga(data: bytes) -> bool:
    """Tell whether the head would do for a TGA: kinds of picture, colours and depth, and a size."""
    if len(data) < 18:
        return False
    mapped, kind, depth, size = data[1], data[2], data[16], data[12:16]
    depths = (8, 16) if kind in (1, 3, 9, 11) else (16, 24, 32)
    return (
        kind in (1, 2, 3, 9, 10, 11)
        and mapped == (kind in (1, 9))
        and depth in depths
        and any(size[:2])
        and any(size[2:])
    )


def _tga_size(data: bytes) -> int:
    """Compute how many bytes a TGA has that is neither compressed nor has a footer; 0: it is none."""
    if not _is_tga(data) or data[2] > 3:
        return 0
    colours, bits, width, height, depth = struct.unpack_from("<HB4xHHB", data, 5)
    return 18 + data[0] + colours * (bits + 7 >> 3) + width * height * (depth + 7 >> 3)


@functools.cache
def readable() -> tuple[str, ...]:
    """Return the names of those FORMATS that this Pillow reads."""
    modules = {"JPEG2000": "Jpeg2K", "PNG": "Png", "WEBP": "WebP"}
    return tuple(name for name in FORMATS if _has_plugin(modules.get(name, name.capitalize())))


def _has_plugin(name: str) -> bool:
    """Import a plug-in. A shortage of files or of memory meanwhile is raised: it must not pass for a missing one."""
    try:
        if name == "Heif":  # one core per process: workers share the machine
            importlib.import_module("pillow_heif").register_heif_opener(decode_threads=1, thumbnails=False)
            return True
        return bool(getattr(importlib.import_module(f"PIL.{name}ImagePlugin"), "SUPPORTED", True))
    except ModuleNotFoundError:
        return False


def check_readable(kind: str) -> None:
    """Raise Refused where a format needs a package that is not there."""
    if kind in readable():
        return
    if kind == "HEIF":
        raise Refused("unsupported", "a HEIC file, which needs a plug-in: pip install 'micl-zoo[heif]'")
    if kind == "AVIF":
        raise Refused("unsupported", "an AVIF file, which needs a newer Pillow: pip install 'pillow>=11.3'")
    raise Refused(
        "unsupported", f"a {kind} file, which this Pillow was built without: pip install --force-reinstall pillow"
    )
