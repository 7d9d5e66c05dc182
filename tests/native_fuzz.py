"""Random corruptions through the C++ extension under sanitizers.

    python tests/native_fuzz.py [--times 6000] [--threads 4] [--sanitizer address,undefined | thread]

Ends with status 1 where a sanitizer reports, with its report.
"""

import argparse
import io
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import simplejpeg
from PIL import Image
from truth import photo

HERE = Path(__file__).parent
KINDS = ("420", "420", "420", "422", "444", "440", "Gray")  # ours are 420


def records() -> bytes:
    """JPEGs of all kinds that may lie in a .beton, small, as native_fuzz.cpp reads them."""
    found = []
    for i in range(21):
        picture = photo(i, 17 + 9 * (i % 6), 20 + 7 * (i % 7))
        kind = KINDS[i % len(KINDS)]
        if kind == "Gray":
            picture = picture[..., :1].copy()
        encoded = simplejpeg.encode_jpeg(
            picture,
            quality=70 + i,
            colorspace="GRAY" if kind == "Gray" else "RGB",
            colorsubsampling=kind,
        )
        found.append((picture.shape, encoded))
    for mode in ("RGB", "CMYK"):
        file = io.BytesIO()
        Image.fromarray(photo(7)).convert(mode).save(file, "JPEG", progressive=True)
        found.append(((60, 80), file.getvalue()))
    return b"".join(struct.pack("<3i", *shape[:2], len(data)) + data for shape, data in found)


def fuzz(folder: Path, *, times: int, threads: int, sanitizer: str) -> subprocess.CompletedProcess:
    """Build the driver in `folder` and run it."""
    (folder / "records").write_bytes(records())
    flags = ["-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-math-errno", "-pthread"]
    made = folder / f"fuzz-{sanitizer.replace(',', '-')}"
    subprocess.run(
        [
            os.environ.get("CXX", "c++"),
            *flags,
            f"-fsanitize={sanitizer}",
            "-fno-sanitize-recover=all",
            str(HERE / "native_fuzz.cpp"),
            *("-ljpeg", "-o", str(made)),
        ],
        check=True,
    )
    asked = [str(made), str(folder / "records"), str(times), str(threads)]
    return subprocess.run(asked, capture_output=True, text=True, check=False)


def possible() -> bool:
    """Whether there is a compiler, with libjpeg-turbo's headers."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return False
    asked = [compiler, "-E", "-x", "c++", "-o", os.devnull, "-"]
    text = "#include <stdio.h>\n#include <jpeglib.h>\n"
    return not subprocess.run(asked, input=text, text=True, capture_output=True).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=6000)
    parser.add_argument("--threads", type=int, default=4)
    parser.add_argument("--sanitizer", default="address,undefined")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        done = fuzz(
            Path(folder), times=asked.times, threads=asked.threads, sanitizer=asked.sanitizer
        )
    print(f"{asked.sanitizer}: {done.stdout}{done.stderr}", end="")
    return 1 if done.returncode else 0


if __name__ == "__main__":
    sys.exit(main())
