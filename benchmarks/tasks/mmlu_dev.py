"""Part of MMLU that needs no network: questions of its development set, which lm-eval's own package carries.

* lm-eval's variant of MMLU with chains of thought has them as examples in its prompts: 57 subjects, five questions each
  (four in two of them), with an explanation of each answer.
* The questions are by Hendrycks et al. (arXiv 2009.03300), the explanations by Chung et al. (arXiv 2210.11416). Nothing
  of it is copied here.
"""

import json
import re
from importlib.resources import files
from typing import Any

from datasets import Dataset

_PROMPTS = "tasks/mmlu/flan_cot_fewshot/_cot_prompts.json"
_LETTERS = "ABCD"
_QUESTION = re.compile(
    r"Q: (?P<question>.+?)\s+\(A\) (?P<A>.+?)\s+\(B\) (?P<B>.+?)\s+\(C\) (?P<C>.+?)\s+\(D\) (?P<D>.+?)\s*"
    r"\nA: Let's think step by step\..*?[Tt]he answer is \((?P<answer>[A-D])\)",
    re.DOTALL,
)


def _questions(number: int) -> list[tuple[str, str]]:
    """The first few questions of each subject, with their explained answers: subject, text."""
    prompts = json.loads((files("lm_eval") / _PROMPTS).read_text(encoding="utf-8"))
    return [
        (subject, text.strip())
        for subject, prompt in prompts.items()
        for text in re.split(r"\n\n(?=Q: )", prompt)[1 : number + 1]
    ]


def questions(**_: Any) -> dict[str, Dataset]:
    """Two questions of each subject, if they have four choices, in the form that `cais/mmlu` has on the hub."""
    rows = []
    for subject, text in _questions(2):
        if found := _QUESTION.match(text):
            choices = [found[letter] for letter in _LETTERS]
            answer = _LETTERS.index(found["answer"])
            rows.append({"question": found["question"], "subject": subject, "choices": choices, "answer": answer})
    return {"dev": Dataset.from_list(rows)}


def texts(**_: Any) -> dict[str, Dataset]:
    """One question of each subject as a text, its choices and its explained answer included."""
    return {"dev": Dataset.from_list([{"subject": subject, "page": text} for subject, text in _questions(1)])}


def perplexity(doc: dict[str, Any], results: tuple[float]) -> dict[str, tuple[float, int]]:
    """The log-likelihood of a text, and its number of words."""
    return {"word_perplexity": (results[0], len(doc["page"].split()))}
