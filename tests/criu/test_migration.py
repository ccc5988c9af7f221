# SPDX-License-Identifier: MIT
"""Post-copy migrations of real programs: their memory comes from a real `criu dump --lazy-pages`."""

from __future__ import annotations

import migration
import pytest
from pki import Authority


@pytest.mark.parametrize("scenario", ["tree"])
def test_stock_daemon_migrates(suite, scenario, victim, tmp_path):
    """That the harness itself is right: the stock daemon at the stock source."""
    command = [str(victim), scenario, str(tmp_path / "state")]
    with migration.source(suite, command, tmp_path) as source:
        assert source.task_state in {"t", "T"}
        images = source.copy_images(tmp_path / "there")
        outcome = migration.restore(source, images, tmp_path / "work", who="stock")
        migration.assert_good(outcome)
        assert not source.task_state or source.task_state == "Z"


SCENARIOS = ["threads", "forks", "forkstorm", "remap", "unmap", "advise", "storm", "exec", "exits", "tree", "sparse"]


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_lazyd_migrates(suite, scenario, victim, tmp_path):
    command = [str(victim), scenario, str(tmp_path / "state")]
    with migration.source(suite, command, tmp_path) as source:
        images = source.copy_images(tmp_path / "there")
        outcome = migration.restore(source, images, tmp_path / "work", who="lazyd")
        migration.assert_good(outcome)
        assert not source.task_state or source.task_state == "Z"


@pytest.mark.parametrize("scenario", ["storm"])
def test_lazyd_migrates_by_tls(suite, scenario, victim, tmp_path):
    authority = Authority(tmp_path)
    there, here = authority.sign("source"), authority.sign("destination")
    command = [str(victim), scenario, str(tmp_path / "state")]
    with migration.source(suite, command, tmp_path, extra=tuple(there.options(authority))) as source:
        images = source.copy_images(tmp_path / "copy")
        extra = tuple(here.options(authority))
        outcome = migration.restore(source, images, tmp_path / "work", who="lazyd", extra=extra)
        migration.assert_good(outcome)
        assert not source.task_state or source.task_state == "Z"
