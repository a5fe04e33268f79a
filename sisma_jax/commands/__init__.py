"""What the command line can do, one file per command: each connects parts of the library and reports the result.

A command is a frozen dataclass of its options, which `cli.py` turns into flags, with a method
`run(config, workdir) -> None`.
"""
