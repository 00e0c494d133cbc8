"""Verifies that a converted model computes the same: both models on a text, the source in float64 as the oracle.

* bf16 runs of one model differ from each other, so two runs are not compared with each other but both with the oracle:
  the source's own distance from it is the noise of its dtype, and a conversion is to stay within that.
* One model is in memory at a time. A source whose float64 version does not fit is not run, and the report says so.
"""

import contextlib
import gc
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import logging

from flashnorm.checkpoint.header import DTYPE_BITS, TORCH_DTYPES
from flashnorm.checkpoint.reader import Checkpoint
from flashnorm.errors import InputError
from flashnorm.runtime.load import load, load_tokenizer
from flashnorm.trace.models import load_config
from flashnorm.verify.divergence import agreement, differences, kl_divergence, perplexity, sensitivity
from flashnorm.verify.float64 import float64_everywhere
from flashnorm.verify.text import DEFAULT_TEXT

MAX_TOKENS = 384
PROMPT_TOKENS = 32
GREEDY_STEPS = 64

# Bounds of the criteria, as `verify_outputs` explains them.
MAX_RATIO = 2.0
NEAR_TIE = 8.0  # times the root mean square difference that the source's own dtype makes in a logit
FLOAT64_NOISE = 1e-13  # relative: float64 logits of one model, computed in two ways


@dataclass(frozen=True)
class Run:
    """One run over the text, compared with the oracle.

    Attributes:
        kl: mean KL(oracle || run) per token, in nats.
        largest_difference, rms_difference: of the logits.
        agreement: share of tokens after which both predict the same next token.
        perplexity: of the run itself.
    """

    kl: float
    largest_difference: float
    rms_difference: float
    agreement: float
    perplexity: float


@dataclass(frozen=True)
class Greedy:
    """Greedy continuations of one prompt by source and converted model, both in float32.

    Attributes:
        source, converted: token ids.
        identical: how many tokens agree before the first that does not.
        gap: by how much the source, where they part, prefers its own token: a difference of logits. 0 if they do not.
        tolerance: a gap that is within the noise of the checkpoint's dtype.
        source_text, converted_text: decoded, where there is a tokenizer.
    """

    source: tuple[int, ...]
    converted: tuple[int, ...]
    identical: int
    gap: float
    tolerance: float
    source_text: str | None = None
    converted_text: str | None = None

    @property
    def ok(self) -> bool:
        """Whether the continuations agree, or part at a near tie."""
        return self.source == self.converted or self.gap <= self.tolerance


@dataclass(frozen=True)
class Criterion:
    """A condition for the outputs to be called the same: what was asked, the numbers, and whether it holds."""

    asked: str
    found: str
    ok: bool


@dataclass(frozen=True)
class OutputsReport:
    """What `verify_outputs` measured.

    Attributes:
        skipped: why nothing was run; then all else is empty.
        dtype: the checkpoint's, in which both models were run.
        tokens: length of the text.
        oracle_perplexity: of the source in float64.
        source, converted: the runs in the checkpoint's dtype.
        rounding_kl: KL(oracle || converted model in float64): what the rounding of the folded weights does by itself.
        greedy: continuations in float32.
        criteria: what decides.
    """

    skipped: str | None = None
    dtype: str | None = None
    tokens: int = 0
    oracle_perplexity: float = math.nan
    source: Run | None = None
    converted: Run | None = None
    rounding_kl: float = math.nan
    greedy: Greedy | None = None
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
    steps: int = GREEDY_STEPS,
    trust_remote_code: bool = False,
    stage: Callable[[str], object] | None = None,
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

    For 1 and 2, the KL that rounding the logits alone would make is as good as none (`sensitivity` in `divergence.py`).

    Args:
        source, converted: folders.
        text: what to run on, at most `MAX_TOKENS` tokens of it; None for `DEFAULT_TEXT`. Without a tokenizer in the
            source's folder, a fixed pseudo-random sequence of tokens.
        steps: length of the greedy continuations.
        trust_remote_code: run code that the checkpoint carries.
        stage: called with a few words before each run.

    Raises:
        InputError: one of the two is no readable checkpoint.
    """
    stage = stage or (lambda words: None)
    original, result = Checkpoint.open(source), Checkpoint.open(converted)
    config = load_config(source, trust_remote_code)
    remote = trust_remote_code and "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if not remote and type(config) not in AutoModelForCausalLM._model_mapping:
        return OutputsReport(skipped=f"{config.model_type} is no causal language model; only those are run")
    dtype = _main_dtype(original)
    if dtype is None:
        return OutputsReport(skipped="most weights are in a dtype that is not run")
    vocabulary = config.get_text_config().vocab_size
    needed = _needed_memory(original, result, vocabulary)
    available = _available_memory()
    if available is not None and needed > available:
        there = f"{available / 1e9:.1f} GB of memory are available"
        return OutputsReport(skipped=f"the source in float64 needs {needed / 1e9:.1f} GB, {there}")

    tokenizer = _tokenizer(original.folder, trust_remote_code)
    tokens = _tokens(tokenizer, text, vocabulary, config)

    def load_source(dtype: torch.dtype) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(
            original.folder, dtype=dtype, trust_remote_code=trust_remote_code
        ).eval()

    def load_converted(dtype: torch.dtype) -> PreTrainedModel:
        return load(result.folder, dtype=dtype, optimize=False, trust_remote_code=trust_remote_code).eval()

    with _quiet():
        stage("the source in float64, as the oracle")
        oracle = _logits(load_source(torch.float64), tokens, exact=True)
        stage(f"the source in {_short(dtype)}")
        source_run = _compare(oracle, _logits(load_source(dtype), tokens), tokens)
        stage(f"the converted model in {_short(dtype)}")
        converted_run = _compare(oracle, _logits(load_converted(dtype), tokens), tokens)
        stage("the converted model in float64")
        rounding_kl = kl_divergence(oracle, _logits(load_converted(torch.float64), tokens, exact=True))
        oracle_perplexity = perplexity(oracle, tokens)
        floor = _rounding_noise(dtype) ** 2 / 2 * sensitivity(oracle)
        del oracle
        stage("greedy continuations in float32")
        prompt = tokens[:PROMPT_TOKENS]
        expected, expected_logits = _continue(load_source(torch.float32), prompt, steps)
        found, _ = _continue(load_converted(torch.float32), prompt, steps)
    greedy = _compare_greedy(expected, found, expected_logits, NEAR_TIE * source_run.rms_difference, tokenizer)
    return OutputsReport(
        dtype=_short(dtype),
        tokens=len(tokens),
        oracle_perplexity=oracle_perplexity,
        source=source_run,
        converted=converted_run,
        rounding_kl=rounding_kl,
        greedy=greedy,
        criteria=_criteria(_short(dtype), source_run, converted_run, rounding_kl, floor, greedy),
    )


def _criteria(
    dtype: str, source: Run, converted: Run, rounding_kl: float, floor: float, greedy: Greedy
) -> tuple[Criterion, ...]:
    if greedy.source == greedy.converted:
        parted = f"{len(greedy.source)} of {len(greedy.source)} agree"
    else:
        parted = f"{greedy.identical} agree, then a gap of {greedy.gap:.3g} (near tie: at most {greedy.tolerance:.3g})"
    return (
        Criterion(
            asked=f"in float64, the converted model is no farther from the oracle than {dtype} takes the source",
            found=f"KL {rounding_kl:.3g}, at most {max(source.kl, floor):.3g}",
            ok=rounding_kl <= max(source.kl, floor),
        ),
        Criterion(
            asked=f"in {dtype}, it is at most {MAX_RATIO:g} times as far as the source",
            found=f"KL {converted.kl:.3g}, at most {max(MAX_RATIO * source.kl, floor):.3g}",
            ok=converted.kl <= max(MAX_RATIO * source.kl, floor),
        ),
        Criterion(
            asked="greedy tokens in float32 agree, or part at a near tie of the source",
            found=parted,
            ok=greedy.ok,
        ),
    )


@torch.inference_mode()
def _logits(model: PreTrainedModel, tokens: Tensor, exact: bool = False) -> Tensor:
    """`[tokens, vocabulary]`; `exact` runs the model in true float64."""
    with float64_everywhere() if exact else contextlib.nullcontext():
        logits = model(input_ids=tokens[None], use_cache=False).logits[0]
    del model
    gc.collect()
    return logits


def _compare(oracle: Tensor, logits: Tensor, tokens: Tensor) -> Run:
    largest, rms = differences(oracle, logits)
    return Run(
        kl=kl_divergence(oracle, logits),
        largest_difference=largest,
        rms_difference=rms,
        agreement=agreement(oracle, logits),
        perplexity=perplexity(logits, tokens),
    )


@torch.inference_mode()
def _continue(model: PreTrainedModel, prompt: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """The most likely tokens after a prompt, `[steps]`, and the logits they were chosen by, `[steps, vocabulary]`."""
    # Not the checkpoint's own settings: no sampling, no penalties, no early end.
    model.generation_config = GenerationConfig(max_new_tokens=steps, do_sample=False, pad_token_id=0)
    answer: Any = cast(Any, model).generate(
        prompt[None],
        attention_mask=torch.ones_like(prompt[None]),
        return_dict_in_generate=True,
        output_logits=True,
    )
    del model
    gc.collect()
    return answer.sequences[0, len(prompt) :], torch.cat(answer.logits)


def _compare_greedy(expected: Tensor, found: Tensor, logits: Tensor, tolerance: float, tokenizer: Any) -> Greedy:
    length = min(len(expected), len(found))
    parted = (expected[:length] != found[:length]).nonzero()
    identical, gap = length, 0.0
    if len(parted):
        identical = int(parted[0])
        gap = float(logits[identical, expected[identical]] - logits[identical, found[identical]])
    elif len(expected) != len(found):
        gap = math.inf
    texts = [tokenizer.decode(tokens) if tokenizer is not None else None for tokens in (expected, found)]
    return Greedy(
        source=tuple(expected.tolist()),
        converted=tuple(found.tolist()),
        identical=identical,
        gap=gap,
        tolerance=tolerance,
        source_text=texts[0],
        converted_text=texts[1],
    )


def _rounding_noise(dtype: torch.dtype) -> float:
    """The root mean square relative error of rounding to a dtype: `eps / sqrt(12)` over a significand in [1, 2).

    The mean of `1 / m ** 2` is 0.54 if the logarithm of the significand `m` is evenly distributed, as that of most
    data is.
    """
    return max(torch.finfo(dtype).eps * math.sqrt(0.54 / 12), FLOAT64_NOISE)


def _main_dtype(checkpoint: Checkpoint) -> torch.dtype | None:
    """The floating dtype of most of a checkpoint's bytes."""
    sizes: dict[str, int] = {}
    for info in checkpoint.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    dtype = TORCH_DTYPES.get(max(sizes, key=lambda name: sizes[name])) if sizes else None
    return dtype if dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64) else None


def _needed_memory(original: Checkpoint, result: Checkpoint, vocabulary: int) -> int:
    """Bytes: the larger model in float64, three sets of logits, and some room."""
    elements = max(
        sum(info.nbytes * 8 // DTYPE_BITS[info.dtype] for info in checkpoint.tensors.values())
        for checkpoint in (original, result)
    )
    return 9 * elements + 3 * 8 * MAX_TOKENS * vocabulary + (1 << 29)


def _available_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (OSError, ValueError, AttributeError):
        return None


def _tokenizer(folder: Path, trust_remote_code: bool) -> Any:
    try:
        return load_tokenizer(folder, trust_remote_code=trust_remote_code)
    except InputError:  # there is none; we do without
        return None


def _tokens(tokenizer: Any, text: str | None, vocabulary: int, config: Any) -> Tensor:
    positions = getattr(config.get_text_config(), "max_position_embeddings", None) or MAX_TOKENS
    length = min(MAX_TOKENS, positions)
    if tokenizer is not None:
        with _quiet():
            ids = tokenizer(text if text is not None else DEFAULT_TEXT)["input_ids"][:length]
        if len(ids) > 1 and max(ids) < vocabulary:
            return torch.tensor(ids)
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(0))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without transformers' progress bars and remarks."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
