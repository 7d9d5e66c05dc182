"""The baseline takes the original's steps, and its rows say what they are."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from truth import golden

from benchmarks import baseline, measure
from fastrot import config
from fastrot.backbones import alexnet
from fastrot.presets import PRESETS
from fastrot.training.foreign import from_original

PRESET = PRESETS["decoupling-alexnet"]()


def weights(file: dict[str, np.ndarray], prefix: str, net: nn.Module) -> dict:
    """Weights of the original's three nets, by the nets of the baseline."""
    start = f"{prefix}__feature__"
    theirs = {k.removeprefix(start): torch.from_numpy(v) for k, v in file.items() if start in k}
    found = {"feature": from_original(theirs)}
    for ours, other in (("classifier", "classifier__fc_classifier"), ("norm", "norm__norm")):
        found[ours] = {
            leaf: torch.from_numpy(file[f"{prefix}__{other}.0.{leaf}"])
            for leaf in ("weight", "bias")
        }
    return found


def pictures(uint8: np.ndarray) -> torch.Tensor:
    """What ToTensor and Normalize make of them, and then in float64."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (PRESET.mean, PRESET.std))
    return ((torch.from_numpy(uint8).permute(0, 3, 1, 2) / 255 - mean) / std).double()


def test_six_steps_are_the_originals():
    file = golden("train_step_small")
    meta = json.loads(str(file["meta_json"]))
    trunk = alexnet.alexnet(config.AlexNet(), 224, (4, 6, 8, 5, 5), 48)
    made = baseline.Original(
        trunk,
        48,
        bank=meta["N"],
        listed=baseline.pu_weights(file["prob"], meta["gamma"]),
        device=torch.device("cpu"),
        dim=meta["D"],
        negatives=meta["K"],
    )
    for net, loaded in zip(made.nets, weights(file, "init", trunk).values(), strict=True):
        net.load_state_dict(loaded)
        net.double()
    made.bank, made.constants = torch.from_numpy(file["bank"]).double(), made.constants.double()
    rotation = torch.arange(4).expand(4, 4)
    exact = dict(rtol=1e-11, atol=1e-12)
    for step, epoch in enumerate(file["epochs"].tolist()):
        for optimiser in made.optimisers:
            optimiser.param_groups[0]["lr"] = file["lr"][step]
        made.alias.draw = lambda _, step=step: torch.from_numpy(file[f"idx_step{step}"]).long()
        index = torch.from_numpy(file["index"][step])[:, None].expand(4, 4)
        record = made.step(pictures(file["image_u8"][step]), rotation, index, epoch)
        seen = [record[name] for name in meta["record_names"]]
        np.testing.assert_allclose(seen, file["f64_records"][step], **exact)
        np.testing.assert_allclose(made.bank, file[f"f64_step{step}_bank_after"], **exact)
        if step in (0, 5):
            after = weights(file, f"f64_step{step}_after", trunk)
            for net, expected in zip(made.nets, after.values(), strict=True):
                for name, value in net.state_dict().items():
                    np.testing.assert_allclose(value, expected[name], **exact, err_msg=name)
    np.testing.assert_allclose(made.constants[2].item(), file["f64_Z"], rtol=1e-12)
    judged = made.judge(pictures(file["image_u8"][0]), rotation)
    np.testing.assert_allclose(
        [judged[name] for name in meta["eval_names"]], file["f64_eval"], rtol=1e-6
    )
    assert all(net.training for net in made.nets)


def test_draws_are_even_over_all_rows():
    torch.manual_seed(0)
    drawn = baseline.Alias(7, torch.device("cpu")).draw(70_000)
    share = torch.bincount(drawn, minlength=7) / 70_000
    assert share.sub(1 / 7).abs().max() < 0.01


def test_an_epoch_is_all_pictures_and_a_validation():
    each = baseline.epoch(1000.0, 500.0)
    assert each["epoch_s"] == pytest.approx(1281.167 + 100)
    assert each["extrapolated"]


def test_both_ways_are_measured_on_the_same_shape(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("COMMIT", "f" * 40)
    monkeypatch.setattr(baseline, "WORKERS", (0, 1))
    out = tmp_path / "rows.jsonl"
    knobs = ["--root", pictures, "--work", tmp_path, "--out", out, "--device", "cpu", "--quick"]
    assert baseline.main([str(knob) for knob in knobs]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    named = {row["variant"]: row for row in rows}
    whole = [
        "original's way, num_workers 0",
        "original's way, num_workers 1",
        "ours, eager, .beton",
    ]
    alone = ["original's way, step alone", "ours, eager, step alone"]
    assert {*whole, *alone} == {n for n, row in named.items() if row["what"] == "baseline"}
    assert len({json.dumps(row["shape"]) for row in rows}) == 1
    for name in whole:
        assert named[name]["extrapolated"]
        assert named[name]["epoch_s"] == pytest.approx(sum(named[name]["split"].values()))
        assert measure.met(named[name] | {"target": 0, "better": "higher"})
    assert not any("epoch_s" in named[name] for name in alone)
    ratios = [row for row in rows if row["what"] == "baseline ratio"]
    assert len(ratios) == 3
    first = named["ours, eager, .beton"]["p50"] / named[whole[0]]["p50"]
    assert named[f"ours, eager, .beton / {whole[0]}"]["p50"] == pytest.approx(first)


def test_without_torchvision_it_says_so(monkeypatch):
    monkeypatch.setattr(baseline.contestants, "installed", lambda name: False)
    with pytest.raises(config.UsageError, match="torchvision"):
        baseline.main(["--quick"])
