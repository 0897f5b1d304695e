"""Errors that end with a one-line message for the user, and text that is safe to print."""

from typing import TypeVar

T = TypeVar("T")


def printable(text: str) -> str:
    """`text` with control characters in the notation of Python, such as \\x1b.

    Names come from files and folders of others, and a terminal obeys what it is sent.
    """
    return "".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in text)


class InputError(ValueError):
    """A mistake in the configuration, the command line or the files that they name.

    The text has the form `key=value is not allowed: it must be <allowed>`, or, with a problem,
    `key=value <problem>: <allowed>`. The command line prints it without a traceback.

    Parameters
    ----------
    key
        The full key, or whatever else is at fault, such as a file.
    value
        The given value; omitted if there is none.
    allowed
        The allowed values, or what to do.
    problem
        What is wrong, if it is not the value itself.
    """

    def __init__(self, key: str, value: object = ..., allowed: str = "", problem: str = "") -> None:
        # Arguments of an exception are pickled with it, for other processes.
        super().__init__(key, value, allowed, problem)
        self.key, self.value, self.allowed, self.problem = key, value, allowed, problem

    def __str__(self) -> str:
        return printable(self._text())

    def _text(self) -> str:
        subject = self.key if self.value is ... else f"{self.key}={self.value}"
        if self.problem:
            return f"{subject} {self.problem}" + (f": {self.allowed}" if self.allowed else "")
        return f"{subject} is not allowed: it must be {self.allowed}" if self.allowed else subject

    def under(self, prefix: str) -> "InputError":
        """The same error, with the key inside the section `prefix`."""
        return self.of(f"{prefix}.{self.key}" if prefix else self.key)

    def of(self, key: str) -> "InputError":
        """The same error, with another key."""
        return InputError(key, self.value, self.allowed, self.problem)


def returned(method: str, value: object, kind: type[T]) -> T:
    """`value`, which a component's `method` has returned, such as `dataset.info`.

    Raises
    ------
    InputError
        If it is of another type than `kind`.
    """
    if not isinstance(value, kind):
        problem = f"returns a value of type {type(value).__name__}"
        raise InputError(method, allowed=f"it must be one of {kind.__name__}", problem=problem)
    return value


class IdentityWarning(UserWarning):
    """Files of a run are read although nothing shows that they belong together."""


class NonFiniteLossError(ArithmeticError):
    """The training loss became NaN or infinite; the message has the epoch and batch."""


class JobError(RuntimeError):
    """A job of a sweep, or its launcher, failed in another process; only its message is known."""


class ProcessLostError(RuntimeError):
    """Another process of the run has ended, or does not answer."""
