"""Norms without weight and the linear layers that read them, as one operator of flashnorm's kernels for the CPU.

* `--additional-config '{"flashnorm_kernels": true}'` asks for it; without it, vLLM's own layers run.
* The norm hands its input on, and the linear layer computes `W RMSNorm(x)` with the division after the product. This is
  right only if nothing else reads the norm's output. So the model runs once before it is changed, on tokens that do not
  matter, and every operator is looked at: which of them read the output of which norm?
* Each pair is computed in both ways, too, on random numbers and with the weights that were loaded.
* All other linear layers run on the kernels without a norm. What is not proven runs as ever, and the log says why.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from flashnorm.compat import vllm
from flashnorm.compat.torch import TorchDispatchMode, tree_leaves
from flashnorm.cpu import ops
from flashnorm.cpu.kernels import native
from flashnorm.errors import InputError
from flashnorm.integrations.vllm.norms import deferred, is_weightless

OPTION = "flashnorm_kernels"

_TOKENS = 4
# Roundings of a result in the model's dtype that two right ways may be apart, relative to the largest number.
_ROUNDINGS = 8

_log = logging.getLogger("vllm.flashnorm")


def asked(vllm_config: Any) -> bool:
    """Whether vLLM's `additional_config` asks for the kernels; raises `InputError` if it is unclear."""
    given = getattr(vllm_config, "additional_config", None)
    value = given.get(OPTION, False) if isinstance(given, dict) else False
    if not isinstance(value, bool):
        raise InputError(f"expected true or false for {OPTION} in --additional-config, found {value!r}")
    return value


def use_kernels(model: nn.Module, vllm_config: Any, model_config: Any) -> None:
    """Make the linear layers of a loaded model run on the kernels, in place, before vLLM packs their weights.

    Args:
        model: vLLM's model, with its weights.
        vllm_config, model_config: the configs that it was built from.
    """
    name = model_config.model
    if (why := _unfit(vllm_config, model_config)) is not None:
        _log.warning("FlashNorm: %s runs vLLM's own layers although %s is set: %s", name, OPTION, why)
        return
    norms = {path: module for path, module in model.named_modules() if is_weightless(module)}
    linears = vllm.plain_linears(model)
    try:
        readers = _readers(model, norms.values(), linears, vllm_config)
    except Exception as problem:  # a model that runs in another way can raise anything
        found = f"{type(problem).__name__}: {problem}"
        _log.warning("FlashNorm: %s runs vLLM's own layers: it could not be traced (%s)", name, found)
        return
    before: dict[nn.Module, Any] = {}  # a linear layer -> the norm whose output it reads
    for path, norm in norms.items():
        why = readers.problem(norm) or next(filter(None, (_differs(norm, one) for one in readers.linears(norm))), None)
        if why is not None:
            _log.info("FlashNorm: %s is normalised by vLLM's own operator: %s", path, why)
            continue
        before |= dict.fromkeys(readers.linears(norm), norm)
    for norm in set(before.values()):
        vllm.change_class(norm, deferred(type(norm)))
    alone = [one for one in linears if one not in before and readers.has_run(one) and _differs(None, one) is None]
    for linear in (*before, *alone):
        _run_on_kernels(linear, before[linear].variance_epsilon if linear in before else None)
    _log.info(
        "FlashNorm: %d of %d linear layers of %s run on flashnorm's kernels, %d of them with the norm before them",
        len(before) + len(alone), len(linears), name, len(before),
    )  # fmt: skip


def _unfit(vllm_config: Any, model_config: Any) -> str | None:
    """Why a model does not run on the kernels, whatever its layers are; None if it does."""
    if native.library() is None:
        return "expected compiled kernels, found none: install flashnorm where there is a C++ compiler"
    if (device := str(vllm_config.device_config.device)) != "cpu":
        return f"expected the CPU, found {device}"
    if model_config.dtype not in native.DTYPES:
        return f"expected float32, bfloat16 or float16, found {model_config.dtype}"
    if model_config.quantization is not None:
        return f"expected a model that is not quantised, found {model_config.quantization}"
    if vllm_config.lora_config is not None:
        return "expected no LoRA adapters, which read the norms' outputs"
    if (size := vllm_config.parallel_config.world_size) != 1:
        return f"expected one worker, found {size}"
    return None


def _run_on_kernels(linear: Any, eps: float | None) -> None:
    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return ops.norm_linear(x, layer.weight, bias, None, eps)

    linear.quant_method = vllm.linear_method(apply)


def _differs(norm: Any, linear: Any) -> str | None:
    """Why the kernels do not compute what a norm, or none, and a linear layer compute; None if they do."""
    weight, bias = linear.weight, linear.bias
    x = torch.randn(_TOKENS, weight.shape[1], generator=torch.Generator().manual_seed(0))
    x = (x * torch.logspace(-2, 1, _TOKENS)[:, None]).to(weight.dtype)  # so small that eps counts, and large
    expected = F.linear(x if norm is None else norm(x), weight, bias).float()
    found = ops.norm_linear(x, weight, bias, None, None if norm is None else norm.variance_epsilon).float()
    apart = ((found - expected).abs().amax(1) / expected.abs().amax(1)).max().item()
    if apart <= _ROUNDINGS * torch.finfo(weight.dtype).eps + 1e-5:  # float32 sums in another order
        return None
    return f"expected the kernels to compute the same, found them {apart:.2g} apart"


class _Readers(TorchDispatchMode):
    """Sees which operators and linear layers read the outputs of norms."""

    def __init__(self) -> None:
        super().__init__()
        self._outputs: dict[int, tuple[nn.Module, Tensor]] = {}  # address -> norm and output, which keeps the address
        self._linears: dict[nn.Module, list[nn.Module]] = {}
        self._inputs: dict[nn.Module, set[nn.Module | None]] = {}  # a linear layer -> the norms that it reads
        self._problems: dict[nn.Module, str] = {}
        self._inside = False

    def has_run(self, linear: nn.Module) -> bool:
        """Whether a linear layer was called at all."""
        return linear in self._inputs

    def linears(self, norm: nn.Module) -> list[nn.Module]:
        """The linear layers that read a norm's output."""
        return self._linears.get(norm, [])

    def problem(self, norm: nn.Module) -> str | None:
        """Why a norm's output cannot be handed on as it comes; None if nothing but its linear layers reads it."""
        if norm in self._problems or not self.linears(norm):
            return self._problems.get(norm, "no linear layer reads it")
        if any(self._inputs[linear] != {norm} for linear in self.linears(norm)):
            return "one of its linear layers reads something else, too"
        return None

    def put(self, norm: nn.Module, output: Tensor) -> Tensor:
        """A copy of a norm's output, which has memory of its own."""
        copy = output.clone()
        self._outputs[copy.untyped_storage().data_ptr()] = norm, copy
        return copy

    def read_by(self, linear: nn.Module, x: Tensor) -> None:
        """Note that a linear layer reads `x`."""
        norm, output = self._outputs.get(x.untyped_storage().data_ptr(), (None, None))
        self._inputs.setdefault(linear, set()).add(norm)
        if norm is None or output is None:
            return
        if x.data_ptr() != output.data_ptr() or x.numel() != output.numel() or x.shape[-1] != output.shape[-1]:
            self._problems[norm] = "a linear layer reads a part of it"
        if linear not in self._linears.setdefault(norm, []):
            self._linears[norm].append(linear)

    def read_elsewhere(self, values: Any, where: str) -> None:
        """Note that something else reads the tensors among `values`."""
        for value in tree_leaves(values):
            found = self._outputs.get(value.untyped_storage().data_ptr()) if isinstance(value, Tensor) else None
            if found is not None:
                self._problems[found[0]] = f"{where} reads it"

    @contextmanager
    def in_linear(self) -> Iterator[None]:
        """Within the block, operators are not looked at."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Look at one operator."""
        if not self._inside and not func.is_view:
            self.read_elsewhere((args, kwargs), str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def _readers(model: nn.Module, norms: Iterable[nn.Module], linears: Iterable[nn.Module], vllm_config: Any) -> _Readers:
    """Run a model once on a few tokens, without attention, and see what reads the outputs of its norms."""
    readers = _Readers()
    with ExitStack() as stack:
        for norm in norms:
            stack.enter_context(_attribute(norm, "forward", _traced_norm(norm, readers)))
        for linear in linears:
            stack.enter_context(_attribute(linear, "quant_method", vllm.linear_method(_traced_linear(readers))))
        stack.enter_context(vllm.without_attention(vllm_config, _TOKENS))
        stack.enter_context(readers)
        tokens = torch.arange(_TOKENS)
        readers.read_elsewhere(model(tokens, tokens), "what uses the model's output")
    return readers


def _traced_norm(norm: nn.Module, readers: _Readers) -> Any:
    original = norm.forward

    def forward(x: Tensor, residual: Tensor | None = None) -> Any:
        if residual is None:
            return readers.put(norm, original(x))
        output, total = original(x, residual)
        return readers.put(norm, output), total

    return forward


def _traced_linear(readers: _Readers) -> Any:
    def apply(layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        readers.read_by(layer, x)
        with readers.in_linear():
            return F.linear(x, layer.weight, bias)

    return apply


@contextmanager
def _attribute(module: Any, name: str, value: Any) -> Iterator[None]:
    """Within the block, an attribute of a module has another value."""
    own = vars(module).get(name)
    setattr(module, name, value)
    try:
        yield
    finally:
        if own is None:
            delattr(module, name)
        else:
            setattr(module, name, own)
