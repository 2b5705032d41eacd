"""The school: a small world to read about, to be asked about, and to be judged in."""
