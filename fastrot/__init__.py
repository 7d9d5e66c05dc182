"""fastrot: self-supervised learning from image rotations, at the speed that the hardware allows."""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (a sentence, where the next lines would be a traceback)
    sys.exit(f"fastrot: this is Python {sys.version.split()[0]}, and fastrot wants 3.10 to 3.13")

__version__ = "0.1.0"


def __getattr__(name: str):
    """`fastrot.load`, `fastrot.open_data`, `fastrot.open_loader`: imported when first asked for."""
    if name in ("load", "open_data", "open_loader"):
        from fastrot import assemble
        from fastrot.evals import trained

        return getattr(trained if name == "load" else assemble, name)
    raise AttributeError(f"module 'fastrot' has no attribute {name!r}")
