"""What goes wrong: the input cannot be used, and here is what to do about it; or a result is not what it must be."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flashnorm.verify.report import VerifyReport


class InputError(Exception):
    """Unusable input. Its message says what was expected, what was found, in which file, and what to do.

    The command line prints the message alone and exits with status 2.
    """


class DifferenceError(Exception):
    """A conversion that was verified before it was published, and is not the same model. Nothing was published.

    Attributes:
        report: what was compared, and what is wrong.
    """

    def __init__(self, report: "VerifyReport") -> None:
        super().__init__(report.verdict)
        self.report = report


def brief(error: Exception, limit: int = 300) -> str:
    """Another library's message on one line, at most `limit` characters of it, for the end of ours."""
    words = " ".join(str(error).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."
