"""`lowbit bench methods`, `tasks` and `claims`: the options, what a person reads, the reports."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._shell import Json, Shell, shell


def methods(
    data: Annotated[str, typer.Option(help="Folder of Parquet files, hub name, or a file of lowbit.train.images.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for results, weights, checkpoints, report.html.")],
    protocol: Annotated[str, typer.Option(help="small (for a CPU) or resnet20.")] = "small",
    rows: Annotated[str, typer.Option(help="Comma-separated names, a trailing * allowed; all if left out.")] = "",
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each row.")] = 1,
    workers: Annotated[int, typer.Option(min=1, help="Networks side by side; more than 1 is for GPUs.")] = 1,
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    minutes: Annotated[float, typer.Option(min=0.0, help="Stop then, with checkpoints; 0 for no limit.")] = 0.0,
    epochs: Annotated[int | None, typer.Option(min=1)] = None,
    batch: Annotated[int | None, typer.Option(min=1)] = None,
    lr: Annotated[float | None, typer.Option(min=0.0)] = None,
    depth: Annotated[int | None, typer.Option(min=8, help="Layers of the residual network: 8, 14, 20, ...")] = None,
    width: Annotated[int | None, typer.Option(min=1, help="Channels of its first stage.")] = None,
    train_images: Annotated[int | None, typer.Option(min=0, help="Use only so many; 0 for all.")] = None,
    test_images: Annotated[int | None, typer.Option(min=0, help="Use only so many; 0 for all.")] = None,
    curve: Annotated[int, typer.Option(min=1, help="Test accuracy every so many epochs.")] = 10,
    bf16: Annotated[bool, typer.Option("--bf16", help="Convolutions in bfloat16.")] = False,
    compiled: Annotated[bool, typer.Option("--compile", help="torch.compile the network.")] = False,
    no_graphs: Annotated[bool, typer.Option("--no-graphs", help="GPU: launch kernels one by one.")] = False,
    smoke: Annotated[bool, typer.Option("--smoke", help="30 steps of every row, to see that they run.")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="Measure images per second.")] = False,
    cost: Annotated[int, typer.Option(min=0, metavar="STEPS", help="Time so many steps of each row and of fp32.")] = 0,
    pack: Annotated[bool, typer.Option("--pack", help="Pack what is finished, count bits, compare.")] = False,
    corrupt: Annotated[
        int, typer.Option(min=0, metavar="IMAGES", help="Evaluate what is finished on so many corrupted test images.")
    ] = 0,
    as_json: Json = False,
) -> None:
    """Compare ways to train at 1 to 4 bits: one network, one protocol, many methods, several seeds.

        lowbit bench methods --data cifar10/ -o methods/ --seeds 3            hours on a CPU; type it again to go on
        lowbit bench methods --data cifar10/ -o methods/ --cost 10            time of a step over fp32's
        lowbit bench methods --data cifar10/ -o methods/ --seeds 3 --pack     bits counted, packed against trained
        lowbit bench methods --data cifar10/ -o methods/ --seeds 3 --corrupt 2000     noise, blur, fog, JPEG, ...

    A row that fails is a failed row with its reason; the others go on. The table is printed and written to
    OUT/report.html. Exit code 0 when all is done, 1 after a failed check, 3 when --minutes ran out.
    """
    from lowbit.bench.methods import Request, run

    sh = shell()
    sh.hint_on_interrupt = "Type the same command again to go on."
    changes = {"epochs": epochs, "batch": batch, "lr": lr, "depth": depth, "width": width,
               "train_images": train_images, "test_images": test_images}  # fmt: skip
    request = Request(
        data, out, protocol, rows, seeds, workers, device, minutes or float("inf"), bf16, compiled, not no_graphs,
        curve, smoke, probe, pack, cost, corrupt, changes,
    )  # fmt: skip
    code = run(request, sh.say)
    if not (smoke or probe):
        _show(sh, request, code)
    if code:
        raise typer.Exit(code)


def _show(sh: Shell, request: Any, code: int) -> None:
    from lowbit.bench.method_table import COLUMNS, cells, table
    from lowbit.bench.methods import protocol_of
    from lowbit.report.methods_page import write_methods_report

    protocol = protocol_of(request)
    found = table(request.out, protocol)
    result: dict[str, Any] = {"what": "methods", "protocol": vars(protocol), "rows": found, "whole": code == 0}
    result |= {"out": str(request.out), "report": str(write_methods_report(request.out, vars(protocol), found))}
    sh.table(COLUMNS, [cells(r) for r in found])
    sh.say(f"Report: {result['report']}")
    sh.result(result)


def tasks(
    out: Annotated[Path, typer.Option("--out", "-o", help="A folder with one training a cell.")] = Path("tasks"),
    task: Annotated[list[str] | None, typer.Option(help="digits, cifar10 or shakespeare. Repeatable.")] = None,
    architecture: Annotated[list[str] | None, typer.Option(help="resnet, mlp, vit, lstm or gpt. Repeatable.")] = None,
    method: Annotated[
        list[str] | None, typer.Option(help="fp32, w1, w1-parq, ternary, w3-s3, w4-lsq or w1a1. Repeatable.")
    ] = None,
    data: Annotated[list[str] | None, typer.Option(metavar="TASK=PATH", help="Data of a task. Repeatable.")] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Trainings of each cell.")] = 1,
    epochs: Annotated[int | None, typer.Option(min=1, help="For all cells, instead of each task's own.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu or cuda.")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A few steps of tiny networks, to see that all run.")] = False,
    as_json: Json = False,
) -> None:
    """Compare methods over tasks and architectures: a small training in every cell that makes sense.

        lowbit bench tasks                                                  the digits, no download, minutes
        lowbit bench tasks --data cifar10=cifar10/ --data shakespeare=input.txt --seeds 3

    What is left out means all. Type it again to go on; a cell that fails is a row with its reason. The table is printed
    and written to OUT/report.html.
    """
    from lowbit.bench.cells import cells, run_cells
    from lowbit.cli._values import parse_settings
    from lowbit.report.tasks_page import write_tasks_report

    sh = shell()
    sh.hint_on_interrupt = "Type the same command again to go on."
    chosen = list(cells(task or (), architecture or (), method or ()))
    where = {name: str(path) for name, path in parse_settings(data).items()}
    rows = run_cells(out, chosen, where, seeds, sh.say, quick, epochs=epochs, device=device)
    networks = list(dict.fromkeys((r["task"], r["architecture"]) for r in rows))
    methods = list(dict.fromkeys(r["method"] for r in rows))
    by_cell = {(r["task"], r["architecture"], r["method"]): r for r in rows}
    sh.table(
        ["task", "network", *(f">{m}" for m in methods)],
        [(*n, *(_accuracy(by_cell.get((*n, m))) for m in methods)) for n in networks],
    )
    report = str(write_tasks_report(out, rows))
    sh.say(f"Report: {report}")
    sh.result({"what": "tasks", "rows": rows, "out": str(out), "report": report})


def _accuracy(row: "dict[str, Any] | None") -> str:
    return "" if row is None else "failed" if row["error"] else f"{100 * row['accuracy']:.2f}"


def claims(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder for claims.json and report.html.")] = Path("claims"),
    only: Annotated[list[str] | None, typer.Option(help="One claim by name. Repeatable; all if left out.")] = None,
    as_json: Json = False,
) -> None:
    """Show or refute what the training papers claim, on toys, with a plot each. A few minutes, no download."""
    from lowbit.bench.claims import CLAIMS
    from lowbit.errors import RecipeError, near_names
    from lowbit.report.claims_page import write_claims_report

    sh, found = shell(), []
    for name in only or CLAIMS:
        if name not in CLAIMS:
            raise RecipeError(f"unknown claim {name!r}. {near_names(name, tuple(CLAIMS))}")
    for name in only or CLAIMS:
        c = CLAIMS[name]()
        found.append(c)
        sh.say(f"{'shown' if c['shown'] else 'NOT SHOWN'}: {c['said']}. {c['source']}\n    {c['seen']}")
    result = {"what": "claims", "claims": found, "out": str(out), "report": str(write_claims_report(out, found))}
    (out / "claims.json").write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    sh.say(f"Report: {result['report']}")
    sh.result(result)
