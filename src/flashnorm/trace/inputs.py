"""The calls to trace a transformers model with: what its methods take, by the names of their parameters.

* The forward, with what it needs. A model that takes more than text has methods such as `get_image_features` as well:
  what they return is an output, so their towers are traced without placing images among the tokens.
* A name does not say how its tensor is laid out (images, patches, several images a text, ...): a layout is a set of
  tensors that go together, and a call has all that fit its signature as alternatives, the most specific first.
* Sizes come from the config. Numbers that decide about shapes (grids, masks, lengths) are real and on the CPU; token
  ids and everything that the model computes with are on the meta device.
"""

import inspect
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from flashnorm.compat.torch import TorchDispatchMode, memory_of, tree_leaves, tree_map, without_modes, written
from flashnorm.errors import InputError

aten = torch.ops.aten

Arguments = dict[str, Any]

# Two sequences of seven tokens: sizes that no model dimension is likely to share.
_BATCH, _TOKENS = 2, 7
# Where the config does not say: rows and columns of merged patches, images of a text, frames, mel frames, samples.
_GRID, _CROPS, _FRAMES, _MEL_FRAMES, _SAMPLES = (2, 4), 10, 4, 400, 8000
# Ways to combine layouts that are tried.
_MOST_ALTERNATIVES = 32

_META = torch.device("meta")
_FEATURES = re.compile(r"get_([a-z]+)_features")


@dataclass(frozen=True)
class Call:
    """A method of the model, and keyword arguments for it: alternatives, of which the first that works is meant."""

    method: str
    alternatives: tuple[Arguments, ...]
    positional: tuple[Any, ...] = ()

    def run(self, model: nn.Module, arguments: Arguments) -> Any:
        """Call the method with one of the alternatives."""
        method = model if self.method == "forward" else getattr(model, self.method)
        return method(*self.positional, **arguments)


@dataclass(frozen=True)
class _Layout:
    """Tensors that go together, by parameter name.

    Attributes:
        tensors: those that are given to a method that has such a parameter.
        spare: those that it is given only if it insists, or if it does not work without.
        marks: a method that has none of these parameters does not take this layout; empty means any of `tensors`.
    """

    tensors: Arguments
    spare: Arguments = field(default_factory=dict)
    marks: tuple[str, ...] = ()


def example_calls(model: nn.Module) -> list[Call]:
    """The calls that together show a transformers model's code. The first is its forward.

    Raises:
        InputError: the model is no transformers model, or it needs inputs that are not known.
    """
    if not isinstance(model, PreTrainedModel):
        raise InputError(
            f"expected a transformers model, found {type(model).__name__}: pass example_inputs, the arguments of its "
            "forward"
        )
    kinds = _layouts(model.config, model.dtype)
    main = [model.main_input_name] if isinstance(model.main_input_name, str) else model.main_input_name
    needed = {*main, *_required(model.forward)}
    needs = {kind for kind, layouts in kinds.items() if any(needed & {*one.tensors, *one.spare} for one in layouts)}
    least = _alternatives(model.forward, {kind: kinds[kind] for kind in kinds if kind in {"text", *needs}})
    most = _alternatives(model.forward, kinds)
    if not least and not most:
        raise InputError(
            f"expected a model whose inputs are known, found {type(model).__name__}, whose forward needs "
            f"{', '.join(sorted(needed))}: pass example_inputs"
        )
    methods = [name for name in dir(type(model)) if _FEATURES.fullmatch(name)]
    if any(getattr(part, "use_cache", False) for _, part in _parts(model.config, "")):
        least, most = (_without_cache(model.forward, alternatives) for alternatives in (least, most))
    calls = [Call("forward", (*least, *most))]
    calls += [Call(name, tuple(_alternatives(getattr(model, name), kinds))) for name in methods]
    shown = {"text", *needs, *(name.split("_")[1] for name in methods)}
    if any(most and {*most[0]} & {*one.tensors} for kind in kinds if kind not in shown for one in kinds[kind]):
        calls.append(Call("forward", tuple(most)))  # nothing else shows what it does with them (cross-attention, say)
    return calls


def _required(method: Callable[..., Any]) -> set[str]:
    return {
        name
        for name, parameter in inspect.signature(method).parameters.items()
        if parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
    }


def _alternatives(method: Callable[..., Any], kinds: Mapping[str, Sequence[_Layout]]) -> list[Arguments]:
    """Every combination of layouts, one of each kind, that has all that the method insists on."""
    names, required = inspect.signature(method).parameters, _required(method)
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in names.values())
    options: list[list[Arguments]] = []
    for kind, layouts in kinds.items():
        fitting: list[Arguments] = []
        for one in layouts:
            if not names.keys() & (one.marks or one.tensors.keys()):
                continue
            given = {name: tensor for name, tensor in one.tensors.items() if name in names}
            # Where there are tokens, the mask that has no other name is theirs.
            spares = one.spare.keys() - ({"attention_mask"} if kind != "text" and "input_ids" in names else set())
            for spare in (required, names, spares if open_ended and kind != "text" else ()):
                fitting.append(given | {name: one.spare[name] for name in one.spare if name in spares & {*spare}})
        options.append(fitting or [{}])
    found: dict[frozenset[tuple[str, int]], Arguments] = {}
    for parts in itertools.islice(itertools.product(*options), _MOST_ALTERNATIVES * 8):
        arguments = {name: tensor for part in parts for name, tensor in part.items()}
        if required <= arguments.keys():
            found.setdefault(frozenset((name, id(tensor)) for name, tensor in arguments.items()), arguments)
    return list(itertools.islice(found.values(), _MOST_ALTERNATIVES))


def _without_cache(forward: Callable[..., Any], alternatives: list[Arguments]) -> list[Arguments]:
    """The same without a cache, which would only hide what becomes of what is written into it.

    A forward may pass what it does not know on to its language model, but also to one that does not know it either.
    """
    parameters = inspect.signature(forward).parameters
    without: list[Arguments] = [{**arguments, "use_cache": False} for arguments in alternatives]
    if "use_cache" in parameters:
        return without
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    return without + alternatives if takes_any else alternatives


# --- layouts


def _layouts(config: PretrainedConfig, dtype: torch.dtype) -> dict[str, list[_Layout]]:
    """Kind of input -> the layouts in which models take it, with what is a picture or a sound in the given dtype."""

    def converted(layout: _Layout) -> _Layout:
        tensors = {
            name: tensor.to(dtype) if tensor.dtype.is_floating_point else tensor
            for name, tensor in layout.tensors.items()
        }
        return replace(layout, tensors=tensors)

    makers = {"text": _texts, "image": _images, "video": _videos, "audio": _audios}
    return {kind: [converted(layout) for layout in maker(config)] for kind, maker in makers.items()}


def _meta(*shape: int) -> Tensor:
    return torch.zeros(shape, device=_META)


def _ones(*shape: int, dtype: torch.dtype = torch.long) -> Tensor:
    return torch.ones(shape, dtype=dtype, device="cpu")


def _each(*numbers: int) -> Tensor:
    """The same numbers for every element of the batch."""
    return torch.tensor([numbers] * _BATCH, device="cpu")


def _texts(config: PretrainedConfig) -> list[_Layout]:
    ids = torch.zeros(_BATCH, _TOKENS, dtype=torch.long, device=_META)
    mask = torch.ones_like(ids)
    decoder = {"decoder_input_ids": ids} if getattr(config, "is_encoder_decoder", False) else {}
    spare = {"attention_mask": mask, "qformer_input_ids": ids, "qformer_attention_mask": mask}
    spare["bbox"] = torch.zeros(_BATCH, _TOKENS, 4, dtype=torch.long, device=_META)
    return [_Layout({"input_ids": ids, **decoder}, spare)]


def _images(config: PretrainedConfig) -> list[_Layout]:
    sizes = _Sizes(config, ("vision", "image", "visual"))
    channels, patch, merge = sizes.channels, sizes.patch, sizes.merge
    height, width = sizes.image
    rows, columns = (merge * count for count in _GRID)
    count = rows * columns
    grid = {"image_grid_thw": _each(1, rows, columns), "grid_thw": _each(1, rows, columns)}
    merging = {"merge_sizes": _each(merge)[:, 0]}
    spare = {"image_merge_sizes": merging["merge_sizes"]}
    layouts = []
    for pixels in (  # the patches of all images, one after the other
        _meta(_BATCH * count, channels * sizes.patch_frames * patch * patch),
        _meta(_BATCH * count, channels * patch * patch),
        _meta(_BATCH * count, channels, patch, patch),
    ):
        layouts.append(
            _Layout({"pixel_values": pixels, "hidden_states": pixels, **grid, **merging}, spare, tuple(grid))
        )
    # The patches of each image, with their places.
    flat = _meta(_BATCH, count, channels * patch * patch)
    places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).expand(_BATCH, count, 2)
    masks = {"pixel_attention_mask": _ones(_BATCH, count), "spatial_shapes": _each(rows, columns)}
    layouts.append(_Layout({"pixel_values": flat, **masks}, marks=("spatial_shapes",)))
    positions = {"image_position_ids": places, "pixel_position_ids": places}
    layouts.append(_Layout({"pixel_values": flat, **positions}, marks=tuple(positions)))
    # One text's images, each in tiles.
    tiles = sizes.number("max_num_tiles", 4)
    ratios = {"aspect_ratio_ids": _ones(_BATCH, 1), "aspect_ratio_mask": _ones(_BATCH, 1, tiles)}
    layouts.append(
        _Layout({"pixel_values": _meta(_BATCH, 1, tiles, channels, height, width), **ratios}, marks=tuple(ratios))
    )
    # An image for each text; several for each.
    shape = {"image_sizes": _each(height, width), "target_sizes": _each(height // patch, width // patch)}
    layouts.append(_Layout({"pixel_values": _meta(_BATCH, channels, height, width)}, shape))
    mask = {"pixel_attention_mask": _ones(_BATCH, _CROPS, height, width, dtype=torch.bool)}
    layouts.append(_Layout({"pixel_values": _meta(_BATCH, _CROPS, channels, height, width)}, shape | mask))
    frames = sizes.number("num_frames", _FRAMES)
    layouts.append(_Layout({"pixel_values": _meta(_BATCH, frames, channels, height, width)}))
    # Rows of a table: where each patch is, and what is in it.
    layouts.append(_Layout({"flattened_patches": _meta(_BATCH, count, 2 + channels * patch * patch)}))
    return layouts


def _videos(config: PretrainedConfig) -> list[_Layout]:
    sizes = _Sizes(config, ("video", "vision", "image", "visual"))
    channels, patch, merge = sizes.channels, sizes.patch, sizes.merge
    height, width = sizes.image
    rows, columns = (merge * count for count in _GRID)
    grid = {"video_grid_thw": _each(2, rows, columns)}
    spare = {"video_merge_sizes": _each(merge)[:, 0]}
    layouts = []
    count = _BATCH * 2 * rows * columns
    for pixels in (
        _meta(count, channels * sizes.patch_frames * patch * patch),
        _meta(count, channels * patch * patch),
        _meta(count, channels, patch, patch),
    ):
        layouts.append(_Layout({"pixel_values_videos": pixels, **grid}, spare, tuple(grid)))
    frames = sizes.number("num_frames frames_per_clip", _FRAMES)
    places = torch.cartesian_prod(torch.arange(columns), torch.arange(rows)).expand(_BATCH, frames, -1, 2)
    flat = _meta(_BATCH, frames, rows * columns, channels * patch * patch)
    layouts.append(_Layout({"pixel_values_videos": flat, "video_position_ids": places}, marks=("video_position_ids",)))
    plain = _meta(_BATCH, frames, channels, height, width)
    layouts.append(_Layout({"pixel_values_videos": plain}, {"image_sizes": _each(height, width)}))
    return layouts


def _audios(config: PretrainedConfig) -> list[_Layout]:
    sizes = _Sizes(config, ("audio", "speech", "encoder"))
    mels = sizes.number(
        "num_mel_bins input_feat_per_channel feature_size n_mels mel_bins input_feat_size feature_projection_input_dim "
        "num_mels",
        80,
    )
    frames = 2 * sizes.number("max_source_positions", 0) or _MEL_FRAMES
    names = ("input_features_mask", "feature_attention_mask", "padding_mask", "attention_mask")
    masks = {name: _ones(_BATCH, frames, dtype=torch.bool) for name in names}
    lengths = {"audio_feature_lengths": _each(frames)[:, 0]}
    by_channel, by_frame = _meta(_BATCH, mels, frames), _meta(_BATCH, frames, mels)
    layouts = [_Layout({"input_features": features}, masks | lengths) for features in (by_channel, by_frame)]
    layouts.append(_Layout({"audio_mel": by_frame, "audio_mel_mask": ~masks["padding_mask"]}))
    samples = {name: _ones(_BATCH, _SAMPLES, dtype=torch.bool) for name in names}
    layouts.append(_Layout({"input_values": _meta(_BATCH, _SAMPLES)}, samples))
    layouts.append(_Layout({"input_values": _meta(_BATCH, 1, _SAMPLES)}, samples))
    layouts.append(_Layout({"input_values": _meta(_BATCH, sizes.number("max_length", frames), mels)}))
    return layouts


class _Sizes:
    """What a config, and the configs in it, say about sizes.

    Args:
        config: of the whole model.
        words: the parts whose names have one of these words are asked first.
    """

    def __init__(self, config: PretrainedConfig, words: tuple[str, ...]):
        parts = list(_parts(config, ""))
        parts.sort(key=lambda part: (not any(word in part[0] for word in words), part[0].count(".")))
        self._parts = [part for _, part in parts]

    def pair(self, names: str, default: int) -> tuple[int, int]:
        """The first of these fields that is there: one number, or a height and a width."""
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
        """The first of these fields that is there."""
        return self.pair(names, default)[1]

    @property
    def channels(self) -> int:
        """Of a picture."""
        return self.number("num_channels in_channels in_chans num_image_channels", 3)

    @property
    def patch(self) -> int:
        """How high and wide a patch is."""
        return self.number("patch_size", 16)

    @property
    def patch_frames(self) -> int:
        """How many frames of a video a patch has."""
        return self.number("temporal_patch_size", 1)

    @property
    def merge(self) -> int:
        """How many rows of patches become one."""
        return math.prod(self.pair("spatial_merge_size merge_kernel_size merge_size", 2)[:1])

    @property
    def image(self) -> tuple[int, int]:
        """Height and width."""
        return self.pair("image_size img_size", 4 * self.patch)


def _parts(config: PretrainedConfig, path: str) -> Iterator[tuple[str, PretrainedConfig]]:
    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from _parts(value, f"{path}.{name}")


# --- tensors with values among tensors without


@dataclass(frozen=True)
class _Numbers:
    """The values of a tensor; if not certain, those that it has when all comparisons turn out as guessed."""

    values: Tensor
    certain: bool = True


class MixedDevices(TorchDispatchMode):
    """Lets code compute with real numbers on the CPU, and with these and meta tensors together, on the meta device.

    What is computed from numbers alone stays known wherever the code moves it: sizes and offsets that it makes of a
    grid, say. Modes outside of this one do not see that: it is constant.

    Args:
        comparisons: what comparisons of unknown numbers give.
        asked: called when numbers that depend on such a guess are given to the code, which may choose its path by them.
    """

    def __init__(self, comparisons: bool, asked: Callable[[], None]) -> None:
        super().__init__()
        self._comparisons, self._asked = comparisons, asked
        self._known: dict[int, tuple[Tensor, _Numbers]] = {}  # by id, with the tensor that keeps it from being reused

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        numbers = [self._numbers(tensor) for tensor in tensors]
        known = bool(tensors) and None not in numbers
        certain = known and all(each.certain for each in numbers if each)
        targets = written(func, args)
        leaves_meta = func.overloadpacket is aten._to_copy and torch.device(kwargs.get("device") or _META) != _META
        if certain or (known and leaves_meta):
            if not certain:
                self._asked()
            result = self._compute(func, args, kwargs)
            if targets:
                return targets[0]
            to_meta = kwargs.get("device", _META) == _META and any(tensor.is_meta for tensor in tensors)
            return tree_map(self._to_known, result) if to_meta or kwargs.get("device") == _META else result
        for tensor in targets:
            if not tensor.is_meta:
                raise NotImplementedError(f"{func} writes a tensor without values into one with values")
            if not known or self._known[id(tensor)][1].certain:
                self._forget(tensor)
                known = False
        result = func(*self._on_meta(func, args), **tree_map(_to_meta, kwargs))
        self._guess(func, args, kwargs, result, known)
        return result

    def _numbers(self, tensor: Tensor) -> _Numbers | None:
        if not tensor.is_meta:
            return _Numbers(tensor)
        return self._known[id(tensor)][1] if id(tensor) in self._known else None

    def _compute(self, func: Any, args: Any, kwargs: Any) -> Any:
        def values(leaf: Any) -> Any:
            numbers = self._numbers(leaf) if isinstance(leaf, Tensor) else None
            return numbers.values if numbers else leaf

        args, kwargs = tree_map(values, (args, kwargs))
        kwargs = {name: "cpu" if name == "device" and value == _META else value for name, value in kwargs.items()}
        with without_modes():
            return func(*args, **kwargs)

    def _to_known(self, leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        tensor = leaf.to(_META)
        self._known[id(tensor)] = tensor, _Numbers(leaf)
        return tensor

    def _forget(self, tensor: Tensor) -> None:
        """The tensor is about to be overwritten with what is not known, and so are all that share its memory."""
        if numbers := self._numbers(tensor):
            memory = memory_of(numbers.values)
            for key, (_, other) in list(self._known.items()):
                if memory_of(other.values) == memory:
                    del self._known[key]

    def _on_meta(self, func: Any, args: Any) -> Any:
        if func.overloadpacket is aten.index:
            args = (args[0], [at for index in args[1] for at in self._positions(index)], *args[2:])
        return tree_map(_to_meta, args)

    def _positions(self, index: Tensor | None) -> Sequence[Tensor | None]:
        """A mask as indices, as many as it has dimensions; an index as it is."""
        if index is None or index.dtype != torch.bool:
            return [index]
        numbers = self._numbers(index)
        if numbers is None or not numbers.certain:
            return index.nonzero().unbind(1)
        with without_modes():
            return numbers.values.nonzero().unbind(1)

    def _guess(self, func: Any, args: Any, kwargs: Any, result: Any, computable: bool) -> None:
        """Comparisons of what is not known give what was guessed, here as in `rules.ANSWERS`."""
        if func.overloadpacket in _COMPARISONS:
            guessed = torch.full(result.shape, self._comparisons, dtype=torch.bool, device="cpu")
            self._known[id(result)] = result, _Numbers(guessed, False)
        elif computable:
            try:
                guessed = self._compute(func, args, kwargs)
            except Exception:  # the guess was wrong, and an index is out of bounds for it
                return
            for tensor, values in zip(tree_leaves(result), tree_leaves(guessed), strict=True):
                if isinstance(tensor, Tensor) and tensor.shape == values.shape:
                    self._known[id(tensor)] = tensor, _Numbers(values, False)


_COMPARISONS = (aten.eq, aten.ne, aten.lt, aten.le, aten.gt, aten.ge)


def _to_meta(leaf: Any) -> Any:
    return leaf.to(_META) if isinstance(leaf, Tensor) and not leaf.is_meta else leaf
