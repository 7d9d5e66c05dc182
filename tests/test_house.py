"""The house's own rules: floors, names, lazy imports, tables that agree with the config."""

import ast
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from fastrot import assemble, config
from fastrot.presets import PRESETS

HOUSE = Path(__file__).parents[1] / "fastrot"
# a room is a folder or a file of fastrot/; a file of a folder may have a floor of its own
FLOORS = [
    {"config", "arrays", "door"},
    {"core", "presets", "ranges", "disk", "entry", "paths", "native"},
    {"ops", "dist", "machine", "cli"},
    {"data", "backbones"},
    {"methods"},
    {"assemble", "speed"},
    {"training"},
    {"evals", "speed.memory", "speed.probe", "speed.profile"},
    {"training.session"},
    {"train", "evaluate", "export", "draw", "doctor", "look", "convert", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
LINES = 19_535  # one formula of a puzzle's sides, in a function each
LONGEST = 450  # lines of a file
MODULES = {
    ".".join(p.relative_to(HOUSE).with_suffix("").parts).removesuffix(".__init__"): p
    for p in sorted(HOUSE.rglob("*.py"))
    if p != HOUSE / "__init__.py"
}


def room(name: str) -> str:
    """The room of a module, by its dotted name within fastrot."""
    return name if name in FLOOR else name.split(".")[0]


def imports(path: Path) -> set[str]:
    """Modules of fastrot that a file imports, inside functions too, by their names within fastrot."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastrot":
            names = [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.removeprefix("fastrot.") for name in names} & set(MODULES)
    return found


@pytest.mark.parametrize("name", MODULES)
def test_imports_come_from_lower_floors_or_the_same_room(name):
    for other in imports(MODULES[name]):
        if room(other) != room(name):
            assert FLOOR[room(other)] < FLOOR[room(name)], f"{name} must not import {other}"


def test_each_room_has_a_floor():
    assert {room(name) for name in MODULES} <= set(FLOOR)


def test_no_import_goes_round():
    """Imports inside functions are counted too: a circle there is one for the reader."""
    left = {name: imports(path) - {name} for name, path in MODULES.items()}
    while free := [name for name, others in left.items() if not others & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def test_no_file_is_longer_than_a_reader_likes():
    for path in MODULES.values():
        assert len(path.read_text().splitlines()) <= LONGEST, path


def test_the_package_grows_only_on_purpose():
    lines = [line for path in HOUSE.rglob("*.py") for line in path.read_text().splitlines()]
    assert sum(bool(line.strip()) for line in lines) <= LINES


def test_methods_know_no_loader_and_no_loop():
    for path in (HOUSE / "methods").glob("*.py"):
        assert not {n for n in imports(path) if room(n) in ("data", "training", "assemble")}


def test_the_package_imports_no_script():
    for path in MODULES.values():
        text = path.read_text()
        assert "import benchmarks" not in text
        assert "import dataprep" not in text


def test_no_module_hides_another():
    # `torchrun fastrot/train.py` puts fastrot/ first on sys.path: fastrot/types.py would *be* types.
    top = {p.stem for p in HOUSE.iterdir()} - {"__init__", "__pycache__", "__main__"}
    others = {"torch", "torchvision", "triton", "ffcv", "nvidia", "numpy", "cv2", "PIL", "yaml"}
    assert not top & (set(sys.stdlib_module_names) | others | {"tyro", "rich", "matplotlib"})


def test_no_room_for_odds_and_ends():
    names = {part for name in MODULES for part in name.split(".")}
    assert not names & {"utils", "util", "helpers", "common", "base", "manager", "misc"}


def test_tables_hold_what_the_config_admits():
    assert set(assemble.METHODS) == set(typing.get_args(config.MethodConfig))
    assert set(assemble.BACKBONES) == set(typing.get_args(config.Backbone))


def test_no_knob_is_a_prefix_of_a_torchrun_option():
    # torchrun's own parser would take --run for --run-path
    from torch.distributed.run import get_args_parser

    options = {o for action in get_args_parser()._actions for o in action.option_strings}
    options |= {o.replace("_", "-") for o in options}
    for preset in PRESETS.values():
        for name in config.to_plain(preset()):
            assert not [o for o in options if o.startswith(config.knob(name))], name


def test_import_is_light():
    code = (
        "import sys, fastrot.__main__, fastrot.train, fastrot.evaluate, fastrot.doctor;"
        "assert 'torch' not in sys.modules;"  # see entry.spin_briefly
        "import fastrot.training.session;"
        "heavy = {'torchvision', 'ffcv', 'nvidia.dali', 'matplotlib', 'sklearn', 'tensorboard'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
