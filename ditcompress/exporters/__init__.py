"""Other formats: one format a file, registered under its name.

An exporter exports NEEDS_FOLDER (whether the output is a folder) and `export(checkpoint, target, dtype) -> facts`,
which writes into an empty folder or to a file path and verifies what it wrote by reading it back.
"""

from __future__ import annotations

from ..registry import Registry

registry = Registry("ditcompress.exporters", "export format", ("NEEDS_FOLDER", "export"))
