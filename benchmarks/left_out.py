"""What is gained by leaving out the mean of a LayerNorm (`--center`), or a norm whose division cancels (`--cancel`)?

* Operators: a LayerNorm and an RMSNorm; and a norm ahead of queries, keys and values that are normalised again, as it
  is, cancelled exactly, and with `eps` dropped. In eager PyTorch as `flashnorm.load` has them, and as one ONNX graph in
  ONNX Runtime and in OpenVINO, where these are installed (`pip install onnx onnxruntime openvino`).
* Whole models: a decoder with GPT-2's widths and one of Gemma 4's kind, with random weights, folded, and folded and
  centred or cancelled. In eager Transformers, a prompt and a text of a few tokens; and as `torch.onnx.export` makes
  graphs of them, without a cache, in ONNX Runtime and in OpenVINO (`pip install onnxscript`).
* Contenders take turns in random order. A ratio is the median of the ratios of runs side by side, with its middle half;
  above 1, less time is needed than with all of the norm.

    python benchmarks/left_out.py [--threads N] [--operators | --models]
"""

import argparse
import importlib.util
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

import flashnorm
from flashnorm.models.cancelled import CancelledNorm, EndingNorm
from flashnorm.models.centred import CentredNorm
from flashnorm.models.weightless import WeightlessNorm
from flashnorm.plan import Ending, Form

EPS, BUDGET, MOST = 1e-6, 1.5, 400  # seconds a contender, and runs at most
WIDTHS, TOKENS, HEAD = (768, 4096), (1, 128), 64
Run = Callable[[], object]


def turns(runs: dict[str, Run]) -> dict[str, list[float]]:
    """Seconds of each run of each contender."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    end = time.perf_counter() + BUDGET * len(runs)
    least = next(iter(seconds.values()))
    while len(least) < MOST and (time.perf_counter() < end or len(least) < 5):
        for name in random.sample([*runs], len(runs)):
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def row(what: str, runs: dict[str, Run]) -> None:
    """Print a row of the table: the first contender's time, and how much less the others need."""
    seconds = turns(runs)
    first, *others = seconds
    cells = [f"{first} {1e3 * statistics.median(seconds[first]):.3f} ms"]
    for other in others:
        ratios = [a / b for a, b in zip(seconds[first], seconds[other], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        cells.append(f"{other} {middle:.2f} ({low:.2f} to {high:.2f})")
    print(f"| {what} | {' | '.join(cells)} |" + " |" * (2 - len(others)), flush=True)


# --- operators


class Block(nn.Module):
    """A norm, queries, keys and values, and their norms: `[tokens, width]` to `[tokens, heads, head size]` each."""

    def __init__(self, width: int, form: Form | None):
        super().__init__()
        self.norm = WeightlessNorm(EPS) if form is None else CancelledNorm(EPS, form)
        outputs = (width, width // 4, width // 4)
        self.linears = nn.ModuleList(nn.Linear(width, one, bias=False) for one in outputs)
        self.ends = nn.ModuleList(EndingNorm(EPS) for _ in outputs)
        for end in self.ends:
            if isinstance(self.norm, CancelledNorm) and isinstance(end, EndingNorm):
                end.takes_over(self.norm, Ending("", 2.0, (0,)))

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        read = self.norm(x)
        pairs = zip(self.ends, self.linears, strict=True)
        return [end(linear(read).unflatten(-1, (-1, HEAD))) for end, linear in pairs]


def eager() -> None:
    """The rows of PyTorch."""
    for width in WIDTHS:
        for tokens in TOKENS:
            x = torch.randn(tokens, width)
            norms = {"LayerNorm": nn.LayerNorm(width, EPS, elementwise_affine=False), "RMSNorm": CentredNorm(EPS)}
            row(
                f"PyTorch, norm of {tokens} x {width}",
                {name: lambda x=x, norm=norm: norm(x) for name, norm in norms.items()},
            )
            blocks = {"norm": Block(width, None), "exact": Block(width, Form.EXACT), "drop": Block(width, Form.DROP)}
            row(
                f"PyTorch, norm ahead of q, k, v norms, {tokens} x {width}",
                {name: lambda x=x, block=block: block(x) for name, block in blocks.items()},
            )


def graphs(width: int, tokens: int) -> dict[str, dict[str, bytes]]:
    """ONNX models, by row and contender: `x`, `[tokens, width]`, to what the norm, or the last norms, give."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    generator = torch.Generator().manual_seed(0)

    def tensor(name: str, value: torch.Tensor) -> Any:
        return numpy_helper.from_array(value.numpy(), name)

    constants = [tensor("eps", torch.tensor(EPS)), tensor("axis", torch.tensor([-1])), tensor("two", torch.tensor(2.0))]

    def squares(x: str, name: str) -> list[Any]:
        return [
            helper.make_node("Pow", [x, "two"], [f"{name}_square"]),
            helper.make_node("ReduceMean", [f"{name}_square", "axis"], [f"{name}_mean"], keepdims=1),
        ]

    def normed(x: str, name: str, gain: str, eps: str = "eps") -> list[Any]:
        return [
            *squares(x, name),
            helper.make_node("Add", [f"{name}_mean", eps], [f"{name}_sum"]),
            helper.make_node("Sqrt", [f"{name}_sum"], [f"{name}_root"]),
            helper.make_node("Div", [x, f"{name}_root"], [f"{name}_divided"]),
            helper.make_node("Mul", [f"{name}_divided", gain], [name]),
        ]

    def model(nodes: list[Any], outputs: list[str], values: list[Any]) -> bytes:
        inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [tokens, width])]
        shape = [tokens, None] if outputs == ["y"] else [tokens, None, HEAD]
        results = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in outputs]
        graph = helper.make_graph(nodes, "graph", inputs, results, [*constants, *values])
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
        onnx.checker.check_model(made)
        return made.SerializeToString()

    ones = tensor("ones", torch.ones(width))
    layer_norm = helper.make_node("LayerNormalization", ["x", "ones"], ["y"], axis=-1, epsilon=EPS)
    found = {
        f"norm of {tokens} x {width}": {
            "LayerNorm": model([layer_norm], ["y"], [ones]),
            "RMSNorm": model(normed("x", "y", "ones"), ["y"], [ones]),
        }
    }
    values = [ones, tensor("head_ones", torch.ones(HEAD))]
    names = {"q": width, "k": width // 4, "v": width // 4}
    for name, size in names.items():
        values.append(tensor(f"{name}_weight", torch.randn(width, size, generator=generator) / width**0.5))
        values.append(tensor(f"{name}_shape", torch.tensor([tokens, -1, HEAD])))
    blocks: dict[str, bytes] = {}
    for form in ("norm", "exact", "drop"):
        read, eps = ("first", "eps") if form == "norm" else ("x", "eps")
        nodes = normed("x", "first", "ones") if form == "norm" else []
        extra = []
        if form == "exact":
            nodes += [
                *squares("x", "first"),
                helper.make_node("Add", ["first_mean", "eps"], ["first_sum"]),
                helper.make_node("Mul", ["first_sum", "eps"], ["scaled"]),
                helper.make_node("Unsqueeze", ["scaled", "axis"], ["of_heads"]),
            ]
            eps = "of_heads"
        for name in names:
            nodes.append(helper.make_node("MatMul", [read, f"{name}_weight"], [f"{name}_flat"]))
            nodes.append(helper.make_node("Reshape", [f"{name}_flat", f"{name}_shape"], [f"{name}_heads"]))
            nodes += normed(f"{name}_heads", name, "head_ones", eps)
        blocks[form] = model(nodes, [*names], values + extra)
    return found | {f"norm ahead of q, k, v norms, {tokens} x {width}": blocks}


Start = Callable[[bytes | Path, dict[str, torch.Tensor]], Run]


def runtimes(threads: int) -> dict[str, Start]:
    """The runtimes that are installed: name -> from an ONNX model (or its file) and its inputs to a run."""
    found: dict[str, Start] = {}
    if importlib.util.find_spec("onnx") is None:
        return found
    if importlib.util.find_spec("onnxruntime") is not None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3

        def in_onnxruntime(model: bytes | Path, inputs: dict[str, torch.Tensor]) -> Run:
            session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            return lambda: session.run(None, arrays)

        found[f"ONNX Runtime {onnxruntime.__version__}"] = in_onnxruntime
    if importlib.util.find_spec("openvino") is not None:
        import openvino

        core = openvino.Core()

        def in_openvino(model: bytes | Path, inputs: dict[str, torch.Tensor]) -> Run:
            settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32"}
            graph = core.read_model(model) if isinstance(model, Path) else core.read_model(model, b"")
            request = core.compile_model(graph, "CPU", settings).create_infer_request()
            arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
            return lambda: request.infer(arrays)

        found[f"OpenVINO {openvino.__version__.split('-')[0]}"] = in_openvino
    return found


def in_runtimes(threads: int) -> None:
    """The rows of ONNX Runtime and OpenVINO."""
    for runtime, start in runtimes(threads).items():
        for width in WIDTHS:
            for tokens in TOKENS:
                x = torch.randn(tokens, width)
                for what, models in graphs(width, tokens).items():
                    row(f"{runtime}, {what}", {name: start(model, {"x": x}) for name, model in models.items()})


# --- whole models

CENTRED = (
    "gpt2",
    {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 8192, "bos_token_id": 0, "eos_token_id": 1},
)
CANCELLED = (
    "gemma4_text",
    {
        "num_hidden_layers": 12,
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "global_head_dim": 64,
        "vocab_size": 8192,
        "vocab_size_per_layer_input": 8192,
        "hidden_size_per_layer_input": 16,
        "num_kv_shared_layers": 0,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "pad_token_id": 2,
    },
)


class Logits(nn.Module):
    """A model that takes ids, `[1, tokens]`, and gives logits, `[1, tokens, vocabulary]`, without a cache."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits


def whole(
    folder: Path, config: tuple[str, dict[str, Any]], contenders: dict[str, dict[str, Any]], threads: int
) -> None:
    """The rows of a model, converted with these options."""
    name, sizes = config
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **sizes)).eval()
    made.save_pretrained(folder / name)
    models: dict[str, Any] = {}
    for contender, options in contenders.items():
        result = flashnorm.convert(folder / name, folder / f"{name}-{contender}", **options)
        models[contender] = flashnorm.load(result.target, optimize=False)
    prompt, short = (torch.randint(3, 8192, (1, tokens)) for tokens in (128, 8))
    kinds: dict[str, Callable[[Any], object]] = {
        "a prompt of 128": lambda model: model(input_ids=prompt, use_cache=False),
        "16 tokens, one by one": lambda model: model.generate(
            short, max_new_tokens=16, min_new_tokens=16, do_sample=False
        ),
    }
    for what, call in kinds.items():
        runs: dict[str, Run] = {key: lambda model=model, call=call: call(model) for key, model in models.items()}
        row(f"PyTorch, {name}, 12 layers of 768, {what}", runs)
    as_graphs(folder, f"{name}, 12 layers of 768", models, threads)


def as_graphs(folder: Path, what: str, models: dict[str, Any], threads: int) -> None:
    """The rows of models in ONNX Runtime and OpenVINO, if they are installed. All have the same outputs."""
    if not (starts := runtimes(threads)) or importlib.util.find_spec("onnxscript") is None:
        return
    for tokens, kind in ((128, "a prompt of 128"), (1, "one token")):
        ids = torch.randint(3, 8192, (1, tokens))
        files: dict[str, Path] = {}
        for contender, model in models.items():
            files[contender] = folder / f"{contender}.onnx"
            torch.onnx.export(
                Logits(model).eval(),
                (ids,),
                files[contender],
                dynamo=True,
                external_data=True,
                verbose=False,
                optimize=True,
            )
        for runtime, start in starts.items():
            runs = {contender: start(file, {"input_ids": ids}) for contender, file in files.items()}
            check({contender: run() for contender, run in runs.items()}, models, ids)
            row(f"{runtime}, {what}, {kind}", runs)
            del runs
        for file in files.values():
            file.unlink()
            file.with_suffix(".onnx.data").unlink()


def check(outputs: dict[str, Any], models: dict[str, Any], ids: torch.Tensor) -> None:
    """Raise `ValueError` if a graph gives other logits than its model."""
    for contender, output in outputs.items():
        (found,) = output if isinstance(output, list) else output.values()
        expected = models[contender](input_ids=ids, use_cache=False).logits
        if not (torch.from_numpy(found) - expected).abs().max() <= 1e-3 * expected.abs().max():
            raise ValueError(f"expected the logits of {contender}, found others")


@torch.inference_mode()
def main() -> None:
    """Measure and print."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    chosen = arguments.add_mutually_exclusive_group()
    chosen.add_argument("--operators", action="store_true", help="no whole models")
    chosen.add_argument("--models", action="store_true", help="whole models alone")
    options = arguments.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    print(f"float32, {options.threads} threads, torch {torch.__version__}\n")
    print("| what | with all of it | how much faster | |\n|---|---|---|---|")
    if not options.models:
        eager()
        in_runtimes(options.threads)
    if not options.operators:
        with tempfile.TemporaryDirectory() as folder:
            means = {"LayerNorm": {"untie": True}, "RMSNorm": {"untie": True, "center": True}}
            whole(Path(folder), CENTRED, means, options.threads)
            forms = {"norm": {}, "exact": {"cancel": "exact"}, "drop": {"cancel": "drop"}}
            whole(Path(folder), CANCELLED, forms, options.threads)


if __name__ == "__main__":
    main()
