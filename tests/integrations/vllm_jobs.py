"""Runs models in vLLM, one after the other in one process, and writes down what they did.

    python vllm_jobs.py JOBS.json RESULTS.json

A job: `name`, `model` (a folder), `options` (of `vllm.LLM`), `steps` (names of functions below, run before generating),
`patch` (the name of one that changes vLLM before the model is built), `task` ("pool": hidden states are pooled).
A result: tokens and log-probabilities of the greedy continuations, and what the model is made of; what was pooled; or
the error.
"""

import gc
import json
import os
import sys
import traceback
from collections import Counter
from importlib import import_module
from pathlib import Path
from typing import Any

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_ALLOW_INSECURE_SERIALIZATION"] = "1"  # functions are sent to workers

from torch.utils._python_dispatch import TorchDispatchMode
from vllm import LLM, PoolingParams, SamplingParams
from vllm.config import get_current_vllm_config
from vllm.lora.request import LoRARequest
from vllm.model_executor.models import llama

from flashnorm.cpu.kernels import native

PROMPTS = [list(range(5, 25)), list(range(40, 50)), [7, 99, 3, 120, 64]]
TOKENS = 16
TOP = 5
DEFAULTS = {
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 96,
    "max_num_seqs": 4,
    "enable_prefix_caching": False,
    "skip_tokenizer_init": True,
    "distributed_executor_backend": "uni",
}


class GainProducts(TorchDispatchMode):
    """Counts products of a matrix with a vector along its last axis: what a norm with a weight computes."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in ("aten::mul", "aten::mul_"):
            shapes = sorted((tuple(getattr(value, "shape", ())) for value in args), key=len)
            self.count += len(shapes[0]) == 1 < len(shapes[1]) and shapes[0][0] == shapes[1][-1] > 1
        return func(*args, **(kwargs or {}))


def generate(llm: Any, **options: Any) -> dict[str, Any]:
    """Greedy tokens after each prompt, `[prompts][TOKENS]`, and the log-probabilities of the best few at each."""
    sampling = SamplingParams(temperature=0, max_tokens=TOKENS, ignore_eos=True, logprobs=TOP, detokenize=False)
    prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [answer.outputs[0] for answer in llm.generate(prompts, sampling, use_tqdm=False, **options)]
    return {
        "tokens": [list(output.token_ids) for output in outputs],
        "logprobs": [
            [{str(token): entry.logprob for token, entry in step.items()} for step in output.logprobs]
            for output in outputs
        ],
    }


def pool(engine: Any) -> list[list[float]]:
    """The pooled hidden state of each prompt; by the engine itself, as `LLM.embed` wants a tokenizer."""
    for number, prompt in enumerate(PROMPTS):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, PoolingParams(task="embed"))
    pooled = {}
    while engine.has_unfinished_requests():
        pooled |= {answer.request_id: answer.outputs.data.tolist() for answer in engine.step()}
    return [pooled[str(number)] for number in range(len(PROMPTS))]


def accepted(llm: Any) -> int:
    """How many tokens of a draft were right so far; 0 without vLLM's statistics."""
    if not llm.llm_engine.log_stats:
        return 0
    (metric,) = [metric for metric in llm.get_metrics() if metric.name == "vllm:spec_decode_num_accepted_tokens"]
    return metric.value


def reload(llm: Any) -> None:
    """Load the weights again, from the same files."""
    llm.collective_rpc("reload_weights")


def read_the_flag() -> None:
    """Make vLLM's Llama read `flashnorm_folded` as an open change of vLLM does (41431).

    Its three kinds of norms are built without weight then, and the tensors of norms are not loaded.
    """
    built, load = llama.RMSNorm, llama.LlamaModel.load_weights

    def flagged(config: Any) -> bool:
        return getattr(config, "flashnorm_folded", False)

    def norm(*args: Any, **kwargs: Any) -> Any:
        return built(*args, **kwargs, has_weight=not flagged(get_current_vllm_config().model_config.hf_config))

    def load_weights(self: Any, weights: Any) -> Any:
        ours = flagged(self.config)
        return load(self, ((name, tensor) for name, tensor in weights if not (ours and name.endswith("norm.weight"))))

    llama.RMSNorm, llama.LlamaModel.load_weights = norm, load_weights


def look(model: Any) -> dict[str, Any]:
    """What a model of vLLM is made of. A function of the module, as workers are sent it."""
    return {
        # Linears that are packed for the CPU leave an empty vector behind.
        "vectors": sorted(name for name, value in model.named_parameters() if value.dim() == 1 and value.numel()),
        "classes": Counter(type(module).__name__ for module in model.modules()),
        "state": sorted(model.state_dict()),
        "loads_as_ever": "load_weights" not in vars(model),
    }


def run(job: dict[str, Any]) -> dict[str, Any]:
    """Do a job."""
    if "patch" in job:
        globals()[job["patch"]]()
    llm = LLM(job["model"], **(DEFAULTS | job.get("options", {})))
    try:
        if job.get("task") == "pool":
            return {"pooled": pool(llm.llm_engine)}
        for step in job.get("steps", ()):
            globals()[step](llm)
        adapter = job.get("adapter")
        options = {} if adapter is None else {"lora_request": LoRARequest("adapter", 1, adapter)}
        before = native.runs[native.NORM_LINEAR]
        result = generate(llm, **options)
        result["kernel_runs"] = native.runs[native.NORM_LINEAR] - before
        if job.get("options", {}).get("speculative_config"):
            result["accepted"] = accepted(llm)
        if llm.llm_engine.vllm_config.parallel_config.world_size == 1:
            with GainProducts() as products:
                generate(llm, **options)
            result["gain_products"] = products.count
        # By the module's own name, as Ray's workers have another __main__.
        parts = llm.apply_model(import_module("vllm_jobs").look)
        return result | parts[0] | {"vectors": sorted({name for part in parts for name in part["vectors"]})}
    finally:
        llm.llm_engine.engine_core.shutdown()


def main() -> None:
    """Do all jobs of a file."""
    results: dict[str, Any] = {}
    for job in json.loads(Path(sys.argv[1]).read_text()):
        try:
            results[job["name"]] = run(job)
        except BaseException as error:
            results[job["name"]] = {"error": f"{type(error).__name__}: {error}"}
            traceback.print_exc()
        gc.collect()
        Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
