"""What is compared: runtimes, the ways to hand them a folder, and the environment of each."""

from dataclasses import dataclass

from peers.environments import Environment

KEEP, WEIGHTLESS = "--keep-norms", "weightless"

TORCH = ("torch==2.13.0", "accelerate==1.15.0", "psutil", "typer", "rich")
TRANSFORMERS = "transformers==5.24.0"

ENVIRONMENTS = {
    "torch": Environment(
        (
            *(*TORCH, TRANSFORMERS, "peft==0.21.2"),
            *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0", "openvino==2026.4.1"),
        )
    ),
    "quantised": Environment(
        (
            # The newest that llm-compressor takes.
            *(*TORCH, "transformers==5.17.0", "sentencepiece", "torchao==0.18.0", "hqq==0.2.8.post1"),
            *("bitsandbytes==0.50.2", "llmcompressor==0.14.0.1"),
        )
    ),
    "executorch": Environment((*TORCH, TRANSFORMERS, "executorch==1.5.1")),
    "llama_cpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "torch==2.13.0", TRANSFORMERS, "sentencepiece"),
        # There is no wheel. Built here, for this very processor: from the cache it could be another's.
        options=("--no-binary=llama-cpp-python", "--no-cache-dir"),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "openvino": Environment(
        (
            *("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0"),
            # Its exporters of Gemma and Qwen refuse Transformers 5.
            *("transformers==4.57.6", "torch==2.13.0"),
        ),
        unwanted=("torchvision",),
    ),
}


@dataclass(frozen=True)
class Way:
    """A runtime, and a way to hand it a folder.

    Attributes:
        name: as the table shows it.
        module, variant: which of `workers` it is, and what that is told.
        environment: a key of `ENVIRONMENTS`.
        forms: the forms of converted folders that are tried.
        calls: the functions or commands that it goes through, in Markdown.
        compared: what is, in words.
        tokenizer: whether the folder has to have one.
        plain: whether it computes what the model alone computes, so that the source can be held against Transformers.
    """

    name: str
    module: str
    variant: str
    environment: str
    forms: tuple[str, ...]
    calls: str
    compared: str = "tokens, log-probabilities"
    tokenizer: bool = False
    plain: bool = True


BOTH = (KEEP, WEIGHTLESS)
GRAPH = "tokens, log-probabilities, gains in the graph"
PRETRAINED, LOAD = "`from_pretrained`", "`flashnorm.load`"
DISK, AUTO = '`device_map={"": "disk"}`', '`device_map="auto"`, half of the model on the disk'

WAYS = [
    Way("Transformers", "in_transformers", "from_pretrained", "torch", BOTH, PRETRAINED),
    Way("Transformers, on the disk", "in_transformers", "from_pretrained, disk", "torch", BOTH, DISK),
    Way("Transformers, accelerate", "in_transformers", "from_pretrained, auto", "torch", BOTH, AUTO),
    Way(
        *("Transformers' pipeline", "in_transformers", "pipeline", "torch", BOTH),
        *('`pipeline("text-generation", model=OUT)`', "tokens, log-probabilities", True),
    ),
    Way(
        *("Transformers' Trainer", "in_transformers", "Trainer", "torch", BOTH),
        *("`Trainer.predict`, `Trainer.train`", "tokens, log-probabilities; losses of three steps"),
    ),
    Way(
        *("PEFT", "in_transformers", "PEFT", "torch", BOTH, "`flashnorm.convert_adapter`, `PeftModel.from_pretrained`"),
        *("tokens, log-probabilities, each with its LoRA", False, False),
    ),
    Way("flashnorm.load", "in_transformers", "flashnorm.load", "torch", BOTH, LOAD),
    Way("flashnorm.load, on the disk", "in_transformers", "flashnorm.load, disk", "torch", (WEIGHTLESS,), DISK),
    Way("flashnorm.load, accelerate", "in_transformers", "flashnorm.load, auto", "torch", (WEIGHTLESS,), AUTO),
    Way(
        *("torch.export, of flashnorm.load", "in_torch", "torch.export", "torch", (WEIGHTLESS,)),
        *("`torch.export.export`", GRAPH),
    ),
    Way(
        *("torch.compile, of flashnorm.load", "in_torch", "torch.compile", "torch", (WEIGHTLESS,)),
        "`torch.compile(fullgraph=True)`",
    ),
    Way(
        *("ONNX Runtime, of flashnorm.load", "in_torch", "ONNX Runtime", "torch", (WEIGHTLESS,)),
        *("`torch.onnx.export`, `InferenceSession`", GRAPH),
    ),
    Way(
        *("OpenVINO, of flashnorm.load", "in_torch", "OpenVINO", "torch", (WEIGHTLESS,)),
        *("`torch.export.export`, `openvino.convert_model`", GRAPH),
    ),
    Way(
        *("ExecuTorch, of flashnorm.load", "in_torch", "ExecuTorch", "executorch", (WEIGHTLESS,)),
        *("`torch.export.export`, `to_edge_transform_and_lower` with XNNPACK", GRAPH),
    ),
    Way(
        *("OpenVINO GenAI", "openvino", "", "openvino", BOTH),
        *("optimum-intel's `main_export`, `LLMPipeline`", GRAPH),
    ),
    Way("llama.cpp", "llama_cpp", "", "llama_cpp", BOTH, "`convert_hf_to_gguf.py`, `llama_decode`"),
    Way(
        *("llama.cpp, patched", "llama_cpp", "patched", "llama_cpp", (WEIGHTLESS,)),
        "[two words](#what-weightless-would-need) in a model's file",
    ),
    Way("MLX", "in_mlx", "", "mlx", BOTH, "`mlx_lm.convert`, `mlx_lm.generate`"),
    Way(
        *("MLX, patched", "in_mlx", "patched", "mlx", (WEIGHTLESS,)),
        "[a norm without weight](#what-weightless-would-need)",
    ),
]
