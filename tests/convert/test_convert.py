"""What `convert` writes is what it should be, bit for bit."""

import hashlib
import json
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from conversion import assert_folded, run, same_bits, tensors_of
from flashnorm.arithmetic import fold_weight
from flashnorm.convert import shards as shard
from flashnorm.convert.whole import convert
from flashnorm.errors import InputError
from flashnorm.files import direct_io
from flashnorm.plan import FoldPlan
from flashnorm.planning.tensors import GainUse, TensorFold
from handmade import CHANNELS, Handmade, content, make, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


class TestOutput:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("piece_bytes", [48, 1 << 23])
    def test_streamed_is_the_fold_of_whole_tensors(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, shards: int, piece_bytes: int
    ):
        monkeypatch.setattr(shard, "PIECE_BYTES", piece_bytes)
        source = make(tmp_path / "source", dtype=dtype, shards=shards)
        result = run(source, tmp_path / "out")
        assert_folded(tmp_path / "out", source, absent=set(source.names.norms))
        assert (result.norms, result.linears, result.shards) == (2, 4, shards)
        assert result.tensors == len(source.tensors) - 2
        assert result.bytes_written == sum(map(len, content(tmp_path / "out").values()))
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    def test_is_the_same_without_direct_io(self, tmp_path: Path, source: Handmade, monkeypatch: pytest.MonkeyPatch):
        run(source, tmp_path / "direct")
        monkeypatch.setattr(direct_io, "_DIRECT", 0)
        run(source, tmp_path / "cached")
        assert content(tmp_path / "direct") == content(tmp_path / "cached")

    def test_keeps_names_order_and_metadata(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "out")
        before, after = source.open(), replace(source, folder=tmp_path / "out").open()
        assert list(after.headers) == list(before.headers)
        for file, header in after.headers.items():
            kept = [name for name in before.headers[file].tensors if name not in source.names.norms]
            assert list(header.tensors) == kept
            assert header.metadata == before.headers[file].metadata
            with safe_open(tmp_path / "out" / file, "pt") as opened:
                assert set(opened.keys()) == set(kept)

    def test_keeps_norms_at_their_identity(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "out", keep_norms=True)
        assert_folded(tmp_path / "out", source, absent=set())
        written = tensors_of(tmp_path / "out")
        assert same_bits(written["layer.norm.weight"], torch.ones(CHANNELS, dtype=torch.bfloat16))
        assert same_bits(written["layer.offset_norm.weight"], torch.zeros(CHANNELS // 2, dtype=torch.bfloat16))

    @pytest.mark.parametrize("shards", [1, 3])
    @pytest.mark.parametrize("present", [False, True], ids=["absent", "stored though tied"])
    def test_unties_a_head(self, tmp_path: Path, shards: int, present: bool):
        source = make(tmp_path / "source", shards=shards, untie=True)
        if present:
            write(source.folder, source.tensors | {"head.weight": torch.zeros(40, CHANNELS)}, shards)
        run(source, tmp_path / "out")
        assert_folded(tmp_path / "out", source, absent=set(source.names.norms))
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        assert config["tie_word_embeddings"] is False
        assert "tie_word_embeddings" not in config["text_config"]
        first = next(iter(replace(source, folder=tmp_path / "out").open().headers.values()))
        assert list(first.tensors).index("head.weight") == list(first.tensors).index("embed.weight") + 1

    def test_a_shard_may_become_empty(self, tmp_path: Path):
        source = make(tmp_path / "source")
        norm = "layer.norm.weight"
        write(source.folder, {norm: source.tensors[norm], "x.weight": torch.ones(3, CHANNELS).bfloat16()}, shards=2)
        (source.folder / "model.safetensors").unlink()
        source.names = replace(
            source.names, norms={norm: 1.0}, folds={"x.weight": TensorFold(1, (GainUse(norm, 0.0),))}
        )
        run(source, tmp_path / "out")
        assert load_file(tmp_path / "out" / "model-00001-of-00002.safetensors") == {}

    def test_config_gains_keys_and_loses_none(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "out")
        before = (source.folder / "config.json").read_text()
        after = (tmp_path / "out" / "config.json").read_text()
        assert after.startswith(before.removesuffix("\n}\n") + ",\n")
        assert list(json.loads(after)) == [*json.loads(before), "flash_norm", "flashnorm_folded", "flashnorm"]
        weightless = ["layer.norm.weight", "layer.offset_norm.weight"]
        assert json.loads(after)["flashnorm"] == {"version": 1, "weightless": weightless}

    def test_the_index_is_that_of_the_output(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "out")
        written = tensors_of(tmp_path / "out")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(written)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in written.values())

    def test_copies_what_belongs_to_the_model(self, tmp_path: Path, source: Handmade):
        copied = [
            *("tokenizer.json", "LICENSE", ".gitattributes", "chat_template.jinja", "modeling_x.py", "assets/plot.PNG"),
            *("1_Pooling/config.json", "2_Dense/model.safetensors", "my_module/words.txt", "README.zh.md"),
        ]
        other_weights = ["pytorch_model.bin", "a.gguf", "consolidated.safetensors", "original/", "onnx/"]
        training = ["checkpoint-500/", "runs/", "wandb/", "optimizer.pt", "trainer_state.json", "training_args.bin"]
        private = [".env", "id_rsa", "notes.txt", "adapter_config.json", "assets/data.csv"]
        left_out = [*other_weights, *training, *private]
        modules = [{"idx": 0, "path": ""}, {"idx": 1, "path": "my_module"}, {"idx": 2, "path": "../outside"}, 3]
        (source.folder / "modules.json").write_text(json.dumps(modules))
        dropped = [name + "model.safetensors" * name.endswith("/") for name in left_out]
        for name in [*copied, *dropped, ".git/HEAD", ".cache/huggingface/x"]:
            path = source.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (source.folder / "vocab.json").symlink_to("tokenizer.json")
        assert run(source, tmp_path / "out").left_out == tuple(sorted(left_out))
        made = {"README.md", "config.json", "flashnorm.json", "model.safetensors.index.json"}
        out = content(tmp_path / "out")
        assert set(out) == {*copied, "modules.json", "vocab.json", *made, *source.open().headers}
        assert json.loads(out["flashnorm.json"])["source"]["left_out"] == sorted(left_out)
        assert all(out[name] == name.encode() for name in copied)
        assert out["vocab.json"] == b"tokenizer.json"
        assert not (tmp_path / "out" / "vocab.json").is_symlink()

    def test_the_manifest_knows_every_file(self, tmp_path: Path, source: Handmade):
        (source.folder / "tokenizer.json").write_text("{}")
        (source.folder / "README.md").write_text("# A model\n")
        run(source, tmp_path / "out", source_id="org/name", revision="abc")
        manifest = json.loads((tmp_path / "out" / "flashnorm.json").read_text())
        out = content(tmp_path / "out")
        assert set(manifest["files"]) == set(out) - {"flashnorm.json"}
        for described, files in ((manifest["files"], out), (manifest["source"]["files"], content(source.folder))):
            for name, record in described.items():
                assert record == {"sha256": hashlib.sha256(files[name]).hexdigest(), "size": len(files[name])}
        assert set(manifest["source"]["files"]) == set(content(source.folder))
        assert (manifest["source"]["id"], manifest["source"]["revision"]) == ("org/name", "abc")
        assert manifest["options"] == {"keep_norms": False, "untie": False}
        kept = {name: replace(why, kind=None) for name, why in source.plan.kept.items()}
        assert FoldPlan.from_dict(manifest["plan"]) == replace(source.plan, kept=kept)

    def test_reports_progress_up_to_the_end(self, tmp_path: Path, source: Handmade):
        calls: list[tuple[int, int]] = []
        run(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
        shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert calls == sorted(calls)
        assert calls[-1] == (shards, shards)


def test_folds_on_one_thread_and_changes_no_other_thread(
    tmp_path: Path, source: Handmade, monkeypatch: pytest.MonkeyPatch
):
    folding: list[int] = []
    meanwhile: list[tuple[int, ...]] = []

    def fold(*args, **kwargs):
        folding.append(torch.get_num_threads())
        with ThreadPoolExecutor(1) as new:
            found = (thread.submit(torch.get_num_threads) for thread in (older, new))
            meanwhile.append(tuple(number.result() for number in found))
        return fold_weight(*args, **kwargs)

    monkeypatch.setattr(shard, "fold_weight", fold)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with ThreadPoolExecutor(1) as older:
            older.submit(torch.get_num_threads).result()
            run(source, tmp_path / "out", progress=lambda *_: meanwhile.append((torch.get_num_threads(),) * 2))
    finally:
        torch.set_num_threads(before)
    assert set(folding) == {1}
    assert set(meanwhile) == {(3, 3)}


def test_convert_traces_and_folds_a_model(tmp_path: Path):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "vocab_size": 50}
    config = LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True)
    model = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(-2, 2)
    model.save_pretrained(tmp_path / "source")
    ids = torch.arange(10).view(1, 10)
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "source", dtype=torch.float64)(ids).logits
    for untie, keep_norms, norms in ((False, False, 4), (True, False, 5), (True, True, 5)):
        out = tmp_path / f"out-{untie}-{keep_norms}"
        result = convert(tmp_path / "source", out, untie=untie, keep_norms=keep_norms)
        assert result.norms == norms
        logits = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float64)(ids).logits
        torch.testing.assert_close(logits, expected, rtol=1e-12, atol=1e-12)


def test_force_replaces_a_model(tmp_path: Path, source: Handmade):
    run(source, tmp_path / "out", keep_norms=True)
    run(source, tmp_path / "out", force=True)
    run(source, tmp_path / "undisturbed")
    assert content(tmp_path / "out") == content(tmp_path / "undisturbed")


@pytest.mark.parametrize("name", ["extra", "README.md", ".git/HEAD"])
def test_force_deletes_nothing_that_was_not_written(tmp_path: Path, source: Handmade, name: str):
    """A file of the user's in a conversion of ours, one of ours that the user has changed, and a repository."""
    run(source, tmp_path / "out")
    (tmp_path / "out" / name).parent.mkdir(exist_ok=True)
    (tmp_path / "out" / name).write_text("mine")
    before = content(tmp_path / "out")
    with pytest.raises(InputError, match=re.escape(name.replace("HEAD", ""))):
        run(source, tmp_path / "out", force=True)
    assert content(tmp_path / "out") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
