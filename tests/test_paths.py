"""Paths as people type them, a run's from another folder, and a start that fails: it leaves nothing."""

import errno
import json
import os
import re
import shutil
from pathlib import Path

import pytest
import yaml
from test_run import TINY, go

import fastrot
from fastrot import entry, evaluate, paths, train
from fastrot.config import RunError, UsageError
from fastrot.evals import rotation
from fastrot.training import checkpoint, loop, session

pytestmark = pytest.mark.usefixtures("quick_runs")


def test_a_home_folder_is_found_wherever_the_shell_leaves_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    words = ["demo", "--out=~/x", "--data", "~/y z", "--seed=3", "~nobody-of-that-name/x", "a~b"]
    meant = ["demo", "--out=/home/me/x", "--data", "/home/me/y z", *words[4:]]
    assert paths.words(words) == meant


EMPTY = {
    "after-its-knob": (["demo", "--out", ""], "--out got an empty word"),
    "behind-an-equals": (["demo", "--data="], "--data got an empty word"),
    "by-itself": (["", "rotation"], "the command line got an empty word"),
}


@pytest.mark.parametrize(("argv", "says"), EMPTY.values(), ids=EMPTY)
def test_an_empty_word_is_a_variable_that_is_not_set(argv, says):
    with pytest.raises(UsageError, match=says):
        paths.words(argv)


@pytest.fixture(scope="module")
def moved(pictures, tmp_path_factory):
    """A project with pictures/ and a run of two steps in runs/x, begun there by relative words."""
    project = tmp_path_factory.mktemp("moved") / "project"
    shutil.copytree(pictures, project / "pictures")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        go("pictures", "runs/x", "--max-steps", "2")
    return project


def test_a_config_is_replayed_from_another_folder(moved, tmp_path, monkeypatch, capsys):
    project = moved
    plain = yaml.safe_load((project / "runs/x/config.yaml").read_text())
    assert (plain["data"], plain["out"]) == ("pictures", "runs/x")  # as typed
    monkeypatch.chdir(tmp_path)
    cfg = train.command_line(["--config", str(project / "runs/x/config.yaml")])
    assert cfg.data == str(project / "pictures")
    assert cfg.out == str(project / "runs/x")
    given = ["--config", os.path.relpath(project / "runs/x/config.yaml"), "--out", "new"]
    assert train.command_line(given).out == "new"
    shutil.copytree(project / "runs/x", tmp_path / "elsewhere")
    assert train.main(["--config", "elsewhere/config.yaml", "--max-steps", "3"]) == 0
    assert "resumed at step 2" in capsys.readouterr().out
    assert checkpoint.load(tmp_path / "elsewhere/checkpoints/last.pt")["step"] == 3


def test_a_config_written_by_hand_may_name_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    (tmp_path / "own.yaml").write_text("type: Config\ndata: ~/pictures\nout: ~/runs/x\n")
    cfg = train.command_line(["--config", str(tmp_path / "own.yaml")])
    assert (cfg.data, cfg.out) == ("/home/me/pictures", "/home/me/runs/x")


def test_data_that_is_in_both_folders_is_asked_about(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replay, here, there = ["--config", str(moved / "runs/x/config.yaml")], tmp_path, moved
    (here / "pictures").mkdir()
    both = f"by --data {there / 'pictures'} or --data {here / 'pictures'}"
    with pytest.raises(UsageError, match=re.escape(both)):
        train.command_line(replay)
    for folder in (here, there):
        named = ["--data", str(folder / "pictures")]
        assert train.command_line([*replay, *named]).data == named[1]
    (here / "pictures").rmdir()
    (here / "pictures").symlink_to(there / "pictures")
    assert train.command_line(replay).data == "pictures"  # the same


def test_what_is_typed_at_a_replay_is_meant_from_here(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    replay = ["--config", str(moved / "runs/x/config.yaml"), "--data", "runs"]
    assert train.command_line(replay).data == "runs"  # which is there too
    (tmp_path / "runs").mkdir()
    assert train.command_line(replay).data == "runs"


@pytest.mark.parametrize("text", ["[1]", "3", "null", '{"folder": 3}', "{}", '"folder"', "{"])
def test_an_environment_that_does_not_tell_the_folder(tmp_path, text):
    (tmp_path / "environment.json").write_text(text)
    assert paths.typed_in(tmp_path) is None


def test_data_in_the_home_folder_opens_in_a_notebook(tmp_path, monkeypatch, pictures):
    monkeypatch.setenv("HOME", str(pictures.parent))
    assert fastrot.open_data(f"~/{pictures.name}").rows == 37


def test_data_that_is_in_neither_folder_is_named_with_both(moved, tmp_path, monkeypatch):
    run = shutil.copytree(moved / "runs/x", tmp_path / "x")
    environment = json.loads((run / "environment.json").read_text()) | {"folder": "/was/here"}
    (run / "environment.json").write_text(json.dumps(environment))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match=rf"--data pictures is neither in {tmp_path} nor in /was/"):
        train.main(["--config", "x/config.yaml"])
    assert train.command_line(["--config", "x/config.yaml", "--data", "x"]).data == "x"


def test_evaluate_finds_a_runs_data_from_another_folder(moved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = []

    def opened(path, *_):
        asked.append(path)
        raise RunError("enough")

    monkeypatch.setattr(rotation.assemble, "open_data", opened)
    with pytest.raises(RunError):
        evaluate.main([str(moved / "runs/x"), "rotation", "--device", "cpu"])
    assert asked == [str(moved / "pictures")]


def test_weights_begun_with_are_the_same_by_another_name(moved, tmp_path, monkeypatch):
    run = shutil.copytree(moved, tmp_path / "p")
    monkeypatch.chdir(run)
    go("pictures", "runs/y", "--start-from", "runs/x", "--max-steps", "1")
    for folder, name in ((run / "runs", "x"), (tmp_path, "p/runs/../runs/x")):
        monkeypatch.chdir(folder)
        go(run / "pictures", run / "runs/y", "--start-from", name, "--max-steps", "1")
    with pytest.raises(UsageError, match="--start-from was runs/x, now p"):
        go(run / "pictures", run / "runs/y", "--start-from", "p", "--max-steps", "1")


FAILS = {
    "data": ["--data", "no/such/place"],
    "net": ["--image-size", "9"],
    "weights": ["--start-from", "no/such/run"],
    "val": ["--val", "no/such/place"],
    "folds": ["--image-size", "9", "--folds", "2"],
}


@pytest.mark.parametrize("args", FAILS.values(), ids=FAILS)
def test_a_start_that_failed_leaves_nothing(pictures, tmp_path, args):
    with pytest.raises(UsageError):
        go(pictures, tmp_path / "runs" / "x", *args)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("folds", [(), ("--folds", "2")])
def test_a_folder_that_cannot_be_made_leaves_no_parent_of_it(
    pictures, tmp_path, monkeypatch, folds
):
    make, name = Path.mkdir, "fold1" if folds else "x" * 300

    def failing(path, *mode, **how):
        if path.name == "fold1":
            raise OSError(errno.EACCES, "Permission denied")
        make(path, *mode, **how)

    monkeypatch.setattr(Path, "mkdir", failing)
    out = tmp_path / "new" if folds else tmp_path / "new" / name
    with pytest.raises(UsageError, match=f"{name} cannot be made"):
        go(pictures, out, *folds)
    assert list(tmp_path.iterdir()) == []


ERRORS = {"_built": (KeyboardInterrupt, RuntimeError), "Journal": (ImportError, ValueError)}


@pytest.mark.parametrize(("part", "error"), [(k, e) for k, v in ERRORS.items() for e in v])
def test_a_start_that_failed_by_anything_leaves_nothing(
    pictures, tmp_path, monkeypatch, part, error
):
    def failing(*_, **__):
        raise error("enough")

    monkeypatch.setattr(session, part, failing)
    with pytest.raises(error, match="enough"):
        go(pictures, tmp_path / "runs" / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_start_is_never_taken_away(pictures, tmp_path, monkeypatch):
    """Where the file system has no locks."""

    def failing(cfg, folder, *_):
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "last.pt").touch()
        raise RunError("enough")

    monkeypatch.setattr(session, "_built", failing)
    with pytest.raises(RunError, match="enough"):
        go(pictures, tmp_path / "x")
    assert (tmp_path / "x" / "checkpoints" / "last.pt").exists()


@pytest.mark.parametrize("step", [0, 2])
def test_a_run_that_failed_in_its_first_step_leaves_nothing_and_later_what_it_has(
    pictures, tmp_path, monkeypatch, step
):
    once = loop.train_step

    def failing(state, batch):
        if state.step == step:
            raise RunError("enough")
        return once(state, batch)

    monkeypatch.setattr(loop, "train_step", failing)
    with pytest.raises(RunError, match="enough"):
        go(pictures, tmp_path / "x", "--hold-out", "0")
    assert (tmp_path / "x").exists() == bool(step)


def test_folders_that_were_there_stay(pictures, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    for run in ("mine", "mine/new"):
        with pytest.raises(UsageError):
            go(pictures, tmp_path / run, "--image-size", "9")
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not (tmp_path / "mine" / "new").exists()

    def beaten(folder, refusal):  # another start of the command was quicker
        (folder / "config.yaml").touch()
        raise UsageError(refusal)

    monkeypatch.setattr(session, "locked", beaten)
    with pytest.raises(UsageError, match="another run writes"):
        go(pictures, tmp_path / "raced")
    assert (tmp_path / "raced" / "config.yaml").exists()


def test_what_is_there_before_the_lock_is_taken_is_anothers(pictures, tmp_path, monkeypatch):
    make = session._make

    def late(run, made):
        make(run, made)
        (run / "log.txt").touch()

    monkeypatch.setattr(session, "_make", late)
    status = entry.status(
        lambda: train.main([*TINY, "--data", "no/such", "--out", str(tmp_path / "x")])
    )
    assert status == 2
    assert (tmp_path / "x" / "log.txt").exists()
