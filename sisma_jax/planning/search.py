"""The largest batch that fits, in few compilations: each takes a minute, so memory between them is extrapolated."""

import dataclasses
from collections.abc import Callable

# Where the compiler runs short of memory it begins to compute things again, so that the line bends: it only says what
# to try next, and what is reported was tried.
RESOLUTION = 16
"""The search ends when the smallest batch that does not fit is larger than the largest that does by one part in so
many, or by the smallest step there is."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """A batch that was compiled.

    Attributes:
      total: bytes on a device; if it does not fit, what the compiler says at least, or None.
    """

    batch_size: int
    fits: bool
    total: int | None


@dataclasses.dataclass(frozen=True)
class LargestBatch:
    """Between which two batches the limit is.

    Attributes:
      batch_size: the largest that was compiled and fits; 0 if none does.
      too_large: the smallest that was compiled and does not fit; None if none was, because trials ran out.
      expected_too_large: the smallest that does not fit if memory grows along the line through the largest two that do;
        None if nothing fits.
      trials: in order.
    """

    batch_size: int
    too_large: int | None
    expected_too_large: int | None
    trials: tuple[Trial, ...]


def largest_batch(
    attempt: Callable[[int], Trial], first: Trial, unit: int, fixed: int, limit: int, max_trials: int = 5
) -> LargestBatch:
    """Returns the largest batch found to fit.

    Args:
      attempt: compiles for a batch.
      first: a trial that has been made.
      unit: batches are multiples of it.
      fixed: bytes on a device that do not grow with the batch, about: the training state.
      limit: bytes of a device.
      max_trials: the first included.
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
            # Within what is not known yet; the middle, once the line points to what is.
            guess = guess if low < guess < high else (low + high) // 2 // step * step
            guess = min(max(guess, low + step), high - unit)
        trials.append(attempt(guess))
    low, high = _bounds(trials)
    expected = (max(low, _extrapolated(trials, fixed, limit)) // unit + 1) * unit if low else None
    return LargestBatch(low, high, expected, tuple(trials))


def _bounds(trials: list[Trial]) -> tuple[int, int | None]:
    low = max((trial.batch_size for trial in trials if trial.fits), default=0)
    return low, min((trial.batch_size for trial in trials if not trial.fits), default=None)


def _extrapolated(trials: list[Trial], fixed: int, limit: int) -> int:
    """Where a line through the two largest batches that fit, or that one and the fixed bytes, meets the limit."""
    points = sorted((trial.batch_size, trial.total) for trial in trials if trial.fits)
    if not points:
        smallest = min(trials, key=lambda trial: trial.batch_size)
        if smallest.total is None or smallest.total <= max(limit, fixed):
            return smallest.batch_size // 2
        points = [(smallest.batch_size, smallest.total)]
    (x0, y0), (x1, y1) = points[-2:] if len(points) > 1 else [(0, fixed), points[0]]
    slope = (y1 - y0) / (x1 - x0)
    return int(x1 + (limit - y1) / slope) if slope > 0 else 2 * x1
