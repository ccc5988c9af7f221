# SPDX-License-Identifier: MIT
"""Chains of parents and the booleans dialect, made from real dumps; see chains.py."""

# ruff: noqa: PLR0917  pytest passes fixtures by name

from __future__ import annotations

import shutil

import chains
import harness
import pytest


@pytest.fixture
def rewritten(tmp_path):
    """Hand out a folder that is gone after the test: chains are large."""
    folder = tmp_path / "rewritten"
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.parametrize("scenario", ["holes", "remap"])
@pytest.mark.parametrize("depth", [1, 2, 50])
def test_chain(suite, depth, scenario, turn, dumped, rewritten, tmp_path):
    saved = dumped(suite, scenario)
    # Stock does not answer a fault in a hole that has the lazy flag: there the restorer fills them all.
    share = 1.0 if harness.uses_stock() else 0.2
    leaf = chains.split_into_chain(saved.images, rewritten, depth, depth * 1000 + turn, share)
    if turn == 0:
        assert harness.eager_restore(saved, tmp_path / "eager", leaf) == "ok\n", "the chain itself is wrong"
    outcome = harness.lazy_restore(saved, tmp_path / "work", restorer_images=leaf, daemon_images=leaf)
    harness.assert_good(outcome)


@pytest.mark.skipif(harness.uses_stock(), reason="stock does not read this dialect")
@pytest.mark.parametrize("scenario", ["zeros", "advise", "forks"])
def test_booleans_with_zero_holes(suite, scenario, turn, dumped, rewritten, tmp_path):
    saved = dumped(suite, scenario)
    converted, zero_pages = chains.to_booleans(suite, saved.images, rewritten, turn)
    assert zero_pages > 0
    harness.assert_good(harness.lazy_restore(saved, tmp_path / "work", daemon_images=converted))


@pytest.mark.skipif(harness.uses_stock(), reason="stock does not read this dialect")
def test_booleans_in_a_chain(suite, turn, dumped, rewritten, tmp_path):
    saved = dumped(suite, "holes")
    leaf = chains.split_into_chain(saved.images, rewritten / "flags", 3, turn)
    converted, zero_pages = chains.to_booleans(suite, leaf, rewritten / "booleans", turn)
    assert zero_pages > 0
    outcome = harness.lazy_restore(saved, tmp_path / "work", restorer_images=leaf, daemon_images=converted)
    harness.assert_good(outcome)
