"""What is tried in an environment, and what came of it."""

import json
import os
import shutil
import statistics
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from compatibility.environments import REPOSITORY, ROOT, CannotBeInstalled, Environment, last_line, run
from peers.client import Peer, PeerError

LOGS = REPOSITORY / "build" / "compatibility"
INSIDE, UPSTREAM = (Path(__file__).with_name(name) for name in ("inside.py", "upstream.py"))
HOURS = 3  # for one check
ROUNDS, PROMPT, DECODED = 5, 16, 128
DECODER = "flashnorm.optimize: generate"  # among the contenders of benchmarks/generate.py


# Tests of Transformers that folded models are meant to fail, and why.
MEANT = dict.fromkeys(
    (
        "test_can_init_all_missing_weights",
        "test_can_use_safetensors",
        "test_from_pretrained_no_checkpoint",
        "test_load_save_without_tied_weights",
        "test_model_weights_reload_no_missing_tied_weights",
    ),
    "it expects each weight that the model's class has, and folded norms have none",
)


class CheckError(Exception):
    """A check ended without a result."""


@dataclass(frozen=True)
class Result:
    """Of one check.

    Attributes:
        cell: what the table says.
        details: what is to be said besides, a line each.
    """

    cell: str
    details: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Place:
    """Where a check runs.

    Attributes:
        environment, python: this one, and its interpreter.
        pin: the interpreter of the pinned versions.
        before: the interpreter of the environment with the next older Transformers; None if there is none.
        model: the folder of SmolLM2.
    """

    environment: Environment
    python: Path
    pin: Path
    before: Path | None
    model: Path


def ask(python: Path, script: Path, *arguments: str | Path, log: str) -> Any:
    """The JSON that a script of this folder prints in an environment.

    Raises:
        CheckError: it failed, with the last line that speaks of an error.
    """
    path = LOGS / f"{log}.log"
    with path.open("w") as errors:
        try:
            answer = subprocess.run(
                [python, script, *arguments],
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=_variables() | {"PYTHONPATH": str(REPOSITORY / "tests")},
                timeout=HOURS * 3600,
                check=True,
            )
        except subprocess.TimeoutExpired:
            raise CheckError(f"not done after {HOURS} hours") from None
        except subprocess.CalledProcessError as error:
            raise CheckError(f"ended with status {error.returncode}: {last_line(path)}") from None
    return json.loads(answer.stdout.strip().splitlines()[-1])


def _variables() -> dict[str, str]:
    """PYTHONPATH is for the caller's environment, not for another."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return inherited | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def _tests(*paths: str) -> Callable[[Place], Result]:
    """The repository's own tests there."""

    def check(place: Place) -> Result:
        name = f"{place.environment.name}.{Path(paths[0]).stem}"
        log, report = LOGS / f"{name}.log", LOGS / f"{name}.xml"
        report.unlink(missing_ok=True)
        command = [place.python, "-m", "pytest", "-p", "no:cacheprovider", f"--junitxml={report}", *paths]
        with log.open("w") as output:
            try:
                subprocess.run(
                    command,
                    cwd=REPOSITORY,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    env=_variables(),
                    timeout=HOURS * 3600,
                    check=False,
                )
            except subprocess.TimeoutExpired:
                raise CheckError(f"not done after {HOURS} hours") from None
        if not report.exists():
            raise CheckError(last_line(log))
        return read_report(report)

    return check


def read_report(report: Path) -> Result:
    """Of pytest, in JUnit's format."""
    cases = ElementTree.parse(report).getroot().findall(".//testcase")
    failed = {}
    for case in cases:
        for problem in (*case.findall("failure"), *case.findall("error")):
            failed[f"{case.get('classname')}::{case.get('name')}"] = (problem.get("message") or "").split("\n")[0]
    skipped = sum(case.find("skipped") is not None for case in cases)
    ran = len(cases) - skipped
    if not ran:
        return Result(f"none of {len(cases)} ran" if cases else "no tests")
    cell = f"{len(failed)} of {ran} FAIL" if failed else f"all {ran}"
    return Result(
        cell + (f" ({skipped} skipped)" if skipped else ""), [f"`{name}`: {why}" for name, why in failed.items()]
    )


def _greedy(place: Place) -> Result:
    """Text in float32, against plain Transformers."""
    found = ask(place.python, INSIDE, "greedy", place.model, log=f"{place.environment.name}.greedy")
    text = f"equal, {found['steps']} steps" if found["equal"] else f"DIFFERENT after {found['agreeing']} tokens"
    if found["refused"]:
        return Result(f"{text}; refused", [found["refused"]])
    return Result(f"{text}; {found['way']}")


def _decode(place: Place) -> Result:
    """Tokens a second, in turns with the pinned versions: two processes that stay loaded."""
    ids, threads = list(range(100, 100 + PROMPT)), os.cpu_count() or 1
    rates: dict[str, list[float]] = {"pin": [], "here": []}
    with (
        Peer(DECODER, place.pin, place.model, "bfloat16", threads) as pin,
        Peer(DECODER, place.python, place.model, "bfloat16", threads) as here,
    ):
        for _ in range(ROUNDS):
            rates["pin"].append(DECODED / pin.decode(ids, DECODED)[0])
            rates["here"].append(DECODED / here.decode(ids, DECODED)[0])
    ratios = [ours / theirs for ours, theirs in zip(rates["here"], rates["pin"], strict=True)]
    middle = statistics.median(rates["here"]) / statistics.median(rates["pin"])
    return Result(
        f"{middle:.2f} ({min(ratios):.2f} to {max(ratios):.2f}); {statistics.median(rates['here']):.0f} tokens a second"
    )


def _new_types(place: Place) -> Result:
    """The sweep's rows of the types that the next older Transformers in the table lacks."""
    if place.before is None:
        return Result("none older")
    name = f"{place.environment.name}.types"
    types = [ask(python, INSIDE, "types", log=name) for python in (place.python, place.before)]
    new = sorted(set(types[0]) - set(types[1]))
    rows = ask(place.python, INSIDE, "examine", *new, log=name) if new else []
    right = sum("exact" in row or "nothing folds" in row for row in rows)
    details = [f"`{row[0]}`: {'; '.join(filter(None, row[-2:]))}" for row in rows]
    return Result(f"{right} of {len(new)} exact, or without a norm that folds", details)


def _upstream(place: Place) -> Result:
    """Transformers' own tests, on plain, optimised and folded models."""
    version, folder = place.environment.version, ROOT / "upstream"
    source = folder / f"transformers-{version}"
    if not source.exists():
        archive = folder / f"transformers-{version}.tar.gz"
        pip: list[str | Path] = [place.python, "-m", "pip", "download", "--no-deps", "--no-binary", "transformers"]
        run([*pip, "--dest", folder, f"transformers=={version}"], {}, LOGS / f"{place.environment.name}.sdist.log")
        shutil.unpack_archive(archive, folder, filter="data")
    found = ask(place.python, UPSTREAM, source, log=f"{place.environment.name}.upstream")
    return compare(found["outcomes"], found["models"])


def compare(outcomes: dict[str, dict[str, dict[str, str]]], models: dict[str, dict[str, int]]) -> Result:
    """`outcomes[kind][way][test]` of Transformers' tests: what fails on our models and passes on plain ones."""
    details, ours = [], 0
    for kind, ways in outcomes.items():
        plain = ways["plain"]
        passed = [test for test, outcome in plain.items() if outcome == "passed"]
        for way, found in ways.items():
            if way == "plain":
                continue
            worse = {test: found.get(test, "did not run") for test in passed if found.get(test) != "passed"}
            meant = {test: MEANT[test] for test in worse if way == "folded" and test in MEANT}
            ours += len(worse) - len(meant)
            done = ", ".join(f"{count} {what}" for what, count in models[f"{kind}, {way}"].items())
            details.append(
                f"{kind}, {way}: {len(passed) - len(worse)} of the {len(passed)} that pass plain; models: {done}"
            )
            for test, outcome in worse.items():
                reason = f" (as meant: {meant[test]})" if test in meant else ""
                details.append(f"{kind}, {way}: `{test}` {outcome}{reason}")
    return Result(f"{ours} fail on ours only" if ours else "none fails on ours only", details)


# Column of the table -> what fills it.
CHECKS: dict[str, tuple[str, Callable[[Place], Result]]] = {
    "contracts": ("contracts", _tests("tests/contracts")),
    "optimised": ("proofs, fused runs", _tests("tests/cpu", "tests/models")),
    "real": ("real models", _tests("tests/real")),
    "greedy": ("greedy text in float32; who ran", _greedy),
    "decode": ("decode, relative to the pin", _decode),
    "adapters": ("its own tests", _tests("tests/models/test_adapters.py")),
    "lm-eval": ("its own tests", _tests("tests/integrations/test_lm_eval.py")),
    "vLLM": ("its own tests", _tests("tests/integrations/test_vllm.py")),
    "new types": ("new types", _new_types),
    "upstream": ("Transformers' tests", _upstream),
}


def attempt(check: str, place: Place) -> Result:
    """A check, whatever happens."""
    try:
        return CHECKS[check][1](place)
    except (CheckError, CannotBeInstalled, PeerError) as error:
        return Result(f"FAILED: {str(error).splitlines()[0]}")
