"""The README's Python runs as it stands, and its commands name things that exist."""

import re
import shlex
from pathlib import Path

import pytest
import tyro

from fastrot import evaluate, train
from fastrot.__main__ import COMMANDS as COMMANDS_OF_FASTROT
from fastrot.data.beton.write import BetonOptions
from fastrot.data.prepare.convert import convert
from fastrot.presets import PRESETS

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
DATAPREP = (ROOT / "dataprep" / "README.md").read_text()
METHODS = (ROOT / "fastrot" / "methods" / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
COMMANDS = [
    line.split("#")[0].strip().removesuffix(" &&")
    for block in re.findall(r"```sh\n(.*?)```", README + METHODS + DATAPREP, re.S)
    for line in block.splitlines()
]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A checkout's folder after a demo of two steps."""
    at = tmp_path_factory.mktemp("checkout")
    root = ROOT / "dataprep" / "demo_pictures"
    out = at / "prepared" / "demo-train.beton"
    out.parent.mkdir()
    convert(
        BetonOptions(
            source="imagefolder",
            root=root,
            split="train",
            out=out,
            limit=100,
            workers=0,
            quality=80,
        )
    )
    args = ["demo", "--data", str(out), "--out", str(at / "runs" / "demo"), "--max-steps", "2"]
    train.main([*args, "--batch", "8", "--no-tensorboard", "--device", "cpu"])
    return at


@pytest.mark.parametrize("code", SNIPPETS, ids=range(len(SNIPPETS)))
def test_python_runs_as_it_stands(code, demo, monkeypatch):
    monkeypatch.chdir(demo)
    names: dict = {}
    exec("import fastrot\n" + code, names)
    if "features" in names:
        assert names["features"].shape == (8, 64, 7, 7)


def test_there_are_snippets_and_commands():
    assert len(SNIPPETS) == 2
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_parse(command):
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.M)
        return
    if words[0] == "fastrot":
        assert words[1] in COMMANDS_OF_FASTROT
        if words[1] == "convert":
            assert tyro.cli(BetonOptions, args=words[2:])
        return
    script = next(word for word in words if word.endswith(".py"))
    assert (ROOT / script).exists()
    if script.endswith("train.py"):
        rest = words[words.index(script) + 1 :]
        assert train.command_line(rest).preset in PRESETS
    if script.endswith("evaluate.py"):
        _, name, *rest = words[words.index(script) + 1 :]
        assert tyro.cli(evaluate.EVALUATIONS[name], args=rest)


@pytest.mark.parametrize("link", re.findall(r"\]\(([^)#:]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()
