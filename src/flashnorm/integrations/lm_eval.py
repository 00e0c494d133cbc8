"""lm-eval (EleutherAI's lm-evaluation-harness): its command, with one model type more, `flashnorm`.

    python -m flashnorm.integrations.lm_eval --model flashnorm --model_args pretrained=OUT --tasks TASKS ...

* lm-eval looks its model types up in a table of its own and knows no entry points, so that a module has to be imported
  before its command runs. This one is it, and is the command as well. In Python, the import is enough:
  `import flashnorm.integrations.lm_eval; lm_eval.simple_evaluate(model="flashnorm", ...)`.
* The type is lm-eval's `hf` in all but the loading, which is `flashnorm.load`: norms without weights, fused kernels.
"""

# Types are checked where lm-eval is not installed.
# pyright: reportMissingImports=false

import sys
from typing import Any, NoReturn

try:
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"flashnorm: expected lm-eval, found {error}; pip install 'flashnorm[evals]'", file=sys.stderr)
    sys.exit(2)
from transformers import PreTrainedModel

from flashnorm.errors import InputError
from flashnorm.runtime.load import load

# Options of `hf` that load something else, or in another way; what each is at when it is not used.
_OTHERWISE = {
    "revision": ("main", None),
    "subfolder": ("",),
    "gguf_file": (None,),
    "autogptq": (False,),
    "gptqmodel": (False,),
    "tp_plan": (None,),
    "peft": (None,),
    "delta": (None,),
}


class _Loader:
    """Stands where `HFLM` has an auto class of Transformers."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> PreTrainedModel:
        # They are at what `_OTHERWISE` says.
        for option in ("revision", "subfolder", "gguf_file"):
            del options[option]
        return load(folder, **options)


@register_model("flashnorm")
class FlashNormLM(HFLM):
    """A FlashNorm checkpoint, loaded by `flashnorm.load`; the options of `hf`, but for those that load something else.

    Raises:
        InputError: it is no FlashNorm checkpoint, or a damaged one, or an option does not fit it.
    """

    AUTO_MODEL_CLASS = _Loader

    def __init__(self, pretrained: str, **options: Any):
        used = [name for name, unused in _OTHERWISE.items() if name in options and options[name] not in unused]
        if used:
            raise InputError(
                f"expected model arguments that fit a FlashNorm checkpoint, found {', '.join(used)}; leave them out, "
                "fetch the checkpoint into a folder first, or see whether --model hf does what you need"
            )
        super().__init__(pretrained, **options)


def main() -> NoReturn:
    """lm-eval's own command line. Exit status 2 if the checkpoint cannot be used."""
    try:
        sys.exit(cli_evaluate())
    except InputError as error:
        print(f"flashnorm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
