"""OpenVINO GenAI, on what optimum-intel exports in float32."""

import importlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

FLOAT32 = {"INFERENCE_PRECISION_HINT": "f32", "KV_CACHE_PRECISION": "f32"}


class Model:
    """A pipeline, and the same files as a model for the logits of all tokens."""

    note = ""

    def __init__(self, folder: Path):
        import openvino
        import openvino_genai

        versions = [f"{name} {version(name)}" for name in ("openvino-genai", "optimum-intel", "transformers")]
        self.version = ", ".join(versions)
        self.openvino, self.genai = openvino, openvino_genai
        self.graph = openvino.Core().read_model(folder / "openvino_model.xml")
        self.gains = gains(self.graph)
        self.pipeline = openvino_genai.LLMPipeline(folder, "CPU", **FLOAT32)

    def logits(self, ids: list[int]) -> np.ndarray:
        """By the compiled graph itself."""
        request = self.openvino.Core().compile_model(self.graph, "CPU", FLOAT32).create_infer_request()
        names = {name for port in self.graph.inputs for name in port.get_names()}
        inputs: dict[str, Any] = {
            "input_ids": np.array([ids]),
            "attention_mask": np.ones((1, len(ids)), np.int64),
            "position_ids": np.arange(len(ids))[None],
            "beam_idx": np.zeros(1, np.int32),
        }
        request.infer({name: value for name, value in inputs.items() if name in names})
        return request.get_tensor("logits").data[0].copy()

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy."""
        prompt = np.array([ids])
        tensors = self.openvino.Tensor(prompt), self.openvino.Tensor(np.ones_like(prompt))
        # The end-of-text token is ignored, and yet must be one.
        options = self.genai.GenerationConfig(max_new_tokens=tokens, ignore_eos=True, eos_token_id=0, do_sample=False)
        return list(self.pipeline.generate(self.genai.TokenizedInputs(*tensors), options).tokens[0])


def gains(graph: Any) -> int:
    """Products of a graph with a constant vector over the last dimension, that is neither one number nor all ones."""
    found = 0
    for operation in graph.get_ops():
        if operation.get_type_name() == "Multiply":
            sources = [operation.input_value(side).get_node() for side in (0, 1)]
            sources = [s.input_value(0).get_node() if s.get_type_name() == "Convert" else s for s in sources]
            found += any(is_gain(source) for source in sources)
    return found


def is_gain(source: Any) -> bool:
    """Whether a node is such a constant."""
    if source.get_type_name() != "Constant":
        return False
    shape = [*source.get_output_shape(0)]
    return bool(shape) and shape[-1] > 1 and int(np.prod(shape)) == shape[-1]


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """Exported from the folder, by the function of `optimum-cli export openvino`."""
    import torch

    importlib.import_module("optimum.exporters.openvino").main_export(
        folder,
        scratch / "openvino",
        task="text-generation-with-past",
        convert_tokenizer=False,
        model_loading_kwargs={"torch_dtype": torch.float32},
    )
    return Model(scratch / "openvino")
