"""The doctor's command: its table, its JSON, and wrong use in a sentence."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastrot import __main__ as command
from fastrot import doctor, entry
from fastrot.config import UsageError

ROOT = Path(__file__).parents[1]


def test_the_command_prints_a_table_and_writes_all_of_it(pictures, tmp_path, capsys):
    args = ["--preset", "demo", "--image-size", "32", "--enlarge", "--batch", "4", "--seconds", "5"]
    args += ["--workers", "1", "--device", "cpu", "--val", str(pictures)]
    assert doctor.main([str(pictures), *args, "--json", str(tmp_path / "x.json")]) == 0
    said = capsys.readouterr().out
    for word in ("read", "decode + crop", "step on random pixels", "train on the data"):
        assert f"\n  {word}" in said
    for word in ("verdict", "format", "workers", "pack", "epoch", "machine", "versions"):
        assert f"\n  {word}  " in said or f"\n  {word} " in said
    whole = json.loads((tmp_path / "x.json").read_text())
    assert whole["environment"]["versions"]["torch"] == torch.__version__
    assert whole["found"]["val_seconds"] > 0
    assert whole["advice"]["verdict"] in said
    assert whole["found"]["measured"]["others"] >= 0
    assert whole["epoch_s"] == pytest.approx(
        37 / whole["found"]["train"] + whole["found"]["val_seconds"]
    )


# ---- wrong use ----


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ([], "fastrot doctor wants data: name a .beton file"),
        (["no/such/place"], "--data no/such/place does not exist"),
        ([__file__], "is not a known format"),
        (["EMPTY"], "is empty: give a path with pictures in it"),
        (["synthetic", "--preset", "rotnet-alexnt"], "did you mean rotnet-alexnet?"),
        (["synthetic", "--seconds", "1"], "--seconds got 1: it wants 5 or more"),
        (["synthetic", "--batch", "0"], "--batch got 0"),
        (["synthetic", "--workers", "-1"], "--workers got -1"),
        (["synthetic:100", "--batch", "101"], "set --batch 100 or smaller"),
        (["synthetic", "--val", "no/such"], "--val no/such does not exist"),
    ],
)
def test_wrong_use_is_one_sentence(args, says, tmp_path):
    with pytest.raises(UsageError) as refused:
        doctor.main([str(tmp_path) if arg == "EMPTY" else arg for arg in args])
    assert says in str(refused.value)


def test_it_is_a_command_and_runs_from_any_folder(tmp_path, monkeypatch, capsys):
    assert "doctor" in command.COMMANDS
    script = str(ROOT / "fastrot" / "doctor.py")
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=env, capture_output=True)
    assert done.returncode == 2
    assert done.stderr.count(b"\n") == 1
    assert b"fastrot doctor wants data" in done.stderr
    monkeypatch.setattr(sys, "argv", ["fastrot", "doctor", "no/such/place"])
    assert entry.status(command._main) == 2
    assert "does not exist" in capsys.readouterr().err
