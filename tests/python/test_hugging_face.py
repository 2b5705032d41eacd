"""A folder loaded and saved again: the same bytes of every tensor, and all that came with the model."""

from __future__ import annotations

import json
import logging
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers

import tutelage as tl
from chats_for_tests import CHATML, save_tokenizer
from models_for_tests import KINDS
from tutelage.hub.hugging_face import CARD, CONFIG, GENERATION_CONFIG, INDEX, WEIGHTS, Stage, read_origin, write_folder
from tutelage.hub.kinds import MISSING

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
SHAPE = tl.ModelConfig(
    vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=64
)
IDS = torch.tensor([5, 9, 250, 17, 3, 3, 40])


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        found |= safetensors.torch.load_file(path)
    return found


def same_tensors(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert second[name].dtype == tensor.dtype and second[name].shape == tensor.shape
        assert torch.equal(second[name].view(torch.uint8), tensor.view(torch.uint8)), name


def resaved(folder: Path, **options: Any) -> tuple[tl.Model, Path]:
    model = tl.Model.from_pretrained(folder)
    model.save_pretrained(folder.parent / "again", **options)
    return model, folder.parent / "again"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tl.Model(SHAPE, seed=3).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(folder: Path, name: str = CONFIG, **changes: Any) -> None:
    document = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps({**document, **changes}))


def logits(folder: Path, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with torch.no_grad():
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        return model(IDS[None]).logits[0]


# --- tensors ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3", "GPT2"])
def test_tensors_come_back_byte_for_byte(tmp_path: Path, kind: str, dtype: str) -> None:
    sizes: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
    if kind == "GPT2":
        sizes = {"n_embd": 32, "n_head": 2, "n_layer": 2, "n_positions": 64}
    else:
        sizes |= {"num_hidden_layers": 2, "max_position_embeddings": 64, "head_dim": 16, "pad_token_id": None}
    config = getattr(transformers, f"{kind}Config")(vocab_size=300, **sizes, bos_token_id=None, eos_token_id=7)
    theirs = transformers.AutoModelForCausalLM.from_config(config).to(DTYPES[dtype])
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="30KB")
    assert (tmp_path / "theirs" / INDEX).exists()
    model, again = resaved(tmp_path / "theirs")
    same_tensors(tmp_path / "theirs", again)
    saved = json.loads((again / CONFIG).read_text())
    assert saved["torch_dtype"] == dtype and saved["model_type"] == config.model_type
    assert torch.equal(logits(again), logits(tmp_path / "theirs"))
    batch = tl.pack([IDS.tolist()])
    with torch.no_grad():
        expected = torch.log_softmax(logits(again)[:-1], -1).gather(1, IDS[1:, None])[:, 0]
        assert (model.score(batch).logprobs[1:] - expected).abs().max() < 1e-5


def test_dtypes_may_differ_from_tensor_to_tensor(folder: Path) -> None:
    """transformers loads all in one: float32, which holds both."""
    mixed = {name: tensor.to(torch.bfloat16 if "norm" in name else torch.float32) for name, tensor in tensors(folder).items()}
    mixed["lm_head.weight"] = mixed["lm_head.weight"].to(torch.float16)
    safetensors.torch.save_file(mixed, folder / WEIGHTS)
    _, again = resaved(folder)
    same_tensors(folder, again)
    assert json.loads((again / CONFIG).read_text())["torch_dtype"] == "float32"


def test_trained_weights_lose_nothing(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    tl.Model.from_pretrained(folder).save_pretrained(folder, dtype="bfloat16")
    model = tl.Model.from_pretrained(folder)
    model.params[7] += 1e-5
    with caplog.at_level(logging.INFO):
        model.save_pretrained(folder.parent / "trained")
    assert (
        "torch.bfloat16 does not hold model.embed_tokens.weight exactly" in caplog.text
        and "saved as torch.float32" in caplog.text
    )
    assert torch.equal(tl.Model.from_pretrained(folder.parent / "trained").params, model.params)
    assert json.loads((folder.parent / "trained" / CONFIG).read_text())["torch_dtype"] == "float32"


def test_float64_is_read_and_not_remembered(folder: Path) -> None:
    wide = {name: tensor.double() * 1.1 for name, tensor in tensors(folder).items()}
    safetensors.torch.save_file(wide, folder / WEIGHTS)
    model, again = resaved(folder)
    assert {tensor.dtype for tensor in tensors(again).values()} == {torch.float32}
    assert torch.equal(model.state_dict()["model.norm.weight"], wide["model.norm.weight"].float())


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_dtype_can_be_asked_for(folder: Path, dtype: Any) -> None:
    model, again = resaved(folder, dtype=dtype)
    rounded = tensors(again)
    assert {tensor.dtype for tensor in rounded.values()} == {DTYPES[dtype]}
    assert all(torch.equal(rounded[name], tensor.to(DTYPES[dtype])) for name, tensor in model.state_dict().items())
    assert transformers.AutoModelForCausalLM.from_pretrained(again).dtype == DTYPES[dtype]


def test_a_weight_that_the_dtype_cannot_hold_is_named(folder: Path) -> None:
    model = tl.Model.from_pretrained(folder)
    model.state_dict()["model.norm.weight"][3] = 1e5
    message = "model.norm.weight holds 100000, too large for float16: save the model as float32"
    with pytest.raises(ValueError, match=re.escape(message)):
        model.save_pretrained(folder.parent / "half", dtype="float16")
    assert not (folder.parent / "half").exists()


def test_a_new_head_on_half_precision_is_not_rounded(folder: Path) -> None:
    tl.Model.from_pretrained(folder).save_pretrained(folder, dtype="bfloat16")
    reward = tl.Model.from_pretrained(folder, head="scalar")
    reward.save_pretrained(folder.parent / "reward")
    assert torch.equal(tl.Model.from_pretrained(folder.parent / "reward").params, reward.params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_number_that_is_none_is_named(folder: Path, dtype: str, bad: float) -> None:
    spoiled = {name: tensor.to(getattr(torch, dtype)) for name, tensor in tensors(folder).items()}
    spoiled["model.layers.1.mlp.down_proj.weight"][4, 7] = bad
    safetensors.torch.save_file(spoiled, folder / WEIGHTS)
    message = f"{folder / WEIGHTS}: model.layers.1.mlp.down_proj.weight holds {bad} at [4, 7]: the weights are damaged"
    with pytest.raises(ValueError, match=re.escape(message)):
        tl.Model.from_pretrained(folder)


def test_a_float64_beyond_float32_is_named(folder: Path) -> None:
    wide = {name: tensor.double() for name, tensor in tensors(folder).items()}
    wide["model.norm.weight"][0] = 1e300
    safetensors.torch.save_file(wide, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"model\.norm\.weight holds inf at \[0\]"):
        tl.Model.from_pretrained(folder)


# --- what comes with a model --------------------------------------------------------------------------------


def test_what_no_number_depends_on_is_kept(folder: Path) -> None:
    kept = {
        "bos_token_id": 1,
        "pad_token_id": 2,
        "initializer_range": 0.041666666666666664,
        "pretraining_tp": 1,
        "is_llama_config": True,
        "transformers.js_config": {"dtype": "q4"},
        "use_cache": False,
    }
    off = {"rope_interleaved": False, "use_mrope": None, "experts": []}
    edit(folder, **kept, **off, _name_or_path="somewhere", transformers_version="4.1", temperature=0.7, max_length=50)
    generation = {"do_sample": True, "top_p": 0.9, "eos_token_id": [4, 6], "transformers_version": "4.1", "odd": {"a": [1]}}
    edit(folder, GENERATION_CONFIG, **generation)
    _, again = resaved(folder)
    saved = json.loads((again / CONFIG).read_text())
    assert {name: saved.get(name) for name in kept} == kept and not {"temperature", "_name_or_path", *off} & set(saved)
    assert json.loads((again / GENERATION_CONFIG).read_text()) == {
        "temperature": 0.7,
        "max_length": 50,
        **generation,
        "bos_token_id": 1,
    }
    theirs = transformers.AutoModelForCausalLM.from_pretrained(again)
    assert theirs.generation_config.top_p == 0.9 and theirs.generation_config.eos_token_id == [4, 6]
    assert tl.Model.from_pretrained(again).origin == read_origin(again, tl.Model.from_pretrained(folder).origin.dtypes)  # type: ignore[union-attr]


def test_the_kind_of_model_is_kept_where_another_would_do(tmp_path: Path) -> None:
    """Without a window a Mistral is a Llama; it stays what it was until its options say otherwise."""
    config = transformers.MistralConfig(
        vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=1, num_attention_heads=8, sliding_window=None
    )
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "theirs")
    model, again = resaved(tmp_path / "theirs")
    assert json.loads((again / CONFIG).read_text())["architectures"] == ["MistralForCausalLM"]
    tl.Model(model.config).save_pretrained(tmp_path / "fresh")
    assert json.loads((tmp_path / "fresh" / CONFIG).read_text())["architectures"] == ["LlamaForCausalLM"]


def test_the_tokenizers_files_are_kept_and_those_of_another_removed(folder: Path, tmp_path: Path) -> None:
    save_tokenizer(folder, CHATML)
    (folder / "special_tokens_map.json").write_text('{"eos_token": "</s>",\n "odd": 1}')
    save_tokenizer(tmp_path / "again", CHATML, chat_template="{{ 'older' }}")
    _, again = resaved(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja"):
        assert (again / name).read_bytes() == (folder / name).read_bytes()
    save_tokenizer(folder, None, chat_template="{{ 'in the older place' }}")
    (folder / "chat_template.jinja").unlink()
    (folder / "special_tokens_map.json").unlink()
    _, again = resaved(folder)
    assert not (again / "chat_template.jinja").exists() and not (again / "special_tokens_map.json").exists()
    theirs = transformers.AutoTokenizer.from_pretrained(again)
    assert theirs.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "in the older place"


def test_the_card_continues_that_of_the_base_model(folder: Path) -> None:
    (folder / CARD).write_text("---\nlicense: apache-2.0\nlanguage: [en]\n---\n# The authors' words\n")
    _, first = resaved(folder, stage=Stage("sft", {"loss": 0.5}))
    model = tl.Model.from_pretrained(first)
    model.clone().save_pretrained(folder.parent / "last", stage=Stage("dpo"))
    origin = tl.Model.from_pretrained(folder.parent / "last").origin
    assert origin is not None and origin.lineage.base_model == "model" and origin.lineage.fields["license"] == "apache-2.0"
    assert [stage.command for stage in origin.lineage.stages] == ["sft", "dpo"]


def test_a_readme_of_somebodys_own_stays(folder: Path) -> None:
    (folder / CARD).write_text("mine")
    model = tl.Model.from_pretrained(folder)
    model.save_pretrained(folder, stage=Stage("sft"))
    assert (folder / CARD).read_text() == "mine"
    (folder / CARD).unlink()
    model.save_pretrained(folder, stage=Stage("sft"))
    model.save_pretrained(folder, stage=Stage("dpo"))  # ours: replaced
    assert "tutelage dpo" in (folder / CARD).read_text() and "tutelage sft" not in (folder / CARD).read_text()


# --- reward models ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama-tied", "mistral", "qwen2", "qwen3", "smollm3", "gpt2"])
def test_a_reward_model_in_transformers(tmp_path: Path, kind: str) -> None:
    model = tl.Model(KINDS[kind], seed=5, head="scalar")
    model.reward_bias, model.eos_token_ids = 0.25, (7,)
    model.save_pretrained(tmp_path)
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()
    texts = [[5, 9, 100, 7], [8, 7], [1, 2, 3, 4, 5, 7, 7]]
    with torch.no_grad():
        batch = tl.pack(texts)
        ours = batch.last(model.values(batch))
        rewards = torch.cat([theirs(torch.tensor([text])).logits[0] for text in texts])
    assert (ours + 0.25 - rewards).abs().max() < 1e-5
    assert "`reward_bias` in config.json is 0.25" in (tmp_path / CARD).read_text()


@pytest.mark.parametrize(("pad", "kept"), [(7, None), (2, 2), (None, None)])
def test_a_reward_is_read_at_the_token_that_ends_the_text(folder: Path, pad: int | None, kept: int | None) -> None:
    """With pad = eos transformers would take the ending for padding and read the reward before it."""
    edit(folder, pad_token_id=pad, eos_token_id=7)
    model = tl.Model.from_pretrained(folder, head="scalar")
    model.save_pretrained(folder.parent / "reward")
    assert json.loads((folder.parent / "reward" / CONFIG).read_text())["pad_token_id"] == kept
    text = [5, 9, 7]
    theirs = transformers.AutoModelForSequenceClassification.from_pretrained(folder.parent / "reward").eval()
    batch = tl.pack([text])
    with torch.no_grad():
        ours, before = model.values(batch)[-1], model.values(batch)[-2]
        assert abs(theirs(torch.tensor([text])).logits.item() - ours) < 1e-5
        theirs.config.pad_token_id = 7  # the negative control
        assert abs(theirs(torch.tensor([text])).logits.item() - before) < 1e-5 < abs(ours - before)
        if kept is not None:
            theirs.config.pad_token_id = kept
            padded = theirs(torch.tensor([[*text, kept, kept], [4, 4, 4, 4, 7]])).logits[:, 0]
            assert abs(padded[0] - ours) < 1e-5


def test_a_label_of_a_classifier_is_kept(folder: Path) -> None:
    reward = tl.Model.from_pretrained(folder, head="scalar")
    reward.save_pretrained(folder)
    edit(folder, id2label={"0": "liked"}, label2id={"liked": 0})
    _, again = resaved(folder)
    assert transformers.AutoConfig.from_pretrained(again).id2label == {0: "liked"}


# --- what does not run here ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "told"),
    [
        ("gemma3_text", "norms behind attention and MLP, and two rotary bases by block"),
        ("mixtral", "experts with a router (a mixture of experts) in the place of its MLP"),
        ("qwen3_moe", "a mixture of experts"),
        ("phi3", "matrices of q, k, v and of gate, up in one tensor each"),
        ("mamba", "a recurrent state in the place of attention"),
        ("bert", "attention in both directions"),
        ("llava", "an encoder of images or sound before the language model"),
        ("something_new", "is not known here"),
    ],
)
def test_other_kinds_are_refused_with_what_is_missing(folder: Path, kind: str, told: str) -> None:
    edit(folder, model_type=kind)
    with pytest.raises(ValueError, match=re.escape(told)) as error:
        tl.Model.from_pretrained(folder)
    assert f"{folder / CONFIG}: model_type is {kind!r}, which " in str(error.value)
    assert str(error.value).endswith("tutelage runs llama, mistral, qwen2, qwen3, smollm3, gpt2")


def test_the_kinds_that_are_told_apart_are_those_of_transformers() -> None:
    known = transformers.CONFIG_MAPPING
    assert {kind for kind in MISSING if kind not in known} <= {"internlm2", "minicpm"}  # their code lies with their weights


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("logit_scale", 0.5),
        ("num_experts", 8),
        ("rope_interleaved", True),
        ("sliding_window", 8),
        ("auto_map", {"AutoModel": "x"}),
    ],
)
def test_a_field_that_is_not_known_is_refused_unless_it_is_off(folder: Path, field: str, value: Any) -> None:
    edit(folder, **{field: value})
    message = f"{folder / CONFIG}: {field} is no field of a Llama that is known here; remove it if nothing that is computed"
    with pytest.raises(ValueError, match=re.escape(message)):
        tl.Model.from_pretrained(folder)
    for off in (None, False, [], {}, ""):
        edit(folder, **{field: off})
        tl.Model.from_pretrained(folder)


def test_a_model_without_an_origin_is_written_as_ever(tmp_path: Path) -> None:
    write_folder(tmp_path, SHAPE, "lm", tl.Model(SHAPE).named_parameters())
    assert sorted(path.name for path in tmp_path.iterdir()) == [CARD, CONFIG, WEIGHTS]
    shutil.rmtree(tmp_path)
