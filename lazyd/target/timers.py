# SPDX-License-Identifier: MIT
"""Whose time timers of timer_create(2) run on, as far as /proc/PID/timers and images say it."""

from __future__ import annotations

_LIBC_TIMER_SIGNAL = 32
"""By which libc tells a thread of its own that runs what SIGEV_THREAD asks for: whose timer it is, it does not say."""


def times_its_maker(clock: int) -> bool:
    """Say whether a timer's clock, of 32 bits, is the processor time of the thread that has made it.

    include/linux/posix-timers.h: that clock has a negative number, of which bit 2 says that it is a thread's, and all
    from bit 3 on, inverted, of which: 0 is who asks. CLOCK_THREAD_CPUTIME_ID becomes such a one.
    """
    signed = (clock & 0xFFFF_FFFF ^ 1 << 31) - (1 << 31)
    return signed >> 3 == -1 and bool(signed & 4)


def is_maker_known(clock: int, notified: int, signal: int) -> bool:
    """Say whether a timer can be made again by who has made it, where that matters: then it notifies that thread."""
    return not times_its_maker(clock) or (bool(notified) and signal != _LIBC_TIMER_SIGNAL)
