"""Every figure that needs a GPU, from one command: the sections below, written to benchmarks/RESULTS-GPU.md.

    python benchmarks/gpu.py [--out FILE] [--only speed-dit-xl ...] [--list]

Each section is another benchmark in a process of its own, whose printed table goes into the file as it is, with its
command, exit status and seconds. A section that is in the file already and did not fail is not run again, so an
interrupted run goes on where it stopped; remove the file to measure anew. A failure does not stop the others.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
MODES = ["--mode", "eager", "graph", "compiled"]
SECTIONS = {
    "kernels": ["kernel_times.py"],
    "speed-dit-xl": ["speed.py", "--layers", "28", "--batch", "1", "8", "32", "64", "--steps", "25", *MODES],
    "speed-flux": ["speed.py", "--size", "flux", "--layers", "19", "--batch", "1", "--seconds", "20", *MODES],
    "compress-dit-xl-w8a8": ["memory.py", "--recipe", "w8a8"],
    "compress-dit-xl-w4a8": ["memory.py", "--recipe", "w4a8"],
    "compress-flux-w4a8": ["memory.py", "--size", "flux", "--recipe", "w4a8", "--offload", "cpu"],
    "experts": ["moe.py", "--device", "cuda", "--width", "1152", "3072", "--tokens", "1024", "4096", "16384"],
}


def heading(name: str) -> str:
    return f"## {name}\n"


def measured(path: Path, name: str) -> bool:
    """Whether the file has this section with exit status 0."""
    text = path.read_text() if path.exists() else ""
    found = re.search(rf"^{re.escape(heading(name))}.*?^exit (\d+)", text, re.DOTALL | re.MULTILINE)
    return found is not None and found[1] == "0"


def without(text: str, name: str) -> str:
    """The file's text less a section."""
    return re.sub(rf"^{re.escape(heading(name))}.*?(?=^## |\Z)", "", text, flags=re.DOTALL | re.MULTILINE)


def machine() -> str:
    """The first lines of the file."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    names = ("torch", "triton", "diffusers", "torchao", "sdnq")
    found = []
    for name in names:
        try:
            found.append(f"{name} {version(name)}")
        except ModuleNotFoundError:
            continue
    return f"# Figures on a GPU\n\n{gpu}; {platform.machine()}; {', '.join(found)}. By `python benchmarks/gpu.py`.\n\n"


def run(name: str, command: list[str]) -> tuple[str, int]:
    """A section's text and its exit status; what it prints is shown while it runs."""
    started, lines = time.time(), []
    given = [sys.executable, "-u", str(HERE / command[0]), *command[1:]]
    told = {**os.environ, "PYTHONPATH": str(HERE.parent), "COLUMNS": "120"}
    with subprocess.Popen(given, stdout=subprocess.PIPE, text=True, env=told) as child:
        assert child.stdout is not None
        for line in child.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    body = "".join(lines) if "".join(lines).lstrip().startswith("|") else f"```\n{''.join(lines).rstrip()}\n```\n"
    status = f"exit {child.returncode}, {time.time() - started:.0f} s"
    return f"{heading(name)}\n`python benchmarks/{' '.join(command)}`\n\n{body}\n{status}\n\n", child.returncode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "RESULTS-GPU.md")
    parser.add_argument("--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--list", action="store_true", help="the sections and their commands; run nothing")
    options = parser.parse_args()
    if options.list:
        for name, command in SECTIONS.items():
            print(f"{name:24} python benchmarks/{' '.join(command)}")
        return
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py needs a GPU; this machine has none.")
    failed = []
    for name in options.only:
        if measured(options.out, name):
            print(f"{name}: measured already")
            continue
        print(f"--- {name}", flush=True)
        section, status = run(name, SECTIONS[name])
        before = options.out.read_text() if options.out.exists() else machine()
        options.out.write_text(without(before, name) + section)
        failed += [name] * (status != 0)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {options.out}")


if __name__ == "__main__":
    main()
