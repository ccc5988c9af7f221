# SPDX-License-Identifier: MIT
"""Stop tasks with ptrace so that they cannot tell, and let them go as they were.

Facts (ptrace(2); kernel/ptrace.c, kernel/signal.c), and what follows:

- PTRACE_SEIZE stops nothing and sends nothing; PTRACE_INTERRUPT makes the thread stop in an event stop, inside the
  kernel's delivery of signals. A thread that is let go from there restarts its system call by itself. So registers
  are looked at in an event stop, and a thread is only let go from one, with the registers it had.
- A stop for a signal that was on its way comes before the event stop, and takes its place: any trap clears a pending
  one. The signal is taken from its queue then. So the event stop is asked for again and the signal is handed on at
  once: the thread stops before the first instruction of its handler.
- A tracer that dies detaches: its tracees run on. A group stop that was there before is there again. So a killed
  dumper harms nobody as long as no register or memory is changed outside what `remote` does.
- A thread is not stopped while it waits uninterruptibly: for a disk, or for its child after vfork. It is given a
  second, for which all other threads stand; what only has not had a processor is given longer. It cannot be let go
  either before it stops: the kernel does that when its tracer ends.
- A leading thread that was killed is reported when the others have been waited for, so nobody waits for it alone.
- ptrace is per thread of the tracer: every call here has to come from the thread that seized.
- A thread that was stopped inside a restartable sequence is made to abort it when it goes on (rseq(2)), because it
  was preempted. Its registers are therefore given as the kernel will leave them: at the abort handler.
- Threads that are not stopped yet can make new ones: the list of threads is read until nothing new turns up.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import struct
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import TracebackType

from lazyd.errors import DumpError, SystemCallError
from lazyd.target.binding import WALL, PtraceError
from lazyd.target.binding import ptrace as _ptrace
from lazyd.target.process import read_small
from lazyd.target.reaper import Reaper
from lazyd.tuples import NamedTuple

# include/uapi/linux/ptrace.h; python-ptrace names only the older half.
PTRACE_CONT = 7
PTRACE_DETACH = 17
PTRACE_SYSCALL = 24
PTRACE_POKEDATA = 5
PTRACE_SET_THREAD_AREA = 26
PTRACE_SETOPTIONS = 0x4200
PTRACE_GETEVENTMSG = 0x4201
PTRACE_GETSIGINFO = 0x4202
PTRACE_GETREGSET = 0x4204
PTRACE_SETREGSET = 0x4205
PTRACE_SEIZE = 0x4206
PTRACE_INTERRUPT = 0x4207
PTRACE_PEEKSIGINFO = 0x4209
PTRACE_GETSIGMASK = 0x420A
PTRACE_SETSIGMASK = 0x420B
PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
PTRACE_O_TRACESYSGOOD = 1
PTRACE_O_TRACECLONE = 1 << 3
PTRACE_O_TRACEEXEC = 1 << 4
PTRACE_O_EXITKILL = 1 << 20
PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_CLONE, PTRACE_EVENT_EXEC, PTRACE_EVENT_STOP = 3, 4, 128
PTRACE_PEEKSIGINFO_SHARED = 1
NT_PRSTATUS = 1
NT_X86_XSTATE = 0x202

# The kernel's own, include/linux/errno.h: what a system call "returns" that is about to be restarted.
ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK = 512, 513, 514, 516
SYS_RESTART_SYSCALL = 219

STOP_TIMEOUT_S = 5.0
_UNINTERRUPTIBLE_S = 1.0
_LONGEST_PAUSE_S = 1e-3
_SEIZE_TRIES = 50
_STOP_SIGNALS = (signal.SIGSTOP, signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
_SIGINFO_BYTES = 128
_XSTATE_BYTES = 16384  # more than AVX-512 and AMX take


class Registers(NamedTuple):
    """General registers, in the order of user_regs_struct (x86-64)."""

    r15: int
    r14: int
    r13: int
    r12: int
    bp: int
    bx: int
    r11: int
    r10: int
    r9: int
    r8: int
    ax: int
    cx: int
    dx: int
    si: int
    di: int
    orig_ax: int
    ip: int
    cs: int
    flags: int
    sp: int
    ss: int
    fs_base: int
    gs_base: int
    ds: int
    es: int
    fs: int
    gs: int

    def restarted(self) -> Registers:
        """Return them as the kernel makes them when the thread goes on: at its system call again, if in one.

        arch/x86/kernel/signal.c: what asked for a restart is entered again with its number in ax, from the
        instruction before.
        """
        error = (1 << 64) - self.ax
        if self.orig_ax >> 31 or error not in (ERESTARTSYS, ERESTARTNOINTR, ERESTARTNOHAND, ERESTART_RESTARTBLOCK):
            return self
        number = SYS_RESTART_SYSCALL if error == ERESTART_RESTARTBLOCK else self.orig_ax
        return self._replace(ax=number, ip=self.ip - 2)


_REGISTERS = struct.Struct("27Q")


class Rseq(NamedTuple):
    """The restartable-sequence area that a thread has registered; rseq(2)."""

    address: int
    size: int
    signature: int


def request(command: int, tid: int, address: int = 0, data: int = 0) -> int:
    """Make one ptrace request; OSError if it fails. Every one that is made here comes through this function."""
    try:
        result = _ptrace(command, tid, address, data)
    except PtraceError as error:
        raise OSError(error.errno, os.strerror(error.errno)) from None
    assert isinstance(result, int)
    return result


class _Vector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


class Thread:
    """A thread that this thread of ours traces. In an event stop unless a method says otherwise."""

    def __init__(self, tid: int, options: int = PTRACE_O_TRACESYSGOOD, *, is_ours: bool = False) -> None:
        """Seize a thread; it runs on. is_ours: its maker is traced with PTRACE_O_TRACECLONE, so it is too. OSError."""
        self.tid = tid
        self.is_leader = True
        """It may be the leading one, which is the last to be reported dead."""
        if not is_ours:
            request(PTRACE_SEIZE, tid, 0, options)
        self.stop_signal = 0
        """It was in a group stop already, by this signal; 0 if it ran."""
        self._registers: Registers | None = None
        self._rseq: tuple[Rseq | None] | None = None

    def interrupt(self) -> None:
        """Ask it to stop; wait_stopped() sees it stop."""
        request(PTRACE_INTERRUPT, self.tid)

    def wait_stopped(self, deadline: float) -> bool:
        """Wait for its event stop, handing on the signals that come before; False if the thread has ended."""
        pause = 20e-6
        begun = time.monotonic()
        while True:
            try:
                pid, status = os.waitpid(self.tid, WALL | os.WNOHANG)
            except ChildProcessError:
                return False
            if not pid:
                now = time.monotonic()
                state = state_of(self.tid) if pause == _LONGEST_PAUSE_S else "?"
                if state in "ZX":
                    return False
                if now > deadline or (state == "D" and now - begun > _UNINTERRUPTIBLE_S):
                    raise DumpError(f"thread {self.tid} does not stop: {_why_not(self.tid)}; try again later")
                time.sleep(pause)
                pause = min(pause * 2, _LONGEST_PAUSE_S)
                continue
            if not os.WIFSTOPPED(status):
                return False
            number, event = os.WSTOPSIG(status), status >> 16
            if event == PTRACE_EVENT_STOP:
                self.stop_signal = number if number in _STOP_SIGNALS else 0
                return True
            self.interrupt()
            request(PTRACE_CONT, self.tid, 0, 0 if event else number)

    def registers(self) -> Registers:
        """Return the general registers with which the thread stopped, a restartable sequence aborted."""
        if self._registers is None:
            found = self.read_registers()
            if (rseq := self.rseq()) is not None and (abort := _abort_address(self.tid, rseq, found.ip)):
                found = found._replace(ip=abort)
                self.write_registers(found)
            self._registers = found
        return self._registers

    def read_registers(self) -> Registers:
        """Return the general registers as they are now."""
        return Registers(*_REGISTERS.unpack(self._read_set(NT_PRSTATUS, _REGISTERS.size)))

    def write_registers(self, registers: Registers) -> None:
        """Set the general registers."""
        text = _REGISTERS.pack(*registers)
        buffer = ctypes.create_string_buffer(text, len(text))
        vector = _Vector(ctypes.addressof(buffer), len(text))
        request(PTRACE_SETREGSET, self.tid, NT_PRSTATUS, ctypes.addressof(vector))

    def write_xstate(self, area: bytes) -> None:
        """Set the extended state, in the layout and of the length that xstate() returns. OSError."""
        buffer = ctypes.create_string_buffer(area, len(area))
        vector = _Vector(ctypes.addressof(buffer), len(area))
        request(PTRACE_SETREGSET, self.tid, NT_X86_XSTATE, ctypes.addressof(vector))

    def write_segment(self, number: int, segment: bytes) -> None:
        """Set one of the entries of set_thread_area(2), a struct user_desc."""
        request(PTRACE_SET_THREAD_AREA, self.tid, number, ctypes.addressof(ctypes.create_string_buffer(segment, 16)))

    def new_thread(self) -> int:
        """Return whom a thread has made that stopped with PTRACE_EVENT_CLONE."""
        tid = ctypes.c_ulong()
        request(PTRACE_GETEVENTMSG, self.tid, 0, ctypes.addressof(tid))
        return tid.value

    def xstate(self) -> bytes:
        """Return the extended state, in the XSAVE layout that is not compacted (Intel's manual, 13.4)."""
        return self._read_set(NT_X86_XSTATE, _XSTATE_BYTES)

    def _read_set(self, which: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(size)
        vector = _Vector(ctypes.addressof(buffer), size)
        request(PTRACE_GETREGSET, self.tid, which, ctypes.addressof(vector))
        return buffer.raw[: vector.length]

    def signal_mask(self) -> int:
        """Return the mask of blocked signals, bit n - 1 for signal n; inside sigsuspend the one to come back to."""
        mask = ctypes.c_uint64()
        request(PTRACE_GETSIGMASK, self.tid, 8, ctypes.addressof(mask))
        return mask.value

    def set_signal_mask(self, mask: int) -> None:
        """Set the mask of blocked signals."""
        request(PTRACE_SETSIGMASK, self.tid, 8, ctypes.addressof(ctypes.c_uint64(mask)))

    def pending_signals(self, *, shared: bool) -> list[bytes]:
        """Return the signals that wait for this thread, or with it for the whole task, as siginfo structures."""
        found: list[bytes] = []
        batch = 32
        buffer = ctypes.create_string_buffer(batch * _SIGINFO_BYTES)
        while True:
            flags = PTRACE_PEEKSIGINFO_SHARED if shared else 0
            asked = ctypes.create_string_buffer(struct.pack("QIi", len(found), flags, batch))
            count = request(PTRACE_PEEKSIGINFO, self.tid, ctypes.addressof(asked), ctypes.addressof(buffer))
            found += [buffer.raw[i * _SIGINFO_BYTES : (i + 1) * _SIGINFO_BYTES] for i in range(count)]
            if count < batch:
                return found

    def rseq(self) -> Rseq | None:
        """Return the registered rseq area; None without one, or where the kernel cannot say (before 5.13)."""
        if self._rseq is None:
            self._rseq = (self._read_rseq(),)
        return self._rseq[0]

    def _read_rseq(self) -> Rseq | None:
        buffer = ctypes.create_string_buffer(24)
        try:
            request(PTRACE_GET_RSEQ_CONFIGURATION, self.tid, 24, ctypes.addressof(buffer))
        except OSError:
            return None
        address, size, signature = struct.unpack_from("QII", buffer.raw)
        return Rseq(address, size, signature) if address else None

    def dispatches_system_calls(self) -> bool:
        """Say whether the thread's system calls are handed to itself (prctl PR_SET_SYSCALL_USER_DISPATCH)."""
        buffer = ctypes.create_string_buffer(32)
        try:
            request(PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG, self.tid, 32, ctypes.addressof(buffer))
        except OSError:
            return False  # before 6.4 nobody can say
        return bool(struct.unpack_from("Q", buffer.raw)[0])

    def suspend_filters(self, *, is_on: bool) -> None:
        """Keep the thread's seccomp filters from judging its system calls while it is traced. OSError.

        It needs CAP_SYS_ADMIN, and a tracer without filters of its own.
        """
        request(PTRACE_SETOPTIONS, self.tid, 0, PTRACE_O_TRACESYSGOOD | (PTRACE_O_SUSPEND_SECCOMP if is_on else 0))

    def detach(self) -> None:
        """Let it go, or see it dead: a thread that was killed stays, and its task with it, until its tracer waits.

        A child of ours is left to whoever waits for it, and one that does not stop to the kernel.
        """
        try:
            request(PTRACE_DETACH, self.tid)
        except OSError:
            with suppress(OSError, KeyError):
                if int(status_fields(self.tid)["PPid"]) != os.getpid() or not is_leader(self.tid):
                    self._await_end()

    def _await_end(self) -> None:
        """Wait for a thread that is not stopped: until it is dead, or stops after all and is let go. OSError."""
        deadline = time.monotonic() + _UNINTERRUPTIBLE_S
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.tid, WALL | os.WNOHANG)
            if pid:
                if os.WIFSTOPPED(status):
                    request(PTRACE_DETACH, self.tid)
                return
            if state_of(self.tid) == "D":
                return
            time.sleep(_LONGEST_PAUSE_S)


def is_leader(tid: int) -> bool:
    """Say whether a thread leads its task; OSError if it is gone."""
    return int(status_fields(tid)["Tgid"]) == tid


def _why_not(tid: int) -> str:
    """Say what a thread does that cannot be interrupted."""
    with suppress(OSError):
        where = Path(f"/proc/{tid}/wchan").read_text().strip("0") or "the kernel"
        if "vfork" in where or "clone" in where:
            return "it waits for its child after vfork"
        return f"it waits uninterruptibly in {where}"
    return "it is gone"


def _abort_address(tid: int, rseq: Rseq, ip: int) -> int:
    """Return where the kernel will send a thread that was stopped at ip, if inside a restartable sequence; else 0."""
    area = read_memory(tid, rseq.address + 8, 8)
    descriptor = int.from_bytes(area, "little") if area else 0
    if not descriptor or (words := read_memory(tid, descriptor, 32)) is None:
        return 0
    _, _, start, length, abort = struct.unpack("IIQQQ", words)
    assert isinstance(abort, int)
    return abort if start <= ip < start + length else 0


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


_libc = ctypes.CDLL(None, use_errno=True)
_libc.process_vm_readv.restype = ctypes.c_ssize_t
_libc.process_vm_readv.argtypes = [ctypes.c_int, *(ctypes.c_void_p, ctypes.c_ulong) * 2, ctypes.c_ulong]


def read_memory(pid: int, address: int, length: int) -> bytes | None:
    """Return bytes of a task's memory that it may read itself; None if it may not, or not all of them."""
    buffer = ctypes.create_string_buffer(length)
    here = _IoVector(ctypes.addressof(buffer), length)
    there = _IoVector(address, length)
    count = _libc.process_vm_readv(pid, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
    return buffer.raw if count == length else None


def thread_ids(pid: int) -> list[int]:
    """Return the ids of a task's threads, the leader first; none if it is gone."""
    try:
        return sorted(map(int, os.listdir(f"/proc/{pid}/task")), key=lambda tid: (tid != pid, tid))  # noqa: PTH208  names
    except (FileNotFoundError, ProcessLookupError):
        return []


def changes_too_fast(pid: int) -> DumpError:
    """Return the error of a task that is another one before it was looked at."""
    return DumpError(f"process {pid} changes faster than it can be looked at (exec, mmap); try again")


class StoppedTask:
    """A task with all its threads stopped. As a context manager it lets them go at the end."""

    def __init__(self, pid: int, timeout: float = STOP_TIMEOUT_S) -> None:
        """Stop a task; DumpError in one line if that cannot be, and then the task runs on."""
        self.pid = pid
        self.threads: list[Thread] = []
        self._ended: list[Thread] = []
        try:
            with Reaper() as reaper:
                self._stop(time.monotonic() + timeout, reaper)
        except BaseException:
            self.release()
            raise

    def _stop(self, deadline: float, reaper: Reaper) -> None:
        known: set[int] = set()
        while new := [tid for tid in thread_ids(self.pid) if tid not in known]:
            known.update(new)
            if len(known) > 1:
                reaper.start()
            seized = []
            for tid in new:
                if (thread := self._seize(tid)) is not None:
                    seized.append(thread)
                    if not thread.is_leader:
                        reaper.add(tid)
            # Every one is asked before any is waited for: they stop at the same time.
            self.threads += seized
            for thread in seized:
                with suppress(ProcessLookupError):
                    thread.interrupt()
            # The leading one last: if it was killed, it is not reported before.
            for thread in reversed(seized):
                if not thread.wait_stopped(deadline):
                    self._ended.append(thread)
        has_leader = any(thread.is_leader for thread in self.threads) and not any(
            thread.is_leader for thread in self._ended
        )
        self.threads = [thread for thread in self.threads if thread not in self._ended]
        if state_of(self.pid) == "X" or (not self.threads and has_ended(self.pid)):
            raise DumpError(f"process {self.pid} has ended")
        if not self.threads:  # an exec has ended those that were there
            raise changes_too_fast(self.pid)
        if not has_leader:
            raise DumpError(
                f"the main thread of process {self.pid} has ended, its other threads run on: that cannot be dumped"
            )

    def _seize(self, tid: int) -> Thread | None:
        for _ in range(_SEIZE_TRIES):
            try:
                thread = Thread(tid)
                break
            except ProcessLookupError:
                return None
            except OSError as failed:
                error = failed
            if error.errno != errno.EPERM:
                raise self._cannot_seize(error) from None
            if tracer := tracer_of(tid):
                raise DumpError(f"process {self.pid} is traced by process {tracer}; end that first")
            if state_of(tid) in "ZX":
                return None
            # A thread that is about to end is refused so, too: another one's exec ends it, and may take its id.
            time.sleep(_LONGEST_PAUSE_S)
        else:
            raise self._cannot_seize(error) from None
        thread.is_leader = tid == self.pid
        return thread

    def _cannot_seize(self, error: OSError) -> SystemCallError:
        hint = "no permission to trace it; run as root or with CAP_SYS_PTRACE"
        return SystemCallError("PTRACE_SEIZE", error.errno or 0, path=f"process {self.pid}", hint=hint)

    @property
    def leader(self) -> Thread:
        """The thread that has the task's pid."""
        return self.threads[0]

    def release(self) -> None:
        """Let all threads go; a second call does nothing."""
        threads, self.threads, self._ended = [*self._ended, *self.threads], [], []
        threads.sort(key=lambda thread: not thread.is_leader)
        for thread in reversed(threads):  # a leader that was killed can only be waited for when the others are gone
            thread.detach()

    def __iter__(self) -> Iterator[Thread]:
        return iter(self.threads)

    def __enter__(self) -> StoppedTask:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def status_fields(pid: int) -> dict[str, str]:
    """Return the lines of /proc/PID/status; OSError if there is no such task."""
    lines = read_small(f"/proc/{pid}/status").decode(errors="replace").rstrip("\n").split("\n")
    return {name: value.strip(" \t") for name, _, value in (line.partition(":") for line in lines)}


def tracer_of(tid: int) -> int:
    """Return the pid of who traces a thread; 0: nobody."""
    with suppress(OSError):
        return int(status_fields(tid)["TracerPid"])
    return 0


def state_of(tid: int) -> str:
    """Return the letter of a thread's state; X if it is gone."""
    with suppress(OSError):
        return status_fields(tid)["State"][0]
    return "X"


def has_ended(pid: int) -> bool:
    """Say whether a process has ended, all its threads."""
    with suppress(OSError):
        fields = status_fields(pid)
        return fields["State"][0] in "ZX" and int(fields.get("Threads", "1")) == 1
    return True
