"""What a bank is over ranks, without starting any: threads stand for them."""

import threading

import numpy as np
import pytest
import torch
from test_decoupling import Features, a_batch, features, info

from fastrot import config, dist
from fastrot.methods import bank
from fastrot.methods.bank import Bank
from fastrot.methods.contrast import EMA
from fastrot.methods.decoupling import Decoupling


class Ranks:
    """W threads that stand for ranks: `gather_rows` meets, and gives all rows in rank order."""

    def __init__(self, world: int, monkeypatch):
        self.world, self.mine = world, threading.local()
        self.given: list = [None] * world
        self.meet = threading.Barrier(world, timeout=20)
        monkeypatch.setattr(dist, "world", lambda: world)
        monkeypatch.setattr(dist, "rank", lambda: self.mine.rank)
        monkeypatch.setattr(dist, "gather_rows", self.gather_rows)
        monkeypatch.setattr(dist, "sum_over_ranks", lambda t: self.gather_rows(t[None]).sum(dim=0))

    def gather_rows(self, tensor):
        self.given[self.mine.rank] = tensor
        self.meet.wait()
        rows = torch.cat(self.given)
        self.meet.wait()
        return rows

    def each(self, work) -> list:
        found: list = [None] * self.world

        def run(rank: int) -> None:
            self.mine.rank = rank
            found[rank] = work(rank)

        threads = [threading.Thread(target=run, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def a_bank(images: int, *, sharded: bool = False, seed: int = 0, dtype=torch.float32) -> Bank:
    return Bank(info(images, seed=seed), 6, dtype=dtype, sharded=sharded, momentum=0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "images", [12, 23, 25]
)  # whole shares, and ragged ones, over several pieces
@pytest.mark.parametrize("world", [2, 3, 4])
def test_ranks_share_out_the_rows_of_one_bank(world, images, dtype, monkeypatch):
    """Fresh rows, the checkpoint's, and those taken from a checkpoint are the whole bank's."""
    monkeypatch.setattr(bank, "CHUNK", 4)
    whole = a_bank(images, dtype=dtype)
    ranks = Ranks(world, monkeypatch)

    def work(rank: int):
        mine = a_bank(images, sharded=True, dtype=dtype)
        fresh, saved = mine.rows.clone(), mine.state_dict()
        mine.rows.zero_()
        mine.load_state_dict(whole.state_dict() if rank else saved)
        return mine.place, fresh, saved, mine.rows

    for rank, (place, fresh, saved, loaded) in enumerate(ranks.each(work)):
        assert torch.equal(fresh, whole.rows[rank::world])
        assert torch.equal(loaded, whole.rows[rank::world])
        assert set(saved) == ({"rows", "fingerprint"} if rank == 0 else set())
        own = torch.arange(images) % world == rank
        assert (place >= 0).tolist() == own.tolist()
        assert place[own].tolist() == list(range(len(fresh)))
        if rank == 0:
            assert torch.equal(saved["rows"], whole.rows)


@pytest.mark.parametrize("sharded", [False, True], ids=["replicated", "sharded"])
def test_a_write_reaches_the_banks_that_hold_the_row(sharded, monkeypatch):
    """Replicated: all, in rank order, so that the highest rank's feature stands. Sharded: its own."""
    one = a_bank(8)
    ranks = Ranks(2, monkeypatch)
    index = [torch.tensor([2, 4]), torch.tensor([5, 4] if not sharded else [5, 7])]
    features = [torch.eye(6)[:2], torch.eye(6)[2:4]]

    def work(rank: int):
        mine = a_bank(8, sharded=sharded)
        mine.update(index[rank], features[rank])
        return mine.rows

    found = ranks.each(work)
    for rank in (0, 1):
        for row, feature in zip(index[rank].tolist(), features[rank], strict=True):
            old = 0.5 * one.rows[row] + 0.5 * feature
            unit = old / old.norm()
            if sharded:
                torch.testing.assert_close(found[rank][row // 2], unit)
            elif (rank, row) != (0, 4):
                torch.testing.assert_close(found[0][row], unit)
    if not sharded:
        assert torch.equal(found[0], found[1])


def test_a_fresh_bank_follows_the_seed_and_no_weights():
    """Its numbers are not those that the same seed gives the network."""
    assert torch.equal(a_bank(50).rows, a_bank(50).rows)
    assert not torch.equal(a_bank(50).rows, a_bank(50, seed=1).rows)
    torch.manual_seed(0)
    weights = torch.empty(300).uniform_(-1, 1)
    both = torch.stack([weights, a_bank(50).rows.flatten()])
    assert torch.corrcoef(both)[0, 1].abs() < 0.3


def built(cfg: config.Decoupling, known) -> Decoupling:
    """A method of given weights; torch's generator is shared by threads."""
    method = Decoupling(cfg, Features(12), known)
    draw = torch.Generator().manual_seed(3)
    for weight in method.net.parameters():
        weight.data.copy_(torch.randn(weight.shape, generator=draw))
    return method


def test_a_rank_with_a_share_of_the_bank_is_a_run_of_its_pictures_alone(monkeypatch):
    """Negatives, population and what Z follows are its own rows'; the first Z is the ranks' mean."""
    cfg = config.Decoupling(dim=5, negatives=40, bank="sharded", z="ema", exclude_self=True)
    images, index = 9, ([0, 4, 8], [1, 3, 7])
    seen = [features(3, seed=rank).float() for rank in (0, 1)]

    def steps(method: Decoupling, rank: int, first=None):
        batch, outputs = a_batch(index[rank], step=6), method.net.heads(seen[rank])
        method.before_first_step(outputs, batch)
        of_first = method.contrast.mean_exp.clone()
        if first is not None:
            method.contrast.mean_exp = first.clone()
        losses = method.losses(outputs, batch)
        method.after_step(outputs, batch, losses)
        return of_first, losses.terms["loss_nce"], losses.metrics["z"], method

    alone = []
    for rank in (0, 1):
        own = np.arange(rank, images, 2)
        method = built(cfg, info(len(own), rows=own, data_rows=images))
        alone.append((method, method.contrast.bank.rows.clone()))
    ranks = Ranks(2, monkeypatch)

    def work(rank: int):
        method = built(cfg, info(images))
        method.contrast.bank.rows.copy_(alone[rank][1])
        return steps(method, rank)

    shared = ranks.each(work)
    monkeypatch.undo()
    firsts = [steps(method, rank)[0] for rank, (method, _) in enumerate(alone)]
    for rank, (first, loss, z, method) in enumerate(shared):
        torch.testing.assert_close(first, (firsts[0] + firsts[1]) / 2)
        mine, rows = alone[rank]
        mine.contrast.bank.rows.copy_(rows)
        _, expected, of_batch, _ = steps(mine, rank, first)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(z, of_batch)
        assert torch.equal(method.contrast.bank.rows, mine.contrast.bank.rows)
        followed = EMA * first + (1 - EMA) * z / len(rows)
        torch.testing.assert_close(method.contrast.mean_exp, followed)


def test_each_rank_takes_its_own_z_back_and_others_their_mean(monkeypatch):
    cfg = config.Decoupling(dim=5, negatives=4, bank="sharded")
    ranks = Ranks(2, monkeypatch)

    def work(rank: int):
        method = built(cfg, info(9))
        method.contrast.mean_exp = torch.tensor(float(rank + 1))
        state = method.state_dict()
        method.contrast.mean_exp = torch.tensor(0.0)
        return state, method

    (state, first), (_, second) = ranks.each(work)
    assert state["mean_exp"].tolist() == [1, 2]
    ranks.each(lambda rank: (first, second)[rank].load_state_dict(state))
    assert (float(first.contrast.mean_exp), float(second.contrast.mean_exp)) == (1, 2)
    monkeypatch.undo()
    one = built(cfg, info(9))
    one.load_state_dict(state)
    assert float(one.contrast.mean_exp) == 1.5
    assert torch.equal(one.contrast.bank.rows, state["bank.rows"])


def test_a_sharded_bank_asks_for_a_view_that_each_rank_owns():
    from fastrot import assemble

    for knobs, owned in (
        (dict(bank="sharded"), True),
        (dict(bank="replicated"), False),
        (dict(bank="sharded", lambda_nce=0.0), False),  # there is no bank
    ):
        cfg = config.Config(method=config.Decoupling(**knobs))
        assert assemble.training_view(cfg).owned == owned
