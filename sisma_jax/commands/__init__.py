"""The commands of the command line, one file each. A command connects parts of the library and reports the result.

A command is a frozen dataclass with a method `run(config, workdir) -> None`. Its fields are the command's options,
which `cli.py` turns into flags. The docstrings of the class and of its fields are the help text of the
command.
"""
