"""Labelled images from Parquet, the hub, or one small file of JPEG bytes.

    train, test = read_images("cifar10/")        a folder with train-*.parquet and test-*.parquet (Hugging Face layout)
    python -m lowbit.train.images cifar10/ cifar10.safetensors       the same images in one file

The one file is for machines without pyarrow: reading it takes Pillow only. Its JPEG bytes are compressed as a whole,
which removes the tables that every small JPEG repeats.
"""

import io
import lzma
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lowbit.errors import DataError

SPLITS = ("train", "test")


class Images(NamedTuple):
    """x: (n, height, width, 3) uint8; y: (n,) int64 classes."""

    x: Tensor
    y: Tensor

    def first(self, n: int) -> "Images":
        """The first n images, all of them where n is 0."""
        return Images(self.x[:n], self.y[:n]) if n else self


def read_images(source: "str | Path") -> tuple[Images, Images]:
    """(train, test) from a folder of Parquet files, a file that `write_images` wrote, or a data set's hub name.

    Raises DataError where there is none, or an image cannot be decoded.
    """
    path = Path(source)
    if path.is_file():
        return _from_file(path)
    splits = [_rows(path, split) if path.is_dir() else _rows_of_hub(str(source), split) for split in SPLITS]
    train, test = (Images(decode(bytes_), torch.tensor(y)) for bytes_, y in splits)
    return train, test


def write_images(source: "str | Path", to: "str | Path") -> int:
    """Put the images of a folder or hub name into one file, as compressed as they were. Returns its bytes."""
    from lowbit.runtime.safetensors_io import source_of, write_safetensors

    tensors: dict[str, Tensor] = {}
    for split in SPLITS:
        found, y = _rows(Path(source), split) if Path(source).is_dir() else _rows_of_hub(str(source), split)
        ends = torch.tensor([len(b) for b in found]).cumsum(0)
        tensors |= {f"{split}.bytes": _bytes(lzma.compress(b"".join(found), preset=1))}
        tensors |= {f"{split}.ends": ends, f"{split}.labels": torch.tensor(y)}
    with Path(to).open("wb") as file:
        write_safetensors({name: source_of(t) for name, t in tensors.items()}, file.write)
    return Path(to).stat().st_size


def decode(images: Iterable[bytes]) -> Tensor:
    """JPEG or PNG bytes of equally large images -> (n, height, width, 3) uint8."""
    import numpy as np
    from PIL import Image, UnidentifiedImageError

    try:
        arrays = [np.asarray(Image.open(io.BytesIO(b)).convert("RGB")) for b in images]
        return torch.from_numpy(np.stack(arrays))
    except (UnidentifiedImageError, OSError, ValueError) as e:
        raise DataError(f"the images could not be decoded: {e}. Copy the data again.") from None


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _from_file(path: Path) -> tuple[Images, Images]:
    from lowbit.runtime.safetensors_io import read_header, read_tensor

    header = read_header(path)
    missing = [f"{s}.{k}" for s in SPLITS for k in ("bytes", "ends", "labels") if f"{s}.{k}" not in header.entries]
    if missing:
        raise DataError(
            f"{path} holds no images ({missing[0]} is missing); write it with python -m lowbit.train.images."
        )

    def split(name: str) -> Images:
        data, ends, y = (read_tensor(path, header, f"{name}.{key}") for key in ("bytes", "ends", "labels"))
        raw, stops = lzma.decompress(data.numpy().tobytes()), ends.tolist()
        return Images(decode(raw[a:b] for a, b in zip([0, *stops], stops)), y)

    return split("train"), split("test")


def _rows(folder: Path, split: str) -> tuple[list[bytes], list[int]]:
    """Image bytes and labels of one split of a folder."""
    import pyarrow.parquet as pq

    files = sorted(folder.glob(f"**/{split}-*.parquet"))
    if not files:
        raise DataError(f"{folder} has no {split}-*.parquet; give a folder in the Hugging Face layout, or a hub name.")
    table = pq.read_table(files)
    names = table.column_names
    image = next((n for n in ("img", "image") if n in names), None)
    label = next((n for n in ("label", "labels", "fine_label") if n in names), None)
    if image is None or label is None:
        raise DataError(f"{files[0]} has the columns {names}; an image column (img) and a label column are needed.")
    return [row["bytes"] for row in table[image].to_pylist()], table[label].to_pylist()


def _rows_of_hub(name: str, split: str) -> tuple[list[bytes], list[int]]:
    """The same through `datasets`, which downloads."""
    try:
        import datasets

        data = datasets.load_dataset(name, split=split)
        image = "img" if "img" in data.column_names else "image"
        data = data.cast_column(image, datasets.Image(decode=False))
        rows: Any = data[image]
        return [row["bytes"] for row in rows], list(data["label"])
    except ImportError:
        raise DataError(f"{name!r} is no local folder or file; for hub names: pip install 'lowbit[data]'.") from None
    except (OSError, ValueError, KeyError) as e:
        reason = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(f"{name!r} is no local folder or file, and the hub did not help: {reason}") from None


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("python -m lowbit.train.images SOURCE TO.safetensors")
    print(f"{sys.argv[2]}: {write_images(sys.argv[1], sys.argv[2]):,} bytes")
