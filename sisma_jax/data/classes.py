"""The semantic classes of a data set, as a `ClassSet`, which is part of the configuration.

A JSON file defines a class set. `class_sets/` holds the class sets that are known by name. A user describes the classes
of other data with a file of the same form. A *mask* is an integer array (..., H, W) of indices into `names`.
"""

import dataclasses
import functools
import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from sisma_jax.errors import InputError

_KNOWN = Path(__file__).parent / "class_sets"


def known_names() -> list[str]:
    """Returns the names of the class sets in `class_sets/`, sorted."""
    return sorted(file.stem for file in _KNOWN.glob("*.json"))


@dataclasses.dataclass(frozen=True)
class ClassSet:
    """The names and colours of the classes, the classes that a flip exchanges, and the label without a class.

    Attributes:
      title: name of the class set in messages.
      names: names of the 2 to 255 classes, in the order of their indices. If a mask is stored as one file per part, the
        parts are drawn in this order, and a later part covers an earlier one. The first class covers the rest.
      colors: RGB colour of each class, in 0..255, for visualisation.
      mirrored: pairs of class names that a horizontal flip exchanges. Left and right are the subject's.
      ignored: label of pixels that belong to no class, in len(names)..255. None if every pixel has a class.

    Raises:
      InputError: the values are invalid or inconsistent.
    """

    title: str
    names: tuple[str, ...]
    colors: tuple[tuple[int, int, int], ...]
    mirrored: tuple[tuple[str, str], ...] = ()
    ignored: int | None = None

    def __post_init__(self) -> None:
        # Lists from JSON become tuples, which are hashable.
        for field in ("names", "colors", "mirrored"):
            value = getattr(self, field)
            if not isinstance(value, list | tuple):
                raise InputError(f"classes: {field} must be a list, got {value!r}.")
            object.__setattr__(self, field, tuple(tuple(x) if isinstance(x, list) else x for x in value))
        _check(self.title, self.names, self.colors, self.mirrored, self.ignored)

    @classmethod
    def load(cls, name_or_file: str | os.PathLike[str]) -> "ClassSet":
        """Returns a class set by its name in `class_sets/`, or from a JSON file.

        Args:
          name_or_file: a name, such as "celebamask_hq", or the path of a file on the disk.

        Raises:
          InputError: neither a name nor a file matches, or the file is malformed.
        """
        path = _KNOWN / f"{name_or_file}.json"
        if not path.is_file():
            path = Path(name_or_file).expanduser()
        try:
            values = json.loads(path.read_bytes())
        except FileNotFoundError as error:
            known = ", ".join(known_names())
            raise InputError(f"classes {name_or_file}: there is no such file; known by name: {known}.") from error
        except (OSError, ValueError) as error:
            raise InputError(f"classes {path} cannot be read as JSON ({error}).") from error
        return cls.from_json(values, source=str(path))

    @classmethod
    def from_json(cls, values: object, source: str) -> "ClassSet":
        """Returns the class set that a parsed JSON value describes.

        Args:
          values: a dict whose keys are the attributes; attributes that have defaults may be absent.
          source: where the value comes from, for the error message.

        Raises:
          InputError: `values` is not such a dict, or its values are invalid or inconsistent.
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
        """A hash of 10 hexadecimal digits of names, mirrored pairs and ignored label; not of colours and title."""
        meaning = json.dumps([self.names, self.mirrored, self.ignored])
        return hashlib.sha256(meaning.encode()).hexdigest()[:10]

    @property
    def known_name(self) -> str | None:
        """The name of this class set in `class_sets/`, or None if it is not there."""
        return next((name for name in known_names() if ClassSet.load(name) == self), None)

    @functools.cached_property
    def index(self) -> dict[str, int]:
        """The index of each class, by name."""
        return {name: index for index, name in enumerate(self.names)}

    @functools.cached_property
    def _mirror(self) -> np.ndarray:
        table = np.arange(256, dtype=np.uint8)
        for left, right in self.mirrored:
            table[[self.index[left], self.index[right]]] = self.index[right], self.index[left]
        return table

    @functools.cached_property
    def _palette(self) -> np.ndarray:
        palette = np.full((256, 3), 128, np.uint8)  # grey for the ignored label
        palette[: len(self)] = self.colors
        return palette

    def flip(self, mask: np.ndarray) -> np.ndarray:
        """Returns a mask flipped horizontally, with mirrored classes exchanged.

        Args:
          mask: uint8 (..., H, W).
        """
        return self._mirror[mask[..., ::-1]]

    def exchange_sides(self, mask: np.ndarray) -> np.ndarray:
        """Returns a mask whose mirrored classes are exchanged; every pixel stays where it is.

        Args:
          mask: uint8, of any shape.
        """
        return self._mirror[mask]

    def colorize(self, mask: np.ndarray) -> np.ndarray:
        """Returns the colour of each pixel of a mask, uint8 RGB (..., H, W, 3); the ignored label is grey.

        Args:
          mask: uint8 (..., H, W).
        """
        return self._palette[mask]

    def table_to(self, other: "ClassSet") -> np.ndarray | None:
        """Returns a table, uint8 (256,), from labels of this set to those of another by the names of the classes.

        Values that are no label of this set stay as they are. None if a class of this set has no namesake in the
        other, or its ignored label has no counterpart.
        """
        if not set(self.names) <= set(other.names):
            return None
        table = np.arange(256, dtype=np.uint8)
        table[: len(self)] = [other.index[name] for name in self.names]
        if self.ignored is not None:
            if other.ignored is None:
                return None
            table[self.ignored] = other.ignored
        return table

    def is_label(self, values: np.ndarray) -> np.ndarray:
        """Returns a bool array that is True where an integer array holds a class index or the ignored label.

        Args:
          values: integer array of any shape.
        """
        is_class = (values >= 0) & (values < len(self))
        return is_class if self.ignored is None else is_class | (values == self.ignored)

    def check(self, mask: np.ndarray, source: str) -> np.ndarray:
        """Returns a mask as uint8 if all its values are class indices or the ignored label.

        Args:
          mask: integer array (..., H, W).
          source: where the mask comes from, for the error message.

        Raises:
          InputError: the dtype is not an integer type, or a value is neither a class index nor the ignored label.
        """
        if not np.issubdtype(mask.dtype, np.integer):
            raise InputError(f"{source}: a mask must hold integer class indices, got dtype {mask.dtype}.")
        outside = np.unique(mask[~self.is_label(mask)])
        if outside.size:
            besides = "" if self.ignored is None else f" and not the ignored label {self.ignored}"
            raise InputError(
                f"{source}: label {', '.join(map(str, outside[:5]))} is outside 0..{len(self) - 1}{besides}; "
                f"a mask must hold class indices of {self.title} (0 {self.names[0]} ... {len(self) - 1} "
                f"{self.names[-1]}), not colours or the classes of another data set."
            )
        return mask.astype(np.uint8)


def _check(
    title: object, names: Sequence[object], colors: Sequence[object], mirrored: Sequence[object], ignored: object
) -> None:
    """Raises InputError unless the values, whose types JSON does not ensure, are those of a class set."""
    count = len(names)

    def require(condition: bool, message: str) -> None:
        if not condition:
            raise InputError(f"classes of {title!r}: {message}.")

    require(isinstance(title, str) and bool(title), "title must be a name")
    require(all(isinstance(name, str) and name for name in names), "names must be non-empty strings")
    require(2 <= count <= 255, f"between 2 and 255 classes are possible, got {count}")
    require(len(set(names)) == count, "names must be distinct")
    require(all(map(_is_color, colors)), "a color must be three whole numbers in 0..255")
    require(len(colors) == count, f"there are {len(colors)} colors for {count} names")
    require(len(set(colors)) == count, "colors must be distinct")
    pairs = [pair for pair in mirrored if isinstance(pair, tuple) and len(pair) == 2]
    require(len(pairs) == len(mirrored), "mirrored must hold pairs of names")
    exchanged = [name for pair in pairs for name in pair]
    require(all(name in names for name in exchanged), "mirrored must hold names of classes")
    require(len(set(exchanged)) == len(exchanged), "a class can be mirrored into one other class only")
    is_outside = ignored is None or (type(ignored) is int and count <= ignored <= 255)
    require(is_outside, f"ignored must be null or a label in {count}..255, got {ignored!r}")


def _is_color(color: object) -> bool:
    if not isinstance(color, tuple) or len(color) != 3:
        return False
    return all(type(value) is int and 0 <= value <= 255 for value in color)


def as_classes(classes: ClassSet | str | os.PathLike[str] | None) -> ClassSet | None:
    """Returns the class set that a caller names, by a built-in name, a JSON file or the set itself; None for None.

    Raises:
      InputError: there is no such name or file.
    """
    return classes if classes is None or isinstance(classes, ClassSet) else ClassSet.load(classes)


@functools.cache
def known_class_sets() -> tuple[ClassSet, ...]:
    """Returns the class sets that are known by name, in the order of these names."""
    return tuple(ClassSet.load(file.stem) for file in sorted(_KNOWN.glob("*.json")))


CELEBAMASK_HQ = ClassSet.load("celebamask_hq")
"""The classes of CelebAMask-HQ (Lee et al., arXiv 1907.11922), which are the default."""
