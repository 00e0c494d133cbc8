"""`convert --verify`: what is published was compared with its source, and says so; what differs is not published."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import flashnorm
import tiny
from flashnorm import cli
from flashnorm.files.staging import staging_folder
from flashnorm.planning.planned import plan_checkpoint
from handmade import OLD, content

# `flashnorm.convert` is the function.
CONVERT: Any = importlib.import_module("flashnorm.convert.whole")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose gains are 1 + w."""
    folder = tmp_path_factory.mktemp("verified") / "source"
    tiny.save(folder, tiny.model(tiny.config("gemma"), torch.bfloat16))
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    return folder


@pytest.fixture
def wrong_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    """The conversion, but not the verification, takes every gain for w."""

    def planned(*args: Any, **options: Any) -> Any:
        right = plan_checkpoint(*args, **options)
        folds = {
            name: replace(fold, gains=tuple(replace(use, offset=0.0) for use in fold.gains))
            for name, fold in right.tensors.folds.items()
        }
        return replace(right, tensors=replace(right.tensors, folds=folds))

    monkeypatch.setattr(CONVERT, "plan_checkpoint", planned)


@pytest.mark.slow
def test_the_card_says_what_was_found(source: Path, tmp_path: Path) -> None:
    stages: list[str] = []
    result = flashnorm.convert(source, tmp_path / "out", verify=True, stage=stages.append)
    report = result.report
    assert report is not None
    assert report.ok
    assert stages[0] == "comparing weights"
    assert (report.source, report.converted) == (str(source), str(tmp_path / "out"))
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\ntags:")
    assert "# A model" in card
    assert card.count("## Verified") == 1
    assert f"- Weights, bit for bit: {report.weights.folded} tensors are the exact product" in card
    assert report.outputs is not None
    assert report.outputs.converted is not None
    assert f"| converted, bfloat16 | {report.outputs.converted.kl:.3g} |" in card
    for sentence in report.unchecked:
        assert sentence[1:] in card
    # The manifest has the hash of that card; and nothing else differs from a conversion without.
    assert flashnorm.verify(source, tmp_path / "out", weights_only=True).ok
    assert flashnorm.verify(tmp_path / "out", weights_only=True).ok
    flashnorm.convert(source, tmp_path / "plain")
    verified, plain = content(tmp_path / "out"), content(tmp_path / "plain")
    assert {name for name in verified if verified[name] != plain.get(name)} == {"README.md", "flashnorm.json"}
    assert verified.keys() == plain.keys()


@pytest.mark.slow
@pytest.mark.usefixtures("wrong_plan")
@pytest.mark.parametrize("old", [False, True])
def test_what_differs_is_not_published(source: Path, tmp_path: Path, old: bool) -> None:
    if old:
        (tmp_path / "out").mkdir()
        for name, data in OLD.items():
            (tmp_path / "out" / name).write_bytes(data)
    before = content(tmp_path / "out") if old else None
    with pytest.raises(flashnorm.DifferenceError, match="is NOT the same model as") as caught:
        flashnorm.convert(source, tmp_path / "out", verify=True, force=old)
    report = caught.value.report
    assert report.weights.problems >= report.weights.norms > 0
    assert report.outputs is not None
    assert not report.outputs.ok
    assert (content(tmp_path / "out") if old else None) == before
    assert [path.name for path in tmp_path.iterdir()] == (["out"] if old else [])


@pytest.mark.slow
@pytest.mark.usefixtures("wrong_plan")
def test_exit_status_of_a_difference(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["flashnorm", "convert", str(source), str(tmp_path / "out"), "--verify"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 1
    written = capsys.readouterr()
    assert "is NOT the same model as" in written.out
    assert written.err == ""


@pytest.mark.slow
def test_as_json(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in ([], ["--verify"]):
        target = tmp_path / f"out{len(options)}"
        monkeypatch.setattr(sys, "argv", ["flashnorm", "convert", str(source), str(target), "--json", *options])
        with pytest.raises(SystemExit) as stopped:
            cli.main()
        assert not stopped.value.code
        report = json.loads(capsys.readouterr().out)["report"]
        assert (report and report["ok"]) == (True if options else None)


@pytest.mark.slow
def test_interrupted_while_it_is_verified(source: Path, tmp_path: Path) -> None:
    def stop(words: str) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        flashnorm.convert(source, tmp_path / "out", verify=True, stage=stop)
    assert not (tmp_path / "out").exists()
    assert not list(staging_folder(tmp_path / "out").rglob("config.json"))
    result = flashnorm.convert(source, tmp_path / "out", verify=True)
    assert result.resumed_shards == 1
    assert flashnorm.verify(tmp_path / "out", weights_only=True).ok
