"""Sample folders in the layouts of others' evaluators: one layout a file, registered under its name; see `base`."""

from __future__ import annotations

from ...registry import Registry

registry = Registry("ditcompress.evaluation.layouts", "sample layout", ("LABEL", "write"))
