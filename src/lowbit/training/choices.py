"""What `prepare` is asked for, as data: which weight function and which input function go on which layers.

    weights: {method: quantize, format: binary-channel, estimator: reste}     or a method's name, or a format
    activations: {method: sign, estimator: approxsign}                        or a method's name; left out: float
    layers:                                          other choices for some layers, the first match wins
      - {match: "blocks.0.*", weights: float}        "float" leaves a layer (or its inputs) alone; match: one or a list
    skip: ["head*"]                                  layers to leave alone
    keep_ends: true                                  the first convolution and the last linear layer stay in float

A dict like this one, from YAML or Python; or only the weights.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lowbit.activations import InputSpec, activation_method, activation_methods
from lowbit.errors import FormatError, RecipeError, near_names
from lowbit.formats import Format
from lowbit.weights import WeightSpec, weight_method, weight_methods

FIELDS = ("weights", "activations", "layers", "skip", "keep_ends")
RULE_FIELDS = ("match", "weights", "activations")
FLOAT = ("float", None)


@dataclass(frozen=True)
class Choice:
    """A method's row and the options it is given."""

    spec: Any  # WeightSpec or InputSpec
    options: Mapping[str, Any]

    def __str__(self) -> str:
        given = ", ".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.spec.name}({given})"


@dataclass(frozen=True)
class Rule:
    """match: patterns of layer names; weights, activations: what they get, None for float."""

    match: tuple[str, ...]
    weights: "Choice | None"
    activations: "Choice | None"


@dataclass(frozen=True)
class Choices:
    """The whole request; `rule_for` answers for one layer."""

    rules: tuple[Rule, ...]
    skip: tuple[str, ...] = ()
    keep_ends: bool = True

    def rule_for(self, layer: str, stays_float: bool = False) -> "Rule | None":
        """The first rule that names the layer; None where it is left alone.

        stays_float: its network says so (`lowbit.layers.keep_float`), and only an entry of `layers` can say otherwise
        """
        rules = self.rules[:-1] if stays_float else self.rules
        rule = next((r for r in rules if _named(layer, r.match)), None)
        if rule is None or _named(layer, self.skip):
            return None
        return rule if rule.weights is not None or rule.activations is not None else None


def read_choices(
    recipe: Any, skip: "Iterable[str] | None" = None, keep_ends: "bool | None" = None, **options: Any
) -> Choices:
    """From a method's name, a format, or a mapping as above; options go to the weights' method.

    Raises RecipeError or FormatError with the nearest names for anything unknown.
    """
    request = dict(recipe) if _is_request(recipe) else {"weights": recipe}
    for name in request:
        if name not in FIELDS:
            raise RecipeError(f"unknown field {name!r} in what to prepare. {near_names(str(name), FIELDS)}")
    if options:
        request["weights"] = _described(request.get("weights")) | options
    weights, activations = read_weights(request.get("weights")), read_activations(request.get("activations"))
    rules = [_rule(row, weights, activations) for row in request.get("layers") or ()]
    kept = request.get("keep_ends", True) if keep_ends is None else keep_ends
    patterns = _patterns(request.get("skip", ()) if skip is None else skip)
    return Choices((*rules, Rule(("*",), weights, activations)), patterns, bool(kept))


def read_weights(given: Any) -> "Choice | None":
    """A choice of weight function: a method's name, a format, or {"method": ..., option: value}; None for float."""
    if given in FLOAT:
        return None
    options = _described(given)
    spec: WeightSpec = weight_method(options.pop("method"))
    spec.check(options)
    if isinstance(options.get("format"), str):
        options["format"] = Format.parse(options["format"])
    return Choice(spec, options)


def read_activations(given: Any) -> "Choice | None":
    """A choice of input function: a method's name or {"method": ..., option: value}; None for float."""
    if given in FLOAT:
        return None
    options = dict(given) if isinstance(given, Mapping) else {"method": given}
    if "method" not in options:
        raise RecipeError(f"activations {options} name no method. Known: {', '.join(activation_methods())}.")
    spec: InputSpec = activation_method(options.pop("method"))
    spec.check(options)
    return Choice(spec, options)


def _is_request(recipe: Any) -> bool:
    return isinstance(recipe, Mapping) and "method" not in recipe and "format" not in recipe


def _described(given: Any) -> dict[str, Any]:
    """Weights as a mapping with a method: a name of the folder first, else a format for `quantize`."""
    if isinstance(given, Mapping):
        return {"method": "quantize"} | dict(given)
    if given is None:
        return {"method": "quantize"}
    if isinstance(given, Format) or given not in weight_methods():
        if not isinstance(given, Format):
            _format_or_method(str(given))
        return {"method": "quantize", "format": given}
    return {"method": given}


def _format_or_method(text: str) -> None:
    """Raise FormatError for what is neither; the sentence names methods where one is near."""
    try:
        Format.parse(text)
    except FormatError as e:
        near = near_names(text, list(weight_methods()))
        raise FormatError(f"{e} Nor is it a method. {near}" if near.startswith("Did") else str(e)) from None


def _rule(row: Any, weights: "Choice | None", activations: "Choice | None") -> Rule:
    if not isinstance(row, Mapping) or "match" not in row:
        raise RecipeError(f"an entry of `layers` is {{match: PATTERN, weights: ..., activations: ...}}, not {row!r}.")
    for name in row:
        if name not in RULE_FIELDS:
            raise RecipeError(f"unknown field {name!r} of a layer's rule. {near_names(str(name), RULE_FIELDS)}")
    w = read_weights(row["weights"]) if "weights" in row else weights
    a = read_activations(row["activations"]) if "activations" in row else activations
    return Rule(_patterns(row["match"]), w, a)


def _patterns(given: "str | Iterable[str]") -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(str(p) for p in given)


def _named(layer: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(layer, pattern) for pattern in patterns)
