# SPDX-License-Identifier: MIT
"""Which memory of a task is dumped, and how: the areas that its mappings are cut into.

As CRIU has it. vvar and vsyscall are the kernel's and never dumped; a shared mapping of a file is in the file. The
vdso is dumped whole, so that a restore on another kernel can tell. Lazy is what `criu restore --lazy-pages` leaves to
a daemon, except the page in which a thread's stack pointer is: the restorer itself needs it. MADV_DONTDUMP is about
core dumps: a task that goes on needs what is there.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable

from lazyd.dump.memory import Area, AreaKind
from lazyd.target.mappings import MAP_ANONYMOUS, MAP_LOCKED, MAP_PRIVATE, Mapping, MappingKind
from lazyd.units import PAGE_SIZE

_KINDS = {
    MappingKind.PRIVATE: AreaKind.PRIVATE_ANON,
    MappingKind.PRIVATE_FILE: AreaKind.PRIVATE_FILE,
    MappingKind.SHARED: AreaKind.SHARED_ANON,
    MappingKind.VDSO: AreaKind.WHOLE,
}


def is_lazy(mapping: Mapping) -> bool:
    """Say whether a restore leaves a mapping to lazy pages."""
    is_private = mapping.flags & (MAP_PRIVATE | MAP_ANONYMOUS) == MAP_PRIVATE | MAP_ANONYMOUS
    return mapping.kind is MappingKind.PRIVATE and is_private and not mapping.flags & MAP_LOCKED


def areas_of(mappings: Iterable[Mapping], stack_pointers: Iterable[int]) -> list[Area]:
    """Return the areas of a task, sorted and disjoint."""
    pages = sorted({pointer & -PAGE_SIZE for pointer in stack_pointers})
    areas: list[Area] = []
    for mapping in mappings:
        kind = _KINDS.get(mapping.kind)
        if kind is None:
            continue
        if not is_lazy(mapping):
            areas.append(Area(mapping.start, mapping.end, kind, shmid=mapping.shared_inode, pgoff=mapping.offset))
            continue
        at = mapping.start
        for page in pages[bisect_left(pages, mapping.start) : bisect_left(pages, mapping.end)]:
            if at < page:
                areas.append(Area(at, page, kind, lazy=True))
            areas.append(Area(page, page + PAGE_SIZE, kind))
            at = page + PAGE_SIZE
        if at < mapping.end:
            areas.append(Area(at, mapping.end, kind, lazy=True))
    return areas
