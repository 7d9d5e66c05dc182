"""Rotation tables: both formats come back bit by bit, what is none is refused in a sentence, weights are the original's."""

import dataclasses
import zipfile

import numpy as np
import pytest
from truth import golden

from fastrot.config import UsageError
from fastrot.methods import rotation_table
from fastrot.methods.rotation_table import RotationTable, pu_weights, read, write

ROWS, OURS = 37, "fingerprint of our data"
GAMMAS = ["0", "0.5", "1", "2", "3", "5"]


@pytest.fixture(scope="module")
def table() -> RotationTable:
    draw = np.random.default_rng(0)
    said = draw.dirichlet(np.full(4, 0.2), (ROWS, 4)).astype(np.float32)
    said[0, :, 0] = [0.0, 1.0, 1e-42, np.nextafter(np.float32(0.1), np.float32(1))]
    return RotationTable(said, draw.integers(0, 2, ROWS).astype(np.int8), OURS)


# ---- weights ----


@pytest.mark.parametrize("gamma", GAMMAS)
def test_weights_are_the_originals(gamma):
    given = golden("pu_weights")
    weights = pu_weights(given["prob"].reshape(-1, 4), float(gamma))
    assert weights.dtype == np.float64
    np.testing.assert_allclose(
        weights.reshape(-1), given[f"weight_gamma_{gamma}"], rtol=0, atol=1e-12
    )


def test_weights_leave_what_they_are_made_from(table):
    before = table.upright.copy()
    weights = pu_weights(table.upright, 2.0)
    assert weights.dtype == np.float32
    assert np.array_equal(table.upright, before)
    assert np.array_equal(weights[:, 0], np.ones(ROWS))


def test_the_originals_text_gives_the_originals_weights(tmp_path):
    """A prob.dat as its authors' loader reads it: one number a line, line 4 i + r."""
    given = golden("pu_weights")
    path = tmp_path / "prob.dat"
    path.write_text("".join(f"{p!r}\n" for p in given["prob"].tolist()))
    upright = read(path, rows=64, fingerprint=OURS).upright
    np.testing.assert_allclose(
        pu_weights(upright, 2.0).reshape(-1), given["weight_gamma_2"], rtol=0, atol=1e-7
    )


# ---- files ----


@pytest.mark.parametrize("name", ["a.npz", "a.dat", "a.txt"])
def test_a_table_comes_back(table, tmp_path, name):
    write(tmp_path / name, table)
    found = read(tmp_path / name, rows=ROWS, fingerprint=OURS)
    assert found.upright.dtype == np.float32
    assert found.upright.tobytes() == table.upright.tobytes()
    assert found.digest == table.digest
    if name.endswith("npz"):
        assert np.array_equal(found.probabilities, table.probabilities)
        assert np.array_equal(found.fold, table.fold)
        assert found.fingerprint == OURS
    else:
        assert (found.fold == -1).all()
        assert found.fingerprint is None


def test_line_4i_plus_r_is_picture_i_turned_r_times(table, tmp_path):
    write(tmp_path / "a.dat", table)
    lines = (tmp_path / "a.dat").read_text().splitlines()
    assert len(lines) == 4 * ROWS
    for i, r in [(0, 3), (1, 0), (17, 2), (ROWS - 1, 3)]:
        assert np.float32(lines[4 * i + r]) == table.probabilities[i, r, 0]


def test_numpy_alone_reads_the_arrays(table, tmp_path):
    write(tmp_path / "a.npz", table)
    with np.load(tmp_path / "a.npz", allow_pickle=False) as file:
        assert np.array_equal(file["probabilities"], table.probabilities)
        assert np.array_equal(file["fold"], table.fold)
        assert str(file["fingerprint"]) == OURS


def test_the_digest_knows_each_number(table):
    other = table.probabilities.copy()
    other[ROWS - 1, 3, 0] = np.nextafter(other[ROWS - 1, 3, 0], np.float32(2))
    assert dataclasses.replace(table, probabilities=other).digest != table.digest


# ---- refusals ----


class Evil:
    def __reduce__(self):
        return print, ("unpickled",)


def text(*lines: str):
    return lambda path: path.with_suffix(".dat").write_text("\n".join(lines) + "\n")


def arrays(**changed):
    def make(path):
        sound = {
            "probabilities": np.full((2, 4, 4), 0.25, np.float32),
            "fold": np.zeros(2, np.int8),
            "fingerprint": np.array(OURS),
        }
        kept = {name: value for name, value in (sound | changed).items() if value is not None}
        np.savez(path.with_suffix(".npz"), **kept)

    return make


def shares(row: int, rotation: int, value: float) -> np.ndarray:
    said = np.full((2, 4, 4), 0.25, np.float32)
    said[row, rotation, 3] = value
    return said


def flipped(path):
    path = path.with_suffix(".npz")
    arrays()(path)
    data = bytearray(path.read_bytes())
    data[data.index(np.float32(0.25).tobytes() * 3)] ^= 1  # its CRC tells
    path.write_bytes(data)


def torn(path):
    arrays()(path)
    path = path.with_suffix(".npz")
    path.write_bytes(path.read_bytes()[:300])


def foreign_zip(path):
    with zipfile.ZipFile(path.with_suffix(".npz"), "w") as file:
        file.writestr("a.txt", "0.5")


E = ["0.5"] * 8
EVIL = np.array([Evil(), Evil()], object)
WRONG = {
    "gone": (lambda path: None, r"is no file: name one that .* or a prob\.dat"),
    "folder": (lambda path: path.mkdir(), "is no file"),
    "short": (text(*E[:7]), r"has 7 lines, but the data's 2 pictures want 8"),
    "long": (text(*E, "0.5"), r"has 9 lines, but the data's 2 pictures want 8"),
    "empty": (lambda path: path.write_text(""), "has 0 lines"),
    "word": (text(*E[:5], "half", *E[6:]), r"line 6 is no number \('half'\)"),
    "blank": (text(*E[:2], "", *E[3:]), "line 3 is no number"),
    "two-a-line": (text("0.5 0.5", *E[:6]), "line 1 is no number"),
    "above-1": (text(*E[:6], "1.5", "0.5"), "line 7 holds 1.5, and a probability is from 0 to 1"),
    "below-0": (text(*E[:7], "-0.25"), "line 8 holds -0.25"),
    "nan": (text("nan", *E[:7]), "line 1 holds nan"),
    "infinite": (text("0.5", "inf", *E[:6]), "line 2 holds inf"),
    "binary": (
        lambda path: path.write_bytes(bytes(range(11, 256)) * 40),
        "is no table of rotations",
    ),
    "other-length": (
        arrays(probabilities=np.full((3, 4, 4), 0.25, np.float32), fold=np.zeros(3, np.int8)),
        "holds 3 pictures, but the data has 2",
    ),
    "other-data": (
        arrays(fingerprint=np.array("another")),
        r"other data \(fingerprint another, now f",
    ),
    "npz-above-1": (arrays(probabilities=shares(1, 2, 1.5)), "row 1 holds 1.5"),
    "npz-nan": (arrays(probabilities=shares(0, 3, np.nan)), "row 0 holds nan"),
    "no-fold": (arrays(fold=None), "is no table of rotations"),
    "pickle": (arrays(fingerprint=EVIL), "is no table of rotations"),
    "another-shape": (
        arrays(probabilities=np.zeros((2, 4), np.float32)),
        "is no table of rotations",
    ),
    "another-type": (arrays(probabilities=np.zeros((2, 4, 4))), "is no table of rotations"),
    "folds-of-others": (arrays(fold=np.zeros(3, np.int8)), "is no table of rotations"),
    "flipped": (flipped, "is no table of rotations"),
    "torn": (torn, "is no table of rotations"),
    "zip": (foreign_zip, "is no table of rotations"),
}


@pytest.mark.parametrize(("make", "says"), WRONG.values(), ids=WRONG)
def test_what_is_no_table_is_refused_in_one_sentence(tmp_path, capsys, make, says):
    make(tmp_path / "table")
    found = [*tmp_path.iterdir(), tmp_path / "table"][0]
    with pytest.raises(UsageError, match=says) as told:
        read(found, rows=2, fingerprint=OURS)
    assert "\n" not in str(told.value)
    assert str(told.value).startswith(f"--method.pu-table {found}")
    assert capsys.readouterr().out == ""  # nothing in it was run


def test_the_wrong_line_is_named(tmp_path):
    lines = ["0.25"] * 400
    for at, wrong in [(399, "x"), (201, "7")]:
        (tmp_path / "a.dat").write_text("\n".join([*lines[:at], wrong, *lines[at + 1 :]]) + "\n")
        with pytest.raises(UsageError, match=f"line {at + 1} "):
            read(tmp_path / "a.dat", rows=100, fingerprint=OURS)


@pytest.mark.parametrize("name", ["a.csv", "a", "no/such/folder/a.npz"])
def test_a_file_that_could_not_be_written_is_refused_at_once(tmp_path, name):
    with pytest.raises(UsageError, match="--table"):
        rotation_table.check_name(tmp_path / name, "--table")
    rotation_table.check_name(tmp_path / "a.npz", "--table")
