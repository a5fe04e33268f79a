"""Charts as inline SVG for an HTML page, whose style sheet gives the colours (`report.css`).

A chart is drawn at about the size at which a phone shows it, so that its text stays readable there.
"""

import dataclasses
import html
import math
from collections.abc import Iterator, Sequence
from typing import Literal

import numpy as np

WIDTH, HEIGHT = 360, 230
"""Size of a line chart, in the units of its coordinates."""
LEFT, RIGHT, TOP, BOTTOM = 44, 350, 28, 190
"""The sides of the plot in it; labels and tick labels are outside."""

_PLOT_SIZE = f'width="{RIGHT - LEFT}" height="{BOTTOM - TOP}"'
# An axis has 3 to 7 ticks.
_MOST_INTERVALS = 6
# A curve has at most this many points, about one per two pixels.
_MOST_POINTS = 200
# Around the curves, as a fraction of their range.
_MARGIN = 0.05


@dataclasses.dataclass(frozen=True)
class Curve:
    """The values of one curve of a line chart; values that are not finite leave gaps.

    Attributes:
      label: name of the curve.
      x: float64 (P,), ascending.
      y: float64 (P,).
      style: "first" or "second", which the style sheet colours.
      band: the lowest and the highest value around each point, both float64 (P,); it does not extend the axis.
      has_points: whether every value is marked by a circle, whose tooltip states it.
    """

    label: str
    x: np.ndarray
    y: np.ndarray
    style: Literal["first", "second"] = "first"
    band: tuple[np.ndarray, np.ndarray] | None = None
    has_points: bool = False


def binned(x: np.ndarray, y: np.ndarray, raw: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Returns a long series with at most 200 points: x, y, and the lowest and the highest of `raw`, float64 (Q,).

    Each point is the last of a run of successive values; lowest and highest are those of the run.

    Args:
      x: float64 (P,).
      y: float64 (P,), smoothed values.
      raw: float64 (P,), the values that were smoothed.
    """
    runs = np.array_split(np.arange(len(x)), min(len(x), _MOST_POINTS)) if len(x) else []
    last = [run[-1] for run in runs]
    finite = [raw[run][np.isfinite(raw[run])] for run in runs]
    low = np.array([values.min() if values.size else np.nan for values in finite])
    high = np.array([values.max() if values.size else np.nan for values in finite])
    return x[last], y[last], low, high


def line_chart(curves: Sequence[Curve], *, x_label: str, y_label: str, y_limit: float = math.inf) -> str:
    """Returns a line chart as an `<svg>` element; "" if no curve has a finite value.

    Args:
      curves: the curves.
      x_label: quantity and unit of the horizontal axis.
      y_label: quantity and unit of the vertical axis.
      y_limit: the vertical axis ends near this value, and does not show what is above.
    """
    finite = [np.isfinite(curve.x) & np.isfinite(curve.y) for curve in curves]
    if not any(mask.any() for mask in finite):
        return ""
    # From step 0, so that the charts of a page have the same axis.
    x_axis = _Axis.around(np.concatenate([[0.0], *(curve.x[mask] for curve, mask in zip(curves, finite, strict=True))]))
    y = np.concatenate([curve.y[mask] for curve, mask in zip(curves, finite, strict=True)])
    y_axis = _Axis.around(np.minimum(y, max(y_limit, y.min())))
    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{html.escape(_summary(curves))}">',
        *_grid(x_axis, y_axis, x_label, y_label),
        # An inner <svg> with the same coordinates clips what is outside of the plot.
        f'<svg x="{LEFT}" y="{TOP}" {_PLOT_SIZE} viewBox="{LEFT} {TOP} {RIGHT - LEFT} {BOTTOM - TOP}">',
    ]
    for curve, mask in zip(curves, finite, strict=True):
        parts += _band(curve, x_axis, y_axis)
        parts += _line(curve, mask, x_axis, y_axis)
    return "\n".join([*parts, "</svg>", "</svg>"])


def bullet(value: float | None, ceiling: float | None, floor: float | None) -> str:
    """Returns a bar for a value in [0, 1] as an `<svg>` element that is as wide as its cell.

    The bar lies on a pale bar that ends at the ceiling, and a mark crosses both at the floor. The text beside it states
    the values, so that readers that do not see the chart miss nothing.

    Args:
      value: end of the bar; None leaves it out.
      ceiling: end of the pale bar; None leaves it out.
      floor: position of the mark; None leaves it out.
    """
    parts = ['<svg class="bullet" viewBox="0 0 100 16" preserveAspectRatio="none" aria-hidden="true">']
    if ceiling is not None:
        parts.append(f'<rect class="ceiling" x="0" y="1" width="{100 * ceiling:.2f}" height="14"/>')
    if value is not None:
        parts.append(f'<rect class="value" x="0" y="5" width="{100 * value:.2f}" height="6"/>')
    if floor is not None:
        parts.append(f'<line class="floor" x1="{100 * floor:.2f}" x2="{100 * floor:.2f}" y1="1" y2="15"/>')
    return "".join([*parts, "</svg>"])


@dataclasses.dataclass(frozen=True)
class _Axis:
    """A range of values, and the round numbers in it."""

    low: float
    high: float
    ticks: tuple[float, ...]
    step: float

    @classmethod
    def around(cls, values: np.ndarray) -> "_Axis":
        low, high = float(values.min()), float(values.max())
        if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, or equal ones
            reach = abs(low) / 2 or 1.0
            low, high = low - reach, high + reach
        margin = _MARGIN * (high - low)
        low, high = low - margin, high + margin
        step = _round_step((high - low) / _MOST_INTERVALS)
        first, last = math.ceil(low / step), math.floor(high / step)
        return cls(low, high, tuple(step * i for i in range(first, last + 1)), step)

    def place(self, value: float | np.ndarray, start: int, end: int) -> float | np.ndarray:
        """Returns the coordinates of values, where `low` is at `start` and `high` at `end`."""
        return start + (value - self.low) / (self.high - self.low) * (end - start)

    def label(self, tick: float) -> str:
        largest = max(map(abs, self.ticks))
        divisor, suffix = next(
            (pair for pair in ((1e9, "G"), (1e6, "M"), (1e3, "k")) if largest >= 10 * pair[0]), (1.0, "")
        )
        step = self.step / divisor
        decimals = next(d for d in range(16) if math.isclose(step * 10**d, round(step * 10**d), rel_tol=1e-6))
        return f"{tick / divisor:.{decimals}f}{suffix if tick else ''}".replace("-", "−")


def _round_step(least: float) -> float:
    """Returns the smallest of 1, 2, 2.5, 5, 10, 20, ... and their decimal fractions that is not less than `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= least * (1 - 1e-9))


def _grid(x_axis: _Axis, y_axis: _Axis, x_label: str, y_label: str) -> Iterator[str]:
    for tick in y_axis.ticks:
        y = y_axis.place(tick, BOTTOM, TOP)
        yield f'<line class="grid" x1="{LEFT}" x2="{RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        yield f'<text class="y tick" x="{LEFT - 6}" y="{y:.1f}">{y_axis.label(tick)}</text>'
    yield f'<line class="axis" x1="{LEFT}" x2="{RIGHT}" y1="{BOTTOM}" y2="{BOTTOM}"/>'
    for tick in x_axis.ticks:
        x = x_axis.place(tick, LEFT, RIGHT)
        if tick < 0:  # the margin before step 0
            continue
        yield f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{BOTTOM}" y2="{BOTTOM + 4}"/>'
        yield f'<text class="x tick" x="{x:.1f}" y="{BOTTOM + 18}">{x_axis.label(tick)}</text>'
    yield f'<text class="y label" x="2" y="14">{html.escape(y_label)}</text>'
    yield f'<text class="x label" x="{RIGHT}" y="{HEIGHT - 6}">{html.escape(x_label)}</text>'


def _band(curve: Curve, x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    if curve.band is None:
        return
    low, high = curve.band
    for part in _runs(np.isfinite(curve.x) & np.isfinite(low) & np.isfinite(high)):
        x = np.concatenate([curve.x[part], curve.x[part][::-1]])
        y = np.concatenate([low[part], high[part][::-1]])
        yield f'<path class="band {curve.style}" d="{_path(x, y, x_axis, y_axis)}Z"/>'


def _line(curve: Curve, finite: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> Iterator[str]:
    for part in _runs(finite):
        if part.stop - part.start > 1:
            yield f'<path class="line {curve.style}" d="{_path(curve.x[part], curve.y[part], x_axis, y_axis)}"/>'
        if not curve.has_points and part.stop - part.start > 1:
            continue
        for x, y in zip(curve.x[part].tolist(), curve.y[part].tolist(), strict=True):
            title = html.escape(f"{curve.label}, step {x:,.0f}: {y:.4g}")
            center = f'cx="{x_axis.place(x, LEFT, RIGHT):.1f}" cy="{y_axis.place(y, BOTTOM, TOP):.1f}"'
            yield f'<circle class="point {curve.style}" {center} r="3"><title>{title}</title></circle>'


def _path(x: np.ndarray, y: np.ndarray, x_axis: _Axis, y_axis: _Axis) -> str:
    points = np.stack([x_axis.place(x, LEFT, RIGHT), y_axis.place(y, BOTTOM, TOP)], axis=1)
    return "M" + "L".join(f"{left:.1f} {top:.1f}" for left, top in points.tolist())


def _runs(is_part: np.ndarray) -> Iterator[slice]:
    """Yields the longest ranges in which a bool array is true."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], is_part, [False]]).astype(np.int8)))
    return (slice(int(start), int(stop)) for start, stop in edges.reshape(-1, 2))


def _summary(curves: Sequence[Curve]) -> str:
    parts = []
    for curve in curves:
        (indices,) = np.nonzero(np.isfinite(curve.y))
        if len(indices):
            first, last = indices[0], indices[-1]
            parts.append(
                f"{curve.label}: {curve.y[first]:.4g} at step {curve.x[first]:,.0f}, "
                f"{curve.y[last]:.4g} at step {curve.x[last]:,.0f}"
            )
    return "; ".join(parts)
