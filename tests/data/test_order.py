import numpy as np
import pytest

from fastrot.data import sampler

KEY = (0x6F72646572, 0, 0)
TWELVE = np.arange(12)


# ---- golden: a checkpoint resumed under another numpy or torch keeps its epoch ----


def test_hash_is_as_ever():
    assert sampler.hash64(1, 2, np.arange(3)).tolist() == [
        0xE68E6FC01DF08360,
        0x0D022233FA9DEDCB,
        0x8BC440364068FD88,
    ]
    assert sampler.hash64(-1).tolist() == [0xE4D971771B652C20]


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
    shuffled = sampler.ShuffledSampler(rows, seed=seed, epoch=epoch)
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
    assert sampler.feistel(np.arange(len(golden)), images, *key).tolist() == golden


@pytest.mark.parametrize(
    ("rows", "seed", "epoch", "shape", "golden"),
    [
        (12, 0, 0, (2, 3), [11, 5, 4, 0, 6, 3, 2, 9, 8, 1, 10, 7]),
        (12, 0, 1, (2, 3), [11, 0, 7, 10, 1, 6, 9, 3, 5, 8, 2, 4]),
        (
            23,  # three windows, two smaller blocks of two, a tail of one
            7,
            3,
            (3, 2),
            [19, 13, 20, 14, 18, 12, 1, 4, 2, 6, 3, 5, 15, 8, 17, 9, 16, 7, 22, 11, 21, 10, 0],
        ),
        (np.array([3, 5, 8, 1_000_000]), 7, 3, (2, 2), [5, 1_000_000, 3, 8]),
        (1_281_167, 0, 0, (128, 128), [102035, 481775, 299669, 1001651, 764402, 355921]),
        (10**10, 0, 0, (128, 128), [7783498975, 6538056453, 8674951398, 2739698613]),
    ],
    ids=["first-epoch", "second-epoch", "uneven", "some-rows", "imagenet", "ten-billion-rows"],
)
def test_order_by_blocks_is_as_ever(rows, seed, epoch, shape, golden):
    shuffled = by_blocks(rows, *shape, seed=seed, epoch=epoch)
    assert shuffled[np.arange(len(golden))].tolist() == golden


def by_blocks(rows, block, window, *, seed=1, epoch=2) -> sampler.BlockSampler:
    return sampler.BlockSampler(rows, seed=seed, epoch=epoch, block=block, window=window)


# ---- what holds for every size ----


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097, 65_537])
def test_feistel_permutes(images):
    rows = sampler.feistel(np.arange(images), images, 3, 1, 4)
    assert np.array_equal(np.sort(rows), np.arange(images))


def test_feistel_scatters_neighbours():
    rows = sampler.feistel(np.arange(10_000), 2**27, *KEY)
    assert abs(np.corrcoef(rows[:-1], rows[1:])[0, 1]) < 0.03
    assert abs(rows.mean() / 2**27 - 0.5) < 0.01


def test_both_orders_visit_each_row_of_a_subset_once(monkeypatch):
    rows = np.arange(5, 300, 3)
    by_hash = sampler.ShuffledSampler(rows, seed=1, epoch=2)
    monkeypatch.setattr(sampler, "SORTED_UP_TO", 10)
    walked = sampler.ShuffledSampler(rows, seed=1, epoch=2)
    everywhere = np.arange(len(rows))
    assert not np.array_equal(by_hash[everywhere], walked[everywhere])
    for shuffled in (by_hash, walked):
        assert np.array_equal(np.sort(shuffled[everywhere]), rows)


def test_places_of_an_order_are_addressable_one_by_one(monkeypatch):
    monkeypatch.setattr(sampler, "SORTED_UP_TO", 10)
    shuffled = sampler.ShuffledSampler(1000, seed=1, epoch=2)
    some = np.array([999, 0, 17, 17])
    assert np.array_equal(shuffled[some], shuffled[np.arange(1000)][some])


@pytest.mark.parametrize("images", [1, 7, 24, 25, 100])
@pytest.mark.parametrize(("batch", "world"), [(4, 1), (4, 2), (3, 3), (1, 2)])
@pytest.mark.parametrize("ragged", [False, True], ids=["training", "evaluation"])
def test_ranks_share_an_epoch(images, batch, world, ragged):
    shares = []
    for rank in range(world):
        count = sampler.batches(images, batch=batch, rank=rank, world=world, ragged=ragged)
        at = dict(batch=batch, rank=rank, world=world, ragged=ragged)
        drawn = [sampler.places(images, number=k, **at) for k in range(count)]
        assert all(len(places) == batch for places in drawn[: None if not ragged else -1])
        assert all(len(places) for places in drawn)
        shares += drawn
    seen = np.sort(np.concatenate([*shares, np.zeros(0, np.int64)]))
    whole = images if ragged else images - images % (batch * world)
    assert np.array_equal(seen, np.arange(whole))  # no overlap, no padding, nothing left out


def test_in_order_is_data_order():
    assert sampler.Sampler(12)[TWELVE].tolist() == TWELVE.tolist()
    assert sampler.Sampler(np.array([4, 9]))[np.array([1, 0])].tolist() == [9, 4]


# ---- by blocks ----


@pytest.mark.parametrize("images", [1, 2, 5, 12, 37, 100, 127, 128, 129, 1000, 4097])
@pytest.mark.parametrize("shape", [(1, 1), (3, 4), (16, 8), (128, 128), (7, 5), (1, 9)])
def test_blocks_visit_each_row_of_a_subset_once(images, shape):
    rows = np.arange(images) * 3 + 1
    drawn = by_blocks(rows, *shape)[np.arange(images)]
    assert np.array_equal(np.sort(drawn), rows)
    assert np.array_equal(drawn, by_blocks(images, *shape)[np.arange(images)] * 3 + 1)


def test_a_window_larger_than_the_data_takes_no_more_memory_than_they_do():
    shuffled = by_blocks(37, 8, 10**15)
    assert np.array_equal(np.sort(shuffled[np.arange(37)]), np.arange(37))
    ahead = shuffled.ahead(0, 37, since=0, rank=0, world=1)
    assert np.array_equal(np.sort(ahead), np.arange(37))


def test_places_of_an_order_by_blocks_are_addressable_one_by_one():
    shuffled = by_blocks(1000, 16, 8)
    some = np.array([999, 0, 17, 17, 896, 895, 500])
    assert np.array_equal(shuffled[some], shuffled[np.arange(1000)][some])


def test_a_window_is_blocks_of_neighbours_dealt_out_in_turn():
    images, block, window = 1003, 16, 8
    drawn = by_blocks(images, block, window)[np.arange(images)]
    for begin in range(0, images - images % (block * window), block * window):
        lanes = drawn[begin : begin + block * window].reshape(block, window).T
        for rows in lanes:  # each a block: neighbours, but for the end of the data, and mixed
            apart = np.sort((rows - rows[0] + images // 2) % images)
            assert np.array_equal(apart, np.arange(block) + apart[0])
            assert not np.array_equal(rows, np.sort(rows))
    last = drawn[-(images % (block * window)) :]  # smaller blocks from everywhere, not one corner
    assert np.ptp(last) > 0.8 * images


def test_every_epoch_has_other_blocks_in_a_window_and_another_mix_in_each():
    def windows(epoch):
        return by_blocks(4096, 16, 8, epoch=epoch)[np.arange(4096)].reshape(32, 16, 8)

    first, second = windows(0), windows(1)
    for a, b in zip(first, second, strict=True):
        assert len(np.intersect1d(a, b)) < 64  # of 128; 4 are expected
    # neighbours of the first epoch that meet again lie apart in another way
    position = np.argsort(second.ravel())
    pairs = np.abs(np.diff(position[first[:, :, 0]], axis=1))
    assert len(np.unique(pairs)) > 50
    assert not np.array_equal(first, by_blocks(4096, 16, 8, epoch=0, seed=5)[first.ravel()])


def test_no_picture_keeps_to_the_end_which_training_drops():
    left = [by_blocks(1003, 16, 8, epoch=e)[np.arange(960, 1003)] for e in range(60)]
    count = np.bincount(np.concatenate(left), minlength=1003)
    assert count.max() < 12  # of 60 epochs; 2.6 are expected
    assert (count > 0).mean() > 0.85


@pytest.mark.parametrize("images", [20_000, 16 * 128, 1000])
@pytest.mark.parametrize("world", [2, 8])
def test_ranks_read_their_own_blocks(images, world):
    shuffled, batch = by_blocks(images, 16, 128), 128 // world
    everywhere = np.arange(images - images % 128)
    of_block = np.full(images, -1)
    for rank in range(world):
        count = sampler.batches(images, batch=batch, rank=rank, world=world, ragged=False)
        at = dict(batch=batch, rank=rank, world=world, ragged=False)
        places = np.concatenate([sampler.places(images, number=k, **at) for k in range(count)])
        assert (of_block[shuffled[places]] == -1).all()
        of_block[shuffled[places]] = rank
    whole = everywhere[: shuffled._whole]
    edges = np.sum(np.diff(of_block) != 0)  # where one rank's neighbours end and another's begin
    assert edges <= len(everywhere) / 16 + 2 * 128
    assert (of_block[shuffled[whole]] == whole % world).all()


@pytest.mark.parametrize("images", [128, 129, 1000, 2500])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_blocks_are_announced_once_by_their_rank_and_before_their_time(images, world):
    shuffled, batch = by_blocks(images, 16, 8), 12
    steps = images // (batch * world)
    told = {rank: [np.zeros(0, np.int64)] for rank in range(world)}
    late = 0
    for k in range(steps):
        first, stop = k * batch * world, (k + 1) * batch * world
        for rank in range(world):
            told[rank].append(shuffled.ahead(first, stop, since=0, rank=rank, world=world))
            mine = shuffled[np.arange(first + rank, stop, world)]
            late += len(np.setdiff1d(mine, np.concatenate(told[rank])))
    for rank in range(world):
        rows = np.concatenate(told[rank])
        assert len(np.unique(rows)) == len(rows)
        mine = shuffled[np.arange(rank, steps * batch * world, world)]
        assert np.isin(mine, rows).all()
    if world == 2:  # divides the window
        both = np.intersect1d(np.concatenate(told[0]), np.concatenate(told[1]))
        assert len(both) <= images % 8  # the tail, which is no block
    assert late < 16 * 8 / 2  # a part of the first window, which is not waited for


@pytest.mark.parametrize("images", [128, 1_003, 2_500])
def test_an_epoch_to_its_end_announces_every_row(images):
    """What divides into no stripe comes last, and is read ahead too."""
    shuffled = by_blocks(images, 16, 8)
    told = [
        shuffled.ahead(k, min(k + 12, images), since=0, rank=0, world=1)
        for k in range(0, images, 12)
    ]
    assert sorted(np.concatenate(told).tolist()) == list(range(images))


def test_what_is_read_ahead_is_at_most_two_windows():
    shuffled, asked, open_rows = by_blocks(4_000, 16, 8), set(), []
    for first in range(0, 3_900, 64):
        asked |= set(shuffled.ahead(first, first + 64, since=0, rank=0, world=1).tolist())
        asked -= set(shuffled[np.arange(first, first + 64)].tolist())
        open_rows.append(len(asked))
    assert max(open_rows) <= 2 * 16 * 8


def test_going_on_in_mid_epoch_announces_what_is_left():
    shuffled = by_blocks(20_000, 16, 8)
    rows = [
        shuffled.ahead(k, k + 50, since=10_000, rank=0, world=1) for k in range(10_000, 20_000, 50)
    ]
    left = shuffled[np.arange(10_000, 20_000)]
    assert np.isin(left, np.concatenate(rows)).mean() > 0.99
    assert len(np.concatenate(rows)) < 10_000 + 16 * 8


def test_each_place_may_have_a_permutation_of_its_own():
    places, keys = np.arange(40) % 10, np.arange(40) // 10
    together = sampler.feistel(places, 10, 7, keys)
    alone = [sampler.feistel(np.arange(10), 10, 7, key) for key in range(4)]
    assert np.array_equal(together, np.concatenate(alone))
    assert len({tuple(each) for each in alone}) == 4
