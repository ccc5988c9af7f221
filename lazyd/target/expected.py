# SPDX-License-Identifier: MIT
"""What passes between a session and the attaching to tasks: what the images expect of one, and what was got."""

from __future__ import annotations

from collections.abc import Sequence

from lazyd.image.directory import Program, Vma
from lazyd.image.pagemap import ExtentTable
from lazyd.tuples import NamedTuple


class Expected(NamedTuple):
    """What the images say of a task's lazy memory. `filled`: ranges in it that a restorer fills itself, sorted.

    `sources`: descriptors of the pages images that `extents` names.
    """

    image_pid: int
    vmas: Sequence[Vma]
    filled: Sequence[tuple[int, int]]
    program: Program | None
    extents: ExtentTable
    sources: Sequence[int]


class Attached(NamedTuple):
    """A task whose lazy memory is registered. The descriptor is whoever's who serves it."""

    image_pid: int
    pid: int
    uffd: int
