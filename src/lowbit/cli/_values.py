"""Reading what people type: sizes, shares, times and key=value settings."""

import re
from typing import Any

import typer

UNITS = {"": 1, "b": 1} | {f"{u}{i}b": (1024 if i else 1000) ** p for p, u in enumerate("kmgt", 1) for i in ("", "i")}
UNITS |= {u: 1000**p for p, u in enumerate("kmgt", 1)}


def parse_size(text: str) -> int:
    """Bytes of "8GB", "1.5GiB", "900 MB", "2G" (powers of 1000; the i makes them powers of 1024). Raises
    typer.BadParameter.

    >>> parse_size("1.5GiB"), parse_size("900MB")
    (1610612736, 900000000)
    """
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*", text)
    if m is None or m[2].lower() not in UNITS:
        raise typer.BadParameter(
            f"{text!r} is not a size. Write a number and a unit, for example 8GB, 1.5GiB or 900MB."
        )
    size = int(float(m[1]) * UNITS[m[2].lower()])
    if size < 1_000_000:
        raise typer.BadParameter(f"{text!r} is {size} bytes, too little to run anything. Did you mean {m[1]}GB?")
    return size


def parse_fraction(text: str) -> float:
    """A share: "5%", "0.05".

    >>> parse_fraction("5%"), parse_fraction("0.05")
    (0.05, 0.05)
    """
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(%?)\s*", text)
    if m is None or float(m[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a share above 0. Write for example 5% or 0.05.")
    value = float(m[1]) / (100 if m[2] else 1)
    if not m[2] and value >= 1:
        raise typer.BadParameter(f"{text!r} is {100 * value:g} percent. Did you mean {text.strip()}%?")
    return value


def parse_seconds(text: str) -> float:
    """A time: "20ms", "0.02s", "500us".

    >>> parse_seconds("20ms"), parse_seconds("1.5s")
    (0.02, 1.5)
    """
    m = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(us|ms|s)\s*", text)
    if m is None or float(m[1]) == 0:
        raise typer.BadParameter(f"{text!r} is not a time above 0. Write a number and a unit, for example 20ms.")
    return float(m[1]) * {"us": 1e-6, "ms": 1e-3, "s": 1.0}[m[2]]


def parse_settings(pairs: "list[str] | None") -> dict[str, Any]:
    """--set key=value, values read as YAML scalars: 0.01 is a number, true a truth value, the rest text.

    >>> parse_settings(["damp=0.01", "act_order=true"])
    {'damp': 0.01, 'act_order': True}
    """
    import yaml

    settings: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals or not key.strip().isidentifier():
            raise typer.BadParameter(f"--set {pair!r}: write key=value, for example --set damp=0.01.")
        try:
            settings[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError:
            settings[key.strip()] = value
    return settings
