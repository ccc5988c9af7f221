# SPDX-License-Identifier: MIT
"""Programs that lazyd dumped, restored by a real CRIU: eagerly, and lazily with lazyd as the daemon.

The programs check themselves; tests/victims/plain.c compares all it can find out about itself with what it was. The
small images are compared, field by field, with what criu itself writes of the same task.
"""

# ruff: noqa: PLR0917  pytest passes fixtures by name

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import harness
import pytest

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
