"""`tutelage convert`: folders of GGUF files, GGUF files of folders, and back again byte for byte."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
import transformers

import tutelage as tl
from gguf_for_tests import MODELS, TEXTS, library_file, logprobs, save, tiny
from tutelage import files
from tutelage.bench import llama_cpp, memory
from tutelage.cli import main
from tutelage.data.tokenizer import Tokenizer
from tutelage.hub import gguf_file, weights
from tutelage.hub.hugging_face import CONFIG, WEIGHTS, read_eos_token_ids, write_folder
from tutelage.train.configs import ConvertConfig
from tutelage.train.convert import convert

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def run(source: Path, target: Path, **options: Any) -> Any:
    return convert(ConvertConfig(str(source), str(target), **options))


def config_of(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / CONFIG).read_text())
    return document


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, "float32") for name in MODELS), ("llama", "float16"), ("qwen2", "bfloat16"), ("gpt2", "bfloat16")],
)
def test_a_folder_comes_back_byte_for_byte(tmp_path: Path, name: str, dtype: str) -> None:
    """Weights, config, ids of every text, chat template, special ids."""
    model = tiny(name)
    folder = save(model, tmp_path / "folder", DTYPES[dtype])
    made = run(folder, tmp_path / "m.gguf")
    again = run(tmp_path / "m.gguf", tmp_path / "again")
    assert (made.dtype, again.dtype) == (dtype, dtype) and made.weights == again.weights == model.params.numel()
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()
    assert config_of(tmp_path / "again") == config_of(folder)
    assert read_eos_token_ids(tmp_path / "again") == read_eos_token_ids(folder) == (0,)
    tokenizer, original = Tokenizer.from_pretrained(tmp_path / "again"), model.tokenizer
    assert original is not None
    assert tokenizer.encode_batch(TEXTS) == original.encode_batch(TEXTS)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (original.bos_token_id, original.eos_token_id)
    messages = [{"role": "user", "content": "hello world"}]
    assert tokenizer.chat_ids(messages, add_generation_prompt=True) == original.chat_ids(messages, add_generation_prompt=True)
    assert tokenizer.contents["chat_template.jinja"] == original.contents["chat_template.jinja"]


@pytest.mark.parametrize("name", ["llama", "llama, tied, biases", "qwen2", "qwen3", "gpt2"])
def test_transformers_loads_what_is_made(tmp_path: Path, name: str) -> None:
    run(save(tiny(name), tmp_path / "folder"), tmp_path / "m.gguf")
    run(tmp_path / "m.gguf", tmp_path / "again")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "again", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    model = tl.Model.from_pretrained(tmp_path / "again")
    ids = torch.randint(0, 330, (40,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = torch.log_softmax(theirs.double()(ids[None]).logits[0, :-1], -1).gather(1, ids[1:, None])[:, 0]
        assert (model.score(tl.pack([ids])).logprobs[1:] - expected).abs().max() < 2e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert model.tokenizer is not None
    for text in TEXTS[:2]:  # for a Qwen2 transformers composes characters, whatever tokenizer.json says
        assert tokenizer(text, add_special_tokens=False)["input_ids"] == model.tokenizer.encode(text)
    messages = [{"role": "user", "content": "hello"}]
    ids_of_chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids_of_chat == model.tokenizer.chat_ids(messages, add_generation_prompt=True)
    assert (tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token) == ("</s>", "<s>", "</s>")


@pytest.mark.parametrize("kind", ["Q4_1", "Q8_0", "Q6_K"])
def test_a_quantised_file_of_the_library(tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny("llama")
    values = library_file(tmp_path / "m.gguf", model, kind, general__name="Tiny", general__license="apache-2.0")
    run(tmp_path / "m.gguf", tmp_path / "folder", json=str(tmp_path / "figures.json"))
    made = tl.Model.from_pretrained(tmp_path / "folder")
    for name, weight in made.named_parameters():
        assert weight.numpy().tobytes() == values[name].tobytes(), name
    assert "176,640 weights in 21 tensors as float32; in " in capsys.readouterr().out.replace(
        f"{made.params.numel():,}", "176,640"
    )
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures.items() >= {"command": "convert", "tensors": 21, "weights": made.params.numel(), "dtype": "float32"}.items()
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "license: apache-2.0" in card and "It began as `Tiny`." in card and "1. `tutelage convert`" in card
    assert "source: m.gguf" in card and f"types: F32, {kind}" in card
    half = run(tmp_path / "m.gguf", tmp_path / "half", dtype="bfloat16")
    assert half.dtype == "bfloat16" and config_of(tmp_path / "half")["torch_dtype"] == "bfloat16"
    loaded = tl.Model.from_pretrained(tmp_path / "half")
    assert torch.equal(loaded.params, made.params.bfloat16().float())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_a_file_of_another_type(tmp_path: Path, dtype: str) -> None:
    """As the `gguf` library rounds; norms and biases stay float32."""
    model = tiny("llama, tied, biases")
    folder = save(model, tmp_path / "folder")
    assert run(folder, tmp_path / "m.gguf", dtype=dtype).dtype == dtype
    kind = gguf.GGMLQuantizationType[{"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]]
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    ours = model.state_dict()
    down = ours["model.layers.1.mlp.down_proj.weight"].numpy()
    mine = tensors["blk.1.ffn_down.weight"]
    assert mine.tensor_type == kind and mine.data.tobytes() == gguf.quants.quantize(down, kind).tobytes()
    for name, theirs in (("input_layernorm.weight", "attn_norm.weight"), ("self_attn.v_proj.bias", "attn_v.bias")):
        assert tensors[f"blk.0.{theirs}"].data.tobytes() == ours[f"model.layers.0.{name}"].numpy().tobytes()
    bias = ours["model.layers.0.self_attn.q_proj.bias"].view(4, 2, 32).transpose(1, 2).reshape(-1)
    assert tensors["blk.0.attn_q.bias"].data.tobytes() == bias.numpy().tobytes()


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    model = tiny("llama")
    folder = save(model, tmp_path / "folder")
    run(folder, tmp_path / "m.gguf")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    for source, target, message in (
        (tmp_path / "m.gguf", folder, "is not empty: pass --overwrite to replace a model in it, or another target"),
        (folder, tmp_path / "m.gguf", "exists already: pass --overwrite to replace it, or another target"),
    ):
        with pytest.raises(files.RunFolderError, match=message):
            run(source, target)
    (tmp_path / "file").write_text("x")
    (tmp_path / "others" / "sub").mkdir(parents=True)
    (tmp_path / "mixed" / "sub").mkdir(parents=True)
    (tmp_path / "mixed" / CONFIG).write_text("{}")
    for source, target, message in (
        (tmp_path / "m.gguf", tmp_path / "file", "is a file: give the folder to write the model to"),
        (folder, tmp_path / "others", "is a folder: give the GGUF file to write"),
        (tmp_path / "m.gguf", tmp_path / "others", "is not the folder of a model alone, so nothing in it was touched"),
        (tmp_path / "m.gguf", tmp_path / "mixed", "is not the folder of a model alone, so nothing in it was touched"),
    ):
        with pytest.raises(files.RunFolderError, match=message):
            run(source, target, overwrite=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (folder / "special_tokens_map.json").write_text("{}")
    (folder / "additional_chat_templates").mkdir()  # a model's folder may have this one
    (folder / "additional_chat_templates" / "rag.jinja").write_text("x")
    run(tmp_path / "m.gguf", folder, overwrite=True)
    assert not (folder / "special_tokens_map.json").exists() and not (folder / "additional_chat_templates").exists()
    assert (folder / WEIGHTS).read_bytes() == before[WEIGHTS]
    run(folder, tmp_path / "m.gguf", overwrite=True)
    (tmp_path / "empty").mkdir()
    run(tmp_path / "m.gguf", tmp_path / "empty")
    assert (tmp_path / "empty" / WEIGHTS).read_bytes() == before[WEIGHTS]


def test_a_failure_leaves_nothing(tmp_path: Path) -> None:
    """The last tensor holds NaN: found when everything else has been written."""
    model = tiny("llama")
    run(save(model, tmp_path / "folder"), tmp_path / "m.gguf")
    content = bytearray((tmp_path / "m.gguf").read_bytes())
    content[-4:] = struct.pack("<f", float("nan"))
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"the tensor .*\.weight holds NaN or an infinity"):
        run(tmp_path / "m.gguf", tmp_path / "again")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.gguf"]
    model.params[5] = 1e6
    save(model, tmp_path / "folder")
    with pytest.raises(ValueError, match=r"token_embd\.weight holds a number that F16 cannot hold"):
        run(tmp_path / "folder", tmp_path / "n.gguf", dtype="float16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "m.gguf"]


def test_sources_that_cannot_be_converted(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing: give a GGUF file or the folder of a model"):
        run(tmp_path / "nothing", tmp_path / "x")
    with pytest.raises(ValueError, match=r"there is no target: tutelage convert model\.gguf folder/"):
        ConvertConfig("x")
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match="q8_0 is for GGUF files; a folder holds float32"):
        run(tmp_path / "m.gguf", tmp_path / "x", dtype="q8_0")
    model = tl.Model(MODELS["llama"], head="scalar")
    write_folder(tmp_path / "reward", model.config, "scalar", model.named_parameters())
    with pytest.raises(ValueError, match=r"reward holds a reward model, for which llama\.cpp has no place"):
        run(tmp_path / "reward", tmp_path / "x")
    bare = tl.Model(MODELS["llama"])
    bare.save_pretrained(tmp_path / "bare")
    with pytest.raises(FileNotFoundError, match=r"no tokenizer\.json in .*bare"):
        run(tmp_path / "bare", tmp_path / "x")


def test_without_the_gguf_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Needed for blocks only."""
    model = tiny("llama")
    folder = save(model, tmp_path / "folder")
    library_file(tmp_path / "m.gguf", model, "Q4_1")

    def missing(name: str) -> Any:
        raise ImportError(name)

    monkeypatch.setattr(gguf_file.importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"need the gguf package: pip install 'tutelage\[hub\]'"):
        run(tmp_path / "m.gguf", tmp_path / "again")
    run(folder, tmp_path / "plain.gguf")
    monkeypatch.undo()
    assert importlib.import_module("gguf") is gguf


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(tiny("llama"), tmp_path / "folder")
    assert main(["convert", str(folder), str(tmp_path / "m.gguf"), "--dtype", "float16"]) == 0
    assert "as float16; in " in capsys.readouterr().out
    assert main(["convert", str(tmp_path / "m.gguf"), str(tmp_path / "again")]) == 0
    assert tl.Model.from_pretrained(tmp_path / "again").config.core_fields("lm") == MODELS["llama"].core_fields("lm")
    assert main(["convert", "--source", str(tmp_path / "m.gguf"), "--target", str(tmp_path / "again")]) == 2
    assert "tutelage convert: " in (told := capsys.readouterr().err) and "is not empty: pass --overwrite" in told
    with pytest.raises(SystemExit):
        main(["convert", str(tmp_path / "m.gguf")])
    assert "there is no target" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["llama", "llama, yarn", "qwen2", "qwen3", "gpt2"])
def test_chat_eval_and_generate_on_it(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    run(save(tiny(name), tmp_path / "folder"), tmp_path / "m.gguf")
    run(tmp_path / "m.gguf", tmp_path / "again")
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n/save {tmp_path / 'said.jsonl'}\n/quit\n"))
    assert main(["chat", str(tmp_path / "again"), "--max_new_tokens", "6", "--temperature", "0"]) == 0
    model = tl.Model.from_pretrained(tmp_path / "folder")
    assert model.tokenizer is not None
    prompt = model.tokenizer.chat_ids([{"role": "user", "content": "hello"}], add_generation_prompt=True)
    said = model.generate([prompt], 6, temperature=0, stop_token_ids=[0, 3]).texts
    assert said is not None
    assert json.loads((tmp_path / "said.jsonl").read_text())["messages"][-1] == {"role": "assistant", "content": said[0]}
    figures = str(tmp_path / "figures.json")
    (tmp_path / "rows.jsonl").write_text(json.dumps({"prompt": "hello", "completion": "x"}) + "\n")
    options = ["--model", str(tmp_path / "again"), "--data", str(tmp_path / "rows.jsonl"), "--json", figures]
    assert main(["eval", "accuracy", *options, "--max_new_tokens", "4"]) == 0
    assert json.loads(Path(figures).read_text())["count"] == 1
    assert main(["generate", str(tmp_path / "again"), "--prompt", "hello", "--max_new_tokens", "4", "--json", figures]) == 0
    assert json.loads(Path(figures).read_text())["rows"] == 1


WATCHED = """
import collections, pickle, sys
from tutelage.cli import main
folder, work = sys.argv[1:]
open(f"{work}/rows.jsonl", "w").write('{"prompt": "hello", "completion": " world"}\\n' * 4)
data = ["--data", f"{work}/rows.jsonl"]
commands = [
    ["convert", folder, f"{work}/m.gguf", "--dtype", "q8_0"],
    ["convert", f"{work}/m.gguf", f"{work}/again"],
    ["sft", "--model", f"{work}/again", *data, "--output_dir", f"{work}/sft", "--batch_size", "2", "--lora_rank", "2"],
    ["eval", "accuracy", "--model", f"{work}/sft/model", *data, "--max_new_tokens", "3"],
    ["generate", f"{work}/sft/model", "--prompt", "hello", "--max_new_tokens", "3"],
    ["chat", f"{work}/sft/model", "--max_new_tokens", "3"],
]
watched = []
sys.addaudithook(lambda event, arguments: watched.append(arguments) if event == "pickle.find_class" else None)
for command in commands:
    assert main(command) == 0, command
assert watched == [], watched
pickle.loads(pickle.dumps(collections.OrderedDict()))
assert watched == [("collections", "OrderedDict")], "the hook sees nothing"
"""


def test_no_command_unpickles_anything(tmp_path: Path) -> None:
    folder = save(tiny("llama"), tmp_path / "folder")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    command = [sys.executable, "-c", WATCHED, str(folder), str(tmp_path)]
    done = subprocess.run(command, env=environment, input="hello\n/quit\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


if llama_cpp.installed():  # a peer: compiled on demand, extra [bench-llama]

    @pytest.mark.parametrize("name", [name for name in MODELS if name != "gpt2, untied"])
    def test_llama_cpp_agrees(tmp_path: Path, name: str) -> None:
        """The same ids and log-probs. Its cache of keys and values is float16."""
        import ctypes

        lib: Any = importlib.import_module("llama_cpp")
        model = tiny(name)
        assert model.tokenizer is not None
        run(save(model, tmp_path / "folder"), tmp_path / "m.gguf")
        tokens = torch.randint(0, 330, (60,), generator=torch.Generator().manual_seed(9)).tolist()
        with llama_cpp.LlamaCpp(tmp_path / "m.gguf", 1, 96, 1) as peer:
            vocabulary = lib.llama_model_get_vocab(peer._model)
            for text in TEXTS[:3]:
                data = text.encode()
                ids = (ctypes.c_int32 * 99)()
                count = lib.llama_tokenize(vocabulary, data, len(data), ids, 99, False, False)
                assert list(ids[:count]) == model.tokenizer.encode(text)
            peer._decode([(token, place, 0, True) for place, token in enumerate(tokens)])
            logits = torch.stack([peer.logits(place, model.config.vocab_size) for place in range(59)])
        theirs = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens[1:])[:, None])[:, 0]
        assert (theirs - logprobs(model)[1:]).abs().max() < 2e-2


def converting(source: str, target: str, mapped_at_once: int) -> Any:
    weights._MAPPED_AT_ONCE = mapped_at_once  # in the process that is measured

    def quietly() -> None:
        with contextlib.redirect_stdout(sys.stderr):
            run(Path(source), Path(target))

    return quietly


@pytest.mark.slow
def test_less_memory_than_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In both directions; and not because the pages of a mapped file would not be counted."""
    config = tl.ModelConfig(
        vocab_size=337, hidden_size=512, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=8,
        max_position_embeddings=96,
    )  # fmt: skip
    model = tl.Model(config, seed=0)
    model.tokenizer = tiny("llama").tokenizer
    folder = str(save(model, tmp_path / "folder"))
    size = 4 * model.params.numel()
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setattr(converting, "__module__", "test_convert")

    def peak(source: str, target: str, mapped_at_once: int = weights._MAPPED_AT_ONCE) -> int:
        return memory.peak_bytes(converting, source, str(tmp_path / target), mapped_at_once, threads=1)

    bound = weights._MAPPED_AT_ONCE + (48 << 20)
    assert bound < 0.65 * size
    assert peak(folder, "m.gguf") < bound
    assert peak(str(tmp_path / "m.gguf"), "again") < bound
    assert peak(folder, "control.gguf", size) > size
    for name in ("m.gguf", "again", "control.gguf"):
        files.remove(tmp_path / name)
