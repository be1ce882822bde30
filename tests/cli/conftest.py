"""What tests of the command line share."""

from __future__ import annotations

import pytest

from tests.calls import Call


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Call:
    """Runs one command line."""
    return Call(capsys)
