# SPDX-License-Identifier: MIT
"""Live tasks from outside. What is named here is light: it is on the way to the listening socket.

The rest stops tasks and looks into them; it is imported by its own names where it is used, because it brings in
python-ptrace.
"""

from __future__ import annotations

from lazyd.target.expected import Attached, Expected
from lazyd.target.process import Target, children, descendants, find_run_pid, namespace_pids, waits_for_userfaults

__all__ = [
    "Attached",
    "Expected",
    "Target",
    "children",
    "descendants",
    "find_run_pid",
    "namespace_pids",
    "waits_for_userfaults",
]
