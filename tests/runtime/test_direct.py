"""A packed linear's direct call against the operators: the same bits, and never taken where torch has to see them."""

import threading
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

from lowbit.errors import KernelError
from lowbit.formats import Format, quantize
from lowbit.runtime import PackedLinear, kernels, ops, prepare
from tests.runtime.test_layers import with_outliers

OPERATORS = ("linear_float", "linear_int8", "sparse_add")


class Seen(TorchDispatchMode):
    """Notes the names of lowbit's operators; being there, it also sends every call through them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names += [func.__name__.split(".")[0]] if func.namespace == "lowbit" else []
        return func(*args, **(kwargs or {}))


def layer(fmt: str, activations: str, bias: bool = True, outliers: bool = False, out: int = 20) -> PackedLinear:
    w = torch.randn(out, 96)
    qt = quantize(w, Format.parse(fmt))
    return PackedLinear.from_quantized(
        with_outliers(qt, w) if outliers else qt, torch.randn(out) if bias else None, activations
    )


def seen(f: Any, *args: Any) -> tuple[Tensor, list[str]]:
    with Seen() as mode:
        return f(*args), mode.names


@pytest.fixture
def no_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on an operator that runs is an error."""

    def fail(*args: Any) -> Tensor:
        raise AssertionError("an operator ran")

    for name in OPERATORS:
        monkeypatch.setattr(ops, name, fail)


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from(["uint2-g16", "uint4-g32", "ternary-channel", "nf4-g16", "int8-g96", "kmeans3-channel"]),
    st.sampled_from(["float", "int8"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from([(96,), (1, 96), (0, 96), (5, 96), (2, 3, 96), (40, 96), (1, 1, 1, 96), (2, 0, 96)]),
    st.integers(1, 40),
)
def test_both_ways_give_the_same_bits(
    fmt: str, activations: str, bias: bool, outliers: bool, shape: tuple[int, ...], out: int
) -> None:
    torch.manual_seed(out)
    made, x = layer(fmt, activations, bias, outliers, out), torch.randn(shape)
    want, names = seen(made, x)
    assert names[0] == f"linear_{activations}"
    y = made(x)
    assert made._direct is not None and y.shape == want.shape and y.dtype == want.dtype and torch.equal(y, want)


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_plain_calls_run_no_operator(activations: str, no_operators: None) -> None:
    for outliers in (False, True):
        made = layer("uint2-g16", activations, outliers=outliers)
        for x in (torch.randn(3, 96), torch.randn(96), torch.randn(1, 2, 96)):
            made(x)
            with torch.inference_mode():
                made(x)
        with torch.no_grad():
            made(torch.randn(2, 96, requires_grad=True))


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_what_changes_in_a_layer_is_seen(activations: str) -> None:
    a, b, x = layer("uint4-g16", activations), layer("uint4-g16", activations), torch.randn(3, 96)
    want = b(x)
    a(x)
    for key in ("codes", "scale", "zero"):
        setattr(a, key, getattr(b, key).clone())
    assert torch.equal(a(x) - a.bias, want - b.bias) or torch.allclose(a(x) - a.bias, want - b.bias, atol=1e-6)
    a.bias = nn.Parameter(b.bias.detach().clone(), requires_grad=False)
    assert torch.equal(a(x), want), "a new bias"
    with torch.no_grad():
        a.bias += 1
    assert torch.equal(a(x), seen(a, x)[0]) and not torch.equal(a(x), want), "in place"
    a.bias.data = b.bias.detach().clone()
    assert torch.equal(a(x), want), "the same parameter, other memory"
    a.bias = None
    assert torch.equal(a(x), seen(a, x)[0])
    a.load_state_dict(layer("uint4-g16", activations, bias=False).state_dict())
    assert torch.equal(a(x), seen(a, x)[0]), "loaded in place"
    a.activations = "int8" if activations == "float" else "float"
    assert seen(a, x)[1] == [f"linear_{a.activations}"] and torch.equal(a(x), seen(a, x)[0])
    a.to(torch.float64).register_buffer("other", torch.zeros(1))
    assert torch.equal(a(x), seen(a, x)[0])


def test_a_bias_that_learns_gets_its_gradient() -> None:
    made, x = layer("uint4-g16", "float"), torch.randn(3, 96)
    made(x)
    made.bias.requires_grad_()
    made(x).sum().backward()
    assert torch.equal(made.bias.grad, torch.full((20,), 3.0))
    made.bias.requires_grad_(False)
    x.requires_grad_()
    made(x).sum().backward()
    assert x.grad is not None and torch.allclose(x.grad[0], made.dequantize().sum(0), atol=1e-4)


def test_functorch_is_never_dropped() -> None:
    made, x = layer("uint4-g16", "float", bias=False), torch.randn(3, 96)
    made(x)
    with pytest.raises(RuntimeError, match="functorch transforms"):  # torch's word on operators like these
        torch.func.grad(lambda v: made(v).sum())(x)


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_sees_the_operators() -> None:
    from torch.fx.experimental.proxy_tensor import make_fx

    for activations in ("float", "int8"):
        made, x = layer("uint4-g16", activations), torch.randn(3, 96)
        y = made(x)
        traced = make_fx(made)(x)
        assert f"lowbit.linear_{activations}" in traced.code and torch.equal(traced(x), y)
        with torch.no_grad():
            assert "lowbit::linear" in str(torch.jit.trace(made, (x,)).inlined_graph)


def test_other_tensors_go_the_long_way_and_agree() -> None:
    class Sub(Tensor):
        pass

    for activations in ("float", "int8"):
        made, x = layer("uint4-g16", activations), torch.randn(4, 96)
        want = made(x)
        assert type(made(x.as_subclass(Sub))) is Sub and torch.equal(made(x.as_subclass(Sub)).as_subclass(Tensor), want)
        assert torch.equal(made(x.T.contiguous().T), want), "strides"
        assert torch.equal(made(torch._neg_view(-x)), want), "memory that holds the negative"
        assert torch.equal(made(x.double()).float(), want) and made(x.bfloat16()).dtype == torch.bfloat16
        try:
            torch.set_default_dtype(torch.float64)
            with torch.device("meta"):
                assert torch.equal(made(x), want)
        finally:
            torch.set_default_dtype(torch.float32)


def test_the_row_and_the_threads_asked_for_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOWBIT_ISA", raising=False)  # the slow tests run with it
    made, x, threads = layer("uint4-g16", "int8", out=300), torch.randn(40, 96), torch.get_num_threads()
    want = made(x)
    first = made._direct
    made(x)
    assert made._direct is first, "kept from call to call"
    monkeypatch.setenv("LOWBIT_ISA", "scalar")
    assert torch.equal(made(x), want) and made._direct is not first
    monkeypatch.setenv("LOWBIT_ISA", "sse9")
    with pytest.raises(KernelError, match="LOWBIT_ISA=sse9"):
        made(x)
    monkeypatch.delenv("LOWBIT_ISA")
    try:
        torch.set_num_threads(threads + 1)
        assert torch.equal(made(x), want)
    finally:
        torch.set_num_threads(threads)


def test_calls_from_several_threads() -> None:
    made, x = layer("uint2-g16", "int8", outliers=True), [torch.randn(n, 96) for n in (1, 3, 9, 30)]
    want, wrong = [made(v) for v in x], []

    def work(i: int) -> None:
        wrong.extend(i for _ in range(200) if not torch.equal(made(x[i]), want[i]))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


def test_a_network_of_unprepared_layers_compiles_no_direct_call() -> None:
    made = layer("uint4-g16", "int8")
    prepare(made)
    y = torch.compile(made, fullgraph=True, backend="eager")(torch.ones(2, 96))
    assert made._direct is None and torch.equal(made(torch.ones(2, 96)), y)


def test_kernels_of_another_version_say_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "ABI", kernels.ABI + 1)
    kernels._extension.cache_clear()
    try:
        with pytest.raises(KernelError, match="make build in a checkout, else pip install --force-reinstall lowbit"):
            kernels._extension()
    finally:
        monkeypatch.undo()
        kernels._extension.cache_clear()
        kernels._extension()


@pytest.mark.parametrize("activations", ["int8", "float"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script`")  # torch's own rules for jvp
def test_forward_mode_is_refused_where_it_would_be_zero(activations: str) -> None:
    packed = layer("uint4-g32", activations)
    x = torch.randn(2, 96)
    with pytest.raises(KernelError, match=r"vjp"):
        torch.func.jvp(packed, (x,), (x,))
    with forward_ad.dual_level():
        with pytest.raises(KernelError, match=r"vjp"):
            packed(forward_ad.make_dual(x, x))
        assert torch.equal(packed(x), packed(x.clone()))  # no dual tensor: as ever
