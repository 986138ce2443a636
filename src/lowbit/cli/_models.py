"""A model to run: a compressed folder, or a float model (.gguf, folder, hub name) for comparison."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lowbit.errors import ArtifactError


@dataclass(frozen=True)
class Runnable:
    """A loaded model, how to get its tokenizer, and what its weights weigh in the file.

    manifest: of an artifact; None for a float model
    """

    model: Any
    tokenizer: Callable[[], Any]
    bytes: int
    activations: str
    manifest: "dict[str, Any] | None" = None


def is_artifact(path: str) -> bool:
    """Folders that lowbit wrote, damaged ones included: those must fail, not be taken for something else."""
    return (Path(path) / "lowbit.json").is_file()


def open_runnable(path: str, activations: "str | None" = None) -> Runnable:
    """Load an artifact or a float model. Raises ArtifactError or ModelError."""
    return _artifact(path, activations) if is_artifact(path) else _float(path, activations)


def _artifact(path: str, activations: "str | None") -> Runnable:
    from lowbit.runtime.artifact import load
    from lowbit.runtime.manifest import load_manifest

    manifest = load_manifest(path)
    if manifest["kind"] != "transformers":
        raise ArtifactError(
            f"{path} holds a network of your own, not a language model: load it in Python with "
            f"lowbit.load({path!r}, model=net), where net is its architecture."
        )
    model: Any = load(path, activations=activations)
    used = model.config.quantization_config["activations"]
    return Runnable(model, lambda: _tokenizer(path), manifest["summary"]["bytes"], activations or used, manifest)


def _float(path: str, activations: "str | None") -> Runnable:
    from lowbit.errors import RecipeError
    from lowbit.sources import fill, open_model

    if activations == "int8":
        raise RecipeError(f"{path} is a float model: --activations is for compressed ones. Leave it out.")
    source = open_model(path)
    model = source.new_skeleton()
    fill(model, source)
    return Runnable(model.float(), source.load_tokenizer, source.nbytes_float, "float")


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError) as e:
        raise ArtifactError(
            f"{path} has no tokenizer that transformers can read ({str(e).splitlines()[0]}); compress the model again."
        ) from e
