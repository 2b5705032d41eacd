"""Reward functions: what they give, and everything they can do wrong (RELIABILITY row 18)."""

from __future__ import annotations

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import hostile_rewards
from tutelage import rewards
from tutelage.files import Disk, Operation
from tutelage.rewards import FAILURES, RewardFunctionError, RewardFunctions, RewardLimits, Rewards

PROMPTS = ["p0", "p1", "p2", "p3"]
COMPLETIONS = ["fine", "good", "bad", "well"]
BAD = COMPLETIONS.index("bad")
HERE = re.escape(str(Path(hostile_rewards.__file__)))
PATIENT = RewardLimits(seconds=20.0)
"""For what ends by itself: a busy machine must not turn it into a hang."""
QUICK = RewardLimits(seconds=0.5)
"""For what never ends."""


@pytest.fixture
def marker(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Is in the environment of every process started from here, whatever session or parent it moves to."""
    text = f"TUTELAGE_TEST={uuid.uuid4()}"
    monkeypatch.setenv(*text.split("="))
    yield text
    for pid in alive(text):
        os.kill(pid, signal.SIGKILL)


def alive(marker: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and marker.encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:
            pass
    return found


def gone(marker: str, seconds: float = 3.0) -> bool:
    deadline = time.monotonic() + seconds
    while alive(marker):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def pool(folder: Path, *names: str, **options: Any) -> RewardFunctions:
    return RewardFunctions([f"hostile_rewards:{name}" for name in names], folder, **options)


def ask(folder: Path, *names: str, **options: Any) -> Rewards:
    with pool(folder, *names, **{"limits": PATIENT, **options}) as functions:
        return functions(PROMPTS, COMPLETIONS, step=7)


def failures(folder: Path) -> list[dict[str, Any]]:
    path = folder / FAILURES
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def own(folder: Path, text: str) -> str:
    (folder / "own.py").write_text(text)
    return f"{folder}/own.py:f"


# ---- what they give


def test_values_weights_totals_and_metrics(tmp_path: Path) -> None:
    result = ask(tmp_path, "fine", "sometimes", "nothing", weights=[0.5, -2, 1])
    assert result.values == {"fine": [4.0, 4.0, 3.0, 4.0], "sometimes": [1.0, 1.0, None, 1.0], "nothing": [None] * 4}
    assert result.totals == [0.0, 0.0, 1.5, 0.0]  # 0.5 · 4 − 2, and 0.5 · 3 where the second function has no opinion
    assert result.metrics() == {
        "rewards/fine/mean": 3.75,
        "rewards/fine/std": 0.5,  # deviations of 1/4, 1/4, 3/4, 1/4; divided by n − 1
        "rewards/sometimes/mean": 1.0,
        "rewards/sometimes/std": 0.0,
        "rewards/failed": 0.0,
    }
    assert failures(tmp_path) == []


def test_no_function_no_reward(tmp_path: Path) -> None:
    assert ask(tmp_path, "nothing").totals == [None] * 4
    assert ask(tmp_path, "sometimes", on_failure="zero").totals == [1.0, 1.0, None, 1.0]  # None is no failure


def test_columns_come_by_keyword(tmp_path: Path) -> None:
    with pool(tmp_path, "matches", columns=["answer"], limits=PATIENT) as functions:
        assert functions(["1", "\ud800\0é"], ["2", "\n"], {"answer": ["12", "\ud800\0é\n"]}).totals == [1.0, 1.0]
        assert functions(("1",), ("2",), {"answer": ("13",)}).totals == [0.0]
        assert functions([], [], {"answer": []}) == Rewards([], {"matches": []})


def test_numbers_of_other_kinds(tmp_path: Path) -> None:
    assert ask(tmp_path, "numbers_of_other_kinds").totals == [1.0, 2.0, 3.0, None]
    assert ask(tmp_path, "an_array").totals == [0.0, 1.0, 2.0, 3.0]


def test_values_come_back_to_the_last_bit(tmp_path: Path) -> None:
    spec = own(tmp_path, "import math\ndef f(prompts, completions): return [math.exp(-i) for i in range(len(completions))]")
    with RewardFunctions([spec], tmp_path, limits=PATIENT) as functions:
        assert functions(["p"] * 100, ["c"] * 100).totals == [math.exp(-i) for i in range(100)]


def test_a_batch_larger_than_any_pipe(tmp_path: Path) -> None:
    with pool(tmp_path, "fine", limits=PATIENT) as functions:
        assert functions(["p"] * 20, ["c" * 100_000] * 20).totals == [100_000.0] * 20


def test_a_worker_imports_little_and_lasts(tmp_path: Path) -> None:
    assert "torch" in sys.modules  # in this process, with its threads
    with pool(tmp_path, "tells_its_imports", "process_id", limits=PATIENT) as functions:
        first, second = (functions(PROMPTS, COMPLETIONS) for _ in range(2))
    assert first.values["tells_its_imports"] == [0.0] * 4
    assert first == second
    assert first.values["process_id"][0] != os.getpid()


def test_signals_to_the_whole_job_are_for_the_trainer(tmp_path: Path) -> None:
    assert ask(tmp_path, "stops_its_children").totals == [1.0] * 4


def test_hashes_are_the_same_in_every_worker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PYTHONHASHSEED", raising=False)
    first = ask(tmp_path, "hashes")
    assert ask(tmp_path, "hashes") == first
    monkeypatch.setenv("PYTHONHASHSEED", "1")  # the user's own choice stands
    assert ask(tmp_path, "hashes") != first


def test_names_are_told_apart(tmp_path: Path) -> None:
    spec = own(tmp_path, "def fine(completions, **columns): return [0.0] * len(completions)").replace(":f", ":fine")
    with RewardFunctions(["hostile_rewards:fine", spec], tmp_path, limits=PATIENT) as functions:
        assert functions.names == ["fine", "fine_2"]
        assert functions(["p"], ["c"]).values == {"fine": [1.0], "fine_2": [0.0]}


# ---- hostile functions: what the sentence says, and who is at fault

ALONE = [
    ("raises", rf"raised ValueError: no number in it \({HERE}, line \d+\)"),
    ("gives_nan", "gave nan"),
    ("gives_infinity", "gave -inf"),
    ("gives_too_much", r"gave 1e\+31, where the largest reward is 1e\+30"),
    ("gives_text", r"gave '0.5' \(str\) where a number belongs"),
    ("gives_a_huge_integer", r"gave 10+\.\.\.0+ \(int\) where a number belongs"),
    ("gives_an_object", r"gave <Own instance at 0x\w+> \(Own\) where a number belongs"),
    ("leaves_one_out", "returned 0 values for 1 sample"),
    ("gives_a_dictionary", r"returned {'reward': 1.0} \(dict\) where a list belongs"),
    ("allocates", rf"raised MemoryError \(the limit is 8 GiB\) \({HERE}, line \d+\)"),
    ("exits", rf"raised SystemExit: enough \({HERE}, line \d+\)"),
    ("recurses", r"raised RecursionError: maximum recursion depth exceeded.*"),
    ("reads_its_input", r"raised EOFError: EOF when reading a line.*"),
]
"""Only the sample is lost; its worker goes on."""

ALL = [
    ("hangs", QUICK, "did not return within 0.5 s and was killed", BAD),
    ("hangs_in_c", QUICK, "did not return within 0.5 s and was killed", BAD),
    ("hangs_after_its_loop", QUICK, "did not return within 0.5 s and was killed", None),
    ("ignores_signals", QUICK, "did not return within 0.5 s and was killed", BAD),
    ("becomes_a_daemon", QUICK, "did not return within 0.5 s and was killed", BAD),
    ("raises_then_hangs", QUICK, rf"raised KeyError: 'only together' \({HERE}, line \d+\)", None),
    ("compares_and_raises", PATIENT, rf"raised KeyError: 'only together' \({HERE}, line \d+\)", None),
    ("prints_a_gigabyte", PATIENT, "printed more than 10485760 bytes", BAD),
    ("computes_for_ever", RewardLimits(seconds=20, cpu_seconds=0.1), "used more than 0.1 s of CPU time", BAD),
    ("ends_its_process", PATIENT, "ended its process with exit status 3", BAD),
    ("segfaults", PATIENT, "crashed: SIGSEGV ended its process", BAD),
    ("is_killed", PATIENT, "crashed: SIGKILL ended its process", BAD),
    ("closes_its_pipes", PATIENT, "ended its process with exit status 1", None),
    ("writes_into_every_pipe", PATIENT, "wrote into the pipe over which rewards come back", None),
    ("kills_its_keeper", PATIENT, "stopped the process that watches over it", None),
]
"""Nothing of the call is left, and a new worker is started."""

SLOW = ("hangs_after_its_loop", "raises_then_hangs", "is_killed")


@pytest.fixture(scope="module")
def one_worker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[RewardFunctions, Path]]:
    folder = tmp_path_factory.mktemp("run")
    with pool(folder, "as_told", "process_id", columns=["how"], limits=PATIENT, on_failure="drop") as functions:
        yield functions, folder


@pytest.mark.parametrize(("name", "reason"), ALONE, ids=[case[0] for case in ALONE])
def test_one_sample_is_at_fault(one_worker: tuple[RewardFunctions, Path], name: str, reason: str) -> None:
    functions, folder = one_worker
    earlier = len(failures(folder))
    result = functions(PROMPTS, COMPLETIONS, {"how": [name] * 4}, step=7)
    assert result.values["as_told"] == [1.0, 1.0, None, 1.0]
    assert [total is None for total in result.totals] == [False, False, True, False]
    assert result.failed == 1
    [record] = failures(folder)[earlier:]
    assert re.fullmatch(reason, record.pop("reason"))
    printed = record.pop("printed")
    assert record == {
        "step": 7,
        "function": "as_told",
        "sample": BAD,
        "prompt": "p2",
        "completion": "bad",
        "whole_call": False,
    }
    if name == "raises":
        assert printed.startswith("looking for a number\nTraceback (most recent call last):\n")
        assert "in it\n" in printed
    again = functions(PROMPTS[:2], COMPLETIONS[:2], {"how": [name] * 2})
    assert again.values == {"as_told": [1.0, 1.0], "process_id": result.values["process_id"][:2]}


@pytest.mark.parametrize(
    ("name", "limits", "reason", "sample"),
    [pytest.param(*case, id=case[0], marks=[pytest.mark.slow] * (case[0] in SLOW)) for case in ALL],
)
def test_the_whole_call_is_at_fault(
    tmp_path: Path, marker: str, name: str, limits: RewardLimits, reason: str, sample: int | None
) -> None:
    with pool(tmp_path, name, limits=limits, on_failure="drop") as functions:
        before = set(alive(marker))
        started = time.monotonic()
        result = functions(PROMPTS, COMPLETIONS, step=7)
        assert time.monotonic() - started <= limits.seconds + 1
        assert not before & set(alive(marker)) or name in ("compares_and_raises", "kills_its_keeper")
        if name not in ("raises_then_hangs", "compares_and_raises"):
            assert functions(PROMPTS[:2], COMPLETIONS[:2]).totals == [1.0, 1.0]
    assert result == Rewards([None] * 4, {name: [None] * 4}, failed=4)
    records = failures(tmp_path)
    assert [record["sample"] for record in records] == ([0, 1, 2, 3] if sample is None else [sample])
    for record in records:
        assert re.fullmatch(reason, record["reason"])
        assert len(record["printed"]) <= 2000
        assert (record["completion"], record["whole_call"]) == (COMPLETIONS[record["sample"]], True)
    if name in ("hangs", "hangs_in_c", "segfaults"):  # where it was
        assert re.search(rf"{HERE}\", line \d+ in {name}\n", records[0]["printed"])
    assert gone(marker)


def test_the_table_is_long_enough() -> None:
    assert len(ALONE) + len(ALL) >= 14


@pytest.mark.parametrize("name", ["starts_a_child", "forks", "forks_and_both_return"])
def test_children_of_successful_calls_end_with_the_pool(tmp_path: Path, marker: str, name: str) -> None:
    with pool(tmp_path, name, limits=PATIENT) as functions:
        for _ in range(3):
            assert functions(PROMPTS, COMPLETIONS).totals == [1.0] * 4
        assert len(alive(marker)) >= (2 if name == "forks_and_both_return" else 5)
    assert not alive(marker)


def test_all_hanging_functions_of_a_step_share_its_time(tmp_path: Path) -> None:
    with pool(tmp_path, "hangs", "hangs_in_c", "fine", "ignores_signals", limits=QUICK, on_failure="zero") as functions:
        started = time.monotonic()
        result = functions(PROMPTS, COMPLETIONS)
        assert time.monotonic() - started <= QUICK.seconds + 1
    assert result.totals == [4.0, 4.0, 3.0, 4.0]
    assert result.failed == 4


@pytest.mark.slow
def test_a_gigabyte_is_read_and_forgotten(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    with pool(tmp_path, "prints_a_gigabyte", limits=RewardLimits(seconds=60, output_bytes=1 << 31)) as functions:
        before = resident()
        assert functions(PROMPTS, COMPLETIONS).totals == [1.0] * 4
        assert resident() - before < 20 << 20
    assert list(tmp_path.iterdir()) == []


def test_the_limits_are_what_stops_them(tmp_path: Path) -> None:
    """Negative control: with more room, the same function is no failure."""
    narrow, wide = RewardLimits(20, memory_bytes=1 << 30), RewardLimits(20, memory_bytes=4 << 30)
    assert ask(tmp_path, "allocates_two_gigabytes", limits=narrow, on_failure="drop").failed == 1
    assert ask(tmp_path, "allocates_two_gigabytes", limits=wide, on_failure="drop").failed == 0


@pytest.mark.slow
def test_a_stopped_keeper_holds_nothing_up(tmp_path: Path, marker: str) -> None:
    with pool(tmp_path, "stops_its_keeper", limits=QUICK, on_failure="drop") as functions:
        started = time.monotonic()
        assert functions(PROMPTS, COMPLETIONS).failed == 4
        assert time.monotonic() - started <= QUICK.seconds + 1
        assert functions(PROMPTS[:1], COMPLETIONS[:1]).totals == [1.0]
    assert gone(marker)


# ---- policies


def test_fail_stops_with_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RewardFunctionError) as error:
        ask(tmp_path, "fine", "raises")
    assert re.fullmatch(
        rf"reward function raises raised ValueError: no number in it \({HERE}, line \d+\) for sample 2; "
        rf"prompt, completion and what it printed are in {tmp_path}/failures\.jsonl",
        str(error.value),
    )
    assert len(failures(tmp_path)) == 1


@pytest.mark.parametrize(
    ("name", "where"),
    [("ends_its_process", "when it was at sample 2"), ("closes_its_pipes", "in the call with samples 0 to 3")],
)
def test_fail_names_what_it_knows(tmp_path: Path, name: str, where: str) -> None:
    with pytest.raises(
        RewardFunctionError, match=rf"reward function {name} ended its process with exit status \d {where}; prompt"
    ):
        ask(tmp_path, name)


def test_zero_and_drop(tmp_path: Path) -> None:
    zero = ask(tmp_path, "fine", "gives_nan", on_failure="zero")
    assert zero.totals == [5.0, 5.0, 3.0, 5.0]
    assert zero.values["gives_nan"] == [1.0, 1.0, 0.0, 1.0]
    drop = ask(tmp_path, "fine", "gives_nan", on_failure="drop")
    assert drop.totals == [5.0, 5.0, None, 5.0]
    assert drop.values == {"fine": [4.0, 4.0, 3.0, 4.0], "gives_nan": [1.0, 1.0, None, 1.0]}
    assert zero.metrics()["rewards/failed"] == drop.metrics()["rewards/failed"] == 1.0


def test_failures_are_appended_durably(tmp_path: Path) -> None:
    log: list[Operation] = []
    with pool(tmp_path, "gives_nan", limits=PATIENT, on_failure="drop", disk=Disk(log.append)) as functions:
        functions(PROMPTS, COMPLETIONS)
        functions(PROMPTS, COMPLETIONS)
    assert [operation.name for operation in log] == ["append", "fsync", "fsync"] * 2
    assert len(failures(tmp_path)) == 2


# ---- nobody is left behind

TRAINER = """
import os, sys, time
from pathlib import Path
from tutelage import rewards
{change}
with rewards.RewardFunctions(["hostile_rewards:becomes_a_daemon", "hostile_rewards:fine"], Path(sys.argv[1])) as functions:
    print("started", flush=True)
    {then}
    functions(["p"], ["bad"])
"""


def killed(folder: Path, marker: str, change: str = "", then: str = "", processes: int = 6) -> None:
    """A trainer killed by kill -9 while a function of its hangs and has a daemon."""
    path = os.pathsep.join(sys.path)
    command = [sys.executable, "-c", TRAINER.format(change=change, then=then), str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path}) as trainer:
        assert trainer.stdout is not None
        assert trainer.stdout.readline() == b"started\n"
        # Itself, two keepers, two workers, the daemon; while that becomes one, there may be its parents as well.
        deadline, settled = time.monotonic() + 20, 0
        while settled < 5 and time.monotonic() < deadline:
            settled = settled + 1 if len(alive(marker)) == processes else 0
            time.sleep(0.01)
        assert len(alive(marker)) == processes
        trainer.kill()


def test_kill_9_of_the_trainer_leaves_nobody(tmp_path: Path, marker: str) -> None:
    killed(tmp_path, marker)
    assert gone(marker)


def test_a_child_of_the_trainers_that_holds_its_pipes_keeps_nobody_alive(tmp_path: Path, marker: str) -> None:
    killed(tmp_path, marker, then="if os.fork() == 0: time.sleep(1000)", processes=7)
    deadline = time.monotonic() + 5
    while len(alive(marker)) > 1 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(alive(marker)) == 1


KEEPER = (
    'rewards._START = rewards._START.replace("\\nkeep(job)", "\\nfrom tutelage import reward_worker as w; {change}; keep(job)")'
)


@pytest.mark.parametrize(
    "change",
    ["w._kill_descendants = lambda ended: None", "w._prctl = lambda option, value: None"],
    ids=["a keeper that kills nobody", "no subreaper"],
)
def test_without_its_keeper_the_daemon_would_live_on(tmp_path: Path, marker: str, change: str) -> None:
    """Negative control of the test above."""
    killed(tmp_path, marker, KEEPER.format(change=change))
    assert not gone(marker, seconds=0.5)


def test_descriptors_threads_and_children_stay_constant(tmp_path: Path, marker: str) -> None:
    def counts() -> tuple[int, int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), len(list(Path("/proc/self/task").iterdir())), len(alive(marker))

    outside = counts()
    limits = RewardLimits(seconds=5)
    with pool(tmp_path, "fine", "ends_its_process", "gives_nan", limits=limits, on_failure="drop") as functions:
        functions(PROMPTS, ["fine"] * 4)
        inside = counts()
        for step in range(100):
            functions(PROMPTS, COMPLETIONS if step % 20 == 0 else ["fine"] * 4)
        functions(PROMPTS, ["fine"] * 4)
        assert counts() == inside
    assert counts() == outside


def test_ctrl_c_during_a_call(tmp_path: Path, marker: str) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with pool(tmp_path, "hangs", "process_id", limits=PATIENT) as functions:
            first = functions(PROMPTS[:1], COMPLETIONS[:1])
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                functions(PROMPTS, COMPLETIONS)
            assert gone(marker)
            after = functions(PROMPTS[:1], COMPLETIONS[:1])
            assert after.values["hangs"] == first.values["hangs"] == [1.0]
            assert after.values["process_id"] != first.values["process_id"]
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not alive(marker)


def test_the_workers_live_as_long_as_the_with(tmp_path: Path, marker: str) -> None:
    functions = pool(tmp_path, "fine")
    assert not alive(marker)
    with functions:
        assert len(alive(marker)) == 2
        assert os.getsid(0) not in map(os.getsid, alive(marker))  # Ctrl-C in the terminal does not reach them
    assert not alive(marker)
    with pytest.raises(RuntimeError, match="must be called inside its with block"):
        functions(PROMPTS, COMPLETIONS)


# ---- what is refused before the first step


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("f = 3", "--reward_funcs: {spec} must be a function, but it is 3"),
        ("def g(): ...", "--reward_funcs: {file} has no 'f'; it defines g"),
        (
            "def f(prompts, completions): ...",
            "--reward_funcs: {spec} cannot be called as f(prompts=…, completions=…, answer=…): got an unexpected keyword",
        ),
        ("def f(completions, word, **columns): ...", "missing a required argument: 'word'"),
        ("\n1 / 0", "--reward_funcs {spec} cannot be loaded: ZeroDivisionError: division by zero ({file}, line 2)"),
        ("\ndef", "--reward_funcs {spec} cannot be loaded: SyntaxError: invalid syntax"),
        ("import no_such_module", "--reward_funcs {spec} cannot be loaded: ModuleNotFoundError: No module named 'no_such_"),
        ("import time; time.sleep(100)", "--reward_funcs {spec} cannot be loaded: it was not loaded within 0.5 s"),
        (
            "import os; print('a\\nb', flush=True); os._exit(5)",
            "--reward_funcs {spec} cannot be loaded: it ended its process with exit status 5; the last that it printed: b",
        ),
    ],
)
def test_a_function_that_cannot_be_loaded(tmp_path: Path, marker: str, text: str, message: str) -> None:
    spec = own(tmp_path, text)
    limits = RewardLimits(load_seconds=0.5 if "sleep" in text else 20)
    expected = re.escape(message.format(spec=spec, file=spec[:-2]))
    with pytest.raises(RewardFunctionError, match=expected), RewardFunctions([spec], tmp_path, None, ["answer"], limits):
        pytest.fail("it was loaded")
    assert not alive(marker)


def test_a_function_that_can_no_longer_be_loaded(tmp_path: Path) -> None:
    spec = own(tmp_path, "import os\ndef f(completions, **columns): os._exit(3)")
    with RewardFunctions([spec], tmp_path, limits=PATIENT, on_failure="zero") as functions:
        (tmp_path / "own.py").write_text("1 / 0")
        assert functions(["p"], ["c"]).totals == [0.0]
        with pytest.raises(RewardFunctionError, match="cannot be loaded: ZeroDivisionError"):
            functions(["p"], ["c"])


@pytest.mark.parametrize("spec", ["nowhere.py:f", "no_such_module:f", "plain"])
def test_a_function_that_is_not_there(tmp_path: Path, spec: str) -> None:
    with pytest.raises(RewardFunctionError, match=r"--reward_funcs(: there is no (file|module)| must be module:name)"):
        RewardFunctions([spec], tmp_path).__enter__()


def test_a_relative_file_is_the_one_that_was_meant(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own(tmp_path, "def f(completions, **columns): return [float(open('number').read())] * len(completions)")
    (tmp_path / "number").write_text("5")
    monkeypatch.chdir(tmp_path)
    functions = RewardFunctions(["own.py:f"], tmp_path, limits=PATIENT)
    monkeypatch.chdir("/")
    with functions:
        assert functions(["p"], ["c"]).totals == [5.0]


def test_a_file_named_like_a_module_of_ours_harms_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("1 / 0")
    monkeypatch.chdir(tmp_path)
    assert ask(tmp_path, "fine").totals == [4.0, 4.0, 3.0, 4.0]


def plain(value: float) -> Callable[..., list[float]]:
    return lambda completions, **columns: [value] * len(completions)


class Scorer:
    def method(self, completions: list[str], **columns: Any) -> list[float]:
        return [1.0]


NAMELESS: list[Callable[..., Any]] = [
    plain(1.0),
    functools.partial(hostile_rewards.fine, extra=1),
    Scorer().method,
    Scorer.method,
]


def test_python_functions_go_to_workers_by_name(tmp_path: Path) -> None:
    with RewardFunctions([hostile_rewards.fine, hostile_rewards.process_id], tmp_path, limits=PATIENT) as functions:
        result = functions(["p"], ["four"])
    assert result.values["fine"] == [4.0]
    assert result.values["process_id"] != [os.getpid()]


@pytest.mark.parametrize("function", NAMELESS, ids=["lambda", "partial", "bound method", "method"])
def test_python_functions_without_a_name_are_refused(tmp_path: Path, function: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match=r"--reward_funcs: .* has no name by which another process could import it: define it"):
        RewardFunctions([function], tmp_path)


SCRIPT = """
from pathlib import Path
from tutelage.rewards import RewardFunctions

def f(prompts, completions):
    return [2.0] * len(completions)

def main():
    with RewardFunctions([f], Path(".")) as functions:
        print(functions(["p"], ["c"]).totals)

{start}
"""
GUARDED = 'if __name__ == "__main__":\n    main()'


@pytest.mark.parametrize(
    ("arguments", "start", "output"),
    [
        (["script.py"], GUARDED, "[2.0]\n"),
        (["-m", "script"], GUARDED, "[2.0]\n"),
        (["script.py"], "main()", 'starts a training when it is imported: put that under if __name__ == "__main__":'),
        (
            ["-c", "exec(open('script.py').read())"],
            GUARDED,
            "f is defined in an interactive session: put it into a file, as in",
        ),
    ],
    ids=["script", "python -m", "unguarded", "interactive"],
)
def test_functions_of_a_script(tmp_path: Path, arguments: list[str], start: str, output: str) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.format(start=start))
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert output in done.stdout + done.stderr
    assert (done.returncode == 0) == (output == "[2.0]\n")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"functions": []}, "--reward_funcs needs a list of at least one function, but it is []"),
        ({"functions": "a:f"}, "--reward_funcs needs a list of at least one function, but it is 'a:f'"),
        ({"functions": ["a:f", "a:f"]}, "--reward_funcs has a:f twice: give it once, with the sum of the weights"),
        ({"weights": [1, 2]}, "there are 2 reward weights for 1 reward functions"),
        ({"weights": [math.nan]}, "the weight of reward function f must be at most 1e6 either way, but it is nan"),
        ({"weights": [-1e7]}, "the weight of reward function f must be at most 1e6 either way, but it is -10000000.0"),
        ({"on_failure": "ignore"}, "on_failure must be fail, zero or drop, but it is 'ignore'"),
        ({"columns": ["prompts"]}, "a column cannot be named prompts: reward functions get the run's own under that name"),
    ],
)
def test_arguments_that_cannot_be(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        RewardFunctions(**{"functions": ["a:f"], "folder": tmp_path, **options})


@pytest.mark.parametrize("name", ["seconds", "cpu_seconds", "memory_bytes", "output_bytes", "load_seconds"])
@pytest.mark.parametrize("value", [0, -1, math.inf, math.nan])
def test_limits_that_cannot_be(name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"the limit {name} must be positive and finite, but it is {value}"):
        RewardLimits(**{name: value})  # type: ignore[arg-type]


def test_calls_that_cannot_be(tmp_path: Path) -> None:
    with pool(tmp_path, "fine", columns=["answer"], limits=PATIENT) as functions:
        with pytest.raises(ValueError, match=r"were announced the columns \['answer'\], but got \[\]"):
            functions(["p"], ["c"])
        with pytest.raises(ValueError, match="prompts has 2 values for 1 completions"):
            functions(["p", "p"], ["c"], {"answer": ["a"]})
        with pytest.raises(ValueError, match="answer has 0 values for 1 completions"):
            functions(["p"], ["c"], {"answer": []})
        with pytest.raises(ValueError, match=r"answer of sample 1 cannot be sent to a reward function \(Object of type bytes"):
            functions(["p", "p"], ["c", "c"], {"answer": ["a", b"a"]})
        assert functions(["p"], ["c"], {"answer": ["a"]}).totals == [1.0]  # none of these has harmed it


def test_nothing_is_unpickled() -> None:
    for module in (rewards.__file__, rewards.__file__.replace("rewards.py", "reward_worker.py")):
        assert not re.search(r"^\s*(import|from) (pickle|multiprocessing|marshal)", Path(module).read_text(), re.MULTILINE)
