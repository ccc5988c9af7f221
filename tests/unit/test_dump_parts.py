# SPDX-License-Identifier: MIT
"""Parts of a dump that need no task: areas, registers at a restart, build ids, progress."""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import sys

import pytest

from lazyd.dump.areas import areas_of
from lazyd.dump.images import read_build_id, registers_for_image
from lazyd.dump.memory import AreaKind
from lazyd.report import CopyProgress, Log, Show
from lazyd.target.mappings import MAP_ANONYMOUS, MAP_LOCKED, MAP_PRIVATE, MAP_SHARED, Mapping, MappingKind
from lazyd.target.tracing import Registers

PAGE = 4096
KINDS = {
    MappingKind.PRIVATE: AreaKind.PRIVATE_ANON,
    MappingKind.PRIVATE_FILE: AreaKind.PRIVATE_FILE,
    MappingKind.SHARED: AreaKind.SHARED_ANON,
    MappingKind.VDSO: AreaKind.WHOLE,
    MappingKind.SHARED_FILE: None,
    MappingKind.VVAR: None,
    MappingKind.VSYSCALL: None,
}


def mapping(start, end, kind=MappingKind.PRIVATE, flags=MAP_PRIVATE | MAP_ANONYMOUS):
    """A mapping, as /proc would have it."""
    return Mapping(start, end, 3, flags, 0, kind, 0, "", None, 0, "", may_have_guards=False, is_write_protected=False)


@pytest.mark.parametrize("seed", range(200))
def test_areas_against_a_model_of_pages(seed):
    """Each page is in one area or none, of its mapping's kind, and lazy unless a stack pointer is in it."""
    chance = random.Random(seed)
    mappings, model, at = [], {}, 16
    for _ in range(chance.randrange(1, 12)):
        at += chance.randrange(0, 4)
        length, kind = chance.randrange(1, 9), chance.choice(list(KINDS))
        flags = MAP_SHARED if kind in (MappingKind.SHARED, MappingKind.SHARED_FILE) else MAP_PRIVATE
        flags |= MAP_ANONYMOUS if kind is not MappingKind.PRIVATE_FILE else 0
        flags |= chance.choice([0, 0, MAP_LOCKED])
        mappings.append(mapping(at * PAGE, (at + length) * PAGE, kind, flags))
        is_lazy = kind is MappingKind.PRIVATE and not flags & MAP_LOCKED
        model |= {page: (KINDS[kind], is_lazy) for page in range(at, at + length) if KINDS[kind]}
        at += length
    pointers = [chance.randrange(16, at + 4) * PAGE + chance.randrange(PAGE) for _ in range(chance.randrange(5))]
    for pointer in pointers:
        if pointer // PAGE in model:
            model[pointer // PAGE] = (model[pointer // PAGE][0], False)
    areas = areas_of(mappings, pointers)
    found = {}
    for area in areas:
        pages = range(area.start // PAGE, area.end // PAGE)
        assert pages
        assert not found.keys() & set(pages)
        found |= dict.fromkeys(pages, (area.kind, area.lazy))
    assert found == model
    assert [area.start for area in areas] == sorted(area.start for area in areas)


def registers(ax, orig_ax, ip=0x401002):
    """Registers of which three matter."""
    return Registers(*[0] * 27)._replace(ax=ax % (1 << 64), orig_ax=orig_ax % (1 << 64), ip=ip)


@pytest.mark.parametrize(
    ("ax", "orig_ax", "live", "image"),
    [
        (-512, 0, (0, 0x401000), (0, 0x401000)),  # ERESTARTSYS: read, once more
        (-513, 56, (56, 0x401000), (56, 0x401000)),  # ERESTARTNOINTR
        (-514, 34, (34, 0x401000), (34, 0x401000)),  # ERESTARTNOHAND: pause
        # ERESTART_RESTARTBLOCK: only the kernel has the rest of a nanosleep; elsewhere it returns EINTR
        (-516, 35, (219, 0x401000), (-4, 0x401002)),
        (-4, 35, (-4, 0x401002), (-4, 0x401002)),  # done
        (-512, -1, (-512, 0x401002), (-512, 0x401002)),  # not in a system call: the number is the program's own
        (7, 39, (7, 0x401002), (7, 0x401002)),
    ],
)
def test_registers_at_a_restart(ax, orig_ax, live, image):
    """arch/x86/kernel/signal.c, handle_signal and arch_do_signal_or_restart."""
    before = registers(ax, orig_ax)
    after = before.restarted()
    assert (after.ax, after.ip) == (live[0] % (1 << 64), live[1])
    after = registers_for_image(before)
    assert (after.ax, after.ip) == (image[0] % (1 << 64), image[1])


@pytest.mark.skipif(shutil.which("readelf") is None, reason="no readelf")
@pytest.mark.parametrize("path", [sys.executable, "/bin/sh", "/lib64/ld-linux-x86-64.so.2"])
def test_build_ids_are_those_that_readelf_reads(path):
    text = subprocess.run(["readelf", "-n", path], capture_output=True, text=True, check=True).stdout
    said = [line.split()[-1] for line in text.splitlines() if "Build ID" in line]
    assert read_build_id(path).hex() == (said[0] if said else "")


@pytest.mark.parametrize("content", [b"", b"\x7fELF", b"\x7fELF\x02\x01" + bytes(58), b"#!/bin/sh\n" * 20])
def test_files_without_a_build_id(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    assert read_build_id(str(tmp_path / "file")) == b""
    assert read_build_id(str(tmp_path / "none")) == b""


def test_progress_of_a_copy_is_a_line_a_second(monkeypatch):
    out = io.StringIO()
    log = Log(stderr=out)
    clock = [100.0]
    monkeypatch.setattr(log, "elapsed", lambda: clock[0])
    progress = CopyProgress(log, Show.LINES)
    for moment, done in ((100.0, 0), (100.5, 1 << 20), (101.0, 2 << 20), (101.2, 3 << 20), (102.1, 4 << 20)):
        clock[0] = moment
        progress.update(done, 8 << 20)
    progress.end()
    lines = out.getvalue().splitlines()
    assert len(lines) == 2
    assert lines[0].endswith("copied 2.0 MiB of 8.0 MiB (25%), 2.0 MiB/s")
    assert "copied 4.0 MiB of 8.0 MiB (50%)" in lines[1]


def test_no_progress_of_what_is_not_shown():
    out = io.StringIO()
    progress = CopyProgress(Log(stderr=out), Show.NOTHING)
    for _ in range(3):
        progress.update(1, 2)
    progress.end()
    assert not out.getvalue()
