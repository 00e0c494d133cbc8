"""Is a converted model the same in vLLM? A check of one's own model, on the machine and with the vLLM that serve it.

    python -m flashnorm.integrations.vllm.compare SOURCE OUT [--dtype float32 bfloat16] [--text FILE] [--json]
                                                  [--vllm '{"tensor_parallel_size": 2}']

* Source and converted model run one after the other in each dtype, each in a process of its own: the log-probabilities
  of the best few tokens after each token of a text, and greedy continuations of parts of it.
* vLLM tells the best few tokens only. The KL divergence counts all others as one, so that it is a lower bound.
* With float32 among the dtypes, the other dtypes are compared with the source in float32 as well, source and converted:
  how far apart two runs of the same model in that dtype are anyway.
* The exit status is 0 if, after every token, the best token of source and converted model is among the best few of the
  other one, in each dtype (what vLLM's own tests ask of two models that are the same); 1 if not; 2 for unusable input.
"""

# Types are checked where vLLM is not installed.
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false

import argparse
import json
import math
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import torch

from flashnorm.errors import InputError
from flashnorm.verify.divergence import kl_divergences
from flashnorm.verify.text import DEFAULT_TEXT, read_text

# What vLLM tells of each token by default at most.
TOP = 20
# Greedy continuations: how many, and of how many tokens each.
PARTS, CONTINUED = 8, 32

# The log-probabilities of the best tokens at a place.
Best = Mapping[str, float]


@dataclass(frozen=True)
class Predictions:
    """What a model says in vLLM.

    Attributes:
        best: for each token of the text but the first, the log-probabilities of the best tokens at its place.
        continued: the token ids of each continuation.
    """

    best: Sequence[Best]
    continued: Sequence[Sequence[int]]


@dataclass(frozen=True)
class Agreement:
    """How far two runs agree.

    Attributes:
        tokens: places in the text.
        same_best: places where both have the same best token.
        among_best: places where the best token of each is among the best of the other.
        largest: the largest difference of a log-probability, of tokens among the best of both.
        mean_kl, largest_kl: KL divergence of the second run from the first, in nats, with all tokens that are not among
            the best of both as one.
        continuations: how many there are.
        same_continuations: how many are the same to the end.
    """

    tokens: int
    same_best: int
    among_best: int
    largest: float
    mean_kl: float
    largest_kl: float
    continuations: int
    same_continuations: int

    @property
    def ok(self) -> bool:
        """Whether the best token is among the other's best everywhere, and every number is one."""
        return self.among_best == self.tokens and math.isfinite(self.largest) and math.isfinite(self.largest_kl)


def agreement(first: Predictions, second: Predictions) -> Agreement:
    """Compare two runs on the same text; raises `ValueError` if they are of different lengths."""
    places = list(zip(first.best, second.best, strict=True))
    tops = [(max(a, key=a.__getitem__), max(b, key=b.__getitem__)) for a, b in places]
    apart = torch.tensor([abs(a[token] - b[token]) for a, b in places for token in a.keys() & b.keys()])
    kls = torch.stack([_kl(a, b) for a, b in places])
    continuations = list(zip(first.continued, second.continued, strict=True))
    return Agreement(
        tokens=len(places),
        same_best=sum(ours == theirs for ours, theirs in tops),
        among_best=sum(ours in b and theirs in a for (a, b), (ours, theirs) in zip(places, tops, strict=True)),
        largest=float(apart.max()) if len(apart) else math.nan,
        mean_kl=float(kls.mean()),
        largest_kl=float(kls.max()),
        continuations=len(continuations),
        same_continuations=sum(a == b for a, b in continuations),
    )


def _kl(first: Best, second: Best) -> torch.Tensor:
    """The KL divergence in nats, of the tokens among the best of both, and of all others together."""
    shared = sorted(first.keys() & second.keys())
    logs = []
    for best in (first, second):
        known = torch.tensor([best[token] for token in shared], dtype=torch.float64)
        rest = (1 - known.exp().sum()).clamp_min(torch.finfo(torch.float64).tiny).log()
        logs.append(torch.cat([known, rest[None]]))
    return kl_divergences(logs[0][None], logs[1][None])[0]


def compare(
    source: str, out: str, dtypes: Sequence[str], text: str, options: Mapping[str, Any]
) -> dict[str, Agreement]:
    """Run both models in vLLM in each dtype and compare them.

    Args:
        source, out: folders, or names of repositories on the hub.
        dtypes: as vLLM names them.
        text: what the models read.
        options: further arguments of `vllm.LLM`, for all runs.

    Returns:
        Which runs are compared -> their agreement. Those of the same dtype come first.

    Raises:
        InputError: vLLM is not installed, or does not run a model.
    """
    if find_spec("vllm") is None:
        raise InputError("expected vLLM in this environment, found none; install flashnorm beside your vLLM")
    from transformers import AutoTokenizer

    ids: Any = AutoTokenizer.from_pretrained(source)(text)["input_ids"]
    runs = {
        (name, dtype): _run(folder, dtype, ids, options)
        for dtype in dtypes
        for name, folder in (("source", source), ("converted", out))
    }
    pairs = [(("source", dtype), ("converted", dtype)) for dtype in dtypes]
    if "float32" in dtypes:
        pairs += [(("source", "float32"), run) for run in runs if run[1] != "float32"]
    return {f"{' '.join(a)}, {' '.join(b)}": agreement(runs[a], runs[b]) for a, b in pairs}


def _run(folder: str, dtype: str, ids: Sequence[int], options: Mapping[str, Any]) -> Predictions:
    """`measure` in a process of its own, because vLLM does not give back all that it takes."""
    command = [sys.executable, "-m", __spec__.name if __spec__ else __name__, "--measure", folder, folder]
    command += ["--dtype", dtype, "--vllm", json.dumps(options)]
    ended = subprocess.run(command, input=json.dumps(ids), capture_output=True, text=True, check=False)
    if ended.returncode:
        raise InputError(f"{folder}: expected vLLM to run it in {dtype}, found {ended.stderr[-2000:]}")
    return Predictions(**json.loads(ended.stdout.splitlines()[-1]))


def measure(folder: str, dtype: str, ids: Sequence[int], options: Mapping[str, Any]) -> Predictions:
    """Run a model in vLLM, in this process."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        folder, **({"dtype": dtype, "max_model_len": len(ids) + CONTINUED, "seed": 0, "enable_prefix_caching": False,
                    "skip_tokenizer_init": True} | dict(options)),
    )  # fmt: skip
    greedy: dict[str, Any] = {"temperature": 0, "ignore_eos": True, "detokenize": False}
    told = SamplingParams(max_tokens=1, prompt_logprobs=TOP, **greedy)
    (read,) = llm.generate([{"prompt_token_ids": list(ids)}], told, use_tqdm=False)
    parts = [{"prompt_token_ids": list(ids[: len(ids) * part // PARTS])} for part in range(1, PARTS + 1)]
    answers = llm.generate(parts, SamplingParams(max_tokens=CONTINUED, **greedy), use_tqdm=False)
    return Predictions(
        # The token that the text goes on with is told as well, whatever its rank.
        best=[{str(token): one.logprob for token, one in place.items() if one.rank <= TOP}
              for place in read.prompt_logprobs[1:]],
        continued=[list(answer.outputs[0].token_ids) for answer in answers],
    )  # fmt: skip


def table(found: Mapping[str, Agreement]) -> str:
    """In Markdown."""
    lines = [
        f"| | same best token | best among the other's {TOP} | largest difference | mean KL | largest KL | same "
        f"continuations of {CONTINUED} tokens |",
        "|---" * 7 + "|",
    ]
    lines += [
        f"| {name} | {one.same_best} of {one.tokens} | {one.among_best} of {one.tokens} | {one.largest:.2g} | "
        f"{one.mean_kl:.2g} | {one.largest_kl:.2g} | {one.same_continuations} of {one.continuations} |"
        for name, one in found.items()
    ]
    return "\n".join(lines)


def main() -> NoReturn:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python -m flashnorm.integrations.vllm.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source")
    parser.add_argument("out")
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--text", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--vllm", type=json.loads, default={}, metavar="JSON", help="arguments of vllm.LLM")
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.measure:
        print(json.dumps(asdict(measure(given.source, given.dtype[0], json.load(sys.stdin), given.vllm))))
        sys.exit(0)
    try:
        text = DEFAULT_TEXT if given.text is None else read_text(given.text)
        found = compare(given.source, given.out, given.dtype, text, given.vllm)
    except InputError as error:
        print(f"flashnorm: {error}", file=sys.stderr)
        sys.exit(2)
    print(json.dumps({name: asdict(one) for name, one in found.items()}, indent=1) if given.json else table(found))
    # The first ones are of the same dtype.
    sys.exit(0 if all(one.ok for one in list(found.values())[: len(given.dtype)]) else 1)


if __name__ == "__main__":
    main()
