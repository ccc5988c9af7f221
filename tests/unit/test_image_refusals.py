# SPDX-License-Identifier: MIT
"""Every bad image gets one line that names file, offset, address and reason, from load and from verify."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest
from images_builder import PAGE, Entry, Task, build_chain, build_checkpoint, frame, pagemap_image, write_mm

from lazyd.errors import ImageError
from lazyd.image import load
from lazyd.image.verify import verify

BASE = 0x7F0000000000
LATER = BASE + 9 * PAGE
USER_END = (1 << 47) - PAGE
HEAD = b"\x08\x01"
FIRST = 8 + 4 + len(HEAD)  # offset of the first entry's record


def varint(value: int) -> bytes:
    out = b""
    while value > 0x7F:
        out += bytes([value & 0x7F | 0x80])
        value >>= 7
    return out + bytes([value])


def entry(address: int, pages: int, four: int | None = None, *, three: int | None = None, five: int | None = None):
    fields = ((1, address), (2, pages), (3, three), (4, four), (5, five))
    return b"".join(bytes([n << 3]) + varint(value) for n, value in fields if value is not None)


GOOD = entry(BASE, 2, 4)
SECOND = FIRST + 4 + len(GOOD)  # offset of a record that follows GOOD
BARE = entry(BASE, 2)


def records(*bodies: bytes) -> bytes:
    return frame("pagemap", [HEAD, *bodies])


def refused(path: Path, **options) -> ImageError:
    """Load, which must fail; verify must say the same first, and nobody may write anything."""
    before = sorted(os.walk(path))
    with pytest.raises(ImageError) as caught:
        load(path, **options)
    error = caught.value
    assert "\n" not in str(error)
    findings = verify(path, options.get("dialect", "auto"))
    assert str(error) in [str(finding) for finding in findings]
    assert sorted(os.walk(path)) == before
    return error


BAD_PAGEMAPS = {
    # name: (image, offset, address, words)
    "nothing": (b"", 0, None, "truncated"),
    "half a magic": (b"\x19\x43", 0, None, "truncated"),
    "one magic": (b"\x19\x43\x56\x54", 4, None, "truncated"),
    "a wrong first magic": (b"\x00" * 64, 0, None, "not a pagemap image"),
    "a wrong second magic": (
        struct.pack("<II", 0x54564319, 0x57492820) + b"\0" * 9,
        4,
        None,
        "magic 0x57492820",
    ),
    "no head": (frame("pagemap", []), 8, None, "no head"),
    "a head of nothing": (frame("pagemap", [b""]), 8, None, "lacks field 1"),
    "a head with an unknown field": (frame("pagemap", [HEAD + b"\x18\x01"]), 14, None, "unknown field 3"),
    "a head out of range": (frame("pagemap", [b"\x08" + varint(1 << 32)]), 8, None, "field 1"),
    "half a record length": (records(GOOD) + b"\x01\x00", SECOND, None, "truncated: 4 bytes wanted here, 2"),
    "half a record": (records(GOOD)[:-1], FIRST, None, "truncated"),
    "a record of 4 GiB": (records(GOOD) + b"\xff" * 8, SECOND, None, "a record of 4294967295 bytes"),
    "a record of 4 KiB and 1": (
        records(GOOD) + b"\x01\x10\0\0" + b"\0" * 4097,
        SECOND,
        None,
        "of 4097 bytes",
    ),
    "an empty record": (records(GOOD, b""), SECOND, None, "lacks field 1"),
    "no count": (records(GOOD, b"\x08" + varint(LATER)), SECOND, None, "lacks field 2"),
    "a varint without an end": (records(GOOD, b"\x08" + b"\xff" * 11), SECOND + 4, None, "protobuf"),
    "a varint of 70 bits": (
        records(GOOD, b"\x08" + b"\xff" * 9 + b"\x02\x10\x01"),
        SECOND + 4,
        None,
        "protobuf",
    ),
    "a tag without a value": (
        records(GOOD, entry(LATER, 1) + b"\x20"),
        SECOND + 4 + len(BARE),
        None,
        "protobuf",
    ),
    "field number 0": (records(GOOD, b"\x00\x00"), SECOND + 4, None, "protobuf"),
    "an unknown field": (
        records(GOOD, entry(LATER, 1, 4) + b"\x30\x01"),
        SECOND + 4 + len(GOOD),
        None,
        "unknown field 6: ",
    ),
    "a field of another type": (records(GOOD, b"\x0d\0\0\0\0"), SECOND + 4, None, "field 1 has wire type 5"),
    "a count above 32 bits": (records(GOOD, entry(LATER, 1 << 32, 4)), SECOND, LATER, "field 2"),
    "unknown flags": (records(GOOD, entry(LATER, 1, 12)), SECOND, LATER, "field 4 is 0xc"),
    "two counts": (records(GOOD, entry(LATER, 3, 4, five=2)), SECOND, LATER, "3 pages in field 2, 2"),
    "no pages": (records(GOOD, entry(LATER, 0, 4)), SECOND, LATER, "no pages"),
    "no pages twice": (records(GOOD, entry(LATER, 0, 4, five=0)), SECOND, LATER, "no pages"),
    "unaligned": (records(GOOD, entry(LATER + 8, 1, 4)), SECOND, LATER + 8, "not page-aligned"),
    "unsorted": (
        records(GOOD, entry(BASE - PAGE, 1, 4)),
        SECOND,
        BASE - PAGE,
        f"unsorted: the entry before starts at {BASE:#x}",
    ),
    "overlapping": (
        records(GOOD, entry(BASE + PAGE, 1, 4)),
        SECOND,
        BASE + PAGE,
        f"overlaps the entry before, {BASE:#x}-",
    ),
    "the same twice": (records(GOOD, GOOD), SECOND, BASE, "overlaps"),
    "outside user space": (records(GOOD, entry(USER_END, 1, 4)), SECOND, USER_END, "not inside user space"),
    "across the end": (
        records(GOOD, entry(USER_END - PAGE, 2, 4)),
        SECOND,
        USER_END - PAGE,
        "not inside user space",
    ),
    "beyond 64 bits": (
        records(GOOD, entry(LATER, 0, 4, five=(1 << 64) - 1)),
        SECOND,
        LATER,
        "not inside user space",
    ),
    "present and parent": (records(GOOD, entry(LATER, 1, 5)), SECOND, LATER, "contradictory"),
    "present, in parent": (
        records(GOOD, entry(LATER, 1, 4, three=1)),
        SECOND,
        LATER,
        "contradictory for the flags dialect",
    ),
    "count 5 is 0 in flags": (records(GOOD, entry(LATER, 1, 4, five=0)), SECOND, LATER, "contradictory"),
    "zero and parent": (
        records(BARE, entry(LATER, 1, 1, three=1)),
        FIRST + 4 + len(BARE),
        LATER,
        "contradictory for the booleans dialect: field 3 is 1, field 4 is 1, field 5 is 0",
    ),
    "zero and lazy": (
        records(BARE, entry(LATER, 1, 1, five=1)),
        FIRST + 4 + len(BARE),
        LATER,
        "field 4 is 1, field 5 is 1",
    ),
    "both dialects": (
        records(GOOD, entry(LATER, 1)),
        SECOND,
        LATER,
        "corrupt: the images mix two dialects",
    ),
}


@pytest.mark.parametrize("name", BAD_PAGEMAPS)
def test_a_bad_pagemap_is_refused(tmp_path, name):
    image, offset, address, words = BAD_PAGEMAPS[name]
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    path = directory / "pagemap-10.img"
    path.write_bytes(image)
    os.truncate(directory / "pages-1.img", 64 * PAGE)
    error = refused(directory)
    assert (error.path, error.offset, error.address) == (path, offset, address), error
    assert words in error.reason


def test_every_truncation_of_a_pagemap_is_refused(tmp_path):
    entries = [Entry(BASE + i * 2 * PAGE, 1) for i in range(3)]
    directory = build_checkpoint(tmp_path / "i", [Task(10, entries)])
    load(directory).close()
    path = directory / "pagemap-10.img"
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        assert refused(directory).path == path
    # The cut behind a record is seen by the pages that nobody names.
    path.write_bytes(pagemap_image(entries[:2], "flags"))
    assert refused(directory).reason == "truncated: it names 8192 bytes of pages-1.img, which has 12288"


@pytest.mark.parametrize("dialect", ["flags", "flags64", "booleans"])
def test_a_pages_image_too_short_is_named_with_where_it_ends(tmp_path, dialect):
    entries = [Entry(BASE, 4), Entry(BASE + 8 * PAGE, 1, "zero"), Entry(BASE + 16 * PAGE, 4)]
    directory = build_checkpoint(tmp_path / "i", [Task(10, entries)], dialect=dialect)
    pages = directory / "pages-1.img"
    for size, address in ((8 * PAGE - 1, BASE + 19 * PAGE), (5 * PAGE, BASE + 17 * PAGE), (0, BASE)):
        os.truncate(pages, size)
        error = refused(directory)
        assert (error.path, error.offset, error.address) == (pages, size, address)
        assert error.reason.startswith("too short, it ends here: ")
        assert f"{directory / 'pagemap-10.img'} (offset " in error.reason
    pages.unlink()
    error = refused(directory)
    assert (error.path, error.offset, error.address) == (pages, None, BASE)
    assert error.reason.startswith("missing: ")


def test_a_short_pages_image_of_an_ancestor_is_refused_even_where_it_does_not_show(tmp_path):
    levels = [[Task(10, [Entry(BASE, 4)])], [Task(10, [Entry(BASE, 4)])]]
    directory = build_chain(tmp_path, levels)
    os.truncate(tmp_path / "1" / "pages-1.img", PAGE)
    error = refused(directory)
    assert (error.path, error.offset, error.address) == (tmp_path / "1" / "pages-1.img", PAGE, BASE + PAGE)


def test_a_missing_or_empty_directory(tmp_path):
    assert "no such file" in refused(tmp_path / "none").reason
    (tmp_path / "file").touch()
    assert "not a directory" in refused(tmp_path / "file").reason
    error = refused(tmp_path)
    assert (error.path, error.reason) == (tmp_path, "no inventory.img in it: not a directory of CRIU images")


@pytest.mark.parametrize("name", ["inventory.img", "pstree.img", "mm-10.img"])
def test_small_images_truncated_anywhere_or_garbled(tmp_path, name):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    path = directory / name
    whole = path.read_bytes()
    first = 4 if name == "inventory.img" else 8
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        error = refused(directory)
        assert error.path == path
        assert length in (0, first) or error.offset is not None
    path.write_bytes(whole[:first] + b"\xff\xff\xff\xff" + whole[first + 4 :])
    error = refused(directory)
    assert (error.path, error.offset) == (path, first)
    assert "a record of 4294967295 bytes" in error.reason
    path.write_bytes(whole[: first + 4] + b"\xff" * (len(whole) - first - 4))
    error = refused(directory)
    assert (error.path, error.offset) == (path, first)
    assert "garbled" in error.reason
    path.write_bytes(b"\x55" * 40)
    assert (refused(directory).offset, "magic 0x55555555" in refused(directory).reason) == (0, True)


@pytest.mark.parametrize("version", [0, 3, 2**32 - 1])
def test_an_unknown_version(tmp_path, version):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])], version=version)
    error = refused(directory)
    assert (error.path, error.offset) == (directory / "inventory.img", 4)
    assert f"images of version {version}" in error.reason


def test_an_unknown_version_of_an_ancestor(tmp_path):
    build_checkpoint(tmp_path / "1", [Task(10, [Entry(BASE, 2)])], version=7)
    directory = build_checkpoint(tmp_path / "0", [Task(10, [Entry(BASE, 2)])], parent=tmp_path / "1")
    assert refused(directory).path == tmp_path / "1" / "inventory.img"


@pytest.mark.parametrize(
    ("tasks", "words"),
    [
        ([], "lists no task"),
        ([Task(10), Task(10, ppid=10)], "task 10 is listed twice"),
        ([Task(0)], "0 is no pid"),
        ([Task(1 << 31)], "is no pid"),
        ([Task(10), Task(11, ppid=12)], "task 11 has parent 12, which is not listed before it"),
    ],
)
def test_a_tree_that_is_none(tmp_path, tasks, words):
    directory = build_checkpoint(tmp_path / "i", tasks)
    error = refused(directory)
    assert error.path == directory / "pstree.img"
    assert words in error.reason


@pytest.mark.parametrize(
    ("vma", "words"),
    [
        ({"start": BASE + 8 * PAGE + 1, "end": LATER}, "not page-aligned"),
        ({"start": LATER, "end": LATER}, "empty or backwards"),
        ({"start": BASE + PAGE, "end": LATER}, "not behind the one before"),
        ({"start": USER_END - PAGE, "end": USER_END + PAGE}, "not inside user space"),
    ],
)
def test_a_vma_that_is_none(tmp_path, vma, words):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    write_mm(directory / "mm-10.img", [{"start": BASE, "end": BASE + 2 * PAGE}, vma])
    error = refused(directory)
    assert (error.path, error.offset, error.address) == (directory / "mm-10.img", 8, vma["start"])
    assert words in error.reason


def test_guard_pages_are_no_vmas(tmp_path):
    """criu 4.2.1 lists them behind all VMAs, those of MADV_GUARD_INSTALL, inside of which they are."""
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    guard = {"start": BASE, "end": BASE + PAGE, "prot": 0, "flags": 0, "status": 1 << 16}
    write_mm(directory / "mm-10.img", [{"start": BASE, "end": BASE + 2 * PAGE}, guard])
    with load(directory) as checkpoint:
        assert [(vma.start, vma.end) for vma in checkpoint.tasks[0].vmas] == [(BASE, BASE + 2 * PAGE)]
    assert verify(directory) == []


def test_files_that_are_missing(tmp_path):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    (directory / "pagemap-10.img").unlink()
    error = refused(directory)
    assert (error.path, error.reason) == (directory / "pagemap-10.img", "missing, though the task has memory")
    (directory / "mm-10.img").unlink()
    error = refused(directory)
    assert error.path == directory / "mm-10.img"
    assert "core-10.img does not say that the task is a zombie" in error.reason
    (directory / "core-10.img").unlink()
    assert "so is core-10.img" in refused(directory).reason
    (directory / "pstree.img").unlink()
    assert refused(directory).path == directory / "pstree.img"


def test_what_is_no_regular_file(tmp_path):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    for name in ("pagemap-10.img", "inventory.img"):
        (directory / name).unlink()
        os.mkfifo(directory / name)
        error = refused(directory)
        assert (error.path, error.reason) == (directory / name, "not a regular file")


def test_a_broken_parent_link(tmp_path):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2, "parent")])])
    link = directory / "parent"
    link.symlink_to("../gone")
    error = refused(directory)
    assert error.path == link
    assert error.reason == "broken parent link: ../gone: no such file or directory"
    link.unlink()
    link.symlink_to("inventory.img")
    assert "not a directory" in refused(directory).reason
    link.unlink()
    link.symlink_to("parent")
    assert refused(directory).path == link


@pytest.mark.parametrize("length", [1, 2, 7])
def test_a_circular_parent_link(tmp_path, length):
    levels = [[Task(10, [Entry(BASE, 2, "parent")])] for _ in range(length)]
    directory = build_chain(tmp_path, levels)
    link = tmp_path / str(length - 1) / "parent"
    link.symlink_to("../0")
    error = refused(directory)
    assert error.path == link
    assert error.reason == f"circular parent link: it leads back to {directory}"


def test_a_hole_that_no_ancestor_covers_names_the_image_where_the_chain_breaks(tmp_path):
    young = [Entry(BASE, 8, "parent")]
    middle = [Entry(BASE, 3), Entry(BASE + 3 * PAGE, 2, "parent"), Entry(BASE + 6 * PAGE, 2)]
    old = [Entry(BASE, 4)]
    directory = build_chain(tmp_path, [[Task(10, entries)] for entries in (young, middle, old)])
    error = refused(directory)
    findings = verify(directory)
    assert [(f.path, f.offset, f.address) for f in findings] == [
        (tmp_path / "1" / "pagemap-10.img", FIRST + 4 + len(GOOD), BASE + 4 * PAGE),
        (directory / "pagemap-10.img", FIRST, BASE + 5 * PAGE),
    ]
    assert findings[0].reason == f"broken chain: 1 pages are in the parent, but {tmp_path / '2'} has no entry there"
    assert str(error) == str(findings[0])


def test_a_hole_where_the_parent_does_not_know_the_task_or_there_is_no_parent(tmp_path):
    entries = [Entry(BASE, 1), Entry(BASE + PAGE, 1, "parent")]
    directory = build_checkpoint(tmp_path / "alone", [Task(10, entries)])
    assert refused(directory).reason == f"broken chain: 1 pages are in the parent, but {directory} has no parent"
    levels = [[Task(10, entries)], [Task(11, [Entry(BASE, 4)])]]
    directory = build_chain(tmp_path, levels)
    assert refused(directory).reason.endswith(f"{tmp_path / '1'} has no pagemap-10.img")
    # A task that skips a generation does not see through the gap.
    directory = build_chain(tmp_path / "gap", [*levels, [Task(10, [Entry(BASE, 4)])]])
    assert refused(directory).path == directory / "pagemap-10.img"


def test_a_broken_hole_that_does_not_show_is_no_error(tmp_path):
    levels = [
        [Task(10, [Entry(BASE, 4), Entry(BASE + 8 * PAGE, 1, "parent")])],
        [Task(10, [Entry(BASE, 4, "parent"), Entry(BASE + 8 * PAGE, 1)])],
    ]
    directory = build_chain(tmp_path, levels)
    load(directory).close()
    assert verify(directory) == []


def test_a_dialect_that_is_forced_but_cannot_be(tmp_path):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    error = refused(directory, dialect="booleans")
    assert (error.offset, error.address) == (FIRST, BASE)
    assert "field 4 is 6, which the booleans dialect never says" in error.reason


def test_verify_goes_on_after_the_first_problem(tmp_path):
    levels = [
        [
            Task(10, [Entry(BASE, 2)]),
            Task(11, [Entry(BASE, 2)], ppid=10),
            Task(12, [Entry(BASE, 2)], ppid=10),
        ],
        [Task(10, [Entry(BASE, 2)]), Task(99, [Entry(BASE, 2)], ppid=10)],
    ]
    directory = build_chain(tmp_path, levels)
    os.truncate(directory / "pages-2.img", PAGE)
    (directory / "pagemap-10.img").write_bytes(b"")
    (directory / "mm-12.img").write_bytes(b"")
    (directory / "core-11.img").unlink()
    (directory / "pagemap-shmem-5.img").write_bytes(records(entry(8, 1, 4)))
    os.truncate(tmp_path / "1" / "pages-2.img", 0)
    assert {f.path.relative_to(tmp_path).as_posix() for f in verify(directory)} == {
        "0/pages-2.img",
        "0/pagemap-10.img",
        "0/mm-12.img",
        "0/core-11.img",
        "0/pagemap-shmem-5.img",
        "1/pages-2.img",
    }


def test_verify_names_pages_outside_every_vma(tmp_path):
    entries = [Entry(BASE, 4), Entry(BASE + 6 * PAGE, 1), Entry(LATER, 2)]
    vmas = [
        {"start": BASE + PAGE, "end": BASE + 3 * PAGE},
        {"start": LATER, "end": BASE + 10 * PAGE},
    ]
    directory = build_checkpoint(tmp_path / "i", [Task(10, entries, vmas=vmas)])
    found = [(f.address, f.reason) for f in verify(directory)]
    assert found == [
        (BASE, "1 pages from here on lie in no VMA"),
        (BASE + 3 * PAGE, "2 pages from here on lie in no VMA"),
        (BASE + 10 * PAGE, "1 pages from here on lie in no VMA"),
    ]
