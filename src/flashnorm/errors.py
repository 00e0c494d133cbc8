"""The errors that FlashNorm raises on purpose: unusable input, and a conversion that is not the same model."""

from typing import Any


class InputError(Exception):
    """Unusable input. The message says what was expected, what was found, in which file, and what to do.

    The command line prints the message alone and exits with status 2.
    """


class DifferenceError(Exception):
    """A conversion was verified before it was published and is not the same model. Nothing was published.

    Attributes:
        report: the `VerifyReport`, which says what was compared and what is wrong.
    """

    def __init__(self, verdict: str, report: Any) -> None:
        super().__init__(verdict)
        self.report = report


def brief(error: Exception) -> str:
    """Another library's message on one line, cut to 300 characters, to put at the end of a message."""
    words = " ".join(str(error).split())
    return words if len(words) <= 300 else words[:297] + "..."
