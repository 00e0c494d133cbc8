"""llama.cpp, on what its own converter writes.

The converter is not in the wheel of `llama-cpp-python` but in its source package. It identifies tokenizers by a hash,
which those of the models here do not have, as they were made anew from GGUF files. So the file has no tokenizer, and
token ids go in.
"""

import ctypes
import importlib.util
import logging
import re
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

CONTEXT = 1024  # tokens that the cache holds
SOURCES = Path(sys.prefix) / "llama.cpp"
NEEDED = ("conversion/", "gguf-py/", "convert_hf_to_gguf", "src/", "include/", "ggml/include/")
# The lines of a model's file that require the norms before attention, MLP and head, and what makes them optional:
# llama.cpp already builds a norm without a product where there is no weight.
MODELS = ("llama", "qwen3", "qwen3moe", "gemma3")
REQUIRED = re.compile(r"(LLM_TENSOR_(?:ATTN|FFN|OUTPUT)_NORM, +\"weight\"(?:, i)?\), \{n_embd\}), 0\)")
OPTIONAL = r"\1, TENSOR_NOT_REQUIRED)"

lib: Any = None  # llama_cpp: `load` imports it, after the patch if there is to be one


class Model:
    """A model and its context. The cache is in float32."""

    gains, note = None, ""

    def __init__(self, file: Path):
        self.version = f"llama-cpp-python {version('llama-cpp-python')}"
        said = _messages()
        lib.llama_backend_init()
        model = lib.llama_model_load_from_file(str(file).encode(), lib.llama_model_default_params())
        if not model:
            raise RuntimeError(next((line for line in said if "error loading model" in line), "no model"))
        parameters = lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = CONTEXT
        parameters.type_k = parameters.type_v = lib.GGML_TYPE_F32
        parameters.flash_attn_type = lib.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it rounds to fewer bits on the way
        self.context = lib.llama_init_from_model(model, parameters)
        self.vocabulary = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def logits(self, ids: list[int]) -> np.ndarray:
        """In one batch that asks for the logits of all tokens."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        batch = lib.llama_batch_init(len(ids), 0, 1)
        batch.n_tokens = len(ids)
        for place, token in enumerate(ids):
            batch.token[place], batch.pos[place], batch.logits[place] = token, place, 1
            batch.n_seq_id[place], batch.seq_id[place][0] = 1, 0
        if status := lib.llama_decode(self.context, batch):
            raise RuntimeError(f"llama_decode returned {status}")
        rows = [
            np.ctypeslib.as_array(lib.llama_get_logits_ith(self.context, place), (self.vocabulary,)).copy()
            for place in range(len(ids))
        ]
        lib.llama_batch_free(batch)
        return np.stack(rows)

    def generate(self, ids: list[int], tokens: int) -> list[int]:
        """Greedy, with llama.cpp's sampler."""
        lib.llama_memory_clear(lib.llama_get_memory(self.context), True)
        greedy, generated = lib.llama_sampler_init_greedy(), []
        while len(generated) < tokens:
            array = (ctypes.c_int32 * len(ids))(*ids)  # the batch only points to it
            if status := lib.llama_decode(self.context, lib.llama_batch_get_one(array, len(ids))):
                raise RuntimeError(f"llama_decode returned {status}")
            generated.append(lib.llama_sampler_sample(greedy, self.context, -1))
            ids = generated[-1:]
        return generated


def _messages() -> list[str]:
    """What llama.cpp says from now on, as it says it."""
    said: list[str] = []

    @lib.llama_log_callback
    def listen(level: int, text: bytes, data: object) -> None:
        said.append(text.decode(errors="replace").strip())

    _messages.kept = listen  # type: ignore[attr-defined]  # C holds no reference to it
    lib.llama_log_set(listen, ctypes.c_void_p(0))
    return said


def convert(folder: Path, target: Path) -> Path:
    """A Hugging Face folder -> a GGUF file in float32: `convert_hf_to_gguf.py --outtype f32`, without the tokenizer."""
    _unpack()
    sys.path[:0] = [str(SOURCES / "gguf-py"), str(SOURCES)]
    import torch
    from gguf import LlamaFileType

    from conversion import ModelBase, ModelType, get_model_architecture, get_model_class

    logging.disable()
    architecture = get_model_architecture(ModelBase.load_hparams(folder, False), ModelType.TEXT)
    kind = get_model_class(architecture)

    def no_tokenizer(model: Any) -> None:
        model._set_vocab_none()
        model.gguf_writer.add_vocab_size(model.hparams["vocab_size"])

    kind.set_vocab = no_tokenizer
    with torch.inference_mode():
        kind(folder, LlamaFileType.ALL_F32, target).write()
    return target


def _unpack() -> None:
    """The converter and the headers, out of the source package of the installed version, once."""
    if SOURCES.exists():
        return
    package = f"llama-cpp-python=={version('llama-cpp-python')}"
    download = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--no-binary", "llama-cpp-python"]
    subprocess.run([*download, "-d", sys.prefix, package], check=True, stdout=sys.stderr)
    (archive,) = Path(sys.prefix).glob("llama_cpp_python-*.tar.gz")
    partial = SOURCES.with_suffix(".partial")
    with tarfile.open(archive) as sources:
        for member in sources:
            _, _, inner = member.name.partition("/vendor/llama.cpp/")
            if inner.startswith(NEEDED):
                member.name = inner
                sources.extract(member, partial, filter="data")
    archive.unlink()
    partial.rename(SOURCES)


def quantise(file: Path, kind: str) -> Path:
    """A GGUF file in float32 -> one of a kind, as `llama-quantize` makes it."""
    target = file.with_name(f"{kind}.gguf")
    parameters = lib.llama_model_quantize_default_params()
    parameters.ftype = getattr(lib, f"LLAMA_FTYPE_MOSTLY_{kind}")
    if status := lib.llama_model_quantize(str(file).encode(), str(target).encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama_model_quantize returned {status}")
    return target


def patch() -> None:
    """Load llama.cpp with `MODELS` compiled anew, their norms before attention and MLP being optional.

    The library of these files is loaded first and for all, so that its functions take the place of llama.cpp's own.
    """
    _unpack()
    patched = SOURCES / "weightless.so"
    if not patched.exists():
        files = [SOURCES / "src" / "models" / f"{model}.cpp" for model in MODELS]
        for file in files:
            text, changes = REQUIRED.subn(OPTIONAL, file.read_text())
            assert changes == 3, (file, changes)
            file.with_suffix(".weightless.cpp").write_text(text)
        folder = Path(str(importlib.util.find_spec("llama_cpp").origin)).parent / "lib"  # type: ignore[union-attr]
        include = [f"-I{SOURCES / name}" for name in ("src", "src/models", "include", "ggml/include")]
        link = [f"-L{folder}", f"-Wl,-rpath,{folder}", "-lllama", "-lggml-base"]
        sources = [file.with_suffix(".weightless.cpp") for file in files]
        command = ["c++", "-std=c++17", "-O2", "-DNDEBUG", "-fPIC", "-shared", *include, *sources, *link]
        subprocess.run([*command, "-o", patched], check=True)
    ctypes.CDLL(str(patched), ctypes.RTLD_GLOBAL)


def load(variant: str, folder: Path, form: str, scratch: Path) -> Model:
    """Converted and loaded; `variant` may be "patched", or a kind to which the file is quantised before."""
    global lib
    if variant == "patched":
        patch()
    lib = importlib.import_module("llama_cpp")
    file = convert(folder, scratch / "model.gguf")
    return Model(quantise(file, variant) if variant not in ("", "patched") else file)
