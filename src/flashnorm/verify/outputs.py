"""Verifies that a converted model computes the same as its source: both models run on a text.

* Even two bf16 runs of one model differ, so runs are not compared with each other. Each is compared with the reference
  run, the source in float64. The source's own distance from it is the noise of the dtype, and the converted model must
  stay within that noise.
* One model is in memory at a time. A model that does not fit in float64 is streamed from disk (`runs.py`).
* Weights that are stored quantised are dequantised as they are loaded, where Transformers can do that.
* A causal language model is compared by its predictions and its text (`on_text.py`), another model by all that it
  returns (`returned.py`).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashnorm.compat.transformers import class_for, dequantising, has_code_for
from flashnorm.errors import InputError
from flashnorm.files.header import DTYPE_BITS, TORCH_DTYPES
from flashnorm.files.reader import Checkpoint
from flashnorm.models.load import Loading, load_tokenizer
from flashnorm.planning.checks import is_plain
from flashnorm.planning.config import load_config
from flashnorm.planning.keep import head_weight
from flashnorm.planning.planned import PlannedCheckpoint, plan_checkpoint
from flashnorm.verify.inputs import FEWEST_IDS, NotRunError, calls_with_numbers
from flashnorm.verify.on_text import compare_on_text
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.returned import ReturnedReport, compare_returned
from flashnorm.verify.runs import (
    Runner,
    available_memory,
    converted_loader,
    needed_memory,
    quiet,
    source_loader,
)
from flashnorm.verify.text import DEFAULT_TEXT

MAX_TOKENS = 384
PROMPT_TOKENS = 32
GREEDY_STEPS = 64
STREAMED_GREEDY_STEPS = 8  # each step reads the whole checkpoint


def verify_outputs(
    source: str | Path,
    converted: str | Path,
    *,
    text: str | None = None,
    steps: int | None = None,
    streamed: bool | None = None,
    trust_remote_code: bool = False,
    stage: Callable[[str], object] = lambda words: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> OutputsReport | ReturnedReport:
    """Run source and converted model on a text and compare both with the reference run, the source in float64.

    The models count as the same if all of these criteria hold, where `source` and `converted` are runs in the
    checkpoint's dtype:

    1. The converted model in float64 is no farther from the reference than the source's dtype takes the source:
       `KL(reference || converted in float64) <= KL(reference || source)`. Only the rounding of the folded weights is
       measured here, usually a tenth of the bound or less. A wrongly folded gain exceeds the bound by orders of
       magnitude.
    2. In the checkpoint's dtype, `KL(reference || converted) <= 2 KL(reference || source)`. The factor is 2 because
       both are averages over only a few hundred tokens, with different roundings.
    3. Greedy continuations in float32 agree token for token, or first differ at a near tie: there the source prefers
       its own token by at most 8 times the root mean square error of a logit in the source's dtype.
    4. Criteria 2 and 3 hold for the converted model as `flashnorm.load` gives it, on the fused kernels if they apply.

    Criteria 1 and 2 must hold for the typical KL, which is the geometric mean over tokens, and for the mean with a
    tolerance of 3 standard errors: in a mixture of experts, a rounding error can choose another expert, and a few such
    tokens make up most of the mean. The KL that rounding only the logits would cause counts as zero (`sensitivity` in
    `divergence.py`).

    Of a model that is no causal language model, criteria 1 and 2 must hold for all that it returns (see
    `compare_returned`).

    Args:
        source, converted: folders.
        text: the text to run the models on, at most `MAX_TOKENS` tokens of it; None for `DEFAULT_TEXT`, or for a fixed
            pseudo-random sequence of tokens if the source's folder has no tokenizer.
        steps: length of the greedy continuations; None for `GREEDY_STEPS`, or `STREAMED_GREEDY_STEPS`.
        streamed: whether to read the weights from disk, a module at a time, which changes no result; None streams them
            if they do not fit into memory.
        trust_remote_code: run code that the checkpoint carries.
        stage: called with a few words before each run.
        progress: called with the bytes of weights that a run has used so far and will use in total.

    Raises:
        InputError: a checkpoint cannot be read.
    """
    result = plan_checkpoint(Checkpoint.open(converted), trust_remote_code=trust_remote_code)
    return compare_outputs(
        Checkpoint.open(source),
        result,
        text=text,
        steps=steps,
        streamed=streamed,
        trust_remote_code=trust_remote_code,
        stage=stage,
        progress=progress,
    )


def compare_outputs(
    original: Checkpoint,
    result: PlannedCheckpoint,
    *,
    text: str | None = None,
    steps: int | None = None,
    streamed: bool | None = None,
    trust_remote_code: bool = False,
    stage: Callable[[str], object] = lambda words: None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> OutputsReport | ReturnedReport:
    """`verify_outputs` for checkpoints that are open already; `result` is the converted one, planned."""
    try:
        return _compare(original, result, text, steps, streamed, trust_remote_code, stage, progress)
    except NotRunError as reason:
        return OutputsReport(skipped=str(reason))


def _compare(
    original: Checkpoint,
    result: PlannedCheckpoint,
    text: str | None,
    steps: int | None,
    streamed: bool | None,
    trust_remote_code: bool,
    stage: Callable[[str], object],
    progress: Callable[[int, int], object],
) -> OutputsReport | ReturnedReport:
    """`compare_outputs`; raises `NotRunError` if the models cannot be run here."""
    config, blank = load_config(original.folder, trust_remote_code), result.model
    always = _loading_options(result, config)
    tag = main_dtype(original)
    if tag is None:
        raise NotRunError("no weights are plain floats")
    dtype, vocabulary = TORCH_DTYPES[tag], getattr(config.get_text_config(), "vocab_size", None) or FEWEST_IDS
    tokenizer = _tokenizer(original.folder, trust_remote_code)
    tokens = _tokens(tokenizer, text, vocabulary, config)
    streamed = _is_streamed(result, streamed, DTYPE_BITS[tag], len(tokens), vocabulary)
    run = Runner(streamed, progress)
    loading = replace(Loading.of(result), options=always)
    if not _is_language_model(result, config, trust_remote_code):
        load_source = source_loader(original.folder, trust_remote_code, type(blank), **always)
        calls = calls_with_numbers(blank, tokens, dtype)
        return compare_returned(
            run, load_source, converted_loader(loading), calls, dtype, model_class=type(blank).__name__, stage=stage
        )
    if steps is None:
        steps = STREAMED_GREEDY_STEPS if streamed else GREEDY_STEPS
    steps = min(steps, max(1, _positions(config) - PROMPT_TOKENS))
    load_source = source_loader(original.folder, trust_remote_code, **always)
    return compare_on_text(run, load_source, loading, dtype, tokens, tokens[:PROMPT_TOKENS], steps, tokenizer, stage)


def _is_language_model(result: PlannedCheckpoint, config: Any, trust_remote_code: bool) -> bool:
    """Whether a checkpoint is one of a causal language model: the model of its plan is one, and has an output head."""
    remote = trust_remote_code and has_code_for(AutoModelForCausalLM, config)
    # A config of BERT, say, has a causal language model as well, which is not what an encoder's checkpoint holds.
    causal = remote or class_for(AutoModelForCausalLM, config) is type(result.model)
    return causal and head_weight(result.model) is not None


def _loading_options(result: PlannedCheckpoint, config: Any) -> dict[str, Any]:
    """Arguments of `from_pretrained` with which Transformers dequantises what is stored quantised."""
    if not result.quantised:
        return {}
    if (dequantised := dequantising(config)) is not None:
        return {"quantization_config": dequantised}
    why = next(iter(result.quantised.values()))
    raise NotRunError(
        f"{why}, and transformers {transformers.__version__} does not dequantise it with the packages here"
    )


def _is_streamed(result: PlannedCheckpoint, asked: bool | None, bits: int, tokens: int, vocabulary: int) -> bool:
    """Whether weights are streamed: as asked, or else if they do not fit into memory."""
    # The memory is computed for the converted model, which is the larger one if its head was untied.
    whole, streamed = (needed_memory(result.model, bits, tokens, vocabulary, streamed=each) for each in (False, True))
    available = available_memory()
    decided = whole > available if asked is None else asked
    if (needed := streamed if decided else whole) > available:
        raise NotRunError(
            f"the source in float64 needs {needed / 1e9:.1f} GB, even a module at a time; "
            f"{available / 1e9:.1f} GB of memory are available"
        )
    if decided and result.quantised:
        raise NotRunError(f"the source in float64 needs {whole / 1e9:.1f} GB, and quantised weights are not streamed")
    return decided


def main_dtype(checkpoint: Checkpoint) -> str | None:
    """The safetensors name of the dtype of most of a checkpoint's plain floats, in bytes; None if it has none."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        if is_plain(info.dtype):
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda name: sizes[name], default=None)


def text_tokens(folder: Path, text: str | None, config: Any, trust_remote_code: bool) -> Tensor:
    """The tokens of a text, `[tokens]`, as `verify_outputs` runs the model of a folder on them.

    Raises:
        InputError: the text has no two tokens of the model's vocabulary.
    """
    return _tokens(_tokenizer(folder, trust_remote_code), text, config.get_text_config().vocab_size, config)


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except InputError:  # then the tokens are pseudo-random
        return None


def _tokens(tokenizer: Any, text: str | None, vocabulary: int, config: Any) -> Tensor:
    length = min(MAX_TOKENS, _positions(config))
    if tokenizer is not None:
        with quiet():
            ids = tokenizer(text if text is not None else DEFAULT_TEXT)["input_ids"][:length]
        if len(ids) > 1 and max(ids) < vocabulary:
            return torch.tensor(ids)
    if text is not None:
        raise InputError(
            f"expected a text of at least two tokens of the model's vocabulary, and a tokenizer, found {text[:40]!r} "
            f"and {'none' if tokenizer is None else 'a tokenizer that does not make them of it'}; give another text"
        )
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))


def _positions(config: Any) -> int:
    return getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
