"""Which checkpoints are the best, and that these are kept."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class BestMetric:
    """By what one checkpoint is better than another.

    Attributes:
      name: of a metric given to `Checkpoints.save`; a checkpoint without it, or where it is not finite, is never best.
      mode: which is better, the lower value or the higher.
    """

    name: str
    mode: Literal["min", "max"]


class Ranking:
    """Orders checkpoints by a metric; a preservation policy of Orbax, which keeps the best.

    In place of its `BestN`, which takes its metrics from a file without checksum when a folder is opened, and fails
    to open it if that is damaged.
    """

    def __init__(self, best: BestMetric | None, keep: int):
        self.best = best
        self.scores: dict[int, float] = {}
        self._keep = keep

    def score(self, metrics: Mapping[str, float]) -> float | None:
        return None if self.best is None else metrics.get(self.best.name)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        self.scores.pop(step, None)
        if (score := self.score(metrics)) is not None:
            self.scores[step] = score

    def sort(self, steps: Sequence[int]) -> list[int]:
        """Returns those of the steps that have a score, the best first, and of equals the newest first."""
        sign = -1 if self.best is not None and self.best.mode == "max" else 1
        return sorted(
            (step for step in steps if step in self.scores), key=lambda step: (sign * self.scores[step], -step)
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        kept = self.sort([checkpoint.step for checkpoint in checkpoints])[: self._keep]
        return [checkpoint.step in kept for checkpoint in checkpoints]
