# SPDX-License-Identifier: MIT
"""Make a task from its plan, in the order that keeps every failure harmless.

1. Nothing is made yet: files are opened, shared memory is filled, the vdso is compared.
2. There is a process, which dies with us: it maps and fills, makes its threads, and gives up what the task had not.
3. Its lazy memory is registered with a userfaultfd that we hold; its threads have their registers.
4. Somebody serves: release() lets it go. From then on it is a task.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lazyd.errors import ImageError, RestoreError, SystemCallError
from lazyd.hints import Self
from lazyd.image import Extent, Kind, load
from lazyd.restore import memory as memories
from lazyd.restore import task as tasks
from lazyd.restore.files import Files
from lazyd.restore.memory import Memory
from lazyd.restore.plan import Plan, make_plan, taken_ranges
from lazyd.target import Attached
from lazyd.target.expected import empty_ranges, merge_ranges
from lazyd.target.mappings import find_pages
from lazyd.target.puppet import Puppet, Step, find_workshop, who_has
from lazyd.target.userfault import enable_missing, reading_events, register_missing, take_userfaultfd

_SYS_CLOSE, _SYS_USERFAULTFD = 3, 323
_SYS_MADVISE, _MADV_DONTNEED = 28, 4


class Unreleased:
    """A task that is a puppet until it is released. As a context manager it ends what is not."""

    def __init__(self, plan: Plan, memory: Memory) -> None:
        """Hold nothing yet: whoever derives from this makes the puppet."""
        self.tasks: list[Attached] = []
        """The task with the userfaultfd of its memory, if that is to be served."""
        self.warning = ""
        self._plan = plan
        self._memory = memory
        self._puppet: Puppet | None = None

    def release(self, *, stopped: bool = False) -> None:
        """Let the task go: somebody serves it. A second call does nothing."""
        puppet, self._puppet = self._puppet, None
        if puppet is None:
            return
        if stopped or self._plan.is_stopped:
            with suppress(RestoreError, OSError):  # it was killed: nothing of it runs
                puppet.stop()
        puppet.release()
        self.tasks = []

    def close(self) -> None:
        """Give up: there is no process then. Does nothing after release()."""
        puppet, self._puppet = self._puppet, None
        if puppet is not None:
            puppet.kill()
        for task in self.tasks:
            os.close(task.uffd)
        self.tasks = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Restored(Unreleased):
    """A task that is whole and does not run yet."""

    def __init__(self, plan: Plan, memory: Memory, *, is_eager: bool = False, is_registered: bool = True) -> None:
        """Make it. is_eager: all its pages are there; is_registered: what is not faults, and waits for `tasks[0]`.

        LazydError in one line if it cannot be made: then there is no process.
        """
        super().__init__(plan, memory)
        try:
            memories.check_vdso(plan, memory)
            tasks.check_values(plan)
            with Files(plan) as files:
                objects = memories.prepare(plan, files, memory)
                self._puppet = Puppet.make(
                    plan.pid,
                    files.pairs(),
                    workshop=find_workshop(taken_ranges(plan)),
                    new_session=plan.has_session,
                    new_group=plan.has_group,
                )
                self._make(self._puppet, files, objects, is_eager=is_eager, is_registered=is_registered)
        except OSError as error:
            self.close()
            raise SystemCallError("ptrace", error.errno or 0, path=f"task {plan.pid}") from error
        except BaseException:
            self.close()
            raise

    def _make(
        self, puppet: Puppet, files: Files, objects: dict[int, int], *, is_eager: bool, is_registered: bool
    ) -> None:
        plan = self._plan
        filled = memories.pages_to_fill(plan, self._memory.extents, is_eager=is_eager)
        puppet.run(tasks.before_mapping_steps(plan))
        puppet.run([*memories.kernel_steps(plan, puppet), memories.limits_step(plan, files)])
        memories.run_map_steps(puppet, memories.map_steps(plan, files, objects, filled))
        puppet.run(files.last_steps())
        make_threads(plan, puppet)
        uffd = -1
        if is_registered and not is_eager:
            uffd = open_userfaultfd(puppet)
            self.tasks.append(Attached(plan.pid, plan.pid, uffd))
        self.warning = dress(plan, puppet, uffd, filled, with_credentials=True)
        if uffd >= 0:
            check_empty(plan, filled)


def make_threads(plan: Plan, puppet: Puppet) -> None:
    """Make the threads that the puppet does not have. RestoreError if an id is taken."""
    missing = [thread for thread in plan.threads if thread.tid not in puppet.threads]
    try:
        puppet.run(tasks.thread_steps(missing))
    except RestoreError as error:
        for tid, _ in missing:
            if tid not in puppet.threads and os.path.exists(f"/proc/{tid}"):  # noqa: PTH110  quick
                what = f"thread id {tid} is taken by {who_has(tid)}"
                raise RestoreError(what) from error
        raise


def open_userfaultfd(puppet: Puppet) -> int:
    """Return a userfaultfd of the puppet's memory, of which it has no descriptor itself."""
    (fd,) = puppet.run([Step("userfaultfd", _SYS_USERFAULTFD, (os.O_CLOEXEC | os.O_NONBLOCK,))])
    try:
        return take_userfaultfd(puppet.pid, fd)
    finally:
        puppet.run([Step("close", _SYS_CLOSE, (fd,))])


def dress(plan: Plan, puppet: Puppet, uffd: int, filled: Sequence[Extent], *, with_credentials: bool) -> str:
    """Give a puppet with the memory and the threads of a task all else; it runs nothing of its own after that.

    Its lazy memory, but for what is filled, is registered with uffd, if that is none below 0. Returns a warning, or
    nothing.
    """
    puppet.run(tasks.task_steps(plan))
    tasks.make_timers(plan, puppet)
    for thread in plan.threads:
        puppet.run(tasks.own_steps(plan, thread), thread.tid)
        tasks.set_scheduling(thread)
    warning = tasks.set_process_files(plan)
    puppet.run(tasks.limit_steps(plan))
    if uffd >= 0:
        _register(plan, puppet, uffd, filled)
    for thread in reversed(plan.threads):  # the leader last: it still has to start timers
        if with_credentials:
            puppet.run(tasks.credential_steps(thread), thread.tid)
        puppet.run(tasks.late_steps(thread), thread.tid)
        traced = puppet.threads[thread.tid]
        tasks.set_extended_state(traced, thread)
        tasks.set_segments(traced, thread)
    puppet.run([*tasks.dumpable_steps(plan), *tasks.start_steps(plan)])
    registers = {thread.tid: tasks.final_registers(puppet.threads[thread.tid], thread) for thread in plan.threads}
    puppet.leave(registers[plan.pid])
    for thread in plan.threads[1:]:
        puppet.threads[thread.tid].write_registers(registers[thread.tid])
    for thread in plan.threads:
        puppet.threads[thread.tid].set_signal_mask(tasks.signal_mask(plan, thread))
    return warning


def _register(plan: Plan, puppet: Puppet, uffd: int, filled: Sequence[Extent]) -> None:
    """Register lazy memory, and drop what pages have come to be in it before that.

    Whoever reads /proc/PID/cmdline or environ, as ps does, makes pages of zeros where there are none yet. Once the
    memory is registered that fails for them. So what there is is dropped after that: a call that waits for its event to
    be read. (To take the range back for it was tried: who reads without end had made the page again every time.)
    """
    pid = plan.pid
    enable_missing(uffd, pid)
    for area in plan.vmas:
        if area.is_lazy:
            register_missing(uffd, area.start, area.end - area.start, pid)
    if found := _find_strangers(plan, filled):
        with reading_events(uffd):
            puppet.run([Step("madvise", _SYS_MADVISE, (start, end - start, _MADV_DONTNEED)) for start, end, _ in found])


def check_empty(plan: Plan, filled: Sequence[Extent]) -> None:
    """See that nothing is where pages are still to come: what is there is never asked for. RestoreError."""
    if found := _find_strangers(plan, filled):
        start, end, pages = found[0]
        raise RestoreError(f"task {plan.pid}: {pages} pages are in {start:#x}-{end:#x} that nobody has put there")


def _find_strangers(plan: Plan, filled: Sequence[Extent]) -> list[tuple[int, int, int]]:
    """Return (start, end, pages) of ranges with pages that are still to come."""
    lazy = [(area.start, area.end) for area in plan.vmas if area.is_lazy]
    known = [(int(extent.start), int(extent.end)) for extent in filled]
    present = merge_ranges([*known, *memories.rseq_pages(plan)])
    try:
        return find_pages(plan.pid, empty_ranges(lazy, present))
    except OSError as error:
        if error.errno == errno.ENOTTY:
            return []  # Linux before 6.7
        raise


def restore_alone(images: Path, dialect: str, *, is_eager: bool, stopped: bool) -> tuple[int, str]:
    """Restore a task that nobody serves: eagerly, or empty and stopped. Return its pid, and a warning or nothing."""
    assert is_eager or stopped, "an empty task must not run"
    plan = make_plan(images)
    with load(images, dialect) as checkpoint:
        memory = Memory(checkpoint.tasks[0].extents, [source.fd for source in checkpoint.sources])
        if is_eager and memory.extents.pages_by_kind()[Kind.REMOTE]:
            raise ImageError(images, f"pages of task {plan.pid} are only at a page server, and none is given")
        with Restored(plan, memory, is_eager=is_eager, is_registered=False) as restored:
            restored.release(stopped=stopped)
    return plan.pid, restored.warning
