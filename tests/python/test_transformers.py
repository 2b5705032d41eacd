"""Our models are transformers' models: log-probs, gradients, values and files, for every architecture."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import tutelage as tl
from tutelage.config import Head

# Odd on purpose: 3 query heads share 1 key/value head; 3 x 24 is not the hidden size; 977 is a prime.
ODD = {
    "vocab_size": 977,
    "hidden_size": 96,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
    "head_dim": 24,
    "max_position_embeddings": 160,
}
GPT2 = {"vocab_size": 977, "n_positions": 160, "n_embd": 72, "n_layer": 2, "n_head": 3}
LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}
MSCALE = {**YARN, "mscale": 1.4, "mscale_all_dim": 0.7, "beta_fast": 20, "beta_slow": 2}
MIXED = ["full_attention", "sliding_attention", "sliding_attention"]
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", ODD),
    "llama, tied, biases": (
        "Llama",
        {**ODD, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "llama, linear": ("Llama", {**ODD, "rope_scaling": LINEAR, "rope_theta": 5e4}),
    "llama, llama3": ("Llama", {**ODD, "rope_scaling": LLAMA3, "rope_theta": 5e5}),
    "llama, yarn": ("Llama", {**ODD, "rope_scaling": YARN, "rope_theta": 5e4}),
    "llama, yarn, untruncated, mscale": ("Llama", {**ODD, "rope_scaling": {**MSCALE, "truncate": False}}),
    "mistral, window 9": ("Mistral", {**ODD, "sliding_window": 9}),
    "mistral, window 65": ("Mistral", {**ODD, "sliding_window": 65, "num_key_value_heads": 3}),
    "qwen2": ("Qwen2", {**ODD, "head_dim": 32, "tie_word_embeddings": True}),
    "qwen2, window": (
        "Qwen2",
        {**ODD, "head_dim": 32, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0},
    ),
    "qwen2, window in some blocks": (
        "Qwen2",
        {**ODD, "head_dim": 32, "use_sliding_window": True, "sliding_window": 20, "max_window_layers": 1},
    ),
    "qwen3, yarn, attention factor": ("Qwen3", {**ODD, "rope_scaling": {**YARN, "attention_factor": 1.3}}),
    "qwen3, window in some blocks": (
        "Qwen3",
        {**ODD, "num_hidden_layers": 3, "use_sliding_window": True, "sliding_window": 9, "layer_types": MIXED[::-1]},
    ),
    "smollm3": ("SmolLM3", {**ODD, "num_hidden_layers": 4, "pad_token_id": None}),
    "smollm3, window in blocks without RoPE": (
        "SmolLM3",
        {**ODD, "no_rope_layers": [0, 1], "use_sliding_window": True, "sliding_window": 9, "pad_token_id": None},
    ),
    "smollm3, window, biases, untied": (  # RoPE everywhere: without it a key's bias has no gradient
        "SmolLM3",
        {
            **ODD,
            "num_hidden_layers": 3,
            "no_rope_layers": [1, 1, 1],
            "layer_types": MIXED,
            "use_sliding_window": True,
            "sliding_window": 9,
            "attention_bias": True,
            "mlp_bias": True,
            "tie_word_embeddings": False,
            "pad_token_id": None,
        },
    ),
    "qwen3": ("Qwen3", ODD),
    "qwen3, tied, biases": ("Qwen3", {**ODD, "tie_word_embeddings": True, "attention_bias": True}),
    "gpt2": ("GPT2", GPT2),
    "gpt2, erf, untied": ("GPT2", {**GPT2, "activation_function": "gelu", "tie_word_embeddings": False}),
}
LENGTHS = (1, 2, 17, 130)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """These models are too small to share: on a busy machine two threads would mostly wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def reference(name: str, head: Head) -> Any:
    """A randomly initialised transformers model; every parameter random, norms and biases too."""
    kind, options = MODELS[name]
    copied = {key: dict(value) if isinstance(value, dict) else value for key, value in options.items()}
    ending = {
        "lm": "LMHeadModel" if kind == "GPT2" else "ForCausalLM",
        "scalar": "ForSequenceClassification",
    }[head]
    labels = {"num_labels": 1} if head == "scalar" else {}
    config = getattr(transformers, kind + "Config")(**copied, **labels, attn_implementation="eager")
    if kind == "GPT2":
        config.attn_pdrop = config.embd_pdrop = config.resid_pdrop = 0.0
    model = getattr(transformers, kind + ending)(config)
    generator = torch.Generator().manual_seed(7)
    for parameter_name, parameter in model.named_parameters():
        centre = 1.0 if parameter.dim() == 1 and parameter_name.endswith("weight") else 0.0
        with torch.no_grad():
            parameter.copy_(centre + 0.08 * torch.randn(parameter.shape, generator=generator))
    return model


def sequences() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 977, (length,), generator=generator) for length in LENGTHS]


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    return model(tokens[None]).logits[0]


def scores_of(model: Any, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-prob and entropy of every token, 0 at each sequence's first: what `tl.Model.score` promises."""
    logprobs, entropies = [], []
    for tokens in sequences():
        logp = torch.log_softmax(logits_of(model, tokens)[:-1] / temperature, -1)
        zero = logp.new_zeros(1)
        logprobs += [zero, logp.gather(1, tokens[1:, None])[:, 0]]
        entropies += [zero, -(logp.exp() * logp).sum(-1)]
    return torch.cat(logprobs), torch.cat(entropies)


def values_of(model: Any) -> torch.Tensor:
    """The classifier's value after every token; transformers itself gives only the last token's."""
    return torch.cat([model.score(model.base_model(tokens[None]).last_hidden_state[0])[:, 0] for tokens in sequences()])


def assert_gradients(model: tl.Model, theirs: Any) -> None:
    ours = dict(model.named_grads())
    expected = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.norm() > 1e-6, name
        error = (ours[name].double() - gradient).norm() / gradient.norm()
        assert error < 1e-4, (name, float(error))


@pytest.fixture
def saved(tmp_path: Path, request: pytest.FixtureRequest) -> tuple[Any, Path]:
    """(the transformers model in float64, the folder it was saved to in float32)."""
    name, head = request.param
    model = reference(name, head)
    model.save_pretrained(tmp_path / "theirs")
    return model.double().eval(), tmp_path / "theirs"


def every(head: Head) -> Any:
    return pytest.mark.parametrize("saved", [(name, head) for name in MODELS], indirect=True, ids=list(MODELS))


@every("lm")
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_entropies_and_gradients(saved: tuple[Any, Path], temperature: float) -> None:
    theirs, folder = saved
    model = tl.Model.from_pretrained(folder)
    batch = tl.pack(sequences())
    out = model.score(batch, temperature)
    logprobs, entropies = scores_of(theirs, temperature)
    assert (out.logprobs - logprobs).abs().max() < 2e-5
    assert (out.entropy - entropies).abs().max() < 2e-5
    weights = torch.randn(len(logprobs), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (out.logprobs * weights.float() + out.entropy * weights.flip(0).float()).sum().backward()
    (logprobs * weights.float() + entropies * weights.flip(0).float()).sum().backward()
    assert_gradients(model, theirs)


@every("scalar")
def test_values_and_gradients(saved: tuple[Any, Path]) -> None:
    theirs, folder = saved
    model = tl.Model.from_pretrained(folder)
    assert model.head == "scalar"
    batch = tl.pack(sequences())
    values = model.values(batch)
    expected = values_of(theirs)
    assert (values - expected).abs().max() < 2e-5
    with torch.no_grad():  # a sequence's reward, as transformers reads it off
        rewards = torch.cat([logits_of(theirs, tokens) for tokens in sequences()])
    assert (batch.last(values) - rewards).abs().max() < 2e-5
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(5))
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_gradients(model, theirs)


@pytest.mark.parametrize("head", ["lm", "scalar"])
@pytest.mark.parametrize("name", MODELS)
def test_what_we_save_is_the_same_model(tmp_path: Path, name: str, head: Head) -> None:
    """transformers → ours → transformers: the same bits of every logit."""
    original = reference(name, head).eval()
    original.save_pretrained(tmp_path / "theirs")
    tl.Model.from_pretrained(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    auto = transformers.AutoModelForCausalLM if head == "lm" else transformers.AutoModelForSequenceClassification
    loaded = auto.from_pretrained(tmp_path / "ours", attn_implementation="eager").eval()
    # Weights mapped from a file lie at odd addresses, where MKL's products may end in other bits: in memory of torch's own, as
    # the original's are.
    loaded.load_state_dict({name: tensor.clone() for name, tensor in loaded.state_dict().items()}, assign=True)
    loaded.tie_weights()
    tokens = sequences()[-1]
    with torch.no_grad():
        assert torch.equal(logits_of(loaded, tokens), logits_of(original, tokens))
    again = tl.Model.from_pretrained(tmp_path / "ours")
    assert again.head == head and again.config.tie_word_embeddings == original.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_our_own_model_in_transformers(tmp_path: Path, name: str) -> None:
    """Not only what came from there: a model of our own initialisation, scored by both."""
    reference(name, "lm").save_pretrained(tmp_path / "theirs")
    model = tl.Model(tl.Model.from_pretrained(tmp_path / "theirs").config, seed=11)
    model.save_pretrained(tmp_path / "ours")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").double().eval()
    with torch.no_grad():
        assert (model.score(tl.pack(sequences())).logprobs - scores_of(theirs, 1.0)[0]).abs().max() < 2e-5


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_language_model_becomes_a_reward_model(tmp_path: Path, name: str) -> None:
    """A fresh scalar head on the backbone of a language model, and no way back without one."""
    reference(name, "lm").save_pretrained(tmp_path / "theirs")
    language, reward = (tl.Model.from_pretrained(tmp_path / "theirs", head=head) for head in ("lm", "scalar"))
    shared = language.state_dict().keys() & reward.state_dict().keys()
    assert reward.state_dict().keys() - shared == {"score.weight"}
    assert all(torch.equal(language.state_dict()[key], reward.state_dict()[key]) for key in shared)
    reward.save_pretrained(tmp_path / "reward")
    if name == "llama":
        with pytest.raises(ValueError, match=r"reward lacks the tensors lm_head\.weight"):
            tl.Model.from_pretrained(tmp_path / "reward", head="lm")


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_a_reward_bias_is_subtracted_and_saved(tmp_path: Path, name: str) -> None:
    """transformers loads the folder, keeps the field and does not subtract it."""
    reference(name, "scalar").save_pretrained(tmp_path / "theirs")
    model, batch = tl.Model.from_pretrained(tmp_path / "theirs"), tl.pack(sequences())
    with torch.no_grad():
        plain = model.values(batch)
        model.reward_bias = 0.75
        model.save_pretrained(tmp_path / "ours")
        saved = tl.Model.from_pretrained(tmp_path / "ours")
        for biased in (model, model.clone(), saved):
            assert torch.equal(biased.values(batch), plain - 0.75) and biased.reward_bias == 0.75
        assert (model.double().values(batch) - plain.double() + 0.75).abs().max() < 2e-5
        theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "ours")
        assert theirs.config.reward_bias == 0.75
        rewards = torch.cat([logits_of(theirs.double().eval(), tokens) for tokens in sequences()])
    assert (batch.last(plain) - rewards).abs().max() < 2e-5
    if name == "gpt2":  # its language-model head is the embedding, so that it is one of both
        assert tl.Model.from_pretrained(tmp_path / "ours", head="lm").reward_bias == 0.0
    values = model.values(batch)
    values.sum().backward()
    gradient = model.grads.clone()
    model.reward_bias = 0.0
    model.zero_grad()
    model.values(batch).sum().backward()
    assert torch.equal(model.grads, gradient)


def test_a_wrong_option_is_noticed(tmp_path: Path) -> None:
    """Control: the tolerance is far below what a window, a rotary base or a norm's epsilon changes."""
    theirs = reference("mistral, window 9", "lm")
    theirs.save_pretrained(tmp_path)
    expected = scores_of(theirs.double().eval(), 1.0)[0]
    config = (tmp_path / "config.json").read_text()
    for old, new in (
        ('"sliding_window": 9', '"sliding_window": 10'),
        ("10000.0", "10100.0"),
        ("1e-06", "3e-04"),
    ):
        assert old in config
        (tmp_path / "config.json").write_text(config.replace(old, new))
        with torch.no_grad():
            out = tl.Model.from_pretrained(tmp_path).score(tl.pack(sequences()))
        assert (out.logprobs - expected).abs().max() > 2e-4, new
