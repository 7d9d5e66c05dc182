"""The pack's loader: its two forms on a CPU agree, what is gathered or laid out for a GPU gives the same crops,

damage is told by row, and nobody is left to guess where the pictures are. What holds for every loader:
test_loaders.py.
"""

from contextlib import closing

import numpy as np
import pytest
import torch
from asked import asked
from packs import write_pack
from PIL import Image
from truth import photo

from fastrot import native
from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError, Whole
from fastrot.core import CropRequest, DamagedRecord, View
from fastrot.data.loader import Loader
from fastrot.data.pack import file as opened
from fastrot.data.pack import read, write
from fastrot.data.pack.read import Pack, choose
from fastrot.ops.resample import resample

ROWS = 24
CPU, CUDA = torch.device("cpu"), torch.device("cuda")
VIEW = View(crops=(RandomResized(size=24), Shifted(size=20, pad=6)))
GB = 10**9


@pytest.fixture(params=["ycc", "raw"])
def folder(request, tmp_path_factory):
    """Pictures of odd sizes, in blocks of 4 kB instead of 64 MB."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (write, opened, read):
            patch.setattr(module, "BLOCK", 4096)
        path = tmp_path_factory.mktemp("pack") / "a.pack"
        pictures = [photo(i, 24 + i, 61 - 3 * (i % 7)) for i in range(ROWS)]
        names = [f"here/{i}.jpg" for i in range(ROWS)]
        yield write_pack(path, pictures, range(ROWS), encoding=request.param, paths=names)


def batches(data, view=VIEW, *, batch=5, workers=0, **how) -> list:
    return list(open_loader(data, view, batch=batch, workers=workers, **how).epoch(2))


def all_rows_request(data: Pack) -> CropRequest:
    """Every row once, in an order of its own, by both crops of VIEW."""
    index = np.random.default_rng(0).permutation(ROWS)
    return Loader(data, VIEW, batch=ROWS).request(index, 3)


def wanted(data: Pack, request: CropRequest) -> list[np.ndarray]:
    """Pictures decoded whole, then `resample`."""
    out = [np.empty((ROWS, size, size, 3), np.uint8) for size in request.sizes]
    for rows, pixels in zip(request.rows, out, strict=True):
        for row, crop in zip(rows, pixels, strict=True):
            resample(data.picture(int(row[0])), row, crop)
    return out


def equal(found, want) -> bool:
    return all(np.array_equal(f.numpy(), w) for f, w in zip(found, want, strict=True))


# ---- on a CPU ----


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("form", ["c", "python"])
def test_crops_are_those_of_the_decoded_pictures(folder, form, workers, monkeypatch):
    if form == "python":
        monkeypatch.setenv("FASTROT_NATIVE", "0")
    elif native.load() is None:
        pytest.skip("the C++ extension is not built")
    data = Pack(folder)
    request = all_rows_request(data)
    ((found, _),) = asked(data, [request], workers)
    assert equal(found, wanted(data, request))
    words = "C++ extension" if form == "c" else "without the C++ extension: FASTROT_NATIVE=0"
    assert words in data.describe()[0]


def test_a_pack_says_what_it_holds(folder):
    data = open_data(folder)
    assert data.rows == ROWS
    assert data.name(3) == "here/3.jpg"
    assert data.labels.tolist() == list(range(ROWS))
    assert data.sizes(np.array([4])).tolist() == [[28, 49]]


def test_pictures_smaller_than_the_crop_are_refused(folder):
    with pytest.raises(UsageError, match="row 0 has a short side of 24: set --image-size 24"):
        open_loader(folder, View(crops=(Shifted(size=32, pad=4),)), batch=2)
    with pytest.raises(UsageError, match="half of the pictures"):
        open_loader(folder, View(crops=(RandomResized(size=64),)), batch=2)


# ---- damage ----


def damage(folder, block: int) -> set[int]:
    """Change a byte; the rows of that block."""
    data = Pack(folder)
    file = folder / data.array
    with file.open("r+b") as opened:
        opened.seek(block * 4096 + 99)
        byte = opened.read(1)
        opened.seek(-1, 1)
        opened.write(bytes([byte[0] ^ 64]))
    return set(data.rows_in(block))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_stretch_is_told_by_row_and_can_be_skipped(folder, workers):
    want = {int(i): c for b in batches(folder) for i, c in zip(b.index, b.images, strict=True)}
    bad = damage(folder, 2)
    assert 0 < len(bad) < ROWS / 2
    words = r"row \d+ of .*a.pack \(here/\d+.jpg\) may be damaged.*--on-bad-record skip"
    with pytest.raises(DamagedRecord, match=words) as error:
        batches(folder, workers=workers)
    assert int(str(error.value).split()[1]) in bad
    found = batches(folder, workers=workers, on_bad_record="skip")
    for batch in found:
        for index, crop in zip(batch.index.tolist(), batch.images, strict=True):
            assert index not in bad
            assert torch.equal(crop, want[index])


def test_every_picture_with_a_byte_in_a_damaged_stretch_is_told_and_no_other(folder):
    """The stretches are the file's, its header of 128 bytes among them."""
    whole = Pack(folder)
    body = (folder / whole.array).read_bytes()
    header, width = len(body) - whole.tiles.nbytes, whole.tiles.shape[1]
    begins, ends = (header + width * each for each in (whole.first[:-1], whole.first[1:]))
    blocks = -(-len(body) // 4096)
    assert ((begins // 4096) != ((begins - header) // 4096)).any()
    for block in range(blocks):
        data = Pack(folder)
        data._agrees = lambda name, each, block=block: each != block
        told = set(data.damage(np.arange(ROWS)))
        inside = (begins < (block + 1) * 4096) & (ends > block * 4096)
        assert told == set(np.flatnonzero(inside).tolist()), block


def test_each_stretch_is_read_once(folder, monkeypatch):
    damage(folder, 1)
    read_, data = [], Pack(folder)
    agrees = data._agrees
    monkeypatch.setattr(data, "_agrees", lambda *block: read_.append(block) or agrees(*block))
    for _ in range(2):
        batches(data, workers=2, on_bad_record="skip")
    assert len(read_) == len(set(read_)) > 4


def test_damage_is_found_before_a_gpu_gets_anything(folder):
    damage(folder, 1)
    with pytest.raises(UsageError, match=r"npy is damaged: the checksum of bytes 4,096 to 8,192"):
        Pack(folder).place(None, CUDA)


# ---- for a GPU ----


def subset() -> np.ndarray:
    return np.array([17, 3, 4, 11, 0, 23, 8])


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("rows", [None, subset()], ids=["all", "some"])
def test_resident_pictures_give_the_same_crops(folder, rows, workers):
    data = Pack(folder)
    placed = read._Resident(data, rows, CPU)
    data._placed.append(placed)
    request = all_rows_request(data)
    want = wanted(data, request)
    assert placed.covers(None) == (rows is None)
    assert placed.covers(np.array([3, 9])) == (rows is None)
    assert placed.covers(np.array([3, 8]))
    if rows is not None:  # no more than these
        assert len(placed.pack.tiles) == (data.first[rows + 1] - data.first[rows]).sum()
        here = np.isin(request.rows[0][:, 0], rows)
        request = CropRequest(tuple(each[here] for each in request.rows), request.sizes)
        want = [each[here] for each in want]
    with closing(read._PlacedReader(data, CPU, workers)) as reader:
        found, _ = reader.begin(request).result()
    assert equal(found, want)


@pytest.mark.parametrize("workers", [0, 3])
def test_gathered_pictures_give_the_same_crops(folder, workers):
    data = Pack(folder)
    request = all_rows_request(data)
    data._placed.append(read._Pinned(data, None, CPU))
    with closing(read._PlacedReader(data, CPU, workers)) as reader:
        found, _ = reader.begin(request).result()
    assert equal(found, wanted(data, request))


def test_only_what_lies_under_the_boxes_is_gathered(folder, monkeypatch):
    data = Pack(folder)
    index = np.arange(ROWS)
    box = np.array([[i, 9, 5, 10, 12, 0] for i in index])
    asked, real = [], read.unpack_crops
    made = lambda pack, *how: asked.append(pack) or real(pack, *how)  # noqa: E731
    monkeypatch.setattr(read, "unpack_crops", made)
    read._Pinned(data, None, CPU).begin(CropRequest((box,), (10,)), None).result()
    rows = slice(8, 24) if data.encoding == "ycc" else slice(9, 19)
    heights = np.minimum(data.sizes(index)[:, 0], rows.stop) - rows.start
    assert asked[0].sizes[:, 0].tolist() == heights.tolist()


@pytest.mark.parametrize(
    ("asked", "wanted", "free", "chosen"),
    [
        ("auto", 80, 130, "resident"),
        ("auto", 84, 130, "pinned"),  # it would leave less than a third of 140
        ("auto", 20, 60, "pinned"),
        ("resident", 84, 130, "resident"),
        ("pinned", 1, 130, "pinned"),
    ],
)
def test_auto_leaves_a_third_of_the_gpu_to_the_training(asked, wanted, free, chosen):
    assert choose(asked, wanted * GB, free * GB, 140 * GB, "a.pack") == chosen


def test_a_gpu_too_small_is_told_with_what_is_missing():
    words = (
        "--placement resident wants 88.0 GB of GPU memory for a.pack, 9.5 GB more than are free: "
        "choose --placement pinned"
    )
    with pytest.raises(UsageError, match=words):
        choose("resident", 88 * GB, 78 * GB + GB // 2, 80 * GB, "a.pack")


def test_a_view_is_placed_once_and_the_choice_is_said(folder, monkeypatch):
    kinds = []
    for kind in ("_Resident", "_Pinned"):
        real = getattr(read, kind)
        made = lambda file, rows, device, real=real: kinds.append(real) or real(file, rows, CPU)  # noqa: E731
        monkeypatch.setattr(read, kind, made)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (130 * GB, 140 * GB))
    data = Pack(folder)
    for rows in (subset(), subset()[:3], np.array([1, 2])):
        data.place(rows, CUDA)
        for placed in data._placed:
            placed.device = CUDA
    assert len(kinds) == 2  # the second lies within the first
    assert "are in GPU memory (--placement resident); the GPU had 130.0 of 140.0 GB" in str(
        data._said
    )
    assert data.describe() == data._said
    data = Pack(folder, "pinned")
    data.place(None, CUDA)
    assert "are in host memory, copied ahead (--placement pinned)" in data.describe()[0]


@pytest.mark.parametrize("placement", ["resident", "pinned"])
def test_without_a_gpu_a_placement_is_refused(folder, placement):
    data = open_data(folder, placement=placement)
    words = f"--placement {placement} is for a GPU, and this runs on cpu"
    with pytest.raises(UsageError, match=words):
        open_loader(data, VIEW, batch=2)


def test_other_data_has_no_placement(pictures):
    with pytest.raises(UsageError, match=r"--placement pinned is for a \.pack"):
        open_data(pictures, placement="pinned")
    with pytest.raises(UsageError, match=r"--placement pinned is for a \.pack"):
        open_data(pictures, "dali", placement="pinned")


def test_a_folder_of_pictures_with_a_meta_json_is_a_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    (tmp_path / "train" / "cats").mkdir(parents=True)
    Image.fromarray(photo(1, 20, 30)).save(tmp_path / "train" / "cats" / "a.png")
    (tmp_path / "train" / "meta.json").write_text("{}")
    assert open_data(tmp_path / "train").format == "folder"


@pytest.mark.gpu
@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("placement", ["resident", "pinned"])
def test_batches_on_a_gpu_are_those_of_the_cpu(folder, placement, workers, tmp_path):
    np.save(tmp_path / "rows.npy", subset())
    view = View(crops=(*VIEW.crops, Whole(size=17)), rows=tmp_path / "rows.npy")
    for each in (VIEW, view):
        data = open_data(folder, placement=placement)
        there = batches(data, each, workers=workers, device="cuda")
        torch.cuda.synchronize()
        for one, other in zip(batches(folder, each), there, strict=True):
            assert all(crop.is_cuda for crop in other.crops)
            assert equal([crop.cpu() for crop in other.crops], [crop.numpy() for crop in one.crops])


@pytest.mark.gpu
def test_a_gpu_without_room_refuses_a_resident_pack(folder, monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (10, 140 * GB))
    with pytest.raises(UsageError, match="more than are free"):
        open_loader(open_data(folder, placement="resident"), VIEW, batch=2, device="cuda")
