"""The process whose forks support/forks.py hands out: imports what it is told to, then forks on
demand. Only that: whatever else it did, each program would find done.
"""

import gc
import importlib
import json
import os
import runpy
import sys
from pathlib import Path


def main() -> None:
    del sys.path[0]  # this folder
    for name in sys.argv[1:]:
        importlib.import_module(name)
    gc.freeze()  # so that no program looks through all of these modules for garbage
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            run(**json.loads(line))
            return
        print(child, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


def run(
    program: str,
    arguments: list[str],
    folder: str,
    paths: list[str],
    changes: dict[str, str],
    output: str,
) -> None:
    """As ``python program arguments`` does, or ``python -c program``."""
    for stream, name in enumerate((os.devnull, f"{output}/stdout", f"{output}/stderr")):
        file = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, stream)
        os.close(file)
    os.chdir(folder)
    os.environ.update(changes)
    is_file = Path(program).suffix == ".py"
    sys.path[:0] = [str(Path(program).parent) if is_file else "", *paths]
    sys.argv[:] = [program if is_file else "-c", *arguments]
    if is_file:
        runpy.run_path(program, run_name="__main__")
    else:
        exec(compile(program, "<string>", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
