"""The command line: each command reads its arguments, makes one call, and prints the result.

Exit status: 0: done, or verified and the same; 1: verified and different; 2: unusable input.
"""

import contextlib
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from typer.core import TyperCommand

from flashnorm import __version__
from flashnorm.errors import DifferenceError, InputError

if TYPE_CHECKING:
    from rich.console import Console

    from flashnorm.convert.dry_run import DryRun
    from flashnorm.convert.result import ConvertResult
    from flashnorm.plan import FoldPlan

DIFFERENT, UNUSABLE = 1, 2

app = typer.Typer(
    help="FlashNorm: fold norm weights into the linear layers that read them. The model stays the same.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # importing rich takes longer than everything else that the help needs
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model's folder, or its id on the Hugging Face hub.")]
Revision = Annotated[
    str | None,
    typer.Option("--revision", help="Branch, tag or commit of the repository, if the model is given by its hub id."),
]
Subfolder = Annotated[
    str, typer.Option("--subfolder", help="The model's folder inside of it, if it is not the top one.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private, if it does not exist yet.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JsonProgress = Annotated[bool, typer.Option("--json-progress", help="Print progress as JSON lines on standard error.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers", metavar="N", min=1, help="How many processes; by default, as many as cores and memory allow."
    ),
]
Untie = Annotated[
    bool, typer.Option("--untie", help="Give a tied output head its own weight, so that the final norm can fold.")
]
Keep = Annotated[
    list[str] | None,
    typer.Option(
        "--keep",
        metavar="PATTERN",
        help="Do not fold norms whose name fits the shell pattern (may be repeated); `final`: the last norm.",
    ),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]


class _Command(TyperCommand):
    """A command. It imports Transformers, which takes seconds, only when it runs, and not to show its help."""

    def invoke(self, ctx: Any) -> Any:
        _quiet_transformers()
        return super().invoke(ctx)


@app.callback(invoke_without_command=True)
def _options(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"flashnorm {__version__}")
        raise typer.Exit


@app.command(cls=_Command)
def plan(
    model: Model,
    as_json: AsJson = False,
    untie: Untie = False,
    keep: Keep = None,
    cancel: Annotated[
        bool, typer.Option("--cancel", help="Show instead which norms' divisions cancel in norms behind them.")
    ] = False,
    center: Annotated[
        bool, typer.Option("--center", help="Show instead which LayerNorms become RMSNorms if weights are centred.")
    ] = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Show which norms fold into which linear layers, which are kept, and why. Needs config.json only."""
    if cancel or center:
        if keep:
            raise InputError("expected --cancel or --center without --keep, which says what is not to fold, found both")
        _print_removable(model, cancel, center, as_json, untie, revision, subfolder, trust_remote_code)
        return
    from flashnorm.hub import local_folder
    from flashnorm.plan import Kind
    from flashnorm.planning.checks import quantizations
    from flashnorm.planning.config import load_config
    from flashnorm.planning.planned import plan as make_plan

    folder = local_folder(model, revision, subfolder, config_only=True)
    config = load_config(folder, trust_remote_code, source=model)
    result = make_plan(folder, untie=untie, keep=keep or (), trust_remote_code=trust_remote_code)
    if as_json:
        print(result.to_json())
        return
    _print_plan(result)
    if any(kept.kind is Kind.TIED for kept in result.kept.values()):
        print("A tied head gets a weight of its own with --untie; its norm folds then.")
    for section, _ in quantizations(config.to_dict()):
        print(
            f"The config declares {section}, but only the weights tell which of them are stored quantised; a norm that "
            "one of these reads is kept. See convert --dry-run."
        )


def _print_removable(
    model: str,
    cancel: bool,
    center: bool,
    as_json: bool,
    untie: bool,
    revision: str | None,
    subfolder: str,
    trust_remote_code: bool,
) -> None:
    from rich.table import Table
    from rich.text import Text

    from flashnorm.planning.removable import removable

    found = removable(model, revision=revision, subfolder=subfolder, untie=untie, trust_remote_code=trust_remote_code)
    if as_json:
        print(found.to_json())
        return
    divisions = ("its division", found.division_rows(), found.division_summary())
    means = ("its mean", found.centring_rows(), found.centring_summary())
    for heading, rows, summary in ([divisions] if cancel else []) + ([means] if center else []):
        table = Table("norm", "count", heading, "why", caption=summary, caption_justify="left")
        for row in rows:
            table.add_row(*map(Text, (row.norm, str(row.count), row.verdict, row.what)))
        _console().print(table if rows else summary)


@app.command(cls=_Command)
def convert(
    model: Model,
    out: Annotated[Path | None, typer.Argument(metavar="OUT", help="The folder to write; --stream needs none.")] = None,
    keep_norms: Annotated[
        bool,
        typer.Option("--keep-norms", help="Keep folded norms at their identity value, for runtimes that need them."),
    ] = False,
    untie: Untie = False,
    keep: Keep = None,
    center: Annotated[
        bool,
        typer.Option("--center", help="Centre what LayerNorms read, where that is possible: they are RMSNorms then."),
    ] = False,
    cancel: Annotated[
        str | None,
        typer.Option(
            "--cancel",
            metavar="exact|drop",
            help="Do not compute norms whose divisions cancel; eps of the norms behind becomes exact, or is ignored.",
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT if it exists and convert wrote all of it.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Verify OUT before it appears; its model card says what was found.")
    ] = False,
    look: Annotated[
        bool,
        typer.Option("--dry-run", help="Only say what would be done. Reads headers and norms, on the hub as well."),
    ] = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option("--push-to-hub", metavar="REPO", help="Then upload OUT to this repository, as `push` does."),
    ] = None,
    private: Private = False,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="With --push-to-hub, from hub to hub: fetch, fold, verify, upload and drop a shard while the next one "
            "comes. Needs room for three shards, beside OUT or in the current folder.",
        ),
    ] = False,
    workers: Workers = None,
    as_json: AsJson = False,
    json_progress: JsonProgress = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the FlashNorm version of a checkpoint. An interrupted run continues when it is repeated.

    With --verify, the exit status is 1 if the result is not the same model; OUT then stays as it was.
    """
    from rich.filesize import decimal

    from flashnorm.convert.whole import convert as run
    from flashnorm.progress import show_progress

    options: dict[str, Any] = {
        "revision": revision,
        "subfolder": subfolder,
        "keep_norms": keep_norms,
        "untie": untie,
        "keep": keep or (),
        "center": center,
        "cancel": cancel,
        "force": force,
        "trust_remote_code": trust_remote_code,
    }
    if look:
        from flashnorm.convert.dry_run import dry_run

        if out is None or stream:
            raise InputError("expected MODEL and OUT with --dry-run, and no --stream, found other arguments")
        found = dry_run(model, out, **options)
        print(found.to_json()) if as_json else _print_dry_run(found)
        return
    with show_progress("converting", json_progress) as shown:
        result = run(
            model,
            out,
            **options,
            verify=verify,
            push_to_hub=push_to_hub,
            private=private or None,
            stream=stream,
            workers=workers,
            progress=shown.bytes,
            stage=shown.stage,
        )
    report = result.report
    if as_json:
        target = None if result.target is None else str(result.target)
        facts = asdict(replace(result, report=None)) | {"target": target, "plan": result.plan.to_dict()}
        print(json.dumps(facts | {"report": report and report.to_dict()}, indent=1))
        return
    place = push_to_hub if stream else out
    files = f"{result.shards} file{'s' if result.shards > 1 else ''}"
    resumed = f" ({result.resumed_shards} from an earlier run)" if result.resumed_shards else ""
    centred = f"; {result.centred} LayerNorms are RMSNorms, {result.writers} tensors are centred"
    centred = (centred if result.centred else "") + (
        f"; {result.cancelled} norms are not computed" if result.cancelled else ""
    )
    print(
        f"{place}: {result.norms} norms folded into {result.linears} tensors{centred}; "
        f"{result.tensors} tensors in {files}{resumed}; {decimal(result.bytes_written)} written in "
        f"{result.seconds:.1f} s"
    )
    if result.spelled_out:
        print(
            f"{result.spelled_out} norm tensors stay, at their identity value: Transformers would initialise them to "
            "another one"
        )
    for row in result.plan.rows():
        if row.kept:
            print(f"{row.norm} ({row.count}) {row.what}")
    _print_remarks(result)
    if report is not None:
        _console().print(report, highlight=False)
    if result.pushed is not None:
        print(f"uploaded to {result.pushed}")


@app.command(cls=_Command)
def push(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder that `convert` wrote.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="The repository's id on the Hugging Face hub.")],
    private: Private = False,
) -> None:
    """Upload a folder that `convert` wrote, unchanged, to the Hugging Face hub.

    If an upload broke, this sends what is missing.
    """
    from flashnorm.convert.push import push as run

    print(f"uploaded to {run(out, repository, private=private or None)}")


@app.command(cls=_Command)
def adapter(
    original: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="An adapter of MODEL (PEFT): its folder, or its hub id.")
    ],
    model: Model,
    out: Annotated[Path, typer.Argument(metavar="OUT_ADAPTER", help="The folder to write.")],
    folded: Annotated[
        str | None,
        typer.Option(
            "--folded",
            metavar="OUT",
            help="The FlashNorm version of MODEL, to follow what its conversion did. Without it: `convert` with the "
            "same --untie and --keep made it.",
        ),
    ] = None,
    untie: Untie = False,
    keep: Keep = None,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32 or float64: write the adapter in this wider dtype.")
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace OUT_ADAPTER if it exists and flashnorm wrote all of it.")
    ] = False,
    as_json: AsJson = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    adapter_revision: Annotated[
        str | None, typer.Option("--adapter-revision", help="As --revision, for ADAPTER.")
    ] = None,
    adapter_subfolder: Annotated[str, typer.Option("--adapter-subfolder", help="As --subfolder, for ADAPTER.")] = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Write the version of an adapter that fits MODEL's FlashNorm version. Reads MODEL's headers and norms."""
    from flashnorm.convert.adapter import convert_adapter

    result = convert_adapter(
        original,
        model,
        out,
        folded=folded,
        revision=revision,
        subfolder=subfolder,
        adapter_revision=adapter_revision,
        adapter_subfolder=adapter_subfolder,
        untie=untie,
        keep=keep or (),
        dtype=dtype,
        force=force,
        trust_remote_code=trust_remote_code,
    )
    if as_json:
        print(json.dumps(asdict(result) | {"target": str(result.target)}, indent=1))
        return
    corrected = f", {result.corrected} corrected" if result.corrected else ""
    print(
        f"{out}: {result.kind} for {result.base}; {result.scaled} tensors have taken a gain{corrected}, "
        f"{result.unchanged} stay as they are"
    )
    if result.left_out:
        print(f"left out, as it does not belong to the adapter: {_listed(result.left_out)}")


@app.command(cls=_Command)
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
    json_progress: JsonProgress = False,
    html: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as an HTML page.")
    ] = None,
    workers: Workers = None,
    adapters: Annotated[
        tuple[str, str] | None,
        typer.Option(
            "--adapter",
            metavar="ADAPTER OUT_ADAPTER",
            help="Check instead that OUT with OUT_ADAPTER, made by `adapter`, is MODEL with ADAPTER.",
        ),
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Check that a conversion is the same model.

    Weights are compared bit for bit, outputs with a reference run in float64. The exit status is 1 if they differ.
    A converted folder alone is checked against its manifest and its model's code.
    """
    if adapters is not None:
        if out is None or html is not None or workers is not None:
            raise InputError("expected MODEL and OUT with --adapter, no --html or --workers, found other arguments")
        _verify_adapter(
            model, out, *adapters, weights_only, text, as_json, json_progress, revision, subfolder, trust_remote_code
        )
        return
    from flashnorm.progress import show_progress
    from flashnorm.verify.page import check_page, write_page
    from flashnorm.verify.whole import verify as run

    if html is not None:
        check_page(html)
    with show_progress("comparing weights" if out else "hashing files", json_progress) as shown:
        report = run(
            model,
            out,
            revision=revision,
            subfolder=subfolder,
            weights_only=weights_only,
            text=text,
            progress=shown.bytes,
            stage=shown.stage,
            trust_remote_code=trust_remote_code,
            workers=workers,
        )
    if html is not None:
        write_page(report, html)
    if as_json:
        print(report.to_json())
    else:
        _console().print(report, highlight=False)
    if not report.ok:
        raise typer.Exit(DIFFERENT)


def _verify_adapter(
    model: str,
    out: Path,
    adapter: str,
    out_adapter: str,
    weights_only: bool,
    text: Path | None,
    as_json: bool,
    json_progress: bool,
    revision: str | None,
    subfolder: str,
    trust_remote_code: bool,
) -> None:
    from flashnorm.progress import show_progress
    from flashnorm.verify.adapter import verify_adapter

    with show_progress("comparing adapters", json_progress) as shown:
        report = verify_adapter(
            model,
            out,
            adapter,
            out_adapter,
            revision=revision,
            subfolder=subfolder,
            weights_only=weights_only,
            text=text,
            progress=shown.bytes,
            stage=shown.stage,
            trust_remote_code=trust_remote_code,
        )
    if as_json:
        print(report.to_json())
    else:
        _console().print(report, highlight=False)
    if not report.ok:
        raise typer.Exit(DIFFERENT)


@app.command(cls=_Command)
def generate(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A FlashNorm checkpoint: a folder or a hub id.")],
    prompt: Annotated[
        str | None, typer.Argument(metavar="PROMPT", help="The text to continue; `-`: from standard input.")
    ] = None,
    file: Annotated[Path | None, typer.Option("--file", "-f", help="Take the text from this UTF-8 file.")] = None,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Answer as the model's chat template asks; without a text, message by message."),
    ] = False,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="What a chat begins with.")] = None,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", "-n", min=1, help="How many tokens at most, in each answer.")
    ] = 100,
    temp: Annotated[
        float, typer.Option("--temp", min=0, help="The temperature to draw tokens with; 0 takes the likeliest.")
    ] = 0.0,
    top_p: Annotated[
        float | None, typer.Option("--top-p", min=0, max=1, help="Draw among tokens of this probability together.")
    ] = None,
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=0, help="Draw among so many of the likeliest tokens; 0: among all.")
    ] = None,
    seed: Annotated[int | None, typer.Option("--seed", min=0, help="Of the random numbers.")] = None,
    stop: Annotated[list[str] | None, typer.Option("--stop", help="Stop after this text (may be repeated).")] = None,
    revision: Revision = None,
    subfolder: Subfolder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Continue a text, or answer in a chat, and print it as it is generated. How fast it was is said at the end."""
    from flashnorm.models.load import load, load_tokenizer
    from flashnorm.models.status import status
    from flashnorm.models.writing import Choice, TextWriter

    if system_prompt is not None and not chat:
        raise InputError("expected --chat with --system-prompt, found none")
    choice, text = Choice(temp, top_p, top_k, seed), _text_from(prompt, file, wanted=not chat)
    with _remarks():
        model: Any = load(out, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code)
    if (runs := status(model)).generate is not None:
        print(f"flashnorm: the model runs {runs.in_words}", file=sys.stderr)
    tokenizer = load_tokenizer(out, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code)
    writer = TextWriter(model, tokenizer, choice, max_new_tokens, stop or ())
    if not chat:
        assert text is not None
        with _remarks():
            print(f"flashnorm: {writer.continue_text(text)}", file=sys.stderr)
        return
    messages = [] if system_prompt is None else [{"role": "system", "content": system_prompt}]
    for said in _asked() if text is None else [text]:
        messages.append({"role": "user", "content": said})
        with _remarks():
            written = writer.answer(messages)
        print(f"flashnorm: {written}", file=sys.stderr)
        messages.append({"role": "assistant", "content": written.text})


def _text_from(prompt: str | None, file: Path | None, *, wanted: bool) -> str | None:
    """The text to continue or to answer: an argument, a file, or standard input; None to ask at the terminal."""
    if prompt is not None and file is not None:
        raise InputError("expected either PROMPT or --file, found both")
    if prompt is not None and prompt != "-":
        return prompt
    if prompt is None and file is None and sys.stdin.isatty():
        if wanted:
            raise InputError("expected a PROMPT, --file or a text on standard input, found none")
        return None
    try:
        with open(sys.stdin.fileno() if file is None else file, encoding="utf-8") as stream:
            return stream.read().removesuffix("\n")
    except (OSError, UnicodeDecodeError) as error:
        place = "standard input" if file is None else file
        raise InputError(f"{place}: expected a UTF-8 text, found none that can be read ({error})") from error


def _asked() -> Iterator[str]:
    """Messages from the terminal, until it ends (Ctrl-D)."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401, so that a line can be edited
    with contextlib.suppress(EOFError):
        while True:
            if said := input("> ").strip():
                yield said


@app.command("status", cls=_Command)
def show_status(
    out: Annotated[str, typer.Argument(metavar="OUT", help="A FlashNorm checkpoint: a folder or a hub id.")],
    as_json: AsJson = False,
    revision: Revision = None,
    subfolder: Subfolder = "",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Say what a checkpoint is, and which parts of its model run on the fused kernels.

    For the other parts, it says why they do not.
    """
    from flashnorm.models.status import folder_status

    with _remarks():
        found = folder_status(out, revision=revision, subfolder=subfolder, trust_remote_code=trust_remote_code)
    print(json.dumps(found.to_dict(), indent=1) if as_json else found)


@contextlib.contextmanager
def _remarks() -> Iterator[None]:
    """Print the warnings of the block on standard error as messages of flashnorm."""
    with warnings.catch_warnings(record=True) as remarks:
        warnings.simplefilter("always", UserWarning)
        yield
    for remark in remarks:
        print(f"flashnorm: {remark.message}", file=sys.stderr)


def main() -> NoReturn:
    """Run the command line and exit."""
    if sys.argv[1:] == ["--version"]:  # a script's question is answered without building all commands
        print(f"flashnorm {__version__}")
        sys.exit(0)
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
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
        # Errors of files are reported elsewhere, so this one is of standard output. Discard what is left for it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        print(f"flashnorm: the output cannot be written ({error.strerror or error})", file=sys.stderr)
        sys.exit(UNUSABLE)
    except KeyboardInterrupt:
        print("flashnorm: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        # All work is done. While Python exits, the handler's exception would only be printed as a traceback.
        signal.signal(signal.SIGTERM, before)


def _quiet_transformers() -> None:
    """Turn off Transformers' log messages, which FlashNorm's own replace, and its progress bars off a terminal."""
    from transformers import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()


def _console() -> "Console":
    """A console for standard output; if that is no terminal, it is wide enough for most table rows."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=160)


def _print_remarks(found: "ConvertResult | DryRun") -> None:
    for remark in found.remarks:
        print(remark)
    if found.left_out:
        print(f"left out, as it does not belong to the model: {_listed(found.left_out)}")


def _listed(names: Iterable[str]) -> str:
    """File names in a line. A name may hold anything, also what a terminal acts on."""
    return ", ".join(name if name.isprintable() else repr(name) for name in names)


def _print_dry_run(found: "DryRun") -> None:
    from rich.filesize import decimal

    _print_plan(found.plan)
    for norm, why in found.undecided.items():
        print(f"{norm} may be kept: {why}; only the conversion tells")
    files = f"{len(found.written)} file{'s' if len(found.written) > 1 else ''}"
    centred = f", centre {found.writers} tensors" if found.writers else ""
    print(
        f"would fold {len(found.plan.folds)} norms into {found.linears} tensors{centred}, read "
        f"{decimal(found.bytes_read)}, and write {files} of weights and {len(found.copied)} copied files to "
        f"{found.target}: {decimal(found.needed)}, of {decimal(found.free)} that are free"
    )
    if found.copied:
        print(f"copied: {_listed(found.copied)}")
    _print_remarks(found)
    print("nothing was written")


def _print_plan(plan: "FoldPlan") -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table("norm", "count", "gain", "what happens", caption=plan.summary(), caption_justify="left")
    for row in plan.rows():
        table.add_row(*map(Text, (row.norm, str(row.count), row.gain, row.what)))
    _console().print(table)
