"""What is compared: runtimes, the ways to hand them a folder, and the environment of each."""

from dataclasses import dataclass

from peers.environments import Environment

KEEP, WEIGHTLESS = "--keep-norms", "weightless"

ENVIRONMENTS = {
    "torch": Environment(
        (
            *("torch==2.13.0", "transformers==5.24.0", "accelerate==1.15.0", "psutil", "typer", "rich"),
            *("onnx==1.23.2", "onnxscript==0.7.2", "onnxruntime==1.32.0"),
        )
    ),
    "llama_cpp": Environment(
        ("llama-cpp-python==0.3.36", "gguf==0.19.0", "torch==2.13.0", "transformers==5.24.0", "sentencepiece"),
        # There is no wheel. Built here, for this very processor: from the cache it could be another's.
        options=("--no-binary=llama-cpp-python", "--no-cache-dir"),
        variables={"CMAKE_ARGS": "-DGGML_NATIVE=ON -DGGML_OPENMP=ON", "CMAKE_BUILD_PARALLEL_LEVEL": "2"},
    ),
    "mlx": Environment(("mlx[cpu]==0.32.4", "mlx-lm==0.32.2")),
    "openvino": Environment(
        (
            *("openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0", "optimum-intel==2.2.0"),
            *("transformers==5.5.4", "torch==2.13.0", "accelerate", "psutil", "typer", "rich"),
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
    """

    name: str
    module: str
    variant: str
    environment: str
    forms: tuple[str, ...]


WAYS = [
    Way("Transformers", "in_transformers", "from_pretrained", "torch", (KEEP, WEIGHTLESS)),
    Way("Transformers, on the disk", "in_transformers", "from_pretrained, on the disk", "torch", (KEEP, WEIGHTLESS)),
    Way("flashnorm.load", "in_transformers", "flashnorm.load", "torch", (KEEP, WEIGHTLESS)),
    Way("flashnorm.load, on the disk", "in_transformers", "flashnorm.load, on the disk", "torch", (WEIGHTLESS,)),
    Way("Transformers' Trainer", "in_transformers", "Trainer", "torch", (KEEP, WEIGHTLESS)),
    Way("torch.export of flashnorm.load", "in_torch", "torch.export", "torch", (WEIGHTLESS,)),
    Way("torch.compile of flashnorm.load", "in_torch", "torch.compile", "torch", (WEIGHTLESS,)),
    Way("ONNX Runtime, of flashnorm.load", "in_torch", "ONNX Runtime", "torch", (WEIGHTLESS,)),
    Way("OpenVINO", "openvino", "folder", "openvino", (KEEP, WEIGHTLESS)),
    Way("OpenVINO, of flashnorm.load", "openvino", "flashnorm.load", "openvino", (WEIGHTLESS,)),
    Way("llama.cpp", "llama_cpp", "", "llama_cpp", (KEEP, WEIGHTLESS)),
    Way("MLX", "in_mlx", "", "mlx", (KEEP, WEIGHTLESS)),
]
