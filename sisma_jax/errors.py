"""What ends a program other than by a defect: input that the user can fix, and being told to make room."""

import os
from typing import Any


class InputError(ValueError):
    """Bad user input: the message names the argument or the configuration value that is wrong, and the fix.

    A configuration value is named by its key (data.num_test), another argument by its name, in backticks where it is
    easily taken for a word (`region`). The command line turns both into flags, prints the message alone, without a
    traceback, and exits with code 2. Any other exception that reaches the command line is a defect of the program and
    keeps its traceback.
    """


class Preempted(SystemExit):
    """The machine is wanted back (SIGTERM); what had to be saved is saved, and the same command resumes.

    Its exit code, 75 or EX_TEMPFAIL, tells a job manager to start the job again.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code: Any = getattr(os, "EX_TEMPFAIL", 75)
        self.message = message
