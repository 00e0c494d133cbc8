"""Adapters of the model before it was folded are refused; those of the folded model, and harmless ones, are right."""

import copy
import json
import pickle
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.files.reader import Checkpoint
from flashnorm.format import FOLDED_BASE
from flashnorm.models.load import Loading
from flashnorm.planning.planned import plan_checkpoint

peft = pytest.importorskip("peft")

READS = ["q_proj", "v_proj"]
REFUSED = "gives wrong results here"
Fold = Callable[[str], PreTrainedModel]

CONFIGS: dict[str, Callable[[], Any]] = {
    "q and v": lambda: peft.LoraConfig(target_modules=READS),
    "all linears": lambda: peft.LoraConfig(target_modules="all-linear"),
    "one layer": lambda: peft.LoraConfig(target_modules=READS, layers_to_transform=[1]),
    "dora": lambda: peft.LoraConfig(target_modules=READS, use_dora=True),
    "modules to save": lambda: peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["up_proj"]),
    "a block to save": lambda: peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["mlp"]),
    "a norm to save": lambda: peft.LoraConfig(target_modules=["o_proj"], modules_to_save=["input_layernorm"]),
    "loha": lambda: peft.LoHaConfig(target_modules=READS),
    "ia3 that scales inputs": lambda: peft.IA3Config(target_modules=["up_proj"], feedforward_modules=["up_proj"]),
}
HARMLESS: dict[str, Callable[[], Any]] = {
    "reads no norm": lambda: peft.LoraConfig(target_modules=["o_proj", "down_proj"]),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
}


def trained(model: PreTrainedModel, config: Any, folder: Path) -> tuple[Path, torch.Tensor]:
    """An adapter of a model with random weights, saved, and the logits of both."""
    with_adapter = peft.get_peft_model(model, config).train()
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in with_adapter.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    with_adapter.save_pretrained(folder)
    return folder, logits(with_adapter.eval())


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tiny.ids()).logits


def close(one: torch.Tensor, other: torch.Tensor) -> bool:
    return bool((one - other).norm() <= 1e-5 * other.norm())


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folders of a source and its conversion, by model type."""
    folder = tmp_path_factory.mktemp("adapters")
    for kind in ("llama", "gemma"):
        tiny.save(folder / kind, tiny.model(tiny.config(kind)))
        flashnorm.convert(folder / kind, folder / f"{kind}-folded")
    return folder


def source(places: Path, kind: str = "llama") -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(places / kind).eval()


@pytest.fixture(params=["load", "load, not optimised", "fold_"])
def fold(request: pytest.FixtureRequest, places: Path) -> Fold:
    if request.param == "fold_":
        return lambda kind: flashnorm.fold_(source(places, kind))
    return lambda kind: flashnorm.load(places / f"{kind}-folded", optimize=request.param == "load")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_an_adapter_of_the_source_is_refused(places: Path, tmp_path: Path, fold: Fold, kind: str):
    adapter, _ = trained(source(places, kind), CONFIGS["q and v"](), tmp_path)
    model = fold(kind)
    plain, modules = logits(model), str(model)
    with pytest.raises(InputError, match=REFUSED) as refused:
        model.load_adapter(str(adapter))
    assert repr(str(places / kind)) in str(refused.value)
    assert f"`flashnorm adapter ADAPTER {places / kind} OUT_ADAPTER`" in str(refused.value)
    # The model is as it was, and there may be another one.
    assert torch.equal(logits(model), plain)
    assert str(model) == modules
    own, expected = trained(fold(kind), CONFIGS["q and v"](), tmp_path / "own")
    model.load_adapter(str(own), adapter_name="own")
    assert close(logits(model), expected)
    with pytest.raises(InputError, match=REFUSED):
        peft.PeftModel.from_pretrained(fold(kind), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_that_reads_a_folded_norm_is_refused(places: Path, tmp_path: Path, name: str):
    adapter, _ = trained(source(places), CONFIGS[name](), tmp_path)
    folded = flashnorm.load(places / "llama-folded")
    with pytest.raises(InputError, match=REFUSED):
        peft.PeftModel.from_pretrained(folded, adapter)
    # Whoever goes on is stopped at the first forward.
    with pytest.raises(InputError, match=REFUSED):
        folded(input_ids=tiny.ids())
    with pytest.raises(InputError, match=REFUSED):
        folded.generate(tiny.ids(), max_new_tokens=2)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_reads_no_folded_norm_is_exact(places: Path, tmp_path: Path, fold: Fold, name: str):
    adapter, expected = trained(source(places), HARMLESS[name](), tmp_path)
    assert close(logits(peft.PeftModel.from_pretrained(fold("llama"), adapter)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_an_adapter_of_the_folded_model_is_right(tmp_path: Path, fold: Fold, name: str):
    model = fold("llama")
    adapter, expected = trained(model, CONFIGS[name](), tmp_path)
    again = peft.PeftModel.from_pretrained(fold("llama"), adapter)
    assert close(logits(again), expected)
    with again.disable_adapter():
        assert close(logits(again), logits(fold("llama")))
    assert json.loads((adapter / "adapter_config.json").read_text())["base_model_name_or_path"] == model.name_or_path
    if name in ("q and v", "all linears", "dora"):
        assert close(logits(again.merge_and_unload()), expected)


def test_an_adapter_of_a_model_folded_in_memory_names_no_source(places: Path, tmp_path: Path):
    """So nobody takes it for one of the source's; it fits the converted checkpoint."""
    folded = flashnorm.fold_(source(places))
    assert re.fullmatch(re.escape(str(places / "llama") + FOLDED_BASE) + "-[0-9a-f]{12}", folded.name_or_path)
    adapter, expected = trained(folded, CONFIGS["q and v"](), tmp_path)
    with pytest.raises(OSError, match=FOLDED_BASE):
        peft.AutoPeftModelForCausalLM.from_pretrained(adapter)
    assert close(logits(peft.PeftModel.from_pretrained(flashnorm.load(places / "llama-folded"), adapter)), expected)


KEPT = {"one layer's norm": ["model.layers.0.input_layernorm*"], "all that it reads": ["*input_layernorm*"]}


@pytest.fixture(params=KEPT)
def keeping(request: pytest.FixtureRequest, places: Path) -> Path:
    """A version of the model in which norms stay that the adapter reads: one of them, or all."""
    folder = places / f"llama-{request.param}"
    if not folder.exists():
        flashnorm.convert(places / "llama", folder, keep=KEPT[request.param])
    return folder


def in_memory(places: Path, like: Path) -> PreTrainedModel:
    return flashnorm.fold_(source(places), keep=KEPT[like.name.removeprefix("llama-")])


def refuses(make: Callable[[], PreTrainedModel], adapter: Path) -> None:
    """Both ways to load an adapter do."""
    with pytest.raises(InputError, match="found one for other folds"):
        make().load_adapter(str(adapter))
    with pytest.raises(InputError, match="found one for other folds"):
        peft.PeftModel.from_pretrained(make(), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("converted", ["by the command", "by the command, for a folder", "in memory"])
def test_an_adapter_for_other_folds_is_refused(places: Path, tmp_path: Path, keeping: Path, converted: str):
    """One that was made for a version of the model in which another set of norms is folded; both directions."""
    expected = trained(source(places), CONFIGS["q and v"](), tmp_path / "source")[1]
    all_folded = places / "llama-folded"
    if converted == "in memory":
        trained(flashnorm.fold_(source(places)), CONFIGS["q and v"](), tmp_path / "all")
        trained(in_memory(places, keeping), CONFIGS["q and v"](), tmp_path / "kept")
    else:
        for name, folder in (("all", all_folded), ("kept", keeping)):
            keep = KEPT[keeping.name.removeprefix("llama-")] if name == "kept" else []
            options: dict[str, Any] = {"folded": folder} if "folder" in converted else {"keep": keep}
            flashnorm.convert_adapter(tmp_path / "source", places / "llama", tmp_path / name, **options)
    for make in (lambda: flashnorm.load(keeping), lambda: in_memory(places, keeping)):
        refuses(make, tmp_path / "all")
        make().load_adapter(str(tmp_path / "kept"))
    for make in (lambda: flashnorm.load(all_folded), lambda: flashnorm.fold_(source(places))):
        refuses(make, tmp_path / "kept")
        make().load_adapter(str(tmp_path / "all"))
    for folder, name in ((all_folded, "all"), (keeping, "kept")):
        found = logits(peft.PeftModel.from_pretrained(flashnorm.load(folder), tmp_path / name))
        assert converted == "in memory" or close(found, expected)


def test_an_adapter_for_other_folds_is_accepted_where_no_norm_can_fold(places: Path, tmp_path: Path, keeping: Path):
    adapter, expected = trained(source(places), HARMLESS["reads no norm"](), tmp_path / "source")
    flashnorm.convert_adapter(adapter, places / "llama", tmp_path / "all")
    for make in (lambda: flashnorm.load(keeping), lambda: in_memory(places, keeping)):
        assert close(logits(peft.PeftModel.from_pretrained(make(), tmp_path / "all")), expected)
        model = make()
        model.load_adapter(str(tmp_path / "all"))
        assert close(logits(model), expected)


@pytest.mark.slow
def test_adapters_for_a_folder_that_is_converted_again(places: Path, tmp_path: Path):
    """They name the folder only, and its folds in a key that PEFT keeps, also when they are trained on and saved."""
    out = tmp_path / "out"
    flashnorm.convert(places / "llama", out)
    _, expected = trained(source(places), CONFIGS["q and v"](), tmp_path / "source")
    flashnorm.convert_adapter(tmp_path / "source", places / "llama", tmp_path / "converted", folded=out)
    own, of_own = trained(flashnorm.load(out), CONFIGS["q and v"](), tmp_path / "own")
    resumed = peft.PeftModel.from_pretrained(flashnorm.load(out), tmp_path / "converted", is_trainable=True).train()
    resumed.save_pretrained(tmp_path / "resumed")
    for adapter, right in ((tmp_path / "converted", expected), (own, of_own), (tmp_path / "resumed", expected)):
        said = json.loads((adapter / "adapter_config.json").read_text())
        assert re.fullmatch("flashnorm-[0-9a-f]{12}", said["revision"])
        assert close(logits(peft.PeftModel.from_pretrained(flashnorm.load(out), adapter)), right)
        # Whoever goes by the name of the base gets the folded model, in plain Transformers.
        assert close(logits(peft.AutoPeftModelForCausalLM.from_pretrained(adapter)), right)
        assert close(logits(AutoModelForCausalLM.from_pretrained(adapter)), right)
    shutil.copytree(out, tmp_path / "another")
    with pytest.raises(InputError, match=REFUSED):
        peft.PeftModel.from_pretrained(flashnorm.load(tmp_path / "another"), own)
    moved = out.rename(tmp_path / "moved")
    assert close(logits(peft.PeftModel.from_pretrained(flashnorm.load(moved), own)), of_own)
    flashnorm.convert(places / "llama", out, keep=["*input_layernorm*"])
    for adapter in (tmp_path / "converted", own, tmp_path / "resumed"):
        refuses(lambda: flashnorm.load(out), adapter)


@pytest.mark.slow
@pytest.mark.parametrize("untied", ["source", "converted"])
def test_a_head_that_another_version_has_untied(tmp_path: Path, untied: str):
    """An adapter of the head has the final norm's gain in one version, and not in the other."""
    tiny.save(tmp_path / "tied", tiny.model(tiny.config("llama", tie_word_embeddings=True)))
    flashnorm.convert(tmp_path / "tied", tmp_path / "folded")
    flashnorm.convert(tmp_path / "tied", tmp_path / "untied", untie=True)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "tied").eval()
    trained(model, peft.LoraConfig(target_modules=["lm_head"]), tmp_path / "adapter")
    one, other = ("untied", "folded") if untied == "source" else ("folded", "untied")
    flashnorm.convert_adapter(tmp_path / "adapter", tmp_path / "tied", tmp_path / "out", untie=one == "untied")
    flashnorm.load(tmp_path / one).load_adapter(str(tmp_path / "out"))
    refuses(lambda: flashnorm.load(tmp_path / other), tmp_path / "out")


@pytest.mark.parametrize("kind", ["gpt2", "gemma", "phi3", "mixtral"])
def test_folds_have_the_same_hash_however_they_are_read(tmp_path: Path, kind: str):
    """From the source, as `convert_adapter` does, from the folded model, and in memory. GPT-2's norms have biases."""
    small = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128} if kind == "gpt2" else {}
    model = tiny.model(tiny.config(kind, **small))
    tiny.save(tmp_path / "source", model)
    plan = flashnorm.convert(tmp_path / "source", tmp_path / "out").plan
    ending = f"{FOLDED_BASE}-{plan.folds_hash()[:12]}"
    assert flashnorm.fold_(model).name_or_path.endswith(ending)
    planned = plan_checkpoint(Checkpoint.open(tmp_path / "out"))
    assert Loading.of(planned).plan.folds_hash() == plan.folds_hash()


def test_a_second_adapter_is_looked_at_as_well(places: Path, tmp_path: Path, fold: Fold):
    wrong, _ = trained(source(places), CONFIGS["q and v"](), tmp_path / "wrong")
    right, expected = trained(fold("llama"), CONFIGS["q and v"](), tmp_path / "right")
    model = peft.PeftModel.from_pretrained(fold("llama"), right)
    assert close(logits(model), expected)
    with pytest.raises(InputError, match="adapter 'second'"):
        model.load_adapter(str(wrong), "second")


def test_adapters_after_a_forward_and_the_fused_loop(places: Path, tmp_path: Path):
    adapter, _ = trained(source(places), CONFIGS["one layer"](), tmp_path)
    model = flashnorm.load(places / "llama-folded")
    before = model.generate(tiny.ids(), max_new_tokens=3)
    with pytest.raises(InputError, match=REFUSED):
        model.load_adapter(str(adapter))
    assert torch.equal(model.generate(tiny.ids(), max_new_tokens=3), before)


@pytest.mark.parametrize("kind", ["llama", "gemma", "gpt2"])
def test_without_a_change_of_mode_it_is_the_forward_that_refuses(tmp_path: Path, kind: str):
    """The one layer that is adapted is the last, so that others may be fused. GPT-2's norms are LayerNorms."""
    targets = "c_attn" if kind == "gpt2" else "q_proj"
    config = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 128} if kind == "gpt2" else {}
    model = tiny.model(tiny.config(kind, **config))
    model.name_or_path = "source"
    lora = peft.LoraConfig(target_modules=[targets], layers_to_transform=[1], fan_in_fan_out=kind == "gpt2")
    adapter, _ = trained(copy.deepcopy(model), lora, tmp_path)
    folded = flashnorm.optimize(flashnorm.fold_(model)) if kind == "llama" else flashnorm.fold_(model)
    to_train = peft.PeftModel.from_pretrained(folded, adapter, is_trainable=True)
    with pytest.raises(InputError, match=REFUSED):
        to_train(input_ids=tiny.ids())
    with pytest.raises(InputError, match=REFUSED):
        to_train.train()


def test_a_fresh_adapter_can_be_trained(places: Path, fold: Fold):
    """By PEFT, and injected by hand, where no base is named."""
    for add in (
        lambda model: peft.get_peft_model(model, CONFIGS["q and v"]()),
        lambda model: peft.inject_adapter_in_model(CONFIGS["q and v"](), model),
    ):
        model = add(fold("llama")).train()
        model(input_ids=tiny.ids(), labels=tiny.ids()).loss.backward()
        assert any(parameter.grad is not None for parameter in model.parameters())


def test_two_ways_to_say_that_an_adapter_is_right(places: Path, tmp_path: Path):
    """For one that was trained on the folded model in another place."""
    adapter, expected = trained(flashnorm.load(places / "llama-folded"), CONFIGS["q and v"](), tmp_path)
    file = adapter / "adapter_config.json"
    said = json.loads(file.read_text()) | {"revision": None}
    for change, flag in (
        ({"base_model_name_or_path": "elsewhere"}, False),
        ({"base_model_name_or_path": FOLDED_BASE}, True),
    ):
        file.write_text(json.dumps(said | change))
        model = flashnorm.load(places / "llama-folded")
        if flag:
            model.load_adapter(str(adapter))
            assert close(logits(model), expected)
        else:
            with pytest.raises(InputError, match=REFUSED):
                model.load_adapter(str(adapter))
    file.write_text(json.dumps(said | {"base_model_name_or_path": "elsewhere", "flashnorm": True}))
    model = flashnorm.load(places / "llama-folded")
    model.load_adapter(str(adapter))
    assert close(logits(model), expected)


@pytest.mark.parametrize("damage", [b"\xef\xbb\xbf", b"\xff", b"{"])
def test_a_config_that_cannot_be_read(places: Path, tmp_path: Path, damage: bytes):
    """A byte order mark, for one, which PEFT does not read either."""
    adapter, _ = trained(source(places), CONFIGS["q and v"](), tmp_path)
    file = adapter / "adapter_config.json"
    file.write_bytes(damage + file.read_bytes())
    with pytest.raises(InputError, match=r"adapter_config\.json: expected JSON"):
        flashnorm.load(places / "llama-folded").load_adapter(str(adapter))


def test_copies_and_pickles_have_guards_of_their_own(places: Path, tmp_path: Path, fold: Fold):
    adapter, _ = trained(source(places), CONFIGS["q and v"](), tmp_path)
    model = fold("llama")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert torch.equal(logits(other), logits(model))
        with pytest.raises(InputError, match=REFUSED):
            peft.PeftModel.from_pretrained(other, adapter, is_trainable=True)(input_ids=tiny.ids())
        with pytest.raises(InputError, match=REFUSED):
            other.eval()
        model.eval()


def test_a_model_that_was_not_folded_is_left_alone(places: Path, tmp_path: Path):
    adapter, expected = trained(source(places), CONFIGS["q and v"](), tmp_path)
    model = source(places)
    assert close(logits(peft.PeftModel.from_pretrained(model, adapter)), expected)
    model.eval()
