"""transformers reads artifacts: `AutoModelForCausalLM.from_pretrained(OUT)` after `import lowbit`.

transformers asks the quantizer named in config.json twice: before the weights are read every packed layer's place is
taken by its empty tensors, which transformers then fills from model.safetensors; afterwards the real layers are built
from them, with the checks and sharing that `lowbit.load` has. Checksums are verified first. `register` runs when
transformers.quantizers is imported (see lowbit/_hook.py), so nothing here imports transformers before the user does.
"""

from pathlib import Path
from typing import Any

from lowbit.errors import ArtifactError
from lowbit.runtime import manifest as mf
from lowbit.runtime import swap
from lowbit.runtime.safetensors_io import read_header, read_tensor
from lowbit.runtime.strict_json import AGAIN

METHOD = "lowbit"


def register() -> None:
    """Make "lowbit" known to transformers. Calling it again does nothing."""
    from transformers.quantizers import auto

    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        config, quantizer = _classes()
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = config
        auto.AUTO_QUANTIZER_MAPPING[METHOD] = quantizer


def artifact_folder(checkpoint: "str | None", config: Any) -> Path:
    """The folder from_pretrained reads: that of the checkpoint file, with lowbit.json in it. Raises ArtifactError.

    From the hub transformers fetches only the files it knows; then lowbit.json is fetched from the same revision.
    """
    folder = Path(checkpoint).parent if checkpoint else Path(getattr(config, "_name_or_path", ""))
    commit = getattr(config, "_commit_hash", None)
    if not (folder / mf.NAME).is_file() and commit:
        from transformers.utils import cached_file

        for name in (mf.NAME, mf.CONFIG):
            cached_file(config._name_or_path, name, revision=commit)
    return folder


def checked_manifest(folder: Path) -> dict[str, Any]:
    """The manifest, after every file that this path uses was compared with it. Raises ArtifactError."""
    manifest = mf.load_manifest(folder)
    used = {
        name: row
        for name, row in manifest["files"].items()
        if name in (mf.CONFIG, mf.WEIGHTS) or (folder / name).is_file()
    }
    mf.check_files(manifest | {"files": used}, folder)
    mf.check_config(manifest, folder)
    path = folder / mf.WEIGHTS
    mf.check_header(manifest, read_header(path), path)
    return manifest


def _classes() -> tuple[Any, Any]:
    from transformers.quantizers.base import HfQuantizer
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class LowbitConfig(QuantizationConfigMixin):
        """quantization_config of config.json: which layers are packed, and how."""

        def __init__(
            self,
            format_version: int = mf.FORMAT_VERSION,
            activations: str = "float",
            layers: Any = None,
            tied: Any = None,
            **_: Any,
        ):
            self.quant_method: Any = METHOD
            self.format_version = format_version
            self.activations = activations
            self.layers = layers or {}
            self.tied = tied or {}

    class LowbitQuantizer(HfQuantizer):
        """Reads artifacts; compressing is `lowbit compress`."""

        quantization_config: Any
        manifest: dict[str, Any]
        asked_dtype: Any = None

        def validate_environment(self, *args: Any, **kwargs: Any) -> None:
            if not self.pre_quantized:
                raise ArtifactError(
                    "from_pretrained cannot compress; run lowbit compress MODEL -o OUT, then from_pretrained(OUT)."
                )

        def update_dtype(self, dtype: Any) -> Any:
            self.asked_dtype = dtype
            return dtype

        def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
            """Plain weights keep their stored dtype unless another than the model's own was asked for."""
            return None if self.asked_dtype == self.own_dtype else super().get_new_dtype(converter, param, dtype)

        def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
            if checkpoint_files and [Path(f).name for f in checkpoint_files] != [mf.WEIGHTS]:
                raise ArtifactError(
                    f"config.json sends transformers to {checkpoint_files[0]}, not to {mf.WEIGHTS}; {AGAIN}."
                )
            self.folder = artifact_folder(checkpoint_files[0] if checkpoint_files else None, model.config)
            self.manifest = checked_manifest(self.folder)
            self.own_dtype = own_dtype(mf.check_config(self.manifest, self.folder))
            swap.check_layers(model, self.manifest)
            swap.reserve(model, self.manifest)
            swap.untie(model, self.manifest)
            return model

        def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
            path, header = self.folder / mf.WEIGHTS, read_header(self.folder / mf.WEIGHTS)

            def tensors_of(name: str) -> dict[str, Any]:
                buffers = dict(model.get_submodule(name).named_buffers())
                for key, t in buffers.items():  # transformers 4 casts every float tensor to the model's dtype
                    if t.dtype != header.entries[f"{name}.{key}"].dtype:
                        buffers[key] = read_tensor(path, header, f"{name}.{key}").to(t.device)
                return buffers

            swap.install(model, self.manifest, tensors_of, self.quantization_config.activations)
            return model.eval()

        def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
            return False  # save_pretrained knows neither checksums nor shared packed tensors: lowbit.save does

        @property
        def is_trainable(self) -> bool:
            return False

    return LowbitConfig, LowbitQuantizer


def own_dtype(config: dict[str, Any]) -> Any:
    """The dtype config.json names, as torch's."""
    import torch

    return getattr(torch, str(config.get("dtype") or config.get("torch_dtype") or "float32"), None)
