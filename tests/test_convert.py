"""What `convert` writes is what it should be, bit for bit; what it cannot do it refuses; interrupted, it resumes."""

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import tiny
from flashnorm.checkpoint import direct_io, shard
from flashnorm.checkpoint.card import updated_card
from flashnorm.checkpoint.names import GainUse, TensorFold
from flashnorm.checkpoint.shard import axis_gain, fold_slices
from flashnorm.checkpoint.small_files import hub_identity
from flashnorm.convert import ConvertResult, convert, convert_checkpoint
from flashnorm.errors import InputError
from flashnorm.fold import fold_weight
from flashnorm.plan import FoldPlan
from handmade import CHANNELS, Handmade, content, make, write

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@pytest.fixture
def source(tmp_path: Path) -> Handmade:
    return make(tmp_path / "source", shards=3)


def run(source: Handmade, target: Path, **options) -> ConvertResult:
    return convert_checkpoint(source.open(), source.plan, source.names, target, **options)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}


def same_bits(a: Tensor, b: Tensor) -> bool:
    bits = (tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else tensor for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*bits)


def assert_folded(target: Path, source: Handmade, absent: set[str]) -> None:
    written = tensors_of(target)
    assert set(written) == (set(source.tensors) | set(source.names.untied)) - absent
    for name, tensor in written.items():
        if name not in source.names.norms:
            assert same_bits(tensor, source.expected(name)), name


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
        assert list(json.loads(after)) == [*json.loads(before), "flash_norm", "flashnorm"]
        weightless = ["layer.norm.weight", "layer.offset_norm.weight"]
        assert json.loads(after)["flashnorm"] == {"version": 1, "weightless": weightless}

    def test_the_index_is_that_of_the_output(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "out")
        written = tensors_of(tmp_path / "out")
        index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
        assert set(index["weight_map"]) == set(written)
        assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in written.values())
        assert index["metadata"]["total_parameters"] == sum(tensor.numel() for tensor in written.values())

    def test_copies_everything_but_other_weights(self, tmp_path: Path, source: Handmade):
        copied = ["tokenizer.json", "LICENSE", ".gitattributes", "1_Pooling/config.json", "2_Dense/model.safetensors"]
        dropped = ["pytorch_model.bin", "a.gguf", "consolidated.safetensors", "original/params.json", "onnx/model.onnx"]
        for name in [*copied, *dropped, ".git/HEAD", ".cache/huggingface/x"]:
            path = source.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(name)
        (source.folder / "vocab.json").symlink_to("tokenizer.json")
        run(source, tmp_path / "out")
        made = {"README.md", "config.json", "flashnorm.json", "model.safetensors.index.json"}
        out = content(tmp_path / "out")
        assert set(out) == {*copied, "vocab.json", *made, *source.open().headers}
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
        assert FoldPlan.from_dict(manifest["plan"]) == source.plan

    def test_reports_progress_up_to_the_end(self, tmp_path: Path, source: Handmade):
        calls: list[tuple[int, int]] = []
        run(source, tmp_path / "out", progress=lambda done, total: calls.append((done, total)))
        shards = sum(path.stat().st_size for path in (tmp_path / "out").glob("*.safetensors"))
        assert calls == sorted(calls)
        assert calls[-1] == (shards, shards)


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


class TestRefusals:
    def refused(self, source: Handmade, message: str, target: Path | None = None, **options) -> None:
        before = sorted(source.folder.parent.rglob("*"))
        with pytest.raises(InputError, match=message):
            run(source, target or source.folder.parent / "out", **options)
        assert sorted(source.folder.parent.rglob("*")) == before

    def amend_config(self, source: Handmade, entries: dict) -> None:
        path = source.folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    @pytest.mark.parametrize("method", ["fp8", "gptq", "awq", "bitsandbytes", "compressed-tensors", "mxfp4"])
    @pytest.mark.parametrize("part", [None, "text_config"])
    def test_a_quantised_source(self, source: Handmade, method: str, part: str | None):
        quantization = {"quantization_config": {"quant_method": method}}
        self.amend_config(source, {part: quantization} if part else quantization)
        self.refused(source, rf"quantization_config \({method}\); a gain cannot be folded exactly")

    @pytest.mark.parametrize("entry", [{"flash_norm": True}, {"flashnorm": {"version": 1}}])
    def test_a_converted_source(self, source: Handmade, entry: dict):
        self.amend_config(source, entry)
        self.refused(source, "converted already")

    def test_a_source_converted_by_the_reference(self, source: Handmade):
        write(source.folder, {n: t for n, t in source.tensors.items() if n not in source.names.norms}, shards=3)
        self.refused(source, "all of them absent: this checkpoint is converted already")

    def test_a_source_that_lacks_some_norms(self, source: Handmade):
        write(source.folder, {n: t for n, t in source.tensors.items() if n != "layer.norm.weight"}, shards=3)
        self.refused(source, r"1 absent: layer\.norm\.weight; the checkpoint is damaged")

    def test_a_source_without_norms_to_fold(self, source: Handmade):
        source.plan = replace(source.plan, folds=())
        self.refused(source, "why norms stay: its output is a residual")

    def test_a_source_that_lacks_a_linear(self, source: Handmade):
        write(source.folder, {n: t for n, t in source.tensors.items() if n != "layer.conv1d.weight"}, shards=3)
        self.refused(source, r"expected tensor layer\.conv1d\.weight")

    def test_a_source_that_lacks_the_tensor_to_untie(self, tmp_path: Path):
        source = make(tmp_path / "source", untie=True)
        write(source.folder, {n: t for n, t in source.tensors.items() if n != "embed.weight"})
        self.refused(source, r"expected tensor embed\.weight, of which head\.weight")

    @pytest.mark.parametrize("shape", [(31, CHANNELS + 1), (31,)])
    def test_a_linear_of_another_shape(self, source: Handmade, shape: tuple[int, ...]):
        write(source.folder, source.tensors | {"layer.linear.weight": torch.ones(shape).bfloat16()}, shards=3)
        self.refused(source, r"layer\.linear\.weight to (match|have an axis)")

    def test_segments_that_do_not_fit(self, source: Handmade):
        write(source.folder, source.tensors | {"layer.parts.weight": torch.ones(9, 11).bfloat16()}, shards=3)
        self.refused(source, r"layer\.parts\.weight to match layer\.norm\.weight")

    @pytest.mark.parametrize("name", ["layer.linear.weight", "layer.norm.weight"])
    def test_a_dtype_that_cannot_take_a_gain(self, source: Handmade, name: str):
        narrow = source.tensors[name].to(torch.float8_e4m3fn)
        write(source.folder, source.tensors | {name: narrow}, shards=3)
        self.refused(source, rf"{name} as one of BF16, F16, F32, F64, found F8_E4M3")

    def test_a_target_that_exists(self, source: Handmade):
        (source.folder.parent / "out").mkdir()
        self.refused(source, "exists")

    def test_a_target_in_the_source(self, source: Handmade):
        self.refused(source, "outside of the source", source.folder / "out")
        self.refused(source, "outside of the source", source.folder, force=True)
        self.refused(source, "outside of the source", source.folder.parent, force=True)

    def test_a_link_that_leads_nowhere(self, source: Handmade):
        (source.folder / "tokenizer.json").symlink_to("absent")
        self.refused(source, "dangling link")

    def test_too_little_space(self, source: Handmade, monkeypatch: pytest.MonkeyPatch):
        usage = shutil.disk_usage(source.folder)._replace(free=1000)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        self.refused(source, "free space")


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


class TestInterrupted:
    @pytest.fixture(autouse=True)
    def small_pieces(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shard, "PIECE_BYTES", 256)

    def interrupt(self, source: Handmade, target: Path, at: float, do: Callable[[], object] | None = None) -> None:
        """Run until a share of the bytes is written, and stop there; or do something there, which should stop it."""

        def progress(done: int, total: int) -> None:
            if done >= at * total:
                if do is None:
                    raise KeyboardInterrupt
                do()

        with pytest.raises((KeyboardInterrupt, InputError)):
            run(source, target, progress=progress)

    @pytest.mark.parametrize("at", [0.01, 0.3, 0.6, 0.9, 1.0])
    def test_continues_and_ends_with_the_same_bytes(self, tmp_path: Path, source: Handmade, at: float):
        run(source, tmp_path / "undisturbed")
        target = tmp_path / "out"
        self.interrupt(source, target, at)
        assert not target.exists()
        left = [path.name for path in (tmp_path / ".out.flashnorm-partial").rglob("*.safetensors")]
        result = run(source, target)
        assert result.resumed_shards == len(left)
        assert content(target) == content(tmp_path / "undisturbed")
        assert not (tmp_path / ".out.flashnorm-partial").exists()

    def test_nothing_is_left_if_nothing_was_finished(self, tmp_path: Path, source: Handmade):
        self.interrupt(source, tmp_path / "out", 0.0)
        assert list(tmp_path.iterdir()) == [source.folder]

    def test_a_finished_shard_that_was_changed_is_written_again(self, tmp_path: Path, source: Handmade):
        run(source, tmp_path / "undisturbed")
        self.interrupt(source, tmp_path / "out", 0.9)
        path = next((tmp_path / ".out.flashnorm-partial").rglob("*.safetensors"))
        path.write_bytes(path.read_bytes()[:-1] + b"\x99")
        run(source, tmp_path / "out")
        assert content(tmp_path / "out") == content(tmp_path / "undisturbed")

    @pytest.mark.parametrize("change", ["source", "option"])
    def test_starts_over_for_another_conversion(self, tmp_path: Path, source: Handmade, change: str):
        self.interrupt(source, tmp_path / "out", 0.9)
        if change == "source":
            write(source.folder, {name: tensor + 1 for name, tensor in source.tensors.items()}, shards=3)
        assert run(source, tmp_path / "out", keep_norms=change == "option").resumed_shards == 0

    def test_a_source_that_changes_meanwhile_is_refused(self, tmp_path: Path, source: Handmade):
        path = next(source.folder.glob("*.safetensors"))
        self.interrupt(source, tmp_path / "out", 0.5, do=lambda: path.write_bytes(path.read_bytes()))
        assert not (tmp_path / "out").exists()

    def test_two_runs_at_once(self, tmp_path: Path, source: Handmade):
        def second(done: int, total: int) -> None:
            with pytest.raises(InputError, match="another run"):
                run(source, tmp_path / "out")

        run(source, tmp_path / "out", progress=second)
        assert_folded(tmp_path / "out", source, absent=set(source.names.norms))

    def test_a_full_disk(self, tmp_path: Path):
        """A limit on the size of a file stands in for a disk that is full: the error comes from the same call."""
        source = make(tmp_path / "source", shards=3)
        write(source.folder, source.tensors | {"x": torch.zeros(1 << 18)}, shards=3)
        script = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from handmade import make, write
from test_convert import run
from flashnorm.errors import InputError
source = make(Path({str(tmp_path / "unused")!r}), shards=3)
source.folder = Path({str(source.folder)!r})
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 19, resource.RLIM_INFINITY))
try:
    run(source, Path({str(tmp_path / "out")!r}))
except InputError as error:
    print(error)
"""
        result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert "make room and run the same command again" in result.stdout, result.stderr
        assert not (tmp_path / "out").exists()
        # `x` comes first, in the first shard, so nothing was finished.
        assert not (tmp_path / ".out.flashnorm-partial").exists()
        run(source, tmp_path / "out")
        assert "x" in tensors_of(tmp_path / "out")


shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@given(shape=shapes, limit=st.integers(1, 60), data=st.data())
def test_slices_cover_a_tensor_once_and_in_order(shape: tuple[int, ...], limit: int, data: st.DataObject):
    axis = data.draw(st.integers(0, len(shape) - 1))
    channel_of = torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    flat = channel_of.reshape(-1)
    position = 0
    for first, (outer, channels, inner), which in fold_slices(shape, axis, limit):
        assert first == position
        assert outer * channels * inner <= limit
        expected = torch.arange(shape[axis])[which].view(1, -1, 1).expand(outer, channels, inner)
        position += outer * channels * inner
        assert torch.equal(flat[first:position].view(outer, channels, inner), expected)
    assert position == prod(shape)


def test_the_gain_of_an_axis():
    norms = {"a": torch.tensor([2.0, 3.0]), "b": torch.tensor([0.5, -1.0])}
    gain = axis_gain(6, (GainUse("a", 0.0, ((0, 1, 1), (1, 0, 2))), GainUse("b", 1.0, ((2, 0, 2),))), norms)
    assert gain.high.tolist() == [3, 2, 3 * 1.5, 0, 1, 1]
    assert gain.low.tolist() == [0] * 6
    assert axis_gain(2, (GainUse("a", 0.0),), norms).high.tolist() == [2, 3]


def test_a_product_that_cannot_be_held_is_refused(tmp_path: Path):
    source = make(tmp_path / "source")
    both = (GainUse("layer.norm.weight", 0.0), GainUse("layer.offset_norm.weight", 1.0, ((0, 0, 6),)))
    source.names.folds["layer.parts.weight"] = TensorFold(1, both)
    tiny = {"layer.offset_norm.weight": torch.full((CHANNELS // 2,), 1e-30).bfloat16()}
    write(source.folder, source.tensors | tiny)
    with pytest.raises(InputError, match=r"layer\.parts\.weight cannot be folded: .*106 bits"):
        run(source, tmp_path / "out")


def test_folding_needs_no_aligned_memory():
    """Tensors of another writer may lie at odd offsets in the file."""
    raw = bytearray(2 * 12 + 1)
    weight = torch.randn(3, 4).bfloat16()
    memoryview(raw)[1:] = weight.view(torch.uint8).numpy().tobytes()
    odd = torch.frombuffer(memoryview(raw)[1:], dtype=torch.uint8).view(torch.bfloat16).view(3, 4)
    gain = axis_gain(4, (GainUse("a", 0.0),), {"a": torch.tensor([1.0, 2, 3, 4])})
    assert torch.equal(fold_weight(odd, gain, 1), weight * torch.tensor([1, 2, 3, 4]))


def test_the_hub_id_is_read_from_the_cache_path():
    commit = "0123456789" * 4
    assert hub_identity(Path(f"/c/models--org--a-name--x/snapshots/{commit}")) == ("org/a-name--x", commit)
    assert hub_identity(Path("/models/name")) == (None, None)


class TestCard:
    CARD = (
        "---\nlicense: mit # y\nlanguage: no\ntags: [a, b]\nbase_model:\n- org/base\nx: 1\n---\n\n# Title\r\n\r\nHi.\n"
    )

    def card(self, card: str | None, base_model: str | None = "org/name") -> str:
        return updated_card(card, base_model=base_model, version="0", norms=3, linears=5)

    def test_changes_three_keys_and_adds_a_section(self):
        new = self.card(self.CARD)
        front = (
            "---\nlicense: mit # y\nlanguage: no\ntags:\n- a\n- b\n- flashnorm\n- weightless-rmsnorm\n"
            "base_model:\n- org/name\nx: 1\n---\n"
        )
        assert new.startswith(front + "\n# Title\r\n\r\nHi.\n\n# FlashNorm\n\nThis is `org/name` with 3 norm weights")

    def test_an_unknown_source_leaves_the_base_model(self):
        assert "base_model:\n- org/base\n" in self.card(self.CARD, base_model=None)

    def test_without_a_card_writes_one(self):
        front = "---\ntags:\n- flashnorm\n- weightless-rmsnorm\nbase_model:\n- org/name\n---\n# FlashNorm\n"
        assert self.card(None).startswith(front)

    def test_without_front_matter_writes_some(self):
        assert self.card("Text.\n").startswith("---\ntags:\n- flashnorm\n")
        assert "---\nText.\n\n# FlashNorm\n" in self.card("Text.\n")

    def test_front_matter_that_is_not_yaml_stays(self):
        assert self.card("---\na: [\n---\nText.\n").startswith("---\na: [\n---\nText.\n\n# FlashNorm\n")


class TestConfigOfOtherWeights:
    """config.json and weights that do not belong together."""

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"hidden_size": 32}, r"expected .* with shape \[.*\], as config.json has it, found \[.*\]"),
            ({"num_hidden_layers": 3}, "absent"),
            ({"intermediate_size": 95}, "gate_proj.weight with shape"),
        ],
    )
    def test_is_refused(self, tmp_path: Path, change: dict, message: str):
        source = tiny.save(tmp_path / "source", tiny.model(tiny.config("llama")))
        config = json.loads((source / "config.json").read_text())
        (source / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(InputError, match=message):
            convert(source, tmp_path / "target")
        assert [path.name for path in tmp_path.iterdir()] == ["source"]
