"""The GGUF format, the model and the tokenizer in it: against the `gguf` library, and malformed in every way."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch

import tutelage as tl
from gguf_for_tests import LLAMA3, MODELS, TEXTS, library_file, logprobs, raw_file, text, tiny
from tutelage.data.tokenizer import Tokenizer, train_tokenizer
from tutelage.hub import gguf_file, gguf_model
from tutelage.hub.gguf_file import QUANTISED, GgufFile, TensorToWrite, gguf_chunks
from tutelage.hub.gguf_model import Place, exact_dtype, places, read_model, rope_factors, rows_of
from tutelage.hub.gguf_tokenizer import PRE_TOKENIZERS, describe_tokenizer, merges_of, read_tokenizer, sentencepiece_rules


def refused(path: Path, content: bytes, message: str) -> None:
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"m\.gguf") as caught, GgufFile(path):
        pass
    assert message in str(caught.value) and len(str(caught.value)) < 600, str(caught.value)


def write(path: Path, metadata: dict[str, Any], tensors: list[TensorToWrite]) -> Path:
    path.write_bytes(b"".join(map(bytes, gguf_chunks(metadata, tensors))))
    return path


def model_tensors(model: tl.Model, kind: str = "F32") -> list[TensorToWrite]:
    architecture, _ = gguf_model.describe(model.config, Path("x"))
    weights = model.state_dict()
    return [
        place.to_write(kind, lambda place=place: weights[place.ours])  # type: ignore[misc]
        for place in places(model.config, architecture)
    ] + gguf_model.extra_tensors(model.config)


def model_metadata(model: tl.Model, **changes: Any) -> dict[str, Any]:
    architecture, described = gguf_model.describe(model.config, Path("x"))
    metadata = {"general.architecture": architecture, **described}
    metadata |= {f"{architecture}.{name.replace('__', '.')}": value for name, value in changes.items()}
    return {name: value for name, value in metadata.items() if value is not None}


# --- the format ---------------------------------------------------------------------------------------------


def test_the_library_reads_what_is_written(tmp_path: Path) -> None:
    rows = torch.arange(12.0).view(3, 4)
    metadata = {
        "a.text": "naïve 猫",
        "a.flag": True,
        "a.count": 2**32 - 1,
        "a.number": 1e-5,
        "a.texts": ["", "x y"],
        "a.ints": np.array([-1, 5], np.int32),
        "a.floats": np.array([0.5], np.float32),
    }
    tensors = [
        TensorToWrite("one", (3, 4), "F32", lambda: iter([rows[:2], rows[2:]])),
        TensorToWrite("two", (4,), "F16", lambda: iter([rows[0]])),
        TensorToWrite("three", (3, 4), "BF16", lambda: iter([rows])),
        TensorToWrite("four", (1, 32), "Q8_0", lambda: iter([torch.linspace(-3, 4, 32)[None]])),
    ]
    path = write(tmp_path / "m.gguf", metadata, tensors)
    reader = gguf.GGUFReader(path)
    plain = {name: value.tolist() if isinstance(value, np.ndarray) else value for name, value in metadata.items()}
    theirs = {name: field.contents() for name, field in reader.fields.items() if name.startswith("a.")}
    assert theirs.pop("a.number") == pytest.approx(1e-5, rel=1e-7)
    assert theirs == {name: value for name, value in plain.items() if name != "a.number"}
    values = {t.name: gguf.quants.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    with GgufFile(path) as file:
        ours: dict[str, Any] = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.metadata.items()}
        assert ours.pop("a.number") == pytest.approx(1e-5, rel=1e-7)
        assert ours == theirs
        for tensor in tensors:
            mine = torch.cat(list(file.read(tensor.name))).float()
            assert mine.numpy().tobytes() == values[tensor.name].tobytes(), tensor.name
            assert file.tensors[tensor.name].shape == tensor.shape
    assert values["one"].tolist() == rows.tolist()


def test_rows_come_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(7, 32, generator=torch.Generator().manual_seed(0))
    path = write(tmp_path / "m.gguf", {}, [TensorToWrite("t", (7, 32), "Q8_0", lambda: iter([rows]))])
    with GgufFile(path) as file:
        whole = torch.cat(list(file.read("t")))
        monkeypatch.setattr(gguf_file, "_PIECE_ELEMENTS", 70)
        pieces = list(file.read("t"))
    assert [len(piece) for piece in pieces] == [2, 2, 2, 1] and torch.equal(torch.cat(pieces), whole)


def test_numbers_that_a_type_cannot_hold(tmp_path: Path) -> None:
    for kind, value, shape in (("F16", 7e4, (1, 32)), ("F32", float("nan"), (1, 32)), ("Q8_0", float("inf"), (1, 32))):
        tensor = TensorToWrite("t", shape, kind, lambda value=value: iter([torch.full((1, 32), value)]))  # type: ignore[misc]
        with pytest.raises(ValueError, match=f"t holds a number that {kind} cannot hold"):
            list(gguf_chunks({}, [tensor]))
    with pytest.raises(ValueError, match="t has rows of 48, which are no whole Q8_0 blocks of 32: choose float32"):
        list(gguf_chunks({}, [TensorToWrite("t", (2, 48), "Q8_0", lambda: iter([]))]))


STRING, U32, BOOL = struct.pack("<I", 8), struct.pack("<I", 4), struct.pack("<I", 7)
ARRAY = struct.pack("<I", 9)
ONE = U32 + struct.pack("<I", 1)
MALFORMED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no GGUF file: it has 0 bytes"),
    "another format": (b"PK\3\4" + bytes(60), "is no GGUF file: it begins with b'PK\\x03\\x04'"),
    "version 1": (raw_file(version=1), "has GGUF version 1; 2 and 3 are read"),
    "version 4": (raw_file(version=4), "has GGUF version 4"),
    "big-endian": (raw_file(version=3 << 24), "is big-endian"),
    "only the magic": (b"GGUF", "ends at byte 4, inside the version: it is damaged or was cut short"),
    "so many tensors": (raw_file(counts=(2**60, 0)), "claims 1,152,921,504,606,846,976 tensors, more than its"),
    "so many values": (raw_file(counts=(0, 2**63)), "metadata values, more than its"),
    "one value too many": (raw_file({"a": ONE}, counts=(0, 4)), "claims 4 metadata values"),
    "a long name": (raw_file([])[:16] + struct.pack("<QQ", 1, 2**40) + bytes(64), "is a text of 1,099,511,627,776 bytes"),
    "a name behind the end": (raw_file({"a" * 50: ONE})[:60], "ends at byte 60, inside the name of metadata value 0"),
    "no UTF-8": (raw_file({b"a\xff": ONE}), "the name of metadata value 0 is no UTF-8 at byte 33"),
    "an unknown type": (raw_file({"a": struct.pack("<I", 13) + bytes(8)}), "'a' has the unknown type 13"),
    "an array of arrays": (raw_file({"a": ARRAY + struct.pack("<IQ", 9, 1)}), "'a' with elements of type 9"),
    "a long array": (raw_file({"a": ARRAY + struct.pack("<IQ", 4, 2**61)}), "elements in the metadata value 'a', more than"),
    "a long list of texts": (raw_file({"a": ARRAY + struct.pack("<IQ", 8, 2**61)}), "strings in the metadata value 'a'"),
    "a value twice": (raw_file([("a", ONE), ("a", ONE)]), "has the metadata value 'a' twice"),
    "alignment 0": (raw_file({"general.alignment": U32 + struct.pack("<I", 0)}), "general.alignment 0, which is no power"),
    "alignment 48": (raw_file({"general.alignment": U32 + struct.pack("<I", 48)}), "general.alignment 48"),
    "alignment true": (raw_file({"general.alignment": BOOL + b"\1"}), "general.alignment True"),
    "a tensor twice": (raw_file({}, [("t", (4,), 0, 0), ("t", (4,), 0, 32)], bytes(64)), "has the tensor 't' twice"),
    "rank 0": (raw_file({}, [("t", (), 0, 0)], bytes(64)), "the tensor 't' has 0 dimensions"),
    "rank 5": (raw_file({}, [("t", (1,) * 5, 0, 0)], bytes(64)), "has 5 dimensions"),
    "an empty tensor": (raw_file({}, [("t", (4, 0), 0, 0)], bytes(64)), "the tensor 't' has the shape [0, 4]"),
    "an unknown tensor type": (raw_file({}, [("t", (4,), 99, 0)], bytes(64)), "'t' is of the unknown type 99"),
    "a type not read": (raw_file({}, [("t", (32,), 20, 0)], bytes(64)), "'t' is IQ4_NL; tutelage reads F32, F16, Q4_0"),
    "half a block": (raw_file({}, [("t", (48,), 8, 0)], bytes(64)), "rows of 48, which are no whole Q8_0 blocks of 32"),
    "a crooked place": (raw_file({}, [("t", (4,), 0, 8)], bytes(64)), "lies at 8, which is no multiple of the alignment 32"),
    "cut short": (raw_file({}, [("t", (16,), 0, 0)], bytes(63)), "its tensor 't' would end at byte"),
    "far away": (raw_file({}, [("t", (4,), 0, 2**62)], bytes(64)), "its tensor 't' would end at byte 4,611,686"),
    "beyond 64 bits": (raw_file({}, [("t", (2**62, 2**62), 0, 0)], bytes(64)), "it was cut short"),
    "overlapping": (raw_file({}, [("t", (16,), 0, 0), ("u", (4,), 0, 32)], bytes(96)), "its tensors 't' and 'u' overlap"),
}  # fmt: skip


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files(tmp_path: Path, name: str) -> None:
    content, message = MALFORMED[name]
    refused(tmp_path / "m.gguf", content, message)


def test_a_header_without_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf_file, "_HEADER_BYTES", 64)
    content = raw_file({f"name {i}": STRING + text("x" * 20) for i in range(3)})
    refused(tmp_path / "m.gguf", content, "has a header of more than 0 MiB, which no model needs")


def test_well_formed_control(tmp_path: Path) -> None:
    """What the malformed files are variants of is read."""
    content = raw_file({"a": ONE, "general.alignment": U32 + struct.pack("<I", 64)}, [("t", (4, 2), 0, 0)], bytes(64))
    (tmp_path / "m.gguf").write_bytes(content)
    with GgufFile(tmp_path / "m.gguf") as file:
        assert file.metadata["a"] == 1 and file.tensors["t"].shape == (2, 4)
        assert torch.cat(list(file.read("t"))).tolist() == [[0.0] * 4] * 2


# --- fuzz ---------------------------------------------------------------------------------------------------


def fuzz_seed(path: Path) -> bytes:
    """A whole small model: every kind of value, a tokenizer, quantised and plain tensors."""
    config = tl.ModelConfig(
        vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    )
    model = tl.Model(config, seed=1)
    tokenizer = train_tokenizer(["hello hello world"] * 3, 262, ["</s>", "<s>"])
    metadata = model_metadata(model) | describe_tokenizer(tokenizer, 300, (0,), "x")
    content = write(path, metadata, model_tensors(model, "Q8_0")).read_bytes()
    assert len(content) < 40_000
    return content


def mutated(content: bytes, header: int, rng: random.Random) -> bytes:
    """A few changes, most of them in the header and at places where numbers stand."""
    changed = bytearray(content)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(min(header if rng.random() < 0.9 else len(changed), len(changed)) or 1)
        match rng.randrange(6):
            case 0:
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                changed[at] = rng.choice([0, 1, 8, 9, 127, 128, 255])
            case 2:
                number = rng.choice([0, 1, 2**16, 2**31 - 1, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1])
                changed[at : at + 8] = struct.pack("<Q", number)
            case 3:
                del changed[at + 1 :]
            case 4:
                del changed[at : at + rng.randrange(1, 9)]
            case _:
                changed[at:at] = changed[at : at + rng.randrange(1, 40)]
        if not changed:
            break
    return bytes(changed)


@pytest.mark.parametrize(
    "executions", [2_000, pytest.param(20_000, marks=pytest.mark.slow), pytest.param(400_000, marks=pytest.mark.soak)]
)
def test_fuzzed_files(tmp_path: Path, executions: int) -> None:
    """An error that names the file, or a model whose tensors are all read."""
    path = tmp_path / "m.gguf"
    content = fuzz_seed(path)
    with GgufFile(path) as file:
        header = min(tensor.offset for tensor in file.tensors.values())
    ran = {"refused": 0, "read": 0}
    seen = set()
    largest = 0.0
    for number in range(executions):
        changed = mutated(content, header, random.Random(number))
        seen.add(hash(changed))
        path.write_bytes(changed)
        deep = number % 20 == 0  # the dearest part
        if deep:
            tracemalloc.start()
        try:
            with GgufFile(path) as file:
                config, found = read_model(file)
                if deep:
                    largest = max(largest, tracemalloc.get_traced_memory()[1] / len(changed))
                    read_tokenizer(file, config.vocab_size)
                    for place in found:
                        assert sum(piece.numel() for piece in rows_of(file, place, torch.float32)) > 0
            ran["read"] += 1
        except ValueError as error:
            assert str(path) in str(error) and len(str(error)) < 1500, str(error)
            ran["refused"] += 1
        finally:
            if deep:
                tracemalloc.stop()
    assert len(seen) > 0.9 * executions and min(ran.values()) > executions // 20, ran
    assert 0 < largest < 12, largest  # times the file: the objects of a header that is all short strings


# --- models -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back(tmp_path: Path, name: str) -> None:
    """Config and every bit of every tensor, through our own file."""
    model = tiny(name)
    path = write(tmp_path / "m.gguf", model_metadata(model), model_tensors(model))
    with GgufFile(path) as file:
        config, found = read_model(file)
        assert config.core_fields("lm") == {**model.config.core_fields("lm"), "mlp_bias": config.mlp_bias}
        state = model.state_dict()
        assert sorted(place.ours for place in found) == sorted(state)
        for place in found:
            rows = torch.cat([piece.reshape(-1) for piece in rows_of(file, place, torch.float32)])
            assert torch.equal(rows.view(place.shape), state[place.ours]), place
        assert exact_dtype(file) == torch.float32


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTISED])
def test_every_type_as_the_library_has_it(tmp_path: Path, kind: str) -> None:
    """A file that the `gguf` library wrote in llama.cpp's layout: the values that it gives for the blocks, bit for bit."""
    model = tiny("llama")
    values = library_file(tmp_path / "m.gguf", model, kind)
    with GgufFile(tmp_path / "m.gguf") as file:
        config, found = read_model(file)
        assert config == model.config or config.core_fields("lm") == model.config.core_fields("lm")
        for place in found:
            rows = torch.cat([piece.reshape(-1) for piece in rows_of(file, place, torch.float32)])
            assert rows.numpy().tobytes() == values[place.ours].tobytes(), place.ours
        assert exact_dtype(file) == torch.float32  # the norms are not exact in 16 bits


def test_rows_of_q_and_k_are_put_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the control: read as they lie in the file, the model is another one."""
    for name in ("llama, tied, biases", "llama, head_dim"):
        model = tiny(name)
        path = write(tmp_path / "m.gguf", model_metadata(model), model_tensors(model))
        with GgufFile(path) as file:
            config, found = read_model(file)
            for right in (True, False):
                with monkeypatch.context() as patch:
                    if not right:
                        patch.setattr(Place, "to_ours", lambda self, tensor: tensor)
                    loaded = tl.Model(config)
                    loaded.load_state_dict(
                        {
                            p.ours: torch.cat([r.reshape(-1) for r in rows_of(file, p, torch.float32)]).view(p.shape)
                            for p in found
                        }
                    )
                difference = (logprobs(loaded) - logprobs(model)).abs().max()
                assert difference == 0 if right else difference > 0.5, name


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("BF16", torch.bfloat16)])
def test_sixteen_bits_where_they_are_exact(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    model = tiny("llama")
    model.params.copy_(model.params.to(dtype))
    path = write(tmp_path / "m.gguf", model_metadata(model), model_tensors(model, kind))
    with GgufFile(path) as file:
        assert exact_dtype(file) == dtype
    model.params += 1e-6  # the norms are stored as float32
    path = write(tmp_path / "m.gguf", model_metadata(model), model_tensors(model, kind))
    with GgufFile(path) as file:
        assert exact_dtype(file) == torch.float32


def test_older_and_other_ways_to_say_it(tmp_path: Path) -> None:
    """rope.scale_linear of 2023, one number a layer, none where there is none, a window as wide as the context."""
    model = tiny("llama")
    for changes, scaling in (
        ({"rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"rope__scale_linear": 1.0}, None),
        ({"rope__scaling__type": "none", "expert_count": 0, "attention__sliding_window": 96, "attention__causal": True}, None),
        ({"attention__head_count": np.array([4, 4], np.int32), "tensor_data_layout": "Meta AI original pth"}, None),
    ):
        path = write(tmp_path / "m.gguf", model_metadata(model, **changes), model_tensors(model))
        with GgufFile(path) as file:
            config = read_model(file)[0]
        assert config.rope_scaling == scaling and config.num_attention_heads == 4
    model = tiny("llama, llama3")
    metadata = model_metadata(model, rope__scaling__type="linear")
    with GgufFile(write(path, metadata, model_tensors(model))) as file, pytest.raises(ValueError, match=r"must be none beside"):
        read_model(file)


def test_llama3_scaling_is_found_in_its_divisors(tmp_path: Path) -> None:
    model = tiny("llama, llama3")
    metadata, tensors = model_metadata(model), model_tensors(model)
    assert tensors[-1].name == "rope_freqs.weight"
    factors = next(tensors[-1].rows())
    # transformers' formula, written out
    for i, factor in enumerate(factors.tolist()):
        wavelength = 2 * np.pi * 1e4 ** (2 * i / 64)
        smooth = (64 / wavelength - 1) / 3
        expected = 1 if wavelength < 64 / 4 else 8 if wavelength > 64 else 1 / ((1 - smooth) / 8 + smooth)
        assert factor == pytest.approx(expected, rel=1e-6)
    assert 1 < float(factors[factors > 1].min()) < 8
    changed = factors.clone()
    changed[8] *= 1.01
    tensors[-1] = TensorToWrite("rope_freqs.weight", (32,), "F32", lambda: iter([changed]))
    with (
        GgufFile(write(tmp_path / "m.gguf", metadata, tensors)) as file,
        pytest.raises(ValueError, match="not that of Llama 3's"),
    ):
        read_model(file)
    tensors[-1] = TensorToWrite("rope_freqs.weight", (16,), "F32", lambda: iter([changed[:16]]))
    with (
        GgufFile(write(tmp_path / "m.gguf", metadata, tensors)) as file,
        pytest.raises(ValueError, match=r"must be F32 \[32\]"),
    ):
        read_model(file)
    doubled = {**LLAMA3, "low_freq_factor": 2.0, "high_freq_factor": 8.0, "original_max_position_embeddings": 128}
    assert torch.allclose(rope_factors(doubled, 64, 1e4), factors)  # the same function


REFUSED_METADATA: dict[str, tuple[dict[str, Any], str]] = {
    "unknown": ({"logit_scale": 0.5}, "llama.logit_scale = 0.5 is not supported"),
    "experts": ({"expert_count": 8}, "llama.expert_count must be 0: mixtures of experts are not supported, but it is 8"),
    "both ways, listed": ({"attention__causal": np.array([1, 1], np.int32)}, "llama.attention.causal must be true"),
    "scalings": ({"rope__scaling__type": np.array([1, 1], np.int32)}, "llama.rope.scaling.type must be none, linear or yarn"),
    "yarn from": (
        {"rope__scaling__type": "yarn", "rope__scaling__factor": 2.0},
        "rope.scaling.original_context_length must be",
    ),
    "both ways": ({"attention__causal": False}, "llama.attention.causal must be true"),
    "missing": ({"block_count": None}, "llama.block_count must be an integer from 1 to 2147483647 (the same in every layer), "),
    "no number": ({"context_length": "x"}, "llama.context_length must be an integer"),
    "layers differ": ({"attention__head_count_kv": np.array([2, 4], np.int32)}, "llama.attention.head_count_kv must be"),
    "too many layers": ({"block_count": 2**31 - 1}, "llama.block_count does not fit the file's 21 tensors"),
    "one layer more": ({"block_count": 3}, "lacks the tensor blk.2.attn_norm.weight"),
    "one layer less": ({"block_count": 1}, "has the tensor 'blk.1.attn_norm.weight', which the model of its metadata has not"),
    "another width": ({"feed_forward_length": 128}, "tensor blk.0.ffn_gate.weight must have shape [128, 256], but it has [256"),
    "another vocabulary": ({"vocab_size": 330}, "llama.vocab_size must be 337, the rows of token_embd.weight, but it is 330"),
    "heads": ({"attention__head_count": 3}, "num_key_value_heads = 2 must divide num_attention_heads = 3"),
    "value width": ({"attention__value_length": 8}, "llama.attention.value_length must be 64, as attention.key_length"),
    "partial rotation": ({"rope__dimension_count": 32}, "llama.rope.dimension_count must be the whole head, 64, but it is 32"),
    "window": ({"attention__sliding_window": 32}, "llama.attention.sliding_window must be 0: llama.cpp has none for llama"),
    "epsilon": ({"attention__layer_norm_rms_epsilon": 0.0}, "llama.attention.layer_norm_rms_epsilon must be a positive number"),
    "scaling": ({"rope__scaling__type": "longrope"}, "llama.rope.scaling.type must be none, linear or yarn"),
    "no factor": ({"rope__scaling__type": "linear"}, "llama.rope.scaling.factor must be a positive number, but it is missing"),
}


@pytest.mark.parametrize("name", REFUSED_METADATA)
def test_refused_metadata(tmp_path: Path, name: str) -> None:
    changes, message = REFUSED_METADATA[name]
    model = tiny("llama")
    path = write(tmp_path / "m.gguf", model_metadata(model, **changes), model_tensors(model))
    with GgufFile(path) as file, pytest.raises(ValueError) as caught:
        read_model(file)
    assert message in str(caught.value) and "m.gguf" in str(caught.value), str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"general.architecture": "gemma3"},
            "the architecture 'gemma3', which tutelage does not run; it converts llama, qwen2,",
        ),
        ({"general.architecture": 5}, "the architecture 5"),
        ({"general.architecture": np.array([1, 2], np.int32)}, "the architecture array([1, 2]"),
        ({"split.count": np.array([1, 1], np.int32)}, "is one of [1 1] parts"),
        ({"split.count": 3}, "is one of 3 parts of a model: join them"),
    ],
)
def test_refused_files(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    model = tiny("llama")
    path = write(tmp_path / "m.gguf", model_metadata(model) | changes, model_tensors(model))
    with GgufFile(path) as file, pytest.raises(ValueError, match=r"m\.gguf") as caught:
        read_model(file)
    assert message in str(caught.value)


def test_refused_tensors(tmp_path: Path) -> None:
    model = tiny("qwen2")
    tensors = [tensor for tensor in model_tensors(model) if not tensor.name.endswith("attn_q.bias")]
    path = write(tmp_path / "m.gguf", model_metadata(model), tensors)
    with GgufFile(path) as file, pytest.raises(ValueError, match=r"lacks the tensor blk\.0\.attn_q\.bias"):
        read_model(file)
    with (
        GgufFile(write(path, model_metadata(model), tensors[1:])) as file,
        pytest.raises(ValueError, match=r"lacks the tensor tok"),
    ):
        read_model(file)
    odd = [*model_tensors(model), TensorToWrite("blk.0.extra.weight", (4,), "F32", lambda: iter([torch.zeros(4)]))]
    with GgufFile(write(path, model_metadata(model), odd)) as file, pytest.raises(ValueError, match=r"'blk\.0\.extra\.weight'"):
        read_model(file)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_none(tmp_path: Path, bad: float) -> None:
    model = tiny("llama")
    path = write(tmp_path / "m.gguf", model_metadata(model), model_tensors(model))
    with GgufFile(path) as file:
        _, found = read_model(file)
        place = next(place for place in found if place.theirs == "blk.1.attn_k.weight")
        at = file.tensors[place.theirs].offset + 400
    content = bytearray(path.read_bytes())
    content[at : at + 4] = struct.pack("<f", bad)
    path.write_bytes(content)
    with GgufFile(path) as file, pytest.raises(ValueError, match=r"the tensor blk\.1\.attn_k\.weight holds NaN or an infinity"):
        list(rows_of(file, place, torch.float32))
    content[at : at + 4] = struct.pack("<f", 7e4)
    path.write_bytes(content)
    with GgufFile(path) as file, pytest.raises(ValueError, match=r"too large for float16; choose bfloat16"):
        list(rows_of(file, place, torch.float16))


NOT_LLAMA_CPP: list[tuple[dict[str, Any], str]] = [
    ({"norm": "layernorm"}, "llama.cpp's architecture llama has no norm = 'layernorm'"),
    ({"mlp": "gelu"}, "llama.cpp's architecture llama has no mlp = 'gelu'"),
    ({"sliding_window": 32}, "llama.cpp's architecture llama has no sliding_window = 32"),
    ({"qk_norm": True, "mlp_bias": True}, "llama.cpp's architecture qwen3 has no mlp_bias = True"),
    ({"qk_norm": True, "attention_bias": True}, "llama.cpp's architecture qwen3 has no attention_bias = True"),
    ({"qk_norm": True, "rope_scaling": LLAMA3}, "llama.cpp's architecture qwen3 has no rope_scaling = 'llama3'"),
]


@pytest.mark.parametrize(("options", "message"), NOT_LLAMA_CPP)
def test_what_llama_cpp_has_not(options: dict[str, Any], message: str) -> None:
    config = tl.ModelConfig.from_dict({**MODELS["llama"].to_dict(), **options})
    with pytest.raises(ValueError, match="some/folder: ") as caught:
        gguf_model.describe(config, Path("some/folder"))
    assert message in str(caught.value)
    wide = tl.ModelConfig.from_dict({**MODELS["llama"].to_dict(), "sliding_window": 96})  # never narrower than the context
    assert gguf_model.describe(wide, Path("x"))[0] == "llama"


def test_options_that_a_file_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """An option of ModelConfig that is not among those described must be at its default."""
    config = MODELS["llama, head_dim"]
    monkeypatch.setattr(gguf_model, "_DESCRIBED", gguf_model._DESCRIBED - {"mlp_bias"})
    assert gguf_model.describe(config, Path("x"))[0] == "llama"
    monkeypatch.setattr(gguf_model, "_DESCRIBED", gguf_model._DESCRIBED - {"rope_theta"})
    with pytest.raises(ValueError, match=r"some/folder: a GGUF file has no place for rope_theta = 500000\.0"):
        gguf_model.describe(config, Path("some/folder"))
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "beta_fast": 16.0}
    scaled = dataclasses.replace(MODELS["llama"], rope_scaling=yarn)
    with pytest.raises(ValueError, match="some/folder: a GGUF file has no place for rope_scaling's beta_fast"):
        gguf_model.describe(scaled, Path("some/folder"))


# --- tokenizers ---------------------------------------------------------------------------------------------


def bpe(rule: Any, **options: Any) -> Tokenizer:
    """A byte-level tokenizer with special and ordinary added tokens at both ends of the vocabulary."""
    contents = dict(train_tokenizer(["the world says hello hello, don't it? 2024 was so"] * 4, 330, ["</s>", "<s>"]).contents)
    document = json.loads(contents["tokenizer.json"])
    document["pre_tokenizer"] = rule
    top = max(document["model"]["vocab"].values()) + 1
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    document["added_tokens"] += [
        {"id": top, "content": "<|im_end|>", "special": True, **plain},
        {"id": top + 1, "content": "<tool>", "special": False, **plain},
    ]
    document["normalizer"] = options.pop("normalizer", None)
    document["post_processor"] = options.pop("post_processor", None)
    document["model"] |= options
    contents["tokenizer.json"] = json.dumps(document).encode()
    contents["tokenizer_config.json"] = json.dumps(
        {"bos_token": {"content": "<s>"}, "eos_token": "</s>", "pad_token": "</s>", "unk_token": "<s>"}
    ).encode()
    return Tokenizer.from_contents(contents, "test")


def there_and_back(tmp_path: Path, tokenizer: Tokenizer, ends: tuple[int, ...] = (0,), **changes: Any) -> tuple[Tokenizer, Any]:
    described: dict[str, Any] = describe_tokenizer(tokenizer, tokenizer.vocab_size + 3, ends, "some/folder")
    described |= {name.replace("__", "."): value for name, value in changes.items()}
    path = write(tmp_path / "m.gguf", {k: v for k, v in described.items() if v is not None}, [])
    with GgufFile(path) as file:
        contents, eos = read_tokenizer(file, tokenizer.vocab_size + 3)
    return Tokenizer.from_contents(contents, "back"), eos


BOS: dict[str, Any] = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
    "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
    "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
}


TWICE: dict[str, Any] = {**BOS, "single": [BOS["single"][0], *BOS["single"]]}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_byte_level_tokenizers_come_back(tmp_path: Path, name: str) -> None:
    pre = PRE_TOKENIZERS[name]
    tokenizer = bpe(pre.rule, normalizer=pre.normalizer, ignore_merges=pre.ignore_merges)
    again, eos = there_and_back(tmp_path, tokenizer, (0, tokenizer.vocab_size - 2))
    assert eos == (0, tokenizer.vocab_size - 2)
    for line in [*TEXTS, "the<tool>world <|im_end|> hello hello", "don't it? 2024!"]:
        assert again.encode(line) == tokenizer.encode(line)
        assert again.backend.encode(line).ids == tokenizer.backend.encode(line).ids
    assert again.special_tokens == tokenizer.special_tokens and again.bos_token_id == 1 and again.eos_token_id == 0
    config = json.loads(again.contents["tokenizer_config.json"])
    assert (config["unk_token"], config["pad_token"]) == ("<s>", "</s>")
    with GgufFile(tmp_path / "m.gguf") as file:
        assert file.metadata["tokenizer.ggml.pre"] == name


@pytest.mark.parametrize("with_bos", [True, False])
def test_bos_in_front(tmp_path: Path, with_bos: bool) -> None:
    again, _ = there_and_back(
        tmp_path, bpe(PRE_TOKENIZERS["llama-bpe"].rule, ignore_merges=True, post_processor=BOS if with_bos else None)
    )
    assert again.adds_bos == with_bos
    changed, _ = there_and_back(
        tmp_path, bpe(PRE_TOKENIZERS["llama-bpe"].rule, ignore_merges=True), tokenizer__ggml__add_bos_token=None
    )
    assert changed.adds_bos  # what llama.cpp does for Llama 3 where the file says nothing


def test_chat_templates_come_back(tmp_path: Path) -> None:
    plain = bpe(PRE_TOKENIZERS["gpt-2"].rule)
    config = json.loads(plain.contents["tokenizer_config.json"])
    named = [{"name": "default", "template": "a {{ x }}\n"}, {"name": "tool_use", "template": "b"}]
    for changes, expected in (
        ({"chat_template.jinja": b"{{ bos_token }}\n"}, "{{ bos_token }}\n"),
        ({"tokenizer_config.json": json.dumps({**config, "chat_template": "one"}).encode()}, "one"),
    ):
        again, _ = there_and_back(tmp_path, Tokenizer.from_contents({**plain.contents, **changes}, "test"))
        assert again.contents["chat_template.jinja"].decode() == expected
    both = {**plain.contents, "tokenizer_config.json": json.dumps({**config, "chat_template": named}).encode()}
    again, _ = there_and_back(tmp_path, Tokenizer.from_contents(both, "test"))
    assert json.loads(again.contents["tokenizer_config.json"])["chat_template"] == named
    both = {**plain.contents, "chat_template.jinja": b"a {{ x }}\n", "additional_chat_templates/tool_use.jinja": b"b"}
    again, _ = there_and_back(tmp_path, Tokenizer.from_contents(both, "test"))
    assert json.loads(again.contents["tokenizer_config.json"])["chat_template"] == named
    again, _ = there_and_back(tmp_path, plain)
    assert again.chat_template is None


REFUSED_TOKENIZERS: list[tuple[dict[str, Any], str]] = [
    ({"tokenizer__ggml__model": "bert"}, "tokenizer.ggml.model must be 'gpt2' (byte-level BPE) or 'llama'"),
    ({"tokenizer__ggml__model": None}, "tokenizer.ggml.model must be a string, but it is missing"),
    ({"tokenizer__ggml__pre": "deepseek-v3"}, "tokenizer.ggml.pre must be one of gpt-2, smollm, qwen2, llama-bpe, smaug-bpe,"),
    ({"tokenizer__ggml__tokens": ["a", "a"], "tokenizer__ggml__token_type": None}, "ggml.tokens has 'a' twice, as 0 and 1"),
    ({"tokenizer__ggml__tokens": None}, "tokenizer.ggml.tokens must be a list of strings, but it is missing"),
    ({"tokenizer__ggml__tokens": [str(i) for i in range(999)]}, "tokenizer.ggml.tokens has 999 entries, but the model has"),
    ({"tokenizer__ggml__token_type": np.array([1], np.int32)}, "tokenizer.ggml.token_type must be a list of"),
    ({"tokenizer__ggml__merges": ["Ġ nothere"]}, "tokenizer.ggml.merges has 'Ġ nothere' as entry 0, but no such tokens"),
    ({"tokenizer__ggml__merges": None}, "tokenizer.ggml.merges must be a list of strings"),
    ({"tokenizer__ggml__eos_token_id": 5000}, "tokenizer.ggml.eos_token_id must be an id below"),
    ({"tokenizer__ggml__eos_token_id": np.array([1, 2], np.int32)}, "tokenizer.ggml.eos_token_id must be an id below"),
    ({"tokenizer__ggml__add_bos_token": True, "tokenizer__ggml__bos_token_id": None}, "ggml.bos_token_id must be a token id"),
    ({"tokenizer__ggml__add_bos_token": "yes"}, "tokenizer.ggml.add_bos_token must be true or false, but it is 'yes'"),
    ({"tokenizer__chat_template": True}, "tokenizer.chat_template must be a string, but it is True"),
    ({"tokenizer__ggml__model": "llama"}, "tokenizer.ggml.scores must be a list of"),
    ({"tokenizer__ggml__model": "llama", "tokenizer__ggml__remove_extra_whitespaces": True}, "whitespaces is not supported"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED_TOKENIZERS)
def test_refused_tokenizers(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=r"m\.gguf") as caught:
        there_and_back(tmp_path, bpe(PRE_TOKENIZERS["gpt-2"].rule), **changes)
    assert message in str(caught.value), str(caught.value)


def test_token_types_are_known(tmp_path: Path) -> None:
    tokenizer = bpe(PRE_TOKENIZERS["gpt-2"].rule)
    types = np.ones(tokenizer.vocab_size + 3, np.int32)
    types[4] = 7
    with pytest.raises(ValueError, match="token_type has 7 for token 4; there are types 1 to 6"):
        there_and_back(tmp_path, tokenizer, tokenizer__ggml__token_type=types)
    types[4] = 1
    types[:3] = 5  # the tokens behind keep their ids
    again, _ = there_and_back(tmp_path, tokenizer, (), tokenizer__ggml__token_type=types)
    ids = {token: again.backend.token_to_id(token) for token in ("</s>", "<s>", "!", "#")}
    assert ids == {"</s>": 0, "<s>": 1, "!": None, "#": 4}  # what is named as eos or bos is used, whatever its type
    types[:3], types[40], types[-5:] = 1, 5, 3  # a hole in front of the added tokens: they keep their ids too
    again, _ = there_and_back(tmp_path, tokenizer, (), tokenizer__ggml__token_type=types)
    assert again.backend.token_to_id("<tool>") == tokenizer.backend.token_to_id("<tool>")
    described: Any = describe_tokenizer(tokenizer, tokenizer.vocab_size + 3, (), "x")
    types = described["tokenizer.ggml.token_type"].copy()
    types[-3:] = 3
    tokens = [*described["tokenizer.ggml.tokens"][:-1], ""]
    with pytest.raises(ValueError, match=r"m\.gguf: the token '' would get the id None instead of \d+"):
        there_and_back(tmp_path, tokenizer, tokenizer__ggml__token_type=types, tokenizer__ggml__tokens=tokens)


NOT_IN_LLAMA_CPP: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda d: d["added_tokens"][-1].update(lstrip=True), "has the added token '<tool>' with lstrip, which llama.cpp has not"),
    (lambda d: d["model"].update(dropout=0.1), "has dropout = 0.1"),
    (lambda d: d.update(pre_tokenizer={"type": "Whitespace"}), "splits text by a rule (pre_tokenizer, normalizer, "),
    (lambda d: d.update(normalizer={"type": "NFC"}), "that is none of gpt-2, smollm, qwen2"),
    (lambda d: d["model"].update(ignore_merges=True), "splits text by a rule"),
    (lambda d: d["model"].update(byte_fallback=True), "treats blanks in another way"),
    (lambda d: d.update(post_processor=TWICE), "puts the ids [1, 1] around every text (post_processor); llama.cpp can add bos"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "message"), NOT_IN_LLAMA_CPP)
def test_tokenizers_that_llama_cpp_has_not(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    tokenizer = bpe(PRE_TOKENIZERS["gpt-2"].rule)
    document = json.loads(tokenizer.contents["tokenizer.json"])
    change(document)
    changed = Tokenizer.from_contents({**tokenizer.contents, "tokenizer.json": json.dumps(document).encode()}, "test")
    with pytest.raises(ValueError, match=r"some/folder: tokenizer\.json") as caught:
        describe_tokenizer(changed, changed.vocab_size, (0,), "some/folder")
    assert message in str(caught.value), str(caught.value)


def test_more_tokens_or_ends_than_there_is_place_for() -> None:
    tokenizer = bpe(PRE_TOKENIZERS["gpt-2"].rule)
    with pytest.raises(ValueError, match=r"has \d+ tokens, but the model has 100 ids"):
        describe_tokenizer(tokenizer, 100, (0,), "some/folder")
    with pytest.raises(ValueError, match=r"a model that has 4 eos ids; llama\.cpp has place for 3"):
        describe_tokenizer(tokenizer, 500, (0, 1, 2, 3), "some/folder")


def sentencepiece(pieces: dict[str, float], prefix: bool = True) -> dict[str, Any]:
    """Metadata of a SentencePiece vocabulary: unknown, bos, eos, the bytes, the pieces."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *pieces]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": np.array([0.0] * 259 + list(pieces.values()), np.float32),
        "tokenizer.ggml.token_type": np.array([2, 3, 3] + [6] * 256 + [1] * len(pieces), np.int32),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_space_prefix": prefix,
    }


PIECES = {piece: -float(rank) for rank, piece in enumerate(
    ["\u2581t", "he", "\u2581the", "in", "an", "\u2581a", "er", "\u2581the\u2581", "ing", "\u2581an", "th", "\u2581in", "re",
     *"\u2581abcdefghinrt"]
)}  # fmt: skip


def spelled(ids: list[int], tokens: list[str]) -> list[str]:
    return [tokens[i] for i in ids]


def by_scores(line: str, pieces: dict[str, float], prefix: bool) -> list[str]:
    """SentencePiece's rule: of all neighbours whose union is a piece, join those of the best score, the leftmost first."""
    symbols = list((" " + line if prefix else line).replace(" ", "\u2581"))
    while True:
        pairs = [(pieces[a + b], -i) for i, (a, b) in enumerate(itertools.pairwise(symbols)) if a + b in pieces]
        if not pairs:
            break
        at = -max(pairs)[1]
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    return [p for s in symbols for p in ([s] if s in pieces else [f"<0x{b:02X}>" for b in s.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
def test_sentencepiece_tokenizers(tmp_path: Path, prefix: bool) -> None:
    path = write(tmp_path / "m.gguf", sentencepiece(PIECES, prefix), [])
    with GgufFile(path) as file:
        contents, eos = read_tokenizer(file, 400)
        tokens: Any = file.metadata["tokenizer.ggml.tokens"]
        described = dict(file.metadata)
    tokenizer = Tokenizer.from_contents(contents, "test")
    rng = random.Random(0)
    for _ in range(300):
        line = "".join(rng.choice("abcdefghinrt  thean猫\n") for _ in range(rng.randrange(1, 20)))
        assert spelled(tokenizer.encode(line), tokens) == by_scores(line, PIECES, prefix), line
        assert tokenizer.decode(tokenizer.encode(line)) == line
    assert eos == (2,) and tokenizer.adds_bos
    again = describe_tokenizer(tokenizer, len(tokens), eos, "x")
    assert {k: again[k] for k in described if k.endswith(("tokens", "model", "_id", "prefix"))} == {
        k: v for k, v in described.items() if k.endswith(("tokens", "model", "_id", "prefix"))
    }
    assert np.array_equal(again["tokenizer.ggml.token_type"], described["tokenizer.ggml.token_type"])  # type: ignore[arg-type]
    with GgufFile(write(path, again, [])) as file:
        assert json.loads(read_tokenizer(file, 400)[0]["tokenizer.json"]) == json.loads(contents["tokenizer.json"])
    document = json.loads(contents["tokenizer.json"])
    document["model"]["merges"] = document["model"]["merges"][::-1]
    changed = Tokenizer.from_contents({**contents, "tokenizer.json": json.dumps(document).encode()}, "test")
    with pytest.raises(ValueError, match="has merges that do not follow from scores of its tokens"):
        describe_tokenizer(changed, len(tokens), eos, "x")


def test_merges_are_the_best_pieces_first() -> None:
    scores = {"a": -5.0, "b": -6.0, "ab": -1.0, "aba": -0.5, "ba": -2.0}
    assert merges_of(scores) == [("ab", "a"), ("a", "ba"), ("a", "b"), ("b", "a")]
    assert sentencepiece_rules(False)["normalizer"]["type"] == "Replace"


def test_scores_are_numbers(tmp_path: Path) -> None:
    metadata = sentencepiece(PIECES)
    metadata["tokenizer.ggml.scores"][270] = np.nan
    with GgufFile(write(tmp_path / "m.gguf", metadata, [])) as file, pytest.raises(ValueError, match="scores holds NaN"):
        read_tokenizer(file, 400)
