"""What holds for every loader: a new format is covered by a line in FORMATS."""

import contextlib
import importlib.util
import multiprocessing
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import Image
from plain_beton import write_beton
from truth import photo

from fastrot.assemble import open_data, open_loader
from fastrot.config import RandomResized, Shifted, UsageError, Whole, Within
from fastrot.core import Data, View
from fastrot.data import loader as loader_module
from fastrot.data.beton.write import BetonOptions
from fastrot.data.loader import Loader
from fastrot.data.pack import write as pack
from fastrot.data.pack.layout import Encoding
from fastrot.data.prepare.convert import convert
from fastrot.data.tars.write import TarsOptions

PACKS = ("pack", "raw-pack")
FORMATS = ("folder", "beton", "parts", *PACKS, "tars", "ffcv-beton", "synthetic")
OF_ONE_FOLDER = ("folder", "beton", "raw-beton", "parts", *PACKS, "tars")
THROUGH_FFCV = pytest.param(  # the .beton, by --loader ffcv
    "ffcv",
    marks=[
        pytest.mark.ffcv,
        pytest.mark.skipif(
            importlib.util.find_spec("ffcv") is None, reason="FFCV is not installed: make ffcv"
        ),
    ],
)
THROUGH_DALI = [  # by --loader dali
    pytest.param(
        f"dali-{name}",
        marks=[
            pytest.mark.dali,
            pytest.mark.skipif(
                not importlib.util.find_spec("nvidia")
                or not importlib.util.find_spec("nvidia.dali"),
                reason="DALI is not installed: make dali",
            ),
        ],
    )
    for name in ("tars", "folder")
]
TRAINING = View(crops=(RandomResized(size=24),))
EVALUATION = View(crops=(Within(size=24, short=28, random=False, flip=False),), shuffled=False)
BLOCKS = View(crops=TRAINING.crops, blocks=(4, 3))
BATCH = 5


@pytest.fixture(scope="session")
def prepared(pictures, tmp_path_factory) -> dict[str, Data]:
    """The same 37 pictures in every format (synthetic and ffcv-beton: others)."""
    out = tmp_path_factory.mktemp("prepared")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FASTROT_CACHE_DIR", str(out / "cache"))
        folder = open_data(pictures)
    for encoding, name in (("jpg", "beton"), ("raw", "raw-beton")):
        convert(
            BetonOptions(
                source="imagefolder",
                root=pictures,
                out=out / f"{name}.beton",
                encoding=encoding,
                workers=0,
            )
        )
    packs: tuple[tuple[Encoding, str], ...] = (("ycc", "pack"), ("raw", "raw-pack"))
    for encoding, name in packs:
        made = dict(source="imagefolder", root=pictures, workers=0)
        convert(pack.PackOptions(**made, out=out / f"{name}.pack", encoding=encoding))
    photos = [photo(i, 50 + i, 60) for i in range(23)]
    write_beton(out / "ffcv-beton.beton", photos, {"image": "image", "label": ("int", range(23))})
    parts = BetonOptions(
        source="imagefolder", root=pictures, out=out / "p.beton", workers=0, keep_parts=True
    )
    names = ("beton", "raw-beton", "ffcv-beton")
    betons = {name: open_data(out / f"{name}.beton") for name in names}
    betons["parts"] = open_data(convert(parts, part=9).out)
    betons |= {name: open_data(out / f"{name}.pack") for _, name in packs}
    tars = TarsOptions(source="imagefolder", root=pictures, out=out / "tars", workers=0, shard=15)
    convert(tars)
    return {
        "folder": folder,
        "synthetic": open_data("synthetic:31"),
        "tars": open_data(tars.out),
        **betons,
    }


@pytest.fixture(params=[*FORMATS, THROUGH_FFCV, *THROUGH_DALI])
def data(request, prepared) -> Data:
    if request.param == "ffcv" and "ffcv" not in prepared:
        prepared["ffcv"] = open_data(prepared["beton"].path, "ffcv")
    if request.param.startswith("dali-") and request.param not in prepared:
        from fastrot.data.tars.dali import ThroughDali

        prepared[request.param] = ThroughDali(prepared[request.param.removeprefix("dali-")])
    return prepared[request.param]


def epoch(data, view, number=0, start=0, *, batch=BATCH, workers=0, **how):
    loader = open_loader(data, view, batch=batch, workers=workers, **how)
    return list(loader.epoch(number, start))


def same(a, b) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.index, y.index)
        and torch.equal(x.label, y.label)
        and torch.equal(x.epoch_step, y.epoch_step)
        and all(torch.equal(s, t) for s, t in zip(x.crops, y.crops, strict=True))
        for x, y in zip(a, b, strict=True)
    )


def by_index(batches) -> dict[int, np.ndarray]:
    found = {}
    for batch in batches:
        for index, crop in zip(batch.index.tolist(), batch.images.numpy(), strict=True):
            assert index not in found
            found[index] = crop
    return found


def subset(tmp_path, rows):
    np.save(tmp_path / "rows.npy", np.array(rows, np.int64))
    return tmp_path / "rows.npy"


def test_it_is_data(data):
    assert isinstance(data, Data)
    assert len(data.labels) == len(data.keys) == data.rows
    assert len(np.unique(data.keys)) == data.rows
    assert data.labels.max() < len(data.classes)


def test_an_epoch_in_training(data):
    batches = epoch(data, TRAINING, 3)
    assert len(batches) == data.rows // BATCH  # the ragged tail is dropped
    for k, batch in enumerate(batches):
        assert batch.images.shape == (BATCH, 24, 24, 3)
        assert batch.images.dtype == torch.uint8
        assert batch.label.tolist() == data.labels[batch.index.numpy()].tolist()
        assert batch.epoch_step.tolist() == [3, 3 * len(batches) + k]
    seen = [i for batch in batches for i in batch.index.tolist()]
    assert len(set(seen)) == len(seen)
    assert seen != sorted(seen)


def test_evaluation_is_in_data_order_with_the_tail(data):
    batches = epoch(data, EVALUATION)
    assert [i for batch in batches for i in batch.index.tolist()] == list(range(data.rows))
    assert len(batches[-1].images) == data.rows % BATCH


def test_epochs_and_seeds_differ_and_repeat(data):
    first = epoch(data, TRAINING, 0)
    assert same(first, epoch(data, TRAINING, 0))
    for other in (epoch(data, TRAINING, 1), epoch(data, TRAINING, 0, seed=1)):
        assert not torch.equal(first[0].index, other[0].index)
        assert not torch.equal(first[0].images, other[0].images)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize(
    "view", [TRAINING, EVALUATION, BLOCKS], ids=["training", "evaluation", "blocks"]
)
def test_any_number_of_workers_gives_equal_bytes(data, view):
    alone = epoch(data, view, 1)
    for workers in (1, 3) if view is TRAINING else (2,):
        assert same(alone, epoch(data, view, 1, workers=workers))


@pytest.mark.parametrize("view", [TRAINING, BLOCKS], ids=["full", "blocks"])
def test_an_epoch_can_start_in_the_middle(data, view):
    whole = epoch(data, view, 2)
    for start, workers in ((1, 2), (len(whole) - 1, 0), (len(whole), 2)):
        assert same(whole[start:], epoch(data, view, 2, start, workers=workers))


@pytest.mark.parametrize("view", [TRAINING, BLOCKS], ids=["full", "blocks"])
def test_two_ranks_draw_the_global_batches_of_one_process(data, view):
    alone = epoch(data, view, 1, batch=6)
    ranks = [epoch(data, view, 1, batch=3, rank=rank, world=2) for rank in (0, 1)]
    assert len(ranks[0]) == len(ranks[1]) == len(alone)
    for one, *shares in zip(alone, *ranks, strict=True):
        wanted, got = by_index([one]), by_index(shares)  # by_index: no row twice
        assert wanted.keys() == got.keys()
        assert all(np.array_equal(wanted[i], got[i]) for i in wanted)


def test_ranks_share_the_evaluation_without_overlap(data):
    world = 3
    ranks = [b for r in range(world) for b in epoch(data, EVALUATION, rank=r, world=world)]
    assert sorted(by_index(ranks)) == list(range(data.rows))


@pytest.mark.parametrize("blocks", [None, (4, 3)], ids=["full", "blocks"])
def test_an_owned_view_gives_each_rank_its_own_rows(data, blocks):
    view = View(crops=TRAINING.crops, owned=True, blocks=blocks)
    for rank in (0, 1):
        batches = epoch(data, view, rank=rank, world=2)
        assert len(batches) == data.rows // 2 // BATCH
        assert {i % 2 for i in by_index(batches)} == {rank}


def test_index_keeps_its_meaning_in_a_subset(data, tmp_path):
    rows = subset(tmp_path, [1, 2, 3, 5, 8, 13, 21, 4, 7, 11])
    whole = by_index(epoch(data, View(crops=TRAINING.crops, shuffled=False), 4))
    part = by_index(epoch(data, View(crops=TRAINING.crops, rows=rows), 4))
    assert sorted(part) == sorted(np.load(rows).tolist())
    assert all(np.array_equal(part[i], whole[i]) for i in part)
    array = by_index(epoch(data, View(crops=TRAINING.crops, rows=np.load(rows)), 4))
    assert list(array) == list(part)


def test_an_epoch_by_blocks_visits_neighbours_and_each_picture_as_it_is(data, tmp_path):
    """Boxes are those of the full order: only the sequence differs."""
    rows = np.delete(np.arange(data.rows), 7)
    crops = {"crops": TRAINING.crops, "rows": subset(tmp_path, rows)}
    batches = epoch(data, View(**crops, blocks=(4, 3)), 4, batch=3)
    seen = np.concatenate([batch.index.numpy() for batch in batches])
    places = np.searchsorted(rows, seen)
    apart = (places[0:12:3] - places[0]) % len(rows)
    assert set(apart.tolist()) <= {*range(4), *range(len(rows) - 3, len(rows))}
    whole = by_index(epoch(data, View(crops=TRAINING.crops, shuffled=False), 4))
    part = by_index(batches)
    assert len(part) == len(rows) // 3 * 3
    assert all(np.array_equal(part[i], whole[i]) for i in part)


def test_blocks_larger_than_the_view_are_refused(data):
    with pytest.raises(
        UsageError, match=rf"--order-block 99 .* {data.rows} pictures .*--order full"
    ):
        epoch(data, View(crops=TRAINING.crops, blocks=(99, 3)))


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([0, 10**6], "row 1000000"),
        ([-1, 3], "row -1"),
        ([1, 1], "twice"),
        ([], "no pictures"),
        ([0, 1], "--batch 5"),
    ],
)
def test_a_subset_that_cannot_be_is_refused(data, tmp_path, rows, words):
    with pytest.raises(UsageError, match=words):
        epoch(data, View(crops=TRAINING.crops, rows=subset(tmp_path, rows)))
    with pytest.raises(UsageError, match=words):
        epoch(data, View(crops=TRAINING.crops, rows=np.array(rows, np.int64)))


def test_two_crops_in_one_view(data):
    view = View(crops=(RandomResized(size=24), Whole(size=17)))
    for batch, one in zip(epoch(data, view, workers=2), epoch(data, TRAINING), strict=True):
        assert torch.equal(batch.crops[0], one.images)
        assert batch.crops[1].shape == (BATCH, 17, 17, 3)


def test_two_equal_crops_draw_different_boxes(data):
    twice = View(crops=(RandomResized(size=24),) * 2)
    assert all(not torch.equal(*batch.crops) for batch in epoch(data, twice))


def test_a_batch_stays_valid_after_later_ones_are_drawn(data):
    """Also a part of it, or one that outlives its epoch: buffers are used again, but never under a reader."""
    loader = open_loader(data, TRAINING, batch=3, workers=2)
    kept, copies = [], []
    for number in range(2):
        for k, batch in enumerate(loader.epoch(number)):
            keep = batch.images if k % 3 else batch.images[1:, 3:]
            if k % 2:
                kept.append(keep if k % 4 == 1 else keep.numpy()[:2])
                copies.append(torch.as_tensor(kept[-1]).clone())
            del batch, keep
    assert all(torch.equal(torch.as_tensor(a), b) for a, b in zip(kept, copies, strict=True))


@pytest.mark.parametrize("how", ["closed", "dropped", "raised"])
def test_breaking_off_leaks_no_thread_and_no_process(data, how):
    loader = open_loader(data, TRAINING, batch=2, workers=2)
    threads = set(threading.enumerate())
    batches = loader.epoch(0)
    next(batches)
    if how == "closed":
        batches.close()
    elif how == "raised":
        with pytest.raises(RuntimeError, match="enough"):
            batches.throw(RuntimeError("enough"))
    del batches
    until = time.monotonic() + 10  # a queue's own thread ends a moment after it
    while set(threading.enumerate()) - threads and time.monotonic() < until:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - threads
    assert not multiprocessing.active_children()


# ---- across formats ----


@pytest.mark.parametrize("name", OF_ONE_FOLDER[1:])
def test_boxes_and_flips_are_equal_in_all_formats(prepared, name):
    view = View(crops=(RandomResized(size=24), Shifted(size=24), Within(size=24, short=28)))
    folder, other = (open_loader(prepared[n], view, batch=BATCH) for n in ("folder", name))
    assert other.fingerprint == folder.fingerprint
    assert other.data.classes == folder.data.classes
    assert np.array_equal(other.data.keys, folder.data.keys)
    index = np.arange(folder.images)[::-1].copy()
    for ours, theirs in zip(
        folder.request(index, 7).rows, other.request(index, 7).rows, strict=True
    ):
        assert np.array_equal(ours, theirs)
    for ours, theirs in zip(folder.epoch(1), other.epoch(1), strict=True):
        assert torch.equal(ours.index, theirs.index)


@pytest.mark.parametrize("name", ["raw-beton", "raw-pack"])
def test_what_is_raw_gives_the_folders_pixels(prepared, name):
    for view in (TRAINING, EVALUATION):
        assert same(epoch(prepared["folder"], view), epoch(prepared[name], view))


@pytest.mark.parametrize("name", ["beton", "pack"])
def test_what_is_compressed_gives_the_folders_pixels_but_for_its_loss(prepared, name):
    pairs = zip(epoch(prepared["folder"], TRAINING), epoch(prepared[name], TRAINING))  # noqa: B905
    apart = np.concatenate([(a.images.float() - b.images.float()).abs().numpy() for a, b in pairs])
    assert apart.mean() < 4
    assert np.quantile(apart, 0.99) < 20


def test_a_folder_of_pngs_and_its_raw_beton_are_equal(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTROT_CACHE_DIR", str(tmp_path / "cache"))
    for i in range(9):
        (tmp_path / "png" / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(photo(i, 30 + i, 41)).save(tmp_path / "png" / f"c{i % 2}" / f"{i}.png")
    raw = tmp_path / "raw.beton"
    convert(
        BetonOptions(
            source="imagefolder", root=tmp_path / "png", out=raw, encoding="raw", workers=0
        )
    )
    view = View(crops=(RandomResized(size=24), Shifted(size=24)))
    assert same(epoch(tmp_path / "png", view), epoch(raw, view))


@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_of_the_cpu(data):
    same_pixels = not data.decoder.startswith("DALI")  # DALI decodes otherwise there
    for number in range(3):
        there = epoch(data, TRAINING, number, workers=2, device="cuda")
        torch.cuda.synchronize()
        for a, b in zip(epoch(data, TRAINING, number), there, strict=True):
            assert b.images.is_cuda
            apart = (a.images.int() - b.images.cpu().int()).abs().float()
            assert not apart.any() if same_pixels else apart.mean() < 3
            assert torch.equal(a.index, b.index.cpu())
            assert torch.equal(a.epoch_step, b.epoch_step.cpu())


class Stream:
    """A GPU's, that notes what is asked of it."""

    def __init__(self, name: str, told: list[str]):
        self.name, self.told = name, told

    def record_event(self) -> str:
        self.told.append(f"{self.name} notes")
        return self.name

    def wait_event(self, event: str) -> None:
        self.told.append(f"{self.name} waits for {event}")


def test_a_batch_on_its_way_to_a_gpu_is_handed_out_before_the_next_is_drawn(monkeypatch):
    told: list[str] = []
    main, side = Stream("main", told), Stream("side", told)
    current = [main]

    @contextlib.contextmanager
    def on(stream):
        current.append(stream)
        yield
        current.pop()

    def drawn():
        for k, batch in enumerate(open_loader("synthetic:31", TRAINING, batch=BATCH).epoch(0)):
            told.append(f"{k} drawn on {current[-1].name}")
            yield batch

    def kept(tensor, stream):
        told.append(f"kept for {stream.name}")

    monkeypatch.setattr(loader_module, "_side_stream", lambda _: side)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[-1])
    monkeypatch.setattr(torch.Tensor, "record_stream", kept)
    monkeypatch.setattr(loader_module, "_to", lambda batch, _: told.append("copied") or batch)
    for k, _ in enumerate(loader_module._copied_ahead(drawn(), torch.device("cuda", 0))):
        told.append(f"{k} used on {current[-1].name}")
    ways = ["copied", "side notes", "main waits for side", *["kept for main"] * 4]
    assert told == [
        word for k in range(6) for word in (f"{k} drawn on side", *ways, f"{k} used on main")
    ]


@pytest.mark.parametrize("view", [TRAINING, BLOCKS], ids=["shuffled", "blocks"])
def test_the_next_epochs_order_is_built_beside_the_end_of_this_one(view, monkeypatch):
    built, made = [], Loader._sampler

    def noted(self, number):
        built.append((number, threading.current_thread() is threading.main_thread()))
        return made(self, number)

    monkeypatch.setattr(Loader, "_sampler", noted)
    loader = open_loader("synthetic:31", view, batch=BATCH)
    next(loader.epoch(0))
    assert built == [(0, True)]  # its last batches are not asked for yet
    for number, start in ((0, 0), (1, 0), (5, 4)):
        mine = list(loader.epoch(number, start))
        assert same(mine, epoch("synthetic:31", view, number, start))
    own = [(0, True), (1, False), (2, False), (5, True), (6, False)]  # 2 is not asked for
    alone = [(0, True), (1, False), (1, True), (2, False), (5, True), (6, False)]
    assert sorted(built) == sorted([(0, True), *own, *alone])
    for thread in threading.enumerate():
        if thread.name.startswith("order"):
            thread.join(1)
            assert not thread.is_alive()


def test_data_in_order_has_no_order_to_build(monkeypatch):
    monkeypatch.setattr(loader_module, "_beside", None)
    assert len(epoch("synthetic:31", EVALUATION)) == 7


def test_the_plain_device_is_the_current_one(monkeypatch):
    """`cuda` is not `cuda:0` to torch: a pack would be placed twice."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    for device, found in (("cuda", "cuda:3"), ("cuda:1", "cuda:1"), ("cpu", "cpu")):
        loader = open_loader("synthetic:20", TRAINING, batch=2, device=device)
        assert loader.device == torch.device(found)


def test_the_fingerprint_knows_the_rows(data, tmp_path):
    found = [open_loader(data, TRAINING, batch=BATCH).fingerprint]
    for rows in ([0, 1, 2, 3, 4], [0, 1, 2, 3, 5]):
        view = View(crops=TRAINING.crops, rows=subset(tmp_path, rows))
        found.append(open_loader(data, view, batch=BATCH).fingerprint)
    assert len(set(found)) == 3


def test_a_subset_in_data_order_is_its_rows(data, tmp_path):
    rows = [8, 3, 13, 1, 5]
    view = View(crops=EVALUATION.crops, shuffled=False, rows=subset(tmp_path, rows))
    drawn = [batch.index for batch in epoch(data, view, batch=2)]
    assert torch.cat(drawn).tolist() == rows


def test_where_ffcv_is_missing_its_loader_is_refused(prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, "fastrot.data.beton.ffcv", None)
    with pytest.raises(UsageError, match=r"cannot import FFCV .* make ffcv"):
        open_data(prepared["beton"].path, "ffcv")


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("shards/0.tar", "by fastrot convert --source tar"),
        ("x.zip", "fastrot convert --source zip"),
        ("shards", "fastrot shards --source webdataset"),
    ],
)
def test_an_archive_is_told_what_reads_it(tmp_path, name, way):
    (tmp_path / "shards").mkdir()
    for file in ("shards/0.tar", "x.zip"):
        (tmp_path / file).write_bytes(bytes(1024))
    with pytest.raises(UsageError, match=way):
        open_data(tmp_path / name)


def test_a_loader_for_packs_refuses_what_is_none(pictures):
    with pytest.raises(UsageError, match=r"is not for --loader pack: name"):
        open_data(pictures, "pack")
