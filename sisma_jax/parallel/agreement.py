"""Agreement between the processes of a job: they continue together, or fail together with the same message.

Every process must call each function at the same point of the program. With a single process there is no communication.
"""

import contextlib
import json
from collections.abc import Callable, Iterator
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from sisma_jax.errors import InputError

Value = TypeVar("Value")


def is_primary() -> bool:
    """Returns whether this is the first process, which writes everything that is written once per job."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns the texts of all processes, ordered by process index.

    Args:
      text: of this process; the lengths may differ.
    """
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    # `process_allgather` needs arrays of one length.
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    if not max(lengths):
        return [""] * len(lengths)
    padded = multihost_utils.process_allgather(np.pad(data, (0, max(lengths) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Makes all processes raise if the block raises in one of them.

    If the block raises in several processes, all raise the exception whose type comes first in `kinds`; between equal
    types, that of the first process. The block must not wait for another process, because a process that fails leaves
    the block early.

    Args:
      kinds: exception types with a single message that every process raises, the most informative first. The default is
        InputError.

    Raises:
      Exception: one of `kinds`, with the message of the process that failed. An exception of any other type is a defect
        of the program: the process where it occurred raises it.
      InputError: another process failed with an exception of another type; the message names it.
    """
    kinds = kinds or (InputError,)
    error = None
    try:
        yield
    except Exception as own:
        error = own
        if jax.process_count() == 1:
            raise
    kind = next((i for i, kind in enumerate(kinds) if isinstance(error, kind)), -1)
    outcomes = gather("" if error is None else json.dumps([kind, str(error) if kind >= 0 else repr(error)]))
    failed = [(*json.loads(outcome), process) for process, outcome in enumerate(outcomes) if outcome]
    if not failed:
        return
    first, text, process = min(failed, key=lambda failure: (failure[0], failure[2]))
    if error is not None and (process == jax.process_index() or kind < 0):
        raise error
    raise kinds[first](text) if first >= 0 else InputError(f"Process {process} failed: {text}")


def from_primary(make: Callable[[], Value]) -> Value:
    """Returns in every process what `make` returns in the first process.

    Args:
      make: called in the first process only. Its result must survive a round trip through JSON.

    Raises:
      InputError: `make` raised it.
    """
    if jax.process_count() == 1:
        return make()
    text = ""
    with together():
        if is_primary():
            text = json.dumps(make())
    return json.loads(gather(text)[0])
