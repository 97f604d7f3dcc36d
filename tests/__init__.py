"""The tests; `ROOT` is the checkout that they run in."""

from pathlib import Path

ROOT = Path(__file__).parents[1]
