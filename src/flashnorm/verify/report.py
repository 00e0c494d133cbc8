"""The result of `verify`: what was checked and measured, and whether source and converted model are the same."""

import json
from dataclasses import dataclass
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from flashnorm.verify.conversion import Conversion
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.returned import ReturnedReport
from flashnorm.verify.weights import WeightsReport

# Version of the JSON, which docs/report.md documents.
REPORT_VERSION = 1

_SHOWN = 20


@dataclass(frozen=True)
class VerifyReport:
    """The result of `verify`.

    Attributes:
        source, converted: the two checkpoints, as they were given.
        conversion: what the conversion changed, and the versions that checked it.
        weights: the bit-for-bit comparison of the weights.
        outputs: the comparison of the models' outputs; None if it was not asked for.
    """

    source: str
    converted: str
    conversion: Conversion
    weights: WeightsReport
    outputs: OutputsReport | ReturnedReport | None = None

    @property
    def ok(self) -> bool:
        """Whether the converted model is the same model as the source."""
        return self.weights.ok and (self.outputs is None or self.outputs.ok)

    @property
    def verdict(self) -> str:
        """The result in one sentence."""
        what = "the same model" if self.ok else "NOT the same model"
        return f"{self.converted} is {what} as {self.source}"

    @property
    def unchecked(self) -> tuple[str, ...]:
        """What the verification does not cover, in words."""
        weights = "the source is taken as it is: whether it is what its publisher released was not asked"
        if self.outputs is None:
            return (weights, "outputs: they were not asked for (--weights-only)")
        if self.outputs.skipped is not None:
            return (weights, f"outputs: {self.outputs.skipped}")
        runtimes = (
            "other runtimes, devices and dtypes than Transformers on the CPU in "
            f"{self.outputs.dtype}, float32 and float64"
        )
        if isinstance(self.outputs, ReturnedReport):
            return (weights, *self.outputs.unchecked, runtimes.replace(", float32", ""))
        greedy = len(self.outputs.greedy.source) if self.outputs.greedy else 0
        loaded = self.outputs.as_loaded and self.outputs.as_loaded.unchecked
        return (
            weights,
            *((loaded,) if loaded else ()),
            f"outputs beyond {self.outputs.tokens} tokens of one text and {greedy} tokens of greedy text",
            runtimes,
        )

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values (docs/report.md). Infinity and NaN, which JSON lacks, become None."""
        data = {
            "version": REPORT_VERSION,
            "ok": self.ok,
            "verdict": self.verdict,
            "unchecked": list(self.unchecked),
            "source": self.source,
            "converted": self.converted,
            "conversion": self.conversion.to_dict(),
            "weights": self.weights.to_dict(),
            "outputs": None if self.outputs is None else self.outputs.to_dict(),
        }
        return _finite(data)

    def to_json(self) -> str:
        """As JSON text."""
        return json.dumps(self.to_dict(), indent=1, allow_nan=False)

    def __rich__(self) -> RenderableType:
        parts: list[RenderableType] = [_weights(self.weights)]
        if self.outputs is not None:
            parts.append(_outputs(self.outputs))
        parts.append(_line(self.ok, f"[bold]{escape(self.verdict)}[/bold]"))
        return Group(*parts)

    def __str__(self) -> str:
        console = Console(width=160, no_color=True, force_terminal=False)
        with console.capture() as capture:
            render(self, console)
        return capture.get()


def render(report: VerifyReport, console: Console) -> None:
    """Print a report to a console."""
    console.print(report, highlight=False)


def _weights(report: WeightsReport) -> RenderableType:
    rate = report.nbytes / max(report.seconds, 1e-9) / 1e9
    text = (
        f"weights: {report.folded} tensors are the correctly rounded product, "
        + (f"{report.biases} biases the rounded sum or quotient, " if report.biases else "")
        + (f"{report.centred} the source's minus their mean, " if report.centred else "")
        + f"{report.unchanged} are unchanged, {report.norms} norm tensors left, {report.files} files have their hash "
        f"({report.nbytes / 1e9:.2f} GB in {report.seconds:.1f} s, {rate:.2f} GB/s)"
    )
    parts: list[RenderableType] = [_line(report.ok, text)]
    parts += [Text(f"  {finding}") for finding in report.findings[:_SHOWN]]
    if report.problems > _SHOWN:
        parts.append(Text(f"  and {report.problems - _SHOWN} more"))
    if report.rounding and report.rounding.not_finite:
        found = f"{report.rounding.not_finite} of {report.rounding.sampled} folded weights that were sampled"
        parts.append(Text(f"  {found} are infinite or NaN, as the source's weights or its gains are"))
    if report.underflow.products:
        parts.append(Text(f"  {report.underflow}"))
    return Group(*parts)


def _outputs(report: OutputsReport | ReturnedReport) -> RenderableType:
    if isinstance(report, ReturnedReport):
        return _returned(report)
    if report.skipped is not None:
        return Text.from_markup(f"[yellow]-[/yellow] outputs: not compared, {escape(report.skipped)}")
    if report.source is None or report.converted is None or report.rounding is None or report.greedy is None:
        raise ValueError("a report of outputs that were neither skipped nor run")
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("  run", "KL", "logits", "top-1", "perplexity"):
        table.add_column(header, justify="left" if header == "  run" else "right")
    table.add_row("  source, float64", "", "", "", f"{report.oracle_perplexity:.4f}")
    for name, run in (("source", report.source), ("converted", report.converted)):
        table.add_row(
            f"  {name}, {report.dtype}",
            f"{run.kl:.3g}",
            f"{run.largest_difference:.3g}",
            f"{run.agreement:.1%}",
            f"{run.perplexity:.4f}",
        )
    if report.as_loaded is not None and (run := report.as_loaded.run) is not None:
        table.add_row(
            f"  converted, {report.dtype}, as loaded",
            f"{run.kl:.3g}",
            f"{run.largest_difference:.3g}",
            f"{run.agreement:.1%}",
            f"{run.perplexity:.4f}",
        )
    table.add_row("  converted, float64", f"{report.rounding.kl:.3g}", "", "", "")
    head = (
        f"outputs: {report.tokens} tokens, against the source in float64 (KL in nats a token, largest difference of a "
        "logit, same next token)" + ("; weights from disk, a module at a time" if report.streamed else "")
    )
    ratio = f"KL ratio, converted to source, in {report.dtype}: {report.ratio:.2f}"
    parts: list[RenderableType] = [_line(report.ok, head), table, Text(f"  {ratio}")]
    for criterion in report.criteria:
        parts.append(_line(criterion.ok, f"{escape(criterion.asked)}: {escape(criterion.found)}", indent="  "))
    if report.dropped is not None:
        parts.append(Text(f"  eps was dropped: what a norm gives changes by at most {report.dropped:.2g} of itself"))
    greedy = report.greedy
    if greedy.source_text is not None and greedy.converted_text is not None:
        parts.append(Text(f"  greedy, source:    {greedy.source_text!r}"))
        parts.append(Text(f"  greedy, converted: {greedy.converted_text!r}"))
    return Group(*parts)


def _returned(report: ReturnedReport) -> RenderableType:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for header in ("  output", f"source, {report.dtype}", f"converted, {report.dtype}", "converted, float64"):
        table.add_column(header, justify="left" if header == "  output" else "right")
    for one in report.returned[:_SHOWN]:
        table.add_row(f"  {one.name}", *(f"{errors.mean:.3g}" for errors in (one.source, one.converted, one.rounding)))
    head = (
        f"outputs: all that {report.model_class} returns, against the source in float64 (relative error of a vector)"
        + ("; weights from disk, a module at a time" if report.streamed else "")
    )
    parts: list[RenderableType] = [_line(report.ok, escape(head)), table]
    if len(report.returned) > _SHOWN:
        parts.append(Text(f"  and {len(report.returned) - _SHOWN} more"))
    for criterion in report.criteria:
        parts.append(_line(criterion.ok, f"{escape(criterion.asked)}: {escape(criterion.found)}", indent="  "))
    return Group(*parts)


def _line(ok: bool, markup: str, indent: str = "") -> Text:
    mark = "[green]✓[/green]" if ok else "[red]✗[/red]"
    return Text.from_markup(f"{indent}{mark} {markup}")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (value != value or value in (float("inf"), float("-inf"))):
        return None
    return value
