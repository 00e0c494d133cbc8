"""Keys and sections of a FlashNorm folder: what is written is read again, and other rooms use the same names."""

from typing import Any

import pytest

from flashnorm import InputError
from flashnorm.compat.generation import INDIFFERENT_SETTINGS
from flashnorm.convert.card import updated_card
from flashnorm.format import (
    CONFIG_FLAGS,
    CONFIG_KEY,
    VERIFIED_BEGIN,
    VERIFIED_END,
    config_keys,
    is_marked,
    listed_cancelled,
    listed_centred,
    listed_norms,
    without_section,
)
from flashnorm.plan import Cancelled, Centred, Ending, Form, Writer

NORMS = ["layers.0.norm.weight", "norm.weight"]
CENTRED = Centred(("layers.0.norm",), (Writer("embed.weight", 1),))
CANCELLED = Cancelled(Form.EXACT, {"layers.0.norm": (Ending("layers.0.q_norm", 2.0, (0, 1)),)})


@pytest.mark.parametrize("centred", [Centred(), CENTRED])
@pytest.mark.parametrize("cancelled", [Cancelled(), CANCELLED])
def test_a_config_says_what_was_written_into_it(centred: Centred, cancelled: Cancelled) -> None:
    config = config_keys(NORMS, centred, cancelled)
    assert is_marked(config)
    assert all(config[flag] is True for flag in CONFIG_FLAGS)
    assert listed_norms(config, "config.json") == NORMS
    assert listed_centred(config, "config.json") == centred
    assert listed_cancelled(config, "config.json") == cancelled


@pytest.mark.parametrize("config", [{}, {CONFIG_KEY: None}, {CONFIG_KEY: True}])
def test_a_config_that_lists_nothing(config: dict[str, Any]) -> None:
    assert listed_norms(config, "config.json") is None
    assert listed_centred(config, "config.json") == Centred()
    assert listed_cancelled(config, "config.json") == Cancelled()


@pytest.mark.parametrize("read", [listed_norms, listed_centred, listed_cancelled])
@pytest.mark.parametrize("entry", [False, "yes", [], {}, {"version": 1}, {"version": 4, "weightless": []}])
def test_a_key_that_is_not_ours(read: Any, entry: Any) -> None:
    with pytest.raises(InputError, match=r"^config\.json: expected .*flashnorm"):
        read({CONFIG_KEY: entry}, "config.json")


@pytest.mark.parametrize(
    ("read", "key", "entry"),
    [
        (listed_centred, "centred", []),
        (listed_centred, "centred", {"norms": [1], "writers": {}}),
        (listed_centred, "centred", {"norms": [], "writers": {"a": "1"}}),
        (listed_cancelled, "cancelled", []),
        (listed_cancelled, "cancelled", {"form": "exact"}),
        (listed_cancelled, "cancelled", {"form": "half", "norms": {}}),
        (listed_cancelled, "cancelled", {"form": "drop", "norms": {"a": 1}}),
    ],
)
def test_other_content_under_the_key(read: Any, key: str, entry: Any) -> None:
    config = config_keys(NORMS)
    config[CONFIG_KEY][key] = entry
    with pytest.raises(InputError, match=rf"^config\.json: expected flashnorm\.{key} to list"):
        read(config, "config.json")


def test_a_section_is_found_again() -> None:
    card = "---\nlicense: mit\n---\nA model.\n\n"
    summary = f"{VERIFIED_BEGIN}\n- Weights.\n\n{VERIFIED_END}"
    for verified in ("", summary):
        added = updated_card(card, base_model=None, version="1.0", norms=1, linears=2, summary=verified)
        assert VERIFIED_BEGIN in added or not verified
        assert without_section(added).endswith("A model.\n\n")
        assert "flashnorm.load" not in without_section(added)


def test_what_is_optimized_passes_over_the_same_keys() -> None:
    """`decoding` knows no folders, so it has these names once more."""
    assert {*CONFIG_FLAGS, CONFIG_KEY} <= INDIFFERENT_SETTINGS
