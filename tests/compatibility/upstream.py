"""Transformers' own tests of models, out of its source distribution: on plain models, optimised, folded and optimised.

    python upstream.py FOLDER     # the unpacked source distribution; prints what each test gave, as JSON

* Every model that a test puts into evaluation mode, as `from_pretrained` does by itself, is first folded and optimised.
  Models in training stay plain, as optimised ones run their own code there.
* Its parameters then want no gradients, on plain models either: where they do, a layer's own code runs.
* The distribution lacks the tests of `generate` and of export, which the mixin inherits from; empty classes take their
  place here. `tests/decoding/test_generate_options.py` has a table of options of `generate` instead.
"""

import importlib
import json
import os
import sys
import types
import unittest
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers
from transformers import PreTrainedModel

import flashnorm
from flashnorm.cpu.optimize import optimize_if_supported
from flashnorm.errors import InputError

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Llama": ("Llama", {}),
    "Qwen3": ("Qwen3", {}),
    "Mistral": ("Mistral", {"sliding_window": None}),
    "Gemma 3": ("Gemma3", {}),
}
SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "intermediate_size": 37,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,  # the kernels' least
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def fold_and_optimize(model: PreTrainedModel) -> object:
    """As `optimize_if_supported`."""
    flashnorm.fold_(model)
    return optimize_if_supported(model)


WAYS: dict[str, Callable[[PreTrainedModel], object]] = {
    "plain": lambda model: "plain",
    "optimised": optimize_if_supported,
    "folded": fold_and_optimize,
}
# Class of tests -> kind and way.
GROUPS = {f"Test{kind.replace(' ', '')}{way.title()}": (kind, way) for kind in KINDS for way in WAYS}
# "kind, way" -> what was done to how many models: "changed", or why it was not.
MODELS: dict[str, Counter[str]] = {}


def mixin(folder: Path) -> tuple[type, type]:
    """`ModelTesterMixin`, and the class that models with `generate` are to inherit from."""
    tests = types.ModuleType("upstream_tests")
    tests.__path__ = [str(folder / "tests")]
    sys.modules[tests.__name__] = tests
    stubs = {}
    for module, name in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        if (folder / "tests" / module.replace(".", "/")).with_suffix(".py").exists():
            stubs[name] = getattr(importlib.import_module(f"upstream_tests.{module}"), name)
            continue
        stub: Any = types.ModuleType(f"upstream_tests.{module}")
        stubs[name] = type(name, (), {})
        setattr(stub, name, stubs[name])
        sys.modules[stub.__name__] = stub
    return importlib.import_module("upstream_tests.test_modeling_common").ModelTesterMixin, stubs[
        "GenerationTesterMixin"
    ]


class Tiny:
    """What the mixin asks of a model's own tests: a config, and inputs."""

    batch_size, seq_length, is_training, num_hidden_layers = 3, 7, True, SIZES["num_hidden_layers"]
    hidden_size, num_attention_heads = SIZES["hidden_size"], SIZES["num_attention_heads"]

    def __init__(self, kind: str):
        self._name, self._more = KINDS[kind]
        self.causal_lm_class = getattr(transformers, f"{self._name}ForCausalLM")
        self.base_model_class = getattr(
            transformers, f"{self._name}TextModel" if kind == "Gemma 3" else f"{self._name}Model"
        )

    def get_config(self) -> Any:
        """Tiny."""
        return self.base_model_class.config_class(**SIZES | self._more)

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, Any]]:
        """Random token ids, nothing padded."""
        ids = torch.randint(3, SIZES["vocab_size"], (self.batch_size, self.seq_length))
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _changing(change: Callable[[PreTrainedModel], object], counts: Counter[str]) -> Callable[[Any], Any]:
    """`PreTrainedModel.eval` that changes the model first."""
    plain, changing = PreTrainedModel.eval, False

    def evaluate(model: Any) -> Any:
        nonlocal changing
        plain(model)
        if not changing and not any(parameter.is_meta for parameter in model.parameters()):
            changing = True
            try:
                counts[str(change(model.requires_grad_(False)) or "changed")] += 1
            except InputError as error:
                counts[str(error)] += 1
            finally:
                changing = False
        return model

    return evaluate


def define(folder: Path) -> None:
    """A class of tests for each kind and way, in this module, for pytest to find."""
    tests, generation = mixin(folder)
    for kind in KINDS:
        tester = Tiny(kind)
        for way, change in WAYS.items():
            name = next(name for name, group in GROUPS.items() if group == (kind, way))
            counts = MODELS[f"{kind}, {way}"] = Counter()

            def set_up(self: Any, tester: Tiny = tester, change: Any = change, counts: Counter = counts) -> None:
                self.model_tester = tester
                torch.manual_seed(0)
                patched = patch.object(PreTrainedModel, "eval", _changing(change, counts))
                patched.start()
                self.addCleanup(patched.stop)

            body = {"all_model_classes": (tester.base_model_class, tester.causal_lm_class), "setUp": set_up}
            globals()[name] = type(name, (tests, generation, unittest.TestCase), body)


class Recorder:
    """What each test gave: `outcomes[kind][way][test] = outcome`, with the first line of a failure."""

    def __init__(self) -> None:
        self.outcomes = {kind: {way: {} for way in WAYS} for kind in KINDS}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """pytest calls this for each phase of a test."""
        if report.when == "call" or report.outcome != "passed":
            _, group, test = report.nodeid.split("::")
            kind, way = GROUPS[group]
            lines = str(report.longrepr).strip().splitlines() if report.failed else []
            said = [line[1:].strip() for line in lines if line.startswith("E ")] or lines[-1:]
            if self.outcomes[kind][way].get(test, "").startswith("failed"):
                return  # one of its subtests, which are reported before the test itself
            self.outcomes[kind][way][test] = f"failed: {said[0]}" if report.failed else report.outcome


if "FLASHNORM_UPSTREAM" in os.environ:  # this file as pytest imports it
    define(Path(os.environ["FLASHNORM_UPSTREAM"]))

if __name__ == "__main__":
    os.environ["FLASHNORM_UPSTREAM"] = sys.argv[1]
    recorder = Recorder()
    options = ["-q", "--no-header", "-c", os.devnull, "-p", "no:cacheprovider", "-p", "no:warnings", "--timeout=300"]
    pytest.main([__file__, *options, *sys.argv[2:]], plugins=[recorder])
    found = sys.modules[Path(__file__).stem]
    print(json.dumps({"outcomes": recorder.outcomes, "models": found.MODELS}))
