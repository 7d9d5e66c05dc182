"""What a command finds where it starts: terminals that lack characters, users without a home, packages that are missing."""

import codecs
import contextlib
import getpass
import io
import os
import select
import sys
import tempfile
from pathlib import Path

PLAIN = str.maketrans({"█": "#", "°": " degrees", "…": "...", "─": "-", "│": "|", "•": "*"})
PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}  # by import


def open_up() -> None:
    """Any terminal and any user will do: no character ends a command, no library complains of the home."""
    codecs.register_error("fastrot", _spelt)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="fastrot")
    try:
        getpass.getuser()
    except (KeyError, OSError, ImportError):  # a container's number without an account
        os.environ["USER"] = f"uid{os.getuid()}"
    home = os.path.expanduser("~")
    if not os.access(home, os.W_OK):
        other = os.path.join(tempfile.gettempdir(), f"fastrot-uid{os.getuid()}")
        with contextlib.suppress(OSError):
            os.makedirs(other, 0o700, exist_ok=True)
        if not os.path.isabs(home):
            os.environ["HOME"] = other
        for name in ("XDG_CACHE_HOME", "MPLCONFIGDIR", "TRITON_HOME"):
            os.environ.setdefault(name, other)


def _spelt(error: UnicodeError) -> tuple[str, int]:
    """Characters that a terminal lacks: drawn with others, or as escapes."""
    assert isinstance(error, UnicodeEncodeError)
    text = error.object[error.start : error.end].translate(PLAIN)
    return text.encode("ascii", "backslashreplace").decode(), error.end


def unread() -> bool:
    """Whether nobody reads stdout any more, as behind `| head`; what is left of it goes nowhere."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    gone = any(event & select.POLLERR for _, event in poll.poll(0))
    if gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return gone


def missing(error: ImportError) -> str:
    """A sentence for a package that is not there, or cannot be loaded. Raises it anew where it is our own."""
    name = (error.name or "fastrot").split(".")[0]
    if name == "fastrot":
        raise error
    root = Path(__file__).resolve().parents[1]
    what = f"-e {root}" if (root / "pyproject.toml").exists() else PACKAGES.get(name, name)
    way = f"type  {sys.executable} -m pip install {what}"
    if (own := root / ".venv" / "bin" / "python").exists() and str(own) != sys.executable:
        way = f"use {own}, or {way}"
    told = (
        "is not installed for" if isinstance(error, ModuleNotFoundError) else f"({error}) fails in"
    )
    return f"{name} {told} {sys.executable}: {way}"
