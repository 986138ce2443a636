"""What a person sees while a model is compressed: the plan, then blocks and layers with error, time left and memory.

Events come from the pipeline as dicts: plan, resume, layer, block, note, write; on the way to a goal also probe,
chosen, measuring and measured. At a terminal they move one live
display; in a pipe each block is one line; with --json and nobody watching, nothing.
"""

import time
from typing import Any

from lowbit.cli._shell import Shell, clean
from lowbit.report.words import number, size_words, time_words


class CompressProgress:
    """Call it with events; use it as a context manager so that the live display ends whatever happens."""

    def __init__(self, shell: Shell):
        self.shell = shell
        self.bar: Any = None
        self.task: Any = None
        self.errors: list[float] = []
        self.began = time.perf_counter()
        self.left: float | None = None

    def __enter__(self) -> "CompressProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def __call__(self, event: dict[str, Any]) -> None:
        handler = getattr(self, f"_on_{event.get('event')}", None)
        if handler is not None and not self.shell.quiet:
            handler(event)

    def _on_plan(self, e: dict[str, Any]) -> None:
        ceiling = f" of {size_words(e['ceiling_bytes'])} allowed" if e.get("ceiling_bytes") else ""
        time = f", about {time_words(e['seconds'])}" if e.get("seconds") else ""
        if e.get("estimate_bytes"):
            self._line(f"Plan: peak memory about {size_words(e['estimate_bytes'])}{ceiling}{time}.")
        for note in e.get("notes") or []:
            self._line(f"  {note}")

    def _on_resume(self, e: dict[str, Any]) -> None:
        self._line(f"Going on from block {e['block']} of {e['blocks']}: the blocks before it are finished.")

    def _on_note(self, e: dict[str, Any]) -> None:
        self._line(str(e.get("text", "")))

    def _on_layer(self, e: dict[str, Any]) -> None:
        if e.get("error") is not None:
            self.errors.append(e["error"])
        if self.shell.rich:
            self._live(e, f"{e.get('name', '')}  error {number(e.get('error'), 3)}")

    def _on_block(self, e: dict[str, Any]) -> None:
        errors, self.errors = self.errors, []
        error = e.get("error") if e.get("error") is not None else (sum(errors) / len(errors) if errors else None)
        done, blocks = int(e["block"]) + 1, int(e["blocks"])
        if self.shell.rich:
            self._live(e | {"block": done}, f"block {done} done, error {number(error, 3)}")
            return
        spent = time.perf_counter() - self.began
        self._line(
            f"block {done}/{blocks}  error {number(error, 3)}  {time_words(spent)}, "
            f"{time_words(e.get('eta_seconds'))} left  memory {size_words(e.get('rss_bytes'))}"
        )

    def _on_probe(self, e: dict[str, Any]) -> None:
        forward, blocks = e["part"] == "forward", int(e["blocks"])
        done = int(e["block"]) + 1 if forward else 2 * blocks - int(e["block"])
        if self.shell.rich:
            self._live(e | {"block": done, "blocks": 2 * blocks}, "probing what each layer loses")
            if done == 2 * blocks:
                self._stop()
        elif done in (1, blocks + 1):
            self._line(
                f"Probing what each layer loses: {'forward' if forward else 'backward'} through {blocks} blocks."
            )

    def _on_chosen(self, e: dict[str, Any]) -> None:
        self._stop()
        x = e["expected"]
        time = f", {1000 * x['latency']:.3g} ms a token" if "latency" in x else ""
        self._line(f"Goal: {e['goals']}.")
        self._line(
            f"Expected: {size_words(x['bytes'])}, {x['bits_per_weight']:.3f} bits per weight in the blocks, "
            f"perplexity {100 * x['loss']:+.2f}%{time}."
        )

    def _on_measuring(self, e: dict[str, Any]) -> None:
        if e["done"] == 1:
            self._line(f"Measuring on {e['of']} held-out windows.")

    def _on_measured(self, e: dict[str, Any]) -> None:
        self._line(f"Measured: {size_words(e['bytes'])}, perplexity {100 * e['loss']:+.2f}% of the float model's.")

    def _on_write(self, e: dict[str, Any]) -> None:
        self._stop()
        self._line("Writing the artifact.")

    def _live(self, e: dict[str, Any], words: str) -> None:
        if self.bar is None:
            self._start(int(e["blocks"]))
        self.left = e.get("eta_seconds", self.left)
        left = "" if self.left is None else f"{time_words(self.left)} left, "
        side = f"{left}{size_words(e.get('rss_bytes'))}"
        self.bar.update(self.task, completed=int(e["block"]), description=clean(words), side=side)

    def _start(self, blocks: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

        columns = (BarColumn(bar_width=24), MofNCompleteColumn(), TextColumn("{task.fields[side]}", markup=False))
        self.bar = Progress(
            *columns, TextColumn("{task.description}", markup=False), console=self.shell.console(), transient=True
        )
        self.bar.start()
        self.task = self.bar.add_task("", total=blocks, side="")

    def _stop(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _line(self, text: str) -> None:
        if self.shell.rich:
            (self.bar.console if self.bar is not None else self.shell.console()).print(clean(text))
        else:
            print(clean(text), file=self.shell.stream, flush=True)
