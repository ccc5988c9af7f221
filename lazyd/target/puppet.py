# SPDX-License-Identifier: MIT
"""A process that is to become a task: it runs nothing but the system calls that it is told.

It begins as the program that cbits/stub.S is, traced from before its first instruction. Facts, and what follows:

- PTRACE_O_EXITKILL: if its tracer dies, the kernel kills it. So nothing here needs to be undone, and no half-made task
  is ever left; that ends when the last of its threads is let go.
- The instructions and the lists that they work off are in one mapping, the workshop, where neither the image nor the
  stub has memory. Its last call unmaps it; the thread is stopped at the exit of that, and gets its own registers before
  it fetches another instruction.
- A list ends in a breakpoint, so that however many calls it has, it costs two switches. The thread is in the stop for
  that signal then; it is let go from there without it.
- PTRACE_O_TRACECLONE: a thread is traced from its first moment on, and stops before it runs.
- Its signals are blocked from exec on, also those of threads, which inherit that.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from lazyd.errors import RestoreError, SystemCallError
from lazyd.target._target import ffi, lib
from lazyd.target.binding import WALL
from lazyd.target.remote import Call, RemoteCalls, find_room, signed
from lazyd.target.tracing import (
    PTRACE_CONT,
    PTRACE_EVENT_CLONE,
    PTRACE_EVENT_EXEC,
    PTRACE_EVENT_STOP,
    PTRACE_O_EXITKILL,
    PTRACE_O_TRACECLONE,
    PTRACE_O_TRACEEXEC,
    PTRACE_O_TRACESYSGOOD,
    PTRACE_SETOPTIONS,
    PTRACE_SYSCALL,
    Registers,
    StoppedTask,
    Thread,
    request,
    status_fields,
)
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, USER_SPACE_END

STUB = Path(__file__).with_name("stub")
_SYS_MMAP, _SYS_MUNMAP, _SYS_MREMAP, _SYS_EXIT = 9, 11, 25, 60
_SYS_SET_TID_ADDRESS, _SYS_SET_ROBUST_LIST = 218, 273
# PROT_READ, WRITE and EXEC; MAP_PRIVATE, ANONYMOUS and FIXED_NOREPLACE; no file
_WORKSHOP_FLAGS = (7, 0x100022, (1 << 64) - 1, 0)
_MREMAP_MAYMOVE_FIXED = 3
_ALL_SIGNALS = _NO_SYSTEM_CALL = (1 << 64) - 1
_MAY_FAIL = 1 << 32
_CALL = struct.Struct("<7Qq")
_END = _CALL.pack(_ALL_SIGNALS, *[0] * 7)

# The workshop: instructions, the list, what the calls' pointers lead to, and room for vdso and vvar on their way.
_CODE_BYTES, _LIST_BYTES, _DATA_BYTES, _PASSAGE_BYTES = PAGE_SIZE, 16 * PAGE_SIZE, 32 * PAGE_SIZE, 64 * PAGE_SIZE
WORKSHOP_BYTES = _CODE_BYTES + _LIST_BYTES + _DATA_BYTES + _PASSAGE_BYTES
MOST_CALLS = _LIST_BYTES // _CALL.size - 1
_OPTIONS = PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACECLONE | PTRACE_O_TRACEEXEC | PTRACE_O_EXITKILL


class Pointing(NamedTuple):
    """A structure that has a pointer in it, at `offset`, to other bytes."""

    text: bytes
    offset: int
    to: bytes


class Step(NamedTuple):
    """A system call for a puppet. An argument that is bytes becomes a pointer to them. `what` is for people."""

    what: str
    number: int
    arguments: tuple[int | bytes | Pointing, ...] = ()
    may_fail: bool = False


class Part(NamedTuple):
    """A mapping of the kernel's own that a new process has: part of vvar, or the vdso."""

    start: int
    end: int
    is_code: bool


def who_has(tid: int) -> str:
    """Say who has an id that is wanted, and what to do about it."""
    with suppress(OSError):
        if status_fields(tid)["State"][0] == "Z":
            return "a process that has ended, but its parent has not waited for it yet (a zombie)"
    return "another process or thread; end that first"


class Puppet:
    """A process that does what it is told, until release(); kill() is for all other ends."""

    def __init__(self, pid: int, workshop: int) -> None:
        """Name a process, and an address for its workshop; make() or take_over() makes it a puppet."""
        self.pid = pid
        self.threads: dict[int, Thread] = {}
        self.kernel_parts: tuple[Part, ...] = ()
        self.memory = -1
        """/proc/PID/mem, open for reading and writing."""
        self._place(workshop)

    def _place(self, workshop: int) -> None:
        self._workshop = self._code = workshop
        self._list = workshop + _CODE_BYTES
        self._data = self._list + _LIST_BYTES

    @classmethod
    def make(
        cls, pid: int, files: Sequence[tuple[int, int]], *, workshop: int, new_session: bool, new_group: bool
    ) -> Puppet:
        """Make a process. files: (descriptor here, number there), sorted by the latter.

        RestoreError or SystemCallError in one line; there is no process then.
        """
        puppet = cls(pid, workshop)
        go = puppet._spawn(files, new_session=new_session, new_group=new_group)
        try:
            puppet.threads[pid] = Thread(pid, _OPTIONS)
            os.write(go, b"\0")
            puppet._wait_for_exec()
            puppet.memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
            puppet._move_in()
        except OSError as error:
            puppet.kill()
            raise SystemCallError("ptrace", error.errno or 0, path=f"process {pid}") from error
        except BaseException:
            puppet.kill()
            raise
        finally:
            os.close(go)
        return puppet

    @classmethod
    def take_over(cls, task: StoppedTask, workshop: int) -> Puppet:
        """Make a stopped task a puppet. From here on it dies with us: `task` has no threads any more.

        An exception before that leaves it as it was.
        """
        puppet = cls(task.pid, workshop)
        with RemoteCalls(task.pid, task.leader, find_room(task)) as calls:
            (result,) = calls.run(Call(_SYS_MMAP, (workshop, WORKSHOP_BYTES, *_WORKSHOP_FLAGS)))
        if result != workshop:
            raise RestoreError(f"process {task.pid}: mmap of the workshop: {os.strerror(-result)}")
        puppet.memory = os.open(f"/proc/{task.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        puppet.threads = {thread.tid: thread for thread in task.threads}
        task.threads.clear()
        try:
            os.pwrite(puppet.memory, _stub_code(), workshop)
            for thread in puppet.threads.values():
                request(PTRACE_SETOPTIONS, thread.tid, 0, _OPTIONS)
                thread.set_signal_mask(_ALL_SIGNALS)
        except BaseException:
            puppet.kill()
            raise
        return puppet

    def _spawn(self, files: Sequence[tuple[int, int]], *, new_session: bool, new_group: bool) -> int:
        program = os.open(STUB, os.O_RDONLY | os.O_CLOEXEC)
        try:
            placed = ffi.new("struct lz_placed_file[]", [list(file) for file in files])
            spawn = ffi.new("struct lz_spawn *")
            spawn.pid, spawn.program = self.pid, program
            spawn.new_session, spawn.new_group = new_session, new_group
            spawn.files, spawn.file_count = placed, len(files)
            go = ffi.new("int *")
            result = lib.lz_spawn_stub(spawn, go)
        finally:
            os.close(program)
        if result == -errno.EEXIST:
            raise RestoreError(f"pid {self.pid} is taken by {who_has(self.pid)}")
        if result == -errno.EPERM:
            hint = "choosing a pid needs CAP_CHECKPOINT_RESTORE or CAP_SYS_ADMIN; run as root"
            raise SystemCallError("clone3", errno.EPERM, path=f"pid {self.pid}", hint=hint)
        if result == -errno.EINVAL:
            hint = "no such pid can be given here; is it above /proc/sys/kernel/pid_max?"
            raise SystemCallError("clone3", errno.EINVAL, path=f"pid {self.pid}", hint=hint)
        if result < 0:
            raise SystemCallError("clone3", -result, path=f"pid {self.pid}")
        return int(go[0])

    def _wait_for_exec(self) -> None:
        status = self._wait(self.pid)
        if status >> 16 == PTRACE_EVENT_EXEC:
            return
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 126:
            raise RestoreError(f"task {self.pid}: its files do not fit below the limit of open files (ulimit -n)")
        raise RestoreError(f"process {self.pid} could not be made from {STUB}")

    def _move_in(self) -> None:
        """Move into the workshop, and unmap all else but what is the kernel's."""
        leader = self.threads[self.pid]
        leader.set_signal_mask(_ALL_SIGNALS)
        registers = leader.read_registers()
        workshop = self._workshop
        # Not moved in yet: its own instructions, and a list on its stack.
        self._code, self._list = registers.ip, (registers.sp & -PAGE_SIZE) - 4 * PAGE_SIZE
        self.run([Step("mmap of the workshop", _SYS_MMAP, (workshop, WORKSHOP_BYTES, *_WORKSHOP_FLAGS))])
        os.pwrite(self.memory, _stub_code(), workshop)
        self._place(workshop)
        self.clear(keep=())

    def clear(self, keep: Iterable[tuple[int, int]]) -> None:
        """Unmap all but these ranges and the workshop, and move what is the kernel's there, for move_part()."""
        parts = _kernel_parts(self.pid)
        if sum(part.end - part.start for part in parts) > _PASSAGE_BYTES:
            raise RestoreError(f"process {self.pid} has more mappings of the kernel's own than are known")
        steps, moved, to = [], [], self._data + _DATA_BYTES
        for start, end, is_code in parts:
            length = end - start
            steps.append(Step("mremap", _SYS_MREMAP, (start, length, length, _MREMAP_MAYMOVE_FIXED, to)))
            moved.append(Part(to, to + length, is_code))
            to += length
        at = 0
        for start, end in sorted([*keep, (self._workshop, self._workshop + WORKSHOP_BYTES)]):
            if at < start:
                steps.append(Step("munmap", _SYS_MUNMAP, (at, start - at)))
            at = max(at, end)
        steps.append(Step("munmap", _SYS_MUNMAP, (at, USER_SPACE_END - at)))
        self.run(steps)
        self.kernel_parts = tuple(moved)

    def move_part(self, part: Part, to: int) -> Step:
        """Return the step that moves a mapping of the kernel's own to where it is to be."""
        length = part.end - part.start
        where = f"mremap of the kernel's own mapping to {to:#x}"
        return Step(where, _SYS_MREMAP, (part.start, length, length, _MREMAP_MAYMOVE_FIXED, to))

    # Doing as told

    def run(self, steps: Iterable[Step], tid: int = 0) -> list[int]:
        """Have a thread (0: the leader) do some calls; return what each returned. RestoreError at one that failed."""
        results: list[int] = []
        chunk: list[Step] = []
        data = bytearray()
        text = bytearray()

        def flush() -> None:
            if chunk:
                results.extend(self._run_chunk(self.threads[tid or self.pid], chunk, bytes(text + _END), bytes(data)))
            chunk.clear()
            text.clear()
            data.clear()

        for step in steps:
            room = sum(_length(argument) for argument in step.arguments)
            assert room <= _DATA_BYTES, "more than the workshop holds"
            if len(chunk) == MOST_CALLS or len(data) + room > _DATA_BYTES:
                flush()
            words = [0] * 6
            for index, argument in enumerate(step.arguments):
                if isinstance(argument, int):
                    words[index] = argument & _ALL_SIGNALS
                    continue
                content = argument
                if isinstance(content, Pointing):
                    pointer = struct.pack("<Q", self._put(data, content.to))
                    content = content.text[: content.offset] + pointer + content.text[content.offset + 8 :]
                words[index] = self._put(data, content)
            text += _CALL.pack(step.number | (_MAY_FAIL if step.may_fail else 0), *words, 0)
            chunk.append(step)
        flush()
        return results

    def _put(self, data: bytearray, content: bytes) -> int:
        data += bytes(-len(data) % 16)
        at = self._data + len(data)
        data += content
        return at

    def _run_chunk(self, thread: Thread, steps: Sequence[Step], text: bytes, data: bytes) -> list[int]:
        os.pwrite(self.memory, text, self._list)
        if data:
            os.pwrite(self.memory, data, self._data)
        registers = thread.read_registers()
        thread.write_registers(registers._replace(ip=self._code, bx=self._list, sp=0, orig_ax=_NO_SYSTEM_CALL, ax=0))
        self._go_on(thread)
        done = (thread.read_registers().bx - self._list) // _CALL.size
        answers = os.pread(self.memory, len(text), self._list)
        results = [_CALL.unpack_from(answers, index * _CALL.size)[7] for index in range(len(steps))]
        if done < len(steps):
            failed = steps[done]
            raise RestoreError(f"task {self.pid}: {failed.what}: {os.strerror(-results[done])}")
        return results

    def _go_on(self, thread: Thread) -> None:
        """Let a thread run to its breakpoint."""
        request(PTRACE_CONT, thread.tid)
        while True:
            status = self._wait(thread.tid)
            if not os.WIFSTOPPED(status):
                raise RestoreError(f"task {self.pid} was killed before it was whole")
            event, number = status >> 16, os.WSTOPSIG(status)
            if event == PTRACE_EVENT_CLONE:
                tid = thread.new_thread()
                if self._wait(tid) >> 16 != PTRACE_EVENT_STOP:
                    raise RestoreError(f"task {self.pid}: its thread {tid} was killed before it was whole")
                self.threads[tid] = Thread(tid, is_ours=True)
            elif not event and number == signal.SIGTRAP:
                return
            elif not event and number != signal.SIGSTOP:
                raise RestoreError(f"task {self.pid}: making it ended in signal {number}")
            request(PTRACE_CONT, thread.tid)

    @staticmethod
    def _wait(tid: int) -> int:
        try:
            return os.waitpid(tid, WALL)[1]
        except ChildProcessError:
            raise RestoreError(f"process {tid} is gone before it was whole") from None

    def end_thread(self, tid: int) -> None:
        """End a thread that is not the leader, such that nobody is told: no word is cleared, no futex woken."""
        steps = [Step("set_robust_list", _SYS_SET_ROBUST_LIST, (0, 24)), Step("set_tid_address", _SYS_SET_TID_ADDRESS)]
        self.run(steps, tid)
        thread = self.threads[tid]
        os.pwrite(self.memory, _CALL.pack(_SYS_EXIT, *[0] * 7), self._list)
        registers = thread.read_registers()
        thread.write_registers(registers._replace(ip=self._code, bx=self._list, orig_ax=_NO_SYSTEM_CALL, ax=0))
        request(PTRACE_CONT, tid)
        while os.WIFSTOPPED(self._wait(tid)):
            request(PTRACE_CONT, tid)
        del self.threads[tid]

    # The end

    def leave(self, registers: Registers) -> None:
        """Have the leader unmap the workshop and give it its own registers: it runs nothing before it is let go."""
        leader = self.threads[self.pid]
        os.pwrite(self.memory, b"\x0f\x05", self._code)  # syscall
        last = leader.read_registers()._replace(
            ip=self._code, ax=_SYS_MUNMAP, di=self._workshop, si=WORKSHOP_BYTES, orig_ax=_NO_SYSTEM_CALL
        )
        leader.write_registers(last)
        for _ in range(2):
            self._to_system_call(leader)
        if (result := signed(leader.read_registers().ax)) < 0:
            raise RestoreError(f"task {self.pid}: munmap of the workshop: {os.strerror(-result)}")
        # From the exit of a system call to an event stop: no instruction runs in between.
        leader.interrupt()
        request(PTRACE_SYSCALL, leader.tid)
        if (status := self._wait(leader.tid)) >> 16 != PTRACE_EVENT_STOP:
            raise RestoreError(f"task {self.pid}: stopped with {status:#x} where an event stop was asked for")
        leader.write_registers(registers)

    def _to_system_call(self, thread: Thread) -> None:
        request(PTRACE_SYSCALL, thread.tid)
        status = self._wait(thread.tid)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
            raise RestoreError(f"task {self.pid}: stopped with {status:#x} on its way into a system call")

    def stop(self) -> None:
        """Stop the whole task as by SIGSTOP: it stays so when it is let go. After leave()."""
        leader = self.threads[self.pid]
        mask = leader.signal_mask()
        leader.set_signal_mask(_ALL_SIGNALS)  # which SIGSTOP passes
        os.kill(self.pid, signal.SIGSTOP)
        request(PTRACE_CONT, leader.tid)
        while (status := self._wait(leader.tid)) >> 16 or os.WSTOPSIG(status) != signal.SIGSTOP:
            if not os.WIFSTOPPED(status):
                raise RestoreError(f"task {self.pid} was killed before it was whole")
            request(PTRACE_CONT, leader.tid)
        request(PTRACE_CONT, leader.tid, 0, signal.SIGSTOP)
        if (status := self._wait(leader.tid)) >> 16 != PTRACE_EVENT_STOP:
            raise RestoreError(f"task {self.pid}: stopped with {status:#x} where a group stop was asked for")
        leader.set_signal_mask(mask)

    def release(self) -> None:
        """Let it go: it is a task now. A second call does nothing."""
        threads, self.threads = self.threads, {}
        for thread in reversed(threads.values()):
            thread.detach()
        self._close()

    def kill(self) -> None:
        """End it, whatever became of it; nothing after release()."""
        threads, self.threads = self.threads, {}
        if threads:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
            for tid in reversed(threads):  # the leader can be waited for when the others are gone
                with suppress(ChildProcessError):
                    while not (os.WIFEXITED(status := os.waitpid(tid, WALL)[1]) or os.WIFSIGNALED(status)):
                        pass
        self._close()

    def _close(self) -> None:
        if self.memory >= 0:
            os.close(self.memory)
            self.memory = -1


def _length(argument: int | bytes | Pointing) -> int:
    """Return how much room an argument takes at most."""
    if isinstance(argument, int):
        return 0
    return len(argument) + 16 if isinstance(argument, bytes) else len(argument.text) + len(argument.to) + 32


def _kernel_parts(pid: int) -> list[Part]:
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        name = line[line.rfind("[") :]
        if name in ("[vdso]", "[vvar]", "[vvar_vclock]"):
            start, end = (int(word, 16) for word in line.split()[0].split("-"))
            found.append(Part(start, end, name == "[vdso]"))
    return found


def find_workshop(taken: Iterable[tuple[int, int]]) -> int:
    """Return where a workshop has room: neither there nor where a stub may be is anything."""
    # The stub is linked where static programs are; stack, vdso and vvar are near the end of user space.
    return find_gap([*taken, (0x400000, 0x500000), (USER_SPACE_END - (1 << 45), USER_SPACE_END)], WORKSHOP_BYTES)


def find_gap(taken: Iterable[tuple[int, int]], length: int) -> int:
    """Return the lowest address from which on there is nothing; RestoreError if there is none."""
    lowest = 1 << 16  # vm.mmap_min_addr as it ships
    margin = 256 * PAGE_SIZE  # what grows downwards keeps a gap below it
    for start, end in sorted([*taken, (USER_SPACE_END, USER_SPACE_END)]):
        if start - margin >= lowest + length:
            return lowest
        lowest = max(lowest, end)
    raise RestoreError("there is no address space left for making the task")


def _stub_code() -> bytes:
    """Return the instructions of the stub: what its executable segment holds (elf(5))."""
    text = STUB.read_bytes()
    (table,) = struct.unpack_from("<Q", text, 32)
    size, count = struct.unpack_from("<HH", text, 54)
    for index in range(count):
        kind, flags, offset, _, _, length = struct.unpack_from("<IIQQQQ", text, table + index * size)
        if kind == 1 and flags & 1:  # PT_LOAD, PF_X
            return text[offset : offset + length]
    raise RestoreError(f"{STUB}: not what the build made; install lazyd again")


def own_code() -> bytes:
    """Return the vdso that every process of this kernel has."""
    for part in _kernel_parts(os.getpid()):
        if part.is_code:
            return ctypes.string_at(part.start, part.end - part.start)
    return b""
