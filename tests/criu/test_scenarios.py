# SPDX-License-Identifier: MIT
"""Real programs, dumped by a real CRIU, restored lazily: every byte right, every daemon exit 0.

The victim checks its own memory against words that are a function of the address; see tests/victims/victim.c.
LAZYD_REPEAT=20 runs each restore that often from one dump; LAZYD_TEST_DAEMON=stock puts criu lazy-pages in
lazyd's place.
"""

# ruff: noqa: PLR0917  pytest passes fixtures by name

from __future__ import annotations

import harness
import pytest

# In the order of the list of promises: plain service, layout events, ends, shapes of memory.
SCENARIOS = [
    "plain",
    "threads",
    "forks",
    "forkstorm",
    "dontfork",
    "wipeonfork",
    "remap",
    "regrow",
    "dontunmap",
    "unmap",
    "advise",
    "cuts",
    "grow",
    "syscalls",
    "storm",
    "exec",
    "exits",
    "killed",
    "partly-killed",
    "tree",
    "sparse",
    "zeros",
    "holes",
    "manyvmas",
    "kinds",
]


# What stock criu lazy-pages gets wrong, by observation.
STOCK_FAILS = {
    "wipeonfork": "it fills a child's wiped mapping with the parent's bytes",
    "storm": "it unregisters what was removed, which cuts the mapping: a later mremap over it fails",
}


# What a CRIU itself gets wrong: its eager restore fails alike.
CRIU_FAILS = {
    ("trixie", "wipeonfork"): "criu 4.1.1 does not restore MADV_WIPEONFORK",
}


def expect_criu_to_manage(suite, scenario):
    if (suite, scenario) in CRIU_FAILS:
        pytest.xfail(CRIU_FAILS[suite, scenario])


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_scenario(suite, scenario, turn, dumped, tmp_path):
    if harness.uses_stock() and scenario in STOCK_FAILS:
        pytest.skip(f"stock: {STOCK_FAILS[scenario]}")
    expect_criu_to_manage(suite, scenario)
    harness.assert_good(harness.lazy_restore(dumped(suite, scenario), tmp_path / "work"))


@pytest.mark.skipif(harness.uses_stock(), reason="of lazyd alone")
@pytest.mark.parametrize("scenario", [name for name in SCENARIOS if name not in {"plain", "kinds", "manyvmas"}])
@pytest.mark.parametrize("fill", ["off", "rate"])
def test_scenario_on_demand(suite, fill, scenario, turn, dumped, tmp_path):
    """The same with the background fill off or slow, so that nearly every page comes by a fault."""
    expect_criu_to_manage(suite, scenario)
    extra = {"off": ("--fill", "off"), "rate": ("--fill-rate", "48M")}[fill]
    harness.assert_good(harness.lazy_restore(dumped(suite, scenario), tmp_path / "work", extra))
