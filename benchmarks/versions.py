"""What the tests came to under the versions that this interpreter has, as a row. `make matrix` runs it.

python -m benchmarks.versions SET FILE.xml... [--out FILE.jsonl or FOLDER]
"""

import argparse
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import measure
from fastrot import entry


def row(name: str, files: list[Path]) -> dict[str, Any]:
    """Tests that passed, of those that ran; `files` are pytest's --junitxml, `name` the set of versions."""
    suites = [suite for file in files for suite in ElementTree.parse(file).iter("testsuite")]

    def count(what: str) -> int:
        return sum(int(suite.attrib[what]) for suite in suites)

    ran = count("tests") - count("skipped")
    passed = ran - count("failures") - count("errors")
    more = dict(ran=ran, skipped=count("skipped"))
    return measure.row(
        "tests", theme="versions", variant=name, **measure.middle([passed], "tests"), **more
    )


def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("name", metavar="SET", help="of versions, as .ci/matrix calls it")
    parser.add_argument("files", nargs="+", type=Path, help="what pytest --junitxml wrote")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<machine>.jsonl")
    asked = parser.parse_args(args)
    made = row(asked.name, asked.files)
    measure.append(measure.results("cpu", asked.out), made)
    print(f"{made['p50']} of {made['ran']} tests passed, {made['skipped']} were skipped")
    return 0


if __name__ == "__main__":
    sys.exit(entry.status(main))
