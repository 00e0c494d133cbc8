"""Damages checkpoints at random, and looks at what becomes of it. Prints a row of counts for each kind of attack.

* `reader`: header, index or config of a sharded checkpoint, through `Checkpoint.open` and a read of every tensor.
* `verify`: a byte of any file of a converted folder, through `verify_weights`. It must never be found the same.
* `plan`: a value of a config, through `flashnorm.plan`.
* `manifest`: manifest or config of a converted model, checked without its source.
* `load`: config or index of a converted model, through `flashnorm.load`.

Allowed is success or `InputError`: no other exception, no file opened outside of the folder (but Python's own), no case
longer than its limit in seconds, no more memory than the limit. Run it by `python tests/reliability/fuzz.py --help`,
with `PYTHONPATH=tests`.
"""

import argparse
import copy
import json
import os
import random
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiny
from flashnorm.convert.whole import convert, convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.format import listed_norms
from flashnorm.models.load import load
from flashnorm.planning.planned import plan
from flashnorm.verify.weights import verify_weights
from flashnorm.verify.whole import verify
from handmade import content, make

SECONDS = {"reader": 5, "verify": 20, "plan": 120, "manifest": 60, "load": 60}
MEMORY = 4 << 30

ODD = [
    *(None, True, False, [], {}, "", "x", "F32", "../x", "/etc/passwd", "a.safetensors", "\0", "\ud800", "\u202e"),
    *(0, 1, -1, -0.0, 0.5, 8, 2**31, 2**53, 2**63 - 1, 2**63, 10**18, -(2**63), 10**400, 1e308),
    *(float("inf"), float("nan"), [0, 0], [1, 0], [-1, 4], [2**62, 2**62], [[]], {"a": {"a": 1}}, [None]),
]
# Some that are there: what is right elsewhere is the best disguise.
FAMILIAR = [
    "dtype",
    "shape",
    "data_offsets",
    "__metadata__",
    "weight_map",
    "metadata",
    "flashnorm",
    "layer.norm.weight",
]


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container in a JSON value with every key or index of it."""
    keys = value.keys() if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    return [place for key in keys for place in ((value, key), *places(value[key]))]


def changed_json(raw: bytes, chance: random.Random) -> bytes:
    """JSON with some values, keys or pairs of another kind; perhaps a key twice, perhaps other damage in its bytes."""
    data = json.loads(raw)
    for _ in range(chance.randint(1, 3)):
        if not (found := places(data)):
            break
        container, key = chance.choice(found)
        match chance.randrange(5):
            case 0:
                del container[key]
            case 1 if isinstance(container, dict):
                container[chance.choice([*FAMILIAR, str(chance.choice(ODD))])] = container.pop(key)
            case 2:
                other, at = chance.choice(found)
                if at in other if isinstance(other, dict) else at < len(other):
                    container[key] = json.loads(json.dumps(other[at]))
            case 3 if isinstance(container[key], int):
                container[key] += chance.choice([-8, -1, 1, 2, 8, 2**32])
            case _:
                container[key] = copy.deepcopy(chance.choice(ODD))
    text = json.dumps(data).encode()
    match chance.randrange(8):
        case 0:
            return changed_bytes(text, chance)
        case 1 if len(text) > 2:
            at = text.find(b'"', chance.randrange(len(text)))
            return text[:at] + text[at : at + 40] + text[at:]
        case 2:
            depth = chance.choice([50, 120, 5000])
            return text[:1] + b'"deep":' + b"[" * depth + b"]" * depth + b"," + text[1:]
    return text


def changed_bytes(raw: bytes, chance: random.Random) -> bytes:
    """A byte replaced, a part cut out or put in twice, or the end cut off."""
    at = chance.randrange(len(raw))
    end = min(len(raw), at + chance.randint(1, 30))
    match chance.randrange(4):
        case 0:
            return raw[:at] + bytes([raw[at] ^ chance.randint(1, 255)]) + raw[at + 1 :]
        case 1:
            return raw[:at] + raw[end:]
        case 2:
            return raw[:end] + raw[at:]
    return raw[:at]


class Reader:
    """The files that describe a checkpoint in shards."""

    def __init__(self, folder: Path):
        self.folder = make(folder / "source", shards=3).folder
        self.files = content(self.folder)

    def attack(self, chance: random.Random) -> str:
        name = chance.choice([*self.files, *(file for file in self.files if file.endswith("safetensors"))])
        raw = self.files[name]
        if name.endswith("safetensors"):
            end = 8 + int.from_bytes(raw[:8], "little")
            header = changed_json(raw[8:end], chance)
            length = len(header) + (chance.choice([-1, 1, 8, 2**40]) if chance.random() < 0.05 else 0)
            damaged = max(length, 0).to_bytes(8, "little") + header + raw[end:]
            damaged = changed_bytes(damaged, chance) if chance.random() < 0.05 else damaged
        else:
            damaged = changed_json(raw, chance)
        path = self.folder / name
        path.write_bytes(damaged)
        try:
            checkpoint = Checkpoint.open(self.folder)
            for tensor in checkpoint.tensors:
                checkpoint.read_bytes(tensor)
            listed_norms(checkpoint.config, self.folder)
            return "still a checkpoint"
        finally:
            path.write_bytes(raw)


class Verify:
    """A converted folder. Only what the manifest says about things that no file shows can change unnoticed."""

    def __init__(self, folder: Path):
        self.source = make(folder / "source", shards=3)
        (self.source.folder / "README.md").write_text("# A model\n")
        (self.source.folder / "tokenizer.json").write_text('{"model": "of words"}')
        self.folder = folder / "converted"
        convert_checkpoint(self.source.planned(), self.folder, source_id="a/b")
        self.files = content(self.folder)

    def attack(self, chance: random.Random) -> str:
        name = chance.choice(list(self.files))
        raw = self.files[name]
        path = self.folder / name
        damaged = changed_json(raw, chance) if name.endswith("json") and chance.random() < 0.5 else raw
        path.write_bytes(damaged if damaged != raw else changed_bytes(raw, chance))
        try:
            report = verify_weights(self.source.planned(), Checkpoint.open(self.folder))
            if report.ok and path.read_bytes() != raw:
                if name != "flashnorm.json":
                    raise AssertionError(f"{name} was changed, and found the same")
                return "found the same: a remark in the manifest"
            return "found the same: nothing changed" if report.ok else "found different"
        finally:
            path.write_bytes(raw)


class Plan:
    """The config of a small model."""

    KINDS = ("llama", "gemma3_text", "gpt2", "qwen3", "mixtral", "phi3", "olmo2", "qwen3_moe")

    def __init__(self, folder: Path):
        self.path = folder / "config.json"
        self.configs = [tiny.config(kind, **tiny.EXPERTS).to_json_string().encode() for kind in self.KINDS]

    def attack(self, chance: random.Random) -> str:
        self.path.write_bytes(changed_json(chance.choice(self.configs), chance))
        plan(self.path.parent)
        return "still a plan"


class Converted:
    """A real model of one layer, converted, in two shards."""

    def __init__(self, folder: Path):
        self.folder = folder / "converted"
        model = tiny.model(tiny.config("qwen3", num_hidden_layers=1))
        model.save_pretrained(folder / "source", max_shard_size=100_000)
        convert(folder / "source", self.folder)
        self.files = content(self.folder)

    def change(self, name: str, chance: random.Random) -> None:
        """Change a file's JSON."""
        (self.folder / name).write_bytes(changed_json(self.files[name], chance))


class Manifest(Converted):
    """Only what the manifest claims of things that are not there, like the source, can change unnoticed."""

    def attack(self, chance: random.Random) -> str:
        name = chance.choice(["flashnorm.json", "config.json"])
        self.change(name, chance)
        try:
            if not verify(self.folder, weights_only=True).ok:
                return "found different"
            if name != "flashnorm.json":
                raise AssertionError(f"{name} was changed, and found whole")
            return "found whole: a claim, or a remark in the manifest"
        finally:
            (self.folder / name).write_bytes(self.files[name])


class Load(Converted):
    """A config that still goes with the weights is a model's."""

    def attack(self, chance: random.Random) -> str:
        name = chance.choice(["config.json", "config.json", "model.safetensors.index.json"])
        self.change(name, chance)
        try:
            load(self.folder, optimize=False)
            return "loaded"
        finally:
            (self.folder / name).write_bytes(self.files[name])


ATTACKS: dict[str, Callable[[Path], Any]] = {
    "reader": Reader,
    "verify": Verify,
    "plan": Plan,
    "manifest": Manifest,
    "load": Load,
}

# Where opened files must be; empty while nothing is watched.
allowed: list[str] = []
outside: list[str] = []


def watch(event: str, arguments: tuple[Any, ...]) -> None:
    """Note what is opened elsewhere."""
    if event == "open" and allowed and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        if not path.startswith(tuple(allowed)):
            outside.append(path)


class TooSlow(BaseException):
    """Not an `Exception`, which would be caught where any error of a config's class is."""


def too_slow(number: int, frame: object) -> None:
    """Stop what takes too long."""
    raise TooSlow


def run(kind: str, runs: int, seed: int) -> bool:
    """Attack so many times; print what happened. Returns whether all was as it must be."""
    counts: Counter[str] = Counter()
    failures: list[str] = []
    slowest, started = 0.0, time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        attack = ATTACKS[kind](Path(folder))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        allowed[:] = [os.path.realpath(folder), sys.prefix, sys.base_prefix, "/proc/", "/sys/", "/dev/"]
        allowed.extend(os.path.realpath(path) for path in sys.path if path)
        for number in range(runs):
            begun = time.monotonic()
            signal.alarm(SECONDS[kind])
            try:
                counts[attack.attack(random.Random(f"{seed}-{number}"))] += 1
            except InputError:
                counts["refused"] += 1
            except (Exception, TooSlow) as error:
                failures.append(f"case {seed}-{number}: {type(error).__name__}: {str(error)[:200]}")
            finally:
                signal.alarm(0)
            slowest = max(slowest, time.monotonic() - begun)
        allowed.clear()
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    what = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    print(
        f"fuzz {kind}: {runs} cases (seed {seed}) in {time.monotonic() - started:.0f} s: {what}; {len(failures)} other "
        f"exceptions or hangs, {len(outside)} files opened outside; slowest {slowest:.2f} s, {grown:.0f} MB more memory"
    )
    for line in [*failures[:10], *outside[:10]]:
        print("  " + line)
    return not failures and not outside


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=ATTACKS)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    import torch
    from transformers import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    signal.signal(signal.SIGALRM, too_slow)
    used = (
        int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE")
        if sys.platform == "linux"
        else 0
    )
    resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, resource.RLIM_INFINITY))
    sys.addaudithook(watch)
    sys.exit(not run(arguments.kind, arguments.runs, arguments.seed))


if __name__ == "__main__":
    main()
