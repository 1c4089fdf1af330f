"""Benchmarks: `python -m tests.bench.NAME` from the top of the repository; results in RESULTS.md."""
