"""What ranks send each other in a step, to the byte; and the model that is made of it."""

import json

import pytest

from benchmarks import measure, scaling

DIM = 128


@pytest.fixture(autouse=True)
def commit(monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setenv("DIRTY", "1")


@pytest.mark.ddp
@pytest.mark.soak
@pytest.mark.parametrize("ranks", [4])
def test_a_step_sends_gradients_and_features_and_nothing_else(ranks):
    found = scaling.count(ranks, "small", extra=True)
    assert found.pop(scaling.EXTRA)["bytes"]["other"] == 4  # it would be seen
    assert {name.partition(",")[0] for name in found} == {"rotnet-alexnet", "decoupling-alexnet"}
    for name, each in found.items():
        number = 2 if "bf16 gradients" in name else 4  # bytes
        whole = (
            name.startswith("decoupling") and "sharded" not in name
        )  # ranks share their features
        assert each["bytes"] == {
            "gradients": number * each["parameters"],
            "features": each["batch"] * (4 * DIM + 8) if whole else 0,
            "other": 0,
        }, name
        assert set(each["calls"]) == ({"allreduce", "allgather"} if whole else {"allreduce"})
        first, second = (step.get("other", 0) for step in each["first_steps"])
        assert first == (4 if name.startswith("decoupling") else 0)  # Z
        assert second < 1000  # how DDP puts gradients together, once


def test_a_link_without_end_leaves_the_step_and_a_slow_one_binds(monkeypatch):
    monkeypatch.setitem(scaling.LINKS, 8, (1e30, "", ""))
    free = scaling.modelled(0.1, 192, gradients=2e8, features=1e5, gpus=8)
    for bound in ("no_overlap", "full_overlap"):
        assert free[bound]["images_per_s"] == pytest.approx(8 * 1920)
        assert free[bound]["seconds_per_epoch"] == pytest.approx(1_281_167 / (8 * 1920))
    monkeypatch.setitem(scaling.LINKS, 8, (1e9, "", ""))
    slow = scaling.modelled(0.1, 192, gradients=2e8, features=1e6, gpus=8)
    assert slow["reduce_ms"] == pytest.approx(2 * 7 / 8 * 200)
    assert slow["gather_ms"] == pytest.approx(7)
    assert slow["no_overlap"]["images_per_s"] == pytest.approx(8 * 192 / (0.1 + 0.35 + 0.007))
    assert slow["full_overlap"]["images_per_s"] == pytest.approx(8 * 192 / (0.35 + 0.007))


def a_step(p50: float, when: str, **more) -> dict:
    row = measure.row("step", variant="decoupling-alexnet eager, held", p50=p50)
    return row | {"shape": {"batch": 64, "size": 64, "width": 0.25}, "when": when} | more


def test_the_step_is_a_gpus_where_there_is_one():
    cpu, old = a_step(100.0, "2031-03"), a_step(5.0, "2031-01", gpu="G")
    new, fast = (
        a_step(9.0, "2031-02", gpu="G", commit="n"),
        a_step(8.0, "2031-02", gpu="G", commit="n"),
    )
    graph = a_step(1.0, "2031-02", gpu="G", commit="n", form="compiled + graph")
    other = a_step(1.0, "2031-04", gpu="G", variant="rotnet-alexnet eager, held")
    assert scaling.step_row([cpu]) is cpu
    assert scaling.step_row([cpu, old, new, fast, graph, other]) is fast
    assert scaling.step_row([other]) is None


def test_rows_say_that_they_are_modelled_and_from_what():
    step = a_step(100.0, "2031-03")
    same = {"batch": 2, "size": 64, "width": 0.25, "parameters": 10}
    counts = {
        "kind": "decoupling-alexnet, sharded bank",
        "shape": same,
        "counted": {"gradients": 40, "features": 8, "other": 0},
    }
    wider = counts | {"shape": same | {"width": 1.0}}
    rows = list(scaling.scaling_rows(step, [counts, wider]))
    assert [row["variant"] for row in rows] == ["8 GPUs, sharded bank", "64 GPUs, sharded bank"]
    for row in rows:
        assert row["modelled"] is True
        assert "for want of a GPU" in row["step_on"]
        assert "assumption" in row["link"]
        assert row["step_ms"] == 100.0
        assert row["bytes"] == 40 + 8 / 2 * 64
        assert row["p50"] <= row["full_overlap"]["images_per_s"]
    json.dumps(rows)


def test_the_command_writes_what_was_counted_and_what_follows(tmp_path, monkeypatch):
    known = {"batch": 2, "size": 64, "width": 0.25, "dim": DIM, "parameters": 10}
    found = {"bytes": {"gradients": 40, "features": 1040, "other": 0}, "calls": {"allreduce": 1}}
    found |= {"first_steps": [{}, {}], **known}
    monkeypatch.setattr(scaling, "count", lambda ranks, net: {"decoupling-alexnet": found})
    monkeypatch.setattr(scaling.measure, "ROOT", tmp_path)  # no other results
    out = tmp_path / "rows.jsonl"
    measure.append(out, a_step(100.0, "2031-03"))
    assert scaling.main(["--out", str(out), "--quick"]) == 0
    _, counts, eight, more = (json.loads(line) for line in out.read_text().splitlines())
    assert (counts["what"], counts["variant"]) == (
        "communication",
        "2 ranks, decoupling-alexnet, width 0.25, 64 pixels",
    )
    assert counts["counted"] == found["bytes"]
    assert (eight["what"], eight["variant"], more["variant"]) == ("scaling", "8 GPUs", "64 GPUs")


def test_the_net_that_is_counted_is_the_steps():
    assert scaling.net_of(a_step(1.0, "2031")) == "small"
    for net, shape in {
        "quarter": {"batch": 32, "size": 224, "width": 0.25},
        "full": {"batch": 192, "size": 224, "width": 1.0},
    }.items():
        assert scaling.net_of(a_step(1.0, "2031", shape=shape)) == net
