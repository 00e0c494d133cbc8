"""What `compat/torch.py` asks of the PyTorch that is installed. A failure says what changed, and what that means."""

import copy
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

import tiny
from flashnorm.compat import torch as compat
from flashnorm.trace import rules

aten = torch.ops.aten


class Seen(compat.TorchDispatchMode):
    """Every operator that ran, with its arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls.append((func, args))
        return func(*args, **(kwargs or {}))

    @property
    def packets(self) -> list[Any]:
        return [func.overloadpacket for func, _ in self.calls]


X = torch.ones(2, 4, device="meta")
WEIGHT = torch.ones(3, 4, device="meta")
# Code of a model -> the operators that a dispatch mode must see of it, in this order.
DISPATCHED = {
    "linear": (lambda: F.linear(X, WEIGHT), [aten.t, aten.mm]),
    "linear with a bias": (lambda: F.linear(X, WEIGHT, torch.ones(3, device="meta")), [aten.t, aten.addmm]),
    "cast": (lambda: X.to(torch.bfloat16), [aten._to_copy]),
    "RMSNorm": (lambda: X * torch.rsqrt(X.pow(2).mean(-1, keepdim=True)), [aten.pow, aten.mean, aten.rsqrt, aten.mul]),
    "rms_norm": (lambda: F.rms_norm(X, (4,), X[0]), [aten.pow, aten.mean, aten.rsqrt, aten.mul]),
    "layer_norm": (lambda: F.layer_norm(X, (4,), X[0]), [aten.native_layer_norm]),
    "equality": (lambda: torch.equal(torch.ones(1), torch.ones(1)), [aten.equal]),
    "item": (lambda: torch.ones(1).item(), [aten._local_scalar_dense]),
}


@pytest.mark.parametrize("code", DISPATCHED)
def test_operators(code: str) -> None:
    run, expected = DISPATCHED[code]
    with torch.no_grad(), Seen() as seen:
        run()
    missing = [packet for packet in expected if packet not in seen.packets]
    assert not missing, (
        f"PyTorch runs {code} as {seen.packets}, without {missing}: the tracer has no rule for what took its place, "
        "so norms that could fold would be kept; trace/rules/ needs a line"
    )


def test_operators_with_rules() -> None:
    """Every operator in the table is one that this PyTorch has; `aten` makes no names up."""
    found = [packet for packet in (*rules.RULES, *rules.ANSWERS) if isinstance(packet, torch._ops.OpOverloadPacket)]
    assert len(found) == len(rules.RULES) + len(rules.ANSWERS), "torch.ops.aten.x is no OpOverloadPacket any more"
    assert not hasattr(aten, "no_such_operator"), "aten has any name: operators that are gone would not be noticed"


def test_schemas() -> None:
    x = torch.ones(2)
    with Seen() as seen:
        x.add_(1)
        x + 1
    (add_, args), (add, others) = seen.calls
    sentence = "operators do not say any more what they write into: writes into shared memory would not be seen"
    assert compat.is_mutable(add_), sentence
    assert not compat.is_mutable(add), sentence
    (target,) = compat.written(add_, args)
    assert target is x, sentence
    assert compat.written(add, others) == [], sentence


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_memory(device: str) -> None:
    a, b = torch.ones(4, device=device), torch.ones(4, device=device)
    sentence = "a storage's address does not tell any more who shares memory: the tracer would take views for copies"
    assert compat.memory_of(a) == compat.memory_of(a[1:].view(3, 1)) == compat.memory_of(a.detach()), sentence
    assert compat.memory_of(a) != compat.memory_of(b), sentence


def test_without_modes() -> None:
    with Seen() as seen, compat.without_modes():
        torch.ones(2) + 1
    assert not seen.calls, "a dispatch mode sees what runs in `_disable_current_modes`: numbers would be traced"


def test_function_mode() -> None:
    class Wide(compat.TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            return args[0].double() if func is torch.Tensor.float else func(*args, **(kwargs or {}))

    with Wide():
        assert torch.ones(1, dtype=torch.float16).float().dtype == torch.float64, (
            "a TorchFunctionMode does not see `Tensor.float` any more: the reference run would not be in float64"
        )


def test_trees() -> None:
    tree = {"a": (1, [2, None]), "b": 3}
    assert compat.tree_leaves(tree) == [1, 2, None, 3], "tree_leaves has another order: results would be mixed up"
    assert compat.tree_map(str, tree) == {"a": ("1", ["2", "None"]), "b": "3"}, "tree_map changes the nest"


def test_what_an_operator_takes() -> None:
    """In what operators take and return, `flat` and `map_flat` find all that PyTorch's own functions find."""

    class Compared(compat.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            out = func(*args, **(kwargs or {}))
            for nest in ((args, kwargs or {}), out):
                assert [*map(id, compat.flat(nest))] == [*map(id, compat.tree_leaves(nest))], f"{func} nests otherwise"
                assert compat.tree_leaves(compat.map_flat(id, nest)) == compat.tree_leaves(compat.tree_map(id, nest))
            self.seen += 1
            return out

    with Compared() as compared:
        torch.cat([part * 2 for part in torch.ones(4, 6).split([2, 4], dim=1)], 1)[:, torch.tensor([0, 1])].topk(2)
        nn.LayerNorm((6,))(torch.ones(2, 6).std(dim=(0, 1)) + torch.ones(2, 6))
        tiny.model(tiny.config("llama"))(tiny.ids())
    assert compared.seen > 200


@pytest.fixture
def three_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("three_threads")
def test_a_thread_that_computes_alone() -> None:
    def number_of_new_thread() -> int:
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(torch.get_num_threads).result()

    def alone() -> tuple[int, int]:
        compat.compute_alone()
        return torch.get_num_threads(), number_of_new_thread()

    with ThreadPoolExecutor(1) as older, ThreadPoolExecutor(1) as pool:
        assert older.submit(torch.get_num_threads).result() == 3
        mine, new = pool.submit(alone).result()
        assert mine == 1, "OpenMP's number is not PyTorch's any more: folding would disturb the hashing beside it"
        others = (new, older.submit(torch.get_num_threads).result(), torch.get_num_threads())
    assert others == (3, 3, 3), "the number of one thread is that of others: a user's program would be slowed down"


def test_reads_of_a_parameter_are_noted() -> None:
    norm, noted = nn.RMSNorm(3), list[str]()
    compat.note_reads(norm, noted.append)
    assert [name for name, _ in norm.named_parameters()] == [*norm.state_dict()] == ["weight"]
    assert not noted
    norm(torch.ones(3))
    sentence = "a read of a parameter is not seen: code that reads a norm's dtype would find None where it is folded"
    assert noted == ["weight"], sentence
    assert copy.deepcopy(norm).weight is not norm.weight
    assert noted == ["weight", "weight"], sentence


def test_parameters_of_a_copy() -> None:
    norm = nn.LayerNorm(3)
    other = compat.with_parameters(norm, {"weight": None, "bias": nn.Parameter(torch.ones(3))})
    sentence = "a module's parameters are not in `_parameters` alone: norms would not be measured without theirs"
    assert norm.weight is not None, sentence
    assert other.weight is None, sentence
    assert torch.equal(other(torch.zeros(1, 3)), torch.ones(1, 3)), sentence


@pytest.mark.parametrize(
    "change", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks(change: str) -> None:
    norm = nn.LayerNorm(3)
    assert compat.calls_itself(norm)
    handle = getattr(norm, change)(lambda *anything: None)
    assert not compat.calls_itself(norm), f"{change} leaves no trace: a norm with a hook would be replaced, and lose it"
    handle.remove()
    assert compat.calls_itself(norm)
    norm.forward = norm.forward
    assert not compat.calls_itself(norm)


def test_buffers_that_no_checkpoint_stores_are_known() -> None:
    module = nn.Module()
    module.register_buffer("stored", torch.zeros(1))
    module.register_buffer("computed", torch.zeros(1), persistent=False)
    assert compat.unsaved_buffers(module) == {"computed"} == {"stored", "computed"} - module.state_dict().keys()
