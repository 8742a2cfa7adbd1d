"""Which version of a job file ran."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

_PATIENCE = 5.0
"""Seconds: a repository on a slow share must not hold up a night."""


def git_commit(folder: Path) -> str | None:
    """The commit that a folder is at, with ``-dirty`` if tracked files were changed since; None without git."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return f"{commit}-dirty" if changed else commit


def _git(folder: Path, *arguments: str) -> str | None:
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}  # to look changes nothing
    try:
        found = subprocess.run(
            ["git", "-C", folder, *arguments],
            capture_output=True, text=True, timeout=_PATIENCE, env=environment, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):  # no git, no repository, not ours, too slow
        return None
    return found.stdout.strip()
