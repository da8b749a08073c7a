"""The command line in this process, and folders with tiny models."""

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import saved_models
from occamkv.cli import run as verb
from occamkv.cli.app import app


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What stdout says; it must be JSON and nothing else."""
        return json.loads(self.out)


@pytest.fixture
def occamkv(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Done]:
    """Run a command; an exception that would be a traceback is raised here. Lines are not wrapped."""
    monkeypatch.setattr(verb.out, "width", 400)

    def run(*args: object) -> Done:
        done = CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=False)
        return Done(done.exit_code, done.stdout, done.stderr)

    return run


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a model, to be read only: a kind of `saved_models`, or `chat`."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind not in made:
            template = saved_models.CHAT_TEMPLATE if kind == "chat" else None
            folder = tmp_path_factory.mktemp(kind.replace(" ", "_"))
            made[kind] = saved_models.save(folder, "packable" if kind == "chat" else kind, chat_template=template)
        return made[kind]

    return make


@pytest.fixture
def copy_of(folder_of: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Return a copy of a model's folder, to be spoiled."""
    return lambda kind: Path(shutil.copytree(folder_of(kind), tmp_path / "a model"))


@pytest.fixture
def prompt_of(tmp_path: Path) -> Callable[[int], Path]:
    """Return a file with a prompt of so many tokens."""

    def write(tokens: int) -> Path:
        path = tmp_path / f"{tokens} tokens.txt"
        path.write_text(saved_models.text(tokens))
        return path

    return write
