"""What a user did wrong, said in a line."""


class InputError(ValueError):
    """A mistake in the configuration, the command line or the files that they name.

    Its text is made here, of its fields: `key=value is not allowed: it must be allowed`, or, with a
    problem, `key=value problem: allowed`. The command line prints it without a traceback;
    everything else that is raised is a defect of the program.

    Parameters
    ----------
    key
        The full key, or whatever else is at fault, such as a file.
    value
        What was given for it; left out where nothing was.
    allowed
        What is allowed, or what to do.
    problem
        What is wrong, where it is something else than the value.
    """

    def __init__(self, key: str, value: object = ..., allowed: str = "", problem: str = "") -> None:
        # As the arguments of the exception they survive the way to another process.
        super().__init__(key, value, allowed, problem)
        self.key, self.value, self.allowed, self.problem = key, value, allowed, problem

    def __str__(self) -> str:
        subject = self.key if self.value is ... else f"{self.key}={self.value}"
        if self.problem:
            return f"{subject} {self.problem}" + (f": {self.allowed}" if self.allowed else "")
        return f"{subject} is not allowed: it must be {self.allowed}" if self.allowed else subject

    def under(self, prefix: str) -> "InputError":
        """The same mistake, of a key that stands below `prefix`."""
        return self.of(f"{prefix}.{self.key}" if prefix else self.key)

    def of(self, key: str) -> "InputError":
        """The same mistake, by another key."""
        return InputError(key, self.value, self.allowed, self.problem)


class NonFiniteLossError(ArithmeticError):
    """The training loss became NaN or infinite; the message says when."""


class JobError(RuntimeError):
    """A job of a sweep, or what runs the jobs, has failed elsewhere; the message is all of it."""


class ProcessLostError(RuntimeError):
    """A process that takes part in the run has ended, or does not answer."""
