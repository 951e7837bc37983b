"""The asv suite (`bench_*.py`), and the comparison with other libraries (`peers.py`)."""
