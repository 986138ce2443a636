"""Stream text from packed weights.

The prompt goes through the model's chat template if it has one; --raw continues it as plain text. Greedy unless
--temperature is given. Several --prompt advance together; their answers are printed one after the other.

    lowbit generate out --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
"""

from pathlib import Path
from typing import Annotated, Any

import typer

from lowbit.cli._models import open_runnable
from lowbit.cli._shell import Json, Shell, clean, shell

ORDER = 40


def run(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder (or a float model).")],
    prompt: Annotated[list[str], typer.Option(help="What to answer or continue; - reads standard input. Repeatable.")],
    system: Annotated[str | None, typer.Option(help="A system message, for chat models.")] = None,
    max_tokens: Annotated[int, typer.Option(min=0, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token; 0.7 is lively.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Draw among the k likeliest; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Draw among the likeliest that make up this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="No chat template: continue the prompt.")] = False,
    activations: Annotated[
        str | None, typer.Option(help="float or int8 inputs of the packed layers; as compressed if left out.")
    ] = None,
    kv_bits: Annotated[int, typer.Option(help="Of the key-value cache: 32 exact, 8 a quarter of the memory.")] = 32,
    engine: Annotated[str, typer.Option(help="auto, native (the C++ loop) or module (the model's forward).")] = "auto",
    as_json: Json = False,
) -> None:
    sh = shell()
    runnable = open_runnable(str(model), activations)
    from lowbit.runtime.generation import generate_batch

    batch = generate_batch(
        runnable.model,
        runnable.tokenizer(),
        [_read(p) for p in prompt],
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=False if raw else None,
        system=system,
        kv_bits=kv_bits,
        engine=engine,
    )
    if batch.note and runnable.manifest is not None:
        sh.note(f"[the model's own forward runs, which is slower than the native loop: {batch.note}]")
    for _, piece in batch:
        if not sh.as_json and len(prompt) == 1:
            print(clean(piece), end="", flush=True)
    results = [r.as_dict() for r in batch.results()]
    if len(prompt) > 1:
        for question, result in zip(prompt, results):
            sh.say(f"--- {question}", "bold")
            sh.say(result["text"])
    _end(sh, results)


def _read(prompt: str) -> str:
    if prompt != "-":
        return prompt
    return typer.get_binary_stream("stdin").read().decode("utf-8", "surrogateescape")


def _end(sh: Shell, results: list[dict[str, Any]]) -> None:
    """The line of figures; with --json the object, which holds a list where there were several prompts."""
    total = _total(results)
    reasons = ", ".join(dict.fromkeys(r["finish_reason"] for r in results))
    if len(results) == 1:
        sh.say()
    sh.note(
        f"[{total['prompt_tokens']} + {total['new_tokens']} tokens; "
        f"prompt {total['prefill_tokens_per_second']:.0f} tokens/s, "
        f"answer {total['decode_tokens_per_second']:.1f} tokens/s; {reasons}]"
    )
    sh.result(results[0] if len(results) == 1 else {"answers": results, **total})


def _total(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Figures of a batch, whose prompts were read together and whose answers overlap in time."""
    prompt, new = (sum(r[k] for r in results) for k in ("prompt_tokens", "new_tokens"))
    prefill, decode = (max(r[k] for r in results) for k in ("prefill_seconds", "decode_seconds"))
    return {
        "prompt_tokens": prompt,
        "new_tokens": new,
        "prefill_tokens_per_second": prompt / prefill if prefill else 0.0,
        "decode_tokens_per_second": (new - len(results)) / decode if decode else 0.0,
    }
