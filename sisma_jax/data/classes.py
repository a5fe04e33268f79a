"""The semantic classes of a data set: `ClassSet`, one value that travels with the configuration.

A class set is a JSON file of names and colours. `class_sets/` holds those that are known by name; any other file of the
same form describes the classes of a user's own data. A *mask* is an integer array (..., H, W) of indices into `names`.
"""

import dataclasses
import functools
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from sisma_jax.errors import InputError

_KNOWN = Path(__file__).parent / "class_sets"


@dataclasses.dataclass(frozen=True)
class ClassSet:
    """Names and colours of the classes, and what a mirror image and a loss need to know about them.

    Attributes:
      title: what messages call the set.
      names: of the classes, in the order of their indices. Masks that come as one file per part are painted in this
        order, each part over those before it; the first class is where no part is.
      colors: RGB in 0..255 of each class, for visualisation.
      mirrored: pairs of classes that a horizontal flip exchanges (left and right are the subject's own).
      ignored: label of pixels that belong to no class, outside the range of indices; None if every pixel has a class.

    Raises:
      InputError: the values contradict one another.
    """

    title: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    mirrored: tuple[tuple[str, str], ...] = ()
    ignored: int | None = None

    def __post_init__(self) -> None:
        # JSON has lists where this has tuples, which are hashable.
        for field in ("names", "colors", "mirrored"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise InputError(f"classes: {field} must be a list, got {value!r}.")
            object.__setattr__(self, field, tuple(tuple(x) if isinstance(x, list) else x for x in value))
        self._check()

    def _check(self) -> None:
        count = len(self.names)

        def require(condition: bool, message: str) -> None:
            if not condition:
                raise InputError(f"classes of {self.title!r}: {message}.")

        require(isinstance(self.title, str) and bool(self.title), "title must be a name")
        require(all(isinstance(name, str) and name for name in self.names), "names must be non-empty strings")
        require(2 <= count <= 255, f"between 2 and 255 classes are possible, got {count}")
        require(len(set(self.names)) == count, "names must be distinct")
        require(all(map(_is_color, self.colors)), "a color must be three whole numbers in 0..255")
        require(len(self.colors) == count, f"there are {len(self.colors)} colors for {count} names")
        require(len(set(self.colors)) == count, "colors must be distinct")
        is_pair = [isinstance(pair, tuple) and len(pair) == 2 for pair in self.mirrored]
        require(all(is_pair), "mirrored must hold pairs of names")
        mirrored = [name for pair in self.mirrored for name in pair]
        require(all(name in self.names for name in mirrored), "mirrored must hold names of classes")
        require(len(set(mirrored)) == len(mirrored), "a class can be mirrored into one other class only")
        is_outside = self.ignored is None or (type(self.ignored) is int and count <= self.ignored <= 255)
        require(is_outside, f"ignored must be null or a label in {count}..255, got {self.ignored!r}")

    @classmethod
    def load(cls, name_or_file: str | os.PathLike) -> "ClassSet":
        """Returns the class set of a name in `class_sets/`, or of a JSON file.

        Raises:
          InputError: there is neither such a name nor such a file, or the file is malformed.
        """
        path = _KNOWN / f"{name_or_file}.json"
        if not path.is_file():
            path = Path(name_or_file).expanduser()
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            known = ", ".join(sorted(file.stem for file in _KNOWN.glob("*.json")))
            raise InputError(f"classes {name_or_file}: there is no such file; known by name: {known}.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"classes {path} cannot be read as JSON ({error}).") from error
        return cls.from_json(values, source=str(path))

    @classmethod
    def from_json(cls, values: Any, source: str) -> "ClassSet":
        """Returns the class set of a parsed JSON object, whose keys are the attributes.

        Raises:
          InputError: a key is missing or unknown, or the values contradict one another.
        """
        fields = dataclasses.fields(cls)
        required = {field.name for field in fields if field.default is dataclasses.MISSING}
        if not isinstance(values, dict) or not required <= set(values) <= {field.name for field in fields}:
            keys = ", ".join(field.name for field in fields)
            raise InputError(f"{source}: a class set is a JSON object with {keys}.")
        try:
            return cls(**values)
        except InputError as error:
            raise InputError(f"{source}: {error}") from error

    def __len__(self) -> int:
        return len(self.names)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of all that decides what a label means, which colours and the title do not."""
        meaning = json.dumps([self.names, self.mirrored, self.ignored])
        return hashlib.sha256(meaning.encode()).hexdigest()[:10]

    @property
    def known_name(self) -> str | None:
        """The name by which the program knows this class set, if it does."""
        return next((file.stem for file in sorted(_KNOWN.glob("*.json")) if ClassSet.load(file.stem) == self), None)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """The index of each name."""
        return {name: index for index, name in enumerate(self.names)}

    @functools.cached_property
    def _mirror(self) -> np.ndarray:
        table = np.arange(256, dtype=np.uint8)
        for left, right in self.mirrored:
            table[[self.index[left], self.index[right]]] = self.index[right], self.index[left]
        return table

    @functools.cached_property
    def _palette(self) -> np.ndarray:
        palette = np.full((256, 3), 128, np.uint8)  # the ignored label
        palette[: len(self)] = self.colors
        return palette

    def flip(self, mask: np.ndarray) -> np.ndarray:
        """Mirrors a uint8 mask (..., H, W) about the vertical axis and exchanges mirrored classes."""
        return self._mirror[mask[..., ::-1]]

    def colorize(self, mask: np.ndarray) -> np.ndarray:
        """Returns a mask (..., H, W) in the classes' colours: uint8 RGB, (..., H, W, 3); ignored pixels are grey."""
        return self._palette[mask]

    def is_label(self, values: np.ndarray) -> np.ndarray:
        """Returns, for each integer of an array, whether it is a class index or the ignored label."""
        is_class = (values >= 0) & (values < len(self))
        return is_class if self.ignored is None else is_class | (values == self.ignored)

    def check(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Returns `mask` as uint8 after checking that every value is a class index or the ignored label.

        Args:
          mask: integer array (..., H, W).
          source: what the mask was read from, for the message.

        Raises:
          InputError: the array is not integer-valued, or holds a value that is no label.
        """
        if not np.issubdtype(mask.dtype, np.integer):
            raise InputError(f"{source}: a mask holds integer class indices, got dtype {mask.dtype}.")
        outside = np.unique(mask[~self.is_label(mask)])
        if outside.size:
            besides = "" if self.ignored is None else f" and not the ignored label {self.ignored}"
            raise InputError(
                f"{source}: label {', '.join(map(str, outside[:5]))} is outside 0..{len(self) - 1}{besides}; "
                f"a mask holds class indices of {self.title} (0 {self.names[0]} ... {len(self) - 1} {self.names[-1]}), "
                "not colours or another data set's classes."
            )
        return mask.astype(np.uint8)


def _is_color(color: Any) -> bool:
    is_triple = isinstance(color, tuple) and len(color) == 3
    return is_triple and all(type(value) is int and 0 <= value <= 255 for value in color)


CELEBAMASK_HQ = ClassSet.load("celebamask_hq")
"""The classes of CelebAMask-HQ (Lee et al., arXiv 1907.11922), the default."""
