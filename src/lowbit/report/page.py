"""The report of an artifact folder: numbers from `view`, drawings from `svg`, words from templates/artifact.html.

One offline file: inline style and SVG, no script, no address of anything outside. Every name is escaped.
"""

import os
import shlex
from pathlib import Path
from typing import Any

from lowbit.errors import ArtifactError
from lowbit.report import svg, view
from lowbit.report.run_file import read_run
from lowbit.report.words import count_words, number, size_words, time_words

NAME = "report.html"
PART_STYLES = {"codes": "c0", "scales": "c1", "zeros": "c2", "tables": "c3", "exceptions": "c4"}


def write_report(folder: "Path | str", to: "Path | str | None" = None) -> Path:
    """Write OUT/report.html (or `to`) and return where. Raises ArtifactError if `folder` is no artifact."""
    from lowbit.runtime.manifest import load_manifest

    folder = Path(folder)
    manifest = load_manifest(folder)
    path = Path(to) if to else folder / NAME
    _check_place(path, folder, {*manifest["files"], "lowbit.json", "run.json"})
    return write_page(path, report_html(manifest, read_run(folder), folder.name))


def _check_place(path: Path, folder: Path, taken: set[str]) -> None:
    """A report must not take the place of what the artifact consists of."""
    if path.is_dir() or (path.name in taken and path.parent.resolve() == folder.resolve()):
        what = "is a folder" if path.is_dir() else "is a part of the artifact"
        raise ArtifactError(f"{path} {what}; give the name of a file for the report, e.g. --to report.html.")


def write_page(path: Path, html: str) -> Path:
    """Replace the file as a whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(html, "utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def report_html(manifest: dict[str, Any], run: dict[str, Any], folder_name: str) -> str:
    """The page for a checked manifest and the run beside it."""
    layers = view.layers_of(manifest)
    inner = [la for la in layers if not view.is_embedding(la)] or layers
    sizes, choice = view.sizes(manifest, layers), view.choice_of(run)
    return render(
        "artifact.html",
        m=manifest,
        run=run,
        title=str(manifest["source"].get("describe") or "").partition(": ")[0] or folder_name,
        folder=shlex.quote(folder_name),
        python_folder=repr(folder_name),
        layers=layers,
        sizes=sizes,
        evaluation=view.best_evaluation(run),
        error_words=view.error_words(manifest),
        left_alone=view.left_alone(manifest),
        notes=view.honest_notes(manifest, run, layers),
        size_chart=size_chart(sizes),
        bits_chart=bits_chart(inner),
        error_chart=error_chart(inner),
        error_map=attribute_map(inner, "error", "error"),
        sensitivity_chart=attribute_map(inner, "sensitivity", "sensitivity"),
        parts_used=[(p, PART_STYLES[p]) for p in view.PARTS if any(la.bytes_by_part[p] for la in inner)],
        settings=_settings(manifest["recipe"]),
        choice=choice,
        frontier_chart=frontier_chart(choice) if choice else "",
    )


def render(template: str, **values: Any) -> str:
    """Fill a template of this package; every value is escaped unless it is a chart."""
    import jinja2
    from markupsafe import Markup

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"size": size_words, "num": number, "span": time_words, "count": count_words}
    charts = {k: Markup(v) if k.endswith(("_chart", "_map")) else v for k, v in values.items()}
    return environment.get_template(template).render(**charts)


def size_chart(s: view.Sizes) -> str:
    kinds = (("blocks", s.blocks, "c0"), ("embeddings and head", s.embeddings, "c1"), ("kept in float", s.other, "c2"))
    after = [svg.Segment(n, style, f"{name}: {size_words(n)}") for name, n, style in kinds if n]
    before = [svg.Segment(s.before, "muted", f"float model: {size_words(s.before)}")]
    return svg.stacked_bars([("before", before, size_words(s.before)), ("after", after, size_words(s.after))])


def bits_chart(layers: list[view.Layer], limit: int = 16) -> str:
    """Bits per weight by kind of layer, split into what they are spent on."""
    rows = []
    for name, members in view.kinds(layers)[:limit]:
        bits = view.bits_by_part(members)
        segments = [
            svg.Segment(v, PART_STYLES[p], f"{name}, {p}: {v:.3f} bits per weight") for p, v in bits.items() if v
        ]
        rows.append((name, segments, f"{sum(bits.values()):.3g}"))
    return svg.stacked_bars(rows)


def frontier_chart(choice: dict[str, Any], most: float = 2.0) -> str:
    """Expected rise of perplexity against size: mixed formats, one format for all, and what was measured.

    Points beyond `most` times the larger of the chosen point's rises are left out.
    """
    chosen, got = choice["expected"], choice["measured"]
    top = max(most * max(chosen["loss"], got["loss"]), 0.02)

    def points(rows: list[dict[str, Any]]) -> list[tuple[float, float]]:
        return sorted((r["bytes"] / 1e6, 100 * r["loss"]) for r in rows if r["loss"] <= top)

    series = [
        svg.Series("one format for all", points(choice["uniform"]), "c5"),
        svg.Series("mixed formats", points(choice["frontier"]), "c0"),
        svg.Series("expected", points([chosen]), "c1"),
        svg.Series("measured", points([got]), "c3"),
    ]
    return svg.lines([s for s in series if s.points], "MB", "perplexity against float, %", from_zero=False)


def error_chart(layers: list[view.Layer]) -> str:
    """Mean error by block, beside round-to-nearest where that was measured; bars by layer where there are no blocks."""
    by_block, rtn = view.by_block(layers, "error"), view.by_block(layers, "error_rtn")
    if len(by_block) > 2:
        series = [svg.Series("round to nearest", rtn, "c5")] if rtn and rtn != by_block else []
        return svg.lines([*series, svg.Series("this model", by_block, "c0")], "block", "relative squared error, mean")
    return svg.bars([(la.name, la.error, f"{la.error:.3g}") for la in layers[:40] if la.error is not None])


def attribute_map(layers: list[view.Layer], attribute: str, words: str) -> str:
    """Kinds of layers down, blocks across; bars where there are no blocks; nothing where nothing was measured."""
    known = [la for la in layers if getattr(la, attribute) is not None]
    placed = [la for la in known if la.place]
    blocks = sorted({la.place[0] for la in placed if la.place})
    if not known or (attribute == "error" and len(blocks) < 3):
        return ""
    if len(blocks) < 3:
        return svg.bars([(la.name, getattr(la, attribute), number(getattr(la, attribute))) for la in known[:40]], "c3")
    names = [name for name, _ in view.kinds(placed)][:24]
    at = {(la.place[1], la.place[0]): getattr(la, attribute) for la in placed if la.place}
    values = [[at.get((name, b)) for b in blocks] for name in names]
    titles = [[f"block {b}, {name}: {words} {number(at.get((name, b)))}" for b in blocks] for name in names]
    return svg.heatmap(names, [str(b) for b in blocks], values, titles)


def _settings(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    """A recipe as rows of words, empty ones left out."""
    rows = []
    for key, value in recipe.items():
        if value in (None, "", [], {}, ()):
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{k}={v}" for k, v in value.items())
        rows.append((str(key), str(value)))
    return rows
