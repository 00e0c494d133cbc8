"""Sizes from a config, and from the configs in it."""

from transformers import PretrainedConfig

from flashnorm.trace.inputs.sizes import Sizes, configs_in


def config() -> PretrainedConfig:
    whole = PretrainedConfig(patch_size=7)
    whole.text_config = PretrainedConfig(num_channels=1)
    whole.vision_config = PretrainedConfig(patch_size=[2, 4, 8], image_size={"height": 32, "width": 48})
    return whole


def test_the_configs_in_a_config_have_the_names_that_lead_to_them() -> None:
    assert {path for path, _ in configs_in(config())} == {"", ".text_config", ".vision_config"}


def test_the_parts_that_are_named_are_asked_first() -> None:
    assert Sizes(config(), ("vision",)).pair("patch_size", 16) == (4, 8)
    assert Sizes(config(), ("audio",)).pair("patch_size", 16) == (7, 7)


def test_what_a_part_does_not_say_the_others_do() -> None:
    assert Sizes(config(), ("vision",)).channels == 1


def test_height_and_width() -> None:
    assert Sizes(config(), ("vision",)).image == (32, 48)


def test_what_no_part_says_is_the_default() -> None:
    sizes = Sizes(PretrainedConfig(patch_size=0, image_size="large"), ())
    assert sizes.patch == 16
    assert sizes.image == (64, 64)


def test_the_first_name_that_is_there_counts() -> None:
    sizes = Sizes(PretrainedConfig(second=2, third=3), ())
    assert sizes.number("first second third", 1) == 2
    assert sizes.number("first", 1) == 1
