# SPDX-License-Identifier: MIT
"""Restored tasks that read, fork, move and drop their memory while it is served: every byte right, exit 0."""

from __future__ import annotations

import shutil

import pytest
from kernel_harness import BASE, PAGE, STRESS, Run, Vma, full, sparse

MIB_PAGES = (1 << 20) // PAGE
FILLS = {"full": (), "off": ("--fill", "off"), "slow": ("--fill-rate", "4M")}
MIXED = [
    full(BASE, 700),
    Vma(BASE + 700 * PAGE, 900, [Run(BASE + 750 * PAGE, 300, 2), Run(BASE + 1200 * PAGE, 40)]),
    Vma(BASE + 5000 * PAGE, 64),
    Vma(BASE + 6000 * PAGE, 300, [Run(BASE + 6000 * PAGE, 100)], [Run(BASE + 6100 * PAGE, 50)]),
    sparse(BASE + 10_000 * PAGE, 2048, 3),
]


def again(stage, count):
    """Yield the numbers of as many rounds as a stress run asks for, each on cleared folders."""
    for number in range(count * STRESS):
        yield number
        stage.close()
        shutil.rmtree(stage.images)


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("order", ["forward", "backward", "random"])
def test_every_page_reads_right_in_any_order(stage, order, threads, fill):
    stage.restore(MIXED, ["sweep", order, str(threads)], *FILLS[fill])


@pytest.mark.parametrize("workers", ["1", "3"])
def test_faults_are_served_before_the_restore_is_finished(stage, workers):
    stage.restore(MIXED, ["sweep", "random", "2"], "--workers", workers, before=["sweep", "random", "2"])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("kind", ["dontneed", "free", "write", "unmap", "overmap", "remap"])
def test_a_page_is_touched_while_its_layout_changes(stage, kind, fill):
    vmas = [sparse(BASE, 32 * 200, 32)]
    for number in again(stage, 2):
        stage.restore(vmas, ["race", kind], *FILLS[fill], before=["seed", str(number)])


@pytest.mark.parametrize("fill", FILLS)
def test_a_page_is_touched_while_the_task_forks(stage, fill):
    vmas = [sparse(BASE, 32 * 100, 32)]
    for number in again(stage, 1):
        stage.restore(vmas, ["race", "fork"], *FILLS[fill], before=["seed", str(number)])


@pytest.mark.parametrize("fill", FILLS)
@pytest.mark.parametrize("threads", [1, 3])
def test_random_layout_changes(stage, threads, fill):
    for number in again(stage, 3):
        seed = ["seed", str(number)]
        stage.restore(MIXED, ["storm", str(threads), "300"], *FILLS[fill], before=seed)


@pytest.mark.parametrize("fill", FILLS)
def test_trees_of_forks_check_every_page(stage, fill):
    for number in again(stage, 1):
        stage.restore(MIXED, ["tree", "3", "2"], *FILLS[fill], before=["seed", str(number)])


@pytest.mark.parametrize("fill", FILLS)
def test_many_forks_in_a_row(stage, fill):
    for number in again(stage, 1):
        stage.restore(MIXED, ["forks", "150"], *FILLS[fill], before=["seed", str(number)])


@pytest.mark.parametrize("fill", FILLS)
def test_a_grown_mapping_continues_with_zeros(stage, fill):
    stage.restore(MIXED, ["grow", "500", "sweep", "random", "2"], *FILLS[fill])


@pytest.mark.parametrize("fill", FILLS)
def test_dropped_pages_are_zeros(stage, fill):
    drop = ["drop", hex(BASE + 100 * PAGE), "300"]
    stage.restore(MIXED, [*drop, "sweep", "random", "1"], *FILLS[fill], before=drop)


@pytest.mark.parametrize("fill", FILLS)
def test_exec_ends_the_serving(stage, fill):
    stage.restore(MIXED, ["exec"], *FILLS[fill])


def test_a_task_without_lazy_memory(stage):
    stage.restore([], [])
