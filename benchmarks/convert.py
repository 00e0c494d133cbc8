"""How long does `flashnorm convert` take, beside `cp -r` of the same folder? And how much memory?

* Synthetic checkpoints with the true configs and shapes of Qwen3-8B (16.4 GB in 5 files) and Qwen3-0.6B (1.2 GB, one
  file, tied), random bf16 weights, gains around 1.
* The contenders take turns, `--rounds` times. Before each turn the source's files are dropped from the page cache, or
  with `--warm` read into it, as far as the memory goes.
* Times are of whole processes, interpreter start and imports included; `cp` is timed with and without waiting for the
  disk, which `convert` always does.
* Beside the small one runs the straightforward way: load all, fold, save, with Transformers.

    python benchmarks/convert.py [--shape qwen3-8b|qwen3-0.6b] [--folder DIR] [--rounds N] [--warm]
"""

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

GB = 1e9

# Where the two differ from each other. What they share is in `config_of`.
SHAPES = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "tie_word_embeddings": False,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "tie_word_embeddings": True,
    },
}
MAX_SHARD_BYTES = 4_000_000_000

FLASHNORM = "from flashnorm.cli import main; main()"
LOAD_FOLD_SAVE = """
import sys, torch
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
with torch.no_grad():
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, linears in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            for linear in linears:
                linear.weight.mul_(norm.weight)
            norm.weight.fill_(1)
model.save_pretrained(sys.argv[2])
"""


def config_of(shape: str) -> dict[str, object]:
    """config.json of a Qwen3 model."""
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "attention_bias": False,
        "head_dim": 128,
        "hidden_act": "silu",
        "max_position_embeddings": 40960,
        "model_type": "qwen3",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
        "vocab_size": 151936,
        **SHAPES[shape],
    }


def tensors_of(config: dict[str, object]) -> dict[str, tuple[int, ...]]:
    """Name -> shape, in the order of the model."""
    hidden, inner, heads, kv_heads, dim = (
        int(str(config[key]))
        for key in ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    )
    layer = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (heads * dim, hidden),
        "self_attn.k_proj": (kv_heads * dim, hidden),
        "self_attn.v_proj": (kv_heads * dim, hidden),
        "self_attn.o_proj": (hidden, heads * dim),
        "self_attn.q_norm": (dim,),
        "self_attn.k_norm": (dim,),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    tensors = {"model.embed_tokens.weight": (int(str(config["vocab_size"])), hidden)}
    for index in range(int(str(config["num_hidden_layers"]))):
        tensors |= {f"model.layers.{index}.{name}.weight": shape for name, shape in layer.items()}
    tensors["model.norm.weight"] = (hidden,)
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = (int(str(config["vocab_size"])), hidden)
    return tensors


def make_checkpoint(shape: str, folder: Path) -> None:
    """Write a checkpoint without ever holding it."""
    import torch

    from flashnorm.files.direct_io import DirectWriter, buffers
    from flashnorm.files.header import encode_header

    folder.mkdir(parents=True)
    config = config_of(shape)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, dims in tensors_of(config).items():
        nbytes = 2 * torch.Size(dims).numel()
        if filled + nbytes > MAX_SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = dims
        filled += nbytes
    files = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        files = ["model.safetensors"]
    torch.manual_seed(0)
    # Drawing 16 GB of random numbers would take minutes; weights are stretches of one block from random places.
    limit = 1 << 24
    block = memoryview(bytearray(torch.randn(1 << 24).mul_(0.02).bfloat16().view(torch.uint8).numpy().tobytes()))
    ring = buffers(1, limit)
    for file, tensors in zip(files, shards, strict=True):
        with DirectWriter(folder / file) as writer:

            def put(data: bytes | memoryview, writer: DirectWriter = writer) -> None:
                buffer = next(ring)
                writer.window(len(data), buffer)[:] = data
                writer.write(len(data), buffer)

            sizes = {name: 2 * torch.Size(dims).numel() for name, dims in tensors.items()}
            entries = ((name, "BF16", dims, sizes[name]) for name, dims in tensors.items())
            put(encode_header(entries, {"format": "pt"}))
            for name, nbytes in sizes.items():
                if "norm" in name:
                    gain = 1 + 0.3 * torch.randn(nbytes // 2)
                    put(gain.bfloat16().view(torch.uint8).numpy().tobytes())
                    continue
                for start in range(0, nbytes, limit):
                    first = 2 * int(torch.randint(0, limit // 4, ()))
                    put(block[first : first + min(limit, nbytes - start)])
            writer.finish()
    if len(files) > 1:
        index = {
            "metadata": {
                "total_size": sum(2 * torch.Size(dims).numel() for shard in shards for dims in shard.values())
            },
            "weight_map": {name: file for file, shard in zip(files, shards, strict=True) for name in shard},
        }
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")


@dataclass
class Run:
    """One process: wall time in seconds, peak resident memory in bytes, what it printed."""

    seconds: float
    peak: int
    output: str


def run(*command: str | Path) -> Run:
    """Run a command and measure it. Its output goes to ours only if it fails."""
    started = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.monotonic() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed with status {process.returncode}:\n{output.decode()}")
    return Run(seconds, usage.ru_maxrss * 1024, output.decode())


def drop_from_cache(folder: Path) -> None:
    """Write everything to the disk, and forget what was read of these files."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_into_cache(folder: Path) -> None:
    """Write everything to the disk, and read these files."""
    os.sync()
    for path in folder.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def machine() -> str:
    """What this ran on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GB
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "safetensors"))
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory:.0f} GB memory, {platform.system()} {platform.release()}, "
        f"Python {platform.python_version()}, {packages}"
    )


def compare(shape: str, work: Path, rounds: int, warm: bool) -> None:
    """Make a checkpoint, let the contenders take turns, print the table."""
    source, copy, out = work / shape, work / f"{shape}-copy", work / f"{shape}-flashnorm"
    for folder in (source, copy, out):
        shutil.rmtree(folder, ignore_errors=True)
    run(sys.executable, __file__, "--shape", shape, "--folder", work, "--make")
    nbytes = size_of(source)
    python = (sys.executable, "-c")
    baseline = run(*python, "import torch").peak
    results: dict[str, list[Run]] = {}

    def turn(name: str, *command: str | Path) -> Run:
        read_into_cache(source) if warm else drop_from_cache(source)
        results.setdefault(name, []).append(run(*command))
        return results[name][-1]

    def copy_folder() -> None:
        turn("cp -r", "cp", "-r", source, copy)
        shutil.rmtree(copy)

    def copy_and_wait() -> None:
        turn("cp -r && sync", "sh", "-c", f"cp -r '{source}' '{copy}' && sync")
        shutil.rmtree(copy)

    def convert_and_verify() -> None:
        whole = turn("flashnorm convert", *python, FLASHNORM, "convert", source, out, "--json")
        inner = dataclasses.replace(whole, seconds=json.loads(whole.output)["seconds"])
        results.setdefault("flashnorm convert, without start and plan", []).append(inner)
        turn("flashnorm verify --weights-only", *python, FLASHNORM, "verify", source, out, "--weights-only")
        shutil.rmtree(out)

    def load_fold_save() -> None:
        turn("load, fold, save with Transformers", *python, LOAD_FOLD_SAVE, source, out)
        shutil.rmtree(out)

    contenders = [copy_folder, copy_and_wait, convert_and_verify]
    if shape == "qwen3-0.6b":
        contenders.append(load_fold_save)
    for turns in range(rounds):
        # Who comes first finds the disk's own caches as the others left them, so each does in turn.
        first = turns % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            contender()
    shutil.rmtree(source)

    reference = statistics.median(each.seconds for each in results["cp -r"])
    cached = ", the source in the page cache" if warm else ""
    print(f"\n{shape}: {nbytes / GB:.2f} GB, {rounds} rounds{cached}, median (slowest) seconds\n")
    print("| | seconds | ratio to `cp -r` | GB/s | peak memory over `import torch` |")
    print("|---|---|---|---|---|")
    for name, runs in results.items():
        seconds = statistics.median(each.seconds for each in runs)
        over = max(each.peak for each in runs) - baseline
        memory = f"{over / 1e6:.0f} MB" if name[:2] != "cp" else ""
        slowest = max(each.seconds for each in runs)
        print(
            f"| {name} | {seconds:.1f} ({slowest:.1f}) | {seconds / reference:.2f} | {nbytes / seconds / GB:.2f} "
            f"| {memory} |"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, help="only this one")
    parser.add_argument("--folder", type=Path, default=Path("benchmark-data"), help="where to work")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--warm", action="store_true", help="the page cache has the source")
    parser.add_argument("--make", action="store_true", help="only write the checkpoint, and leave it there")
    args = parser.parse_args()
    # Made in a process of its own: a child's peak memory includes its parent's at the fork.
    if args.make:
        make_checkpoint(args.shape, args.folder / args.shape)
        return
    args.folder.mkdir(parents=True, exist_ok=True)
    print(machine())
    for shape in [args.shape] if args.shape else SHAPES:
        compare(shape, args.folder, args.rounds, args.warm)


if __name__ == "__main__":
    main()
