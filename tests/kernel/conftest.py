# SPDX-License-Identifier: MIT
"""Fixtures of the kernel tests."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pages_victim
import pytest
from kernel_harness import Stage, compile_skeleton, wait_until

from lazyd.errors import LazydError
from lazyd.uffd import check_permission


@pytest.fixture(scope="session")
def skeleton(tmp_path_factory):
    """The compiled skeleton."""
    try:
        check_permission()
    except LazydError as error:
        pytest.skip(str(error))
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return compile_skeleton(tmp_path_factory.mktemp("skeleton") / "skeleton")


@pytest.fixture
def stage(skeleton, tmp_path):
    """A stage that is cleared when the test is over."""
    stage = Stage(skeleton, tmp_path)
    yield stage
    stage.close()


@pytest.fixture(scope="session")
def pages_binary(tmp_path_factory):
    """The compiled task of pages.c."""
    if os.geteuid() != 0:
        pytest.skip("looking into another task's page tables needs root")
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed")
    return pages_victim.compile_victim(tmp_path_factory.mktemp("pages") / "pages")


@pytest.fixture
def victim(pages_binary):
    """A task that does what it is told; it is ended when the test is over."""
    with pages_victim.Victim(pages_binary) as victim:
        yield victim


@pytest.fixture(scope="session")
def steady(tmp_path_factory):
    """The compiled victim."""
    target = tmp_path_factory.mktemp("steady") / "steady"
    words = ["gcc", "-std=gnu11", "-O2", "-g", "-D_GNU_SOURCE", "-Wall", "-Wextra", "-Werror", "-pthread"]
    subprocess.run([*words, "-o", str(target), str(Path(__file__).parent.parent / "victims/steady.c")], check=True)
    return target


class Victim:
    """A running steady."""

    def __init__(self, program, state, kinds):
        state.mkdir(parents=True, exist_ok=True)
        null = subprocess.DEVNULL
        self.state = state
        command = [str(program), str(state), *kinds]
        self.process = subprocess.Popen(command, stdin=null, stdout=null, stderr=null, start_new_session=True, cwd="/")
        self.pid = self.process.pid
        wait_until((state / "ready").exists, "the victim")

    def finish(self):
        """Tell it to end; return what it found."""
        (self.state / "go").touch()
        self.process.wait(60)
        return (self.state / "result").read_text()

    def close(self):
        """End it and its children, whatever it does."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def start(steady, tmp_path):
    """Start victims that are gone when the test is over."""
    victims = []

    def start(*kinds):
        victims.append(Victim(steady, tmp_path / f"state{len(victims)}", kinds))
        return victims[-1]

    yield start
    for victim in victims:
        victim.close()
