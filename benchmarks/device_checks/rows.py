"""What a check reports, and the tables of a report."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

from benchmarks import measure

Status = Literal["pass", "FAIL", "measured", "skipped"]
"""pass and FAIL are judged by a stated tolerance; measured is a number without a judgement; skipped was not run."""

Section = Literal["environment", "correctness", "timings", "training"]

COLUMNS: dict[Section, tuple[str, ...]] = {
    "environment": ("value",),
    "correctness": ("implementation", "dtype", "error", "tolerance", "worst"),
    "timings": ("candidate", "ms", "quartiles", "temp MiB", "roofline", "bound", "/associative", "/attention"),
    "training": ("value",),
}
"""The columns of each section's table between the name of the check and its status."""

TEXT_COLUMNS = ("value", "implementation", "dtype", "worst", "candidate", "bound", "status", "note")
"""The columns of the tables that are left-aligned."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a report.

    Attributes:
      name: of what was checked.
      status: see `Status`.
      cells: text by column of the section; columns without an entry show "-".
      note: the reason of a failure or of a skip, or a remark.
      record: JSON-ready numbers.
    """

    name: str
    status: Status
    cells: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""
    record: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def to_json(self, section: Section) -> dict[str, Any]:
        """Returns the JSON record of the row.

        Args:
          section: to which the row belongs.
        """
        head = {"section": section, "name": self.name, "status": self.status, "note": self.note}
        return head | {"cells": dict(self.cells)} | dict(self.record)


@dataclasses.dataclass(frozen=True)
class Check:
    """One check.

    Attributes:
      section: of the report.
      name: for messages, and the row's name if the check is skipped or raises.
      run: returns the rows.
    """

    section: Section
    name: str
    run: Callable[[], Iterable[Row]]


def reason(error: BaseException, limit: int = 160) -> str:
    """Returns the type and the first line of an error.

    Args:
      error: the error.
      limit: of the number of characters.
    """
    lines = str(error).strip().splitlines()
    text = f"{type(error).__name__}: {lines[0] if lines else ''}"
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def print_tables(rows: Sequence[tuple[Section, Row]]) -> None:
    """Prints one aligned table per section.

    Args:
      rows: of all sections, in the order in which they were computed.
    """
    for section, columns in COLUMNS.items():
        lines = [
            [row.name, *(row.cells.get(column, "-") for column in columns), row.status, row.note]
            for owner, row in rows
            if owner == section
        ]
        if lines:
            measure.print_table(section, ["", *columns, "status", "note"], lines, left=TEXT_COLUMNS)
