"""Both models on the fused kernels: the tokens of the source in float32, and no more rounding than Transformers."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F  # noqa: N812
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from flashnorm.cpu.fused import FusedDecoder
from flashnorm.cpu.kernels import native
from flashnorm.decoding.formula import read_decoder
from flashnorm.verify.text import DEFAULT_TEXT

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled"),
]

PROMPT = "The three most important things to know about the moon are"


@pytest.fixture(scope="module", params=["smollm2", "gemma3"])
def source(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def greedy(model: Any, folder: Path, steps: int) -> list[int]:
    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    with torch.inference_mode():
        answer = model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)
    return answer[0, inputs["input_ids"].shape[1] :].tolist()


def test_they_say_what_the_source_says_for_256_steps(source: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    expected = greedy(model, source, 256)
    flashnorm.optimize(model)
    before = native.runs[native.ALL]
    assert greedy(model, source, 256) == expected
    assert native.runs[native.ALL] == before + 256


def test_they_round_no_more_than_transformers(source: Path) -> None:
    ids = AutoTokenizer.from_pretrained(source)(DEFAULT_TEXT, return_tensors="pt")["input_ids"][:, :256]

    def kl(found: Tensor) -> float:
        """To the float64 run, in nats a token."""
        return F.kl_div(found.double().log_softmax(-1), exact, reduction="batchmean", log_target=True).item()

    with torch.inference_mode():
        model: Any = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float64)
        exact = model(ids).logits[0].log_softmax(-1)
        for dtype in (torch.bfloat16, torch.float16):
            model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype)
            theirs = kl(model(ids).logits[0])
            if math.isnan(theirs):  # Gemma 3's activations leave the range of float16
                assert (model.config.model_type, dtype) == ("gemma3_text", torch.float16)
                continue
            flashnorm.optimize(model)
            layers = kl(model(ids).logits[0])
            ours = kl(FusedDecoder(read_decoder(model)).extend(ids[0], ids.shape[1]))
            assert ours <= layers <= theirs, (dtype, ours, layers, theirs)
