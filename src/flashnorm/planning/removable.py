"""What of a model's norms can be left out: from a config or a model to `Removable`."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from flashnorm.planning.planned import config_of, tied_model
from flashnorm.removable import Removable
from flashnorm.trace.build import meta_model
from flashnorm.trace.planner import trace
from flashnorm.trace.scales import FACTORS, divisions
from flashnorm.trace.streams import STREAMS, centrings


def removable(
    source: str | Path | PretrainedConfig | nn.Module,
    example_inputs: tuple[Any, ...] | None = None,
    *,
    revision: str | None = None,
    subfolder: str = "",
    untie: bool = False,
    trust_remote_code: bool = False,
) -> Removable:
    """Which divisions of norms cancel, and which LayerNorms can become RMSNorms, read off the model's code.

    A division cancels if everything that reads the norm is normalised again (FlashNorm, proposition 3). A LayerNorm
    subtracts nothing if everything that writes into its input has a mean of zero. No weights are read.

    Args:
        source: a folder with `config.json`, a hub id, a config, or a module on any device.
        example_inputs: the positional arguments of the module's forward, for a module that takes no token ids.
        revision: branch, tag or commit of a hub repository; None for its main branch.
        subfolder: the model's folder, relative to the source's.
        untie: look at the model as if a tied output head were a parameter of its own.
        trust_remote_code: whether code that comes with a checkpoint may run.

    Raises:
        InputError: there is no such model, or its forward cannot be traced.
    """
    if isinstance(source, nn.Module):
        model = source
    else:
        config, _ = config_of(source, revision, subfolder, trust_remote_code)
        model = meta_model(config, untie, trust_remote_code)
        if untie:
            tied_model(config, trace(model, example_inputs), trust_remote_code, example_inputs)
    factors, streams = (trace(model, example_inputs, analysis) for analysis in (FACTORS, STREAMS))
    model_type = str(getattr(getattr(model, "config", None), "model_type", "") or type(model).__name__)
    return Removable(model_type, divisions(factors), centrings(streams))
