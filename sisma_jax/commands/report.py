"""What commands tell people: lines of text, grids of images, and the folders that these go to."""

import contextlib
import itertools
from collections.abc import Iterator

from sisma_jax.errors import InputError
from sisma_jax.files import AnyPath, bucket_errors, to_path
from sisma_jax.parallel.agreement import from_primary, is_primary

GRID_ROWS = 8
_GRID_HEIGHT = 128


def tell(text: str) -> None:
    """Prints a line, once per job."""
    if is_primary():
        print(text)


def grid_scale(size: int) -> int:
    """Returns the factor by which a grid enlarges images of this size, so that small faces can be seen."""
    return max(1, _GRID_HEIGHT // size)


@contextlib.contextmanager
def output_folder(given: str, parent: AnyPath) -> Iterator[AnyPath]:
    """Gives the folder that was asked for, or else PARENT/0001, or the next number that is free.

    It is made at once, so that a folder that cannot be written ends the command before its work starts, and removed
    again if the work fails and left nothing in it.

    Raises:
      InputError: the folder cannot be made.
    """
    folder = to_path(given) if given else parent / from_primary(lambda: _next_number(parent))
    existed = from_primary(lambda: folder.exists())
    if is_primary():
        make_folder(folder)
    try:
        yield folder
    except BaseException:
        if is_primary() and not existed:
            with contextlib.suppress(OSError):
                folder.rmdir()
        raise


def _next_number(parent: AnyPath) -> str:
    with bucket_errors(parent):
        return next(name for number in itertools.count(1) if not (parent / (name := f"{number:04d}")).exists())


def make_folder(folder: AnyPath) -> None:
    """Makes a folder for results. Raises InputError if it cannot be made."""
    try:
        with bucket_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be made ({error}); name another with `out`.") from error


def require_free(files: list[AnyPath], overwrite: bool) -> None:
    """Raises InputError if one of the files exists, unless it is to be overwritten."""
    if overwrite:
        return
    for file in files:
        if from_primary(lambda file=file: file.exists()):
            raise InputError(f"{file} exists already; name another folder or file with `out`, or give `overwrite`.")
