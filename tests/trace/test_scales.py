"""Which divisions cancel: what is said of small modules and of models, each claim proven by numbers in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import removed
from architectures import causal, configs, published
from flashnorm.planning.config import load_config
from flashnorm.planning.removable import removable
from flashnorm.removable import Division, Ending, Reader, Removable, Verdict

CHANNELS, TOKENS = 6, 5


class Norm(nn.Module):
    """An RMSNorm of plain operators."""

    def __init__(self, size: int = CHANNELS) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), 1e-6

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class Pair(nn.Module):
    """Two norms with a linear layer between and one behind; `forward` is the test's."""

    def __init__(self, second: Callable[[int], nn.Module] = Norm, bias: bool = False) -> None:
        super().__init__()
        self.first, self.linear, self.other = Norm(), nn.Linear(CHANNELS, CHANNELS, bias=bias), nn.Linear(CHANNELS, 2)
        self.second = second(CHANNELS)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 + torch.randn(parameter.shape, generator=generator))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.second(self.linear(self.first(x))))


def examined(module: nn.Module) -> Removable:
    """What is found in a module, after all of it was proven by numbers."""
    found = removable(module, (torch.zeros(2, TOKENS, CHANNELS),))
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, seed: int) -> Tensor:
        outputs = model(x)
        return torch.cat([one.flatten() for one in (outputs if isinstance(outputs, tuple) else [outputs])])

    verdicts = removed.prove(module.double(), found, run)
    assert {*verdicts.values()} == {"proven"}, verdicts
    return found


def first(module: nn.Module) -> Division:
    return next(one for one in examined(module).divisions if one.norm == "first")


def test_a_norm_ahead_of_a_norm() -> None:
    found = examined(Pair())
    one, two = found.divisions
    assert one.norm == "first"
    assert one.where is not None
    assert one.where.startswith("first (test_scales.py:")
    assert one.readers == (Reader("linear.weight", (Ending("second", 2, (0, 1)),)),)
    assert one.verdict is Verdict.CANCELS
    assert two.verdict is Verdict.STAYS
    assert two.readers[0].escapes[0].operator == "aten.tanh"
    assert found.division_summary() == "Pair: 2 divisions of norms, 1 cancel, 0 cancel in part"


def _squared(self: Pair, x: Tensor) -> Tensor:
    return self.second(torch.relu(self.linear(self.first(x))).square())


def _gated(self: Pair, x: Tensor) -> Tensor:
    h = self.first(x)
    return self.second(torch.relu(self.linear(h)) * self.linear(h))


def _root(self: Pair, x: Tensor) -> Tensor:
    h = self.linear(self.first(x))
    return h / (h.pow(2).sum(-1, keepdim=True).sqrt())


def _normalised(self: Pair, x: Tensor) -> Tensor:
    return nn.functional.normalize(self.linear(self.first(x)), dim=-1, eps=1e-300)


def _joined(self: Pair, x: Tensor) -> Tensor:
    h = self.linear(self.first(x))
    return self.second(torch.cat([h[..., 3:], -2 * h[..., :3]], -1) + h * torch.arange(CHANNELS))


def _heads(self: Pair, x: Tensor) -> Tensor:
    h = self.linear(self.first(x)).view(2, TOKENS, 2, 3).transpose(1, 2)
    return h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-300)


def _rotated(self: Pair, x: Tensor) -> Tensor:
    pairs = self.linear(self.first(x)).reshape(*x.shape[:2], 3, 2)
    turned = torch.view_as_complex(pairs) * torch.polar(torch.ones(3), torch.arange(3.0)).to(x.device, torch.complex128)
    return self.second(torch.view_as_real(turned).flatten(2))


@pytest.mark.parametrize(
    ("forward", "power"),
    [(_rotated, 2), (_squared, 4), (_gated, 4), (_root, None), (_normalised, 1), (_joined, 2), (_heads, 2)],
)
def test_what_commutes_with_a_scale(forward: Callable[[Pair, Tensor], Tensor], power: float | None) -> None:
    module = type("Module", (Pair,), {"forward": forward})()
    division = first(module)
    assert division.verdict is Verdict.CANCELS
    assert [one.power for one in division.readers[0].endings] == [power]


def _stacked(self: Pair, x: Tensor) -> Tensor:
    return self.second(torch.stack([self.linear(self.first(x)), x], 2))


def test_a_norm_of_what_is_scaled_and_what_is_not() -> None:
    """The division cancels, but no `eps` of that norm takes it over: that of one half stays."""
    module = type("Module", (Pair,), {"forward": _stacked})().double()
    found = removable(module, (torch.zeros(2, TOKENS, CHANNELS, dtype=torch.float64),))
    (ending,) = found.divisions[0].readers[0].endings
    assert (found.divisions[0].verdict, ending.power, ending.dims) == (Verdict.CANCELS, 2, None)
    assert "cancels in second (eps of what is scaled * r^2)" in str(found.division_rows())
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert removed.prove(module, found, lambda model, _: model(x))["first"] == removed.BUT_FOR_EPS
    with pytest.raises(ValueError, match="no place of tokens"), removed.large_eps(module):
        removed.changed(module, lambda model, _: model(x), module(x), found.divisions[0])


@pytest.mark.parametrize("second", [lambda size: nn.RMSNorm(size, eps=1e-6), nn.LayerNorm])
def test_norms_of_pytorch(second: Callable[[int], nn.Module]) -> None:
    assert first(Pair(second)).readers == (Reader("linear.weight", (Ending("second", 2, (0, 1)),)),)


def test_a_bias_before_the_second_norm() -> None:
    division = first(Pair(bias=True))
    assert division.verdict is Verdict.STAYS
    (why,) = division.readers[0].escapes
    assert why.reason == "it adds a tensor that is not scaled"
    assert why.operator == "aten.addmm"


def test_a_bias_of_the_norm_itself() -> None:
    module = Pair()
    module.first = nn.LayerNorm(CHANNELS)
    nn.init.normal_(module.first.bias)
    assert first(module).readers[0].escapes[0].reason == "the norm adds a bias of its own"


def _second_reader(self: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.first(x)
    return self.second(self.linear(h)), self.other(h)


def _residual(self: Pair, x: Tensor) -> Tensor:
    return x + self.second(self.linear(self.first(x))) + self.linear(self.first(x))


def _output(self: Pair, x: Tensor) -> tuple[Tensor, Tensor]:
    h = self.linear(self.first(x))
    return self.second(h), h


@pytest.mark.parametrize("forward", [_second_reader, _residual, _output])
def test_a_second_reader_without_a_norm(forward: Callable[[Pair, Tensor], Tensor]) -> None:
    division = first(type("Module", (Pair,), {"forward": forward})())
    assert division.verdict is Verdict.IN_PART


def _mixed_tokens(self: Pair, x: Tensor) -> Tensor:
    return self.second(self.linear(self.first(x)).cumsum(1))


def _whole_sequence(self: Pair, x: Tensor) -> Tensor:
    h = self.linear(self.first(x))
    return h * torch.rsqrt(h.pow(2).mean((1, 2), keepdim=True) + 1e-6)


def _half(self: Pair, x: Tensor) -> Tensor:
    """The second norm is given channels that are not scaled as well."""
    h = self.linear(self.first(x))
    return self.second(torch.cat([h[..., :3], x[..., :3]], -1))


def _two_powers(self: Pair, x: Tensor) -> Tensor:
    h = self.linear(self.first(x))
    return self.second(h + h.square())


def _number(self: Pair, x: Tensor) -> Tensor:
    return self.second(self.linear(self.first(x)) + 1)


def _rounded(self: Pair, x: Tensor) -> Tensor:
    return self.second(torch.div(self.linear(self.first(x)), 0.1, rounding_mode="floor"))


def _number_of_a_statistic(self: Pair, x: Tensor) -> Tensor:
    """`1 + mean`, which no root is taken of, is no norm's."""
    h = self.linear(self.first(x))
    return h / (h.abs().mean(-1, keepdim=True) + 1)


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_mixed_tokens, "it adds up different tokens"),
        (_whole_sequence, "it adds up different tokens"),
        (_half, "it adds up different tokens"),
        (_two_powers, "it adds a tensor that is not scaled"),
        (_number, "it adds a number"),
        (_rounded, "unknown operator"),
        (_number_of_a_statistic, "it adds a number"),
    ],
)
def test_what_does_not_commute(forward: Callable[[Pair, Tensor], Tensor], reason: str) -> None:
    division = first(type("Module", (Pair,), {"forward": forward})())
    assert division.verdict is Verdict.STAYS
    assert reason in [why.reason for why in division.readers[0].escapes]


class Shared(Pair):
    """One norm ahead of two blocks, of which only one normalises again."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.second(self.linear(self.first(x))), torch.tanh(self.other(self.first(2 + x)))


def test_a_norm_shared_by_two_blocks() -> None:
    found = examined(Shared())
    (division,) = [one for one in found.divisions if one.norm == "first"]
    assert division.verdict is Verdict.IN_PART
    assert {reader.weight: bool(reader.endings) for reader in division.readers} == {
        "linear.weight": True,
        "other.weight": False,
    }


class Gated(Pair):
    """The same division behind two linear layers, which meet ahead of the norm: as in BitNet's MLP."""

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        return self.second(torch.relu(self.linear(h)).square() * self.other(h).mean(-1, keepdim=True))


def test_powers_of_two_readers_add_up() -> None:
    module = Gated()
    module.other = nn.Linear(CHANNELS, 2, bias=False)
    nn.init.normal_(module.other.weight)
    division = first(module)
    assert [(one.weight, one.endings) for one in division.readers] == [
        ("linear.weight", (Ending("second", 6, (0, 1)),)),
        ("other.weight", (Ending("second", 6, (0, 1)),)),
    ]


def test_a_write_into_memory_that_others_share() -> None:
    class Writes(Pair):
        def forward(self, x: Tensor) -> Tensor:
            h = torch.zeros_like(x)
            h[..., :3].add_(self.linear(self.first(x))[..., :3])
            return self.second(h)

    division = removable(Writes(), (torch.zeros(2, TOKENS, CHANNELS),)).divisions[0]
    assert division.verdict is Verdict.STAYS  # it is not known to cancel
    assert "memory" in division.readers[0].escapes[0].reason


def test_eps_that_matters() -> None:
    """The proof tells an eps that is scaled from one that is not."""
    module = Pair().double()
    found = removable(module, (torch.zeros(2, TOKENS, CHANNELS),))
    x = torch.randn(2, TOKENS, CHANNELS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def run(model: nn.Module, seed: int) -> Tensor:
        return model(x)

    with removed.large_eps(module):
        before = removed.outputs(module, run)
        assert removed.changed(module, run, before, found.divisions[0]) < removed.LIMIT
        assert removed.changed(module, run, before, found.divisions[0], with_eps=False) > 0.1


# Model type -> the verdict of the norm ahead of attention, and what is said of each of its readers.
KNOWN = {
    "gemma4_text": (Verdict.CANCELS, {"q_proj": "ends", "k_proj": "ends", "v_proj": "ends"}),
    "qwen3": (Verdict.IN_PART, {"q_proj": "ends", "k_proj": "ends", "v_proj": "escapes"}),
    "minicpm3": (Verdict.IN_PART, {"q_a_proj": "ends", "kv_a_proj_with_mqa": "both"}),
    "deepseek_v2": (Verdict.IN_PART, {"q_a_proj": "ends", "kv_a_proj_with_mqa": "both"}),
    "llama": (Verdict.STAYS, {"q_proj": "escapes", "k_proj": "escapes", "v_proj": "escapes"}),
}


@pytest.mark.slow
@pytest.mark.parametrize("model_type", KNOWN)
def test_models(model_type: str) -> None:
    verdict, readers = KNOWN[model_type]
    found = removable(configs.tiny_config(model_type))
    division = next(one for one in found.divisions if one.norm == "model.layers.0.input_layernorm")
    assert division.verdict is verdict
    assert readers == {
        str(one.weight).split(".")[-2]: "both" if one.endings and one.escapes else "ends" if one.endings else "escapes"
        for one in division.readers
    }
    model = causal.build(model_type)
    verdicts = removed.prove(model, found, causal.run)
    assert {*verdicts.values()} == {"proven"}, verdicts


def test_smollm2_has_nothing_to_cancel() -> None:
    """One layer of the published config: no norm is read by another norm alone."""
    config = load_config(published.configs()["HuggingFaceTB/SmolLM2-135M"])
    config.num_hidden_layers = 1
    found = removable(config)
    assert found.division_summary() == "llama: 3 divisions of norms, none of which cancels"
    assert found.centrings == ()


def test_bitnet_mlp() -> None:
    """`norm(relu(gate x)^2 * up x)` is of degree three: the norm ahead of the MLP does nothing."""
    found = removable(configs.tiny_config("bitnet"))
    assert [one.norm for one in found.of_verdict(Verdict.CANCELS)] == [
        f"model.layers.{layer}.post_attention_layernorm" for layer in (0, 1)
    ]
    verdicts = removed.prove(causal.build("bitnet"), found, causal.run)
    assert {*verdicts.values()} == {"proven"}, verdicts


def test_deepseek_without_a_query_latent() -> None:
    """DeepSeek-V2-Lite: only the latent of keys and values is normalised, and not its rotated part."""
    config = configs.tiny_config("deepseek_v2")
    config.q_lora_rank = None
    division = removable(config).divisions[0]
    query, latent = division.readers
    assert query.endings == ()
    assert query.escapes
    assert [one.norm for one in latent.endings] == ["model.layers.0.self_attn.kv_a_layernorm"]
    assert latent.escapes


def test_the_division_itself_is_left_out() -> None:
    """Gemma 4 without the first norm's division: the second norms' eps becomes `eps * r(x)^2`, and nothing changes."""
    model = causal.build("gemma4_text")
    found = removable(model)
    whole = found.of_verdict(Verdict.CANCELS)
    assert [one.norm for one in whole] == [f"model.layers.{layer}.input_layernorm" for layer in (0, 1)]
    with removed.large_eps(model):
        before = removed.outputs(model, causal.run)
        for division in whole:
            norm = model.get_submodule(division.norm)

            def undivided(module: nn.Module, args: tuple[Tensor, ...], norm: nn.Module = norm) -> None:
                norm.divisor = torch.sqrt(args[0].pow(2).mean(-1, keepdim=True) + module.eps)

            def bare(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                return args[0] * module.weight

            norm.register_forward_pre_hook(undivided)
            norm.register_forward_hook(bare)
            for ending in (one for reader in division.readers for one in reader.endings):
                model.get_submodule(ending.norm).register_forward_pre_hook(_of_divisor(norm, ending))
        after = removed.outputs(model, causal.run)
    assert (after - before).abs().max() / before.abs().max() < removed.LIMIT


def _of_divisor(norm: nn.Module, ending: Ending) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
    def enter(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        module.eps = removed.EPS * norm.divisor.unsqueeze(-1) ** ending.power

    return enter
