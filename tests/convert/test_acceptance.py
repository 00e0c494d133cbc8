"""What `convert` cannot do it refuses, before it writes anything."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
from conversion import run
from flashnorm.convert.whole import convert
from flashnorm.errors import InputError
from handmade import CHANNELS, Handmade, make, write


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
    def test_a_quantisation_declared_beside_plain_weights(self, source: Handmade, method: str, part: str | None):
        quantization = {"quantization_config": {"quant_method": method}}
        self.amend_config(source, {part: quantization} if part else quantization)
        key = f"{part}.quantization_config" if part else "quantization_config"
        said = rf", though every matrix is of plain floats; if they were dequantised, remove {key} from config\.json"
        self.refused(source, rf"{key} \({method}\){said}")

    @pytest.mark.parametrize("entry", [{"flash_norm": True}, {"flashnorm_folded": True}])
    def test_a_converted_source(self, source: Handmade, entry: dict):
        identity = {name: torch.full_like(source.tensors[name], value) for name, value in source.names.norms.items()}
        write(source.folder, source.tensors | identity, shards=3)
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
