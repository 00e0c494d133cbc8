"""Is a model faster without the gains? SmolLM2, source and weightless folder in turns; a table of docs/runtimes.md.

    python -m runtimes.speed [--only WORD ...]

* One process loads both. A round is one call of each; a ratio is that of a round, and the table has its median and its
  quartiles. Above 1, the weightless folder was faster.
* All weights are in float32. Nothing else should run on the machine meanwhile.
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from peers.environments import made

from .compare import child
from .models import MODELS, folders, text_ids
from .page import PAGE, put_table, table_of
from .table import ENVIRONMENTS, WAYS, WEIGHTLESS, Way

ROOT = Path(__file__).parents[2]
TIMER = Path(__file__).with_name("timer.py")
BEGIN = "<!-- make speed -->"
LENGTHS = (2, 128)  # tokens in one call; a graph of torch.export takes two or more
SECONDS = 10  # for each
# Ways that run a weightless folder without its products.
TIMED = ("torch.export", "torch.compile", "ONNX Runtime", "OpenVINO, of", "ExecuTorch", "patched")
HEAD = ["runtime", "version", *(f"{length} tokens: {what}" for length in LENGTHS for what in ("source", "ratio"))]


def timed(way: Way, of: dict[str, Path]) -> dict[str, Any]:
    """What `timer.py` found."""
    interpreter = made(ROOT / ".venv-runtimes" / way.environment, ENVIRONMENTS[way.environment])
    pairs = [[form, str(of[form].resolve())] for form in ("source", WEIGHTLESS)]
    request = {"ids": text_ids(of["source"]), "lengths": LENGTHS, "seconds": SECONDS, "folders": pairs}
    with tempfile.TemporaryDirectory(prefix="speed-", ignore_cleanup_errors=True) as scratch:
        file = Path(scratch) / "request.json"
        file.write_text(json.dumps(request))
        child([interpreter, TIMER, way.module, way.variant, file], Path(scratch))
        return json.loads((Path(scratch) / "times.json").read_text())


def row(way: Way, found: dict[str, Any]) -> list[str]:
    """A line of the table."""
    if "error" in found:
        raise RuntimeError(found["error"])
    cells = []
    for length in LENGTHS:
        rounds = found["times"][str(length)]
        ratios = [source / converted for source, converted in rounds]
        low, middle, high = statistics.quantiles(ratios, n=4)
        milliseconds = 1e3 * statistics.median(source for source, _ in rounds)
        cells += [f"{milliseconds:.1f} ms", f"{middle:.3f} ({low:.3f} to {high:.3f}), {len(rounds)} rounds"]
    return [way.name, found["version"], *cells]


def saved(of: dict[str, Path]) -> str:
    """How many norms are without weights, and the bytes that this saves."""
    sizes = {form: sum(file.stat().st_size for file in of[form].glob("*.safetensors")) for form in of}
    norms = json.loads((of[WEIGHTLESS] / "config.json").read_text())["flashnorm"]["weightless"]
    fewer = sizes["source"] - sizes[WEIGHTLESS]
    share = f"{fewer:,} bytes less of {sizes['source']:,} ({fewer / sizes['source']:.3%})"
    return f"{len(norms)} norms without weights, {share}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[""])
    words = [word.lower() for word in parser.parse_args().only]
    of = folders(MODELS[0], ROOT / "build" / "runtimes")
    print(saved(of), flush=True)
    every = [way for way in WAYS if WEIGHTLESS in way.forms and any(word in way.name for word in TIMED)]
    for way in every:
        if any(word in way.name.lower() for word in words):
            line = row(way, timed(way, of))
            print(", ".join(line), flush=True)
            rows = {old[0]: old for old in table_of(PAGE.read_text(), BEGIN)[1:]} | {way.name: line}
            lines = [rows[known.name] for known in every if known.name in rows]
            PAGE.write_text(put_table(PAGE.read_text(), BEGIN, [HEAD, *lines]))


if __name__ == "__main__":
    main()
