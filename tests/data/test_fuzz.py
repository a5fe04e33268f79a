"""No damaged file ends in a traceback, a hang or a wrong shape."""

import pytest

from tests.data import fuzz


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_files_that_are_not_damaged_are_read_or_refused_by_name(reader):
    outcomes = {name: fuzz.check(data, reader) for name, data in fuzz.seeds().items()}
    assert "read" in outcomes.values()


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_are_read_or_refused_by_name(reader):
    outcomes = {fuzz.check(data, reader) for _, _, data in fuzz.cases(500, seed=0)}
    assert outcomes == {"read", "refused"}
