"""Sources against what transformers itself says: names, shapes, values, logits."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lowbit.errors import ModelError
from lowbit.sources import check_finite, drop, fill, models, new_skeleton, open_model, skeleton
from tests.sources import tiny_models as tiny

KINDS = list(tiny.CONFIGS)
IDS = torch.arange(12)[None] * 5 % tiny.VOCAB


def saved(tmp_path: Path, kind: str = "llama", **options: object) -> tuple[Path, torch.nn.Module]:
    net = tiny.model(kind)
    net.save_pretrained(tmp_path / kind, **options)
    return tmp_path / kind, net


def logits(net: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return net(input_ids=IDS).logits


@pytest.mark.parametrize("shard", [None, "20KB"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_folder_gives_the_same_model_back(tmp_path, kind, shard):
    folder, net = saved(tmp_path, kind, **({"max_shard_size": shard} if shard else {}))
    assert len(list(folder.glob("*.safetensors"))) > (shard is not None)
    source, state = open_model(folder), net.state_dict()
    assert set(source.keys()) | set(source.tied) == set(state)
    for name in source:
        assert source.shape(name) == tuple(state[name].shape)
        assert torch.equal(source.get(name), state[name]) and source.get(name).dtype == source.dtype(name)
    skeleton = source.new_skeleton()
    assert type(skeleton) is type(net) and not skeleton.training
    assert all(p.is_meta for p in skeleton.parameters()) and not any(b.is_meta for b in skeleton.buffers())
    skeleton.load_state_dict({n: source.get(n) for n in source}, assign=True, strict=False)
    skeleton.tie_weights()
    assert torch.equal(logits(skeleton), logits(net))
    again = source.new_skeleton()
    fill(again, source)
    assert torch.equal(logits(again), logits(net))


@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt", "bert"])
def test_a_tied_head_is_one_tensor(tmp_path, kind):
    source = open_model(saved(tmp_path, kind)[0])
    alias = next(a for a in source.tied if a.endswith("weight"))
    assert alias in source and alias not in list(source)
    assert torch.equal(source.get(alias), source.get(source.tied[alias]))
    net = source.new_skeleton()
    fill(net, source)
    assert net.get_parameter(alias) is net.get_parameter(source.tied[alias])
    drop(net, [source.tied[alias]])
    assert net.get_parameter(source.tied[alias]).is_meta and not net.get_parameter(alias).is_meta


def test_get_gives_memory_of_its_own(tmp_path):
    source = open_model(saved(tmp_path)[0])
    name = source.keys()[0]
    w = source.get(name)
    before = w.clone()
    w.zero_()
    assert torch.equal(source.get(name), before) and source.get(name).data_ptr() % 64 == 0


def test_counts_and_one_line(tmp_path):
    folder, net = saved(tmp_path)
    source = open_model(folder)
    assert source.numel == sum(p.numel() for p in net.parameters()) and source.nbytes_float == 4 * source.numel
    assert source.kind in source.describe() and "\n" not in source.describe()


def test_half_precision_stays_as_stored(tmp_path):
    tiny.model("llama").to(torch.bfloat16).save_pretrained(tmp_path / "m")
    source = open_model(tmp_path / "m")
    assert {source.get(n).dtype for n in source} == {torch.bfloat16}
    assert source.nbytes_float == 2 * source.numel
    net = source.new_skeleton()
    assert next(net.buffers()).dtype == torch.float32


def test_fingerprint_follows_contents_not_place(tmp_path):
    folder, _ = saved(tmp_path)
    first = open_model(folder).fingerprint
    copy = shutil.copytree(folder, tmp_path / "copy")
    assert open_model(copy).fingerprint == first and len(first) == 32
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    assert open_model(copy).fingerprint != first


def test_a_checkpoint_of_the_bare_model_lacks_the_prefix(tmp_path):
    """As GPT-2 on the hub: `h.0...` instead of `transformer.h.0...`, and masks nobody needs."""
    folder, net = saved(tmp_path, "gpt2")
    tensors = load_file(folder / "model.safetensors")
    bare = {n.removeprefix("transformer."): t for n, t in tensors.items()} | {"h.0.attn.bias": torch.ones(1)}
    save_file(bare, folder / "model.safetensors")
    source = open_model(folder)
    assert torch.equal(source.get("transformer.h.1.mlp.c_fc.weight"), net.transformer.h[1].mlp.c_fc.weight)


def test_norms_of_early_bert_are_called_gamma_and_beta(tmp_path):
    folder, net = saved(tmp_path, "bert")
    tensors = load_file(folder / "model.safetensors")
    old = {n.replace("LayerNorm.weight", "LayerNorm.gamma"): t for n, t in tensors.items()}
    assert set(old) != set(tensors)
    save_file(old, folder / "model.safetensors")
    name = "bert.embeddings.LayerNorm.weight"
    assert torch.equal(open_model(folder).get(name), net.state_dict()[name])


def test_tokenizer_of_a_folder(tmp_path):
    folder, _ = saved(tmp_path)
    with pytest.raises(ModelError, match=r"has no tokenizer that loads"):
        open_model(folder).load_tokenizer()
    tiny.tokenizer().save_pretrained(folder)
    assert open_model(folder).load_tokenizer()("w5 w9")["input_ids"] == [5, 9]


def test_a_skeleton_larger_than_any_memory():
    config = tiny.CONFIGS["llama"]()
    config.vocab_size = 10**12
    net = new_skeleton(config)
    assert sum(p.numel() for p in net.parameters()) > 3e13 and len(list(net.buffers())) > 0


def test_parameters_shared_while_building_stay_shared():
    with skeleton.without_weights():
        a, b = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
        b.weight = a.weight
        b.scale = torch.nn.Parameter(torch.ones(3))
        b.register_buffer("table", torch.arange(3))
    assert b.weight is a.weight and a.weight.is_meta and b.scale.is_meta and not b.table.is_meta
    assert not torch.nn.Linear(3, 3).weight.is_meta


# ------------------------------------------------------------ hub names


def test_hub_name_downloads_safe_files_only(tmp_path, monkeypatch):
    import huggingface_hub

    folder, _ = saved(tmp_path)
    asked = {}
    monkeypatch.setattr(
        huggingface_hub, "snapshot_download", lambda name, **k: asked.update(name=name, **k) or str(folder)
    )
    source = open_model("someone/some-model")
    assert source.kind == "hub" and source.name == asked["name"] == "someone/some-model"
    assert not any(p.endswith((".bin", ".pt", "*")) and "token" not in p for p in asked["allow_patterns"])


def test_hub_name_without_network():
    with pytest.raises(ModelError, match=r"could not be fetched from the hub .* type `hf download someone/absent"):
        open_model("someone/absent")


# ------------------------------------------------------------ errors: what was given, what to type


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def test_wrong_shape_names_the_tensor(tmp_path):
    folder, _ = saved(tmp_path)
    edit_config(folder, intermediate_size=48)
    with pytest.raises(
        ModelError, match=r"gate_proj.weight has shape \[64, 32\], but the configuration needs \[48, 32\]"
    ):
        open_model(folder)


def test_missing_tensor_is_named(tmp_path):
    folder, _ = saved(tmp_path)
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(ModelError, match=r"no weights for model.layers.2\S+ and 8 more, which LlamaForCausalLM needs"):
        open_model(folder)


def test_damaged_configurations_are_refused_before_building(tmp_path):
    folder, _ = saved(tmp_path)
    whole = (folder / "config.json").read_text()
    for change, message in [
        ({"num_hidden_layers": 10**9}, "declares 1000000000 layers but holds"),
        ({"num_attention_heads": 7}, "cannot be used|cannot build|but the configuration needs"),
        ({"hidden_size": -32}, "cannot be used|cannot build"),
        ({"model_type": "no-such-type", "architectures": None}, "cannot be used"),
    ]:
        edit_config(folder, **change)
        with pytest.raises(ModelError, match=message):
            open_model(folder)
        (folder / "config.json").write_text(whole)
    (folder / "config.json").write_text(whole[:50])
    with pytest.raises(ModelError, match="cannot be used"):
        open_model(folder)


def test_unknown_name_lists_near_ones(tmp_path):
    with pytest.raises(ModelError, match=r"has no tensor 'model.norm.wait'. Did you mean 'model.norm.weight'"):
        open_model(saved(tmp_path)[0]).get("model.norm.wait")


@pytest.mark.parametrize("keep", [4, 200, 0.5, 0.999])
def test_truncated_safetensors(tmp_path, keep):
    folder, _ = saved(tmp_path)
    file = folder / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: keep if keep > 1 else int(len(data) * keep)])
    with pytest.raises(ModelError, match="download or copy it again"):
        open_model(folder)


def test_a_file_that_shrinks_while_in_use(tmp_path):
    folder, _ = saved(tmp_path)
    source = open_model(folder)
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4000])
    with pytest.raises(ModelError, match="too early"):
        for name in source:
            source.get(name)


HEADERS = {
    "not json": b"{]",
    "no dict": b"[1]",
    "offsets upside down": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}',
    "negative offset": b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[-4,0]}}',
    "shape beyond bytes": b'{"a":{"dtype":"F32","shape":[9],"data_offsets":[0,4]}}',
    "negative shape": b'{"a":{"dtype":"F32","shape":[-1,-1],"data_offsets":[0,4]}}',
    "beyond the file": b'{"a":{"dtype":"F32","shape":[25],"data_offsets":[0,100]}}',
    "no dtype": b'{"a":{"shape":[1],"data_offsets":[0,4]}}',
    "odd dtype": b'{"a":{"dtype":"F2","shape":[1],"data_offsets":[0,4]}}',
    "huge": b'{"a":{"dtype":"F32","shape":[99999999999,99999999999],"data_offsets":[0,4]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_malformed_safetensors_header(tmp_path, header):
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))
    with pytest.raises(ModelError):
        open_model(folder)


def test_missing_shard_and_escaping_index(tmp_path):
    folder, _ = saved(tmp_path, "llama", max_shard_size="20KB")
    shards = sorted(folder.glob("*.safetensors"))
    shards[1].unlink()
    with pytest.raises(ModelError, match=f"{shards[1].name} is listed"):
        open_model(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../secret.safetensors"}}')
    with pytest.raises(ModelError, match="outside its folder"):
        open_model(folder)


def test_places_that_are_no_model(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("once upon a time")
    with pytest.raises(ModelError, match=r"is a text; give a .gguf file.*goes to --data"):
        open_model(text)
    with pytest.raises(ModelError, match=r"no config\.json and no \.gguf"):
        open_model(tmp_path)
    with pytest.raises(ModelError, match="no such file or folder"):
        open_model(tmp_path / "absent")
    with pytest.raises(ModelError, match="no such file or folder"):
        open_model("absent.gguf")
    folder, _ = saved(tmp_path)
    with pytest.raises(ModelError, match="give its folder"):
        open_model(folder / "model.safetensors")
    (folder / "lowbit.json").write_text("{}")
    with pytest.raises(ModelError, match="compressed already"):
        open_model(folder)


def test_pickles_are_refused_unopened(tmp_path):
    folder, _ = saved(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"has no .safetensors"):
        open_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    for path in (folder, folder / "pytorch_model.bin"):
        with pytest.raises(
            ModelError, match=r"never opens; convert it where you trust it: `python -c .*save_pretrained"
        ):
            open_model(path)


def test_quantized_and_foreign_code_models_are_refused(tmp_path):
    folder, _ = saved(tmp_path)
    edit_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(ModelError, match="quantized already"):
        open_model(folder)
    config = tiny.CONFIGS["llama"]()
    config.architectures, config.auto_map = ["TheirModel"], {"AutoModelForCausalLM": "theirs.TheirModel"}
    with pytest.raises(ModelError, match="code of its own"):
        models.ModelSource.new_skeleton(type("S", (), {"config": config})())


def test_nan_and_inf_are_named():
    w = torch.zeros(5_000_000)
    check_finite("fine", w)
    check_finite("codes", torch.zeros(3, dtype=torch.int8))
    w[4_999_999], w[7] = float("nan"), float("inf")
    with pytest.raises(ModelError, match=r"layers.3.weight: 2 of 5000000 values are NaN or infinite"):
        check_finite("layers.3.weight", w)


def test_a_folder_with_code_of_its_own_is_refused_without_asking(tmp_path, monkeypatch):
    """transformers would ask at the terminal whether to run it, and a `y` would."""
    folder, _ = saved(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "stranger", "auto_map": {"AutoConfig": "stranger.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "stranger.py").write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked whether to run code"))
    with pytest.raises(ModelError, match="config.json cannot be used"):
        open_model(folder)


def test_a_tokenizer_with_code_of_its_own_is_refused_without_asking(tmp_path, monkeypatch):
    folder, _ = saved(tmp_path)
    table = {"tokenizer_class": "Stranger", "auto_map": {"AutoTokenizer": ["stranger.Stranger", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(table))
    (folder / "stranger.py").write_text("raise SystemExit('code of the folder was run')")
    monkeypatch.setattr("builtins.input", lambda *words: pytest.fail("asked whether to run code"))
    with pytest.raises(ModelError, match="no tokenizer that loads"):
        open_model(folder).load_tokenizer()


def test_weights_stored_as_whole_numbers_are_refused(tmp_path):
    folder, _ = saved(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"] = tensors["model.layers.1.mlp.up_proj.weight"].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj.weight is stored as whole numbers.*quantized"):
        open_model(folder)


def test_stored_weights_that_the_model_does_not_use_are_named(tmp_path: Path) -> None:
    tiny.model("llama").save_pretrained(tmp_path / "m")
    file = tmp_path / "m" / "model.safetensors"
    weights = load_file(file)
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(weights | rotary, file, {"format": "pt"})
    assert open_model(tmp_path / "m").unused_note() == ""
    save_file(weights | rotary | {"vision.proj.weight": torch.ones(2, 2)}, file, {"format": "pt"})
    assert "vision.proj.weight, which the model does not use" in open_model(tmp_path / "m").unused_note()
