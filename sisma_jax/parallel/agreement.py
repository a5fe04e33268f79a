"""What the processes of one job have to agree on: they continue together, or fail together with the same message.

Every function is to be called by every process, at the same place of the program; with one process each is free.
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
    """Whether this is the process that writes what is written once."""
    return jax.process_index() == 0


def gather(text: str) -> list[str]:
    """Returns the text of every process, in the order of the processes."""
    if jax.process_count() == 1:
        return [text]
    data = np.frombuffer(text.encode(), np.uint8)
    # Arrays of different lengths cannot be gathered.
    lengths = multihost_utils.process_allgather(np.int32(len(data)))
    if not max(lengths):
        return [""] * len(lengths)
    padded = multihost_utils.process_allgather(np.pad(data, (0, max(lengths) - len(data))))
    return [bytes(row[:length]).decode() for row, length in zip(padded, lengths, strict=True)]


@contextlib.contextmanager
def together(*kinds: type[Exception]) -> Iterator[None]:
    """Raises in every process what the block raises in one; of several the most telling, of equals the first.

    The block must not wait for other processes, as the one that fails does not come that far.

    Args:
      kinds: exceptions with one text that are raised as they are, the most telling first; by default InputError. Others
        are defects of the program: the process that has one raises it, the others an InputError that names it.
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
    if process == jax.process_index() or (error is not None and kind < 0):
        raise error
    raise kinds[first](text) if first >= 0 else InputError(f"Process {process} failed: {text}")


def from_primary(make: Callable[[], Value]) -> Value:
    """Returns what `make` returns in the first process, which alone calls it; JSON has to hold it.

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
