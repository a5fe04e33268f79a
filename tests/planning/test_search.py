"""The search for the largest batch, on devices that are functions."""

import pytest

from sisma_jax.planning.search import Trial, largest_batch

LIMIT = 16_000


def _search(need, first, unit=4, fixed=1_000, tells=True, max_trials=5):
    """Searches where a batch takes `need(batch)` bytes; a refusal tells them, or nothing."""

    def attempt(batch_size):
        assert batch_size > 0
        assert batch_size % unit == 0
        total = need(batch_size)
        return Trial(batch_size, total <= LIMIT, total if tells or total <= LIMIT else None)

    return largest_batch(attempt, attempt(first), unit=unit, fixed=fixed, limit=LIMIT, max_trials=max_trials)


@pytest.mark.parametrize("first", [4, 8, 64, 72, 400])
@pytest.mark.parametrize("tells", [True, False])
def test_the_limit_is_found_on_a_line(first, tells):
    found = _search(lambda batch: 1_000 + 200 * batch, first, tells=tells, max_trials=9)
    assert (found.batch_size, found.too_large) == (72, 76) or found.too_large - found.batch_size <= 4
    assert found.batch_size <= 75 < found.too_large


def test_a_line_takes_three_trials():
    found = _search(lambda batch: 1_000 + 200 * batch, 8)
    assert [trial.batch_size for trial in found.trials] == [8, 72, 76]
    assert (found.batch_size, found.too_large) == (72, 76)


def test_a_bent_line_takes_a_few_more():
    """Near the limit a compiler trades time for memory."""

    def need(batch):
        return 1_000 + 200 * batch if batch < 50 else 11_000 + 60 * (batch - 50)

    found = _search(need, 8, max_trials=8)
    assert need(found.batch_size) <= LIMIT < need(found.too_large)
    assert found.too_large - found.batch_size <= 8


def test_trials_are_few_and_never_repeated():
    for slope in (1, 7, 33, 150, 900, 3_000):
        found = _search(lambda batch, slope=slope: 1_000 + slope * batch, 16)
        sizes = [trial.batch_size for trial in found.trials]
        assert len(sizes) == len(set(sizes)) <= 5
        assert found.batch_size == max((x.batch_size for x in found.trials if x.fits), default=0)


def test_nothing_may_fit():
    found = _search(lambda batch: 20_000 + batch, 16)
    assert found.batch_size == 0
    assert found.too_large == 4
    assert found.expected_too_large is None


def test_what_was_not_tried_is_not_claimed():
    found = _search(lambda batch: 1_000 + 200 * batch, 8, max_trials=2)
    assert found.batch_size == 72
    assert found.too_large is None
    assert found.expected_too_large == 76
