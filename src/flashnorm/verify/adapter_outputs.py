"""Runs source and converted model with their adapters on a text, and compares both with the first in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from flashnorm.compat.transformers import class_for, has_code_for
from flashnorm.files.header import DTYPE_BITS, TORCH_DTYPES
from flashnorm.files.reader import Checkpoint
from flashnorm.models.load import Loading
from flashnorm.planning.config import load_config
from flashnorm.planning.planned import plan_checkpoint
from flashnorm.verify.divergence import sensitivity
from flashnorm.verify.measures import MAX_RATIO, Criterion, Run, rounding_noise, within
from flashnorm.verify.outputs import main_dtype, text_tokens
from flashnorm.verify.runs import Loader, Runner, available_memory, converted_loader, needed_memory, source_loader


@dataclass(frozen=True)
class AdapterOutputs:
    """What was measured of models with adapters.

    Attributes:
        skipped: why nothing was run; then all other attributes are empty.
        dtype: the source's dtype, in which both were run.
        tokens: length of the text in tokens.
        source, converted: the runs in that dtype, compared with source and adapter in float64.
        rounding: the run of converted model and adapter in float64.
        criteria: the conditions that decide whether they count as the same.
    """

    skipped: str | None = None
    dtype: str | None = None
    tokens: int = 0
    source: Run | None = None
    converted: Run | None = None
    rounding: Run | None = None
    criteria: tuple[Criterion, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all criteria hold; also true if nothing was run."""
        return all(criterion.ok for criterion in self.criteria)


def compare_with_adapters(
    original: Checkpoint,
    result: Checkpoint,
    adapter: Path,
    converted_adapter: Path,
    *,
    text: str | None = None,
    stage: Callable[[str], object],
    progress: Callable[[int, int], object],
    trust_remote_code: bool = False,
) -> AdapterOutputs:
    """Compare source + adapter with converted model + converted adapter, by criteria 1 and 2 of `verify_outputs`.

    Args:
        original, result: the source and its FlashNorm version.
        adapter, converted_adapter: the folders of their adapters.
        text, stage, progress, trust_remote_code: see `verify`.

    Raises:
        InputError: a checkpoint cannot be read, or the text.
    """
    if (skipped := _not_run(original, trust_remote_code)) is not None:
        return AdapterOutputs(skipped)
    from peft import PeftConfig

    if PeftConfig.from_pretrained(str(adapter)).is_prompt_learning:
        return AdapterOutputs("prompts are put before the text, and do not change")
    config = load_config(original.folder, trust_remote_code)
    planned = plan_checkpoint(result, trust_remote_code=trust_remote_code)
    tag = main_dtype(original)
    if tag is None or planned.quantised:
        return AdapterOutputs("the weights are not plain floats")
    dtype, vocabulary = TORCH_DTYPES[tag], config.get_text_config().vocab_size
    tokens = text_tokens(original.folder, text, config, trust_remote_code)
    needed = needed_memory(planned.model, DTYPE_BITS[tag], len(tokens), vocabulary, streamed=False)
    if needed > (available := available_memory()):
        return AdapterOutputs(
            f"the source in float64 needs {needed / 1e9:.1f} GB, {available / 1e9:.1f} GB are available"
        )
    run = Runner(False, progress)
    load_source = _with(source_loader(original.folder, trust_remote_code), adapter, original.folder)
    load_converted = _with(converted_loader(Loading.of(planned)), converted_adapter, result.folder)
    named = str(dtype).removeprefix("torch.")
    stage("the source with its adapter in float64, as the reference")
    reference = run.outputs(load_source, torch.float64, tokens, exact=True)
    stage(f"the source with its adapter in {named}")
    source = Run.of(reference, run.outputs(load_source, dtype, tokens), tokens)
    stage(f"the converted model with its adapter in {named}")
    converted = Run.of(reference, run.outputs(load_converted, dtype, tokens), tokens)
    stage("the converted model with its adapter in float64")
    rounding = Run.of(reference, run.outputs(load_converted, torch.float64, tokens, exact=True), tokens)
    floor = rounding_noise(dtype) ** 2 / 2 * sensitivity(reference.logits)
    asked = f"in float64, converted model and adapter are no farther from the reference than {named} takes the source"
    in_dtype = f"in {named}, they are at most {MAX_RATIO:g} times as far as the source"
    return AdapterOutputs(
        dtype=named,
        tokens=len(tokens),
        source=source,
        converted=converted,
        rounding=rounding,
        criteria=(
            within(asked, rounding, source, 1.0, floor),
            within(in_dtype, converted, source, MAX_RATIO, floor),
        ),
    )


def _not_run(original: Checkpoint, trust_remote_code: bool) -> str | None:
    try:
        import peft  # noqa: F401
    except ImportError:
        return "PEFT is not installed"
    config = load_config(original.folder, trust_remote_code)
    remote = trust_remote_code and has_code_for(AutoModelForCausalLM, config)
    if not remote and class_for(AutoModelForCausalLM, config) is None:
        return f"{config.model_type} is no causal language model; only those are run"
    return None


def _with(load: Loader, adapter: Path, model: Path) -> Loader:
    """A loader of a model together with its adapter."""

    def load_with_adapter(dtype: torch.dtype, **options: Any) -> PreTrainedModel:
        from peft import PeftConfig, PeftModel

        config = PeftConfig.from_pretrained(str(adapter))
        config.base_model_name_or_path = str(model)  # wherever the model was when the adapter was trained
        adapted = PeftModel.from_pretrained(load(dtype, **options), str(adapter), config=config)
        return cast(PreTrainedModel, adapted.eval())

    return load_with_adapter
