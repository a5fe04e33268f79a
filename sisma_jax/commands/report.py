"""Output of the commands: lines of text, grids of images, and the folders for them."""

import contextlib
import itertools
from collections.abc import Callable, Iterator

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, to_path
from sisma_jax.parallel.agreement import from_primary, is_primary

GRID_ROWS = 8
_GRID_HEIGHT = 128


def tell(text: str) -> None:
    """Prints a line of `text`, in the first process only."""
    if is_primary():
        print(text)


def grid_scale(size: int) -> int:
    """Returns the integer factor by which a grid enlarges images of `size` pixels, so that small faces are visible."""
    return max(1, _GRID_HEIGHT // size)


@contextlib.contextmanager
def output_folder(
    given: str, parent: AnyPath, is_unfinished: Callable[[AnyPath], bool] = lambda _: False
) -> Iterator[AnyPath]:
    """Creates the folder for a command's results.

    The folder is created before the work in the block starts, so that an unwritable folder is reported early. If the
    block fails and has written nothing, the folder is deleted again, and its parent if it was created. Every process of
    a job must call this.

    Args:
      given: folder that the user named; "" for the first free folder PARENT/0001, PARENT/0002, ...
      parent: folder of the numbered folders.
      is_unfinished: whether the newest numbered folder is that of an interrupted command, which continues there.

    Yields:
      The folder.

    Raises:
      InputError: the folder cannot be created.
    """
    folder = to_path(given) if given else parent / from_primary(lambda: _next_number(parent, is_unfinished))
    absent = [path for path in (folder, folder.parent) if not path.exists()] if is_primary() else []
    if is_primary():
        make_folder(folder)
    try:
        yield folder
    except BaseException:
        if is_primary():
            with contextlib.suppress(OSError):
                for path in absent:
                    path.rmdir()
        raise


def _next_number(parent: AnyPath, is_unfinished: Callable[[AnyPath], bool]) -> str:
    with bucket_errors(parent):
        number = next(number for number in itertools.count(1) if not (parent / f"{number:04d}").exists())
        newest = f"{number - 1:04d}"
        return newest if number > 1 and is_unfinished(parent / newest) else f"{number:04d}"


def make_folder(folder: AnyPath) -> None:
    """Creates a folder for results, and its parents.

    Raises:
      InputError: the folder cannot be created.
    """
    try:
        with bucket_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be created ({error}); name another with `out`.") from error


def require_free(files: list[AnyPath], overwrite: bool) -> None:
    """Checks that files may be written; every process of a job must call this.

    Args:
      files: to be written.
      overwrite: whether existing files may be replaced.

    Raises:
      InputError: one of the files exists, and `overwrite` is false.
    """
    if overwrite:
        return
    for file in files:
        if from_primary(lambda file=file: file.exists()):
            raise InputError(f"{file} exists already; name another folder or file with `out`, or give `overwrite`.")
