"""Files made by a fuzzer: a result or one of our own errors comes out, in bounded time and memory."""

from __future__ import annotations

import pytest
from fuzz import TARGETS, run_target

SECONDS = 60


@pytest.mark.fuzz
@pytest.mark.parametrize("name", TARGETS)
def test_no_file_gets_anything_else_out(name: str) -> None:
    pytest.importorskip("atheris", reason="the fuzzer is an extra: pip install 'micl-zoo[fuzz]'")
    found = run_target(name, SECONDS)
    assert found["runs"] > 100
    assert not found["foreign"]
    assert not found["hangs_and_memory"]
