"""Adapters against PEFT: its logits and gradients, folders both ways, its merge."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from torch import Tensor

import tutelage as tl
from tutelage import Model

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning", "ignore::UserWarning"),  # of PEFT's own
]

LENGTHS = [9, 1, 40, 17]
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": (
        "Llama",
        {
            "hidden_size": 48,
            "intermediate_size": 80,
            "num_hidden_layers": 2,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "tie_word_embeddings": True,
        },
    ),
    "qwen3": (
        "Qwen3",
        {
            "hidden_size": 40,
            "intermediate_size": 72,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
        },
    ),
    "gpt2": ("GPT2", {"n_embd": 48, "n_layer": 2, "n_head": 3, "attn_pdrop": 0, "embd_pdrop": 0, "resid_pdrop": 0}),
}
TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "qwen3": ["q_proj", "v_proj", "mlp.down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
}


def base(folder: Path, kind: str) -> Any:
    """A transformers model of random weights, saved to the folder; float64."""
    name, options = KINDS[kind]
    model = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))(
        getattr(transformers, name + "Config")(vocab_size=211, **options, pad_token_id=0)
    )
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.08 * torch.randn(parameter.shape, generator=generator)
    model.save_pretrained(folder)
    return model


def adapted(folder: Path, kind: str, head: str = "lm", **options: Any) -> Any:
    """PEFT's adapter, with A and B of random numbers, on the model saved in the folder; float64, evaluating."""
    auto = transformers.AutoModelForCausalLM
    if head == "scalar":
        auto, options["num_labels"] = transformers.AutoModelForSequenceClassification, 1
    labels = {"num_labels": options.pop("num_labels")} if head == "scalar" else {}
    loaded = auto.from_pretrained(folder, pad_token_id=0, attn_implementation="eager", **labels)
    task = peft.TaskType.CAUSAL_LM if head == "lm" else peft.TaskType.SEQ_CLS
    settings = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS[kind], **options}
    model = peft.get_peft_model(loaded, peft.LoraConfig(task_type=task, fan_in_fan_out=kind == "gpt2", **settings))
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for _, parameter in trainable(model):
            parameter.copy_(0.15 * torch.randn(parameter.shape, generator=generator))
    return model.double().eval()


def trainable(model: Any) -> list[tuple[str, Tensor]]:
    """Sorted, under our names."""
    found = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            own = name.removeprefix("base_model.model.").replace(".default", "").replace(".modules_to_save", "")
            found.append((own, parameter))
    return sorted(found)


def sequences() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, 211, (length,), generator=generator) for length in LENGTHS]


def outputs(model: Any, head: str) -> Tensor:
    """Log-probs of all tokens but first ones, or values."""
    if head == "scalar":
        inner = model.base_model.model
        return torch.cat([inner.score(inner.base_model(tokens[None]).last_hidden_state[0])[:, 0] for tokens in sequences()])
    found = []
    for tokens in sequences():
        logp = torch.log_softmax(model(tokens[None]).logits[0][:-1], -1)
        found += [logp.new_zeros(1), logp.gather(1, tokens[1:, None])[:, 0]]
    return torch.cat(found)


def ours(model: Model) -> Tensor:
    batch = tl.pack(sequences())
    return model.values(batch) if model.head == "scalar" else model.score(batch).logprobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_what_peft_writes_is_the_same_model_here(tmp_path: Path, kind: str, head: str) -> None:
    """Log-probs or values, the gradient of every A, B and score, and what merging gives."""
    base(tmp_path / "base", kind)
    theirs = adapted(tmp_path / "base", kind, head, use_rslora=kind == "qwen3")
    theirs.float().save_pretrained(tmp_path / "adapter")
    theirs.double()
    model = Model.from_pretrained(tmp_path / "adapter")
    assert model.head == head and model.lora is not None and model.lora.use_rslora == (kind == "qwen3")
    found, expected = ours(model), outputs(theirs, head)
    assert (found - expected).abs().max() < 2e-5
    with torch.no_grad():
        assert model.base is not None
        if head == "lm":
            assert (ours(model.base) - expected).abs().max() > 1e-2, "control: the adapter matters"
    weights = torch.randn(len(expected), generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (found * weights.float()).sum().backward()  # type: ignore[no-untyped-call]
    (expected * weights).sum().backward()  # type: ignore[no-untyped-call]
    grads = dict(model.named_grads())
    assert sorted(grads) == [name for name, _ in trainable(theirs)]
    for name, parameter in trainable(theirs):
        assert parameter.grad is not None and parameter.grad.norm() > 1e-6, name
        error = (grads[name].double() - parameter.grad).norm() / parameter.grad.norm()
        assert error < 1e-4, (name, float(error))
    if head == "lm":
        merged, state = dict(model.merge().named_parameters()), theirs.merge_and_unload().state_dict()
        for name, view in merged.items():
            torch.testing.assert_close(view.double(), state[name], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", ["lm", "scalar"])
def test_what_we_write_is_the_same_model_in_peft(tmp_path: Path, kind: str, head: Any) -> None:
    base(tmp_path / "base", kind)
    model = Model.from_pretrained(tmp_path / "base").with_lora(4, 6, TARGETS[kind], head, seed=3)
    model.params += 0.1 * torch.randn(model.params.numel(), generator=torch.Generator().manual_seed(2))
    model.save_adapter(tmp_path / "adapter")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if head == "lm":
            theirs = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", attn_implementation="eager")
        else:
            bare = transformers.AutoModelForSequenceClassification.from_pretrained(
                tmp_path / "base", num_labels=1, pad_token_id=0, attn_implementation="eager"
            )
            theirs = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter")
    assert not [str(warning.message) for warning in told if re.search("missing|unexpected|ignored", str(warning.message), re.I)]
    with torch.no_grad():
        assert (ours(model) - outputs(theirs.double().eval(), head)).abs().max() < 2e-5


def test_a_folder_trained_with_dropout_is_read_and_it_is_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    base(tmp_path / "base", "llama")
    theirs = adapted(tmp_path / "base", "llama", lora_dropout=0.1)
    theirs.float().save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        model = Model.from_pretrained(tmp_path / "adapter")
        assert (ours(model) - outputs(theirs.double(), "lm")).abs().max() < 2e-5
    assert caplog.text.count("adapter_config.json: lora_dropout not used, tutelage has no dropout") == 1
    caplog.clear()
    model.save_adapter(tmp_path / "again")
    Model.from_pretrained(tmp_path / "again")
    assert "dropout" not in caplog.text, "control"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"rank_pattern": {"q_proj": 3}}, "rank_pattern"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"modules_to_save": ["embed_tokens"]}, "modules_to_save"),
    ],
    ids=str,
)
def test_what_pefts_options_change_is_refused_by_name(tmp_path: Path, options: dict[str, Any], field: str) -> None:
    base(tmp_path / "base", "llama")
    adapted(tmp_path / "base", "llama", **options).float().save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=rf"adapter_config\.json: {field} is not supported"):
        Model.from_pretrained(tmp_path / "adapter")
