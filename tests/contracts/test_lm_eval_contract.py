"""What `compat/lm_eval.py` asks of the lm-eval that is installed. A failure says what changed, and what that means."""

import inspect
from importlib.util import find_spec
from typing import Any

import pytest

from flashnorm.compat import lm_eval as compat
from flashnorm.errors import InputError

needs_lm_eval = pytest.mark.skipif(find_spec("lm_eval") is None, reason="lm-eval is not installed")


@needs_lm_eval
def test_options() -> None:
    parameters = inspect.signature(compat.hf_type().__init__).parameters
    named = {name for name, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD}
    known = {"self", "pretrained", *compat.EVALUATING, *compat.OTHERWISE}
    assert not named - known, "these options are new, and would be refused: say in compat/lm_eval.py what they do"
    assert not known - named, "these options are gone: they would be handed to Transformers, and be refused there"
    for name, unused in compat.OTHERWISE.items():
        assert parameters[name].default in unused, f"{name} has another default: every checkpoint would be refused"


@needs_lm_eval
def test_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    """What `HFLM` hands to its auto class."""
    given: dict[str, Any] = {}

    class Auto:
        @staticmethod
        def from_pretrained(*args: Any, **options: Any) -> Any:
            given.update(options, args=args)

    hf_type = compat.hf_type()
    assert hf_type.AUTO_MODEL_CLASS is None, "the class that loads is chosen in another way"
    monkeypatch.setattr(hf_type, "AUTO_MODEL_CLASS", Auto)
    model = hf_type.__new__(hf_type)
    model._device, model._config = "cpu", None
    model._create_model("folder", dtype="float32", gpus=0)
    assert given.pop("args") == ("folder",)
    compat.check_options(given, compat.LOADING)
    assert {"dtype", "trust_remote_code", "revision"} <= given.keys()


@needs_lm_eval
def test_command_and_registry() -> None:
    assert callable(compat.command()), "python -m flashnorm.integrations.lm_eval would not run"
    assert callable(compat.register("a name")), "the type flashnorm could not be registered"


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"adapter": "a"}, r"found adapter, with lm-eval 9\.9; .*lm-eval 0\.4\.13"),
        ({"hub_revision": "main", "dtype": "auto"}, "found hub_revision, with"),
        ({"peft": "a"}, "that fit a FlashNorm checkpoint, found peft;"),
        ({"batch_size": 1}, "found batch_size, with"),  # which lm-eval would have for itself
        ({"revision": "main", "subfolder": "", "gguf_file": None, "dtype": "auto", "trust_remote_code": True}, None),
    ],
)
def test_options_that_are_not_known(options: dict[str, Any], word: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """What an lm-eval that renames or adds an option hands to the auto class."""
    monkeypatch.setattr(compat, "version", lambda name: "9.9")
    if word is None:
        compat.check_options(options, compat.LOADING)
        return
    with pytest.raises(InputError, match=word):
        compat.check_options(options, compat.LOADING)
