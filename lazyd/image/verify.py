# SPDX-License-Identifier: MIT
"""Check a directory of images whole, and go on after the first problem.

Looks at more than load() does: at every pagemap image of every level of the chain, those of shared memory and
of tasks that only an ancestor knows included; at the core image of every task; and at whether each page of a
task lies in one of its VMAs.
"""

from __future__ import annotations

import os
from pathlib import Path

from lazyd.errors import ImageError
from lazyd.image import chain
from lazyd.image.checkpoint import (
    Level,
    Report,
    TaskFiles,
    check_inventory,
    flatten,
    pagemap_name,
    read_level,
    read_tasks,
    report_broken_holes,
)
from lazyd.image.directory import ImagesDirectory, Vma
from lazyd.image.pagemap import Dialect, ExtentTable, Pagemap, decide_dialect, find_evidence
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE


class Finding(NamedTuple):
    """One thing that is wrong; str() is the line for people."""

    path: Path
    offset: int | None
    address: int | None
    reason: str

    def __str__(self) -> str:
        return str(ImageError(self.path, self.reason, offset=self.offset, address=self.address))


def verify(path: Path, dialect: str = "auto") -> list[Finding]:
    """Return all that is wrong with a directory and its chain of parents; nothing, if it can be served."""
    findings: list[Finding] = []

    def report(error: ImageError) -> None:
        findings.append(Finding(error.path, error.offset, error.address, error.reason))

    levels: list[Level] = []
    tasks: list[TaskFiles] = []
    whole_chain = True
    try:
        for directory in chain.walk_chain(path):
            check_inventory(directory, len(levels), report)
            if not levels:
                tasks = read_tasks(directory, report)
                _check_cores(directory, tasks, report)
            names = {pagemap_name(task.pid) for task in tasks if not task.is_zombie}
            names |= set(_pagemap_names(directory, report))
            levels.append(read_level(directory, sorted(names), report))
    except ImageError as error:
        report(error)
        whole_chain = False
    if levels:
        _check_pagemaps(levels, tasks, dialect, report, whole_chain=whole_chain)
    return findings


def _pagemap_names(directory: ImagesDirectory, report: Report) -> list[str]:
    try:
        with os.scandir(directory.fd) as entries:
            names = [entry.name for entry in entries]
    except OSError as error:
        report(ImageError(directory.path, (error.strerror or "").lower()))
        return []
    return [name for name in names if name.startswith("pagemap-") and name.endswith(".img")]


def _check_cores(directory: ImagesDirectory, tasks: list[TaskFiles], report: Report) -> None:
    for task in tasks:
        path = directory.path / f"core-{task.pid}.img"
        try:
            core = directory.read_core(task.pid)
            if core.state is None:
                raise ImageError(path, f"task state {core.state_number}, of which nothing is known here")
        except FileNotFoundError:
            report(ImageError(path, "missing"))
        except ImageError as error:
            report(error)


def _check_pagemaps(
    levels: list[Level], tasks: list[TaskFiles], asked: str, report: Report, *, whole_chain: bool
) -> None:
    vmas_of = {pagemap_name(task.pid): task.vmas for task in tasks if not task.is_zombie}
    for name in vmas_of:
        if name not in levels[0].maps:
            report(ImageError(levels[0].path / name, "missing, though the task has memory"))
    dialects = _decide_dialects(levels, set(vmas_of), asked, report, has_parent=len(levels) > 1 or not whole_chain)
    for name in sorted({name for level in levels for name in level.maps}):
        dialect = dialects[name in vmas_of]
        if dialect is None:
            continue
        extents = _check_chain_of(levels, name, dialect, report, whole_chain=whole_chain)
        if extents is not None and name in vmas_of:
            _check_inside(extents, vmas_of[name], levels[0].path / name, report)


def _decide_dialects(
    levels: list[Level], of_tasks: set[str], asked: str, report: Report, *, has_parent: bool
) -> dict[bool, Dialect | None]:
    """Decide the dialect of the tasks' images (True), as load() does, and that of all others (False).

    None where they are corrupt. Without evidence of their own the others are read as the tasks' are.
    """
    groups: dict[bool, list[Pagemap]] = {True: [], False: []}
    for level in levels:
        for name, found in level.maps.items():
            if found is not None:
                groups[name in of_tasks].append(found.pagemap)
    dialects: dict[bool, Dialect | None] = {True: None, False: None}
    try:
        dialects[True] = decide_dialect(groups[True], asked, has_parent=has_parent)[0]
        dialects[False] = dialects[True]
        evidence = find_evidence(groups[False]) if asked == "auto" else None
        if evidence is not None:
            dialects[False] = evidence[0]
    except ImageError as error:
        report(error)
    return dialects


def _check_chain_of(
    levels: list[Level], name: str, dialect: Dialect, report: Report, *, whole_chain: bool
) -> ExtentTable | None:
    """Flatten one pagemap name; return what the youngest directory has of it, if all of it could be read."""
    flat = flatten(levels, name, dialect, report)
    extents = flat.table.finish({}, len(levels))
    if not flat.whole or name not in levels[0].maps:
        return None
    report_broken_holes(levels, name, extents, report, whole_chain=whole_chain)
    return extents


def _check_inside(extents: ExtentTable, vmas: list[Vma], path: Path, report: Report) -> None:
    """Report pages that no VMA holds, once for each gap between VMAs."""
    number = 0
    stray_pages = first_stray = 0

    def report_stray() -> None:
        nonlocal stray_pages
        if stray_pages:
            report(ImageError(path, f"{stray_pages} pages from here on lie in no VMA", address=first_stray))
        stray_pages = 0

    for start, pages, *_ in extents.rows():
        at, end = start, start + pages * PAGE_SIZE
        while at < end:
            while number < len(vmas) and vmas[number].end <= at:
                report_stray()
                number += 1
            if number < len(vmas) and vmas[number].start <= at:
                at = min(end, vmas[number].end)
                continue
            stop = min(end, vmas[number].start) if number < len(vmas) else end
            if not stray_pages:
                first_stray = at
            stray_pages += (stop - at) // PAGE_SIZE
            at = stop
    report_stray()
