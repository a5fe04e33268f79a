"""Runs commands of the command line in this process, on the finished run of the fixture `finished`."""

import pytest

from sisma_jax import cli


def command(finished, *arguments, workdir=None):
    file, folder = finished
    cli.main(["--config", str(file), "--workdir", str(workdir or folder), *map(str, arguments)])


def refused(capsys, finished, *arguments, workdir=None) -> str:
    """Returns what is printed when the command is refused."""
    with pytest.raises(SystemExit) as exit_info:
        command(finished, *arguments, workdir=workdir)
    assert exit_info.value.code == 2
    errors = capsys.readouterr().err
    assert "Traceback" not in errors
    return " ".join(errors.replace("│", " ").split())
