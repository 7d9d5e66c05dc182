"""Tables as papers print them, each from many runs of the real commands: `python -m benchmarks.studies.NAME`."""
