"""Which LayerNorms can become RMSNorms: what is said of small modules and of models, each claim proven in float64."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import removed
from architectures import causal, configs, families
from flashnorm.plan import Kind, Writer
from flashnorm.planning.removable import removable
from flashnorm.removable import Centring, Removable

CHANNELS, TOKENS = 6, 5


class Block(nn.Module):
    """A residual stream: embedding, positions, a linear layer, and a LayerNorm with a head; `forward` is the test's."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.positions = nn.Embedding(9, CHANNELS), nn.Parameter(torch.empty(1, 8, CHANNELS))
        self.inner, self.norm = nn.LayerNorm(CHANNELS), nn.LayerNorm(CHANNELS)
        self.up, self.down = nn.Linear(CHANNELS, 7), nn.Linear(7, CHANNELS)
        self.head, self.scale = nn.Linear(CHANNELS, 4), nn.Parameter(torch.empty(CHANNELS))
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(0.3 + torch.randn(parameter.shape, generator=generator))

    def begin(self, ids: Tensor) -> Tensor:
        return self.embed(ids) + self.positions[:, : ids.shape[1]]

    def grown(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(self.inner(x))))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.norm(self.grown(self.begin(ids))))


IDS = torch.randint(0, 9, (2, TOKENS), generator=torch.Generator().manual_seed(1))


def examined(module: nn.Module) -> Removable:
    """What is found in a module, after what it claims was proven by numbers."""
    found = removable(module, (IDS,))

    def run(model: nn.Module, seed: int) -> Tensor:
        outputs = model(IDS)
        return torch.cat([one.flatten() for one in (outputs if isinstance(outputs, tuple) else [outputs])])

    verdicts = removed.prove_centred(module.double(), found, run)
    assert {*verdicts.values()} <= {"proven"}, verdicts
    return found


def last(module: nn.Module) -> Centring:
    return next(one for one in examined(module).centrings if one.norm == "norm")


def of(forward: Callable[[Block, Tensor], object]) -> Block:
    return type("Module", (Block,), {"forward": forward})()


def test_every_writer_is_named() -> None:
    found = examined(Block())
    assert [one.norm for one in found.centred] == ["inner", "norm"]
    for one in found.centrings:
        assert {*one.writers} == {
            Writer("embed.weight", 1),
            Writer("positions", 2),
            Writer("down.weight", 0),
            Writer("down.bias", 0),
        }
    assert found.centring_summary() == "Block: 2 norms subtract a mean, 2 of which can become RMSNorms"


def _scaled(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids) * 3.5
    return self.head(self.norm(x - self.grown(x) / self.up(self.inner(x)).mean(-1, keepdim=True)))


def _class_token(self: Block, ids: Tensor) -> Tensor:
    x = torch.cat([self.positions[:, :1].expand(2, -1, -1), self.embed(ids)], 1)
    return self.head(self.norm(x.transpose(0, 1).contiguous()))


def _mean_of_tokens(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(self.begin(ids).mean(1)))


def _of_plain_operators(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids)
    x = x - x.mean(-1, keepdim=True)
    return self.head(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True)))


@pytest.mark.parametrize("forward", [_scaled, _mean_of_tokens])
def test_what_keeps_a_mean_of_zero(forward: Callable[[Block, Tensor], Tensor]) -> None:
    assert last(of(forward)).removable


def test_a_class_token() -> None:
    """A parameter that is another writer's as well is one thing with it: here a token, not a position."""
    centring = last(of(_class_token))
    assert {writer.name for writer in centring.writers} == {"positions", "embed.weight"}
    assert centring.removable


def test_a_layer_norm_of_plain_operators() -> None:
    module = of(_of_plain_operators)
    (centring,) = removable(module, (IDS,)).centrings
    assert (centring.norm, centring.removable) == ("", True)
    before = module(IDS)
    with torch.no_grad():
        for writer in centring.writers:
            parameter = dict(module.named_parameters())[writer.name]
            parameter -= parameter.mean(writer.axis, keepdim=True)
    assert torch.allclose(module(IDS), before, atol=1e-6)


def _another_mean(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids)
    return self.head(self.norm(x) + x - self.embed(ids).mean(-1, keepdim=True))


def _gain(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(self.begin(ids) * self.scale))


def _number(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(self.begin(ids) + 1))


def _activation(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(self.begin(ids) + torch.tanh(self.down(self.up(self.embed(ids))))))


def _after_a_norm(self: Block, ids: Tensor) -> Tensor:
    """Post-norm: what a LayerNorm gives is no sum of linear layers."""
    return self.head(self.norm(self.grown(self.inner(self.begin(ids)))))


def _second_reader(self: Block, ids: Tensor) -> tuple[Tensor, Tensor]:
    x = self.begin(ids)
    return self.head(self.norm(x)), self.up(x)


def _output(self: Block, ids: Tensor) -> tuple[Tensor, Tensor]:
    x = self.grown(self.begin(ids))
    return self.head(self.norm(x)), x


def _part(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids)
    return self.head(self.norm(torch.cat([x[..., 3:], x[..., :3]], -1)))


def _tied(self: Block, ids: Tensor) -> Tensor:
    return self.norm(self.begin(ids)) @ self.embed.weight.t()


def _tied_to_a_multiple(self: Block, ids: Tensor) -> Tensor:
    return self.norm(self.begin(ids)) @ (0.5 * self.embed.weight).t()


def _reciprocal(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(1 / self.begin(ids)))


def _rounded(self: Block, ids: Tensor) -> Tensor:
    return self.head(self.norm(torch.div(self.begin(ids), 0.1, rounding_mode="floor")))


def _masked_channels(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids)
    return self.head(self.norm(x.masked_fill(torch.arange(CHANNELS, device=ids.device).expand(x.shape) > 2, 0)))


def _masked_by_a_tensor(self: Block, ids: Tensor) -> Tensor:
    x = self.begin(ids)
    mask = torch.arange(TOKENS, device=ids.device)[:, None].expand(x.shape) > 2
    return self.head(self.norm(x.masked_fill(mask, torch.tensor(float("-inf"), device=ids.device).exp())))


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (_another_mean, "it reads the mean"),
        (_gain, "different numbers"),
        (_number, "no parameter writes"),
        (_activation, "no parameter writes"),
        (_after_a_norm, "no parameter writes"),
        (_second_reader, "it reads the mean"),
        (_output, "an output of the model"),
        (_part, "other channels"),
        (_tied, "embed.weight has another use"),
        (_tied_to_a_multiple, "embed.weight has another use"),
        (_reciprocal, "is no sum"),
        (_rounded, "is no sum"),
        (_masked_by_a_tensor, "is no sum"),
        (_masked_channels, "different numbers"),
    ],
)
def test_what_stays(forward: Callable[[Block, Tensor], Tensor], reason: str) -> None:
    centring = last(of(forward))
    assert not centring.removable
    assert any(reason in why.reason for why in centring.escapes), centring.escapes


def test_a_head_that_is_tied() -> None:
    """GPT-2: the embedding cannot be centred while the output head is the same tensor."""
    config = configs.tiny_config("gpt2")
    assert {one.escapes[0].kind for one in removable(config).centrings} == {Kind.TIED}
    assert all(one.removable for one in removable(config, untie=True).centrings)


@pytest.mark.parametrize("model_type", ["gpt2", "cohere"])
def test_models(model_type: str) -> None:
    config = configs.tiny_config(model_type)
    config.tie_word_embeddings = False
    found = removable(config)
    model = causal.random_model(causal.model_class(config), config)
    verdicts = removed.prove_centred(model, found, causal.run)
    assert len(verdicts) == len(found.centrings) > 0
    assert {*verdicts.values()} == {"proven"}


@pytest.mark.slow
def test_whisper() -> None:
    """The decoder, not the encoder: a GELU writes into that one."""
    config = families.tiny("speech-seq2seq", "whisper")
    config.tie_word_embeddings = False
    found = removable(config)
    assert all(one.norm.startswith("model.decoder.") == one.removable for one in found.centrings)
    model = causal.random_model(families.model_class("speech-seq2seq", "whisper"), config)
    assert {*removed.prove_centred(model, found, families.run).values()} == {"proven"}


def test_models_of_rms_norms_have_no_mean() -> None:
    found = removable(configs.tiny_config("llama"))
    assert found.centrings == ()
    assert found.centring_summary() == "llama: no norm subtracts a mean"
