"""tutelage.kernels: values and gradients against torch in float64, bits against themselves, every error."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from tutelage import _core, kernels

few = settings(max_examples=12)


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64).to(dtype)


def i32(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


# ---- references, in plain torch


def attention_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    group, scale = q.shape[1] // k.shape[1], scale or 1 / math.sqrt(q.shape[2])
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    outputs = []
    for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False):
        scores = torch.einsum("ihd,jhd->hij", q[a:b], k[a:b]) * scale
        i, j = torch.arange(b - a)[:, None], torch.arange(b - a)
        hidden = (j > i) & causal | (j <= i - (window or b - a))
        outputs.append(torch.einsum("hij,jhd->ihd", scores.masked_fill(hidden, -math.inf).softmax(-1), v[a:b]))
    return torch.cat(outputs)


def logprob_reference(x: Tensor, weight: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    logp = (x @ weight.T / temperature).log_softmax(-1)
    return logp.gather(1, targets.long()[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def rms_reference(x: Tensor, weight: Tensor) -> Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * weight


def rope_reference(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    (x1, x2), c, s = x.chunk(2, -1), cos[positions.long()][:, None], sin[positions.long()][:, None]
    return torch.cat([x1 * c - x2 * s, x2 * c + x1 * s], -1)


def sums_reference(x: Tensor, mask: Tensor, cu: Tensor) -> Tensor:
    x = torch.where(mask, x, 0)
    return torch.stack([x[a:b].sum() for a, b in zip(cu.tolist(), cu.tolist()[1:], strict=False)])


# ---- one table of cases: our function, the reference, the shapes of what is differentiated


class Case(NamedTuple):
    ours: Callable[..., Any]
    reference: Callable[..., Any]
    shapes: tuple[tuple[int, ...], ...]


CU = i32(0, 5, 5, 6, 19)
IDS = i32(3, 0, 3, 8, 3, 1)
TARGETS = i32(0, 276, 17, 255, 256)
POSITIONS = i32(0, 4, 2)
MASK = torch.arange(19) % 3 > 0


def attention_case(heads: int, kv_heads: int, d: int, **options: Any) -> Case:
    return Case(
        lambda q, k, v: kernels.flash_attention(q, k, v, CU, **options),
        lambda q, k, v: attention_reference(q, k, v, CU, **options),
        ((19, heads, d), (19, kv_heads, d), (19, kv_heads, d)),
    )


def logprob_case(temperature: float, budget: int) -> Case:
    return Case(
        lambda x, w: kernels.linear_logprob(x, w, TARGETS, temperature, budget),
        lambda x, w: logprob_reference(x, w, TARGETS, temperature),
        ((5, 3), (277, 3)),
    )


def rope_case() -> Case:
    angles = randn(5, 3)
    tables = [angles.cos(), angles.sin()]
    return Case(
        lambda x: kernels.rope(x, POSITIONS, *(t.to(x.dtype) for t in tables)),
        lambda x: rope_reference(x, POSITIONS, *tables),
        ((3, 2, 6),),
    )


CASES = {
    "matmul": Case(kernels.matmul, F.linear, ((5, 13), (21, 13), (21,))),
    "matmul, no bias": Case(kernels.matmul, F.linear, ((2, 3, 4), (5, 4))),
    "flash_attention": attention_case(3, 3, 8),
    "flash_attention, grouped": attention_case(4, 1, 24),
    "flash_attention, window": attention_case(2, 1, 8, window=3),
    "flash_attention, not causal": attention_case(2, 2, 8, causal=False),
    "flash_attention, scale": attention_case(1, 1, 16, scale=0.7),
    "linear_logprob, kept": logprob_case(0.7, kernels.LOGITS_BUDGET),
    "linear_logprob, recomputed": logprob_case(1.0, 0),
    "rms_norm": Case(kernels.rms_norm, rms_reference, ((2, 3, 21), (21,))),
    "rms_norm, residual": Case(
        lambda x, w, r: kernels.rms_norm(x, w, residual=r),
        lambda x, w, r: (rms_reference(x + r, w), x + r),
        ((3, 21), (21,), (3, 21)),
    ),
    "layer_norm": Case(kernels.layer_norm, lambda x, w, b: F.layer_norm(x, (21,), w, b), ((3, 21), (21,), (21,))),
    "layer_norm, residual": Case(
        lambda x, w, b, r: kernels.layer_norm(x, w, b, residual=r),
        lambda x, w, b, r: (F.layer_norm(x + r, (21,), w, b), x + r),
        ((2, 2, 21), (21,), (21,), (2, 2, 21)),
    ),
    "rope": rope_case(),
    "swiglu": Case(kernels.swiglu, lambda gate, up: F.silu(gate) * up, ((3, 21), (3, 21))),
    "gelu": Case(kernels.gelu, lambda x: F.gelu(x, approximate="tanh"), ((3, 21),)),
    "gelu, erf": Case(lambda x: kernels.gelu(x, "none"), F.gelu, ((3, 21),)),
    "embedding": Case(lambda t: kernels.embedding(IDS, t), lambda t: t[IDS.long()], ((9, 21),)),
    "total": Case(kernels.total, torch.sum, ((3, 7),)),
    "total, mask": Case(lambda x: kernels.total(x, MASK), lambda x: x[MASK].sum(), ((19,),)),
    "total, sequences": Case(lambda x: kernels.total(x, MASK, CU), lambda x: sums_reference(x, MASK, CU), ((19,),)),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())


def as_tuple(outputs: Any) -> tuple[Tensor, ...]:
    return (outputs,) if isinstance(outputs, Tensor) else tuple(outputs)


def inputs_of(case: Case, dtype: torch.dtype) -> list[Tensor]:
    return [randn(*shape, seed=i, dtype=dtype).requires_grad_() for i, shape in enumerate(case.shapes)]


def outputs_and_gradients(function: Callable[..., Any], inputs: list[Tensor]) -> list[Tensor]:
    """What the function gives, and the gradients under a fixed cotangent."""
    outputs = as_tuple(function(*inputs))
    cotangents = [randn(*y.shape, 1, seed=9)[..., 0].to(y.dtype) for y in outputs]
    gradients = torch.autograd.grad(outputs, inputs, cotangents)
    return [*(y.detach() for y in outputs), *gradients]


def assert_close(ours: list[Tensor], reference: list[Tensor]) -> None:
    assert len(ours) == len(reference)
    for a, b in zip(ours, reference, strict=True):
        assert a.shape == b.shape
        tolerance = (1e-5 if a.dtype == torch.float32 else 1e-12) * max(1.0, float(b.abs().max()) if b.numel() else 0.0)
        assert (a.double() - b.double()).abs().le(tolerance).all()  # NaN fails too


def bits(tensors: list[Tensor]) -> list[bytes]:
    return [t.contiguous().numpy().tobytes() for t in tensors]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the tests of threads set more
    yield
    torch.set_num_threads(before)


# ---- values and gradients


@every_case
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_agrees_with_torch_in_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = inputs_of(case, dtype)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(outputs_and_gradients(case.ours, inputs), outputs_and_gradients(case.reference, exact))


@every_case
def test_gradcheck(case: Case) -> None:
    inputs = inputs_of(case, torch.float64)
    assert torch.autograd.gradcheck(case.ours, inputs, eps=1e-6, atol=1e-7, rtol=1e-5, fast_mode=True)


@few
@given(
    m=st.sampled_from([1, 17, 97]),
    n=st.integers(1, 70),
    k=st.sampled_from([1, 4, 33, 390]),
    bias=st.booleans(),
)
def test_matmul_of_any_size(m: int, n: int, k: int, bias: bool) -> None:
    inputs = [randn(m, k, dtype=torch.float32), randn(n, k, seed=1, dtype=torch.float32)]
    inputs = [x.requires_grad_() for x in [*inputs, randn(n, seed=2, dtype=torch.float32)][: 3 if bias else 2]]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    assert_close(outputs_and_gradients(kernels.matmul, inputs), outputs_and_gradients(F.linear, exact))


@few
@given(
    lengths=st.lists(st.sampled_from([0, 1, 17, 49, 130]), min_size=1, max_size=4).filter(any),
    kv_heads=st.sampled_from([1, 3]),
    group=st.sampled_from([1, 2]),
    d=st.sampled_from([8, 24, 40, 64, 128]),
    window=st.sampled_from([None, 1, 5, 128]),
    threads=st.sampled_from([1, 2]),
)
def test_attention_of_any_size(lengths: list[int], kv_heads: int, group: int, d: int, window: int | None, threads: int) -> None:
    torch.set_num_threads(threads)
    cu = torch.tensor([0, *lengths]).cumsum(0).int()
    n = int(cu[-1])
    shapes = [(n, kv_heads * group, d), (n, kv_heads, d), (n, kv_heads, d)]
    inputs = [randn(*shape, seed=i, dtype=torch.float32).requires_grad_() for i, shape in enumerate(shapes)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    ours = outputs_and_gradients(lambda q, k, v: kernels.flash_attention(q, k, v, cu, window=window), inputs)
    assert_close(ours, outputs_and_gradients(lambda q, k, v: attention_reference(q, k, v, cu, window=window), exact))


@few
@given(
    rows=st.sampled_from([1, 7, 50]),
    hidden=st.sampled_from([1, 24, 65]),
    vocab=st.sampled_from([1, 2, 16, 255, 257, 977]),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    budget=st.sampled_from([0, kernels.LOGITS_BUDGET]),
)
def test_linear_logprob_of_any_size(rows: int, hidden: int, vocab: int, temperature: float, budget: int) -> None:
    x, w = (
        randn(rows, hidden, dtype=torch.float32),
        randn(vocab, hidden, seed=1, dtype=torch.float32) / hidden**0.5,
    )
    targets = (torch.arange(rows) * 31 % vocab).int()
    exact = [t.double().requires_grad_() for t in (x, w)]
    ours = outputs_and_gradients(
        lambda a, b: kernels.linear_logprob(a, b, targets, temperature, budget),
        [x.requires_grad_(), w.requires_grad_()],
    )
    assert_close(ours, outputs_and_gradients(lambda a, b: logprob_reference(a, b, targets, temperature), exact))


@few
@given(rows=st.sampled_from([1, 17]), d=st.integers(1, 140))
def test_row_operations_of_any_width(rows: int, d: int) -> None:
    for name, reference in (
        (kernels.rms_norm, rms_reference),
        (lambda x, w: kernels.layer_norm(x, w, w), lambda x, w: F.layer_norm(x, (d,), w, w)),
        (lambda x, w: kernels.swiglu(x, w.expand(rows, d)), lambda x, w: F.silu(x) * w),
        (lambda x, w: kernels.gelu(x * w), lambda x, w: F.gelu(x * w, approximate="tanh")),
        (lambda x, w: kernels.total(x * w), lambda x, w: (x * w).sum()),
    ):
        # far from a constant row: there 1 / sqrt(variance) makes float32 a poor judge
        inputs = [
            randn(rows, d, dtype=torch.float32) + torch.arange(d) % 2 * 4,
            randn(d, seed=1, dtype=torch.float32),
        ]
        exact = [x.double().requires_grad_() for x in inputs]
        ours = outputs_and_gradients(name, [x.requires_grad_() for x in inputs])
        if d > 1:
            assert_close(ours, outputs_and_gradients(reference, exact))


def test_large_logits_stay_finite() -> None:
    x, w = torch.full((2, 1), 1e4), torch.tensor([[1.0], [-1.0], [0.5]])
    logprobs, entropy = kernels.linear_logprob(x, w, i32(0, 1), temperature=0.5)
    assert logprobs.tolist() == [0.0, -40000.0] and entropy.tolist() == [0.0, 0.0]


# ---- torch's own rules for an operation

OPS = torch.ops.tutelage
X, W, B = randn(3, 4).requires_grad_(), randn(5, 4).requires_grad_(), randn(5).requires_grad_()
D = randn(4).requires_grad_()
QKV = [randn(7, heads, 8, seed=heads).requires_grad_() for heads in (4, 2, 2)]
OP_SAMPLES: dict[str, tuple[Any, tuple[Any, ...]]] = {
    "matmul": (OPS.matmul, (X, W, B)),
    "matmul, strided": (OPS.matmul, (randn(4, 2, 3).permute(1, 2, 0).requires_grad_(), W, None)),
    "product": (OPS.product, (randn(4, 3), randn(4, 5), True)),
    "column_sum": (OPS.column_sum, (randn(3, 4),)),
    "flash_attention": (OPS.flash_attention, (*QKV, i32(0, 3, 7), True, 2, 0.3)),
    "linear_logprob, kept": (OPS.linear_logprob, (X, W, i32(0, 4, 2), 0.7, 10**6)),
    "linear_logprob, recomputed": (OPS.linear_logprob, (X, W, i32(0, 4, 2), 0.7, 0)),
    "rms_norm": (OPS.rms_norm, (X, D, None, 1e-5)),
    "rms_norm, residual": (OPS.rms_norm, (X, D, randn(3, 4, seed=2).requires_grad_(), 1e-5)),
    "layer_norm": (OPS.layer_norm, (X, D, D, None, 1e-5)),
    "layer_norm, residual": (OPS.layer_norm, (X, D, D, randn(3, 4, seed=2).requires_grad_(), 1e-5)),
    "rope": (OPS.rope, (QKV[0], torch.arange(7), randn(9, 4), randn(9, 4), False)),
    "swiglu": (OPS.swiglu, (X, randn(3, 4, seed=2).requires_grad_())),
    "gelu": (OPS.gelu, (X, False)),
    "embedding": (OPS.embedding, (torch.tensor([[1, 4], [4, 0]]), W)),
    "total": (OPS.total, (X, X.detach() > 0, None)),
    "total, sequences": (OPS.total, (B, None, i32(0, 2, 2, 5))),
}


@pytest.mark.parametrize(("op", "arguments"), OP_SAMPLES.values(), ids=OP_SAMPLES.keys())
def test_opcheck(op: Any, arguments: tuple[Any, ...]) -> None:
    torch.library.opcheck(op.default, arguments)


# ---- the same bits


def results_on(case: Case, threads: int) -> list[bytes]:
    torch.set_num_threads(threads)
    return bits(outputs_and_gradients(case.ours, inputs_of(case, torch.float32)))


@every_case
def test_any_number_of_threads_gives_the_same_bits(case: Case) -> None:
    alone = results_on(case, 1)
    for threads in (2, 3, 4):
        assert results_on(case, threads) == alone


@every_case
def test_scalar_level_gives_the_bits_of_the_active_one(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    run = kernels._run
    active = results_on(case, 2)
    monkeypatch.setattr(kernels, "_run", lambda *tensors, **options: run(*tensors, level="scalar", **options))
    assert results_on(case, 2) == active


def test_bits_are_told_apart() -> None:
    """The control of the two tests above: another order of the same sum does change bits."""
    x = randn(100_000, dtype=torch.float32)
    whole = kernels.total(x)
    assert bits([whole]) != bits([kernels.total(x[:50_001]) + kernels.total(x[50_001:])])
    assert whole.double() == pytest.approx(float(x.double().sum()), abs=1e-2)


def test_long_sums_and_attention_do_not_depend_on_threads() -> None:
    """Sizes at which work is really shared, and the backward of attention takes both of its ways."""
    x, cu = randn(50_000, dtype=torch.float32), i32(0, 700)
    q = randn(700, 2, 16, dtype=torch.float32)
    big = Case(
        lambda x, q: (kernels.total(x), kernels.flash_attention(q, q, q, cu)),
        torch.sum,
        ((50_000,), (700, 2, 16)),
    )
    assert x.numel() == big.shapes[0][0] and q.shape == big.shapes[1]
    alone = results_on(big, 1)
    for threads in (2, 3):
        assert results_on(big, threads) == alone


def test_a_sequence_packed_with_others_gives_its_bits_alone() -> None:
    q = randn(150, 2, 8, dtype=torch.float32)
    packed = kernels.flash_attention(q, q, q, i32(0, 13, 143, 150))
    for a, b in ((0, 13), (13, 143), (143, 150)):
        alone = kernels.flash_attention(q[a:b], q[a:b], q[a:b], i32(0, b - a))
        assert bits([packed[a:b]]) == bits([alone])


def test_neighbours_full_of_nan_change_nothing() -> None:
    clean = [randn(150, 2, 8, seed=i, dtype=torch.float32) for i in range(3)]
    spoilt = [x.clone() for x in clean]
    for x in spoilt:
        x[:13] = x[143:] = math.nan
    one, other = (
        outputs_and_gradients(
            lambda q, k, v: kernels.flash_attention(q, k, v, i32(0, 13, 143, 150))[13:143],
            [x.requires_grad_() for x in inputs],
        )
        for inputs in (clean, spoilt)
    )
    assert bits([x[:130] if len(x) == 130 else x[13:143] for x in one]) == bits(
        [x[:130] if len(x) == 130 else x[13:143] for x in other]
    )
    spoilt[0] = clean[0].detach().clone()
    spoilt[0][20] = math.nan  # the control: its own NaN does arrive
    assert kernels.flash_attention(*(x.detach() for x in (spoilt[0], *clean[1:])), i32(0, 13, 143, 150))[20].isnan().all()


def test_total_ignores_nan_outside_its_mask() -> None:
    x = torch.tensor([1.0, math.nan, 2.0]).requires_grad_()
    total = kernels.total(x, torch.tensor([True, False, True]))
    total.backward()
    assert total.item() == 3.0 and x.grad is not None and x.grad.tolist() == [1.0, 0.0, 1.0]
    assert kernels.total(x).isnan()


def test_kept_and_recomputed_logits_give_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(budget: int) -> list[bytes]:
        inputs = [randn(50, 24, dtype=torch.float32), randn(300, 24, seed=1, dtype=torch.float32)]
        targets = torch.arange(50).int()
        return bits(
            outputs_and_gradients(
                lambda x, w: kernels.linear_logprob(x, w, targets, 0.7, budget),
                [x.requires_grad_() for x in inputs],
            )
        )

    kept = run(kernels.LOGITS_BUDGET)
    assert run(0) == kept
    for rows in (1, 7, 49):  # blocks of so many rows, kept or computed again
        monkeypatch.setattr(kernels, "_LOGITS_BLOCK", rows * 300 * 4)
        assert run(0) == kept and run(50 * 300 * 4) == kept


def test_logits_are_kept_up_to_the_budget_and_only_for_a_backward_pass() -> None:
    x, w = randn(5, 3).requires_grad_(), randn(9, 3)

    def saved(budget: int) -> set[tuple[int, ...]]:
        shapes: set[tuple[int, ...]] = set()

        def pack(t: Tensor) -> Tensor:
            shapes.add(tuple(t.shape))
            return t

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            kernels.linear_logprob(x, w, i32(0, 1, 2, 3, 4), logits_budget=budget)
        return shapes

    assert (5, 9) in saved(5 * 9 * 8)
    assert (5, 9) not in saved(5 * 9 * 8 - 1)
    with torch.no_grad():
        assert saved(10**6) == set()


def test_a_graph_can_be_gone_through_twice() -> None:
    x, w = randn(5, 3).requires_grad_(), randn(9, 3).requires_grad_()
    logprobs, _ = kernels.linear_logprob(x, w, i32(0, 1, 2, 3, 4))
    first = torch.autograd.grad(logprobs.sum(), (x, w), retain_graph=True)
    assert bits(list(torch.autograd.grad(logprobs.sum(), (x, w)))) == bits(list(first))


def test_frozen_inputs_get_no_gradient() -> None:
    x, w = randn(5, 3).requires_grad_(), randn(9, 3)
    logprobs, entropy = kernels.linear_logprob(x, w, i32(0, 1, 2, 3, 4))
    (logprobs.sum() + entropy.sum() + kernels.matmul(x, w).sum()).backward()
    assert x.grad is not None and w.grad is None


# ---- strides, dtypes of integers, nothing at all


def test_any_strides_give_the_bits_of_contiguous_tensors() -> None:
    x, w = randn(4, 6, dtype=torch.float32), randn(6, 6, seed=1, dtype=torch.float32)
    q = randn(2, 9, 8, dtype=torch.float32).transpose(0, 1)
    pairs = [
        (kernels.matmul(x.T, w.T[:, :4]), kernels.matmul(x.T.contiguous(), w.T[:, :4].contiguous())),
        (kernels.gelu(x.T), kernels.gelu(x.T.contiguous())),
        (
            kernels.rms_norm(x[:, ::2], w[0, ::2]),
            kernels.rms_norm(x[:, ::2].contiguous(), w[0, ::2].contiguous()),
        ),
        (
            kernels.flash_attention(q, q, q, i32(0, 9)),
            kernels.flash_attention(*[q.contiguous()] * 3, i32(0, 9)),
        ),
        (kernels.total(x.T), kernels.total(x.T.contiguous())),
    ]
    for strided, contiguous in pairs:
        assert bits([strided]) == bits([contiguous])


def test_integers_may_be_int64() -> None:
    table, q = randn(9, 4), randn(3, 2, 8)
    assert torch.equal(kernels.embedding(IDS.long(), table), kernels.embedding(IDS, table))
    assert torch.equal(kernels.flash_attention(q, q, q, torch.tensor([0, 3])), kernels.flash_attention(q, q, q, i32(0, 3)))


@pytest.mark.parametrize(
    ("function", "shapes"),
    [
        (kernels.matmul, ((0, 4), (5, 4), (5,))),
        (lambda q: kernels.flash_attention(q, q, q, i32(0, 0)), ((0, 2, 8),)),
        (lambda x, w: kernels.linear_logprob(x, w, i32()), ((0, 4), (5, 4))),
        (kernels.rms_norm, ((0, 4), (4,))),
        (kernels.layer_norm, ((0, 4), (4,), (4,))),
        (lambda x: kernels.rope(x, i32(), randn(3, 2), randn(3, 2)), ((0, 2, 4),)),
        (kernels.swiglu, ((0, 4), (0, 4))),
        (kernels.gelu, ((0,),)),
        (lambda t: kernels.embedding(i32(), t), ((5, 4),)),
        (kernels.total, ((0,),)),
        (lambda x: kernels.total(x, None, i32(0, 0, 0)), ((0,),)),
    ],
)
def test_no_tokens(function: Callable[..., Any], shapes: tuple[tuple[int, ...], ...]) -> None:
    inputs = [randn(*shape).requires_grad_() for shape in shapes]
    for x in outputs_and_gradients(function, inputs):
        assert not x.any()  # empty, or zero


# ---- errors


def f32(*shape: int) -> Tensor:
    return torch.zeros(shape)


ERRORS: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype of the first": (
        lambda: kernels.matmul(f32(2, 4).bfloat16(), f32(3, 4)),
        "argument 'x' must be float32 or float64, but it is bfloat16 [2, 4] on the CPU",
    ),
    "dtypes that differ": (
        lambda: kernels.matmul(f32(2, 4), f32(3, 4).double()),
        "argument 'weight' must be float32, but it is float64 [3, 4] on the CPU",
    ),
    "matmul: weight": (
        lambda: kernels.matmul(f32(2, 4), f32(3, 5)),
        "argument 'weight' must have shape [3, 4], but it is float32 [3, 5] on the CPU",
    ),
    "matmul: bias": (
        lambda: kernels.matmul(f32(2, 4), f32(3, 4), f32(2)),
        "argument 'bias' must have shape [3], but it is float32 [2] on the CPU",
    ),
    "matmul: nothing to multiply": (
        lambda: kernels.matmul(f32(2, 0), f32(3, 0)),
        "matmul needs an inner dimension of at least 1, but argument 'x' is float32 [2, 0] on the CPU",
    ),
    "matmul: a single number": (
        lambda: kernels.matmul(torch.tensor(1.0), f32(3, 4)),
        "argument 'x' must have at least one axis, but it is a single number",
    ),
    "attention: rank": (
        lambda: kernels.flash_attention(f32(4, 8), f32(4, 8), f32(4, 8), i32(0, 4)),
        "argument 'q' must have shape [any, any, any], but it is float32 [4, 8] on the CPU",
    ),
    "attention: v": (
        lambda: kernels.flash_attention(f32(4, 2, 8), f32(4, 2, 8), f32(4, 1, 8), i32(0, 4)),
        "argument 'v' must have shape [4, 2, 8], but it is float32 [4, 1, 8] on the CPU",
    ),
    "attention: head dimension": (
        lambda: kernels.flash_attention(f32(4, 2, 12), f32(4, 2, 12), f32(4, 2, 12), i32(0, 4)),
        "the head dimension must be a multiple of 8, but argument 'q' is float32 [4, 2, 12] on the CPU",
    ),
    "attention: heads": (
        lambda: kernels.flash_attention(f32(4, 3, 8), f32(4, 2, 8), f32(4, 2, 8), i32(0, 4)),
        "the number of query heads must be a multiple of the number of key heads, but there are 3 and 2",
    ),
    "attention: cu_seqlens starts late": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(1, 4)),
        "cu_seqlens must start at 0, but it starts at 1",
    ),
    "attention: cu_seqlens falls": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(0, 3, 2, 4)),
        "cu_seqlens must never fall, but entry 2 is 2 after 3",
    ),
    "attention: cu_seqlens ends early": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(0, 3)),
        "cu_seqlens must end at the number of tokens, 4, but it ends at 3",
    ),
    "attention: cu_seqlens empty": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32()),
        "argument 'cu_seqlens' must hold at least one entry, 0",
    ),
    "attention: cu_seqlens not integers": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, f32(2)),
        "argument 'cu_seqlens' must be int32, but it is float32 [2] on the CPU",
    ),
    "attention: window": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(0, 4), window=0),
        "window must be at least 1, or None, but it is 0",
    ),
    "attention: window without causal": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(0, 4), causal=False, window=2),
        "a window needs causal attention",
    ),
    "attention: scale": (
        lambda: kernels.flash_attention(*[f32(4, 2, 8)] * 3, i32(0, 4), scale=-1.0),
        "scale must be a positive number, but it is -1.000000",
    ),
    "linear_logprob: target": (
        lambda: kernels.linear_logprob(f32(2, 4), f32(5, 4), i32(0, 5)),
        "targets: token id 5 at position 1 of sequence 0 is outside the vocabulary of 5 ids (0 to 4)",
    ),
    "linear_logprob: number of targets": (
        lambda: kernels.linear_logprob(f32(2, 4), f32(5, 4), i32(0)),
        "argument 'targets' must have shape [2], but it is int32 [1] on the CPU",
    ),
    "linear_logprob: weight": (
        lambda: kernels.linear_logprob(f32(2, 4), f32(5, 3), i32(0, 1)),
        "argument 'weight' must have shape [any, 4], but it is float32 [5, 3] on the CPU",
    ),
    "linear_logprob: temperature": (
        lambda: kernels.linear_logprob(f32(2, 4), f32(5, 4), i32(0, 1), temperature=0.0),
        "temperature must be a positive number, but it is 0.000000",
    ),
    "rms_norm: weight": (
        lambda: kernels.rms_norm(f32(2, 4), f32(3)),
        "argument 'weight' must have shape [4], but it is float32 [3] on the CPU",
    ),
    "rms_norm: residual": (
        lambda: kernels.rms_norm(f32(2, 4), f32(4), residual=f32(3, 4)),
        "argument 'residual' must have shape [2, 4], but it is float32 [3, 4] on the CPU",
    ),
    "rms_norm: eps": (
        lambda: kernels.rms_norm(f32(2, 4), f32(4), eps=-1.0),
        "eps must be a number of at least 0, but it is -1.000000",
    ),
    "rms_norm: no columns": (
        lambda: kernels.rms_norm(f32(2, 0), f32(0)),
        "argument 'x' must have at least one column",
    ),
    "layer_norm: bias": (
        lambda: kernels.layer_norm(f32(2, 4), f32(4), f32(3)),
        "argument 'bias' must have shape [4], but it is float32 [3] on the CPU",
    ),
    "rope: odd": (
        lambda: kernels.rope(f32(1, 1, 3), i32(0), f32(2, 1), f32(2, 1)),
        "rope needs an even head dimension, but argument 'x' is float32 [1, 1, 3] on the CPU",
    ),
    "rope: tables": (
        lambda: kernels.rope(f32(1, 1, 4), i32(0), f32(2, 2), f32(3, 2)),
        "argument 'sin' must have shape [2, 2], but it is float32 [3, 2] on the CPU",
    ),
    "rope: position": (
        lambda: kernels.rope(f32(2, 1, 4), i32(0, 2), f32(2, 2), f32(2, 2)),
        "positions: position 2 of token 1 is outside the cos and sin tables of 2 rows",
    ),
    "rope: gradient of a table": (
        lambda: kernels.rope(f32(1, 1, 4), i32(0), f32(2, 2).requires_grad_(), f32(2, 2)),
        "cos and sin are tables without a gradient; pass them detached",
    ),
    "swiglu": (
        lambda: kernels.swiglu(f32(2, 4), f32(2, 5)),
        "argument 'up' must have shape [2, 4], but it is float32 [2, 5] on the CPU",
    ),
    "gelu": (
        lambda: kernels.gelu(f32(2), "erf"),  # type: ignore[arg-type]
        "approximate must be 'tanh' or 'none', but it is 'erf'",
    ),
    "embedding: id": (
        lambda: kernels.embedding(i32(0, -1), f32(5, 4)),
        "ids: token id -1 at position 1 of sequence 0 is outside the vocabulary of 5 ids (0 to 4)",
    ),
    "embedding: id beyond int32": (
        lambda: kernels.embedding(torch.tensor([0, 2**32]), f32(5, 4)),
        "argument 'ids' holds 4294967296, which no int32 can hold",
    ),
    "total: mask": (
        lambda: kernels.total(f32(3), torch.ones(4, dtype=torch.bool)),
        "argument 'mask' must have the shape of x, [3], but it has [4]",
    ),
    "total: mask of numbers": (
        lambda: kernels.total(f32(3), f32(3)),
        "argument 'mask' must be bool, but it is float32 [3] on the CPU",
    ),
    "total: cu_seqlens of a matrix": (
        lambda: kernels.total(f32(3, 2), None, i32(0, 6)),
        "argument 'x' must have one axis to go with cu_seqlens, but its shape is [3, 2]",
    ),
}


@pytest.mark.parametrize(("call", "message"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value) == message


# ---- what only the engine uses: fused epilogues, the optimizer


def test_fused_matmul_epilogues() -> None:
    a, b = randn(7, 13, dtype=torch.float32), randn(20, 13, seed=1, dtype=torch.float32)
    bias, residual = randn(20, seed=2, dtype=torch.float32), randn(7, 20, seed=3, dtype=torch.float32)

    def run(activation: str = "none", columns: int = 20, **options: Any) -> tuple[Tensor, Tensor]:
        c, activated = torch.empty(7, 20), torch.empty(7, columns)
        extra = {} if activation == "none" else {"activated": activated, "activation": activation}
        _core.matmul(a, b[: options.pop("rows", 20)], c, transpose_b=True, threads=2, **extra, **options)
        return c, activated

    plain = F.linear(a.double(), b.double())
    assert_close([run(bias=bias, residual=residual)[0]], [plain + bias + residual])
    assert_close(list(run("gelu", bias=bias)), [plain + bias, F.gelu(plain + bias, approximate="tanh")])
    assert_close(list(run("gelu_erf")), [plain, F.gelu(plain)])
    gate, up = (plain + bias).chunk(2, 1)
    assert_close(list(run("swiglu", 10, bias=bias)), [plain + bias, F.silu(gate) * up])

    pre = residual.double().requires_grad_()  # what the forward kept
    for activation, function in (("gelu_backward", "tanh"), ("gelu_erf_backward", "none")):
        value = F.gelu(pre, approximate=function)
        (d_pre,) = torch.autograd.grad(value, pre, plain)
        assert_close(list(run(activation, pre=residual)), [d_pre, value.detach()])
    value = F.silu(pre[:, :10]) * pre[:, 10:]
    (d_pre,) = torch.autograd.grad(value, pre, plain[:, :10])
    assert_close(list(run("swiglu_backward", 10, pre=residual, rows=10)), [d_pre, value.detach()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"activation": "relu"},
            "unknown activation 'relu'; it must be one of none, gelu, gelu_erf, swiglu, ",
        ),
        ({"activation": "gelu"}, "argument 'activated' goes with an activation, and only with one"),
        ({"activated": f32(2, 3)}, "argument 'activated' goes with an activation, and only with one"),
        ({"pre": f32(2, 3)}, "argument 'pre' goes with a backward activation, and only with one"),
        (
            {"activation": "gelu_backward", "activated": f32(2, 3), "pre": f32(2, 3), "bias": f32(3)},
            "activation 'gelu_backward' does not go with these of bias, residual and accumulate",
        ),
        ({"threads": 0}, "threads must be at least 1, but it is 0"),
        ({"level": "float64"}, "level 'float64' does not take float32 tensors"),
        ({"level": "sse"}, "unknown ISA level 'sse'; this build has "),
    ],
)
def test_errors_of_the_core(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        _core.matmul(f32(2, 4), f32(4, 3), f32(2, 3), **{"threads": 1, **options})
    assert str(caught.value).startswith(message)


def test_the_core_does_not_copy_what_is_not_contiguous() -> None:
    with pytest.raises(ValueError, match=r"^argument 'b' must be contiguous; call \.contiguous\(\) on it first$"):
        _core.matmul(f32(2, 4), f32(3, 4).T, f32(2, 3), threads=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_agrees_with_torch(dtype: torch.dtype) -> None:
    p = randn(1003, dtype=dtype)
    reference = torch.nn.Parameter(p.double())
    optimizer = torch.optim.AdamW([reference], lr=1e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
    for step in range(1, 4):
        g = randn(1003, seed=step, dtype=dtype)
        reference.grad = g.double() * 0.5
        optimizer.step()
        options = {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1, "grad_scale": 0.5}
        _core.adamw(p, g, exp_avg, exp_avg_sq, step=step, threads=2, **options)
    assert_close([p], [reference.detach()])
    with pytest.raises(ValueError, match=r"^step counts from 1, but it is 0$"):
        _core.adamw(p, g, exp_avg, exp_avg_sq, step=0, threads=2, **options)
    with pytest.raises(ValueError, match=r"^betas must be at least 0 and below 1, but they are 1\.0+ and 0\.95"):
        _core.adamw(p, g, exp_avg, exp_avg_sq, step=1, threads=2, **{**options, "betas": (1.0, 0.95)})


def test_sum_of_squares_is_added_in_double() -> None:
    x = randn(9001, dtype=torch.float32)
    assert _core.sum_of_squares(x, threads=2) == _core.sum_of_squares(x, threads=1)
    assert _core.sum_of_squares(x, threads=2) == pytest.approx(float(x.double().square().sum()), rel=1e-6)
