"""The float64 mode: nothing inside it is computed in fewer bits."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM

from flashnorm.verify.float64 import float64_everywhere

TINY = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "cast",
    [
        lambda x: x.float(),
        lambda x: x.half(),
        lambda x: x.bfloat16(),
        lambda x: x.to(torch.float32),
        lambda x: x.to(dtype=torch.bfloat16),
        lambda x: x.to("cpu", torch.float16),
        lambda x: x.type(torch.float32),
        lambda x: x.type("torch.FloatTensor"),
        lambda x: x.softmax(-1, dtype=torch.float32),
        lambda x: torch.nn.functional.softmax(x, dim=-1, dtype=torch.float32),
        lambda x: x.sum(dtype=torch.float32),
        lambda x: torch.zeros(3, dtype=torch.float32),
        lambda x: torch.arange(3).float(),
        lambda x: torch.ones(3),
        lambda x: torch.tensor(0.1),
        lambda x: x.new_zeros(2, dtype=torch.float32),
    ],
)
def test_casts_give_float64(cast) -> None:
    x = torch.tensor([1.0, 1.0 + 2.0**-40], dtype=torch.float64)
    with float64_everywhere():
        assert cast(x).dtype == torch.float64
    assert torch.get_default_dtype() == torch.float32
    assert torch.ones(1).dtype == torch.float32


def test_other_dtypes_stay() -> None:
    with float64_everywhere():
        assert torch.zeros(3, dtype=torch.int64).dtype == torch.int64
        assert torch.ones(3).to(torch.bool).dtype == torch.bool
        assert torch.view_as_complex(torch.ones(3, 2).float()).dtype == torch.complex128
        assert torch.ones(2, dtype=torch.complex64).dtype == torch.complex128


def test_the_default_dtype_comes_back_after_an_error() -> None:
    with pytest.raises(KeyError), float64_everywhere():
        raise KeyError
    assert torch.get_default_dtype() == torch.float32


def test_other_threads_keep_their_casts() -> None:
    with ThreadPoolExecutor(1) as other, float64_everywhere():
        assert other.submit(lambda: torch.ones(1, dtype=torch.int64).float().dtype).result() == torch.float32
        assert torch.ones(1, dtype=torch.int64).float().dtype == torch.float64


@pytest.mark.parametrize("promoted", [lambda ints: ints / ints, lambda ints: ints * 0.5, lambda ints: ints.sqrt()])
def test_integers_become_float64(promoted) -> None:
    """The dtype is none that a mode sees: these need the default dtype, which is one for the process."""
    with float64_everywhere():
        assert promoted(torch.tensor([1, 2])).dtype == torch.float64


class Narrow(TorchDispatchMode):
    """Notes every operator that computes a floating result in fewer bits than float64."""

    def __init__(self) -> None:
        super().__init__()
        self.found: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else (result,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.dtype != torch.float64:
                self.found.add(str(func))
        return result


@pytest.mark.parametrize("model_type", ["llama", "qwen3", "gemma", "gemma2", "gemma3_text", "cohere", "helium"])
def test_a_model_computes_in_float64_and_only_in_it(model_type: str) -> None:
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **TINY)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    tokens = torch.arange(24).reshape(2, 12) % 64
    with torch.no_grad(), Narrow() as plain:
        model(tokens)
    with torch.no_grad(), float64_everywhere(), Narrow() as mode:
        logits = model(tokens).logits
    assert plain.found, "this model casts to float32; if it does no more, it is no test"
    assert not mode.found
    assert logits.dtype == torch.float64


def test_rotary_frequencies_stay_what_they_are() -> None:
    config = AutoConfig.for_model("llama", **TINY)
    model = AutoModelForCausalLM.from_config(config).double().eval()
    before = model.model.rotary_emb.inv_freq.clone()
    with torch.no_grad(), float64_everywhere():
        model(torch.arange(8)[None])
    assert torch.equal(model.model.rotary_emb.inv_freq, before)
    assert torch.equal(before, before.float().double())


def test_modes_nest() -> None:
    class Count(TorchFunctionMode):
        calls = 0

        def __torch_function__(self, func, types, args=(), kwargs=None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    with Count() as count, float64_everywhere():
        assert torch.ones(1).float().dtype == torch.float64
    assert count.calls
