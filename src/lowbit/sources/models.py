"""`open_model`: a name or a path -> the source that reads it.

    model.gguf                          one GGUF file
    folder/                             config.json + model.safetensors (or shards), or exactly one .gguf
    Qwen/Qwen2.5-0.5B                   a Hugging Face hub name: downloaded once, then a folder

Pickled weights (.bin, .pt, ...) are never opened: unpickling runs whatever code the file contains.
"""

import os
import re
from pathlib import Path

from lowbit.errors import ModelError
from lowbit.sources.base import ModelSource
from lowbit.sources.gguf import GgufSource
from lowbit.sources.safetensors import SafetensorsSource

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle", ".th")
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
HUB_FILES = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
CONVERT = (
    'convert it where you trust it: `python -c "from transformers import AutoModel as M; '
    "M.from_pretrained('FOLDER').save_pretrained('NEW')\"`, then give NEW"
)


def open_model(name_or_path: str | os.PathLike[str]) -> ModelSource:
    """Open a float model for reading; only headers are read. Raises ModelError with what to type instead."""
    text = os.fspath(name_or_path)
    path = Path(text).expanduser()
    if path.is_file():
        return _open_file(path)
    if path.is_dir():
        return _open_folder(path)
    if path.exists():
        raise ModelError(f"{text} is no regular file; give a .gguf file or a model folder.")
    if path.suffix.lower() in (".gguf", ".safetensors", *PICKLES) or not HUB_NAME.fullmatch(text):
        raise ModelError(
            f"{text}: no such file or folder; check the path, or give a hub name such as "
            "HuggingFaceTB/SmolLM2-135M-Instruct."
        )
    return SafetensorsSource(_download(text), name=text, kind="hub")


def _open_file(path: Path) -> ModelSource:
    with open(path, "rb") as file:
        begin = file.read(512)
    if begin[:4] == b"GGUF" or path.suffix.lower() == ".gguf":
        if begin[:4] != b"GGUF" and begin and _is_text(begin):
            raise ModelError(
                f"{path} is a text, not a GGUF file (often a download page or a Git LFS pointer); "
                "download the file itself again."
            )
        return GgufSource(path)
    if path.suffix.lower() in PICKLES:
        raise ModelError(f"{path} is a pickle, which lowbit never opens; {CONVERT}.")
    if path.suffix.lower() == ".safetensors":
        raise ModelError(f"{path} holds weights only; give its folder, {path.parent}, with the config.json beside it.")
    what = "is a text" if _is_text(begin) else "is not a model file"
    hint = " (a text for calibration goes to --data)" if _is_text(begin) else ""
    raise ModelError(f"{path} {what}; give a .gguf file, a model folder or a hub name{hint}.")


def _is_text(begin: bytes) -> bool:
    if b"\0" in begin:
        return False
    try:
        begin.decode("utf-8")
    except UnicodeDecodeError as e:
        return e.start > len(begin) - 4  # a character cut in half at the end
    return True


def _open_folder(path: Path) -> ModelSource:
    if (path / "lowbit.json").is_file():
        raise ModelError(
            f"{path} is compressed already; give the float model it came from, "
            f"or run it: `lowbit eval {path} --text FILE`."
        )
    ggufs = sorted(path.glob("*.gguf"))
    if not (path / "config.json").is_file() and ggufs:
        if len(ggufs) > 1:
            raise ModelError(f"{path} has {len(ggufs)} .gguf files; name one of them, e.g. {ggufs[0]}.")
        return GgufSource(ggufs[0])
    _check_folder(path)
    return SafetensorsSource(path)


def _check_folder(path: Path) -> None:
    pickles = sorted(p for p in path.iterdir() if p.suffix.lower() in PICKLES and p.name != "training_args.bin")
    if pickles and not list(path.glob("*.safetensors")):
        raise ModelError(
            f"{path} holds its weights as a pickle ({pickles[0].name}), which lowbit never opens; {CONVERT}."
        )
    if not (path / "config.json").is_file():
        raise ModelError(
            f"{path} has no config.json and no .gguf file; give a model folder, a .gguf file or a hub name."
        )


def _download(name: str) -> Path:
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except Exception as e:  # the hub client raises its own, requests' and httpx' errors: all mean "not fetched"
        first = (str(e).strip().splitlines() or [""])[0]
        raise ModelError(
            f"{name!r} is no file or folder here, and could not be fetched from the hub ({type(e).__name__}: {first}); "
            f"check the name, or on a machine with network type `hf download {name} --local-dir DIR` and give DIR."
        ) from e
    _check_folder(folder)
    return folder
