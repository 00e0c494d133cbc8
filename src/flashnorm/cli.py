"""The command line: arguments in, one call, a rendered answer out.

Exit status: 0 done, or verified and equal; 1 verified and found different; 2 unusable input.
"""

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table
from rich.text import Text

from flashnorm import __version__
from flashnorm.errors import DifferenceError, InputError
from flashnorm.plan import FoldPlan

DIFFERENT, UNUSABLE = 1, 2

app = typer.Typer(
    help="FlashNorm: fold norm weights into the linears that read them. The model stays the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its id on the Hugging Face hub.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Untie = Annotated[
    bool, typer.Option("--untie", help="Give a tied output head its own weight, so that its norm can fold.")
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"flashnorm {__version__}")
        raise typer.Exit


@app.command()
def plan(
    model: Model, as_json: AsJson = False, untie: Untie = False, trust_remote_code: TrustRemoteCode = False
) -> None:
    """Show which norms fold into what, which stay, and why. Needs config.json only."""
    from flashnorm.planning import plan as make_plan

    result = make_plan(model, untie=untie, trust_remote_code=trust_remote_code)
    if as_json:
        print(result.to_json())
        return
    _print_plan(result)
    if any(kept.reason.startswith("tied") for kept in result.kept.values()):
        print("A tied head gets a weight of its own with --untie; its norm folds then.")


@app.command()
def convert(
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder to write.")],
    keep_norms: Annotated[
        bool, typer.Option("--keep-norms", help="Keep folded norms as tensors of ones, for runtimes that want them.")
    ] = False,
    untie: Untie = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it exists and convert wrote all of it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify OUT before it appears; its model card says what was found.")
    ] = False,
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the FlashNorm version of a checkpoint. An interrupted run continues when it is repeated.

    With --verify, exit status 1 if it is not the same model; OUT stays as it was then.
    """
    from flashnorm.convert import convert as run
    from flashnorm.progress import progress_bar

    with progress_bar("converting") as bar:
        result = run(
            model,
            out,
            keep_norms=keep_norms,
            untie=untie,
            force=force,
            verify=verify,
            trust_remote_code=trust_remote_code,
            progress=bar.bytes,
            stage=bar.stage,
        )
    report = result.report
    if as_json:
        facts = asdict(replace(result, report=None)) | {"target": str(result.target), "plan": result.plan.to_dict()}
        print(json.dumps(facts | {"report": report and report.to_dict()}, indent=1))
        return
    files = f"{result.shards} file{'s' if result.shards > 1 else ''}"
    resumed = f" ({result.resumed_shards} from an earlier run)" if result.resumed_shards else ""
    print(
        f"{out}: {result.norms} norms folded into {result.linears} tensors; {result.tensors} tensors in "
        f"{files}{resumed}; {decimal(result.bytes_written)} written in {result.seconds:.1f} s"
    )
    if result.spelled_out:
        print(
            f"{result.spelled_out} norm tensors stay, at their identity value: Transformers would initialise them to "
            "another one"
        )
    for row in result.plan.rows():
        if row.kept:
            print(f"{row.norm} ({row.count}) {row.what}")
    if report is not None:
        _console().print(report, highlight=False)


@app.command()
def verify(
    model: Model,
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="The folder that `convert` wrote. Without it, --weights-only checks MODEL as such a folder.",
        ),
    ] = None,
    weights_only: Annotated[bool, typer.Option("--weights-only", help="Do not run the models.")] = False,
    text: Annotated[Path | None, typer.Option("--text", help="A text file to compare the outputs on.")] = None,
    as_json: AsJson = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write the report as a page, too.")
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check a conversion: weights bit for bit, outputs against a float64 oracle. Exit status 1 if they differ.

    A converted folder alone is checked against its manifest and its model's code.
    """
    from flashnorm.progress import progress_bar
    from flashnorm.verify import verify as run
    from flashnorm.verify.page import check_page, write_page

    if html is not None:
        check_page(html)
    with progress_bar("comparing weights" if out else "hashing files") as bar:
        report = run(
            model,
            out,
            weights_only=weights_only,
            text=text,
            progress=bar.bytes,
            stage=bar.stage,
            trust_remote_code=trust_remote_code,
        )
    if html is not None:
        write_page(report, html)
    if as_json:
        print(report.to_json())
    else:
        _console().print(report, highlight=False)
    if not report.ok:
        raise typer.Exit(DIFFERENT)


@app.command()
def generate(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A FlashNorm checkpoint: a folder or a hub id.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="The text to continue.")],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="How many tokens at most.")] = 100,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a text, greedily, and print it as it comes."""
    from transformers import TextStreamer

    from flashnorm.runtime.load import load, load_tokenizer
    from flashnorm.runtime.status import status

    with _remarks():
        model: Any = load(out, trust_remote_code=trust_remote_code)
    if (runs := status(model)).generate is not None:
        print(f"flashnorm: the model runs {runs.in_words}", file=sys.stderr)
    tokenizer = load_tokenizer(out, trust_remote_code=trust_remote_code)
    inputs = tokenizer(prompt, return_tensors="pt")
    if not inputs["input_ids"].numel():
        raise InputError(f"expected a prompt of at least one token, found {prompt!r}")
    streamer = TextStreamer(tokenizer, skip_special_tokens=True)
    with _remarks():
        model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)


@app.command("status")
def show_status(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A FlashNorm checkpoint: a folder or a hub id.")],
    as_json: AsJson = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what a checkpoint is, what of it runs on the fused kernels here, and why the rest does not."""
    from flashnorm.runtime.status import folder_status

    with _remarks():
        found = folder_status(out, trust_remote_code=trust_remote_code)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    """Warnings, and what the runtime logs, go to standard error as our own."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        yield
    for remark in remarks:
        print(f"flashnorm: {remark.message}", file=sys.stderr)


def main() -> NoReturn:
    """Run the command line and exit."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        _quiet_transformers()
        try:
            sys.exit(app(standalone_mode=True))
        finally:
            sys.stdout.flush()
    except InputError as error:
        print(f"flashnorm: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)
    except DifferenceError as error:
        _console().print(error.report, highlight=False)
        sys.exit(DIFFERENT)
    except OSError as error:
        # Files have messages of their own: this is standard output. What is left for it goes nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"flashnorm: the output cannot be written ({error.strerror or error})", file=sys.stderr)
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        print("flashnorm: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        # All is done; while Python ends, an exception would be printed from wherever it is.
        signal.signal(signal.SIGTERM, before)


def _quiet_transformers() -> None:
    """Our own messages say what there is to say; progress is for terminals."""
    from transformers import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _console() -> Console:
    """Standard output; where that is no terminal, wide enough for a table row to stay on one line mostly."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _print_plan(plan: FoldPlan) -> None:
    table = Table("norm", "count", "gain", "what happens", caption=plan.summary(), caption_justify="left")
    for row in plan.rows():
        table.add_row(*map(Text, (row.norm, str(row.count), row.gain, row.what)))
    _console().print(table)
