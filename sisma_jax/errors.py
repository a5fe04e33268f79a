"""The one exception for input that the user can mend."""


class InputError(ValueError):
    """Bad user input: the message names the thing that is wrong and how to mend it.

    The command line prints the message alone, without a traceback, and exits with code 2. Any other
    exception that reaches the command line is a defect of the program and keeps its traceback.
    """
