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
FLOORS = [
    {"config"},
    {"core", "presets", "disk", "entry", "native", "cost"},
    {"ops", "bounds", "dist", "machine", "rotation_table"},
    {"journal", "bank", "backbones", "data", "optim"},
    {"methods", "checkpoint", "watch", "graph"},
    {"loop", "evals"},
    {"assemble", "page", "fits", "tracing"},
    {"run", "checkup"},
    {"train", "evaluate", "draw", "export", "doctor", "__main__"},
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
MODULES = sorted(p for p in HOUSE.rglob("*.py") if p != HOUSE / "__init__.py")


def room(path: Path) -> str:
    return path.relative_to(HOUSE).with_suffix("").parts[0]


def imports(path: Path) -> set[str]:
    """Dotted names of fastrot that a file imports, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("fastrot"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("fastrot.")}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(HOUSE)))
def test_imports_come_from_lower_floors_or_the_same_folder(path):
    mine = room(path)
    for name in imports(path):
        other = name.split(".")[1]
        if other in FLOOR and other != mine:
            assert FLOOR[other] < FLOOR[mine], f"{mine} must not import {name}"


def test_each_room_has_a_floor():
    assert {room(p) for p in MODULES} <= set(FLOOR)


def test_methods_know_no_loader_and_no_loop():
    for path in (HOUSE / "methods").glob("*.py"):
        assert not {n for n in imports(path) if n.split(".")[1] in ("data", "loop", "assemble")}


def test_the_package_imports_no_script():
    for path in MODULES:
        text = path.read_text()
        assert "import benchmarks" not in text
        assert "import dataprep" not in text


def test_no_module_hides_another():
    # `torchrun fastrot/train.py` puts fastrot/ first on sys.path: fastrot/types.py would *be* types.
    top = {p.stem for p in HOUSE.iterdir()} - {"__init__", "__pycache__", "__main__"}
    others = {"torch", "torchvision", "triton", "ffcv", "nvidia", "numpy", "cv2", "PIL", "yaml"}
    assert not top & (set(sys.stdlib_module_names) | others | {"tyro", "rich", "matplotlib"})


def test_no_room_for_odds_and_ends():
    names = {p.stem for p in MODULES} | {p.parent.name for p in MODULES}
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
        "import sys, fastrot, fastrot.config, fastrot.presets, fastrot.train;"
        "assert 'torch' not in sys.modules;"
        "import fastrot.training.session;"
        "heavy = {'torchvision', 'ffcv', 'nvidia.dali', 'matplotlib', 'sklearn', 'tensorboard'};"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=HOUSE.parent
    )
    assert done.stdout.strip() == "[]", done.stderr
