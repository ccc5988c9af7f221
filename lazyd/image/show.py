# SPDX-License-Identifier: MIT
"""Describe what is in a directory of images: as data for programs, as text for people.

In the data addresses are strings in hexadecimal, because the largest do not fit the numbers that many readers
of JSON have; lengths are numbers of bytes.
"""

from __future__ import annotations

from pathlib import Path

from lazyd.hints import Any
from lazyd.image.checkpoint import Checkpoint, TaskImage, load
from lazyd.image.directory import CoreState, ImagesDirectory
from lazyd.image.pagemap import Kind
from lazyd.units import PAGE_SIZE, counted, human_bytes

Description = dict[str, Any]

KIND_WORDS = {
    Kind.DUMPED: "dumped",
    Kind.ZERO: "zero",
    Kind.REMOTE: "remote",
    Kind.BROKEN: "broken",
}


def describe(path: Path, dialect: str = "auto") -> Description:
    """Load a checkpoint and return what is in it, as JSON can hold it; ImageError as load() raises it."""
    directory = ImagesDirectory.open(path)
    try:
        with load(path, dialect) as checkpoint:
            tasks = [_describe_task(task, _read_core(directory, task.pid)) for task in checkpoint.tasks]
            return {
                "path": str(checkpoint.path),
                "dialect": checkpoint.dialect.value,
                "dialect_reason": checkpoint.dialect_reason,
                "page_server_header_bytes": 32 if checkpoint.wide_header else 24,
                "chain": [str(level) for level in checkpoint.chain_paths],
                "tasks": tasks,
                "pages_images": _describe_sources(checkpoint),
                "totals": _totals(tasks),
            }
    finally:
        directory.close()


def _read_core(directory: ImagesDirectory, pid: int) -> CoreState | None:
    try:
        return directory.read_core(pid)
    except FileNotFoundError:
        return None


def _describe_sources(checkpoint: Checkpoint) -> list[Description]:
    used = [0] * len(checkpoint.sources)
    for task in checkpoint.tasks:
        for _, pages, kind, _, source, _ in task.extents.rows():
            if kind == Kind.DUMPED.value:
                used[source] += pages * PAGE_SIZE
    return [
        {"path": str(source.path), "bytes": source.size, "bytes_used": bytes_used}
        for source, bytes_used in zip(checkpoint.sources, used, strict=True)
    ]


def _describe_task(task: TaskImage, core: CoreState | None) -> Description:
    by_kind = {word: {"extents": 0, "bytes": 0, "bytes_lazy": 0} for word in KIND_WORDS.values()}
    in_images = [0] * len(task.vmas)
    number = 0
    for start, pages, kind, lazy, _, _ in task.extents.rows():
        counts = by_kind[KIND_WORDS[Kind(kind)]]
        counts["extents"] += 1
        counts["bytes"] += pages * PAGE_SIZE
        counts["bytes_lazy"] += pages * PAGE_SIZE if lazy else 0
        at, end = start, start + pages * PAGE_SIZE
        while number < len(task.vmas) and task.vmas[number].end <= at:
            number += 1
        while number < len(task.vmas) and at < end:
            vma = task.vmas[number]
            in_images[number] += max(0, min(end, vma.end) - max(at, vma.start))
            at = vma.end
            if at < end:
                number += 1
    return {
        "pid": task.pid,
        "ppid": task.ppid,
        "comm": core.comm if core else None,
        "state": core.state.name.lower() if core and core.state else None,
        "zombie": task.is_zombie,
        "extents": by_kind,
        "vmas": [
            {
                "start": f"{vma.start:#x}",
                "end": f"{vma.end:#x}",
                "bytes": vma.end - vma.start,
                "kind": vma.kind,
                "lazy": vma.is_lazy,
                "protection": protection(vma.prot),
                "flags": vma.flags,
                "status": vma.status,
                "bytes_in_images": covered,
            }
            for vma, covered in zip(task.vmas, in_images, strict=True)
        ],
    }


def _totals(tasks: list[Description]) -> Description:
    return {
        "tasks": len(tasks),
        "zombies": sum(task["zombie"] for task in tasks),
        "vmas": sum(len(task["vmas"]) for task in tasks),
        "bytes_lazy_vmas": sum(vma["bytes"] for task in tasks for vma in task["vmas"] if vma["lazy"]),
        "extents": {
            word: {key: sum(task["extents"][word][key] for task in tasks) for key in ("extents", "bytes", "bytes_lazy")}
            for word in KIND_WORDS.values()
        },
    }


def protection(prot: int) -> str:
    """Return PROT_ bits as `ls` and /proc write them."""
    return "".join(letter if prot & bit else "-" for bit, letter in ((1, "r"), (2, "w"), (4, "x")))


def render(description: Description) -> str:
    """Return a description as text, without colours and at most as wide as its paths."""
    lines = [f"checkpoint {description['path']}"]
    lines.append(f"  dialect {description['dialect']} ({description['dialect_reason']})")
    lines.append(f"  page-server header of {description['page_server_header_bytes']} bytes")
    lines += _render_chain(description["chain"])
    totals = description["totals"]
    counts = (
        f"{counted(totals['tasks'], 'task')} ({counted(totals['zombies'], 'zombie')}), {counted(totals['vmas'], 'VMA')}"
    )
    lines.append(f"  {counts}, {human_bytes(totals['bytes_lazy_vmas'])} of VMAs left to lazy pages")
    lines += _render_kinds(totals["extents"], "  ")
    for task in description["tasks"]:
        lines += ["", *_render_task(task)]
    lines += ["", f"pages images in use: {len(description['pages_images'])}"]
    for source in description["pages_images"]:
        used = human_bytes(source["bytes_used"])
        lines.append(f"  {human_bytes(source['bytes']):>11}  {used:>11} used  {source['path']}")
    return "\n".join(lines) + "\n"


def _render_chain(paths: list[str]) -> list[str]:
    if len(paths) == 1:
        return ["  no parent"]
    lines = [f"  chain of {len(paths)} images, the oldest last:"]
    shown = paths if len(paths) <= 8 else [*paths[:4], f"({len(paths) - 6} more)", *paths[-2:]]
    return lines + [f"    {path}" for path in shown]


def _render_kinds(extents: Description, indent: str) -> list[str]:
    lines = []
    for word, counts in extents.items():
        if counts["extents"]:
            size, lazy = human_bytes(counts["bytes"]), human_bytes(counts["bytes_lazy"])
            lines.append(f"{indent}{word:<7} {size:>11} in {counts['extents']} extents, {lazy} of it lazy")
    return lines


def _render_task(task: Description) -> list[str]:
    title = f"task {task['pid']}"
    title += f" {task['comm']!r}" if task["comm"] else ""
    title += f", child of {task['ppid']}" if task["ppid"] else ""
    if task["zombie"]:
        return [f"{title}: a zombie, without memory"]
    lines = [title, *_render_kinds(task["extents"], "  ")]
    lines.append(f"  {'start':>18} {'end':>18} {'prot':<4} {'size':>11} {'in images':>11}       kind")
    for vma in task["vmas"]:
        size, covered = human_bytes(vma["bytes"]), human_bytes(vma["bytes_in_images"])
        lazy = "lazy" if vma["lazy"] else ""
        where = f"{vma['start']:>18} {vma['end']:>18} {vma['protection']:<4}"
        lines.append(f"  {where} {size:>11} {covered:>11}  {lazy:<4} {vma['kind']}")
    return lines
