"""Tier T5: external metrics, one a file, registered under its name; see `base` for the contract.

`run_external` gives every asked-for metric a row or a reason. Nothing is downloaded: weights are local files, pinned
by sha256 (`local_weights`), and the network is refused while a library of others runs (`_offline`).
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from types import ModuleType

from ...errors import DitcompressError, printable
from ...registry import Registry
from ...result import Measurement, Skipped
from ..local_weights import Unavailable, first_line
from ..pixels import Images
from ._offline import offline
from .base import Samples

__all__ = ["Images", "Samples", "Unavailable", "registry", "run_external"]

registry = Registry("ditcompress.evaluation.external", "external metric", ("LABEL", "EXTRA", "WEIGHTS", "measure"))


def run_external(names: Sequence[str], samples: Samples) -> tuple[list[Measurement], list[Skipped]]:
    """Rows of the metrics `names`, and those that could not be measured with their reasons. E201 for unknown names."""
    modules = {name: registry.get(name) for name in names}
    rows: list[Measurement] = []
    skipped: list[Skipped] = []
    for name, module in modules.items():
        found = _measure(module, samples)
        if isinstance(found, str):
            skipped.append(Skipped(name, found))
        else:
            rows += found
    return rows, skipped


def _measure(module: ModuleType, samples: Samples) -> list[Measurement] | str:
    """The rows, or the one-line reason why there are none. What libraries print goes to stderr."""
    try:
        with offline(), contextlib.redirect_stdout(sys.stderr):
            return list(module.measure(samples))
    except Unavailable as error:
        return printable(error, 400)
    except DitcompressError as error:
        return printable(f"{error.where} {error.what}; {error.remedy}", 400)
    except (Exception, SystemExit) as error:  # other people's code: whatever it raises is a reason, not our end
        return first_line(error)
