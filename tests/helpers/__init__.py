"""What several tests use: toy models, runs as processes, golden cases."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
