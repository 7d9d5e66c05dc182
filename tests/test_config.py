import dataclasses

import pytest
import yaml

from fastrot import config, entry, ranges, train
from fastrot.config import Config, RunError, Schedule, UsageError
from fastrot.presets import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_survives_yaml(preset):
    cfg = config.resolved(PRESETS[preset]())
    if isinstance(cfg.method, config.Probe):  # which wants one
        cfg = dataclasses.replace(cfg, start_from="runs/x")
    ranges.check(cfg)
    text = yaml.safe_dump(config.to_plain(cfg))
    assert config.from_plain(yaml.safe_load(text)) == cfg


@pytest.mark.parametrize("preset", PRESETS)
def test_the_command_line_gives_the_preset(preset):
    assert train.command_line([preset]) == PRESETS[preset]()
    assert PRESETS[preset]().preset == preset


def test_knobs_of_each_part_are_on_the_command_line():
    cfg = train.command_line(
        [
            "demo",
            "--epochs",
            "3",
            "--schedule.steps",
            "None",
            "--backbone.width",
            ".5",
            "--method.crop.scale",
            ".2",
            ".9",
            "--optim.momentum",
            "0.8",
            "--data",
            "x",
        ]
    )
    assert (cfg.epochs, cfg.backbone.width, cfg.method.crop.scale) == (3, 0.5, (0.2, 0.9))
    assert (cfg.optim.momentum, cfg.data) == (0.8, "x")


def test_a_config_file_is_replayed_with_changes(tmp_path):
    path = tmp_path / "config.yaml"
    cfg = dataclasses.replace(config.resolved(PRESETS["rotnet-nin-cifar10"]()), seed=3, data="d")
    path.write_text(yaml.safe_dump(config.to_plain(cfg)))
    assert train.command_line(["--config", str(path)]) == cfg
    changed = train.command_line([f"--config={path}", "--seed", "4"])
    assert changed == dataclasses.replace(cfg, seed=4)


BAD = {
    "batch": (["--batch", "0"], "--batch"),
    "lr": (["--lr", "-1"], "--lr"),
    "hold-out": (["--hold-out", "1"], "--hold-out"),
    "scale": (["--method.crop.scale", "0.9", "0.1"], "--method.crop.scale"),
    "two-lengths": (["--epochs", "3", "--budget", "1h"], "--budget"),
    "width": (["--backbone.width", "0"], "--backbone.width"),
    "std": (["--std", "0", "1", "1"], "--std"),
    "momentum": (["--optim.momentum", "-1"], "--optim.momentum"),
    "weight-decay": (["--optim.weight-decay", "nan"], "--optim.weight-decay"),
    "lr-infinite": (["--lr", "inf"], "--lr"),
    "mean": (["--mean", "nan", "0", "0"], "--mean"),
    "order-window": (["--order", "blocks", "--order-window", "0"], "--order-window got 0"),
    "exponential": (
        ["--schedule.kind", "exponential"],
        "--schedule.last got 0.0: it wants .*above 0",
    ),
    "order-block": (["--order", "blocks", "--order-block", "-3"], "--order-block got -3"),
    "block-without-blocks": (["--order-block", "64"], "--order-block got 64.*--order blocks"),
    "seed": (["--seed", "99999999999999999999"], "--seed"),
    "published-epochs": (["--schedule.epochs", "0"], "--schedule.epochs"),
    "config-with-preset": (["--config", "x.yaml"], "--config x.yaml takes the place"),
    "table": (["--schedule.table", "9", "0.1", "3", "0.2"], "--schedule.table"),
    "no-data": ([], "--data"),
}


@pytest.mark.parametrize(("args", "names"), BAD.values(), ids=BAD)
def test_a_knob_out_of_range_is_named(args, names):
    with pytest.raises(UsageError, match=names):
        train.main(["rotnet-alexnet", *args])


def test_a_wrong_knob_gets_a_suggestion(capsys):
    with pytest.raises(SystemExit) as left:
        train.command_line(["demo", "--bacth", "3"])
    assert left.value.code == 2
    said = capsys.readouterr()
    assert "--batch" in said.out + said.err


def test_a_wrong_preset_gets_a_suggestion():
    with pytest.raises(UsageError, match="did you mean rotnet-alexnet"):
        train.command_line(["rotnet-alexnt", "--data", "x"])
    with pytest.raises(UsageError, match="supervised-alexnet"):
        train.command_line(["simclr"])


def test_what_is_spelt_out_and_what_is_meant_are_the_same_run():
    plain = config.resolved(train.command_line(["rotnet-alexnet"]))
    spelt = config.resolved(
        train.command_line(["rotnet-alexnet", "--epochs", "50", "--lr", "0.01"])
    )
    assert plain == spelt


def test_blocks_that_are_spelt_out_are_the_ones_that_are_meant():
    plain = config.resolved(train.command_line(["rotnet-alexnet", "--order", "blocks"]))
    size, window = map(str, config.BLOCKS)
    spelt = ["--order", "blocks", "--order-block", size, "--order-window", window]
    assert plain == config.resolved(train.command_line(["rotnet-alexnet", *spelt]))
    assert config.blocks(plain) == config.BLOCKS
    full = config.resolved(train.command_line(["rotnet-alexnet"]))
    assert config.blocks(full) is None


@pytest.mark.parametrize(
    "args", [["--epochs", "3"], ["--budget", "9min"]], ids=["epochs", "budget"]
)
def test_a_length_takes_the_place_of_the_presets_steps(args):
    assert config.resolved(train.command_line(["demo"])).schedule.steps == 1120
    assert config.resolved(train.command_line(["demo", *args])).schedule.steps is None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_only_rank_0_complains(rank, capsys, monkeypatch):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        train.command_line(["demo", "--bacth", "3"])
    said = capsys.readouterr()
    assert bool(said.out + said.err) == (rank == "0")


def test_image_size_goes_into_the_recipe():
    cfg = dataclasses.replace(PRESETS["rotnet-alexnet"](), image_size=96)
    assert config.resolved(cfg).method.crop.size == 96
    within = config.with_size(config.Within(), 112)
    assert (within.size, within.short) == (112, 128)


def test_free_knobs_do_not_make_another_run():
    a = Config(data="a", workers=3, log_every=7, max_steps=9)
    b = Config(data="b", seed=1, schedule=Schedule(kind="cosine"))
    found = config.differences(config.to_plain(a), config.to_plain(b))
    assert found == {"seed": (0, 1), "schedule.kind": ("table", "cosine")}


def test_a_knob_that_a_run_did_not_know_yet_had_its_default():
    before = config.to_plain(Config())
    del before["order"], before["order_block"]
    assert not config.differences(before, config.to_plain(Config()))
    found = config.differences(before, config.to_plain(Config(order="blocks")))
    assert found == {"order": ("full", "blocks")}


PLAIN = {
    "unknown": ({"colour": 1}, "colour"),
    "type": ({"batch": "many"}, "batch"),
    "part": ({"method": {"type": "Simclr"}}, "method"),
    "choice": ({"precision": "fp8"}, "precision"),
    "null": ({"batch": None}, "batch"),
    "null-part": ({"schedule": None}, "schedule"),
}


@pytest.mark.parametrize(("plain", "names"), PLAIN.values(), ids=PLAIN)
def test_a_config_file_that_does_not_fit_is_named(plain, names):
    with pytest.raises(UsageError, match=names):
        config.from_plain(plain)


def test_knobs_that_change_numbers_make_another_run():
    loose = {f.name for f in dataclasses.fields(Config) if f.metadata.get("free")}
    assert loose == {
        *(
            "data",
            "val",
            "out",
            "max_steps",
            "workers",
            "log_every",
            "checkpoint_every",
            "online_probe",
        ),
        *("keep_every", "keep_best", "validate_every", "loader", "placement", "tensorboard"),
        *("profile", "threads", "extend"),
        "on_bad_record",
    }
    other = Config(method=config.RotNet(crop=config.RandomResized(flip=False)))
    found = config.differences(config.to_plain(Config()), config.to_plain(other))
    assert found == {"method.crop.flip": (True, False)}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        *((UsageError("x"), 2), (RunError("x"), 1), (OSError("x"), 1), (KeyboardInterrupt(), 130)),
        *((entry.Preempted(10, "x"), 138), (entry.Preempted(15, "x"), 143)),
    ],
)
def test_each_end_has_its_status(error, code):
    def main():
        raise error

    assert entry.status(main) == code


RENAMED = {"rate": "lr", "backbone.stem": "backbone.kernel", "backbone.norm": "backbone.fuse"}


@pytest.mark.parametrize(
    ("given", "now"),
    [
        *(("--rate", "--lr"), ("--rate=3", "--lr"), ("--backbone.no-norm", "--backbone.fuse")),
        ("--backbone.stem", "--backbone.kernel"),
    ],
)
def test_a_knob_answers_to_its_old_name_with_the_new_one(monkeypatch, given, now):
    monkeypatch.setattr(config, "OLD_KNOBS", RENAMED)
    with pytest.raises(UsageError, match=f"{given.split('=')[0]} is called {now} now"):
        train.command_line(["demo", given])


def test_a_config_written_under_an_old_name_is_read(monkeypatch):
    monkeypatch.setattr(config, "OLD_KNOBS", RENAMED)
    plain = config.to_plain(Config())
    plain["backbone"] |= {"stem": plain["backbone"].pop("kernel")}
    assert config.from_plain(plain) == Config()
    assert config.differences(plain, config.to_plain(Config())) == {}


def test_a_config_of_the_version_before_is_read():
    plain = config.to_plain(Config(backbone=config.AlexNet(space_to_depth=True)))
    plain["backbone"] |= {"fold": plain["backbone"].pop("space_to_depth")}
    assert config.from_plain(plain).backbone == config.AlexNet(space_to_depth=True)


@pytest.mark.parametrize("angles", [["0"], ["0", "360"], ["90", "90"], ["45", "0", "405"]])
def test_angles_are_each_another(angles):
    cfg = train.command_line(["demo", "--method.angles", *angles])
    with pytest.raises(UsageError, match=r"--method.angles got .*: it wants two or more, each"):
        ranges.check(cfg)


def test_angles_between_quarters_want_room():
    words = ["rotnet-nin-cifar10", "--method.angles", "0", "45"]
    ranges.check(train.command_line(words))
    for knob in ("--method.crop.size", "--image-size"):
        with pytest.raises(UsageError, match="crops of 24 pixels or more"):
            ranges.check(train.command_line([*words, knob, "23"]))
