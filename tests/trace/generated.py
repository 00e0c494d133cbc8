"""Random small networks of norms, linears and everything that may stand between them, as one torch module.

A network is a program: a list of steps, each an operation from `OPERATIONS` on two earlier tensors, with a number that
says which parameter. All tensors are `[BATCH, TOKENS, CHANNELS]`. Whatever no later step reads is an output, so that
nothing is dead code.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

BATCH, TOKENS, CHANNELS, HEADS, VOCABULARY = 2, 3, 6, 2, 11
HEAD_SIZE = CHANNELS // HEADS
EPS = 1e-2  # large, so that a norm behind a changed scale shows it


class Step(NamedTuple):
    operation: str
    first: int
    second: int
    number: int


class Network(nn.Module):
    """A program with its parameters, in float64. `scale` is the largest magnitude that the last forward met."""

    def __init__(self, program: list[Step], tied: bool, seed: int):
        super().__init__()
        self.program = program
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=generator, dtype=torch.float64))

        def gain(*shape: int) -> nn.Parameter:
            magnitude = 0.5 + torch.rand(*shape, generator=generator, dtype=torch.float64)
            return nn.Parameter(magnitude * random(*shape).detach().sign())

        self.gains = nn.ParameterList([gain(CHANNELS) for _ in range(3)])
        self.head_gains = nn.ParameterList([gain(HEAD_SIZE), gain(HEADS, HEAD_SIZE)])
        self.weights = nn.ParameterList([random(CHANNELS, CHANNELS) for _ in range(3)])
        self.wide = random(CHANNELS, 2 * CHANNELS)
        self.fused = random(2 * CHANNELS, CHANNELS)
        self.head_weight = random(HEAD_SIZE, HEAD_SIZE)
        self.filters = random(CHANNELS, 1, 2)
        self.bias = random(CHANNELS)
        self.embedding = random(VOCABULARY, CHANNELS)
        self.output = self.embedding if tied else random(VOCABULARY, CHANNELS)
        self.register_buffer("angles", random(TOKENS, CHANNELS).detach())
        self.register_buffer("order", torch.tensor([2, 0, 1]))
        self.register_buffer("mask", torch.tensor([[True], [False], [False]]))

    def forward(self, ids: Tensor) -> tuple[Tensor, ...]:
        pool = [F.embedding(ids, self.embedding)]
        read: set[int] = set()
        for operation, first, second, number in self.program:
            inputs = OPERATIONS[operation]
            a, b = first % len(pool), second % len(pool)
            read |= {a, b} if operation in _BINARY else {a}
            pool.append(inputs(self, pool[a], pool[b], number))
        self.scale = max(1.0, *(float(tensor.detach().abs().max()) for tensor in pool)) if not ids.is_meta else 1.0
        return tuple(tensor for position, tensor in enumerate(pool) if position not in read)


def _normalised(x: Tensor) -> Tensor:
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + EPS)


def _pick(parameters: nn.ParameterList, number: int) -> Tensor:
    return parameters[number % len(parameters)]


def _heads(x: Tensor) -> Tensor:
    return x.view(BATCH, TOKENS, HEADS, HEAD_SIZE)


def _rotated(x: Tensor) -> Tensor:
    return torch.cat((-x[..., HEAD_SIZE:], x[..., :HEAD_SIZE]), dim=-1)


def _in_place(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    out = _normalised(x)
    out *= _pick(net.gains, n)
    return out


def _in_place_half(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    out = x.clone()
    out[..., :HEAD_SIZE] *= 2
    return out


def _head_linear(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    return (_heads(x).transpose(1, 2) @ net.head_weight.T).transpose(1, 2).reshape(x.shape)


def _attention(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    scores = torch.softmax(_heads(x).transpose(1, 2) @ _heads(y).permute(0, 2, 3, 1), dim=-1)
    return (scores @ _heads(y).transpose(1, 2)).transpose(1, 2).flatten(2)


def _gated(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    gate, up = F.linear(x, net.fused).chunk(2, dim=-1)
    return F.silu(gate) * up


def _convolution(net: Network, x: Tensor, y: Tensor, n: int) -> Tensor:
    return F.conv1d(x.transpose(1, 2), net.filters, padding=1, groups=CHANNELS)[..., :TOKENS].transpose(1, 2)


Operation = Callable[[Network, Tensor, Tensor, int], Tensor]

OPERATIONS: dict[str, Operation] = {
    # norms
    "norm": lambda net, x, y, n: _pick(net.gains, n) * _normalised(x),
    "offset_norm": lambda net, x, y, n: _normalised(x) * (1.0 + _pick(net.gains, n)),
    "rms_norm": lambda net, x, y, n: F.rms_norm(x, (CHANNELS,), _pick(net.gains, n), EPS),
    "layer_norm": lambda net, x, y, n: F.layer_norm(x, (CHANNELS,), _pick(net.gains, n), None, EPS),
    "head_norm": lambda net, x, y, n: (_normalised(_heads(x)) * _pick(net.head_gains, n)).flatten(2),
    "gated_norm": lambda net, x, y, n: _normalised(x) * _pick(net.gains, n) * F.silu(y),
    "norm_in_place": _in_place,
    # weights
    "linear": lambda net, x, y, n: F.linear(x, _pick(net.weights, n)),
    "linear_transposed": lambda net, x, y, n: x @ _pick(net.weights, n),
    "linear_bias": lambda net, x, y, n: F.linear(x, _pick(net.weights, n), net.bias),
    "linear_scaled": lambda net, x, y, n: F.linear(x, _pick(net.weights, n) * 0.5),
    "linear_of_two": lambda net, x, y, n: F.linear(torch.cat((x, y), dim=-1), net.wide),
    "linear_of_half": lambda net, x, y, n: F.linear(x[..., :HEAD_SIZE], _pick(net.weights, n)[:, :HEAD_SIZE]),
    "head_linear": _head_linear,
    "gated": _gated,
    "convolution": _convolution,
    "output": lambda net, x, y, n: F.linear(x, net.output)[..., :CHANNELS],
    # movement
    "swap_halves": lambda net, x, y, n: torch.cat(x.split(HEAD_SIZE, dim=-1)[::-1], dim=-1),
    "interleave": lambda net, x, y, n: _heads(x).transpose(2, 3).reshape(x.shape),
    "reorder": lambda net, x, y, n: x[:, net.order],
    "flip": lambda net, x, y, n: x.flip(-1),
    "pad": lambda net, x, y, n: F.pad(x, (1, 0))[..., :CHANNELS],
    "stack": lambda net, x, y, n: torch.stack((x, y)).select(0, n % 2),
    "mask": lambda net, x, y, n: x.masked_fill(net.mask, 0.0),
    # arithmetic
    "add": lambda net, x, y, n: x + y,
    "subtract": lambda net, x, y, n: x - 0.37 * y,
    "multiply": lambda net, x, y, n: x * y,
    "scale": lambda net, x, y, n: x * y.mean(-1, keepdim=True),
    "divide": lambda net, x, y, n: x / (1.0 + y.square().sum(-1, keepdim=True)),
    "negate": lambda net, x, y, n: -2.7 * x,
    "shift": lambda net, x, y, n: x + 1.0,
    "double_half": _in_place_half,
    "mean_over_tokens": lambda net, x, y, n: x.mean(1, keepdim=True).expand_as(x),
    "silu": lambda net, x, y, n: F.silu(x),
    "relu": lambda net, x, y, n: F.relu(x),
    "rotate": lambda net, x, y, n: x * net.angles.cos() + _rotated(x) * net.angles.sin(),
    "attention": _attention,
}

_BINARY = {
    "gated_norm",
    "linear_of_two",
    "stack",
    "add",
    "subtract",
    "multiply",
    "scale",
    "divide",
    "attention",
}
