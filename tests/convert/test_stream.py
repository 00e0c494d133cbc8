"""From hub to hub, shard by shard, over a hub on loopback."""

import hashlib
import json
import random
import re
import shutil
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
import tiny
from architectures.configs import tiny_config
from forked import Commands, assert_refused, forked_commands
from hub_server import Break, Hub, Refusal, Request, hub_server

pytestmark = pytest.mark.slow  # each test runs commands

CARD, MANIFEST = "README.md", "flashnorm.json"
WRITE: dict[str, str] = {"HF_TOKEN": "writes"}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as running:
        running.writers["writes"] = {"me"}
        yield running


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def run(hub: Hub, home: Path) -> Iterator[Commands]:
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    absent = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "TRANSFORMERS_OFFLINE")
    with forked_commands(environment | WRITE | dict.fromkeys(absent)) as commands:
        yield commands


@dataclass
class Model:
    """A repository, its conversion the plain way, and the folder that has both as `source` and `plain`."""

    folder: Path
    repository: str
    files: dict[str, bytes]
    shards: list[str]
    plain: dict[str, bytes]


def published(
    hub: Hub, run: Commands, home: Path, folder: Path, name: str, model: Any, size: str, *options: str
) -> Model:
    model.save_pretrained(folder / "source", max_shard_size=size)
    (folder / "source" / "tokenizer.json").write_text('{"model": "of words"}')
    (folder / "source" / CARD).write_text("---\nlicense: mit\n---\n# A model\n")
    files = {path.name: path.read_bytes() for path in (folder / "source").iterdir()}
    repository = f"org/{name}"
    hub.publish(repository, files | {"pytorch_model.bin": b"not for us", "notes.txt": b"mine"})
    result = run("convert", repository, folder / "plain", *options)
    assert result.returncode == 0, result
    plain = {path.name: path.read_bytes() for path in (folder / "plain").iterdir()}
    shards = sorted(name for name in files if name.endswith(".safetensors"))
    assert len(shards) > 4
    hub.requests.clear()
    shutil.rmtree(home / "hub")  # else shards would be copied from there, not fetched
    return Model(folder, repository, files, shards, plain)


@pytest.fixture(scope="module")
def model(hub: Hub, run: Commands, home: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    built = tiny.model(tiny.config("llama"), torch.bfloat16)
    return published(hub, run, home, tmp_path_factory.mktemp("model"), "model", built, "40KB")


@pytest.fixture
def target(request: pytest.FixtureRequest) -> str:
    return "me/" + re.sub(r"\W+", "-", request.node.name)[:90].strip("-")


def assert_as_plain(hub: Hub, target: str, model: Model) -> None:
    """The repository holds what the plain way writes, byte for byte; its card also says what was verified."""
    found = hub.commits[hub.heads[target]]
    assert found.keys() == model.plain.keys()
    others = found.keys() - {CARD, MANIFEST}
    assert {name: found[name] for name in others} == {name: model.plain[name] for name in others}
    assert found[CARD].decode().startswith(model.plain[CARD].decode().rstrip())
    assert "Weights, bit for bit" in found[CARD].decode()
    manifests = [json.loads(files[MANIFEST]) for files in (found, model.plain)]
    for manifest in manifests:
        del manifest["files"][CARD]
    assert manifests[0] == manifests[1]


def commits(hub: Hub, target: str) -> list[Request]:
    return [request for request in hub.requests if request.path == f"/api/models/{target}/commit/main"]


def uploads(hub: Hub) -> list[str]:
    return [request.path.removeprefix("/") for request in hub.requests if request.method == "PUT"]


def test_the_result_is_that_of_the_plain_way(
    hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path
) -> None:
    result = run("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream", "--json")
    assert result.returncode == 0, result
    assert_as_plain(hub, target, model)
    assert not list(tmp_path.iterdir())
    facts = json.loads(result.stdout)
    assert facts["target"] is None
    assert facts["pushed"] == f"{hub.address}/{target}"
    assert (facts["shards"], facts["resumed_shards"]) == (len(model.shards), 0)
    # What was found shard by shard is what `verify` finds of the whole.
    expected = flashnorm.verify(model.folder / "source", model.folder / "plain", weights_only=True).weights.to_dict()
    assert facts["report"]["weights"] | {"seconds": 0} == json.loads(json.dumps(expected)) | {"seconds": 0}
    assert expected["ok"]
    assert "shard by shard" in facts["report"]["outputs"]["skipped"]
    fetched = hub.fetched(model.repository)
    assert "pytorch_model.bin" not in fetched
    assert "notes.txt" not in fetched
    assert len(commits(hub, target)) == 1


@pytest.mark.parametrize(
    ("name", "dtype", "size", "options"),
    [
        ("llama", torch.bfloat16, "40KB", ["--keep-norms"]),
        ("starcoder2", torch.bfloat16, "30KB", []),  # norm biases: a new bias needs a weight of another shard
        ("gemma", torch.float32, "60KB", ["--untie"]),
        ("gpt2", torch.bfloat16, "20KB", ["--center", "--untie"]),
        ("gemma4_text", torch.bfloat16, "40KB", ["--cancel", "exact"]),
    ],
)
def test_other_models_and_options(
    hub: Hub,
    run: Commands,
    home: Path,
    target: str,
    tmp_path: Path,
    name: str,
    dtype: torch.dtype,
    size: str,
    options: list[str],
) -> None:
    built = tiny.model(tiny_config(name), dtype)
    model = published(hub, run, home, tmp_path, target.replace("/", "-"), built, size, *options)
    result = run("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream", *options)
    assert result.returncode == 0, result
    assert_as_plain(hub, target, model)


def test_products_that_do_not_fit(hub: Hub, run: Commands, home: Path, target: str, tmp_path: Path) -> None:
    """Shards that are uploaded already are written again, as norms of later shards must be kept."""
    built = tiny.model(tiny.config("llama"), torch.float16)
    with torch.no_grad():
        for layer in built.model.layers:
            layer.input_layernorm.weight[5] = 3000
            for linear in (layer.self_attn.q_proj, layer.self_attn.v_proj):
                linear.weight[0, 5] = 60
        built.model.norm.weight[7] = 2000
        built.lm_head.weight[3, 7] = 100
    model = published(hub, run, home, tmp_path, "overflows", built, "12KB")
    result = run("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream", "--json")
    assert result.returncode == 0, result
    kept = json.loads(result.stdout)["plan"]["kept"].values()
    assert sum("too large" in one["reason"] for one in kept) == 3
    assert_as_plain(hub, target, model)


def test_a_subfolder_at_a_tag(hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path) -> None:
    files = {f"inner/{name}": data for name, data in model.files.items()}
    commit = hub.publish("org/inner", files)
    hub.refs["org/inner@v1"] = commit
    hub.publish("org/inner", {"config.json": b"{}"})
    place = ("org/inner", "--revision", "v1", "--subfolder", "inner")
    result = run("convert", *place, tmp_path / "out", "--push-to-hub", target, "--stream")
    assert result.returncode == 0, result
    found = hub.commits[hub.heads[target]]
    assert {name: found[name] for name in model.shards} == {name: model.plain[name] for name in model.shards}
    source = json.loads(found[MANIFEST])["source"]
    assert (source["id"], source["revision"]) == ("org/inner", commit)


# Converts with --stream, and prints when each stage of each shard began and ended, and the most bytes that were in the
# working folder.
_WATCHED = """
import json, logging, pathlib, sys, threading, time
import flashnorm

source, target, place = arguments
events, peak, ended = [], 0, threading.Event()

class Handler(logging.Handler):
    def emit(self, record):
        events.append([*record.getMessage().split(), record.created])

def watch():
    global peak
    while not ended.wait(0.002):
        try:
            files = [path.lstat() for path in pathlib.Path(place).rglob("*") if path.is_file()]
        except OSError:  # one is gone meanwhile
            continue
        peak = max(peak, sum(512 * file.st_blocks for file in files))

logging.getLogger("flashnorm.convert.stream").addHandler(Handler())
logging.getLogger("flashnorm.convert.stream").setLevel(logging.DEBUG)
watcher = threading.Thread(target=watch)
watcher.start()
try:
    flashnorm.convert(source, pathlib.Path(place) / "out", push_to_hub=target, stream=True)
finally:
    ended.set()
    watcher.join()
print(json.dumps({"events": events, "peak": peak}))
"""


def test_the_stages_overlap_in_room_for_three_shards(
    hub: Hub, run: Commands, home: Path, target: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Over a link of some MB a second; this prints the timeline."""
    built = tiny.model(tiny.config("llama", intermediate_size=8000, num_hidden_layers=6), torch.bfloat16)
    model = published(hub, run, home, tmp_path, "slow", built, "2MB")
    (tmp_path / "work").mkdir()
    hub.rate = 6e6
    try:
        result = run("-c", _WATCHED, model.repository, target, tmp_path / "work")
    finally:
        hub.rate = None
    assert result.returncode == 0, result
    assert_as_plain(hub, target, model)
    found = json.loads(result.stdout)
    begun: dict[tuple[str, str], float] = {}
    spans: dict[str, list[tuple[float, float]]] = {"fetch": [], "fold": [], "verify": [], "upload": []}
    for what, name, which, at in found["events"]:
        if which == "begins":
            begun[what, name] = at
        else:
            spans[what].append((begun[what, name], at))
    assert all(len(one) == len(model.shards) for one in spans.values())
    # While a shard is uploaded, the next one is fetched, and one is folded, time and again.
    assert _overlaps(spans["fetch"], spans["upload"]) >= len(model.shards) // 3
    assert _overlaps(spans["fold"], spans["upload"]) + _overlaps(spans["fold"], spans["fetch"]) >= 2
    largest = max(len(model.files[name]) for name in model.shards)
    small = sum(len(data) for name, data in model.plain.items() if name not in model.shards)
    blocks = 4096 * 20 * len(model.shards)  # stand-ins, journal and notes fill whole blocks
    assert 2 * largest < found["peak"] < 3 * largest + small + blocks
    with capsys.disabled():
        print(f"\nroom: {found['peak'] / largest:.2f} shards of {largest / 1e6:.1f} MB at most")
        print(timeline(spans))


def _overlaps(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> int:
    """How many pairs of spans overlap."""
    return sum(a < d and c < b for a, b in one for c, d in other)


def timeline(spans: dict[str, list[tuple[float, float]]], columns: int = 100) -> str:
    """The spans of each stage in a line, its shards as digits."""
    first = min(start for one in spans.values() for start, _ in one)
    width = (max(end for one in spans.values() for _, end in one) - first) / columns
    lines = []
    for stage, found in spans.items():
        line = [" "] * columns
        for number, (start, end) in enumerate(sorted(found)):
            begin = int((start - first) / width)
            for column in range(begin, max(int((end - first) / width), begin + 1)):
                line[min(column, columns - 1)] = str(number % 10)
        lines.append(f"{stage:>8} |{''.join(line)}|")
    return "\n".join(lines) + f"\n{'':>8}  {columns * width:.1f} s"


def test_killed_at_random_moments_and_repeated(
    hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path
) -> None:
    """Nothing is seen before the end, and nothing is uploaded twice."""
    chance, kills = random.Random(0), 0
    hub.stored.clear()  # else the hub has them from other tests
    sent = len(uploads(hub))
    command = ("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream")
    hub.rate = 4e5
    try:
        # Each run lives a little longer: on a slow machine, seconds pass before there is anything to continue with.
        while (result := run(*command, dies_after=chance.uniform(0.5, 3) + kills / 2)).returncode:
            assert result.returncode == -signal.SIGALRM, result
            kills += 1
            assert len(hub.commits.get(hub.heads.get(target, ""), {})) in (0, len(model.plain))  # nothing, or all
            assert not (tmp_path / "out").exists()
    finally:
        hub.rate = None
    assert kills > 0
    assert_as_plain(hub, target, model)
    new = uploads(hub)[sent:]
    assert len(new) == len(set(new)) == len(model.shards)
    assert not list(tmp_path.iterdir())


class TestFailures:
    def test_a_shard_that_is_folded_wrong_is_not_uploaded(
        self, hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path
    ) -> None:
        """As by a bug, or by a faulty processor: here, one bit of one tensor."""
        code = """
import importlib, sys
import torch
import flashnorm.cli
shards = importlib.import_module("flashnorm.convert.shards")
right = shards.fold_weight
def wrong(weight, gain, axis, out):
    right(weight, gain, axis=axis, out=out)
    out.view(torch.int16).view(-1)[7] ^= 1
shards.fold_weight = wrong
sys.argv = ["flashnorm", *arguments]
flashnorm.cli.main()
"""
        sent = len(uploads(hub))
        command = ("convert", model.repository, str(tmp_path / "out"), "--push-to-hub", target, "--stream")
        result = run("-c", code, *command)
        assert result.returncode == 1, result
        assert "is not the rounded product" in result.stdout
        assert f"{target} is NOT the same model as {model.repository}" in result.stdout.replace("\n", " ")
        assert not hub.commits[hub.heads[target]]
        expected = {hashlib.sha256(model.plain[name]).hexdigest() for name in model.shards}
        assert set(uploads(hub)[sent:]) <= expected  # shards without a folded tensor are right
        assert run(*command).returncode == 0
        assert_as_plain(hub, target, model)

    def test_a_source_that_is_not_what_the_hub_says(
        self, hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path
    ) -> None:
        name = model.shards[2]
        damaged = bytearray(model.files[name])
        damaged[-3] ^= 1
        commit = hub.publish("org/damaged", model.files)
        hub.served[f"org/damaged/{name}"] = bytes(damaged)
        command = ("convert", "org/damaged", tmp_path / "out", "--push-to-hub", target, "--stream")
        assert_refused(run(*command), name, "expected a file with the SHA-256", "run the same command again")
        assert not hub.commits[hub.heads[target]]
        del hub.served[f"org/damaged/{name}"]
        result = run(*command)
        assert result.returncode == 0, result
        assert "from an earlier run" in result.stdout
        assert commit in hub.commits

    def test_a_connection_that_breaks(self, hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path) -> None:
        name = model.shards[1]
        hub.breaks[f"{model.repository}/{name}"] = [Break(9000), Break(100, reset=True)]
        command = ("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream")
        result = run(*command)
        assert result.returncode == 0, result
        assert_as_plain(hub, target, model)

    def test_a_commit_that_is_refused(self, hub: Hub, run: Commands, model: Model, target: str, tmp_path: Path) -> None:
        command = ("convert", model.repository, tmp_path / "out", "--push-to-hub", target, "--stream")
        hub.refusals[f"{target}:commit"] = Refusal(500, message="broken")
        try:
            assert_refused(run(*command), target, "all shards are uploaded, and the same command commits them")
        finally:
            del hub.refusals[f"{target}:commit"]
        sent = len(uploads(hub))
        assert run(*command).returncode == 0
        assert len(uploads(hub)) == sent
        assert_as_plain(hub, target, model)

    def test_a_repository_that_may_not_be_written(self, hub: Hub, run: Commands, model: Model, tmp_path: Path) -> None:
        before = len(hub.fetched(model.repository))
        command = ("convert", model.repository, tmp_path / "out", "--push-to-hub", "you/there", "--stream")
        assert_refused(run(*command), "you/there", "you may not write there")
        assert model.shards[0] not in hub.fetched(model.repository)[before:][-1:]
        assert not list(tmp_path.iterdir())

    @pytest.mark.parametrize(
        ("arguments", "words"),
        [
            (["org/model", "--stream"], "add --push-to-hub"),
            (["org/model", "--push-to-hub", "me/x", "--stream", "--verify"], "each shard is verified anyway"),
            (["org/model", "--push-to-hub", "me/x", "--stream", "--workers", "2"], "one process keeps up"),
            ([".", "--push-to-hub", "me/x", "--stream"], "a folder is converted without --stream"),
            (["org/model"], "expected a folder to write"),
            (["org/model", "--stream", "--push-to-hub", "me/x", "--dry-run"], "no --stream"),
        ],
    )
    def test_arguments(self, run: Commands, model: Model, arguments: list[str], words: str) -> None:
        assert_refused(run("convert", *arguments), words)

    def test_a_path_that_exists(self, hub: Hub, run: Commands, model: Model, tmp_path: Path) -> None:
        before = len(hub.requests)
        result = run("convert", model.repository, tmp_path, "--stream", "--push-to-hub", "me/exists")
        assert_refused(result, "found it exists; name another OUT")
        assert not [request for request in hub.requests[before:] if request.method != "GET"]
