"""Functions named by the user: what is found, what is refused; an objective of the user's own, on a model."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from models_for_tests import bits, tiny_model
from tutelage import pack
from tutelage.objectives import cross_entropy, load_objective
from tutelage.user_code import load_function

OWN = """
from __future__ import annotations
from dataclasses import dataclass

from torch import Tensor  # a class that is not defined here
from tutelage.objectives import cross_entropy as imported

@dataclass(frozen=True)
class Options:
    scale: float = 2.0

def doubled(out, batch, columns):
    return Options().scale * imported(out.logprobs, batch.completion_mask, columns["denominator"])

def with_default(out, batch, columns, scale=1.0): ...
def any_arguments(*args): ...
def two(out, batch): ...
def _hidden(): ...
number = 3
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    return path


def test_a_users_objective_from_a_file_trains_a_model(file: Path) -> None:
    model, batch = tiny_model(), pack([[1, 2, 3], [4, 5]])
    objective = load_objective(f"{file}:doubled")
    loss = objective(model.score(batch), batch, {"denominator": 3})
    loss.backward()
    assert bits(loss) == bits(2 * cross_entropy(model.score(batch).logprobs, batch.completion_mask, 3))
    assert float(model.grads.abs().max()) > 0


def test_from_a_module(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(file.parent))
    assert load_objective("own:doubled").__module__ == "own"
    assert load_function("math:hypot", "--scorer", ("a", "b"))(3, 4) == 5.0
    sys.modules.pop("own")


def test_arguments_with_defaults_and_stars_are_fine(file: Path) -> None:
    for name in ("with_default", "any_arguments"):
        assert callable(load_objective(f"{file}:{name}"))


def test_arguments_passed_by_name(file: Path) -> None:
    assert callable(load_function(f"{file}:doubled", "--scorer", ["out"], ["columns", "batch"]))
    message = (
        "--scorer: .*own.py:two cannot be called as two(out, columns=…, batch=…): got an unexpected keyword argument 'columns'"
    )
    with pytest.raises(ValueError, match=re.escape(message).replace(r"\.\*", ".*")):
        load_function(f"{file}:two", "--scorer", ["out"], ["columns", "batch"])


def test_two_files_of_one_name_are_two_modules(tmp_path: Path) -> None:
    results = []
    for n in (1, 2):
        path = tmp_path / str(n) / "own.py"
        path.parent.mkdir()
        path.write_text(f"def f(): return {n}")
        results.append(load_function(f"{path}:f", "--scorer", ())())
    assert results == [1, 2]


@pytest.mark.parametrize("spec", ["own.py", "own.py:", ":doubled", "", "own.py:a b", "own.py:a.b"])
def test_a_spec_of_another_form(spec: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"--objective must be module:name or file.py:name, but it is {spec!r}")):
        load_objective(spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{dir}/other.py:f", "--objective: there is no file {dir}/other.py"),
        (
            "no_such_module:f",
            "--objective: there is no module 'no_such_module'; a file is named with its ending, as in loss.py:f",
        ),
        ("tutelage.no_such:f", "--objective: there is no module 'tutelage.no_such'"),
        (
            "{dir}/own.py:dubled",
            "--objective: {dir}/own.py has no 'dubled'; it defines Options, any_arguments, doubled, two, with_",
        ),
        ("{dir}/own.py:number", "--objective: {dir}/own.py:number must be a function, but it is 3"),
        ("{dir}/own.py:two", "--objective: {dir}/own.py:two cannot be called as two(out, batch, columns): too many positional"),
    ],
)
def test_what_is_not_there_or_does_not_fit(file: Path, spec: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message.format(dir=file.parent))):
        load_objective(spec.format(dir=file.parent))


def test_a_file_without_functions_says_so(tmp_path: Path) -> None:
    (tmp_path / "empty.py").write_text("x = 1")
    with pytest.raises(ValueError, match=r"has no 'f'; it defines no function"):
        load_objective(f"{tmp_path}/empty.py:f")


def test_what_the_users_module_raises_comes_through(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "broken.py"
    path.write_text("import no_such_dependency")
    monkeypatch.syspath_prepend(str(tmp_path))
    for spec in (f"{path}:f", "broken:f"):
        with pytest.raises(ModuleNotFoundError, match="no_such_dependency"):
            load_objective(spec)
    assert str(path) not in sys.modules
