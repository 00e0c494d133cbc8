"""Every model type of every family other than causal language models: a tiny config, and numbers to run it on.

* The calls are those that a plan is traced with, on random numbers; what is compared is all that they return.
* A model that takes images among its tokens is run with images there as well.
"""

import inspect
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from architectures.causal import TooLargeError, random_model
from architectures.configs import LEFT_OUT, PARTS, VOCABULARY, shrunk
from flashnorm.trace.inputs import ExampleCall, example_calls
from flashnorm.trace.tracer import _tensors_in

Names = Mapping[str, Any]  # model type -> the name of its class, or several

_CAUSAL: Names = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
FAMILIES: dict[str, Names] = {
    "image-text-to-text": modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "speech-seq2seq": modeling_auto.MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES,
    "masked-lm": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
}
_COVERED = _CAUSAL.keys() | {model_type for names in FAMILIES.values() for model_type in names}
FAMILIES["plain"] = {
    model_type: name for model_type, name in modeling_auto.MODEL_MAPPING_NAMES.items() if model_type not in _COVERED
}

# Where a config has such a field: four by four patches, which can be merged.
EVERYWHERE: dict[str, Any] = {"image_size": 64, "patch_size": 16, "image_embedding_size": 4, "max_source_positions": 32}
# Type, also of a nested config -> fields that `tiny_config` leaves too large, or wrong.
OVERRIDES: dict[str, dict[str, Any]] = {
    "aria": {"projector_patch_to_query_dict": {16: 4}},
    "blip-2": {"image_token_index": 100},
    "instructblip": {"image_token_index": 100},
    "instructblipvideo": {"video_token_index": 100},
    "edgetam_prompt_encoder": {"patch_size": 8},  # the backbone's last stage
    "edgetam_vision_model": {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]]},
    "llama4_vision_model": {"intermediate_size": 256, "projector_input_dim": 64, "projector_output_dim": 64},
    "llava_next": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_next_video": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "llava_onevision": {"image_grid_pinpoints": [[64, 128], [128, 64]]},
    "mllama_vision_model": {"intermediate_layers_indices": [0, 1], "vision_output_dim": 192},
    "qwen2_5_omni_vision_encoder": {"window_size": 64},
    "qwen2_5_vl_vision": {"window_size": 64},
    "qwen2_vl_vision": {"embed_dim": 64, "mlp_ratio": 2},
    "siglip_text_model": {"projection_size": 64},
    "siglip2_text_model": {"projection_size": 64},
    "mobilevitv2": {"patch_size": 2},
    "sam2_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "pp_ocrv5_mobile_rec": {"image_size": 128},
    "seggpt": {"image_size": [128, 64]},  # two images, one above the other
    "shieldgemma2": {"mm_tokens_per_image": 4},
    "t5gemma2_text": {"dropout_rate": 0.0},  # as the whole model's config sets it
    "t5gemma2_encoder": {"mm_tokens_per_image": 4},
    "vipllava": {"vision_feature_layers": [-1, -2]},
}

# Widths that are in no table are divided until the model is small enough; of these types more, as other sizes want it.
DIVISORS = dict.fromkeys(
    ["edgetam", "sam2", "sam2_hiera_det_model", "sam2_vision_model", "sam3", "sam3_lite_text", "sam3_tracker"], 4
)
MOST_DIVISOR = 32
LARGEST = 12_000_000  # parameters; vision and audio models run on many more positions than language models here
CACHES = {"past_key_values", "cache_params", "cache"}  # fields of what a forward returns; the last name is that of 5.24
_PLACEHOLDERS = re.compile(r"(image|video|audio|vision|speech|media|img)(_\w+)?_token_(id|index)|_?image_token_id")
_ORDINARY = VOCABULARY - 32  # token ids below this are no placeholders


def model_types(family: str) -> list[str]:
    """The types of a family, in order."""
    return sorted(FAMILIES[family])


def tiny(family: str, model_type: str, divisor: int = 1) -> PretrainedConfig:
    """A small config of a type, see `shrunk`. Raises whatever the type's config class raises."""
    config_class = CONFIG_MAPPING[PARTS.get(model_type, model_type)]
    default = config_class().to_dict()
    small = shrunk(default, divisor)
    try:
        config = config_class(**small)
    except Exception:  # one size is no list of sizes: they stay as they are
        config = config_class(**_with_lists(default, small))
    _override(config, iter(range(VOCABULARY - 1, 0, -1)))
    if family == "masked-lm":
        config.is_decoder = False
    name = FAMILIES[family][model_type]
    config.architectures = [name if isinstance(name, str) else name[0]]
    return config


def _with_lists(default: dict[str, Any], small: dict[str, Any]) -> dict[str, Any]:
    kept = dict(small)
    for field, value in small.items():
        old = default.get(field)
        if isinstance(value, dict) and isinstance(old, dict):
            kept[field] = _with_lists(old, value)
        elif isinstance(old, (list, tuple)) and isinstance(value, int):
            kept[field] = old
    return kept


def _override(config: PretrainedConfig, placeholders: Iterator[int]) -> None:
    for field, value in EVERYWHERE.items():
        old = getattr(config, field, None)
        if field == "patch_size" and hasattr(config, "depths"):
            continue  # each stage merges patches, so that they begin small
        if old is not None:
            setattr(config, field, [value] * len(old) if isinstance(old, (list, tuple)) else value)
    for field, value in OVERRIDES.get(config.model_type, {}).items():
        setattr(config, field, value)
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = getattr(config, "per_layer_attributes", None) or ()
    has_heads = "num_attention_heads" not in by_layer and getattr(config, "num_attention_heads", None) is not None
    if "rope_theta" in rope and has_heads:  # if it has sections, their default is in the model's code
        half = int(rope.get("partial_rotary_factor", 1) * _head_dim(config)) // 2
        equal = 3 * half // 8  # the first two, as some models want it
        rope["mrope_section"] = [equal, equal, half - 2 * equal]
    for field, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            _override(value, placeholders)
        elif _PLACEHOLDERS.fullmatch(field) and isinstance(value, int):
            setattr(config, field, next(placeholders))


def _head_dim(config: PretrainedConfig) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def model_class(family: str, model_type: str) -> type[PreTrainedModel]:
    """The class that the family's auto class chooses."""
    name = FAMILIES[family][model_type]
    return getattr(transformers, name if isinstance(name, str) else name[0])


def build(family: str, model_type: str) -> PreTrainedModel:
    """A tiny model of a type, see `random_model`. Raises whatever the type's classes raise."""
    if model_type in LEFT_OUT:
        raise ValueError(LEFT_OUT[model_type])
    divisor = DIVISORS.get(model_type, 1)
    while True:
        try:
            return random_model(model_class(family, model_type), tiny(family, model_type, divisor), LARGEST)
        except TooLargeError:
            if divisor == MOST_DIVISOR:
                raise
            divisor *= 2


def run(model: PreTrainedModel, seed: int = 1) -> Tensor:
    """All floating tensors that the model's calls return for random inputs, one after the other."""
    return torch.cat([one.flatten() for _, outputs in runs(model, seed) for one in _floating(outputs)])


def runs(model: PreTrainedModel, seed: int = 1) -> list[tuple[str, Any]]:
    """ExampleCall, and what it returned. The forward with images among the tokens is "inserted".

    Raises:
        Exception: the forward does not work with any of its inputs.
    """
    for part in model.modules():  # a layer may have a config of its own
        if getattr(config := getattr(part, "config", None), "_experts_implementation", None) is not None:
            config._experts_implementation = "eager"  # the grouped kernels have no float64
    done: list[tuple[str, Any]] = []
    first, *others = example_calls(model)
    done.append((first.method, _first_that_works(model, first, seed)[1]))
    while others:
        call = others.pop(0)
        try:
            arguments, outputs = _first_that_works(model, call, seed)
        except Exception:
            others = [*call.instead, *others]
            continue
        done.append((call.method, outputs))
        if tokens := _placeholders(model, call.method, outputs):
            try:
                done.append(("inserted", _with_tokens(model, tokens, arguments, seed)))
            except Exception as error:
                done.append((f"not inserted: {type(error).__name__}: {error}", None))
    return done


def _first_that_works(model: PreTrainedModel, call: ExampleCall, seed: int) -> tuple[dict[str, Any], Any]:
    errors: list[Exception] = []
    for alternative in call.alternatives:
        arguments = real(model, alternative, seed)
        try:
            return arguments, call.run(model, arguments)
        except Exception as error:
            errors.append(error)
    raise errors[0] if errors else ValueError(f"{call.method} has inputs that are not known")


def real(model: PreTrainedModel, arguments: Mapping[str, Any], seed: int = 1) -> dict[str, Any]:
    """Random numbers in the place of tensors without values."""
    generator = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)  # some models mask or drop at random, in evaluation as well
    sizes = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    vocabulary = min([size for size in sizes if size >= VOCABULARY], default=min(sizes, default=_ORDINARY))

    def number(name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        if value.dtype.is_floating_point:
            numbers = torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if name == "flattened_patches":
                numbers[..., :2] = numbers[..., :2].abs().floor()  # a row and a column
            return numbers
        if name.endswith("_ids"):
            return torch.randint(3, max(4, min(_ORDINARY, vocabulary)), value.shape, generator=generator)
        return torch.ones(value.shape, dtype=value.dtype)

    return {name: number(name, value) for name, value in arguments.items()}


def _placeholders(model: PreTrainedModel, method: str, outputs: Any) -> list[int]:
    """Half of the tokens in whose place the forward puts an image's (video's, recording's) features."""
    kind = method.split("_")[1] if method != "forward" else ""
    fields = [f"{kind}_token_id", f"{kind}_token_index"]
    token = next((value for name in fields if isinstance(value := getattr(model.config, name, None), int)), None)
    if token is None or kind == "text":
        return []
    features = getattr(outputs, "pooler_output", outputs)
    rows = sum(one.numel() // one.shape[-1] for one in tree_leaves(features) if isinstance(one, Tensor))
    return [token] * (rows // 2)


def _with_tokens(model: PreTrainedModel, tokens: list[int], arguments: dict[str, Any], seed: int) -> Any:
    """The forward of two texts that have these tokens."""
    words = torch.randint(3, _ORDINARY, (2, 7), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([words[:, :3], torch.tensor([tokens] * 2), words[:, 3:]], 1)
    if "mm_token_type_ids" in inspect.signature(model.forward).parameters:
        arguments["mm_token_type_ids"] = torch.zeros_like(ids)
        for number, kind in enumerate(("image", "video", "audio"), 1):
            token = getattr(model.config, f"{kind}_token_id", None)
            arguments["mm_token_type_ids"][ids == token] = number
    return model(**{"input_ids": ids, **arguments})


def _floating(outputs: Any) -> list[Tensor]:
    """What a call computes. A cache is not compared: a folded model fills and reads it without the gain, as it may."""
    if isinstance(outputs, ModelOutput):
        outputs = {name: value for name, value in outputs.items() if name not in CACHES}
    return [one for one in _tensors_in(outputs) if one.dtype.is_floating_point]
