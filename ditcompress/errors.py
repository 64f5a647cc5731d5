"""Every way a run can fail that is not our bug: one class, one catalogue, one line of text.

The number of a code begins with the exit code of the process (E3xx -> 3), so the table below is also the
exit-code contract of the command line (see README, "Exit codes").
"""

from __future__ import annotations

import errno
import re
from typing import Any

EXIT_CODES = {
    0: "ok",
    1: "internal error (a bug: please report it)",
    2: "usage or recipe",
    3: "bad input checkpoint or data",
    4: "refused for safety",
    5: "output exists or is locked",
    6: "resources: disk, memory, device",
    7: "numerical failure",
    8: "quality gate failed",
    9: "quality gate inconclusive",
}

CODES = {
    "E201": "unknown-name",  # a recipe, step, format or option name that is not registered
    "E202": "bad-recipe",  # the recipe file does not parse or does not validate
    "E203": "bad-option",  # a command-line value out of range or in conflict with another
    "E204": "missing-extra",  # an optional dependency is needed
    "E205": "unsupported",  # a legal request that this model or device cannot serve
    "E301": "not-found",
    "E302": "not-a-checkpoint",
    "E310": "bad-header",
    "E311": "missing-shard",
    "E312": "truncated-shard",
    "E313": "stale-shard",
    "E314": "bad-index",
    "E315": "missing-key",
    "E316": "extra-key",
    "E317": "shape-mismatch",
    "E318": "bad-dtype",
    "E319": "non-finite",
    "E320": "bad-config",
    "E321": "wrong-class",
    "E322": "already-compressed",
    "E323": "corrupt-file",
    "E324": "input-changed",
    "E330": "bad-conditions",
    "E331": "bad-statistics",
    "E332": "bad-scheduler",
    "E333": "bad-reference",
    "E334": "too-few-images",
    "E335": "weak-extractor",
    "E336": "classes-differ",
    "E337": "bad-extractor",
    "E338": "bad-training-data",
    "E340": "models-differ",
    "E341": "schedulers-differ",
    "E342": "runs-differ",
    "E401": "unsafe-pickle",
    "E402": "unsafe-path",
    "E403": "remote-code",
    "E501": "output-exists",
    "E502": "output-locked",
    "E503": "stale-work",
    "E601": "disk-full",
    "E602": "out-of-memory",
    "E603": "not-writable",
    "E604": "device-unavailable",
    "E605": "process-lost",  # one of several processes is gone
    "E701": "numerical",
    "E703": "training-diverged",
    "E702": "bad-round-trip",  # a library does not give back what its format can hold
    "E801": "gate-failed",
    "E901": "gate-inconclusive",
}

TOLD = "ditcompress_told"  # attribute of an error that all of several processes know of

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]")


def printable(text: object, limit: int = 160) -> str:
    """`text` on one line: control characters escaped, cut to `limit` characters."""
    line = _CONTROL.sub(lambda m: m.group().encode("unicode_escape").decode(), str(text))
    return line if len(line) <= limit else line[: limit - 3] + "..."


def some(names: Any, most: int = 5) -> str:
    """The first `most` names, then how many more there are."""
    listed = [printable(n, 60) for n in names]
    more = len(listed) - most
    return ", ".join(listed[:most]) + (f" and {more} more" if more > 0 else "")


class DitcompressError(Exception):
    """A failure the user can act on.

    `code` is a key of CODES; `where` names the file, tensor, recipe key or option; `what` says found against
    expected; `remedy` says what to do.
    """

    def __init__(self, code: str, where: object, what: str, remedy: str) -> None:
        self.code = code
        self.slug = CODES[code]
        self.where = printable(where, 120)
        self.what = printable(what, 200)
        self.remedy = printable(remedy, 160)
        super().__init__(self.line())

    @property
    def exit_code(self) -> int:
        return int(self.code[1])

    def line(self) -> str:
        """The one line shown to users, at most 400 characters."""
        text = f"error[{self.code} {self.slug}]: {self.where}: {self.what}; {self.remedy}."
        return text if len(text) <= 400 else text[:397] + "..."

    def to_dict(self) -> dict[str, Any]:
        return {
            "error": {
                "code": self.code,
                "slug": self.slug,
                "where": self.where,
                "what": self.what,
                "remedy": self.remedy,
                "exit_code": self.exit_code,
            }
        }


def as_ours(error: BaseException) -> DitcompressError | None:
    """Failures of the machine as errors of ours."""
    if isinstance(error, DitcompressError):
        return error
    if (
        isinstance(error, MemoryError)
        or "OutOfMemoryError" in type(error).__name__
        or "can't allocate memory" in str(error)
    ):
        return DitcompressError(
            "E602", "memory", "there is not enough of it", "lower calibration.samples or use a smaller --batch"
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return DitcompressError("E601", error.filename or "output", "the disk is full", "free some space")
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EROFS, errno.EPERM):
        return DitcompressError("E603", error.filename or "output", "permission denied", "choose another folder")
    return None
