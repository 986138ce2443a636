"""The artifact: a compressed model in a folder, written whole or not at all, read with distrust.

    save(model, "out/", tokenizer=tokenizer)        a model whose layers are packed
    model = load("out/")                            a transformers model, from the folder alone
    net = load("out/", model=net)                   any other module: you bring the architecture

A loader checks every number before it uses it: lowbit.json by its own checksum, every file by size and SHA-256, the
safetensors header against the formats' shapes, every tensor's bytes as they are read, layer names and sizes against the
architecture. Nothing is unpickled.
"""

import copy
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lowbit.errors import ArtifactError
from lowbit.formats import tensor_specs
from lowbit.runtime import manifest as mf
from lowbit.runtime import swap
from lowbit.runtime.artifact_write import refuse_existing, write_artifact
from lowbit.runtime.manifest import load_manifest
from lowbit.runtime.safetensors_io import bytes_of, read_header, read_tensors
from lowbit.runtime.skeleton import names_by_tensor, new_skeleton, put
from lowbit.runtime.strict_json import AGAIN

__all__ = ["auto_class_of", "load", "load_manifest", "refuse_existing", "save", "verify_artifact", "write_artifact"]

# an encoder's class is in several of these: the first that fits is written
AUTO_CLASSES = (
    "AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForSeq2SeqLM", "AutoModelForSequenceClassification",
    "AutoModelForTokenClassification", "AutoModelForQuestionAnswering", "AutoModelForImageClassification", "AutoModel",
)  # fmt: skip
REPEATS = ("layer", "expert", "head", "depth")  # what config.json says there is many of ...
MAX_REPEATS, MAX_SIZE = 10_000, 1 << 26  # ... and the most of these, or of anything else, that is believed


def save(
    model: nn.Module,
    out: "Path | str",
    tokenizer: Any = None,
    recipe: "Mapping[str, Any] | None" = None,
    seed: int = 0,
    force: bool = False,
    *,
    source: "Mapping[str, Any] | None" = None,
    notes: "Mapping[str, Mapping[str, Any]] | None" = None,
) -> dict[str, Any]:
    """Write a model with packed layers to the folder OUT; returns the manifest.

    A transformers model becomes an artifact that loads by itself; any other module one of kind "module".
    notes: layer -> {"error", "sensitivity", "error_rtn"}, kept in the manifest.

    Raises ArtifactError as `write_artifact` does.
    """
    swap.check_module(model, "lowbit.save")
    packed = dict(swap.packed_modules(model))
    if prepared := next((n for n, m in model.named_modules() if hasattr(m, "parametrizations")), None):
        raise ArtifactError(f"{prepared or 'the model'} is prepared and not packed: call lowbit.pack(model) first.")
    if not packed:
        raise ArtifactError(
            "no layer of this model is packed: call lowbit.compress(model, ...) or lowbit.pack(model) first."
        )
    config = getattr(model, "config", None) if _is_transformers(model) else None
    kinds = _float_kinds(model, packed) if config is not None else {}
    layers: dict[str, dict[str, Any]] = {}
    tied: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    owners: dict[tuple[int, ...], str] = {}
    for name, module in packed.items():
        quantized = module.quantized()
        stored = quantized.tensors()
        owner = owners.setdefault(tuple(t.data_ptr() for t in stored.values() if t.numel()), name)
        if owner != name:
            if isinstance(module, swap.BINARY_LAYERS):
                raise ArtifactError(
                    f"{name!r} shares the 1-bit weights of {owner!r}: pack a copy of the layer instead."
                )
            tied[name] = owner
            continue
        kind = _own_kind(module) if isinstance(module, swap.BINARY_LAYERS) else kinds.get(name, _own_kind(module))
        layers[name] = {
            "type": kind,
            "meta": quantized.meta(),
            "bias": getattr(module, "bias", None) is not None,
        } | dict((notes or {}).get(name, {}))
        if kind in swap.BINARY:
            layers[name]["binary"] = module.describe()
        if kind.endswith("conv2d"):
            layers[name]["conv"] = swap.conv_options(module)
        tensors |= {f"{name}.{k}": t for k, t in stored.items()}
    return write_artifact(
        out,
        [*tensors.items(), *_plain_tensors(model, layers, tied).items()],
        layers,
        tied=tied,
        config=config,
        auto_class=None if config is None else auto_class_of(model),
        recipe=recipe,
        seed=seed,
        source=source,
        activations=next((m.activations for m in packed.values() if isinstance(m, swap.ROUNDING)), "float"),
        tokenizer=tokenizer,
        generation_config=getattr(model, "generation_config", None),
        force=force,
    )


def load(
    path: "Path | str",
    model: "nn.Module | None" = None,
    activations: "str | None" = None,
    device: Any = "cpu",
    verify: bool = True,
) -> nn.Module:
    """The model of an artifact, in eval mode, computing from its packed weights.

    model:       for kind "module": the float architecture, which is changed in place and returned
    activations: "float" (exact) or "int8"; None takes what was stored
    verify:      False skips the SHA-256 sums, and only those

    Raises ArtifactError for anything that is not a whole, untouched artifact.
    Memory: about the size of the packed file.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    mf.check_files(manifest, folder, verify, skip=[mf.WEIGHTS])
    config = mf.check_config(manifest, folder)
    activations = activations or config["quantization_config"]["activations"]
    model = _architecture(folder, manifest, config, model)
    swap.check_layers(model, manifest)
    swap.place_binary(model, manifest)
    tensors = {name: t.to(device) for name, t in _checked_tensors(folder, manifest, verify)}
    _check_plain(model, manifest, tensors)
    fill(model, manifest, tensors, activations)
    return model.to(device).eval()


def fill(model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor], activations: str) -> None:
    """Put plain tensors and packed layers into a checked architecture; a tensor of several names stays one."""
    plain = manifest["plain"]
    values: Any = model.state_dict(keep_vars=True)
    for names in names_by_tensor(model):
        stored = [n for n in names if n in plain]
        for name in names if stored else ():
            new: Any = tensors[name if name in plain else stored[0]]
            if isinstance(values[name], nn.Parameter):
                new = (
                    nn.Parameter(new, requires_grad=values[name].requires_grad)
                    if name in plain
                    else _at(model, stored[0])
                )
            put(model, name, new)
    keys = {name: list(row["tensors"]) for name, row in manifest["layers"].items()}
    swap.install(model, manifest, lambda name: {k: tensors[f"{name}.{k}"] for k in keys[name]}, activations)


def verify_artifact(path: "Path | str") -> dict[str, Any]:
    """Check everything that can be checked without building the model; returns what was found.

    {"path", "format_version", "kind", "files", "tensors", "bytes", "layers", "summary"}
    Raises ArtifactError on the first fault.
    """
    folder = Path(path)
    manifest = load_manifest(folder)
    mf.check_files(manifest, folder, skip=[mf.WEIGHTS])
    mf.check_config(manifest, folder)
    n_bytes = sum(t.nbytes for _, t in _checked_tensors(folder, manifest))
    return {
        "path": str(folder),
        "format_version": manifest["format_version"],
        "kind": manifest["kind"],
        "files": len(manifest["files"]),
        "tensors": len(mf.stored_tensors(manifest)),
        "bytes": n_bytes,
        "layers": len(manifest["layers"]),
        "summary": manifest["summary"],
    }


def auto_class_of(model: nn.Module) -> str:
    """The name of the transformers Auto class that builds this model. Raises ArtifactError for one of your own."""
    import transformers

    config: Any = model.config
    for name in AUTO_CLASSES:
        mapping = getattr(transformers, name)._model_mapping
        found = mapping[type(config)] if type(config) in mapping else ()  # noqa: SIM401  no plain dict
        if type(model) in (found if isinstance(found, (tuple, list)) else (found,)):
            return name
    raise ArtifactError(
        f"{type(model).__name__} belongs to none of transformers' Auto classes, so nothing could rebuild it; save "
        "the module inside it "
        "that you need, and give the architecture to lowbit.load(path, model=...)."
    )


def _checked_tensors(folder: Path, manifest: dict[str, Any], verify: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The safetensors file, read once; header, each tensor and the whole file are compared with the manifest."""
    path = folder / mf.WEIGHTS
    header = read_header(path)
    mf.check_header(manifest, header, path)
    stored, whole = mf.stored_tensors(manifest), hashlib.sha256()
    try:
        for name, tensor in read_tensors(path, header, whole.update if verify else None):
            if verify and hashlib.sha256(bytes_of(tensor)).hexdigest() != stored[name][2]["sha256"]:
                raise ArtifactError(
                    f"{path}: tensor {name!r} is damaged, its SHA-256 is not the one in {mf.NAME}; {AGAIN}."
                )
            yield name, tensor
    except OSError as e:
        raise ArtifactError(f"{path} cannot be read ({e.strerror}); {AGAIN}.") from e
    if verify and whole.hexdigest() != manifest["files"][mf.WEIGHTS]["sha256"]:
        raise ArtifactError(f"{path} is damaged: its SHA-256 is not the one in {mf.NAME}; {AGAIN}.")


def _check_plain(model: nn.Module, manifest: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Every weight and buffer of the architecture is packed or has exactly its plain tensor."""
    values: Any = model.state_dict(keep_vars=True)
    packed = {f"{name}.weight" for name in (*manifest["layers"], *manifest["tied"])}
    packed |= {f"{name}.{key}" for name, row in manifest["layers"].items() for key in row["tensors"]}
    strange = sorted(manifest["plain"].keys() - (values.keys() - packed))
    if strange:
        raise ArtifactError(f"tensor {strange[0]!r} has no place in {type(model).__name__}; {swap.ELSEWHERE}.")
    for names in names_by_tensor(model):
        rest = [n for n in names if n not in packed]
        if rest and not any(n in manifest["plain"] for n in rest):
            raise ArtifactError(
                f"{type(model).__name__} needs {rest[0]!r}, which the artifact lacks; {swap.ELSEWHERE}."
            )
        for name in rest:
            if name in tensors and not _fits(tensors[name], values[name]):
                raise ArtifactError(
                    f"tensor {name!r} is {tuple(tensors[name].shape)}, not {tuple(values[name].shape)}; "
                    f"{swap.ELSEWHERE}."
                )


def _fits(stored: Tensor, wanted: Tensor) -> bool:
    return stored.shape == wanted.shape and stored.is_floating_point() == wanted.is_floating_point()


def _architecture(
    folder: Path, manifest: dict[str, Any], config: dict[str, Any], model: "nn.Module | None"
) -> nn.Module:
    if manifest["kind"] == "module":
        if model is None:
            raise ArtifactError(
                f"{folder} holds a module of your own; give its architecture: lowbit.load({str(folder)!r}, model=net)."
            )
        return model
    if model is not None:
        raise ArtifactError(
            f"{folder} holds a transformers model, which needs no architecture: lowbit.load({str(folder)!r})."
        )
    return _transformers_skeleton(folder, manifest, config)


def _transformers_skeleton(folder: Path, manifest: dict[str, Any], table: dict[str, Any]) -> nn.Module:
    """Built from config.json alone, on no memory; generation settings loaded."""
    _check_sizes(folder, table)
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        float_config = copy.deepcopy(config)
        del float_config.quantization_config
        dtype = getattr(torch, str(table.get("dtype") or table.get("torch_dtype") or "float32"))
        model: Any = new_skeleton(float_config, getattr(transformers, manifest["auto_class"]), dtype)
        model.config.quantization_config = table["quantization_config"]
        model.config.name_or_path = str(folder)
        if "generation_config.json" in manifest["files"]:
            model.generation_config = transformers.GenerationConfig.from_pretrained(str(folder), local_files_only=True)
    except Exception as e:  # whatever a configuration that is not trusted sets off in transformers
        first = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ArtifactError(
            f"transformers {transformers.__version__} cannot build {folder} ({first}); it was written with "
            f"transformers {manifest['versions'].get('transformers')}: install that version, or {AGAIN}."
        ) from e
    swap.untie(model, manifest)
    return model


def _check_sizes(folder: Path, table: dict[str, Any]) -> None:
    """A damaged number in config.json must not make transformers build for hours or fill the memory."""
    for key, value in table.items():
        if isinstance(value, dict) and key != "quantization_config":
            _check_sizes(folder, value)
        limit = MAX_REPEATS if any(word in key for word in REPEATS) else MAX_SIZE
        if type(value) is int and value > limit and "theta" not in key:
            raise ArtifactError(f"{folder / mf.CONFIG}: {key} = {value} is more than any model has; {AGAIN}.")


def _plain_tensors(model: nn.Module, layers: Mapping[str, Any], tied: Mapping[str, str]) -> dict[str, Tensor]:
    """What the state dict holds beside packed tensors; a tensor of several names once, under its first."""
    skip = {f"{n}.{k}" for n, m in swap.packed_modules(model) for k in tensor_specs(m.meta)}
    values: Any = model.state_dict(keep_vars=True)
    return {names[0]: values[names[0]] for names in names_by_tensor(model) if names[0] not in skip}


def _float_kinds(model: nn.Module, packed: Mapping[str, nn.Module]) -> dict[str, str]:
    """What the packed layers of a transformers model were before, from its architecture."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    skeleton = new_skeleton(config, type(model))
    return {name: kind for name in packed if (kind := swap.kind_of(skeleton.get_submodule(name)))}


def _own_kind(module: nn.Module) -> str:
    return next(kind for kind, cls in swap.PACKED_KINDS.items() if isinstance(module, cls))


def _is_transformers(model: nn.Module) -> bool:
    return hasattr(model, "config") and hasattr(type(model), "_from_config")


def _at(model: nn.Module, name: str) -> Any:
    owner, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(owner), leaf)
