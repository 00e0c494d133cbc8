"""vLLM's CPU build, in one process."""

import os
from importlib.metadata import version
from pathlib import Path


class Model:
    """An engine that takes one text at a time."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        # The engine reads these when it is imported.
        os.environ |= {
            "VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}",
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
        }
        import vllm

        self.version = f"vllm-cpu {version('vllm-cpu')}"
        self.parameters = vllm.SamplingParams
        self.engine = vllm.LLM(
            str(folder),
            dtype=dtype,
            skip_tokenizer_init=True,
            max_model_len=1024,
            max_num_batched_tokens=1024,  # a prompt in one piece
            max_num_seqs=1,
            enable_prefix_caching=False,
        )

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy; without the prefix cache, every call starts from nothing."""
        options = self.parameters(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        (result,) = self.engine.generate({"prompt_token_ids": ids}, options, use_tqdm=False)
        return list(result.outputs[0].token_ids)


def load(folder: Path, dtype: str, threads: int, scratch: Path) -> Model:
    """Compiled, which is vLLM's default."""
    os.environ["VLLM_CACHE_ROOT"] = str(scratch / "vllm")
    return Model(folder, dtype, threads)
