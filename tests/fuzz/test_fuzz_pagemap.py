# SPDX-License-Identifier: MIT
"""Whatever the bytes, only ImageError comes out of the images room; and verify agrees with load."""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from images_builder import PAGE, Entry, Task, build_chain, pagemap_image

from lazyd.errors import ImageError
from lazyd.image import load
from lazyd.image.pagemap import Dialect, FlatTable, decide_dialect, read_pagemap
from lazyd.image.show import describe, render
from lazyd.image.verify import verify

BASE = 0x7F0000000000
USER_END = (1 << 47) - PAGE
SETTINGS = settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))

YOUNG = [
    Entry(BASE, 3),
    Entry(BASE + 3 * PAGE, 4, "parent"),
    Entry(BASE + 8 * PAGE, 2, "zero"),
    Entry(BASE + 12 * PAGE, 300),
    Entry(BASE + 400 * PAGE, 2, "remote"),
]
OLD = [Entry(BASE, 5), Entry(BASE + 5 * PAGE, 9, "zero"), Entry(BASE + 20 * PAGE, 1)]

mutation = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 1 << 12), st.integers(0, 255)),
    st.tuples(st.just("flip"), st.integers(0, 1 << 12), st.integers(0, 7)),
    st.tuples(st.just("cut"), st.integers(0, 1 << 12), st.just(0)),
    st.tuples(st.just("drop"), st.integers(0, 1 << 12), st.integers(1, 9)),
    st.tuples(st.just("add"), st.integers(0, 1 << 12), st.binary(min_size=1, max_size=12)),
    st.tuples(st.just("repeat"), st.integers(0, 1 << 12), st.integers(1, 40)),
)


def mutate(content: bytes, changes) -> bytes:
    data = bytearray(content)
    for what, at, value in changes:
        where = at % (len(data) + 1)
        if what == "set" and where < len(data):
            data[where] = value
        elif what == "flip" and where < len(data):
            data[where] ^= 1 << value
        elif what == "cut":
            del data[where:]
        elif what == "drop":
            del data[where : where + value]
        elif what == "add":
            data[where:where] = value
        elif what == "repeat":
            data[where:where] = data[where : where + value]
    return bytes(data)


@contextmanager
def only_image_errors():
    try:
        yield
    except ImageError as error:
        assert "\n" not in str(error)
        assert error.reason


def read_flat(content: bytes) -> None:
    """Decode and flatten, once over itself; what comes out holds the rules of a table."""
    fd = os.memfd_create("pagemap")
    try:
        os.write(fd, content)
        pagemap = read_pagemap(Path("pagemap-1.img"), fd)
    finally:
        os.close(fd)
    assert len(pagemap) <= len(content)
    dialect, _ = decide_dialect([pagemap], "auto", has_parent=True)
    for chosen in {dialect, *Dialect}:
        with only_image_errors():
            table = FlatTable(chosen)
            table.push(pagemap, 1, Path("pages-1.img"), 1 << 40)
            table.push(pagemap, 0, Path("pages-1.img"), 1 << 40)
            extents = table.finish({0: 0, 1: 1}, 2)
            end = 0
            for extent in extents:
                assert end <= extent.start < extent.end <= USER_END
                assert extent.start % PAGE == extent.offset % PAGE or extent.kind.value == 4
                end = extent.end


@SETTINGS
@given(st.binary(max_size=400))
def test_random_bytes(content):
    with only_image_errors():
        read_flat(content)


@SETTINGS
@given(st.binary(max_size=400))
def test_random_bytes_behind_a_good_head(content):
    with only_image_errors():
        read_flat(pagemap_image([], "flags") + content)


@SETTINGS
@given(st.sampled_from(["booleans", "flags", "flags64"]), st.lists(mutation, min_size=1, max_size=5))
def test_a_changed_pagemap(dialect, changes):
    with only_image_errors():
        read_flat(mutate(pagemap_image(YOUNG, dialect), changes))


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """A chain of two, with a zombie and shared memory."""
    base = tmp_path_factory.mktemp("chain")
    zombie = Task(11, ppid=10, zombie=True)
    build_chain(base, [[Task(10, YOUNG), zombie], [Task(10, OLD)]])
    (base / "0" / "pagemap-shmem-7.img").write_bytes(pagemap_image([Entry(0, 1)], "flags", 9))
    (base / "0" / "pages-9.img").write_bytes(bytes(PAGE))
    assert verify(base / "0") == []
    return base


IMAGES = [
    "0/inventory.img", "0/pstree.img", "0/mm-10.img", "0/core-10.img", "0/core-11.img", "0/pagemap-10.img",
    "0/pagemap-shmem-7.img", "1/pagemap-10.img", "1/inventory.img",
]  # fmt: skip


@settings(SETTINGS, max_examples=250)
@given(name=st.sampled_from(IMAGES), changes=st.lists(mutation, min_size=1, max_size=4))
def test_a_changed_directory(chain, name, changes):
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "c"
        shutil.copytree(chain, base, symlinks=True)
        image = base / name
        image.write_bytes(mutate(image.read_bytes(), changes))
        findings = verify(base / "0")
        assert all("\n" not in str(finding) for finding in findings)
        try:
            load(base / "0").close()
            loads = True
        except ImageError as error:
            loads = False
            assert str(error) in [str(finding) for finding in findings]
        assert loads or findings
        if not findings:
            render(describe(base / "0"))
        with only_image_errors():
            describe(base / "0")
