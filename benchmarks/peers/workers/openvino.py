"""OpenVINO GenAI, on what optimum-intel exports."""

import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path

# Its name for a dtype, and for a processor's ability to calculate in it.
PRECISIONS = {"float32": ("f32", "FP32"), "float16": ("f16", "FP16"), "bfloat16": ("bf16", "BF16")}


class Model:
    """A pipeline."""

    def __init__(self, folder: Path, dtype: str, threads: int):
        import openvino
        import openvino_genai

        self.genai = openvino_genai
        precision, capability = PRECISIONS[dtype]
        self.version = f"openvino-genai {version('openvino-genai')}"
        if capability not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"):
            precision = "f32"
            self.version += f", {dtype} weights, float32 arithmetic"
        scheduler = openvino_genai.SchedulerConfig()
        scheduler.enable_prefix_caching = False
        scheduler.max_num_batched_tokens = 1024  # a prompt in one piece
        scheduler.cache_size = 1  # GB
        self.pipeline = openvino_genai.LLMPipeline(
            folder,
            "CPU",
            scheduler_config=scheduler,
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT=precision,
            KV_CACHE_PRECISION=precision,  # 8 bits otherwise
        )

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy; without the scheduler's prefix cache, every call starts from nothing."""
        import numpy as np
        from openvino import Tensor

        prompt = np.array([ids], dtype=np.int64)
        inputs = self.genai.TokenizedInputs(Tensor(prompt), Tensor(np.ones_like(prompt)))
        # The end-of-text token is ignored, and yet must be one.
        options = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, eos_token_id=0, do_sample=False)
        return list(self.pipeline.generate(inputs, options).tokens[0])


def export(folder: Path, target: Path, dtype: str) -> None:
    """A Hugging Face folder -> OpenVINO's files, weights in the given dtype."""
    import torch
    from optimum.exporters.openvino import main_export

    main_export(
        folder,
        target,
        task="text-generation-with-past",
        convert_tokenizer=False,
        model_loading_kwargs={"torch_dtype": getattr(torch, dtype)},
    )


def load(folder: Path, dtype: str, threads: int, scratch: Path) -> Model:
    """Exported by a process of its own, so that PyTorch takes none of this one's memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        process.submit(export, folder, scratch / "openvino", dtype).result()
    return Model(scratch / "openvino", dtype, threads)
