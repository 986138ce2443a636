"""Accuracy counts right answers, whatever the form of the data and the batch."""

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lowbit.errors import DataError, ModelError, RecipeError
from lowbit.evaluate import accuracy

X = torch.eye(4).repeat(5, 1)
Y = torch.arange(4).repeat(5)
Y[:3] = 3  # 0, 1, 2 are now wrong


@pytest.mark.parametrize("batch", [1, 3, 20, 1000])
def test_every_form_of_data(batch):
    model = nn.Sequential(nn.Identity(), nn.Dropout(0.9)).train()
    forms = [(X, Y), (TensorDataset(X, Y), None), (DataLoader(TensorDataset(X, Y), batch), None), ([(X, Y)], None)]
    for data, targets in forms:
        got = accuracy(model, data, targets, batch=batch)
        assert (got.correct, got.samples, got.accuracy) == (17, 20, 0.85)
        assert got.stderr == pytest.approx((0.85 * 0.15 / 20) ** 0.5)
    assert model.training


def test_progress_knows_the_total_where_it_can():
    seen = []
    for data, targets in ((X, Y), (TensorDataset(X, Y), None), ([(X, Y)], None)):
        accuracy(nn.Identity(), data, targets, batch=16, progress=lambda *a: seen.append(a))
    assert seen == [(16, 20), (20, 20), (16, 20), (20, 20), (20, -1)]


def test_messages():
    with pytest.raises(DataError, match="20 inputs need as many targets; got 19"):
        accuracy(nn.Identity(), X, Y[:-1])
    with pytest.raises(DataError, match="got none"):
        accuracy(nn.Identity(), X)
    with pytest.raises(DataError, match="0 samples"):
        accuracy(nn.Identity(), [])
    with pytest.raises(RecipeError, match="batch=0"):
        accuracy(nn.Identity(), X, Y, batch=0)
    with pytest.raises(ModelError, match=r"got \(20, 2, 2\) for 20 samples"):
        accuracy(nn.Unflatten(1, (2, 2)), X, Y)
    with pytest.raises(ModelError, match="NaN"):
        accuracy(nn.Identity(), X * float("nan"), Y)
