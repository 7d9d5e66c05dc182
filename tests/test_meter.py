"""Running means: one vector a step, over log lines and starts."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fastrot import dist
from fastrot.core import Losses
from fastrot.training.journal import Meter


def of_step(a: float, b: float, share: float) -> Losses:
    terms = {"loss_a": torch.tensor(a, requires_grad=True), "loss_b": torch.tensor(b)}
    return Losses(terms, {"accuracy": torch.tensor(share)}).detached()


def test_a_steps_numbers_are_views_of_one_vector():
    losses = of_step(1.0, 2.0, 0.25)
    assert losses.vector is not None
    assert losses.vector.tolist() == [3.0, 1.0, 2.0, 0.25]
    assert losses.names == ("loss", "loss_a", "loss_b", "accuracy")
    assert (float(losses.total), float(losses.terms["loss_b"])) == (3.0, 2.0)
    assert float(losses.metrics["accuracy"]) == 0.25
    each = [losses.total, *losses.terms.values(), *losses.metrics.values()]
    whole = losses.vector.untyped_storage().data_ptr()
    assert {value.untyped_storage().data_ptr() for value in each} == {whole}
    assert not losses.total.requires_grad


def test_wide_numbers_stay_wide():
    terms = {"loss_a": torch.tensor(1 / 3, dtype=torch.float64)}
    losses = Losses(terms, {"accuracy": torch.tensor(0.5)}).detached()
    assert losses.total.item() == 1 / 3


def test_means_are_over_the_steps_since_the_last_line():
    meter = Meter()
    meter.add(of_step(1.0, 2.0, 0.25))
    meter.add(of_step(3.0, 2.0, 0.75))
    means = {"loss": 4.0, "loss_a": 2.0, "loss_b": 2.0, "accuracy": 0.5}
    assert meter.take(keep=True)() == means
    assert meter.take()() == means
    assert meter.take()() == {}
    meter.add(of_step(5.0, 0.0, 1.0))
    assert meter.take()()["loss"] == 5.0


def test_numbers_may_be_overwritten_behind_the_meter():
    """A captured graph writes each step's numbers into the same memory."""
    meter, losses = Meter(), of_step(1.0, 2.0, 0.25)
    assert losses.vector is not None
    for value in (1.0, 2.0, 6.0):
        losses.vector.fill_(value)
        meter.add(losses)
    assert meter.take()()["loss"] == 3.0


class Counted(TorchDispatchMode):
    """The operators that run inside, by name."""

    def __init__(self):
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_adding_a_step_is_one_launch():
    meter = Meter()
    meter.add(of_step(1.0, 2.0, 0.25))
    losses = of_step(1.0, 2.0, 0.25)
    with Counted() as seen:
        meter.add(losses)
    assert seen.names == ["aten.add_.Tensor"]


def test_names_stay_those_of_the_first_step():
    meter = Meter()
    meter.add(of_step(1.0, 2.0, 0.25))
    with pytest.raises(AssertionError, match="names"):
        meter.add(Losses({"other": torch.tensor(1.0)}, {}).detached())


def test_states_of_older_versions_load():
    """As they were saved when each number was added by itself."""
    meter = Meter()
    rows = torch.tensor([[8.0, 0.5]])
    meter.load_state_dict(
        {"names": ["loss", "accuracy"], "sums": rows, "count": 2}, torch.device("cpu")
    )
    meter.add(Losses({}, {"accuracy": torch.tensor(1.0)}, torch.tensor([1.0, 1.0])))
    assert rows.tolist() == [[8.0, 0.5]]  # the loaded state is not added to
    assert meter.take()() == {"loss": 3.0, "accuracy": 0.5}
    meter.load_state_dict({"names": [], "sums": torch.zeros(1, 0), "count": 0}, torch.device("cpu"))
    assert meter.take()() == {}
    assert meter.state_dict()["sums"].shape == (1, 0)


def test_a_state_is_a_row_a_rank_and_no_copy_of_the_sums(monkeypatch):
    meter = Meter()
    meter.add(of_step(1.0, 2.0, 0.25))
    state = meter.state_dict()
    assert state["names"] == ["loss", "loss_a", "loss_b", "accuracy"]
    meter.add(of_step(1.0, 2.0, 0.25))
    assert state["sums"].tolist() == [[3.0, 1.0, 2.0, 0.25]]
    two = {**state, "sums": torch.tensor([[2.0, 0, 0, 0], [4.0, 0, 0, 0]])}
    other = Meter()
    other.load_state_dict(two, torch.device("cpu"))
    assert other.take()()["loss"] == 3.0  # two ranks' mean on one
    monkeypatch.setattr(dist, "world", lambda: 2)
    monkeypatch.setattr(dist, "rank", lambda: 1)
    monkeypatch.setattr(dist, "sum_over_ranks", lambda mine: mine)
    other.load_state_dict(two, torch.device("cpu"))
    assert other.take()()["loss"] == 2.0  # its own 4.0 over one step of two ranks
