"""The model card gets three keys and a section."""

from flashnorm.convert.card import is_causal, updated_card


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

    def test_names_the_runtimes_that_the_form_fits(self):
        def text(*, generates: bool = True, keep_norms: bool = False) -> str:
            about = {"base_model": None, "version": "0", "norms": 3, "linears": 5}
            return updated_card(None, **about, generates=generates, keep_norms=keep_norms)

        weightless, kept, encoder = text(), text(keep_norms=True), text(generates=False)
        for both in ("pipeline(", "vllm serve", "optimum-cli export openvino", "optimize=False"):
            assert both in weightless
            assert both in kept
        assert "convert_hf_to_gguf.py" not in weightless
        assert "Runtimes that insist" in weightless
        assert "convert_hf_to_gguf.py" in kept
        assert "mlx_lm.generate" in kept
        assert "no weights any more" not in kept
        assert "Runtimes that insist" not in kept
        assert "vllm" not in encoder
        assert "flashnorm.load" in encoder
        assert "\n\n\n" not in weightless + kept + encoder


def test_a_causal_language_model_is_known_by_its_config():
    assert is_causal({"architectures": ["LlamaForCausalLM"]})
    assert not is_causal({"architectures": ["BertForMaskedLM"]})
    assert not is_causal({"architectures": None})
    assert not is_causal({})
