# SPDX-License-Identifier: MIT
"""Fixtures of the tests that need a real CRIU."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import harness
import pytest


def pytest_generate_tests(metafunc):
    """Run a test that asks for `turn` LAZYD_REPEAT times."""
    if "turn" in metafunc.fixturenames:
        metafunc.parametrize("turn", range(int(os.environ.get("LAZYD_REPEAT", "1"))))


@pytest.fixture(scope="session", autouse=True)
def _privileged():
    if os.geteuid() != 0:
        pytest.skip("restoring needs root")
    harness.become_subreaper()


@pytest.fixture(scope="module", params=harness.SUITES)
def suite(request):
    """Name the CRIU in use; skip if it is not there."""
    if not Path(harness.criu_command(request.param)).exists():
        pytest.skip(f"no CRIU of {request.param}: run scripts/get-criu {request.param}")
    return request.param


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
def start(tmp_path):
    """Start programs that are gone when the test is over."""
    pids, states = [], []

    def start(*command):
        # Not below pytest's own folder, which another pytest may close to all but root at any moment.
        state = Path(tempfile.mkdtemp(prefix="lazyd-test-"))
        state.chmod(0o777)
        states.append(state)
        pid = harness.start_program([word.replace("STATE", str(state)) for word in command], state)
        pids.append(pid)
        return harness.Checkpoint("", pid, tmp_path / "images", state)

    yield start
    for pid in pids:
        harness.reap_group(pid)
    for state in states:
        shutil.rmtree(state, ignore_errors=True)


@pytest.fixture(scope="session")
def victim(programs):
    """Return the path of the compiled victim."""
    return Path(programs("victim"))


@pytest.fixture(scope="module")
def dumped(victim, tmp_path_factory):
    """Return a function that dumps a scenario, or hands out the last dump if it is the same one."""
    last = {}

    def get(suite, scenario):
        if (suite, scenario) not in last:
            for saved in last.values():
                saved.forget()
            last.clear()
            folder = tmp_path_factory.mktemp(f"{scenario}-{suite}")
            last[suite, scenario] = harness.checkpoint(suite, [str(victim), scenario, str(folder / "state")], folder)
        return last[suite, scenario]

    yield get
    for saved in last.values():
        saved.forget()
