# SPDX-License-Identifier: MIT
"""Build backend: setuptools, preceded by the two generators that lazyd needs.

pyproject.toml declares the extension modules; what they are compiled from is generated here, before setuptools
looks: the protobuf modules from images/*.proto, and cffi's API-mode sources from the marked regions of cbits/lz.h,
so that no struct or constant is typed twice. A setup.py would do the same from one more place.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from setuptools import build_meta as _setuptools
from setuptools.build_meta import (  # noqa: F401  the hooks that need nothing generated
    get_requires_for_build_editable,
    get_requires_for_build_sdist,
    get_requires_for_build_wheel,
)

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "cbits" / "lz.h"
MODULES = {
    "_pagemap": ("lazyd.image._pagemap", "pagemap"),
    "_engine": ("lazyd.uffd._engine", "engine"),
    "_target": ("lazyd.target._target", "target"),
    "_memory": ("lazyd.dump._memory", "memory"),
    "_server": ("lazyd.serve._server", "server"),
}


def header_regions(which: str) -> str:
    """Return what cffi may see of lz.h for one module: the regions marked `cffi: common` and `cffi: WHICH`."""
    text = HEADER.read_text()
    found = re.findall(rf"/\* cffi: (?:common|{which}) \*/\n(.*?)/\* cffi: end \*/", text, re.S)
    if not found:
        raise SystemExit(f"{HEADER}: no region marked for cffi as {which}")
    return "\n".join(found)


def build_stub(source: Path, target: Path) -> None:
    """Link the program that a restored task begins as: static, and with nothing in it but its own instructions."""
    words = ["gcc", "-nostdlib", "-static", "-no-pie", "-Wl,--build-id=none", "-Wl,-z,noexecstack", "-s"]
    subprocess.run([*words, "-o", str(target), str(source)], check=True)


def generate() -> None:
    """Write build/cffi/*.c, lazyd/image/pb/*_pb2.py and lazyd/target/stub; untouched files keep their time stamps."""
    import cffi  # noqa: PLC0415  a build requirement: absent when only the hook list is asked for

    out = ROOT / "build" / "cffi"
    out.mkdir(parents=True, exist_ok=True)
    for stem, (module, region) in MODULES.items():
        ffi = cffi.FFI()
        ffi.cdef(header_regions(region))
        ffi.set_source(module, '#include "lz.h"')
        ffi.emit_c_code(str(out / f"{stem}.c"))
    build_stub(ROOT / "cbits" / "stub.S", ROOT / "lazyd" / "target" / "stub")
    package = ROOT / "lazyd" / "image" / "pb"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text('"""Generated from images/*.proto by the build."""\n')
    protos = sorted(str(p.relative_to(ROOT)) for p in (ROOT / "images").glob("*.proto"))
    subprocess.run(
        [sys.executable, "-m", "grpc_tools.protoc", "-Iimages", f"--python_out={package}", *protos],
        cwd=ROOT,
        check=True,
    )


def build_wheel(wheel_directory, config_settings=None, metadata_directory=None):
    generate()
    return _setuptools.build_wheel(wheel_directory, config_settings, metadata_directory)


def build_editable(wheel_directory, config_settings=None, metadata_directory=None):
    generate()
    return _setuptools.build_editable(wheel_directory, config_settings, metadata_directory)


def build_sdist(sdist_directory, config_settings=None):
    generate()
    # What setuptools does not find by itself; it is told by a file in the top folder, which is there only meanwhile.
    manifest = ROOT / "MANIFEST.in"
    manifest.write_text(
        "recursive-include cbits *.c *.h *.S\nrecursive-include images *.proto\ninclude scripts/build_backend.py\n"
    )
    try:
        return _setuptools.build_sdist(sdist_directory, config_settings)
    finally:
        manifest.unlink()


def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    generate()
    return _setuptools.prepare_metadata_for_build_wheel(metadata_directory, config_settings)


def prepare_metadata_for_build_editable(metadata_directory, config_settings=None):
    generate()
    return _setuptools.prepare_metadata_for_build_editable(metadata_directory, config_settings)
