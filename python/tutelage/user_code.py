"""Functions that a user names on the command line: "module:name" or "file.py:name"."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import reprlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any


def load_function(spec: str, option: str, parameters: Sequence[str], keywords: Sequence[str] = ()) -> Callable[..., Any]:
    """The function that `spec` names, ready to be called with the given arguments.

    What its module raises while it is imported comes through unchanged, with the user's own traceback.

    Args:
        spec: "module:name" for what Python can import, "path/to/file.py:name" for a file.
        option: the option that it was given to, for the messages.
        parameters: names of the positional arguments that it will be called with.
        keywords: of those that are passed by name.

    Raises:
        ValueError: a spec of another form, a module, file or name that does not exist, a name that is no function or
            takes other arguments.
    """
    where, colon, name = spec.rpartition(":")
    if not colon or not where or not name.isidentifier():
        raise ValueError(f"{option} must be module:name or file.py:name, but it is {spec!r}")
    module = _from_file(Path(where), option) if where.endswith(".py") else _from_module(where, name, option)
    if not hasattr(module, name):
        known = sorted(
            key
            for key, value in vars(module).items()
            if callable(value) and not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
        )
        raise ValueError(f"{option}: {where} has no {name!r}; it defines {', '.join(known) or 'no function'}")
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(f"{option}: {spec} must be a function, but it is {reprlib.repr(function)}")
    try:
        signature = inspect.signature(function)
    except ValueError:  # compiled, and it does not say: its first call will
        return function  # type: ignore[no-any-return]
    try:
        signature.bind(*parameters, **dict.fromkeys(keywords))
    except TypeError as error:
        arguments = ", ".join([*parameters, *(f"{keyword}=…" for keyword in keywords)])
        raise ValueError(f"{option}: {spec} cannot be called as {name}({arguments}): {error}") from error
    return function  # type: ignore[no-any-return]


def _from_module(where: str, name: str, option: str) -> ModuleType:
    try:
        return importlib.import_module(where)
    except ModuleNotFoundError as error:
        # Only where the module itself, or a package on the way to it, is what is missing: not one that it imports.
        if error.name is None or not f"{where}.".startswith(f"{error.name}."):
            raise
        raise ValueError(
            f"{option}: there is no module {where!r}; a file is named with its ending, as in loss.py:{name}"
        ) from error


def _from_file(path: Path, option: str) -> ModuleType:
    if not path.is_file():
        raise ValueError(f"{option}: there is no file {path}")
    key = str(path.resolve())
    spec = importlib.util.spec_from_file_location(key, path)
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module  # dataclasses look their own module up while it is being executed
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module
