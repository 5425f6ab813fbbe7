"""Benchmarks of the ops against their rivals; `python -m bench` measures, `python -m bench --check`
gates."""
