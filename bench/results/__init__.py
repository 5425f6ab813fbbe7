"""The README's tables and figures, drawn from the JSON in `results/`: `python -m bench.results`."""
