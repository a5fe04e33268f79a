"""Images that illustrate a run: a grid of masks with the faces sampled for them, and the loss curve."""

import io
import os
from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from sisma_jax.data import photos
from sisma_jax.data.classes import ClassSet
from sisma_jax.evaluation.curves import series, smooth
from sisma_jax.files import write_atomically

SEPARATOR = 2
"""Width in pixels of the white lines around and between the cells of a grid."""
HEADER_HEIGHT = 20
"""Height in pixels of the strip that holds the column titles."""


def sample_grid(
    masks: np.ndarray,
    samples: np.ndarray,
    originals: np.ndarray | None = None,
    *,
    classes: ClassSet,
    scale: int = 1,
    title: str = "sample",
) -> np.ndarray:
    """Returns an image with one row per mask: the mask in colours, its samples, and the original photograph.

    The upper left pixel of the cell in row i and column j is at
    (HEADER_HEIGHT + SEPARATOR + i (scale H + SEPARATOR), SEPARATOR + j (scale W + SEPARATOR)).

    Args:
      masks: uint8 (n, H, W), class indices or the ignored label.
      samples: uint8 (n, k, H, W, 3), RGB, k samples per mask.
      originals: uint8 (n, H, W, 3), RGB; None omits this column.
      classes: classes of the masks, which give the colours.
      title: of the samples; an s follows it if there are several per mask.
      scale: number of times that each pixel is repeated along both axes, at least 1; it enlarges small faces.

    Returns:
      uint8 (height, width, 3), RGB.

    Raises:
      ValueError: the shapes of `samples` or `originals` do not match the masks, or `scale` is less than 1.
    """
    count, height, width = masks.shape
    if samples.ndim != 5 or samples.shape[0] != count or 0 in samples.shape or samples.shape[2:] != (height, width, 3):
        raise ValueError(f"samples must be ({count}, k, {height}, {width}, 3) for these masks, got {samples.shape}.")
    if originals is not None and originals.shape != (count, height, width, 3):
        raise ValueError(f"originals must be ({count}, {height}, {width}, 3), got {originals.shape}.")
    if scale < 1:
        raise ValueError(f"scale must be a positive integer, got {scale}.")
    columns = [classes.colorize(masks), *np.swapaxes(samples, 0, 1)]
    titles = {0: "mask", 1: title if samples.shape[1] == 1 else f"{title}s"}
    if originals is not None:
        titles[len(columns)] = "original"
        columns.append(originals)

    cells = np.stack(columns, axis=1).repeat(scale, axis=2).repeat(scale, axis=3)
    rows, row_step, column_step = len(cells), scale * height + SEPARATOR, scale * width + SEPARATOR
    top = HEADER_HEIGHT + SEPARATOR
    grid = np.full((top + rows * row_step, SEPARATOR + len(columns) * column_step, 3), 255, np.uint8)
    for i, row in enumerate(cells):
        for j, cell in enumerate(row):
            y, x = top + i * row_step, SEPARATOR + j * column_step
            grid[y : y + scale * height, x : x + scale * width] = cell
    for j, title in titles.items():
        _draw_title(grid[:HEADER_HEIGHT], title, SEPARATOR + j * column_step, scale * width)
    return grid


def _draw_title(header: np.ndarray, title: str, left: int, width: int) -> None:
    """Draws a title into `header` in place, in the largest font, up to the standard size, that fits into `width`."""
    font, thickness, size = cv2.FONT_HERSHEY_SIMPLEX, 1, 0.5
    (text_width, text_height), _ = cv2.getTextSize(title, font, size, thickness)
    size *= min(1.0, width / text_width)
    baseline = (HEADER_HEIGHT + text_height) // 2
    # OpenCV draws only into contiguous memory. A slice of the image's rows is contiguous.
    cv2.putText(header, title, (left, baseline), font, size, (0, 0, 0), thickness, cv2.LINE_AA)


def save_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image as a PNG file, atomically.

    Args:
      path: of the file, on the disk or in a bucket.
      image: uint8 (H, W, 3), RGB.

    Raises:
      OSError: the file cannot be written.
    """
    write_atomically(path, photos.encode_png(image))


def loss_curve(metrics: Sequence[Mapping[str, int | float]], path: str | os.PathLike[str]) -> None:
    """Plots the loss over the training steps and writes the plot as a PNG file, atomically.

    A faint curve shows the training loss of every logged step. A second curve smooths it with a moving average over one
    twentieth of the run. Values that are not finite leave gaps.

    Args:
      metrics: lines of metrics.jsonl in order of their "step". Lines with "loss" give the training loss, and lines with
        "held_out_loss", if there are any, give a curve of the held-out loss. Other lines are ignored.
      path: of the PNG file, on the disk or in a bucket.

    Raises:
      OSError: the file cannot be written.
    """
    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.add_subplot(xlabel="training step", ylabel="flow-matching loss")
    steps, values = series(metrics, "loss")
    if len(steps) > 1:
        axes.plot(steps, values, color="tab:blue", alpha=0.25, linewidth=0.8, label="training, as logged")
        axes.plot(steps, smooth(values, reach=len(values) // 40), color="tab:blue", label="training, smoothed")
    elif len(steps):
        axes.plot(steps, values, "o", color="tab:blue", label="training, as logged")
    held_out_steps, held_out_values = series(metrics, "held_out_loss")
    if len(held_out_steps):
        axes.plot(held_out_steps, held_out_values, "o-", color="tab:orange", markersize=3, label="held-out")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    write_atomically(path, buffer.getvalue())
