# SPDX-License-Identifier: MIT
"""Dump the task of pages.c as the verbs do, and read the images back without lazyd's code."""

from __future__ import annotations

from pathlib import Path

from images_builder import Task, build_checkpoint, read_entries
from pages_victim import PAGE, Victim

from lazyd.dump.core import Area, AreaKind, PagemapFormat
from lazyd.dump.memory import MemoryCounts, MemoryDump
from lazyd.dump.tracker import Tracker, needs_uffd, take
from lazyd.dump.transfer import LocalImages
from lazyd.image import Dialect
from lazyd.image.writer import ImagesWriter

_ANON = {"flags": 0x22, "status": 1 | 1 << 9}
_FILE = {"flags": 0x02, "status": 1 | 1 << 6}


def write_small_images(writer: ImagesWriter, folder: Path, pid: int, areas: list[Area]) -> None:
    """Write what readers need beside memory, by the tests' own writer."""
    vmas = [
        {"start": a.start, "end": a.end, "prot": 3, **(_FILE if a.kind is AreaKind.PRIVATE_FILE else _ANON)}
        for a in areas
        if a.kind is not AreaKind.SHARED_ANON
    ]
    small = build_checkpoint(folder, [Task(pid, vmas=vmas)])
    for name in ("inventory.img", "pstree.img", f"core-{pid}.img", f"mm-{pid}.img"):
        writer.write_file(name, (small / name).read_bytes())


def tracker_for(victim: Victim, parent: Path | None, *, to_track: bool) -> Tracker | None:
    """What a verb would get: the tracker that is there, else a new one if it is to be left."""
    tracker = take(victim.pid, parent, f"pagemap-{victim.pid}.img", to_track=to_track)
    if tracker is None and to_track:
        tracker = Tracker.start(victim.pid, victim.uffd() if needs_uffd() else -1)
    return tracker


def dump(
    victim: Victim,
    path: Path,
    areas: list[Area] | None = None,
    *,
    parent: Path | None = None,
    form: PagemapFormat | None = None,
    track: bool = False,
    punched: list[int] | None = None,
    while_stopped=None,
    after_early=None,
) -> MemoryCounts:
    """Dump the victim as `lazyd dump --leave-running`, or (track) `lazyd pre-dump`; it is stopped meanwhile.

    punched: dedup, and tell there how many bytes were freed. after_early: copy its pages while it runs, then do this.
    """
    tracker = tracker_for(victim, parent, to_track=track)
    if tracker is None and after_early:
        tracker = Tracker.start(victim.pid, victim.uffd())
    try:
        with ImagesWriter(path, parent=parent) as writer:
            images = LocalImages(writer, form, auto_dedup=punched is not None)
            memory = MemoryDump(images)
            memory.prepare(victim.pid, is_incremental=parent is not None)
            if after_early:
                assert tracker.is_free
                assert memory.copy_early(victim.pid, victim.areas() if areas is None else areas, tracker, lambda: None)
                areas = after_early()
            victim.stop()
            try:
                areas = victim.areas() if areas is None else areas
                memory.dump(victim.pid, areas, tracker=tracker, keep_tracking=track)
                memory.dump_shared()
                if while_stopped:
                    while_stopped()
            finally:
                victim.go()
            counts = memory.finish()
            write_small_images(writer, path.with_name(path.name + ".small"), victim.pid, areas)
            writer.publish()
            if punched is not None:
                punched.append(images.punch_parents())
        if track and tracker is not None:
            assert tracker.leave(path, f"pagemap-{victim.pid}.img") == ""
    finally:
        if tracker is not None:
            tracker.close()
    return counts


def read_back(
    directory: Path, name: str, form: PagemapFormat, known: dict[Path, dict[int, bytes]] | None = None
) -> dict[int, bytes]:
    """All pages that a chain of images has under a pagemap's name, entry by entry, page by page.

    `known` is what was read before, by directory; what is read now is added.
    """
    known = {} if known is None else known
    if directory in known:
        return known[directory]
    dialect = "booleans" if form.dialect is Dialect.BOOLEANS else "flags"
    pages_id, entries = read_entries(directory / name, dialect)
    parent: dict[int, bytes] | None = None
    found: dict[int, bytes] = {}
    with (directory / f"pages-{pages_id}.img").open("rb") as pages:
        for entry in entries:
            for at in range(entry.start, entry.end, PAGE):
                if entry.kind == "dumped":
                    found[at] = pages.read(PAGE)
                    assert len(found[at]) == PAGE
                elif entry.kind == "zero":
                    found[at] = bytes(PAGE)
                else:
                    assert entry.kind == "parent"
                    if parent is None:
                        parent = read_back((directory / "parent").resolve(), name, form, known)
                    found[at] = parent[at]
        assert not pages.read(1), "more pages than entries"
    known[directory] = found
    return found


def entry_kinds(directory: Path, name: str, form: PagemapFormat) -> dict[int, str]:
    """What the entry of each page says."""
    dialect = "booleans" if form.dialect is Dialect.BOOLEANS else "flags"
    return {
        at: entry.kind
        for entry in read_entries(directory / name, dialect)[1]
        for at in range(entry.start, entry.end, PAGE)
    }
