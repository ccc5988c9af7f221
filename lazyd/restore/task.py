# SPDX-License-Identifier: MIT
"""What a task and its threads are beside memory and files, as steps in the order that the kernel needs.

- Threads are made with their ids (clone3, set_tid) while the maker still has the right to choose them, and made before
  timers, which may be a thread's own.
- Pending signals a thread puts into its own queues (rt_tgsigqueueinfo(2): nobody else may say who sent them), after
  the actions are set; all signals are blocked until the registers are there.
- Limits come late, because they would limit what makes the task; credentials come last but one, thread by thread, and
  after them only what they would reset: whether it may be dumped, and the signal at its parent's death.
- User ids are changed with SECBIT_NO_SETUID_FIXUP, so that the capabilities are what is set, not what is left.
- From Linux 6.15 on a timer may be made with its number (PR_TIMER_CREATE_RESTORE_IDS). Before, numbers are dealt out
  one by one: timers are made and deleted until it is its turn.
"""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from lazyd.errors import ImageError, RestoreError
from lazyd.hints import Any
from lazyd.restore.plan import Plan, Thread, mask
from lazyd.target import xstate
from lazyd.target.process import SIGACTION_SIGNALS
from lazyd.target.puppet import Pointing, Puppet, Step
from lazyd.target.timers import times_its_maker
from lazyd.target.tracing import Registers, status_fields
from lazyd.target.tracing import Thread as Traced

# arch/x86/entry/syscalls/syscall_64.tbl
_SYS_RT_SIGACTION, _SYS_SETITIMER, _SYS_CHDIR, _SYS_UMASK = 13, 38, 80, 95
_SYS_SETGROUPS, _SYS_SETRESUID, _SYS_SETRESGID, _SYS_SETFSUID, _SYS_SETFSGID = 116, 117, 119, 122, 123
_SYS_CAPSET, _SYS_RT_SIGQUEUEINFO, _SYS_SIGALTSTACK, _SYS_PERSONALITY, _SYS_PRCTL = 126, 129, 131, 135, 157
_SYS_SET_TID_ADDRESS, _SYS_TIMER_CREATE, _SYS_TIMER_SETTIME, _SYS_TIMER_DELETE = 218, 222, 223, 226
_SYS_SET_ROBUST_LIST, _SYS_RT_TGSIGQUEUEINFO, _SYS_PRLIMIT, _SYS_MEMBARRIER = 273, 297, 302, 324
_SYS_RSEQ, _SYS_CLONE3 = 334, 435
# include/uapi/linux/prctl.h
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_NAME, _PR_CAPBSET_DROP, _PR_SET_SECUREBITS = 1, 4, 15, 24, 28
_PR_SET_CHILD_SUBREAPER, _PR_SET_NO_NEW_PRIVS, _PR_SET_THP_DISABLE, _PR_CAP_AMBIENT = 36, 38, 41, 47
_PR_TIMER_CREATE_RESTORE_IDS = 77
_PR_CAP_AMBIENT_RAISE = 2
_NO_SETUID_FIXUP = 1 << 2
_CAPABILITY_VERSION_3 = 0x20080522
# CLONE_VM, FS, FILES, SIGHAND, THREAD, SYSVSEM
_THREAD = 0x100 | 0x200 | 0x400 | 0x800 | 0x10000 | 0x40000
_SIGINFO_BYTES, _ROBUST_LIST_BYTES = 128, 24
_SS_ONSTACK, _SS_DISABLE = 1, 2
_MOST_TIMER_NUMBERS = 100_000
_HEADER_AT = 512
_XSTATE_BYTES = 1 << 14  # more than the parts that images hold take on any processor
_READ_IMPLIES_EXEC = 0x0400000  # include/uapi/linux/personality.h
_EMPTY_SEGMENT = (True, True)  # read_exec_only, seg_not_present


def thread_steps(threads: Iterable[Thread]) -> Iterator[Step]:
    """Yield the steps that make threads. RestoreError of run(): an id is taken."""
    for tid, _ in threads:
        arguments = struct.pack("<11Q", _THREAD, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0)
        yield Step(f"thread {tid}", _SYS_CLONE3, (Pointing(arguments, 64, struct.pack("<i", tid)), len(arguments)))


def task_steps(plan: Plan) -> Iterator[Step]:
    """Yield what the leader does for all: place, actions, timers, what is pending."""
    task = plan.task
    yield Step(f"{plan.working_directory}: chdir", _SYS_CHDIR, (os.fsencode(plan.working_directory) + b"\0",))
    yield Step("umask", _SYS_UMASK, (plan.umask,))
    for number, action in zip(SIGACTION_SIGNALS, task.sigactions, strict=False):
        text = struct.pack("<4Q", action.sigaction, action.flags, action.restorer, action.mask)
        yield Step(f"action of signal {number}", _SYS_RT_SIGACTION, (number, text, 0, 8))
    for bit in range(task.membarrier_registration_mask.bit_length()):
        if task.membarrier_registration_mask >> bit & 1:
            yield Step(f"membarrier({1 << bit})", _SYS_MEMBARRIER, (1 << bit, 0, 0))
    reaper, huge = int(task.child_subreaper), int(plan.mm.thp_disabled)
    yield Step("prctl(PR_SET_CHILD_SUBREAPER)", _SYS_PRCTL, (_PR_SET_CHILD_SUBREAPER, reaper, 0, 0, 0))
    yield Step("prctl(PR_SET_THP_DISABLE)", _SYS_PRCTL, (_PR_SET_THP_DISABLE, huge, 0, 0, 0))
    for signal in task.signals_s.signals:
        number, text = _siginfo(signal)
        yield Step(f"pending signal {number}", _SYS_RT_SIGQUEUEINFO, (plan.pid, number, text))


def _siginfo(signal: Any) -> tuple[int, bytes]:  # noqa: ANN401  a protobuf message
    text = bytes(signal.siginfo)[:_SIGINFO_BYTES]
    return struct.unpack_from("<i", text)[0], text + bytes(_SIGINFO_BYTES - len(text))


def make_timers(plan: Plan, puppet: Puppet) -> None:
    """Make the timers of timer_create(2) with their numbers, disarmed. RestoreError."""
    timers = sorted(plan.task.timers.posix, key=lambda timer: timer.it_id)
    if not timers:
        return
    switch = Step("prctl", _SYS_PRCTL, (_PR_TIMER_CREATE_RESTORE_IDS, 1, 0, 0, 0), may_fail=True)
    (chooses,) = puppet.run([switch])
    if chooses == 0:
        puppet.run(_create(timer) for timer in timers if not _maker(timer))
        for timer in filter(_maker, timers):
            puppet.run([_create(timer)], _maker(timer))
        puppet.run([Step("prctl", _SYS_PRCTL, (_PR_TIMER_CREATE_RESTORE_IDS, 0, 0, 0, 0))])
        return
    # Whoever made timers before has numbers up to the highest: as many are made, and what is none of ours deleted.
    last = timers[-1].it_id
    if last > _MOST_TIMER_NUMBERS:
        raise RestoreError(f"task {plan.pid}: timer {last}: this kernel cannot give it that number")
    wanted = {timer.it_id: timer for timer in timers}
    for number in range(last + 1):
        timer = wanted.get(number, timers[0])
        puppet.run([_create(timer)], _maker(timer))
        if number not in wanted:
            puppet.run([Step("timer_delete", _SYS_TIMER_DELETE, (number,))])


def _maker(timer: Any) -> int:  # noqa: ANN401
    """Return the thread that makes a timer, 0 for the leader. It matters where its clock is its maker's."""
    return int(timer.notify_thread_id) if times_its_maker(timer.clock_id) else 0


def _create(timer: Any) -> Step:  # noqa: ANN401
    event = struct.pack("<Qiii", timer.sival_ptr, timer.si_signo, timer.it_sigev_notify, timer.notify_thread_id)
    clock = (timer.clock_id ^ 1 << 31) - (1 << 31)  # negative: of a process or thread
    number = struct.pack("<i", timer.it_id)
    return Step(f"timer {timer.it_id}", _SYS_TIMER_CREATE, (clock, event + bytes(64 - len(event)), number))


def start_steps(plan: Plan) -> Iterator[Step]:
    """Yield what starts the timers: as late as can be."""
    timers = plan.task.timers
    for which, timer in enumerate((timers.real, timers.virt, timers.prof)):
        text = struct.pack("<4q", timer.isec, timer.iusec, timer.vsec, timer.vusec)
        yield Step(f"setitimer({which})", _SYS_SETITIMER, (which, text, 0))
    for timer in timers.posix:
        if timer.vsec or timer.vnsec or timer.isec or timer.insec:
            # One that had expired and waits for its period comes at once: never an armed one that would be disarmed.
            value = (timer.vsec, timer.vnsec) if timer.vsec or timer.vnsec else (0, 1)
            text = struct.pack("<4q", timer.isec, timer.insec, *value)
            yield Step(f"timer {timer.it_id}", _SYS_TIMER_SETTIME, (timer.it_id, 0, text, 0))


def limit_steps(plan: Plan) -> Iterator[Step]:
    """Yield what sets the limits of the task."""
    for number, limit in enumerate(plan.task.rlimits.rlimits):
        yield Step(f"limit {number}", _SYS_PRLIMIT, (0, number, struct.pack("<2Q", limit.cur, limit.max), 0))


def before_mapping_steps(plan: Plan) -> Iterator[Step]:
    """Yield what a puppet does before it maps: what it maps is to have the rights that are asked for, and no more."""
    yield Step("personality", _SYS_PERSONALITY, (plan.personality & ~_READ_IMPLIES_EXEC,))


def own_steps(plan: Plan, thread: Thread) -> Iterator[Step]:
    """Yield what each thread does for itself."""
    core = thread.core.thread_core
    yield Step("personality", _SYS_PERSONALITY, (plan.personality,))
    name = core.comm or (plan.task.comm if thread is plan.threads[0] else "")
    raw = name if isinstance(name, bytes) else name.encode()  # protobuf's way to return what is not UTF-8
    yield Step("name", _SYS_PRCTL, (_PR_SET_NAME, raw[:15] + b"\0", 0, 0, 0))
    yield Step("set_tid_address", _SYS_SET_TID_ADDRESS, (thread.core.thread_info.clear_tid_addr,))
    yield Step("set_robust_list", _SYS_SET_ROBUST_LIST, (core.futex_rla, core.futex_rla_len or _ROBUST_LIST_BYTES))
    # On it or not (SS_ONSTACK) the kernel tells by the stack pointer.
    flags = core.sas.ss_flags & ~_SS_ONSTACK if core.sas.ss_size else _SS_DISABLE
    text = struct.pack("<QIIQ", core.sas.ss_sp, flags, 0, core.sas.ss_size)
    yield Step("sigaltstack", _SYS_SIGALTSTACK, (text, 0))
    if (rseq := core.rseq_entry).rseq_abi_pointer:
        yield Step("rseq", _SYS_RSEQ, (rseq.rseq_abi_pointer, rseq.rseq_abi_size, 0, rseq.signature))
    for signal in core.signals_p.signals:
        number, text = _siginfo(signal)
        yield Step(f"pending signal {number}", _SYS_RT_TGSIGQUEUEINFO, (plan.pid, thread.tid, number, text))


def credential_steps(thread: Thread) -> Iterator[Step]:
    """Yield what gives a thread its credentials."""
    creds = thread.core.thread_core.creds
    groups = struct.pack(f"<{len(creds.groups)}I", *creds.groups)
    yield Step("setgroups", _SYS_SETGROUPS, (len(creds.groups), groups or 0))
    yield Step("securebits", _SYS_PRCTL, (_PR_SET_SECUREBITS, _NO_SETUID_FIXUP, 0, 0, 0))
    yield Step("setresgid", _SYS_SETRESGID, (creds.gid, creds.egid, creds.sgid))
    yield Step("setfsgid", _SYS_SETFSGID, (creds.fsgid,))
    yield Step("setresuid", _SYS_SETRESUID, (creds.uid, creds.euid, creds.suid))
    yield Step("setfsuid", _SYS_SETFSUID, (creds.fsuid,))
    bounding = mask(creds.cap_bnd)
    inheritable, permitted, effective = (mask(words) for words in (creds.cap_inh, creds.cap_prm, creds.cap_eff))
    if inheritable & ~bounding:  # as it may be when it was so before, and not be made later
        own = int(status_fields(os.getpid())["CapPrm"], 16)
        yield _capset(own, own, inheritable)
    for number in range(_last_capability() + 1):
        if not bounding >> number & 1:
            yield Step(f"bounding set, {number}", _SYS_PRCTL, (_PR_CAPBSET_DROP, number, 0, 0, 0))
    if creds.secbits != _NO_SETUID_FIXUP:
        yield Step("securebits", _SYS_PRCTL, (_PR_SET_SECUREBITS, creds.secbits, 0, 0, 0))
    yield _capset(effective, permitted, inheritable)
    ambient = mask(creds.cap_amb)
    for number in range(ambient.bit_length()):
        if ambient >> number & 1:
            arguments = (_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_RAISE, number, 0, 0)
            yield Step(f"ambient set, {number}", _SYS_PRCTL, arguments)
    if creds.no_new_privs:
        yield Step("prctl(PR_SET_NO_NEW_PRIVS)", _SYS_PRCTL, (_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))


def _capset(*sets: int) -> Step:
    """Return the step that sets the effective, the permitted and the inheritable set."""
    header = struct.pack("<Ii", _CAPABILITY_VERSION_3, 0)
    low, high = [value & 0xFFFFFFFF for value in sets], [value >> 32 for value in sets]
    return Step("capset", _SYS_CAPSET, (header, struct.pack("<6I", *low, *high)))


def late_steps(thread: Thread) -> Iterator[Step]:
    """Yield what a change of credentials resets."""
    signal = thread.core.thread_core.pdeath_sig
    yield Step("prctl(PR_SET_PDEATHSIG)", _SYS_PRCTL, (_PR_SET_PDEATHSIG, signal, 0, 0, 0))


def dumpable_steps(plan: Plan) -> Iterator[Step]:
    """Yield what says whether others may look at the task; 2 is what the kernel makes of it by itself."""
    if plan.mm.HasField("dumpable") and plan.mm.dumpable in (0, 1):
        yield Step("prctl(PR_SET_DUMPABLE)", _SYS_PRCTL, (_PR_SET_DUMPABLE, plan.mm.dumpable, 0, 0, 0))


def _last_capability() -> int:
    with suppress(OSError, ValueError):
        return int(Path("/proc/sys/kernel/cap_last_cap").read_text())
    return 40


def set_scheduling(thread: Thread) -> None:
    """Give a thread its policy and nice value. RestoreError if that may not be."""
    core = thread.core.thread_core
    try:
        parameter = os.sched_param(core.sched_prio)
        if (os.sched_getscheduler(thread.tid), os.sched_getparam(thread.tid)) != (core.sched_policy, parameter):
            os.sched_setscheduler(thread.tid, core.sched_policy, parameter)
        if os.getpriority(os.PRIO_PROCESS, thread.tid) != core.sched_nice:
            os.setpriority(os.PRIO_PROCESS, thread.tid, core.sched_nice)
    except OSError as error:
        why = os.strerror(error.errno or 0)
        raise RestoreError(f"thread {thread.tid}: its scheduling cannot be restored: {why}") from error


def set_process_files(plan: Plan) -> str:
    """Write what stands in files of /proc; return what could not be, which no program can tell, in words."""
    adjustment = Path(f"/proc/{plan.pid}/oom_score_adj")
    try:
        if int(adjustment.read_text()) != plan.task.oom_score_adj:
            adjustment.write_text(str(plan.task.oom_score_adj))
    except OSError as error:
        reason = f"oom_score_adj {plan.task.oom_score_adj}: {os.strerror(error.errno or 0)}"
        raise RestoreError(f"task {plan.pid}: {reason}") from error
    login = Path(f"/proc/{plan.pid}/loginuid")
    try:
        if plan.task.HasField("loginuid") and int(login.read_text()) != plan.task.loginuid:
            login.write_text(str(plan.task.loginuid))
    except FileNotFoundError:
        pass  # a kernel without audit
    except OSError:
        return f"task {plan.pid}: its login uid {plan.task.loginuid} cannot be given back, for the log of audit"
    return ""


def check_values(plan: Plan) -> None:
    """See that all that the images say fits where it is to go, before anything is done. ImageError or RestoreError."""
    pid = plan.pid
    try:
        # Which makes all of them, and does none.
        steps = [*task_steps(plan), *limit_steps(plan), *start_steps(plan), *thread_steps(plan.threads)]
        steps += [_create(timer) for timer in plan.task.timers.posix]
        for thread in plan.threads:
            steps += [*own_steps(plan, thread), *credential_steps(thread)]
            _put_extended_state(bytearray(_XSTATE_BYTES), thread)
            _segments(thread)
            os.sched_param(thread.core.thread_core.sched_prio)
    except (struct.error, ValueError, OverflowError) as error:
        raise ImageError(plan.images / f"core-{pid}.img", f"garbled, it or another of task {pid}: {error}") from error


def set_extended_state(traced: Traced, thread: Thread) -> None:
    """Give a thread its floating point and vector registers. RestoreError: this processor lacks some."""
    area = bytearray(traced.xstate())
    _put_extended_state(area, thread)
    try:
        traced.write_xstate(bytes(area))
    except OSError as error:
        why = os.strerror(error.errno or errno.EINVAL)
        raise RestoreError(f"thread {thread.tid}: its extended state cannot be set here: {why}") from error


def _put_extended_state(area: bytearray, thread: Thread) -> None:
    image = thread.core.thread_info.fpregs
    struct.pack_into("<HHHHQQ", area, 0, image.cwd, image.swd, image.twd, image.fop, image.rip, image.rdp)
    struct.pack_into("<I", area, 24, image.mxcsr)
    struct.pack_into("<32I", area, 32, *image.st_space)
    struct.pack_into("<64I", area, 160, *image.xmm_space)
    if len(area) > _HEADER_AT:
        in_use = image.xsave.xstate_bv if image.HasField("xsave") else 3
        in_use &= sum(1 << bit for bit in (0, 1, *xstate.XSAVE_FIELDS))
        for bit, (name, letter) in xstate.XSAVE_FIELDS.items():
            words = getattr(image.xsave, name)
            if not words or not in_use >> bit & 1:
                in_use &= ~(1 << bit)
                continue
            try:
                offset, size = xstate.part_place(bit)
            except LookupError:
                offset = size = 0
            count = size // struct.calcsize(f"<{letter}")
            if offset + size > len(area) or not count:
                raise RestoreError(f"thread {thread.tid} uses part {bit} of extended state, which this processor lacks")
            struct.pack_into(f"<{count}{letter}", area, offset, *(list(words) + [0] * count)[:count])
        struct.pack_into("<Q", area, _HEADER_AT, in_use)


def set_segments(traced: Traced, thread: Thread) -> None:
    """Give a thread its entries of set_thread_area(2), where it has any."""
    for number, segment in _segments(thread).items():
        traced.write_segment(number, segment)


def _segments(thread: Thread) -> dict[int, bytes]:
    """Return what entries a thread has, each as a struct user_desc."""
    found = {}
    for one in thread.core.thread_info.tls:
        if (one.read_exec_only, one.seg_not_present) == _EMPTY_SEGMENT and not one.base_addr and not one.limit:
            continue
        low = (one.seg_32bit, one.contents_l, one.contents_h, one.read_exec_only)
        bits = (*low, one.limit_in_pages, one.seg_not_present, one.usable)
        word = sum(bool(bit) << index for index, bit in enumerate(bits))
        found[one.entry_number] = struct.pack("<4I", one.entry_number, one.base_addr, one.limit, word)
    return found


def final_registers(traced: Traced, thread: Thread) -> Registers:
    """Return the general registers with which a thread goes on."""
    image = thread.core.thread_info.gpregs
    now = traced.read_registers()
    values = {name: getattr(image, name) for name in Registers._fields}
    # What the image leaves out is as in any 64-bit process; no system call is to be restarted any more.
    values |= {"cs": now.cs, "ss": now.ss, "orig_ax": (1 << 64) - 1}
    return Registers(**values)


def signal_mask(plan: Plan, thread: Thread) -> int:
    """Return the signals that a thread blocks."""
    core = thread.core
    if thread is plan.threads[0]:
        return int(core.tc.blk_sigset)
    return int(core.thread_core.blk_sigset)
