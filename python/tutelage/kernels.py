"""The compiled kernels as differentiable torch operations, for anyone's own model.

Every function takes float32 or float64 tensors on the CPU (all of one dtype, any strides), runs on
``torch.get_num_threads()`` threads and gives the same bits for any number of them. float32 runs the best ISA
level of this CPU; float64 is there to check gradients with. Integer arguments (ids, targets, positions,
cu_seqlens) are int32; int64 is converted. The operations are registered with ``torch.library`` as
``torch.ops.tutelage.*``; their backward passes are kernels too and cannot be differentiated again.

Errors are ``ValueError`` and name the argument. The formulas and summation orders: cpp/kernels/<name>.h.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.library import custom_op

from tutelage import _core

LOGITS_BUDGET = 256 * 2**20  # bytes of logits that linear_logprob keeps for its backward pass
_LOGITS_BLOCK = 64 * 2**20  # bytes of logits in work at a time in that pass: rows enough for a fast product

__all__ = [
    "LOGITS_BUDGET",
    "embedding",
    "flash_attention",
    "gelu",
    "layer_norm",
    "linear_logprob",
    "matmul",
    "rms_norm",
    "rope",
    "swiglu",
    "total",
]


def _dense(x: Tensor) -> Tensor:
    """What the core reads: contiguous, outside autograd."""
    return x.detach().contiguous()


def _rows(x: Tensor, name: str) -> Tensor:
    """``x`` [..., d] as contiguous rows [n, d]."""
    if x.dim() == 0:
        raise ValueError(f"argument '{name}' must have at least one axis, but it is a single number")
    return _dense(x).view(math.prod(x.shape[:-1]), x.shape[-1])


def _run(kernel: Callable[..., None], *tensors: Tensor, **options: Any) -> None:
    """Lends tensors to a kernel; those that it fills are fresh, hence contiguous already."""
    options = {name: _dense(value) if isinstance(value, Tensor) else value for name, value in options.items()}
    kernel(*(_dense(x) for x in tensors), **options, threads=torch.get_num_threads())


def _int32(x: Tensor, name: str) -> Tensor:
    if x.dtype == torch.int64 and x.numel():
        lowest, highest = (int(v) for v in torch.aminmax(x))
        if lowest < -(2**31) or highest >= 2**31:
            raise ValueError(f"argument '{name}' holds {highest if highest >= 2**31 else lowest}, which no int32 can hold")
    return x.to(torch.int32) if x.dtype == torch.int64 else x


# ---- matmul


def matmul(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x @ weight.T + bias``: a linear layer.

    Args:
        x: [..., k].
        weight: [n, k].
        bias: [n].

    Returns:
        [..., n]. Each element is one chain of fused multiply-adds over ascending k, so a row depends on its
        own row of ``x`` only.

    Raises:
        ValueError: a shape or dtype that does not fit; k = 0.
    """
    result: Tensor = torch.ops.tutelage.matmul(x, weight, bias)
    return result


@custom_op("tutelage::matmul", mutates_args=(), schema="(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
def _matmul(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = _rows(x, "x")
    y = rows.new_empty(rows.shape[0], _rows(weight, "weight").shape[0])
    _run(_core.matmul, rows, weight, y, transpose_b=True, bias=bias, names=("x", "weight"))
    return y.view(*x.shape[:-1], weight.shape[0])


@_matmul.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _matmul_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _matmul_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    d_rows, x_rows = dy.reshape(-1, weight.shape[0]), x.reshape(-1, weight.shape[1])
    product = torch.ops.tutelage.product
    dx, dweight, dbias = ctx.needs_input_grad
    return (
        product(d_rows, weight, False).view(x.shape) if dx else None,
        product(d_rows, x_rows, True) if dweight else None,
        torch.ops.tutelage.column_sum(d_rows) if dbias else None,
    )


_matmul.register_autograd(_matmul_backward, setup_context=_matmul_context)


@custom_op("tutelage::product", mutates_args=(), schema="(Tensor a, Tensor b, bool transpose_a) -> Tensor")
def _product(a: Tensor, b: Tensor, transpose_a: bool) -> Tensor:
    c = a.new_zeros(a.shape[1 if transpose_a else 0], b.shape[1])  # and stays so when there is nothing to add
    _run(_core.matmul, a, b, c, transpose_a=transpose_a, accumulate=True)
    return c


@_product.register_fake
def _(a: Tensor, b: Tensor, transpose_a: bool) -> Tensor:
    return a.new_empty(a.shape[1 if transpose_a else 0], b.shape[1])


@custom_op("tutelage::column_sum", mutates_args=(), schema="(Tensor x) -> Tensor")
def _column_sum(x: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[1])
    _run(_core.column_sum, x, out)
    return out


@_column_sum.register_fake
def _(x: Tensor) -> Tensor:
    return x.new_empty(x.shape[1])


# ---- flash_attention


def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    causal: bool = True,
    window: int | None = None,
    scale: float | None = None,
) -> Tensor:
    """Attention over packed sequences, in tiles, without the [T, T] matrix (Dao 2023, arXiv 2307.08691).

    ``o_i = sum_j softmax_j(scale q_i . k_j) v_j`` over the tokens j of i's own sequence.

    Args:
        q: [N, heads, d], d a multiple of 8.
        k: [N, kv_heads, d]; query head h reads kv head ``h // (heads // kv_heads)``.
        v: [N, kv_heads, d].
        cu_seqlens: int32 [S + 1]; sequence s holds tokens ``cu_seqlens[s]`` to ``cu_seqlens[s + 1]``.
        causal: only j <= i.
        window: only j > i - window; None: all. Needs ``causal``.
        scale: default ``1 / sqrt(d)``.

    Returns:
        [N, heads, d].

    Raises:
        ValueError: a shape or dtype that does not fit, a cu_seqlens that does not start at 0, falls, or does
            not end at N.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, or None, but it is {window}")
    scale = 1 / math.sqrt(max(1, q.shape[-1])) if scale is None else scale
    result: Tensor = torch.ops.tutelage.flash_attention(q, k, v, cu_seqlens, causal, window or 0, scale)[0]
    return result


@custom_op(
    "tutelage::flash_attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, bool causal, int window, float scale) -> (Tensor, Tensor)",
)
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float
) -> tuple[Tensor, Tensor]:
    o, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])
    _run(
        _core.flash_attention,
        q,
        k,
        v,
        _int32(cu_seqlens, "cu_seqlens"),
        o,
        lse,
        causal=causal,
        window=window,
        scale=scale,
    )
    return o, lse


@_flash_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, causal: bool, window: int, scale: float) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:-1])


@custom_op(
    "tutelage::flash_attention_backward",
    mutates_args=(),
    schema="(Tensor d_o, Tensor q, Tensor k, Tensor v, Tensor cu_seqlens, Tensor o, Tensor lse, bool causal, "
    "int window, float scale) -> (Tensor, Tensor, Tensor)",
)
def _flash_attention_gradient(
    d_o: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    _run(
        _core.flash_attention_backward,
        q,
        k,
        v,
        _int32(cu_seqlens, "cu_seqlens"),
        o,
        lse,
        d_o,
        dq,
        dk,
        dv,
        causal=causal,
        window=window,
        scale=scale,
    )
    return dq, dk, dv


@_flash_attention_gradient.register_fake
def _(d_o: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _flash_attention_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    q, k, v, cu_seqlens, *ctx.options = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(q, k, v, cu_seqlens, *output)


def _flash_attention_backward(ctx: Any, d_o: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.tutelage.flash_attention_backward(d_o, *ctx.saved_tensors, *ctx.options)
    return (*gradients, None, None, None, None)


_flash_attention.register_autograd(_flash_attention_backward, setup_context=_flash_attention_context)


# ---- linear_logprob


def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float = 1.0,
    logits_budget: int = LOGITS_BUDGET,
) -> tuple[Tensor, Tensor]:
    """Log-probs of target tokens and the entropy of their distributions, straight from hidden states.

    ``z = hidden @ weight.T / temperature``; ``logprob = z[target] - logsumexp(z)``;
    ``entropy = -sum_j p_j log p_j``. The logits are never handed out. The backward pass needs them: they are
    kept while they take at most ``logits_budget`` bytes and computed again above it, 64 MiB at a time, to the
    same bits.

    Args:
        hidden: [N, hidden_size].
        weight: [vocab_size, hidden_size].
        targets: int32 [N].
        temperature: divides the logits; positive.
        logits_budget: bytes. No logits are kept where no gradient is wanted.

    Returns:
        (logprobs, entropy): [N] each.

    Raises:
        ValueError: a shape or dtype that does not fit, a target outside the vocabulary (naming it and its
            position), a temperature that is not positive.
    """
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    results = torch.ops.tutelage.linear_logprob(hidden, weight, targets, temperature, logits_budget if wanted else 0)
    return results[0], results[1]


def _kept_shape(hidden: Tensor, weight: Tensor, logits_budget: int) -> tuple[int, int]:
    rows, vocab = hidden.shape[0], weight.shape[0]
    return (rows, vocab) if rows * vocab * hidden.element_size() <= logits_budget else (0, 0)


@custom_op(
    "tutelage::linear_logprob",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, float temperature, int logits_budget) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def _linear_logprob(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, logits_budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden = _rows(hidden, "hidden")
    logprobs, entropy, lse = (hidden.new_empty(hidden.shape[0]) for _ in range(3))
    logits = hidden.new_empty(_kept_shape(hidden, weight, logits_budget))
    _run(
        _core.linear_logprob,
        hidden,
        weight,
        _int32(targets, "targets"),
        logprobs,
        entropy,
        lse,
        z=logits if logits.numel() else None,
        temperature=temperature,
    )
    return logprobs, entropy, lse, logits


@_linear_logprob.register_fake
def _(
    hidden: Tensor, weight: Tensor, targets: Tensor, temperature: float, logits_budget: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    logprobs, entropy, lse = (hidden.new_empty(hidden.shape[0]) for _ in range(3))
    return logprobs, entropy, lse, hidden.new_empty(_kept_shape(hidden, weight, logits_budget))


@custom_op(
    "tutelage::linear_logprob_backward",
    mutates_args=(),
    schema="(Tensor hidden, Tensor weight, Tensor targets, Tensor entropy, Tensor lse, Tensor? logits, "
    "Tensor? d_logprobs, Tensor? d_entropy, float temperature, bool hidden_wanted, bool weight_wanted) "
    "-> (Tensor, Tensor)",
)
def _linear_logprob_gradient(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    logits: Tensor | None,
    d_logprobs: Tensor | None,
    d_entropy: Tensor | None,
    temperature: float,
    hidden_wanted: bool,
    weight_wanted: bool,
) -> tuple[Tensor, Tensor]:
    weight, targets = weight.contiguous(), _int32(targets, "targets")
    d_logprobs = torch.zeros_like(lse) if d_logprobs is None else d_logprobs
    d_entropy = torch.zeros_like(lse) if d_entropy is None else d_entropy
    dhidden = hidden.new_empty(hidden.shape if hidden_wanted else 0)
    dweight = weight.new_zeros(weight.shape if weight_wanted else 0)
    rows, vocab = lse.shape[0], weight.shape[0]
    blocks = max(1, math.ceil(rows * vocab * lse.element_size() / _LOGITS_BLOCK))
    block_rows = max(1, math.ceil(rows / blocks))
    # The kernel turns logits into their gradients in place, and the kept ones must outlive it (retain_graph).
    scratch = lse.new_empty(block_rows if logits is not None else 0, vocab)
    for start in range(0, rows, block_rows):
        block = slice(start, min(rows, start + block_rows))
        kept = None if logits is None else scratch[: block.stop - start].copy_(logits[block])
        _run(
            _core.linear_logprob_backward,
            hidden[block],
            weight,
            targets[block],
            entropy[block],
            lse[block],
            d_logprobs[block],
            d_entropy[block],
            dx=dhidden[block] if hidden_wanted else None,
            dweight=dweight if weight_wanted else None,
            z=kept,
            block_rows=block_rows,
            temperature=temperature,
        )
    return dhidden, dweight


@_linear_logprob_gradient.register_fake
def _(hidden: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    *_, hidden_wanted, weight_wanted = others
    return (
        hidden.new_empty(hidden.shape if hidden_wanted else 0),
        weight.new_empty(weight.shape if weight_wanted else 0),
    )


def _linear_logprob_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    hidden, weight, targets, ctx.temperature, _ = inputs
    _, entropy, lse, logits = output
    ctx.mark_non_differentiable(lse, logits)
    ctx.set_materialize_grads(False)  # zeros for the logits would be as large as the logits
    ctx.save_for_backward(hidden, weight, targets, entropy, lse, logits if logits.numel() else None)


def _linear_logprob_backward(
    ctx: Any, d_logprobs: Tensor | None, d_entropy: Tensor | None, *_: Tensor | None
) -> tuple[Tensor | None, ...]:
    hidden_wanted, weight_wanted = ctx.needs_input_grad[:2]
    dhidden, dweight = torch.ops.tutelage.linear_logprob_backward(
        *ctx.saved_tensors, d_logprobs, d_entropy, ctx.temperature, hidden_wanted, weight_wanted
    )
    return dhidden if hidden_wanted else None, dweight if weight_wanted else None, None, None, None


_linear_logprob.register_autograd(_linear_logprob_backward, setup_context=_linear_logprob_context)


# ---- norms


@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: None = None) -> Tensor: ...
@overload
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5, residual: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last axis (Zhang & Sennrich 2019, arXiv 1910.07467).

    ``y = x / sqrt(mean(x^2) + eps) * weight``.

    Args:
        x: [..., d].
        weight: [d].
        eps: at least 0.
        residual: [..., d]; with one, ``sum = x + residual`` takes x's place.

    Returns:
        y [..., d], or (y, sum) with a residual.

    Raises:
        ValueError: a shape or dtype that does not fit, a negative eps.
    """
    y, summed, _ = torch.ops.tutelage.rms_norm(x, weight, residual, eps)
    return y if residual is None else (y, summed)


def _sum_shape(x: Tensor, residual: Tensor | None) -> torch.Size:
    return torch.Size([0]) if residual is None else x.shape


@custom_op(
    "tutelage::rms_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor)",
)
def _rms_norm(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(x, "x")
    y, rstd = torch.empty_like(rows), rows.new_empty(rows.shape[0])
    summed = rows.new_empty(_sum_shape(rows, residual))
    _run(
        _core.rms_norm,
        rows,
        weight,
        y,
        rstd,
        residual=None if residual is None else _rows(residual, "residual"),
        sum=None if residual is None else summed,
        eps=eps,
    )
    return y.view(x.shape), summed.view(_sum_shape(x, residual)), rstd


@_rms_norm.register_fake
def _(x: Tensor, weight: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(_sum_shape(x, residual)), x.new_empty(math.prod(x.shape[:-1]))


@custom_op(
    "tutelage::rms_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor rstd) -> (Tensor, Tensor)",
)
def _rms_norm_gradient(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(x, "x")
    dx = torch.empty_like(rows) if dsum is None else _rows(dsum, "dsum").clone()
    dweight = torch.zeros_like(weight, memory_format=torch.contiguous_format)
    _run(_core.rms_norm_backward, rows, weight, rstd, _rows(dy, "dy"), dx, dweight, accumulate=dsum is not None)
    return dx.view(x.shape), dweight


@_rms_norm_gradient.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _rms_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, residual, _ = inputs
    _, summed, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, rstd)


def _rms_norm_backward(ctx: Any, dy: Tensor, dsum: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight = torch.ops.tutelage.rms_norm_backward(dy, dsum if ctx.has_residual else None, *ctx.saved_tensors)
    return dx, dweight, dx if ctx.has_residual else None, None


_rms_norm.register_autograd(_rms_norm_backward, setup_context=_rms_norm_context)


@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: None = None) -> Tensor: ...
@overload
def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, residual: Tensor) -> tuple[Tensor, Tensor]: ...
def layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, residual: Tensor | None = None
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm over the last axis (Ba, Kiros & Hinton 2016, arXiv 1607.06450).

    ``y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias``.

    Args:
        x: [..., d].
        weight: [d].
        bias: [d].
        eps: at least 0.
        residual: [..., d]; with one, ``sum = x + residual`` takes x's place.

    Returns:
        y [..., d], or (y, sum) with a residual.

    Raises:
        ValueError: a shape or dtype that does not fit, a negative eps.
    """
    y, summed, *_ = torch.ops.tutelage.layer_norm(x, weight, bias, residual, eps)
    return y if residual is None else (y, summed)


@custom_op(
    "tutelage::layer_norm",
    mutates_args=(),
    schema="(Tensor x, Tensor weight, Tensor bias, Tensor? residual, float eps) -> (Tensor, Tensor, Tensor, Tensor)",
)
def _layer_norm(
    x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = _rows(x, "x")
    y, mean, rstd = torch.empty_like(rows), rows.new_empty(rows.shape[0]), rows.new_empty(rows.shape[0])
    summed = rows.new_empty(_sum_shape(rows, residual))
    _run(
        _core.layer_norm,
        rows,
        weight,
        bias,
        y,
        mean,
        rstd,
        residual=None if residual is None else _rows(residual, "residual"),
        sum=None if residual is None else summed,
        eps=eps,
    )
    return y.view(x.shape), summed.view(_sum_shape(x, residual)), mean, rstd


@_layer_norm.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, residual: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])
    return x.new_empty(x.shape), x.new_empty(_sum_shape(x, residual)), x.new_empty(rows), x.new_empty(rows)


@custom_op(
    "tutelage::layer_norm_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor? dsum, Tensor x, Tensor weight, Tensor mean, Tensor rstd) -> (Tensor, Tensor, Tensor)",
)
def _layer_norm_gradient(
    dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows = _rows(x, "x")
    dx = torch.empty_like(rows) if dsum is None else _rows(dsum, "dsum").clone()
    dweight, dbias = (torch.zeros_like(weight, memory_format=torch.contiguous_format) for _ in range(2))
    _run(
        _core.layer_norm_backward,
        rows,
        weight,
        mean,
        rstd,
        _rows(dy, "dy"),
        dx,
        dweight,
        dbias,
        accumulate=dsum is not None,
    )
    return dx.view(x.shape), dweight, dbias


@_layer_norm_gradient.register_fake
def _(dy: Tensor, dsum: Tensor | None, x: Tensor, weight: Tensor, mean: Tensor, rstd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape)


def _layer_norm_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weight, _, residual, _ = inputs
    _, summed, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.has_residual = residual is not None
    ctx.save_for_backward(summed if ctx.has_residual else x, weight, mean, rstd)


def _layer_norm_backward(ctx: Any, dy: Tensor, dsum: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    dx, dweight, dbias = torch.ops.tutelage.layer_norm_backward(dy, dsum if ctx.has_residual else None, *ctx.saved_tensors)
    return dx, dweight, dbias, dx if ctx.has_residual else None, None


_layer_norm.register_autograd(_layer_norm_backward, setup_context=_layer_norm_context)


# ---- rope


def rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary position embedding (Su et al. 2021, arXiv 2104.09864), Llama's layout.

    ``y1 = x1 cos - x2 sin``, ``y2 = x2 cos + x1 sin``, where x1 and x2 are the two halves of a head.

    Args:
        x: [N, heads, d], d even.
        positions: int32 [N], rows of the tables.
        cos: [P, d / 2]; a table, no gradient.
        sin: [P, d / 2]; a table, no gradient.

    Returns:
        [N, heads, d].

    Raises:
        ValueError: a shape or dtype that does not fit, a position outside the tables, a table that requires
            grad.
    """
    if cos.requires_grad or sin.requires_grad:
        raise ValueError("cos and sin are tables without a gradient; pass them detached")
    result: Tensor = torch.ops.tutelage.rope(x, positions, cos, sin, False)
    return result


@custom_op(
    "tutelage::rope",
    mutates_args=(),
    schema="(Tensor x, Tensor positions, Tensor cos, Tensor sin, bool backward) -> Tensor",
)
def _rope(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    y = x.new_empty(x.shape)
    _run(_core.rope, x, _int32(positions, "positions"), cos, sin, y, backward=backward)
    return y


@_rope.register_fake
def _(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, backward: bool) -> Tensor:
    return x.new_empty(x.shape)


def _rope_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, *tables, ctx.backward = inputs
    ctx.save_for_backward(*tables)


def _rope_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tutelage.rope(dy, *ctx.saved_tensors, not ctx.backward), None, None, None, None


_rope.register_autograd(_rope_backward, setup_context=_rope_context)


# ---- swiglu, gelu


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up``, element by element (Shazeer 2020, arXiv 2002.05202).

    Args:
        gate: [..., f].
        up: the same shape.

    Returns:
        The same shape.

    Raises:
        ValueError: shapes or dtypes that differ.
    """
    result: Tensor = torch.ops.tutelage.swiglu(gate, up)
    return result


@custom_op("tutelage::swiglu", mutates_args=(), schema="(Tensor gate, Tensor up) -> Tensor")
def _swiglu(gate: Tensor, up: Tensor) -> Tensor:
    rows = _rows(gate, "gate")
    y = torch.empty_like(rows)
    _run(_core.swiglu, rows, _rows(up, "up"), y)
    return y.view(gate.shape)


@_swiglu.register_fake
def _(gate: Tensor, up: Tensor) -> Tensor:
    return gate.new_empty(gate.shape)


@custom_op(
    "tutelage::swiglu_backward",
    mutates_args=(),
    schema="(Tensor dy, Tensor gate, Tensor up) -> (Tensor, Tensor)",
)
def _swiglu_gradient(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    rows = _rows(gate, "gate")
    d_gate, d_up = torch.empty_like(rows), torch.empty_like(rows)
    _run(_core.swiglu_backward, rows, _rows(up, "up"), _rows(dy, "dy"), d_gate, d_up)
    return d_gate.view(gate.shape), d_up.view(up.shape)


@_swiglu_gradient.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _swiglu_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(*inputs)


def _swiglu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor]:
    d_gate, d_up = torch.ops.tutelage.swiglu_backward(dy, *ctx.saved_tensors)
    return d_gate, d_up


_swiglu.register_autograd(_swiglu_backward, setup_context=_swiglu_context)


def gelu(x: Tensor, approximate: Literal["tanh", "none"] = "tanh") -> Tensor:
    """GELU, element by element (Hendrycks & Gimpel 2016, arXiv 1606.08415).

    Args:
        x: any shape.
        approximate: "tanh" (GPT-2's gelu_new): ``0.5 x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))``;
            "none": ``x Phi(x)``.

    Returns:
        The same shape.

    Raises:
        ValueError: another dtype, another ``approximate``.
    """
    if approximate not in ("tanh", "none"):
        raise ValueError(f"approximate must be 'tanh' or 'none', but it is {approximate!r}")
    result: Tensor = torch.ops.tutelage.gelu(x, approximate == "none")
    return result


@custom_op("tutelage::gelu", mutates_args=(), schema="(Tensor x, bool erf) -> Tensor")
def _gelu(x: Tensor, erf: bool) -> Tensor:
    y = x.new_empty(x.shape)
    _run(_core.gelu, x.reshape(-1), y.reshape(-1), erf=erf)
    return y


@_gelu.register_fake
def _(x: Tensor, erf: bool) -> Tensor:
    return x.new_empty(x.shape)


@custom_op("tutelage::gelu_backward", mutates_args=(), schema="(Tensor dy, Tensor x, bool erf) -> Tensor")
def _gelu_gradient(dy: Tensor, x: Tensor, erf: bool) -> Tensor:
    dx = x.new_empty(x.shape)
    _run(_core.gelu_backward, x.reshape(-1), dy.reshape(-1), dx.reshape(-1), erf=erf)
    return dx


@_gelu_gradient.register_fake
def _(dy: Tensor, x: Tensor, erf: bool) -> Tensor:
    return x.new_empty(x.shape)


def _gelu_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, ctx.erf = inputs
    ctx.save_for_backward(x)


def _gelu_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return torch.ops.tutelage.gelu_backward(dy, *ctx.saved_tensors, ctx.erf), None


_gelu.register_autograd(_gelu_backward, setup_context=_gelu_context)


# ---- embedding


def embedding(ids: Tensor, table: Tensor) -> Tensor:
    """``table[ids]``. The gradient of a row is one chain over its tokens in order.

    Args:
        ids: int32, any shape.
        table: [rows, d].

    Returns:
        [*ids.shape, d].

    Raises:
        ValueError: an id outside the table (naming it and its position), a shape or dtype that does not fit.
    """
    result: Tensor = torch.ops.tutelage.embedding(ids, table)
    return result


@custom_op("tutelage::embedding", mutates_args=(), schema="(Tensor ids, Tensor table) -> Tensor")
def _embedding(ids: Tensor, table: Tensor) -> Tensor:
    rows = _rows(table, "table")
    y = rows.new_empty(ids.numel(), rows.shape[1])
    _run(_core.embedding, _int32(ids, "ids").reshape(-1), table, y)
    return y.view(*ids.shape, rows.shape[1])


@_embedding.register_fake
def _(ids: Tensor, table: Tensor) -> Tensor:
    return table.new_empty(*ids.shape, table.shape[1])


@custom_op("tutelage::embedding_backward", mutates_args=(), schema="(Tensor dy, Tensor ids, SymInt rows) -> Tensor")
def _embedding_gradient(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    dtable = dy.new_zeros(rows, dy.shape[-1])
    _run(_core.embedding_backward, _int32(ids, "ids").reshape(-1), _rows(dy, "dy"), dtable)
    return dtable


@_embedding_gradient.register_fake
def _(dy: Tensor, ids: Tensor, rows: int) -> Tensor:
    return dy.new_empty(rows, dy.shape[-1])


def _embedding_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ids, table = inputs
    ctx.rows = table.shape[0]
    ctx.save_for_backward(ids)


def _embedding_backward(ctx: Any, dy: Tensor) -> tuple[None, Tensor]:
    return None, torch.ops.tutelage.embedding_backward(dy, *ctx.saved_tensors, ctx.rows)


_embedding.register_autograd(_embedding_backward, setup_context=_embedding_context)


# ---- total


def total(x: Tensor, mask: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """The sum of ``x`` where ``mask``, over everything or over each sequence, in one fixed order.

    ``torch.sum`` gives other bits for other thread counts; here neither they nor the rest matter.

    Args:
        x: any shape; [N] with ``cu_seqlens``.
        mask: bool, the shape of ``x``. What it leaves out may be NaN.
        cu_seqlens: int32 [S + 1]; sequence s holds ``x[cu_seqlens[s] : cu_seqlens[s + 1]]``.

    Returns:
        A scalar, or [S] with ``cu_seqlens``. An empty sum is 0.

    Raises:
        ValueError: a mask of another shape or dtype, a cu_seqlens that does not start at 0, falls, or does
            not end at N.
    """
    if mask is not None and mask.shape != x.shape:
        raise ValueError(f"argument 'mask' must have the shape of x, {list(x.shape)}, but it has {list(mask.shape)}")
    if cu_seqlens is not None and x.dim() != 1:
        raise ValueError(f"argument 'x' must have one axis to go with cu_seqlens, but its shape is {list(x.shape)}")
    result: Tensor = torch.ops.tutelage.total(x, mask, cu_seqlens)
    return result


@custom_op("tutelage::total", mutates_args=(), schema="(Tensor x, Tensor? mask, Tensor? cu_seqlens) -> Tensor")
def _total(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    out = x.new_empty(1 if cu_seqlens is None else max(0, cu_seqlens.numel() - 1))
    _run(
        _core.total,
        x.reshape(-1),
        out,
        mask=None if mask is None else mask.reshape(-1),
        cu_seqlens=None if cu_seqlens is None else _int32(cu_seqlens, "cu_seqlens"),
    )
    return out.view(()) if cu_seqlens is None else out


@_total.register_fake
def _(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None) -> Tensor:
    return x.new_empty(() if cu_seqlens is None else cu_seqlens.numel() - 1)


def _total_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, mask, cu_seqlens = inputs
    ctx.shape = x.shape
    ctx.save_for_backward(mask, cu_seqlens)


def _total_backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    mask, cu_seqlens = ctx.saved_tensors
    if cu_seqlens is None:
        dx = dy.expand(ctx.shape)
    else:
        dx = torch.repeat_interleave(dy, cu_seqlens.diff(), output_size=ctx.shape[0])
    return dx if mask is None else torch.where(mask, dx, 0), None, None


_total.register_autograd(_total_backward, setup_context=_total_context)
