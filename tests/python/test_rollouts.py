"""Generation: the bits of score (P2), what the tokens depend on (P3), stopping, streaming, interrupts, errors."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tutelage as tl
from models_for_tests import KINDS, backward, batch_for, bits, in_use, in_use_at_start, threads, tiny_model
from tutelage import Model, Rollouts, _core
from tutelage.devices import free_memory
from tutelage.rollouts import Interrupted


def prompts_for(model: Model, count: int, longest: int = 150, seed: int = 0) -> list[list[int]]:
    """Of mixed lengths; every third begins like the one before it."""
    rng = random.Random(seed)
    prompts: list[list[int]] = []
    for row in range(count):
        prompt = [rng.randrange(model.config.vocab_size) for _ in range(rng.randint(1, longest))]
        prompts.append(prompts[-1] + prompt[:5] if row % 3 == 2 else prompt)
    return prompts


def same(x: Rollouts, y: Rollouts) -> bool:
    return all(
        bits(*a) == bits(*b)
        for a, b in ((x.tokens, y.tokens), (x.logprobs, y.logprobs), (x.support_logprobs, y.support_logprobs))
    )


def scored(model: Model, rollouts: Rollouts, temperature: float) -> bool:
    """Whether the rollouts' log-probs are the bits that score gives."""
    batch = rollouts.pack()
    assert batch.logprobs is not None
    with torch.no_grad():
        logprobs = model.score(batch, temperature=temperature or 1.0).logprobs
    return bits(logprobs[batch.completion_mask]) == bits(batch.logprobs[batch.completion_mask])


# ---- P2 and P3


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_logprobs_are_the_bits_of_score(kind: str, weights: Any) -> None:
    model = tiny_model(kind, weights=weights)
    prompts = prompts_for(model, 7)
    for temperature in (1.0, 0.7, 0.0):
        rollouts = model.generate(prompts, max_new_tokens=20, temperature=temperature, seed=3)
        assert rollouts.lengths == [20] * 7
        assert scored(model, rollouts, temperature)
        if temperature == 0.7:
            assert not scored(model, rollouts, 1.0), "control: at another temperature they differ"


def _slow(kind: str, temperature: float) -> Any:
    """Half a minute each: in CI three architectures at 1 and one at 0.7, the others with the long ones."""
    often = kind == "llama" or (temperature == 1 and kind != "llama+lora")
    return pytest.param(kind, temperature, marks=pytest.mark.slow if often else pytest.mark.soak)


@pytest.mark.parametrize(
    ("kind", "temperature"),
    [_slow(kind, temperature) for kind in ("llama", "qwen3", "gpt2", "llama+lora") for temperature in (1.0, 0.7)],
)
def test_two_hundred_prompts_however_they_are_generated(kind: str, temperature: float) -> None:
    """Batches of 1 to 32 (the cache's budget decides), threads, chunks, shared beginnings: the same bits, and score's."""
    model = tiny_model(kind)
    prompts = prompts_for(model, 200)
    with threads(1):
        expected = model.generate(prompts, max_new_tokens=32, temperature=temperature, seed=1)
    assert scored(model, expected, temperature)
    block = cache_block(model)
    for number, batch in enumerate((1, 2, 3, 7, 32)):
        for turn, chunk in enumerate((1, 16, 10_000)):
            share = (number + turn) % 2 == 0
            with threads(1 + (number + turn) % 4):
                rollouts = model.generate(
                    prompts,
                    max_new_tokens=32,
                    temperature=temperature,
                    seed=1,
                    prefill_chunk=chunk,
                    share_prefixes=share,
                    kv_cache_bytes=2 * batch * block,
                )
            assert same(rollouts, expected), (batch, chunk, share)


def cache_block(model: Model) -> int:
    """Bytes of 128 positions of keys and values."""
    c = model.config
    heads = c.num_key_value_heads or c.num_attention_heads
    return 4 * 128 * c.num_hidden_layers * heads * (c.head_width + -(-c.head_width // 16) * 16)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_tokens_do_not_depend_on_the_batch_the_order_or_the_chunks(kind: str) -> None:
    model = tiny_model(kind)
    prompts = prompts_for(model, 9)
    expected = model.generate(prompts, max_new_tokens=12, seed=5)
    for row in (0, 4, 8):
        alone = model.generate([prompts[row]], max_new_tokens=12, seed=5)
        assert bits(*alone.tokens) == bits(expected.tokens[row]) and bits(*alone.logprobs) == bits(expected.logprobs[row])
    backwards = model.generate(prompts[::-1], max_new_tokens=12, seed=5)
    assert [bits(t) for t in backwards.tokens[::-1]] == [bits(t) for t in expected.tokens]
    small = model.generate(prompts, max_new_tokens=12, seed=5, prefill_chunk=3, kv_cache_bytes=3 * cache_block(model))
    assert same(small, expected)
    with threads(4):
        assert same(model.generate(prompts, max_new_tokens=12, seed=5, share_prefixes=False), expected)
    assert not same(model.generate(prompts, max_new_tokens=12, seed=6), expected), "control: another seed"


@pytest.mark.parametrize("level", [level for level, supported in _core.levels() if supported])
def test_every_level_generates_the_same(level: str) -> None:
    reference, model = tiny_model("qwen3"), tiny_model("qwen3", level=level)
    prompts = prompts_for(model, 14)
    assert same(model.generate(prompts, 16, top_p=0.9), reference.generate(prompts, 16, top_p=0.9))


def test_a_shared_prompt_is_computed_once() -> None:
    model = tiny_model()
    prompt = prompts_for(model, 1, 200, seed=4)[0] * 2
    generation = tl.rollouts.Generation(model, [prompt], tl.rollouts.GenerationSettings(16, samples_per_prompt=6))
    while generation.step():
        pass
    assert generation.prefilled == len(prompt) + 5, "the prompt once, and the last token of each other sample"
    shared = generation.rollouts()
    assert same(shared, model.generate([prompt], 16, samples_per_prompt=6, share_prefixes=False))
    assert len({bits(row) for row in shared.tokens}) == 6
    again = model.generate([prompt] * 6, 16)  # equal prompts are numbered on
    assert same(again, shared)


# ---- sampling


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_greedy_is_what_transformers_generates(tmp_path: Path, architecture: str) -> None:
    model = tiny_model(architecture)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    for prompt in prompts_for(model, 5, 40):
        ours = model.generate([prompt], 25, temperature=0).tokens[0]
        ids = torch.tensor([prompt])
        expected = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0
        )[0, len(prompt) :]
        assert ours.tolist() == expected.tolist()


def test_rows_can_be_chosen() -> None:
    rollouts = tiny_model().generate([[1, 2], [3], [4, 5, 6]], 4)
    chosen = rollouts.select([2, 0])
    assert [row.tolist() for row in chosen.prompts] == [[4, 5, 6], [1, 2]]
    for name in ("tokens", "logprobs", "support_logprobs", "finish_reasons"):
        whole, part = getattr(rollouts, name), getattr(chosen, name)
        assert [str(entry) for entry in part] == [str(whole[2]), str(whole[0])]
    assert chosen.texts is None and len(chosen) == 2


@pytest.mark.parametrize("cut", [{"top_k": 3}, {"top_p": 0.3}, {"min_p": 0.5}])
def test_a_cut_support_has_its_own_logprobs(cut: dict[str, Any]) -> None:
    model = tiny_model()
    rollouts = model.generate(prompts_for(model, 6), 20, **cut)
    whole, kept = torch.cat(rollouts.logprobs), torch.cat(rollouts.support_logprobs)
    assert bool((kept > whole).all()) and scored(model, rollouts, 1.0)
    uncut = model.generate(prompts_for(model, 6), 20)
    assert bits(*uncut.logprobs) == bits(*uncut.support_logprobs)


def test_settings_of_each_prompt() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 3)
    rollouts = model.generate(prompts, max_new_tokens=[3, 1, 7], seed=[4, 5, 4], samples_per_prompt=2)
    assert rollouts.lengths == [3, 3, 1, 1, 7, 7]
    assert bits(rollouts.tokens[4]) == bits(model.generate([prompts[2]], 7, seed=4).tokens[0])


# ---- the same weights


def test_generation_sees_every_change_of_the_weights() -> None:
    model = tiny_model("llama-tied")
    prompts = prompts_for(model, 4)
    optimizer = tl.AdamW(model, lr=1e-2)
    theirs = torch.optim.SGD([model.params], lr=1e-3)

    def engine_step() -> None:
        backward(model, batch_for(model, [9, 4]))
        optimizer.step()

    def torch_step() -> None:
        model.params.grad = model.grads
        theirs.step()

    def through_params() -> None:
        model.params[model.config.hidden_size * 3] += 1.0

    def through_a_view() -> None:
        dict(model.named_parameters())["model.norm.weight"].mul_(-1.5)

    seen = {bits(*model.generate(prompts, 8).logprobs)}
    changes = (engine_step, torch_step, through_params, through_a_view)
    for number, change in enumerate(changes):
        if change is engine_step:
            change()
        else:
            with torch.no_grad():
                change()
        rollouts = model.generate(prompts, 8)
        seen.add(bits(*rollouts.logprobs))
        assert len(seen) == number + 2, change.__name__
        assert scored(model, rollouts, 1.0)


def test_bfloat16_rounds_the_matrices_and_keeps_the_master() -> None:
    model, rounded = tiny_model("qwen2"), tiny_model("qwen2", weights="bfloat16")
    batch = batch_for(model, [20, 7])
    by_hand = tiny_model("qwen2")
    for (name, view), (_, offset, shape, matrix) in zip(by_hand.named_parameters(), by_hand._engine.parameters(), strict=True):
        assert view.shape == torch.Size(shape), (name, offset)
        if matrix:
            view.copy_(view.bfloat16())
    assert bits(rounded.params) == bits(model.params) != bits(by_hand.params)
    assert bits(rounded.score(batch).logprobs.detach()) == bits(by_hand.score(batch).logprobs.detach())
    backward(rounded, batch)
    backward(by_hand, batch)
    assert bits(rounded.grads) == bits(by_hand.grads)
    tl.AdamW(rounded, lr=1e-6).step()
    assert bits(rounded.params) != bits(model.params), "a step too small for bfloat16 is not lost"
    assert rounded._packed_weights().bytes < 0.6 * model._packed_weights().bytes


def test_the_packed_weights_are_given_back() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 2)
    model.generate(prompts, 2)  # rotary tables
    model.free_caches()
    before = in_use_at_start()
    model.generate(prompts, 2)
    assert in_use() > before
    model.free_caches()
    assert in_use() == before


# ---- stopping


@pytest.fixture(scope="module")
def reader() -> Model:
    """A model with a tokenizer of few merges."""
    tokenizer = tl.train_tokenizer(["the cat sat on the mat. der Käse, größer – naïve 猫は魚が好き"] * 3, 300)
    config = tl.ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=200,
    )
    model = Model(config, seed=2)
    model.tokenizer = tokenizer
    return model


def test_ids_that_the_tokenizer_does_not_know(reader: Model) -> None:
    """An embedding padded to a round number has rows for more ids than the tokenizer; they can be drawn."""
    tokenizer = reader.tokenizer
    assert tokenizer is not None
    padded = Model(dataclasses.replace(reader.config, vocab_size=tokenizer.vocab_size + 40), seed=2)
    padded.tokenizer = tokenizer
    rollouts = padded.generate(["the cat"] * 8, 30, stop_strings=("never said",))
    assert rollouts.texts is not None
    unknown = [sum(int(token) >= tokenizer.vocab_size for token in row) for row in rollouts.tokens]
    assert sum(unknown) > 0
    assert set(rollouts.finish_reasons) <= {"length", "stop"}
    for row, text, reason in zip(rollouts.tokens, rollouts.texts, rollouts.finish_reasons, strict=True):
        said = row.tolist() if reason == "length" else row.tolist()[:-1]
        assert text == tokenizer.decode(said, errors="replace")
        assert text.count("\ufffd") >= sum(token >= tokenizer.vocab_size for token in said)


def test_a_stop_token_ends_the_row_and_is_part_of_it() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 4)
    free = model.generate(prompts, 30)
    stop = int(free.tokens[1][7])
    rollouts = model.generate(prompts, 30, stop_token_ids=[stop])
    first = free.tokens[1].tolist().index(stop)
    assert rollouts.finish_reasons[1] == "stop" and rollouts.tokens[1].tolist() == free.tokens[1].tolist()[: first + 1]
    for row, reason in zip(rollouts.tokens, rollouts.finish_reasons, strict=True):
        assert (stop in row.tolist()) == (reason == "stop")
    batch = rollouts.pack()
    assert batch.completion_counts == rollouts.lengths
    model.eos_token_ids = (stop,)
    assert same(model.generate(prompts, 30), rollouts)


def test_stop_strings_across_tokens_and_inside_characters(reader: Model) -> None:
    assert reader.tokenizer is not None
    free = reader.generate(["the cat"], 60, seed=1)
    spelled = b"".join(reader.tokenizer.token_bytes()[token] for token in free.tokens[0].tolist())
    text = free.texts
    assert text is not None
    border = len(b"".join(reader.tokenizer.token_bytes()[token] for token in free.tokens[0].tolist()[:9]))
    across = spelled[border - 1 : border + 1]  # ends inside the tenth token
    try:
        stop = across.decode()
    except UnicodeDecodeError:
        stop = spelled[border : border + 1].decode(errors="ignore") or "e"
    stopped = reader.generate(["the cat"], 60, seed=1, stop_strings=[stop])
    assert stopped.finish_reasons == ["string"]
    got = b"".join(reader.tokenizer.token_bytes()[token] for token in stopped.tokens[0].tolist())
    assert spelled.startswith(got) and stop.encode() in got
    shorter = b"".join(reader.tokenizer.token_bytes()[token] for token in stopped.tokens[0].tolist()[:-1])
    assert stop.encode() not in shorter, "it stops at the first token that completes the string"
    assert stopped.texts is not None and stop not in stopped.texts[0]


def test_a_string_of_many_bytes_is_found_byte_by_byte(reader: Model) -> None:
    """Every byte a token of its own: the matcher sees 猫 arrive in three pieces."""
    assert reader.tokenizer is not None
    by_byte = {spelled: number for number, spelled in enumerate(reader.tokenizer.token_bytes()) if len(spelled) == 1}
    wanted = [by_byte[bytes([byte])] for byte in "魚猫".encode()]
    state = {name: torch.zeros_like(view) for name, view in reader.named_parameters()}
    forced = Model(reader.config)
    forced.tokenizer = reader.tokenizer
    # One-hot embeddings of a ring of tokens: after each comes the next.
    ring = [by_byte[b"a"], *wanted, by_byte[b"b"]]
    for position, token in enumerate(ring):
        state["model.embed_tokens.weight"][token, position] = 1.0
        state["lm_head.weight"][ring[(position + 1) % len(ring)], position] = 50.0
    state["model.norm.weight"].fill_(1.0)
    for name in state:
        if name.endswith("layernorm.weight"):
            state[name].fill_(1.0)
    forced.load_state_dict(state)
    rollouts = forced.generate([[ring[0]]], 20, temperature=0, stop_strings=["猫", "never"])
    assert rollouts.finish_reasons == ["string"] and rollouts.tokens[0].tolist() == wanted
    assert rollouts.texts == ["魚"]
    assert forced.generate([[ring[0]]], 6, temperature=0).texts == ["魚猫"]


def test_prompts_at_the_edges_of_the_context() -> None:
    model = tiny_model()  # 320 positions
    one = model.generate([[3]], 5)
    assert one.lengths == [5] and scored(model, one, 1.0)
    full = [1] * 320
    rollouts = model.generate([full, full[:-1], full[:-2]], 10)
    assert rollouts.lengths == [0, 1, 2] and rollouts.finish_reasons == ["length"] * 3
    assert scored(model, rollouts, 1.0)


def test_a_thousand_prompts_through_a_small_budget() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 1000, 200, seed=9)
    budget = 8 * cache_block(model)
    model.generate([[1] * 300], 1)  # rotary tables
    model.free_caches()
    before = in_use_at_start()
    rollouts = model.generate(prompts, max_new_tokens=2, kv_cache_bytes=budget)
    assert rollouts.lengths == [2] * 1000
    assert scored(model, rollouts, 1.0)
    del rollouts
    model.free_caches()
    assert in_use() == before


@pytest.mark.slow
def test_ten_thousand_requests_leave_memory_flat() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 2500, 60, seed=8)
    sizes = []
    for _ in range(4):
        model.generate(prompts, max_new_tokens=4)
        sizes.append(in_use())
    assert sizes[1:] == sizes[:1] * 3


# ---- streaming, interrupts


def test_a_stream_gives_the_tokens_of_generate() -> None:
    model = tiny_model()
    prompts = prompts_for(model, 5)
    expected = model.generate(prompts, 9, samples_per_prompt=2)
    rows: list[list[int]] = [[] for _ in range(10)]
    ends = []
    for token in model.generate_stream(prompts, 9, samples_per_prompt=2):
        assert token.logprob == float(expected.logprobs[token.row][len(rows[token.row])])
        rows[token.row].append(token.token)
        if token.finish_reason is not None:
            ends.append(token.finish_reason)
    assert rows == [row.tolist() for row in expected.tokens] and ends == ["length"] * 10


def test_ctrl_c_hands_over_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    prompts = prompts_for(model, 3)
    expected = model.generate(prompts, max_new_tokens=[2, 50, 50])
    generation = tl.rollouts.Generation(model, prompts, tl.rollouts.GenerationSettings([2, 50, 50]))

    class Interrupting:
        def __getattr__(self, name: str) -> Any:
            return getattr(inner, name)

        def step(self) -> bool:
            raise KeyboardInterrupt

    for _ in range(5):
        generation.step()
    inner = generation._generator
    monkeypatch.setattr(generation, "_generator", Interrupting())
    with pytest.raises(Interrupted, match=r"^interrupted after 1 of 3 rows$") as caught:
        generation.step()
    partial = caught.value.partial
    assert isinstance(caught.value, KeyboardInterrupt)
    assert partial.finish_reasons == ["length", "interrupted", "interrupted"]
    for part, row in zip(partial.tokens, expected.tokens, strict=True):
        assert part.tolist() == row.tolist()[: part.numel()]
    monkeypatch.undo()  # and the generation can go on
    while generation.step():
        pass
    assert same(generation.rollouts(), expected)


# ---- errors


def bad_calls() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"prompts": [[]]}, "prompt 0 is empty; give it at least one token (a beginning-of-text token, say)"
    yield {"prompts": [[1], [2] * 321]}, "prompt 1 has 321 tokens, more than max_position_embeddings = 320; cut it"
    yield {"prompts": [[1, 999]]}, "prompt 0 holds token id 999 at position 1, but the vocabulary has 275 ids"
    yield {"prompts": [[1, 2**31]]}, "prompt 0 holds 2147483648 at position 1, which is no token id"
    yield {"prompts": ["text"]}, "prompt 0 is text, but this model has no tokenizer (model.tokenizer); pass token ids"
    yield {"kv_cache_bytes": 10}, "prompt 0 and its new tokens (1 + 128) need 65536 bytes of cache, but kv_cache_bytes is 10"
    yield {"temperature": -1.0}, "temperature must be 0 (greedy) or positive, but it is -1.0"
    yield {"temperature": float("nan")}, "temperature must be 0 (greedy) or positive, but it is nan"
    yield {"top_k": -1}, "top_k must be 0 (all tokens) or more, but it is -1"
    yield {"top_p": 0.0}, "top_p must lie in (0, 1], but it is 0.0"
    yield {"min_p": 1.5}, "min_p must lie in [0, 1], but it is 1.5"
    yield {"samples_per_prompt": 0}, "samples_per_prompt must be at least 1, but it is 0"
    yield {"prefill_chunk": 0}, "prefill_chunk must be at least 1, but it is 0"
    yield {"max_new_tokens": [1, 2]}, "max_new_tokens must be one number or one for every prompt (1), but there are 2"
    yield {"max_new_tokens": 0}, "max_new_tokens must be at least 1, but for prompt 0 it is 0"
    yield {"seed": -1}, "seed must be at least 0, but for prompt 0 it is -1"
    yield {"stop_token_ids": [275]}, "stop_token_ids holds 275, but the vocabulary has 275 ids"
    yield {"stop_strings": [""]}, "a stop string is empty; it would stop every row at once"
    yield {"stop_strings": ["x"]}, "stop_strings need a tokenizer, but this model has none (model.tokenizer)"


@pytest.mark.parametrize(("arguments", "message"), list(bad_calls()))
def test_what_cannot_be_generated(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        tiny_model("llama").generate(**{"prompts": [[1]], **arguments})
    assert str(caught.value) == message


def test_models_that_do_not_generate() -> None:
    with pytest.raises(ValueError, match="this model has a scalar head; load it with head='lm' to generate tokens"):
        tiny_model(head="scalar").generate([[1]])
    with pytest.raises(ValueError, match="generation needs a float32 model"):
        tiny_model().double().generate([[1]])
    with pytest.raises(ValueError, match="weights must be 'float32' or 'bfloat16', but it is 'int8'"):
        tiny_model(weights="int8")


def test_weights_that_are_no_numbers_are_named() -> None:
    model = tiny_model()
    model.params.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="the logits after position 1 of prompt 0 are not finite; the weights hold NaN"):
        model.generate([[1, 2]])


def test_no_prompts_give_no_rows() -> None:
    assert len(tiny_model().generate([])) == 0


def test_free_memory_is_what_the_machine_says() -> None:
    assert 2**20 < free_memory() < 2**50
