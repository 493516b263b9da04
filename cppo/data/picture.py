"""Pictures: from whatever a cell of a row holds to upright RGB images, guarded at every step."""

import base64
import io
import os
import struct
import zipfile
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

from PIL import Image, ImageOps, UnidentifiedImageError

from cppo.data.item import BadRow
from cppo.perturb import to_rgb

MAX_PIXELS = 50_000_000  # 150 MB once decoded; a phone's picture has 12 to 50 million

# Pillow knows many more; some of them start outside programs (EPS).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# What Pillow's decoders raise on damaged files: OSError for most; the rest come from the parsers
# of chunks and tags. Their warnings are exceptions where the user's filters say so.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    struct.error,
    zlib.error,
    ArithmeticError,
    AttributeError,
    LookupError,
    RuntimeError,
    TypeError,
    UserWarning,
)
_BOMBS = (Image.DecompressionBombError, Image.DecompressionBombWarning, MemoryError)


def decode(data: bytes, *, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The picture in `data` (one of `FORMATS`; its first frame where it moves), upright, in RGB.

    The size in the header is checked before a pixel is decoded. BadRow where `data` is empty, cut
    short, no picture, or has more than `max_pixels` pixels; Pillow's own limit, twice
    `Image.MAX_IMAGE_PIXELS`, holds too.
    """
    if not data:
        raise BadRow("image empty", "zero bytes")
    _check_bytes(len(data), max_pixels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise Image.DecompressionBombError(f"{image.width}x{image.height} pixels")
        image.load()
        upright = ImageOps.exif_transpose(image)
    except _BOMBS as error:
        limit = f"dataset.max_image_pixels is {max_pixels}"
        raise BadRow("image too large", f"{error}; {limit}") from error
    except UnidentifiedImageError as error:
        found = f"{len(data)} bytes from {data[:8]!r} on"
        detail = f"not readable as one of {', '.join(FORMATS)}: {found}"
        raise BadRow("image unreadable", detail) from error
    except _DAMAGE as error:
        cut = isinstance(error, EOFError) or "truncated" in str(error).lower()
        reason = "image truncated" if cut else "image unreadable"
        raise BadRow(reason, f"{len(data)} bytes: {error}") from error
    try:
        return to_rgb(upright)
    except (ValueError, OSError) as error:
        detail = f"mode {upright.mode} does not convert to RGB: {error}"
        raise BadRow("image mode", detail) from error


def entries(value: object) -> list[object]:
    """The pictures in a cell, still encoded: a list as it is, anything else as a list of one."""
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


class PictureFiles:
    """Finds picture files by path: in `folders`, in their order, then in the zip archives there.

    ViRL39K's pictures come as one `images.zip`: it need not be unpacked.
    """

    def __init__(self, folders: Sequence[Path]) -> None:
        self._folders = tuple(dict.fromkeys(folders))
        self._archives: dict[Path, zipfile.ZipFile] = {}
        self._broken_archives: list[str] = []

    def encoded(self, entry: object, *, max_pixels: int) -> bytes:
        """The bytes behind one entry: bytes, {bytes, path}, a path or a data: URL.

        Bytes inside JSON are base64 text; a path is relative to the folders, or absolute. BadRow
        where there are none, or more than `max_pixels` pixels can need.
        """
        if isinstance(entry, dict):
            inside = entry.get("bytes")
            if isinstance(inside, str):
                return _from_base64(inside)
            entry = inside if inside is not None else entry.get("path")
        if isinstance(entry, bytes):
            return entry
        if entry is None:
            raise BadRow("image file missing", "the entry holds neither bytes nor a path")
        if not isinstance(entry, str):
            detail = f"an image is {type(entry).__name__}; it must be bytes, a path or both"
            raise BadRow("wrong type", detail)
        if entry.startswith("data:"):
            return _from_base64(entry.partition(",")[2])
        if entry.startswith(("http://", "https://")):
            raise BadRow("image file missing", f"{entry} is not fetched: download it first")
        return self._read(entry, max_pixels)

    def _read(self, path: str, max_pixels: int) -> bytes:
        for folder in self._folders:
            whole = os.path.join(folder, path)
            if os.path.isfile(whole):  # a pipe or a device could be read without end
                try:
                    _check_bytes(os.path.getsize(whole), max_pixels)
                    return Path(whole).read_bytes()
                except OSError as error:
                    raise BadRow("image unreadable", f"{whole}: {error.strerror}") from error
        member = self._members.get(Path(path).as_posix())
        if member is None:
            searched = ", ".join(map(str, self._folders))
            broken = "".join(f"; not a whole zip: {archive}" for archive in self._broken_archives)
            detail = f"{path!r} is no file in {searched}, nor in a zip there{broken}"
            raise BadRow("image file missing", detail)
        return self._unzip(*member, max_pixels)

    @cached_property
    def _members(self) -> dict[str, tuple[Path, zipfile.ZipInfo]]:
        members: dict[str, tuple[Path, zipfile.ZipInfo]] = {}
        for archive in (path for folder in self._folders for path in sorted(folder.glob("*.zip"))):
            try:
                self._archives[archive] = zipfile.ZipFile(archive)
            except (OSError, zipfile.BadZipFile) as error:
                self._broken_archives.append(f"{archive} ({error})")
                continue
            for info in self._archives[archive].infolist():
                members.setdefault(info.filename, (archive, info))
        return members

    def _unzip(self, archive: Path, info: zipfile.ZipInfo, max_pixels: int) -> bytes:
        _check_bytes(info.file_size, max_pixels)
        try:
            return self._archives[archive].read(info)
        except (OSError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
            raise BadRow("image unreadable", f"{info.filename} in {archive}: {error}") from error


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except ValueError as error:
        raise BadRow("image unreadable", f"its bytes are not base64 text: {error}") from error


def _check_bytes(size_bytes: int, max_pixels: int) -> None:
    """BadRow for more bytes than `max_pixels` take uncompressed, 8 a pixel, and 1 MiB of tags."""
    limit_bytes = 8 * max_pixels + 2**20
    if size_bytes > limit_bytes:
        raise BadRow("image too large", f"{size_bytes} bytes; at most {limit_bytes} are read")
