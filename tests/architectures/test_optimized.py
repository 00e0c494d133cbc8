"""`flashnorm.optimize` on every causal language model type: the same tokens, or left as it is.

`make test` tries one in three of those that are left as they are; `make WHOLE=1 test` all of them.
"""

import os
import warnings

import pytest
import torch

import flashnorm
from architectures import causal
from flashnorm.cpu.kernels import native

pytestmark = pytest.mark.slow

OPTIMIZED = {
    *("cwm", "exaone", "flex_olmo", "gemma", "gemma2", "gemma3_text", "granite", "internlm3", "iquestcoder", "llama"),
    *("mellum", "ministral", "ministral3", "mistral", "mixtral", "olmo2", "olmo3", "olmoe", "phi3", "phi4_multimodal"),
    *("qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
}
LEFT = [model_type for model_type in causal.model_types() if model_type not in OPTIMIZED]


@pytest.mark.skipif(not native.instruction_sets(), reason="the kernels are not compiled")
@pytest.mark.parametrize("model_type", sorted(OPTIMIZED) + LEFT[:: 1 if os.environ.get("WHOLE") else 3])
def test_the_same_tokens(model_type: str) -> None:
    try:
        model = causal.build(model_type).float()
    except Exception as error:
        pytest.skip(f"not built: {error}")
    ids = torch.randint(3, 120, (2, 9), generator=torch.Generator().manual_seed(1))
    mask = torch.tensor([[1] * 9, [0, 0] + [1] * 7])
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    if model_type in OPTIMIZED:
        expected = model.generate(ids, **options)
        beams = model.generate(ids, num_beams=3, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        flashnorm.optimize(model)
    assert ("generate" in vars(model)) == (model_type in OPTIMIZED)
    if model_type in OPTIMIZED:
        assert torch.equal(model.generate(ids, **options), expected)
        assert torch.equal(model.generate(ids, num_beams=3, **options), beams)
