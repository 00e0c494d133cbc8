"""Transformers under `torch.compile`, with a static cache and a loop that does nothing but take the likeliest token."""

import os
from importlib.metadata import version
from pathlib import Path

CONTEXT = 1024  # tokens that the cache holds, all of which every token attends to under a mask


class Model:
    """A compiled forward; each length of input compiles once."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        import torch
        from transformers import AutoModelForCausalLM, StaticCache

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.version = f"torch {version('torch')}, transformers {version('transformers')}"
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()
        self.cache = StaticCache(config=model.config, max_cache_len=CONTEXT)
        # The first use allocates the cache. Under the compiler it would be compiled for, and the next call again.
        model(torch.tensor([[0]]), past_key_values=self.cache)
        self.forward = torch.compile(model.forward, dynamic=False, fullgraph=True)

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy; the cache is emptied first."""
        self.cache.reset()
        generated = []
        inputs, positions = self.torch.tensor([ids]), self.torch.arange(len(ids))[None]
        while True:
            logits = self.forward(
                input_ids=inputs, position_ids=positions, past_key_values=self.cache, logits_to_keep=1
            ).logits
            token = logits[0, -1].argmax()
            generated.append(token.item())
            if len(generated) == tokens:
                return generated
            inputs, positions = token.view(1, 1), positions[:, -1:] + 1


def load(folder: Path, dtype: str, threads: int, scratch: Path) -> Model:
    """Compiled anew by each process, and in it."""
    os.environ |= {"TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"), "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    return Model(folder, dtype, threads)
