"""The command line: `tutelage COMMAND [OPTIONS]`.

A command is a frozen dataclass of options and a function of it, so that everything the command line does can
be done from Python with the same names. Nothing here imports torch before a command runs.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tutelage import __version__


@dataclass(frozen=True)
class Command:
    """Where a command's options and its function are ("module:name", imported when the command is asked
    for)."""

    summary: str
    config: str
    function: str
    positional: tuple[str, ...] = ()
    """The options whose values may stand in front without their names; the last may have several."""
    ranks: bool = False
    """Whether several processes may run it together, started by torchrun."""
    last: str = ""
    """The option whose value may stand at the very end without its name."""


COMMANDS: Mapping[str, Command] = {
    "school": Command(
        "Take a model from nothing through all stages, and see what each has taught it.",
        "tutelage.school.stages:SchoolConfig",
        "tutelage.school.course:school",
    ),
    "tokenizer": Command(
        "Train a byte-level BPE tokenizer on text and save it.",
        "tutelage.train.configs:TokenizerConfig",
        "tutelage.train.tokenizer:tokenizer",
    ),
    "pretrain": Command(
        "Train a language model on text; without --data on the text every machine has.",
        "tutelage.train.configs:PretrainConfig",
        "tutelage.train.pretrain:pretrain",
        ranks=True,
    ),
    "sft": Command(
        "Teach a model by examples: prompts and the answers to give.",
        "tutelage.train.configs:SftConfig",
        "tutelage.train.sft:sft",
        ranks=True,
    ),
    "reward": Command(
        "Teach a model to judge: answers of which one was preferred, or rankings of several.",
        "tutelage.train.configs:RewardConfig",
        "tutelage.train.reward:reward",
        ranks=True,
    ),
    "dpo": Command(
        "Learn from pairs of answers which one is better (DPO, cDPO, IPO, SimPO, KTO).",
        "tutelage.train.configs:DpoConfig",
        "tutelage.train.dpo:dpo",
        ranks=True,
    ),
    "orpo": Command(
        "Learn to answer and which answer is better at once, without a reference (ORPO).",
        "tutelage.train.configs:OrpoConfig",
        "tutelage.train.dpo:orpo",
        ranks=True,
    ),
    "ppo": Command(
        "Learn from what a reward model or a function says of the model's own answers (PPO, PPO-ptx).",
        "tutelage.train.configs:PpoConfig",
        "tutelage.train.ppo:ppo",
        ranks=True,
    ),
    "grpo": Command(
        "Learn which of several answers of its own to a prompt are better (GRPO, Dr. GRPO, RLOO).",
        "tutelage.train.configs:GrpoConfig",
        "tutelage.train.grpo:grpo",
        ranks=True,
    ),
    "generate": Command(
        "Complete prompts with a model.",
        "tutelage.train.configs:GenerateConfig",
        "tutelage.train.generate:generate",
        positional=("model",),
    ),
    "chat": Command(
        "Talk to a model.",
        "tutelage.train.configs:ChatConfig",
        "tutelage.train.chat:chat",
        positional=("model",),
    ),
    "eval": Command(
        "Measure a model: bits per byte, accuracy, win rate, KL divergence.",
        "tutelage.train.configs:EvalConfig",
        "tutelage.train.evaluate_command:evaluate",
        positional=("measure",),
    ),
    "data check": Command(
        "Check a file of rows: its schema, its bad rows, what of it would be learned.",
        "tutelage.train.configs:DataCheckConfig",
        "tutelage.train.data_check:data_check",
        positional=("data",),
    ),
    "label": Command(
        "Let people judge answers: a local page to rank, compare, rate or write them.",
        "tutelage.train.configs:LabelConfig",
        "tutelage.train.label:label",
    ),
    "label export": Command(
        "Write what people judged as rows that reward, dpo, ppo and sft read.",
        "tutelage.train.configs:LabelExportConfig",
        "tutelage.train.label:export",
        positional=("feedback",),
        last="output",
    ),
    "play": Command(
        "Talk with one or two models on a local page, and say which answers are better.",
        "tutelage.train.configs:PlayConfig",
        "tutelage.train.play:play",
        positional=("models",),
    ),
    "convert": Command(
        "Make a Hugging Face folder of a GGUF file, or a GGUF file of a folder.",
        "tutelage.train.configs:ConvertConfig",
        "tutelage.train.convert:convert",
        positional=("source", "target"),
    ),
    "bench kernels": Command(
        "Measure every kernel against torch and this machine's ceilings.",
        "tutelage.bench:KernelsConfig",
        "tutelage.bench:run",
    ),
    "bench train": Command(
        "Measure whole training steps against torch.",
        "tutelage.bench:TrainConfig",
        "tutelage.bench:run",
    ),
    "bench rollout": Command(
        "Measure generation against the roofline, transformers and llama.cpp.",
        "tutelage.bench:RolloutConfig",
        "tutelage.bench:run",
    ),
    "bench loops": Command(
        "Measure steps of sft, dpo and ppo part by part, and against TRL.",
        "tutelage.bench:LoopsConfig",
        "tutelage.bench:run",
    ),
    "bench label": Command(
        "Measure how long the labelling page lets people wait.",
        "tutelage.bench:LabelConfig",
        "tutelage.bench:run",
    ),
    "doctor": Command(
        "Say what this installation can do here: CPU, kernels, threads, libraries.",
        "tutelage.doctor:DoctorConfig",
        "tutelage.doctor:doctor",
    ),
}

# What a command raises when the caller, the data or the machine is at fault: told in one sentence. Anything
# else is our own mistake and keeps its traceback.
_EXPECTED = (ValueError, OSError, ImportError, ArithmeticError, MemoryError)

_TRACEBACK = "TUTELAGE_TRACEBACK"

# How often an OpenMP thread looks again before it goes to sleep. libgomp's own 300,000 (about a millisecond) holds a core that
# another process needs: on a busy machine training is three to five times slower with it, on a quiet one not faster. Read
# when torch is imported; the user's own setting wins.
_OPENMP_SPINS = ("GOMP_SPINCOUNT", "1000")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 2 (an error, told on stderr), 128 + signal (stopped)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    os.environ.setdefault(*_OPENMP_SPINS)
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    below = [name for name in COMMANDS if name.startswith(f"{arguments[0]} ")]
    if below and arguments[0] not in COMMANDS and arguments[1:] in ([], ["-h"], ["--help"]):
        print(_help(arguments[0]))
        return 0
    if arguments[0] == "--version":
        print(__version__)
        return 0
    words = 2 if " ".join(arguments[:2]) in COMMANDS else 1
    name, rest = " ".join(arguments[:words]), arguments[words:]
    if name not in COMMANDS:
        close = [] if below else difflib.get_close_matches(name, COMMANDS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are {', '.join(below or COMMANDS)}"
        return _fail("tutelage", f"unknown command {name!r}; {hint}")

    def command() -> None:
        config = parse(name, rest)  # before the import of what takes it: `--help` ends here
        if not COMMANDS[name].ranks and os.environ.get("WORLD_SIZE", "1") != "1":
            others = ", ".join(other for other, entry in COMMANDS.items() if entry.ranks)
            raise ValueError(
                f"this command runs in one process, so start it without torchrun (WORLD_SIZE); these can: {others}"
            )
        _imported(COMMANDS[name].function)(config)

    return run(name, command)


def run(name: str, command: Callable[[], object]) -> int:
    """Calls a command; what goes wrong becomes one sentence on stderr and an exit status."""
    try:
        command()
    except _EXPECTED as error:
        if os.environ.get(_TRACEBACK):
            raise
        return _fail(f"tutelage {name}", str(error) or type(error).__name__)
    except KeyboardInterrupt as stop:
        print(f"tutelage {name}: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 128 + int(getattr(stop, "number", 2))
    return 0


def parse(name: str, arguments: Sequence[str]) -> Any:
    """The config of the command `name` from its options, `--config FILE` (YAML) included; options win over
    the file.

    Raises SystemExit (2, with an explanation on stderr) for options that do not parse, ValueError for a file
    that does not.
    """
    import tyro

    command = COMMANDS[name]
    config = _imported(command.config)
    path, options = _split_config(_named(command, arguments))
    # The file's values go in front of the options as options of their own: one parser checks both, and the
    # last one wins.
    from_file = [] if path is None else _options_of(config, path)
    return tyro.cli(
        config,
        args=[*from_file, *options],
        prog=f"tutelage {name}",
        use_underscores=True,
    )


def _named(command: Command, arguments: Sequence[str]) -> list[str]:
    """The arguments with the names of those that stand in front, and of the one at the very end."""
    named, rest = [], list(arguments)
    for name in command.positional:
        if not rest or rest[0].startswith("-"):
            break
        named += [f"--{name}", rest.pop(0)]
    alone = len(rest) == 1 or (len(rest) > 1 and (not rest[-2].startswith("-") or "=" in rest[-2]))
    if command.last and alone and not rest[-1].startswith("-"):
        rest[-1:] = [f"--{command.last}", rest[-1]]
    return named + rest


def _imported(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def _help(group: str = "") -> str:
    """The commands, all of them or one group's."""
    shown = {name: command for name, command in COMMANDS.items() if not group or name.startswith(f"{group} ")}
    width = max(map(len, shown))
    lines = "\n".join(f"  {name:<{width}}  {command.summary}" for name, command in shown.items())
    if group:
        return f"usage: tutelage {group} COMMAND [OPTIONS]\n\ncommands:\n{lines}\n"
    return f"""usage: tutelage COMMAND [OPTIONS]

One compiled engine for the whole upbringing of a language model.

commands:
{lines}

`tutelage COMMAND --help` explains a command's options. Every command takes `--config FILE`, a YAML
file of options (`learning_rate: 0.001`); options on the command line win over it. A run writes such a
file itself: its config.yaml.
`{_TRACEBACK}=1` shows where an error comes from.

first steps:
  tutelage school                    five minutes: all stages on a small invented world, and a report
  tutelage school --size tiny        the same in seconds
  tutelage pretrain                  three minutes, and a model that predicts this Python's documentation
  tutelage pretrain --size tiny      the same in seconds
  tutelage pretrain --data books/    your own text
  tutelage generate --prompt "The "  what the model has to say
"""


def _split_config(arguments: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The file of `--config`, and the other arguments."""
    rest = list(arguments)
    for index, argument in enumerate(rest):
        flag, equals, value = argument.partition("=")
        if flag == "--config":
            end = index + (1 if equals else 2)
            if end > len(rest):
                raise ValueError("--config needs a file")
            return Path(value if equals else rest[index + 1]), rest[:index] + rest[end:]
    return None, rest


def _options_of(config: type[Any], path: Path) -> list[str]:
    """The fields of a YAML file as options. Raises ValueError naming file and field."""
    import yaml

    try:
        content = yaml.safe_load(path.read_bytes())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold options, one `name: value` a line")
    known = {field.name: field for field in dataclasses.fields(config)}
    options: list[str] = []
    for key, value in content.items():
        if key == "format_version":
            _check_version(path, value)
            continue
        name = str(key).replace("-", "_")
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise ValueError(f"{path}: there is no option {key!r}{hint}")
        options += _as_option(path, name, value)
    return options


def _as_option(path: Path, name: str, value: object) -> list[str]:
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no_{name}"]
    values = value if isinstance(value, list) else [value]
    if any(isinstance(entry, (dict, list)) for entry in values):
        raise ValueError(f"{path}: {name} must be a value or a list of values")
    return [f"--{name}", *("None" if entry is None else str(entry) for entry in values)]


def _check_version(path: Path, version: object) -> None:
    from tutelage.files import check_version

    check_version(path, version)


def _fail(who: str, message: str) -> int:
    print(f"{who}: {message}", file=sys.stderr)
    return 2
