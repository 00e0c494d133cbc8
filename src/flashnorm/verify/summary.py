"""A report as a few lines of Markdown, for a model card."""

from flashnorm.format import VERIFIED_BEGIN, VERIFIED_END
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.report import VerifyReport


def card_summary(report: VerifyReport) -> str:
    """The summary of a verification: what was compared, the measured numbers, and what was not checked.

    Args:
        report: the report of a conversion that was found to be the same model as its source.
    """
    weights, outputs, versions = report.weights, report.outputs, report.conversion.verified_with
    lines = [
        VERIFIED_BEGIN,
        f"Compared with its source by flashnorm {versions['flashnorm']} (torch {versions['torch']}, transformers "
        f"{versions['transformers']}, {versions['machine']}) before it was published:",
        "",
        f"- Weights, bit for bit: {weights.folded} tensors are the exact product, rounded once; "
        + (f"{weights.biases} biases are the rounded sum or quotient; " if weights.biases else "")
        + (f"{weights.centred} are the source's minus their mean; " if weights.centred else "")
        + f"{weights.unchanged} are unchanged; {weights.norms} norm tensors left.",
    ]
    if outputs is not None and outputs.skipped is None:
        lines += [
            f"- {criterion.asked[0].upper()}{criterion.asked[1:]}: {criterion.found}." for criterion in outputs.criteria
        ]
    if isinstance(outputs, OutputsReport) and outputs.source:
        lines += [
            "",
            f"On {outputs.tokens} tokens, against the source in float64, whose perplexity is "
            f"{outputs.oracle_perplexity:.4f}:",
            "",
            "| run | KL (nats a token) | same next token | perplexity |",
            "|---|---|---|---|",
        ]
        lines += [
            f"| {name} | {run.kl:.3g} | {run.agreement:.1%} | {run.perplexity:.4f} |"
            for name, run in (
                (f"source, {outputs.dtype}", outputs.source),
                (f"converted, {outputs.dtype}", outputs.converted),
                (
                    f"converted, {outputs.dtype}, as flashnorm.load gives it",
                    outputs.as_loaded and outputs.as_loaded.run,
                ),
                ("converted, float64", outputs.rounding),
            )
            if run is not None
        ]
    lines += ["", "Not checked:", "", *(f"- {sentence[0].upper()}{sentence[1:]}." for sentence in report.unchecked)]
    lines += ["", VERIFIED_END]
    return "\n".join(lines)
