# SPDX-License-Identifier: MIT
"""The images that a new dump names as its parent: what they have of each pagemap, and in which dialect.

All readers decide the dialect over a whole chain, so that a new image must be in that of its parents. They are
loaded before the task is stopped, and whole: a chain that cannot be read is found before anything depends on it.
"""

from __future__ import annotations

from pathlib import Path

from lazyd.errors import ImageError
from lazyd.hints import NoReturn
from lazyd.image import chain
from lazyd.image.checkpoint import Level, flatten, read_level, report_broken_holes
from lazyd.image.pagemap import Dialect, ExtentTable, Pagemap, check_dialect
from lazyd.tuples import NamedTuple


class ParentTable(NamedTuple):
    """What a chain has of one pagemap: the flat table, and the pages image that each of its sources is."""

    extents: ExtentTable
    sources: list[Path]
    dialect: Dialect


def _stop(error: ImageError) -> NoReturn:
    raise error


def load_parent(path: Path, name: str, dialect: Dialect | None) -> ParentTable | None:
    """Return what the images in `path` and their parents have under this pagemap's name; None: nothing.

    `dialect` is the one of the new image; None: it will be in that of the chain. Raises ImageError if the chain is not
    whole, or in another one.
    """
    levels: list[Level] = [read_level(directory, [name], _stop) for directory in chain.walk_chain(path)]
    if name not in levels[0].maps:
        return None
    pagemaps = [found.pagemap for level in levels for found in level.maps.values() if found]
    if dialect is None:
        dialect = _find_dialect(pagemaps)
    check_dialect(pagemaps, dialect)
    del pagemaps
    table = flatten(levels, name, dialect, _stop).table
    used = table.used_levels(len(levels))
    sources = []
    for number in used:
        found = levels[number].maps[name]
        assert found is not None, "the first bad image stops the load"
        sources.append(found.pages_path)
    extents = table.finish({level: number for number, level in enumerate(used)}, len(levels))
    report_broken_holes(levels, name, extents, _stop)
    return ParentTable(extents, sources, dialect)


def _find_dialect(pagemaps: list[Pagemap]) -> Dialect:
    """Return the dialect that a new image beside these must be in: flags, where they would be read as that, too."""
    try:
        check_dialect(pagemaps, Dialect.FLAGS)
    except ImageError:
        return Dialect.BOOLEANS
    return Dialect.FLAGS
