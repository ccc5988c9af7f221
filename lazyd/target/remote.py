# SPDX-License-Identifier: MIT
"""Make a stopped thread do system calls, such that nothing is left of it even if lazyd is killed in the middle.

Facts, and what follows:

- A tracer that dies detaches: the thread runs on with whatever registers it has at that moment. So from the first
  register that is changed to the last that is put back, what the thread would run must itself end in the thread's own
  state. Injected is not one system call, but a piece of code that does all of them, gives back what it took, and goes
  on where the thread was. A tracer that lives only watches it, stop by stop, and puts the registers back earlier.
- The code uses neither stack nor flags, so that nothing below the stack pointer is written and no instruction is
  needed that a restorer of flags would have to be: only mov, syscall and jmp. It has the thread's registers as
  immediate operands; those of the floating point unit no system call changes.
- The code stands where no instruction and no data is: in the zeros behind the end of the vdso, else in the zeros at
  the end of some other executable mapping. ptrace may write there (the kernel copies the page for this task); its zeros
  are put back at the end. A killed lazyd leaves bytes there that nobody runs or reads.
- The arguments and results are in a scratch mapping of the thread's own making, at an address where nothing was; the
  end of the code unmaps it. Addresses near the bottom are taken, where the kernel never puts a mapping by itself.
- Signals are blocked meanwhile, except SIGKILL and SIGSTOP, which no mask holds; they stay in their queues. The mask
  is put back by the code too.
- A thread in a system call that is to be restarted (nanosleep, futex, poll) has the rest of it in its kernel state,
  which other system calls leave alone. The kernel restarts it only on the way out of an event stop: that is where the
  registers are put back. The code, which runs on if lazyd dies, jumps to the system call again itself.
- A thread can be watched call by call (PTRACE_SYSCALL: two stops each), or let run through them: the last thing that
  the code does before its end is to wait, for as long as a lazyd that lives needs to see that it does. It waits by
  ppoll, which leaves no rest behind in the kernel, so that the rest of the thread's own system call stays.
- Most of the time that all this takes is waiting for a thread to be stopped. So whatever waits is a generator that
  yields what it waits for: alone it is run by drive(), and `crowd` runs those of several threads side by side.
"""

from __future__ import annotations

import errno
import os
import re
import signal
import struct
import time
from collections.abc import Generator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lazyd.enums import Enum
from lazyd.errors import DumpError, SystemCallError
from lazyd.hints import TypeAlias, TypeVar
from lazyd.target.binding import WALL
from lazyd.target.tracing import (
    PTRACE_CONT,
    PTRACE_EVENT_STOP,
    PTRACE_POKEDATA,
    PTRACE_SYSCALL,
    Registers,
    StoppedTask,
    Thread,
    request,
    state_of,
)
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE, USER_SPACE_END

# arch/x86/entry/syscalls/syscall_64.tbl
SYS_MMAP, SYS_MUNMAP, SYS_RT_SIGPROCMASK, SYS_GETPID, SYS_PPOLL = 9, 11, 14, 39, 271
_PROT_READ_WRITE = 3
_MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE = 0x100022
_SIG_SETMASK = 2
_ALL_SIGNALS = (1 << 64) - 1
_NO_SYSTEM_CALL = (1 << 64) - 1

_MARGIN = 32  # more zeros than the code can end in
SCRATCH_BYTES = 4 * PAGE_SIZE
_SCRATCH_STEP = SCRATCH_BYTES + PAGE_SIZE
_LOWEST = 0x10000  # vm.mmap_min_addr as it ships
_RECORD_BYTES = 80
MOST_CALLS = 63  # at once: their records fill the first two pages of the scratch mapping
_BUFFERS = 2 * PAGE_SIZE
_WAIT_BELOW_BUFFERS = 1024  # where the time of the wait is; the results are above it
_WAIT_S = 1
_LOOKS_AT_ONCE = 20
_LOOK_INTERVAL_S = 20e-6
_LOOKS_PER_STATE = 100


class Wait(Enum):
    """What a generator of Steps waits for."""

    STOP = "the thread to stop; it is sent the status that waitpid(2) gives, 0 if the thread is gone"
    TURN = "anything at all; it is sent 0"


_T = TypeVar("_T")
Steps: TypeAlias = Generator[Wait, int, _T]


def wait_for_stop(thread: Thread) -> int:
    """Wait until a thread stops or ends; return its status, 0 if it is gone."""
    with suppress(ChildProcessError):
        if not thread.is_leader:
            return os.waitpid(thread.tid, WALL)[1]
        # A leader that was killed is not reported before its other threads have been waited for.
        looks = 0
        while True:
            pid, status = os.waitpid(thread.tid, WALL | os.WNOHANG)
            if pid:
                return status
            looks += 1
            if looks % _LOOKS_PER_STATE == 0 and state_of(thread.tid) in "ZX":
                return 0
            if looks < _LOOKS_AT_ONCE:
                os.sched_yield()
            else:
                time.sleep(_LOOK_INTERVAL_S)
    return 0


def drive(thread: Thread, steps: Steps[_T]) -> _T:
    """Run the steps of one thread to their end; return what they return."""
    status = 0
    turns = 0
    try:
        waits = next(steps)
        while True:
            if waits is Wait.STOP:
                status = wait_for_stop(thread)
            else:
                status = 0
                turns += 1
                pause(turns)
            waits = steps.send(status)
    except StopIteration as end:
        result: _T = end.value
        return result


def pause(turns: int) -> None:
    """Give way, for the turns-th time in a row in which there was nothing to do."""
    if turns < _LOOKS_AT_ONCE:
        os.sched_yield()
    else:
        time.sleep(_LOOK_INTERVAL_S)


class Call(NamedTuple):
    """A system call: its number and up to six arguments, each an integer, or a `Result` of one before it."""

    number: int
    arguments: tuple[int | Result, ...] = ()


class Result(NamedTuple):
    """Stands for what an earlier call of the same batch returned."""

    call: int


# What the thread runs. `step` does the call that the record at rbx says, and goes on with the next one.
_SIGNATURE = bytes.fromhex("6c7a2d72656d6f74 9f1c56e0a7b34d28")  # so that what is left is known again
_SYSCALL = bytes.fromhex("0f05")
_FIRST = bytes.fromhex("0f05 4889c7")  # syscall; mov rdi, rax
_STEP = bytes.fromhex(
    "488b03 488b7b08 488b7310 488b5318 4c8b5320 4c8b4328 4c8b4b30 0f05"  # mov rax, [rbx] … mov r9, [rbx + 48]; syscall
    "488b4b38 488901"  # mov rcx, [rbx + 56]; mov [rcx], rax
    "488b4b48 488b5b40 ffe1"  # mov rcx, [rbx + 72]; mov rbx, [rbx + 64]; jmp rcx
)
_IMMEDIATE = struct.Struct("<Q")
_MOV_IMMEDIATE = {
    name: bytes.fromhex(code)
    for name, code in {
        "ax": "48b8",
        "cx": "48b9",
        "dx": "48ba",
        "bx": "48bb",
        "bp": "48bd",
        "si": "48be",
        "di": "48bf",
        **{f"r{number}": f"49{0xB0 + number:02x}" for number in range(8, 16)},
    }.items()
}
_PLAIN_64 = 0x48  # the prefix for registers below r8, which the short form does without


def _load(register: str, value: int) -> bytes:
    return _MOV_IMMEDIATE[register] + _IMMEDIATE.pack(value)


def _load_small(register: str, value: int) -> bytes:
    """The same for a value of 32 bits, in half the room: the upper half of the register becomes zero."""
    long = _MOV_IMMEDIATE[register]
    prefix = b"" if long[0] == _PLAIN_64 else b"\x41"
    return prefix + long[1:] + struct.pack("<I", value)


class _Code:
    """The code for one thread, at the address where it will stand."""

    def __init__(self, at: int, scratch: int, registers: Registers, mask: int) -> None:
        unmap = _load("di", scratch)
        self.first = at + len(_SIGNATURE)
        self.step = self.first + len(_FIRST) + 2
        self.tail = self.step + len(_STEP)
        # The first call's result is the mapping: it is in rdi already. The jump counts from behind itself.
        jump = bytes([0xEB, self.tail + len(unmap) - self.step])
        length = len(self._tail(registers, 0))
        text = _SIGNATURE + _FIRST + jump + _STEP + unmap + self._tail(registers, self.tail + len(unmap) + length)
        text += struct.pack("<Q", mask)
        self.bytes = text + bytes(-len(text) % 8)

    @staticmethod
    def _tail(registers: Registers, mask_at: int) -> bytes:
        """munmap(rdi), rt_sigprocmask(SIG_SETMASK, mask_at, NULL, 8), and on with what the thread did."""
        whole = registers.restarted()
        text = _load_small("ax", SYS_MUNMAP) + _load_small("si", SCRATCH_BYTES) + _SYSCALL
        text += _load_small("ax", SYS_RT_SIGPROCMASK) + _load_small("di", _SIG_SETMASK) + _load("si", mask_at)
        text += _load_small("dx", 0) + _load_small("r10", 8) + _SYSCALL
        text += b"".join(_load(name, getattr(whole, name)) for name in _MOV_IMMEDIATE)
        return text + bytes.fromhex("ff2500000000") + struct.pack("<Q", whole.ip)  # jmp [rip]


CODE_BYTES = len(_Code(0, 0, Registers(*[0] * 27), 0).bytes)


class Room(NamedTuple):
    """Where in a task the code and the scratch mapping have room."""

    code: int
    scratch: int


_MAPS_LINE = r"([0-9a-f]+)-([0-9a-f]+) (...)([ps]) \S+ \S+ \S+\s*(.*)"


def find_room(task: StoppedTask) -> Room:
    """Find room in a task whose threads are stopped; DumpError if it has none.

    Where a lazyd was killed, its code is left. That place is taken again when there is no other one.
    """
    return find_rooms(task, 1)[0]


def find_rooms(task: StoppedTask, most: int) -> list[Room]:
    """Find room for several threads at a time: at least one and at most so many. DumpError."""
    pid = task.pid
    lines = Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines()
    areas = [
        (int(match[1], 16), int(match[2], 16), match[3], match[4], match[5])
        for match in map(re.compile(_MAPS_LINE).fullmatch, lines)
        if match is not None
    ]
    areas.sort(key=lambda area: area[4] != "[vdso]")
    codes: list[int] = []
    left: list[int] = []
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for _, end, protection, sharing, name in areas:
            if protection != "r-x" or sharing != "p" or name == "[vsyscall]":
                continue
            with suppress(OSError):
                memory.seek(end - PAGE_SIZE)
                page = memory.read(PAGE_SIZE)
                found = page.find(_SIGNATURE)
                while found >= 0:
                    left.append(end - PAGE_SIZE + found)
                    _check_nobody_is_there(task, left[-1])
                    found = page.find(_SIGNATURE, found + 1)
                # A margin of zeros, so that the end of the last instruction, or of what is left, is not taken for room.
                start = (len(page.rstrip(b"\0")) + _MARGIN + 63) & ~63
                if len(page) == PAGE_SIZE and PAGE_SIZE - start >= CODE_BYTES + 64:
                    count = min(most, (PAGE_SIZE - start - 64) // CODE_BYTES)
                    codes = [end - PAGE_SIZE + start + index * CODE_BYTES for index in range(count)]
                    break
    # One page of another mapping than the vdso is as much as is ever written to.
    codes = codes or _apart(left)[:most]
    if not codes:
        raise DumpError(f"process {pid} has no room for a system call that lazyd must make inside it; use `criu dump`")
    ordered = sorted(areas)
    while codes:
        length = len(codes) * _SCRATCH_STEP
        lowest = _LOWEST + PAGE_SIZE
        for start, end, *_ in ordered:
            if start >= lowest + length:
                # As near as can be to what is there already: a table of pages more or less is not to be seen.
                first = min(start, USER_SPACE_END) - length
                return [Room(code, first + index * _SCRATCH_STEP) for index, code in enumerate(codes)]
            lowest = max(lowest, end + PAGE_SIZE)
        codes.pop()
    raise DumpError(f"process {pid} has no address space left for four pages; use `criu dump`")


def _apart(left: list[int]) -> list[int]:
    """Return which of some places do not overlap: two threads at once would spoil each other's code."""
    chosen: list[int] = []
    for code in sorted(left):
        if not chosen or code >= chosen[-1] + CODE_BYTES:
            chosen.append(code)
    return chosen


def _check_nobody_is_there(task: StoppedTask, left: int) -> None:
    """See that no thread runs the code that a killed lazyd has left: it would not be itself."""
    for thread in task:
        if left <= thread.read_registers().ip < left + CODE_BYTES:
            raise DumpError(f"thread {thread.tid} is not done with what a lazyd that was killed left it; try again")


class SteppedCalls:
    """A stopped thread that does system calls for us, from begin() to end(), which both are Steps as all that waits.

    In its `scratch` from `buffers` on there are two pages for arguments and results in memory.
    """

    def __init__(self, pid: int, thread: Thread, room: Room) -> None:
        """Get ready for a thread in an event stop."""
        self._pid = pid
        self._thread = thread
        self._room = room
        self._registers = thread.registers()
        self._mask = thread.signal_mask()
        self._code = _Code(room.code, room.scratch, self._registers, self._mask)
        self._memory = os.open(f"/proc/{pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        self._is_taken = False
        self._at_entry = False
        self._batch: Batch | None = None
        self.buffers = room.scratch + _BUFFERS

    def begin(self) -> Steps[None]:
        """Take the thread over. DumpError if it cannot do system calls; end() has to come all the same."""
        self._write_code(self._code.bytes)
        # The order matters if lazyd dies between two of these: the code puts the mask back.
        self._is_taken = True
        self._thread.write_registers(
            self._registers._replace(
                ip=self._code.first,
                orig_ax=_NO_SYSTEM_CALL,
                ax=SYS_MMAP,
                di=self._room.scratch,
                si=SCRATCH_BYTES,
                dx=_PROT_READ_WRITE,
                r10=_MAP_PRIVATE_ANONYMOUS_FIXED_NOREPLACE,
                r8=_NO_SYSTEM_CALL,  # fd -1
                r9=0,
            )
        )
        self._thread.set_signal_mask(_ALL_SIGNALS)
        yield from self.to_next_stop()
        yield from self.to_next_stop()
        result = self._thread.read_registers().ax
        if result != self._room.scratch:
            hint = "the process must map four pages for a moment, and cannot; raise its limits, or use `criu dump`"
            raise SystemCallError("mmap", -signed(result), path=f"process {self._pid}", hint=hint)

    def _write_code(self, text: bytes) -> None:
        try:
            if os.pwrite(self._memory, text, self._room.code) == len(text):
                return
        except OSError:
            pass  # proc_mem.force_override= may forbid it to all but ptrace
        for offset in range(0, len(text), 8):
            word = int.from_bytes(text[offset : offset + 8], "little")
            request(PTRACE_POKEDATA, self._thread.tid, self._room.code + offset, word)

    def _is_gone(self) -> ProcessLookupError:
        """proc(5): the memory of a task that has been killed has no bytes any more."""
        return ProcessLookupError(errno.ESRCH, f"process {self._pid} was killed")

    def write(self, address: int, content: bytes) -> None:
        """Write to the thread's memory; to the scratch mapping, that is."""
        if os.pwrite(self._memory, content, address) != len(content):
            raise self._is_gone()

    def read(self, address: int, length: int) -> bytes:
        """Read the thread's memory."""
        content = os.pread(self._memory, length, address)
        if len(content) != length:
            raise self._is_gone()
        return content

    def start(self, *calls: Call) -> Batch:
        """Lay out some calls; the caller steps through them. Not while another batch is not at its end."""
        assert 0 < len(calls) <= MOST_CALLS, "too many calls for the scratch mapping"
        assert self._batch is None or self._batch.is_done, "the batch before is not at its end"
        # Two more than asked for: one whose result says that all others are there, and the wait. They come last, but
        # stand first, where those of the batch before are: the thread still is in one of these, and if lazyd dies
        # before it has other registers it goes on there.
        done, wait = self._room.scratch, self._room.scratch + _RECORD_BYTES
        start = wait + _RECORD_BYTES
        records = [Call(SYS_GETPID), Call(SYS_PPOLL, (0, 0, self.buffers - _WAIT_BELOW_BUFFERS, 0)), *calls]
        sinks = [self.buffers - 8 * (index + 1) for index in range(len(records))]
        words: list[list[int]] = []
        for index, call in enumerate(records):
            arguments = [0] * 6
            for position, argument in enumerate(call.arguments):
                if isinstance(argument, Result):
                    assert argument.call + 2 < index, "a result that is not there yet"
                    sinks[argument.call + 2] = done + index * _RECORD_BYTES + 8 * (position + 1)
                else:
                    arguments[position] = argument & _ALL_SIGNALS
            words.append([call.number, *arguments])
        follows = [wait, wait, *(start + number * _RECORD_BYTES for number in range(1, len(calls))), done]
        text = b""
        for record, sink, then in zip(words, sinks, follows, strict=True):
            handler = self._code.tail if len(text) == _RECORD_BYTES else self._code.step
            text += struct.pack("<10Q", *record, sink, then, handler)
        text += bytes(_BUFFERS - _WAIT_BELOW_BUFFERS - len(text)) + struct.pack("<QQ", _WAIT_S, 0)
        self.write(done, text + bytes(_BUFFERS - len(text)))
        self._thread.write_registers(
            self._registers._replace(ip=self._code.step, bx=start, orig_ax=_NO_SYSTEM_CALL, ax=0)
        )
        self._batch = Batch(self, [*sinks[2:], sinks[0]])  # that of the wait is nothing to anybody
        return self._batch

    def run_steps(self, *calls: Call) -> Steps[list[int]]:
        """Do some calls and return what each returned: not negative, or -errno."""
        results: list[int] = []
        for first in range(0, len(calls), MOST_CALLS):
            results += yield from self.start(*calls[first : first + MOST_CALLS]).finish_steps()
        return results

    def to_next_stop(self) -> Steps[None]:
        """Let the thread run to the entry of its next system call, or from there to its exit."""
        number = 0
        while True:
            request(PTRACE_SYSCALL, self._thread.tid, 0, number)
            status = yield from self._wait()
            number = os.WSTOPSIG(status)
            if number == signal.SIGTRAP | 0x80:
                self._at_entry = not self._at_entry
                return
            if status >> 16 == PTRACE_EVENT_STOP:
                # Stopped by a signal that no mask holds. It is stopped again when it is let go.
                number = 0
            elif number != signal.SIGSTOP:
                raise DumpError(f"process {self._pid}: a system call made inside it ended in signal {number}")

    def run_until(self, done: int) -> Steps[None]:
        """Let the thread run until there is something at `done` in its memory, and stop it where it waits then."""
        request(PTRACE_CONT, self._thread.tid)
        while not any(self.read(done, 8)):
            pid, status = os.waitpid(self._thread.tid, WALL | os.WNOHANG)
            if pid:
                self._pass_on(status)
            yield Wait.TURN
        self._thread.interrupt()
        while (status := (yield from self._wait())) >> 16 != PTRACE_EVENT_STOP:
            self._thread.interrupt()
            self._pass_on(status)
        if not self._room.code <= self._thread.read_registers().ip < self._room.code + CODE_BYTES:
            self._is_taken = False
            raise DumpError(f"process {self._pid}: lazyd was kept from running for too long; try again")

    def _pass_on(self, status: int) -> None:
        """Let the thread go on from a stop that is none of ours: by a signal that no mask holds."""
        if not os.WIFSTOPPED(status):
            raise self._is_gone()
        number = os.WSTOPSIG(status)
        if status >> 16 == PTRACE_EVENT_STOP:
            number = 0  # it is stopped again when it is let go
        elif number != signal.SIGSTOP:
            raise DumpError(f"process {self._pid}: a system call made inside it ended in signal {number}")
        request(PTRACE_CONT, self._thread.tid, 0, number)

    def returned(self) -> int:
        """Return what the system call returned at whose exit the thread is."""
        return signed(self._thread.read_registers().ax)

    def _wait(self) -> Steps[int]:
        status = yield Wait.STOP
        if not os.WIFSTOPPED(status):
            raise self._is_gone()
        return status

    def end(self) -> Steps[None]:
        """Give back all that was taken: the thread is in an event stop as it was; a second time does nothing."""
        if self._memory < 0:
            return
        try:
            if self._is_taken:
                yield from self._give_back()
            self._write_code(bytes(len(self._code.bytes)))
        except ProcessLookupError:
            pass  # there is nothing left to give back to
        finally:
            os.close(self._memory)
            self._memory = -1

    def _give_back(self) -> Steps[None]:
        if self._batch is not None and not self._batch.is_done:
            yield from self._batch.finish_steps()  # later calls undo what earlier ones did
        if self._at_entry:
            yield from self.to_next_stop()
        # The code's own end unmaps; what the rest of it would do is done from here.
        self._thread.write_registers(self._registers._replace(ip=self._code.tail, orig_ax=_NO_SYSTEM_CALL))
        yield from self.to_next_stop()
        yield from self.to_next_stop()
        self._thread.set_signal_mask(self._mask)
        self._thread.interrupt()
        # From the exit of a system call to an event stop: no instruction runs in between.
        request(PTRACE_SYSCALL, self._thread.tid)
        status = yield from self._wait()
        if status >> 16 != PTRACE_EVENT_STOP:
            raise DumpError(f"process {self._pid}: stopped with {status:#x} where an event stop was asked for")
        self._thread.write_registers(self._registers)
        self._is_taken = False

    def drive(self, steps: Steps[_T]) -> _T:
        """Run steps of this thread to their end."""
        return drive(self._thread, steps)


class RemoteCalls(SteppedCalls):
    """The same for a thread that is waited for alone, until close(). It is a context manager."""

    def __init__(self, pid: int, thread: Thread, room: Room) -> None:
        """Take a thread in an event stop over. DumpError if it cannot do system calls."""
        super().__init__(pid, thread, room)
        try:
            self.drive(self.begin())
        except BaseException:
            self.close()
            raise

    def run(self, *calls: Call) -> list[int]:
        """Do some calls and return what each returned: not negative, or -errno."""
        return self.drive(self.run_steps(*calls))

    def close(self) -> None:
        """Give back all that was taken: the thread is in an event stop as it was; a second call does nothing."""
        self.drive(self.end())

    def __enter__(self) -> RemoteCalls:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Batch:
    """Some calls that a thread is about to do."""

    def __init__(self, calls: SteppedCalls, sinks: list[int]) -> None:
        self._calls = calls
        self._sinks = sinks
        self._done = 0
        self.is_done = False

    def step(self) -> int:
        """Do the next call and return what it returned; the thread is stopped at its exit."""
        assert self._done + 1 < len(self._sinks), "no call is left"
        self._calls.drive(self._calls.to_next_stop())
        self._calls.drive(self._calls.to_next_stop())
        self._done += 1
        return self._calls.returned()

    def finish_steps(self) -> Steps[list[int]]:
        """Do all calls that are left and return what each of the batch returned."""
        self.is_done = True
        *sinks, done = self._sinks
        yield from self._calls.run_until(done)
        lowest = min(sinks)
        text = self._calls.read(lowest, max(sinks) + 8 - lowest)
        return [struct.unpack_from("<q", text, sink - lowest)[0] for sink in sinks]

    def finish(self) -> list[int]:
        """Do the same, and wait for it."""
        return self._calls.drive(self.finish_steps())


def signed(value: int) -> int:
    """Return a register's value as the signed number that system calls return."""
    return value - (1 << 64) if value >> 63 else value
