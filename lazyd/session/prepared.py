# SPDX-License-Identifier: MIT
"""From loaded images to an engine that is ready for their tasks."""

from __future__ import annotations

import os
import resource

from lazyd.errors import ImageError, LazydError, SystemCallError
from lazyd.hints import TYPE_CHECKING
from lazyd.image import Checkpoint, Kind
from lazyd.target import Expected
from lazyd.tuples import NamedTuple
from lazyd.uffd import Engine, OnFork, Served
from lazyd.units import PAGE_SIZE, counted, human_bytes

if TYPE_CHECKING:
    from lazyd.session.remote import RemotePages

_OWN_DESCRIPTORS = 32
"""What is opened later, beside the tasks' own: those of the keeping, the connection, some for forks and for reading."""


class Prepared(NamedTuple):
    """What of the images matters beside the engine. `tasks`: the engine's numbers, by image pid.

    `expected`: what is needed to attach to a task, by image pid; it reads the images, which must stay open.
    `said`: what there is to serve, in one line.
    """

    tasks: dict[int, int]
    zombies: set[int]
    source_names: list[str]
    expected: dict[int, Expected]
    dialect: str
    chain_depth: int
    said: str


def prepare(
    engine: Engine, checkpoint: Checkpoint, attach: frozenset[int] | None, remote: RemotePages | None = None
) -> Prepared:
    """Give an engine all tasks of a checkpoint, or those that are attached to, by image pid. Empties checkpoint.tasks.

    ImageError if they cannot be served, LazydError if there is no room for their descriptors.
    """
    expected = {} if attach is None else _expect(checkpoint, attach)
    for task in checkpoint.tasks:
        pages = task.extents.pages_by_kind()[Kind.REMOTE]
        if pages and remote is None:
            reason = f"{pages} pages of task {task.pid} are only at a page server, and none is given (--page-server)"
            raise ImageError(checkpoint.path, reason)
    for source in checkpoint.sources:
        engine.add_source(source.fd)
    if remote is not None:
        remote.begin()  # behind the files, whose numbers the tables have
    # Taken out one by one: the engine has a copy of its own, and a table can be hundreds of megabytes.
    tasks, checkpoint.tasks = checkpoint.tasks, []
    numbers: dict[int, int] = {}
    zombies: set[int] = set()
    pages = 0
    while tasks:
        task = tasks.pop(0)
        if task.is_zombie:
            zombies.add(task.pid)
            continue
        ranges = [
            Served(vma.start, vma.end, OnFork.ZEROS if vma.is_wiped_on_fork else OnFork.COPY)
            for vma in task.vmas
            if vma.is_lazy
        ]
        numbers[task.pid] = engine.prepare(task.pid, task.extents.buffer, ranges)
        pages += engine.task(numbers[task.pid]).image_pages
    _check_descriptors(len(numbers))
    return Prepared(
        tasks=numbers,
        zombies=zombies,
        source_names=[*(str(source.path) for source in checkpoint.sources), *([remote.name] if remote else [])],
        expected=expected,
        dialect=checkpoint.dialect.value,
        chain_depth=checkpoint.depth,
        said=f"{checkpoint.path}: {counted(len(numbers), 'task')} and {counted(len(zombies), 'zombie')},"
        f" {human_bytes(pages * PAGE_SIZE)} to serve lazily, from {counted(len(checkpoint.sources), 'pages image')}"
        f" in a chain of {checkpoint.depth}; {checkpoint.dialect.value} ({checkpoint.dialect_reason})",
    )


def _check_descriptors(tasks: int) -> None:
    """Refuse to begin what would end for lack of descriptors, with tasks that depend on it.

    The engine has raised the limit as far as it may be. Every task's userfaultfd is open until all are restored.
    """
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        needed = len(os.listdir("/proc/self/fd")) + _OWN_DESCRIPTORS + tasks  # noqa: PTH208  only counted
    except OSError as error:
        raise SystemCallError("counting open files", error.errno or 0) from error
    if needed > limit:
        who = f"{tasks} task{'' if tasks == 1 else 's'}"
        raise LazydError(
            f"{who}: {needed} open files are needed, and the limit is {limit} (raise it: ulimit -n {needed})"
        )


def _expect(checkpoint: Checkpoint, wanted: frozenset[int]) -> dict[int, Expected]:
    """Leave of the images only what is attached to; what its tasks must look like."""
    from lazyd.image.directory import ImagesDirectory  # noqa: PLC0415  few attach

    checkpoint.tasks = [task for task in checkpoint.tasks if task.pid in wanted]
    if missing := sorted(wanted - {task.pid for task in checkpoint.tasks if not task.is_zombie}):
        raise ImageError(checkpoint.path, f"no task {missing[0]} with memory in it; --image-pid names another")
    expected = {}
    directory = ImagesDirectory.open(checkpoint.path)
    try:
        for task in checkpoint.tasks:
            program = directory.read_program(task.pid)
            filled = task.extents.filled_by_restorer()
            sources = [source.fd for source in checkpoint.sources]
            expected[task.pid] = Expected(task.pid, task.vmas, filled, program, task.extents, sources)
    finally:
        directory.close()
    return expected
