"""transformers loads artifacts: the same logits as lowbit.load, the same distrust."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from lowbit.errors import ArtifactError
from lowbit.runtime.artifact import load, save
from lowbit.runtime.layers import PackedLinear
from tests.runtime.tiny_models import IDS, MODELS, logits, packed


@pytest.fixture(autouse=True)
def _no_bars() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def from_pretrained(folder: Path, **options: Any) -> Any:
    name = json.loads((folder / "lowbit.json").read_text())["auto_class"]
    return getattr(transformers, name).from_pretrained(folder, **options)


@pytest.mark.parametrize("name", MODELS)
def test_from_pretrained_equals_lowbit_load(name: str, tmp_path: Path) -> None:
    save(packed(name), tmp_path / "out")
    model, info = from_pretrained(tmp_path / "out", output_loading_info=True)
    assert torch.equal(logits(model), logits(load(tmp_path / "out")))
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    assert not model.training and not any(p.is_meta for p in [*model.parameters(), *model.buffers()])


def test_a_shared_embedding_stays_shared(tmp_path: Path) -> None:
    save(packed("llama"), tmp_path / "out")
    model = from_pretrained(tmp_path / "out")
    assert isinstance(model.lm_head, PackedLinear) and model.lm_head.codes is model.model.embed_tokens.codes
    save(model, tmp_path / "again")
    first, again = ((tmp_path / out / "model.safetensors").read_bytes() for out in ("out", "again"))
    assert first == again


def test_it_generates(tmp_path: Path) -> None:
    model = packed("llama")
    model.generation_config.max_new_tokens = 5
    save(model, tmp_path / "out")
    ways = [from_pretrained(tmp_path / "out"), load(tmp_path / "out"), model]
    tokens = [m.generate(IDS, attention_mask=torch.ones_like(IDS), do_sample=False, min_new_tokens=5) for m in ways]
    assert tokens[0].shape == (1, IDS.shape[1] + 5)
    assert torch.equal(tokens[0], tokens[1]) and torch.equal(tokens[0], tokens[2])


def test_activations_and_dtype_follow_config_and_request(tmp_path: Path) -> None:
    save(packed("llama", activations="int8"), tmp_path / "out")
    model = from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.activations == "int8"
    half = from_pretrained(tmp_path / "out", **{_dtype_word(): torch.bfloat16})
    assert half.model.norm.weight.dtype == torch.bfloat16 and logits(half).dtype == torch.bfloat16
    assert half.model.embed_tokens.scale.dtype == torch.float16, "stored scales are never rounded"


def _dtype_word() -> str:
    from lowbit.runtime.skeleton import dtype_word

    return dtype_word()


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "lowbit.json", "generation_config.json"])
def test_a_changed_file_is_refused(name: str, tmp_path: Path) -> None:
    save(packed("llama"), tmp_path / "out")
    path = tmp_path / "out" / name
    raw = bytearray(path.read_bytes())
    at = raw.index(b"initializer_range") if name == "config.json" else len(raw) - 9
    raw[at] ^= 1
    path.write_bytes(raw)
    with pytest.raises(ArtifactError, match="damaged|checksum"):
        from_pretrained(tmp_path / "out")


def test_a_folder_without_its_manifest_is_refused(tmp_path: Path) -> None:
    save(packed("llama"), tmp_path / "out")
    (tmp_path / "out" / "lowbit.json").unlink()
    with pytest.raises(ArtifactError, match="no lowbit artifact"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_float_models_are_not_quantized_on_the_way_in(tmp_path: Path) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING

    MODELS["llama"]().save_pretrained(tmp_path / "float")
    with pytest.raises(ArtifactError, match="lowbit compress MODEL"):
        transformers.AutoModelForCausalLM.from_pretrained(
            tmp_path / "float", quantization_config=AUTO_QUANTIZATION_CONFIG_MAPPING["lowbit"]()
        )


def test_the_tokenizer_travels_along_and_is_deterministic(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = {"<unk>": 0, "hello": 1, "world": 2}
    inner = Tokenizer(models.WordLevel(words, "<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")
    save(packed("llama"), tmp_path / "a", tokenizer=tokenizer)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path / "a")
    assert again("hello world")["input_ids"] == [1, 2]
    save(packed("llama"), tmp_path / "b", tokenizer=tokenizer)
    for name in ("tokenizer.json", "tokenizer_config.json", "lowbit.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    save(packed("llama"), tmp_path / "c", tokenizer=again)
    assert str(tmp_path) not in (tmp_path / "c" / "tokenizer_config.json").read_text()


def test_the_hook_runs_once_after_its_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from importlib import import_module

    from lowbit._hook import after_import

    (tmp_path / "module_of_a_test.py").write_text("value = 1")
    monkeypatch.syspath_prepend(str(tmp_path))
    finders, calls = list(sys.meta_path), []
    after_import("module_of_a_test", lambda: calls.append(sys.modules["module_of_a_test"].value))
    assert calls == []
    module: Any = import_module("module_of_a_test")
    assert calls == [1] and sys.meta_path == finders
    assert type(module.__loader__) is type(module.__spec__.loader) is not None
    after_import("module_of_a_test", lambda: calls.append(2))
    assert calls == [1, 2]


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import lowbit, transformers", "import transformers, lowbit", "import transformers.quantizers, lowbit"]
)
def test_registered_whichever_is_imported_first(imports: str) -> None:
    code = (
        f"import sys; {imports}; from transformers.quantizers.auto import *; import transformers.quantizers.auto as a; "
        "print('lowbit' in a.AUTO_QUANTIZER_MAPPING and 'lowbit' in a.AUTO_QUANTIZATION_CONFIG_MAPPING, "
        "[f for f in sys.meta_path if type(f).__module__.startswith('lowbit.')], a.__spec__.loader.__class__.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "[]", "SourceFileLoader"]
