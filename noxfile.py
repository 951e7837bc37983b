"""Sessions: `nox -s tests` on every interpreter there is, `nox -s lint` for style and types."""

import os
from pathlib import Path

import nox

nox.options.error_on_missing_interpreters = False
nox.options.download_python = "never"

# All that pyenv has installed, not only the versions that its shims answer for in this folder.
versions = Path(os.environ.get("PYENV_ROOT") or "~/.pyenv").expanduser().glob("versions/3.*/bin")
os.environ["PATH"] = os.pathsep.join([*map(str, versions), os.environ.get("PATH", os.defpath)])


@nox.session(python=["3.10", "3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the suite; arguments after `--` go to pytest."""
    session.install("-e", ".[test]")
    session.run("pytest", *session.posargs)


@nox.session
def lint(session: nox.Session) -> None:
    """Check style, format and types."""
    session.install("-e", ".[test]", "mypy", "ruff")
    session.run("ruff", "check")
    session.run("ruff", "format", "--check")
    session.run("mypy")
