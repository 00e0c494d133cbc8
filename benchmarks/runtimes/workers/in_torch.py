"""Ways to run a Transformers model as a graph: torch.export, torch.compile, and ONNX Runtime on what is exported."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKENS = torch.export.Dim("tokens", min=2, max=1024)
# What stands between a gain and its product: a conversion, the offset of 1 + w, a change of shape.
BETWEEN = ("_to_copy", "to", "add", "view", "unsqueeze", "expand", "clone", "type_as")


class Logits(nn.Module):
    """A model that takes ids, `[1, tokens]`, and gives logits, `[1, tokens, vocabulary]`, without a cache."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


class Model:
    """A function of ids, `[1, tokens]` -> logits; greedy tokens by calling it again with one token more."""

    def __init__(self, function: Any, name: str, gains: int | None):
        self.function, self.gains = function, gains
        self.version = f"{name}, transformers {version('transformers')}"

    def logits(self, ids: list[int]) -> np.ndarray:
        """Of all tokens."""
        return np.asarray(self.function(torch.tensor([ids])))[0]

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Without a cache."""
        for _ in range(tokens):
            ids = [*ids, int(self.logits(ids)[-1].argmax())]
        return ids[-tokens:]


def model_of(folder: Path, form: str) -> PreTrainedModel:
    """The source by Transformers, a converted model by `flashnorm.load`; no fused kernels."""
    if form == "source":
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    import flashnorm

    return flashnorm.load(folder, dtype=torch.float32, optimize=False)


def gains(program: torch.export.ExportedProgram) -> int:
    """Products of a graph with a parameter of one dimension, and norms that are given one."""
    signature = program.graph_signature
    vectors = {
        place
        for place, name in {**signature.inputs_to_parameters, **signature.inputs_to_buffers}.items()
        if program.state_dict.get(name, torch.empty(0, 0)).dim() == 1
    }

    def is_vector(node: Any) -> bool:
        while isinstance(node, torch.fx.Node):
            if node.op == "placeholder":
                return node.name in vectors
            if node.op != "call_function" or getattr(node.target, "_opname", "") not in BETWEEN:
                return False
            node = node.args[0]
        return False

    found = 0
    for node in program.graph.nodes:
        name = getattr(node.target, "_opname", "") if node.op == "call_function" else ""
        if name == "mul":
            found += any(is_vector(one) for one in node.args)
        elif "norm" in name:
            # rms_norm(x, shape, weight, eps), layer_norm(x, shape, weight, bias, eps)
            found += len(node.args) > 2 and is_vector(node.args[2])
    return found


def onnx_gains(graph: Any, buffers: set[str]) -> int:
    """Products with a constant vector that is no buffer (the frequencies of rotary embeddings are one) nor all ones.

    ONNX's own norm operators cannot do without a scale; where the gain is folded, it is all ones.
    """
    from onnx import numpy_helper

    vectors = {
        one.name
        for one in graph.initializer
        if len(one.dims) == 1 and one.dims[0] > 1 and one.name not in buffers
        if not (numpy_helper.to_array(one) == 1).all()
    }
    norms = ("LayerNormalization", "RMSNormalization")
    products = [node for node in graph.node if node.op_type == "Mul" and any(name in vectors for name in node.input)]
    scaled = [node for node in graph.node if node.op_type in norms and node.input[1] in vectors]
    return len(products) + len(scaled)


def onnx_session(program: Logits, example: Tensor, scratch: Path) -> tuple[Any, int]:
    """A session of ONNX Runtime, and the products with a gain in the exported graph."""
    import onnx
    import onnxruntime

    file = scratch / "model.onnx"
    torch.onnx.export(program, (example,), file, dynamo=True, dynamic_shapes=({1: TOKENS},), external_data=True)
    found = onnx_gains(onnx.load(file).graph, {name for name, _ in program.named_buffers()})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return session, found


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` is "torch.export", "torch.compile" or "ONNX Runtime"."""
    torch.set_grad_enabled(False)
    model = Logits(model_of(folder, form))
    example = torch.arange(8)[None]
    torch_version = f"torch {version('torch')}"
    if variant == "torch.export":
        program = torch.export.export(model, (example,), dynamic_shapes=({1: TOKENS},), strict=False)
        return Model(program.module(), torch_version, gains(program))
    if variant == "torch.compile":
        return Model(torch.compile(model, dynamic=True, fullgraph=True), torch_version, None)
    session, found = onnx_session(model, example, scratch)
    name = f"onnxruntime {version('onnxruntime')}, {torch_version}"
    return Model(lambda ids: session.run(None, {"input_ids": ids.numpy()})[0], name, found)
