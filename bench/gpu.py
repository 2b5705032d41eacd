"""The kernels on a GPU: ``tutelage bench kernels --device cuda``; checked only on the emulator, ``--device cuda-sim``.

Each case is checked before it is timed, by the rule of FlashAttention's tests: against the formula in float64, our error is at
most twice that of torch's eager computation in bfloat16 on the same inputs.

Times are CUDA events' on torch's stream. Before every sample a buffer larger than any L2 is written, so that every run
reads its operands from memory, and so that the launch has left the host when the GPU comes to it. Contenders
take turns; ratios are of the same round.
"""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn import functional as F

import tutelage
from tutelage import devices
from tutelage.files import write_file_atomic

from . import KernelsConfig, peers
from .measure import FILE_WIDTH, OURS, Spread

Run = Callable[[], tuple[Tensor, ...]]
Formula = Callable[..., tuple[Tensor, ...]]
Unit = Literal["TFLOP/s", "GB/s"]
EPS = 1e-5
FLUSH_BYTES = 512 * 2**20  # ten times the largest L2; writing it takes longer than a launch
BLOCK_ROWS = 512  # of logits that are computed again


@dataclass(frozen=True)
class Peak:
    """What a GPU can do at most, from its data sheet: dense bfloat16 with float32 sums, and memory."""

    tflops: float
    gigabytes: float


# By a part of torch.cuda.get_device_name(); of two that fit, the longer.
PEAKS = {
    "A100-SXM4-40GB": Peak(312, 1555),
    "A100-PCIE-40GB": Peak(312, 1555),
    "A100-SXM4-80GB": Peak(312, 2039),
    "A100 80GB PCIe": Peak(312, 1935),
    "H100": Peak(989, 3350),
    "H100 PCIe": Peak(756, 2039),
    "H100 NVL": Peak(835, 3938),
    "H200": Peak(989, 4800),
    "A10": Peak(125, 600),
    "A30": Peak(165, 933),
    "L4": Peak(121, 300),
    "L40": Peak(181, 864),
    "L40S": Peak(362, 864),
    "RTX 3090": Peak(71, 936),
    "RTX 4090": Peak(165, 1008),
    "RTX A6000": Peak(155, 768),
}


def peak_of(name: str) -> Peak | None:
    """The data sheet of the GPU of that name; None for one that is not listed."""
    found = [key for key in PEAKS if _holds(name, key)]
    return PEAKS[max(found, key=len)] if found else None


def _holds(name: str, part: str) -> bool:
    """Whether the name holds these words, whole: L4 is not L40."""
    return f" {part} " in f" {name} "


@dataclass(frozen=True)
class Case:
    """One kernel at one shape.

    Args:
        unit: "TFLOP/s" where arithmetic is the limit, "GB/s" where memory is.
        work: flops or bytes of one run; bytes count every element read or written once.
        ours: one run; returns tensors that a later run may overwrite.
        formula, inputs: the same in torch: of bfloat16 inputs what we are measured by, of their float64 the truth.
        others: further peers, by name.
    """

    kernel: str
    phase: str
    shape: str
    unit: Unit
    work: float
    ours: Run
    formula: Formula
    inputs: tuple[Tensor, ...]
    others: Mapping[str, Run] = field(default_factory=dict)

    def torchs(self) -> tuple[Tensor, ...]:
        """torch, eager, in the types of the inputs."""
        return self.formula(*self.inputs)

    def exact(self) -> tuple[Tensor, ...]:
        """In float64."""
        return self.formula(*(x.double() if x.is_floating_point() else x for x in self.inputs))


@dataclass(frozen=True)
class Result:
    """A case, checked and timed.

    Attributes:
        errors: of each output, the root mean square of our error over that of torch's.
        microseconds: contender -> of one run; empty on the emulator.
        fraction: of the peak, ours, where the peak is known.
        ratios: peer -> its time / ours in the same round.
    """

    kernel: str
    phase: str
    shape: str
    unit: Unit
    work: float
    errors: list[float]
    microseconds: dict[str, Spread]
    rate: float | None
    fraction: float | None
    ratios: dict[str, Spread]


class WrongResultError(ArithmeticError):
    """A kernel is further from the truth than the rule allows."""


class Bench:
    """The device, and its inputs: the same numbers on every machine."""

    def __init__(self, device: str) -> None:
        self.on = devices.find(device)
        self.core = self.on.core

    def normal(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        """bfloat16."""
        generator = torch.Generator().manual_seed(seed * 1000 + len(shape))
        return (torch.randn(shape, generator=generator) * scale).bfloat16().to(self.on.place)

    def ids(self, n: int, limit: int) -> Tensor:
        generator = torch.Generator().manual_seed(n)
        return torch.randint(limit, (n,), generator=generator, dtype=torch.int32).to(self.on.place)

    def floats(self, *shape: int) -> Tensor:
        return torch.zeros(shape, device=self.on.place)

    # ---- products

    def matmul(self, m: int, n: int, k: int) -> Iterator[Case]:
        """y [m, n] = x [m, k] weight [n, k]^T, and its two gradients, that of the weight in float32."""
        x, weight, dy = self.normal(m, k), self.normal(n, k, seed=1, scale=k**-0.5), self.normal(m, n, seed=2)
        y, dx, dweight = torch.empty_like(dy), torch.empty_like(x), self.floats(n, k)
        shape, flops = _times(m, n, k), 2.0 * m * n * k

        def forward() -> tuple[Tensor, ...]:
            self.core.matmul(x, weight, y, transpose_b=True, threads=1)
            return (y,)

        def input_gradient() -> tuple[Tensor, ...]:
            self.core.matmul(dy, weight, dx, threads=1)
            return (dx,)

        def weight_gradient() -> tuple[Tensor, ...]:
            self.core.matmul(dy, x, dweight, transpose_a=True, threads=1)
            return (dweight,)

        yield Case("matmul", "forward", shape, "TFLOP/s", flops, forward, lambda a, b: (a @ b.T,), (x, weight))
        yield Case("matmul", "dX", shape, "TFLOP/s", flops, input_gradient, lambda a, b: (a @ b,), (dy, weight))
        yield Case("matmul", "dW", shape, "TFLOP/s", flops, weight_gradient, lambda a, b: (a.T @ b,), (dy, x))

    def matmul_swiglu(self, m: int, f: int, k: int) -> Iterator[Case]:
        """gate and up at once, and silu(gate) up beside them."""
        x, weight = self.normal(m, k), self.normal(2 * f, k, seed=1, scale=k**-0.5)
        pre, activated = self.normal(m, 2 * f), self.normal(m, f)

        def ours() -> tuple[Tensor, ...]:
            self.core.matmul(x, weight, pre, transpose_b=True, activation="swiglu", activated=activated, threads=1)
            return pre, activated

        def formula(a: Tensor, b: Tensor) -> tuple[Tensor, ...]:
            both = a @ b.T
            gate, up = both.chunk(2, 1)
            return both, F.silu(gate) * up

        yield Case("matmul_swiglu", "forward", _times(m, 2 * f, k), "TFLOP/s", 4.0 * m * f * k, ours, formula, (x, weight))

    # ---- attention

    def flash_attention(self, length: int, heads: int, kv_heads: int, head_dim: int) -> Iterator[Case]:
        """Causal, of one sequence. Flops: the causal half, 2 T² H d; of the backward 2.5 times that."""
        q, d_o = self.normal(length, heads, head_dim), self.normal(length, heads, head_dim, seed=3)
        k, v = (self.normal(length, kv_heads, head_dim, seed=seed) for seed in (1, 2))
        cu_seqlens = torch.tensor([0, length], dtype=torch.int32, device=self.on.place)
        o, lse, dq, dk, dv = torch.empty_like(q), self.floats(length, heads), *(torch.empty_like(x) for x in (q, k, v))
        options: dict[str, Any] = {"causal": True, "window": 0, "scale": head_dim**-0.5, "threads": 1}

        def forward() -> tuple[Tensor, ...]:
            self.core.flash_attention(q, k, v, cu_seqlens, o, lse, **options)
            return (o,)

        def backward() -> tuple[Tensor, ...]:
            self.core.flash_attention_backward(q, k, v, cu_seqlens, o, lse, d_o, dq, dk, dv, **options)
            return dq, dk, dv

        def eager(a: Tensor, b: Tensor, c: Tensor) -> Tensor:  # of the query heads [T, heads, d] of one key head [T, d]
            scores = torch.einsum("ihd,jd->hij", a, b) * head_dim**-0.5
            later = torch.ones(length, length, dtype=torch.bool, device=a.device).triu(1)
            return torch.einsum("hij,jd->ihd", scores.masked_fill(later, -math.inf).softmax(-1), c)

        def groups(*of: Tensor) -> Iterator[tuple[Tensor, ...]]:  # one key head at a time: T x T float64 takes memory
            for one in range(kv_heads):
                own = slice(one * heads // kv_heads, (one + 1) * heads // kv_heads)
                yield tuple(x[:, own] if x.shape[1] == heads and i != 1 and i != 2 else x[:, one] for i, x in enumerate(of))

        def formula(a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, ...]:
            return (torch.cat([eager(*part) for part in groups(a, b, c)], 1),)

        def formula_backward(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> tuple[Tensor, ...]:
            parts = []
            for *given, slope in groups(a, b, c, d):
                mine = _leaves(*given)
                parts.append(torch.autograd.grad(eager(mine[0], mine[1], mine[2]), mine, slope))
            queries, keys, values = zip(*parts, strict=True)
            return torch.cat(queries, 1), torch.stack(keys, 1), torch.stack(values, 1)

        forward()
        shape, flops = f"T {length}, {heads}/{kv_heads} heads of {head_dim}", 2.0 * length**2 * heads * head_dim
        yield Case(
            "flash_attention",
            "forward",
            shape,
            "TFLOP/s",
            flops,
            forward,
            formula,
            (q, k, v),
            _attention_peers(q, k, v, None),
        )
        yield Case(
            "flash_attention",
            "backward",
            shape,
            "TFLOP/s",
            2.5 * flops,
            backward,
            formula_backward,
            (q, k, v, d_o),
            _attention_peers(q, k, v, d_o),
        )

    # ---- the head

    def linear_logprob(self, rows: int, hidden: int, vocab: int) -> Iterator[Case]:
        """Log-probs of targets from hidden states, and the gradients of their sum: 2 and 6 flops a weight and row."""
        x, weight = self.normal(rows, hidden), self.normal(vocab, hidden, seed=1, scale=hidden**-0.5)
        targets = self.ids(rows, vocab)
        logprob, entropy, lse, d_entropy = (self.floats(rows) for _ in range(4))
        d_logprob, dx, dweight = self.floats(rows) + 1, torch.empty_like(x), self.floats(vocab, hidden)

        def forward() -> tuple[Tensor, ...]:
            self.core.linear_logprob(x, weight, targets, logprob, entropy, lse, temperature=1.0, threads=1)
            return logprob, entropy

        def backward() -> tuple[Tensor, ...]:
            dweight.zero_()
            self.core.linear_logprob_backward(
                x,
                weight,
                targets,
                entropy,
                lse,
                d_logprob,
                d_entropy,
                dx=dx,
                dweight=dweight,
                block_rows=BLOCK_ROWS,
                temperature=1.0,
                threads=1,
            )
            return dx, dweight

        def formula(a: Tensor, b: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            logits = a @ b.T
            rows_of = (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(-1)
            return rows_of.gather(1, ids.long()[:, None])[:, 0], -(rows_of.exp() * rows_of).sum(-1)

        def formula_backward(a: Tensor, b: Tensor, ids: Tensor) -> tuple[Tensor, ...]:
            leaves = _leaves(a, b)
            return torch.autograd.grad(formula(leaves[0], leaves[1], ids)[0].sum(), leaves)

        forward()
        shape, product = _times(rows, hidden, vocab), 2.0 * rows * hidden * vocab
        given = (x, weight, targets)
        yield Case("linear_logprob", "forward", shape, "TFLOP/s", product, forward, formula, given)
        yield Case("linear_logprob", "backward", shape, "TFLOP/s", 3 * product, backward, formula_backward, given)

    # ---- what memory limits

    def rms_norm(self, tokens: int, d: int) -> Iterator[Case]:
        """4 bytes an element forward, 6 backward."""
        x, weight, dy = self.normal(tokens, d), self.normal(d, seed=1), self.normal(tokens, d, seed=2)
        y, rstd, dx, dweight = torch.empty_like(x), self.floats(tokens), torch.empty_like(x), self.floats(d)

        def forward() -> tuple[Tensor, ...]:
            self.core.rms_norm(x, weight, y, rstd, eps=EPS, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            dweight.zero_()
            self.core.rms_norm_backward(x, weight, rstd, dy, dx, dweight, threads=1)
            return dx, dweight

        forward()
        yield from _memory_bound(
            "rms_norm",
            _times(tokens, d),
            x.numel(),
            (4, forward, 6, backward),
            lambda a, w: F.rms_norm(a, (d,), w, EPS),
            (x, weight),
            dy,
        )

    def layer_norm(self, tokens: int, d: int) -> Iterator[Case]:
        """4 bytes an element forward, 6 backward."""
        x, dy = self.normal(tokens, d), self.normal(tokens, d, seed=3)
        weight, bias = self.normal(d, seed=1), self.normal(d, seed=2)
        y, mean, rstd, dx = torch.empty_like(x), self.floats(tokens), self.floats(tokens), torch.empty_like(x)
        dweight, dbias = self.floats(d), self.floats(d)

        def forward() -> tuple[Tensor, ...]:
            self.core.layer_norm(x, weight, bias, y, mean, rstd, eps=EPS, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            dweight.zero_()
            dbias.zero_()
            self.core.layer_norm_backward(x, weight, mean, rstd, dy, dx, dweight, dbias, threads=1)
            return dx, dweight, dbias

        forward()
        yield from _memory_bound(
            "layer_norm",
            _times(tokens, d),
            x.numel(),
            (4, forward, 6, backward),
            lambda a, w, b: F.layer_norm(a, (d,), w, b, EPS),
            (x, weight, bias),
            dy,
        )

    def rope(self, tokens: int, heads: int, head_dim: int) -> Iterator[Case]:
        """4 bytes an element, forward and backward. torch: as transformers writes it."""
        x, dy = self.normal(tokens, heads, head_dim), self.normal(tokens, heads, head_dim, seed=1)
        cos, sin = (table.to(self.on.place) for table in peers.rope_tables(tokens, head_dim, 1e4))
        positions = torch.arange(tokens, dtype=torch.int32, device=self.on.place)
        y, dx = torch.empty_like(x), torch.empty_like(x)

        def forward() -> tuple[Tensor, ...]:
            self.core.rope(x, positions, cos, sin, y, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            self.core.rope(dy, positions, cos, sin, dx, backward=True, threads=1)
            return (dx,)

        def formula(a: Tensor) -> Tensor:
            wide_cos, wide_sin = (torch.cat((t, t), dim=-1)[:, None].to(a.dtype) for t in (cos, sin))
            return peers.rope(a, wide_cos, wide_sin)

        shape = f"{tokens}, {heads} heads of {head_dim}"
        yield from _memory_bound("rope", shape, x.numel(), (4, forward, 4, backward), formula, (x,), dy)

    def swiglu(self, rows: int, columns: int) -> Iterator[Case]:
        """6 bytes an element forward, 10 backward."""
        gate, up, dy = (self.normal(rows, columns, seed=seed) for seed in range(3))
        y, d_gate, d_up = (torch.empty_like(gate) for _ in range(3))

        def forward() -> tuple[Tensor, ...]:
            self.core.swiglu(gate, up, y, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            self.core.swiglu_backward(gate, up, dy, d_gate, d_up, threads=1)
            return d_gate, d_up

        shape = _times(rows, columns)
        yield from _memory_bound(
            "swiglu", shape, y.numel(), (6, forward, 10, backward), lambda g, u: F.silu(g) * u, (gate, up), dy
        )

    def gelu(self, rows: int, columns: int) -> Iterator[Case]:
        """The tanh form: 4 bytes an element forward, 6 backward."""
        x, dy = self.normal(rows * columns), self.normal(rows * columns, seed=1)
        y, dx = torch.empty_like(x), torch.empty_like(x)

        def forward() -> tuple[Tensor, ...]:
            self.core.gelu(x, y, erf=False, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            self.core.gelu_backward(x, dy, dx, erf=False, threads=1)
            return (dx,)

        yield from _memory_bound(
            "gelu",
            _times(rows, columns),
            y.numel(),
            (4, forward, 6, backward),
            lambda a: F.gelu(a, approximate="tanh"),
            (x,),
            dy,
        )

    def embedding(self, tokens: int, d: int, vocab: int) -> Iterator[Case]:
        """4 bytes an element forward; 10 backward, which adds to a float32 gradient (torch: index_add_)."""
        table, dy, ids = self.normal(vocab, d), self.normal(tokens, d, seed=1), self.ids(tokens, vocab)
        y, dtable = self.normal(tokens, d), self.floats(vocab, d)

        def forward() -> tuple[Tensor, ...]:
            self.core.embedding(ids, table, y, threads=1)
            return (y,)

        def backward() -> tuple[Tensor, ...]:
            dtable.zero_()
            self.core.embedding_backward(ids, dy, dtable, threads=1)
            return (dtable,)

        def formula_backward(a: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
            return (torch.zeros(vocab, d, dtype=a.dtype, device=a.device).index_add_(0, rows.long(), a),)

        shape, n = _times(tokens, d), float(tokens * d)
        yield Case(
            "embedding", "forward", shape, "GB/s", 4 * n, forward, lambda t, i: (F.embedding(i.long(), t),), (table, ids)
        )
        yield Case("embedding", "backward", shape, "GB/s", 10 * n, backward, formula_backward, (dy, ids))

    # ---- the optimizer and its norm

    def adamw(self, n: int) -> Iterator[Case]:
        """30 bytes a parameter, the copy that kernels read included. torch: AdamW(fused=True), without one."""
        p, g = self.normal(n).float(), self.normal(n, seed=1).float()
        exp_avg, exp_avg_sq, copy = torch.zeros_like(p), torch.zeros_like(p), p.bfloat16()
        start = p.clone()
        options: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}

        def ours() -> tuple[Tensor, ...]:
            # From the beginning again, so that a run can be compared: three writes more, which the rate does not count.
            p.copy_(start)
            exp_avg.zero_()
            exp_avg_sq.zero_()
            self.core.adamw(p, g, exp_avg, exp_avg_sq, step=1, copy=copy, threads=1, **options)
            return p, copy

        def formula(a: Tensor, slope: Tensor) -> tuple[Tensor, ...]:
            leaf = a.clone().requires_grad_()
            leaf.grad = slope
            torch.optim.AdamW([leaf], fused=True, **options).step()
            return leaf.detach(), leaf.detach().bfloat16().to(a.dtype)

        yield Case("adamw", "step, state reset", str(n), "GB/s", 50.0 * n, ours, formula, (start, g))

    def total(self, n: int) -> Iterator[Case]:
        """The gradient's norm: 4 bytes an element, and a wait for the result."""
        x = self.normal(n).float()

        def ours() -> tuple[Tensor, ...]:
            return (torch.tensor(math.sqrt(self.core.sum_of_squares(x, threads=1))),)

        yield Case("total", "norm", str(n), "GB/s", 4.0 * n, ours, lambda a: (torch.linalg.vector_norm(a).cpu(),), (x,))


def _memory_bound(
    kernel: str,
    shape: str,
    elements: int,
    ours: tuple[float, Run, float, Run],
    formula: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dy: Tensor,
) -> Iterator[Case]:
    forward_bytes, forward, backward_bytes, backward = ours

    def gradients(*given: Tensor) -> tuple[Tensor, ...]:
        leaves = _leaves(*given[:-1])
        return torch.autograd.grad(formula(*leaves), leaves, given[-1])

    yield Case(kernel, "forward", shape, "GB/s", forward_bytes * elements, forward, lambda *given: (formula(*given),), inputs)
    # torch's time is that of a forward and a backward: it is not divided by ours alone, see `measure`.
    yield Case(kernel, "backward", shape, "GB/s", backward_bytes * elements, backward, gradients, (*inputs, dy))


def _leaves(*tensors: Tensor) -> list[Tensor]:
    return [t.detach().clone().requires_grad_() for t in tensors]


def _times(*extents: int) -> str:
    return "×".join(str(extent) for extent in extents)


def _attention_peers(q: Tensor, k: Tensor, v: Tensor, d_o: Tensor | None) -> dict[str, Run]:
    """torch's fused attention, and FlashAttention where it is installed; none on the emulator, where nothing is timed."""
    if not q.is_cuda:
        return {}
    same = q.shape[1] // k.shape[1]
    leaves = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    runs: dict[str, Run] = {}

    def sdpa() -> Tensor:
        a, b, c = (x.transpose(0, 1)[None] for x in leaves)
        return F.scaled_dot_product_attention(a, b, c, is_causal=True, enable_gqa=same > 1)[0].transpose(0, 1)

    forwards: dict[str, Callable[[], Tensor]] = {"torch's sdpa": sdpa}
    if importlib.util.find_spec("flash_attn") is not None:
        flash = importlib.import_module("flash_attn").flash_attn_func
        forwards["flash_attn"] = lambda: flash(*(x[None] for x in leaves), causal=True)[0]
    for name, forward in forwards.items():
        if d_o is None:
            runs[name] = _without_graph(forward)
        else:
            output = forward()  # the graph is kept, so that only the backward is timed
            runs[name] = _backward_of(output, leaves, d_o)
    return runs


def _without_graph(forward: Callable[[], Tensor]) -> Run:
    def run() -> tuple[Tensor, ...]:
        with torch.no_grad():
            return (forward(),)

    return run


def _backward_of(output: Tensor, leaves: Sequence[Tensor], d_output: Tensor) -> Run:
    return lambda: torch.autograd.grad(output, leaves, d_output, retain_graph=True)


# ---- checking and timing


def errors(case: Case) -> list[float]:
    """For each output our root mean square error over that of torch's eager bfloat16.

    Raises:
        WrongResultError: one is above 2.
    """
    right = case.exact()
    mine = [x.double().clone() for x in case.ours()]
    theirs = [x.double() for x in case.torchs()]
    found = []
    for index, (true, own, other) in enumerate(zip(right, mine, theirs, strict=True)):
        ours, torchs = (float((x.to(true.device) - true).square().mean().sqrt()) for x in (own, other))
        # Where torch is exact, as a look-up is, or as good as exact, as a sum in float32 is, there is one more rounding for us.
        floor = 1e-7 * float(true.square().mean().sqrt())
        quotient = 0.0 if ours <= floor else ours / max(torchs, floor)  # NaN is not at most anything
        if not quotient <= 2:
            raise WrongResultError(
                f"{case.kernel} {case.phase} {case.shape}: the error of output {index} is {ours:.3g}, "
                f"{quotient:.2f} times that of torch's bfloat16; at most twice is allowed"
            )
        found.append(quotient)
    return found


class Timer:
    """Microseconds of a run on the GPU, with a cold L2."""

    def __init__(self) -> None:
        self._flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def __call__(self, run: Run) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        self._flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        return 1e3 * float(begin.elapsed_time(end))


def measure(case: Case, timer: Callable[[Run], float] | None, rounds: int, peak: Peak | None) -> Result:
    """Checks the case and, with a timer, times it in turn with its peers. torch's eager backward is no peer: it runs the
    forward too."""
    found = errors(case)
    contenders: dict[str, Run] = {OURS: case.ours}
    if case.phase != "backward" or case.kernel == "embedding":
        contenders["torch"] = case.torchs
    contenders.update(case.others)
    times: dict[str, list[float]] = {name: [] for name in contenders}
    if timer is not None:
        for run in contenders.values():
            timer(run)  # warm up
        for _ in range(rounds):
            for name, run in contenders.items():
                times[name].append(timer(run))
    spreads = {name: Spread.of(samples) for name, samples in times.items() if samples}
    rate = fraction = None
    if spreads:
        rate = case.work / spreads[OURS].median * (1e-6 if case.unit == "TFLOP/s" else 1e-3)
        if peak is not None:
            fraction = rate / (peak.tflops if case.unit == "TFLOP/s" else peak.gigabytes)
    ratios = {
        name: Spread.of([its / mine for mine, its in zip(times[OURS], samples, strict=True)])
        for name, samples in times.items()
        if name != OURS and samples
    }
    return Result(case.kernel, case.phase, case.shape, case.unit, case.work, found, spreads, rate, fraction, ratios)


SHAPES: dict[str, list[tuple[int, ...]]] = {
    "matmul": [(8192, 4096, 4096), (8192, 11008, 4096), (2048, 576, 576), (32, 4096, 4096), (1, 4096, 4096)],
    "matmul_swiglu": [(4096, 11008, 4096)],
    "flash_attention": [(4096, 32, 8, 128), (4096, 16, 16, 64), (1024, 9, 3, 64), (2048, 16, 16, 80)],
    "linear_logprob": [(4096, 2048, 49152)],
    "rms_norm": [(16384, 4096), (16384, 576)],
    "layer_norm": [(16384, 4096)],
    "rope": [(16384, 32, 128)],
    "swiglu": [(16384, 11008)],
    "gelu": [(16384, 11008)],
    "embedding": [(16384, 4096, 49152)],
    "adamw": [(2**27,)],
    "total": [(2**27,)],
}
# What the emulator takes a few seconds for: more than one tile, with tails.
SMALL_SHAPES: dict[str, list[tuple[int, ...]]] = {
    "matmul": [(136, 72, 40)],
    "matmul_swiglu": [(24, 40, 48)],
    "flash_attention": [(70, 2, 1, 64)],
    "linear_logprob": [(20, 32, 300)],
    "rms_norm": [(9, 96)],
    "layer_norm": [(9, 96)],
    "rope": [(9, 2, 16)],
    "swiglu": [(9, 48)],
    "gelu": [(9, 48)],
    "embedding": [(20, 48, 30)],
    "adamw": [(1000,)],
    "total": [(5000,)],
}


def environment(device: str) -> dict[str, Any]:
    """What the numbers belong to."""
    found: dict[str, Any] = {"tutelage": tutelage.__version__, "torch": torch.__version__, "device": device}
    if device != "cuda":
        return {**found, "note": "an emulator: results are checked, nothing is timed"}
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    peak = peak_of(properties.name)
    return {
        **found,
        "gpu": properties.name,
        "compute_capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "gibibytes": round(properties.total_memory / 2**30, 1),
        "cuda": torch.version.cuda,
        "peak": None if peak is None else asdict(peak),
        "peak_source": "data sheet" if peak else "not listed in bench/gpu.py: no fractions are given",
    }


def cases(device: str, only: Sequence[str] = (), quick: bool = False) -> Iterator[Case]:
    """Every kernel at every shape; quick: at its first."""
    bench = Bench(device)
    shapes = SHAPES if device == "cuda" else SMALL_SHAPES
    for name in only or shapes:
        for shape in shapes[name][: 1 if quick else None]:
            yield from getattr(bench, name)(*shape)


def clock(device: str) -> tuple[Callable[[Run], float] | None, Peak | None]:
    """What times runs there (None: nothing, on the emulator), and the peak, where it is known."""
    return (Timer(), peak_of(torch.cuda.get_device_name())) if device == "cuda" else (None, None)


def run(config: KernelsConfig) -> dict[str, Any]:
    """``tutelage bench kernels --device cuda``; see :func:`tutelage.bench.run`."""
    for name in config.only:
        if name not in SHAPES:
            raise ValueError(f"there is no kernel {name!r} to measure; there are {', '.join(SHAPES)}")
    if config.rounds < 1:
        raise ValueError(f"there must be at least 1 round to measure, but there are {config.rounds}")
    devices.find(config.device)  # says why not, before anything else
    progress = Console(stderr=True)
    taken = []
    timer, peak = clock(config.device)
    for case in cases(config.device, config.only, config.quick):
        result = measure(case, timer, 2 if config.quick else config.rounds, peak)
        progress.print(f"{result.kernel} {result.phase} {result.shape}: {said(result)}", highlight=False)
        taken.append(result)
    summary = {"bench": "kernels", **environment(config.device), "results": [asdict(result) for result in taken]}
    line = json.dumps(summary)
    Console(width=None if sys.stdout.isatty() else FILE_WIDTH).print(table(taken))
    print(line)
    if config.json is not None:
        write_file_atomic(config.json, f"{line}\n".encode())
    return summary


def said(result: Result) -> str:
    """A line on a case."""
    error = f"error {max(result.errors):.2f} of torch's"
    if result.rate is None:
        return f"{error}; not timed"
    return f"{error}; {result.rate:.0f} {result.unit}"


def table(taken: Sequence[Result]) -> Table:
    """One row a case."""
    names = list(dict.fromkeys(name for result in taken for name in result.ratios))
    grid = Table("what", "shape", "error / torch's", "µs", "rate", "of the peak", *(f"faster than {name}" for name in names))
    for result in taken:
        ratios = [f"{result.ratios[name].median:.2f}×" if name in result.ratios else "" for name in names]
        grid.add_row(
            f"{result.kernel} {result.phase}",
            result.shape,
            f"{max(result.errors):.2f}",
            f"{result.microseconds[OURS].median:.1f}" if result.microseconds else "not timed",
            "" if result.rate is None else f"{result.rate:.0f} {result.unit}",
            "" if result.fraction is None else f"{result.fraction:.2f}",
            *ratios,
        )
    return grid
