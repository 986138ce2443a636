"""Stream text from packed weights.

The prompt goes through the model's chat template if it has one; --raw continues it as plain text. Greedy unless
--temperature is given.

    lowbit generate out --prompt "Why is the sky blue?" --temperature 0.7 --seed 1
"""

from pathlib import Path
from typing import Annotated

import typer

from lowbit.cli._models import open_runnable
from lowbit.cli._shell import Json, clean, shell

ORDER = 40


def run(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="A compressed folder (or a float model).")],
    prompt: Annotated[str, typer.Option(help="What to answer or continue; - reads standard input.")],
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
    as_json: Json = False,
) -> None:
    sh = shell()
    if prompt == "-":
        prompt = typer.get_binary_stream("stdin").read().decode("utf-8", "surrogateescape")
    runnable = open_runnable(str(model), activations)
    from lowbit.runtime.generation import generate

    stream = generate(
        runnable.model,
        runnable.tokenizer(),
        prompt,
        max_new_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        chat=False if raw else None,
        system=system,
    )
    for piece in stream:
        if not sh.as_json:
            print(clean(piece), end="", flush=True)
    result = stream.result()
    sh.say()
    sh.note(
        f"[{result.prompt_tokens} + {result.new_tokens} tokens; "
        f"prompt {result.prefill_tokens_per_second:.0f} tokens/s, "
        f"answer {result.decode_tokens_per_second:.1f} tokens/s; {result.finish_reason}]"
    )
    sh.result(result.as_dict())
