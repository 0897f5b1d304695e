"""What a user did wrong, said in a line."""


class InputError(ValueError):
    """A mistake in the configuration, the command line or the files that they name.

    The message names the key, its value and what is allowed. The command line prints it without a
    traceback; everything else that is raised is a defect of the program.
    """


class NonFiniteLossError(ArithmeticError):
    """The training loss became NaN or infinite; the message says when."""


class JobError(RuntimeError):
    """A job of a sweep, or what runs the jobs, has failed elsewhere; the message is all of it."""


class ProcessLostError(RuntimeError):
    """A process that takes part in the run has ended, or does not answer."""
