"""Adapters that are in a model's memory, folded together with it.

What becomes of each tensor is planned and computed as for `flashnorm adapter`, from the same table of kinds. The
tensors are those that PEFT would save; each is changed in place, in its own dtype.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from flashnorm.compat import peft
from flashnorm.errors import InputError
from flashnorm.files.header import TORCH_DTYPES, TensorInfo
from flashnorm.files.reader import Checkpoint
from flashnorm.plan import FoldPlan
from flashnorm.planning.adapter import plan_adapter
from flashnorm.planning.adapter_values import AdapterValues
from flashnorm.planning.folded import of_folded_model
from flashnorm.planning.names import StoredNames
from flashnorm.planning.planned import PlannedCheckpoint
from flashnorm.planning.tensors import by_parameter
from flashnorm.trace.meta_copy import meta_copy
from flashnorm.trace.solve import names_by_parameter
from flashnorm.trace.values import View

_TAGS = {dtype: tag for tag, dtype in TORCH_DTYPES.items()}


@dataclass(frozen=True)
class Adapted:
    """A model that may have adapters.

    Attributes:
        model: the model, as its owner has it.
        base: the same without PEFT's own model around it.
        configs: PEFT's configs of the adapters, by name.
        bare: `base` without adapters: itself if it has none, else a copy on the meta device.
        parameters: the parameters of `base` by their names in `bare`, under all of these.
    """

    model: nn.Module
    base: nn.Module
    configs: Mapping[str, Any]
    bare: nn.Module
    parameters: dict[str, nn.Parameter]

    @staticmethod
    def of(model: nn.Module) -> "Adapted":
        """Look at a model.

        Raises:
            InputError: it has adapters in a state in which they cannot be folded.
        """
        base, configs = peft.base_and_configs(model)
        wrappers = peft.wrappers_of(base)
        if not wrappers:
            return Adapted(model, base, configs, base, dict(base.named_parameters(remove_duplicate=False)))
        if any(peft.is_merged(wrapper) for wrapper in wrappers):
            raise InputError(
                "expected adapters beside the model's weights, found some that are merged into them; call "
                "unmerge_adapter() first, or merge_and_unload() and fold the merged model"
            )
        if unknown := {name for wrapper in wrappers for name in peft.adapters_in(wrapper)} - configs.keys():
            raise InputError(
                f"expected the config of each adapter in the model's peft_config, found none of {sorted(unknown)}; add "
                "adapters by get_peft_model or load_adapter"
            )
        bare, copies = meta_copy(base)
        peft.unwrap_(bare)
        originals = {copy: tensor for tensor, copy in copies.items()}
        found: dict[str, Any] = {
            name: originals[parameter] for name, parameter in bare.named_parameters(remove_duplicate=False)
        }
        return Adapted(model, base, configs, bare, found)

    def changes(self, plan: FoldPlan) -> list["AdapterChange"]:
        """What becomes of the adapters. To be asked before the base model is changed.

        Args:
            plan: what will be folded, in the names of `bare`.

        Raises:
            InputError: an adapter cannot be folded exactly, or is not one of this model.
        """
        if not self.configs:
            return []
        if not isinstance(self.bare, PreTrainedModel):
            raise InputError(f"expected adapters of a Transformers model, found some of a {type(self.bare).__name__}")
        values = {name: self.parameters[name] for name in names_by_parameter(self.bare)}
        views = {name: (View.of(name, self.bare.get_parameter(name)),) for name in values}
        planned = PlannedCheckpoint(
            _InMemory.of("the model in memory", {}, values),
            plan,
            by_parameter(plan),
            StoredNames(self.bare, values, views),
        )
        return [self._change(name, config, planned) for name, config in self.configs.items()]

    def _change(self, name: str, config: Any, planned: PlannedCheckpoint) -> "AdapterChange":
        said = peft.saved_config(config)
        if (found := of_folded_model(said)) is not None:
            raise InputError(f"adapter {name!r}: expected one of the model before it is folded, found {found}")
        of_base = {id(parameter) for parameter in self.parameters.values()}
        live = {parameter.data_ptr(): parameter for parameter in self.model.parameters()}
        tensors = peft.saved_tensors(self.model, name)
        # Trained biases are the base model's own parameters, and are folded with it.
        own = {key: tensor for key, tensor in tensors.items() if id(live.get(tensor.data_ptr())) not in of_base}
        adapter = _InMemory.of(f"adapter {name!r} in memory", said, own)
        adapter_plan = plan_adapter(adapter, planned)
        changed = adapter_plan.changed
        for key in changed & own.keys():
            if (parameter := live.get(own[key].data_ptr())) is None or parameter.shape != own[key].shape:
                raise InputError(
                    f"adapter {name!r}: expected {key} to be a parameter of the model, found that PEFT makes it when "
                    "it saves the adapter; save it, and convert it with `flashnorm adapter`"
                )

        def layer(b: str) -> Any:
            return peft.lora_layer(self.model, name, live[own[b].data_ptr()])

        for magnitude in adapter_plan.magnitudes.values():
            if not math.isclose(scale := layer(magnitude.b).scaling[name], magnitude.scale):
                raise InputError(
                    f"adapter {name!r}: expected a DoRA with the scale of its config, {magnitude.scale:g}, found "
                    f"{scale:g}; set it back first (unscale_layer)"
                )
        dtypes = {key: info.dtype for key, info in adapter.tensors.items()}
        dtypes = {key: dtypes[constant.b] for key, constant in adapter_plan.constants.items()} | dtypes
        values = AdapterValues(adapter, planned.checkpoint, adapter_plan, dtypes)
        return AdapterChange(
            name,
            config,
            [(live[own[key].data_ptr()], values.value(key)) for key in changed & own.keys()],
            [
                (layer(adapter_plan.constants[key].b), values.value(key))
                for key in adapter_plan.constants.keys() - own.keys()
            ],
        )


@dataclass(frozen=True)
class AdapterChange:
    """What becomes of an adapter that is in a model.

    Attributes:
        name: the adapter's name.
        config: PEFT's config of it.
        values: its parameters that change, and their new values.
        biases: the layers whose `B` gets a bias, and its value.
    """

    name: str
    config: Any
    values: list[tuple[nn.Parameter, Tensor]]
    biases: list[tuple[Any, Tensor]]

    @torch.no_grad()
    def apply(self, base: str) -> None:
        """Change the adapter, in place.

        Args:
            base: the name of the folded model, which it belongs to now; empty for a model without a name.
        """
        for parameter, value in self.values:
            parameter.copy_(value)
        for layer, value in self.biases:
            peft.add_lora_bias(layer, self.name, value)
        if self.biases:
            self.config.lora_bias = True
        self.config.base_model_name_or_path, self.config.revision = base or None, None


@dataclass(frozen=True)
class _InMemory(Checkpoint):
    """Tensors in memory, as they would be read from a checkpoint."""

    values: Mapping[str, Tensor] = field(default_factory=dict)

    @staticmethod
    def of(what: str, config: dict[str, Any], values: Mapping[str, Tensor]) -> "_InMemory":
        """Tensors by name; `what` stands for a folder in messages."""
        tensors = {
            name: TensorInfo("", _TAGS.get(value.dtype, str(value.dtype)), tuple(value.shape), 0, value.nbytes)
            for name, value in values.items()
        }
        return _InMemory(Path(what), config, {}, tensors, None, {}, values=values)

    def read_tensor(self, name: str) -> Tensor:
        return self.values[name].detach().cpu()

    def read_outputs(self, name: str, axis: int, limit: int) -> Iterator[Tensor]:
        yield self.read_tensor(name).movedim(axis, 1)
