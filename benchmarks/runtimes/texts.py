"""Texts that are in every Python: pieces of the language reference in its library, one for each topic.

Both sides import this: what compares quantised models, and the worker that calibrates them with other topics.
"""

import re
from pathlib import Path
from pydoc_data.topics import topics

from transformers import AutoTokenizer

IDS = 64  # of each text
TEXTS = 16
SKIPPED = 200  # characters at a topic's beginning, which is a heading


def chosen(part: int) -> list[str]:
    """`TEXTS` of the longest topics; those of parts 0 and 1 are different ones."""
    return sorted(topics, key=lambda name: (-len(topics[name]), name))[part : 2 * TEXTS : 2]


def texts(folder: Path, part: int) -> list[list[int]]:
    """Ids of `TEXTS` texts, `IDS` each, by the tokenizer of a folder."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    whole = [re.sub(r"\s+", " ", topics[name])[SKIPPED:] for name in chosen(part)]
    return [tokenizer(text)["input_ids"][:IDS] for text in whole]
