"""Every causal language model that transformers knows: what folds, folds exactly. None is silently wrong.

A type whose tiny config cannot be built or run, or in which nothing folds, is skipped with the reason.
"""

import pytest
import torch
from transformers import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

import flashnorm
from architectures.configs import VOCABULARY, tiny_config
from flashnorm.errors import InputError, brief
from flashnorm.trace.models import model_class
from flashnorm.verify.float64 import float64_everywhere

LARGEST = 60_000_000  # parameters; what stays larger than this has sizes that the table does not know


def build(model_type: str) -> PreTrainedModel:
    """A model in float64 with random weights; gains are far from one, some of them negative."""
    config = tiny_config(model_type)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config)._from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size} parameters in what should be tiny")
    model = model_class(config)._from_config(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(0.7 + 0.5 * noise if parameter.dim() == 1 else 0.2 * noise)
    return model.double()


def run(model: PreTrainedModel) -> torch.Tensor:
    """Logits, in float64 throughout, with experts one after the other (the grouped kernels have no float64)."""
    if model._can_set_experts_implementation():
        model.set_experts_implementation("eager")
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad(), float64_everywhere():
        output = model(input_ids=ids)
    return output.logits if hasattr(output, "logits") else output[0]


@pytest.mark.parametrize("model_type", sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
def test_folds_exactly(model_type: str) -> None:
    try:
        model = build(model_type)
        before = run(model)
    except Exception as error:
        pytest.skip(f"the source cannot be built or run: {type(error).__name__}: {brief(error)}")
    try:
        plan = flashnorm.plan(model)
    except InputError as error:
        pytest.skip(f"cannot be planned: {brief(error)}")
    if not plan.folds:
        pytest.skip(f"nothing folds: {next(iter(plan.kept.values())).reason if plan.kept else 'no norms'}")
    after = run(flashnorm.fold_(model))
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()
    assert not {name for name, _ in model.named_parameters()} & {fold.norm for fold in plan.folds}
