"""Memory does not grow with a model's depth."""

import pytest

from lowbit.bench import depth


@pytest.mark.slow
def test_the_peak_of_memory_is_that_of_one_block() -> None:
    options = ["--method", "gptq", "--bits", "3", "--windows", "4", "--context", "64"]
    few, many = (depth.measure(blocks, options) for blocks in (4, 20))
    extra = many["nbytes_float"] - few["nbytes_float"]
    assert extra > 190e6
    assert many["peak_memory_bytes"] < few["peak_memory_bytes"] + extra / 2  # heap and page cache wander by some 30 MB


def test_a_row_for_each_depth(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    found = {"nbytes_float": 5e6, "seconds": 6.0, "peak_memory_bytes": 7e8}
    monkeypatch.setattr(depth, "measure", lambda blocks, options, width: {"blocks": blocks, **found})
    assert depth.main(["--blocks", "2", "3"]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["| 2 | 5 | 6.0 | 3.00 | 700 |", "| 3 | 5 | 6.0 | 2.00 | 700 |"]
