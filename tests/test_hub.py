"""Models on the hub, against a small hub on loopback: what is fetched, and what is said when it cannot be."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

import flashnorm
import planted
import tiny
from flashnorm.hub import hub_identity
from forked import Commands, assert_refused, forked_commands
from hub_server import Break, Hub, Refusal, hub_server

pytestmark = pytest.mark.slow  # each test runs commands

# The same weights in other formats, and what a training run leaves.
DOUBLES = (
    *("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth", "consolidated.safetensors"),
    *("consolidated.safetensors.index.json", "tf_model.h5", "flax_model.msgpack", "rust_model.ot", "model.Q4_0.gguf"),
    *("original/params.json", "original/model.safetensors", "metal/model.bin", "onnx/model.onnx", "onnx/config.json"),
    *("onnx/model.onnx_data", "openvino/openvino_model.xml", "weights.npz", "checkpoint-500/model.safetensors"),
    *("checkpoint-500/trainer_state.json", "last.ckpt", "runs/events.out"),
)

LARGE, SMALL = "model.safetensors", ["config.json", "generation_config.json"]


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with hub_server() as running:
        yield running


@pytest.fixture(scope="module")
def run(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Commands]:
    environment = {
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HOME": str(tmp_path_factory.mktemp("home")),
        "NO_PROXY": "127.0.0.1",
        "no_proxy": "127.0.0.1",
    }
    absent = ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HF_MODULES_CACHE", "HF_TOKEN", "TRANSFORMERS_OFFLINE")
    with forked_commands(environment | dict.fromkeys(absent)) as commands:
        yield commands


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Those of a tiny Llama."""
    model = tiny.model(tiny.config("llama", num_hidden_layers=1), torch.bfloat16)
    folder = tiny.save(tmp_path_factory.mktemp("llama"), model)
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.fixture
def repository(hub: Hub, files: dict[str, bytes], request: pytest.FixtureRequest) -> str:
    """One with these files, of which nothing is cached."""
    name = "org/" + re.sub(r"\W+", "-", request.node.name)[:90].strip("-")
    hub.publish(name, files)
    return name


def source_in(out: Path) -> tuple[str, str]:
    """Hub id and commit of the source, as the manifest says."""
    source = json.loads((out / "flashnorm.json").read_text())["source"]
    return source["id"], source["revision"]


def test_a_plan_needs_the_config_alone_and_fetches_it_once(hub: Hub, run: Commands, repository: str) -> None:
    first = run("plan", repository)
    assert first.returncode == 0, first
    assert "3 norms, 3 folded into 6 linears" in first.stdout
    assert hub.fetched(repository) == ["config.json"]
    assert hub.asked_for_commits(repository) == ["main"]
    assert run("plan", repository).stdout == first.stdout
    assert hub.fetched(repository) == ["config.json"]


def test_a_conversion_fetches_all_once_and_records_the_commit(
    hub: Hub, run: Commands, files: dict[str, bytes], tmp_path: Path
) -> None:
    repository = "org/converted"
    commit = hub.publish(repository, files | dict.fromkeys(DOUBLES, b"not for us"))
    for out in (tmp_path / "first", tmp_path / "again"):
        result = run("convert", repository, out)
        assert result.returncode == 0, result
        assert result.stderr == ""
        assert source_in(out) == (repository, commit)
        assert sorted(hub.fetched(repository)) == sorted(files)
    verified = run("verify", repository, out, "--weights-only")
    assert verified.returncode == 0, verified
    assert f"{out} is the same model as {repository}" in verified.stdout
    assert sorted(hub.fetched(repository)) == sorted(files)


@pytest.mark.parametrize("prefix", ["", "inner/"])
def test_modules_of_sentence_transformers_are_fetched_with_their_weights(
    hub: Hub, run: Commands, files: dict[str, bytes], tmp_path: Path, prefix: str
) -> None:
    repository = f"org/sentences-{len(prefix)}"
    modules = {"modules.json": b'[{"path": ""}, {"path": "2_Dense"}]', "2_Dense/config.json": b"{}"}
    model = files | modules | {"2_Dense/pytorch_model.bin": b"weights", "2_Dense/model.safetensors": b"weights"}
    doubles = dict.fromkeys(DOUBLES, b"not for us")
    hub.publish(repository, {prefix + name: content for name, content in (model | doubles).items()})
    result = run("convert", repository, tmp_path / "out", *(("--subfolder", prefix) if prefix else ()))
    assert result.returncode == 0, result
    assert sorted(hub.fetched(repository)) == sorted(prefix + name for name in model)
    for name in model.keys() & {"2_Dense/pytorch_model.bin", "2_Dense/model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == b"weights"


def test_a_new_commit_is_noticed_and_what_is_new_in_it_is_fetched(
    hub: Hub, run: Commands, files: dict[str, bytes], repository: str, tmp_path: Path
) -> None:
    assert run("convert", repository, tmp_path / "out").returncode == 0
    first = source_in(tmp_path / "out")
    commit = hub.publish(repository, files | {"README.md": b"# Better\n"})
    result = run("convert", repository, tmp_path / "out", "--force")
    assert result.returncode == 0, result
    assert source_in(tmp_path / "out") == (repository, commit) != first
    assert sorted(hub.fetched(repository)) == sorted([*files, "README.md"])


def test_a_renamed_repository(hub: Hub, run: Commands, repository: str, tmp_path: Path) -> None:
    hub.names["org/former"] = repository
    result = run("convert", "org/former", tmp_path / "out")
    assert result.returncode == 0, result
    assert source_in(tmp_path / "out") == ("org/former", hub.heads[repository])


def test_a_converted_repository(hub: Hub, run: Commands, repository: str, tmp_path: Path) -> None:
    assert run("convert", repository, tmp_path / "out").returncode == 0
    hub.publish("org/folded", {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()})
    status = run("status", "org/folded")
    assert status.returncode == 0, status
    assert "org/folded: a FlashNorm checkpoint of llama, 3 norms folded" in status.stdout
    whole = run("verify", "org/folded", "--weights-only")
    assert whole.returncode == 0, whole


@pytest.fixture
def tagged(hub: Hub, files: dict[str, bytes], repository: str) -> tuple[str, str]:
    """A repository whose tag v1 is the tiny Llama, and whose main branch holds no model any more; the tag's commit."""
    commit = hub.refs[f"{repository}@v1"] = hub.heads[repository]
    hub.publish(repository, {"README.md": b"# Moved\n"})
    return repository, commit


@pytest.mark.parametrize("by", ["tag", "commit"])
def test_a_revision(hub: Hub, run: Commands, tagged: tuple[str, str], tmp_path: Path, by: str) -> None:
    repository, commit = tagged
    at = ("--revision", "v1" if by == "tag" else commit)
    assert_refused(run("plan", repository), repository, "found no config.json")
    assert "3 norms, 3 folded" in run("plan", repository, *at).stdout
    result = run("convert", repository, tmp_path / "out", *at)
    assert result.returncode == 0, result
    assert source_in(tmp_path / "out") == (repository, commit)
    assert run("verify", repository, tmp_path / "out", "--weights-only", *at).returncode == 0
    assert "3 of its norms can be folded" in run("status", repository, *at).stdout
    hub.stop()
    try:
        # What is in the cache is used; nothing else is in it.
        assert run("convert", repository, tmp_path / "again", *at).returncode == 0
        assert_refused(run("convert", repository, tmp_path / "none", "--revision", "v2"), "v2", "check the connection")
    finally:
        hub.start()
    assert source_in(tmp_path / "again") == (repository, commit)


@pytest.mark.parametrize("revision", ["v2", "0" * 40, "no such branch"])
def test_no_such_revision(run: Commands, repository: str, tmp_path: Path, revision: str) -> None:
    for command in (["plan", repository], ["convert", repository, tmp_path / "out"]):
        assert_refused(run(*command, "--revision", revision), f"{repository} at {revision}", "without that revision")
    assert not [*tmp_path.iterdir()]


def test_a_revision_of_a_gated_repository(hub: Hub, run: Commands, tagged: tuple[str, str], tmp_path: Path) -> None:
    repository, commit = tagged
    hub.tokens[repository] = "hf_right"
    convert = ("convert", repository, tmp_path / "out", "--revision", "v1")
    assert_refused(run(*convert), repository, "gated", "hf auth login")
    assert run(*convert, HF_TOKEN="hf_right").returncode == 0
    assert source_in(tmp_path / "out") == (repository, commit)


def test_a_revision_of_a_folder_is_refused(run: Commands, files: dict[str, bytes], tmp_path: Path) -> None:
    assert_refused(run("plan", tmp_path, "--revision", "v1"), str(tmp_path), "expected a hub id", "--revision")


def test_a_subfolder_is_fetched_alone(hub: Hub, run: Commands, files: dict[str, bytes], tmp_path: Path) -> None:
    repository = "org/with-folders"
    model = {f"a/b[1]/{name}": content for name, content in files.items()}
    commit = hub.publish(repository, {"README.md": b"", "model.safetensors": b"", "a/b1/config.json": b"", **model})
    within = ("--subfolder", "a/b[1]/")
    assert "3 norms, 3 folded" in run("plan", repository, *within).stdout
    result = run("convert", repository, tmp_path / "out", *within)
    assert result.returncode == 0, result
    assert sorted(hub.fetched(repository)) == sorted(model)
    assert source_in(tmp_path / "out") == (repository, commit)
    assert run("verify", repository, tmp_path / "out", "--weights-only", *within).returncode == 0
    for name in ("none", "a/b[1]/model.safetensors"):
        refused = run("convert", repository, tmp_path / "none", "--subfolder", name)
        assert_refused(refused, f"{repository}: expected a model in its folder '{name}', found none")
    for name in ("../other", "/etc"):
        assert_refused(run("plan", repository, "--subfolder", name), repository, name, "leads out of it")


def test_all_commands_take_a_revision_and_a_subfolder(hub: Hub, run: Commands, repository: str, tmp_path: Path) -> None:
    assert run("convert", repository, tmp_path / "out").returncode == 0
    tokenizer = Tokenizer(WordLevel({"<unk>": 0, "the": 5, "moon": 7}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>").save_pretrained(tmp_path / "out")
    folded = {f"fold/{file.name}": file.read_bytes() for file in (tmp_path / "out").iterdir()}
    hub.refs["org/in-folder@dev"] = hub.publish("org/in-folder", folded)
    hub.publish("org/in-folder", {"README.md": b""})
    at = ("--revision", "dev", "--subfolder", "fold")
    status = run("status", "org/in-folder", *at)
    assert "org/in-folder: a FlashNorm checkpoint of llama, 3 norms folded" in status.stdout, status
    generated = run("generate", "org/in-folder", "the moon", "--max-new-tokens", "3", *at)
    assert generated.returncode == 0, generated
    assert generated.stdout == run("generate", tmp_path / "out", "the moon", "--max-new-tokens", "3").stdout
    assert generated.stdout.startswith("the moon")
    # The tokenizer came after the conversion.
    verified = run("verify", "org/in-folder", "--weights-only", *at)
    assert verified.returncode == 1, verified
    assert "does not list tokenizer.json" in verified.stdout


def test_a_subfolder_of_a_folder(files: dict[str, bytes], tmp_path: Path) -> None:
    inner = tmp_path / "whole" / "llm"
    inner.mkdir(parents=True)
    for name, content in files.items():
        (inner / name).write_bytes(content)
    whole, out = tmp_path / "whole", tmp_path / "outs" / "a"
    assert flashnorm.plan(whole, subfolder="llm") == flashnorm.plan(inner)
    flashnorm.convert(whole, out, subfolder="llm")
    assert flashnorm.verify(whole, out, subfolder="llm", weights_only=True).ok
    model = flashnorm.load(tmp_path / "outs", subfolder="a")
    assert model.name_or_path == str(out)
    with pytest.raises(flashnorm.InputError, match=r"outs: expected a model in its folder 'b', found none"):
        flashnorm.load(tmp_path / "outs", subfolder="b")


def test_a_gated_repository_is_refused_without_the_right_token(
    hub: Hub, run: Commands, repository: str, tmp_path: Path
) -> None:
    hub.tokens[repository] = "hf_right"
    for token in ({}, {"HF_TOKEN": "hf_wrong"}):
        for command in (["plan", repository], ["convert", repository, tmp_path / "out"]):
            assert_refused(run(*command, **token), repository, "gated", "ask for access", "hf auth login", "HF_TOKEN")
    assert not [*tmp_path.iterdir()]
    assert run("convert", repository, tmp_path / "out", HF_TOKEN="hf_right").returncode == 0
    # The token is the hub's: it is not for the storage that large files are redirected to.
    assert not [one for one in hub.requests if one.address == hub.storage and one.headers["Authorization"]]


REFUSALS = {
    "gated, no token": (Refusal(401, "GatedRepo", "Access is restricted"), "gated", "ask for access"),
    "gated, not in the list": (Refusal(403, "GatedRepo", "Ask for access"), "gated", "ask for access"),
    "none of that name": (Refusal(404, "RepoNotFound", "Repository not found"), "check the name"),
    "none, or private": (Refusal(401, "RepoNotFound", "Invalid username"), "check the name", "HF_TOKEN"),
    "disabled": (Refusal(403, "", "Access to this resource is disabled"), "cannot be fetched"),
    "without a main branch": (Refusal(404, "RevisionNotFound", "Invalid rev id"), "main branch"),
    "broken": (Refusal(500, "", "Internal error"), "cannot be fetched", "run again"),
}


@pytest.mark.parametrize("why", REFUSALS)
def test_what_the_hub_refuses(hub: Hub, run: Commands, repository: str, tmp_path: Path, why: str) -> None:
    hub.refusals[repository], *words = REFUSALS[why]
    assert_refused(run("convert", repository, tmp_path / "out"), repository, *words)
    assert_refused(run("plan", repository), repository, *words)
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("name", ["org/none", "org/of--none", "org/none.git"])
def test_no_such_repository(run: Commands, name: str) -> None:
    assert_refused(run("plan", name), name, "check the name")


@pytest.mark.parametrize("missing", ["config.json", LARGE])
def test_a_repository_without_a_file(
    hub: Hub, run: Commands, files: dict[str, bytes], tmp_path: Path, missing: str
) -> None:
    repository = f"org/without-{missing}"
    hub.publish(repository, {name: content for name, content in files.items() if name != missing})
    assert_refused(run("convert", repository, tmp_path / "out"), missing, "fetch the whole repository")
    assert not [*tmp_path.iterdir()]
    if missing == "config.json":
        assert_refused(run("plan", repository), repository, "found no config.json")


def test_a_file_that_is_listed_but_gone(hub: Hub, run: Commands, repository: str, tmp_path: Path) -> None:
    hub.refusals[f"{repository}/{LARGE}"] = Refusal(404, "EntryNotFound", "Entry not found")
    assert_refused(run("convert", repository, tmp_path / "out"), repository, "cannot be fetched", LARGE)
    assert not [*tmp_path.iterdir()]


def test_a_connection_that_is_closed_in_a_shard_is_taken_up_where_it_ended(
    hub: Hub, run: Commands, files: dict[str, bytes], repository: str, tmp_path: Path
) -> None:
    hub.breaks[f"{repository}/{LARGE}"] = [Break(10_000), Break(0)]
    result = run("convert", repository, tmp_path / "out")
    assert result.returncode == 0, result
    assert hub.fetched(repository).count(LARGE) == 3
    assert run("verify", repository, tmp_path / "out", "--weights-only").returncode == 0


def test_a_connection_that_is_reset_in_a_shard_leaves_nothing_half_written(
    hub: Hub, run: Commands, repository: str, tmp_path: Path
) -> None:
    hub.breaks[f"{repository}/{LARGE}"] = [Break(10_000, reset=True)]
    assert_refused(run("convert", repository, tmp_path / "out"), repository, "cannot be fetched", "run again")
    assert not [*tmp_path.iterdir()]
    result = run("convert", repository, tmp_path / "out")
    assert result.returncode == 0, result
    # What had come is not fetched again.
    assert sorted(hub.fetched(repository)) == sorted([*SMALL, LARGE, LARGE])


def test_a_hub_that_cannot_be_reached(
    hub: Hub, run: Commands, files: dict[str, bytes], repository: str, tmp_path: Path
) -> None:
    assert run("convert", repository, tmp_path / "before").returncode == 0
    hub.publish("org/unknown", files)
    hub.stop()
    try:
        for command in (["plan", "org/unknown"], ["convert", "org/unknown", tmp_path / "none"]):
            assert_refused(run(*command), "org/unknown", "check the connection")
        # What is in the cache is used as it is.
        result = run("convert", repository, tmp_path / "out")
    finally:
        hub.start()
    assert result.returncode == 0, result
    assert source_in(tmp_path / "out") == source_in(tmp_path / "before")
    assert not (tmp_path / "none").exists()


def test_code_of_a_repository_runs_with_the_flag_only(hub: Hub, run: Commands, tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    folder = planted.custom_model(tmp_path / "planted", witness)
    names = [file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()]
    hub.publish("org/planted", {name: (folder / name).read_bytes() for name in names})
    assert_refused(run("plan", "org/planted"), "--trust-remote-code")
    assert not witness.exists()
    result = run("plan", "org/planted", "--trust-remote-code")
    assert result.returncode == 0, result
    assert "planted: 3 norms, 3 folded into 6 linears" in result.stdout
    assert "modeling_planted" in witness.read_text()


def test_code_of_another_repository_is_not_even_fetched(hub: Hub, run: Commands, files: dict[str, bytes]) -> None:
    config = json.loads(files["config.json"])
    elsewhere = {"auto_map": {"AutoConfig": "org/code--configuration_planted.PlantedConfig"}, "model_type": "planted"}
    hub.publish("org/refers", files | {"config.json": json.dumps(config | elsewhere).encode()})
    assert_refused(run("plan", "org/refers"), "--trust-remote-code")
    assert not [request for request in hub.requests if "org/code" in request.path]


class TestPush:
    WRITE: ClassVar = {"HF_TOKEN": "hf_write"}

    @pytest.fixture(autouse=True)
    def tokens(self, hub: Hub) -> None:
        hub.writers |= {"hf_write": {"me"}, "hf_read": set()}

    @pytest.fixture
    def out(self, run: Commands, repository: str, tmp_path: Path) -> Path:
        assert run("convert", repository, tmp_path / "out").returncode == 0
        return tmp_path / "out"

    def sent(self, hub: Hub) -> list[str]:
        """The large files that were sent to the storage."""
        return [request.path for request in hub.requests if request.method == "PUT"]

    def test_converted_pushed_and_fetched_again(self, hub: Hub, run: Commands, repository: str, tmp_path: Path) -> None:
        out, name = tmp_path / "out", "me/folded"
        result = run("convert", repository, out, "--verify", "--push-to-hub", name, "--private", **self.WRITE)
        assert result.returncode == 0, result
        assert result.stdout.endswith(f"uploaded to {hub.address}/{name}\n")
        assert hub.private == {name}
        assert hub.commits[hub.heads[name]] == {file.name: file.read_bytes() for file in out.iterdir()}
        card = (out / "README.md").read_text()
        front, text = yaml.safe_load(card.split("---")[1]), card.split("---")[2]
        assert front == {"tags": ["flashnorm", "weightless-rmsnorm"], "base_model": [repository]}
        assert "verified" in text.lower()
        assert run("verify", name, "--weights-only").returncode == 0
        assert f"{name}: a FlashNorm checkpoint of llama, 3 norms folded" in run("status", name).stdout

    def test_an_upload_that_broke_goes_on(self, hub: Hub, run: Commands, out: Path) -> None:
        name, before = f"me/{out.parent.name}", len(self.sent(hub))
        hub.stored.clear()
        hub.refusals[f"{name}:commit"] = Refusal(500, "", "Internal error")
        assert_refused(run("push", out, name, **self.WRITE), name, "fails", f"`flashnorm push {out} {name}`")
        assert hub.commits[hub.heads[name]] == {}
        sent = self.sent(hub)
        assert len(sent) == before + 1
        del hub.refusals[f"{name}:commit"]
        for _ in range(2):
            result = run("push", out, name, **self.WRITE)
            assert result.returncode == 0, result
            assert hub.commits[hub.heads[name]] == {file.name: file.read_bytes() for file in out.iterdir()}
        assert self.sent(hub) == sent

    def test_a_conversion_whose_upload_broke_stays(
        self, hub: Hub, run: Commands, repository: str, tmp_path: Path
    ) -> None:
        out, name = tmp_path / "out", "me/broken"
        hub.refusals[f"{name}:create"] = Refusal(500, "", "Internal error")
        result = run("convert", repository, out, "--push-to-hub", name, **self.WRITE)
        assert_refused(result, name, "fails", f"{out} is complete", f"`flashnorm push {out} {name}`")
        assert run("verify", out, "--weights-only").returncode == 0
        del hub.refusals[f"{name}:create"]
        assert run("push", out, name, **self.WRITE).returncode == 0

    @pytest.mark.parametrize(
        ("token", "words"),
        [
            ({}, ("does not know who you are", "hf auth login", "HF_TOKEN")),
            ({"HF_TOKEN": "hf_wrong"}, ("does not know who you are", "hf auth login")),
            ({"HF_TOKEN": "hf_read"}, ("may not write there", "write access")),
        ],
    )
    def test_without_the_right_token(
        self, hub: Hub, run: Commands, out: Path, token: dict[str, str], words: tuple[str, ...]
    ) -> None:
        assert_refused(run("push", out, "me/none", **token), "me/none", *words)
        assert run("verify", out, "--weights-only").returncode == 0
        assert "me/none" not in hub.heads

    def test_a_conversion_does_not_begin_if_the_hub_does_not_know_the_user(
        self, hub: Hub, run: Commands, repository: str, tmp_path: Path
    ) -> None:
        convert = ("convert", repository, tmp_path / "out", "--push-to-hub", "me/none")
        assert_refused(run(*convert), "me/none", "does not know who you are", "HF_TOKEN")
        assert_refused(run(*convert, HF_TOKEN="hf_wrong"), "me/none", "does not know who you are", "HF_TOKEN")
        assert not [*tmp_path.iterdir()]

    def test_no_connection(self, hub: Hub, run: Commands, out: Path) -> None:
        hub.stop()
        try:
            assert_refused(run("push", out, "me/none", **self.WRITE), "cannot be reached", "check the connection")
        finally:
            hub.start()

    def test_no_name_of_a_repository(self, run: Commands, out: Path) -> None:
        assert_refused(run("push", out, "me/a/b", **self.WRITE), "me/a/b", "no name")

    def test_only_what_convert_wrote_is_pushed(self, hub: Hub, run: Commands, out: Path) -> None:
        (out / ".env").write_text("KEY=secret")
        assert run("push", out, "me/clean", **self.WRITE).returncode == 0
        assert ".env" not in hub.commits[hub.heads["me/clean"]]
        (out / "notes.txt").write_text("mine")
        assert_refused(run("push", out, "me/not", **self.WRITE), "does not list notes.txt", "hf upload")
        (out / "notes.txt").unlink()
        with (out / LARGE).open("r+b") as file:
            file.seek(-1, 2)
            file.write(b"?")
        assert_refused(run("push", out, "me/not", **self.WRITE), LARGE, "SHA-256")
        (out / "flashnorm.json").unlink()
        assert_refused(run("push", out, "me/not", **self.WRITE), "found no flashnorm.json")
        assert "me/not" not in hub.heads


def test_the_hub_id_is_read_from_the_cache_path():
    commit = "0123456789" * 4
    assert hub_identity(Path(f"/c/models--org--a-name--x/snapshots/{commit}")) == ("org/a-name--x", commit)
    assert hub_identity(Path("/models/name")) == (None, None)
