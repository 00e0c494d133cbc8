"""An adapter that was trained for some steps on Gemma 3 270M, whose gains are `1 + w`: converted, verified, and folded
together with it in memory. It is LoRA and DoRA in one; `test_real_adapters.py` has each by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from flashnorm.verify.float64 import float64_everywhere
from flashnorm.verify.text import DEFAULT_TEXT

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.slow

# Short, as there are 262 144 logits after each token.
TEXT = DEFAULT_TEXT[:120]


@pytest.fixture(scope="module")
def converted(gemma3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "gemma3-flashnorm"
    flashnorm.convert(gemma3, folder)
    return folder


@pytest.fixture(scope="module")
def tokens(gemma3: Path) -> torch.Tensor:
    return AutoTokenizer.from_pretrained(gemma3)(TEXT, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def adapter(gemma3: Path, tokens: torch.Tensor, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the source."""
    config = peft.LoraConfig(target_modules="all-linear", use_rslora=True, use_dora=True)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float32), config)
    optimizer = torch.optim.AdamW([one for one in model.parameters() if one.requires_grad], lr=2e-3)
    losses = []
    for _ in range(4):
        loss = model.train()(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    folder = tmp_path_factory.mktemp("adapters") / "dora"
    model.eval().save_pretrained(folder)
    return folder


def test_converted(gemma3: Path, converted: Path, adapter: Path, capsys: pytest.CaptureFixture) -> None:
    """Every product, and the outputs in bfloat16 and float64."""
    target = adapter.with_name(f"{adapter.name}-converted")
    result = flashnorm.convert_adapter(adapter, gemma3, target, folded=converted)
    assert result.scaled == result.corrected == 18 * (3 + 2)
    report = flashnorm.verify_adapter(gemma3, converted, adapter, target, text=TEXT)
    assert report.ok, report.to_json()
    assert report.outputs is not None
    assert report.outputs.source is not None
    assert report.outputs.converted is not None
    with capsys.disabled():
        kls = (report.outputs.source.kl, report.outputs.converted.kl)
        print(f"\nGemma 3 270M bf16, DoRA: KL {kls[0]:.2e} of source and adapter, {kls[1]:.2e} converted")


def test_folded_together_in_float64(gemma3: Path, adapter: Path, tokens: torch.Tensor) -> None:
    """Exact but for the rounding of float64. Adapters of float32 are widened, so that their products are as exact."""
    base = AutoModelForCausalLM.from_pretrained(gemma3, dtype=torch.float64)
    model = peft.PeftModel.from_pretrained(base, adapter).to(torch.float64).eval()

    def logits() -> torch.Tensor:
        with torch.inference_mode(), float64_everywhere():
            return model(input_ids=tokens).logits

    def distance(one: torch.Tensor) -> Any:
        return (one - expected).norm() / expected.norm()

    expected = logits()
    with model.disable_adapter():
        assert distance(logits()) > 1e-2, "the adapter does too little"
    flashnorm.fold_(model)
    assert not any("input_layernorm" in name for name, _ in model.named_parameters())
    assert distance(logits()) < 1e-12
    model = model.merge_and_unload()
    assert distance(logits()) < 1e-12
