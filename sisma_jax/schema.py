"""The parts of a configuration section: fields that state their range, values that are checked when they are made."""

import dataclasses
import math
from typing import Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import numpy as np

from sisma_jax.data.classes import ClassSet
from sisma_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that a field takes; a bound belongs to them unless it is open."""

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


# Ranges that many fields have. Every float is finite besides.
ANY = Range()
COUNT = Range(low=1)
NON_NEGATIVE = Range(low=0)
POSITIVE = Range(low=0, low_is_open=True)
DECAY = Range(low=0, high=1, high_is_open=True)
FRACTION = Range(low=0, high=1)
SEED = Range(low=0, high=2**32 - 1)


def value(default: Any, within: Range = ANY, *, may_change: bool = False) -> Any:
    """Returns a field of a section.

    Args:
      within: range of a number, or of each number of a tuple.
      may_change: whether a run may be resumed with another value: one that changes how long the run takes or what is
        made of it, never what its checkpoints mean.
    """
    return dataclasses.field(default=default, metadata={"within": within, "may_change": may_change})


class Section:
    """A part of the configuration: every value is of its field's type and range, or the section is not made."""

    section: ClassVar[str]
    """Its name in `Config`."""

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
        """Raises InputError for values that are in range each, but make no sense together."""

    def _require(self, condition: bool, name: str, wanted: str) -> None:
        if not condition:
            raise InputError(f"{self.section}.{name} must be {wanted}, got {getattr(self, name)!r}.")


def _plain(value: Any, hint: Any) -> Any:
    """Returns the value in the form of the schema: Python scalars for NumPy's, tuples and classes for JSON's."""
    if isinstance(value, np.generic):
        return value.item()
    if get_origin(hint) is tuple and isinstance(value, list | tuple):
        return tuple(x.item() if isinstance(x, np.generic) else x for x in value)
    if hint is ClassSet and isinstance(value, dict):
        return ClassSet.from_json(value, "data.classes")
    return value
