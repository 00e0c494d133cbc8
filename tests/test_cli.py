"""The command line, as a user runs it: output, exit status, and errors without a traceback."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tiny
from flashnorm import cli
from flashnorm.plan import FoldPlan
from forked import Commands, assert_refused, forked_commands


@pytest.fixture(scope="module")
def run() -> Iterator[Commands]:
    with forked_commands({"HF_HUB_OFFLINE": "1"}) as commands:
        yield commands


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("cli") / "source", tiny.model(tiny.config("qwen3"), torch.bfloat16))


@pytest.fixture(scope="module")
def converted(run: Commands, source: Path) -> Path:
    result = run("convert", source, source.parent / "converted")
    assert (result.returncode, result.stderr) == (0, "")
    assert "5 norms folded into 11 tensors" in result.stdout
    return source.parent / "converted"


@pytest.mark.slow
def test_plan_needs_the_config_only(run: Commands, source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    table = run("plan", tmp_path)
    assert (table.returncode, table.stderr) == (0, "")
    assert "[aten.add at model.layers.*.self_attn (modeling_qwen3.py:" in " ".join(
        table.stdout.replace("│", "").split()
    )
    assert table.stdout.strip().endswith("qwen3: 9 norms, 5 folded into 11 linears, 4 kept")
    assert "--untie" not in table.stdout
    plan = FoldPlan.from_json(run("plan", tmp_path, "--json").stdout)
    assert (len(plan.folds), len(plan.kept)) == (5, 4)


@pytest.mark.slow
def test_plan_says_which_divisions_cancel(run: Commands, source: Path, tmp_path: Path) -> None:
    table = run("plan", source, "--cancel")
    assert (table.returncode, table.stderr) == (0, "")
    words = " ".join(table.stdout.replace("│", "").split())
    assert "self_attn.q_proj.weight: cancels in model.layers.*.self_attn.q_norm (eps * r^2)" in words
    assert table.stdout.strip().endswith("qwen3: 9 divisions of norms, 0 cancel, 2 cancel in part")
    found = json.loads(run("plan", source, "--cancel", "--json").stdout)
    assert (found["version"], found["model_type"]) == (1, "qwen3")
    first = found["divisions"][0]
    assert (first["norm"], first["verdict"]) == ("model.layers.0.input_layernorm", "cancels in part")
    queries = {"weight": "model.layers.0.self_attn.q_proj.weight", "escapes": []}
    ending = {"norm": "model.layers.0.self_attn.q_norm", "power": 2.0, "dims": [0, 1]}
    assert first["readers"][0] == queries | {"endings": [ending]}
    (why,) = first["readers"][2]["escapes"]
    assert (why["operator"], why["kind"]) == ("aten.bmm", "stopped")
    assert_refused(run("plan", source, "--cancel", "--keep", "final"), "without --keep")
    (tmp_path / "config.json").write_text(tiny.config("llama").to_json_string())
    assert run("plan", tmp_path, "--cancel").stdout.strip().endswith("divisions of norms, none of which cancels")


@pytest.mark.slow
def test_plan_says_which_means_can_be_zero(run: Commands, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(tiny.config("gpt2").to_json_string())
    tied = run("plan", tmp_path, "--center")
    assert (tied.returncode, tied.stderr) == (0, "")
    assert "tied: lm_head.weight is transformer.wte.weight" in " ".join(tied.stdout.replace("│", "").split())
    assert tied.stdout.strip().endswith("gpt2: 5 norms subtract a mean, 0 of which can become RMSNorms")
    untied = run("plan", tmp_path, "--center", "--cancel", "--untie").stdout
    assert "gpt2: 5 divisions of norms, none of which cancels" in untied
    assert untied.strip().endswith("5 of which can become RMSNorms")
    first = json.loads(run("plan", tmp_path, "--center", "--untie", "--json").stdout)["centrings"][0]
    assert (first["norm"], first["removable"], first["escapes"]) == ("transformer.h.0.ln_1", True, [])
    assert {"name": "transformer.wte.weight", "axis": 1} in first["writers"]


@pytest.mark.slow
def test_plan_says_that_a_quantisation_is_declared(run: Commands, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "The config declares quantization_config, but only the weights tell" in run("plan", tmp_path).stdout
    assert len(FoldPlan.from_json(run("plan", tmp_path, "--json").stdout).folds) == 5


@pytest.mark.slow
def test_a_tied_head_gets_a_hint(run: Commands, source: Path, tmp_path: Path) -> None:
    config = json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "kept: tied: lm_head.weight is model.embed_tokens.weight" in run("plan", tmp_path).stdout
    assert "--untie" in run("plan", tmp_path).stdout
    assert run("plan", tmp_path, "--untie").stdout.strip().endswith("5 folded into 11 linears, 4 kept")


@pytest.mark.slow
def test_verify_equal_and_different(run: Commands, source: Path, converted: Path) -> None:
    same = run("verify", source, converted, "--json")
    assert (same.returncode, same.stderr) == (0, "")
    assert json.loads(same.stdout)["ok"] is True
    file = converted / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    try:
        file.write_bytes(data)
        different = run("verify", source, converted, "--weights-only")
        assert different.returncode == 1
        assert "tensor model." in different.stdout  # and which one
        assert "NOT the same model" in different.stdout
    finally:
        data[-1] ^= 1
        file.write_bytes(data)


@pytest.mark.slow
def test_verify_writes_a_page(run: Commands, source: Path, converted: Path, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    both = run("verify", source, converted, "--weights-only", "--json", "--html", page)
    assert (both.returncode, both.stderr) == (0, "")
    assert json.loads(both.stdout)["verdict"] in page.read_text()
    alone = run("verify", converted, "--weights-only", "--html", page)
    assert (alone.returncode, alone.stderr) == (0, "")
    assert "What cannot be known without the source" in page.read_text()
    assert_refused(run("verify", source, converted, "--html", tmp_path / "nowhere" / "x.html"), "no such folder")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


@pytest.mark.slow
def test_a_page_needs_an_extra(run: Commands, source: Path, converted: Path, tmp_path: Path) -> None:
    (tmp_path / "matplotlib.py").write_text("raise ImportError('not here', name='matplotlib')")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "-m", "flashnorm", "verify", source, converted, "--html", tmp_path / "report.html"]
    assert_refused(
        subprocess.run(command, capture_output=True, text=True, env=environment, check=False),
        "pip install 'flashnorm[report]'",
    )


@pytest.mark.slow
def test_verify_a_converted_folder_alone(run: Commands, source: Path, converted: Path, tmp_path: Path) -> None:
    whole = run("verify", converted, "--weights-only")
    assert (whole.returncode, whole.stderr) == (0, "")
    assert "not known without the source" in whole.stdout
    damaged = shutil.copytree(converted, tmp_path / "damaged")
    (damaged / "config.json").write_bytes((converted / "config.json").read_bytes() + b"\n")
    different = run("verify", damaged, "--weights-only", "--json")
    assert (different.returncode, different.stderr) == (1, "")
    (finding,) = json.loads(different.stdout)["findings"]
    assert (finding["name"], finding["problem"]) == ("config.json", "has another size than flashnorm.json says")
    assert_refused(run("verify", source, "--weights-only"), "expected flashnorm.json")
    assert_refused(run("verify", converted), "--weights-only")


@pytest.mark.slow
def test_progress_as_json_lines(run: Commands, source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "out", "--json-progress")
    assert result.returncode == 0
    lines = [json.loads(line) for line in result.stderr.splitlines()]
    assert lines[0] == {"stage": "converting"}
    assert lines[-1]["bytes"] == lines[-1]["total"] == (tmp_path / "out" / "model.safetensors").stat().st_size
    checked = run("verify", source, tmp_path / "out", "--weights-only", "--json", "--json-progress")
    assert checked.returncode == 0
    assert json.loads(checked.stdout)["ok"] is True
    assert json.loads(checked.stderr.splitlines()[0]) == {"stage": "comparing weights"}


@pytest.mark.slow
def test_convert_says_what_it_did_as_json(run: Commands, source: Path, tmp_path: Path) -> None:
    result = run("convert", source, tmp_path / "out", "--keep-norms", "--json")
    assert json.loads(result.stdout)["norms"] == 5
    assert_refused(run("convert", source, tmp_path / "out"), "--force")
    assert run("convert", source, tmp_path / "out", "--force").returncode == 0


def test_a_signal_after_the_end_is_not_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would raise while Python ends, and be printed from wherever that is."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(sys, "argv", ["flashnorm", "--version"])
    with pytest.raises(SystemExit):
        cli.main()
    assert signal.getsignal(signal.SIGTERM) == before


def test_an_interrupt_is_not_a_traceback(source: Path, tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-m", "flashnorm", "convert", source, tmp_path / "out"], stderr=subprocess.PIPE, text=True
    ) as process:
        process.terminate()
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()
    assert process.returncode in (-15, 128 + 15)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_unusable_input(run: Commands, source: Path, converted: Path, tmp_path: Path) -> None:
    assert_refused(run("plan", tmp_path / "nowhere"), "found nothing there")
    assert_refused(run("plan", tmp_path), "no config.json")
    assert_refused(run("convert", converted, tmp_path / "again"), "converted already")
    assert_refused(run("verify", source, tmp_path), str(tmp_path))
    assert_refused(run("generate", source, "Hello"), "flashnorm convert")
    assert_refused(run("generate", converted, "Hello"), "tokenizer")


def test_usage_errors_exit_with_2(run: Commands) -> None:
    assert run("convert", "one").returncode == 2
    assert run("plan", "x", "--no-such-option").returncode == 2


def test_version_and_help(run: Commands) -> None:
    assert run("--version").stdout.startswith("flashnorm ")
    helped = run("convert", "--help")
    assert helped.returncode == 0
    assert "--keep-norms" in helped.stdout


@pytest.mark.slow
def test_an_adapter_is_converted_and_verified(run: Commands, source: Path, converted: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"
    adapter.mkdir()
    generator = torch.Generator().manual_seed(0)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_{}.weight"
    shapes = {"A": (4, 64), "B": (64, 4)}
    tensors = {name.format(half): torch.randn(shape, generator=generator) for half, shape in shapes.items()}
    save_file(tensors, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": ["q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    result = run("adapter", adapter, source, out, "--folded", converted)
    assert (result.returncode, result.stderr) == (0, "")
    assert "1 tensors have taken a gain, 1 stay as they are" in result.stdout
    assert_refused(run("adapter", adapter, source, out), "expected nothing there yet")
    facts = json.loads(run("adapter", adapter, source, out, "--force", "--json", "--dtype", "float64").stdout)
    base = f"{source}#flashnorm-{facts['plan_hash'][:12]}"
    assert (facts["kind"], facts["scaled"], facts["base"]) == ("LORA", 1, base)
    verified = run("verify", source, converted, "--weights-only", "--adapter", adapter, out)
    assert verified.returncode == 0
    assert "1 tensors are the correctly rounded product, 1 are unchanged" in verified.stdout
    wrong = run("verify", source, converted, "--weights-only", "--json", "--adapter", adapter, adapter)
    assert (wrong.returncode, json.loads(wrong.stdout)["ok"]) == (1, False)
    assert_refused(run("verify", source, "--adapter", adapter, out), "expected MODEL and OUT with --adapter")
    assert_refused(run("adapter", source, source, tmp_path / "new"), "expected an adapter's folder")
