"""Adapters: the base's bits at first, the promises with them, gradients, folders as PEFT has them."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from models_for_tests import (
    KINDS,
    backward,
    batch_for,
    bits,
    forward_bits,
    gradient_bits,
    lora_model,
    randn,
    sequences,
    threads,
    tiny_model,
)
from tutelage import AdamW, Model, _core, pack
from tutelage.hub.model_card import Stage, read_lineage

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [5, 1, 9, 2, 12]
SOME = ["llama", "qwen2", "qwen3", "layernorm", "gpt2"]
TARGETS: dict[str, tuple[str, ...]] = {"all": (), "few": ("v_proj", "down_proj"), "up": ("up_proj",)}


# ---- the surface


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_fresh_adapter_has_the_bits_of_its_base(kind: str, head: Any) -> None:
    base = tiny_model(kind, head=head)
    batch = batch_for(base, [*LENGTHS, 130])
    fresh = base.with_lora(rank=4, alpha=8)
    assert forward_bits(fresh, batch) == forward_bits(base, batch)
    with torch.no_grad():
        fresh.params += 0.01
    assert forward_bits(fresh, batch) != forward_bits(base, batch), "control: an adapter that has learned does not"


def test_an_adapter_shares_its_base_and_owns_what_learns() -> None:
    base = tiny_model("llama")
    policy, critic = base.with_lora(rank=2, seed=1), base.with_lora(rank=3, head="scalar", seed=2)
    assert policy.base is base and critic.base is base
    assert policy._weights()[0] is critic._weights()[0] is base.params
    assert policy._streams()[0] is base._packed_weights()
    names = {name: list(view.shape) for name, view in policy.named_parameters()}
    assert names["model.layers.1.self_attn.k_proj.lora_A.weight"] == [2, 48]
    assert names["model.layers.1.self_attn.k_proj.lora_B.weight"] == [16, 2]
    assert "score.weight" in critic.state_dict() and "score.weight" not in names
    assert policy.decay_mask().all() and policy.params.numel() == policy.grads.numel() == sum(
        view.numel() for view in policy.state_dict().values()
    )
    assert policy.lora is not None and policy.lora.target_modules == (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    assert "rank=2" in repr(policy) and policy.lora.scale == 16


def test_the_first_adapter_is_pefts_and_known() -> None:
    """A uniform within 1/√in, B zero; the same bits on every machine and at every level."""
    base = tiny_model("gpt2")
    policy = base.with_lora(rank=8, seed=3)
    for name, view in policy.named_parameters():
        if "lora_B" in name:
            assert not view.any()
        else:
            bound = view.shape[1] ** -0.5
            assert bound * 0.9 < float(view.abs().max()) <= bound and abs(float(view.mean())) < 0.1 * bound
    scalar = tiny_model("gpt2", level="scalar").with_lora(rank=8, seed=3)
    with threads(3):
        assert bits(scalar.params) == bits(policy.params) == bits(base.with_lora(rank=8, seed=3).params)
    assert bits(base.with_lora(rank=8, seed=4).params) != bits(policy.params)


def test_a_reward_models_adapter_begins_with_its_head() -> None:
    base = tiny_model("llama", head="scalar")
    base.reward_bias = 0.5
    reward = base.with_lora(rank=2)
    assert reward.reward_bias == 0.5
    assert torch.equal(reward.state_dict()["score.weight"], base.state_dict()["score.weight"])


def test_what_cannot_be_is_refused() -> None:
    base = tiny_model("llama")
    policy = base.with_lora(rank=2)
    for message, call in {
        "rank must be at least 1, but it is 0": lambda: base.with_lora(rank=0),
        "alpha must be positive and finite, but it is 0": lambda: base.with_lora(alpha=0),
        "target_modules must be a sequence of names: write ('q_proj',)": lambda: base.with_lora(target_modules="q_proj"),
        "target_modules names 'c_attn', which is no linear layer of this model's blocks; there are down_proj, gate_proj, "
        "k_proj, o_proj, q_proj, up_proj, v_proj": lambda: base.with_lora(target_modules=("q_proj", "c_attn")),
        "this model is an adapter already: train it on, or make a model of it first, with merge()": policy.with_lora,
        "a reward model has no language-model head: put the adapter on the language model itself": lambda: tiny_model(
            head="scalar"
        ).with_lora(head="lm"),
        "this model has no adapter: make one with with_lora()": base.merge,
    }.items():
        with pytest.raises(ValueError, match="^" + re.escape(message) + "$"):
            call()
    with pytest.raises(RuntimeError, match="the parameters changed between the forward and its backward"):
        out = policy.score(batch_for(base, LENGTHS))
        base.params.mul_(2)
        out.logprobs.sum().backward()


def test_the_core_wants_the_adapter_where_there_is_one() -> None:
    base = tiny_model("llama")
    policy = base.with_lora(rank=2)
    batch = batch_for(base, LENGTHS)
    outputs = torch.empty(batch.tokens.numel()), torch.empty(batch.tokens.numel())
    options = 1.0, False, False, 0, 1
    for model, weights in ((base, (base.params, base.params)), (policy, (base.params, None))):
        with pytest.raises(ValueError, match="weights: a model with adapters, and no other, has two"):
            model._engine.score(weights, batch.tokens, batch.cu_seqlens, None, *outputs, *options)
    with pytest.raises(ValueError, match="argument 'adapter' must have shape"):
        policy._engine.score((base.params, base.params), batch.tokens, batch.cu_seqlens, None, *outputs, *options)


def test_a_clone_shares_the_base_and_a_double_does_not() -> None:
    policy = lora_model("llama")
    other, double = policy.clone(), policy.double()
    assert other.base is policy.base and other.lora == policy.lora and bits(other.params) == bits(policy.params)
    other.params.mul_(2)
    batch = batch_for(policy, LENGTHS)
    assert forward_bits(other, batch) != forward_bits(policy, batch)
    with torch.no_grad():
        single = policy.score(batch).logprobs
        torch.testing.assert_close(single.double(), double.score(batch).logprobs, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("weights", ["float32", "bfloat16"])
def test_generation_has_the_bits_of_score(weights: Any) -> None:
    for kind, targets in itertools.product(SOME, TARGETS.values() if weights == "float32" else [()]):
        if targets and kind == "gpt2":
            targets = ("c_attn", "mlp.c_proj")
        elif targets == ("up_proj",) and kind == "layernorm":
            continue
        policy = lora_model(kind, targets=targets, weights=weights)
        prompts = sequences([3, 40, 1, 130, 7, 9, 2, 3, 1, 5, 6, 8, 20, 4], policy.config.vocab_size)
        rollouts = policy.generate(prompts, max_new_tokens=6, temperature=0.7, seed=3)
        batch = rollouts.pack()
        with torch.no_grad():
            found = policy.score(batch, temperature=0.7).logprobs
        assert batch.logprobs is not None
        mask = batch.completion_mask
        assert bits(found[mask]) == bits(batch.logprobs[mask]), (kind, targets)
        for row in (0, 3):  # alone, and the prompt in pieces
            alone = policy.generate([prompts[row]], max_new_tokens=6, temperature=0.7, seed=3, prefill_chunk=5)
            assert bits(*alone.tokens, *alone.logprobs) == bits(rollouts.tokens[row], rollouts.logprobs[row])
        assert policy.base is not None
        with torch.no_grad():
            assert bits(policy.base.score(batch, temperature=0.7).logprobs[mask]) != bits(batch.logprobs[mask]), "control"


def test_generation_sees_every_change_of_the_adapter() -> None:
    policy = lora_model("llama")
    prompts = sequences([4, 6], 275)
    before = policy.generate(prompts, max_new_tokens=8)
    packed = policy._streams()[0]
    policy.params.mul_(3)
    assert bits(*policy.generate(prompts, max_new_tokens=8).logprobs) != bits(*before.logprobs)
    assert policy._streams()[0] is packed, "the base did not change"


# ---- gradients


def test_gradients_agree_with_central_differences() -> None:
    for kind, head, targets in [("llama", "lm", ()), ("qwen3", "lm", ("k_proj", "up_proj")), ("gpt2", "scalar", ())]:
        policy = lora_model(kind, head=head, targets=targets).double()  # type: ignore[arg-type]
        batch = batch_for(policy, [1, 9, 2, 7])

        def loss(policy: Model = policy, batch: Any = batch) -> Tensor:
            with torch.no_grad():
                if policy.head == "scalar":
                    return (policy.values(batch) * randn(batch.tokens.double(), 0)).sum()
                out = policy.score(batch, 0.7)
                return (out.logprobs * randn(out.logprobs, 0)).sum() + (out.entropy * randn(out.entropy, 1)).sum()

        policy.zero_grad()
        backward(policy, batch, temperature=0.7)
        gradients = {name: grad.clone() for name, grad in policy.named_grads()}
        for seed, (name, view) in enumerate(policy.named_parameters()):
            direction, step = randn(view, seed), 1e-6
            with torch.no_grad():
                view += step * direction
                above = loss()
                view -= 2 * step * direction
                below = loss()
                view += step * direction
            slope = (above - below) / (2 * step)
            expected = (gradients[name] * direction).sum()
            assert abs(slope - expected) < 1e-6 * max(1.0, float(gradients[name].norm() * direction.norm())), (kind, name)


def test_the_first_gradient_of_a_is_zero_and_of_b_is_not() -> None:
    policy = tiny_model("llama").with_lora(rank=2)
    backward(policy, batch_for(policy, LENGTHS))
    for name, grad in policy.named_grads():
        assert grad.any() == ("lora_B" in name), name


def test_nothing_is_kept_of_a_backward() -> None:
    policy = lora_model("llama")
    batch = batch_for(policy, LENGTHS)
    backward(policy, batch)
    before = _core.memory_use()["in_use"]
    backward(policy, batch)
    assert _core.memory_use()["in_use"] <= before


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("rank", [3, 200])
def test_activations_take_the_memory_that_they_take_without(kind: str, rank: int) -> None:
    """t lies in scratch that is there anyway, unless a rank is wider than the MLP; the gradients are right there too."""
    policy = lora_model(kind, rank=rank)
    assert policy.base is not None
    ours, theirs = (model.activation_bytes(100, 3) for model in (policy, policy.base))
    assert ours == theirs if rank == 3 else theirs < ours < theirs + 100 * 4 * 3 * 2 * rank
    batch = batch_for(policy, [40, 3, 17])
    expected = gradient_bits(policy, batch)
    policy.zero_grad()
    for part in batch.split(43):
        out = policy.score(part)
        first = 0 if part.tokens.numel() == 43 else 43
        where = slice(first, first + part.tokens.numel())
        torch.autograd.backward([out.logprobs, out.entropy], [randn(batch.tokens.float(), seed)[where] for seed in (0, 1)])
    assert bits(policy.grads) == expected


def test_recomputed_blocks_and_logits_give_the_same_gradients() -> None:
    for options in ({"recompute": True}, {"logits_budget": 0}, {"level": "scalar"}):
        policy, other = lora_model("qwen3"), lora_model("qwen3", **options)
        batch = batch_for(policy, LENGTHS)
        assert gradient_bits(policy, batch) == gradient_bits(other, batch), options


def test_training_an_adapter_leaves_the_base_alone() -> None:
    policy = tiny_model("llama-tied").with_lora(rank=2)
    assert policy.base is not None
    before, batch = bits(policy.base.params), pack(sequences(LENGTHS, 977))
    optimizer = AdamW(policy, 1e-2, max_grad_norm=1.0)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = -policy.score(batch).logprobs.sum()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0] and bits(policy.base.params) == before


# ---- merging


@pytest.mark.parametrize("kind", SOME)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_a_merged_model_is_close_and_its_own(kind: str, head: Any) -> None:
    policy = lora_model(kind, head=head)
    merged = policy.merge()
    batch = batch_for(policy, [*LENGTHS, 40])
    assert merged.base is None and merged.lora is None
    with torch.no_grad():
        if head == "scalar":
            ours, theirs = policy.values(batch), merged.values(batch)
        else:
            ours, theirs = policy.score(batch).logprobs, merged.score(batch).logprobs
    torch.testing.assert_close(ours, theirs, rtol=2e-4, atol=2e-4)
    assert bits(ours) != bits(theirs), "other bits: rounded once more"
    with threads(3):
        assert bits(policy.merge().params) == bits(merged.params)


# ---- folders


def test_a_saved_adapter_is_loaded_with_its_base(tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = Model.from_pretrained(tmp_path / "base")
    policy = lora_model(base=base)
    policy.eos_token_ids = (3, 5)
    policy.save_pretrained(tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "generation_config.json",
    ]  # fmt: skip
    batch = batch_for(base, LENGTHS)
    again = Model.from_pretrained(tmp_path / "adapter")
    assert again.lora == policy.lora and again.eos_token_ids == (3, 5)
    assert forward_bits(again, batch) == forward_bits(policy, batch)
    shared = Model.from_pretrained(tmp_path / "adapter", base=base)
    assert shared.base is base and bits(shared.params) == bits(policy.params)
    other = Model.from_pretrained(tmp_path / "adapter", base=tiny_model("llama"))
    assert other.base is not None and other.base.is_from(tmp_path / "base"), "not one that came from elsewhere"
    critic = Model.from_pretrained(tmp_path / "adapter", head="scalar", base=base, seed=4)
    assert critic.head == "scalar" and critic.state_dict()["score.weight"].any()
    policy.merge().save_pretrained(tmp_path / "adapter")  # in the adapter's place
    assert "adapter_config.json" not in {path.name for path in (tmp_path / "adapter").iterdir()}
    policy.save_adapter(tmp_path / "adapter")  # and back
    assert not (tmp_path / "adapter" / "config.json").exists()


def test_an_adapters_card_goes_on_with_that_of_its_base(tmp_path: Path) -> None:
    """And the adapter's successors, trained on or merged, with both."""

    def commands(folder: Path) -> list[str]:
        return [stage.command for stage in read_lineage(folder).stages]

    tiny_model("llama").save_pretrained(tmp_path / "base", stage=Stage("pretrain"))
    policy = lora_model(base=Model.from_pretrained(tmp_path / "base"))
    policy.save_pretrained(tmp_path / "first", stage=Stage("sft", {"steps": 3}))
    assert commands(tmp_path / "first") == ["pretrain", "sft"]
    card = (tmp_path / "first" / "README.md").read_text()
    assert (
        "library_name: peft" in card
        and "1. `tutelage pretrain` (the model under it)\n" in card
        and "2. `tutelage sft`\n" in card
    )
    assert f"{policy.params.numel():,} parameters" in card and str(tmp_path) not in card
    again = Model.from_pretrained(tmp_path / "first")
    again.save_pretrained(tmp_path / "second", stage=Stage("dpo"))
    assert commands(tmp_path / "second") == ["pretrain", "sft", "dpo"]
    again.merge().save_pretrained(tmp_path / "merged", stage=Stage("dpo"))
    assert commands(tmp_path / "merged") == ["pretrain", "sft", "dpo"]
    assert "(the model under it)" not in (tmp_path / "merged" / "README.md").read_text()
    (tmp_path / "first" / "README.md").write_text("mine")
    policy.save_pretrained(tmp_path / "first", stage=Stage("ppo"))
    assert (tmp_path / "first" / "README.md").read_text() == "mine"


def test_a_reward_models_bias_is_saved_with_its_adapter(tmp_path: Path) -> None:
    reward = lora_model("llama", head="scalar")
    reward.reward_bias = 0.1
    reward.save_adapter(tmp_path)
    assert reward.base is not None
    again = Model.load_adapter(reward.base, tmp_path)
    assert again.head == "scalar" and again.reward_bias == 0.1
    batch = batch_for(reward, LENGTHS)
    assert forward_bits(again, batch) == forward_bits(reward, batch)
    with pytest.raises(ValueError, match="holds the adapter of a reward model, which has no language-model head"):
        Model.load_adapter(reward.base, tmp_path, head="lm")
    with pytest.raises(ValueError, match=r"an adapter goes on a model of its own, but base is an adapter: merge\(\) it first"):
        Model.load_adapter(reward, tmp_path)
    assert reward.merge().reward_bias == 0.1


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "peft_type": ({"peft_type": "IA3"}, 'peft_type must be "LORA", but it is "IA3"'),
    "dora": ({"use_dora": True}, "use_dora is not supported, but it is true"),
    "alpha pattern": ({"alpha_pattern": {"q_proj": 4}}, 'alpha_pattern is not supported, but it is {"q_proj": 4}'),
    "bias": ({"bias": "all"}, 'bias is not supported (only "none"), but it is "all"'),
    "start": ({"init_lora_weights": "pissa"}, "init_lora_weights is not supported: such an adapter belongs to a changed base"),
    "r": ({"r": 0}, "r must be a positive integer, but it is 0"),
    "alpha": ({"lora_alpha": None}, "lora_alpha must be a positive number, but it is null"),
    "targets": (
        {"target_modules": ".*q_proj"},
        'target_modules must be a list of names, or "all-linear", but it is ".*q_proj"',
    ),
    "rslora": ({"use_rslora": 1}, "use_rslora must be true or false, but it is 1"),
    "task": ({"task_type": "SEQ_2_SEQ_LM"}, "task_type must be one of CAUSAL_LM, SEQ_CLS, but it is"),
    "saved": ({"modules_to_save": ["lm_head"]}, "modules_to_save is not supported (only a reward model's score)"),
    "base": ({"base_model_name_or_path": "org/name"}, "base_model_name_or_path is 'org/name', which is no folder here"),
    "shape": (
        {"r": 3},
        "q_proj.lora_A.weight has shape [2, 48]), but it is 3",
    ),
    "missing": ({"target_modules": ["q_proj", "k_proj"]}, "lacks the tensors model.layers.0.self_attn.k_proj.lora_A.weight"),
    "unexpected": (
        {"target_modules": ["q_proj"]},
        "has, but an adapter of this model and adapter_config.json has not, the tensors model.layers.0.self_attn.v_proj",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_does_not_fit_is_refused(case: str, tmp_path: Path) -> None:
    base = tiny_model("llama")
    base.save_pretrained(tmp_path / "base")
    base = Model.from_pretrained(tmp_path / "base")
    lora_model(base=base, targets=("q_proj", "v_proj"), rank=2).save_adapter(tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    changed, message = REFUSED[case]
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        Model.from_pretrained(tmp_path / "adapter")
    assert "adapter" in str(error.value)


@given(st.sampled_from([*REFUSED]), st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists))
@settings(max_examples=60, deadline=None)
def test_any_value_of_any_field_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, case: str, value: Any) -> None:
    folder = tmp_path_factory.mktemp("fuzzed")
    policy = lora_model("llama", targets=("q_proj",), rank=2)
    policy.save_adapter(folder)
    path = folder / "adapter_config.json"
    changed = dict.fromkeys(REFUSED[case][0], value)
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    assert policy.base is not None
    with contextlib.suppress(ValueError):
        Model.load_adapter(policy.base, folder)


def test_other_damage_is_named(tmp_path: Path) -> None:
    policy = lora_model("llama", head="scalar")
    policy.reward_bias = 0.5
    policy.save_adapter(tmp_path)
    assert policy.base is not None
    weights = tmp_path / "adapter_model.safetensors"
    content = weights.read_bytes()
    for wrong in (b"nan", b"0,5"):
        weights.write_bytes(content.replace(b'"0.5"', b'"' + wrong + b'"'))
        with pytest.raises(ValueError, match=rf"reward_bias must be a finite number, but it is '{wrong.decode()}'"):
            Model.load_adapter(policy.base, tmp_path)
    content = weights.read_bytes()
    weights.write_bytes(content[:100])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is no safetensors file, or damaged"):
        Model.load_adapter(policy.base, tmp_path)
    weights.unlink()
    weights.with_suffix(".bin").write_bytes(b"x")
    with pytest.raises(ValueError, match=r"has no adapter_model\.safetensors: .* is a pickle, which can run any code"):
        Model.load_adapter(policy.base, tmp_path)
