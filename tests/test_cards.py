"""docs/cards.md has the cards that a conversion writes today."""

import re
from pathlib import Path

import pytest
import torch

import flashnorm
import tiny
from cards import MODELS, PAGE, cards_of, page
from flashnorm.convert.card import updated_card
from flashnorm.version import __version__

CARDS = cards_of(PAGE.read_text())
COUNTS = re.compile(r"with (\d+) norm weights folded into the (\d+) weight matrices")


def parts(card: str) -> tuple[str, str]:
    """What a conversion writes, and the summary of the verification, without its numbers and how far tokens agree."""
    section, mark, summary = card.partition("\n## Verified\n")
    summary = re.sub(r"(near tie of the source): .*", r"\1", summary)
    return section, re.sub(r"[-+]?\d[\d.,e+-]*%?", "N", mark + summary)


@pytest.mark.parametrize(("title", "keep_norms"), [(title, keep) for title, _, _, keep in MODELS])
def test_the_cards_are_what_the_code_writes(title: str, keep_norms: bool) -> None:
    section, _ = parts(CARDS[title])
    (found,) = COUNTS.findall(section)
    norms, linears = map(int, found)
    about = {"base_model": None, "version": __version__, "norms": norms, "linears": linears}
    assert section == updated_card(None, **about, keep_norms=keep_norms, generates=True)


def test_the_page_is_what_its_command_writes() -> None:
    assert list(CARDS) == [title for title, *_ in MODELS]
    assert page(CARDS) == PAGE.read_text()


@pytest.mark.slow
def test_the_summary_is_that_of_a_verification(tmp_path: Path) -> None:
    """A tiny model of the type, with the same sentences; its numbers are others."""
    model = tiny.model(tiny.config("llama", tie_word_embeddings=True), dtype=torch.bfloat16)
    flashnorm.convert(tiny.save(tmp_path / "source", model), tmp_path / "out", verify=True)
    _, expected = parts((tmp_path / "out" / "README.md").read_text())
    assert parts(CARDS[MODELS[0][0]])[1] == expected
