"""A library's file, looked at before it is loaded: a loader may crash where something is wrong."""

from __future__ import annotations

import mmap
import struct
from pathlib import Path

from .. import _version

_IDENTITY = b"cbam_ext library, version "  # csrc/library/identity.cpp


def fault(library: Path) -> str:
    """Why this file must not be loaded, in a phrase; empty if nothing speaks against it."""
    try:
        with library.open("rb") as file, _mapped(file.fileno()) as content:
            if not _is_whole(content):
                return "is damaged: not a whole library"
            version = _version_of(content)
    except (OSError, ValueError, struct.error) as error:
        return f"is damaged: {error}"
    if version != _version.__version__:
        found = f"version {version}" if version else "a version that does not tell its number"
        return f"is of {found}, and this package is cbam_ext {_version.__version__}"
    return ""


def _mapped(descriptor: int) -> mmap.mmap:
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)


def _version_of(content: mmap.mmap) -> str:
    begin = content.find(_IDENTITY)
    if begin < 0:
        return ""
    begin += len(_IDENTITY)
    return content[begin : content.find(b"\0", begin)].decode(errors="replace")


def _is_whole(content: mmap.mmap) -> bool:
    """Whether this is a library, of Linux, and as long as its headers say.

    The loader does not ask: it maps what should be there, and the process dies at the first access.
    """
    if content[:4] != b"\x7fELF":
        return False
    if content[4] != 2 or content[5] != 1:  # of 64 bits, little-endian: what we build for
        return True
    segments, sections = struct.unpack_from("<QQ", content, 0x20)
    segment_size, segment_count, section_size, section_count = struct.unpack_from(
        "<HHHH", content, 0x36
    )
    ends = [sections + section_size * section_count, segments + segment_size * segment_count]
    if max(ends) > len(content):
        return False
    for i in range(segment_count):
        offset, _, _, size = struct.unpack_from("<QQQQ", content, segments + i * segment_size + 8)
        if offset + size > len(content):
            return False
    return True
