"""Damages the files that describe a checkpoint, guided by coverage: what reaches new code is damaged further.

The rules are those of `fuzz.py reader`: a checkpoint, or `InputError`. It needs atheris (`pip install atheris`), whose
libFuzzer takes the options: `python tests/reliability/guided.py -runs=300000 -seed=1` (with `PYTHONPATH=tests`), and
prints the number of runs.
"""

import sys
import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["flashnorm.files", "flashnorm.plan", "flashnorm.verify.manifest"]):
    from flashnorm.convert.whole import convert_checkpoint
    from flashnorm.errors import InputError
    from flashnorm.files.reader import Checkpoint
    from flashnorm.format import listed_norms
    from flashnorm.verify.manifest import read_manifest
    from handmade import content, make

NAMES = ("config.json", "model.safetensors.index.json", "flashnorm.json", "model-00001-of-00003.safetensors")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        source, target, seeds = make(Path(folder) / "source", shards=3), Path(folder) / "out", Path(folder) / "seeds"
        convert_checkpoint(source.planned(), target)
        files = content(target)
        seeds.mkdir()
        for number, name in enumerate(NAMES):
            (seeds / name).write_bytes(bytes([number]) + files[name])

        def attack(data: bytes) -> None:
            name = NAMES[data[0] % len(NAMES)] if data else NAMES[0]
            path = target / name
            path.write_bytes(data[1:])
            try:
                checkpoint = Checkpoint.open(target)
                for tensor in checkpoint.tensors:
                    checkpoint.read_bytes(tensor)
                listed_norms(checkpoint.config, target)
                read_manifest(target)
            except InputError:
                pass
            finally:
                path.write_bytes(files[name])

        options = ["-max_len=8192", "-timeout=20", "-rss_limit_mb=4096", "-verbosity=0", "-print_final_stats=1"]
        atheris.Setup([sys.argv[0], *options, *sys.argv[1:], str(seeds)], attack)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
