"""What a config says about sizes."""

import math
from collections.abc import Iterator

from transformers import PretrainedConfig


class Sizes:
    """What a config, and the configs in it, say about sizes.

    Args:
        config: the config of the whole model.
        words: parts whose field names contain one of these words are asked first.
    """

    def __init__(self, config: PretrainedConfig, words: tuple[str, ...]):
        parts = list(configs_in(config))
        parts.sort(key=lambda part: (not any(word in part[0] for word in words), part[0].count(".")))
        self._parts = [part for _, part in parts]

    def pair(self, names: str, default: int) -> tuple[int, int]:
        """The value of the first of these fields that exists: one number, or a height and a width."""
        for part in self._parts:
            for name in names.split():
                found = getattr(part, name, None)
                if isinstance(found, dict):
                    found = [found[key] for key in ("height", "width", "longest_edge") if key in found]
                numbers = [found] if isinstance(found, int) else list(found) if isinstance(found, (list, tuple)) else []
                if numbers and all(isinstance(number, int) and number > 0 for number in numbers):
                    return numbers[-2:][0], numbers[-1]
        return default, default

    def number(self, names: str, default: int) -> int:
        """The value of the first of these fields that exists."""
        return self.pair(names, default)[1]

    @property
    def channels(self) -> int:
        """How many channels an image has."""
        return self.number("num_channels in_channels in_chans num_image_channels", 3)

    @property
    def patch(self) -> int:
        """The height and width of a patch, in pixels."""
        return self.number("patch_size", 16)

    @property
    def patch_frames(self) -> int:
        """How many frames of a video a patch has."""
        return self.number("temporal_patch_size patch_temporal", 1)

    @property
    def merge(self) -> int:
        """How many rows of patches are merged into one."""
        return math.prod(self.pair("spatial_merge_size merge_kernel_size merge_size pooling_kernel_size", 2)[:1])

    @property
    def image(self) -> tuple[int, int]:
        """The height and width of an image, in pixels."""
        return self.pair("image_size img_size", 4 * self.patch)


def configs_in(config: PretrainedConfig, path: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """A config and all configs in it, each with the names of the fields that lead to it, as in `.vision_config`."""
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from configs_in(value, f"{path}.{name}")
