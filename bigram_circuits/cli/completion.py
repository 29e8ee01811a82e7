"""Completion in a shell: a script that knows the commands, their options, and where files belong."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

SHELLS = ("bash", "zsh", "tcsh")
_FILES = ("model", "models", "corpus", "task")
"""Options that may name a file or a folder, beside those that are paths."""


def script(program: argparse.ArgumentParser, commands: Mapping[str, argparse.ArgumentParser], shell: str) -> str:
    """The completion script of a program with these commands."""
    import shtab

    for command in commands.values():
        for action in command._actions:
            if action.type is Path or action.dest in _FILES:
                is_folder = action.metavar == "FOLDER" or action.dest in ("run", "runs", "other")
                vars(action)["complete"] = shtab.DIRECTORY if is_folder else shtab.FILE
    return shtab.complete(program, shell)
