"""Benchmarks are functions named ``bench_…`` in files named ``bench_….py``; what they measure with is ``xdfast.bench``."""

from __future__ import annotations


def pytest_configure(config) -> None:
    config.addinivalue_line("python_files", "bench_*.py")
    config.addinivalue_line("python_functions", "bench_*")


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Committed results name the hardware, not the host."""
    machine_info.pop("node", None)
