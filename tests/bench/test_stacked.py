"""The rows of the method table: their formulas, and that each trains, resumes and packs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lowbit.bench import stacked, stacked_levels
from lowbit.bench.packing import float_network, packed_network
from lowbit.bench.pool import Job, Setting, read_rows, run_pool
from lowbit.bench.rows import PROTOCOLS, ROWS
from lowbit.bench.trainee import Trainee
from lowbit.errors import ArtifactError
from lowbit.formats import Format
from lowbit.train.device_images import DeviceImages
from lowbit.train.images import Images

CPU = torch.device("cpu")
TINY = replace(PROTOCOLS["small"], depth=8, width=4, epochs=4, batch=16, warmup=1.0)


@pytest.fixture(scope="module")
def data() -> DeviceImages:
    """Eight colours to tell apart, 8 x 8 pixels."""
    draw = torch.Generator().manual_seed(0)
    y = torch.arange(48) % 8
    colours = torch.randint(0, 256, (8, 1, 1, 3), generator=draw)
    noise = torch.randint(-20, 21, (48, 8, 8, 3), generator=draw)
    images = Images((colours[y] + noise).clamp(0, 255).to(torch.uint8), y)
    return DeviceImages(images, images, CPU)


def trainee(row: str, data: DeviceImages, seed: int = 0) -> Trainee:
    return Trainee(ROWS[row], TINY, seed, data, CPU)


def run(t: Trainee, steps: int) -> Trainee:
    for _ in range(steps):
        t.step()
        t.done += 1
        if t.done % t.steps == 0 and t.done < t.total:
            t.load_draws()
    return t


@pytest.mark.parametrize("row", ROWS)
def test_a_row_learns_and_its_levels_are_those_of_its_format(row: str, data: DeviceImages) -> None:
    t = trainee(row, data)
    run(t, 3)
    first = float(t.loss_sum)
    run(t, t.total - 6)
    t.loss_sum.zero_()
    run(t, 3)
    assert float(t.loss_sum) < first
    if row == "fp32":
        return
    fmt = Format.parse(t.method.format)
    for name, levels in t.export().items():
        if name.endswith(".levels"):
            assert set(levels.flatten().tolist()) <= set(fmt.levels.values), name


@pytest.mark.parametrize(
    "row", ["w1-ste", "w1-reste", "ternary-s3", "w3-s3", "w4-denseshift", "w2-lsq", "w3-deepshift-q"]
)
def test_the_packed_network_gives_the_same_logits(row: str, data: DeviceImages) -> None:
    t = run(trainee(row, data), 5)
    tensors = t.export()
    x = data.test_batches()[0][0]
    with torch.no_grad():
        trained = float_network(ROWS[row], TINY, tensors)(x)
        packed = packed_network(ROWS[row], TINY, tensors, Format.parse(t.method.format))(x)
    torch.testing.assert_close(packed, trained, rtol=1e-4, atol=1e-4)
    assert float((trained.argmax(1) == data.y_test).float().mean()) == pytest.approx(t.accuracy())


@pytest.mark.parametrize("row", ["w1-biper", "w1a1-reste"])
def test_a_resumed_run_ends_with_the_same_bytes(row: str, data: DeviceImages, tmp_path: Path) -> None:
    whole = run(trainee(row, data), 12)
    begun = run(trainee(row, data), 5)
    begun.save(tmp_path / "a.safetensors")
    again = trainee(row, data)
    again.resume(tmp_path / "a.safetensors")
    run(again, 7)
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, again.state()[name]), name


def test_a_checkpoint_of_another_row_is_refused(data: DeviceImages, tmp_path: Path) -> None:
    trainee("w1-ste", data).save(tmp_path / "a.safetensors")
    with pytest.raises(ArtifactError, match="another run"):
        trainee("w1-reste", data).resume(tmp_path / "a.safetensors")


def test_the_pool_stops_in_time_resumes_and_skips_what_is_done(data: DeviceImages, tmp_path: Path) -> None:
    setting = Setting(TINY, data, CPU, torch.float32, tmp_path, curve=2)
    jobs = [Job(ROWS[n], 0) for n in ("fp32", "w1-ste")]
    assert not run_pool(jobs, setting, 2, 0.0, print)
    assert run_pool(jobs, setting, 2, float("inf"), print)
    rows = read_rows(tmp_path)
    assert [r["status"] for r in rows] == ["done", "done"]
    assert [e for e, _ in rows[0]["curve"]] == [1, 2, 4]
    assert len(rows[0]["losses"]) == 4
    assert (tmp_path / "weights" / "w1-ste-s0.safetensors").is_file()


def test_a_row_whose_loss_is_no_number_is_a_failed_row(data: DeviceImages, tmp_path: Path) -> None:
    setting = Setting(replace(TINY, lr=1e30), data, CPU, torch.float32, tmp_path)
    assert run_pool([Job(ROWS["fp32"], 0)], setting, 1, float("inf"), print)
    (row,) = read_rows(tmp_path)
    assert row["status"] == "failed" and "learning rate" in row["error"]


def test_mean_square_of_fresh_sign_planes() -> None:
    """E[W^2] = 2.5, 11.5, 191.5 for DenseShift at 2, 3, 4 bits and 2.75 for S3 at 3 bits."""
    torch.manual_seed(0)
    w = torch.zeros(4, 500, 500)
    for method, expected in (
        (stacked_levels.DenseShift(2), 2.5),
        (stacked_levels.DenseShift(3), 11.5),
        (stacked_levels.DenseShift(4), 191.5),
        (stacked_levels.S3(3), 2.75),
        (stacked_levels.S3(2), 0.5),
    ):
        levels, _ = method.hard(method.latents(w))
        assert float(levels.square().mean()) == pytest.approx(expected, rel=0.02)


def test_swish_slope_is_the_derivative() -> None:
    w = torch.linspace(-2, 2, 101, dtype=torch.float64, requires_grad=True)
    stacked.swish_sign(5 * w).sum().backward()
    torch.testing.assert_close(w.grad, stacked.swish_slope(w.detach(), 5.0))


def test_denseshift_passes_the_surrogates_gradient() -> None:
    """d/du = g sqrt(S + 1); where the last plane is off only it learns."""
    p = {"sign": torch.tensor([[[0.3]]]), "t1": torch.tensor([[[1.0]]]), "t2": torch.tensor([[[1.0]]])}
    p |= {"t3": torch.tensor([[[-1.0]]])}
    for v in p.values():
        v.requires_grad_(True)
    stacked_levels.DenseShift(3).weight(p, ()).sum().backward()
    assert p["sign"].grad.item() == 1.0  # S = 0
    assert p["t1"].grad.item() == p["t2"].grad.item() == 0.0
    assert p["t3"].grad.item() == pytest.approx(3 / 2)  # (S_2 + 1) * 1 / (2 sqrt(1))


def test_parq_is_the_float_weight_at_first_and_the_levels_at_last() -> None:
    u = torch.linspace(-1, 1, 41).reshape(1, 1, -1)
    for levels in (2, 3):
        method = stacked.Parq(levels)
        hard, scale = method.hard({"w": u})
        start = method.weight({"w": u}, (torch.tensor(method.schedule(0.0)[0]),))
        end = method.weight({"w": u}, (torch.tensor(method.schedule(0.9)[0]),))
        torch.testing.assert_close(start, u.clamp(-float(scale), float(scale)))
        torch.testing.assert_close(end, hard * scale)


@pytest.mark.parametrize("method", [stacked_levels.LsqShift(3), stacked_levels.ParqShift(3)])
def test_shift_levels_are_the_nearest_powers(method: stacked.Method) -> None:
    w = torch.randn(2, 5, 400)
    p = method.latents(w)
    levels, scale = method.hard(p)
    table = torch.tensor([-8.0, -4, -2, -1, 1, 2, 4, 8])
    nearest = ((w / scale)[..., None] - table).abs().amin(-1)
    assert torch.equal(nearest, (w / scale - levels).abs()) and set(levels.unique().tolist()) == set(table.tolist())


def test_the_step_of_a_shift_is_the_best_for_normal_weights() -> None:
    w = torch.randn(1, 1, 100_000)
    for bits, step in stacked_levels.SHIFT_STEP.items():

        def error(c: float, bits: int = bits) -> float:
            levels, scale = stacked_levels.LsqShift(bits).hard(
                {"w": w, "scale": c * w.abs().mean((-2, -1), keepdim=True)}
            )
            return float((levels * scale - w).square().mean())

        assert error(step) < min(error(0.85 * step), error(1.15 * step))


def test_proximal_shifts_go_from_the_weight_to_its_level() -> None:
    method, w = stacked_levels.ParqShift(3), torch.randn(1, 3, 500)
    levels, scale = method.hard({"w": w})
    inside = (w / scale).abs() < 8

    def at(s: float) -> torch.Tensor:
        return method.weight({"w": w}, (torch.tensor(s),))

    torch.testing.assert_close(at(1.0)[inside], w[inside])
    torch.testing.assert_close(at(1e-6), levels * scale)
    far = [(at(s) - levels * scale).abs().mean() for s in (1.0, 0.5, 0.1, 0.01)]
    assert far == sorted(far, reverse=True) and far[-1] < 0.02 * far[0]


def test_two_stages_start_the_learning_rate_again(data: DeviceImages) -> None:
    t = trainee("w1a1-reactnet-2stage", data)
    lr, stage = t.table[:, 0], t.total // 2
    assert (
        lr[stage - 1] < 0.1 * lr.max() < lr[stage + t.steps] and t.table[:, 1].tolist() == [0.0] * stage + [1.0] * stage
    )
    w = {"w": torch.tensor([[[0.5, -0.25]]])}
    assert t.method.weight(w, (torch.tensor(0.0),)).tolist() == [[[0.5, -0.25]]]
    assert t.method.weight(w, (torch.tensor(1.0),)).tolist() == [[[0.375, -0.375]]]
