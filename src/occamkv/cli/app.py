"""The application with all its verbs; importing a verb registers it."""

from occamkv.cli import doctor, methods, run
from occamkv.cli.shell import app

__all__ = ["app", "doctor", "methods", "run"]
