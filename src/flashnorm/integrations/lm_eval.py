"""lm-eval (EleutherAI's lm-evaluation-harness): its command, with the additional model type `flashnorm`.

    python -m flashnorm.integrations.lm_eval --model flashnorm --model_args pretrained=OUT --tasks TASKS ...

* lm-eval looks model types up in its own table and has no entry points, so a module must be imported before its command
  runs. This module adds the type and runs the command. In Python, the import is enough:
  `import flashnorm.integrations.lm_eval; lm_eval.simple_evaluate(model="flashnorm", ...)`.
* The type is lm-eval's `hf`, except that `flashnorm.load` loads the model: norms without weights, fused kernels.
"""

import sys
from typing import Any, NoReturn

from transformers import PreTrainedModel

from flashnorm.compat import lm_eval
from flashnorm.errors import InputError
from flashnorm.models.load import load

try:
    HFLM: Any = lm_eval.hf_type()
except ImportError as error:
    if __name__ != "__main__":
        raise
    print(f"flashnorm: expected lm-eval, found {error}; pip install 'flashnorm[evals]'", file=sys.stderr)
    sys.exit(2)


class _Loader:
    """Replaces the auto class of Transformers in `HFLM`."""

    @staticmethod
    def from_pretrained(folder: str, **options: Any) -> PreTrainedModel:
        lm_eval.check_options(options, lm_eval.LOADING)
        return load(folder, **{name: value for name, value in options.items() if name in lm_eval.LOADING})


@lm_eval.register("flashnorm")
class FlashNormLM(HFLM):
    """A FlashNorm checkpoint, loaded by `flashnorm.load`. It has the options of `hf` that do not change what is loaded.

    Raises:
        InputError: `pretrained` is no FlashNorm checkpoint or a damaged one, or an option is unknown or does not fit.
    """

    AUTO_MODEL_CLASS = _Loader

    def __init__(self, pretrained: str, **options: Any):
        lm_eval.check_options(options, lm_eval.EVALUATING | lm_eval.LOADING)
        super().__init__(pretrained, **options)


def main() -> NoReturn:
    """lm-eval's own command line. Exit status 2 if the checkpoint cannot be used."""
    try:
        sys.exit(lm_eval.command()())
    except InputError as error:
        print(f"flashnorm: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
