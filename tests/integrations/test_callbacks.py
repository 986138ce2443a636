"""The callbacks of other people's loops: schedules, penalties, records, and exact resumption."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lowbit
from lowbit.errors import RecipeError
from lowbit.training import add_penalty_gradients, penalty, prepare, step, weight_functions

X = torch.randn(48, 12, generator=torch.Generator().manual_seed(1))
Y = torch.arange(48) % 4
STEPS, BATCH = 6, 8


class Net(nn.Module):
    """Returns what transformers' Trainer wants, or only the scores."""

    def __init__(self, weights: Any = "s3", activations: Any = "float"):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Linear(12, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4))
        prepare(self.body, {"weights": weights, "activations": activations}, keep_ends=False)

    def forward(self, x: Tensor, labels: "Tensor | None" = None) -> Any:
        scores = self.body(x)
        return scores if labels is None else {"loss": F.cross_entropy(scores, labels), "logits": scores}


def by_hand(net: Net, steps: int = STEPS) -> dict[str, Tensor]:
    """The same training in a loop of one's own."""
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    for i in range(steps):
        at = slice(i * BATCH, (i + 1) * BATCH)
        optimizer.zero_grad()
        (F.cross_entropy(net(X[at]), Y[at]) + penalty(net)).backward()
        optimizer.step()
        step(net, (i + 1) / STEPS)
    return net.state_dict()


def same(a: dict[str, Tensor], b: dict[str, Tensor], exactly: bool = True) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]) if exactly else torch.allclose(a[name], b[name], atol=1e-6), name


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(Y)

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": X[i], "labels": Y[i]}


def hf_trainer(net: nn.Module, folder: Path, callback: Any, **more: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")

    class InOrder(transformers.Trainer):
        def _get_train_sampler(self, *_: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

    settings: dict[str, Any] = {"max_steps": STEPS, "per_device_train_batch_size": BATCH, "learning_rate": 0.1}
    settings |= {"lr_scheduler_type": "constant", "max_grad_norm": 0.0, "use_cpu": True, "report_to": "none"}
    settings |= {"save_steps": 3, "disable_tqdm": True, "logging_strategy": "no"}
    args = transformers.TrainingArguments(str(folder), **settings | more)
    sgd = torch.optim.SGD(net.parameters(), 0.1)
    return InOrder(net, args, train_dataset=Rows(), callbacks=[callback], optimizers=(sgd, None))


def lightning_fit(net: Net, folder: Path, callback: Any, ckpt: "str | None" = None, **more: Any) -> Any:
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: Any, i: int) -> Tensor:
            return F.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.net.parameters(), 0.1)

    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(X, Y), BATCH)
    saver = lightning.pytorch.callbacks.ModelCheckpoint(folder, "{step}", every_n_train_steps=3, save_top_k=-1)
    settings: dict[str, Any] = {
        "max_steps": STEPS,
        "accelerator": "cpu",
        "logger": False,
        "callbacks": [callback, saver],
    }
    settings |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's hints about workers, and its own deprecations
        lightning.Trainer(**settings | more).fit(Module(), loader, ckpt_path=ckpt)
    return net


@pytest.mark.parametrize("weights", ["s3", "bnn_pp"])
def test_the_trainer_computes_what_a_plain_loop_does(weights: str, tmp_path: Path) -> None:
    net, callback = Net(weights), lowbit.integrations.TrainerCallback(diagnose=3)
    hf_trainer(net, tmp_path, callback).train()
    same(net.state_dict(), by_hand(Net(weights)), exactly=False)
    assert [row["at"] for row in callback.rows] == [0, 3]
    assert all(row["layers"]["body.0"]["gradient"] > 0 for row in callback.rows)
    lowbit.pack(net.eval())


def test_the_trainer_resumes_exactly(tmp_path: Path) -> None:
    recipe = {"format": "binary-channel", "estimator": "reste", "scale": "learned"}
    net, again = Net(recipe, {"method": "lsq", "bits": 4}), Net(recipe, {"method": "lsq", "bits": 4})
    hf_trainer(net, tmp_path, lowbit.integrations.TrainerCallback()).train()
    hf_trainer(again, tmp_path, lowbit.integrations.TrainerCallback()).train(
        resume_from_checkpoint=str(tmp_path / "checkpoint-3")
    )
    same(net.state_dict(), again.state_dict())


def test_the_trainer_wants_a_prepared_model(tmp_path: Path) -> None:
    net = nn.Module()
    net.layer = nn.Linear(2, 2)
    with pytest.raises(RecipeError, match="not prepared.*lowbit.prepare"):
        lowbit.integrations.TrainerCallback().on_train_begin(None, None, None, model=net)


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["s3", "bnn_pp"])
def test_lightning_computes_what_a_plain_loop_does(weights: str, tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    callback = lowbit.integrations.LightningCallback(diagnose=3)
    net = lightning_fit(Net(weights), tmp_path, callback)
    same(net.state_dict(), by_hand(Net(weights)), exactly=False)
    assert [row["at"] for row in callback.rows] == [0, 3]


@pytest.mark.slow
def test_lightning_resumes_exactly_and_accumulates(tmp_path: Path) -> None:
    pytest.importorskip("lightning")
    recipe = {"format": "binary-channel", "estimator": "reste", "scale": "learned"}
    more = {"accumulate_grad_batches": 2, "max_epochs": 4, "max_steps": -1}  # 12 steps
    nets = [Net(recipe, {"method": "lsq", "bits": 4}) for _ in range(2)]
    lightning_fit(nets[0], tmp_path, lowbit.integrations.LightningCallback(), **more)
    lightning_fit(nets[1], tmp_path, lowbit.integrations.LightningCallback(), str(tmp_path / "step=6.ckpt"), **more)
    same(nets[0].state_dict(), nets[1].state_dict())
    assert float(next(weight_functions(nets[0]))[2].t) == 3.0  # ReSTE's power has arrived


def test_penalty_gradients_are_those_of_the_sum() -> None:
    a, b = Net("s3"), Net("s3")
    (F.cross_entropy(a(X), Y) + penalty(a)).backward()
    F.cross_entropy(b(X), Y).backward()
    before = copy.deepcopy([p.grad for p in b.parameters()])
    add_penalty_gradients(b)
    for p, q in zip(a.parameters(), b.parameters()):
        assert torch.allclose(p.grad, q.grad, atol=1e-7)
    assert any(not torch.equal(p.grad, g) for p, g in zip(b.parameters(), before))
    plain = Net("ternary")
    add_penalty_gradients(plain)
    assert all(p.grad is None for p in plain.parameters())
