"""Loading FlashNorm checkpoints: ours, the reference's, and what is damaged."""

import json
import logging
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashnorm
import tiny
from flashnorm.convert.whole import convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.models.status import folder_status
from flashnorm.planning.planned import plan_checkpoint

FILE = "model.safetensors"
KEYS = ("flash_norm", "flashnorm_folded", "flashnorm")


def edit_tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, {"format": "pt"})


def edit_config(folder: Path, change: Callable[[dict], object]) -> dict:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))
    return config


def norms_of(model: PreTrainedModel) -> list[str]:
    return [fold.norm for fold in flashnorm.plan(model).folds]


def logits(model: PreTrainedModel) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


@pytest.fixture(params=["llama", "gemma3_text", "mixtral"])
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny.model(tiny.config(request.param, **(tiny.EXPERTS if request.param == "mixtral" else {})))


@pytest.fixture
def source(model: PreTrainedModel, tmp_path: Path) -> Path:
    return tiny.save(tmp_path / "source", model)


@pytest.fixture
def converted(source: Path, tmp_path: Path) -> Path:
    return flashnorm.convert(source, tmp_path / "converted").target


def assert_same(loaded: PreTrainedModel, model: PreTrainedModel) -> None:
    """In float32 the two differ by rounding only."""
    expected = logits(model)
    assert (logits(loaded) - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert not {name for name, _ in loaded.named_parameters()} & set(norms_of(model))


def said(load: Callable[[], PreTrainedModel], caplog: pytest.LogCaptureFixture) -> tuple[PreTrainedModel, set[str]]:
    """A loaded model, and what Transformers warned of meanwhile."""
    transformers_log = logging.getLogger("transformers")
    transformers_log.addHandler(caplog.handler)
    caplog.clear()
    try:
        loaded = load()
    finally:
        transformers_log.removeHandler(caplog.handler)
    return loaded, {record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING}


def test_loads_without_a_word(
    model: PreTrainedModel, source: Path, converted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """That is, without one that is not said of the source too: up to 5.10, Gemma 3's config alone brings some."""
    _, words = said(lambda: type(model).from_pretrained(source), caplog)
    loaded, ours = said(lambda: flashnorm.load(converted), caplog)
    assert ours <= words
    assert type(loaded) is type(model)
    assert not loaded.training
    assert_same(loaded, model)


@pytest.mark.slow
def test_generates_and_saves_and_loads_again(converted: Path, model: PreTrainedModel, tmp_path: Path) -> None:
    loaded = flashnorm.load(converted)
    tokens = loaded.generate(tiny.ids(1), max_new_tokens=8, do_sample=False)
    assert tokens.equal(model.generate(tiny.ids(1), max_new_tokens=8, do_sample=False))
    loaded.save_pretrained(tmp_path / "again")
    again = flashnorm.load(tmp_path / "again")
    assert logits(again).equal(logits(loaded))
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    written = json.loads((converted / "config.json").read_text())
    assert saved["flash_norm"] is saved["flashnorm_folded"] is True
    assert saved["flashnorm"] == written["flashnorm"]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_any_dtype(converted: Path, dtype: torch.dtype) -> None:
    loaded = flashnorm.load(converted, dtype=dtype)
    assert {parameter.dtype for parameter in loaded.parameters()} == {dtype}


def test_any_device(converted: Path) -> None:
    loaded = flashnorm.load(converted, device="meta")
    assert all(parameter.is_meta for parameter in loaded.parameters())


def test_layers_left_on_the_disk(model: PreTrainedModel, converted: Path, tmp_path: Path) -> None:
    loaded = flashnorm.load(converted, device_map={"": "disk"}, offload_folder=tmp_path / "offloaded")
    assert all(parameter.is_meta for parameter in loaded.parameters())
    assert_same(loaded, model)


def test_plain_transformers_loads_it_as_well(model: PreTrainedModel, converted: Path) -> None:
    loaded, info = AutoModelForCausalLM.from_pretrained(converted, output_loading_info=True)
    assert info["missing_keys"] == set(norms_of(model))
    expected = logits(model)
    assert (logits(loaded) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_kept_norms_are_weightless_too(model: PreTrainedModel, source: Path, tmp_path: Path) -> None:
    kept = flashnorm.convert(source, tmp_path / "kept", keep_norms=True).target
    _, info = AutoModelForCausalLM.from_pretrained(kept, output_loading_info=True)
    assert not info["missing_keys"]
    assert_same(flashnorm.load(kept), model)


def test_a_reference_checkpoint_has_no_flag_and_no_manifest(model: PreTrainedModel, converted: Path) -> None:
    (converted / "flashnorm.json").unlink()
    edit_config(converted, lambda config: [config.pop(key) for key in KEYS])
    assert_same(flashnorm.load(converted), model)


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["flash_norm", "flashnorm_folded"])
def test_the_plain_flag_of_other_engines(model: PreTrainedModel, converted: Path, flag: str) -> None:
    edit_config(converted, lambda config: [config.pop(key) for key in KEYS if key != flag])
    assert_same(flashnorm.load(converted), model)


def test_the_reference_checkpoint_with_all_norms_at_one(model: PreTrainedModel, source: Path, tmp_path: Path) -> None:
    kept = flashnorm.convert(source, tmp_path / "kept", keep_norms=True).target
    edit_config(kept, lambda config: [config.pop(key) for key in KEYS])
    assert_same(flashnorm.load(kept), model)


def test_the_reference_checkpoint_in_its_compat_mode(model: PreTrainedModel, source: Path, tmp_path: Path) -> None:
    """Its tool writes another value under our key, and its norms in float32."""
    kept = flashnorm.convert(source, tmp_path / "kept", keep_norms=True).target
    edit_config(kept, lambda config: config.update(flashnorm=True, flashnorm_mode="compat"))
    edit_tensors(kept, lambda tensors: tensors.update({n: t.float() for n, t in tensors.items() if "norm" in n}))
    assert_same(flashnorm.load(kept), model)
    with pytest.raises(InputError, match="converted already"):
        flashnorm.convert(kept, tmp_path / "again")


def test_an_ordinary_checkpoint_is_told_what_to_do(source: Path) -> None:
    with pytest.raises(InputError, match="flashnorm convert"):
        flashnorm.load(source)


def test_some_norms_absent_is_damage(model: PreTrainedModel, source: Path) -> None:
    first = "model.layers.0.input_layernorm.weight"
    edit_tensors(source, lambda tensors: tensors.pop(first))
    with pytest.raises(InputError, match=rf"1 absent \({first}\); the checkpoint is damaged"):
        flashnorm.load(source)


def test_an_absent_linear_is_damage(converted: Path) -> None:
    edit_tensors(converted, lambda tensors: tensors.pop("model.layers.0.self_attn.o_proj.weight"))
    with pytest.raises(InputError, match=r"absent.*o_proj"):
        flashnorm.load(converted)


def test_a_norm_that_is_said_to_be_folded_but_has_a_gain(source: Path, converted: Path) -> None:
    flagged = json.loads((converted / "config.json").read_text())
    edit_config(source, lambda config: config.update(flashnorm=flagged["flashnorm"]))
    with pytest.raises(InputError, match="found other values"):
        flashnorm.load(source)


@pytest.fixture
def trained(source: Path, tmp_path: Path) -> Path:
    """A converted model that plain Transformers has trained: each absent norm has got a weight."""
    planned = plan_checkpoint(Checkpoint.open(source))
    folder = convert_checkpoint(planned, tmp_path / "once", source_id="org/name", revision="abc").target
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
    optimizer.step()
    model.save_pretrained(folder)
    return folder


def test_what_was_trained_since_is_told_what_to_do(trained: Path) -> None:
    with pytest.raises(InputError, match=r"trained since it was converted; `flashnorm convert` folds"):
        flashnorm.load(trained)
    found = folder_status(trained)
    assert found.trained
    assert found.folded is None
    assert "trained since" in str(found)


@pytest.mark.slow
@pytest.mark.parametrize("keys", [KEYS, ("flash_norm",), ("flashnorm_folded",)])
def test_what_was_trained_since_is_folded_again(trained: Path, tmp_path: Path, keys: tuple[str, ...]) -> None:
    edit_config(trained, lambda config: [config.pop(key) for key in KEYS if key not in keys])
    result = flashnorm.convert(trained, tmp_path / "again", verify=True)
    assert result.report is not None
    assert result.report.ok
    assert_same(flashnorm.load(result.target), AutoModelForCausalLM.from_pretrained(trained))
    source = json.loads((result.target / "flashnorm.json").read_text())["source"]
    assert source["id"] is None
    assert source["earlier"] == {"flashnorm_version": flashnorm.__version__, "id": "org/name", "revision": "abc"}
    card = (result.target / "README.md").read_text()
    assert card.count("# FlashNorm\n") == 1
    assert "base_model:\n- org/name\n" in card


def test_what_was_trained_twice_keeps_its_provenance(trained: Path, tmp_path: Path) -> None:
    again = flashnorm.convert(trained, tmp_path / "again").target
    edit_tensors(again, lambda tensors: tensors.update({n: 2 * t for n, t in load_file(trained / FILE).items()}))
    third = flashnorm.convert(again, tmp_path / "third").target
    assert json.loads((third / "flashnorm.json").read_text())["source"]["earlier"]["id"] == "org/name"


def test_a_part_that_was_trained_is_no_training(trained: Path, tmp_path: Path) -> None:
    """Training stores all norms or none. If some are absent, the files do not belong together."""
    first = json.loads((trained / "config.json").read_text())["flashnorm"]["weightless"][0]
    edit_tensors(trained, lambda tensors: tensors.pop(first))
    with pytest.raises(InputError, match="converted already"):
        flashnorm.convert(trained, tmp_path / "again")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "found something else"),
        ({"version": 1, "weightless": [3]}, "found something else"),
        ({"version": 99, "weightless": []}, "version 1"),
        ({"version": 1, "weightless": ["no.such.norm"]}, r"no\.such\.norm"),
    ],
)
def test_a_key_that_cannot_be_read(converted: Path, entry: object, message: str) -> None:
    edit_config(converted, lambda config: config.update(flashnorm=entry))
    with pytest.raises(InputError, match=message):
        flashnorm.load(converted)


def test_what_is_neither_a_folder_nor_a_hub_id() -> None:
    with pytest.raises(InputError, match="found nothing there"):
        flashnorm.load("no/such/folder/at/all")
    with pytest.raises(InputError, match="expected a folder or a hub id"):
        flashnorm.load("nobody/no-such-model")


def test_in_inference_mode(converted: Path) -> None:
    with torch.inference_mode():
        assert logits(flashnorm.load(converted)).isfinite().all()
