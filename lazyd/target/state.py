# SPDX-License-Identifier: MIT
"""All that a stopped task is beside its memory and its files.

Facts, and what follows: most of it the kernel tells anybody who may trace the task: /proc, ptrace's register sets,
prlimit(2), sched_getscheduler(2), get_robust_list(2). Handlers of signals, alternate stacks, timers, the address that
is cleared when a thread ends, and some settings of prctl(2) it tells only to the task itself: the task is made to ask,
see `remote`, all its questions in one go for each thread.

Extended state lies in the buffer of its register set where CPUID says (leaf 13), which differs between processors.
"""

from __future__ import annotations

import ctypes
import os
import re
import struct
from pathlib import Path

from lazyd.errors import DumpError
from lazyd.target import xstate
from lazyd.target.crowd import ask_each
from lazyd.target.process import SIGACTION_SIGNALS, read_small, stat_fields
from lazyd.target.remote import Call, RemoteCalls, SteppedCalls, Steps, find_room
from lazyd.target.timers import is_maker_known
from lazyd.target.tracing import Registers, Rseq, StoppedTask, Thread, request, status_fields
from lazyd.tuples import NamedTuple

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_BRK, _SYS_RT_SIGACTION, _SYS_GETITIMER, _SYS_SIGALTSTACK, _SYS_PRCTL = 12, 13, 36, 131, 157
_SYS_TIMER_GETTIME, _SYS_TIMER_GETOVERRUN, _SYS_MEMBARRIER, _SYS_GET_ROBUST_LIST = 224, 225, 324, 274
# include/uapi/linux/prctl.h
_PR_GET_PDEATHSIG, _PR_GET_DUMPABLE, _PR_GET_TSC, _PR_GET_SECUREBITS = 2, 3, 25, 27
_PR_GET_CHILD_SUBREAPER, _PR_GET_TID_ADDRESS, _PR_GET_THP_DISABLE, _PR_GET_MDWE = 37, 40, 42, 66
_PR_TSC_ENABLE = 1
_MEMBARRIER_CMD_GET_REGISTRATIONS = 1 << 9
_PTRACE_GET_THREAD_AREA = 25
_FIRST_TLS_ENTRY, _TLS_ENTRIES = 12, 3
_SIGACTION_BYTES = 32
_SCHED_DEADLINE = 6
_USER_CODE_64 = 0x33
_UNLIMITED = (1 << 64) - 1  # RLIM_INFINITY


class SignalAction(NamedTuple):
    """The kernel's sigaction."""

    handler: int
    flags: int
    restorer: int
    mask: int


class IntervalTimer(NamedTuple):
    """A timer of setitimer(2); both times in (seconds, microseconds)."""

    interval: tuple[int, int]
    value: tuple[int, int]


class PosixTimer(NamedTuple):
    """A timer of timer_create(2); both times in (seconds, nanoseconds). `thread`: whom it signals, 0 the task."""

    number: int
    clock: int
    signal: int
    notify: int
    value_pointer: int
    thread: int
    overrun: int
    interval: tuple[int, int]
    value: tuple[int, int]


class Credentials(NamedTuple):
    """Whose a thread is; capability sets as 64-bit masks."""

    uids: tuple[int, ...]  # real, effective, saved, filesystem
    gids: tuple[int, ...]
    groups: tuple[int, ...]
    inheritable: int
    permitted: int
    effective: int
    bounding: int
    ambient: int
    secure_bits: int
    no_new_privileges: bool


class SegmentDescriptor(NamedTuple):
    """One of the three entries of set_thread_area(2): struct user_desc."""

    number: int
    base: int
    limit: int
    bits: int


class ThreadState(NamedTuple):
    """What a thread is."""

    tid: int
    name: str
    registers: Registers
    xstate: xstate.ExtendedState
    segments: tuple[SegmentDescriptor, ...]
    signal_mask: int
    pending: list[bytes]
    alternate_stack: tuple[int, int, int]  # address, size, flags
    clear_tid_address: int
    robust_list: tuple[int, int]
    rseq: Rseq | None
    parent_death_signal: int
    credentials: Credentials
    nice: int
    policy: int
    priority: int


class TaskState(NamedTuple):
    """What a task is, its memory and files apart. The leading thread comes first."""

    pid: int
    parent: int
    group: int
    session: int
    name: str
    threads: list[ThreadState]
    stop_signal: int
    """It was stopped by this one before we came; 0 if it ran."""
    flags: int
    personality: int
    pending: list[bytes]
    actions: list[SignalAction]
    interval_timers: tuple[IntervalTimer, IntervalTimer, IntervalTimer]
    posix_timers: list[PosixTimer]
    limits: list[tuple[int, int]]
    login_uid: int
    oom_score_adjustment: int
    is_child_subreaper: bool
    membarrier_registrations: int
    umask: int
    working_directory: str
    executable: str
    auxiliary_vector: list[int]
    memory_limits: MemoryLimits
    dumpable: int
    huge_pages_disabled: bool


class MemoryLimits(NamedTuple):
    """Where the parts of a program are, as the kernel keeps it: prctl(2), PR_SET_MM."""

    start_code: int
    end_code: int
    start_data: int
    end_data: int
    start_stack: int
    start_brk: int
    brk: int
    arg_start: int
    arg_end: int
    env_start: int
    env_end: int


class _Answers(NamedTuple):
    """What a thread said of itself."""

    alternate_stack: tuple[int, int, int]
    clear_tid_address: int
    parent_death_signal: int
    secure_bits: int


class _TaskAnswers(NamedTuple):
    """What the leading thread said of the task."""

    actions: list[SignalAction]
    interval_timers: list[IntervalTimer]
    posix_timers: list[PosixTimer]
    brk: int
    dumpable: int
    is_child_subreaper: bool
    huge_pages_disabled: bool
    membarrier_registrations: int


def read_state(task: StoppedTask) -> TaskState:
    """Read all of a stopped task; DumpError if it has what cannot be kept, and it stays stopped as it was."""
    pid = task.pid
    for thread in task:
        if thread.registers().cs != _USER_CODE_64:
            raise DumpError(f"process {pid} runs 32-bit code, which cannot be dumped; use `criu dump`")
        if thread.dispatches_system_calls():
            raise DumpError(f"thread {thread.tid} handles its own system calls (prctl); use `criu dump`")
    room = find_room(task)
    timers = list_timers(pid)
    if len(task.threads) > 1 and not all(is_maker_known(one.clock, one.thread, one.signal) for one in timers):
        raise DumpError(f"process {pid} has a timer on the time of one of its threads: no image can hold of which")
    with RemoteCalls(pid, task.leader, room) as calls:
        leader_answers = calls.drive(_ask_thread(calls))
        answers = _ask_task(calls, pid, timers)
    threads = [_read_thread(pid, task.leader, leader_answers)]
    others = task.threads[1:]
    answered = ask_each(task, others, _ask_thread)
    threads += [_read_thread(pid, thread, told) for thread, told in zip(others, answered, strict=True)]
    stat = stat_fields(pid)
    status = status_fields(pid)
    return TaskState(
        pid=pid,
        parent=int(stat[4 - 3]),
        group=int(stat[5 - 3]),
        session=int(stat[6 - 3]),
        name=threads[0].name,
        threads=threads,
        stop_signal=task.leader.stop_signal,
        flags=int(stat[9 - 3]),
        personality=int(Path(f"/proc/{pid}/personality").read_text(), 16),
        pending=task.leader.pending_signals(shared=True),
        actions=answers.actions,
        interval_timers=(answers.interval_timers[0], answers.interval_timers[1], answers.interval_timers[2]),
        posix_timers=answers.posix_timers,
        limits=_read_limits(pid),
        login_uid=_read_number(pid, "loginuid", 0xFFFFFFFF),
        oom_score_adjustment=_read_number(pid, "oom_score_adj", 0),
        is_child_subreaper=answers.is_child_subreaper,
        membarrier_registrations=answers.membarrier_registrations,
        working_directory=os.readlink(f"/proc/{pid}/cwd"),  # noqa: PTH115  the text as it is
        executable=os.readlink(f"/proc/{pid}/exe"),  # noqa: PTH115  the same
        umask=int(status["Umask"], 8),
        auxiliary_vector=_read_auxiliary_vector(pid),
        memory_limits=_memory_limits(stat, answers.brk),
        dumpable=answers.dumpable,
        huge_pages_disabled=answers.huge_pages_disabled,
    )


def _read_number(pid: int, name: str, default: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/{name}").read_text())
    except FileNotFoundError:
        return default  # a kernel without audit


def _read_limits(pid: int) -> list[tuple[int, int]]:
    """Return the limits by their number; prlimit(2) would need CAP_SYS_RESOURCE for a task of another user."""
    found = []
    for line in Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]:
        soft, hard = (_UNLIMITED if word == "unlimited" else int(word) for word in line[26:].split()[:2])
        found.append((soft, hard))
    return found


def _read_auxiliary_vector(pid: int) -> list[int]:
    text = Path(f"/proc/{pid}/auxv").read_bytes()
    words = list(struct.unpack(f"{len(text) // 8}Q", text))
    for index in range(0, len(words), 2):
        if not words[index]:  # AT_NULL
            return words[:index]
    return words


def _memory_limits(stat: list[str], brk: int) -> MemoryLimits:
    def field(number: int) -> int:
        return int(stat[number - 3])

    return MemoryLimits(
        start_code=field(26),
        end_code=field(27),
        start_stack=field(28),
        start_data=field(45),
        end_data=field(46),
        start_brk=field(47),
        brk=brk,
        arg_start=field(48),
        arg_end=field(49),
        env_start=field(50),
        env_end=field(51),
    )


def _ask_thread(calls: SteppedCalls) -> Steps[_Answers]:
    at = calls.buffers
    *_, secure_bits = yield from calls.run_steps(
        Call(_SYS_SIGALTSTACK, (0, at)),
        Call(_SYS_PRCTL, (_PR_GET_TID_ADDRESS, at + 24)),
        Call(_SYS_PRCTL, (_PR_GET_PDEATHSIG, at + 32)),
        Call(_SYS_PRCTL, (_PR_GET_SECUREBITS,)),
    )
    address, flags, size, clear_tid, death = struct.unpack("QiQQi", calls.read(at, 36))
    return _Answers((address, size, flags), clear_tid, death, max(0, secure_bits))


def _ask_task(calls: RemoteCalls, pid: int, timers: list[PosixTimer]) -> _TaskAnswers:
    at = calls.buffers
    asked = [Call(_SYS_RT_SIGACTION, (number, 0, at + index * 32, 8)) for index, number in enumerate(SIGACTION_SIGNALS)]
    at_timers = at + len(asked) * _SIGACTION_BYTES
    asked += [Call(_SYS_GETITIMER, (which, at_timers + which * 32)) for which in range(3)]
    results = calls.run(
        *asked,
        Call(_SYS_BRK, (0,)),
        Call(_SYS_PRCTL, (_PR_GET_DUMPABLE,)),
        Call(_SYS_PRCTL, (_PR_GET_CHILD_SUBREAPER, at_timers + 96)),
        Call(_SYS_PRCTL, (_PR_GET_THP_DISABLE,)),
        Call(_SYS_MEMBARRIER, (_MEMBARRIER_CMD_GET_REGISTRATIONS,)),
        Call(_SYS_PRCTL, (_PR_GET_TSC, at_timers + 100)),
        Call(_SYS_PRCTL, (_PR_GET_MDWE,)),
    )
    brk, dumpable, _, huge, membarrier, _, denies = results[len(asked) :]
    text = calls.read(at, at_timers + 104 - at)
    reaper, tsc = struct.unpack_from("ii", text, at_timers + 96 - at)
    if tsc not in (0, _PR_TSC_ENABLE) or denies > 0:
        what = "may not read the time stamp counter" if denies <= 0 else "may not have memory that it writes and runs"
        raise DumpError(f"process {pid} {what} (prctl): no image can hold that")
    actions = []
    for index in range(len(SIGACTION_SIGNALS)):
        handler, flags, restorer, mask = struct.unpack_from("4Q", text, index * _SIGACTION_BYTES)
        actions.append(SignalAction(handler, flags, restorer, mask))
    intervals = []
    for which in range(3):
        words = struct.unpack_from("4Q", text, at_timers + which * 32 - at)
        intervals.append(IntervalTimer((words[0], words[1]), (words[2], words[3])))
    return _TaskAnswers(
        actions=actions,
        interval_timers=intervals,
        posix_timers=[_ask_timer(calls, timer) for timer in timers],
        brk=brk,
        dumpable=max(0, dumpable),
        is_child_subreaper=bool(reaper),
        huge_pages_disabled=huge > 0,
        membarrier_registrations=max(0, membarrier),
    )


def _ask_timer(calls: RemoteCalls, timer: PosixTimer) -> PosixTimer:
    _, overrun = calls.run(
        Call(_SYS_TIMER_GETTIME, (timer.number, calls.buffers)), Call(_SYS_TIMER_GETOVERRUN, (timer.number,))
    )
    words = struct.unpack("4Q", calls.read(calls.buffers, 32))
    return timer._replace(overrun=max(0, overrun), interval=(words[0], words[1]), value=(words[2], words[3]))


_TIMER = r"ID: (\d+)\nsignal: (\d+)/([0-9a-fpx()]+)\nnotify: (\w+)/(\w+)\.(\d+)\nClockID: (-?\d+)\n"
_NOTIFY = {"signal": 0, "none": 1, "thread": 2}  # SIGEV_*
_SIGEV_THREAD_ID = 4


def list_timers(pid: int) -> list[PosixTimer]:
    """Return the timers that /proc lists, their times still open; kernels without checkpoint/restore list none."""
    try:
        text = Path(f"/proc/{pid}/timers").read_text()
    except FileNotFoundError:
        return []
    found = []
    for match in re.finditer(_TIMER, text):
        to_thread = match[5] == "tid"
        notify = _NOTIFY[match[4]] | (_SIGEV_THREAD_ID if to_thread else 0)
        found.append(
            PosixTimer(
                number=int(match[1]),
                clock=int(match[7]),
                signal=int(match[2]),
                notify=notify,
                value_pointer=int(match[3], 16) if match[3] not in ("(null)",) else 0,
                thread=int(match[6]) if to_thread else 0,
                overrun=0,
                interval=(0, 0),
                value=(0, 0),
            )
        )
    if len(found) != text.count("ID: ") - text.count("ClockID: "):
        raise DumpError(f"process {pid} has a timer that is not understood: {text.splitlines()}")
    return sorted(found)


def _read_thread(pid: int, thread: Thread, answers: _Answers) -> ThreadState:
    status = status_fields(thread.tid)
    policy = os.sched_getscheduler(thread.tid)
    if policy & ~os.SCHED_RESET_ON_FORK == _SCHED_DEADLINE:
        raise DumpError(f"thread {thread.tid} of process {pid} has deadlines (SCHED_DEADLINE): no image can hold that")
    return ThreadState(
        tid=thread.tid,
        # Images hold UTF-8 only: another name comes back with question marks.
        name=read_small(f"/proc/{pid}/task/{thread.tid}/comm")[:-1].decode(errors="replace").replace("\ufffd", "?"),
        registers=thread.registers(),
        xstate=xstate.parse(thread.xstate()),
        segments=_read_segments(thread),
        signal_mask=thread.signal_mask(),
        pending=thread.pending_signals(shared=False),
        alternate_stack=answers.alternate_stack,
        clear_tid_address=answers.clear_tid_address,
        robust_list=_robust_list(thread.tid),
        rseq=thread.rseq(),
        parent_death_signal=answers.parent_death_signal,
        credentials=_credentials(status, answers.secure_bits),
        nice=os.getpriority(os.PRIO_PROCESS, thread.tid),
        policy=policy,
        priority=os.sched_getparam(thread.tid).sched_priority,
    )


def _read_segments(thread: Thread) -> tuple[SegmentDescriptor, ...]:
    found = []
    buffer = ctypes.create_string_buffer(16)
    for number in range(_FIRST_TLS_ENTRY, _FIRST_TLS_ENTRY + _TLS_ENTRIES):
        request(_PTRACE_GET_THREAD_AREA, thread.tid, number, ctypes.addressof(buffer))
        found.append(SegmentDescriptor(*struct.unpack("4I", buffer.raw)))
    return tuple(found)


_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


def _robust_list(tid: int) -> tuple[int, int]:
    head, length = ctypes.c_uint64(), ctypes.c_uint64()
    if _libc.syscall(_SYS_GET_ROBUST_LIST, tid, ctypes.byref(head), ctypes.byref(length)):
        error = ctypes.get_errno()
        raise DumpError(f"thread {tid}: get_robust_list: {os.strerror(error)}")
    return head.value, length.value


def _credentials(status: dict[str, str], secure_bits: int) -> Credentials:
    def numbers(name: str) -> tuple[int, ...]:
        return tuple(map(int, status[name].split()))

    def mask(name: str) -> int:
        return int(status[name], 16)

    return Credentials(
        uids=numbers("Uid"),
        gids=numbers("Gid"),
        groups=numbers("Groups"),
        inheritable=mask("CapInh"),
        permitted=mask("CapPrm"),
        effective=mask("CapEff"),
        bounding=mask("CapBnd"),
        ambient=mask("CapAmb"),
        secure_bits=secure_bits,
        no_new_privileges=status.get("NoNewPrivs", "0") != "0",
    )
