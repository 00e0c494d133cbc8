"""A converted folder without its source: whole ones pass, and whatever is done to one is found or named as unknown."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.files.records import file_record
from flashnorm.verify.integrity import IntegrityReport, verify_integrity

MANIFEST = "flashnorm.json"
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def make(folder: Path, config: PretrainedConfig, **options: Any) -> Path:
    """A model in three shards, with files that are copied, and its conversion."""
    source = folder / "source"
    tiny.model(config, torch.bfloat16).save_pretrained(source, max_shard_size="60KB")
    (source / "tokenizer.json").write_text('{"model": "of words"}')
    (source / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (source / "1_Pooling").mkdir()
    (source / "1_Pooling" / "chat.jinja").write_text("{{ messages }}")
    flashnorm.convert(source, folder / "converted", **options)
    return folder / "converted"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion that tests copy."""
    folder = make(tmp_path_factory.mktemp("integrity"), tiny.config("llama", tie_word_embeddings=False))
    assert sorted(path.name for path in folder.glob("*.safetensors")) == SHARDS
    return folder


@pytest.fixture
def converted(original: Path, tmp_path: Path) -> Path:
    return shutil.copytree(original, tmp_path / "copy")


def problems(folder: Path) -> list[str]:
    return [str(finding) for finding in verify_integrity(folder).findings]


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file; the manifest follows, as somebody would make it who wants to hide the change."""
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data, indent=2) + "\n")
    if path.name != MANIFEST:
        hide(path)


def hide(path: Path) -> None:
    """Give the manifest the hash that a file has now."""
    record = file_record(path)
    edit(path.parent / MANIFEST, lambda data: data["files"].update({path.name: vars(record)}))


def change_tensors(folder: Path, file: str, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    """Change the tensors of a shard; index and manifest follow."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    hide(folder / file)

    def follow(index: dict[str, Any]) -> None:
        others = {name: where for name, where in index["weight_map"].items() if where != file}
        index["weight_map"] = others | dict.fromkeys(tensors, file)
        index["metadata"]["total_size"] = sum(
            tensor.nbytes for shard in SHARDS for tensor in load_file(folder / shard).values()
        )

    edit(folder / "model.safetensors.index.json", follow)


def test_a_whole_folder_passes(converted: Path) -> None:
    report = flashnorm.verify(converted, weights_only=True)
    assert isinstance(report, IntegrityReport)
    assert report.ok, str(report)
    listed = json.loads((converted / MANIFEST).read_text())
    assert report.files == len(listed["files"]) == 10
    assert report.norms == 5
    assert report.tensors == sum(len(load_file(converted / shard)) for shard in SHARDS)
    assert report.unread == 0
    data = json.loads(report.to_json())
    assert data["claimed_source"] == listed["source"]
    assert data["manifest"]["sha256"] == file_record(converted / MANIFEST).sha256
    text = str(report)
    assert data["manifest"]["sha256"] in text
    assert listed["source"]["files"][SHARDS[0]]["sha256"] in text
    assert all(what in text for what in data["unknown"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("llama", {"keep_norms": True}),
        ("llama", {"untie": True}),
        ("gemma", {"untie": True}),  # 1 + w
        ("gemma", {"keep_norms": True}),
        ("gpt2", {}),  # biases
        ("nemotron", {}),  # norms that are spelled out
        ("qwen3_moe", {}),  # experts, stored one by one
    ],
)
def test_every_form_passes(tmp_path: Path, model_type: str, options: dict[str, bool]) -> None:
    config = tiny.config(model_type, tie_word_embeddings="untie" in options, **tiny.EXPERTS)
    report = verify_integrity(make(tmp_path, config, **options))
    assert report.ok, str(report)
    assert report.norms


def test_the_hub_names_the_source(tmp_path: Path) -> None:
    commit = "0123456789abcdef" * 2 + "01234567"
    source = tmp_path / "hub" / "models--org--tiny" / "snapshots" / commit
    tiny.save(source, tiny.model(tiny.config("llama")))
    flashnorm.convert(source, tmp_path / "converted")
    report = verify_integrity(tmp_path / "converted")
    assert f"from org/tiny at {commit}" in str(report)
    assert report.to_dict()["claimed_source"]["revision"] == commit


def test_files_of_tools_do_no_harm(converted: Path) -> None:
    (converted / ".DS_Store").write_bytes(b"\0")
    (converted / ".cache" / "huggingface").mkdir(parents=True)
    (converted / ".cache" / "huggingface" / "model.lock").touch()
    assert problems(converted) == []


@pytest.mark.slow
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_changed_byte_of_any_listed_file_is_found(converted: Path, data: st.DataObject) -> None:
    names = sorted(json.loads((converted / MANIFEST).read_text())["files"])
    path = converted / data.draw(st.sampled_from(names))
    raw = path.read_bytes()
    # Headers, where a change can do anything, are a small part of the large files.
    place = data.draw(st.integers(0, len(raw) - 1) | st.integers(0, min(len(raw), 5000) - 1))
    path.write_bytes(raw[:place] + bytes([raw[place] ^ data.draw(st.integers(1, 255))]) + raw[place + 1 :])
    try:
        report = verify_integrity(converted)
    finally:
        path.write_bytes(raw)
    hashed = [finding for finding in report.findings if finding.kind == "file"]
    assert [finding.name for finding in hashed] == [path.relative_to(converted).as_posix()]
    assert "another SHA-256" in hashed[0].problem


@pytest.mark.slow
def test_any_changed_byte_of_the_manifest_is_found_or_a_claim(converted: Path) -> None:
    """What is left is what the report prints as the manifest's word; and the manifest's own hash is another one."""
    path = converted / MANIFEST
    raw = path.read_bytes()
    before = verify_integrity(converted)

    @settings(max_examples=150, deadline=None)
    @given(place=st.integers(0, len(raw) - 1), byte=st.integers(32, 126))
    def check(place: int, byte: int) -> None:
        changed = raw[:place] + bytes([byte]) + raw[place + 1 :]
        path.write_bytes(changed)
        try:
            after = verify_integrity(converted)
        except InputError:
            return
        if after.ok:
            assert (after.manifest_sha256 == before.manifest_sha256) is (changed == raw)
            assert after.manifest.files == before.manifest.files
            assert after.manifest.plan.folds == before.manifest.plan.folds
            assert after.manifest.options == before.manifest.options

    check()


def swap(folder: Path, one: str, other: str) -> None:
    (folder / one).rename(folder / "aside")
    (folder / other).rename(folder / one)
    (folder / "aside").rename(folder / other)


@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (lambda folder: (folder / "tokenizer.json").unlink(), "lists tokenizer.json, which is not there"),
        (lambda folder: (folder / ".gitattributes").unlink(), "lists .gitattributes, which is not there"),
        (lambda folder: (folder / "1_Pooling/chat.jinja").unlink(), "lists 1_Pooling/chat.jinja, which is not there"),
        (lambda folder: (folder / "modeling.py").write_text("import os"), "does not list modeling.py"),
        (lambda folder: (folder / "1_Pooling/new.jinja").write_text(""), "does not list 1_Pooling/new.jinja"),
        (lambda folder: (folder / "more").symlink_to(folder.parent), "does not list more"),
        (lambda folder: (folder / "gone.json").symlink_to(folder / "nowhere"), "does not list gone.json"),
        (lambda folder: (folder / "tokenizer.json").rename(folder / "vocab.json"), "does not list vocab.json"),
        (lambda folder: swap(folder, SHARDS[0], SHARDS[1]), f"{SHARDS[0]}: has another size"),
        (lambda folder: swap(folder, "config.json", "tokenizer.json"), "could not be looked at any further"),
        (lambda folder: (folder / SHARDS[1]).unlink(), f"lists {SHARDS[1]}, which is not there"),
        (lambda folder: (folder / SHARDS[1]).write_bytes(b""), f"{SHARDS[1]}: has another size"),
    ],
)
def test_tampering_with_files_is_found(converted: Path, tamper: Callable, expected: str) -> None:
    tamper(converted)
    assert any(expected in problem for problem in problems(converted)), problems(converted)


NORM = "model.layers.1.input_layernorm.weight"
LINEAR = "model.layers.1.self_attn.q_proj.weight"


def shard_of(folder: Path, tensor: str) -> str:
    return json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"][tensor]


def with_tensor(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    """Change the shard that holds `LINEAR`, and hide it."""
    return lambda folder: change_tensors(folder, shard_of(folder, LINEAR), change)


def with_json(file: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Change a JSON file, and hide it."""
    return lambda folder: edit(folder / file, change)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tamper", "expected"),
    [
        (with_json("config.json", lambda c: c["flashnorm"]["weightless"].pop()), "lists other weightless norms"),
        (with_json("config.json", lambda c: c["flashnorm"]["weightless"].append("lm_head.weight")), "lm_head.weight"),
        (with_json("config.json", lambda c: c.pop("flashnorm")), "does not list the weightless norms"),
        (with_json("config.json", lambda c: c.update(flash_norm=False)), "key 'flash_norm'"),
        (with_json("config.json", lambda c: c.update(num_hidden_layers=3)), "holds another plan than a fresh one"),
        (with_json("config.json", lambda c: c.update(intermediate_size=32)), "has another shape than the model's code"),
        (with_json("model.safetensors.index.json", lambda i: i["metadata"].update(total_size=1)), "total_size"),
        (with_json(MANIFEST, lambda m: m["plan"]["folds"].pop()), "holds another plan than a fresh one"),
        (with_json(MANIFEST, lambda m: m["plan"]["folds"][0].update(offset=1.0)), "holds another plan"),
        (with_json(MANIFEST, lambda m: m["plan"]["folds"][0]["linears"].pop()), "holds another plan"),
        (with_json(MANIFEST, lambda m: m["options"].update(keep_norms=True)), "names other options"),
        (with_json(MANIFEST, lambda m: m["files"].pop("config.json")), "does not list config.json"),
        (with_tensor(lambda t: t.pop(LINEAR)), f"tensor {LINEAR}: is missing"),
        (with_tensor(lambda t: t.update({LINEAR: t[LINEAR].T.reshape(32, -1)})), "has another shape"),
        (with_tensor(lambda t: t.update({NORM: torch.ones(64)})), "4 of 5 folded norms are absent"),
    ],
)
def test_tampering_that_the_hashes_hide_is_found(converted: Path, tamper: Callable, expected: str) -> None:
    """Somebody who makes the manifest agree with his files must still agree with the model's code."""
    tamper(converted)
    found = problems(converted)
    assert any(expected in problem for problem in found), found
    assert not any("SHA-256" in problem or "size than" in problem for problem in found)


def test_norms_that_are_kept_must_be_at_identity(tmp_path: Path) -> None:
    folder = make(tmp_path, tiny.config("llama"), keep_norms=True)
    change_tensors(folder, shard_of(folder, NORM), lambda tensors: tensors[NORM][5].fill_(1.5))
    (problem,) = problems(folder)
    assert f"tensor {NORM}: is a folded norm and not at its identity value" in problem
    assert "the first at [5]: found 1.5, expected 1" in problem


def test_an_untied_head_that_is_tied(tmp_path: Path) -> None:
    folder = make(tmp_path, tiny.config("llama", tie_word_embeddings=True), untie=True)
    edit(folder / "config.json", lambda config: config.update(tie_word_embeddings=True))
    found = problems(folder)
    assert any("holds another plan" in problem and "model.norm.weight" in problem for problem in found)
    assert any("names other options" in problem for problem in found)


def test_the_manifest_of_another_conversion(converted: Path, tmp_path: Path) -> None:
    other = make(tmp_path, tiny.config("llama", num_hidden_layers=3, tie_word_embeddings=False))
    shutil.copy(other / MANIFEST, converted / MANIFEST)
    found = problems(converted)
    assert any("another size" in problem or "another SHA-256" in problem for problem in found)
    assert any("holds another plan than a fresh one" in problem for problem in found)


@pytest.mark.parametrize("seed", range(3))
def test_other_values_that_the_manifest_hides_are_unknown(converted: Path, seed: int) -> None:
    """The limit of all this, which the report states: only the source can tell a product from another number."""
    change = random.Random(seed)
    change_tensors(
        converted, shard_of(converted, LINEAR), lambda tensors: tensors[LINEAR][change.randrange(64)].mul_(2)
    )
    report = verify_integrity(converted)
    assert report.ok
    assert any("products of the source's" in what for what in report.to_dict()["unknown"])
    assert not flashnorm.verify(make_source_of(converted), converted, weights_only=True).ok


def make_source_of(converted: Path) -> Path:
    """The source that `make` converted: the same model again."""
    folder = converted.parent / "again"
    make(folder, tiny.config("llama", tie_word_embeddings=False))
    return folder / "source"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m.update(version=2), "expected a manifest of version 1, found version 2"),
        (lambda m: m.pop("source"), "expected the manifest of a conversion"),
        (lambda m: m.update(files=[]), "expected the manifest of a conversion"),
        (lambda m: m["files"].update({"config.json": "0" * 64}), "expected sha256 and size of config.json"),
        (lambda m: m["files"]["config.json"].update(size="818"), "expected sha256 and size of config.json"),
        (lambda m: m["plan"].update(version=0), "expected a fold plan of version 1"),
        (lambda m: m["plan"]["folds"][0].update(bias=["a"]), "expected a fold plan"),
        (lambda m: m["plan"]["folds"][0]["linears"][0].update(segments=[[0, 0, 1e999]]), "expected a fold plan"),
    ],
)
def test_a_manifest_of_another_form_is_unusable(converted: Path, change: Callable, expected: str) -> None:
    edit(converted / MANIFEST, change)
    with pytest.raises(InputError, match=expected) as raised:
        verify_integrity(converted)
    assert str(converted / MANIFEST) in str(raised.value)


def test_names_in_the_manifest_are_not_opened(converted: Path) -> None:
    secret = converted.parent / "secret"
    secret.write_text("outside")
    record = vars(file_record(secret))
    edit(converted / MANIFEST, lambda manifest: manifest["files"].update({"../secret": record}))
    assert problems(converted) == [f"manifest {MANIFEST}: lists ../secret, which is not there"]


def test_a_checkpoint_of_the_reference_says_nothing_of_itself(converted: Path) -> None:
    (converted / MANIFEST).unlink()
    edit_config = json.loads((converted / "config.json").read_text())
    del edit_config["flashnorm"], edit_config["flash_norm"], edit_config["flashnorm_folded"]
    (converted / "config.json").write_text(json.dumps(edit_config))
    with pytest.raises(InputError, match=r"give its source as well \(flashnorm verify MODEL OUT\)"):
        verify_integrity(converted)


def test_outputs_need_the_source(converted: Path) -> None:
    with pytest.raises(InputError, match="expected a source and its conversion, found one folder"):
        flashnorm.verify(converted)


def test_progress_counts_every_byte(converted: Path) -> None:
    steps: list[tuple[int, int]] = []
    report = flashnorm.verify(converted, weights_only=True, progress=lambda *step: steps.append(step))
    assert isinstance(report, IntegrityReport)
    sizes = [path.stat().st_size for path in converted.rglob("*") if path.is_file()]
    assert (report.nbytes, report.nbytes) == (sum(sizes), sum(sizes))
    assert (report.nbytes, report.nbytes) in steps
    assert steps[-1][0] == steps[-1][1]  # then the folded weights are looked at
