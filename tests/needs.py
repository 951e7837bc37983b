"""What some tests need beside Python packages: where it is missing they are skipped, or fail if it was promised."""

import os

import pytest

PROMISED = os.environ.get("FASTLSTM_TESTS_NEED", "").split()


def need(name: str, there: object, remedy: str) -> None:
    """Skip the test unless what it needs is there; fail it where `FASTLSTM_TESTS_NEED` names it."""
    if not there:
        message = f"{name} is missing: {remedy}"
        pytest.fail(message) if name in PROMISED else pytest.skip(message)
