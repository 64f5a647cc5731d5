"""`fusion_cases` on the Triton kernels."""

from __future__ import annotations

import pytest

from tests.runtime.fusion_cases import *  # noqa: F403  (the tests themselves)
from tests.runtime.triton_support import kernels

kernels("rows")


@pytest.fixture
def kernel() -> str:
    return "triton_int8"
