"""Real lm-eval: source and converted, by its own command, sample by sample (`make test-evals`)."""

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import compare_samples
import flashnorm
import tiny
from flashnorm.cpu.layers import FusedForward
from flashnorm.errors import InputError

TASKS = Path(compare_samples.__file__).with_name("tasks")
INSTALLED = find_spec("lm_eval") is not None
needs_lm_eval = pytest.mark.skipif(not INSTALLED, reason="lm-eval is not installed (make test-evals installs it)")

WEIGHTS = "model.safetensors"
SAMPLES = 12
# Each generates from two prompts at once, of different lengths.
GENERATION = """\
task: continue
dataset_path: json
dataset_kwargs: {data_files: {test: DATA}}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{text}}"
generation_kwargs: {until: ["<end>"], max_gen_toks: 8, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""


def source(folder: Path, model_type: str) -> Path:
    """A tiny random model of a type in float32, whose tokens are bytes."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(["<start>", "<end>", "<pad>", *alphabet])}
    tokenizer: Any = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = {"bos_token": "<start>", "eos_token": "<end>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    config = tiny.config(model_type, vocab_size=len(vocabulary), max_position_embeddings=4096)
    return tiny.save(folder, tiny.model(config))


def evaluate(
    model_type: str, folder: Path, tasks: Path = TASKS, samples: int = SAMPLES, **more: Any
) -> compare_samples.Samples:
    """The samples of all tasks in a folder. (lm-eval's command would read its own 16,000 files of tasks first.)"""
    import lm_eval
    from lm_eval.tasks import TaskManager

    import flashnorm.integrations.lm_eval  # noqa: F401

    results: Any = lm_eval.simple_evaluate(
        model_type, {"pretrained": str(folder), "dtype": "float32"}, tasks=[file.stem for file in tasks.glob("*.yaml")],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False), limit=samples, device="cpu", **more,
    )  # fmt: skip
    return results["samples"]


@pytest.fixture
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A source, and what `flashnorm convert` makes of it."""
    original = source(tmp_path / "source", getattr(request, "param", "llama"))
    flashnorm.convert(original, tmp_path / "converted")
    return original, tmp_path / "converted"


@needs_lm_eval
@pytest.mark.parametrize("pair", ["llama", "qwen3", "gpt2"], indirect=True)
def test_same_samples(pair: tuple[Path, Path]) -> None:
    """The converted model by `hf`, and by `flashnorm`: what the source says by `hf`."""
    original, converted = pair
    expected = evaluate("hf", original)
    for model_type in ("hf", "flashnorm"):
        found = {one.task: one for one in compare_samples.compare(expected, evaluate(model_type, converted))}
        assert found.keys() == {"mmlu_dev", "mmlu_dev_text"}
        assert found["mmlu_dev"].same_choice == SAMPLES
        # These models are as wrong as can be: thousands of nats a text.
        assert max(one.relative for one in found.values()) < 1e-5


@needs_lm_eval
def test_comparison_sees_another_model(pair: tuple[Path, Path]) -> None:
    original, converted = pair
    expected = evaluate("hf", original)
    tensors = load_file(converted / WEIGHTS)
    tensors["model.layers.1.mlp.up_proj.weight"] *= 1.5
    save_file(tensors, converted / WEIGHTS, {"format": "pt"})
    found = {one.task: one for one in compare_samples.compare(expected, evaluate("flashnorm", converted))}
    assert min(one.relative for one in found.values()) > 1e-3
    choices = found["mmlu_dev"].same_choice
    assert choices is not None
    assert choices < SAMPLES
    with pytest.raises(SystemExit, match="the same samples"):
        compare_samples.compare(expected, evaluate("hf", original, samples=5))


def test_scores_and_their_errors() -> None:
    """By hand: four questions, two of them answered rightly; two texts, of 10 and 30 bytes, of 20 and 60 nats."""
    questions = [
        {"doc_id": number, "filter": "none", "prompt_hash": "", "metrics": ["acc"], "acc": float(number % 2),
         "filtered_resps": [["-1.0", "True"], ["-2.0", "False"]]}
        for number in range(4)
    ]  # fmt: skip
    others = [question | {"filtered_resps": [("-1.0", "True"), ("-2.5", "False")]} for question in questions]
    others[2]["filtered_resps"] = [("-2.1", "False"), ("-2.0", "True")]
    (found,) = compare_samples.compare({"task": questions}, {"task": others[::-1]})
    assert (found.samples, found.same_choice, found.absolute, found.relative) == (4, 3, 1.1, 1.1)
    assert found.metrics == {"acc": ("0.5000 ± 0.2887", "0.5000 ± 0.2887")}
    texts = [
        {"doc_id": size, "filter": "none", "prompt_hash": "", "metrics": ["byte_perplexity", "bits_per_byte"],
         "byte_perplexity": [nats, size], "bits_per_byte": [nats, size], "filtered_resps": [str(nats)]}
        for nats, size in ((-22.0, 10), (-58.0, 30))
    ]  # fmt: skip
    (found,) = compare_samples.compare({"task": texts}, {"task": texts})
    # Two nats a byte; of the two texts' sums, 2 nats are too many and too few: sqrt(2 * (4 + 4)) of 40 bytes.
    assert found.metrics["byte_perplexity"] == ("7.389 ± 0.739",) * 2
    assert found.metrics["bits_per_byte"] == ("2.8854 ± 0.1443",) * 2
    assert (found.same_choice, found.absolute) == (None, 0)


@needs_lm_eval
def test_generation(pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of a padded batch are the source's."""
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    (tmp_path / "data.jsonl").write_text('{"text": "one"}\n{"text": "twenty-two, and three"}\n')
    (tasks / "continue.yaml").write_text(GENERATION.replace("DATA", str(tmp_path / "data.jsonl")))
    texts = [
        [sample["resps"] for sample in evaluate(model_type, folder, tasks, batch_size=2)["continue"]]
        for model_type, folder in zip(("hf", "flashnorm"), pair, strict=True)
    ]
    assert texts[0] == texts[1]
    assert all(text for ((text,),) in texts[0])


@needs_lm_eval
def test_command(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """lm-eval's command with our type: its samples on disk are those in memory."""
    line = ["run", "--model", "flashnorm", "--model_args", f"pretrained={pair[1]},dtype=float32", "--device", "cpu"]
    line += ["--include_path", str(TASKS), "--tasks", "mmlu_dev", "--limit", "2", "--log_samples"]
    ended = command(*line, "--output_path", str(tmp_path / "results"))
    assert ended.returncode == 0, ended.stderr
    assert "|mmlu_dev|" in ended.stdout
    on_disk = compare_samples.read(tmp_path / "results")
    (same,) = compare_samples.compare(on_disk, {"mmlu_dev": evaluate("flashnorm", pair[1], samples=2)["mmlu_dev"]})
    assert same.absolute < 1e-3
    assert (same.samples, same.same_choice) == (2, 2)


@needs_lm_eval
def test_loaded_by_flashnorm(pair: tuple[Path, Path], caplog: pytest.LogCaptureFixture) -> None:
    """No parameter in the norms, the fused kernels, and no warning of absent weights, which `hf` gives."""
    from lm_eval.api.registry import get_model

    from flashnorm.integrations import lm_eval

    assert get_model("flashnorm") is lm_eval.FlashNormLM
    model = lm_eval.FlashNormLM(str(pair[1]), device="cpu", dtype="bfloat16").model
    assert not [name for name, _ in model.named_parameters() if "norm" in name]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert isinstance(vars(model.model.layers[0])["forward"], FusedForward)
    assert "MISSING" not in caplog.text
    get_model("hf")(str(pair[1]), device="cpu")
    assert "MISSING" in caplog.text


@needs_lm_eval
@pytest.mark.parametrize("option", [{"peft": "adapter"}, {"revision": "abc"}, {"gguf_file": "a.gguf"}])
def test_options_that_do_not_fit(option: dict[str, str], tmp_path: Path) -> None:
    from flashnorm.integrations.lm_eval import FlashNormLM

    with pytest.raises(InputError, match=next(iter(option))):
        FlashNormLM(str(tmp_path), device="cpu", **option)


@needs_lm_eval
def test_ordinary_checkpoint(pair: tuple[Path, Path]) -> None:
    """Exit status 2, and what to do, without a traceback."""
    arguments = ["--model", "flashnorm", "--model_args", f"pretrained={pair[0]}", "--device", "cpu"]
    ended = command(*arguments, "--include_path", str(TASKS), "--tasks", "mmlu_dev")
    assert ended.returncode == 2
    assert "expected a FlashNorm checkpoint" in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
@pytest.mark.skipif(INSTALLED, reason="lm-eval is installed")
def test_without_lm_eval() -> None:
    ended = command("--model", "flashnorm")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("flashnorm: expected lm-eval, found No module named 'lm_eval'")
    assert "pip install 'flashnorm[evals]'" in ended.stderr


@pytest.mark.slow
def test_not_imported_by_flashnorm() -> None:
    check = "import sys, flashnorm, flashnorm.cli; flashnorm.load; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m flashnorm.integrations.lm_eval`."""
    line = [sys.executable, "-m", "flashnorm.integrations.lm_eval", *arguments]
    return subprocess.run(line, capture_output=True, text=True, check=False)
