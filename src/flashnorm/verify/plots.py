"""The plots of the report, as SVG elements for an HTML page.

* Matplotlib draws in placeholder colours, which are replaced by the page's own, so one drawing serves light and dark.
* Text is kept as text, so that it can be searched and copied.
"""

import io
import re
from collections.abc import Callable
from typing import Any

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from flashnorm.verify.measures import Run
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.rounding import Rounding

# Placeholder colour for Matplotlib -> the page's colour.
_COLOURS = {
    "#010101": "var(--ink)",
    "#020202": "var(--line)",
    "#030303": "var(--source)",
    "#040404": "var(--converted)",
    "#050505": "var(--exact)",
}
INK, LINE, SOURCE, CONVERTED, EXACT = _COLOURS

_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": LINE,
    "grid.linewidth": 0.5,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
}
_SIZE = (5.6, 3.2)  # inches; small, so that text is readable on a phone
_SMOOTHED = 16  # tokens


def kl_by_token(report: OutputsReport) -> str | None:
    """KL divergence from the reference run at each token of the text. None if no value is above zero."""
    drawn = [(name, np.array(run.kl_by_token), colour) for name, run, colour in _series(report)]
    drawn = [(name, kl, colour) for name, kl, colour in drawn if np.isfinite(kl).all() and (kl > 0).any()]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for name, kl, colour in drawn:
            positions = np.arange(len(kl))
            axes.plot(positions, np.where(kl > 0, kl, np.nan), ".", color=colour, markersize=3, alpha=0.35)
            window = min(_SMOOTHED, len(kl))
            mean = np.convolve(kl, np.full(window, 1 / window), "valid")
            at = positions[: len(mean)] + (window - 1) / 2
            axes.plot(at, np.where(mean > 0, mean, np.nan), color=colour, linewidth=1.8, label=name)
        axes.set_yscale("log")
        axes.set_xlabel("position in the text (tokens)")
        axes.set_ylabel("KL to the reference (nats)")
        _legend(axes)

    return _svg("kl", draw)


def error_by_depth(report: OutputsReport) -> str | None:
    """Relative error after the embedding and each layer. None if the model gives no hidden states."""
    drawn = [(name, np.array(run.depth), colour) for name, run, colour in _series(report)]
    drawn = [
        (name, error, colour) for name, error, colour in drawn if np.isfinite(error).all() and (error[:-1] > 0).any()
    ]
    if not drawn:
        return None

    def draw(axes: Any) -> None:
        for name, error, colour in drawn:
            states = np.arange(len(error))
            error = np.where(error > 0, error, np.nan)
            axes.plot(states[:-1], error[:-1], ".-", color=colour, linewidth=1.5, markersize=5, label=name)
            axes.plot(states[-1:], error[-1:], "D", color=colour, markersize=5)
        axes.set_yscale("log")
        axes.set_xlabel("depth (layers; 0: embedding, ◆: logits)")
        axes.set_ylabel("relative error (1)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        _legend(axes)

    return _svg("depth", draw)


def rounding_errors(rounding: Rounding) -> str | None:
    """Rounding errors of folded weights, in units of the last place. None if no weight of the sample was rounded."""
    counts = np.array(rounding.histogram)
    if not counts.sum():
        return None

    def draw(axes: Any) -> None:
        edges = np.linspace(-0.5, 0.5, len(counts) + 1)
        axes.stairs(100 * counts / counts.sum(), edges, fill=True, color=CONVERTED, alpha=0.7)
        for limit in (-0.5, 0.5):
            axes.axvline(limit, color=INK, linewidth=1, linestyle="--")
        axes.axhline(100 / len(counts), color=INK, linewidth=1, linestyle=":")
        axes.set_xlim(-0.6, 0.6)
        axes.set_xlabel("stored - exact product (units of the last place)")
        axes.set_ylabel("share of the rounded weights (%)")

    return _svg("rounding", draw)


def _series(report: OutputsReport) -> list[tuple[str, Run, str]]:
    runs = (
        (f"source, {report.dtype}", report.source, SOURCE),
        (f"converted, {report.dtype}", report.converted, CONVERTED),
        ("converted, float64", report.rounding, EXACT),
    )
    return [(name, run, colour) for name, run, colour in runs if run is not None]


def _legend(axes: Any) -> None:
    axes.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, fontsize=9, columnspacing=1, handlelength=1)


def _svg(name: str, draw: Callable[[Any], None]) -> str:
    """An SVG element whose ids begin with `name`, so that several elements can share a page."""
    style: Any = _STYLE | {"svg.hashsalt": name}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=_SIZE, layout="constrained")
        draw(figure.add_subplot())
        figure.patch.set_alpha(0)
        for axes in figure.axes:
            axes.patch.set_alpha(0)
        written = io.StringIO()
        FigureCanvasSVG(figure).print_svg(written)
    svg = written.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' (?:xmlns(?::xlink)?|version)="[^"]*"', "", svg)
    svg = re.sub(r' (?:width|height)="[^"]*pt"', "", svg, count=2)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, theirs in _COLOURS.items():
        svg = svg.replace(colour, theirs)
    return svg
