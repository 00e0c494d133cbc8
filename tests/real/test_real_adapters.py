"""Adapters that were trained for some steps on SmolLM2: converted, verified, merged, several at once, trained on."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from flashnorm.errors import InputError
from flashnorm.verify.text import DEFAULT_TEXT

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow

# Two ways to the same float32 logits: rounding errors of 30 layers, and of the folded weights in bf16.
CLOSE = 2e-2


@pytest.fixture(scope="module")
def converted(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "smollm2-flashnorm"
    flashnorm.convert(smollm2, folder)
    return folder


@pytest.fixture(scope="module")
def tokens(smollm2: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(smollm2)(DEFAULT_TEXT, return_tensors="pt")["input_ids"][:, :96]


def source(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def train(model: Any, tokens: torch.Tensor, steps: int = 5) -> float:
    """Train what can be trained of a model for some steps. Returns the loss at the end."""
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=1e-3)
    loss = torch.zeros(())
    model.train()
    for _ in range(steps):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return float(loss.detach())


CONFIGS = {
    "lora": lambda: peft.LoraConfig(target_modules="all-linear", use_rslora=True),
    "dora": lambda: peft.LoraConfig(target_modules=["q_proj", "up_proj"], use_dora=True),
}


@pytest.fixture(scope="module")
def trained(smollm2: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the source, by kind."""
    root = tmp_path_factory.mktemp("adapters")
    for name, make in CONFIGS.items():
        model = peft.get_peft_model(source(smollm2), make())
        train(model, tokens)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture(scope="module")
def fitting(smollm2: Path, converted: Path, trained: dict[str, Path]) -> dict[str, Path]:
    """The converted adapters, by kind."""
    found = {}
    for name, folder in trained.items():
        found[name] = folder.with_name(f"{name}-converted")
        flashnorm.convert_adapter(folder, smollm2, found[name], folded=converted)
    return found


def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens).logits


def distance(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_verified(
    smollm2: Path, converted: Path, trained: dict[str, Path], fitting: dict[str, Path], name: str
) -> None:
    report = flashnorm.verify_adapter(smollm2, converted, trained[name], fitting[name])
    assert report.ok, report.to_json()
    assert report.outputs is not None
    assert len(report.outputs.criteria) == 2


def test_in_use(
    smollm2: Path, converted: Path, trained: dict[str, Path], fitting: dict[str, Path], tokens: torch.Tensor
) -> None:
    """Several adapters at once, merged, and trained on; those of the source are refused."""
    before = peft.PeftModel.from_pretrained(source(smollm2), trained["lora"], adapter_name="lora")
    with before.disable_adapter():
        plain = logits(before, tokens)
    after = peft.PeftModel.from_pretrained(
        flashnorm.load(converted, dtype=torch.float32), fitting["lora"], adapter_name="lora"
    )
    before.load_adapter(trained["dora"], "dora")
    after.load_adapter(fitting["dora"], "dora")
    for name in CONFIGS:
        before.set_adapter(name)
        after.set_adapter(name)
        expected = logits(before, tokens)
        assert distance(logits(after, tokens), expected) < CLOSE
        assert name != "lora" or distance(plain, expected) > 2 * CLOSE, "the adapter does too little"
    with pytest.raises(InputError, match="flashnorm adapter"):
        after.load_adapter(trained["lora"], "wrong")
    after.delete_adapter("wrong")
    after.set_adapter("lora")
    before.set_adapter("lora")
    merged = after.merge_and_unload()
    assert distance(logits(merged, tokens), logits(before, tokens)) < CLOSE

    resumed = peft.PeftModel.from_pretrained(
        flashnorm.load(converted, dtype=torch.float32), fitting["lora"], is_trainable=True
    )
    start = train(resumed, tokens, steps=1)
    assert train(resumed, tokens, steps=4) < start
