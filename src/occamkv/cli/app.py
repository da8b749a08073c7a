"""The application with all its verbs; importing a verb registers it."""

from occamkv.cli import analyze, bench, doctor, evaluate, inspection, methods, plan, run
from occamkv.cli.shell import app

__all__ = ["analyze", "app", "bench", "doctor", "evaluate", "inspection", "methods", "plan", "run"]
