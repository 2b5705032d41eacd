from __future__ import annotations

import hashlib
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tutelage.data.home_library import home_library

LONG = "x" * 90


@pytest.fixture(scope="module")
def rows() -> list[dict[str, str]]:
    return home_library()


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"))
    return folder


def test_the_real_library(rows: list[dict[str, str]]) -> None:
    size = sum(len(row["text"].encode()) for row in rows)
    assert 2_000_000 < size < 6_000_000
    names = [row["name"] for row in rows]
    assert len(set(names)) == len(names)
    assert {"argparse", "json", "json.decoder"} <= set(names)
    assert not [name for name in names if {"test", "tests", "idle_test"} & set(name.split("."))]
    assert {name.split(".")[0] for name in names if not name.startswith("help(")} <= sys.stdlib_module_names
    text = {row["name"]: row["text"] for row in rows}
    assert "Serialize ``obj`` to a JSON formatted ``str``." in text["json"]


def test_equal_in_every_process(rows: list[dict[str, str]]) -> None:
    program = (
        "import hashlib; from tutelage.data.home_library import home_library\n"
        "print(hashlib.sha256(repr(home_library()).encode()).hexdigest())"
    )
    environment = {"PYTHONPATH": ":".join(sys.path), "PYTHONHASHSEED": "7"}
    run = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.strip() == hashlib.sha256(repr(rows).encode()).hexdigest()


def test_docstrings_and_long_comments_in_the_order_of_the_source(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "json/__init__.py": f'''
            #!/usr/bin/env python
            """The module speaks.
            It has two lines."""

            # short remark

            #######################
            # A long comment, {LONG},
            #
            # of several lines.
            #----------------------
            class Reader:
                "A class speaks."

                async def read(self):
                    """A method speaks."""
                    def inner():
                        "Even an inner function."

            TEXT = """
            # not a comment {LONG} {LONG}
            """
            '''
        },
    )
    assert home_library(folder=folder) == [
        {
            "name": "json",
            "text": "json\n\nThe module speaks.\nIt has two lines.\n\n"
            f"A long comment, {LONG},\n\nof several lines.\n\n"
            "Reader\n\nA class speaks.\n\n"
            "Reader.read\n\nA method speaks.\n\n"
            "Reader.read.inner\n\nEven an inner function.",
        }
    ]


def test_what_is_left_out(tmp_path: Path) -> None:
    prose = f'"""{LONG} {LONG} {LONG}"""\n'
    folder = write(
        tmp_path,
        {
            "json/__init__.py": prose,
            "json/twin.py": prose,  # says nothing that json/__init__.py does not
            "json/tests/test_json.py": prose + "a",
            "ctypes/test/__init__.py": prose + "b",
            "idlelib/idle_test/__init__.py": prose + "c",
            "test/test_all.py": prose + "d",
            "site-packages/numpy.py": prose + "e",
            "notlibrary.py": prose + "f",
            "bisect.py": '"""Too short to be worth a document."""\n',
        },
    )
    assert [row["name"] for row in home_library(folder=folder)] == ["json"]


def test_code_gives_whole_sources_instead(tmp_path: Path) -> None:
    source = f'"""{LONG} {LONG} {LONG}"""\nimport sys\nsys.exit("imported!")\n'
    folder = write(tmp_path, {"bisect.py": source})
    assert home_library(code=True, folder=folder) == [{"name": "bisect", "text": source}]


def test_help_topics_are_documents(tmp_path: Path) -> None:
    folder = write(
        tmp_path,
        {
            "json/__init__.py": f'"""{LONG} {LONG} {LONG}"""\n',
            "pydoc_data/topics.py": "topics = {'with': 'The with statement', 'assert': 'The assert'}\n",
        },
    )
    assert home_library(folder=folder)[1:] == [
        {"name": "help('assert')", "text": "The assert"},
        {"name": "help('with')", "text": "The with statement"},
    ]


def test_no_library_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no standard library sources under .*: give your own text"):
        home_library(folder=tmp_path)
