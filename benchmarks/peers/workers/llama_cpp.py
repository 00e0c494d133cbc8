"""llama.cpp, through the C functions that `llama-cpp-python` binds."""

import ctypes
from importlib.metadata import version
from pathlib import Path

import llama_cpp as lib

from . import gguf_file

CONTEXT = 1024  # tokens that the cache holds


class Model:
    """A model and its context."""

    def __init__(self, file: Path, cache: int, threads: int):
        model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError("llama.cpp does not load the file; see its log")
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = CONTEXT
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = cache
        context = lib.llama_init_from_model(model, parameters)
        if not context:
            raise RuntimeError("llama.cpp makes no context; see its log")
        self.context = context
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        self.greedy = lib.llama_sampler_init_greedy()

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy; the cache is emptied first."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        generated = []
        while True:
            array = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
            if status := lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids))):
                raise RuntimeError(f"llama_decode returned {status}")
            generated.append(lib.llama_sampler_sample(self.greedy, self.context, -1))
            if len(generated) == tokens:
                return generated
            ids = generated[-1:]


def load(folder: Path, dtype: str, threads: int, scratch: Path) -> Model:
    """The cache is in llama.cpp's default, float16, for 16-bit weights, and in float32 for float32 ones."""
    file = gguf_file.convert(folder, dtype, scratch / "model.gguf")
    lib.llama_backend_init()
    return Model(file, lib.GGML_TYPE_F32 if dtype == "float32" else lib.GGML_TYPE_F16, threads)
