"""What a configuration section is made of: fields that state their range, and values that are checked on creation."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """The interval of numbers that a field accepts, such as [0, 1) for `Range(0, 1, high_is_open=True)`."""

    low: float = -math.inf
    high: float = math.inf
    high_is_open: bool = False
    low_is_open: bool = False

    def __contains__(self, value: float) -> bool:
        above = value > self.low if self.low_is_open else value >= self.low
        return above and (value < self.high if self.high_is_open else value <= self.high)

    def __str__(self) -> str:
        if self.high == math.inf:
            if self.low == 0:
                return "positive" if self.low_is_open else "non-negative"
            return "positive" if self.low == 1 else f"{self.low} or more"
        return f"in {'(' if self.low_is_open else '['}{self.low}, {self.high}{')' if self.high_is_open else ']'}"


# Ranges that several fields share. In addition, every float must be finite.
ANY = Range()
COUNT = Range(low=1)
NON_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, low_is_open=True)
DECAY = Range(low=0, high=1, high_is_open=True)
FRACTION = Range(low=0, high=1)
SEED = Range(low=0, high=2**32 - 1)


def value(default: Any, within: Range = ANY, *, may_change: bool = False) -> Any:
    """Returns a dataclass field of a section.

    Args:
      default: its default value.
      within: the range of a number, or of each number in a tuple.
      may_change: whether a run may resume with another value. True for values that affect how the run is carried out,
        for example its length or where its files are. False for values that define what its checkpoints mean.
    """
    return dataclasses.field(default=default, metadata={"within": within, "may_change": may_change})


@dataclasses.dataclass(frozen=True)
class Section:
    """A section of the configuration, which checks the type and the range of every value when it is created.

    NumPy scalars become Python scalars, and lists become tuples.

    Attributes:
      section: name of the section in `Config`.

    Raises:
      InputError: a value has the wrong type or is out of range, or the values contradict each other.
    """

    section: ClassVar[str]

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self))
        for field in dataclasses.fields(self):
            given, hint = getattr(self, field.name), hints[field.name]
            plain = _plain(given, hint)
            if plain is not given:
                object.__setattr__(self, field.name, plain)
            self._check_type(field.name, hint)
            within = field.metadata.get("within", ANY)
            numbers = [x for x in (plain if isinstance(plain, tuple) else [plain]) if type(x) in (int, float)]
            self._require(all(map(math.isfinite, numbers)), field.name, "finite")
            each = "numbers that are each " if isinstance(plain, tuple) else ""
            self._require(all(x in within for x in numbers), field.name, f"{each}{within}")
        self._check()

    def _check_type(self, name: str, hint: Any) -> None:
        value = getattr(self, name)
        if get_origin(hint) is Literal:
            self._require(value in get_args(hint), name, f"one of {', '.join(map(repr, get_args(hint)))}")
        elif get_origin(hint) is tuple:
            is_right = isinstance(value, tuple) and all(type(x) is get_args(hint)[0] for x in value)
            self._require(is_right, name, f"a tuple of {get_args(hint)[0].__name__}")
        else:
            accepted = (int, float) if hint is float else hint
            is_right = isinstance(value, accepted) and (hint is bool or not isinstance(value, bool))
            self._require(is_right, name, f"of type {hint.__name__}")

    def _check(self) -> None:
        """Raises InputError for values that are each in range but contradict each other."""

    def _require(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(f"{self.section}.{name} must be {wanted}, got {getattr(self, name)!r}.")


def _plain(value: Any, hint: Any) -> Any:
    """Returns a value in the schema's form: Python scalars for NumPy scalars, tuples and `ClassSet` for JSON values."""
    if isinstance(value, np.generic):
        return value.item()
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(x.item() if isinstance(x, np.generic) else x for x in value)
    if hint is ClassSet and isinstance(value, dict):
        return ClassSet.from_json(value, "data.classes")
    return value
