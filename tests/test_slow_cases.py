"""What `make test` leaves to `make slow` is named by names that exist."""

from pathlib import Path

import pytest
from slow_cases import KEPT


@pytest.mark.parametrize("name", KEPT)
def test_a_slow_test_is_there(name: str) -> None:
    file, _, function = name.partition("::")
    assert f"\ndef {function}(" in (Path(__file__).parent / file).read_text()
