# SPDX-License-Identifier: MIT
"""What a process may have: its own limits."""

from __future__ import annotations

import resource


def raise_descriptor_limit() -> None:
    """Have as many descriptors as this process may: the soft limit is made for programs that use select(2)."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
