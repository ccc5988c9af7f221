# SPDX-License-Identifier: MIT
"""What the images hold of one plain task, all of it checked before anything is made.

What is beyond a plain task is listed whole. It is what the images say, not what lazyd may think of: every kind of file,
of area and of image that is not known to be plain is named.

A mapped or open file is checked as criu does: it is there, of the same kind, of the same size where the images have
one, and of the same build id where they have that. criu from 4.1 on makes a memfd of shared memory that has no name.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lazyd.errors import ImageError, RestoreError
from lazyd.hints import Any
from lazyd.image.buildid import build_id_words, read_build_id
from lazyd.image.directory import VMA_GUARD, ImagesDirectory, TaskState
from lazyd.image.encode import SmallImage
from lazyd.image.small import has_records, read_message, read_messages
from lazyd.restore import vma as vmas
from lazyd.target.timers import is_maker_known
from lazyd.target.tracing import status_fields
from lazyd.tuples import NamedTuple

_X86_64, _NATIVE = 1, 1
REGULAR, PIPE, TERMINAL, MEMFD = 1, 2, 11, 18
_FILE_WORDS = {
    3: "a named pipe",
    4: "an internet socket",
    5: "a unix socket",
    6: "an eventfd",
    7: "an epoll",
    8: "an inotify",
    9: "a signalfd",
    10: "a packet socket",
    12: "a fanotify",
    13: "a netlink socket",
    14: "a namespace",
    15: "a tun device",
    16: "a file of a plugin",
    17: "a timerfd",
    MEMFD: "a memfd",
    19: "a BPF map",
    20: "a pidfd",
}
_LAST_STANDARD_STREAM = 2
_NAMESPACES = ("pid", "net", "ipc", "uts", "mnt", "user", "cgroup", "time")
# RLIMIT_*, by number
_LIMITS = (
    *("CPU", "FSIZE", "DATA", "STACK", "CORE", "RSS", "NPROC", "NOFILE"),
    *("MEMLOCK", "AS", "LOCKS", "SIGPENDING", "MSGQUEUE", "NICE", "RTPRIO", "RTTIME"),
)
_CAP_SYS_RESOURCE = 24
_MODES = {stat.S_IFREG: "a file", stat.S_IFDIR: "a directory", stat.S_IFCHR: "a device"}


class Thread(NamedTuple):
    """A thread, with its record of core-TID.img."""

    tid: int
    core: Any


class Plan(NamedTuple):
    """One plain task, in the records of its images."""

    images: Path
    pid: int
    has_session: bool
    has_group: bool
    threads: list[Thread]
    """The leader first."""
    mm: Any
    vmas: list[vmas.Area]
    guards: list[tuple[int, int]]
    files: dict[int, Any]
    """By their number in files.img."""
    descriptors: list[Any]
    """Records of fdinfo, sorted by descriptor."""
    terminals: list[Any]
    program: str
    working_directory: str
    umask: int
    personality: int

    @property
    def task(self) -> Any:  # noqa: ANN401  a protobuf message
        """The record of what threads have in common."""
        return self.threads[0].core.tc

    @property
    def is_stopped(self) -> bool:
        """Say whether the task was stopped by a signal when it was dumped."""
        return bool(self.task.task_state == TaskState.STOPPED.value)


def make_plan(images: Path, *, is_there: bool = False) -> Plan:
    """Read the images of a plain task; ImageError if they cannot be trusted, RestoreError if it is not plain.

    is_there: the task is put back, not made: then it needs none of our terminals, limits and capabilities.
    """
    directory = ImagesDirectory.open(images)
    try:
        directory.check_inventory()
        return _Reader(directory, is_there=is_there).read()
    except FileNotFoundError as error:
        raise ImageError(images, "no inventory.img in it: not a directory of CRIU images") from error
    finally:
        directory.close()


class _Reader:
    def __init__(self, directory: ImagesDirectory, *, is_there: bool) -> None:
        self.directory = directory
        self.is_there = is_there
        self.problems: list[str] = []

    def read(self) -> Plan:
        tree = read_messages(self.directory, "pstree.img", SmallImage.PSTREE)
        if not tree:
            raise ImageError(self.directory.path / "pstree.img", "lists no task")
        root = tree[0]
        pid = root.pid
        if len(tree) > 1:
            self.add(f"{len(tree)} tasks", f"{', '.join(str(entry.pid) for entry in tree)}: a tree of processes")
        core = read_message(self.directory, f"core-{pid}.img", SmallImage.CORE)
        if core.tc.task_state not in (TaskState.ALIVE.value, TaskState.STOPPED.value):
            self.add(f"task {pid}", "it has ended, or is in a state that is not known")
            self.refuse(pid)
        threads = [Thread(pid, core)]
        threads += [
            Thread(tid, read_message(self.directory, f"core-{tid}.img", SmallImage.CORE))
            for tid in root.threads
            if tid != pid
        ]
        ids = read_message(self.directory, f"ids-{pid}.img", SmallImage.IDS)
        place = read_message(self.directory, f"fs-{pid}.img", SmallImage.FS)
        mm = read_message(self.directory, f"mm-{pid}.img", SmallImage.MM)
        files = self.read_files()
        descriptors = sorted(
            read_messages(self.directory, f"fdinfo-{ids.files_id}.img", SmallImage.FDINFO), key=lambda one: one.fd
        )
        terminals = []
        if any(one.type == TERMINAL for one in descriptors):
            terminals = read_messages(self.directory, "tty-info.img", SmallImage.TTY_INFO)
        plan = Plan(
            images=self.directory.path,
            pid=pid,
            has_session=root.sid == pid,
            # A job of somebody's terminal stays in our group: it is ours that may read from ours.
            has_group=root.pgid == pid and not terminals,
            threads=threads,
            mm=mm,
            vmas=self.read_areas(pid, mm, files),
            guards=[(area.start, area.end) for area in mm.vmas if area.status & VMA_GUARD],
            files=files,
            descriptors=descriptors,
            terminals=terminals,
            program=self.path_of(files, mm.exe_file_id),
            working_directory=self.path_of(files, place.cwd_id),
            umask=place.umask,
            personality=self.personality_of(core.tc.personality),
        )
        self.look_at_namespaces(ids)
        self.look_at_place(plan, place)
        self.look_at_images()
        self.look_at_files(plan)
        self.look_at_threads(plan)
        self.look_at_limits(plan)
        self.refuse(pid)
        self.check_files(plan)
        return plan

    def add(self, where: str, what: str) -> None:
        self.problems.append(f"{where}: {what}")

    def refuse(self, pid: int) -> None:
        if self.problems:
            listed = "".join(f"\n  {text}" for text in dict.fromkeys(self.problems))
            images = self.directory.path
            end = f"nothing was made; `criu restore --lazy-pages` may, beside `lazyd --images {images}`"
            if self.is_there:
                end = "nothing was changed"
            raise RestoreError(f"{images}: task {pid} has what lazyd cannot bring back:{listed}\n{end}")

    def read_files(self) -> dict[int, Any]:
        """Return what files.img has, by number, with paths that can be. What is not UTF-8 protobuf returns as bytes."""
        files = {file.id: file for file in read_messages(self.directory, "files.img", SmallImage.FILES)}
        for number, file in files.items():
            if file.type != REGULAR:
                continue
            name = file.reg.name
            if isinstance(name, bytes):
                self.add(f"file {number} ({name!r})", "its path is not UTF-8")
            elif not name.startswith("/") or "\0" in name:
                raise ImageError(self.directory.path / "files.img", f"garbled: file {number} is {name!r}")
        return files

    def path_of(self, files: dict[int, Any], number: int) -> str:
        """Return the path of a regular file by its number in files.img."""
        file = files.get(number)
        if file is None or file.type != REGULAR:
            raise ImageError(self.directory.path / "files.img", f"has no regular file {number}, which is in use")
        return str(file.reg.name)

    def read_areas(self, pid: int, mm: Any, files: dict[int, Any]) -> list[vmas.Area]:  # noqa: ANN401
        self.directory.read_mm(pid)  # which checks them
        objects = {}
        if any(file.type == MEMFD for file in files.values()):
            inodes = read_messages(self.directory, "memfd.img", SmallImage.MEMFD)
            objects = {inode.inode_id: inode for inode in inodes}
        areas = []
        for record in mm.vmas:
            if record.status & VMA_GUARD:
                continue
            area = vmas.read_area(record)
            if area.kind is vmas.Kind.OTHER:
                self.add(f"mapping {record.start:#x}-{record.end:#x}", vmas.why_not_plain(record))
            elif area.kind is vmas.Kind.MEMFD:
                inode = objects.get(files[record.shmid].memfd.inode_id) if record.shmid in files else None
                if inode is None:
                    raise ImageError(self.directory.path / "memfd.img", f"has not what is mapped at {record.start:#x}")
                if inode.hugetlb_flag:
                    self.add(f"mapping {record.start:#x}-{record.end:#x}", "huge pages (hugetlb)")
                area = area._replace(kind=vmas.Kind.SHARED, shared_id=inode.shmid, shared_size=inode.size)
            areas.append(area)
        return areas

    def personality_of(self, number: int) -> int:
        """Return a task's personality(2). criu takes the kernel's hexadecimal digits for a decimal number."""
        inventory = read_message(self.directory, "inventory.img", SmallImage.INVENTORY)
        is_ours = inventory.dump_uptime and not inventory.dump_criu_run_id
        return number if is_ours else int(str(number), 16)

    def look_at_namespaces(self, ids: Any) -> None:  # noqa: ANN401
        inventory = read_message(self.directory, "inventory.img", SmallImage.INVENTORY)
        names = [f"{name}_ns_id" for name in _NAMESPACES]
        other = [
            name.removesuffix("_ns_id")
            for name in names
            if ids.HasField(name) and inventory.root_ids.HasField(name)
            if getattr(ids, name) != getattr(inventory.root_ids, name)
        ]
        if other:
            self.add("namespaces", f"its own: {', '.join(other)}")

    def look_at_place(self, plan: Plan, place: Any) -> None:  # noqa: ANN401
        root = self.path_of(plan.files, place.root_id)
        if root != "/":
            self.add("root directory", f"{root}, by chroot")

    def look_at_images(self) -> None:
        for name, what in (
            ("filelocks.img", "file locks"),
            ("remap-fpath.img", "files that are deleted"),
            ("cgroup-ns.img", "control groups of its own"),
        ):
            if has_records(self.directory, name):
                self.add(name, what)

    def look_at_files(self, plan: Plan) -> None:
        standard = {one.id for one in plan.descriptors if one.fd <= _LAST_STANDARD_STREAM}
        for one in plan.descriptors:
            file = plan.files.get(one.id)
            if file is None:
                raise ImageError(self.directory.path / "files.img", f"has no file {one.id}: descriptor {one.fd}")
            where = f"descriptor {one.fd}"
            if file.type == REGULAR:
                if file.reg.fown.signum or file.reg.fown.pid:
                    self.add(f"{where} ({file.reg.name})", "signals about it go to an owner (F_SETOWN)")
            elif file.type == PIPE:
                if one.id not in standard:
                    self.add(where, "a pipe")
            elif file.type != TERMINAL:
                self.add(where, _FILE_WORDS.get(file.type, f"a file of kind {file.type}"))
        ends: dict[int, set[int]] = {}
        for file in plan.files.values():
            if file.type == PIPE:
                ends.setdefault(file.pipe.pipe_id, set()).add(file.pipe.flags & os.O_ACCMODE)
        if any(len(modes) > 1 for modes in ends.values()):
            self.add("standard streams", "a pipe with both ends in the images")
        if self.has_unread_pipes():
            self.add("pipes-data.img", "pipes with bytes in them that nobody has read")
        has_terminal = any(plan.files[one.id].type == TERMINAL for one in plan.descriptors)
        if has_terminal and not self.is_there and own_terminal() < 0:
            self.add("terminal", "none of lazyd's own standard streams is one, for it to go on with")

    def has_unread_pipes(self) -> bool:
        if not has_records(self.directory, "pipes-data.img"):
            return False
        try:  # criu writes of empty ones, too, that they are
            return any(pipe.bytes for pipe in read_messages(self.directory, "pipes-data.img", SmallImage.PIPES_DATA))
        except ImageError:  # what follows a record is no other one, but the bytes
            return True

    def look_at_threads(self, plan: Plan) -> None:
        own = status_fields(os.getpid())
        permitted, bounding = int(own["CapPrm"], 16), int(own["CapBnd"], 16)
        for tid, core in plan.threads:
            where = f"thread {tid}"
            if core.mtype != _X86_64 or core.thread_info.gpregs.mode not in (0, _NATIVE):
                self.add(where, "not 64-bit code of x86-64")
            creds = core.thread_core.creds
            if core.thread_core.seccomp_mode or core.tc.old_seccomp_mode:
                self.add(where, "has given up system calls (seccomp)")
            if creds.lsm_profile:
                self.add(where, f"confined by a security module as {creds.lsm_profile}")
            lacking = (mask(creds.cap_prm) & ~permitted) | (mask(creds.cap_bnd) & ~bounding)
            if lacking and not self.is_there:
                self.add(where, f"capabilities that lazyd does not have itself: {lacking:#x}")
            if not core.HasField("thread_core"):
                self.add(where, "images that are too old to say what it is")
        clocks = {(one.clock_id, one.notify_thread_id, one.si_signo) for one in plan.task.timers.posix}
        if len(plan.threads) > 1 and not all(is_maker_known(*one) for one in clocks):
            self.add("timers", "one on the time of a thread, and the images do not say of which")
        if not plan.task.sigactions:
            self.add("signals", "images that are too old to say what handles them")

    def look_at_limits(self, plan: Plan) -> None:
        import resource  # noqa: PLC0415  only here

        if self.is_there or int(status_fields(os.getpid())["CapEff"], 16) >> _CAP_SYS_RESOURCE & 1:
            return
        for number, limit in enumerate(plan.task.rlimits.rlimits):
            hard = resource.getrlimit(number)[1] % (1 << 64)
            if limit.max > hard:
                name = _LIMITS[number] if number < len(_LIMITS) else number
                self.add(f"limit {name}", f"{limit.max} is above lazyd's own {hard}, and it may not raise that")

    def check_files(self, plan: Plan) -> None:
        """See that every file that is mapped, or to be opened, is what it was; one line about the first that is not."""
        used = {plan.mm.exe_file_id} | {area.file for area in plan.vmas if area.file}
        if not self.is_there:  # else it has them open, and what it has written since is its own business
            used |= {one.id for one in plan.descriptors}
        for number in sorted(used):
            file = plan.files.get(number)
            if file is None:
                raise ImageError(self.directory.path / "files.img", f"has no file {number}, which is mapped")
            if file.type == REGULAR:
                check_file(file.reg)
        if not os.path.isdir(plan.working_directory):  # noqa: PTH112  text as it is
            raise RestoreError(f"{plan.working_directory}: the working directory of the task is gone")


def check_file(file: Any) -> None:  # noqa: ANN401  a protobuf message
    """See that a regular file is the one that the images mean; RestoreError says how it is not."""
    try:
        status = os.stat(file.name)  # noqa: PTH116  text as it is
    except OSError as error:
        raise RestoreError(f"{file.name}: {(error.strerror or '').lower()}; the task needs it") from None
    if file.HasField("mode") and stat.S_IFMT(file.mode) != stat.S_IFMT(status.st_mode):
        was = _MODES.get(stat.S_IFMT(file.mode), "something else")
        raise RestoreError(f"{file.name}: it was {was} when the task was dumped, and is not now")
    if not stat.S_ISREG(status.st_mode):
        return
    if file.HasField("size") and file.size != status.st_size:
        raise RestoreError(f"{file.name}: it has changed: {status.st_size} bytes, {file.size} when the task was dumped")
    if file.build_id:
        words = build_id_words(read_build_id(file.name))
        if words and words != tuple(file.build_id):
            raise RestoreError(f"{file.name}: it has changed: its build id is another than when the task was dumped")


def mask(words: Any) -> int:  # noqa: ANN401  a repeated field
    """Return a set of capabilities from its two words."""
    return sum(word << 32 * index for index, word in enumerate(words))


def own_terminal() -> int:
    """Return which of our standard streams is a terminal; -1: none."""
    for descriptor in range(_LAST_STANDARD_STREAM + 1):
        with suppress(OSError):
            if os.isatty(descriptor):
                return descriptor
    return -1


def taken_ranges(plan: Plan) -> Iterator[tuple[int, int]]:
    """Yield where the images have memory."""
    for area in plan.vmas:
        yield area.start, area.end
