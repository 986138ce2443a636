"""Measurements with baselines in the same run.

`lowbit bench kernels`, `conv` and `decode` time products, convolutions and generation (kernels.py, conv.py, decode.py);
`python -m lowbit.bench.methods` compares ways to train few bits (methods.py).
"""
