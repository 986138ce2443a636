"""The disk is looked at before hours are spent."""

from collections import namedtuple

import pytest
import torch

from lowbit.api import compress_model
from lowbit.errors import ArtifactError
from lowbit.pipeline import space
from lowbit.pipeline.checkpoint import MemoryStore
from lowbit.pipeline.stream import Walk
from lowbit.recipe import Recipe
from lowbit.sources import open_model
from tests.cli.helpers import words
from tests.sources import tiny_models as tiny

USAGE = namedtuple("USAGE", "free")
OPTIONS = {"method": "rtn", "bits": 4, "group": 16}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    where = tmp_path_factory.mktemp("space")
    torch.manual_seed(0)
    tiny.model("llama").save_pretrained(where)
    tiny.tokenizer().save_pretrained(where)
    return where


@pytest.mark.parametrize("bits", [4, 2])
def test_the_estimate_is_the_files_size(model, tmp_path, bits):
    options = OPTIONS | {"bits": bits}
    made = compress_model(model, tmp_path / "out", **options)
    walk = Walk(open_model(model), Recipe(**options), MemoryStore(), None)
    assert space.packed_bytes(walk) == pytest.approx(made["bytes"], rel=0.05)


def test_too_little_room_is_said_before_any_work(model, tmp_path, monkeypatch):
    text = words(tmp_path / "words.txt", 900)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: USAGE(1000))
    monkeypatch.setattr(Walk, "run", lambda self, *_: pytest.fail("it has begun"))
    with pytest.raises(ArtifactError, match=r"the disk is too full: .*out and .* are free in .* with -o"):
        compress_model(model, tmp_path / "deep" / "out", method="gptq", bits=4, group=16, data=str(text), context=16)
    assert not (tmp_path / "deep").exists()


def test_what_is_kept_already_needs_no_room_again(model, tmp_path, monkeypatch):
    walk = Walk(open_model(model), Recipe(**OPTIONS), MemoryStore(), None)
    need = 2 * space.packed_bytes(walk)
    monkeypatch.setattr(space.shutil, "disk_usage", lambda folder: USAGE(need - 5000))
    with pytest.raises(ArtifactError):
        space.check_space(walk, tmp_path / "out", tmp_path / "work")
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "block").write_text("x" * 5000)
    space.check_space(walk, tmp_path / "out", tmp_path / "work")
