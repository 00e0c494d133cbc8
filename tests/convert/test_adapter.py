"""A converted adapter does on the folded model what the adapter did on the source: each kind, or its refusal."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import flashnorm
import tiny
from flashnorm.errors import InputError

peft = pytest.importorskip("peft")

import adapters  # noqa: E402
from adapters import EXACT_KINDS, REFUSED, ROWS  # noqa: E402

# Float64 with norms: two ways to the same logits.
EXACT = 1e-12


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """The folders of a source in float64 and of its conversion, by a name of `MODELS`."""
    folder = tmp_path_factory.mktemp("models")

    def made(kind: str) -> tuple[Path, Path]:
        original, out = folder / kind, folder / f"{kind}-folded"
        if not out.exists():
            tiny.save(original, adapters.model(kind))
            flashnorm.convert(original, out)
        return original, out

    return made


def test_the_table_of_kinds_in_the_documents_has_a_test_for_each_row() -> None:
    page = (Path(__file__).parents[2] / "docs" / "adapters.md").read_text()
    table = page.partition("## Kinds of adapters")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \|", table, re.MULTILINE)[1:]
    assert rows == list(ROWS)
    assert sorted(name for names in ROWS.values() for name in names) == sorted([*EXACT_KINDS, *REFUSED])


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT_KINDS)
def test_a_converted_adapter_is_exact(places: Any, tmp_path: Path, name: str) -> None:
    kind, make = EXACT_KINDS[name]
    original, out = places(kind)
    adapters.train(adapters.source(original), make(), tmp_path / "adapter")
    plain = adapters.logits(adapters.source(original))
    expected = adapters.logits(adapters.with_adapter(adapters.source(original), tmp_path / "adapter"))
    assert adapters.distance(plain, expected) > 1e-3, "the adapter does nothing"
    flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "converted", folded=out)
    found = adapters.logits(adapters.with_adapter(adapters.folded(out), tmp_path / "converted"))
    assert adapters.distance(found, expected) < EXACT


@pytest.mark.slow
@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exact_is_refused(places: Any, tmp_path: Path, name: str) -> None:
    kind, make, words = REFUSED[name]
    original, out = places(kind)
    model = adapters.source(original, torch.float32)
    peft.get_peft_model(model, make()).save_pretrained(tmp_path / "adapter")
    with pytest.raises(InputError, match=words):
        flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "converted", folded=out)
    assert not (tmp_path / "converted").exists()


@pytest.fixture(scope="module")
def lora(places: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA of the source "llama" in float64."""
    folder = tmp_path_factory.mktemp("lora") / "adapter"
    adapters.train(adapters.source(places("llama")[0]), peft.LoraConfig(target_modules=["q_proj", "o_proj"]), folder)
    return folder


def changed(folder: Path, target: Path, config: dict[str, Any] | None = None, tensors: Any = None) -> Path:
    """A copy of an adapter with other keys in its config, and other tensors."""
    shutil.copytree(folder, target)
    file = target / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | (config or {})))
    if tensors is not None:
        save_file(tensors(load_file(target / "adapter_model.safetensors")), target / "adapter_model.safetensors")
    return target


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "NEW"}, "found NEW: how its weights read"),
        ({"peft_type": "XLORA"}, "classifier"),
        ({"use_new_trick": True}, '"use_new_trick": what this does is not known'),
        ({"use_qalora": True}, "groups of input channels"),
        ({"flashnorm": True}, "converted already"),
        ({"base_model_name_or_path": "x#flashnorm"}, "one of a folded model"),
        ({"base_model_name_or_path": "x#flashnorm-0123456789ab"}, "one of a folded model"),
    ],
)
def test_configs_that_are_refused(places: Any, lora: Path, tmp_path: Path, config: dict[str, Any], words: str) -> None:
    adapter = changed(lora, tmp_path / "adapter", config)
    with pytest.raises(InputError, match=words):
        flashnorm.convert_adapter(adapter, places("llama")[0], tmp_path / "converted")


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (lambda old: {name.replace("q_proj", "new_proj"): one for name, one in old.items()}, "none that is known"),
        (lambda old: old | {"base_model.model.model.layers.0.new": torch.ones(2)}, "none that is known"),
        (
            lambda old: {name: one[:, :60].contiguous() if "_A" in name else one for name, one in old.items()},
            "64 channels along axis 1",
        ),
        (lambda old: {name: one for name, one in old.items() if "lora_B" not in name}, "both factors of a LoRA"),
        (lambda old: {name: one[:4].contiguous() for name, one in old.items()}, "of one rank"),
        (lambda old: {name: one.to(torch.int64) for name, one in old.items()}, "in bfloat16, float16, float32"),
        (lambda old: {name: torch.full_like(one, 6e4).half() for name, one in old.items()}, "fit F16"),
    ],
)
def test_tensors_that_are_refused(places: Any, lora: Path, tmp_path: Path, tensors: Any, words: str) -> None:
    adapter = changed(lora, tmp_path / "adapter", tensors=tensors)
    with pytest.raises(InputError, match=words):
        flashnorm.convert_adapter(adapter, places("llama")[0], tmp_path / "converted")


def test_the_files(places: Any, lora: Path, tmp_path: Path) -> None:
    """Only factors that take a gain change; config and manifest say what the adapter belongs to."""
    original, out = places("llama")
    result = flashnorm.convert_adapter(lora, original, tmp_path / "converted", folded=out)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (lora, tmp_path / "converted"))
    weights = load_file(original / "model.safetensors")
    assert list(before) == list(after)
    for name, tensor in before.items():
        if "q_proj.lora_A" in name:
            layer = re.search(r"layers\.\d+", name)
            assert layer
            assert torch.equal(after[name], tensor * weights[f"model.{layer[0]}.input_layernorm.weight"])
        else:
            assert torch.equal(after[name], tensor)
    assert (result.scaled, result.corrected, result.unchanged) == (2, 0, 6)
    old, new = (json.loads((folder / "adapter_config.json").read_text()) for folder in (lora, tmp_path / "converted"))
    plan = json.loads((out / "flashnorm.json").read_text())["plan"]
    folds_hash = flashnorm.FoldPlan.from_dict(plan).folds_hash()
    mark = {"base_model_name_or_path": str(out), "flashnorm": True, "flashnorm_plan": folds_hash}
    mark["revision"] = f"flashnorm-{folds_hash[:12]}"
    assert new == old | mark
    with pytest.raises(InputError, match="it exists"):
        flashnorm.convert_adapter(lora, original, tmp_path / "converted")
    # Without the FlashNorm version at hand, the same tensors are made for what `convert` makes.
    flashnorm.convert_adapter(lora, original, tmp_path / "converted", force=True)
    again = load_file(tmp_path / "converted" / "adapter_model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in after.items())
    new = json.loads((tmp_path / "converted" / "adapter_config.json").read_text())
    assert new == old | mark | {"base_model_name_or_path": f"{original}#flashnorm-{folds_hash[:12]}", "revision": None}
    assert not list(tmp_path.glob(".*"))
    with pytest.raises(InputError, match="converted already"):
        flashnorm.convert_adapter(tmp_path / "converted", original, tmp_path / "twice")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_one_rounding(places: Any, lora: Path, tmp_path: Path, dtype: torch.dtype) -> None:
    original, out = places("llama")
    adapter = changed(
        lora, tmp_path / "adapter", tensors=lambda old: {name: one.to(dtype) for name, one in old.items()}
    )
    old = load_file(adapter / "adapter_model.safetensors")
    gain = load_file(original / "model.safetensors")["model.layers.0.input_layernorm.weight"]
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    product = old[name].double() * gain  # exact up to the rounding of float64, for which there is 2 ** -52 below
    for wider in (None, "float32", "float64"):
        flashnorm.convert_adapter(adapter, original, tmp_path / "converted", folded=out, dtype=wider, force=True)
        new = load_file(tmp_path / "converted" / "adapter_model.safetensors")
        assert {one.dtype for one in new.values()} == {getattr(torch, wider) if wider else dtype}
        half_ulp = torch.finfo(new[name].dtype).eps / 2
        assert ((new[name].double() - product).abs() <= product.abs() * (half_ulp + 2.0**-52)).all()


def test_narrower_is_refused(places: Any, lora: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="as wide as"):
        flashnorm.convert_adapter(lora, places("llama")[0], tmp_path / "converted", dtype="float32")


def test_options_of_the_conversion(places: Any, tmp_path: Path) -> None:
    """An adapter follows what the FlashNorm version has kept and untied; by its config, or by the same options."""
    original, _ = places("tied")
    out = tmp_path / "out"
    flashnorm.convert(original, out, untie=True, keep=["model.layers.0.*"])
    make = peft.LoraConfig(target_modules=["q_proj", "lm_head"])
    expected = adapters.logits(adapters.train(adapters.source(original), make, tmp_path / "adapter"))
    flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "one", folded=out)
    found = adapters.logits(adapters.with_adapter(adapters.folded(out), tmp_path / "one"))
    assert adapters.distance(found, expected) < EXACT
    flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "other", untie=True, keep=["model.layers.0.*"])
    one, other = (tmp_path / name / "adapter_model.safetensors" for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()
    with pytest.raises(InputError, match="found both"):
        flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "new", folded=out, untie=True)
    with pytest.raises(InputError, match="found an ordinary one"):
        flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "new", folded=original)
    with pytest.raises(InputError, match="expected an ordinary checkpoint"):
        flashnorm.convert_adapter(tmp_path / "adapter", out, tmp_path / "new")


def test_in_use(places: Any, tmp_path: Path) -> None:
    """Both ways to load it, two at once, merged, and trained on."""
    original, out = places("llama")
    expected = []
    for name, targets in (("one", ["q_proj"]), ("two", ["up_proj", "o_proj"])):
        config = peft.LoraConfig(target_modules=targets)
        expected.append(adapters.logits(adapters.train(adapters.source(original), config, tmp_path / name)))
        flashnorm.convert_adapter(tmp_path / name, original, tmp_path / f"{name}-converted", folded=out)
    model = adapters.with_adapter(adapters.folded(out), tmp_path / "one-converted", adapter_name="one")
    model.load_adapter(tmp_path / "two-converted", "two")
    for name, logits in zip(("one", "two"), expected, strict=True):
        model.set_adapter(name)
        assert adapters.distance(adapters.logits(model), logits) < EXACT
    both = adapters.with_adapter(adapters.source(original), tmp_path / "one", adapter_name="one")
    both.load_adapter(tmp_path / "two", "two")
    both.base_model.set_adapter(["one", "two"])
    model.base_model.set_adapter(["one", "two"])
    assert adapters.distance(adapters.logits(model), adapters.logits(both)) < EXACT
    assert adapters.distance(adapters.logits(model.merge_and_unload()), adapters.logits(both)) < EXACT
    injected = adapters.folded(out)
    injected.load_adapter(str(tmp_path / "one-converted"))
    assert adapters.distance(adapters.logits(injected), expected[0]) < EXACT
    # Trained on, and saved by PEFT, which drops our keys; the name of its base still tells.
    resumed = adapters.with_adapter(adapters.folded(out), tmp_path / "one-converted", is_trainable=True).train()
    resumed(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    with torch.no_grad():
        for parameter in resumed.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad
    resumed.eval().save_pretrained(tmp_path / "resumed")
    again = adapters.with_adapter(adapters.folded(out), tmp_path / "resumed")
    assert adapters.distance(adapters.logits(again), adapters.logits(resumed)) < EXACT
    with pytest.raises(InputError, match="one of a folded model"):
        flashnorm.convert_adapter(tmp_path / "resumed", original, tmp_path / "twice")


def test_pissa_saved_as_a_lora(places: Any, tmp_path: Path) -> None:
    """PEFT's way to save an initialisation that changes the source: the difference, as a LoRA of the source."""
    original, out = places("llama")
    config = peft.LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa", r=4)
    model = peft.get_peft_model(adapters.source(original, torch.float32), config)
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(tmp_path / "initial")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.05 * torch.randn_like(parameter))
    model.peft_config["default"].init_lora_weights = "pissa"
    model.save_pretrained(tmp_path / "adapter", path_initial_model_for_weight_conversion=str(tmp_path / "initial"))
    flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "converted", folded=out)
    expected = adapters.logits(adapters.with_adapter(adapters.source(original), tmp_path / "adapter"))
    found = adapters.logits(adapters.with_adapter(adapters.folded(out), tmp_path / "converted"))
    assert adapters.distance(found, expected) < 1e-6  # the adapter is in float32
    assert adapters.distance(adapters.logits(adapters.source(original)), expected) > 1e-3


@pytest.mark.parametrize("kind", ["mica", "lora-fa"])
def test_kinds_that_are_trained_in_float32(places: Any, tmp_path: Path, kind: str) -> None:
    """MiCA, which PEFT does not initialise in float64; and LoRA-FA, which is an optimizer."""
    from peft.optimizers import create_lorafa_optimizer

    original, out = places("llama")
    init = {"init_lora_weights": "mica"} if kind == "mica" else {}
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], **init)
    if kind == "mica":
        model = adapters.train(adapters.source(original, torch.float32), config, tmp_path / "adapter")
    else:
        model = peft.get_peft_model(adapters.source(original, torch.float32), config).train()
        optimizer = create_lorafa_optimizer(model, r=8, lora_alpha=8, lr=0.01)
        for _ in range(3):
            model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model.eval().save_pretrained(tmp_path / "adapter")
    expected = adapters.logits(model)
    assert adapters.distance(adapters.logits(adapters.source(original, torch.float32)), expected) > 1e-3
    flashnorm.convert_adapter(tmp_path / "adapter", original, tmp_path / "converted", folded=out)
    found = adapters.logits(adapters.with_adapter(adapters.folded(out, torch.float32), tmp_path / "converted"))
    assert adapters.distance(found, expected) < 1e-5
