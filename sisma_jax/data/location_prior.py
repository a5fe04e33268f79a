"""Where the classes of a data set lie in its images, and whether a mask's labels lie there.

A diffusion model generates something for any mask, so a mask in another tool's order of classes is never noticed in its
images. The order shows in the mask itself: eyes are not where hair is. `LocationPrior` holds, for each cell of a coarse
grid, how often each class covers it in the training masks; a mask's *score* is the mean log probability of its labels.
"""

import dataclasses
import io
import logging
import os
import zipfile
import zlib
from collections.abc import Iterable

import cv2
import numpy as np

from sisma_jax.data.classes import ClassSet, known_class_sets
from sisma_jax.data.photos import central_square, read_bytes
from sisma_jax.errors import InputError
from sisma_jax.files import write_atomically

logger = logging.getLogger(__name__)

GRID = 32

# Counts are blurred by this standard deviation in cells, and half a mask is added to each: a place where no training
# mask has a class is improbable, not impossible.
_BLUR_CELLS = 1.0
_PSEUDOCOUNT = 0.5
# By how much the score of another order must exceed that of the data set's own. On 600 held-out masks of CelebAMask-HQ
# the excess was below -0.6 for masks in their own order, and above 0.15 for masks in each of the known other orders.
_OTHER_ORDER_MARGIN = 0.1
# By how much the mean log probability of the mirrored classes must rise if left and right are exchanged. Of the same
# 600 masks, one exceeds this, a face that is turned aside; with exchanged sides, 588 do.
_EXCHANGED_MARGIN = 3.0
# The score below which a mask is unusual: so much below that of all but one in a hundred training masks.
_UNUSUAL_MARGIN = 0.5


@dataclasses.dataclass(frozen=True, eq=False)
class LocationPrior:
    """How often each class covers each cell of the grid in the training masks.

    Attributes:
      log_probabilities: float32 (K, 32, 32), the logarithm of the share of the masks.
      usual_score: score that 99 in 100 training masks reach.
    """

    log_probabilities: np.ndarray
    usual_score: float

    @classmethod
    def fit(cls, masks: Iterable[np.ndarray], classes: ClassSet) -> "LocationPrior":
        """Returns the prior of square masks, uint8 class indices (S, S), and of their mirror images."""
        cells = np.stack([_cells(mask) for mask in masks])
        cells = np.concatenate([cells, classes.flip(cells)])
        counts = np.stack([(cells == label).sum(0) for label in range(len(classes))]).astype(np.float32)
        counts = np.stack([cv2.GaussianBlur(count, (0, 0), _BLUR_CELLS) for count in counts]) + _PSEUDOCOUNT
        prior = cls(np.log(counts / counts.sum(0)), -np.inf)
        scores = [prior.score(mask) for mask in cells]
        return dataclasses.replace(prior, usual_score=float(np.quantile(scores, 0.01)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the prior as one npz file, atomically.

        Raises:
          OSError: the file cannot be written.
        """
        buffer = io.BytesIO()
        np.savez_compressed(buffer, log_probabilities=self.log_probabilities, usual_score=np.float64(self.usual_score))
        write_atomically(path, buffer.getvalue())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "LocationPrior":
        """Returns the prior that `save` has written.

        Raises:
          InputError: the file does not exist, or is damaged.
        """
        try:
            with np.load(io.BytesIO(read_bytes(path)), allow_pickle=False) as content:
                return cls(content["log_probabilities"], float(content["usual_score"]))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise InputError(f"{path} is damaged ({error}); delete it, and training writes it again.") from error

    def check(self, mask: np.ndarray, classes: ClassSet, name: str, *, named: ClassSet | None = None) -> np.ndarray:
        """Refuses a mask whose labels lie where those of another class order would, and warns of an unusual mask.

        Args:
          mask: uint8 (H, W), class indices of the data set; only its central square counts.
          classes: of the data set.
          name: what the mask was read from, for the message.
          named: the classes from which the mask was converted, if the caller has named them; then it is not refused.

        Returns:
          The mask. Public class sets do not say whether left is the subject's or the viewer's. If the mask was
          converted from another set and its left parts lie where right ones do, left and right are exchanged.

        Raises:
          InputError: the labels are more probable in the order of another class set that is known by name.
        """
        square = central_square(mask)
        other = self.more_probable_order(square, classes) if named is None else None
        if other is not None:
            raise InputError(
                f"{name}: its classes lie where those of {ClassSet.load(other).title} would, not those of "
                f"{classes.title}. Name the classes of the mask with `mask_classes` (classes= in Python): {other}, or "
                f"{classes.known_name or classes.title} if it is right as it is."
            )
        if self.has_exchanged_sides(square, classes):
            if named is not None and named.names != classes.names:
                logger.info("%s: its left is the viewer's; left and right parts are exchanged.", name)
                return classes.exchange_sides(mask)
            logger.warning(
                "%s: its left parts lie where right ones do in the training masks, as in a mirrored mask; left and "
                "right are the subject's.",
                name,
            )
        elif self.is_unusual(square):
            logger.warning("%s: its classes lie where they hardly ever do in the training masks.", name)
        return mask

    def score(self, mask: np.ndarray) -> float:
        """Returns the mean log probability of the labels of a square mask (S, S); ignored pixels do not count."""
        cells = _cells(mask)
        valid = cells < len(self.log_probabilities)
        rows, columns = np.nonzero(valid)
        if not len(rows):
            return 0.0
        return float(self.log_probabilities[cells[rows, columns], rows, columns].mean())

    def more_probable_order(self, mask: np.ndarray, classes: ClassSet) -> str | None:
        """Returns the name of the built-in class set whose order is more probable for a square mask, or None.

        Args:
          mask: uint8 (S, S), class indices.
          classes: classes of the data set, to which the mask is supposed to belong.
        """
        own, best, name = self.score(mask), -np.inf, None
        highest = mask[mask < 255].max(initial=0)
        for other in sorted(known_class_sets(), key=len):  # of equally probable orders the one with fewer classes
            table = other.table_to(classes)
            if other.names == classes.names or highest >= len(other) or table is None:
                continue
            score = self.score(table[mask])
            if score > best:
                best, name = score, other.known_name
        return name if best > own + _OTHER_ORDER_MARGIN else None

    def has_exchanged_sides(self, mask: np.ndarray, classes: ClassSet) -> bool:
        """Whether the left parts of a square mask lie where right parts do, and the right ones where left ones do.

        Args:
          mask: uint8 (S, S), class indices.
          classes: of the mask, those of the data set.
        """
        present = np.isin(np.arange(256, dtype=np.uint8), mask)
        in_pairs = present & present[classes.exchange_sides(np.arange(256, dtype=np.uint8))]  # not one eye of a profile
        rows, columns = np.nonzero((classes.exchange_sides(mask) != mask) & in_pairs[mask])
        if not len(rows):
            return False
        labels, cells = mask[rows, columns], (rows * GRID // len(mask), columns * GRID // len(mask))
        excess = self.log_probabilities[classes.exchange_sides(labels), *cells] - self.log_probabilities[labels, *cells]
        return float(excess.mean()) > _EXCHANGED_MARGIN

    def is_unusual(self, mask: np.ndarray) -> bool:
        """Whether the score of a square mask is well below that of nearly all training masks."""
        return self.score(mask) < self.usual_score - _UNUSUAL_MARGIN


def _cells(mask: np.ndarray) -> np.ndarray:
    return cv2.resize(mask, (GRID, GRID), interpolation=cv2.INTER_NEAREST_EXACT)
