"""Writing an artifact: all of it or nothing.

Everything goes into a hidden folder beside OUT, is flushed to the disk, and becomes OUT by one rename. An existing OUT
stays untouched without `force`; with it, the old folder is renamed aside, the new one takes its place, then the old one
is deleted, so at every moment one whole artifact exists. Tensors are streamed: memory stays at a
megabyte whatever the size of the model. Equal inputs give byte-identical files (run.json, which holds times and the
machine, is the exception).
"""

import errno
import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from lowbit.errors import ArtifactError
from lowbit.formats import tensor_specs
from lowbit.runtime import manifest as mf
from lowbit.runtime.safetensors_io import NAMES, Source, header_bytes, merge, write_safetensors
from lowbit.runtime.strict_json import canonical_json

SLACK = 1 << 20  # room for what is not known beforehand, beside the tensors: JSON, tokenizer, directory entries
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
LAYER_KEYS = ("type", "meta", "bias", "conv", "binary")
LAYER_NOTES = ("error", "sensitivity", "error_rtn")
# where a model lay and how transformers ran it, not what it is
LOCAL_KEYS = (
    "_name_or_path",
    "name_or_path",
    "_commit_hash",
    "_attn_implementation_autoset",
    "local_files_only",
    "is_local",
)


def write_artifact(
    out: "Path | str",
    tensors: "Iterable[Path | tuple[str, Tensor]]",
    layers: Mapping[str, Mapping[str, Any]],
    *,
    tied: "Mapping[str, str] | None" = None,
    config: Any = None,
    auto_class: "str | None" = None,
    recipe: "Mapping[str, Any] | None" = None,
    seed: int = 0,
    source: "Mapping[str, Any] | None" = None,
    activations: str = "float",
    tokenizer: Any = None,
    generation_config: Any = None,
    run: "Mapping[str, Any] | None" = None,
    extras: "Mapping[str, str] | None" = None,
    force: bool = False,
) -> dict[str, Any]:
    """Write the folder OUT and return its manifest (the content of lowbit.json).

    tensors:   safetensors files (one per finished block) and single (name, tensor) pairs; together all, each once
    layers:    module -> {"type", "meta", "bias"[, "conv", "error", "sensitivity", "error_rtn"]}; its packed tensors are
               "<module>.<key>" for the keys of the meta. What no layer claims is a plain tensor
    config:    a transformers configuration; None writes an artifact of kind "module"
    source:    {"describe", "fingerprint", "nbytes_float"}
    run:       run.json, the volatile facts. extras: further text files that nothing reads back (report.html)

    Raises ArtifactError where OUT exists (without force), tensors and layers disagree, or the disk is full;
    then OUT is as it was.
    """
    out = Path(out)
    refuse_existing(out, force)
    sources = merge(tensors)
    need = sum(s.nbytes for s in sources.values()) + len(header_bytes(sources)) + SLACK
    meta = _describe(sources, layers, dict(tied or {}))
    meta |= {
        "format_version": mf.FORMAT_VERSION,
        "lowbit_version": _lowbit_version(),
        "kind": "module" if config is None else "transformers",
        "auto_class": auto_class,
        "recipe": _plain_json(recipe),
        "seed": seed,
        "versions": _versions(),
        "source": {"describe": None, "fingerprint": None, "nbytes_float": None} | _plain_json(source),
    }
    folder = out.parent / f".{out.name}.lowbit-writing"
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _check_space(out, need)
        shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
        folder.mkdir()
        _write_tensors(folder, sources, meta)
        _write(folder / mf.CONFIG, canonical_json(_config_dict(config, meta, activations)))
        _save_helpers(folder, tokenizer, generation_config)
        meta["files"] = {p.name: _file_row(p, meta) for p in sorted(folder.iterdir()) if p.is_file()}
        meta["summary"] = mf.summarize(meta["layers"], meta["plain"], meta["source"]["nbytes_float"])
        _self_check(meta)
        _write(folder / mf.NAME, mf.dump_manifest(meta))
        for name, text in ({"run.json": canonical_json(_plain_json(run))} | dict(extras or {})).items():
            _write(folder / name, text)
        _flush(folder)
        publish(folder, out, force)
    except OSError as e:
        shutil.rmtree(folder, ignore_errors=True)  # so that the free space in the message is what there will be
        raise _os_error(out, need, e) from e
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return mf.load_manifest(out)


def refuse_existing(out: Path, force: bool) -> None:
    """Raise ArtifactError if OUT may not be written. Call it before a long computation, too.

    Undoes a replacement that was interrupted between its two renames.
    """
    aside = mf.aside_of(out)
    if aside.is_dir() and not os.path.lexists(out):
        os.rename(aside, out)
    if not os.path.lexists(out):
        return
    if not force:
        raise ArtifactError(
            f"{out} exists already; give another folder with -o, or add --force (force=True) to replace it."
        )
    if out.is_symlink() or not out.is_dir():
        raise ArtifactError(
            f"{out} is not a folder and is not replaced even with --force; give another folder with -o."
        )
    if any(out.iterdir()) and not (out / mf.NAME).is_file():
        raise ArtifactError(
            f"{out} holds other files and no {mf.NAME}, so --force leaves it alone; give another folder with -o."
        )
    if strange := _strangers(out):
        raise ArtifactError(
            f"{out} also holds {strange[0]!r}, which lowbit did not write and --force would delete; "
            "move it away, or give another folder with -o."
        )


def _strangers(out: Path) -> list[str]:
    """Names in an artifact's folder that are not of the artifact; where its list cannot be read, its folders."""
    try:
        known = {*mf.load_manifest(out)["files"], *mf.UNCHECKED}
    except ArtifactError:
        return sorted(p.name for p in out.iterdir() if p.is_dir())
    return sorted(p.name for p in out.iterdir() if p.name not in known and not p.name.startswith("."))


def _describe(
    sources: dict[str, Source], layers: Mapping[str, Mapping[str, Any]], tied: dict[str, str]
) -> dict[str, Any]:
    """The manifest's layers, ties and plain tensors, without checksums.

    Raises ArtifactError on a tensor that does not fit its layer.
    """
    table: dict[str, Any] = {}
    claimed: set[str] = set()
    for name, given in layers.items():
        specs = tensor_specs(given["meta"])
        for key, (shape, dtype) in specs.items():
            s = sources.get(f"{name}.{key}")
            if s is None or s.shape != tuple(shape) or s.dtype != dtype:
                found = "missing" if s is None else f"{s.shape} {NAMES[s.dtype]}"
                raise ArtifactError(
                    f"layer {name!r}: tensor {key!r} is {found}, its format needs {tuple(shape)} {NAMES[dtype]}."
                )
            claimed.add(f"{name}.{key}")
        rows = {key: {"bytes": sources[f"{name}.{key}"].nbytes} for key in specs}
        total = sum(r["bytes"] for r in rows.values())
        row = {k: _plain_json(given[k]) for k in LAYER_KEYS if k in given} | {k: given.get(k) for k in LAYER_NOTES}
        table[name] = row | {
            "bytes": total,
            "bits_per_weight": 8 * total / max(1, prod(given["meta"]["shape"])),
            "tensors": rows,
        }
    plain = {n: s for n, s in sources.items() if n not in claimed}
    described = {n: {"shape": list(s.shape), "dtype": NAMES[s.dtype], "bytes": s.nbytes} for n, s in plain.items()}
    return {"layers": table, "tied": tied, "plain": described}


def _write_tensors(folder: Path, sources: dict[str, Source], meta: dict[str, Any]) -> None:
    """model.safetensors; puts every checksum into `meta`."""
    digest = hashlib.sha256()
    with open(folder / mf.WEIGHTS, "wb") as file:

        def write(block: "bytes | memoryview") -> None:
            write_block(file, block)
            digest.update(block)

        sums = write_safetensors(sources, write)
    meta["weights_sha256"] = digest.hexdigest()
    for name, row in meta["layers"].items():
        for key, stored in row["tensors"].items():
            stored["sha256"] = sums[f"{name}.{key}"]
    for name, row in meta["plain"].items():
        row["sha256"] = sums[name]


def write_block(file: BinaryIO, block: "bytes | memoryview") -> None:
    """Every byte of an artifact that lowbit writes itself passes here."""
    file.write(block)


def _write(path: Path, text: "str | bytes") -> None:
    with open(path, "wb") as file:
        write_block(file, text.encode("utf-8") if isinstance(text, str) else text)


def _config_dict(config: Any, meta: dict[str, Any], activations: str) -> dict[str, Any]:
    if config is None:
        table: dict[str, Any] = {}
    else:
        table = {k: v for k, v in json.loads(config.to_json_string(use_diff=True)).items() if k not in LOCAL_KEYS}
        table |= _dtype_word(config, meta["plain"])
    return table | {"quantization_config": mf.quantization_config(meta, activations)}


def _dtype_word(config: Any, plain: dict[str, Any]) -> dict[str, str]:
    """The dtype of most plain float weights: what transformers should compute in."""
    counts: dict[str, int] = {}
    for row in plain.values():
        if row["dtype"] in ("F32", "F16", "BF16"):
            counts[row["dtype"]] = counts.get(row["dtype"], 0) + row["bytes"]
    if not counts:
        return {}
    word = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}[max(sorted(counts), key=lambda k: counts[k])]
    return {"dtype" if hasattr(config, "dtype") else "torch_dtype": word}


def _save_helpers(folder: Path, tokenizer: Any, generation_config: Any) -> None:
    """Tokenizer and generation settings, in transformers' own files."""
    if generation_config is not None:
        generation_config.save_pretrained(str(folder))
    if tokenizer is not None:
        tokenizer.save_pretrained(str(folder))
    for name in ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"):
        if (folder / name).is_file():
            table = json.loads((folder / name).read_text("utf-8"))
            _write(folder / name, canonical_json({k: v for k, v in table.items() if k not in LOCAL_KEYS}))


def _file_row(path: Path, meta: dict[str, Any]) -> dict[str, Any]:
    sha256 = meta.pop("weights_sha256") if path.name == mf.WEIGHTS else mf.sha256_file(path)
    return {"bytes": path.stat().st_size, "sha256": sha256}


def _self_check(meta: dict[str, Any]) -> None:
    """What we are about to write is what a loader accepts."""
    try:
        mf.check(json.loads(mf.dump_manifest(meta)))
    except ArtifactError as e:
        raise ArtifactError(f"this model cannot be stored: {e}.") from e


def _flush(folder: Path) -> None:
    """Everything reaches the disk before the rename does."""
    for path in (*sorted(folder.iterdir()), folder):
        _fsync(path)


def _fsync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":
        return  # Windows does not open folders
    handle = os.open(path, os.O_RDONLY if path.is_dir() or os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def publish(folder: Path, out: Path, force: bool) -> None:
    """Move a finished artifact to OUT; the old one stays whole until then. Raises ArtifactError, OSError."""
    refuse_existing(out, force)  # somebody may have made it meanwhile
    aside = mf.aside_of(out)
    if os.path.lexists(out):
        shutil.rmtree(aside, ignore_errors=True)
        os.rename(out, aside)
    try:
        os.rename(folder, out)
    except OSError:
        if aside.is_dir():
            os.rename(aside, out)
        raise
    _fsync(out.parent)
    shutil.rmtree(aside, ignore_errors=True)


def _check_space(out: Path, need: int) -> None:
    free = shutil.disk_usage(out.parent).free
    if free < need:
        raise ArtifactError(_full(out, need, free))


def _full(out: Path, need: int, free: int) -> str:
    return (
        f"the disk is full: {out} needs {need} bytes, {free} are free in {out.parent.absolute()}; "
        "free some space, or give a folder on another disk with -o."
    )


def _os_error(out: Path, need: int, e: OSError) -> ArtifactError:
    if e.errno in FULL:
        return ArtifactError(_full(out, need, shutil.disk_usage(out.parent).free))
    return ArtifactError(
        f"{out} cannot be written ({e.strerror or e}); check the folder's permissions, or give another one with -o."
    )


def _lowbit_version() -> str:
    from lowbit import __version__

    return __version__


def _versions() -> dict[str, "str | None"]:
    from importlib.metadata import PackageNotFoundError, version

    try:
        transformers: str | None = version("transformers")
    except PackageNotFoundError:
        transformers = None
    return {"torch": torch.__version__, "transformers": transformers, "python": platform.python_version()}


def _plain_json(value: Any) -> Any:
    """A copy in JSON's own types; None is an empty table."""
    return json.loads(json.dumps({} if value is None else value, default=str))
