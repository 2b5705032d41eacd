"""`python examples/movies/run.py`: the course; `--help` tells its options, README.md what to expect."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    from common.door import enter

    sys.exit(enter("movies", "movies.course", "MoviesConfig"))
