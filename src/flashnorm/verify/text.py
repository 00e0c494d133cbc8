"""The default text on which outputs are compared: plain English, written for this purpose, about 400 tokens.

* It has facts, dialogue, numbers and a little code, so that both certain and uncertain predictions occur.
"""

from pathlib import Path

from flashnorm.errors import InputError
from flashnorm.files.source_files import open_file

DEFAULT_TEXT = """\
The lighthouse on the northern point was built in 1874, after two ships had been lost on the rocks in a single winter. \
For ninety years a keeper lived there with his family. He wound the clockwork every four hours, trimmed the wick, and \
wrote the weather into a large green book. Today the lamp is electric and nobody lives on the point, but the book is \
kept in the library of the town, and children are sometimes taken to see it.

"Why did he write down the weather every day?" a girl asked once.

"Because it was his duty," the librarian said, "and because he was alone. A man who writes is talking to somebody."

Water boils at 100 degrees Celsius at sea level. On a mountain of three thousand metres it boils at about 90 degrees, \
since the pressure of the air is lower there. This is why potatoes take longer to cook in a hut near the summit, and \
why a pressure cooker, which does the opposite, saves both time and fuel.

To find the largest number in a list, go through it once and remember the largest that you have seen so far:

def largest(numbers):
    best = numbers[0]
    for number in numbers:
        if number > best:
            best = number
    return best

A letter came on Thursday. It had been posted in Lisbon three weeks before, it was addressed in pencil, and it had no \
sender. Inside there was a photograph of a house with a blue door and, on the back of it, a single sentence: the key \
is where you left it. My grandmother looked at the picture for a long time. Then she put on her coat, although it was \
warm outside, and asked me to drive her to the station.

There are seven days in a week, twelve months in a year and sixty minutes in an hour. If a train leaves at a quarter \
past nine and the journey takes two hours and fifty minutes, it arrives at five minutes past twelve.
"""


def read_text(path: Path) -> str:
    """The text of a file in UTF-8. Raises `InputError` if it cannot be read."""
    try:
        with open_file(path) as file:
            return file.read().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: expected a text file in UTF-8, cannot read it ({error})") from error
