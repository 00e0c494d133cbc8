"""What is almost a norm is folded exactly or refused, never wrong."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

import flashnorm
from flashnorm.errors import InputError

N = 8


class Almost(nn.Module):
    """One way of using a gain `g` and linears, by its method's name."""

    def __init__(self, kind: str):
        super().__init__()
        self.kind = kind
        self.g, self.h = (nn.Parameter(torch.empty(N)) for _ in range(2))
        self.scalar, self.one = nn.Parameter(torch.empty(())), nn.Parameter(torch.empty(1))
        self.a, self.b = (nn.Linear(N, N, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        r = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
        return getattr(self, self.kind)(x, r)

    def a_learned_scalar_beside_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g * self.scalar) + self.a(self.one * (r * self.g))

    def a_learned_scalar_before_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(self.scalar * r * self.g)

    def a_scalar_added_to_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * (self.g + self.scalar))

    def two_added_to_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * (self.g + 2.0))

    def the_gain_doubled(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * (self.g * 2.0))

    def the_gain_s_exponential(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g.exp())

    def the_negative_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * -self.g)

    def a_clamp(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a((r * self.g).clamp(-1.0, 1.0))

    def a_clamp_of_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g.clamp(min=0.0))

    def a_clamp_instead_of_a_norm(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(x.clamp(-1.0, 1.0) * self.g)

    def a_mixed_in_residual(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g + 0.1 * x)

    def a_residual_after(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        return self.a(normed) + normed

    def a_residual_of_the_same(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        return self.a(normed.roll(1, 0) + normed)

    def two_norms_share_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        other = F.normalize(torch.tanh(x), dim=-1)
        return self.a(r * self.g) + self.b(other * self.g)

    def two_norms_share_the_gain_and_one_escapes(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g) + torch.tanh(r * self.g)

    def a_linear_of_two_gains(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g) + self.a(r * self.h)

    def a_linear_with_the_gain_and_without(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g) + self.a(x)

    def a_product_of_two_gains(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g * self.h)

    def the_gain_twice(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g * self.g)

    def the_gain_on_two_axes(self, x: Tensor, r: Tensor) -> Tensor:
        square = r[:N] * self.g
        return self.a(square) + self.b((square.T * self.g).T)

    def the_gain_on_the_other_axis(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r[:N].T * self.g)

    def rows_instead_of_columns(self, x: Tensor, r: Tensor) -> Tensor:
        return (self.a.weight * self.g[:, None]) @ r.T

    def a_weight_transposed(self, x: Tensor, r: Tensor) -> Tensor:
        return (r * self.g) @ self.a.weight

    def a_weight_on_both_sides(self, x: Tensor, r: Tensor) -> Tensor:
        return (r * self.g) @ self.a.weight @ self.a.weight

    def half_of_the_channels(self, x: Tensor, r: Tensor) -> Tensor:
        return F.linear((r * self.g)[:, : N // 2], self.a.weight[:, : N // 2])

    def channels_reversed(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a((r * self.g).flip(-1))

    def channels_reversed_once(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        return self.a(normed) + self.a(normed.flip(-1))

    def a_norm_of_the_norm(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.rms_norm(r * self.g, (N,), self.h))

    def a_gate_of_the_same(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        return self.a(normed * torch.sigmoid(self.b(normed)))

    def a_gate_of_itself(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        return self.a(normed * torch.sigmoid(normed))

    def written_into(self, x: Tensor, r: Tensor) -> Tensor:
        normed = r * self.g
        normed[0] = 1.0
        return self.a(normed)

    def a_masked_row(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a((r * self.g).masked_fill(x > 0, 0.0))

    def a_masked_row_of_ones(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a((r * self.g).masked_fill(x > 0, 1.0))

    def the_larger_of_two(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(torch.where(x > 0, r * self.g, x))

    def tokens_pooled(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.avg_pool1d((r * self.g).T[None], 3)[0].T)

    def channels_pooled(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.avg_pool1d((r * self.g)[None], 3, 1, 1)[0])

    def channels_pooled_without_a_batch(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.avg_pool2d((r * self.g).T[None], (3, 1), 1, (1, 0))[0].T)

    def tokens_pooled_without_a_batch(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.avg_pool2d((r * self.g)[None].permute(2, 1, 0), (3, 1))[:, :, 0].T)

    def tokens_interpolated(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.interpolate((r * self.g).T[None], size=5, mode="linear")[0].T)

    def patches(self, x: Tensor, r: Tensor) -> Tensor:
        square = F.unfold((r * self.g).T.reshape(1, N, 3, 3), 2)  # [1, 4 N, 4]
        return self.a(square[0, ::4].T)

    def padded_patches(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(F.unfold((r * self.g).T.reshape(1, N, 3, 3), 1, padding=1)[0].T)

    def weights_joined(self, x: Tensor, r: Tensor) -> Tensor:
        return F.linear(r * self.g, torch.cat([self.a.weight, self.b.weight]))

    def weights_joined_beside_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g) + F.linear(x, torch.stack([self.a.weight, self.b.weight])[0])

    def the_gain_ahead_of_the_division(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(x * self.g * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def a_scale_ahead_of_the_norm(self, x: Tensor, r: Tensor) -> Tensor:
        x = x * self.g
        return self.a(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))

    def the_data_of_the_gain(self, x: Tensor, r: Tensor) -> Tensor:
        return self.a(r * self.g) * self.g.data.sum()


# Kind -> gains that fold.
FOLDED = {
    "a_learned_scalar_beside_the_gain": "g",
    "a_learned_scalar_before_the_gain": "g",
    "the_negative_gain": "g",
    "the_gain_on_the_other_axis": "g",
    "the_gain_ahead_of_the_division": "g",
    "a_residual_of_the_same": "g",
    "two_norms_share_the_gain": "g",
    "a_product_of_two_gains": "gh",
    "a_weight_transposed": "g",
    "half_of_the_channels": "g",
    "channels_reversed": "g",
    "a_norm_of_the_norm": "h",
    "a_gate_of_the_same": "g",
    "a_masked_row": "g",
    "tokens_pooled": "g",
    "tokens_pooled_without_a_batch": "g",
    "tokens_interpolated": "g",
    "patches": "g",
}
KINDS = [name for name in vars(Almost) if not name.startswith("_") and name != "forward"]


def build(kind: str) -> Almost:
    model = Almost(kind).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def x() -> Tensor:
    return torch.randn(N + 1, N, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


@pytest.mark.parametrize("kind", KINDS)
def test_folds_exactly_or_not_at_all(kind: str) -> None:
    model = build(kind)
    plan = flashnorm.plan(model, (x(),))
    assert {fold.norm for fold in plan.folds} == set(FOLDED.get(kind, ""))
    before = model(x())
    if plan.folds:
        flashnorm.fold_(model, (x(),))
    else:
        with pytest.raises(InputError, match="found none"):
            flashnorm.fold_(model, (x(),))
    assert (model(x()) - before).abs().max() <= 1e-12 * before.abs().max()


def test_a_scale_ahead_of_a_norm_is_not_its_gain() -> None:
    assert flashnorm.plan(build("a_scale_ahead_of_the_norm"), (x(),)).norms == 0
    assert flashnorm.plan(build("a_residual_after"), (x(),)).norms == 1


def test_gains_of_zero_and_negative_ones_are_folded() -> None:
    model = build("a_weight_transposed")
    with torch.no_grad():
        model.g[:5] = torch.tensor([0.0, -0.0, 5e-324, -1e-300, 1e30])
    before = model(x())
    flashnorm.fold_(model, (x(),))
    assert (model(x()) - before).abs().max() <= 1e-12 * before.abs().max()
    assert (model.a.weight[0] == 0).all()


class WithDropout(nn.Module):
    """Dropout between norm and linear."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.RMSNorm(N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.dropout(self.norm(x), 0.5, self.training))


def test_a_model_in_training_mode_is_folded_and_stays_in_it() -> None:
    torch.manual_seed(0)
    model = WithDropout().double().train()
    with torch.no_grad():
        model.norm.weight.normal_()
    torch.manual_seed(1)
    before = model(x())
    flashnorm.fold_(model, (x(),))
    assert model.training
    assert model.norm.training
    torch.manual_seed(1)
    assert (model(x()) - before).abs().max() <= 1e-12 * before.abs().max()
