"""The home library: the prose of the running interpreter's own standard library.

Real text that every machine with Python has (about 3 MB): docstrings, long comments and the help topics of
`pydoc_data`. Modules are parsed, never imported.
"""

from __future__ import annotations

import ast
import os
import sys
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator
from pathlib import Path

# Tests are written for machines: their text is mostly data.
_TEST_FOLDERS = frozenset({"test", "tests", "idle_test"})
# A comment shorter than about two lines of code is a remark on the line below it and means little without it.
_LONG_COMMENT = 120
# A module with less prose than this is a table with a label (most of `encodings`): nothing to read.
_MIN_CHARACTERS = 200


def home_library(code: bool = False, folder: Path | None = None) -> list[dict[str, str]]:
    """The standard library's prose as rows `{"name": module, "text": prose}`, one per module or help topic.

    A row holds the module's docstrings (of itself, its classes, functions and methods, each under its name)
    and its long comments (consecutive `#` lines, together at least 120 characters), in the order of the
    source. A passage that an earlier module holds word for word is left out, and so are modules with less
    than 200 characters of prose and all tests. With `code=True` a module's row is its whole source instead,
    so no text is there twice.

    `folder` is where the library lies (default: this interpreter's). The order, and every byte, depend on the
    library only. Takes a few seconds. Raises FileNotFoundError where there is no source to read (an
    interpreter that ships its library as a zip or as bytecode).
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    seen: set[str] = set()
    rows = []
    for name, path in _modules(root):
        with tokenize.open(path) as file:  # decodes as the interpreter does: coding cookie, byte-order mark
            source = file.read()
        tree = _parse(source)
        passages = [passage for passage in _passages(name, source, tree) if passage not in seen]
        seen.update(passages)
        prose = "\n\n".join([name, *passages])
        if len(prose) >= _MIN_CHARACTERS:
            rows.append({"name": name, "text": source if code else prose})
    if not rows:
        raise FileNotFoundError(f"no standard library sources under {root}: give your own text with --data")
    return rows + _topics(root)


def _modules(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted name, path) of every module of the library that is no test, sorted by path."""
    for directory, folders, files in os.walk(root):
        here = Path(directory).relative_to(root).parts
        # At the top only what the interpreter calls its own: installed packages and build files lie there
        # too.
        folders[:] = sorted(f for f in folders if f not in _TEST_FOLDERS and (here or _is_library(f)))
        for path in sorted(Path(directory, file) for file in files):
            stem = path.stem
            if path.suffix == ".py" and (here or _is_library(stem)) and here != ("pydoc_data",):
                yield ".".join(here if stem == "__init__" else (*here, stem)), path


def _is_library(name: str) -> bool:
    return name in sys.stdlib_module_names


def _parse(source: str) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # an invalid escape in somebody's string is not our reader's business
        return ast.parse(source)


def _passages(module: str, source: str, tree: ast.Module) -> list[str]:
    """Docstrings under their names and long comments, in the order of the source."""
    found: list[tuple[int, str]] = []
    strings: set[int] = set()  # lines that a string covers: a `#` at their start is no comment

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            if not isinstance(node, ast.Module):
                name = f"{name}.{node.name}" if name else node.name
            docstring = ast.get_docstring(node)
            if docstring:
                found.append((node.body[0].lineno, f"{name}\n\n{docstring}" if name else docstring))
        elif isinstance(node, (ast.Constant, ast.JoinedStr)) and node.end_lineno is not None:
            strings.update(range(node.lineno + 1, node.end_lineno + 1))
        for child in ast.iter_child_nodes(node):
            visit(child, name)

    visit(tree, "")
    block: list[str] = []
    for number, line in enumerate([*source.split("\n"), ""], start=1):
        stripped = line.strip()
        if stripped.startswith("#") and number not in strings:
            words = stripped.strip("#").strip()
            if any(character.isalnum() for character in words) or not words:  # no rulers of ---- or ====
                block.append(words)
        elif block:
            comment = "\n".join(block).strip()
            if len(comment) >= _LONG_COMMENT:
                found.append((number - 1, comment))
            block = []
    return [passage for _, passage in sorted(found, key=lambda item: item[0])]


def _topics(root: Path) -> list[dict[str, str]]:
    """The help topics (`help("WITH")`): the chapters of the language reference that pydoc carries."""
    path = root / "pydoc_data" / "topics.py"
    if not path.exists():  # some distributions put it into a package of its own
        return []
    with tokenize.open(path) as file:
        tree = _parse(file.read())
    for statement in tree.body:
        if isinstance(statement, ast.Assign) and isinstance(statement.value, ast.Dict):
            topics = ast.literal_eval(statement.value)
            return [{"name": f"help({topic!r})", "text": topics[topic]} for topic in sorted(topics)]
    raise ValueError(f"{path}: no dictionary of topics in it")
