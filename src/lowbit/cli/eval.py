"""Measure perplexity, size, speed and memory; with --against also the float model and the distance to it.

OUT is a compressed folder, or a float model for its own perplexity. The whole text is cut into windows side by side
unless --stride is given. The result of a compressed folder is added to its run.json and shown in its report.

    lowbit eval out --text "valid.txt[50%:]" --against model.gguf
"""

import os
from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._models import Runnable, open_runnable
from lowbit.cli._shell import Json, Shell, shell
from lowbit.report.words import number, size_words

ORDER = 30


def run(
    model: Annotated[str, typer.Argument(metavar="OUT", help="A compressed folder, or a float model.")],
    text: Annotated[str, typer.Option(help="A file, a folder, Parquet, a dataset; a part as FILE[50%:].")],
    context: Annotated[int, typer.Option(min=3, help="Tokens in a window.")] = 512,
    stride: Annotated[
        int | None, typer.Option(min=1, help="Start a window every so many tokens; side by side if left out.")
    ] = None,
    windows: Annotated[int | None, typer.Option(min=1, help="Only so many windows; all if left out.")] = None,
    protocol: Annotated[str, typer.Option(help="gptq or llama.cpp; see the guide.")] = "gptq",
    against: Annotated[str | None, typer.Option(metavar="MODEL", help="The float model to compare with.")] = None,
    activations: Annotated[
        str | None, typer.Option(help="float or int8 inputs of the packed layers; as compressed if left out.")
    ] = None,
    as_json: Json = False,
) -> None:
    from lowbit.evaluate.windows import check_options
    from lowbit.sources.texts import read_text

    sh = shell()
    check_options(context, stride, protocol)
    words = read_text(text)
    runnable = open_runnable(model, activations)
    options = {"context": context, "stride": stride, "windows": windows, "protocol": protocol}
    result = measure(sh, runnable, words, options)
    result |= {"text": os.path.basename(text.rstrip("/")), "activations": runnable.activations, "bytes": runnable.bytes}
    if against is not None:
        result |= compare_with(sh, runnable, against, words, options)
    if runnable.manifest is not None:
        result |= {k: runnable.manifest["summary"][k] for k in ("bits_per_weight", "bits_per_weight_file")}
        _remember(Path(model), result)
    _show(sh, model, result)
    sh.result({"model": model, **result})


def measure(sh: Shell, runnable: Runnable, words: str, options: dict[str, Any]) -> dict[str, Any]:
    """Perplexity (or an encoder's pseudo-perplexity), speed and peak memory of one model."""
    from lowbit.evaluate import peak_memory_bytes, perplexity, pseudo_perplexity

    tokenizer = runnable.tokenizer()
    masked = _mask_id(runnable.model, tokenizer)
    with sh.progress("windows") as step:
        if masked is not None:
            _check_masked(options)
            ids = _tokens(words, tokenizer, special=False)
            ends = {"cls_id": tokenizer.cls_token_id, "sep_id": tokenizer.sep_token_id}
            found = pseudo_perplexity(
                runnable.model, ids, masked, options["context"], options["windows"], progress=step, **ends
            )
        else:
            found = perplexity(
                runnable.model, _tokens(words, tokenizer), bos=_bos(tokenizer, options), progress=step, **options
            )
    kept = (
        "perplexity",
        "nll",
        "nll_stderr",
        "nll_stderr_windows",
        "windows",
        "tokens",
        "context",
        "stride",
        "protocol",
        "tokens_per_second",
        "seconds",
    )
    result = {k: v for k, v in found.as_dict().items() if k in kept}
    return result | {
        "float_perplexity": None,
        "kl": None,
        "top1_agreement": None,
        "peak_memory_bytes": peak_memory_bytes(),
    }


def compare_with(sh: Shell, runnable: Runnable, against: str, words: str, options: dict[str, Any]) -> dict[str, Any]:
    """The float model by the same protocol; for causal models also KL and top-1 agreement on the same windows."""
    reference = open_runnable(against)
    sh.say(f"Measuring {against} beside it.", "dim")
    floats = measure(sh, reference, words, options)
    result = {
        "against": os.path.basename(against.rstrip("/")),
        "float_perplexity": floats["perplexity"],
        "float_tokens_per_second": floats["tokens_per_second"],
    }
    tokenizer = runnable.tokenizer()
    if _mask_id(runnable.model, tokenizer) is None:
        from lowbit.evaluate import compare

        ids = _tokens(words, tokenizer)
        ids = ids[: options["windows"] * options["context"]] if options["windows"] else ids
        with sh.progress("distance") as step:
            distance = compare(runnable.model, reference.model, ids, options["context"], progress=step).as_dict()
        result |= {k: distance[k] for k in ("kl", "kl_stderr", "top1_agreement", "max_relative_logit_difference")}
    return result


def _tokens(words: str, tokenizer: Any, special: bool = True) -> Any:
    from lowbit.evaluate import tokenize

    return tokenize(words, tokenizer, special)


def _mask_id(model: Any, tokenizer: Any) -> "int | None":
    """The mask token of a masked language model; None for one that reads from left to right."""
    from lowbit.errors import DataError

    if not type(model).__name__.endswith("ForMaskedLM"):
        return None
    found = getattr(tokenizer, "mask_token_id", None)
    if found is None:
        raise DataError(
            f"{type(model).__name__} is measured by hiding tokens, and its tokenizer has no mask token: "
            "give a folder whose tokenizer_config.json names one (mask_token)."
        )
    return found


def _check_masked(options: dict[str, Any]) -> None:
    from lowbit.errors import RecipeError

    if options["stride"] is not None or options["protocol"] != "gptq":
        raise RecipeError("a masked language model is measured by hiding tokens: leave out --stride and --protocol.")


def _bos(tokenizer: Any, options: dict[str, Any]) -> Any:
    if options["protocol"] == "llama.cpp":
        return False if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    return tokenizer.bos_token_id


def _remember(folder: Path, result: dict[str, Any]) -> None:
    """run.json and report.html; a folder that may not be written is left as it is."""
    from lowbit.cli._shell import jsonable
    from lowbit.report import add_evaluation, write_report

    try:
        add_evaluation(folder, jsonable(result))
        write_report(folder)
    except OSError as e:
        shell().note(f"not added to {folder}/run.json: {e.strerror}")


def _show(sh: Shell, model: str, r: dict[str, Any]) -> None:
    stderr = r["perplexity"] * (r.get("nll_stderr_windows") or r["nll_stderr"])
    how = f"{r['windows']} windows of {r['context']}, protocol {r['protocol']}"
    rows = [("perplexity", f"{r['perplexity']:.4g} ± {stderr:.2g}  ({how})")]
    if r["float_perplexity"]:
        rows.append(
            ("float perplexity", f"{r['float_perplexity']:.4g}  (ratio {r['perplexity'] / r['float_perplexity']:.4g})")
        )
    if r["kl"] is not None:
        rows.append(
            ("distance", f"KL {number(r['kl'])} nats a token, same top token {100 * r['top1_agreement']:.1f} %")
        )
    bits = f", {r['bits_per_weight_file']:.3f} bits per weight" if "bits_per_weight_file" in r else ""
    rows += [("size", size_words(r["bytes"]) + bits), ("speed", f"{r['tokens_per_second']:.1f} tokens/s")]
    rows.append(("peak memory", size_words(r["peak_memory_bytes"])))
    for name, value in rows:
        sh.say(f"{name:<18} {value}")
    if r["float_perplexity"] is None and "bits_per_weight_file" in r:
        sh.say("Add --against MODEL for the float figure beside it: a perplexity alone says little.", "dim")
