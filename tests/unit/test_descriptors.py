# SPDX-License-Identifier: MIT
"""Which descriptors of a task stand for one open file, among many of the same file."""

from __future__ import annotations

import os
import random
import signal

from lazyd.target.descriptors import find_owners, read_descriptors


def test_many_descriptors_of_one_file():
    """Opened again it is another open file; duplicated it is the same: which of them it is, dup(2) has told."""
    chance = random.Random(1)
    first = {fd: fd for fd in (os.open("/dev/null", os.O_RDWR) for _ in range(120))}
    try:
        for _ in range(80):
            fd = chance.choice(list(first))
            first[os.dup(fd)] = first[fd]
        found = {one.fd: one.same_as for one in read_descriptors(os.getpid())}
        assert {fd: found[fd] for fd in first} == {
            fd: min(other for other in first if first[other] == first[fd]) for fd in first
        }
        child = os.fork()
        if not child:
            signal.pause()
        try:
            tables = {pid: read_descriptors(pid) for pid in (os.getpid(), child)}
            owners = find_owners(tables)
            for fd in first:
                assert owners[child, fd] == owners[os.getpid(), fd] == (os.getpid(), found[fd])
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
    finally:
        for fd in first:
            os.close(fd)
