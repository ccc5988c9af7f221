# SPDX-License-Identifier: MIT
"""What both demos print, and what they measure of a restore."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass, field

WATCH_RATE_MIB = 160
COLOUR = sys.stdout.isatty() and "NO_COLOR" not in os.environ


def paint(text: str, code: str) -> str:
    """Colour a text on a terminal."""
    return f"\033[{code}m{text}\033[0m" if COLOUR else text


def step(title: str) -> None:
    """Head a step."""
    print(f"\n{paint('==>', '1;34')} {paint(title, '1')}", flush=True)


def say(text: str) -> None:
    """Write one line of a step."""
    print(f"    {text}", flush=True)


def microseconds(nanoseconds: float | None) -> str:
    """Write a time."""
    if nanoseconds is None:
        return "-"
    return f"{nanoseconds / 1e6:.1f} ms" if nanoseconds >= 1e6 else f"{nanoseconds / 1e3:.0f} µs"


def size(count: float | None) -> str:
    """Write a number of bytes."""
    if count is None:
        return "-"
    return f"{count / 2**20:.1f} MiB" if count >= 2**20 else f"{count / 2**10:.0f} KiB"


@dataclass
class Restored:
    """What one restore took."""

    first_answer_s: float  # from the start of the command that restores
    start_s: float = 0.0  # of a daemon of its own, until it listens
    right: bool = False
    latencies: list[float] = field(default_factory=list)  # of answers while memory fills, in seconds
    stats: dict = field(default_factory=dict)

    def percentile(self, share: float) -> float:
        """Return a percentile of the latencies in seconds."""
        ordered = sorted(self.latencies)
        return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def summary(eager: Restored, watched: Restored, full: Restored, asked: str) -> bool:
    """Print what was measured; tell whether all data was right. asked: what clients did meanwhile, in words."""
    step("Summary")
    lazy_ms, eager_ms = full.first_answer_s * 1000, eager.first_answer_s * 1000
    say(f"{'first answer, eager restore':34}{eager_ms:.0f} ms")
    say(f"{'first answer, through lazyd':34}{lazy_ms:.0f} ms: {eager_ms / lazy_ms:.1f} times sooner")
    if full.start_s:
        say(f"{'lazyd listens after':34}{full.start_s * 1000:.0f} ms, before the restore begins")
    print()
    say(f"{'':34}{'full speed':29}held to {WATCH_RATE_MIB} MiB/s")

    def row(name: str, of) -> None:
        say(f"{name:34}{of(full):29}{of(watched)}")

    def faults(run: Restored) -> str:
        return f"{run.stats['faults']['count']:,}"

    def kind(name: str):
        return lambda run: f"{run.stats['pages'][name]:,} pages, {size(run.stats['bytes'][name])}"

    row("faults", faults)
    for name in ("p50", "p99", "max"):
        row(f"  latency, {name}", lambda run, name=name: microseconds(run.stats["faults"][f"{name}_ns"]))
    row("copied for faults", kind("by_fault"))
    row("copied by the background fill", kind("by_fill"))
    row("zero pages", kind("zero"))
    row("already there", kind("already_there"))
    row("fill rate", lambda run: f"{size(run.stats['fill_bytes_per_second'])}/s")
    row(f"{asked} meanwhile", lambda run: f"{len(run.latencies):,}")
    for name, share in (("p50", 0.5), ("p99", 0.99)):
        row(f"  latency, {name}", lambda run, share=share: microseconds(run.percentile(share) * 1e9))
    print()
    right = eager.right and watched.right and full.right
    verdict = paint("all of it, after every restore", "1;32") if right else paint("NO", "1;31")
    say(f"{'data right':34}{verdict}")
    return right
