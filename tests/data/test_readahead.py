import mmap

import numpy as np
import pytest
from packs import write_pack
from PIL import Image
from truth import photo

from fastrot.assemble import open_loader
from fastrot.config import RandomResized, UsageError
from fastrot.core import View
from fastrot.data import readahead, sampler
from fastrot.data.beton.read import Beton
from fastrot.data.beton.write import BetonOptions
from fastrot.data.pack.read import Pack
from fastrot.data.prepare.convert import convert
from fastrot.data.prepare.report import Summary


def runs(files, ptr, size):
    return list(
        readahead.runs(np.array(files), np.array(ptr, np.uint64), np.array(size, np.uint64))
    )


def test_neighbours_go_together_and_pages_are_whole():
    page, far = mmap.PAGESIZE, 2**20
    assert runs([0, 0, 0], [far, 100, 40], [9, 10, 60]) == [(0, 0, 110), (0, far, 9)]
    assert runs([0, 0], [page + 7, 3 * page], [2 * page - 7, 5]) == [(0, page, 2 * page + 5)]
    assert runs([1, 0], [0, 50], [50, 50]) == [(0, 0, 100), (1, 0, 50)]


def test_a_long_run_is_advised_in_pieces_that_linux_takes_whole():
    piece = readahead.PIECE
    assert piece <= 128 * 1024  # its read-ahead where nobody has set it
    assert runs([0, 0], [0, piece], [piece, 2 * piece + 5]) == [
        *((0, k * piece, piece) for k in range(3)),
        (0, 3 * piece, 5),
    ]


@pytest.mark.parametrize(("apart", "count"), [(readahead.GAP, 1), (readahead.GAP + 1, 2)])
def test_a_small_gap_is_read_along(apart, count):
    assert len(runs([0, 0], [0, 100 + apart], [100, 100])) == count


class Heard:
    """A map that notes what it is told."""

    def __init__(self):
        self.told = []

    def madvise(self, advice, start, length):
        self.told.append((advice, start, length))


@pytest.mark.parametrize("keep_parts", [False, True], ids=["file", "parts"])
def test_a_beton_reads_blocks_ahead_in_one_piece(tmp_path, keep_parts):
    for i in range(48):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.fromarray(photo(i, 40, 50)).save(tmp_path / "in" / f"{i:02}.png")
    how = {"source": "imagefolder", "root": tmp_path / "in", "workers": 0}
    how |= {"label_from": "none", "keep_parts": keep_parts, "encoding": "raw"}
    made = convert(BetonOptions(out=tmp_path / "x.beton", **how), part=24)
    assert isinstance(made, Summary)
    data = Beton(made.out)
    heard = [Heard() for _ in data._files]
    data._files = [f._replace(map=h) for f, h in zip(data._files, heard, strict=True)]
    loader = open_loader(
        data, View(crops=(RandomResized(size=16),), blocks=(8, 2)), batch=4, workers=0, enlarge=True
    )
    drawn = [batch.index.numpy() for batch in loader.epoch(0)]
    assert len(np.unique(np.concatenate(drawn))) == 48
    record = 40 * 50 * 3
    long = [length for each in heard for _, _, length in each.told if length >= 7 * record]
    assert len(long) >= 4  # of six blocks, of which some may lie across an edge
    assert {advice for each in heard for advice, _, _ in each.told} == {mmap.MADV_WILLNEED}


@pytest.mark.parametrize("start", [0, 13])
def test_a_loader_tells_of_each_block_once(start, monkeypatch):
    view = View(crops=(RandomResized(size=16),), blocks=(8, 4))
    loader = open_loader("synthetic:200", view, batch=5, workers=0)
    told, reader = [], loader.data.open_reader(loader.device, 0)
    begin = reader.begin
    reader.begin = lambda request: told.append(request.prefetch) or begin(request)
    monkeypatch.setattr(loader.data, "open_reader", lambda *_: reader)
    drawn = np.concatenate([batch.index.numpy() for batch in loader.epoch(0, start)])
    rows = np.concatenate(told)
    assert len(np.unique(rows)) == len(rows) <= len(drawn) + 8 * 4
    assert np.isin(drawn, rows).mean() > 0.9


def test_blocks_larger_than_a_ranks_own_rows_are_refused():
    """An owned view has a rank mix its own rows alone."""
    view = View(crops=(RandomResized(size=16),), blocks=(60, 2), owned=True)
    assert open_loader("synthetic:100", view, batch=5, workers=0)
    with pytest.raises(UsageError, match=r"--order-block 60 is more than the 50 pictures"):
        open_loader("synthetic:100", view, batch=5, workers=0, world=2)


def test_a_rank_that_owns_its_rows_reads_them_ahead_at_its_own_pace():
    view = View(crops=(RandomResized(size=16),), blocks=(8, 4), owned=True)
    loader = open_loader("synthetic:800", view, batch=4, workers=0, rank=1, world=4)
    rows, told, most = loader._order(0), set(), 0
    for k in range(len(loader)):
        told |= set(loader._prefetch(rows, k, 0).tolist())
        told -= set(rows[loader._places(k)].tolist())
        most = max(most, len(told))
    assert 8 < most <= 2 * 8 * 4


def test_a_loader_tells_of_its_own_ranks_blocks_alone():
    """So that machines which share an epoch fetch each byte once between them."""
    view, told = View(crops=(RandomResized(size=16),), blocks=(8, 4)), []
    for rank in (0, 1):
        loader = open_loader("synthetic:192", view, batch=4, workers=0, rank=rank, world=2)
        rows = loader._order(0)
        assert isinstance(rows, sampler.BlockSampler)
        each = [loader._prefetch(rows, k, 0) for k in range(len(loader))]
        drawn = [rows[loader._places(k)] for k in range(len(loader))]
        assert np.isin(np.concatenate(drawn), np.concatenate(each)).all()
        told.append(np.concatenate(each))
    assert not np.intersect1d(*told).size
    assert len(np.union1d(*told)) == 192


@pytest.mark.parametrize("encoding", ["ycc", "raw"])
def test_a_pack_reads_blocks_ahead_in_one_piece(tmp_path, encoding):
    pictures = [photo(i, 40, 50) for i in range(48)]
    data = Pack(write_pack(tmp_path / "x.pack", pictures, encoding=encoding))
    data.map = Heard()
    body = (data.path / data.array).read_bytes()
    (_,), (first,), (length,) = data.places(np.array([7]))
    assert body[int(first) :][: int(length)] == data.rows_of(7).tobytes()
    view = View(crops=(RandomResized(size=16),), blocks=(8, 2))
    loader = open_loader(data, view, batch=4, workers=0, enlarge=True)
    drawn = [batch.index.numpy() for batch in loader.epoch(0)]
    assert len(np.unique(np.concatenate(drawn))) == 48
    long = [each for _, _, each in data.map.told if each >= 7 * int(length)]
    assert len(long) >= 4
    assert {advice for advice, _, _ in data.map.told} == {mmap.MADV_WILLNEED}
