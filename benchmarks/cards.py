"""Model cards as `flashnorm convert --verify` writes them, of the two real models; writes docs/cards.md.

python benchmarks/cards.py [--folder DIR]
"""

import argparse
import sys
import tempfile
from pathlib import Path

import flashnorm

sys.path.append(str(Path(__file__).parents[1] / "examples"))
import gemma3
import smollm2

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "cards.md"
HEAD = """\
# Model cards

`flashnorm convert MODEL OUT --verify --push-to-hub OWNER/NAME` publishes a model in one command. These are the cards
that it writes: a section at the end of the source's card, and `tags` and `base_model` in its front matter. The sources
here have no card, and no hub id, as they come out of packages. `python benchmarks/cards.py` writes this page.
"""
MODELS = [
    ("SmolLM2-135M, weightless", smollm2.build, "smollm2-135m", False),
    ("Gemma 3 270M, with `--keep-norms`", gemma3.build, "gemma3-270m", True),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "build", help="where the models are, or are made")
    home = parser.parse_args().folder
    parts = [HEAD]
    for title, build, name, keep_norms in MODELS:
        source = build(home / name)
        with tempfile.TemporaryDirectory(dir=home) as scratch:
            flashnorm.convert(source, Path(scratch) / "out", keep_norms=keep_norms, verify=True)
            card = (Path(scratch) / "out" / "README.md").read_text()
        # Four backticks, as a card has blocks of three.
        parts.append(f"## {title}\n\n````markdown\n{card.rstrip()}\n````\n")
        print(f"{title}: {len(card.splitlines())} lines", flush=True)
    PAGE.write_text("\n".join(parts))


if __name__ == "__main__":
    main()
