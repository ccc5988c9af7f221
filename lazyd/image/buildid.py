# SPDX-License-Identifier: MIT
"""The build ids of ELF files, which images keep of mapped ones: a file that changed has another."""

from __future__ import annotations

import struct
from pathlib import Path


def build_id_words(build_id: bytes) -> tuple[int, ...]:
    """Return a build id as images hold it."""
    padded = build_id + bytes(-len(build_id) % 4)
    return struct.unpack(f"<{len(padded) // 4}I", padded)


def read_build_id(path: str) -> bytes:
    """Return what the note NT_GNU_BUILD_ID of a 64-bit ELF file says (elf(5)); empty without one."""
    try:
        with Path(path).open("rb") as file:
            header = file.read(64)
            if header[:6] != b"\x7fELF\x02\x01" or len(header) < 64:
                return b""
            (table,) = struct.unpack_from("<Q", header, 32)
            size, count = struct.unpack_from("<HH", header, 54)
            file.seek(table)
            headers = file.read(size * count)
            for at in range(0, len(headers) - 55, size or 56):
                kind, _, offset, _, _, length = struct.unpack_from("<IIQQQQ", headers, at)
                if kind == 4:  # PT_NOTE
                    file.seek(offset)
                    if found := _find_build_id(file.read(min(length, 1 << 16))):
                        return found
    except (OSError, struct.error):
        pass
    return b""


def _find_build_id(notes: bytes) -> bytes:
    at = 0
    while at + 12 <= len(notes):
        name_length, length, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_length]
        start = at + 12 + (name_length + 3 & ~3)
        if kind == 3 and name == b"GNU\0":
            return notes[start : start + length]
        at = start + (length + 3 & ~3)
    return b""
