"""Odd and broken pictures: written + rejected + skipped = seen, each by name; nothing crashes, hangs or runs.

The first half makes its pictures here. The second takes the tree of make_hostile.py, from where the real
pictures are.
"""

import io
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import unicodedata
import zlib
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from truth import DATA, photo

from fastrot.data.beton.read import Beton
from fastrot.data.files import MOST_BYTES, SUFFIXES, has_reader
from fastrot.data.pictures import decode_truncated
from fastrot.data.sources.cifar10 import CIFAR_SPLITS

CHECKOUT = Path(__file__).parents[2]
NOBODY = 65_534
HUNG = 60  # seconds


def encoded(image: Image.Image, kind: str = "JPEG", **options) -> bytes:
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


PHOTO = Image.fromarray(photo(5, 48, 64))
JPEG = encoded(PHOTO, quality=95)


def tree(root: Path, files: dict[str, bytes]) -> Path:
    for path, data in files.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(data)
    return root


def script(name: str):
    spec = spec_from_file_location(name, CHECKOUT / "dataprep" / f"{name}.py")
    module, path = module_from_spec(spec), list(sys.path)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module.main


def run(program: str | Path, *args) -> subprocess.CompletedProcess:
    """A program, or a script, in a process that can neither wait for ever nor take all memory."""
    environment = {**os.environ, "PYTHONPATH": str(CHECKOUT), "OMP_NUM_THREADS": "1"}
    code = [program] if isinstance(program, Path) else ["-c", program]
    within = ["sh", "-c", 'ulimit -v 8000000; exec "$@"', "sh"]  # kB
    return subprocess.run(
        [*within, sys.executable, *code, *map(str, args)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=HUNG,
    )


def told_by(program: str, *args) -> Any:
    """What a program prints as JSON in its last line."""
    done = run(program, *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


class Made:
    """A prepared file, and what became of each picture."""

    def __init__(self, out: Path, status: int):
        self.status = status
        self.facts = json.loads(Path(f"{out}.json").read_bytes())
        self.rows = {line["path"]: row for row, line in enumerate(lines_of(out, "paths"))}
        self.rejects = {line["path"]: line["reason"] for line in lines_of(out, "rejects")}
        self.data = Beton(out)

    def picture(self, path: str) -> np.ndarray:
        return self.data.picture(self.rows[path])

    @property
    def accounted(self) -> bool:
        f = self.facts
        told = f["rows"], f["rejected"], f["rows"] + f["rejected"] + f["skipped"]
        return told == (len(self.rows), len(self.rejects), f["seen"])


def lines_of(out: Path, name: str) -> list[dict]:
    file = Path(f"{out}.{name}.jsonl")
    return [json.loads(line) for line in file.read_bytes().splitlines()] if file.exists() else []


def ordered(root: Path, out: Path, *args) -> list:
    return ["--source", "imagefolder", "--root", root, "--out", out, "--workers", 0, *args]


def convert(root: Path, out: Path, *args) -> Made:
    return Made(out, script("to_ffcv")([str(arg) for arg in ordered(root, out, *args)]))


# ---- pictures that are odd, or broken ----


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 1))
        + chunk(b"IEND", b"")
    )


def claims(width: int, height: int) -> bytes:
    at = JPEG.index(b"\xff\xc0")
    return JPEG[: at + 5] + struct.pack(">HH", height, width) + JPEG[at + 9 :]


def turned(orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(PHOTO, quality=95, exif=exif)


BOMBS = {
    "claimed.jpg": claims(65_500, 65_500),
    "real.png": png(20_000, 20_000, 1, 0, bytes(2501) * 20_000),  # 6 kB a side, 1.2 GB of RGB
    "claimed.png": png(2**31 - 1, 2**31 - 1, 8, 6, b""),
    "canvas.gif": b"GIF89a" + struct.pack("<HH", 65_535, 65_535) + b"\0\0\0,"
    + struct.pack("<HHHH", 0, 0, 65_535, 65_535) + b"\0\x02\x02\x4c\x01\0;",
}  # fmt: skip
TEXT = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(80_000_000), 1))  # 80 MB of words
SMALL = png(4, 4, 8, 0, b"\0abcd" * 4)
BROKEN = {
    "cut.jpg": (JPEG[: len(JPEG) // 2], "jpeg data is cut short (--allow-truncated takes it)"),
    "cut.png": (encoded(PHOTO, "PNG")[:3000], "png data is cut short (--allow-truncated takes it)"),
    "empty.jpg": (b"", "it is empty"),
    "text.jpg": (b"<!DOCTYPE html>404", "first bytes are no picture's"),
}
RGB = np.asarray(PHOTO)
SIXTEEN = np.zeros((48, 1 + 64 * 6), np.uint8)
SIXTEEN[:, 1:] = np.repeat(RGB.reshape(48, 192), 2, axis=1)
GREY = np.repeat(np.asarray(PHOTO.convert("L"))[..., None], 3, axis=2)
T = Image.Transpose
UPRIGHT = {2: T.FLIP_LEFT_RIGHT, 3: T.ROTATE_180, 4: T.FLIP_TOP_BOTTOM, 5: T.TRANSPOSE}
UPRIGHT |= {6: T.ROTATE_270, 7: T.TRANSVERSE, 8: T.ROTATE_90}
ODD = {  # file -> bytes, pixels, mean difference that its encoding may cost
    "cmyk.jpg": (encoded(PHOTO.convert("CMYK"), quality=95), RGB, 4),
    "rgb_parts.jpg": (encoded(PHOTO, quality=95, keep_rgb=True), RGB, 4),
    "grey.jpg": (encoded(PHOTO.convert("L"), quality=95), GREY, 4),
    "rgb_16.png": (png(64, 48, 16, 2, SIXTEEN.tobytes()), RGB, 0),
    "png_named.JPEG": (encoded(PHOTO.convert("RGBA"), "PNG"), RGB, 0),
    "no_suffix": (encoded(PHOTO, "BMP"), RGB, 0),
    "no_end.jpg": (JPEG[:-2], RGB, 5),
    "jpeg2000.jp2": (encoded(PHOTO, "JPEG2000"), RGB, 0),
    "jpeg2000_named.jpg": (encoded(PHOTO, "JPEG2000", no_jp2=True), RGB, 0),
    "palette.png": (encoded(PHOTO.quantize(256), "PNG", transparency=3), RGB, 6),
    **{
        f"turned_{o}.jpg": (turned(o), np.asarray(PHOTO.transpose(how)), 5)
        for o, how in UPRIGHT.items()
    },
}


def nearest_rotation(picture: np.ndarray, truth: np.ndarray) -> tuple[int, bool]:
    """The quarter-turns and the flip of the truth that come nearest."""
    apart, step = {}, max(1, min(truth.shape[:2]) // 200)
    picture, truth = picture[::step, ::step], truth[::step, ::step]
    for turn, flip in itertools.product(range(4), (False, True)):
        other = np.rot90(truth[:, ::-1] if flip else truth, turn)
        if other.shape == picture.shape:
            apart[turn, flip] = np.abs(picture.astype(int) - other).mean()
    return min(apart, key=lambda turn: apart[turn])


def test_odd_pictures_are_converted_right_and_broken_ones_named(tmp_path, capsys):
    root = tree(tmp_path / "root", {f"a/{name}": data for name, (data, *_) in ODD.items()})
    tree(root, {f"b/{name}": data for name, (data, _) in BROKEN.items()})
    (root / "b" / "loop.jpg").symlink_to("pool.jpg")
    (root / "b" / "pool.jpg").symlink_to("loop.jpg")
    (root / "a" / "round").symlink_to("..")
    made = convert(root, tmp_path / "a.beton", "--encoding", "raw")
    assert made.status == 1
    assert made.accounted
    assert made.rows.keys() == {f"a/{name}" for name in ODD}
    for name, (_, truth, bound) in ODD.items():
        picture = made.picture(f"a/{name}")
        assert picture.shape == truth.shape, name
        assert nearest_rotation(picture, truth) == (0, False), name
        assert np.abs(picture.astype(int) - truth).mean() <= bound, name
    said = {f"b/{name}": reason for name, (_, reason) in BROKEN.items()}
    said |= {"b/loop.jpg": "broken link", "b/pool.jpg": "broken link"}
    assert made.rejects.keys() == said.keys()
    for path, reason in said.items():
        assert reason in made.rejects[path]
    assert f"{len(ODD)} written + {len(said)} rejected + 0 left out" in capsys.readouterr().out


PEAK = """
import json, sys
sys.path.insert(0, sys.argv[1])
from fastrot.entry import status
if sys.argv[2] == "cifar10":
    from fastrot.data.sources.open import open_source
    ended = status(lambda: open_source(*sys.argv[2:]) and 0)
else:
    from to_ffcv import main
    ended = main(sys.argv[2:])
lines = open("/proc/self/status").read().splitlines()
peak = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))  # kB
print(json.dumps([ended, peak]))
"""


needs_proc = pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="needs /proc")


@needs_proc
def test_bombs_are_rejected_unread(tmp_path):
    good = {f"a/{i}.jpg": JPEG for i in range(4)}
    bombs = {f"b/{name}": data for name, data in BOMBS.items()}
    words = {"b/words.png": SMALL[:33] + TEXT + SMALL[33:]}  # is read, its words are not
    told = []
    for name, files in ("plain", good), ("bombs", good | bombs | words):
        root = tree(tmp_path / name, files)
        with open(root / "a" / "long.jpg", "wb") as file:
            file.write(JPEG)
            if name == "bombs":
                file.truncate(MOST_BYTES + 1)  # zeros that take no room
        args = ["--source", "imagefolder", "--root", root, "--out", tmp_path / f"{name}.beton"]
        told.append(told_by(PEAK, CHECKOUT / "dataprep", *args, "--workers", 0))
    (plain, least), (status, most) = told
    assert (plain, status) == (0, 1)
    assert most - least < 40_000  # kB; the smallest of the bombs holds 80 MB
    made = Made(tmp_path / "bombs.beton", status)
    assert made.rejects.keys() == {*bombs, "a/long.jpg"}
    assert made.rows.keys() == {*good, *words}
    assert all("178 megapixels" in made.rejects[f"b/{name}"] for name in BOMBS)
    assert "2,147,483,649 bytes" in made.rejects["a/long.jpg"]


def test_truncated_pictures_are_taken_where_that_is_asked_for_and_counted(tmp_path, capsys):
    cut = {f"a/{name}": data for name, (data, _) in BROKEN.items() if name.startswith("cut")}
    root = tree(tmp_path / "root", {"a/whole.jpg": JPEG, **cut})
    out = tmp_path / "a.beton"
    refused = convert(root, out, "--encoding", "raw")
    assert (refused.status, refused.rows.keys()) == (1, {"a/whole.jpg"})
    assert "cut short (--allow-truncated)" not in capsys.readouterr().out
    taken = "--encoding", "raw", "--allow-truncated"
    assert script("to_ffcv")([*map(str, ordered(root, out, *taken))]) == 2  # another plan
    assert "made without --allow-truncated: add --overwrite" in capsys.readouterr().err
    made = convert(root, out, *taken, "--overwrite")
    assert (made.status, made.facts["truncated"]) == (0, 2)
    assert "2 of those written were cut short (--allow-truncated)" in capsys.readouterr().out
    np.testing.assert_array_equal(made.picture("a/cut.png")[:10], RGB[:10])
    assert "allow_truncated" not in {
        k for k, v in refused.facts["options"].items() if v is not None
    }


def test_shards_hold_a_truncated_picture_so_that_any_reader_takes_it(tmp_path):
    from fastrot.data.tars.read import Tars

    files = {"a/cut.jpg": BROKEN["cut.jpg"][0], "a/no_end.jpg": JPEG[:-2], "a/whole.jpg": JPEG}
    given = ordered(tree(tmp_path / "root", files), tmp_path / "out", "--allow-truncated")
    assert script("to_dali")([*map(str, given)]) == 0
    data = Tars(tmp_path / "out")
    kept = [data.record(row).tobytes() == each for row, each in enumerate(files.values())]
    assert kept == [False, True, True]
    np.testing.assert_array_equal(data.picture(0), decode_truncated(files["a/cut.jpg"]))
    np.testing.assert_array_equal(data.picture(1), data.picture(2))


HEIC = b"\0\0\0\x1cftypheic\0\0\0\0mif1heic" + bytes(99)
WITHOUT_READER = {
    "a/phone.heic": (HEIC, "no reader: pip install pillow-heif"),
    "a/phone.jpg": (HEIC, "no reader: pip install pillow-heif"),
    "a/drawn.tga": (b"\0\0\2" + bytes(99), "no reader"),
    "a/camera.NEF": (encoded(PHOTO, "TIFF"), "no reader"),  # its first picture is a thumbnail
}


def test_pictures_without_a_reader_are_counted_and_can_be_mended(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    has_reader.cache_clear()
    files = {path: data for path, (data, _) in WITHOUT_READER.items()}
    files |= {"a/0.jpg": JPEG, "a/png_named.tga": encoded(PHOTO, "PNG"), "a/words.txt": b"words"}
    made = convert(tree(tmp_path / "root", files), tmp_path / "a.beton")
    has_reader.cache_clear()
    assert (made.status, made.rejects) == (1, {})
    assert made.rows.keys() == {"a/0.jpg", "a/png_named.tga"}
    left = {line["path"]: line["reason"] for line in lines_of(tmp_path / "a.beton", "skipped")}
    assert left == {path: why for path, (_, why) in WITHOUT_READER.items()} | {
        "a/words.txt": "no picture"
    }
    assert "1 .heic (no reader: pip install pillow-heif)" in capsys.readouterr().out


def test_sides_that_no_format_holds_are_rejected(tmp_path):
    sides = {"65500": 65_500, "65520": 65_520, "65536": 65_536}
    pictures = {
        f"a/{name}.png": encoded(Image.new("RGB", (w, 1)), "PNG") for name, w in sides.items()
    }
    root = tree(tmp_path / "root", pictures)
    for encoding, fits in ("raw", ["65500", "65520"]), ("jpg", ["65500"]):
        made = convert(root, tmp_path / f"{encoding}.beton", "--encoding", encoding)
        assert made.accounted
        assert made.rows.keys() == {f"a/{name}.png" for name in fits}
        assert all("a side" in reason for reason in made.rejects.values())


# ---- names ----


def test_names_that_differ_in_case_or_unicode_form_alone_stay_apart(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    word, accent = "kameleontier", unicodedata.normalize("NFC", "e\u0301")
    forms = [accent, unicodedata.normalize("NFD", accent)]
    cases = [
        "".join(c.upper() if bit >> i & 1 else c for i, c in enumerate(word)) for bit in range(25)
    ]
    folders = ["cat", "Cat", *(f"cat{form}" for form in forms)]
    paths = [f"{a}/{b}{c}.png" for a, b, c in itertools.product(folders, cases, forms)]
    assert len(paths) == 200
    (tmp_path / "one.png").write_bytes(encoded(Image.new("RGB", (8, 8)), "PNG"))
    for name, order in ("root", paths), ("again", reversed(paths)):
        for folder in folders:
            (tmp_path / name / folder).mkdir(parents=True, exist_ok=True)
        for path in order:
            try:
                os.link(tmp_path / "one.png", tmp_path / name / path)
            except FileExistsError:
                pytest.skip("this file system keeps no such names apart")
    made = convert(tmp_path / "root", tmp_path / "a.beton", "--encoding", "raw")
    assert made.status == 0
    assert made.accounted
    assert list(made.rows) == sorted(paths, key=lambda path: path.split("/"))
    assert len(set(made.data.keys.tolist())) == 200
    from fastrot.data.folder import Folder

    for name in ("root", "again"):
        data = Folder(tmp_path / name)
        assert [data.name(row) for row in range(data.rows)] == list(made.rows)
        assert data.fingerprint == made.data.fingerprint
        assert data.classes == made.data.classes == tuple(sorted(folders))


# ---- files that may not be read, or change ----

AS_NOBODY = """
import json, os, sys
sys.path.insert(0, sys.argv[1] + "/dataprep")
from to_ffcv import main
from fastrot.data.folder import Folder
warm, root, out, nobody = sys.argv[2:]
convert = lambda root, out: main(
    ["--source", "imagefolder", "--root", root, "--out", out, "--workers", "0"]
)
if os.access(root + "/shut", os.R_OK):  # for root everything is open
    convert(warm, out + "/warm.beton")  # imports all that nobody may not read
    try:
        os.setgroups([])
        os.setgid(int(nobody))
        os.setuid(int(nobody))
    except PermissionError:
        pass
able = not os.access(root + "/shut", os.R_OK)
print(json.dumps(able and [convert(root, out + "/a.beton"), Folder(root).rejected]))
"""


@pytest.fixture
def open_to_all():
    """A folder that another user may enter and write; pytest's are the user's own."""
    with tempfile.TemporaryDirectory(prefix="fastrot-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


def convert_as_nobody(root: Path, open_to_all: Path) -> tuple[Made, dict[str, str]]:
    """Without the right to read everything; what becomes of it, and what the folder loader leaves out."""
    warm = tree(open_to_all / "warm", {"a/0.jpg": JPEG, "a/1.png": SMALL})
    out = open_to_all / "out"
    out.mkdir()
    out.chmod(0o777)
    told = told_by(AS_NOBODY, CHECKOUT, warm, root, out, NOBODY)
    if not told:
        pytest.skip("root's rights cannot be laid down here")
    status, left_out = told
    return Made(out / "a.beton", status), dict(left_out)


def test_what_may_not_be_read_is_named(open_to_all, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(open_to_all / "cache"))
    root = tree(
        open_to_all / "root",
        {"a/0.jpg": JPEG, "a/1.jpg": JPEG, "b/2.jpg": JPEG, "c/3.jpg": JPEG, "shut": b"words"},
    )
    shut = [root / "a/1.jpg", root / "b", root / "shut"]
    (root / "c").chmod(0o444)  # its names may be read, its files may not
    for path in shut:
        path.chmod(0)
    try:
        made, left_out = convert_as_nobody(root, open_to_all)
    finally:
        for path in (*shut, root / "c"):
            path.chmod(0o755)
    assert made.status == 1
    assert made.accounted
    assert list(made.rows) == ["a/0.jpg"]
    assert made.rejects == left_out
    assert made.rejects == {
        "a/1.jpg": "it cannot be read (Permission denied)",
        "b": "the folder cannot be read (Permission denied)",
        "c/3.jpg": "it cannot be read (Permission denied)",
    }


VANISHING = """
import os, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from to_ffcv import main
from fastrot.data.sources.records import Source
root, read = Path(sys.argv[2]), Source.read

def while_it_is_read(source, i):
    if (root / "b").exists():
        for name in ("away", "cut", "folder", "loop", "pipe"):
            (root / "a" / (name + ".jpg")).unlink()
        (root / "a" / "cut.jpg").write_bytes(b"")
        (root / "a" / "folder.jpg").mkdir()
        (root / "a" / "loop.jpg").symlink_to("loop.jpg")
        os.mkfifo(root / "a" / "pipe.jpg")
        (root / "b").rename(root.parent / "elsewhere")
        (root / "c").rename(root.parent / "replaced")
        (root / "c").write_bytes(b"a file now")
    return read(source, i)

Source.read = while_it_is_read
given = ["--source", "imagefolder", "--root", sys.argv[2], "--out", sys.argv[3], "--workers", "0"]
sys.exit(main(given))
"""


def test_what_vanishes_while_it_is_read_is_named(tmp_path):
    files = [*(f"a/{name}.jpg" for name in ("0", "away", "cut", "folder", "loop", "pipe"))]
    files += ["b/moved.jpg", "c/buried.jpg"]
    root = tree(tmp_path / "root", dict.fromkeys(files, JPEG))
    done = run(VANISHING, CHECKOUT / "dataprep", root, tmp_path / "a.beton")
    assert done.returncode == 1, done.stderr
    made = Made(tmp_path / "a.beton", done.returncode)
    assert made.accounted
    assert list(made.rows) == ["a/0.jpg"]
    assert made.rejects.keys() == {*files[1:]}
    assert "a/away.jpg: cannot be read: No such file" in done.stdout
    assert made.rejects["a/pipe.jpg"] == made.rejects["a/cut.jpg"] == "it is empty"


# ---- text lists ----


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"[" * 200_000, "no picture among them"),
        (b"0" + b" " * 100_000 + b"x\n", "no picture among them"),
        (b"PK\3\4" + bytes(100), "holds zero bytes"),
    ],
    ids=["one-long-line", "spaces", "archive"],
)
def test_a_strange_list_is_one_short_sentence(tmp_path, text, says):
    tree(tmp_path, {"0.jpg": JPEG, "list.txt": text})
    args = ["--source", "list", "--root", tmp_path / "list.txt", "--out", tmp_path / "a.beton"]
    done = run(CHECKOUT / "dataprep" / "to_ffcv.py", *args, "--workers", 0)
    assert done.returncode == 2
    assert says in done.stderr
    assert done.stderr.count("\n") == 1
    assert len(done.stderr) < 800


@needs_proc
def test_a_pickle_that_asks_for_memory_gets_none(tmp_path):
    entry = (2**26).to_bytes(4, "little")  # of the memo: 1 GB in a table
    for name in CIFAR_SPLITS["train"]:
        (tmp_path / name).write_bytes(b"\x80\x02]r" + entry + b".")
    status, peak = told_by(PEAK, CHECKOUT / "dataprep", "cifar10", tmp_path)
    assert status == 2
    assert peak < 500_000  # kB


# ---- make_hostile.py's tree ----


@pytest.fixture(scope="module")
def hostile():
    """The tree, and its manifest by path."""
    maker = DATA / "make_hostile.py"
    if not maker.exists():
        pytest.skip("there is no make_hostile.py beside the real pictures")
    with tempfile.TemporaryDirectory(prefix="fastrot-") as folder:
        os.chmod(folder, 0o755)
        root = Path(folder) / "tree"
        subprocess.run([sys.executable, maker, root], check=True, capture_output=True)
        entries = json.loads((root / "manifest.json").read_text())
        yield root, {os.fsdecode(entry["path"].encode("latin-1")): entry for entry in entries}
        for shut in ("locked_class", "dog/unreadable.jpg"):
            (root / "tree" / shut).chmod(0o755)


def in_time(root: Path, out: Path, *args) -> Made:
    """By the command itself, so that a pipe cannot hold up the tests."""
    given = ["--source", "imagefolder", "--root", root, "--out", out, *args]
    done = run(CHECKOUT / "dataprep" / "to_ffcv.py", *given)
    made = Made(out, done.returncode)
    f = made.facts
    sums = f"{f['rows']:,} written + {f['rejected']:,} rejected + {f['skipped']:,} left out"
    assert f"{sums} = {f['seen']:,} files seen" in done.stdout
    assert "Traceback" not in done.stderr
    return made


@pytest.fixture(scope="module")
def made(hostile, tmp_path_factory) -> Made:
    out = tmp_path_factory.mktemp("hostile") / "a.beton"
    return in_time(hostile[0], out, "--encoding", "raw", "--workers", 2)


@pytest.mark.soak
def test_every_file_of_the_hostile_tree_has_the_fate_it_should(hostile, made):
    root, manifest = hostile
    files = [os.path.join(at, name) for at, _, names in os.walk(root) for name in names]
    shut = not os.access(root / "tree/locked_class", os.R_OK)
    assert made.facts["seen"] == len(files) + shut > 250
    assert made.accounted
    assert made.status == 1
    assert all(made.rejects.values())
    as_root = {  # "not in a class folder" is another root's; root may read all
        "tree/stray_at_top.jpg": "ok",
        **dict.fromkeys(["tree/dog/unreadable.jpg", "tree/locked_class/x.jpg"], "either"),
    }
    for path, entry in manifest.items():
        if path.split("/")[0] not in ("images", "names", "tree"):
            continue  # not pictures: see below
        fate = "ok" if path in made.rows else "reject" if path in made.rejects else "skip"
        expected = as_root.get(path, entry["expect"])
        if path.startswith("tree/locked_class/") and shut:
            assert "tree/locked_class" in made.rejects
        elif (root / path).is_dir():
            assert fate == "skip", path
        elif expected == "either":
            assert fate != "skip", path
        else:
            assert fate == expected, path


def truth_of(path: str, entry: dict, upright: Image.Image) -> tuple[np.ndarray, float]:
    """Pixels that a picture of images/ok stands for, and the mean difference that its encoding may cost."""
    name, side = path.rpartition("/")[2], min(entry["w"], entry["h"])
    wanted = upright.resize((entry["w"], entry["h"]))
    if turn := re.match(r"exif_orientation_([2-8])", name):
        wanted = upright.transpose(UPRIGHT[int(turn[1])])
    if name == "exif_two_blocks.jpg":  # the first counts
        wanted = upright.transpose(UPRIGHT[6])
    if name in ("gray.jpg", "gray16.png", "la.png"):
        wanted = upright.convert("L")
    if name == "bilevel.png":
        wanted = upright.convert("1")
    pixels = np.asarray(wanted.convert("RGB"))
    if name == "gray4bit.png":
        ramp = np.array([nibble * 17 for n in range(8) for nibble in (n, 0)], np.uint8)
        pixels = np.broadcast_to(ramp[:, None], (2, 16, 3))
    if name == "text_chunk_1MB.png":
        pixels = np.broadcast_to(np.frombuffer(b"abcd", np.uint8)[:, None], (4, 4, 3))
    if "palette" in name:
        return pixels, 10
    if "gif" in name:
        return pixels, 18
    if name == "q1.jpg":
        return pixels, 20
    exact = name.endswith((".png", ".bmp", ".ppm", ".tif")) or "png_named" in name
    if (exact or "lossless" in name) and not name.startswith(("webp_named", "jpeg_named")):
        return pixels, 0
    return pixels, 8 if side > 8 else 15


@pytest.mark.soak
def test_odd_pictures_of_the_hostile_tree_are_converted_right(hostile, made):
    root, manifest = hostile
    stored = (root / "images/ok/rgb.ppm").read_bytes()[-120 * 160 * 3 :]
    upright = Image.fromarray(np.frombuffer(stored, np.uint8).reshape(120, 160, 3))
    odd = [path for path in manifest if path.startswith("images/ok/")]
    assert len(odd) > 70
    for path in odd:
        picture = made.picture(path)
        truth, bound = truth_of(path, manifest[path], upright)
        assert picture.shape == truth.shape, path
        if path.endswith("ycck_adobe.jpg"):  # the tree says: odd colours
            continue
        assert np.abs(picture.astype(np.int16) - truth).mean() <= bound, path
        if min(truth.shape[:2]) > 4:
            assert nearest_rotation(picture, truth) == (0, False), path
    plain = made.picture("images/ok/baseline.jpg")
    for path, entry in manifest.items():
        if path.startswith(("names/", "tree/")) and entry["expect"] == "ok" and "w" in entry:
            assert made.picture(path).shape == (entry["h"], entry["w"], 3), path
            if entry["w"] == 160:
                np.testing.assert_array_equal(made.picture(path), plain)


@pytest.mark.soak
def test_the_hostile_file_is_looked_at(made, tmp_path, capsys):
    beton = str(made.data.path)
    assert script("look")([beton, "--verify", "--out", str(tmp_path / "sheet.png")]) == 0
    said = capsys.readouterr().out
    assert f"{len(made.rows)} records read and decoded" in said
    assert "all whole" in said
    assert (tmp_path / "sheet.png").exists()


@pytest.mark.soak
def test_the_hostile_classes_are_read_as_nobody(hostile, open_to_all, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(open_to_all / "cache"))
    root, manifest = hostile
    (root / "tree/shut").touch(mode=0)
    try:
        made, left_out = convert_as_nobody(root / "tree", open_to_all)
    finally:
        (root / "tree/shut").unlink()
    assert made.status == 1
    assert made.accounted
    inside = {path[5:]: entry for path, entry in manifest.items() if path.startswith("tree/")}
    rejected = {path for path, entry in inside.items() if entry["expect"] == "reject"}
    rejected = rejected - {"locked_class/x.jpg"} | {"locked_class"}  # which hides it
    assert made.rejects.keys() == rejected
    assert left_out.items() <= made.rejects.items()
    skipped = {path for path, entry in inside.items() if entry["expect"] == "skip"}
    assert not skipped & made.rows.keys()
    assert {path for path, entry in inside.items() if entry["expect"] == "ok"} <= made.rows.keys()
    assert sum(path.startswith("linked_class/") for path in made.rows) == 33


FOLDER = """
import json, sys
from fastrot.assemble import open_data
from fastrot.data.files import BadPicture
from fastrot.data.pictures import decode
data = open_data(sys.argv[1])
damaged = []
for row in range(data.rows):
    try:
        decode((data.root / data.name(row)).read_bytes())
    except BadPicture:
        damaged.append(row)
rows = [[data.name(row), *data.sizes(slice(row, row + 1))[0].tolist()] for row in range(data.rows)]
print(json.dumps([rows, data.rejected, damaged]))
"""


@pytest.mark.soak
def test_the_folder_loader_reads_or_names_every_file_named_like_a_picture(
    hostile, made, tmp_path, monkeypatch
):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    root = hostile[0]
    rows, rejected, damaged = told_by(FOLDER, root)
    sizes = {path: (height, width) for path, height, width in rows}
    named = set()
    for at, _, names in os.walk(root):
        for name in names:
            path = os.path.relpath(os.path.join(at, name), root)
            hidden = any(p[0] == "." or p == "__MACOSX" for p in path.split("/"))
            if name.lower().endswith(SUFFIXES) and not hidden:
                named.add(path)
    named.remove("tree/dog/pipe.jpg")
    if not os.access(root / "tree/locked_class", os.R_OK):
        named.add("tree/locked_class")
    refused = {path for path, _ in rejected}
    assert sizes.keys() | refused == named
    assert not sizes.keys() & refused
    for path in sizes.keys() & made.rows.keys():
        assert sizes[path] == made.picture(path).shape[:2], path
    # a header tells nothing of what follows: these are met when they are read
    assert {rows[row][0] for row in damaged} == sizes.keys() & made.rejects.keys()
    assert refused <= made.rejects.keys()


@pytest.mark.soak
@pytest.mark.parametrize("part", ["lists", "annotations"])
def test_broken_lists_and_foreign_tables_are_one_sentence(hostile, tmp_path, capsys, part):
    files = [path for path in sorted((hostile[0] / part).iterdir()) if path.is_file()]
    assert files
    for file in files:
        given = ["--source", "list", "--root", file, "--out", tmp_path / "a.beton"]
        assert script("to_ffcv")([*map(str, given), "--workers", "0"]) == 2, file
        said = capsys.readouterr().err
        assert said.count("\n") == 1, file
        assert file.name in said
        assert len(said) < 800, file


@pytest.mark.soak
def test_broken_cifar_batches_are_one_sentence_and_run_nothing(
    hostile, tmp_path, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    batches = hostile[0] / "cifar"
    good = (batches / "batch_good").read_bytes()
    given = ["--source", "cifar10", "--root", "cifar", "--workers", "0", "--out"]
    tree(Path("cifar"), dict.fromkeys(CIFAR_SPLITS["train"], good))
    assert script("to_ffcv")([*given, "good.beton"]) == 0
    capsys.readouterr()
    broken = [path for path in sorted(batches.iterdir()) if path.name != "batch_good"]
    assert len(broken) > 12
    for path in broken:
        Path("cifar/data_batch_3").write_bytes(path.read_bytes())
        assert script("to_ffcv")([*given, "a.beton"]) == 2, path
        said = capsys.readouterr().err
        assert "data_batch_3 is no CIFAR-10 batch" in said, path
        assert said.count("\n") == 1, path
    assert not list(tmp_path.rglob("PICKLE_WAS_EXECUTED"))
    assert not (CHECKOUT / "PICKLE_WAS_EXECUTED").exists()
