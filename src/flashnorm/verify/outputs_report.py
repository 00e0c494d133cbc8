"""What a verification of outputs measured, and whether its criteria hold."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from flashnorm.verify.as_loaded import AsLoaded
from flashnorm.verify.measures import Criterion, Greedy, Run


@dataclass(frozen=True)
class LogitDifference:
    """A logit of the converted run that is far from that of the reference run.

    Attributes:
        position: position in the text of the token whose successor the logit predicts.
        token: id of the predicted token.
        oracle, source, converted: the logit in the three runs; `oracle` is the reference run.
        context, token_text: the text up to the position and the predicted token, if there is a tokenizer.
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
        skipped: why nothing was run; then all other attributes are empty.
        dtype: the checkpoint's dtype, in which both models were run.
        streamed: whether the weights came from disk, a module at a time.
        tokens: length of the text in tokens.
        oracle_perplexity: perplexity of the reference run, the source in float64.
        source, converted: the runs in the checkpoint's dtype.
        rounding: the run of the converted model in float64, which shows only the rounding of the folded weights.
        logits: the logits of the converted run that are farthest from the reference, at most one for each token.
        greedy: the greedy continuations in float32.
        as_loaded: the runs of the converted model as `flashnorm.load` gives it; the runs above use its own code.
        dropped: the largest relative change of what a norm gives by dropping `eps`; None if no `eps` was dropped.
        criteria: the conditions that decide whether the models count as the same.
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
    dropped: float | None = None
    criteria: tuple[Criterion, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether all criteria hold; also true if nothing was run."""
        return all(criterion.ok for criterion in self.criteria)

    @property
    def ratio(self) -> float:
        """KL of the converted run over KL of the source's run. About 1 or less is within the noise of the dtype."""
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
