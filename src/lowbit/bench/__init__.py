"""Measurements with baselines in the same run.

`lowbit bench kernels` and `lowbit bench decode` time products and generation (kernels.py, decode.py);
`python -m lowbit.bench.methods` compares ways to train few bits (methods.py).
"""
