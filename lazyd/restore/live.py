# SPDX-License-Identifier: MIT
"""A live task beside its own checkpoint: what keeps it from being rewound, and what of it may stay.

What a rewind cannot undo is refused, in one line, before anything is changed: another program, other credentials,
children, other descriptors. Positions in files are put back; what was written to files is not.
"""

from __future__ import annotations

import fcntl
import os
import re
import struct
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from itertools import pairwise
from pathlib import Path

from lazyd.errors import RestoreError
from lazyd.restore.memory import shared_sizes
from lazyd.restore.plan import PIPE, REGULAR, TERMINAL, Plan, Thread, mask
from lazyd.restore.vma import Area, Kind
from lazyd.target.crowd import ask_each
from lazyd.target.descriptors import FILE_LOCK, SIGNALS_OWNER, Descriptor, DescriptorKind, read_descriptors
from lazyd.target.mappings import DELETED, SERVED, read_mappings
from lazyd.target.process import children, namespace_pids, stat_fields
from lazyd.target.remote import Call, SteppedCalls, Steps
from lazyd.target.survey import Survey, check_is_process
from lazyd.target.tracing import StoppedTask, status_fields, thread_ids
from lazyd.tuples import NamedTuple
from lazyd.units import PAGE_SIZE

_COMPARED_FLAGS = os.O_ACCMODE | os.O_APPEND | os.O_NONBLOCK | os.O_SYNC | os.O_DIRECT | os.O_NOATIME
_KINDS = {REGULAR: DescriptorKind.FILE, PIPE: DescriptorKind.PIPE, TERMINAL: DescriptorKind.TERMINAL}
_MAPS_LINE = r"([0-9a-f]+)-([0-9a-f]+) (...)([ps]) ([0-9a-f]+) ([0-9a-f]+):([0-9a-f]+) (\d+)\s*(.*)"
_CAP_DAC_OVERRIDE, _CAP_SYS_PTRACE, _CAP_SYS_ADMIN = 1 << 1, 1 << 19, 1 << 21
_CAP_SYS_RESOURCE, _CAP_CHECKPOINT_RESTORE = 1 << 24, 1 << 40
_RLIMIT_DATA, _RLIMIT_NOFILE, _RLIMIT_MEMLOCK, _RLIMIT_AS, _RLIMIT_SIGPENDING = 2, 7, 8, 9, 11
_OWN_DESCRIPTORS = 8
_OWN_MAPPINGS = 16
TABLE_BYTES = 2 << 20
"""What one table of pages covers: mremap(2) moves it whole."""
_SYS_PRCTL = 157  # arch/x86/entry/syscalls/syscall_64.tbl
_PR_GET_TSC, _PR_GET_SECUREBITS, _PR_GET_MDWE = 25, 27, 66  # include/uapi/linux/prctl.h
_PR_TSC_SIGSEGV = 2
_F_GET_SEALS = 1034
_F_SEAL_SHRINK, _F_SEAL_GROW, _F_SEAL_WRITE, _F_SEAL_FUTURE_WRITE = 2, 4, 8, 16
_UNLIMITED = (1 << 64) - 1
_KERNEL_NAMES = {"[vdso]", "[vvar]", "[vvar_vclock]", "[vsyscall]"}


class Live(NamedTuple):
    """A mapping as /proc/PID/maps has it, which costs nothing to read; smaps looks at every page."""

    start: int
    end: int
    prot: int
    is_shared: bool
    offset: int
    device: int
    inode: int
    name: str

    @property
    def is_private_memory(self) -> bool:
        """Say whether it is anonymous and the task's own."""
        return not (self.is_shared or self.inode or self.name in _KERNEL_NAMES)


def read_live(pid: int) -> list[Live]:
    """Return the mappings of a task, sorted."""
    found = []
    fullmatch = re.compile(_MAPS_LINE).fullmatch
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        if match := fullmatch(line):
            prot = sum(bit for letter, bit in (("r", 1), ("w", 2), ("x", 4)) if letter in match[3])
            device = os.makedev(int(match[6], 16), int(match[7], 16))
            start, end, offset = int(match[1], 16), int(match[2], 16), int(match[5], 16)
            found.append(Live(start, end, prot, match[4] == "s", offset, device, int(match[8]), match[9]))
    return found


def check_before(plan: Plan, pid: int) -> None:
    """See, while it runs, that a task can be rewound, as far as that can be seen without stopping it."""
    check_is_process(pid)
    pids = namespace_pids(pid)
    if len(pids) > 1:
        raise RestoreError(f"process {pid} is in another pid namespace; it cannot be rewound from here")
    if pid != plan.pid:
        raise RestoreError(f"{plan.images}: images of task {plan.pid}, not of {pid}")
    for mapping in read_mappings(pid):
        if mapping.problem:
            hint = " (is a fill under way?)" if mapping.problem == SERVED else ""
            raise RestoreError(f"process {pid}: {mapping} is {mapping.problem}{hint}: it cannot be rewound")


def check_stopped(plan: Plan, stopped: StoppedTask) -> list[Descriptor]:
    """See, once it is stopped, that a task is what the images are of and has nothing that stays. Its descriptors."""
    pid = plan.pid
    stat = stat_fields(pid)
    # Installed anew it would be called deleted; whether it is the same is seen by its build id.
    program = os.readlink(f"/proc/{pid}/exe").removesuffix(DELETED)  # noqa: PTH115  the text as it is
    # proc(5): 26 startcode, 28 startstack
    then = (plan.program, plan.mm.mm_start_code, plan.mm.mm_start_stack)
    if (program, int(stat[26 - 3]), int(stat[28 - 3])) != then:
        raise RestoreError(f"process {pid} runs another program than the one that was dumped")
    if found := children(pid):
        raise RestoreError(f"process {pid} has children, which would stay: {', '.join(map(str, found))}")
    tids = set(thread_ids(pid))
    for thread in plan.threads:
        if thread.tid in tids:
            _check_credentials(thread)
        elif os.path.exists(f"/proc/{thread.tid}"):  # noqa: PTH110  quick
            raise RestoreError(f"thread {thread.tid} is gone, and its id is taken by another process or thread")
        elif thread.core.thread_core.creds != plan.threads[0].core.thread_core.creds:
            # It would be made by the leader, with what that may do.
            raise RestoreError(f"thread {thread.tid} is gone, and had other credentials than the main thread has")
    leader = plan.threads[0]
    for tid in tids - {thread.tid for thread in plan.threads}:
        _check_credentials(Thread(tid, leader.core))  # or it could leave nothing but what the others may see
    if lasting := Survey(pid).lasting():
        raise RestoreError(f"process {pid} has what it had not when it was dumped: {'; '.join(map(str, lasting))}")
    descriptors = read_descriptors(pid)
    _check_descriptors(plan, descriptors)
    _check_switches(plan, stopped)
    return descriptors


def _check_switches(plan: Plan, stopped: StoppedTask) -> None:
    """See that no switch of prctl(2) stands otherwise that cannot be turned back, or that no image has."""
    changed = [
        f"thread {thread.tid} handles its own system calls"
        for thread in stopped.threads
        if thread.dispatches_system_calls()
    ]
    if not changed:  # or what it is asked might end it
        then = {thread.tid: thread.core.thread_core.creds.secbits for thread in plan.threads}
        leader = plan.threads[0].core.thread_core.creds.secbits
        answers = ask_each(stopped, stopped.threads, _ask_switches)
        for thread, (bits, denies, counter) in zip(stopped.threads, answers, strict=True):
            if bits >= 0 and bits != then.get(thread.tid, leader):
                changed.append(f"the securebits of thread {thread.tid} are {bits:#x}")
            if denies > 0:
                changed.append("it may not have memory that it writes and runs")
            if counter == _PR_TSC_SIGSEGV:
                changed.append(f"thread {thread.tid} may not read the time stamp counter")
    if changed:
        listed = "; ".join(dict.fromkeys(changed))
        raise RestoreError(f"process {plan.pid} has changed since it was dumped: {listed} (prctl)")


def _ask_switches(calls: SteppedCalls) -> Steps[tuple[int, int, int]]:
    """Ask a thread for its securebits, whether it is denied what it writes and runs, and how it reads the counter."""
    bits, denies, result = yield from calls.run_steps(
        Call(_SYS_PRCTL, (_PR_GET_SECUREBITS,)),
        Call(_SYS_PRCTL, (_PR_GET_MDWE,)),
        Call(_SYS_PRCTL, (_PR_GET_TSC, calls.buffers)),
    )
    (counter,) = struct.unpack("i", calls.read(calls.buffers, 4))
    return bits, denies, counter if result >= 0 else 0


def _check_credentials(thread: Thread) -> None:
    status = status_fields(thread.tid)
    creds = thread.core.thread_core.creds
    what = {
        "Uid": (creds.uid, creds.euid, creds.suid, creds.fsuid),
        "Gid": (creds.gid, creds.egid, creds.sgid, creds.fsgid),
        "Groups": tuple(creds.groups),
    }
    other = [name for name, ids in what.items() if tuple(map(int, status[name].split())) != ids]
    sets = {"CapInh": creds.cap_inh, "CapPrm": creds.cap_prm, "CapEff": creds.cap_eff, "CapBnd": creds.cap_bnd}
    other += [
        name for name, words in (sets | {"CapAmb": creds.cap_amb}).items() if int(status[name], 16) != mask(words)
    ]
    if int(status.get("NoNewPrivs", "0")) != creds.no_new_privs:
        other.append("NoNewPrivs")
    if status.get("Seccomp", "0") != "0":
        other.append("Seccomp")
    if other:
        raise RestoreError(f"thread {thread.tid} has other credentials than when it was dumped: {', '.join(other)}")


def _check_descriptors(plan: Plan, descriptors: Sequence[Descriptor]) -> None:
    then = {one.fd: one for one in plan.descriptors}
    now = {one.fd: one for one in descriptors}
    problems = [f"{fd} is closed" for fd in sorted(then.keys() - now.keys())]
    problems += [f"{fd} is new ({now[fd].path})" for fd in sorted(now.keys() - then.keys())]
    owners: dict[int, int] = {}
    for fd in sorted(then.keys() & now.keys()):
        file, one = plan.files[then[fd].id], now[fd]
        owner = owners.setdefault(then[fd].id, fd)
        if _KINDS.get(file.type) is not one.kind:
            problems.append(f"{fd} is another kind of file ({one.path})")
        elif file.type == REGULAR and file.reg.name != one.path:
            problems.append(f"{fd} was {file.reg.name}, is {one.path}")
        elif file.type == REGULAR and (file.reg.flags ^ one.flags) & _COMPARED_FLAGS:
            problems.append(f"{fd} ({one.path}) has other flags")
        elif bool(then[fd].flags & 1) != one.close_on_exec:
            problems.append(f"{fd} ({one.path}) is another at exec")
        elif one.same_as != owner:
            problems.append(f"{fd} ({one.path}) shares its open file with others than before")
        elif one.problem in (FILE_LOCK, SIGNALS_OWNER):
            problems.append(f"{fd} ({one.path}): {one.problem}")
    if problems:
        raise RestoreError(f"process {plan.pid} has other descriptors than when it was dumped: {'; '.join(problems)}")


def _limits(pid: int) -> list[tuple[str, str]]:
    """Return the soft and hard limits of a task by their number, as words."""
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()[1:]
    return [(words[0], words[1]) for words in (line[26:].split() for line in lines)]


def may_be_twice(plan: Plan) -> bool:
    """Say whether nothing limits how much memory a task has mapped: while it goes back, and when it has what it had."""
    limits = _limits(plan.pid)
    strict = Path("/proc/sys/vm/overcommit_memory").read_text().strip() == "2"
    then = plan.task.rlimits.rlimits
    kinds = (_RLIMIT_DATA, _RLIMIT_AS)
    return not strict and all(limits[kind][1] == "unlimited" and then[kind].cur == _UNLIMITED for kind in kinds)


def soft_limits(pid: int) -> list[tuple[int, int]]:
    """Return the limits that would be in the way of a rewind, by number, and how high they may be."""
    numbers = (_RLIMIT_DATA, _RLIMIT_MEMLOCK, _RLIMIT_AS, _RLIMIT_SIGPENDING)
    limits = _limits(pid)
    return [(number, _UNLIMITED if limits[number][1] == "unlimited" else int(limits[number][1])) for number in numbers]


def check_memory(plan: Plan, staying: Staying, live: Sequence[Live]) -> None:
    """See that what stays of a task's mappings can be put back, and that there is room for what is made again."""
    pid = plan.pid
    for kind, start in ((Kind.VDSO, "[vdso]"), (Kind.VVAR, "[vvar")):
        areas = [area for area in plan.vmas if area.kind is kind]
        parts = [one for one in live if one.name.startswith(start)]
        if not areas:
            continue
        is_whole = areas[-1].end - areas[0].start == sum(one.end - one.start for one in parts)
        follows = all(one.end == after.start for one, after in pairwise(parts))
        if not (is_whole and follows and parts[0].name == f"{start.removesuffix(']')}]"):
            raise RestoreError(
                f"process {pid} has unmapped or moved some of its {kind.value}, which only the kernel maps"
            )
    most = int(Path("/proc/sys/vm/max_map_count").read_text())
    count = max(len(live), len(plan.vmas) + len(put_aside(plan, live)))
    if count + _OWN_MAPPINGS > most:
        hint = f"vm.max_map_count is {most}, raise it"
        raise RestoreError(f"process {pid} has, or would have for a while, too many mappings: {count} ({hint})")
    sizes = shared_sizes(plan)
    for area in staying.areas:
        if area.kind is not Kind.SHARED:
            continue
        piece = next(one for one in live if one.start <= area.start < one.end)
        fd = os.open(f"/proc/{pid}/map_files/{piece.start:x}-{piece.end:x}", os.O_RDONLY | os.O_CLOEXEC)
        seals = 0
        try:
            size = os.fstat(fd).st_size
            with suppress(OSError):  # EINVAL: nothing that could be sealed
                seals = fcntl.fcntl(fd, _F_GET_SEALS)
        finally:
            os.close(fd)
        # Whole pages are written, and the end is put back.
        resizes = size % PAGE_SIZE or size < sizes[area.shared_id]
        if seals & (_F_SEAL_WRITE | _F_SEAL_FUTURE_WRITE) or (resizes and seals & (_F_SEAL_GROW | _F_SEAL_SHRINK)):
            raise RestoreError(f"process {pid}: {area} is sealed (F_ADD_SEALS): it cannot be put back")


def put_aside(plan: Plan, live: Sequence[Live]) -> list[Live]:
    """Return the mappings that are moved aside and freed later: large private ones, if there may be twice as much."""
    if not may_be_twice(plan):
        return []
    return [one for one in live if one.is_private_memory and one.end - one.start >= TABLE_BYTES]


def check_rights(plan: Plan, staying: Staying, descriptors: int) -> None:
    """See that a task has the rights and the room that it takes to go back: it does so itself."""
    pid = plan.pid
    capabilities = int(status_fields(pid)["CapEff"], 16)
    missing = [thread.tid for thread in plan.threads if thread.tid not in thread_ids(pid)]
    if missing and not capabilities & (_CAP_SYS_ADMIN | _CAP_CHECKPOINT_RESTORE):
        raise RestoreError(
            f"thread {missing[0]} of process {pid} is gone, and the process may not choose the id of another"
        )
    files = (Kind.PRIVATE_FILE, Kind.SHARED_FILE)
    gone = [area for area in plan.vmas if area.kind in files and area not in staying.areas]
    if gone and not capabilities & _CAP_DAC_OVERRIDE:
        path = plan.files[gone[0].file].reg.name
        raise RestoreError(f"process {pid} has unmapped {path}, and may not be allowed to open it again")
    may_fault = Path("/proc/sys/vm/unprivileged_userfaultfd").read_text().strip() == "1"
    if not capabilities & _CAP_SYS_PTRACE and not may_fault:
        hint = "as root set vm.unprivileged_userfaultfd to 1"
        raise RestoreError(f"process {pid} may not open a userfaultfd ({hint})")
    limits = _limits(pid)
    most = limits[_RLIMIT_NOFILE][0]
    if most != "unlimited" and descriptors + len(gone) + _OWN_DESCRIPTORS > int(most):
        raise RestoreError(f"process {pid} has {descriptors} open files, and its limit of {most} leaves no room")
    for number, limit in enumerate(plan.task.rlimits.rlimits):
        hard = limits[number][1]
        if hard != "unlimited" and limit.max > int(hard) and not capabilities & _CAP_SYS_RESOURCE:
            raise RestoreError(f"process {pid} has lowered its hard limit {number}, and may not raise it again")


class Staying(NamedTuple):
    """Areas of the images that are mapped as they were: only their pages, and perhaps their protection, differ."""

    areas: list[Area]
    protect: list[Area]


def find_staying(plan: Plan, mappings: Sequence[Live]) -> Staying:
    """Find the areas of files and shared memory that a task still has where the images have them."""
    areas, protect = [], []
    inodes: dict[int, set[tuple[int, int]]] = {}
    whole: dict[int, bool] = {}
    found: dict[Area, list[Live]] = {}
    for area in plan.vmas:
        if area.kind not in (Kind.PRIVATE_FILE, Kind.SHARED_FILE, Kind.SHARED):
            continue
        found[area] = pieces = _cover(area, mappings)
        if area.kind is Kind.SHARED:
            whole[area.shared_id] = whole.get(area.shared_id, True) and bool(pieces)
            inodes.setdefault(area.shared_id, set()).update((piece.device, piece.inode) for piece in pieces)
        elif pieces and not _is_file(plan, area, pieces):
            pieces.clear()
    taken = Counter(inode for each in inodes.values() for inode in each)
    for area, pieces in found.items():
        is_there = bool(pieces)
        if area.kind is Kind.SHARED:  # all of an object, or none of it, and it is no other's (mremap makes it so)
            (inode, *others) = inodes[area.shared_id] or {(0, 0)}
            is_there = whole[area.shared_id] and not others and taken[inode] == 1
        if is_there:
            areas.append(area)
            if any(piece.prot != area.prot & 7 for piece in pieces):
                protect.append(area)
    return Staying(areas, protect)


def _cover(area: Area, mappings: Sequence[Live]) -> list[Live]:
    """Return the mappings that cover an area as one mapping of one file would; none if they do not."""
    found = []
    at = area.start
    for piece in mappings:
        if piece.end <= at:
            continue
        if piece.start > at or at >= area.end:
            break
        is_shared = area.kind is not Kind.PRIVATE_FILE
        if not piece.inode or piece.is_shared != is_shared:
            return []
        if piece.offset + at - piece.start != area.offset + at - area.start:
            return []
        found.append(piece)
        at = piece.end
    return found if at >= area.end else []


def _is_file(plan: Plan, area: Area, pieces: Sequence[Live]) -> bool:
    """Say whether mappings are of the file that the images name, not of another that has taken its path."""
    path = str(plan.files[area.file].reg.name)
    return all(piece.name == path and piece.inode == pieces[0].inode for piece in pieces)
