# SPDX-License-Identifier: MIT
"""Which lines of smaps are a mapping's first and its flags: counted where all have the same, else looked at."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lazyd.target.mappings import _headers_and_flags, read_mappings


def line_by_line(text: bytes) -> list[tuple[bytes, bytes]]:
    """The plain way."""
    found: list[tuple[bytes, bytes]] = []
    for line in text.splitlines():
        if re.match(rb"[0-9a-f]+-[0-9a-f]+ ", line):
            found.append((line, b""))
        elif line.startswith(b"VmFlags:"):
            found[-1] = (found[-1][0], line)
    return found


def test_counted_and_looked_at_find_the_same():
    text = Path("/proc/self/smaps").read_bytes()
    expected = line_by_line(text)
    assert len(expected) > 20
    assert list(_headers_and_flags(text)) == expected
    # One line more in one mapping: nothing can be counted.
    uneven = text.replace(b"Rss:", b"New:                   0 kB\nRss:", 1)
    assert list(_headers_and_flags(uneven)) == expected
    # None has flags, as on a kernel before 3.8; and one alone has none.
    without = re.sub(rb"VmFlags:.*\n", b"", text)
    assert list(_headers_and_flags(without)) == [(header, b"") for header, _ in expected]
    one = re.sub(rb"VmFlags:.*\n", b"", text, count=1)
    assert list(_headers_and_flags(one)) == [(expected[0][0], b""), *expected[1:]]
    assert list(_headers_and_flags(b"")) == []


def test_mappings_are_those_of_maps():
    """The kernel's other list of them; vvar is one mapping to an image, two to the kernel."""
    known = read_mappings(os.getpid())
    lines = [line.split() for line in Path("/proc/self/maps").read_text().splitlines()]
    starts = {int(words[0].split("-")[0], 16) for words in lines if words[-1] != "[vvar_vclock]"}
    libraries = {words[-1] for words in lines if words[-1].startswith("/") and ".so" in words[-1]}
    assert libraries <= {mapping.name for mapping in known}
    assert len(starts & {mapping.start for mapping in known}) > len(starts) - 4
