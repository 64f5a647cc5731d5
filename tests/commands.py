"""The command line as a process, for tests: forked from one that has the imports done, which take seconds."""

from __future__ import annotations

import atexit
import functools
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

WARM = """
import json, os, sys, traceback
from ditcompress.cli.common import hush
hush()
from diffusers import DDIMScheduler, DiTTransformer2DModel
import ditcompress.api, matplotlib.pyplot
from ditcompress.api import calibration, chain, compress, depth, distill, judge, look, moe, q_sched, runs
from ditcompress.__main__ import main
for line in sys.stdin:
    arguments, *files = json.loads(line)
    child = os.fork()
    if not child:
        for number, path in enumerate(files, 1):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.argv = ["ditcompress", *arguments]
        code = 1
        try:
            main()
        except SystemExit as leave:
            code = leave.code
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
        os._exit(code)  # taking down all modules would take two seconds more
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@functools.cache
def _warm() -> tuple[subprocess.Popen[str], Path]:
    """The process that forks, and the folder of the streams."""
    process = subprocess.Popen(
        [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    folder = tempfile.TemporaryDirectory()
    atexit.register(folder.cleanup)
    atexit.register(process.kill)
    return process, Path(folder.name)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """`ditcompress ARGUMENTS`: a process with streams and an exit code of its own."""
    process, folder = _warm()
    assert process.stdin is not None and process.stdout is not None
    files = [folder / name for name in ("out", "err")]
    line = [str(a) for a in arguments]
    process.stdin.write(json.dumps([line, *map(str, files)]) + "\n")
    process.stdin.flush()
    code = int(process.stdout.readline())
    return subprocess.CompletedProcess(line, code, files[0].read_text(), files[1].read_text())


def fresh(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """The same as nobody has imported anything: what a user starts."""
    command = [sys.executable, "-m", "ditcompress", *(str(a) for a in arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)  # type: ignore[call-overload]


def fails(code: int, name: str, *arguments: object) -> str:
    """The one line that a failing command leaves on stderr."""
    done = run(*arguments)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert lines[-1].startswith(f"error[{name}") and len(lines[-1]) <= 400
    assert "Traceback" not in done.stderr and len([x for x in lines if not x.startswith("note:")]) == 1
    return lines[-1]
