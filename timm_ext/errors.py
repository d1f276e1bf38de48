"""The one exception type for input that the user can mend."""


class InputError(ValueError):
    """Input that cannot be used, told in one line: what it is, what was expected, what came.

    The command line prints the message without a traceback and exits with status 1.
    """
