"""Paired metrics: one metric a file, registered under its name.

A metric exports LABEL, UNIT, HIGHER_IS_BETTER, IDEAL (its value for identical images) and

    values(original, compressed, peak) -> (n,) float64, one value for each pair of images (n, channels, height, width)

where `peak` is the data range of the images.
"""

from __future__ import annotations

from ...registry import Registry

registry = Registry(
    "ditcompress.evaluation.metrics", "metric", ("LABEL", "UNIT", "HIGHER_IS_BETTER", "IDEAL", "values")
)
