"""Pretraining: it learns, twice the same, and the same through any kill, signal and thread count (P5;
RELIABILITY rows 1, 9, 13, 15–17)."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from forked import Forker, forker
from tutelage import Model
from tutelage.files import RunFolderError, newest_complete
from tutelage.hub.model_card import read_lineage
from tutelage.train.configs import PretrainConfig
from tutelage.train.pretrain import SIZES, pretrain, with_defaults
from tutelage.train.run import NonFiniteError

STEPS = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows of made-up words: text that a model of this size can learn something about in eight steps."""
    content = random.Random(0)
    words = ["".join(content.choices("abcdefgh", k=content.randint(2, 6))) for _ in range(50)]
    rows = [{"text": " ".join(content.choices(words, k=content.randint(5, 50)))} for _ in range(60)]
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def fields(path: Path, folder: Path, **others: Any) -> dict[str, Any]:
    """Options of a run of a second: two micro-batches a step, saves that fall beside the lines of metrics."""
    return {
        "output_dir": str(folder),
        "data": [str(path)],
        "size": "tiny",
        "vocab_size": 280,
        "context": 32,
        "batch_tokens": 64,
        "micro_batch_tokens": 32,
        "max_steps": STEPS,
        "save_steps": 2,
        "logging_steps": 3,
        "eval_steps": 4,
        "plot": False,
        **others,
    }


def config(path: Path, folder: Path, **others: Any) -> PretrainConfig:
    values = fields(path, folder, **others)
    return PretrainConfig(**{**values, "data": tuple(values["data"])})


def digest(folder: Path) -> str:
    """SHA-256 of all that a finished run must end with: newest checkpoint, model, tokenizer, metrics."""
    newest = newest_complete(folder)
    assert newest is not None and newest.name.startswith(f"step-{STEPS:08d}")
    paths = [*sorted(newest.iterdir()), *sorted((folder / "model").iterdir()), folder / "metrics.jsonl"]
    content = hashlib.sha256()
    for path in paths:
        content.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return content.hexdigest()


@pytest.fixture(scope="module")
def children(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forker]:
    with forker(tmp_path_factory.mktemp("children"), "children", "torch._dynamo") as parent:
        yield parent


@dataclasses.dataclass(frozen=True)
class Whole:
    """An uninterrupted run: its digest, what it passed on its way, how long it took."""

    digest: str
    points: int
    operations: int
    seconds: float


@pytest.fixture(scope="module")
def whole(children: Forker, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    folder = tmp_path_factory.mktemp("whole")
    begin = time.monotonic()
    status, output = children.run("children:passed", config=fields(data, folder))
    assert status == 0, output
    points, operations = map(int, output.splitlines()[-1].split())
    return Whole(digest(folder), points, operations, time.monotonic() - begin)


# --- P5: killed at any instant ------------------------------------------------------------------------------


def kill_and_resume(children: Forker, data: Path, folder: Path, kill: dict[str, int], **others: Any) -> str:
    """The digest of a run that is killed once and resumed."""
    status, output = children.run("children:train", config=fields(data, folder), **kill)
    assert status == -signal.SIGKILL, output
    return resume(children, data, folder, **others)


def resume(children: Forker, data: Path, folder: Path, **others: Any) -> str:
    status, output = children.run("children:train", config=fields(data, folder, resume="auto"), **others)
    assert status == 0, output
    return digest(folder)


def test_a_kill_at_named_points_changes_no_bit(children: Forker, data: Path, whole: Whole, tmp_path: Path) -> None:
    for number, point in enumerate(random.Random(1).sample(range(1, whole.points + 1), 2)):
        assert kill_and_resume(children, data, tmp_path / str(number), {"point": point}) == whole.digest


def test_a_kill_between_disk_operations_changes_no_bit(children: Forker, data: Path, whole: Whole, tmp_path: Path) -> None:
    for number, operation in enumerate(random.Random(2).sample(range(1, whole.operations + 1), 2)):
        killed = kill_and_resume(children, data, tmp_path / str(number), {"operation": operation})
        assert killed == whole.digest


def killed_at_a_random_time(children: Forker, data: Path, folder: Path, seconds: float, moments: random.Random) -> int:
    child = children.start("children:train", config=fields(data, folder, resume="auto"))
    time.sleep(moments.uniform(0.0, seconds))  # the instant is the random variable of this test
    os.kill(child.pid, signal.SIGKILL)
    return child.wait()


def test_several_kills_at_random_times_change_no_bit(children: Forker, data: Path, whole: Whole, tmp_path: Path) -> None:
    moments = random.Random(3)
    for _ in range(2):
        killed_at_a_random_time(children, data, tmp_path / "run", whole.seconds, moments)
    assert resume(children, data, tmp_path / "run") == whole.digest


@pytest.mark.parametrize(
    "rounds", [pytest.param(5, marks=pytest.mark.slow, id="20"), pytest.param(25, marks=pytest.mark.soak, id="100")]
)
def test_many_kills(children: Forker, data: Path, whole: Whole, tmp_path: Path, rounds: int) -> None:
    """Four kills a round: at a named point, at a disk operation, and two at random times."""
    moments = random.Random(rounds - 1)
    for number in range(rounds):
        folder = tmp_path / f"point-{number}"
        point = moments.randint(1, whole.points)
        assert kill_and_resume(children, data, folder, {"point": point}) == whole.digest
        folder = tmp_path / f"operation-{number}"
        operation = moments.randint(1, whole.operations)
        assert kill_and_resume(children, data, folder, {"operation": operation}) == whole.digest
    for number in range(rounds):
        folder = tmp_path / f"time-{number}"
        for _ in range(2):
            killed_at_a_random_time(children, data, folder, whole.seconds, moments)
        assert resume(children, data, folder) == whole.digest


def test_a_resume_that_forgets_where_the_data_was_ends_elsewhere(
    children: Forker, data: Path, whole: Whole, tmp_path: Path
) -> None:
    """The negative control: without the cursor the kill tests above must fail."""
    late = {"point": whole.points * 3 // 4}
    killed = kill_and_resume(children, data, tmp_path / "run", late, forget_cursor=True)
    assert killed != whole.digest


def test_a_resume_with_other_threads_changes_no_bit(children: Forker, data: Path, whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    half = {"point": whole.points // 2}
    assert kill_and_resume(children, data, folder, half, threads=2) == whole.digest


# --- signals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_a_signal_lets_the_step_finish_and_save(
    children: Forker, data: Path, whole: Whole, tmp_path: Path, number: signal.Signals
) -> None:
    folder = tmp_path / "run"
    status, output = children.run("children:command", config=fields(data, folder), name="updated", point=3, number=number)
    assert status == 128 + number
    assert f"stopped by {number.name} after step 3, which is saved" in output
    assert "the same command with --resume auto" in output
    assert newest_complete(folder) == folder / "checkpoints" / "step-00000003"
    assert resume(children, data, folder) == whole.digest


def test_a_second_signal_stops_at_once(children: Forker, data: Path, whole: Whole, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    status, _ = children.run(
        "children:command",
        config=fields(data, folder),
        name="updated",
        point=3,
        number=signal.SIGINT,
        times=2,
    )
    assert status == -signal.SIGINT
    assert newest_complete(folder) == folder / "checkpoints" / "step-00000002"
    assert resume(children, data, folder) == whole.digest


# --- what a run is ------------------------------------------------------------------------------------------


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_training_twice_gives_equal_files(data: Path, whole: Whole, tmp_path: Path) -> None:
    pretrain(config(data, tmp_path / "again"))
    assert digest(tmp_path / "again") == whole.digest
    pretrain(config(data, tmp_path / "other", seed=1))
    assert digest(tmp_path / "other") != whole.digest


@pytest.mark.usefixtures("one_thread")
def test_it_learns_and_leaves_everything_behind(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figures = tmp_path / "out" / "figures.json"
    run = tmp_path / "run"
    result = pretrain(config(data, run, max_steps=40, eval_steps=20, plot=True, json=str(figures)))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    measured = [line["eval_bits_per_byte"] for line in lines if "eval_bits_per_byte" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert losses[-1] < losses[0] - 1
    assert len(measured) == 2 and measured[1] < measured[0] < 8
    assert result.bits_per_byte["all"] == measured[-1] == pytest.approx(result.bits_per_byte[str(data)])

    model = Model.from_pretrained(result.folder)
    (stage,) = read_lineage(result.folder).stages
    assert stage.command == "pretrain" and stage.figures["bits_per_byte"] == result.bits_per_byte["all"]
    assert model.params.numel() == result.parameters
    assert model.tokenizer is not None and model.tokenizer.vocab_size == model.config.vocab_size

    resolved = yaml.safe_load((run / "config.yaml").read_text())
    assert resolved["format_version"] == 1
    assert resolved["learning_rate"] == SIZES["tiny"].learning_rate
    written = json.loads(figures.read_text())
    assert written["format_version"] == 1
    assert written["bits_per_byte"] == result.bits_per_byte
    assert written["baselines"] == result.baselines
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "gzip -9, document by document" in output and f"{result.baselines['gzip_stream']:.3f}" in output
    assert "█" in output


@pytest.mark.usefixtures("one_thread")
def test_a_run_without_held_out_documents(data: Path, tmp_path: Path) -> None:
    result = pretrain(config(data, tmp_path / "run", held_out_fraction=0.0, max_steps=2))
    assert result.bits_per_byte == {} and result.baselines == {}


@pytest.mark.usefixtures("one_thread")
def test_a_given_tokenizer_and_two_weighted_sources(data: Path, tmp_path: Path) -> None:
    first = pretrain(config(data, tmp_path / "first", max_steps=1))
    book = tmp_path / "book.txt"
    book.write_text("A whole book.\n" * 50)
    sources = [f"{data}:2", str(book)]
    given = config(data, tmp_path / "second", data=sources, tokenizer=str(first.folder), vocab_size=0, max_steps=1)
    result = pretrain(given)
    assert set(result.bits_per_byte) == {str(data), str(book), "all"}
    tokenizers = [run / "model" / "tokenizer.json" for run in (tmp_path / "first", tmp_path / "second")]
    assert tokenizers[0].read_bytes() == tokenizers[1].read_bytes()


@pytest.mark.usefixtures("one_thread")
def test_an_earlier_run_is_not_overwritten_by_accident(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    pretrain(config(data, run, max_steps=1))
    with pytest.raises(RunFolderError, match=r"holds an earlier run: pass --resume auto.*--overwrite"):
        pretrain(config(data, run, max_steps=1))
    pretrain(config(data, run, max_steps=2, overwrite=True))
    assert newest_complete(run) == run / "checkpoints" / "step-00000002"


@pytest.mark.usefixtures("one_thread")
def test_a_resume_with_other_options_or_data_is_refused(data: Path, tmp_path: Path) -> None:
    run, changed = tmp_path / "run", tmp_path / "rows.jsonl"
    changed.write_bytes(data.read_bytes())
    pretrain(config(changed, run, max_steps=1))
    with pytest.raises(ValueError, match=r"learning_rate is 0\.001, but that run was started with 0\.005"):
        pretrain(config(changed, run, max_steps=1, resume="auto", learning_rate=0.001))
    changed.write_text(json.dumps({"text": "other words"}) + "\n" + data.read_text())
    with pytest.raises(ValueError, match="the data or the tokenizer is not what that run read"):
        pretrain(config(changed, run, max_steps=1, resume="auto"))


def test_two_processes_cannot_share_a_folder(children: Forker, data: Path, tmp_path: Path) -> None:
    """The first waits inside a step, stopped, so that the second is sure to meet it."""
    run = tmp_path / "run"
    first = children.start("children:command", config=fields(data, run), point=5, number=signal.SIGSTOP)
    first.wait_until_stopped()
    status, output = children.run("children:command", config=fields(data, run, resume="auto"))
    assert status == 2
    assert f"is in use by process {first.pid} on " in output
    os.kill(first.pid, signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert resume(children, data, run)


@pytest.mark.usefixtures("one_thread")
def test_a_loss_that_is_not_finite_stops_the_run(data: Path, tmp_path: Path) -> None:
    with pytest.raises(NonFiniteError, match=r"^step \d+: .*; the update was not applied.*learning_rate"):
        pretrain(config(data, tmp_path / "run", learning_rate=1e30, max_grad_norm=1e30, warmup_ratio=0.0))


def test_the_size_fills_in_what_is_not_said(tmp_path: Path) -> None:
    for name, size in SIZES.items():
        filled = with_defaults(PretrainConfig(size=name))
        assert (filled.context, filled.max_steps, filled.vocab_size) == (
            size.context,
            size.max_steps,
            size.vocab_size,
        )
    assert with_defaults(PretrainConfig(max_steps=7, learning_rate=1.0)).max_steps == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"save_steps": 0}, "save_steps must be at least 1, but it is 0"),
        ({"context": -1}, "context must be at least 0, but it is -1"),
        ({"learning_rate": float("nan")}, "learning_rate must be at least 0, but it is nan"),
        ({"max_grad_norm": 0.0}, "max_grad_norm must be positive, but it is 0.0"),
        ({"decay_ratio": 2.0}, "decay_ratio must lie between 0 and 1, but it is 2.0"),
        ({"code": True, "data": ("x.txt",)}, "it has no meaning beside data"),
        ({"tokenizer": "x", "vocab_size": 300}, "the given one has its own"),
        ({"seed": -1}, "seed must lie in"),
        ({"batch_tokens": 100, "context": 64}, "batch_tokens = 100 must be a multiple of context = 64"),
        ({"micro_batch_tokens": 8}, "micro_batch_tokens = 8 must be at least context = 256"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_defaults(PretrainConfig(**options))
