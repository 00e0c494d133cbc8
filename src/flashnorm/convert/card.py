"""The model card: a conversion adds a section at its end and sets two keys of its front matter; the rest stays.

* A section that an earlier conversion added is not true of the new output, and is replaced.
* The front matter is edited as text: loading and dumping it would drop comments and turn Norwegian (`no`) into `false`.
"""

import re
from collections.abc import Mapping
from typing import Any

import yaml

from flashnorm.format import CARD_BEGIN, CARD_END, without_section

TAGS = ("flashnorm", "weightless-rmsnorm")

_FRONT_MATTER = re.compile(r"\A\ufeff?---[ \t]*\r?\n(.*?)^---[ \t]*(?:\r?\n|\Z)", re.DOTALL | re.MULTILINE)


_FOLDER = "path/to/this/model"

# What runs a language model out of either form of the folder, and what needs a tensor for each norm: docs/runtimes.md.
_RUNS_BOTH = (
    ("flashnorm", f'flashnorm generate {_FOLDER} "The moon is"'),
    ("Transformers", f'pipeline("text-generation", model="{_FOLDER}")'),
    ("vLLM, with flashnorm installed beside it", f"vllm serve {_FOLDER}"),
    ("OpenVINO", f"optimum-cli export openvino --model {_FOLDER} --task text-generation-with-past exported"),
    (
        "torch.export, ONNX Runtime, ExecuTorch",
        f'torch.export.export(flashnorm.load("{_FOLDER}", optimize=False), ...)',
    ),
)
_RUNS_WITH_NORMS = (
    ("llama.cpp", f"python convert_hf_to_gguf.py {_FOLDER} --outfile model.gguf"),
    ("MLX", f'mlx_lm.generate --model {_FOLDER} --prompt "The moon is"'),
)

_ABSENT = """\
- Plain Transformers warns that the weights of the folded norms are missing, and computes the same. It cannot leave this
  model on the disk (`device_map`); `flashnorm.load` can. Runtimes that insist on these tensors (llama.cpp, MLX) need
  what `flashnorm convert --keep-norms` writes.
"""

_CENTRED = """\
- The mean of the residual stream is zero: {} LayerNorms are RMSNorms in `flashnorm.load`. They still are LayerNorms for
  everything else, with the same outputs; `hidden_states` before a norm lack their mean. Adapters cannot be converted.
"""

_CANCELLED = """\
- The divisions of {} norms cancel in norms behind them; `flashnorm.load` does not compute them. Everything else may.
"""


def updated_card(
    card: str | None,
    *,
    base_model: str | None,
    version: str,
    norms: int,
    linears: int,
    centred: int = 0,
    cancelled: int = 0,
    keep_norms: bool = False,
    generates: bool = False,
    summary: str = "",
) -> str:
    """A model card that says what was done to the model, and how it is run.

    Args:
        card: the source's card, None if it has none.
        base_model: the source's hub id, if it is known.
        version: the version of flashnorm.
        norms, linears: how many norm weights were folded into how many weights of linear layers.
        centred: how many LayerNorms became RMSNorms.
        cancelled: how many norms are not computed, as their divisions cancel.
        keep_norms: whether the folded norms are stored, at their identity value.
        generates: whether this is a causal language model, for which there are more runtimes.
        summary: the summary of a verification, in Markdown.
    """
    card = card or "---\n---\n"
    found = _FRONT_MATTER.match(card)
    front, text = (found.group(1), card[found.end() :]) if found else ("", card)
    if (data := _parsed(front)) is not None:
        tags = [*_as_list(data.get("tags")), *TAGS]
        front = _with_key(front, "tags", list(dict.fromkeys(tags)))
        if base_model:
            front = _with_key(front, "base_model", [base_model])
    text = without_section(text).rstrip("\r\n") + "\n\n" if text.strip() else ""
    section = _section(base_model, version, norms, linears, centred, cancelled, keep_norms, generates)
    summary = f"\n{summary}" if summary else ""
    return f"---\n{front}---\n{text}{section}{summary}"


def is_causal(config: Mapping[str, Any]) -> bool:
    """Whether a config says that its model is a causal language model."""
    names = config.get("architectures")
    return isinstance(names, list) and any(str(name).endswith("ForCausalLM") for name in names)


def _section(
    base_model: str | None,
    version: str,
    norms: int,
    linears: int,
    centred: int,
    cancelled: int,
    keep_norms: bool,
    generates: bool,
) -> str:
    begin = CARD_BEGIN + (f"`{base_model}`" if base_model else "the source model")
    stored = "are stored at the value that changes nothing" if keep_norms else "have no weights any more"
    return f"""{begin} with {norms} norm weights folded into the {linears} weight matrices that read them (FlashNorm,
arXiv:2407.09577). Those norms {stored}; every folded weight is the exact product, rounded once.
`config.json` names them (`flashnorm.weightless`), `flashnorm.json` says what went where, with a hash of every file.

```python
import flashnorm

model = flashnorm.load("{_FOLDER}")
```
{_runs(keep_norms) if generates else ""}
What is different:

- Outputs are the source's but for rounding. All tensors that are not named in `flashnorm.json` are the source's.
- By itself, the fold makes few runtimes faster.
- Adapters that were trained on the source do not fit; `flashnorm adapter` converts them. Neither does a draft head that
  reads the output of a folded norm.
{_left_out(centred, cancelled)}{"" if keep_norms else _ABSENT}
{CARD_END}{version}.
"""


def _left_out(centred: int, cancelled: int) -> str:
    """What is left out of norms, as lines of a list."""
    parts = ((_CENTRED, centred), (_CANCELLED, cancelled))
    return "".join(words.format(count) for words, count in parts if count)


def _runs(keep_norms: bool) -> str:
    """The commands for a form of the folder, as a list."""
    commands = [*_RUNS_BOTH, *(_RUNS_WITH_NORMS if keep_norms else ())]
    return "\nOther ways to run it:\n\n" + "".join(f"- {runtime}: `{command}`\n" for runtime, command in commands)


def _parsed(front: str) -> dict[str, Any] | None:
    """The front matter's keys, None if they cannot be read: the front matter then stays unchanged."""
    try:
        data = yaml.safe_load(front)
    except yaml.YAMLError:
        return None
    return {} if data is None else data if isinstance(data, dict) else None


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _with_key(front: str, key: str, value: list[Any]) -> str:
    """The front matter with one of its keys set, in its place or at the end."""
    entry = yaml.safe_dump({key: value}, allow_unicode=True, sort_keys=False)
    pattern = re.compile(rf"^{key}[ \t]*:.*\n(?:[ \t-].*\n)*", re.MULTILINE)
    if pattern.search(front):
        return pattern.sub(lambda _: entry, front, count=1)
    return front + entry
