"""The package's metadata stands in pyproject.toml; this file adds the C++ extension, where it can be built.

It wants a C++ compiler and the headers of libjpeg-turbo. Without them the install succeeds all the same, and
Python libraries do the extension's work (fastrot/native/__init__.py).
"""

from pathlib import Path

from setuptools import Extension, setup

NATIVE = Path("fastrot", "native")

setup(
    ext_modules=[
        Extension(
            "fastrot.native._native",
            [str(NATIVE / "native.cpp")],
            depends=sorted(map(str, NATIVE.glob("*.hpp"))),
            libraries=["jpeg"],
            # no fused multiply-add: weights are rounded as OpenCV's are, on every processor
            extra_compile_args=[
                *("-std=c++17", "-O3", "-ffp-contract=off", "-fno-math-errno"),
                *("-fvisibility=hidden", "-pthread", "-Wall", "-Wextra"),
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
