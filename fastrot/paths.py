"""Paths as people type them: `~`, and those of a run whose command was typed in another folder. Standard library only."""

import json
import os
import sys
from pathlib import Path

from fastrot.config import UsageError


def words(argv: list[str] | None = None) -> list[str]:
    """A command line's words, the home folder in place of a `~` that the shell left: behind `=`. None may be empty."""
    found, before = [], "the command line"
    for word in sys.argv[1:] if argv is None else argv:
        name, sign, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if not value and (sign or not name):
            way = "leave it out, or give it a value (is a variable of the shell not set?)"
            raise UsageError(f"{name or before} got an empty word: {way}")
        found.append(name + sign + os.path.expanduser(value))
        before = name or before
    return found


def typed_in(run: Path) -> str | None:
    """The folder in which a run's last command was typed, to which its paths are relative; None: it is not known."""
    try:
        folder = json.loads((run / "environment.json").read_text(encoding="utf-8"))["folder"]
    except (OSError, ValueError, LookupError, TypeError):  # TypeError: it holds no object
        return None
    return folder if isinstance(folder, str) else None


def seen_from_here(path: str, folder: str | None, knob: str) -> str:
    """A path of a run's config, typed in `folder`: as it is, or where only that leads to a file, from there.

    Raises UsageError where they lead to two files, and where data leads to none.
    """
    path = os.path.expanduser(path)
    if path.partition(":")[0] == "synthetic":
        return path
    here, there = os.path.abspath(path), os.path.abspath(os.path.join(folder or "", path))
    found = [each for each in (here, there) if os.path.exists(each)]
    if len(found) == 2 and not os.path.samefile(*found):
        way = f"say which is meant, by {knob} {there} or {knob} {here}"
        raise UsageError(f"the run's {knob} {path} is here and where its command was typed: {way}")
    if knob in ("--data", "--val") and not found and here != there:
        told = f"the run's {knob} {path} is neither in {os.getcwd()} nor in {folder}"
        raise UsageError(f"{told}, where its command was typed: say where it is, by {knob}")
    return there if found == [there] else path


def same_file(typed: str, folder: str | None, now: str) -> bool:
    """Whether a path typed in `folder` and one typed here lead to the same file."""
    before = os.path.join(folder or "", os.path.expanduser(typed))
    return os.path.realpath(before) == os.path.realpath(os.path.expanduser(now))
