"""Model cards as `flashnorm convert --verify` writes them, of the two real models; writes docs/cards.md.

PYTHONPATH=examples python benchmarks/cards.py [--folder DIR]
"""

import argparse
import re
import tempfile
from pathlib import Path

import gemma3
import smollm2

import flashnorm

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cards.md"
HEAD = """\
# Model cards

`flashnorm convert MODEL OUT --verify --push-to-hub OWNER/NAME` converts, verifies and publishes a model in one command.
The card of the new repository is the source's card with a section at its end, and with `tags` and `base_model` in its
front matter. These are the cards of our two real models. Their sources have no card and no hub id, as they come out of
packages; a source of the hub stands in `base_model` and in the first sentence. `make cards` writes this page.
"""
# Title, how the source is built, its folder's name, and whether the folded norms stay in the files.
MODELS = [
    ("SmolLM2-135M, weightless", smollm2.build, "smollm2-135m", False),
    ("Gemma 3 270M, with `--keep-norms`", gemma3.build, "gemma3-270m", True),
]


def page(cards: dict[str, str]) -> str:
    """The page of some cards, by their titles. Four backticks, as a card has blocks of three."""
    return "\n".join([HEAD, *(f"## {title}\n\n````markdown\n{card.rstrip()}\n````\n" for title, card in cards.items())])


def cards_of(text: str) -> dict[str, str]:
    """Title -> card, of a page."""
    return dict(re.findall(r"^## ([^\n]*)\n\n````markdown\n(.*?\n)````$", text, re.DOTALL | re.MULTILINE))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the models are, or are made")
    home, cards = parser.parse_args().folder, {}
    home.mkdir(exist_ok=True)
    for title, build, name, keep_norms in MODELS:
        source = build(home / name)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            flashnorm.convert(source, Path(scratch) / "out", keep_norms=keep_norms, verify=True)
            cards[title] = (Path(scratch) / "out" / "README.md").read_text()
        print(f"{title}: {len(cards[title].splitlines())} lines", flush=True)
    PAGE.write_text(page(cards))


if __name__ == "__main__":
    main()
