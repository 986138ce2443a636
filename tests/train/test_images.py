"""Images from Parquet folders and from the one-file form."""

import io
from pathlib import Path

import pytest
import torch

from lowbit.errors import DataError
from lowbit.train.images import read_images, write_images

pytest.importorskip("PIL")
pytest.importorskip("pyarrow")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from PIL import Image

    draw = torch.Generator().manual_seed(0)
    for split, n in (("train", 5), ("test", 3)):
        rows = []
        for i in range(n):
            file = io.BytesIO()
            pixels = torch.randint(0, 256, (4, 4, 3), generator=draw, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(file, "PNG")
            rows.append({"img": {"bytes": file.getvalue(), "path": None}, "label": i})
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / f"{split}-00000-of-00001.parquet")
    return tmp_path


def test_a_folder_and_the_one_file_hold_the_same(folder: Path, tmp_path: Path) -> None:
    train, test = read_images(folder)
    assert train.x.shape == (5, 4, 4, 3) and train.y.tolist() == [0, 1, 2, 3, 4] and len(test.x) == 3
    write_images(folder, tmp_path / "one.safetensors")
    again, _ = read_images(tmp_path / "one.safetensors")
    assert torch.equal(again.x, train.x) and torch.equal(again.y, train.y)


def test_missing_data_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no train-"):
        read_images(tmp_path)
