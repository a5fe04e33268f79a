"""Which checkpoints are the best, and the Orbax policy that keeps them."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class BestMetric:
    """The metric that ranks checkpoints.

    Attributes:
      name: of a metric that is passed to `Checkpoints.save`. A checkpoint without it, or with a value that is not
        finite, is not ranked.
      mode: "min" if lower values are better, "max" if higher values are.
    """

    name: str
    mode: Literal["min", "max"]


BEST_METRICS = {
    metric.name: metric
    for metric in (BestMetric("held_out_loss", "min"), BestMetric("fd_parser", "min"), BestMetric("miou", "max"))
}
"""The metrics by which the checkpoints of a denoiser can be ranked, by the value of `train.best`."""


class Ranking:
    """Ranks checkpoints by a metric, and is the preservation policy for Orbax that keeps the best ones.

    It replaces Orbax's `BestN`, which reads metrics from a file without a checksum when it opens a folder, and cannot
    open the folder if that file is damaged.

    Attributes:
      best: the metric, or None for no ranking.
      scores: value of the metric by step.

    Args:
      best: the metric, or None for no ranking.
      keep: number of best checkpoints to keep.
    """

    def __init__(self, best: BestMetric | None, keep: int):
        self.best = best
        self.scores: dict[int, float] = {}
        self._keep = keep

    def score(self, metrics: Mapping[str, float]) -> float | None:
        """Returns the value that ranks a checkpoint with these metrics; None if they lack it."""
        return None if self.best is None else metrics.get(self.best.name)

    def add(self, step: int, metrics: Mapping[str, float]) -> None:
        """Ranks the checkpoint of a step by its metrics, in place of an earlier one of the same step."""
        self.scores.pop(step, None)
        if (score := self.score(metrics)) is not None:
            self.scores[step] = score

    def sort(self, steps: Sequence[int]) -> list[int]:
        """Returns the steps that are ranked, the best first; of steps with equal values, the newest first."""
        sign = -1 if self.best is not None and self.best.mode == "max" else 1
        return sorted(
            (step for step in steps if step in self.scores), key=lambda step: (sign * self.scores[step], -step)
        )

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Returns whether to keep each checkpoint; Orbax calls this.

        Args:
          checkpoints: Orbax's descriptions of checkpoints, with a `step`.
          context: not used.
        """
        kept = self.sort([checkpoint.step for checkpoint in checkpoints])[: self._keep]
        return [checkpoint.step in kept for checkpoint in checkpoints]
