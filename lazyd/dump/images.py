# SPDX-License-Identifier: MIT
"""Put what a plain task is into the words of the small images.

What a restore needs, found by comparing with what criu 4.1.1 and 4.2.1 write of the same task and by restoring with
both; tests/criu/test_small_images.py holds the two to it, field by field:

- A thread that was in a system call is there again at its restart. What only the kernel's own state could finish
  (nanosleep, poll, a futex with a time limit: ERESTART_RESTARTBLOCK) returns EINTR, as after a stop by a signal.
- Kernel objects have numbers: tasks with the same number share the object. The numbers of namespaces are those of
  `root_ids`: the restored task stays in the namespaces of who restores it. Control groups are left alone the same way.
- One open file is one record in files.img, whoever has descriptors for it. Mapped files, the program and the working
  directory are open files too, of which nobody has a descriptor.
- Guard pages (MADV_GUARD_INSTALL) are listed behind the VMAs, as criu does from 4.2 on; 4.1 refuses such images, and
  would restore pages without guard.
- A standard stream that is a pipe is one end of it. `criu restore` makes a new pipe, or with --inherit-fd takes what it
  is given for pipe:[INODE].
- A terminal is one record in tty-info.img; `criu restore --shell-job` replaces it by the one that it has itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import struct
import time
from collections.abc import Iterable, Iterator

from lazyd.hints import Any
from lazyd.image.buildid import build_id_words, read_build_id
from lazyd.image.encode import Record, SmallImage
from lazyd.target import xstate
from lazyd.target.descriptors import Descriptor, DescriptorKind, Owner, Terminal
from lazyd.target.mappings import Mapping, MappingKind
from lazyd.target.state import Credentials, SegmentDescriptor, SignalAction, TaskState, ThreadState
from lazyd.target.tracing import ERESTART_RESTARTBLOCK, Registers
from lazyd.tuples import NamedTuple

_IMAGE_VERSION = 2  # "1.1"
_TASK_ALIVE, _TASK_STOPPED = 1, 3
_X86_64, _NATIVE = 1, 1
_TYPE_REGULAR, _TYPE_PIPE, _TYPE_TERMINAL = 1, 2, 11
_TYPES = {
    DescriptorKind.FILE: _TYPE_REGULAR,
    DescriptorKind.PIPE: _TYPE_PIPE,
    DescriptorKind.TERMINAL: _TYPE_TERMINAL,
}
_TYPE_PSEUDO_TERMINAL = 1
_OF_DUMPER = 1  # the number of each object of ours
_NAMESPACES = {
    "pid_ns_id": 1,
    "net_ns_id": 2,
    "ipc_ns_id": 3,
    "uts_ns_id": 4,
    "time_ns_id": 5,
    "mnt_ns_id": 6,
    "user_ns_id": 7,
    "cgroup_ns_id": 8,
}
_CGROUP_SET = 1
_NOBODY = {"uid": 0, "euid": 0, "signum": 0, "pid_type": 0, "pid": 0}

# Bits of a VMA's status.
_REGULAR, _VSYSCALL, _VDSO, _HEAP, _VVAR, _GUARD = 1, 4, 8, 32, 1 << 12, 1 << 16
_STATUS = {
    MappingKind.PRIVATE: _REGULAR | 1 << 9,
    MappingKind.PRIVATE_FILE: _REGULAR | 1 << 6,
    MappingKind.SHARED: _REGULAR | 1 << 8,
    MappingKind.SHARED_FILE: _REGULAR | 1 << 7,
    MappingKind.VDSO: _REGULAR | _VDSO | 1 << 9,
    MappingKind.VVAR: _REGULAR | _VVAR | 1 << 9,
    MappingKind.VSYSCALL: _VSYSCALL | 1 << 9,
}


class TaskImages(NamedTuple):
    """One task, all that its small images are made of."""

    state: TaskState
    mappings: list[Mapping]
    guards: list[tuple[int, int]]
    descriptors: list[Descriptor]


class BuildIds:
    """The build ids of ELF files, read once for each file: known before a task is stopped."""

    def __init__(self) -> None:
        self._found: dict[tuple[int, int, int, int], bytes] = {}

    def warm_up(self, paths: Iterable[str]) -> None:
        """Read what will be asked for."""
        for path in set(paths):
            with contextlib.suppress(OSError):
                self.of(path, os.stat(path))  # noqa: PTH116  text as it is

    def of(self, path: str, status: os.stat_result) -> bytes:
        """Return the build id of a file; empty if it has none or is no ELF file."""
        key = (status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size)
        if key not in self._found:
            self._found[key] = read_build_id(path) if stat.S_ISREG(status.st_mode) else b""
        return self._found[key]


class Files:
    """The open files of all tasks together, numbered from 1."""

    def __init__(self, build_ids: BuildIds) -> None:
        self.records: list[Record] = []
        self.terminals: list[Record] = []
        self._build_ids = build_ids
        self._by_path: dict[str, int] = {}
        self._terminal_numbers: dict[int, int] = {}

    def _add(self, kind: int, name: str, record: dict[str, Any]) -> int:
        number = len(self.records) + 1
        self.records.append({"type": kind, "id": number, name: {"id": number, "fown": _NOBODY, **record}})
        return number

    def add_regular(self, path: str, flags: int, position: int, status: os.stat_result) -> int:
        """Add an open file."""
        record: dict[str, Any] = {"flags": flags, "pos": position, "name": path, "mode": status.st_mode}
        # A restore refuses a file of another size. What is only written, such as a log, may have grown.
        if stat.S_ISREG(status.st_mode) and flags & os.O_ACCMODE != os.O_WRONLY:
            record["size"] = status.st_size
            if build_id := self._build_ids.of(path, status):
                record["build_id"] = build_id_words(build_id)
        return self._add(_TYPE_REGULAR, "reg", record)

    def add_path(self, path: str) -> int:
        """Return the number of a file that nobody has a descriptor for, adding it where it is new."""
        if path not in self._by_path:
            self._by_path[path] = self.add_regular(path, 0, 0, os.stat(path))  # noqa: PTH116  text as it is
        return self._by_path[path]

    def add_descriptor(self, descriptor: Descriptor) -> int:
        """Add the open file of a descriptor."""
        if descriptor.kind is DescriptorKind.PIPE:
            record = {"pipe_id": descriptor.status.st_ino, "flags": descriptor.flags}
            return self._add(_TYPE_PIPE, "pipe", record)
        if descriptor.kind is not DescriptorKind.TERMINAL:
            return self.add_regular(descriptor.path, descriptor.flags, descriptor.position, descriptor.status)
        terminal = descriptor.terminal
        assert terminal is not None, "a terminal's settings are read with it"
        regular = self.add_path(descriptor.path)
        info = self._terminal_number(terminal, descriptor.status)
        record = {"tty_info_id": info, "flags": descriptor.flags, "regf_id": regular}
        return self._add(_TYPE_TERMINAL, "tty", record)

    def _terminal_number(self, terminal: Terminal, status: os.stat_result) -> int:
        if terminal.number not in self._terminal_numbers:
            self._terminal_numbers[terminal.number] = len(self.terminals)
            self.terminals.append(_terminal_record(len(self.terminals), terminal, status))
        return self._terminal_numbers[terminal.number]


def _terminal_record(number: int, terminal: Terminal, status: os.stat_result) -> Record:
    def settings(characters: bytes, *flags: int) -> Record:
        # Nineteen words, of which the characters fill the first five.
        words = struct.unpack("<19I", characters + bytes(76 - len(characters)))
        names = ("c_iflag", "c_oflag", "c_cflag", "c_lflag", "c_line")
        return {**dict(zip(names, flags, strict=True)), "c_ispeed": 0, "c_ospeed": 0, "c_cc": words}

    rows, columns, width, height = terminal.window
    flags = (terminal.iflag, terminal.oflag, terminal.cflag, terminal.lflag, terminal.line)
    return {
        "id": number,
        "type": _TYPE_PSEUDO_TERMINAL,
        "locked": False,
        "exclusive": False,
        "packet_mode": False,
        "sid": terminal.session,
        "pgrp": terminal.foreground,
        "rdev": _kernel_device(status.st_rdev),
        "termios": settings(terminal.characters, *flags),
        "termios_locked": settings(b"", 0, 0, 0, 0, 0),
        "winsize": {"ws_row": rows, "ws_col": columns, "ws_xpixel": width, "ws_ypixel": height},
        "pty": {"index": terminal.number},
        "dev": _kernel_device(status.st_dev),
        "uid": status.st_uid,
        "gid": status.st_gid,
    }


def _kernel_device(device: int) -> int:
    """Return a device number in the form of 16 bits that the images have for terminals."""
    return os.major(device) << 8 | os.minor(device)


def compose(
    tasks: list[TaskImages], owners: dict[Owner, Owner], build_ids: BuildIds
) -> Iterator[tuple[str, SmallImage, list[Record]]]:
    """Yield name, kind and records of every small image of some tasks; the first is the root, parents come first.

    owners: which descriptor stands for the open file of each. What describes the memory itself (pagemap, pages) is not
    among them. OSError if a file is gone meanwhile.
    """
    files = Files(build_ids)
    numbers: dict[Owner, int] = {}
    known = {task.state.pid for task in tasks}
    yield "inventory.img", SmallImage.INVENTORY, [_inventory()]
    yield "timens-0.img", SmallImage.TIMENS, [_clocks()]
    yield "pstree.img", SmallImage.PSTREE, [_pstree_entry(task.state, known) for task in tasks]
    for number, task in enumerate(tasks, _OF_DUMPER + 1):
        pid = task.state.pid
        for index, thread in enumerate(task.state.threads):
            record = _core(task.state, thread, is_leader=not index)
            yield f"core-{thread.tid}.img", SmallImage.CORE, [record]
        yield f"mm-{pid}.img", SmallImage.MM, [_mm(task, files)]
        yield f"fdinfo-{number}.img", SmallImage.FDINFO, _descriptors(task, files, owners, numbers)
        objects = dict.fromkeys(("vm_id", "files_id", "fs_id", "sighand_id"), number)
        yield f"ids-{pid}.img", SmallImage.IDS, [{**objects, **_NAMESPACES}]
        place = {
            "cwd_id": files.add_path(task.state.working_directory),
            "root_id": files.add_path("/"),
            "umask": task.state.umask,
        }
        yield f"fs-{pid}.img", SmallImage.FS, [place]
    yield "files.img", SmallImage.FILES, files.records
    if files.terminals:
        yield "tty-info.img", SmallImage.TTY_INFO, files.terminals


def _inventory() -> Record:
    own = dict.fromkeys(("vm_id", "files_id", "fs_id", "sighand_id"), _OF_DUMPER)
    return {
        "img_version": _IMAGE_VERSION,
        "fdinfo_per_id": True,
        "root_ids": {**own, **_NAMESPACES},
        "ns_per_id": True,
        "root_cg_set": _CGROUP_SET,
        "lsmtype": 0,
        "dump_uptime": time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1000,
    }


def _clocks() -> Record:
    def now(clock: int) -> Record:
        seconds, nanoseconds = divmod(time.clock_gettime_ns(clock), 1_000_000_000)
        return {"tv_sec": seconds, "tv_nsec": nanoseconds}

    return {"monotonic": now(time.CLOCK_MONOTONIC), "boottime": now(time.CLOCK_BOOTTIME)}


def _pstree_entry(state: TaskState, known: Iterable[int]) -> Record:
    return {
        "pid": state.pid,
        "ppid": state.parent if state.parent in known else 0,
        "pgid": state.group,
        "sid": state.session,
        "threads": [thread.tid for thread in state.threads],
    }


def _core(state: TaskState, thread: ThreadState, *, is_leader: bool) -> Record:
    record: dict[str, Any] = {
        "mtype": _X86_64,
        "thread_info": {
            "clear_tid_addr": thread.clear_tid_address,
            "gpregs": {**registers_for_image(thread.registers)._asdict(), "mode": _NATIVE},
            "fpregs": _floating_point(thread.xstate),
            "tls": [_segment(segment) for segment in thread.segments],
        },
        "thread_core": _thread_core(thread, is_leader=is_leader),
    }
    if is_leader:
        record["tc"] = _task_core(state, thread)
    return record


def registers_for_image(registers: Registers) -> Registers:
    """Return the registers with which a restored thread goes on where this one was stopped."""
    if not registers.orig_ax >> 31 and registers.ax == (1 << 64) - ERESTART_RESTARTBLOCK:
        return registers._replace(ax=(1 << 64) - errno.EINTR)
    return registers.restarted()


def _floating_point(state: xstate.ExtendedState) -> Record:
    legacy = state.legacy
    cwd, swd, twd, fop, rip, rdp, mxcsr, mxcsr_mask = struct.unpack_from("<HHHHQQII", legacy)
    record: dict[str, Any] = {
        "cwd": cwd,
        "swd": swd,
        "twd": twd,
        "fop": fop,
        "rip": rip,
        "rdp": rdp,
        "mxcsr": mxcsr,
        "mxcsr_mask": mxcsr_mask,
        "st_space": struct.unpack_from("<32I", legacy, 32),
        "xmm_space": struct.unpack_from("<64I", legacy, 160),
    }
    if state.parts:
        record["xsave"] = {"xstate_bv": state.in_use}
        for bit, (name, letter) in xstate.XSAVE_FIELDS.items():
            if part := state.parts.get(bit):
                count = len(part) // struct.calcsize(f"<{letter}")
                record["xsave"][name] = struct.unpack(f"<{count}{letter}", part)
    return record


def _segment(segment: SegmentDescriptor) -> Record:
    """Take the bits of struct user_desc apart."""
    bits = segment.bits
    return {
        "entry_number": segment.number,
        "base_addr": segment.base,
        "limit": segment.limit,
        "seg_32bit": bool(bits & 1),
        "contents_h": bool(bits >> 2 & 1),
        "contents_l": bool(bits >> 1 & 1),
        "read_exec_only": bool(bits >> 3 & 1),
        "limit_in_pages": bool(bits >> 4 & 1),
        "seg_not_present": bool(bits >> 5 & 1),
        "usable": bool(bits >> 6 & 1),
    }


def _queue(pending: list[bytes]) -> Record:
    return {"signals": [{"siginfo": signal} for signal in pending]}


def _thread_core(thread: ThreadState, *, is_leader: bool) -> Record:
    address, size, flags = thread.alternate_stack
    record: dict[str, Any] = {
        "futex_rla": thread.robust_list[0],
        "futex_rla_len": thread.robust_list[1],
        "sched_nice": thread.nice,
        "sched_policy": thread.policy,
        "sas": {"ss_sp": address, "ss_size": size, "ss_flags": flags & 0xFFFFFFFF},
        "signals_p": _queue(thread.pending),
        "creds": _credentials(thread.credentials),
        "comm": thread.name,
        "cg_set": _CGROUP_SET,
    }
    if thread.priority:
        record["sched_prio"] = thread.priority
    if not is_leader:
        record["blk_sigset"] = thread.signal_mask
    if thread.parent_death_signal:
        record["pdeath_sig"] = thread.parent_death_signal
    if rseq := thread.rseq:
        record["rseq_entry"] = {
            "rseq_abi_pointer": rseq.address,
            "rseq_abi_size": rseq.size,
            "signature": rseq.signature,
        }
    return record


def _credentials(credentials: Credentials) -> Record:
    def words(mask: int) -> list[int]:
        return [mask & 0xFFFFFFFF, mask >> 32]

    uid, euid, suid, fsuid = credentials.uids
    gid, egid, sgid, fsgid = credentials.gids
    record: dict[str, Any] = {
        "uid": uid,
        "gid": gid,
        "euid": euid,
        "egid": egid,
        "suid": suid,
        "sgid": sgid,
        "fsuid": fsuid,
        "fsgid": fsgid,
        "cap_inh": words(credentials.inheritable),
        "cap_prm": words(credentials.permitted),
        "cap_eff": words(credentials.effective),
        "cap_bnd": words(credentials.bounding),
        "secbits": credentials.secure_bits,
        "groups": credentials.groups,
        "cap_amb": words(credentials.ambient),
    }
    if credentials.no_new_privileges:
        record["no_new_privs"] = 1
    return record


def _task_core(state: TaskState, leader: ThreadState) -> Record:
    real, virtual, profiling = (
        {"isec": timer.interval[0], "iusec": timer.interval[1], "vsec": timer.value[0], "vusec": timer.value[1]}
        for timer in state.interval_timers
    )
    record: dict[str, Any] = {
        "task_state": _TASK_STOPPED if state.stop_signal else _TASK_ALIVE,
        "exit_code": 0,
        "personality": state.personality,
        "flags": state.flags,
        "blk_sigset": leader.signal_mask,
        "comm": state.name,
        "timers": {"real": real, "virt": virtual, "prof": profiling, "posix": _posix_timers(state)},
        "rlimits": {"rlimits": [{"cur": soft, "max": hard} for soft, hard in state.limits]},
        "signals_s": _queue(state.pending),
        "loginuid": state.login_uid,
        "oom_score_adj": state.oom_score_adjustment,
        "sigactions": [_action(action) for action in state.actions],
        "child_subreaper": state.is_child_subreaper,
    }
    if state.stop_signal:
        record["stop_signo"] = state.stop_signal
    if state.membarrier_registrations:
        record["membarrier_registration_mask"] = state.membarrier_registrations
    return record


def _posix_timers(state: TaskState) -> list[Record]:
    records: list[Record] = []
    for timer in state.posix_timers:
        record = {
            "it_id": timer.number,
            "clock_id": timer.clock & 0xFFFFFFFF,
            "si_signo": timer.signal,
            "it_sigev_notify": timer.notify,
            "sival_ptr": timer.value_pointer,
            "overrun": timer.overrun,
            "isec": timer.interval[0],
            "insec": timer.interval[1],
            "vsec": timer.value[0],
            "vnsec": timer.value[1],
        }
        if timer.thread:
            record["notify_thread_id"] = timer.thread
        records.append(record)
    return records


def _action(action: SignalAction) -> Record:
    return {
        "sigaction": action.handler,
        "flags": action.flags,
        "restorer": action.restorer,
        "mask": action.mask,
        "compat_sigaction": False,
    }


def _mm(task: TaskImages, files: Files) -> Record:
    state = task.state
    limits = {f"mm_{name}": value for name, value in state.memory_limits._asdict().items()}
    return {
        **limits,
        "exe_file_id": files.add_path(state.executable),
        "mm_saved_auxv": state.auxiliary_vector,
        "vmas": [_vma(mapping, files) for mapping in task.mappings] + [_guard(*guard) for guard in task.guards],
        "dumpable": state.dumpable,
        "thp_disabled": state.huge_pages_disabled,
    }


def _guard(start: int, end: int) -> Record:
    fields = dict.fromkeys(("pgoff", "shmid", "prot", "flags"), 0)
    return {"start": start, "end": end, "status": _GUARD, "fd": -1, **fields}


def _vma(mapping: Mapping, files: Files) -> Record:
    record: dict[str, Any] = {
        "start": mapping.start,
        "end": mapping.end,
        "pgoff": mapping.offset,
        "shmid": mapping.shared_inode,
        "prot": mapping.protection,
        "flags": mapping.flags,
        "status": _STATUS[mapping.kind] | (_HEAP if mapping.name == "[heap]" else 0),
        "fd": -1,
    }
    if mapping.file is not None:
        record["shmid"] = files.add_path(mapping.file.path)
        record["fdflags"] = mapping.file.open_flags
    if mapping.advice:
        record["madv"] = mapping.advice
    return record


def _descriptors(task: TaskImages, files: Files, owners: dict[Owner, Owner], numbers: dict[Owner, int]) -> list[Record]:
    """Return the descriptors of a task. `numbers` has those of the open files so far, and is added to."""
    records: list[Record] = []
    for descriptor in task.descriptors:
        owner = owners[task.state.pid, descriptor.fd]
        if owner not in numbers:
            numbers[owner] = files.add_descriptor(descriptor)
        records.append(
            {
                "id": numbers[owner],
                "flags": int(descriptor.close_on_exec),
                "type": _TYPES[descriptor.kind],
                "fd": descriptor.fd,
            }
        )
    return records
