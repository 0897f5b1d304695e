"""Errors of users, as fields and as text."""

import pickle

import pytest

from robusttrain.errors import InputError, printable


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (InputError("eps", -1, "0 or more"), "eps=-1 is not allowed: it must be 0 or more"),
        (InputError("probe", None, "an attack"), "probe=None is not allowed: it must be an attack"),
        (InputError("run", "x", "name one", "is not there"), "run=x is not there: name one"),
        (InputError("noise", allowed="ask", problem="is odd"), "noise is odd: ask"),
        (InputError("a.csv", problem="lacks a column"), "a.csv lacks a column"),
        (InputError("two runs are needed"), "two runs are needed"),
    ],
)
def test_the_text_is_made_of_the_fields(error: InputError, text: str) -> None:
    assert str(error) == text


def test_a_key_is_put_below_another_or_replaced() -> None:
    error = InputError("eps", -1, "0 or more")
    assert str(error.under("attack")).startswith("attack.eps=-1 is not allowed")
    assert str(error.under("")) == str(error)
    assert str(error.of("radius")).startswith("radius=-1 is not allowed")


def test_its_fields_survive_pickling() -> None:
    error = InputError("run", 3, "name one", "is not there")
    copied = pickle.loads(pickle.dumps(error))
    assert vars(copied) == vars(error)
    assert str(copied) == str(error)
    left_out = pickle.loads(pickle.dumps(InputError("noise", problem="is odd")))
    assert str(left_out) == "noise is odd"


def test_a_terminal_is_sent_no_control_characters() -> None:
    """They come in names, of folders for instance, and could hide or forge what is printed."""
    error = InputError("dataset.path", "a\x1b[2J\rb\x07\u202e", "none", "has\x9b bad names")
    assert str(error) == r"dataset.path=a\x1b[2J\rb\x07\u202e has\x9b bad names: none"
    assert printable("tab\tand line\nand ä stay") == "tab\tand line\nand ä stay"
