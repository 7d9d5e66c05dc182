"""What the choice of the pack's encoding rests on: exact codecs, a rule that can go either way, pages that say void."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from benchmarks import bench_quality, measure, report
from fastrot.assemble import open_data
from fastrot.config import UsageError
from fastrot.data.pack import bc4
from tests.truth import photo

pytest.importorskip("etcpak")
pytest.importorskip("texture2ddecoder")
pytest.importorskip("skimage")


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


# ---- the encodings ----


def planes() -> dict[str, np.ndarray]:
    draw = np.random.default_rng(0)
    return {
        "noise": draw.integers(0, 256, (32, 24), dtype=np.uint8),
        "photo": np.ascontiguousarray(photo(1, 32, 48)[..., 0]),
        "flat": np.full((8, 8), 77, np.uint8),
        "two values": np.where(draw.random((16, 16)) < 0.5, 3, 250).astype(np.uint8),
        "neighbours": draw.integers(100, 102, (16, 16), dtype=np.uint8),
        "extremes": np.where(draw.random((16, 16)) < 0.1, 255, 0).astype(np.uint8),
    }


@pytest.mark.parametrize("name", planes())
def test_our_blocks_lose_less_than_etcpaks(name):
    plane = planes()[name]

    def lost(coder) -> np.ndarray:
        blocks = coder(plane)
        back = bc4.decode(blocks.reshape(-1, 8)).reshape(*blocks.shape[:2], 4, 4)
        return np.square(back.swapaxes(1, 2).reshape(plane.shape).astype(int) - plane)

    ours, theirs = lost(bc4.encode), lost(bench_quality.bc4_by_etcpak)
    assert ours.sum() <= theirs.sum()
    if name in ("flat", "two values", "neighbours", "extremes"):
        assert not ours.any()  # two values are the end points
    if name == "photo":
        assert ours.mean() < 0.6 * theirs.mean()


@pytest.mark.parametrize("name", ["bc7", "ycc", bench_quality.SMOOTHED, bench_quality.BY_ETCPAK])
def test_pictures_come_back_upright_in_their_colours_and_sizes(name):
    codec, a_block = bench_quality.codecs()[name], 16 if name == "bc7" else 12
    side = 4 if name == "bc7" else 8
    for height, width in ((61, 83), (37, 35), (64, 64)):
        picture = photo(2, height, width)
        data = codec.encode(picture)
        pixels = -(-height // side) * -(-width // side) * side * side
        assert len(data) == pixels * a_block // 16
        back = codec.decode(data, height, width)
        assert back.shape == picture.shape
        assert np.abs(back.astype(int) - picture).mean() < (3.5 if name == "bc7" else 6)
    red = np.zeros((16, 16, 3), np.uint8)
    red[..., 0] = 200
    assert np.abs(codec.decode(codec.encode(red), 16, 16).astype(int) - red).max() <= 2


def test_chroma_that_is_smoothed_is_nearer_on_a_slope_and_the_same_on_a_plain():
    slope = np.zeros((32, 32, 3), np.uint8)
    slope[..., 0] = np.arange(32) * 8
    plain = np.full((24, 40, 3), (200, 30, 90), np.uint8)
    for picture, same in ((slope, False), (plain, True)):
        data = bench_quality.encode_ycc(picture)
        each = [
            bench_quality.decode_ycc(data, *picture.shape[:2], smooth=smooth)
            for smooth in (False, True)
        ]
        assert np.array_equal(*each) == same
        near, far = (np.square(back.astype(int) - picture).mean() for back in each[::-1])
        assert near <= far


def test_bc7_has_no_block_of_another_mode():
    data = bench_quality.encode_bc7(photo(3, 64, 64))
    assert {byte & 127 for byte in data[::16]} == {1 << 6}


def test_what_is_kept_is_told_in_decibels():
    exact = bench_quality.Codec(
        lambda picture: picture.tobytes(),
        lambda data, height, width: np.frombuffer(data, np.uint8).reshape(height, width, 3),
    )
    off = bench_quality.Codec(
        exact.encode, lambda *found: exact.decode(*found) ^ np.uint8(1)
    )  # each value is one off
    whole, near = (bench_quality.judge(codec, photo(4)) for codec in (exact, off))
    assert (whole.psnr, whole.ssim, whole.pixels, whole.size) == (100, 1, 4800, 14400)
    assert near.squares == 1
    assert near.psnr == pytest.approx(48.13, abs=0.01)
    assert 0.9 < near.ssim < 1
    small = bench_quality.Kept(pixels=100, size=50, seconds=0.001, squares=4.0, ssim=0.5)
    row, seconds = bench_quality.picture_rows("x", [near, small])
    assert row["mean_db"] == pytest.approx((near.psnr + bench_quality.psnr(4)) / 2)
    assert row["pooled_db"] == pytest.approx(bench_quality.psnr((4800 + 400) / 4900))
    assert row["bytes_a_pixel"] == pytest.approx(14450 / 4900)
    assert seconds["unit"] == "ms a picture and core"


# ---- what is learnt from ----


def test_all_pictures_go_through_the_encoding_in_their_order(tmp_path):
    root, exact = tmp_path / "pictures", {}
    for split in ("train", "val"):
        for i, name in enumerate(("b/1", "a/2", "a/10")):
            path = root / split / f"{name}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            exact[split, name] = photo(i, 40, 24 + 8 * i)
            Image.fromarray(exact[split, name]).save(path)
    codec = bench_quality.codecs()["jpeg 75"]
    made = bench_quality.prepared(root, "jpeg 75", codec, tmp_path / "work", quick=False)
    for split, file in zip(("train", "val"), made, strict=True):
        assert open_data(file).labels.tolist() == [0, 0, 1]
        lines = file.with_name(f"{file.name}.paths.jsonl").read_text().splitlines()
        assert [json.loads(line)["path"].split(".")[0] for line in lines] == ["a/10", "a/2", "b/1"]
        stored, at = file.read_bytes(), -1
        for name in ("a/10", "a/2", "b/1"):
            picture = exact[split, name]
            coded = codec.decode(codec.encode(picture), *picture.shape[:2])
            assert at < (at := stored.find(coded.tobytes())), (split, name)


def test_an_absent_folder_is_refused_in_one_sentence(tmp_path):
    with pytest.raises(UsageError, match="--root DIR"):
        bench_quality.prepared(tmp_path / "nowhere", "originals", None, tmp_path, quick=True)
    with pytest.raises(UsageError, match="--sample DIR"):
        list(bench_quality.sample(tmp_path / "nowhere", None))


def test_a_missing_package_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "texture2ddecoder", None)
    with pytest.raises(UsageError, match=r"needs texture2ddecoder: pip install"):
        bench_quality.codecs()


# ---- the decision ----


def rows(small: list[float], large: list[float], originals: float = 0.6) -> list[dict]:
    """The rows of ycc (0.75 bytes a pixel) and bc7 (1) with these accuracies."""
    found, void = [], originals < bench_quality.LEAST
    for name, size, right in (("ycc", 75, small), ("bc7", 100, large), ("originals", None, None)):
        if size is not None:
            kept = bench_quality.Kept(pixels=100, size=size, seconds=0.01, squares=9.0, ssim=0.9)
            found += bench_quality.picture_rows(name, [kept] * 2)
        summaries = [
            {"val_accuracy": each, "steps": 9, "seconds": 1.0, "images_per_s": 2.0}
            for each in right or [originals] * 3
        ]
        found.append(bench_quality.learning_row(name, summaries, void))
    return found


@pytest.mark.parametrize(
    ("small", "large", "winner"),
    [
        ([0.58, 0.59, 0.60], [0.58, 0.59, 0.60], "ycc"),
        ([0.57, 0.58, 0.59], [0.58, 0.59, 0.605], "ycc"),  # lower, but by less than the spread
        ([0.55, 0.56, 0.57], [0.59, 0.60, 0.61], "bc7"),
        ([0.55, 0.56, 0.60], [0.60, 0.60, 0.60], "ycc"),  # the wider spread counts
        ([0.60, 0.60, 0.60], [0.55, 0.56, 0.57], "ycc"),
    ],
)
def test_the_smaller_wins_unless_it_is_lower_by_more_than_the_spread(small, large, winner):
    found = rows(small, large)
    assert bench_quality.chosen(found) == winner
    assert f"Chosen: {winner}." in bench_quality.decision(found)


def test_without_learning_from_the_originals_nothing_is_chosen(tmp_path):
    found = rows([0.58] * 3, [0.58] * 3, originals=0.549)
    assert bench_quality.chosen(found) is None
    assert "Nothing is chosen (void" in bench_quality.decision(found)[-1]
    text = page(found, tmp_path)
    assert text.count("| VOID, learning") == 3
    assert "MISSED: held-out rotation accuracy, originals" in text
    missing = [row for row in rows([0.58] * 3, [0.58] * 3) if row["variant"] != "bc7"]
    assert "rows of bc7 or ycc are missing" in bench_quality.decision(missing)[-1]


def test_the_page_ends_its_figures_with_the_decision(tmp_path):
    text = page(rows([0.58, 0.59, 0.60], [0.57, 0.58, 0.60]), tmp_path)
    figures, decision = text.split("## The decision")
    assert "Chosen: ycc." in decision
    assert "Chosen" not in figures
    # 1,281,167 pictures of 256 x 256 at 0.75 bytes, and 1.39 times as many pixels
    assert "63 GB as squares of 256, and 88 GB at short side 256" in decision
    assert (
        "ycc: 0.750 bytes a pixel, 38.6 dB, 59.0% of held-out rotations predicted right" in decision
    )
    assert "ycc less bc7: +1.0%, +1.0%, +0.0% of the rotations." in decision
    assert "The means of all 3 that were learnt from lie within 1.7 points" in decision
    assert "the seeds of one alone within up to 3.0" in decision
    assert "_encodings.png)" in figures
    assert "VOID" not in text
    assert figures.count("| what | variant |") == 3  # a table for each thing measured


def page(found: list[dict], folder) -> str:
    for row in found:
        measure.append(folder / "cpu_x_2_cores.jsonl", row)
    made = report.write(folder / "cpu_x_2_cores.jsonl", folder / "reports")
    (text,) = (path.read_text() for path in made if path.suffix == ".md")
    return text
