# SPDX-License-Identifier: MIT
"""Loading whole directories: real ones, and made up ones.

real_images/ holds, for each CRIU, the small images of a dump of a program with two threads, a forked child,
a zombie, shared and locked memory. crit.json beside them is what that CRIU's `crit decode` (python3-pycriu)
says of them: pagemap entries as [vaddr, pages, flags], VMAs as [start, end, status, flags], tasks as [pid,
ppid], the state and name of each task, and how large the pages images were.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from images_builder import (
    PAGE,
    Entry,
    Task,
    booleans_from_dump,
    build_chain,
    build_checkpoint,
    chain_from_dump,
    page_pattern,
)

from lazyd.errors import ImageError
from lazyd.image import Dialect, Kind, load
from lazyd.image.show import describe, render
from lazyd.image.verify import verify

BASE = 0x7F0000000000
REAL = sorted((Path(__file__).parent / "real_images").iterdir())
WIDE = {"criu-4.1.1": False, "criu-4.2.1": True}


@pytest.fixture(params=REAL, ids=lambda path: path.name)
def real(request, tmp_path):
    """A real dump. Its pages images, which are not kept, are filled so that no two pages are alike."""
    directory = tmp_path / request.param.name
    shutil.copytree(request.param, directory)
    crit = json.loads((directory / "crit.json").read_text())
    (directory / "crit.json").unlink()
    for number, (name, size) in enumerate(crit["pages"].items()):
        pages = (page_pattern(page * PAGE, number) for page in range(size // PAGE))
        (directory / name).write_bytes(b"".join(pages))
    return directory, crit


def open_descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def page_bytes(checkpoint) -> dict[tuple[int, int], tuple[bytes, bool]]:
    """What every page of every task is: (pid, address) to bytes and lazy."""
    pages = {}
    for task in checkpoint.tasks:
        for extent in task.extents:
            for i in range(extent.pages):
                data = bytes(PAGE)
                if extent.kind is Kind.DUMPED:
                    data = os.pread(checkpoint.sources[extent.source].fd, PAGE, extent.offset + i * PAGE)
                else:
                    assert extent.kind is Kind.ZERO
                pages[task.pid, extent.start + i * PAGE] = (data, extent.lazy)
    return pages


def crit_pages(crit: dict) -> dict[tuple[int, int], tuple[bytes, bool]]:
    """The same from what crit has decoded."""
    pages = {}
    for name, image in crit["pagemaps"].items():
        if "shmem" in name:
            continue
        pid, page = int(name[8:-4]), 0
        number = list(crit["pages"]).index(f"pages-{image['pages_id']}.img")
        for start, count, flags in image["entries"]:
            assert flags & 4
            for i in range(count):
                pages[pid, start + i * PAGE] = (page_pattern(page * PAGE, number), bool(flags & 2))
                page += 1
    return pages


def test_a_real_dump_reads_as_crit_reads_it(real):
    directory, crit = real
    assert verify(directory) == []
    with load(directory) as checkpoint:
        assert checkpoint.path == directory
        assert [[task.pid, task.ppid] for task in checkpoint.tasks] == crit["tasks"]
        states = {task.pid: crit["comms"][f"core-{task.pid}.img"][0] for task in checkpoint.tasks}
        assert [t.is_zombie for t in checkpoint.tasks] == [states[t.pid] == 2 for t in checkpoint.tasks]
        assert sum(task.is_zombie for task in checkpoint.tasks) == 1
        for task in checkpoint.tasks:
            vmas = [[vma.start, vma.end, vma.status, vma.flags] for vma in task.vmas]
            assert vmas == crit["vmas"].get(f"mm-{task.pid}.img", [])
        assert checkpoint.dialect is Dialect.FLAGS
        assert checkpoint.wide_header is WIDE[directory.name]
        assert checkpoint.depth == 1
        assert page_bytes(checkpoint) == crit_pages(crit)
        assert {source.path.name: source.size for source in checkpoint.sources} == {
            name: size for name, size in crit["pages"].items() if name != "pages-1.img"
        }, "shared memory's pages are no task's"


def test_pages_marked_lazy_lie_in_lazy_vmas(real):
    directory, _ = real
    with load(directory) as checkpoint:
        for task in checkpoint.tasks:
            for extent in task.extents:
                vma = next(v for v in task.vmas if v.start <= extent.start < v.end)
                assert vma.is_lazy or not extent.lazy
        kinds = {vma.kind: vma.is_lazy for task in checkpoint.tasks for vma in task.vmas}
    assert kinds["heap"]
    assert not any(kinds[word] for word in ("vdso", "vvar", "vsyscall", "file private", "file shared"))


@pytest.mark.parametrize("levels", [1, 2, 3, 50])
@pytest.mark.parametrize("lazy_holes", [True, False])
def test_a_chain_cut_out_of_a_dump_has_the_same_pages(real, tmp_path, levels, lazy_holes):
    dump, crit = real
    youngest = chain_from_dump(dump, tmp_path / "chain", levels, seed=levels, lazy_holes=lazy_holes)
    assert verify(youngest) == []
    with load(youngest) as checkpoint:
        assert checkpoint.depth == levels
        found, expected = page_bytes(checkpoint), crit_pages(crit)
        assert {page: data for page, (data, _) in found.items()} == {p: data for p, (data, _) in expected.items()}
        lazy, lazy_in_dump = ({p for p, (_, lazy) in pages.items() if lazy} for pages in (found, expected))
        assert lazy == lazy_in_dump if lazy_holes else lazy <= lazy_in_dump
        assert lazy_holes or levels == 1 or lazy != lazy_in_dump


def test_the_booleans_dialect_with_zero_holes_has_the_same_pages(real, tmp_path):
    dump, crit = real
    pages = dump / "pages-2.img"
    data = pages.read_bytes()
    pages.write_bytes(data[: 3 * PAGE] + bytes(2 * PAGE) + data[5 * PAGE :])
    rewritten = booleans_from_dump(dump, tmp_path / "booleans")
    assert verify(rewritten) == []
    with load(dump) as flags, load(rewritten) as booleans:
        assert booleans.dialect is Dialect.BOOLEANS
        assert not booleans.wide_header
        one, two = page_bytes(flags), page_bytes(booleans)
        assert all(lazy for _, lazy in two.values())
        assert {page: data for page, (data, _) in two.items() if page in one} == {
            page: data for page, (data, _) in one.items()
        }
        extra = {page: data for page, (data, _) in two.items() if page not in one}
        assert extra
        assert set(extra.values()) == {bytes(PAGE)}
        kinds = booleans.tasks[0].extents.pages_by_kind()
        assert kinds[Kind.ZERO] > 2
        assert crit_pages(crit).keys() <= two.keys()


def test_remote_pages_are_remote(tmp_path):
    entries = [Entry(BASE, 1), Entry(BASE + PAGE, 3, "remote")]
    for dialect in ("booleans", "flags", "flags64"):
        # One dumped entry beside one of field 5 is no proof of booleans, only a hint.
        directory = build_checkpoint(tmp_path / dialect, [Task(10, entries)], dialect=dialect)
        with load(directory) as checkpoint:
            assert checkpoint.dialect is (Dialect.BOOLEANS if dialect == "booleans" else Dialect.FLAGS)
            assert [(e.kind, e.pages, e.lazy) for e in checkpoint.tasks[0].extents] == [
                (Kind.DUMPED, 1, True),
                (Kind.REMOTE, 3, True),
            ]


def test_a_chain_of_twelve_hundred_opens_only_what_it_needs(tmp_path):
    depth = 1200
    levels = [[Task(10, [Entry(BASE, 2, "parent")])] for _ in range(depth - 1)]
    levels.append([Task(10, [Entry(BASE, 2)])])
    youngest = build_chain(tmp_path, levels)
    before = open_descriptors()
    with load(youngest) as checkpoint:
        assert checkpoint.depth == depth
        assert [s.path for s in checkpoint.sources] == [(tmp_path / str(depth - 1) / "pages-1.img").resolve()]
        assert open_descriptors() == before + 1
        assert [tuple(e) for e in checkpoint.tasks[0].extents] == [(BASE, 2, Kind.DUMPED, True, 0, 0)]
    assert open_descriptors() == before


def test_descriptors_are_closed_after_a_failure(tmp_path):
    tasks = [Task(10, [Entry(BASE, 2)]), Task(11, [Entry(BASE, 2, "parent")], ppid=10)]
    directory = build_checkpoint(tmp_path / "i", tasks)
    before = open_descriptors()
    with pytest.raises(ImageError):
        load(directory)
    assert open_descriptors() == before


def test_the_pages_images_are_open_for_reading_and_not_inherited(tmp_path):
    directory = build_checkpoint(tmp_path / "i", [Task(10, [Entry(BASE, 2)])])
    checkpoint = load(directory)
    source = checkpoint.sources[0]
    assert (source.path, source.size) == (directory / "pages-1.img", 2 * PAGE)
    assert not os.get_inheritable(source.fd)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.write(source.fd, b"x")
    checkpoint.close()
    checkpoint.close()


def test_a_tree_of_tasks_with_a_zombie(tmp_path):
    tasks = [Task(10, [Entry(BASE, 1)])]
    tasks += [Task(11 + i, [Entry(BASE + i * PAGE, 1)], ppid=10 + i // 2) for i in range(48)]
    tasks.append(Task(90, ppid=10, zombie=True))
    with load(build_checkpoint(tmp_path / "i", tasks)) as checkpoint:
        assert [(t.pid, t.ppid, t.is_zombie) for t in checkpoint.tasks] == [(t.pid, t.ppid, t.zombie) for t in tasks]
        assert len(checkpoint.tasks[-1].extents) == 0
        assert checkpoint.tasks[-1].extents.buffer.nbytes == 0
        assert [task.extents[0].source for task in checkpoint.tasks[:-1]] == list(range(49))


def test_the_loader_imports_nothing_heavy():
    heavy = ("rich", "click", "asyncio", "dataclasses", "multiprocessing", "google.protobuf.json_format")
    code = f"import sys, lazyd.image; print([m for m in {heavy!r} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


def test_a_description_adds_up_and_is_json(real):
    directory, crit = real
    description = describe(directory)
    assert json.loads(json.dumps(description)) == description
    pages = crit_pages(crit)
    totals = description["totals"]
    assert totals["extents"]["dumped"]["bytes"] == len(pages) * PAGE
    assert totals["extents"]["dumped"]["bytes_lazy"] == sum(lazy for _, lazy in pages.values()) * PAGE
    assert totals["tasks"] == len(crit["tasks"])
    for task in description["tasks"]:
        in_images = {(int(v["start"], 16), int(v["end"], 16)): v["bytes_in_images"] for v in task["vmas"]}
        for (start, end), covered in in_images.items():
            assert covered == sum(start <= page < end for pid, page in pages if pid == task["pid"]) * PAGE
        assert task["comm"] == crit["comms"][f"core-{task['pid']}.img"][1]
    assert [s["bytes"] for s in description["pages_images"]] == [s["bytes_used"] for s in description["pages_images"]]
    text = render(description)
    assert "a zombie, without memory" in text
    assert all(f"task {pid} " in text or f"task {pid}," in text for pid, _ in crit["tasks"])


def test_a_long_chain_is_described_by_its_ends(tmp_path):
    levels = [[Task(10, [Entry(BASE, 2, "parent")])] for _ in range(19)] + [[Task(10, [Entry(BASE, 2)])]]
    description = describe(build_chain(tmp_path, levels))
    assert len(description["chain"]) == 20
    text = render(description)
    assert "chain of 20 images" in text
    assert "(14 more)" in text
