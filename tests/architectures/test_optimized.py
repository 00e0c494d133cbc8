"""`flashnorm.optimize` on every causal language model type: the same tokens, or left as it is."""

import warnings

import pytest
import torch

import flashnorm
from architectures import causal
from flashnorm.runtime.kernels import native

OPTIMIZED = {
    *("cwm", "granite", "internlm3", "iquestcoder", "llama", "ministral", "ministral3", "mistral", "phi3"),
    *("phi4_multimodal", "qwen2", "qwen3", "seed_oss", "smollm3"),
}


@pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")
@pytest.mark.parametrize("model_type", causal.model_types())
def test_the_same_tokens(model_type: str) -> None:
    try:
        model = causal.build(model_type).float()
    except Exception as error:
        pytest.skip(f"not built: {error}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flashnorm.optimize(model)
    assert ("generate" in vars(model)) == (model_type in OPTIMIZED)
    if model_type in OPTIMIZED:
        ids = torch.randint(3, 120, (1, 9), generator=torch.Generator().manual_seed(1))
        options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
        expected = type(model).generate(model, ids, **options)
        assert torch.equal(model.generate(ids, **options), expected)
