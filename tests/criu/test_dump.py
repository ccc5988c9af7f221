# SPDX-License-Identifier: MIT
"""Programs that lazyd dumped, restored by a real CRIU: eagerly, and lazily with lazyd as the daemon.

The programs check themselves; tests/victims/plain.c compares all it can find out about itself with what it was. The
small images are compared, field by field, with what criu itself writes of the same task.
"""

# ruff: noqa: PLR0917  pytest passes fixtures by name

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import harness
import pytest

from lazyd.target.tracing import state_of

LAZYD = str(Path(sys.executable).parent / "lazyd")


@pytest.fixture(scope="session")
def programs(tmp_path_factory):
    """Return a function that compiles a victim once."""
    folder = tmp_path_factory.mktemp("programs")
    made = {}

    def get(name):
        if name not in made:
            made[name] = harness.compile_c(harness.ROOT / "tests/victims" / f"{name}.c", folder / name)
        return str(made[name])

    return get


@pytest.fixture
def running():
    """Process groups that are ended when the test is over."""
    pids = []
    yield pids
    for pid in pids:
        harness.reap_group(pid)


def lazyd(*words, check=True):
    """Run lazyd; raise with what it said if it fails."""
    run = subprocess.run([LAZYD, *map(str, words)], capture_output=True, text=True, check=False, timeout=60)
    if check and run.returncode:
        raise AssertionError(f"lazyd {words[0]} failed ({run.returncode}): {run.stderr}")
    return run


def start_plain(programs, running, folder, *words):
    """Start the plain task."""
    state = folder / "state"
    state.mkdir(parents=True)
    state.chmod(0o777)
    for parent in list(state.parents)[:4]:
        parent.chmod(parent.stat().st_mode | 0o11)  # one that gives up root passes through
    pid = harness.start_program([programs("plain"), str(state), *map(str, words)], state)
    running.append(pid)
    return pid, state


def wait_gone(pid):
    """Reap a child that was killed, so that its pid is free."""
    os.waitpid(pid, 0)


def restore(saved, how, work):
    """Restore eagerly or lazily; return the program's verdict."""
    if how == "eager":
        return harness.eager_restore(saved, work)
    outcome = harness.lazy_restore(saved, work)
    assert outcome.daemon_exit == 0, outcome.details
    return outcome.verdict


HOW = pytest.mark.parametrize("how", ["eager", "lazy"])


@HOW
@pytest.mark.parametrize("words", [(0,), (1,), (7,), (50,), (7, "user")], ids=str)
def test_a_plain_task_comes_back(suite, how, words, programs, running, tmp_path):
    pid, state = start_plain(programs, running, tmp_path, *words)
    images = tmp_path / "images"
    lazyd("dump", "--pid", pid, "-D", images)
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


@HOW
def test_a_chain_of_pre_dumps_comes_back(suite, how, programs, running, tmp_path):
    pid, state = start_plain(programs, running, tmp_path, 3)
    parent = []
    for level in range(4):
        images = tmp_path / f"images{level}"
        lazyd("dump" if level == 3 else "pre-dump", "--pid", pid, "-D", images, *parent)
        parent = ["--parent", images]
    wait_gone(pid)
    assert lazyd("verify", images).stdout.endswith("good\n")
    assert restore(harness.Checkpoint(suite, pid, images, state), how, tmp_path / "work") == "ok\n"


# ---- what is written, beside what criu writes of the same task ----


def crit(suite, path):
    """Decode an image with the real crit."""
    run = subprocess.run([harness.crit_command(suite), "show", str(path)], capture_output=True, text=True, check=False)
    assert run.returncode == 0, f"crit cannot decode {path.name}: {run.stderr}"
    return json.loads(run.stdout)["entries"]


def test_crit_decodes_every_image(suite, programs, running, tmp_path):
    pid, _ = start_plain(programs, running, tmp_path, 2)
    lazyd("pre-dump", "--pid", pid, "-D", tmp_path / "a", "-R")
    lazyd("dump", "--pid", pid, "-D", tmp_path / "b", "--parent", tmp_path / "a", "-R")
    for images in (tmp_path / "a", tmp_path / "b"):
        names = [path.name for path in images.iterdir() if path.name not in ("parent",)]
        assert {"inventory.img", "pstree.img", "files.img", "stats-dump", f"mm-{pid}.img"} <= set(names)
        for name in names:
            if not name.startswith("pages-"):
                assert crit(suite, images / name), name


# What differs from criu's, and why. Paths of keys; a list is any of its items.
DIFFERENCES = {
    "core": {
        # criu takes these hexadecimal digits for a decimal number, and restores neither
        ("tc", "personality"),
        # parts of processors that criu names even where there is nothing in them
        ("thread_info", "fpregs", "xsave", "cet"),
        # time passes between the two dumps
        *((("tc", "timers", name, key)) for name in ("real", "virt", "prof") for key in ("vsec", "vusec")),
        ("tc", "timers", "posix", "vsec"),
        ("tc", "timers", "posix", "vnsec"),
    },
    "inventory": {
        # of that run of criu, and of its options about the network, which a plain task has not
        ("dump_criu_run_id",),
        ("network_lock_method",),
        ("plugins_entry",),
        ("allow_uprobes",),
        # ours: so that the next dump can tell another process of the same pid
        ("dump_uptime",),
    },
}


def flatten(value, ignored, path=()):
    """Yield (path, value) of all leaves that are not ignored; list items keep their order."""
    if path and tuple(key for key in path if isinstance(key, str)) in ignored:
        return
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from flatten(inner, ignored, (*path, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from flatten(inner, ignored, (*path, index))
    else:
        yield path, value


def named_files(suite, images):
    """The open files by their number, without the number."""
    found = {}
    for entry in crit(suite, images / "files.img"):
        kind = entry["type"].lower()
        record = {key: value for key, value in entry[kind].items() if key not in ("id", "regf_id")}
        found[entry["id"]] = (kind, json.dumps(record, sort_keys=True))
    return found


def view(suite, images, pid):
    """All of the small images, with files in place of their numbers."""
    files = named_files(suite, images)
    seen = {}
    for path in sorted(images.glob("core-*.img")):
        seen[path.name] = list(flatten(crit(suite, path), DIFFERENCES["core"]))
    seen["inventory"] = list(flatten(crit(suite, images / "inventory.img"), DIFFERENCES["inventory"]))
    for name in (f"ids-{pid}.img", "pstree.img"):
        seen[name] = list(flatten(crit(suite, images / name), ()))
    (place,) = crit(suite, images / f"fs-{pid}.img")
    seen["fs"] = files[place["cwd_id"]], files[place["root_id"]], place["umask"]
    descriptors = crit(suite, images / "fdinfo-2.img")
    seen["fdinfo"] = [{**entry, "id": files[entry["id"]]} for entry in descriptors]
    # Two descriptors share one open file in both or in none.
    seen["sharing"] = [[other["fd"] for other in descriptors if other["id"] == one["id"]] for one in descriptors]
    (mm,) = crit(suite, images / f"mm-{pid}.img")
    mm["exe_file_id"] = files[mm["exe_file_id"]]
    for vma in mm["vmas"]:
        if "VMA_FILE" in vma["status"]:
            vma["shmid"] = files[vma["shmid"]]
        if "MEMFD" in vma["status"] or "VMA_ANON_SHARED" in vma["status"]:
            # criu takes the kernel's object behind shared memory for a memfd here; we call it what it is
            vma.pop("fdflags", None)
            vma.update(status="shared memory", flags="", shmid=0)
    seen["mm"] = list(flatten(mm, ()))
    return seen


def test_small_images_are_those_that_criu_writes(suite, programs, running, tmp_path):
    """The task is stopped by SIGSTOP, so that both see the same registers."""
    pid, _ = start_plain(programs, running, tmp_path, 3)
    os.kill(pid, signal.SIGSTOP)
    harness.wait_until(lambda: state_of(pid) == "T", "the stop")
    theirs, ours = tmp_path / "criu", tmp_path / "lazyd"
    theirs.mkdir()
    words = [harness.criu_command(suite), "dump", "-t", str(pid), "-D", str(theirs), "--shell-job", "-R", "-o", "log"]
    subprocess.run(words, check=True, capture_output=True, timeout=60)
    lazyd("dump", "--pid", pid, "-D", ours, "--leave-running")
    assert state_of(pid) == "T"
    expected, found = view(suite, theirs, pid), view(suite, ours, pid)
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        assert found[name] == values, name
    pagemap = f"pagemap-{pid}.img"
    assert {entry["vaddr"] for entry in crit(suite, ours / pagemap)[1:]}
