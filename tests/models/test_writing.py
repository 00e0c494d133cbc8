"""`flashnorm generate`: a text continued, a chat, options of drawing, stops, and what is said about it."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

import flashnorm
import tiny
from flashnorm.errors import InputError
from flashnorm.models.writing import Choice, TextWriter
from forked import Commands, assert_refused, forked_commands

TEMPLATE = (
    "{% for message in messages %}{{ message.role + ' ' + message.content + ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant' }}{% endif %}"
)
WORDS = [
    "<s>",
    "</s>",
    "<pad>",
    "system",
    "user",
    "assistant",
    *(f"w{i}" for i in range(121)),
    "abcdef",
]  # the last: `StopStringCriteria` looks for it


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A converted model whose tokens are words."""
    folder = tmp_path_factory.mktemp("writing")
    tiny.save(folder / "source", tiny.model(tiny.config("qwen3"), torch.float32))
    words = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "source")
    flashnorm.convert(folder / "source", folder / "out")
    return folder / "out"


@pytest.fixture(scope="module")
def run() -> Any:
    with forked_commands({"HF_HUB_OFFLINE": "1"}) as commands:
        yield commands


def expected(out: Path, text: str, steps: int, **options: Any) -> list[str]:
    """The words that the model's own `generate` adds to a text."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(out)
    inputs = tokenizer(text, return_tensors="pt")
    model: Any = flashnorm.load(out, optimize=False)
    ids = model.generate(**inputs, max_new_tokens=steps, **({"do_sample": False} | options))
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).split()


@pytest.mark.slow
def test_a_text_is_continued(run: Commands, out: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("w1 w2 w3\n")
    words = expected(out, "w1 w2 w3", 7)
    for given in (["w1 w2 w3"], ["--file", tmp_path / "text.txt"]):
        result = run("generate", out, *given, "-n", "7")
        assert (result.returncode, result.stdout.split()) == (0, ["w1", "w2", "w3", *words])
        pace = (
            r"flashnorm: (\d+) tokens; the first after [\d.]+ s \(a prompt of 3 tokens\), then ([\d.]+) tokens a second"
        )
        found = re.fullmatch(pace, result.stderr.strip())
        assert found is not None
        assert int(found[1]) in (len(words), len(words) + 1)  # one may be special
        assert float(found[2]) > 0


@pytest.mark.slow
def test_a_text_from_a_pipe(out: Path) -> None:
    for given in ([], ["-"]):
        command = [sys.executable, "-m", "flashnorm", "generate", str(out), *given, "--max-new-tokens", "4"]
        result = subprocess.run(command, input="w9 w8\n", capture_output=True, text=True, check=True)
        assert result.stdout.split() == ["w9", "w8", *expected(out, "w9 w8", 4)]
    broken = subprocess.run(command, input=b"\xff\xfe", capture_output=True, check=False)
    assert broken.returncode == 2
    assert b"standard input: expected a UTF-8 text" in broken.stderr


@pytest.mark.slow
def test_a_message_is_answered(run: Commands, out: Path) -> None:
    words = expected(out, "system w5 user w6 assistant", 6)
    result = run("generate", out, "w6", "--chat", "--system-prompt", "w5", "-n", "6")
    assert (result.returncode, result.stdout.split()) == (0, words)


@pytest.mark.slow
def test_a_chat_at_a_terminal(out: Path) -> None:
    """Each message is answered with all that was said before it."""
    first = expected(out, "user w6 assistant", 3)
    second = expected(out, f"user w6 assistant {' '.join(first)} user w7 w8 assistant", 3)
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "flashnorm", "generate", str(out), "--chat", "-n", "3"]
    with subprocess.Popen(command, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        os.close(theirs)
        os.write(ours, b"w6\n\nw7 w8\n\x04")
        printed, remarks = process.communicate(timeout=300)
    os.close(ours)
    assert process.returncode == 0, remarks
    assert printed.replace(">", "").split() == [*first, *second]
    assert remarks.count("tokens a second") == 2


@pytest.mark.slow
def test_drawn_tokens(run: Commands, out: Path) -> None:
    def drawn(*options: str) -> list[str]:
        return run("generate", out, "w1", "-n", "8", *options).stdout.split()[1:]

    assert drawn("--temp", "3", "--seed", "5") == drawn("--temp", "3", "--seed", "5")
    assert drawn("--temp", "3", "--seed", "5") != drawn("--temp", "3", "--seed", "6")
    assert drawn("--temp", "3", "--top-k", "1") == expected(out, "w1", 8) == drawn("--temp", "3", "--top-p", "0")


@pytest.mark.parametrize("stops", [("w",), ("nowhere", "w")])
def test_it_stops_after_a_text_and_on_the_fused_kernels(
    out: Path, stops: tuple[str, ...], caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture
) -> None:
    model, tokenizer = flashnorm.load(out), PreTrainedTokenizerFast.from_pretrained(out)
    words = expected(out, "w1 w2", 8)
    stop = words[2]
    written = TextWriter(model, tokenizer, Choice(), 8, (*stops[:-1], stop)).continue_text("w1 w2")
    assert written.text.split() == words[: words.index(stop) + 1]
    assert capsys.readouterr().out.split() == ["w1", "w2", *written.text.split()]
    assert not caplog.records, "the fused loop ran"
    assert (written.prompt, written.tokens) == (2, words.index(stop) + 1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "expected_words"),
    [
        (["w1", "--top-p", "0.5"], "--temp above 0 with --top-p"),
        (["w1", "--seed", "5", "--top-k", "3"], "--temp above 0 with --top-k and --seed"),
        (["w1", "--system-prompt", "w2"], "expected --chat with --system-prompt"),
        (["w1", "--file", "somewhere"], "either PROMPT or --file, found both"),
        (["--file", "nowhere"], "nowhere: expected a UTF-8 text"),
        (["w1", "--stop", ""], "text as --stop"),
        ([""], "at least one token"),
    ],
)
def test_refused(run: Commands, out: Path, options: list[str], expected_words: str) -> None:
    assert_refused(run("generate", out, *options), expected_words)


def test_a_chat_without_a_template_or_with_one_that_refuses(out: Path) -> None:
    model, tokenizer = flashnorm.load(out), PreTrainedTokenizerFast.from_pretrained(out)
    tokenizer.chat_template = "{{ raise_exception('no system, please') }}"
    with pytest.raises(InputError, match="no system, please"):
        TextWriter(model, tokenizer, Choice(), 3).answer([{"role": "user", "content": "w1"}])
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="a chat template, found none; leave out --chat"):
        TextWriter(model, tokenizer, Choice(), 3).answer([{"role": "user", "content": "w1"}])
