#!/usr/bin/env python3
"""A C++ compiler that keeps its objects: CXX of the tests that build the package.

They ask how it is built, again and again from the same sources in new folders. What c++ makes of a
source without a warning is kept in build/kept_objects, under a hash of the preprocessed text and
the flags; all other calls (links, questions) are c++'s own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path

KEPT = Path(__file__).resolve().parents[2] / "build" / "kept_objects"
KEPT_DAYS = 3  # what was compiled and not used for so long is deleted
# Of a flag with a value behind it; these say where files lie, and the text tells what is in them.
_PLACES = ("-I", "-isystem", "-MF", "-MT", "-MQ", "-o")


def main(arguments: list[str]) -> int:
    compiler = ["c++", *arguments]
    if "-c" not in arguments or "-o" not in arguments:
        os.execvp("c++", compiler)
    target = Path(arguments[arguments.index("-o") + 1])
    text = _preprocess(arguments, target)
    kept = KEPT / f"{_key(arguments, text)}.o"
    if kept.exists():
        os.utime(kept)
        shutil.copyfile(kept, target)
        return 0
    done = subprocess.run(compiler, stderr=subprocess.PIPE)
    sys.stderr.buffer.write(done.stderr)
    if done.returncode == 0 and not done.stderr:
        KEPT.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, unfinished)
        unfinished.rename(kept)
        delete_old(KEPT.iterdir())
    return done.returncode


def _preprocess(arguments: list[str], target: Path) -> bytes:
    """The source with all its headers in it, without their places.

    Files of dependencies (-MMD) are written on the way.
    """
    at = arguments.index("-o")
    rest = [each for each in arguments[:at] + arguments[at + 2 :] if each != "-c"]
    named = ["-MQ", str(target)] if "-MMD" in rest else []
    return subprocess.run(["c++", *rest, "-E", "-P", *named], capture_output=True).stdout


def _key(arguments: list[str], text: bytes) -> str:
    version = subprocess.run(["c++", "--version"], capture_output=True).stdout
    flags, skip = [], False
    for each in arguments:
        if each.startswith("-") and not skip and not each.startswith(("-I", "-ffile-prefix-map")):
            flags.append(each)
        skip = each in _PLACES
    return hashlib.sha256(repr((version, flags)).encode() + text).hexdigest()[:24]


def delete_old(paths: Iterable[Path]) -> None:
    """Those that nobody has used for days; another process may do the same."""
    for path in paths:
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.stat().st_mtime > KEPT_DAYS * 24 * 3600:
                path.unlink()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
