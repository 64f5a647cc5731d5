"""No network while an external metric runs: libraries are told so, and Python sockets of the thread are refused."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..local_weights import Unavailable

_FLAGS = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY")
_EVENTS = frozenset({"socket.connect", "socket.getaddrinfo", "socket.gethostbyname"})
_state = threading.local()
_installed = threading.Lock()


@contextmanager
def offline() -> Iterator[None]:
    """Sets the offline switches of the Hugging Face libraries, and refuses connections of this thread.

    Native downloaders do not pass Python's audit events, but those in use here (hf_xet) obey HF_HUB_OFFLINE.
    """
    _install()
    before = {flag: os.environ.get(flag) for flag in _FLAGS}
    os.environ.update(dict.fromkeys(_FLAGS, "1"))
    constants = sys.modules.get("huggingface_hub.constants")  # it reads the environment only when it is imported
    was = getattr(constants, "HF_HUB_OFFLINE", None)
    if was is not None:
        constants.HF_HUB_OFFLINE = True  # type: ignore[union-attr]
    _state.refused = True
    try:
        yield
    finally:
        _state.refused = False
        if was is not None:
            constants.HF_HUB_OFFLINE = was  # type: ignore[union-attr]
        for flag, value in before.items():
            os.environ.pop(flag, None)
            if value is not None:
                os.environ[flag] = value


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if event in _EVENTS and getattr(_state, "refused", False):
        raise Unavailable("its library tried to reach the network")


def _install() -> None:
    """Audit hooks cannot be removed, so there is one, and it looks at a flag of the thread."""
    if _installed.acquire(blocking=False):  # held for ever: the hook is installed once
        sys.addaudithook(_refuse)
