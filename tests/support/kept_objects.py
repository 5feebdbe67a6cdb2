#!/usr/bin/env python3
"""A C++ compiler that keeps its objects: CXX of the tests that build the package.

They ask how it is built, again and again from the same sources in new folders. What c++ makes of a
source is kept in build/objects under a hash of the preprocessed text and the flags; all other calls
(links, questions) are c++'s own.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

KEPT = Path(__file__).resolve().parents[2] / "build" / "objects"
KEPT_SECONDS = 3 * 24 * 3600  # an object that was not used for so long is deleted
# Of a flag with a value behind it; these say where files lie, and the text tells what is in them.
_PLACES = ("-I", "-isystem", "-MF", "-MT", "-MQ", "-o")


def main(arguments: list[str]) -> int:
    compiler = ["c++", *arguments]
    if "-c" not in arguments or "-o" not in arguments:
        os.execvp("c++", compiler)
    target = Path(arguments[arguments.index("-o") + 1])
    text, messages = _preprocess(arguments, target)
    kept = KEPT / f"{_key(arguments, text)}.o"
    if kept.exists():
        os.utime(kept)
        shutil.copyfile(kept, target)
        return 0
    done = subprocess.run(compiler)
    if done.returncode == 0 and not messages:
        KEPT.mkdir(parents=True, exist_ok=True)
        unfinished = kept.with_suffix(f".{os.getpid()}")
        shutil.copyfile(target, unfinished)
        unfinished.rename(kept)
        _delete_old_objects()
    return done.returncode


def _preprocess(arguments: list[str], target: Path) -> tuple[bytes, bytes]:
    """The source with all its headers in it, without their places, and what c++ said meanwhile.

    Files of dependencies (-MMD) are written on the way.
    """
    at = arguments.index("-o")
    rest = [each for each in arguments[:at] + arguments[at + 2 :] if each != "-c"]
    named = ["-MQ", str(target)] if "-MMD" in rest else []
    done = subprocess.run(["c++", *rest, "-E", "-P", *named], capture_output=True)
    return done.stdout, done.stderr


def _key(arguments: list[str], text: bytes) -> str:
    version = subprocess.run(["c++", "--version"], capture_output=True).stdout
    flags, skip = [], False
    for each in arguments:
        if each.startswith("-") and not skip and not each.startswith(("-I", "-ffile-prefix-map")):
            flags.append(each)
        skip = each in _PLACES
    return hashlib.sha256(repr((version, flags)).encode() + text).hexdigest()[:24]


def _delete_old_objects() -> None:
    for path in KEPT.iterdir():
        if time.time() - path.stat().st_mtime > KEPT_SECONDS:
            path.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
