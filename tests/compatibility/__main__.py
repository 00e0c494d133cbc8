"""Tries flashnorm with old and new versions of its upstreams, and writes `docs/compatibility.md`.

    make compatibility [ONLY="transformers-5.4.0 ..."] [CHECKS="contracts greedy ..."]

* What an environment gave is kept in `build/compatibility`; the document is written from all that is there, so that a
  single row can be tried again. An environment that cannot be made, or a check that fails, is a cell that says so.
"""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import smollm2

from compatibility import environments
from compatibility.checks import CHECKS, INSIDE, LOGS, CheckError, Place, ask, attempt
from compatibility.document import DOCUMENT, document, machine
from compatibility.environments import CannotBeInstalled, Environment


class Table:
    """The environments, their interpreters, and the rows."""

    def __init__(self, found: list[Environment], wheel: Path, model: Path):
        self._environments, self._wheel, self._model = found, wheel, model
        self._made: dict[str, Path] = {}

    def python(self, environment: Environment) -> Path:
        """Made once in a run."""
        if environment.name not in self._made:
            self._made[environment.name] = environments.python(environment, self._wheel)
        return self._made[environment.name]

    def row(self, environment: Environment, checks: list[str], before: dict[str, Any]) -> dict[str, Any]:
        """Of the table; `before` are the results of earlier runs."""
        row = {"name": environment.name, "versions": {}, "machine": machine(), "problem": "", "results": dict(before)}
        try:
            python = self.python(environment)
            row["versions"] = ask(python, INSIDE, "versions", log=f"{environment.name}.versions")
            pin = next(one for one in self._environments if one.is_pin)
            same = [one for one in self._environments if one.package == "transformers"]
            older = same[: same.index(environment)] if environment in same else []
            place = Place(environment, python, self.python(pin), self.python(older[-1]) if older else None, self._model)
        except (CheckError, CannotBeInstalled) as error:
            return row | {"problem": str(error), "results": {}}
        for check in environment.checks:
            if check in checks:
                print(f"{environment.name}: {check} ...", file=sys.stderr, flush=True)
                row["results"][check] = asdict(attempt(check, place))
                print(f"{environment.name}: {check}: {row['results'][check]['cell']}", file=sys.stderr, flush=True)
        return row


def main() -> None:
    """Try and write."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--only", nargs="*", default=[], metavar="ENVIRONMENT")
    arguments.add_argument("--checks", nargs="*", choices=CHECKS, default=[])
    options = arguments.parse_args()
    found = environments.resolved()
    names = [environment.name for environment in found]
    if unknown := set(options.only) - set(names):
        arguments.error(f"no environment is called {', '.join(sorted(unknown))}; there are: {', '.join(names)}")
    LOGS.mkdir(parents=True, exist_ok=True)
    model = smollm2.build(LOGS.parent / "smollm2-135m")
    table = Table(found, environments.build_wheel(), model)
    for environment in found:
        if options.only and environment.name not in options.only:
            continue
        path = LOGS / f"{environment.name}.json"
        before = json.loads(path.read_text())["results"] if options.checks and path.exists() else {}
        row = table.row(environment, options.checks or list(CHECKS), before)
        path.write_text(json.dumps(row, indent=1) + "\n")
        paths = (LOGS / f"{name}.json" for name in names)
        DOCUMENT.write_text(document([json.loads(path.read_text()) for path in paths if path.exists()]))


if __name__ == "__main__":
    try:
        main()
    except CannotBeInstalled as error:
        sys.exit(f"{error}")
