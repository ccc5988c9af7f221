# SPDX-License-Identifier: MIT
"""Fixtures of the kernel tests."""

from __future__ import annotations

import os
import shutil

import pages_victim
import pytest
from kernel_harness import Stage, compile_skeleton

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
