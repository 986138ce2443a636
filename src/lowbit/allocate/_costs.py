"""What an option costs: bytes counted from what a file would hold, before anything is quantized."""

from math import prod

from lowbit.formats import Format, tensor_specs


def storage_bytes(shape: tuple[int, ...], fmt: "Format | str") -> int:
    """Bytes of a weight of this shape in a format: codes, scales, zeros, tables and padding.

    Equal to QuantizedTensor.nbytes without exceptions. Raises ShapeError where the format's blocks do not divide.

    >>> storage_bytes((64, 128), "uint4-g64")
    4416
    """
    specs = tensor_specs({"shape": list(shape), "parts": [{"format": str(fmt)}]})
    return sum(prod(size) * dtype.itemsize for size, dtype in specs.values())
