# SPDX-License-Identifier: MIT
"""What every test directory shares: one variable that turns each skip into a failure."""

from __future__ import annotations

import os

import pytest


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """Report a skip as a failure when LAZYD_NO_SKIP is set: CI must not pass by lacking a privilege."""
    outcome = yield
    report = outcome.get_result()
    if report.skipped and not hasattr(report, "wasxfail") and os.environ.get("LAZYD_NO_SKIP") == "1":
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"LAZYD_NO_SKIP=1 and this was not run: {reason}"
