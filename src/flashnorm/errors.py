"""The one exception that means: the input cannot be used, and here is what to do about it."""


class InputError(Exception):
    """Unusable input. Its message says what was expected, what was found, in which file, and what to do.

    The command line prints the message alone and exits with status 2.
    """


def brief(error: Exception, limit: int = 300) -> str:
    """Another library's message on one line, at most `limit` characters of it, for the end of ours."""
    words = " ".join(str(error).split())
    return words if len(words) <= limit else words[: limit - 3] + "..."
