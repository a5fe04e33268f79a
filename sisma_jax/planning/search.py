"""Searches for the largest batch that fits into memory, with few compilations, because each takes about a minute.

Memory is assumed to grow linearly with the batch size, which determines the next batch size to compile. Near the limit
the compiler recomputes values to save memory, so the growth is not linear there. The result therefore contains only
batch sizes that were compiled, apart from `LargestBatch.expected_too_large`.
"""

import dataclasses
from collections.abc import Callable

RESOLUTION = 16
"""The search ends when the largest batch that fits and the smallest that does not differ by at most 1/16 of the former,
or by one unit."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A batch size that was compiled.

    Attributes:
      batch_size: total over all devices.
      fits: whether the program fits into memory.
      total: bytes on each device. If the compiler refused the program, the lower bound that it states, or None.
    """

    batch_size: int
    fits: bool
    total: int | None


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """The result of a search: the two batch sizes between which the limit is.

    Attributes:
      batch_size: the largest batch size that was compiled and fits; 0 if none fits.
      too_large: the smallest batch size that was compiled and does not fit; None if all that were compiled fit.
      expected_too_large: the smallest batch size that does not fit if memory continues to grow along the line through
        the two largest batch sizes that fit; None if none fits.
      trials: all compiled batch sizes, in the order of compilation.
    """

    batch_size: int
    too_large: int | None
    expected_too_large: int | None
    trials: tuple[Trial, ...]


def largest_batch(
    attempt: Callable[[int], Trial], first: Trial, unit: int, fixed: int, limit: int, max_trials: int = 5
) -> LargestBatch:
    """Returns the largest batch size that the search finds to fit into memory.

    Args:
      attempt: compiles the program for a batch size.
      first: the trial of a batch size that has been compiled already.
      unit: batch sizes are multiples of it.
      fixed: approximate bytes per device that do not depend on the batch size: those of the training state.
      limit: bytes of memory per device.
      max_trials: largest number of trials, including `first`.
    """
    trials = [first]
    while len(trials) < max_trials:
        low, high = _bounds(trials)
        step = unit * max(1, low // unit // RESOLUTION)
        if high is not None and high - low <= step:
            break
        guess = _extrapolated(trials, fixed, limit) // step * step
        if high is None:
            guess = max(guess, low + step)
        else:
            # The next batch size must be between the two bounds. If the extrapolation is not, take the middle.
            guess = guess if low < guess < high else (low + high) // 2 // step * step
            guess = min(max(guess, low + step), high - unit)
        trials.append(attempt(guess))
    low, high = _bounds(trials)
    expected = (max(low, _extrapolated(trials, fixed, limit)) // unit + 1) * unit if low else None
    return LargestBatch(low, high, expected, tuple(trials))


def _bounds(trials: list[Trial]) -> tuple[int, int | None]:
    """The largest batch size that fits, or 0, and the smallest that does not, or None."""
    low = max((trial.batch_size for trial in trials if trial.fits), default=0)
    return low, min((trial.batch_size for trial in trials if not trial.fits), default=None)


def _extrapolated(trials: list[Trial], fixed: int, limit: int) -> int:
    """The batch size at which memory reaches the limit, on a line through two points.

    The points are the two largest batch sizes that fit; or the only one that fits and the fixed bytes at 0; or, if none
    fits, the smallest one and the fixed bytes at 0.
    """
    points = sorted((trial.batch_size, trial.total) for trial in trials if trial.fits and trial.total is not None)
    if not points:
        smallest = min(trials, key=lambda trial: trial.batch_size)
        # A lower bound below the limit says nothing about the slope.
        if smallest.total is None or smallest.total <= max(limit, fixed):
            return smallest.batch_size // 2
        points = [(smallest.batch_size, smallest.total)]
    (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else [(0, fixed), points[0]]
    slope = (y1 - y0) / (x1 - x0)
    return int(x1 + (limit - y1) / slope) if slope > 0 else 2 * x1
