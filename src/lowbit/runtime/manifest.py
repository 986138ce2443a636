"""lowbit.json: what an artifact consists of, with a checksum for everything, its own text included.

    {"format_version": 1, "lowbit_version", "checksum", "kind": "transformers" | "module", "auto_class",
     "recipe", "seed", "versions", "source",
     "layers": {module: {"type", "meta", "bias", "bytes", "bits_per_weight", "error", "sensitivity", "error_rtn",
                         "tensors": {key: {"bytes", "sha256"}}, "conv"?, "binary"?}},
     "tied":   {module: the module whose packed tensors it shares},
     "plain":  {tensor: {"shape", "dtype", "bytes", "sha256"}},
     "summary": {"bits_per_weight", "bits_per_weight_file", "bytes", "weights", "float_bytes"},
     "files":  {name: {"bytes", "sha256"}}}

`checksum` is the SHA-256 of the file's own bytes with these 64 digits replaced by zeros. What decides the weights'
values (layers and ties) stands a second time in config.json, and the two must agree. Times and machines stay out: equal
inputs give equal bytes.
"""

import hashlib
import math
import re
from collections.abc import Iterable
from math import prod
from pathlib import Path
from typing import Any

import torch

from lowbit.errors import ArtifactError, LowbitError
from lowbit.formats import tensor_specs
from lowbit.runtime.safetensors_io import DTYPES, NAMES, Entry, Header
from lowbit.runtime.strict_json import AGAIN, canonical_json, parse_json, read_limited

FORMAT_VERSION = 1
NAME = "lowbit.json"
WEIGHTS = "model.safetensors"
CONFIG = "config.json"
TYPES = ("linear", "embedding", "conv1d", "conv2d", "binary_linear", "binary_conv2d")
KINDS = ("transformers", "module")
UNCHECKED = (NAME, "run.json", "report.html")  # not listed under "files"
CONV_KEYS = ("stride", "padding", "dilation", "groups", "padding_mode")
ZEROS = "0" * 64

_TOP = {
    "format_version": int, "lowbit_version": str, "checksum": str, "kind": str, "auto_class": (str, type(None)),
    "recipe": dict, "seed": int, "versions": dict, "source": dict, "layers": dict, "tied": dict,
    "plain": dict, "summary": dict, "files": dict,
}  # fmt: skip
_LAYER = {"type": str, "meta": dict, "bias": bool, "bytes": int, "bits_per_weight": (int, float), "tensors": dict}
_BINARY = {"inputs": str, "pad": int, "extras": dict, "folded": list}
_STORED = {"bytes": int, "sha256": str}
_PLAIN = _STORED | {"shape": list, "dtype": str}


def load_manifest(path: "Path | str") -> dict[str, Any]:
    """lowbit.json of an artifact folder, checksum verified, every number cross-checked. Other files are not touched.

    Raises ArtifactError.
    """
    file = Path(path) / NAME
    if not Path(path).is_dir():
        raise ArtifactError(_no_folder(Path(path)))
    if not file.is_file():
        raise ArtifactError(
            f"{path} has no {NAME} and so is no lowbit artifact; make one with lowbit compress MODEL -o {path}."
        )
    raw = read_limited(file)
    manifest = parse_json(raw, str(file))
    if (
        isinstance(manifest, dict)
        and type(manifest.get("format_version")) is int
        and manifest["format_version"] > FORMAT_VERSION
    ):
        maker = manifest.get("lowbit_version")
        raise ArtifactError(
            f"{path} has artifact format {manifest['format_version']}, written by lowbit {maker}; this one "
            f"reads up to {FORMAT_VERSION}: pip install -U 'lowbit>={maker}'."
        )
    try:
        _fields(manifest, _TOP, NAME)
        _check_checksum(raw, manifest["checksum"])
        check(manifest)
    except ArtifactError as e:
        raise ArtifactError(f"{file}: {e}; {AGAIN}.") from e
    return manifest


def dump_manifest(manifest: dict[str, Any]) -> bytes:
    """The file's bytes, checksum filled in."""
    text = canonical_json(manifest | {"checksum": ZEROS}).encode()
    return text.replace(ZEROS.encode(), hashlib.sha256(text).hexdigest().encode(), 1)


def quantization_config(manifest: dict[str, Any], activations: str = "float") -> dict[str, Any]:
    """What config.json says about the layers, for transformers and as a second witness."""
    keys = ("type", "meta", "bias", "conv", "binary")
    layers = {name: {k: row[k] for k in keys if k in row} for name, row in manifest["layers"].items()}
    return {
        "quant_method": "lowbit",
        "format_version": manifest["format_version"],
        "activations": activations,
        "layers": layers,
        "tied": manifest["tied"],
    }


def stored_tensors(manifest: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], torch.dtype, dict[str, Any]]]:
    """Every tensor of the safetensors file: name -> (shape, dtype, {"bytes", "sha256"})."""
    table = {}
    for name, row in manifest["layers"].items():
        for key, (shape, dtype) in tensor_specs(row["meta"]).items():
            table[f"{name}.{key}"] = (tuple(shape), dtype, row["tensors"][key])
    for name, row in manifest["plain"].items():
        table[name] = (tuple(row["shape"]), DTYPES[row["dtype"]], row)
    return table


def check_header(manifest: dict[str, Any], header: Header, path: Path) -> None:
    """Raise ArtifactError unless the safetensors header holds exactly the tensors of the manifest."""
    wanted = stored_tensors(manifest)
    odd = sorted(wanted.keys() ^ header.entries.keys())
    if odd:
        raise ArtifactError(
            f"{path}: tensor {odd[0]!r} is {'missing' if odd[0] in wanted else 'not in ' + NAME}; {AGAIN}."
        )
    for name, (shape, dtype, _) in wanted.items():
        e: Entry = header.entries[name]
        if e.shape != shape or e.dtype != dtype:
            raise ArtifactError(
                f"{path}: tensor {name!r} is {e.shape} {NAMES[e.dtype]}, needed {shape} {NAMES[dtype]}; {AGAIN}."
            )


def check_files(manifest: dict[str, Any], folder: Path, verify: bool = True, skip: Iterable[str] = ()) -> None:
    """Raise ArtifactError unless every listed file is there with its size and, if verify, its SHA-256."""
    for name, row in manifest["files"].items():
        path = folder / name
        try:
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; {AGAIN}.")
            if path.stat().st_size != row["bytes"]:
                raise ArtifactError(
                    f"{path} has {path.stat().st_size} bytes, not the {row['bytes']} it was written with; {AGAIN}."
                )
            if verify and name not in skip and sha256_file(path) != row["sha256"]:
                raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {NAME}; {AGAIN}.")
        except OSError as e:
            raise ArtifactError(f"{path} cannot be read ({e.strerror}); check its permissions, or {AGAIN}.") from e


def check_config(manifest: dict[str, Any], folder: Path) -> dict[str, Any]:
    """config.json, after comparing its quantization_config with the manifest. Raises ArtifactError."""
    path = folder / CONFIG
    config = parse_json(read_limited(path), str(path))
    found = config.get("quantization_config") if isinstance(config, dict) else None
    activations = found.get("activations") if isinstance(found, dict) else None
    if activations not in ("float", "int8") or found != quantization_config(manifest, activations):
        raise ArtifactError(f"{path}: quantization_config does not agree with {NAME}; {AGAIN}.")
    return config


def sha256_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def summarize(layers: dict[str, Any], plain: dict[str, Any], float_bytes: int | None = None) -> dict[str, Any]:
    """Sizes counted from the stored bytes.

    bits_per_weight is over the compressed layers inside blocks (those with a number in their name; without any, all),
    embeddings excluded; bits_per_weight_file over every stored byte and weight.
    """
    weights = {name: prod(row["meta"]["shape"]) for name, row in layers.items()}
    inner = [n for n, row in layers.items() if row["type"] != "embedding"]
    inner = [n for n in inner if any(word.isdigit() for word in n.split("."))] or inner or list(layers)
    n_all = sum(weights.values()) + sum(prod(row["shape"]) for row in plain.values())
    n_bytes = sum(row["bytes"] for row in (*layers.values(), *plain.values()))
    return {
        "bits_per_weight": 8 * sum(layers[n]["bytes"] for n in inner) / max(1, sum(weights[n] for n in inner)),
        "bits_per_weight_file": 8 * n_bytes / max(1, n_all),
        "bytes": n_bytes,
        "weights": n_all,
        "float_bytes": 4 * n_all if float_bytes is None else float_bytes,
    }


def check(manifest: dict[str, Any]) -> None:
    """Cross-check a parsed manifest; the message says what is wrong, the caller adds where."""
    _need(manifest["format_version"] == FORMAT_VERSION, f"format_version {manifest['format_version']} is unknown")
    _need(manifest["kind"] in KINDS, f"kind {manifest['kind']!r} is unknown")
    auto = manifest["auto_class"]
    _need(
        manifest["kind"] == "module" or bool(re.fullmatch(r"AutoModel\w{0,60}", auto or "")),
        f"auto_class {auto!r} is no transformers Auto class",
    )
    for name, row in manifest["layers"].items():
        _check_layer(name, row)
    for name, row in manifest["plain"].items():
        _check_plain(name, row)
    _check_tied(manifest)
    _check_files_table(manifest["files"])
    count = sum(len(row["tensors"]) for row in manifest["layers"].values()) + len(manifest["plain"])
    _need(len(stored_tensors(manifest)) == count, "two tensors share a name")
    counted, told = summarize(manifest["layers"], manifest["plain"]), manifest["summary"]
    _fields(told, {"bits_per_weight": (int, float), "float_bytes": int}, "summary")
    _need(
        all(told.get(k) == counted[k] for k in ("bytes", "weights", "bits_per_weight_file")),
        "the summary does not follow from the layers",
    )


def _check_layer(name: str, row: Any) -> None:
    where = f"layer {name!r}"
    _check_name(name)
    _fields(row, _LAYER, where)
    _need(row["type"] in TYPES, f"{where} has the unknown type {row['type']!r}")
    try:
        specs = tensor_specs(row["meta"])
    except (LowbitError, ValueError, TypeError, AttributeError, LookupError, ArithmeticError) as e:
        raise ArtifactError(f"{where}: {e}") from e
    shape = row["meta"]["shape"]
    _need(
        all(type(s) is int for s in shape) and len(shape) == (4 if row["type"].endswith("conv2d") else 2),
        f"{where} has the impossible shape {shape}",
    )
    _need(set(specs) == set(row["tensors"]), f"{where} lists tensors its format does not have")
    for key, (spec_shape, dtype) in specs.items():
        _check_stored(f"{where}, tensor {key!r}", row["tensors"][key], prod(spec_shape) * dtype.itemsize)
    total = sum(t["bytes"] for t in row["tensors"].values())
    _need(
        row["bytes"] == total and row["bits_per_weight"] == 8 * total / max(1, prod(shape)),
        f"{where}: bytes do not add up",
    )
    for key in ("error", "sensitivity", "error_rtn"):
        value = row.get(key)
        _need(
            value is None or (type(value) in (int, float) and math.isfinite(value)), f"{where}: {key} is not a number"
        )
    if row["type"].startswith("binary"):
        _check_binary(where, row)
    if row["type"].endswith("conv2d"):
        _fields(row.get("conv"), dict.fromkeys(CONV_KEYS, (int, list, str)), f"{where}, conv")


def _check_binary(where: str, row: dict[str, Any]) -> None:
    _fields(row.get("binary"), _BINARY, f"{where}, binary")
    extras, folded = row["binary"]["extras"], row["binary"]["folded"]
    sizes = [s for shape in extras.values() if isinstance(shape, list) for s in shape]
    _need(
        set(extras) <= {"high", "low", "gain", "prelu"}
        and all(isinstance(shape, list) and len(shape) in (1, 2) for shape in extras.values())
        and all(type(s) is int and 0 < s < 2**31 for s in sizes),
        f"{where} has impossible extras",
    )
    for name in folded:
        _need(isinstance(name, str), f"{where} has folded {str(name)[:40]!r}")
        _check_name(name)


def _check_plain(name: str, row: Any) -> None:
    _check_name(name)
    _fields(row, _PLAIN, f"tensor {name!r}")
    ok = (
        row["dtype"] in DTYPES
        and len(row["shape"]) <= 8
        and all(type(s) is int and 0 <= s < 2**48 for s in row["shape"])
    )
    _need(ok, f"tensor {name!r} has an impossible shape or dtype")
    _check_stored(f"tensor {name!r}", row, prod(row["shape"]) * DTYPES[row["dtype"]].itemsize)


def _check_stored(where: str, row: Any, n_bytes: int) -> None:
    _fields(row, _STORED, where)
    _need(row["bytes"] == n_bytes, f"{where} has {row['bytes']} bytes, its shape needs {n_bytes}")
    _need(bool(re.fullmatch("[0-9a-f]{64}", row["sha256"])), f"{where} has no SHA-256")


def _check_tied(manifest: dict[str, Any]) -> None:
    for alias, owner in manifest["tied"].items():
        _check_name(alias)
        ok = isinstance(owner, str) and owner in manifest["layers"] and alias not in manifest["layers"]
        _need(ok, f"tied layer {alias!r} shares the weights of {owner!r}, which is no layer")


def _check_files_table(files: dict[str, Any]) -> None:
    for needed in (WEIGHTS, CONFIG):
        _need(needed in files, f"{needed} is not listed")
    for name, row in files.items():
        plain = re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.\-]{0,120}", name)  # no folders, no "..", no hidden files
        _need(bool(plain) and name not in UNCHECKED, f"the listed file {name!r} is not a plain file name")
        _fields(row, _STORED, f"file {name!r}")
        _need(
            row["bytes"] >= 0 and bool(re.fullmatch("[0-9a-f]{64}", row["sha256"])),
            f"file {name!r} has no size or SHA-256",
        )


def _check_checksum(raw: bytes, checksum: str) -> None:
    digits = checksum.encode()
    right = re.fullmatch(rb"[0-9a-f]{64}", digits) and raw.count(digits) == 1
    _need(
        bool(right) and hashlib.sha256(raw.replace(digits, ZEROS.encode())).hexdigest() == checksum,
        "the checksum is wrong, the file was changed",
    )


def _check_name(name: str) -> None:
    _need(
        bool(re.fullmatch(r"[^\s/\\\x00.]+(\.[^\s/\\\x00.]+)*", name)) and len(name) < 1000,
        f"{name[:80]!r} is no module or tensor name",
    )


def _fields(row: Any, kinds: dict[str, Any], where: str) -> None:
    """Every field is there with its JSON type (true and false are not numbers)."""
    _need(isinstance(row, dict), f"{where} is not a table")
    for key, kind in kinds.items():
        _need(key in row, f"{where} lacks {key!r}")
        fits = isinstance(row[key], kind) and (kind is bool or not isinstance(row[key], bool))
        _need(
            fits and (not isinstance(row[key], float) or math.isfinite(row[key])),
            f"{where}: {key!r} is {str(row[key])[:40]!r}",
        )


def _need(condition: bool, message: str) -> None:
    if not condition:
        raise ArtifactError(message)


def _no_folder(path: Path) -> str:
    aside = aside_of(path)
    if aside.is_dir():
        return (
            f"{path} is missing: replacing it was interrupted. The earlier artifact is {aside}; "
            "rename it back, or re-run lowbit compress."
        )
    return f"{path} is not a folder; give the folder that lowbit compress wrote."


def aside_of(out: Path) -> Path:
    """Where an artifact waits while a new one takes its place."""
    return out.parent / f".{out.name}.lowbit-old"
