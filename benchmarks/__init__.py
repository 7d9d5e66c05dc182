"""Scripts that measure, each run as `python -m benchmarks.NAME`."""

from fastrot import entry

entry.spin_briefly()  # before torch is imported: as the commands do
