"""Exceptions that are not defects of the program: bad input, and preemption."""

import os
from typing import Any


class InputError(ValueError):
    """Bad user input: the message names the argument or the configuration value that is wrong, and the fix.

    A message names a configuration value by its key (data.num_test). It names any other argument by its name, in
    backticks if the name is also an ordinary word (`region`). The command line turns both into flags, prints the
    message without a traceback, and exits with code 2. Any other exception that reaches the command line is a defect of
    the program and keeps its traceback.
    """


class Preempted(SystemExit):
    """SIGTERM stopped the program, typically because its machine was preempted; the same command resumes.

    The exit code is 75 (EX_TEMPFAIL), which tells a job manager to start the job again.

    Args:
      message: what was saved, in one line for the user.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code: Any = getattr(os, "EX_TEMPFAIL", 75)
        self.message = message
