"""What ends a program other than by a defect: input that the user can mend, and being told to make room."""

import os
from typing import Any


class InputError(ValueError):
    """Bad user input: the message names the thing that is wrong and how to mend it.

    The command line prints the message alone, without a traceback, and exits with code 2. Any other
    exception that reaches the command line is a defect of the program and keeps its traceback.
    """


class Preempted(SystemExit):
    """The machine is wanted back (SIGTERM); what had to be saved is saved, and the same command goes on from there.

    Its exit code, 75 or EX_TEMPFAIL, tells a job manager to start the job again.
    """

    def __init__(self, message: str):
        super().__init__(message)
        self.code: Any = os.EX_TEMPFAIL
        self.message = message
