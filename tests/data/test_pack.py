"""What a pack promises: tiles that decode alone and everywhere alike, and no changed byte unnoticed."""

import json
import re
import shutil
import zlib
from pathlib import Path

import numpy as np
import pytest
from packs import write_pack
from truth import DATA, photo

from fastrot.config import UsageError
from fastrot.core import DamagedRecord
from fastrot.data.keys import order_fingerprint, path_keys
from fastrot.data.manifest import sealed
from fastrot.data.pack import bc4, layout, write
from fastrot.data.pack import file as opened
from fastrot.data.pack.read import Pack
from fastrot.data.pictures import decode, shrink
from fastrot.ops.tiles import plane_of

PAGE = Path(__file__).parents[2] / "fastrot" / "data" / "pack" / "README.md"


def real_pictures(count: int) -> list[np.ndarray]:
    """Photographs at a short side of 256; some that are made here, where there are none."""
    found = sorted((DATA / "imagenet-sample").glob("*/*.JPEG"))[:: 492 // count][:count]
    return [shrink(decode(p.read_bytes()), 256) for p in found] or [
        photo(i, 120, 180) for i in range(3)
    ]


# ---- the codec ----


def referee(blocks: np.ndarray) -> np.ndarray:
    """texture2ddecoder's samples [n, 16] of BC4 blocks [n, 8]."""
    texture2ddecoder = pytest.importorskip("texture2ddecoder")
    pixels = texture2ddecoder.decode_bc4(blocks.tobytes(), 4, 4 * len(blocks))
    return np.frombuffer(pixels, np.uint8).reshape(-1, 16, 4)[:, :, 2]


def samples(blocks: np.ndarray) -> np.ndarray:
    """Ours, of the same."""
    return plane_of(blocks[:, None]).reshape(-1, 16)


def test_any_block_decodes_as_texture2ddecoder_decodes_it():
    blocks = np.random.default_rng(0).integers(0, 256, (60_000, 8), dtype=np.uint8)
    blocks[:500, 1] = blocks[:500, 0]
    eight = blocks[:, 0] > blocks[:, 1]
    assert 20_000 < eight.sum() < 40_000  # both palettes
    np.testing.assert_array_equal(samples(blocks), referee(blocks))


def test_blocks_of_real_pictures_decode_as_texture2ddecoder_decodes_them():
    for picture in real_pictures(12):
        blocks = layout.encode(picture, "ycc").reshape(-1, 8)
        np.testing.assert_array_equal(samples(blocks), referee(blocks))


def test_pictures_keep_their_looks():
    real, made = real_pictures(12), [photo(i, 120, 180) for i in range(3)]
    for pictures, least in ((real, 35 if len(real) == 12 else 31), (made, 31)):
        there = [layout.decode(layout.encode(p, "ycc"), *p.shape[:2]) for p in pictures]
        apart = [p - q.astype(float) for p, q in zip(pictures, there, strict=True)]
        squares = sum(np.square(each).sum() for each in apart)
        assert 10 * np.log10(255**2 * sum(p.size for p in pictures) / squares) > least


def blocks_of(plane: np.ndarray) -> np.ndarray:
    """Its blocks' samples, int [n, 16]."""
    height, width = plane.shape
    cut = plane.reshape(height // 4, 4, width // 4, 4).swapaxes(1, 2)
    return cut.reshape(-1, 16).astype(np.int64)


def test_coded_samples_are_near_and_small_ranges_exact():
    """At the mean, half a step of the block and what rounding takes; eight levels and fewer lose nothing."""
    draw = np.random.default_rng(4)
    low, spread = draw.integers(0, 256, (2, 32, 32, 1, 1))
    plane = (low + draw.integers(0, spread + 1, (32, 32, 4, 4))).clip(0, 255)
    plane = plane.swapaxes(1, 2).reshape(128, 128).astype(np.uint8)
    wanted, got = blocks_of(plane), blocks_of(plane_of(bc4.encode(plane)))
    ranges = np.ptp(wanted, axis=1)
    assert (ranges < 8).sum() > 20
    np.testing.assert_array_equal(got[ranges < 8], wanted[ranges < 8])
    apart = np.square(got - wanted).sum(axis=1)
    assert (apart <= 16 * np.square(ranges / 14 + 1)).all()


def losses(wanted: np.ndarray) -> np.ndarray:
    """Squares [n, 65536] that blocks of samples [n, 16] lose at least, with any two bytes as end points."""
    blocks = np.zeros((2**16, 8), np.uint8)
    blocks[:, :2] = np.mgrid[:256, :256].reshape(2, -1).T  # in either order: both palettes
    numbers = sum(i % 8 << 3 * i for i in range(16)).to_bytes(6, "little")
    blocks[:, 2:] = np.frombuffer(numbers, np.uint8)
    values, nearest = np.arange(256, dtype=np.int16)[:, None], np.full((256, 2**16), 255, np.int16)
    for level in samples(blocks)[:, :8].T.astype(np.int16):
        np.minimum(nearest, np.abs(values - level), out=nearest)
    return np.stack([np.square(nearest[x], dtype=np.int32).sum(axis=0) for x in wanted])


def test_coding_is_nearly_the_best_there_is():
    """Against a search over all that end points can be, and against the extremes as ends."""
    pictures = [*real_pictures(3), *(photo(i, 64, 64) for i in range(3))]
    plane = np.concatenate([p[:64, :64].mean(axis=2) for p in pictures]).astype(np.uint8)
    blocks, got = blocks_of(plane), blocks_of(plane_of(bc4.encode(plane)))
    some = np.flatnonzero(np.ptp(blocks, axis=1) > 7)[::30]  # not sorted: numpys differ at ties
    ours, found = np.square(got - blocks).sum(axis=1)[some], losses(blocks[some])
    high, low, best = blocks[some].max(axis=1), blocks[some].min(axis=1), found.min(axis=1)
    extremes = found[np.arange(len(some)), 256 * high + low]
    assert (ours >= best).all()  # else the search is wrong
    assert (ours <= extremes).all()
    assert ours.sum() < extremes.sum() - 0.3 * (extremes.sum() - best.sum())


def test_coding_is_whole_numbers():
    """The same bytes on every machine."""
    draw = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    tiles = layout.encode(draw // np.arange(1, 33, dtype=np.uint8).repeat(3)[:, None], "ycc")
    assert zlib.crc32(tiles.tobytes()) == 4134156170


def pixels_of(tiles: np.ndarray) -> np.ndarray:
    """uint8 [n, 8, 8, 3] of tiles [n, 48], each a picture."""
    return np.stack([layout.decode(tile[None], 8, 8) for tile in tiles])


def test_colours_are_those_of_jpeg():
    """Tiles of one Y, Cb and Cr each, against the formulas of JFIF in float64."""
    draw = np.random.default_rng(1).integers(0, 256, (20_000, 3))
    tiles = np.zeros((len(draw), 6, 8), np.uint8)
    tiles[:, :, :2] = draw[:, [0, 0, 0, 0, 1, 2], None]  # both end points alike: flat
    y, cb, cr = (draw - [0, 128, 128]).astype(float).T
    rgb = [y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]
    wanted = np.clip(np.stack(rgb, -1), 0, 255)[:, None, None]
    assert np.abs(pixels_of(tiles.reshape(-1, 48)) - wanted).max() <= 0.52


def test_chroma_is_the_rounded_mean_of_four_pixels():
    picture = np.random.default_rng(2).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    r, g, b = picture.reshape(32, 2, 48, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
    cb = 128 - 0.168736 * r - 0.331264 * g + 0.5 * b
    cr = 128 + 0.5 * r - 0.418688 * g - 0.081312 * b
    got = layout._chroma(picture)
    assert np.abs(got - np.concatenate([cb, cr])).max() < 0.51
    blue = np.broadcast_to(np.uint8([0, 0, 255]), (8, 8, 3))
    assert layout._chroma(blue)[0, 0] == 255  # 255.5 by the formula, which a byte cannot hold


def test_a_tile_depends_on_its_own_pixels_alone_and_lies_where_the_page_says():
    """Every tile of a picture is that of its 64 pixels by themselves, and decodes to their place."""
    picture = photo(5, 40, 72)
    whole = layout.encode(picture, "ycc")
    cut = picture.reshape(5, 8, 9, 8, 3).swapaxes(1, 2).reshape(45, 8, 8, 3)
    alone = [layout.encode(np.ascontiguousarray(each), "ycc") for each in cut]
    np.testing.assert_array_equal(whole, np.concatenate(alone))
    there = layout.decode(whole, 40, 72)
    for i in (0, 8, 9, 44):
        y, x = i // 9 * 8, i % 9 * 8
        np.testing.assert_array_equal(there[y : y + 8, x : x + 8], layout.decode(alone[i], 8, 8))


@pytest.mark.parametrize("height", [1, 7, 8, 9, 17])
def test_any_side_is_padded_with_its_edge(height):
    for width in (1, 2, 8, 15, 40):
        picture = photo(height * width, height, width)
        tiles = layout.encode(picture, "ycc")
        sizes = np.array([[height, width]], np.int32)
        assert len(tiles) == layout.lengths(sizes, "ycc")[0] == -(-height // 8) * -(-width // 8)
        padded = np.pad(picture, ((0, -height % 8), (0, -width % 8), (0, 0)), "edge")
        np.testing.assert_array_equal(tiles, layout.encode(padded, "ycc"))
        whole = layout.decode(layout.encode(padded, "ycc"), *padded.shape[:2])
        np.testing.assert_array_equal(layout.decode(tiles, height, width), whole[:height, :width])


def test_a_flat_picture_is_flat():
    for grey in (0, 1, 127, 254, 255):
        picture = np.full((16, 24, 3), grey, np.uint8)
        np.testing.assert_array_equal(layout.decode(layout.encode(picture, "ycc"), 16, 24), picture)


# ---- the page ----


def test_the_decoder_on_the_page_gives_the_same_bits(tmp_path):
    code = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    page: dict = {}
    exec(code, page)
    pictures = [photo(i, 9 + 5 * i, 30 - 3 * i) for i in range(5)]
    for encoding in ("ycc", "raw"):
        path = write_pack(tmp_path / "a.pack", pictures, list(range(5)), encoding=encoding)
        pack, (tiles, first, sizes, labels) = Pack(path), page["open_pack"](path)
        assert labels.tolist() == [*range(5)]
        for row in range(5):
            there = page["picture"](tiles, first, sizes, row)
            np.testing.assert_array_equal(there, pack.picture(row))
    noise = np.random.default_rng(3).integers(0, 256, (300, 48), dtype=np.uint8)
    for tile, wanted in zip(noise, pixels_of(noise), strict=True):
        np.testing.assert_array_equal(page["tile"](tile), wanted)


# ---- the folder ----


@pytest.fixture
def small(tmp_path, monkeypatch) -> Path:
    """A pack of 20 pictures in which checksums cover 4,096 bytes each."""
    for module in (opened, write):
        monkeypatch.setattr(module, "BLOCK", 4096)
    pictures = [photo(i, 30 + i, 50) for i in range(20)]
    names = [f"here/{i}.jpg" for i in range(20)]
    return write_pack(tmp_path / "a.pack", pictures, np.arange(20) % 3, paths=names, classes="abc")


def test_a_pack_is_what_the_page_says(small):
    meta = json.loads((small / "meta.json").read_bytes())
    tiles, first, sizes, labels, keys = (
        np.load(small / f"{name}.npy", mmap_mode="r", allow_pickle=False)
        for name in ("tiles", "first", "sizes", "labels", "keys")
    )
    assert (tiles.dtype, tiles.shape) == ("u1", (first[-1], 48))
    assert (first.dtype, sizes.dtype, labels.dtype, keys.dtype) == ("<i8", "<i4", "<i8", "<u8")
    assert sizes.tolist() == [[30 + i, 50] for i in range(20)]
    assert first.tolist() == [0, *np.cumsum([-(-(30 + i) // 8) * 7 for i in range(20)])]
    assert labels.tolist() == [i % 3 for i in range(20)]
    assert keys.tolist() == path_keys(f"here/{i}.jpg" for i in range(20)).tolist()
    assert tiles.offset % 64 == 0
    wanted = {
        "format": "pack",
        "version": 1,
        "encoding": "ycc",
        "rows": 20,
        "classes": ["a", "b", "c"],
    }
    assert wanted.items() <= meta.items()
    assert meta["tiles"] == first[-1]
    assert meta["fingerprint"] == order_fingerprint(keys, labels)
    pixels = np.concatenate([photo(i, 30 + i, 50).reshape(-1, 3) for i in range(20)]) / 255
    np.testing.assert_allclose(meta["mean"], pixels.mean(axis=0))
    np.testing.assert_allclose(meta["std"], pixels.std(axis=0))
    for name in ("tiles", "first", "sizes", "labels", "keys"):
        data = (small / f"{name}.npy").read_bytes()
        blocks = [zlib.crc32(data[at : at + 4096]) for at in range(0, len(data), 4096)]
        assert meta["checksums"][f"{name}.npy"] == blocks
    assert len(meta["checksums"]["tiles.npy"]) > 5


def test_what_is_opened_is_what_was_put_in(small):
    pack = Pack(small)
    assert (pack.rows, pack.encoding, pack.classes) == (20, "ycc", ("a", "b", "c"))
    assert pack.name(0) == "here/0.jpg"
    assert pack.name(19) == "here/19.jpg"
    assert pack.numbers is None
    pack.check()
    for row in range(20):
        picture = photo(row, 30 + row, 50)
        wanted = layout.decode(layout.encode(picture, "ycc"), *picture.shape[:2])
        np.testing.assert_array_equal(pack.picture(row), wanted)
    (small / "paths.jsonl").unlink()
    assert Pack(small).name(3) == "path unknown"


def test_raw_is_exact(tmp_path):
    pictures = [photo(i, 9 + i, 20) for i in range(6)]
    pack = Pack(write_pack(tmp_path / "a.pack", pictures, encoding="raw"))
    assert pack.tiles.shape == (sum(p.size for p in pictures) // 3, 3)
    assert pack.labels.tolist() == [-1] * 6
    for row, picture in enumerate(pictures):
        np.testing.assert_array_equal(pack.picture(row), picture)


def test_a_changed_byte_is_found_where_it_lies(small):
    """The pictures of its block are refused, by name; all others are as they were."""
    whole = Pack(small)
    wanted = [whole.picture(row) for row in range(20)]
    data = bytearray((small / "tiles.npy").read_bytes())
    data[3 * 4096 + 77] ^= 4
    (small / "tiles.npy").write_bytes(data)
    pack = Pack(small)
    bad = []
    for row in range(20):
        try:
            np.testing.assert_array_equal(pack.picture(row), wanted[row])
        except DamagedRecord as error:
            bad.append((row, str(error)))
    assert [row for row, _ in bad] == [*pack.rows_in(3)]
    for row, words in bad:
        assert f"row {row} of {small} (here/{row}.jpg) may be damaged" in words
        assert "bytes 12,288 to 16,384" in words
    assert 0 < len(bad) < 6
    assert [*pack.damaged("tiles.npy")] == [3]
    with pytest.raises(
        UsageError, match=r"tiles.npy is damaged: the checksum of bytes 12,288 to 16,384"
    ):
        pack.check()
    assert [*pack.damaged("sizes.npy")] == []


def test_rows_of_a_block_are_those_with_a_byte_in_it(small):
    pack, offset = Pack(small), 128
    for block in range(len(pack.meta["checksums"]["tiles.npy"])):
        wanted = [
            row
            for row in range(20)
            if offset + 48 * pack.first[row] < (block + 1) * 4096
            and offset + 48 * pack.first[row + 1] > block * 4096
        ]
        assert [*pack.rows_in(block)] == wanted


def resealed(pack: Path, **changed) -> None:
    """meta.json with other values, and a checksum of its own that agrees."""
    meta = json.loads((pack / "meta.json").read_bytes())
    meta.pop("crc")
    (pack / "meta.json").write_bytes(sealed({**meta, **changed}))


def left_out(pack: Path, name: str) -> None:
    meta = json.loads((pack / "meta.json").read_bytes())
    (pack / "meta.json").write_bytes(
        sealed({k: v for k, v in meta.items() if k not in (name, "crc")})
    )


def swapped(pack: Path, name: str, array: np.ndarray) -> None:
    """Another array in the place of one, checksum and all."""
    np.save(pack / name, array)
    data = (pack / name).read_bytes()
    meta = json.loads((pack / "meta.json").read_bytes())
    sums = [zlib.crc32(data[at : at + 4096]) for at in range(0, len(data), 4096)]
    resealed(pack, checksums={**meta["checksums"], name: sums})


def flipped(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def cut(path: Path, length: int) -> None:
    with open(path, "r+b") as file:
        file.truncate(length)


def unsealed_again(pack: Path) -> None:
    text = (pack / "meta.json").read_text()
    (pack / "meta.json").write_text(re.sub(r',\n "crc": \d+', "", text))


BAD = {
    "no meta.json": (
        lambda p: (p / "meta.json").unlink(),
        r"meta.json cannot be read \(No such file",
    ),
    "changed": (
        lambda p: flipped(p / "meta.json", 60),
        "meta.json has changed since written",
    ),
    "cut meta": (lambda p: cut(p / "meta.json", 100), "meta.json has changed since written"),
    "no seal": (unsealed_again, "meta.json has changed since written"),
    "version": (
        lambda p: resealed(p, version=2),
        "a pack of version 2, encoding 'ycc', and this program reads version 1, ycc or raw",
    ),
    "format": (lambda p: resealed(p, format="beton"), "is of no pack"),
    "encoding": (lambda p: resealed(p, encoding="bc7"), "encoding 'bc7', and this"),
    "no mean": (lambda p: left_out(p, "mean"), "has no 'mean': prepare"),
    "other rows": (
        lambda p: resealed(p, rows=19),
        r"first.npy is int64 \[21\], and meta.json wants",
    ),
    "no sums": (lambda p: resealed(p, checksums={}), "which is not what was written"),
    "missing": (lambda p: (p / "tiles.npy").unlink(), r"tiles.npy cannot be read \(No such file"),
    "missing sizes": (
        lambda p: (p / "sizes.npy").unlink(),
        r"sizes.npy cannot be read \(No such file",
    ),
    "cut": (lambda p: cut(p / "tiles.npy", 5000), "tiles.npy is cut short or damaged"),
    "cut in the header": (lambda p: cut(p / "tiles.npy", 50), "tiles.npy is cut short or damaged"),
    "empty": (lambda p: cut(p / "keys.npy", 0), "keys.npy is cut short or damaged"),
    "longer": (
        lambda p: (p / "keys.npy").open("ab").write(b"1234"),
        "which is not what was written",
    ),
    "a bit of sizes": (
        lambda p: flipped(p / "sizes.npy", 130),
        "sizes.npy is damaged: the checksum",
    ),
    "a bit of labels": (lambda p: flipped(p / "labels.npy", 130), "labels.npy is damaged"),
    "dtype": (
        lambda p: swapped(p, "labels.npy", np.zeros(20, np.int32)),
        r"labels.npy is int32 \[20\], and meta.json wants int64 \[20\]",
    ),
    "shape": (
        lambda p: swapped(p, "sizes.npy", np.ones((10, 4), np.int32)),
        r"sizes.npy is int32 \[10, 4\], and meta.json wants int32 \[20, 2\]",
    ),
    "columns": (
        lambda p: swapped(p, "sizes.npy", np.asfortranarray(np.load(p / "sizes.npy"))),
        "sizes.npy is int32",
    ),
    "pickled": (
        lambda p: np.save(p / "labels.npy", np.array([None] * 20), allow_pickle=True),
        "labels.npy is cut short or damaged",
    ),
    "other sizes": (
        lambda p: swapped(p, "sizes.npy", np.full((20, 2), 8, np.int32)),
        "first.npy and sizes.npy do not agree",
    ),
    "other labels": (
        lambda p: swapped(p, "labels.npy", np.zeros(20, np.int64)),
        "its keys and labels are not its own",
    ),
    "other tiles": (
        lambda p: (swapped(p, "tiles.npy", np.zeros((7, 48), np.uint8)), resealed(p, tiles=7)),
        "its pictures do not fill the array",
    ),
    "a file": (lambda p: (shutil.rmtree(p), p.write_bytes(b"")), "is no pack: name the folder"),
}


@pytest.mark.parametrize("how", BAD)
def test_what_is_no_whole_pack_is_refused_in_one_sentence(small, how):
    harm, words = BAD[how]
    Pack(small)
    harm(small)
    with pytest.raises(UsageError, match=words) as refused:
        Pack(small)
    assert str(small) in str(refused.value)
    assert "\n" not in str(refused.value)
