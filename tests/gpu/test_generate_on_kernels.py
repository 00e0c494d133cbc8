"""Models whose `generate` runs on the GPU's kernels: on a GPU, or in Triton's interpreter with models on the CPU."""

from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

import torch

from decoders import build, generate, text
from flashnorm.decoding.decoder import UnsupportedError
from flashnorm.decoding.proof import DifferentError
from flashnorm.decoding.structure import find_decoder
from flashnorm.gpu import decoder as gpu_decoder
from flashnorm.gpu import kernels, launch
from flashnorm.gpu.decoder import GraphDecoder
from flashnorm.gpu.optimize import install, optimize_if_supported, proven

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# Of float32: sums in another order, relative to the largest logit.
SAME = 1e-4
FEW: Any = {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 40, "vocab_size": 70}


def model_of(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    return build(name, dtype, **(FEW | more)).to(DEVICE)


def ids(length: int) -> torch.Tensor:
    return (text(length) % 60 + 3).to(DEVICE)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "qwen3", "llama with biases", "granite"])
@torch.inference_mode()
def test_steps(name: str) -> None:
    """A prompt and steps, beyond the end of the cache, against the model's own code at once."""
    model = model_of(name, num_hidden_layers=2)
    tokens = ids(gpu_decoder._GROWTH + 1)
    expected = model(input_ids=tokens[None]).logits[0, -3:]
    decoder = GraphDecoder(model, find_decoder(model))
    before = launch.runs["step"]
    decoder.start()
    decoder.extend(tokens[:-3])
    found = torch.cat([decoder.step(token[None]) for token in tokens[-3:]])
    assert launch.runs["step"] == before + 3
    assert (found - expected).abs().max() <= SAME * expected.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_proven_model_generates_the_same(dtype: torch.dtype) -> None:
    model = model_of("qwen3", dtype, head_dim=16)
    expected = generate(model, ids=ids(9)[None], max_new_tokens=4, min_new_tokens=4)
    assert optimize_if_supported(model) is None
    before = launch.runs["step"]
    found = generate(model, ids=ids(9)[None], max_new_tokens=4, min_new_tokens=4)
    assert launch.runs["step"] == before + 3  # the first token is the prompt's
    if dtype == torch.float32:
        assert torch.equal(found, expected)


def test_weights_that_change_count() -> None:
    """In place, and as other tensors, which a captured graph would not see."""
    model = model_of("llama")
    install(model)
    given = {"ids": ids(9)[None], "max_new_tokens": 3}
    generate(model, **given)
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.mul_(-3)
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.flip(0))
    found = generate(model, **given)
    del model.generate
    assert torch.equal(found, generate(model, **given))


def test_several_sequences_run_the_models_own_loop() -> None:
    model = model_of("llama")
    expected = generate(model, ids=ids(18).view(2, 9), max_new_tokens=3)
    install(model)
    before = launch.runs["step"]
    assert torch.equal(generate(model, ids=ids(18).view(2, 9), max_new_tokens=3), expected)
    assert launch.runs["step"] == before


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma", "the activation silu"),
        ("mistral with a window", "no window"),
        ("mixtral", "experts_in"),
        ("olmo2", "norms before attention"),
        ("smollm3, every other layer rotated", "RoPE"),
    ],
)
def test_what_there_are_no_kernels_for_is_refused(name: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        proven(build(name).to(DEVICE))


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof runs the kernels: with other gains of the MLP's norm it fails."""
    model, own = model_of("llama"), launch.gated_matvec
    monkeypatch.setattr(launch, "gated_matvec", lambda *args, gain, **kwargs: own(*args, gain=None, **kwargs))
    with pytest.raises(DifferentError, match="apart"):
        proven(model)
    assert kernels  # they are there, and were not what was wrong
