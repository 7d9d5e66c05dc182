"""Probes: heads as the originals compute them, on trunks that provably stay as they were, in runs like any other."""

import contextlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_run import TINY, assert_same_bits
from truth import golden

from fastrot import assemble, config, dist, evaluate, train
from fastrot.backbones.alexnet import alexnet
from fastrot.backbones.heads import HEADS
from fastrot.backbones.nin import nin
from fastrot.backbones.staged import HALVES
from fastrot.config import RunError, UsageError
from fastrot.entry import Place
from fastrot.evals.trained import load, trained_method
from fastrot.methods.probe import ProbeNet
from fastrot.presets import PRESETS
from fastrot.speed.cost import step_cost
from fastrot.training import checkpoint, foreign

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("quick_runs")
KNOBS = ["--batch", "4", "--enlarge", "--schedule.steps", "9", "--log-every", "3", "--workers", "1"]
KNOBS += ["--device", "cpu", "--precision", "fp32", "--no-tensorboard", "--validate-every", "1"]
LINEAR = ["probe-linear", *KNOBS]


def probe(pictures, out: Path, *more: str, words=LINEAR) -> Path:
    assert train.main([*words, "--data", str(pictures), "--out", str(out), *more]) == 0
    return out


def state(run: Path):
    return checkpoint.load(run / "checkpoints" / "last.pt")


# ---- heads ----


@pytest.mark.parametrize("stage", ["conv1", "conv2", "conv3", "conv4", "conv5"])
@pytest.mark.parametrize("precision", ["f32", "f64"])
def test_a_linear_head_is_the_originals(stage, precision):
    file, trunk = golden("linear_probe"), alexnet(config.AlexNet(width=0.05), 224)
    maps = torch.from_numpy(file[f"{stage}__feat"])
    head = HEADS["linear"](trunk, stage, {stage: tuple(maps.shape[1:])}, 7)
    names = {"norm": "classifier.BatchNorm", "out": "classifier.LiniearClassifier"}
    theirs = {
        ours: f"{stage}__sd__{ours.replace(n, names[n])}"
        for ours in head.state_dict()
        for n in names
        if n in ours
    }
    head.load_state_dict(
        {ours: torch.from_numpy(np.array(file[name])) for ours, name in theirs.items()}
    )
    kind = {"f32": torch.float32, "f64": torch.float64}[precision]
    head, near = head.to(kind), {"f32": 1e-5, "f64": 1e-12}[precision]

    def same(mine, name):
        theirs = torch.from_numpy(file[f"{stage}__{name}_{precision}"]).to(kind)
        torch.testing.assert_close(mine, theirs, rtol=near, atol=near)

    if precision == "f32":
        same(head.pool(maps), "pooled")
    with torch.no_grad():
        same(head.eval()(maps.to(kind)), "eval")
        same(head.train()(maps.to(kind)), "train")
    for name in ("running_mean", "running_var"):  # of float32 the originals' were noted too early
        theirs = torch.from_numpy(file[f"{stage}__{name}_f64"]).to(kind)
        torch.testing.assert_close(getattr(head.norm, name), theirs, rtol=near, atol=near)


def shapes_of(trunk, size):
    stages = (*trunk.stages, *HALVES)
    seen = trunk.eval().outputs(torch.zeros(1, 3, size, size), stages)
    return {name: tuple(each.shape[1:]) for name, each in zip(stages, seen, strict=True)}


def numbers(head):
    return sum(p.numel() for p in head.parameters())


def test_heads_have_the_papers_sizes():
    """Numbers that linear probes read, and parameters of the others, as the original codes have them."""
    with torch.device("meta"):
        trunk = alexnet(config.AlexNet(), 224)
        shapes = shapes_of(trunk, 224)
        reads = [
            HEADS["linear"](trunk, stage, shapes, 1000).out.in_features
            for stage in ("conv1", "conv2", "conv3", "conv4", "conv5")
        ]
        assert reads == [9216, 9408, 9600, 9216, 9216]
        above = {s: HEADS["nonlinear"](trunk, s, shapes, 1000) for s in ("conv4", "conv5")}
        assert {s: f"{numbers(head) / 1e6:.2f}" for s, head in above.items()} == {
            "conv4": "59.23", "conv5": "58.64"
        }  # fmt: skip
        assert list(dict(above["conv5"].named_children())) == ["pool5", "fc_block", "out"]
        trunk = nin(config.Nin(), 32)
        shapes = shapes_of(trunk, 32)
        mlp = HEADS["mlp"](trunk, "conv2", shapes, 10)
        sizes = [m.weight.shape for m in mlp if isinstance(m, torch.nn.Linear)]
        assert sizes == [(200, 12288), (200, 200), (10, 200)]
        conv = HEADS["conv"](trunk, "conv2", shapes, 10)
        assert [tuple(p.shape) for p in conv.parameters() if p.ndim == 4] == [
            (192, 192, 3, 3), (192, 192, 1, 1), (192, 192, 1, 1)
        ]  # fmt: skip


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("cfg", [config.AlexNet(width=0.1), config.Nin(width=0.1)])
def test_each_head_learns_from_each_map_of_each_backbone(name, cfg):
    trunk = assemble.backbone(cfg, 64)
    shapes, pictures = shapes_of(trunk, 64), torch.rand(6, 3, 64, 64)
    maps = [stage for stage in trunk.stages if len(shapes[stage]) == 3]
    halves = (
        HALVES if name == "linear" or (name != "nonlinear" and trunk.stages[-1] in maps) else ()
    )
    for stage in (*maps, *halves):
        net = ProbeNet(trunk, {stage: HEADS[name](trunk, stage, shapes, 5)}, frozen=True).train()
        (logits,) = net(pictures)
        assert logits.shape == (6, 5)
        logits.square().sum().backward()
        assert all(p.grad is not None for p in net.heads.parameters())
        assert all(p.grad is None for p in net.trunk.parameters())


def test_heads_begin_as_the_originals():
    torch.manual_seed(0)
    trunk = alexnet(config.AlexNet(width=0.5), 64)
    out = HEADS["linear"](trunk, "conv5", shapes_of(trunk, 64), 1000).out
    assert out.weight.std().item() == pytest.approx(golden_std(), rel=0.02)
    assert not out.bias.any()


def golden_std() -> float:
    return json.loads(str(golden("linear_probe")["meta_json"]))["init_std"]


# ---- runs ----


@pytest.fixture(scope="module")
def probed(straight, pictures, tmp_path_factory) -> Path:
    """A linear probe on a frozen trunk, with knobs that the trunk's run answers otherwise."""
    out = tmp_path_factory.mktemp("probes") / "linear"
    probe(pictures, out, *others(straight), "--max-steps", "5")
    return probe(pictures, out, *others(straight))


def others(straight) -> list[str]:
    return ["--start-from", str(straight), "--image-size", "64", "--mean", "0.1", "0.2", "0.3"]


def test_the_trunk_stays_as_it_was_to_the_bit(probed, straight):
    """Weights, and batch norm's statistics; the heads learn."""
    mine, theirs = state(probed), state(straight)
    trunk = checkpoint.trunk_weights(theirs["net"])
    assert any("running_mean" in name for name in trunk)
    for name, value in trunk.items():
        assert torch.equal(mine["net"][f"trunk.{name}"], value), name
    assert mine["net"]["heads.conv5.norm.num_batches_tracked"] == 9
    own, source = (config.from_plain(each["config"]) for each in (mine, theirs))
    assert (own.backbone, own.mean, own.std) == (source.backbone, source.mean, source.std)
    asked = config.with_size(config.Within(), 64)
    assert own.method.crop == config.with_size(asked, source.method.crop.size)
    said = (probed / "log.txt").read_text()
    assert f"are those of its trunk, {straight}" in said


def test_a_probe_goes_on_to_the_same_bits(probed, straight, pictures, tmp_path):
    """`probed` was broken off after five steps."""
    assert_same_bits(state_file(probed), state_file(probe(pictures, tmp_path, *others(straight))))


def state_file(run: Path) -> Path:
    return run / "checkpoints" / "last.pt"


def test_each_stage_has_its_scores(probed, capsys):
    summary = json.loads((probed / "summary.json").read_text())
    val = summary["val"]
    stages = [f"conv{n}" for n in (1, 2, 3, 4, 5)]
    assert {f"{kind}_{stage}" for kind in ("top1", "top5", "loss") for stage in stages} <= set(val)
    assert val["accuracy"] == val["top1_conv5"]
    assert val["loss"] == pytest.approx(sum(val[f"loss_{stage}"] for stage in stages))
    assert all(val[f"top5_{stage}"] == 1 for stage in stages)  # of three classes
    assert summary["chance"] == pytest.approx(1 / 3)
    said = (probed / "log.txt").read_text()
    assert f"top-1 {val['top1_conv2']:.1%}, top-5 100.0%" in said


def test_scores_are_those_of_each_picture_alone(probed, pictures):
    method = trained_method(probed, CPU)
    cfg = load(probed).config
    loader = assemble.open_loader(
        str(pictures), assemble.evaluation_view(cfg), batch=1, workers=0, enlarge=True
    )
    right = dict.fromkeys(cfg.method.stages, 0)
    sums = dict.fromkeys(cfg.method.stages, 0.0)
    whole = {}
    for batch in loader.epoch(0):
        with torch.no_grad():
            outputs = method.net(method.views(batch).float())
        for stage, logits in zip(cfg.method.stages, outputs, strict=True):
            right[stage] += int(logits.argmax() == batch.label)
            sums[stage] -= float(logits.log_softmax(dim=1)[0, batch.label])
        for name, (total, count) in method.score(outputs, batch).items():
            was = whole.get(name, (0.0, 0.0))
            whole[name] = (was[0] + float(total), was[1] + float(count))
    for stage in right:
        assert whole[f"top1_{stage}"] == (right[stage], 37)
        assert whole[f"loss_{stage}"][0] == pytest.approx(sums[stage], rel=1e-4)


def test_classes_are_counted_each_alone(probed, pictures, tmp_path, capsys):
    """Of the held-out pictures: each share is that of a class's pictures that a head says right, one at a time."""
    file = tmp_path / "classes.json"
    assert evaluate.main([str(probed), "classes", "--device", "cpu", "--json", str(file)]) == 0
    data, method = assemble.open_data(pictures), trained_method(probed, CPU)
    rows = np.load(probed / "rows-val.npy")
    size = state(probed)["config"]["method"]["crop"]["size"]
    view = assemble.evaluation_view(
        config.from_plain(state(probed)["config"]), probed / "rows-val.npy"
    )
    how = {"batch": 1, "rank": 0, "world": 1, "device": CPU, "enlarge": True, "workers": 1}
    right, count = {}, {}
    for batch in assemble.open_loader(data, view, **how).epoch(0):
        assert batch.images.shape[1] == size
        name = data.classes[int(batch.label)]
        count[name] = count.get(name, 0) + 1
        with torch.no_grad():
            outputs = method.net(method.views(batch))
        for stage, logits in zip(method.stages, outputs, strict=True):
            right.setdefault(stage, dict.fromkeys(data.classes, 0))
            right[stage][name] += int(logits.argmax()) == int(batch.label)
    assert sum(count.values()) == len(rows)
    found = json.loads(file.read_text())["stages"]
    assert found.keys() == right.keys()
    for stage, each in found.items():
        assert each["classes"] == {name: right[stage][name] / n for name, n in count.items()}
        assert each["top1"] == sum(right[stage].values()) / len(rows)
    said = capsys.readouterr().out.splitlines()
    assert said[1].split() == ["class", *found]
    assert said[-2].split() == [
        "all",
        "classes",
        *(f"{each['top1']:.2%}" for each in found.values()),
    ]


def test_of_classes_nothing_else_can_tell(straight, probed, pictures, tmp_path):
    with pytest.raises(UsageError, match="has learnt no classes"):
        evaluate.main([str(straight), "classes"])
    shutil.copytree(pictures / "class0", tmp_path / "data" / "class0")
    with pytest.raises(UsageError, match=r"other classes than .* has learnt \(1 and 3\): prepare"):
        evaluate.main([str(probed), "classes", "--data", str(tmp_path / "data")])
    for name in ("a", "b", "c"):
        shutil.copytree(pictures / "class0", tmp_path / "three" / name)
    with pytest.raises(UsageError, match=r"other classes than .* has learnt \(3 and 3\)"):
        evaluate.main([str(probed), "classes", "--data", str(tmp_path / "three")])


def test_classes_of_pictures_without_a_label_are_refused(probed, monkeypatch):
    opened = assemble.open_data

    def without(*given, **how):
        data = opened(*given, **how)
        data.labels = data.labels.copy()
        data.labels[np.load(probed / "rows-val.npy")[0]] = -1
        return data

    monkeypatch.setattr(assemble, "open_data", without)
    with pytest.raises(UsageError, match=r"1 of 2 pictures of .* have no label"):
        evaluate.main([str(probed), "classes", "--device", "cpu"])


def test_ranks_share_the_classes(probed, monkeypatch):
    """Each counts its own: the sum over ranks is what one counts, with one rank more than there are pictures."""
    counted, ranks = [], len(np.load(probed / "rows-val.npy")) + 1
    monkeypatch.setattr(dist, "sum_over_ranks", lambda each: counted.append(each) or each)
    monkeypatch.setattr(dist, "joined", lambda *_: contextlib.nullcontext())
    for rank, world in ((0, 1), *((rank, ranks) for rank in range(ranks))):
        here = Place(rank, world)
        monkeypatch.setattr(dist, "place", lambda here=here: here)
        with contextlib.suppress(RunError):  # a share that is empty
            evaluate.main([str(probed), "classes", "--device", "cpu"])
    whole, *shares = counted
    assert torch.equal(sum(shares), whole)
    assert not shares[-1].any()


def test_a_frozen_trunk_costs_no_backward(probed):
    method, cfg = trained_method(probed, CPU), load(probed).config
    view = assemble.training_view(cfg)
    frozen = step_cost(method, view, cfg, CPU).flop
    method.net.requires_grad_(True)
    method.net.trunk.fc_block.requires_grad_(False)  # which no head reads
    method.net.frozen = False
    assert frozen < 0.5 * step_cost(method, view, cfg, CPU).flop


def test_a_trunk_may_be_tuned(straight, pictures, tmp_path):
    more = ["--start-from", str(straight), "--method.tune", "--method.stages", "conv2"]
    run = probe(pictures, tmp_path, *more)
    mine, theirs = state(run)["net"], checkpoint.trunk_weights(state(straight)["net"])
    changed = {k.split(".")[0] for k, v in theirs.items() if not torch.equal(mine[f"trunk.{k}"], v)}
    assert changed == {"conv1", "conv2"}  # what no head reads stays


def test_a_random_trunk_is_of_the_seed(pictures, tmp_path):
    more = ["--method.random", "--image-size", "64", "--backbone.width", "0.1"]
    run = probe(pictures, tmp_path / "a", *more)
    other = probe(pictures, tmp_path / "b", *more, "--seed", "1")
    mine, others = (checkpoint.trunk_weights(state(each)["net"]) for each in (run, other))
    assert not torch.equal(mine["conv1.conv.weight"], others["conv1.conv.weight"])
    assert not mine["conv1.bn.running_mean"].any()  # as it began


def test_halves_of_a_decoupled_net_and_supervised_ones_go_the_same_way(pictures, tmp_path):
    sizes = [
        *TINY[1:],
        "--backbone.kernel",
        "5",
        "--backbone.stride",
        "2",
        "--schedule.steps",
        "3",
        "--data",
        str(pictures),
    ]
    for preset, more in (
        ("decoupling-alexnet", ["--method.negatives", "8"]),
        ("supervised-alexnet", []),
    ):
        source = tmp_path / preset
        assert train.main([preset, *sizes, "--out", str(source), *more]) == 0
        out = tmp_path / f"{preset}-probe"
        stages = ["--method.stages", "conv5", "fc_block", "f1", "f2"]
        probe(pictures, out, "--start-from", str(source), *stages)
        val = json.loads((out / "summary.json").read_text())["val"]
        assert {"top1_f1", "top1_f2", "top1_fc_block", "top1_conv5"} <= set(val)
    trunk = load(tmp_path / "decoupling-alexnet")
    images = torch.randint(0, 256, (2, 32, 32, 3), dtype=torch.uint8)
    whole = trunk.features(images, "fc_block")
    assert torch.equal(
        torch.cat([trunk.features(images, "f1"), trunk.features(images, "f2")], 1), whole
    )


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_checkpoint_of_the_original_code_is_probed(wrapped, pictures, tmp_path):
    """Its NIN, narrowed to a sixteenth; behind DataParallel, and in torch's older form."""
    nin = golden("nin_small")
    state = {
        k[8:]: torch.from_numpy(np.array(v)) for k, v in nin.items() if k.startswith("s4__sd__")
    }
    if wrapped:  # and without what torch did not count then
        state = {k: v for k, v in state.items() if "num_batches" not in k}
        state = {"epoch": 3, "network": {f"module.{k}": v for k, v in state.items()}}
    torch.save(state, tmp_path / "theirs", _use_new_zipfile_serialization=not wrapped)
    words = [
        "--start-from",
        str(tmp_path / "theirs"),
        "--backbone.width",
        "0.0625",
        "--image-size",
        "32",
    ]
    run = probe(
        pictures, tmp_path / "run", *words, "--max-steps", "1", words=["probe-mlp-cifar10", *KNOBS]
    )
    trunk = load(run).net
    with torch.no_grad():
        (found,) = trunk.outputs(torch.from_numpy(nin["x"]), ["conv2"])
    (name,) = (k for k in nin if k.startswith("s4__eval") and k.endswith("conv2"))
    torch.testing.assert_close(found, torch.from_numpy(nin[name]), rtol=1e-4, atol=1e-5)


def test_a_trunk_of_vissl_is_probed(pictures, tmp_path, caplog):
    """Its AlexNet for rotations, narrowed: convolutions alone, by the names of RotNet's code, nested as it nests them."""
    ours = alexnet(config.AlexNet(width=0.1), 64).eval()
    theirs = {}
    for name, value in ours.state_dict().items():
        stage, layer, leaf = name.split(".")
        if stage != "fc_block":
            block = next(number for number, each in foreign.BLOCKS.items() if each == stage)
            theirs[f"_feature_blocks.{block}.{('conv', 'bn').index(layer)}.{leaf}"] = value
    model = {"model": {"trunk": theirs, "heads": {}}}
    state = {"phase_idx": 9, "classy_state_dict": {"base_model": model, "optimizer": {}}}
    torch.save(state, file := tmp_path / "model_final.torch")
    words = ["--start-from", str(file), "--backbone.width", "0.1", "--image-size", "64"]
    run = probe(pictures, tmp_path / "run", *words, "--max-steps", "1")
    assert "has no fc_block: it begins anew" in caplog.text
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        for stage in ("conv1", "conv5"):
            assert torch.equal(ours.outputs(x, [stage])[0], load(run).net.outputs(x, [stage])[0])
    for stage in ("fc_block", "f2", "last"):
        with pytest.raises(UsageError, match="has no fc_block: leave it"):
            probe(pictures, tmp_path / stage, *words, "--method.stages", stage)


def test_a_probe_goes_on_without_the_run_that_it_stands_on(straight, pictures, tmp_path):
    source = shutil.copytree(straight, tmp_path / "source")
    more = ["--start-from", str(source), "--method.stages", "conv5"]
    probe(pictures, tmp_path / "probe", *more, "--max-steps", "2")
    shutil.rmtree(source)
    probe(pictures, tmp_path / "probe", *more)
    assert json.loads((tmp_path / "probe" / "summary.json").read_text())["steps"] == 9


def test_layers_that_no_net_of_theirs_has_are_named(pictures, tmp_path):
    for number, key in enumerate(("_feature_blocks.8.7.weight", "momentum")):
        state = {"_feature_blocks.0.0.weight": torch.zeros(1), key: torch.zeros(1)}
        torch.save({"network": state}, file := tmp_path / f"{number}.pt")
        with pytest.raises(UsageError, match=r"has a layer .*, unlike the AlexNet and the NIN"):
            probe(pictures, tmp_path / "run", "--start-from", str(file))


def test_a_file_of_other_code_is_refused(pictures, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    with pytest.raises(
        UsageError, match=r"--start-from: .*other\.pt is no checkpoint of a fastrot run"
    ):
        probe(pictures, tmp_path / "run", "--start-from", str(tmp_path / "other.pt"))


@pytest.mark.parametrize("preset", [name for name in PRESETS if name.startswith("probe")])
def test_each_probe_preset_trains(preset, pictures, tmp_path):
    nin = "cifar10" in preset
    backbone = ["--backbone.width", "0.1", "--image-size", "32" if nin else "64"]
    more = ["--method.random", *backbone, "--schedule.steps", "2"]
    run = probe(pictures, tmp_path, *more, words=[preset, *KNOBS])
    val = json.loads((run / "summary.json").read_text())["val"]
    stages = config.to_plain(PRESETS[preset]().method)["stages"]
    assert {f"top1_{stage}" for stage in stages} <= set(val)


# ---- few labels ----


def test_few_rows_of_each_class(straight, pictures, tmp_path):
    data = assemble.open_data(str(pictures))

    def rows(text, seed="0"):
        out = tmp_path / f"{text}-{seed}"
        more = ["--start-from", str(straight), "--rows", text, "--seed", seed, "--max-steps", "1"]
        probe(pictures, out, *more, "--method.stages", "conv5")
        return np.load(out / "rows-train.npy"), np.load(out / "rows-val.npy")

    two, aside = rows("2")
    four, _ = rows("4")
    assert np.bincount(data.labels[two]).tolist() == [2, 2, 2]
    assert np.bincount(data.labels[four]).tolist() == [4, 4, 4]
    assert set(two) < set(four)
    assert not set(four) & set(aside)
    assert set(rows("2", "1")[0]) != set(two)
    said = "--rows 4: 4 pictures in each of 3 classes\n"
    assert said in (tmp_path / "4-0" / "log.txt").read_text()
    count = np.bincount(data.labels[rows("12")[0]])  # more than some class has
    few = f"--rows 12: {count.min()} to {count.max()} pictures in each of 3 classes\n"
    assert few in (tmp_path / "12-0" / "log.txt").read_text()
    share, _ = rows("25%")
    others = np.setdiff1d(np.arange(data.rows), aside)
    expected = np.ceil(np.bincount(data.labels[others]) / 4)
    assert np.bincount(data.labels[share]).tolist() == expected.tolist()
    more = ["--start-from", str(straight), "--rows", "3", "--method.stages", "conv5"]
    with pytest.raises(UsageError, match="--rows was 2, now 3"):
        probe(pictures, tmp_path / "2-0", *more)


# ---- what is refused ----


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ([], "--start-from got None: it wants the run whose network is probed"),
        (["--start-from", "{run}", "--method.random"], "--start-from got .*: it wants the run"),
        (["--start-from", "{run}/no"], "--start-from: there is no checkpoint .*/no"),
        (["--start-from", "{run}", "--method.stages", "conv9"], "no stage 'conv9': choose from"),
        (["--start-from", "{run}", "--method.stages", "f1", "f1"], "--method.stages got .* each once"),
        (["--start-from", "{run}", "--rows", "none"], "--rows got none: it wants pictures a class"),
        (["--start-from", "{run}", "--rows", "0"], "--rows got 0: it wants pictures a class"),
        (
            ["--start-from", "{run}", "--method.head", "conv", "--method.stages", "fc_block"],
            "fc_block is no map: for it give --method.head linear, or mlp",
        ),
        (
            ["--start-from", "{run}", "--method.head", "nonlinear", "--method.stages", "f2"],
            "nothing follows f2: for it give --method.head linear, or mlp",
        ),
    ],
)  # fmt: skip
def test_what_no_probe_can_use_is_refused_in_a_sentence(straight, pictures, tmp_path, words, says):
    given = [word.format(run=straight) for word in words]
    with pytest.raises(UsageError, match=says):
        probe(pictures, tmp_path / "run", *given)
    assert not (tmp_path / "run").exists()


def test_data_without_labels_is_refused(straight, pictures, tmp_path):
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, path in enumerate(sorted(pictures.rglob("*.jpg"))[:8]):
        (flat / f"{i}.jpg").write_bytes(path.read_bytes())
    with pytest.raises(UsageError, match="probe-linear learns from labels, but 8 of 8 pictures"):
        probe(flat, tmp_path / "run", "--start-from", str(straight))
