"""Verification of weights: healthy conversions pass, and every kind of damage is found and named."""

import itertools
import json
import math
import os
import random
import resource
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor
from toy_checkpoints import TWO_SHARDS_FOLDS, Converted, two_shards

from flashnorm.arithmetic import fold_weight, gain_of
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.planning.tensors import GainUse, TensorFold, TensorPlan
from flashnorm.verify import hashed_file
from flashnorm.verify import tensors as tensors_module
from flashnorm.verify.findings import Finding

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"

Convert = Callable[..., Converted]


def awkward(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Random bit patterns and ordinary numbers, mixed: subnormals, infinities, NaN, zeros of both signs."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape)
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    limits = torch.iinfo(integer)
    anything = torch.randint(limits.min, limits.max, (size,), generator=generator, dtype=integer).view(dtype)
    ordinary = torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
    chosen = torch.where(torch.rand(size, generator=generator) < 0.3, anything, ordinary)
    zeros = torch.tensor([0.0, -0.0], dtype=dtype)[torch.randint(2, (size,), generator=generator)]
    return torch.where(torch.rand(size, generator=generator) < 0.1, zeros, chosen).reshape(shape)


@pytest.mark.parametrize(("dtype", "gain_dtype"), list(itertools.product(DTYPES, DTYPES)))
def test_conversions_pass_in_every_dtype(convert: Convert, dtype: torch.dtype, gain_dtype: torch.dtype) -> None:
    report = convert(two_shards(dtype, gain_dtype), TWO_SHARDS_FOLDS).verify()
    assert report.findings == ()
    assert report.ok
    assert (report.folded, report.unchanged, report.norms) == (3, 3, 2)


@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_awkward_numbers_pass(convert: Convert, dtype: torch.dtype, offset: float) -> None:
    tensors = {"norm": awkward((64,), dtype, 1), "linear": awkward((200, 64), dtype, 2)}
    if dtype == torch.float64 and offset:
        # Products that float64 cannot hold are computed from halves, which want room in the exponent.
        extreme = {name: (t.abs() < 2.0**-400) | (t.abs() > 2.0**400) for name, t in tensors.items()}
        tensors = {name: t.where(~extreme[name] | t.isinf() | (t == 0), 1.5) for name, t in tensors.items()}
    # Weights that would become infinite keep their norm: that is for another test.
    folded = fold_weight(tensors["linear"], gain_of(tensors["norm"], offset), 1)
    too_large = folded.isinf() & tensors["linear"].isfinite() & tensors["norm"].isfinite()
    tensors["linear"] = tensors["linear"].where(~too_large, 0.0)
    converted = convert({"model.safetensors": tensors}, {"norm": (offset, {"linear": 1})})
    assert converted.verify().findings == ()


def test_pieces_fit_together(convert: Convert, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors of many pieces, folded along the first and the last axis, one line longer than a piece."""
    monkeypatch.setattr(tensors_module, "PIECE", 1000)
    monkeypatch.setattr(hashed_file, "_PART", 1000)
    tensors = {
        "norm": torch.randn(37),
        "last": torch.randn(500, 37),
        "first": torch.randn(37, 600),
        "plain": torch.randn(3001),
    }
    converted = convert({"model.safetensors": tensors}, {"norm": (0.0, {"last": 1, "first": 0})})
    assert converted.verify().ok
    for name, place in {"last": (499, 36), "first": (36, 599), "plain": (3000,)}.items():
        damage(converted.folder / "model.safetensors", name, place)
    found = {finding.name: finding for finding in tensor_findings(converted)}
    assert {name: finding.index for name, finding in found.items()} == {
        "last": (499, 36),
        "first": (36, 599),
        "plain": (3000,),
    }


def test_untied_head_is_checked_against_the_embedding(convert: Convert) -> None:
    tensors = {"embed": torch.randn(30, 8).bfloat16(), "norm": torch.randn(8).bfloat16()}
    converted = convert({"model.safetensors": tensors}, {"norm": (0.0, {"head": 1})}, untied={"head": "embed"})
    assert converted.verify().ok
    damage(converted.folder / "model.safetensors", "head", (7, 3))
    (finding,) = tensor_findings(converted)
    assert (finding.name, finding.index, finding.differing) == ("head", (7, 3), 1)


def test_kept_norms_must_be_at_identity(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS, keep_norms=True)
    assert converted.verify().ok
    damage(converted.folder / FIRST, "layers.0.norm.weight", (5,))
    (finding,) = tensor_findings(converted)
    assert (finding.name, finding.index, finding.expected) == ("layers.0.norm.weight", (5,), "1")


def test_a_file_whose_norms_all_went(convert: Convert) -> None:
    """It is written without tensors, and the index does not name it."""
    shards = two_shards()
    norms = {name: shard.pop(name) for shard in shards.values() for name in list(shard) if "norm" in name}
    converted = convert({**shards, "norms.safetensors": norms}, TWO_SHARDS_FOLDS)
    assert converted.verify().ok
    save_file({"layers.0.norm.weight": torch.ones(24)}, converted.folder / "norms.safetensors")
    problems = {str(finding) for finding in converted.verify().findings}
    assert "file norms.safetensors: holds tensors, but the index does not name it" in problems


def test_many_files_need_few_descriptors(convert: Convert) -> None:
    shards = {f"model-{i:05}.safetensors": {f"matrix.{i}": torch.ones(3, 2)} for i in range(40)}
    converted = convert(two_shards() | shards, TWO_SHARDS_FOLDS)
    taken = len(os.listdir("/proc/self/fd"))
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (taken + 30, limits[1]))
    try:
        assert converted.verify().ok
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_some_norms_absent_and_some_not(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS, keep_norms=True)
    rewrite(converted.folder, FIRST, lambda tensors: tensors.pop("layers.0.norm.weight"))
    (finding,) = tensor_findings(converted)
    assert finding.name == "layers.0.norm.weight"
    assert "1 of 2 folded norms are absent" in finding.problem


@pytest.mark.parametrize("seed", range(20))
def test_one_flipped_bit_is_found_and_named(convert: Convert, seed: int) -> None:
    """Any bit of any element of any tensor."""
    chance = random.Random(seed)
    dtype = chance.choice(DTYPES)
    converted = convert(two_shards(dtype), TWO_SHARDS_FOLDS)
    file = chance.choice([FIRST, SECOND])
    tensors = load_file(converted.folder / file)
    name = chance.choice(sorted(tensors))
    place = tuple(chance.randrange(size) for size in tensors[name].shape)
    was = tensors[name][place].item()
    damage(converted.folder / file, name, place, bit=chance.randrange(8 * tensors[name].element_size()))
    now = load_file(converted.folder / file)[name][place].item()

    findings = converted.verify().findings
    (finding,) = [finding for finding in findings if finding.kind == "tensor"]
    assert (finding.name, finding.index, finding.differing) == (name, place, 1)
    assert finding.elements == tensors[name].numel()
    if name != "steps":
        assert finding.stored
        assert finding.expected
        assert same_number(float(finding.stored.split()[0]), now)
        assert same_number(float(finding.expected.split()[0]), was)
    (hashed,) = [finding for finding in findings if finding.kind == "file"]
    assert hashed.name == file
    assert "SHA-256" in hashed.problem


def test_all_damage_is_counted(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    places = [(3, 4), (3, 5), (39, 23)]
    for place in places:
        damage(converted.folder / FIRST, "layers.0.q.weight", place)
    damage(converted.folder / SECOND, "steps", (2,))
    found = {finding.name: finding for finding in tensor_findings(converted)}
    assert found.keys() == {"layers.0.q.weight", "steps"}
    assert found["layers.0.q.weight"].differing == 3
    assert found["layers.0.q.weight"].index == (3, 4)
    assert "3 of 960 elements, the first at [3, 4]" in str(found["layers.0.q.weight"])


def test_a_gain_of_another_form_is_found(convert: Convert) -> None:
    """Gemma's gain folded as a plain one, and a linear that was not folded at all."""
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    fold = TensorFold(1, (GainUse("layers.0.norm2.weight", 0.0),))
    names = TensorPlan(
        folds=converted.names.folds | {"layers.0.experts": fold, "layers.0.out.weight": fold},
        norms=converted.names.norms,
    )
    wrong = Converted(converted.source, converted.folder, converted.plan, names)
    with pytest.raises(ValueError, match="24 gains do not reach over the 40 channels"):
        wrong.verify()
    names.folds.pop("layers.0.out.weight")
    (finding,) = tensor_findings(wrong)
    assert finding.name == "layers.0.experts"
    assert finding.differing
    assert finding.differing > 300


def test_missing_extra_and_reshaped_tensors(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)

    def change(tensors: dict[str, Tensor]) -> None:
        del tensors["embed.weight"]
        tensors["layers.0.surprise"] = torch.zeros(2)
        tensors["layers.0.q.weight"] = tensors["layers.0.q.weight"].reshape(24, 40)
        tensors["layers.0.kv.weight"] = tensors["layers.0.kv.weight"].float()

    rewrite(converted.folder, FIRST, change)
    problems = {finding.name: finding.problem for finding in tensor_findings(converted)}
    assert problems == {
        "embed.weight": "is missing",
        "layers.0.surprise": f"is not in the source (in {FIRST})",
        "layers.0.q.weight": "has another dtype or shape",
        "layers.0.kv.weight": "has another dtype or shape",
    }


def test_config_may_differ_by_our_keys_only(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    edit(converted.folder / "config.json", lambda config: config | {"hidden_size": 9, "added": 1, "flash_norm": False})
    problems = {finding.problem for finding in converted.verify().findings if finding.kind == "config"}
    assert problems == {f"key '{key}' is not what it must be" for key in ("hidden_size", "added", "flash_norm")}


def test_config_must_list_the_weightless_norms(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    edit(converted.folder / "config.json", lambda config: config["flashnorm"]["weightless"].pop())
    (finding,) = [finding for finding in converted.verify().findings if finding.kind == "config"]
    assert "'flashnorm'" in finding.problem


def test_index_size(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    edit(
        converted.folder / "model.safetensors.index.json",
        lambda index: index["metadata"].update(total_size=1),
    )
    (finding,) = [finding for finding in converted.verify().findings if finding.kind == "index"]
    assert finding.stored == "1"


def test_copied_files_and_the_card(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    (converted.folder / "tokenizer.json").write_text("{}")
    (converted.folder / "README.md").write_text("# Another model")
    (converted.folder / "modeling.py").write_text("import os")
    for folder in (converted.source, converted.folder):
        (folder / "optimizer.pt").write_text("a")
    (converted.source / "vocab.txt").write_text("a\nb")
    found = {finding.name: finding.problem for finding in converted.verify().findings if "hash" not in finding.problem}
    assert found["tokenizer.json"] == "has another size than flashnorm.json says"
    assert found["README.md"] == "has another size than flashnorm.json says"
    problems = {str(finding) for finding in converted.verify().findings}
    assert "file tokenizer.json: is not the source's, byte for byte" in problems
    assert "file README.md: does not contain the source's text" in problems
    assert "file modeling.py: is not in the source" in problems
    assert "file optimizer.pt: does not belong to the model" in problems
    assert "manifest flashnorm.json: does not list modeling.py" in problems
    assert "file vocab.txt: was not copied" in problems


def test_files_of_tools_do_no_harm(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    (converted.folder / ".DS_Store").write_bytes(b"\0")
    (converted.folder / ".git").mkdir()
    (converted.folder / ".git" / "HEAD").write_text("ref")
    assert converted.verify().ok


def test_what_is_below_the_top_is_copied_and_found(convert: Convert) -> None:
    """A folder named like a tool's is one at the top only; links to folders are seen."""
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    inner = converted.source / "1_Pooling" / ".cache"
    inner.mkdir(parents=True)
    (inner / "words.txt").write_text("a b")
    convert_checkpoint(converted.planned(), converted.folder, force=True)
    assert converted.verify().ok
    assert (converted.folder / "1_Pooling" / ".cache" / "words.txt").read_text() == "a b"
    (converted.folder / "link").symlink_to(inner)
    problems = [str(finding) for finding in converted.verify().findings]
    assert problems == ["file link: is not in the source", "manifest flashnorm.json: does not list link"]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda m: m["files"].pop("tokenizer.json"), "does not list tokenizer.json"),
        (lambda m: m["files"].update({"gone.json": m["files"]["config.json"]}), "lists gone.json, which is not there"),
        (lambda m: m["source"]["files"][FIRST].update(sha256="0" * 64), f"was made from another {FIRST} than"),
        (lambda m: m["source"]["files"].pop(FIRST), f"does not list the source's {FIRST}"),
        (lambda m: m["plan"]["folds"].pop(), "holds another plan than a fresh one"),
        (lambda m: m["plan"]["folds"][0].update(offset=1.0), "holds another plan than a fresh one"),
        (lambda m: m["options"].update(keep_norms=True), "names other options than were used"),
        (lambda m: m.pop("plan"), "cannot be read"),
        (lambda m: m.update(files=[]), "cannot be read"),
    ],
)
def test_the_manifest_must_tell_the_truth(convert: Convert, change: Callable, expected: str) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    edit(converted.folder / "flashnorm.json", change)
    findings = converted.verify().findings
    assert [finding.kind for finding in findings] == ["manifest"]
    assert expected in findings[0].problem


def test_no_manifest(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    (converted.folder / "flashnorm.json").unlink()
    (finding,) = converted.verify().findings
    assert finding.kind == "manifest"


def test_findings_are_bounded_but_counted(convert: Convert) -> None:
    tensors = {f"t{i:03}": torch.full((2,), float(i)) for i in range(150)} | {"norm": torch.ones(2)}
    converted = convert({"model.safetensors": tensors}, {"norm": (0.0, {"t000": 0})})
    rewrite(converted.folder, "model.safetensors", lambda tensors: [t.add_(1) for t in tensors.values()])
    report = converted.verify()
    assert len(report.findings) == 100
    assert report.problems == 151  # every tensor, and the file's hash
    assert not report.ok


def test_a_damaged_header_is_unusable_input(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    path = converted.folder / FIRST
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(InputError, match="truncated"):
        converted.verify()


def test_progress_counts_every_byte(convert: Convert) -> None:
    from flashnorm.verify.weights import verify_weights

    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    steps: list[int] = []
    report = verify_weights(converted.planned(), Checkpoint.open(converted.folder), advance=steps.append)
    assert sum(steps) == report.nbytes


def test_findings_are_json(convert: Convert) -> None:
    converted = convert(two_shards(), TWO_SHARDS_FOLDS)
    damage(converted.folder / FIRST, "layers.0.q.weight", (3, 4))
    data = json.loads(json.dumps(converted.verify().to_dict()))
    assert data["ok"] is False
    assert data["findings"][0]["index"] == [3, 4]


def damage(path: Path, name: str, place: tuple[int, ...], bit: int = 0) -> None:
    """Flip one bit of one element, in the file."""
    with safe_open(path, "pt") as file:
        tensor = file.get_tensor(name)
    raw = path.read_bytes()
    header = 8 + struct.unpack("<Q", raw[:8])[0]
    start = json.loads(raw[8:header])[name]["data_offsets"][0]
    element = sum(index * stride for index, stride in zip(place, tensor.stride(), strict=True))
    at = header + start + element * tensor.element_size() + bit // 8
    path.write_bytes(raw[:at] + bytes([raw[at] ^ 1 << bit % 8]) + raw[at + 1 :])


def rewrite(folder: Path, file: str, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a file; the index follows."""
    tensors = load_file(folder / file)
    change(tensors)
    save_file(tensors, folder / file, metadata={"format": "pt"})
    index = folder / "model.safetensors.index.json"
    if index.exists():
        data = json.loads(index.read_text())
        others = {name: where for name, where in data["weight_map"].items() if where != file}
        index.write_text(json.dumps(data | {"weight_map": others | dict.fromkeys(tensors, file)}))


def edit(path: Path, change: Callable[[dict], object]) -> None:
    """Change a JSON file, and its record in the manifest, so that only the content is wrong."""
    import hashlib

    data = json.loads(path.read_text())
    result = change(data)
    data = result if isinstance(result, dict) and "flash_norm" in result else data
    path.write_text(json.dumps(data))
    manifest = path.parent / "flashnorm.json"
    if path != manifest:
        records = json.loads(manifest.read_text())
        raw = path.read_bytes()
        records["files"][path.name] = {"sha256": hashlib.sha256(raw).hexdigest(), "size": len(raw)}
        manifest.write_text(json.dumps(records))


def tensor_findings(converted: Converted) -> list[Finding]:
    return [finding for finding in converted.verify().findings if finding.kind == "tensor"]


def same_number(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-7)
