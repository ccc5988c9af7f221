# SPDX-License-Identifier: MIT
"""Have many stopped threads do system calls, several of them at a time.

A thread that is asked alone is waited for half a dozen times, and each time for as long as it takes a busy machine to
run it. So as many are on their way at once as there is room for their code, each of them as safe as alone; while one is
waited for, the others run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from lazyd.errors import LazydError, SystemCallError
from lazyd.hints import Generic, TypeVar
from lazyd.target.remote import Room, SteppedCalls, Steps, Wait, find_rooms, pause, wait_for_stop
from lazyd.target.tracing import StoppedTask, Thread
from lazyd.tuples import NamedTuple

_T = TypeVar("_T")
_MOST = 16  # at once; more would not keep any machine busier than these do


def ask_each(task: StoppedTask, threads: Sequence[Thread], ask: Callable[[SteppedCalls], Steps[_T]]) -> list[_T]:
    """Ask each of some threads of a stopped task; return the answers in the order of the threads.

    DumpError, and ProcessLookupError if the task was killed; no thread is left in the middle then either.
    """
    if not threads:
        return []
    rooms = find_rooms(task, min(_MOST, len(threads)))
    try:
        return _ask(task.pid, threads, rooms, ask)
    except SystemCallError:
        # Limits that let one thread map a few pages may not let several.
        if len(rooms) == 1:
            raise
        return _ask(task.pid, threads, rooms[:1], ask)


def _ask(pid: int, threads: Sequence[Thread], rooms: list[Room], ask: Callable[[SteppedCalls], Steps[_T]]) -> list[_T]:
    waiting = deque(enumerate(threads))
    answers: dict[int, _T] = {}
    failed: list[Exception] = []
    free = list(rooms)
    active: deque[_Asked[_T]] = deque()
    idle = 0
    while active or (waiting and not failed):
        if waiting and free and not failed:
            number, thread = waiting.popleft()
            room = free.pop()
            one = _Asked(number, thread, room, _whole(SteppedCalls(pid, thread, room), ask))
        else:
            one = active.popleft()
        status = 0
        if one.waits is Wait.STOP:
            status, idle = wait_for_stop(one.thread), 0
        elif one.waits is Wait.TURN:
            idle += 1
            if idle > len(active):
                pause(idle)
        try:
            waits = next(one.steps) if one.waits is None else one.steps.send(status)
            active.append(one._replace(waits=waits))
        except StopIteration as end:
            answers[one.number] = end.value
            free.append(one.room)
        except (OSError, LazydError) as error:
            failed.append(error)
            free.append(one.room)
    if failed:
        raise failed[0]
    return [answers[number] for number in range(len(threads))]


class _Asked(NamedTuple, Generic[_T]):
    """A thread on its way. `waits`: for what it does; None: it has not begun."""

    number: int
    thread: Thread
    room: Room
    steps: Steps[_T]
    waits: Wait | None = None


def _whole(calls: SteppedCalls, ask: Callable[[SteppedCalls], Steps[_T]]) -> Steps[_T]:
    """Take a thread over, ask it, and give it back, also when that failed."""
    try:
        yield from calls.begin()
        answer = yield from ask(calls)
    except Exception:
        yield from calls.end()
        raise
    yield from calls.end()
    return answer
