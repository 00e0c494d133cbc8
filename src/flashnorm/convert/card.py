"""The model card: a conversion adds a section at its end and sets two keys of its front matter; the rest stays.

* A section that an earlier conversion added is not true of the new output, and is replaced.
* The front matter is edited as text: loading and dumping it would drop comments and turn Norwegian (`no`) into `false`.
"""

import re
from typing import Any

import yaml

from flashnorm.format import without_section

TAGS = ("flashnorm", "weightless-rmsnorm")

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


def updated_card(
    card: str | None, *, base_model: str | None, version: str, norms: int, linears: int, summary: str = ""
) -> str:
    """A model card that says what was done to the model.

    Args:
        card: the source's card, None if it has none.
        base_model: the source's hub id, if it is known.
        version: the version of flashnorm.
        norms, linears: how many norm weights were folded into how many weights of linear layers.
        summary: the summary of a verification, in Markdown.
    """
    card = card or "---\n---\n"
    found = _FRONT_MATTER.match(card)
    front, text = (found.group(1), card[found.end() :]) if found else ("", card)
    if (data := _parsed(front)) is not None:
        tags = [*_as_list(data.get("tags")), *TAGS]
        front = _with_key(front, "tags", list(dict.fromkeys(tags)))
        if base_model:
            front = _with_key(front, "base_model", [base_model])
    text = without_section(text).rstrip("\r\n") + "\n\n" if text.strip() else ""
    summary = f"\n{summary}" if summary else ""
    return f"---\n{front}---\n{text}{_section(base_model, version, norms, linears)}{summary}"


def _section(base_model: str | None, version: str, norms: int, linears: int) -> str:
    source = f"`{base_model}`" if base_model else "the source model"
    return f"""# FlashNorm

This is {source} with {norms} norm weights folded into the {linears} weight matrices that read them (FlashNorm,
arXiv:2407.09577). Those norms have no weights any more; every folded weight is the exact product, rounded once.
`config.json` names them (`flashnorm.weightless`), `flashnorm.json` says what went where, with a hash of every file.

```python
import flashnorm

model = flashnorm.load("path/to/this/model")
```

Written by flashnorm {version}.
"""


def _parsed(front: str) -> dict[str, Any] | None:
    """The front matter's keys, None if they cannot be read: the front matter then stays unchanged."""
    try:
        data = yaml.safe_load(front)
    except yaml.YAMLError:
        return None
    return {} if data is None else data if isinstance(data, dict) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _with_key(front: str, key: str, value: list[Any]) -> str:
    """The front matter with one of its keys set, in its place or at the end."""
    entry = yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False)
    pattern = re.compile(rf"^{key}[ \t]*:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
    if pattern.search(front):
        return pattern.sub(lambda _: entry, front, count=1)
    return front + entry
