"""tutelage's compiled core: cpp/bind. Tensors are lent to it through DLPack, never copied."""

from collections.abc import Callable
from typing import Any, TypedDict

from torch import Tensor

__version__: str

class MemoryUse(TypedDict):
    in_use: int
    cached: int
    peak: int
    allocations: int

def philox4x32(key: int, counter: tuple[int, int, int, int] | list[int]) -> list[int]: ...
def levels() -> list[tuple[str, bool]]: ...
def active_level() -> str: ...
def self_check(name: str) -> str: ...
def memory_use() -> MemoryUse: ...
def reset_memory_peak() -> None: ...
def free_cached_memory() -> None: ...
def fail_allocation(n: int) -> None: ...
def fma_peak(threads: int, seconds: float = 0.2) -> float: ...
def read_bandwidth(x: Any, threads: int, seconds: float = 0.2) -> float: ...

class Graph:
    @property
    def bytes(self) -> int: ...
    @property
    def used(self) -> bool: ...

class PackedWeights:
    @property
    def bytes(self) -> int: ...
    @property
    def half(self) -> bool: ...

class GeneratorOptions:
    def __init__(
        self, kv_cache_bytes: int, prefill_chunk: int, max_sequences: int, share_prefixes: bool, threads: int
    ) -> None: ...

class Generator:
    def add(
        self,
        prompt: list[int],
        max_new_tokens: int,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        seed: int,
        sample: int,
        stop_token_ids: list[int],
        stop_strings: list[bytes],
    ) -> None: ...
    def step(self) -> bool: ...
    def completion(self, request: int) -> tuple[list[int], list[float], list[float], str]: ...
    @property
    def advanced(self) -> list[int]: ...
    @property
    def prefilled(self) -> int: ...
    @property
    def steps(self) -> int: ...

class Transformer:
    def __init__(self, config: dict[str, Any], level: str = "", adapter: dict[str, Any] | None = None) -> None: ...
    @property
    def size(self) -> int: ...
    @property
    def level(self) -> str: ...
    def parameters(self) -> list[tuple[str, int, tuple[int, ...], bool]]: ...
    def initialise(self, params: Tensor, seed: int, threads: int) -> None: ...
    def score(
        self,
        weights: tuple[Tensor, Tensor | None],
        tokens: Tensor,
        cu_seqlens: Tensor,
        mask: Tensor | None,
        logprobs: Tensor,
        entropy: Tensor,
        temperature: float,
        keep: bool,
        recompute: bool,
        logits_budget: int,
        threads: int,
    ) -> Graph | None: ...
    def values(
        self,
        weights: tuple[Tensor, Tensor | None],
        tokens: Tensor,
        cu_seqlens: Tensor,
        values: Tensor,
        keep: bool,
        recompute: bool,
        threads: int,
    ) -> Graph | None: ...
    def backward_score(
        self,
        graph: Graph,
        weights: tuple[Tensor, Tensor | None],
        grads: Tensor,
        d_logprobs: Tensor,
        d_entropy: Tensor,
        threads: int,
        finished: Callable[[int], None] | None = None,
    ) -> None: ...
    def backward_values(
        self,
        graph: Graph,
        weights: tuple[Tensor, Tensor | None],
        grads: Tensor,
        d_values: Tensor,
        threads: int,
        finished: Callable[[int], None] | None = None,
    ) -> None: ...
    def forget_gradients(self) -> None: ...
    def finish_gradients(self, grads: Tensor, threads: int) -> None: ...
    def pack(self, params: Tensor, half: bool, threads: int) -> PackedWeights: ...
    def generator(
        self,
        weights: tuple[Tensor, Tensor | None],
        packed: PackedWeights,
        packed_adapter: PackedWeights | None,
        options: GeneratorOptions,
        token_bytes: list[bytes],
    ) -> Generator: ...
    def activation_bytes(self, tokens: int, sequences: int, keep: bool, recompute: bool, logits_budget: int) -> int: ...
    def sum_of_squares(self, grads: Tensor, threads: int) -> float: ...
    def adamw(
        self,
        params: Tensor,
        grads: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        lr: float,
        beta1: float,
        beta2: float,
        eps: float,
        weight_decay: float,
        step: int,
        grad_scale: float,
        copy: Tensor | None,
        threads: int,
    ) -> None: ...

def matmul(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    transpose_a: bool = False,
    transpose_b: bool = False,
    accumulate: bool = False,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str = "none",
    activated: Tensor | None = None,
    pre: Tensor | None = None,
    names: tuple[str, str] = ("a", "b"),
    threads: int,
    level: str | None = None,
) -> None: ...
def column_sum(x: Tensor, out: Tensor, *, threads: int, level: str | None = None) -> None: ...
def flash_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    *,
    causal: bool,
    window: int,
    scale: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def flash_attention_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o: Tensor,
    lse: Tensor,
    d_o: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    *,
    causal: bool,
    window: int,
    scale: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def rms_norm(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    rstd: Tensor,
    *,
    residual: Tensor | None = None,
    sum: Tensor | None = None,
    eps: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def rms_norm_backward(
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor,
    *,
    accumulate: bool = False,
    threads: int,
    level: str | None = None,
) -> None: ...
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    *,
    residual: Tensor | None = None,
    sum: Tensor | None = None,
    eps: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def layer_norm_backward(
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    rstd: Tensor,
    dy: Tensor,
    dx: Tensor,
    dweight: Tensor,
    dbias: Tensor,
    *,
    accumulate: bool = False,
    threads: int,
    level: str | None = None,
) -> None: ...
def rope(
    x: Tensor,
    positions: Tensor,
    cos: Tensor,
    sin: Tensor,
    y: Tensor,
    *,
    backward: bool = False,
    threads: int,
    level: str | None = None,
) -> None: ...
def swiglu(gate: Tensor, up: Tensor, y: Tensor, *, threads: int, level: str | None = None) -> None: ...
def swiglu_backward(
    gate: Tensor,
    up: Tensor,
    dy: Tensor,
    d_gate: Tensor,
    d_up: Tensor,
    *,
    threads: int,
    level: str | None = None,
) -> None: ...
def gelu(x: Tensor, y: Tensor, *, erf: bool, threads: int, level: str | None = None) -> None: ...
def gelu_backward(x: Tensor, dy: Tensor, dx: Tensor, *, erf: bool, threads: int, level: str | None = None) -> None: ...
def embedding(ids: Tensor, table: Tensor, y: Tensor, *, threads: int, level: str | None = None) -> None: ...
def embedding_backward(ids: Tensor, dy: Tensor, dtable: Tensor, *, threads: int, level: str | None = None) -> None: ...
def linear_logprob(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    logprob: Tensor,
    entropy: Tensor,
    lse: Tensor,
    *,
    z: Tensor | None = None,
    temperature: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def linear_logprob_backward(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    entropy: Tensor,
    lse: Tensor,
    d_logprob: Tensor,
    d_entropy: Tensor,
    *,
    dx: Tensor | None = None,
    dweight: Tensor | None = None,
    z: Tensor | None = None,
    block_rows: int = 0,
    temperature: float,
    threads: int,
    level: str | None = None,
) -> None: ...
def total(
    x: Tensor,
    out: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    threads: int,
    level: str | None = None,
) -> None: ...
def sum_of_squares(x: Tensor, *, threads: int, level: str | None = None) -> float: ...
def adamw(
    p: Tensor,
    g: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_scale: float = 1.0,
    copy: Tensor | None = None,
    threads: int,
    level: str | None = None,
) -> None: ...
