"""The model: parameters in one flat torch tensor, forward and backward in the compiled core."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from tutelage import _core, devices, kernels
from tutelage.batch import PackedBatch
from tutelage.config import Head, ModelConfig
from tutelage.data.tokenizer import Tokenizer
from tutelage.hub import hugging_face, peft
from tutelage.lora import LoraConfig, modules_of
from tutelage.rollouts import PREFILL_CHUNK, Generation, GenerationSettings, Rollouts, StreamedToken

_SCORE = "score.weight"
_BLOCK = re.compile(r"(?:^|\.)(?:layers|h)\.([0-9]+)\.")

LOGITS_BUDGET = 256 * 2**20
"""Bytes of logits kept between forward and backward; more are computed again, a block of tokens at a time."""


@dataclass(frozen=True)
class Score:
    """What :meth:`Model.score` returns, each float32 [N], differentiable, 0 at each sequence's first token.

    Attributes:
        logprobs: log p(tokens[i] | the tokens of its sequence before it).
        entropy: of the distribution that predicted tokens[i], in nats.
    """

    logprobs: Tensor
    entropy: Tensor


class Model:
    """A transformer.

    Args:
        config: its shape.
        seed: of the initial weights (Philox: the same bits on every machine and ISA level).
        device: "cpu"; "cuda", torch's current GPU; or "cuda-sim", the GPU's kernels on an emulator, exact and slow, to test
            what a GPU will do. On these two ``params`` is float32 as ever, and the kernels read a bfloat16 copy of it and add
            up in float32.
        head: "lm" (token log-probs) or "scalar" (a value after every token: critics, reward models).
        weights: "float32"; or "bfloat16": every matrix is used rounded to bfloat16 (by score, backward and generate alike, in
            float32 arithmetic), while ``params`` keeps full precision for the optimizer. Generation then reads half as much.
            On "cuda" and "cuda-sim" it changes nothing: all weights are used as bfloat16.
        dtype: torch.float32, or torch.float64 for gradient checks (the scalar kernels, built for double).
        recompute: keep only each block's input between forward and backward and run the block again: less memory, a third
            more arithmetic, the same bits.
        logits_budget: bytes of logits kept between forward and backward.
        level: the ISA level of the kernels ("scalar", "avx2" …; None: the best that passed its self-check). All give the
            same bits; this is for tests.
    """

    def __init__(
        self,
        config: ModelConfig,
        seed: int = 0,
        device: str = "cpu",
        head: Head = "lm",
        weights: Literal["float32", "bfloat16"] = "float32",
        *,
        dtype: torch.dtype = torch.float32,
        recompute: bool = False,
        logits_budget: int = LOGITS_BUDGET,
        level: str | None = None,
        _initialise: bool = True,  # False: the caller fills params
        _base: Model | None = None,  # with _lora: this is an adapter on it
        _lora: LoraConfig | None = None,
    ) -> None:
        self._on = devices.find(device)
        if head not in ("lm", "scalar"):
            raise ValueError(f"head must be 'lm' or 'scalar', but it is {head!r}")
        if weights not in ("float32", "bfloat16"):
            raise ValueError(f"weights must be 'float32' or 'bfloat16', but it is {weights!r}")
        if weights == "bfloat16" and dtype == torch.float64:
            raise ValueError("weights='bfloat16' goes with dtype=torch.float32")
        if dtype not in (torch.float32, torch.float64):
            raise ValueError(f"dtype must be torch.float32 or torch.float64, but it is {dtype}")
        if device != "cpu" and (dtype == torch.float64 or level is not None):
            raise ValueError(f"dtype=torch.float64 and level go with device='cpu', but device is {device!r}")
        if dtype == torch.float64 and level is not None:
            raise ValueError("level chooses among float32 kernels; leave it out with dtype=torch.float64")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must lie in 0 .. 2^64 - 1, but it is {seed}")
        if logits_budget < 0:
            raise ValueError(f"logits_budget must not be negative, but it is {logits_budget}")
        self.config = config
        self.head: Head = head
        self.device = self._on.place
        """Where ``params`` and ``grads`` lie."""
        self.dtype = dtype
        self.weights: Literal["float32", "bfloat16"] = weights
        self._eos_token_ids: tuple[int, ...] = ()
        self.recompute = recompute
        self.logits_budget = logits_budget
        self.tokenizer: Tokenizer | None = None
        self.origin: hugging_face.Origin | None = None
        """What the folder that the model came from holds beside it; saved with it again."""
        self.reward_bias = 0.0
        """Subtracted from every value of a scalar head; saved with the model."""
        self.base = _base
        """The frozen model under an adapter, whose parameters this one shares; None for a model of its own."""
        self.lora = _lora
        """What the adapter is; None for a model of its own."""
        self.name_or_path: str | None = None
        """The folder that the model came from."""
        self._level = level
        level_name = "float64" if dtype == torch.float64 else level or ""
        fields = config.core_fields(head)
        if _base is None or _lora is None:
            self._engine: _core.Transformer = self._on.core.Transformer(fields, level_name)
        else:
            self._engine = self._on.core.Transformer(fields, level_name, _lora.core_fields(_base.head))
        if _initialise:
            initial = torch.empty(self._engine.size)
            self._engine.initialise(initial, seed, torch.get_num_threads())
            self.params = initial.to(self.device, dtype)
        else:
            self.params = torch.empty(self._engine.size, dtype=dtype, device=self.device)
        self._places = {name: (offset, shape) for name, offset, shape, _ in self._engine.parameters()}
        # Copies made from the parameters, with the version of the parameters that they are of.
        self._rounded: tuple[int, Tensor] | None = None
        self._packed: tuple[int, _core.PackedWeights] | None = None
        self._grads: Tensor | None = None
        self._grads_seen = False
        self.graphs = 0
        """How many forwards have been kept for a backward, ever."""
        self._told: Callable[[int], None] | None = None
        # What autograd hangs our graphs on: the parameters themselves are leaves that the engine, not autograd, adds to.
        self._anchor = torch.zeros((), dtype=dtype, requires_grad=True)

    def __repr__(self) -> str:
        adapter = "" if self.lora is None else f", {self.lora}"
        return (
            f"Model({self.config}, head={self.head!r}{adapter}, {self.params.numel():,} parameters, {self.dtype}, "
            f"device={self.device_name!r})"
        )

    @property
    def device_name(self) -> str:
        """The constructor's ``device``."""
        return self._on.name

    # ---- forward

    def score(self, batch: PackedBatch, temperature: float = 1.0, completion_only: bool = False) -> Score:
        """Log-prob and entropy of every token, from logits / temperature.

        completion_only: of the tokens in the batch's completion_mask, to the same bits; both are 0 elsewhere. The head, a fifth
        of the work of a small model, then works for no other token.

        The bits of a sequence do not depend on what else is in the batch, on the number of threads or on the ISA level.
        Under ``torch.no_grad()`` nothing is kept for a backward. What comes back lies where the batch does, whatever the
        model's device: with a batch on the CPU a GPU's numbers are waited for.

        Raises:
            ValueError: naming the sequence that is empty or too long, or the position and id outside the vocabulary;
                temperature not positive; a scalar head.
        """
        if not (temperature > 0 and temperature < float("inf")):
            raise ValueError(f"temperature must be positive and finite, but it is {temperature}")
        keep = torch.is_grad_enabled()
        mask = batch.completion_mask if completion_only else None
        return Score(*_Score.apply(self._anchor, self, batch, mask, temperature, keep))  # type: ignore[no-untyped-call]

    def values(self, batch: PackedBatch) -> Tensor:
        """The scalar head's value after every token: float32 [N], differentiable.

        A sequence's reward is the value at its last token (``batch.last``); the baseline of the action tokens[i] is value[i-1].
        ``reward_bias`` is already subtracted.

        Raises:
            ValueError: as :meth:`score`; a language-model head.
        """
        keep = torch.is_grad_enabled()
        values: Tensor = _Values.apply(self._anchor, self, batch, keep)  # type: ignore[no-untyped-call]
        return values - self.reward_bias if self.reward_bias else values

    def activation_bytes(self, tokens: int, sequences: int, *, keep: bool = True) -> int:
        """Bytes of activations of one forward over so many tokens, kept for a backward (or only needed meanwhile)."""
        return self._engine.activation_bytes(tokens, sequences, keep, self.recompute, self.logits_budget)

    # ---- generation

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Ids that end a completion: those that were set (``from_pretrained`` sets the folder's), else the tokenizer's."""
        if self._eos_token_ids or self.tokenizer is None or self.tokenizer.eos_token_id is None:
            return self._eos_token_ids
        return (self.tokenizer.eos_token_id,)

    @eos_token_ids.setter
    def eos_token_ids(self, ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(ids)

    def generate(
        self,
        prompts: Sequence[str | Sequence[int] | Tensor],
        max_new_tokens: int | Sequence[int] = 128,
        samples_per_prompt: int = 1,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        min_p: float = 0.0,
        stop_token_ids: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
        seed: int | Sequence[int] = 0,
        prefill_chunk: int = PREFILL_CHUNK,
        kv_cache_bytes: int | None = None,
        share_prefixes: bool = True,
        first_sample: int | Sequence[int] = 0,
    ) -> Rollouts:
        """Completions of every prompt, with the log-probs that :meth:`score` gives them, bit for bit.

        Args:
            prompts: lists of token ids, or texts where the model has a tokenizer (nothing is added to them).
            max_new_tokens: at most so many; one number or one a prompt. Never more than the context leaves.
            samples_per_prompt: completions of each; the prompt is computed once for all.
            temperature: logits are divided by it; 0: greedy, the largest logit, ties to the smallest id, log-probs at 1.
            top_k, top_p, min_p: cut the distribution, in this order: the top_k largest (0: all); of those the fewest that
                reach probability top_p; of those every one of at least min_p times the best's probability. Ties stay.
            stop_token_ids: end a row (None: the model's eos ids). The token is part of the row.
            stop_strings: end a row when its text holds one of them, across tokens and inside characters.
            seed: of the noise; one number or one a prompt. Equal prompts in one call are further samples: they differ.
            first_sample: the number of a prompt's first sample, one number or one a prompt; those after it are numbered on. So
                calls that each draw a part of the samples give what one call would have given.
            prefill_chunk: tokens of prompts in one step. kv_cache_bytes: for keys and values (None: half of the free
                memory). share_prefixes: compute common beginnings once. None of these changes a bit.

        Raises:
            ValueError: naming the argument, or the prompt that is empty, too long or can never fit kv_cache_bytes.
            Interrupted: Ctrl-C; its ``partial`` holds what there is.
        """
        generation = Generation(
            self,
            prompts,
            GenerationSettings(
                max_new_tokens,
                samples_per_prompt,
                temperature,
                top_k,
                top_p,
                min_p,
                stop_token_ids,
                stop_strings,
                seed,
                prefill_chunk,
                kv_cache_bytes,
                share_prefixes,
                first_sample,
            ),
        )
        while generation.step():
            pass
        return generation.rollouts()

    def generate_stream(
        self, prompts: Sequence[str | Sequence[int] | Tensor], max_new_tokens: int | Sequence[int] = 128, **settings: Any
    ) -> Iterator[StreamedToken]:
        """The tokens of :meth:`generate` as they come, the rows' in turn; takes the same arguments."""
        generation = Generation(self, prompts, GenerationSettings(max_new_tokens, **settings))
        while generation.step():
            yield from generation.streamed()

    def free_caches(self, keep_memory: bool = False) -> None:
        """Gives back the copies of the weights that generation made; the next one makes them again.

        keep_memory: the engine keeps the memory for what it does next, instead of returning it to the system.
        """
        self._packed = self._rounded = None
        if self.base is not None:
            self.base.free_caches(keep_memory)
        if not keep_memory:
            self._on.free_cached_memory()

    def _weights(self) -> tuple[Tensor, Tensor | None]:
        """What the kernels compute with: the parameters, or the base's and the adapter's."""
        return (self._matrices(), None) if self.base is None else (self.base._matrices(), self._matrices())

    def _versions(self) -> tuple[int, ...]:
        """Change with the weights."""
        return (self.params._version,) if self.base is None else (self.base.params._version, self.params._version)

    def _matrices(self) -> Tensor:
        """The parameters as the kernels read them: on a device all rounded to bfloat16; on the CPU as they are, or with their
        matrices rounded (not an adapter's)."""
        on_device = self._on.rounds
        if not on_device and (self.weights == "float32" or self.base is not None):
            return self.params
        version = self.params._version
        if self._rounded is None or self._rounded[0] != version:
            if on_device:
                rounded = self.params.bfloat16()
            else:
                rounded = self.params.clone()
                for _, offset, shape, matrix in self._engine.parameters():
                    if matrix:
                        part = rounded[offset : offset + torch.Size(shape).numel()]
                        part.copy_(part.bfloat16())
            self._rounded = (version, rounded)
        return self._rounded[1]

    def _stepped(self, update: Callable[[Tensor | None], None]) -> None:
        """Runs ``update``, which changes ``params`` behind torch's back, and with them the copy that a device's kernels read,
        where it is given that."""
        current = self._on.rounds and self._rounded is not None and self._rounded[0] == self.params._version
        copy = self._rounded[1] if current and self._rounded is not None else None
        update(copy)
        torch.autograd.graph.increment_version(self.params)
        if copy is not None:
            self._rounded = (self.params._version, copy)

    def _streams(self) -> tuple[_core.PackedWeights, _core.PackedWeights | None]:
        """What generation reads. All adapters stream the one copy of their base's weights."""
        own = self._packed_weights()
        return (own, None) if self.base is None else (self.base._packed_weights(), own)

    def _packed_weights(self) -> _core.PackedWeights:
        version = self.params._version
        if self._packed is None or self._packed[0] != version:
            self._packed = None  # before the new one is made: never two at a time
            half = self.weights == "bfloat16" and self.base is None  # an adapter stays as it is
            self._packed = (version, self._engine.pack(self._matrices(), half, torch.get_num_threads()))
        return self._packed[1]

    # ---- parameters and gradients

    @property
    def grads(self) -> Tensor:
        """d loss / d params, one flat tensor beside ``params``. Reading it settles what the engine still owed to it: read it
        again after a backward instead of keeping an old reference."""
        self._grads_seen = True
        return self._settled_grads()

    def zero_grad(self) -> None:
        """Sets the gradients to zero. Until somebody has read ``grads`` nothing is written: the next backward overwrites."""
        self._engine.forget_gradients()
        if self._grads_seen:
            self._settled_grads()

    def _settled_grads(self) -> Tensor:
        grads = self._grad_buffer()
        self._engine.finish_gradients(grads, torch.get_num_threads())
        return grads

    def _grad_buffer(self) -> Tensor:
        if self._grads is None:
            self._grads = torch.empty_like(self.params)
            self._engine.forget_gradients()
        return self._grads

    def _view(self, flat: Tensor, name: str) -> Tensor:
        offset, shape = self._places[name]
        return flat[offset : offset + torch.Size(shape).numel()].view(shape)

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view into ``params``), under Hugging Face's names and in its shapes."""
        return ((name, self._view(self.params, name)) for name in self._places)

    def named_grads(self) -> Iterator[tuple[str, Tensor]]:
        """(name, view into ``grads``)."""
        grads = self.grads
        return ((name, self._view(grads, name)) for name in self._places)

    def block_starts(self) -> dict[int, int]:
        """Where in ``params`` the parameters of each block begin, by the block's number; of an adapter not all have some."""
        starts: dict[int, int] = {}
        for name, (offset, _) in self._places.items():
            found = _BLOCK.search(name)
            if found:
                starts.setdefault(int(found[1]), offset)
        return starts

    @contextmanager
    def telling(self, ready: Callable[[int], None]) -> Iterator[None]:
        """Within a ``with`` that runs one backward: ``ready(offset)`` is called when ``grads`` are finished from there on.

        It is called after each block, the last one first, with what the chain of earlier backwards has left in ``grads``. A
        backward finishes what lies before the first block, and the two parts of a tied embedding, only at its end.
        """
        starts = self.block_starts()

        def finished(block: int) -> None:
            if block in starts:
                ready(starts[block])

        self._told = finished
        try:
            yield
        finally:
            self._told = None

    def decay_mask(self) -> Tensor:
        """bool, as ``params``: True where weight decay applies (matrices; not norms and biases)."""
        mask = torch.zeros(self.params.numel(), dtype=torch.bool, device=self.device)
        for _, offset, shape, decay in self._engine.parameters():
            mask[offset : offset + torch.Size(shape).numel()] = decay
        return mask

    # ---- state

    def state_dict(self) -> dict[str, Tensor]:
        """Name -> view into ``params``."""
        return dict(self.named_parameters())

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copies every parameter from ``state``.

        Raises:
            ValueError: naming parameters that are missing, unexpected, or of another shape. Nothing is copied then.
        """
        missing = [name for name in self._places if name not in state]
        unexpected = [name for name in state if name not in self._places]
        if missing or unexpected:
            raise ValueError(
                "the state does not fit this model: "
                + "; ".join(
                    f"{what} {', '.join(names[:5])}" + (f" and {len(names) - 5} more" if len(names) > 5 else "")
                    for what, names in (("missing", missing), ("unexpected", unexpected))
                    if names
                )
            )
        for name, (_, shape) in self._places.items():
            if tuple(state[name].shape) != tuple(shape):
                raise ValueError(f"{name} must have shape {list(shape)}, but the state has {list(state[name].shape)}")
        with torch.no_grad():
            for name, view in self.named_parameters():
                view.copy_(state[name])

    def clone(self) -> Model:
        """A model of its own with the same weights (and tokenizer)."""
        return self._like(self.dtype, self.device_name)

    def to(self, device: str) -> Model:
        """A model of its own with the same weights (and tokenizer) on another device; this one itself where it is there."""
        return self if device == self.device_name else self._like(self.dtype, device)

    def double(self) -> Model:
        """A copy in float64 on the CPU, for gradient checks."""
        return self._like(torch.float64, "cpu")

    def _like(self, dtype: torch.dtype, device: str) -> Model:
        base = self.base
        if base is not None and (dtype, device) != (self.dtype, self.device_name):
            base = base._like(dtype, device)
        other = Model(
            self.config,
            device=device,
            head=self.head,
            weights=self.weights if dtype == torch.float32 else "float32",
            dtype=dtype,
            recompute=self.recompute,
            logits_budget=self.logits_budget,
            level=self._level if dtype == torch.float32 and device == "cpu" else None,
            _initialise=False,
            _base=base,
            _lora=self.lora,
        )
        other.params.copy_(self.params)
        other.reward_bias = self.reward_bias
        return other._told_as(self)

    def _told_as(self, other: Model) -> Model:
        """With the tokenizer of `other`, what ends its completions and what else its folder holds."""
        self.tokenizer, self._eos_token_ids, self.origin = other.tokenizer, other._eos_token_ids, other.origin
        return self

    # ---- adapters

    def with_lora(
        self,
        rank: int = 16,
        alpha: float = 32.0,
        target_modules: Sequence[str] = (),
        head: Head | None = None,
        seed: int = 0,
        *,
        use_rslora: bool = False,
    ) -> Model:
        """A model of this one's weights, which stay as they are and in memory once, and a low-rank adapter that learns (LoRA).

        Its ``params``, ``grads``, state and checkpoints are the adapter's (and a scalar head's) alone; ``policy.base`` is this
        model. A fresh adapter changes no bit. Any number of adapters may share a base: a policy, a critic, a reward model.

        Args:
            rank, alpha, use_rslora: see :class:`LoraConfig`.
            target_modules: layers that get one, as ("q_proj", "v_proj"). None named: all linear layers of the blocks.
            head: None: as the base's. A scalar head always learns, and begins as the base's where that has one.
            seed: of A (uniform within 1/√in, as PEFT's; B is 0) and of a new scalar head.

        Raises:
            ValueError: this is an adapter already; a reward model cannot become a language model; as :class:`LoraConfig`; a
                name that is no linear layer of the blocks.
        """
        if isinstance(target_modules, str):
            raise ValueError(f"target_modules must be a sequence of names: write ({target_modules!r},)")
        lora = LoraConfig(rank, alpha, tuple(target_modules), use_rslora)
        if self.base is not None:
            raise ValueError("this model is an adapter already: train it on, or make a model of it first, with merge()")
        if head == "lm" and self.head == "scalar":
            raise ValueError("a reward model has no language-model head: put the adapter on the language model itself")
        model = self._adapter(lora, head or self.head, seed=seed)
        if not lora.target_modules:
            model.lora = dataclasses.replace(lora, target_modules=modules_of([*model._places]))
        if self.head == "scalar":
            with torch.no_grad():
                model._view(model.params, _SCORE).copy_(self._view(self.params, _SCORE))
            model.reward_bias = self.reward_bias
        return model

    def _adapter(self, lora: LoraConfig, head: Head, **options: Any) -> Model:
        """An adapter on this model."""
        model = Model(
            self.config,
            device=self.device_name,
            head=head,
            weights=self.weights,
            dtype=self.dtype,
            recompute=self.recompute,
            logits_budget=self.logits_budget,
            level=self._level,
            _base=self,
            _lora=lora,
            **options,
        )
        return model._told_as(self)

    def merge(self) -> Model:
        """A model of its own with W + scale · B A in the place of every adapted W.

        Rounded once more than base and adapter apart, so its log-probs are close to theirs but other bits.

        Raises:
            ValueError: this model is no adapter.
        """
        base, lora = self._adapted()
        model = Model(
            self.config,
            device=self.device_name,
            head=self.head,
            weights=self.weights,
            dtype=self.dtype,
            recompute=self.recompute,
            logits_budget=self.logits_budget,
            level=self._level,
            _initialise=False,
        )
        own = dict(self.named_parameters())
        with torch.no_grad():
            for name, view in model.named_parameters():
                view.copy_(own[name] if name in own else base._view(base.params, name))
                module = name.removesuffix(".weight")
                if f"{module}.lora_A.weight" in own:
                    a, b = own[f"{module}.lora_A.weight"], own[f"{module}.lora_B.weight"]
                    # The engine's product: the same bits for any number of threads.
                    change = kernels.matmul(b.cpu(), a.T.cpu().contiguous()).to(view.device) * lora.scale
                    view += change.T if self.config.position == "learned" else change
        model.reward_bias = self.reward_bias
        return model._told_as(self)

    def _adapted(self) -> tuple[Model, LoraConfig]:
        if self.base is None or self.lora is None:
            raise ValueError("this model has no adapter: make one with with_lora()")
        return self.base, self.lora

    def save_adapter(self, folder: str | Path, *, stage: hugging_face.Stage | None = None) -> None:
        """Writes the adapter alone, as PEFT does (adapter_config.json, adapter_model.safetensors), tokenizer and model card.

        ``peft.PeftModel.from_pretrained`` and :meth:`load_adapter` put it on its base, :meth:`from_pretrained` loads both.

        Args:
            stage: what was done to the adapter, for its card, README.md. A README.md of somebody's own stays.

        Raises:
            ValueError: this model is no adapter.
        """
        base, lora = self._adapted()
        peft.write_adapter(
            folder,
            lora,
            self.head,
            self.named_parameters(),
            base_folder=base.name_or_path,
            base_parameters=base.params.numel(),
            origin=self.origin,
            base_origin=base.origin,
            stage=stage,
            fan_in_fan_out=self.config.position == "learned",
            eos_token_ids=self.eos_token_ids,
            bos_token_id=None if self.tokenizer is None else self.tokenizer.bos_token_id,
            reward_bias=self.reward_bias,
        )
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    @classmethod
    def load_adapter(cls, base: Model, folder: str | Path, head: Head | None = None, seed: int = 0) -> Model:
        """The adapter in ``folder``, written by :meth:`save_adapter` or by PEFT, on ``base``.

        Args:
            head: None: what the folder says. "scalar" on a language model's adapter gives a fresh scalar head, of ``seed``.

        Raises:
            ValueError: naming the file, field or tensor that does not fit; an option of PEFT's that changes what is computed
                and that tutelage does not have; ``base`` is an adapter itself.
        """
        if base.base is not None:
            raise ValueError("an adapter goes on a model of its own, but base is an adapter: merge() it first")
        found = peft.read_config(folder)
        wanted = found.head if head is None else head
        if wanted == "lm" and found.head == "scalar":
            raise ValueError(f"{folder} holds the adapter of a reward model, which has no language-model head")
        model = base._adapter(found.lora, wanted, seed=seed)
        if not found.lora.target_modules:
            model.lora = dataclasses.replace(found.lora, target_modules=modules_of([*model._places]))
        expected = {name: tuple(shape) for name, (_, shape) in model._places.items()}
        fresh_head = wanted == "scalar" and found.head == "lm"
        if fresh_head:
            del expected[_SCORE]
        with torch.no_grad():
            for name, tensor in peft.read_tensors(folder, expected):
                model._view(model.params, name).copy_(tensor)
        if (Path(folder) / "tokenizer.json").exists():
            model.tokenizer = Tokenizer.from_pretrained(folder)
        model.origin = peft.read_origin(folder, base.origin)
        model.eos_token_ids = hugging_face.read_eos_token_ids(folder) or base.eos_token_ids
        if not fresh_head:
            model.reward_bias = found.reward_bias
        return model

    # ---- folders

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, head: Head | None = None, device: str = "cpu", *, base: Model | None = None, **options: Any
    ) -> Model:
        """A model from a Hugging Face folder (config.json, safetensors, sharded or not; its tokenizer.json if there is one).

        The folder of an adapter gives it on its base, which is loaded from the folder that adapter_config.json names.

        Args:
            head: None: what config.json says. "scalar" on a language model's folder gives a fresh scalar head.
            base: a model that an adapter's folder shares instead of loading it again, where it came from that same folder.
            options: as the constructor's; ``seed`` is that of a fresh head.

        Raises:
            ValueError: naming the file, field or tensor that does not fit.
        """
        if peft.is_adapter(folder):
            place = peft.base_folder(folder)
            if base is None or not base.is_from(place):
                base = cls.from_pretrained(place, device=device, **options)
            return cls.load_adapter(base, folder, head, options.get("seed", 0))
        config, own_head = hugging_face.read_config(folder)
        wanted = own_head if head is None else head
        fresh_head = wanted == "scalar" and own_head == "lm"
        model = cls(config, device=device, head=wanted, _initialise=fresh_head, **options)
        expected = {name: tuple(shape) for name, (_, shape) in model._places.items()}
        tied = config.tie_word_embeddings and wanted == "lm"
        if fresh_head:
            del expected[_SCORE]
        dtypes = {}
        with torch.no_grad():
            for name, tensor in hugging_face.read_tensors(folder, expected, tied=tied):
                model._view(model.params, name).copy_(tensor)
                dtypes[name] = tensor.dtype
        model.origin = hugging_face.read_origin(folder, dtypes)
        if (Path(folder) / "tokenizer.json").exists():
            model.tokenizer = Tokenizer.from_pretrained(folder)
        model.eos_token_ids = hugging_face.read_eos_token_ids(folder)
        if own_head == wanted == "scalar":
            model.reward_bias = hugging_face.read_reward_bias(folder)
        model.name_or_path = str(folder)
        return model

    def is_from(self, folder: str | Path) -> bool:
        """Whether this model was loaded from that folder."""
        return self.name_or_path is not None and Path(self.name_or_path).resolve() == Path(folder).resolve()

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        dtype: hugging_face.StoredDtype | None = None,
        stage: hugging_face.Stage | None = None,
    ) -> None:
        """Writes a folder that ``transformers.Auto…from_pretrained`` and :meth:`from_pretrained` load; of an adapter as
        :meth:`save_adapter`.

        What came with the model (tokenizer, chat template, generation settings, license) is written too.

        Args:
            dtype: to store the weights in: "float32", "float16" or "bfloat16", rounded to it. None: the one they were loaded
                from where it holds all of them exactly (a folder loaded and saved has the same bytes), else float32.
            stage: what was done to the model, for its card, README.md. A README.md of somebody's own stays.

        Raises:
            ValueError: no class of transformers has the model's options; a weight is too large for ``dtype``, or it is
                an adapter's.
        """
        if self.base is not None:
            if dtype is not None:
                raise ValueError(f"an adapter is saved in float32, not in {dtype}: leave dtype out, or merge() it first")
            return self.save_adapter(folder, stage=stage)
        hugging_face.write_folder(
            folder,
            self.config,
            self.head,
            self.named_parameters(),
            eos_token_ids=self.eos_token_ids,
            bos_token_id=self._bos_token_id(),
            reward_bias=self.reward_bias,
            origin=self.origin,
            dtype=dtype,
            stage=stage,
        )
        if self.tokenizer is not None:
            self.tokenizer.save(folder)

    def _bos_token_id(self) -> int | None:
        if self.tokenizer is not None:
            return self.tokenizer.bos_token_id
        return None if self.origin is None else self.origin.config.get("bos_token_id")


def _check_unchanged(model: Model, versions: tuple[int, ...]) -> None:
    if model._versions() != versions:
        raise RuntimeError(
            "the parameters changed between the forward and its backward; run backward() before the optimizer's step"
        )


# `keep` is the caller's torch.is_grad_enabled(): inside forward() it is off, and needs_input_grad ignores it.
class _Score(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, _anchor: Tensor, model: Model, batch: PackedBatch, mask: Tensor | None, temperature: float, keep: bool
    ) -> tuple[Tensor, Tensor]:
        logprobs = torch.empty(batch.tokens.numel(), dtype=model.dtype, device=model.device)
        entropy = torch.empty_like(logprobs)
        ctx.weights = model._weights()
        ctx.graph = model._engine.score(
            ctx.weights,
            batch.tokens.cpu(),
            batch.cu_seqlens.cpu(),
            None if mask is None else mask.cpu(),
            logprobs,
            entropy,
            temperature,
            keep,
            model.recompute,
            model.logits_budget,
            torch.get_num_threads(),
        )
        ctx.model, ctx.versions = model, model._versions()
        model.graphs += keep
        return logprobs.to(batch.tokens.device), entropy.to(batch.tokens.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None, None, None]:
        model: Model = ctx.model
        d_logprobs, d_entropy = (gradient.to(model.device).contiguous() for gradient in gradients)
        _check_unchanged(model, ctx.versions)
        model._engine.backward_score(
            ctx.graph, ctx.weights, model._grad_buffer(), d_logprobs, d_entropy, torch.get_num_threads(), model._told
        )
        return None, None, None, None, None, None


class _Values(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, _anchor: Tensor, model: Model, batch: PackedBatch, keep: bool) -> Tensor:
        values = torch.empty(batch.tokens.numel(), dtype=model.dtype, device=model.device)
        ctx.weights = model._weights()
        ctx.graph = model._engine.values(
            ctx.weights,
            batch.tokens.cpu(),
            batch.cu_seqlens.cpu(),
            values,
            keep,
            model.recompute,
            torch.get_num_threads(),
        )
        ctx.model, ctx.versions = model, model._versions()
        model.graphs += keep
        return values.to(batch.tokens.device)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None, None, None]:
        (d_values,) = gradients
        model: Model = ctx.model
        _check_unchanged(model, ctx.versions)
        model._engine.backward_values(
            ctx.graph,
            ctx.weights,
            model._grad_buffer(),
            d_values.to(model.device).contiguous(),
            torch.get_num_threads(),
            model._told,
        )
        return None, None, None, None
