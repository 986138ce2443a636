"""Look into a compressed folder: every tensor's shape, format, bits and error; verifies all checksums.

lowbit inspect out
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, shell
from lowbit.report.words import number, size_words

ORDER = 50


def run(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder.")],
    layer: Annotated[str | None, typer.Option(help="Only layers with this in their name.")] = None,
    as_json: Json = False,
) -> None:
    from lowbit.errors import ArtifactError, near_names
    from lowbit.report.view import layers_of
    from lowbit.runtime.artifact import verify_artifact
    from lowbit.runtime.manifest import load_manifest

    sh = shell()
    found = verify_artifact(out)
    manifest = load_manifest(out)
    layers = [la for la in layers_of(manifest) if layer is None or layer in la.name]
    rows = [
        (la.name, "x".join(map(str, la.shape)), la.formats, f"{la.bits:.3f}", f"{la.bytes:,}", number(la.error))
        for la in layers
    ]
    sh.table(["layer", "shape", "format", ">bits", ">bytes", ">error"], rows)
    plain = [_plain(name, row) for name, row in manifest["plain"].items() if layer is None or layer in name]
    if layer and not layers and not plain:
        names = (*manifest["layers"], *manifest["plain"])
        raise ArtifactError(f"no layer has {layer!r} in its name. {near_names(layer, names)}")
    sh.table(
        ["left in high precision", "shape", "dtype", ">bytes"],
        [(p["name"], "x".join(map(str, p["shape"])), p["dtype"], f"{p['bytes']:,}") for p in plain],
    )
    for alias, owner in manifest["tied"].items():
        sh.say(f"{alias} shares the tensors of {owner}.")
    summary = manifest["summary"]
    sh.say(
        f"{summary['bits_per_weight']:.3f} bits per weight in the compressed layers, "
        f"{summary['bits_per_weight_file']:.3f} in the whole file; "
        f"{size_words(summary['bytes'])} of tensors, {size_words(summary['float_bytes'])} as float."
    )
    sh.say(f"All checksums are right: {found['files']} files, {found['tensors']} tensors.", "green")
    told = {k: manifest[k] for k in ("summary", "tied", "recipe", "seed", "versions")}
    counted = {"files": found["files"], "tensors": found["tensors"]}
    sh.result(
        {"path": str(out), "ok": True, **told, **counted, "layers": [_layer(la) for la in layers], "plain": plain}
    )


def _layer(la: Any) -> dict[str, Any]:
    return {
        "name": la.name,
        "format": la.formats,
        "shape": list(la.shape),
        "bits_per_weight": la.bits,
        "bytes": la.bytes,
        "error": la.error,
        "sensitivity": la.sensitivity,
    }


def _plain(name: str, row: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, "shape": row["shape"], "dtype": row["dtype"], "bytes": row["bytes"]}
