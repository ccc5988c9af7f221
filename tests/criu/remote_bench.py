# SPDX-License-Identifier: MIT
"""Measure filling from a remote machine: lazyd's daemon and the stock one, at the same stock source, in turn.

Source and destination are network namespaces joined by a veth pair (lazyd/net.py), whose rate is limited where one is
named. A delay, in each direction, is netem's where the kernel has it, else a relay's at the source (links.py). Every
round dumps the program anew, since the source ends with its transfer. scripts/bench makes rows of what this returns.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import chains
import harness
import links
import migration
import pki

from lazyd.net import Host, Network
from lazyd.tcp import Peer, connect
from lazyd.wire import ClientParser, Command, HeaderSize, Message

SUITE = "trixie"
PAGE = 4096
BARE_PAGES = 1024
"""What a bare client asks for at a time: 4 MiB."""
BARE_AHEAD = 16
Measured = dict[str, list[float | None]]


@dataclass
class Setting:
    """A link, and what runs at its ends."""

    program: tuple[str, ...]
    rate_bits: int = 0
    delay_s: float = 0.0
    is_idle: bool = False
    """The program does nothing, and the time is that until all is there; else it times itself."""
    tls: bool = False


class Lab:
    """Two hosts, the link between them, and a folder."""

    def __init__(self, work: Path, setting: Setting, patience: float) -> None:
        self._work, self._setting, self._patience = work, setting, patience
        self._program = work / "bench"
        if not self._program.exists():
            harness.compile_c(harness.ROOT / "tests/victims/bench.c", self._program)
        self._tls: tuple[tuple[str, ...], tuple[str, ...]] = ((), ())
        if setting.tls:
            authority = pki.Authority(work / "pki")
            # A stock server that was told an address wants clients' certificates to be for that too.
            there, here = (authority.sign(name, ("10.77.0.1",)) for name in ("source", "destination"))
            self._tls = tuple(there.options(authority)), tuple(here.options(authority))

    @contextlib.contextmanager
    def _source(self) -> Iterator[tuple[migration.Source, Path, Host]]:
        """Dump the program at the source host; yield the source as seen from the destination, images and that host."""
        setting, folder = self._setting, self._work / "remote"
        shutil.rmtree(folder, ignore_errors=True)
        with contextlib.ExitStack() as stack:
            stack.callback(shutil.rmtree, folder, ignore_errors=True)
            network = stack.enter_context(Network())
            there, here = network.host("source"), network.host("destination")
            link = network.join(there, here, rate_bits=setting.rate_bits, delay_s=setting.delay_s)
            command = [str(self._program), str(folder / "state"), *setting.program]
            source = stack.enter_context(
                migration.source(
                    SUITE,
                    command,
                    folder,
                    address="127.0.0.1" if link.missing_delay_s else link.first,
                    extra=self._tls[0],
                    enter=there.enter,
                    verbosity="-v1",
                )
            )
            if link.missing_delay_s:
                target = (source.address, source.port)
                program = links.compile_relay(self._work)
                relay = links.delaying_relay(
                    program, target, link.missing_delay_s, address=link.first, enter=there.enter
                )
                source.port = stack.enter_context(relay)
            source.address = link.first
            yield source, source.copy_images(folder / "there"), here

    def measure(self, who: str) -> dict[str, float | None]:
        """Migrate once by "stock" or "lazyd", or have a "bare" client ask for all; return what it took."""
        with self._source() as (source, images, here):
            if who == "bare":
                with here.inside():
                    seconds = ask_for_all(source, images)
                    return {"seconds": seconds, "filling": seconds}
            os.sync()
            work = self._work / "remote" / "work"
            extra = self._tls[1]
            if who != "stock":
                extra = (*extra, "--no-progress", "--stats", str(work / "stats.json"))
            daemon = migration.start_daemon(
                source, images, work, who=who, extra=extra, enter=here.enter, verbosity="-v1"
            )
            try:
                with migration.copy(source, images, work, enter=here.enter, goes=not self._setting.is_idle):
                    return self._wait(who, source, daemon)
            except AssertionError as error:
                raise AssertionError(f"{who}: {error}\n{daemon.report()}\n{source.report()}") from None
            finally:
                daemon.stop()

    def _wait(self, who: str, source: migration.Source, daemon: harness.Daemon) -> dict[str, float | None]:
        begun = time.monotonic()
        result: dict[str, float | None]
        if self._setting.is_idle:
            code = daemon.wait(self._patience)
            result = {"seconds": time.monotonic() - begun}
            (source.state / "go").touch()  # it then reads all of it
        try:
            harness.wait_until((source.state / "result").exists, "the result", self._patience)
        except AssertionError:
            if who != "stock":
                raise
            return {"seconds": self._patience, "p50_us": None}  # at least
        found = json.loads((source.state / "result").read_text())
        if found["wrong"]:
            raise AssertionError(f"{who}: {found['wrong']} wrong words")
        if not self._setting.is_idle:
            result = found
            code = daemon.wait(self._patience)
        if code:
            raise AssertionError(f"{who} ended with {code}:\n{daemon.report()}\n{source.report()}")
        if who != "stock":
            # Without what comes after: the parting, which the source answers when it has ended its task.
            moments = json.loads((daemon.work / "stats.json").read_text())["seconds"]
            result["filling"] = moments["full"] - moments["restored"]
        return result


def ask_for_all(source: migration.Source, images: Path) -> float:
    """Ask a stock source for all of its pages in order, some requests ahead, and read them; return the seconds."""
    (pagemap,) = images.glob("pagemap-*.img")
    _, entries, _ = chains.read_pagemap(pagemap)
    asks = []
    for entry in entries:
        if entry.flags & chains.PRESENT or not entry.flags & chains.LAZY:
            continue  # it is in the images
        for first in range(0, entry.pages, BARE_PAGES):
            pages = min(BARE_PAGES, entry.pages - first)
            asks.append(Message(Command.GET, entry.start + first * PAGE, pages, 1))
    header = HeaderSize.NARROW
    buffer = memoryview(bytearray(BARE_PAGES * PAGE))
    with connect(source.address, source.port, Peer.ALWAYS_READS) as connection:
        connection.settimeout(harness.TIMEOUT_S)
        parser = ClientParser("the source", header)
        begun = time.monotonic()
        for number in range(len(asks) + BARE_AHEAD):
            if number < len(asks):
                connection.sendall(parser.send(asks[number]))
            if number < BARE_AHEAD:
                continue
            _receive(connection, buffer[:header])
            parser.feed(buffer[:header])
            answer = parser.next_event()
            assert isinstance(answer, Message)
            assert (answer.address, answer.pages) == (
                asks[number - BARE_AHEAD].address,
                asks[number - BARE_AHEAD].pages,
            )
            _receive(connection, buffer[: answer.data_bytes])
            parser.skip_data(answer.data_bytes)
        took = time.monotonic() - begun
        connection.sendall(parser.send(Message(Command.CLOSE)))
        _receive(connection, buffer[:4])
    return took


def _receive(connection: socket.socket, into: memoryview) -> None:
    while into:
        length = connection.recv_into(into)
        assert length, "the source hung up"
        into = into[length:]
