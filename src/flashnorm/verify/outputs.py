"""Verifies that a converted model computes the same: both models on a text, the source in float64 as the oracle.

* bf16 runs of one model differ from each other, so two runs are not compared with each other but both with the oracle:
  the source's own distance from it is the noise of its dtype, and a conversion is to stay within that.
* One model is in memory at a time. One whose float64 version does not fit is streamed from disk (`runs.py`).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from flashnorm.checkpoint.header import DTYPE_BITS, TORCH_DTYPES
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.compat.transformers import class_for, has_code_for
from flashnorm.errors import InputError
from flashnorm.runtime.load import load_tokenizer
from flashnorm.trace.models import load_config, meta_model
from flashnorm.verify.as_loaded import AsLoaded, fits, loaded_continuation, loaded_outputs
from flashnorm.verify.divergence import farthest, perplexity, sensitivity
from flashnorm.verify.measures import (
    MAX_RATIO,
    NEAR_TIE,
    Criterion,
    Greedy,
    Run,
    compare_greedy,
    rounding_noise,
    same_text,
    within,
)
from flashnorm.verify.runs import Runner, available_memory, loaders, needed_memory, quiet
from flashnorm.verify.text import DEFAULT_TEXT

MAX_TOKENS = 384
PROMPT_TOKENS = 32
GREEDY_STEPS = 64
STREAMED_GREEDY_STEPS = 8  # each of them reads the whole checkpoint
LARGEST_DIFFERENCES = 10


@dataclass(frozen=True)
class LogitDifference:
    """A logit of the converted run that is far from the oracle's.

    Attributes:
        position: of the token, in the text, after which the logit predicts.
        token: the vocabulary's entry that the logit is of.
        oracle, source, converted: the logit in the three runs.
        context, token_text: the text that ends at the position, and the entry, where there is a tokenizer.
    """

    position: int
    token: int
    oracle: float
    source: float
    converted: float
    context: str | None = None
    token_text: str | None = None


@dataclass(frozen=True)
class OutputsReport:
    """What `verify_outputs` measured.

    Attributes:
        skipped: why nothing was run; then all else is empty.
        dtype: the checkpoint's, in which both models were run.
        streamed: whether the weights came from disk, a module at a time, because the model does not fit into memory.
        tokens: length of the text.
        oracle_perplexity: of the source in float64.
        source, converted: the runs in the checkpoint's dtype.
        rounding: the converted model in float64: what the rounding of the folded weights does by itself.
        logits: the logits of the converted run that are farthest from the oracle's, one at most for each token.
        greedy: continuations in float32.
        as_loaded: the same as `flashnorm.load` gives the converted model; the runs above use its own code.
        criteria: what decides.
    """

    skipped: str | None = None
    dtype: str | None = None
    streamed: bool = False
    tokens: int = 0
    oracle_perplexity: float = math.nan
    source: Run | None = None
    converted: Run | None = None
    rounding: Run | None = None
    logits: tuple[LogitDifference, ...] = ()
    greedy: Greedy | None = None
    as_loaded: AsLoaded | None = None
    criteria: tuple[Criterion, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all criteria hold; true if nothing was run."""
        return all(criterion.ok for criterion in self.criteria)

    @property
    def ratio(self) -> float:
        """KL of the converted run over KL of the source's run. At most about 1: within the noise of the dtype."""
        if self.source is None or self.converted is None:
            return math.nan
        if not self.source.kl:
            return 1.0 if not self.converted.kl else math.inf
        return self.converted.kl / self.source.kl

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        if self.skipped is not None:
            return {"ok": self.ok, "skipped": self.skipped}
        return {"ok": self.ok, **asdict(self), "kl_ratio": self.ratio}


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
) -> OutputsReport:
    """Run source and converted model on a text and compare both with the source in float64.

    They are the same if all of this holds:

    1. The converted model in float64 is no farther from the oracle than the source's dtype takes the source itself:
       `KL(oracle || converted in float64) <= KL(oracle || source)`. Only the rounding of the folded weights stands
       between the two, usually a tenth of that or less; a gain folded wrongly is orders of magnitude above.
    2. In the checkpoint's dtype it is about as far as the source: `KL(oracle || converted) <= 2 KL(oracle || source)`.
       Twice, because both are averages over a few hundred tokens of two different roundings.
    3. Greedy continuations in float32 agree token for token, or part where the source itself has a near tie: it prefers
       its own token by no more than 8 times the root mean square difference that its dtype makes in a logit.
    4. 2 and 3 hold for the converted model as `flashnorm.load` gives it, on the fused kernels where they apply.

    Both 1 and 2 must hold for the KL of a typical token, which is the geometric mean, and for the mean, give or take 3
    standard errors: in a mixture of experts, a rounding error can choose another expert, and a few such tokens make
    most of the mean. The KL that rounding the logits alone would make is as good as none (`sensitivity` in
    `divergence.py`).

    Args:
        source, converted: folders.
        text: what to run on, at most `MAX_TOKENS` tokens of it; None for `DEFAULT_TEXT`. Without a tokenizer in the
            source's folder, a fixed pseudo-random sequence of tokens.
        steps: length of the greedy continuations; None for `GREEDY_STEPS`, or `STREAMED_GREEDY_STEPS`.
        streamed: read the weights from disk, a module at a time, which changes no number; None: if they do not fit.
        trust_remote_code: run code that the checkpoint carries.
        stage: called with a few words before each run.
        progress: called with the bytes of weights that a run has used so far, and in all.

    Raises:
        InputError: one of the two is no readable checkpoint.
    """
    original, result = Checkpoint.open(source), Checkpoint.open(converted)
    config = load_config(source, trust_remote_code)
    remote = trust_remote_code and has_code_for(AutoModelForCausalLM, config)
    if not remote and class_for(AutoModelForCausalLM, config) is None:
        return OutputsReport(skipped=f"{config.model_type} is no causal language model; only those are run")
    tag = _main_dtype(original)
    if tag is None:
        return OutputsReport(skipped="most weights are in a dtype that is not run")
    dtype, vocabulary = TORCH_DTYPES[tag], config.get_text_config().vocab_size
    tokenizer = _tokenizer(original.folder, trust_remote_code)
    tokens = _tokens(tokenizer, text, vocabulary, config)
    # The larger of the two, if the head was untied.
    blank = meta_model(load_config(converted, trust_remote_code), trust_remote_code=trust_remote_code)
    needed = {
        way: needed_memory(blank, DTYPE_BITS[tag], len(tokens), vocabulary, streamed=way) for way in (False, True)
    }
    available = available_memory()
    if streamed is None:
        streamed = available is not None and needed[False] > available
    if available is not None and needed[streamed] > available:
        there = f"{available / 1e9:.1f} GB of memory are available"
        return OutputsReport(
            skipped=f"the source in float64 needs {needed[streamed] / 1e9:.1f} GB, even a module at a time; {there}"
        )
    if steps is None:
        steps = STREAMED_GREEDY_STEPS if streamed else GREEDY_STEPS
    run = Runner(streamed, progress)
    load_source, load_converted = loaders(original.folder, result.folder, trust_remote_code)

    stage("the source in float64, as the oracle")
    oracle = run.outputs(load_source, torch.float64, tokens, exact=True)
    stage(f"the source in {_short(dtype)}")
    source_outputs = run.outputs(load_source, dtype, tokens)
    source_run = Run.of(oracle, source_outputs, tokens)
    stage(f"the converted model in {_short(dtype)}")
    converted_outputs = run.outputs(load_converted, dtype, tokens)
    converted_run = Run.of(oracle, converted_outputs, tokens)
    logits = _farthest_logits(oracle.logits, source_outputs.logits, converted_outputs.logits, tokens, tokenizer)
    as_loaded = AsLoaded("not run")
    if fits(blank, dtype, 8 * oracle.logits.numel()):
        stage(f"the converted model as flashnorm.load gives it, in {_short(dtype)}")
        loaded, path = loaded_outputs(result.folder, dtype, tokens, trust_remote_code)
        as_loaded = AsLoaded(path, Run.of(oracle, loaded, tokens))
        del loaded
    del source_outputs, converted_outputs
    stage("the converted model in float64")
    rounding = Run.of(oracle, run.outputs(load_converted, torch.float64, tokens, exact=True), tokens)
    oracle_perplexity = perplexity(oracle.logits, tokens)
    floor = rounding_noise(dtype) ** 2 / 2 * sensitivity(oracle.logits)
    del oracle
    prompt = tokens[:PROMPT_TOKENS]
    stage("the source's greedy text, in float32")
    expected, expected_logits = run.continuation(load_source, prompt, steps)
    stage("the converted model's")
    found, _ = run.continuation(load_converted, prompt, steps)
    tolerance = NEAR_TIE * source_run.rms_difference
    greedy = compare_greedy(expected, found, expected_logits, tolerance, tokenizer)
    if fits(blank, torch.float32, 0):
        stage("the converted model's, as flashnorm.load gives it")
        found = loaded_continuation(result.folder, prompt, steps, trust_remote_code)
        as_loaded = replace(as_loaded, greedy=compare_greedy(expected, found, expected_logits, tolerance, tokenizer))
    return OutputsReport(
        dtype=_short(dtype),
        streamed=streamed,
        tokens=len(tokens),
        oracle_perplexity=oracle_perplexity,
        source=source_run,
        converted=converted_run,
        rounding=rounding,
        logits=logits,
        greedy=greedy,
        as_loaded=as_loaded,
        criteria=(
            within(
                f"in float64, the converted model is no farther from the oracle than {_short(dtype)} takes the source",
                rounding,
                source_run,
                1.0,
                floor,
            ),
            within(
                f"in {_short(dtype)}, it is at most {MAX_RATIO:g} times as far as the source",
                converted_run,
                source_run,
                MAX_RATIO,
                floor,
            ),
            same_text("greedy tokens in float32 agree, or part at a near tie of the source", greedy),
            *as_loaded.criteria(_short(dtype), source_run, floor),
        ),
    )


def _farthest_logits(
    oracle: Tensor, source: Tensor, converted: Tensor, tokens: Tensor, tokenizer: Any
) -> tuple[LogitDifference, ...]:
    def decoded(ids: Sequence[int]) -> str | None:
        return None if tokenizer is None else tokenizer.decode(ids)

    return tuple(
        LogitDifference(
            position=position,
            token=entry,
            oracle=float(oracle[position, entry]),
            source=float(source[position, entry]),
            converted=float(converted[position, entry]),
            context=decoded(tokens[max(0, position - 7) : position + 1].tolist()),
            token_text=decoded([entry]),
        )
        for position, entry in farthest(oracle, converted, LARGEST_DIFFERENCES)
    )


def _main_dtype(checkpoint: Checkpoint) -> str | None:
    """The name of the floating dtype of most of a checkpoint's bytes; None if it is one that is not run."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    tag = max(sizes, key=lambda name: sizes[name], default="")
    return tag if tag in ("F16", "BF16", "F32", "F64") else None


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except InputError:  # there is none; we do without
        return None


def _tokens(tokenizer: Any, text: str | None, vocabulary: int, config: Any) -> Tensor:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    length = min(MAX_TOKENS, positions)
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


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
