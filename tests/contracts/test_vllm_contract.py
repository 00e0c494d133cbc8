"""What `compat/vllm.py` asks of the vLLM that is installed. A failure says what changed, and what that means."""

# Types are checked where vLLM is not installed.
# pyright: reportMissingImports=false

import dataclasses
import inspect
import pkgutil
from importlib.util import find_spec

import pytest
import torch
from torch import nn

from flashnorm.compat import vllm as compat
from flashnorm.integrations.vllm import rules

pytestmark = pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")

# Fields of vLLM's configs that the plugin reads.
FIELDS = {
    "vllm.config:VllmConfig": (
        "model_config load_config lora_config speculative_config compilation_config additional_config device_config "
        "parallel_config"
    ),
    "vllm.config:ParallelConfig": "world_size",
    "vllm.config:DeviceConfig": "device",
    "vllm.config:ModelConfig": "model hf_config revision dtype quantization trust_remote_code",
    "vllm.config:LoadConfig": "load_format download_dir",
    "vllm.config:SpeculativeConfig": "method draft_model_config",
    "vllm.config:CompilationConfig": "mode pass_config",
}
# Fields of `PassConfig` that have nothing to do with a folded norm's weight.
OTHER_PASSES = {
    "fuse_act_quant", "fuse_attn_quant", "eliminate_noops", "enable_qk_norm_rope_fusion", "fuse_rope_kvcache_cat_mla",
    "fuse_rope_kvcache", "fuse_qk_norm_rope_kvcache", "rope_kvcache_fusion_max_token_num",
    "fi_allreduce_fusion_max_size_mb", "sp_min_token_num",
}  # fmt: skip
WRAPPED = [
    compat.CREATE_CONFIG,
    compat.INITIALIZE,
    compat.TRACK_LOADING,
    compat.PROCESS_WEIGHTS,
    compat.LOAD_ADAPTER,
    compat.EXECUTE_MODEL,
]


def test_usable() -> None:
    assert rules.unsupported(compat.version()) is None
    assert compat.changed_part() is None, "every FlashNorm checkpoint would be refused"


@pytest.mark.parametrize("function", WRAPPED, ids=lambda function: function.name)
def test_wrapped_functions(function: compat.Function) -> None:
    assert function.lacks() is None, "it cannot be wrapped: FlashNorm checkpoints would be refused"
    found = inspect.signature(getattr(function.owner(), function.name)).parameters
    unknown = [name for name in found if name not in function.parameters]
    assert not unknown, (
        f"{function.name} takes {unknown}, which are not known: FlashNorm checkpoints would be refused "
        "where they are given; see what they mean, and add them to compat/vllm.py"
    )


@pytest.mark.parametrize("name", compat.NORMS)
def test_norm_classes(name: str) -> None:
    module, _, attribute = name.rpartition(".")
    found = pkgutil.resolve_name(f"{module}:{attribute}")
    assert f"{found.__module__}.{found.__qualname__}" == name, (
        "the class moved: its norms could not be built weightless"
    )
    assert issubclass(found, nn.Module)


def test_norms() -> None:
    from vllm.model_executor.custom_op import CustomOp
    from vllm.model_executor.layers.layernorm import GemmaRMSNorm, RMSNorm

    names = {*inspect.signature(RMSNorm.__init__).parameters}
    assert "has_weight" in names, "RMSNorm has no way to be without weight"
    for norm in (RMSNorm, GemmaRMSNorm):
        assert [*inspect.signature(norm.forward_native).parameters] == ["self", "x", "residual"], (
            f"{norm.__name__}.forward_native takes something else, which the weightless norm does not know"
        )
        assert issubclass(norm, CustomOp)
    assert "_forward_method" in inspect.getsource(CustomOp), (
        "CustomOp chooses its method in another way: Gemma's norms would go on multiplying by a constant"
    )
    x = torch.tensor([[3.0, 4.0]])
    rms_norm, fused_add_rms_norm = compat.weightless_operators()
    expected = x / x.square().mean().sqrt()
    assert torch.allclose(rms_norm(x, None, 0.0), expected), "rms_norm without weight gives something else"
    found, total = fused_add_rms_norm(x / 2, x / 2, None, 0.0)
    assert torch.allclose(found, expected), "fused_add_rms_norm without weight gives something else"
    assert torch.equal(total, x)


@pytest.mark.parametrize("config", FIELDS)
def test_configs(config: str) -> None:
    found = pkgutil.resolve_name(config)
    fields = {field.name for field in dataclasses.fields(found)}
    absent = set(FIELDS[config].split()) - fields
    assert not absent, (
        f"{config} has no {sorted(absent)} any more: the plugin would fail, or see no FlashNorm checkpoint"
    )


def test_compiler_passes() -> None:
    """A pass that fuses norms, and is not known, may need their weights."""
    from vllm.config.compilation import PassConfig

    fields = {field.name for field in dataclasses.fields(PassConfig)}
    unknown = fields - {*rules._PASSES_WITH_WEIGHT} - OTHER_PASSES
    assert not unknown, f"does {sorted(unknown)} fuse norms? Without weight they might not match: see rules.py"


def test_linears() -> None:
    """What linear layers on flashnorm's kernels need."""
    from vllm.forward_context import set_forward_context
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear, UnquantizedLinearMethod

    assert [*inspect.signature(UnquantizedLinearMethod.apply).parameters] == ["self", "layer", "x", "bias"]
    assert [*inspect.signature(UnquantizedLinearMethod.process_weights_after_loading).parameters] == ["self", "layer"]
    for linear in (ColumnParallelLinear, RowParallelLinear):
        assert "quant_method.apply" in inspect.getsource(linear.forward), "its method would not be asked"
    assert {"num_tokens", "skip_compiled"} <= {*inspect.signature(set_forward_context).parameters}
