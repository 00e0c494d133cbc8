"""The report of `verify` as one HTML page, without scripts, for phones and screens, light and dark.

* The page holds the facts of the JSON. Text from a checkpoint is escaped, and the page's security policy lets it load
  nothing.
* The page needs Jinja and Matplotlib, which the extra `flashnorm[report]` installs.
"""

import contextlib
import os
import shlex
from pathlib import Path
from typing import Any

from rich.filesize import decimal

from flashnorm.errors import InputError
from flashnorm.verify.integrity import UNKNOWN, IntegrityReport
from flashnorm.verify.layers import layer_kinds
from flashnorm.verify.outputs_report import OutputsReport
from flashnorm.verify.report import VerifyReport


def check_page(path: Path) -> None:
    """Check, before hours of work, that a page can be made and written.

    Raises:
        InputError: a package is not installed, or the file cannot be written there.
    """
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"an HTML report needs the package {error.name}, which is not installed: pip install 'flashnorm[report]'"
        ) from error
    problems = {
        "something else of that name": path.exists() and not path.is_file(),
        "no such folder": not path.parent.is_dir(),
        "no access": not os.access(path.parent, os.W_OK),
    }
    if found := next((problem for problem, there in problems.items() if there), None):
        raise InputError(f"{path}: expected a file in a folder that can be written to, found {found}")


def write_page(report: VerifyReport | IntegrityReport, path: Path) -> None:
    """Write a report to an HTML file, whole or not at all.

    Raises:
        InputError: `check_page` raises it, or the file cannot be written.
    """
    check_page(path)
    page = html(report)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise InputError(f"{path}: cannot be written ({error.strerror or error}); choose another place") from error


def html(report: VerifyReport | IntegrityReport) -> str:
    """A report as an HTML page."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("flashnorm.verify"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": decimal, "quoted": shlex.quote, "shown": _shown}
    if isinstance(report, IntegrityReport):
        return environment.get_template("integrity.html.j2").render(report=report, unknown=UNKNOWN)
    drawings = {name: svg and Markup(svg) for name, svg in _plots(report).items()}
    language = report.outputs if isinstance(report.outputs, OutputsReport) else None
    greedy = language and language.greedy
    texts = (greedy.source_text or "", greedy.converted_text or "") if greedy else ("", "")
    return environment.get_template("comparison.html.j2").render(
        report=report,
        language=language,
        layers=layer_kinds(report.conversion.plan),
        plots=drawings,
        common=next(
            (at for at, (ours, theirs) in enumerate(zip(*texts, strict=False)) if ours != theirs), len(texts[0])
        ),
    )


def _plots(report: VerifyReport) -> dict[str, str | None]:
    from flashnorm.verify.plots import error_by_depth, kl_by_token, rounding_errors

    rounding = report.weights.rounding
    outputs = report.outputs if isinstance(report.outputs, OutputsReport) else None
    return {
        "rounding": rounding_errors(rounding) if rounding else None,
        "kl": kl_by_token(outputs) if outputs else None,
        "depth": error_by_depth(outputs) if outputs else None,
    }


def _shown(text: Any) -> str:
    """A piece of text with visible line ends and tabs."""
    return "" if text is None else str(text).replace("\n", "⏎").replace("\t", "⇥")
