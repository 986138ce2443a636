"""Room on the disk, looked at before the work: finished blocks and the artifact stand beside each other for a while."""

import shutil
from pathlib import Path

from lowbit.allocate import storage_bytes
from lowbit.errors import ArtifactError
from lowbit.pipeline.blocks import layer_matrix, linear_layers
from lowbit.pipeline.stream import Walk


def packed_bytes(walk: Walk) -> int:
    """Bytes of the model's tensors under the walk's recipe, exceptions aside: a little less than the file will have."""
    sizes = {n: p.numel() * 2 for n, p in walk.model.named_parameters()}  # what stays in float: two bytes at least
    for i, block in enumerate(walk.blocks):
        for name, layer in linear_layers(block).items():
            full = f"{walk.prefix}.{i}.{name}"
            if (fmt := walk.recipe.format_for(full)) is not None:
                sizes[f"{full}.weight"] = storage_bytes(tuple(layer_matrix(layer).shape), fmt)
    for end in (walk.embedding(), walk.head()):
        if end is not None:
            shape = tuple(layer_matrix(walk.model.get_submodule(end)).shape)
            if (fmt := walk.recipe.embedding_format(shape[1])) is not None:
                sizes[f"{end}.weight"] = storage_bytes(shape, fmt)
    return sum(sizes.values())


def check_space(walk: Walk, out: Path, work: Path) -> None:
    """Raises ArtifactError where OUT and the finished blocks in `work` cannot both be written."""
    kept = sum(f.stat().st_size for f in work.rglob("*") if f.is_file()) if work.is_dir() else 0
    folder = next(p for p in out.absolute().parents if p.is_dir())
    need, free = 2 * packed_bytes(walk) - kept, shutil.disk_usage(folder).free
    if free < need:
        raise ArtifactError(
            f"the disk is too full: {out} and what is kept on the way to it need {need / 1e6:.0f} MB, "
            f"{free / 1e6:.0f} MB are free in {folder}; free some space, or give a folder on another disk with -o."
        )
