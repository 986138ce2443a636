"""Measurements with baselines in the same run. `python -m lowbit.bench.methods` compares ways to train few bits."""
