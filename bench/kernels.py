"""Every kernel, forward and backward, on transformer shapes: ``tutelage bench kernels``.

Results go where each would put them in a model: ours into buffers that are there already (the engine has an
arena), torch's into what its allocator gives. The matrix products of torch and numpy take ``out=``: there all
three have buffers. torch's backward is ``torch.autograd.grad`` over a graph that is kept.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from tutelage import _core

from . import KernelsConfig, peers
from .measure import OURS, QUICK, Case, Measurement, Plan, measure, report
from .memory import peak_bytes

Run = Callable[[], tuple[Tensor, ...]]
EPS = 1e-5
# Bytes of logits at a time when they are computed again, as in the engine: with the packed panels about
# a tenth of what torch needs beside its inputs at 2048 x 50257 (three times the logits).
RECOMPUTED_BLOCK = 96 * 2**20


def _normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed * 1000 + len(shape)))


def _ids(n: int, limit: int) -> Tensor:
    return torch.randint(limit, (n,), generator=torch.Generator().manual_seed(n), dtype=torch.int32)


def _gradient(output: Tensor, inputs: Sequence[Tensor], d_output: Tensor) -> Run:
    return lambda: torch.autograd.grad(output, inputs, d_output, retain_graph=True)


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


# ---- matmul


def matmul(m: int, n: int, k: int) -> Iterator[Case]:
    """y [m, n] = x [m, k] weight [n, k]^T, and its two gradients."""
    x, weight, dy = _normal(m, k), _normal(n, k, seed=1), _normal(m, n, seed=2)
    yield _product("forward", (m, n, k), x, weight, transpose_b=True)
    yield _product("dX", (m, n, k), dy, weight)
    yield _product("dW", (m, n, k), dy, x, transpose_a=True)


def _product(
    phase: str,
    shape: tuple[int, ...],
    a: Tensor,
    b: Tensor,
    transpose_a: bool = False,
    transpose_b: bool = False,
) -> Case:
    left, right = a.T if transpose_a else a, b.T if transpose_b else b
    mine, its, numpys = (torch.empty(left.shape[0], right.shape[1]) for _ in range(3))
    threads = torch.get_num_threads()
    left_array, right_array, out_array = left.numpy(), right.numpy(), numpys.numpy()

    def ours() -> tuple[Tensor, ...]:
        _core.matmul(a, b, mine, transpose_a=transpose_a, transpose_b=transpose_b, threads=threads)
        return (mine,)

    def torchs() -> tuple[Tensor, ...]:
        torch.mm(left, right, out=its)
        return (its,)

    def numpy() -> tuple[Tensor, ...]:
        left_array.dot(right_array, out=out_array)
        return (numpys,)

    contenders: dict[str, Run] = {OURS: ours, "torch": torchs}
    # OpenBLAS runs on all CPUs of the process, whatever torch does: compared where that is the same number.
    if threads == len(os.sched_getaffinity(0)):
        contenders["numpy"] = numpy
    return Case("matmul", phase, _times(*shape), "GFLOP/s", 2.0 * math.prod(shape), contenders)


def matmul_gelu(m: int, n: int, k: int) -> Iterator[Case]:
    """gelu(x weight^T + bias), both kept: the first half of GPT-2's MLP."""
    x, weight, bias = _normal(m, k), _normal(n, k, seed=1) / math.sqrt(k), _normal(n, seed=2)
    pre, activated = torch.empty(m, n), torch.empty(m, n)
    threads = torch.get_num_threads()

    def ours() -> tuple[Tensor, ...]:
        _core.matmul(
            x,
            weight,
            pre,
            transpose_b=True,
            bias=bias,
            activation="gelu",
            activated=activated,
            threads=threads,
        )
        return pre, activated

    def torchs() -> tuple[Tensor, ...]:
        its = F.linear(x, weight, bias)
        return its, F.gelu(its, approximate="tanh")

    yield Case("matmul_gelu", "forward", _times(m, n, k), "GFLOP/s", 2.0 * m * n * k, {OURS: ours, "torch": torchs})


def _times(*extents: int) -> str:
    return "×".join(str(extent) for extent in extents)


# ---- flash_attention


def flash_attention(length: int, heads: int, head_dim: int) -> Iterator[Case]:
    """Causal attention of one sequence. Flops: the causal half, 2 T² H d; with the backward 3.5 times it."""
    q, k, v, d_o = (_normal(length, heads, head_dim, seed=seed) for seed in range(4))
    cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
    o, lse = torch.empty_like(q), torch.empty(length, heads)
    gradients = tuple(torch.empty_like(q) for _ in range(3))
    options: dict[str, Any] = {
        "causal": True,
        "window": 0,
        "scale": 1 / math.sqrt(head_dim),
        "threads": torch.get_num_threads(),
    }
    its = [x.transpose(0, 1).contiguous()[None].requires_grad_() for x in (q, k, v)]
    its_d_o = d_o.transpose(0, 1).contiguous()[None]

    def ours() -> tuple[Tensor, ...]:
        _core.flash_attention(q, k, v, cu_seqlens, o, lse, **options)
        return (o,)

    def torchs() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (peers.attention(*its)[0].transpose(0, 1),)

    def ours_with_backward() -> tuple[Tensor, ...]:
        _core.flash_attention(q, k, v, cu_seqlens, o, lse, **options)
        _core.flash_attention_backward(q, k, v, cu_seqlens, o, lse, d_o, *gradients, **options)
        return o, *gradients

    def torchs_with_backward() -> tuple[Tensor, ...]:
        y = peers.attention(*its)
        return tuple(x[0].transpose(0, 1) for x in (y.detach(), *torch.autograd.grad(y, its, its_d_o)))

    flops = 2.0 * length**2 * heads * head_dim
    shape = f"T {length}, {heads} heads of {head_dim}"
    yield Case("flash_attention", "forward", shape, "GFLOP/s", flops, {OURS: ours, "torch": torchs})
    yield Case(
        "flash_attention",
        "forward+backward",
        shape,
        "GFLOP/s",
        3.5 * flops,
        {OURS: ours_with_backward, "torch": torchs_with_backward},
    )


# ---- linear_logprob


def head_step(contender: str, rows: int, hidden: int, vocab: int) -> Run:
    """Summed cross-entropy of a linear head: (loss, dx, dweight), by "kept", "recomputed" or "torch".

    Inputs and our gradients exist before the first run. Logits that are kept are allocated in the first run.
    """
    x, weight = _normal(rows, hidden), _normal(vocab, hidden, seed=1) / math.sqrt(hidden)
    targets = _ids(rows, vocab)
    if contender == "torch":
        return peers.cross_entropy_over_logits(x, weight, targets.long())
    dx, dweight = torch.zeros_like(x), torch.zeros_like(weight)
    logprob, entropy, lse, d_entropy = (torch.zeros(rows) for _ in range(4))
    d_logprob = torch.full((rows,), -1.0)
    logits: list[Tensor] = []
    options: dict[str, Any] = {"temperature": 1.0, "threads": torch.get_num_threads()}

    def step() -> tuple[Tensor, ...]:
        if contender == "kept" and not logits:
            logits.append(torch.empty(rows, vocab))
        z = logits[0] if logits else None
        dweight.zero_()
        _core.linear_logprob(x, weight, targets, logprob, entropy, lse, z=z, **options)
        _core.linear_logprob_backward(
            x,
            weight,
            targets,
            entropy,
            lse,
            d_logprob,
            d_entropy,
            dx=dx,
            dweight=dweight,
            z=z,
            block_rows=max(1, RECOMPUTED_BLOCK // (4 * vocab)),
            **options,
        )
        return -logprob.sum(), dx, dweight

    return step


def linear_logprob(rows: int, hidden: int, vocab: int) -> Iterator[Case]:
    """The head and the loss, forward and backward: 6 flops a weight and row. Logits kept or recomputed."""
    for phase in ("kept", "recomputed"):
        yield Case(
            "linear_logprob",
            f"forward+backward, logits {phase}",
            _times(rows, hidden, vocab),
            "GFLOP/s",
            6.0 * rows * hidden * vocab,
            {OURS: head_step(phase, rows, hidden, vocab), "torch": head_step("torch", rows, hidden, vocab)},
        )


def _with_memory(m: Measurement, rows: int, hidden: int, vocab: int) -> Measurement:
    threads = torch.get_num_threads()
    phase = m.phase.rpartition(" ")[2]
    extra = {
        name: peak_bytes(head_step, contender, rows, hidden, vocab, threads=threads) / 2**20
        for name, contender in ((OURS, phase), ("torch", "torch"))
    }
    return replace(m, extra={"peak MiB": extra})


# ---- norms


def rms_norm(tokens: int, d: int) -> Iterator[Case]:
    """8 bytes an element forward, 12 backward."""
    x, weight, dy = _normal(tokens, d), _normal(d, seed=1), _normal(tokens, d, seed=2)
    y, rstd, dx, dweight = torch.empty_like(x), torch.empty(tokens), torch.empty_like(x), torch.zeros(d)
    threads = torch.get_num_threads()
    its_x, its_weight = _leaves(x, weight)

    def forward() -> tuple[Tensor, ...]:
        _core.rms_norm(x, weight, y, rstd, eps=EPS, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (F.rms_norm(x, (d,), weight, EPS),)

    def backward() -> tuple[Tensor, ...]:
        dweight.zero_()
        _core.rms_norm_backward(x, weight, rstd, dy, dx, dweight, threads=threads)
        return dx, dweight

    forward()
    its_backward = _gradient(F.rms_norm(its_x, (d,), its_weight, EPS), (its_x, its_weight), dy)
    yield from _memory_bound(
        "rms_norm", _times(tokens, d), tokens * d, (8, forward, torchs_forward), (12, backward, its_backward)
    )


def layer_norm(tokens: int, d: int) -> Iterator[Case]:
    """8 bytes an element forward, 12 backward."""
    x, weight, bias, dy = (
        _normal(tokens, d),
        _normal(d, seed=1),
        _normal(d, seed=2),
        _normal(tokens, d, seed=3),
    )
    y, mean, rstd, dx = torch.empty_like(x), torch.empty(tokens), torch.empty(tokens), torch.empty_like(x)
    dweight, dbias = torch.zeros(d), torch.zeros(d)
    threads = torch.get_num_threads()
    leaves = _leaves(x, weight, bias)

    def forward() -> tuple[Tensor, ...]:
        _core.layer_norm(x, weight, bias, y, mean, rstd, eps=EPS, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (F.layer_norm(x, (d,), weight, bias, EPS),)

    def backward() -> tuple[Tensor, ...]:
        dweight.zero_()
        dbias.zero_()
        _core.layer_norm_backward(x, weight, mean, rstd, dy, dx, dweight, dbias, threads=threads)
        return dx, dweight, dbias

    forward()
    its_backward = _gradient(F.layer_norm(leaves[0], (d,), leaves[1], leaves[2], EPS), leaves, dy)
    yield from _memory_bound(
        "layer_norm",
        _times(tokens, d),
        tokens * d,
        (8, forward, torchs_forward),
        (12, backward, its_backward),
    )


Phase = tuple[int, Run, Run]


def _memory_bound(kernel: str, shape: str, elements: int, forward: Phase, backward: Phase | None = None) -> Iterator[Case]:
    """Cases of (bytes an element, ours, torch's)."""
    for name, phase in (("forward", forward), ("backward", backward)):
        if phase is not None:
            size, ours, torchs = phase
            yield Case(kernel, name, shape, "GB/s", float(size) * elements, {OURS: ours, "torch": torchs})


# ---- element-wise kernels and look-ups


def rope(tokens: int, heads: int, head_dim: int) -> Iterator[Case]:
    """8 bytes an element, forward and backward. torch: as transformers writes it."""
    x, dy = _normal(tokens, heads, head_dim), _normal(tokens, heads, head_dim, seed=1)
    cos, sin = peers.rope_tables(tokens, head_dim, 1e4)
    positions = torch.arange(tokens, dtype=torch.int32)
    wide_cos, wide_sin = (torch.cat((t, t), dim=-1)[:, None] for t in (cos, sin))
    y, dx = torch.empty_like(x), torch.empty_like(x)
    threads = torch.get_num_threads()
    (leaf,) = _leaves(x)

    def forward() -> tuple[Tensor, ...]:
        _core.rope(x, positions, cos, sin, y, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (peers.rope(x, wide_cos, wide_sin),)

    def backward() -> tuple[Tensor, ...]:
        _core.rope(dy, positions, cos, sin, dx, backward=True, threads=threads)
        return (dx,)

    its_backward = _gradient(peers.rope(leaf, wide_cos, wide_sin), (leaf,), dy)
    shape = f"{tokens}, {heads} heads of {head_dim}"
    yield from _memory_bound("rope", shape, x.numel(), (8, forward, torchs_forward), (8, backward, its_backward))


def swiglu(rows: int, columns: int) -> Iterator[Case]:
    """12 bytes an element forward, 20 backward."""
    gate, up, dy = (_normal(rows, columns, seed=seed) for seed in range(3))
    y, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))
    threads = torch.get_num_threads()
    its_gate, its_up = _leaves(gate, up)

    def forward() -> tuple[Tensor, ...]:
        _core.swiglu(gate, up, y, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (F.silu(gate) * up,)

    def backward() -> tuple[Tensor, ...]:
        _core.swiglu_backward(gate, up, dy, d_gate, d_up, threads=threads)
        return d_gate, d_up

    its_backward = _gradient(F.silu(its_gate) * its_up, (its_gate, its_up), dy)
    yield from _memory_bound(
        "swiglu",
        _times(rows, columns),
        y.numel(),
        (12, forward, torchs_forward),
        (20, backward, its_backward),
    )


def gelu(rows: int, columns: int) -> Iterator[Case]:
    """The tanh form: 8 bytes an element forward, 12 backward."""
    x, dy = _normal(rows * columns), _normal(rows * columns, seed=1)
    y, dx = torch.empty_like(x), torch.empty_like(x)
    threads = torch.get_num_threads()
    (leaf,) = _leaves(x)

    def forward() -> tuple[Tensor, ...]:
        _core.gelu(x, y, erf=False, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (F.gelu(x, approximate="tanh"),)

    def backward() -> tuple[Tensor, ...]:
        _core.gelu_backward(x, dy, dx, erf=False, threads=threads)
        return (dx,)

    its_backward = _gradient(F.gelu(leaf, approximate="tanh"), (leaf,), dy)
    yield from _memory_bound(
        "gelu", _times(rows, columns), y.numel(), (8, forward, torchs_forward), (12, backward, its_backward)
    )


def embedding(tokens: int, d: int, vocab: int) -> Iterator[Case]:
    """8 bytes an element forward; 12 backward, which adds to a gradient that is there (torch: index_add_)."""
    table, dy, ids = _normal(vocab, d), _normal(tokens, d, seed=1), _ids(tokens, vocab)
    y, dtable, its_dtable = torch.empty(tokens, d), torch.zeros(vocab, d), torch.zeros(vocab, d)
    long_ids = ids.long()
    threads = torch.get_num_threads()

    def forward() -> tuple[Tensor, ...]:
        _core.embedding(ids, table, y, threads=threads)
        return (y,)

    def torchs_forward() -> tuple[Tensor, ...]:
        return (F.embedding(long_ids, table),)

    def backward() -> tuple[Tensor, ...]:
        _core.embedding_backward(ids, dy, dtable, threads=threads)
        return (dtable,)

    def torchs_backward() -> tuple[Tensor, ...]:
        return (its_dtable.index_add_(0, long_ids, dy),)

    yield from _memory_bound(
        "embedding",
        _times(tokens, d),
        tokens * d,
        (8, forward, torchs_forward),
        (12, backward, torchs_backward),
    )


# ---- the optimizer and sums


def adamw(n: int) -> Iterator[Case]:
    """28 bytes a parameter. torch: AdamW(fused=True)."""
    p, grad = _normal(n), _normal(n, seed=1)
    exp_avg, exp_avg_sq = torch.zeros(n), torch.zeros(n)
    (its,) = _leaves(p)
    its.grad = grad.clone()
    optimizer = torch.optim.AdamW([its], lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused=True)
    steps = itertools.count(1)
    threads = torch.get_num_threads()

    def ours() -> tuple[Tensor, ...]:
        _core.adamw(
            p,
            grad,
            exp_avg,
            exp_avg_sq,
            step=next(steps),
            lr=1e-3,
            betas=(0.9, 0.95),
            eps=1e-8,
            weight_decay=0.1,
            threads=threads,
        )
        return (p,)

    def torchs() -> tuple[Tensor, ...]:
        optimizer.step()
        return (its.detach(),)

    yield Case("adamw", "step", str(n), "GB/s", 28.0 * n, {OURS: ours, "torch": torchs})


def total(rows: int, columns: int) -> Iterator[Case]:
    """4 bytes an element: the sum, the norm (of gradients) and the column sums (the gradient of a bias)."""
    x = _normal(rows, columns)
    flat, out, columns_out = x.view(-1), torch.empty(1), torch.zeros(columns)
    threads = torch.get_num_threads()

    def ours() -> tuple[Tensor, ...]:
        _core.total(flat, out, threads=threads)
        return (out[0],)

    def norm() -> tuple[Tensor, ...]:
        return (torch.tensor(math.sqrt(_core.sum_of_squares(flat, threads=threads))),)

    def column_sum() -> tuple[Tensor, ...]:
        columns_out.zero_()
        _core.column_sum(x, columns_out, threads=threads)
        return (columns_out,)

    torchs: dict[str, Run] = {
        "sum": lambda: (torch.sum(flat),),
        "norm": lambda: (torch.linalg.vector_norm(flat),),
        "column sum": lambda: (torch.sum(x, 0),),
    }
    for (phase, its), mine in zip(torchs.items(), (ours, norm, column_sum), strict=True):
        yield Case("total", phase, _times(rows, columns), "GB/s", 4.0 * x.numel(), {OURS: mine, "torch": its})


# ---- all of them

KERNELS: dict[str, tuple[Callable[..., Iterator[Case]], list[tuple[int, ...]]]] = {
    "matmul": (
        matmul,
        [(1024, 3072, 768), (1024, 768, 3072), (2048, 2048, 2048), (256, 3072, 768), (1024, 50257, 768)],
    ),
    "matmul_gelu": (matmul_gelu, [(1024, 3072, 768)]),
    "flash_attention": (flash_attention, [(length, 12, 64) for length in (1024, 512, 2048, 4096)]),
    "linear_logprob": (linear_logprob, [(2048, 768, 50257)]),
    # From here on the arrays are larger than the caches: what is measured is memory.
    "rms_norm": (rms_norm, [(16384, 768)]),
    "layer_norm": (layer_norm, [(16384, 768)]),
    "rope": (rope, [(16384, 12, 64)]),
    "swiglu": (swiglu, [(4096, 3072)]),
    "gelu": (gelu, [(4096, 3072)]),
    "embedding": (embedding, [(16384, 768, 50257)]),
    "adamw": (adamw, [(2**24,)]),
    "total": (total, [(16384, 3072)]),
}


def run(config: KernelsConfig) -> dict[str, Any]:
    """``tutelage bench kernels``; see :func:`tutelage.bench.run`."""
    for name in config.only:
        if name not in KERNELS:
            raise ValueError(f"there is no kernel {name!r} to measure; there are {', '.join(KERNELS)}")
    plan = QUICK if config.quick else Plan(rounds=config.rounds)
    names = config.only or tuple(KERNELS)
    shapes = {name: KERNELS[name][1][: 1 if config.quick else None] for name in names}
    return report("kernels", plan, measurements(shapes, plan), config.json)


def measurements(shapes: dict[str, list[tuple[int, ...]]], plan: Plan) -> Iterator[Measurement]:
    """Every case of these kernels at these shapes, measured."""
    threads = torch.get_num_threads()
    for name, extents in shapes.items():
        cases = KERNELS[name][0]
        for shape in extents:
            for case in cases(*shape):
                m = measure(case, plan, threads)
                yield _with_memory(m, *shape) if name == "linear_logprob" else m
