"""Draws what `generate.py --json` measured: bars with ranges, and the limits as lines.

python benchmarks/plot.py RESULT.json ... PICTURE.svg
"""

import json
import statistics
import sys
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib import pyplot

matplotlib.rcParams["svg.hashsalt"] = "flashnorm"  # the same picture for the same numbers


def draw(axes: Any, result: dict[str, Any], kind: str) -> None:
    """One panel."""
    found = [one for one in result["contenders"] if one[kind]][::-1]
    for at, one in enumerate(found):
        middle = statistics.median(one[kind])
        spread = [[middle - min(one[kind])], [max(one[kind]) - middle]]
        ours = "flashnorm" in one["name"] or "fused" in one["name"]
        axes.barh(at, middle, xerr=spread, color="#2a7f9e" if ours else "#b0b0b0", ecolor="#404040", capsize=3)
    limit = result[f"{kind}_limit"]
    axes.axvline(limit, color="#c05030", linestyle="--", label=f"limit in the same run: {limit:.0f}")
    axes.set_yticks(range(len(found)), [one["name"] for one in found])
    axes.set_xlabel("tokens a second")
    axes.set_title(f"{kind}, {result['model']}, {result['dtype']}")
    axes.legend(loc="upper right", fontsize="small")


def main() -> None:
    """Read and draw."""
    *sources, target = map(Path, sys.argv[1:])
    results = [json.loads(source.read_text()) for source in sources]
    figure, axes = pyplot.subplots(len(results), 2, figsize=(13, 3.6 * len(results)), squeeze=False)
    for row, result in zip(axes, results, strict=True):
        for panel, kind in zip(row, ("decode", "prefill"), strict=True):
            draw(panel, result, kind)
    figure.tight_layout()
    figure.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    main()
