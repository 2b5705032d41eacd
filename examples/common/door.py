"""What `python examples/NAME/run.py` does."""

from __future__ import annotations

import importlib
import os
from typing import Any

from tutelage import cli


def enter(name: str, module: str, config: str) -> int:
    """Calls the function `name` of the module with its config from the command line; returns the exit status."""
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch is imported, as the command line does

    def command() -> None:
        import tyro

        found: Any = importlib.import_module(module)
        options = tyro.cli(getattr(found, config), prog=f"python examples/{name}/run.py", use_underscores=True)
        getattr(found, name)(options)

    return cli.run(name, command)
