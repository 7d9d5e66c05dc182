"""`evaluate.py RUN upright`: what is said of each photograph, how sure, and copies that open upright."""

import csv
import hashlib
import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import ExifTags, Image
from test_run import TINY
from truth import photo

from fastrot import evaluate, train
from fastrot.config import UsageError
from fastrot.core import Batch
from fastrot.data.pictures import decode
from fastrot.evals import upright
from fastrot.evals.exif import oriented, upright_copy
from fastrot.evals.trained import trained_method

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_runs")


@pytest.fixture(scope="module")
def album(tmp_path_factory) -> Path:
    """Photographs of many formats, some in a folder of their own, one of them damaged."""
    root = tmp_path_factory.mktemp("album")
    (root / "1998").mkdir()
    for i in range(8):
        picture = Image.fromarray(np.rot90(photo(i, 60, 90), i % 4).copy())
        picture.save(root / ("1998" if i % 2 else ".") / f"scan {i}.jpg", quality=92)
    Image.fromarray(photo(20)).save(root / "a.png")
    Image.fromarray(photo(21)).save(root / "b.webp", quality=90)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.fromarray(photo(22)).save(root / "c.jpg", exif=exif)
    whole = (root / "c.jpg").read_bytes()
    (root / "cut.jpg").write_bytes(whole[: len(whole) // 2])  # in its head
    Image.fromarray(photo(23, 300, 400)).save(root / "half.jpg", quality=92)
    whole = (root / "half.jpg").read_bytes()
    (root / "half.jpg").write_bytes(whole[: len(whole) // 2])
    return root


def ask(run, album, out, *more: str) -> int:
    words = ["--out", str(out), "--device", "cpu", "--workers", "0", *more]
    return evaluate.main([str(run), "upright", str(album), *words])


def answers(out: Path) -> dict[str, tuple[int, float]]:
    with (out / "upright.csv").open(newline="") as text:
        rows = list(csv.DictReader(text))
    assert not rows or list(rows[0]) == ["path", "degrees", "confidence"]
    assert len({row["path"] for row in rows}) == len(rows)
    return {row["path"]: (int(row["degrees"]), float(row["confidence"])) for row in rows}


# ---- what is said ----


def test_four_views_are_turned_back_and_averaged(straight):
    method = trained_method(straight, CPU)
    images = torch.from_numpy(np.stack([photo(i, 32, 32) for i in range(3)]))

    def said(pixels):
        none = torch.zeros(3, dtype=torch.int64)
        return upright.evidence(method, Batch((pixels,), none, none, none[:2]))

    each = said(images)
    for turn in range(4):
        mean = 0
        for on_top in range(4):
            view = torch.rot90(images, on_top, (1, 2)).contiguous()
            views = Batch((view,), torch.arange(3), torch.arange(3), torch.zeros(2).long())
            with torch.no_grad():
                logits = method.net(method.views(views).float())[::4]
            mean += logits.log_softmax(dim=1)[:, (turn + on_top) % 4] / 4
        torch.testing.assert_close(each[:, turn], mean, rtol=1e-4, atol=1e-5)
    turned = said(torch.rot90(images, 1, (1, 2)).contiguous())
    torch.testing.assert_close(turned, each.roll(1, dims=1), rtol=1e-4, atol=1e-5)


def test_all_of_an_album(straight, album, tmp_path, capsys):
    before = {p: hashlib.md5(p.read_bytes()).digest() for p in album.rglob("*") if p.is_file()}
    assert ask(straight, album, tmp_path / "out", "--sure", "0.26") == 0
    said = capsys.readouterr().out
    found = answers(tmp_path / "out")
    pictures = {str(p.relative_to(album)) for p in before} - {"cut.jpg", "half.jpg"}
    assert set(found) == pictures
    there = {f"{'1998/' if i % 2 else ''}scan {i}.jpg": 90 * (i % 4) for i in range(8)}
    there |= {"a.png": 0, "b.webp": 0, "c.jpg": 270}
    assert {path: degrees for path, (degrees, _) in found.items()} == there
    turned = [path for path, (degrees, sure) in found.items() if degrees and sure >= 0.26]
    assert f"{len(turned)} of {len(pictures)} photographs seem turned" in said
    assert "2 cannot be read, and are left:" in said
    assert "  cut.jpg: " in said
    assert "half.jpg" in said
    assert "right; of photographs of another kind nobody knows" in said
    assert f"pictures of {straight_data(straight)} it tells" in said
    assert "to be right 95% of the time it decides" in said
    with Image.open(tmp_path / "out" / "turned.png") as sheet:
        assert sheet.width > 900
    after = {p: hashlib.md5(p.read_bytes()).digest() for p in album.rglob("*") if p.is_file()}
    assert after == before


def straight_data(run) -> str:
    return yaml.safe_load((run / "config.yaml").read_text())["data"]


def test_answers_that_others_have_edited_are_asked_again(straight, album, tmp_path):
    ask(straight, album, tmp_path)
    whole = answers(tmp_path)
    lines = (tmp_path / "upright.csv").read_text().splitlines()
    lines[2:4] = ["", "a.png,sideways,0.9"]
    (tmp_path / "upright.csv").write_text("\n".join(lines) + '\n"a name\n')
    ask(straight, album, tmp_path)
    assert answers(tmp_path) == whole


def test_a_second_call_goes_on(straight, album, tmp_path, monkeypatch, capsys):
    out, asked, followed = tmp_path / "out", [], upright.followed

    def counted(loader):
        asked.append(loader.images)
        return followed(loader)

    monkeypatch.setattr(upright, "followed", counted)
    ask(straight, album, out)
    whole = answers(out)
    held = len(np.load(straight / "rows-val.npy"))
    assert asked == [held, 12]
    lines = (out / "upright.csv").read_bytes().splitlines(keepends=True)
    (out / "upright.csv").write_bytes(b"".join(lines[:5]) + lines[5][:9])  # killed in mid-line
    ask(straight, album, out)
    assert asked[2:] == [8]  # four are known; nor is the hold-out asked again
    assert answers(out) == whole
    capsys.readouterr()
    ask(straight, album, out)
    assert asked[3:] == [1]  # what could not be read may be whole now
    assert "photographs seem turned" in capsys.readouterr().out


def test_confidence_is_calibrated():
    draw = torch.Generator().manual_seed(0)
    truth = torch.randn(4000, 4, generator=draw).mul(2).log_softmax(dim=1)
    label = torch.multinomial(truth.exp(), 1, generator=draw)[:, 0]
    # class 0 is the truth, as of pictures that stand upright
    turned = torch.stack([row.roll(-int(k)) for row, k in zip(truth, label, strict=True)])
    assert upright.temperature(turned) == pytest.approx(1, rel=0.1)
    assert upright.temperature(turned * 3) == pytest.approx(3, rel=0.1)  # it was too sure
    confidence = np.array([0.9, 0.8, 0.8, 0.7, 0.6])
    right = np.array([True, True, False, True, False])
    assert upright.decides(confidence, right, 1.0) == (0.2, 0.9)
    assert upright.decides(confidence, right, 0.75) == (0.8, 0.7)
    assert upright.decides(confidence, ~right, 0.9) == (0.0, 1.0)


# ---- copies ----


def jpeg(exif: bytes = b"") -> bytes:
    Image.fromarray(photo(3, 40, 64)).save(
        file := io.BytesIO(), "JPEG", **({"exif": exif} if exif else {})
    )
    return file.getvalue()


def exif_of(order: str, **tags) -> bytes:
    exif = Image.Exif()
    exif.endian = order
    exif[ExifTags.Base.Make] = "fastrot"
    exif[ExifTags.Base.Software] = "a longer text that lies behind the directory"
    for name, value in tags.items():
        exif[getattr(ExifTags.Base, name)] = value
    return exif.tobytes()


def pixels_of(data: bytes) -> bytes:
    """From the first table on: all but EXIF and JFIF."""
    return data[data.index(b"\xff\xdb") :]


@pytest.mark.parametrize("degrees", [90, 180, 270])
@pytest.mark.parametrize("now", [None, *range(1, 9)])
@pytest.mark.parametrize("order", ["<", ">"])
def test_a_jpeg_is_turned_by_its_exif_alone(order, now, degrees, tmp_path):
    tags = {} if now is None else {"Orientation": now}
    (tmp_path / "a.jpg").write_bytes(data := jpeg(exif_of(order, **tags)))
    upright_copy(tmp_path / "a.jpg", tmp_path / "out" / "a.jpg", degrees)
    made = (tmp_path / "out" / "a.jpg").read_bytes()
    np.testing.assert_array_equal(decode(made), np.rot90(decode(data), -degrees // 90))
    assert pixels_of(made) == pixels_of(data)
    with Image.open(io.BytesIO(made)) as image:
        exif = image.getexif()
        assert exif[ExifTags.Base.Make] == "fastrot"
        assert exif[ExifTags.Base.Software] == "a longer text that lies behind the directory"
    assert len(made) == len(data) or now is None


@pytest.mark.parametrize("block", ["none", "damaged", "directory beyond its end"])
def test_a_jpeg_without_a_directory_gets_one(block):
    data = jpeg() if block == "none" else jpeg(exif_of("<", Orientation=3))
    if block == "damaged":
        data = data.replace(b"II*\0", b"IIII", 1)
    elif block != "none":
        data = data.replace(b"II*\0\x08\0\0\0", b"II*\0\xff\xff\0\0", 1)
    made = oriented(data, 6)
    assert pixels_of(made) == pixels_of(data)
    plain = decode(jpeg())
    np.testing.assert_array_equal(decode(made), np.rot90(plain, -1))
    assert made[:4] == (b"\xff\xd8\xff\xe0" if block == "none" else data[:4])


@pytest.mark.parametrize("name", ["a.png", "a.webp", "a.bmp", "a.tiff", "a.gif"])
@pytest.mark.parametrize("degrees", [90, 180, 270])
def test_other_formats_are_turned_by_exact_quarters(name, degrees, tmp_path):
    kind = {"a.gif": "P"}.get(name, "RGB")
    Image.fromarray(photo(5)).convert(kind).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    upright_copy(tmp_path / name, tmp_path / "out" / name, degrees)
    made = (tmp_path / "out" / name).read_bytes()
    np.testing.assert_array_equal(decode(made), np.rot90(decode(data), -degrees // 90))


def test_what_pillow_would_compress_or_blacken_stays_exact(tmp_path):
    Image.fromarray(photo(5)).save(tmp_path / "a.tiff", compression="jpeg")
    clear = np.dstack([photo(6), np.zeros((60, 80), np.uint8)])
    Image.fromarray(clear, "RGBA").save(tmp_path / "a.webp", lossless=True, exact=True)
    for name in ("a.tiff", "a.webp"):
        assert upright_copy(tmp_path / name, tmp_path / "out" / name, 90)
        before, after = (Image.open(root / name) for root in (tmp_path, tmp_path / "out"))
        np.testing.assert_array_equal(np.asarray(after), np.rot90(np.asarray(before), -1))


def test_a_format_that_loses_becomes_a_png_and_what_is_there_stays(tmp_path):
    Image.fromarray(photo(5)).save(tmp_path / "a.avif")
    assert upright_copy(tmp_path / "a.avif", tmp_path / "out" / "a.avif", 180)
    made = (tmp_path / "out" / "a.avif.png").read_bytes()
    there = decode((tmp_path / "a.avif").read_bytes())
    np.testing.assert_array_equal(decode(made), np.rot90(there, 2))
    assert not upright_copy(tmp_path / "a.avif", tmp_path / "out" / "a.avif", 90)
    assert (tmp_path / "out" / "a.avif.png").read_bytes() == made


def test_what_would_lose_something_is_refused(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "deep.png"), photo(5).astype(np.uint16) * 256)
    with pytest.raises(ValueError, match="16 bits a colour, of which a copy would keep 8"):
        upright_copy(tmp_path / "deep.png", tmp_path / "b.png", 90)
    frames = [Image.fromarray(photo(k)) for k in range(2)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    with pytest.raises(ValueError, match="several frames"):
        upright_copy(tmp_path / "a.gif", tmp_path / "b.gif", 90)
    assert not (tmp_path / "b.gif").exists()


def test_copies_of_what_seems_turned(straight, album, tmp_path, capsys):
    copies = tmp_path / "copies"
    ask(straight, album, tmp_path / "out", "--sure", "0", "--copy-to", str(copies))
    found = answers(tmp_path / "out")
    turned = {path: degrees for path, (degrees, _) in found.items() if degrees}
    assert turned
    assert f"{len(turned)} copies that open upright in {copies}" in capsys.readouterr().out
    assert {str(p.relative_to(copies)) for p in copies.rglob("*") if p.is_file()} == set(turned)
    ask(straight, album, tmp_path / "out", "--sure", "0", "--copy-to", str(copies))
    said = capsys.readouterr().out
    assert f"0 copies that open upright in {copies}" in said
    assert f"{len(turned)} had a file of their name there, which stays" in said
    ask(straight, copies, tmp_path / "again")  # all of them stand upright
    assert not any(degrees for degrees, _ in answers(tmp_path / "again").values())
    for path, degrees in turned.items():
        theirs, mine = (decode((root / path).read_bytes()) for root in (album, copies))
        np.testing.assert_array_equal(mine, np.rot90(theirs, -degrees // 90))


# ---- what is refused ----


def test_wrong_use_gets_one_sentence(straight, album, tmp_path, monkeypatch):
    def refused(says, *more, run=straight, folder=album, out=tmp_path / "no"):
        with pytest.raises(UsageError, match=says) as told:
            ask(run, folder, out, *more)
        assert "\n" not in str(told.value)

    refused("--copy-to .* is inside of", "--copy-to", str(album / "copies"))
    refused("--out .* is inside of", out=album / "upright")
    assert not (album / "upright").exists()
    refused("--sure got 2.0: it wants a share from 0 to 1", "--sure", "2")
    refused("FOLDER .*nowhere does not exist", folder=tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("is empty: give a path with pictures in it", folder=tmp_path / "empty")
    ask(straight, album, tmp_path / "out")
    other = tmp_path / "other"
    shutil.copytree(album, other)
    refused("holds answers on .*album.* name another --out", folder=other, out=tmp_path / "out")
    supervised = [
        "supervised-alexnet",
        *TINY[1:],
        "--backbone.kernel",
        "5",
        "--backbone.stride",
        "2",
    ]
    labelled = tmp_path / "labelled"
    for k in range(2):
        shutil.copytree(album / "1998", labelled / f"class{k}")
    train.main(
        [*supervised, "--data", str(labelled), "--out", str(tmp_path / "s"), "--max-steps", "1"]
    )
    refused(r"predicts no rotations \(Supervised\)", run=tmp_path / "s")
    for name, value in {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
    }.items():
        monkeypatch.setenv(name, value)
    refused("upright runs in one process: start it without torchrun")


def test_a_run_that_held_nothing_out_is_refused(straight, album, pictures, tmp_path):
    run = tmp_path / "run"
    words = [*TINY, "--hold-out", "0", "--schedule.steps", "1"]
    train.main([*words, "--data", str(pictures), "--out", str(run)])
    with pytest.raises(UsageError, match="held no pictures out: name some, by --data"):
        ask(run, album, tmp_path / "out")
