"""Published models at full size: as many norms fold as the architecture says, and nothing in it is unknown.

The expected numbers are derived from the architectures, not read off the planner:

* A norm before linears folds: before attention, before the MLP or experts, in a latent (MLA), behind a gate.
* A norm before the rotation (of queries and keys) or before the residual sum stays.
* The last norm folds into the output head, unless that is tied to the embedding.

`make test` plans one model in three; `make WHOLE=1 test` all of them.
"""

import os
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch

from architectures.published import configs, plan_published, runs

pytestmark = pytest.mark.slow


class Expected(NamedTuple):
    """Norms of the language model that fold and that stay, and the published number of parameters in billions."""

    folded: int
    kept: int
    billions: float


TIED = 1  # the last norm, before an output head that is the embedding

EXPECTED = {
    # Linear attention in three layers of four has a norm behind its gate; full attention has norms of queries and keys.
    "Qwen/Qwen3-0.6B": Expected(28 * 2, 28 * 2 + TIED, 0.596),
    "Qwen/Qwen3-8B": Expected(36 * 2 + 1, 36 * 2, 8.19),
    "Qwen/Qwen3-30B-A3B": Expected(48 * 2 + 1, 48 * 2, 30.5),
    "Qwen/Qwen3-235B-A22B": Expected(94 * 2 + 1, 94 * 2, 235),
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Expected(48 * 2 + 36 + 1, 12 * 2, 80),
    "Qwen/Qwen3.5-27B": Expected(64 * 2 + 48 + 1, 16 * 2, 27),
    "Qwen/Qwen3.5-35B-A3B": Expected(40 * 2 + 30 + 1, 10 * 2, 35),
    "Qwen/Qwen3.5-397B-A17B": Expected(60 * 2 + 45 + 1, 15 * 2, 397),
    "meta-llama/Llama-3.1-8B-Instruct": Expected(32 * 2 + 1, 0, 8.03),
    "meta-llama/Llama-3.2-1B-Instruct": Expected(16 * 2, TIED, 1.24),
    "meta-llama/Llama-3.3-70B-Instruct": Expected(80 * 2 + 1, 0, 70.6),
    "meta-llama/Llama-4-Scout-17B-16E-Instruct": Expected(48 * 2 + 1, 0, 108.6),
    "mistralai/Mistral-7B-v0.1": Expected(32 * 2 + 1, 0, 7.24),
    "mistralai/Mixtral-8x7B-v0.1": Expected(32 * 2 + 1, 0, 46.7),
    # Gemma 2 and later: a norm behind attention and behind the MLP as well. Gemma 3: norms of queries and keys.
    "google/gemma-2b": Expected(18 * 2, TIED, 2.51),
    "google/gemma-2-9b": Expected(42 * 2, 42 * 2 + TIED, 9.24),
    "google/gemma-3-4b-it": Expected(34 * 2, 34 * 4 + TIED, 4.3),
    "google/gemma-3-27b-it": Expected(62 * 2, 62 * 4 + TIED, 27.4),
    # Before attention it is added in LAuReL; 15 layers share keys. AltUp's router has a norm, the inputs a layer too.
    "google/gemma-3n-E4B": Expected(35 * 2, 35 * 6 + 20 + 1 + TIED, 6.87),
    # 20 layers share keys. A norm behind what each layer has as its own input, and one of all those inputs.
    "google/gemma-4-E2B-it": Expected(35 * 2, 35 * 4 + 15 + 1 + TIED, 5.1),
    # An MLP and experts: router and experts have a norm each, and two more stand behind.
    "google/gemma-4-26B-A4B": Expected(30 * 4, 30 * 6 + TIED, 25.8),
    "microsoft/Phi-3-mini-4k-instruct": Expected(32 * 2 + 1, 0, 3.82),
    "microsoft/phi-4": Expected(40 * 2 + 1, 0, 14.7),
    # Norms behind attention and MLP only, and of queries and keys.
    "allenai/OLMo-2-1124-7B": Expected(1, 32 * 4, 7.3),
    "allenai/Olmo-3-1025-7B": Expected(1, 32 * 4, 7.3),
    # Latent attention: norms of the latents fold as well. V2-Lite has no latent of the queries.
    "deepseek-ai/DeepSeek-V2-Lite": Expected(27 * 3 + 1, 0, 15.7),
    "deepseek-ai/DeepSeek-V3": Expected(61 * 4 + 1, 0, 671),
    "moonshotai/Kimi-K2.5": Expected(61 * 4 + 1, 0, 1027),
    # The indexer rotates its keys behind a norm.
    "deepseek-ai/DeepSeek-V3.2": Expected(61 * 4 + 1, 61, 671),
    "zai-org/GLM-5.1": Expected(78 * 4 + 1, 78, 744),
    "openai/gpt-oss-20b": Expected(24 * 2 + 1, 0, 20.9),
    "openai/gpt-oss-120b": Expected(36 * 2 + 1, 0, 116.8),
    "zai-org/glm-4-9b-chat-hf": Expected(40 * 2 + 1, 0, 9.4),
    "zai-org/GLM-4-9B-0414": Expected(40 * 2 + 1, 40 * 2, 9.4),
    "zai-org/GLM-4.5-Air": Expected(46 * 2 + 1, 0, 106.8),
    "zai-org/GLM-4.6": Expected(92 * 2 + 1, 92 * 2, 355),
    "ibm-granite/granite-3.3-8b-instruct": Expected(40 * 2, TIED, 8.17),
    "ibm-granite/granite-4.0-micro": Expected(40 * 2, TIED, 3.4),
    # Mamba in 36 of 40 layers has a norm behind its gate. In Falcon-H1 it has none.
    "ibm-granite/granite-4.0-h-tiny": Expected(40 * 2 + 36, TIED, 6.94),
    "tiiuae/Falcon-H1-0.5B-Instruct": Expected(36 * 2 + 1, 0, 0.521),
    # One norm a layer; of 52 layers, 23 are Mamba with a norm behind the gate.
    "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16": Expected(52 + 23 + 1, 0, 31.6),
    "HuggingFaceTB/SmolLM2-135M": Expected(30 * 2, TIED, 0.1345),
    "HuggingFaceTB/SmolLM2-1.7B": Expected(24 * 2, TIED, 1.71),
    "HuggingFaceTB/SmolLM3-3B": Expected(36 * 2, TIED, 3.08),
    # The residual is the norm's output; lightning attention in seven layers of eight has a norm before its gate.
    "MiniMaxAI/MiniMax-Text-01-hf": Expected(70 + 1, 80 * 2, 456),
    "MiniMaxAI/MiniMax-M2.5": Expected(62 * 2 + 1, 62 * 2, 229),
    "XiaomiMiMo/MiMo-V2-Flash": Expected(48 * 2 + 1, 0, 309),
    # LayerNorm; from here on. In Cohere, Falcon and Phi, attention and MLP read the same one.
    "nvidia/Minitron-4B-Base": Expected(32 * 2 + 1, 0, 4.19),
    "CohereForAI/c4ai-command-r-v01": Expected(40, TIED, 35),
    "EleutherAI/pythia-6.9b": Expected(32 * 2 + 1, 0, 6.86),
    "bigcode/starcoder2-7b": Expected(32 * 2, TIED, 7.17),
    # The embedding has a norm, and the residual begins behind it.
    "bigscience/bloom-7b1": Expected(30 * 2, 1 + TIED, 7.07),
    "facebook/opt-6.7b": Expected(32 * 2, TIED, 6.66),
    "microsoft/phi-2": Expected(32 + 1, 0, 2.78),
    "openai-community/gpt2": Expected(12 * 2, TIED, 0.124),
    "stabilityai/stablelm-3b-4e1t": Expected(32 * 2 + 1, 0, 2.8),
    "tiiuae/falcon-7b": Expected(32, TIED, 6.92),
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Index tensors are small: several threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_config_has_its_expectation() -> None:
    assert set(configs()) == set(EXPECTED)


@pytest.mark.parametrize("name", sorted(EXPECTED)[:: 1 if os.environ.get("WHOLE") else 3])
def test_folds_what_the_architecture_says(name: str) -> None:
    expected = EXPECTED[name]
    if not runs(configs()[name]):
        pytest.skip("this version of transformers cannot run the model")
    row = plan_published(configs()[name])
    assert row.parameters == pytest.approx(expected.billions * 1e9, rel=0.03)
    assert (row.folded, sum(row.kept.values())) == (expected.folded, expected.kept)
    assert not row.unknown
