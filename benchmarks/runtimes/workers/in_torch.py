"""Ways to run a Transformers model as a graph: torch.compile, and what runs the graph of torch.export."""

from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

TOKENS = torch.export.Dim("tokens", min=2, max=256)
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

    note = ""

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


def in_onnx_runtime(model: Logits, example: Tensor, scratch: Path) -> Model:
    """A session of ONNX Runtime."""
    import onnx
    import onnxruntime

    file = scratch / "model.onnx"
    torch.onnx.export(model, (example,), file, dynamo=True, dynamic_shapes=({1: TOKENS},), external_data=True)
    found = onnx_gains(onnx.load(file).graph, {name for name, _ in model.named_buffers()})
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = f"onnxruntime {version('onnxruntime')}, torch {version('torch')}"
    return Model(lambda ids: session.run(None, {"input_ids": ids.numpy()})[0], name, found)


def in_openvino(program: torch.export.ExportedProgram) -> Model:
    """A graph that OpenVINO compiles, in float32."""
    import openvino
    from workers.openvino import gains as openvino_gains

    graph = openvino.convert_model(program)
    hints = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(graph, "CPU", hints)
    name = f"openvino {version('openvino')}, torch {version('torch')}"
    return Model(lambda ids: compiled([ids.numpy()])[0], name, openvino_gains(graph))


def in_executorch(program: torch.export.ExportedProgram, scratch: Path) -> Model:
    """A program for ExecuTorch's runtime, lowered to XNNPACK where that has the operators."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower
    from executorch.runtime import Runtime

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()]).to_executorch()
    file = scratch / "model.pte"
    with file.open("wb") as output:
        lowered.write_to_file(output)
    method = Runtime.get().load_program(file).load_method("forward")
    name = f"executorch {version('executorch')}, torch {version('torch')}"
    return Model(lambda ids: method.execute([ids])[0], name, gains(program))


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """`variant` is "torch.compile", or what runs the graph of "torch.export"."""
    torch.set_grad_enabled(False)
    model, example = Logits(model_of(folder, form)), torch.arange(8)[None]
    if variant == "ONNX Runtime":
        return in_onnx_runtime(model, example, scratch)
    if variant == "torch.compile":
        return Model(torch.compile(model, dynamic=True, fullgraph=True), f"torch {version('torch')}", None)
    program = torch.export.export(model, (example,), dynamic_shapes=({1: TOKENS},), strict=False)
    if variant == "OpenVINO":
        return in_openvino(program)
    if variant == "ExecuTorch":
        return in_executorch(program, scratch)
    return Model(program.module(), f"torch {version('torch')}", gains(program))
