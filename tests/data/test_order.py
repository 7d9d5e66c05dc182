import numpy as np
import pytest

from fastrot.data import order

KEY = (0x6F72646572, 0, 0)
TWELVE = np.arange(12)


# ---- golden: a checkpoint resumed under another numpy or torch keeps its epoch ----


def test_hash_is_as_ever():
    assert order.hash64(1, 2, np.arange(3)).tolist() == [
        0xE68E6FC01DF08360,
        0x0D022233FA9DEDCB,
        0x8BC440364068FD88,
    ]
    assert order.hash64(-1).tolist() == [0xE4D971771B652C20]


@pytest.mark.parametrize(
    ("rows", "seed", "epoch", "golden"),
    [
        (12, 0, 0, [1, 11, 3, 4, 5, 9, 10, 8, 6, 7, 2, 0]),
        (12, 0, 1, [2, 7, 10, 5, 3, 4, 1, 0, 9, 11, 6, 8]),
        (12, 7, 3, [1, 8, 7, 6, 11, 3, 9, 0, 2, 5, 10, 4]),
        (np.array([3, 5, 8, 1_000_000]), 7, 3, [8, 3, 1_000_000, 5]),
        (1_281_167, 0, 0, [1004650, 1049150, 1188715, 1137653, 1151917, 721037]),
    ],
    ids=["first-epoch", "second-epoch", "another-seed", "some-rows", "imagenet"],
)
def test_sorted_order_is_as_ever(rows, seed, epoch, golden):
    shuffled = order.Shuffled(rows, seed=seed, epoch=epoch)
    assert shuffled[np.arange(len(golden))].tolist() == golden


@pytest.mark.parametrize(
    ("images", "key", "golden"),
    [
        (12, KEY, [9, 0, 7, 2, 10, 11, 6, 3, 5, 4, 1, 8]),
        (12, (0x6F72646572, 7, 3), [4, 10, 0, 11, 8, 9, 5, 1, 7, 6, 3, 2]),
        (10**9, KEY, [995728126, 830372124, 712459833, 457594843, 950227402, 928187593]),
    ],
    ids=["first-epoch", "another-epoch", "a-billion-rows"],
)
def test_feistel_order_is_as_ever(images, key, golden):
    assert order.feistel(np.arange(len(golden)), images, *key).tolist() == golden


# ---- what holds for every size ----


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097, 65_537])
def test_feistel_permutes(images):
    rows = order.feistel(np.arange(images), images, 3, 1, 4)
    assert np.array_equal(np.sort(rows), np.arange(images))


def test_feistel_scatters_neighbours():
    rows = order.feistel(np.arange(10_000), 2**27, *KEY)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert abs(rows.mean() / 2**27 - 0.5) < 0.01


def test_both_orders_visit_each_row_of_a_subset_once(monkeypatch):
    rows = np.arange(5, 300, 3)
    by_hash = order.Shuffled(rows, seed=1, epoch=2)
    monkeypatch.setattr(order, "SORTED_UP_TO", 10)
    walked = order.Shuffled(rows, seed=1, epoch=2)
    everywhere = np.arange(len(rows))
    assert not np.array_equal(by_hash[everywhere], walked[everywhere])
    for shuffled in (by_hash, walked):
        assert np.array_equal(np.sort(shuffled[everywhere]), rows)


def test_places_of_an_order_are_addressable_one_by_one(monkeypatch):
    monkeypatch.setattr(order, "SORTED_UP_TO", 10)
    shuffled = order.Shuffled(1000, seed=1, epoch=2)
    some = np.array([999, 0, 17, 17])
    assert np.array_equal(shuffled[some], shuffled[np.arange(1000)][some])


@pytest.mark.parametrize("images", [1, 7, 24, 25, 100])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (4, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize("ragged", [False, True], ids=["training", "evaluation"])
def test_ranks_share_an_epoch(images, batch, world, ragged):
    shares = []
    for rank in range(world):
        count = order.batches(images, batch=batch, rank=rank, world=world, ragged=ragged)
        at = dict(batch=batch, rank=rank, world=world, ragged=ragged)
        drawn = [order.places(images, number=k, **at) for k in range(count)]
        assert all(len(places) == batch for places in drawn[: None if not ragged else -1])
        assert all(len(places) for places in drawn)
        shares += drawn
    seen = np.sort(np.concatenate([*shares, np.zeros(0, np.int64)]))
    whole = images if ragged else images - images % (batch * world)
    assert np.array_equal(seen, np.arange(whole))  # no overlap, no padding, nothing left out


def test_in_order_is_data_order():
    assert order.InOrder(12)[TWELVE].tolist() == TWELVE.tolist()
    assert order.InOrder(np.array([4, 9]))[np.array([1, 0])].tolist() == [9, 4]
