# SPDX-License-Identifier: MIT
"""A dump on its way in: images in the order in which they are opened, which appear when the client closes the session.

What can be wrong is found at two times. A parent is loaded whole when an image on top of it is opened; parent holes
are held against it at the end. A dump that has failed goes on being read, and none of it is kept, so
that the client, who only asks at the end, hears of it in the words of the protocol: a status that is not 0.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from lazyd.dump.core import PageKind, PagemapFormat, PagePipe
from lazyd.dump.transfer import ImageType, MemoryImage, punch_parent
from lazyd.errors import DumpError, LazydError, ProtocolError, SystemCallError
from lazyd.image import Dialect
from lazyd.image.chain import PARENT_LINK
from lazyd.image.parent import ParentTable, load_parent
from lazyd.image.writer import write_error
from lazyd.report import Log
from lazyd.serve.core import Peer
from lazyd.serve.folder import Folder, Move, clear_up, locked, next_pages_id
from lazyd.units import human_bytes
from lazyd.wire import HeaderSize, split_image_id

# As many as a tree may have tasks, and more than any has.
IMAGES_MAX = 1 << 16


class _Image:
    """One pagemap and its pages image in the making."""

    def __init__(self, image: MemoryImage, number: int, folder: Folder, parent: ParentTable | None) -> None:
        self.image = image
        self.number = number
        self.parent = parent
        self.pipe = PagePipe()
        self.pages_name = f"pages.{number}"
        self.fd = folder.create(self.pages_name)

    def check_holes(self, directory: Path) -> None:
        """Check that the parent has the bytes of every parent hole, over its whole length."""
        if not self.pipe.pages(PageKind.PARENT):
            return
        name = self.image.pagemap_name
        if self.parent is None:
            raise DumpError(f"{directory}: no {name} in a parent for the parent holes that came; nothing is kept")
        address = self.pipe.first_hole_not_in(self.parent.extents)
        if address is not None:
            reason = "what came has a parent hole where the parent has no bytes; nothing is kept"
            raise DumpError(f"{directory / PARENT_LINK}, {name}, address {address:#x}: {reason}")

    def close_pages(self) -> None:
        """Close the pages image; a second call does nothing."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Inbox:
    """What one client sends. close() gives up what was not published."""

    def __init__(self, directory: Path, peer: Peer, log: Log, *, auto_dedup: bool) -> None:
        """Take images into a directory; its link `parent`, if it has one, names what they are on top of."""
        self._directory = directory
        self._peer = peer
        self._log = log
        self._auto_dedup = auto_dedup
        self._folder: Folder | None = None
        self._images: dict[MemoryImage, _Image] = {}
        self._current: _Image | None = None

    @property
    def is_empty(self) -> bool:
        """Say whether no image was opened since the last was published."""
        return not self._images

    def holds(self, destination: int) -> bool:
        """Say whether an image is the one that is being sent."""
        return self._current is not None and self._current.image == _image(destination, self._peer.name)

    def has_parent(self, destination: int) -> bool:
        """Say whether there is a parent for an image; ImageError if the parent cannot be read."""
        return self._load_parent(_image(destination, self._peer.name)) is not None

    def open(self, destination: int) -> bool:
        """Start an image, anew if it was started before. Return whether it has a parent."""
        image = _image(destination, self._peer.name)
        self._finish_image()
        parent = self._load_parent(image)
        if self._folder is None:
            if finished := clear_up(self._directory):
                self._log.warning(f"{self._directory}: finished what a server that was killed began: {finished}")
            self._folder = Folder(self._directory)
        before = self._images.get(image)
        if before is None and len(self._images) == IMAGES_MAX:
            raise ProtocolError(self._peer.name, f"more than {IMAGES_MAX} images in one dump")
        number = len(self._images) if before is None else before.number
        self._current = self._images[image] = _Image(image, number, self._folder, parent)
        self._peer.begin_image(destination, self._current.pipe, self._current.fd)
        return parent is not None

    def _load_parent(self, image: MemoryImage) -> ParentTable | None:
        link = self._directory / PARENT_LINK
        return load_parent(link, image.pagemap_name, None) if os.path.lexists(link) else None

    def note_unwritten(self, number: int) -> None:
        """Say that a pages image cannot be written: the dump has failed."""
        self._log.error(f"{self._peer.name}: {write_error('write', self._directory, OSError(number, ''))}")

    def _finish_image(self) -> None:
        current, self._current = self._current, None
        if current is None:
            return
        self._peer.end_image()
        current.close_pages()

    def _fail(self, reason: str, number: int) -> None:
        self._log.error(f"{self._peer.name}: {reason}")
        self._peer.broken = number

    def finish(self) -> int:
        """End the dump: its images appear. Return the status for the client, 0 or -errno; another may follow."""
        self._finish_image()
        if not self._peer.broken and self._images:
            try:
                self._publish()
            except SystemCallError as error:
                self._fail(str(error), error.number)
            except LazydError as error:
                self._fail(str(error), errno.EINVAL)
            except OSError as error:
                self._fail(str(write_error("write", self._directory, error)), error.errno or errno.EIO)
        status = -self._peer.broken
        self.close()
        return status

    def _publish(self) -> None:
        assert self._folder is not None
        images = list(self._images.values())
        for image in images:
            image.check_holes(self._directory)
        form = self._form(images)
        with locked(self._directory):
            first = next_pages_id(self._directory)
            pages = [Move(image.pages_name, f"pages-{first + n}.img") for n, image in enumerate(images)]
            for number, image in enumerate(images, first):
                self._write_pagemap(image, number, form)
            maps = [Move(name, name) for name in (image.image.pagemap_name for image in images)]
            kept = self._folder.publish([*pages, *maps])
        names = ", ".join(move.name for move in maps[:4]) + (f" and {len(maps) - 4} more" if len(maps) > 4 else "")
        size = sum(image.pipe.dumped_bytes for image in images)
        self._log.info(f"{self._peer.name}: has dumped {human_bytes(size)}: {names}")
        if kept:
            self._log.warning(f"{self._directory}: what was there of these tasks is kept: {', '.join(sorted(kept))}")
        if self._auto_dedup:
            self._punch([image for image in images if not any(k.startswith(image.image.pagemap_name) for k in kept)])

    def _write_pagemap(self, image: _Image, pages_id: int, form: PagemapFormat) -> None:
        assert self._folder is not None
        fd = self._folder.create(image.image.pagemap_name)
        try:
            image.pipe.write_pagemap(fd, pages_id, form)
        finally:
            os.close(fd)

    def _form(self, images: list[_Image]) -> PagemapFormat:
        """Return how entries are written: as the parents are, else as stock does; counts as the client sends them."""
        found = {image.parent.dialect for image in images if image.parent is not None}
        if len(found) > 1:
            raise DumpError(f"{self._directory / PARENT_LINK}: its pagemaps are of two dialects; nothing is kept")
        return PagemapFormat(found.pop() if found else Dialect.FLAGS, wide=self._peer.header is HeaderSize.WIDE)

    def _punch(self, images: list[_Image]) -> None:
        """Free in the parents what the images replace. One whose predecessor is kept leaves it its parent."""
        try:
            freed = sum(punch_parent(image.parent, image.pipe) for image in images if image.parent is not None)
        except SystemCallError as error:
            self._log.warning(str(error))
        else:
            self._log.info(f"{self._directory / PARENT_LINK}: {human_bytes(freed)} freed")

    def close(self) -> None:
        """Give up what is not published; what comes next begins anew."""
        self._peer.end_image()
        self._peer.broken = 0
        for image in self._images.values():
            image.close_pages()
            image.pipe.close()
        self._images.clear()
        self._current = None
        if self._folder is not None:
            self._folder.close()
            self._folder = None


def _image(destination: int, peer: str) -> MemoryImage:
    kind, number = split_image_id(destination)
    try:
        return MemoryImage(ImageType(kind), number)
    except ValueError:
        raise ProtocolError(peer, f"pages of {destination:#x}, which is no image id") from None
