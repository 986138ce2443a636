"""From a prompt to the ids a model reads, and the ids that end its answer."""

from typing import Any

from lowbit.errors import DataError, ModelError


def check_text(*texts: str) -> None:
    """A terminal's bytes that are not UTF-8 arrive as surrogates, which no tokenizer takes."""
    for text in texts:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise DataError("the prompt is not UTF-8 text. Type it again, or set the terminal to UTF-8.") from None


def check_model(model: Any) -> None:
    config = getattr(model, "config", None)
    can = getattr(model, "can_generate", None)
    if getattr(config, "is_encoder_decoder", False) or (callable(can) and not can()):
        raise ModelError(
            f"{type(model).__name__} does not continue text: generation needs a decoder-only causal language model. "
            "Measure this model with `lowbit eval` instead."
        )


def wants_chat(tokenizer: Any, chat: bool | None, system: str | None) -> bool:
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise DataError("this tokenizer has no chat template. Leave chat out to continue the prompt as plain text.")
    chat = has_template if chat is None else chat
    if system is not None and not chat:
        why = "chat is off" if has_template else "this tokenizer has no chat template"
        raise DataError(f"a system message needs a chat template, and {why}. Put its text into the prompt instead.")
    return chat


def encode_prompt(tokenizer: Any, model: Any, prompt: str, chat: bool, system: str | None = None) -> list[int]:
    """Ids the model reads: the filled chat template, or the plain text with the tokenizer's own BOS. Never empty."""
    if chat:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": prompt})
        return _fill_template(tokenizer, messages)
    ids = list(tokenizer(prompt, verbose=False)["input_ids"]) if prompt else []
    if ids:
        return ids
    for name in ("bos_token_id", "eos_token_id"):
        for holder in (tokenizer, getattr(model, "config", None)):
            first = _as_ids(getattr(holder, name, None))
            if first:
                return [min(first)]
    raise DataError("the prompt is empty and this model has no token to start from. Give a prompt.")


def _fill_template(tokenizer: Any, messages: list[dict[str, str]]) -> list[int]:
    """Ids of the template, the answer's header included. transformers 4 returns a list, 5 a mapping: both are read."""
    from jinja2 import TemplateError

    try:
        out = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    except TemplateError as e:
        roles = " and ".join(m["role"] for m in messages)
        raise DataError(
            f"the chat template refuses messages of role {roles}: {e}. "
            "Put the system text into the prompt, or use chat=False."
        ) from e
    ids = out["input_ids"] if hasattr(out, "keys") else out
    ids = ids[0] if len(ids) and not isinstance(ids[0], int) else ids
    if not len(ids):
        raise DataError("the chat template turned the prompt into nothing. Give a prompt, or use chat=False.")
    return [int(i) for i in ids]


def eos_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer: generation config, model config and tokenizer may each name one or several."""
    holders = (getattr(model, "generation_config", None), getattr(model, "config", None), tokenizer)
    return frozenset(i for h in holders for i in _as_ids(getattr(h, "eos_token_id", None)))


def _as_ids(value: Any) -> list[int]:
    if value is None:
        return []
    return [int(v) for v in value] if isinstance(value, list | tuple | set) else [int(value)]


def room(model: Any, prompt_ids: list[int]) -> int | None:
    """How many tokens the model's context still takes after the prompt; None = no limit known."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    vocabulary = getattr(config, "vocab_size", None)
    if vocabulary is not None and max(prompt_ids) >= vocabulary:
        raise DataError(
            f"the prompt has token id {max(prompt_ids)}, but the model has {vocabulary} tokens: "
            "this tokenizer belongs to another model. Give the tokenizer that came with the model."
        )
    context = getattr(config, "max_position_embeddings", None)
    if not isinstance(context, int) or context <= 0:
        return None
    if len(prompt_ids) > context:
        raise DataError(
            f"the prompt has {len(prompt_ids)} tokens, but the model reads at most {context}: "
            f"shorten it by {len(prompt_ids) - context} tokens or more."
        )
    return context - len(prompt_ids)
