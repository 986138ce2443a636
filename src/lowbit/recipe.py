"""Recipes: what to do to a whole model, as data. Python object = YAML file = command-line flags.

    method: gptq            a solver's name (`lowbit methods --kind solver`)
    bits: 4                 width of the codes ...
    group: 64               ... and how many weights of a row share a scale (-1: the whole row)
    format: uint4-g64       instead of bits and group: any format string
    layers:                 other formats for some layers, the first match wins; "float" leaves a layer alone
      - {match: "*.down_proj", format: uint8-g64}
      - {match: "*.v_proj", format: uint4-g64, method: rtn}     another method, with its default options
      - {match: "*.o_proj", format: uint4-g64, options: {sweeps: 4}}     or options of its own
    options: {damping: 0.01}    the method's own options
    gram: oac               what is gathered about a layer: inputs, or the loss's gradients too: oac, guided, fisher
    data: valid.txt[:50%]   calibration text; windows x context tokens of it, chosen by seed
    embeddings: 8           bits of the embeddings and the output head, in groups (16 leaves them as they are), or
                            their format, e.g. uint4-g64-search

The steps follow from it and always come in this order: embeddings, calibration inputs, blocks one after the other
(statistics, solve, pack), output head, artifact. `Recipe.load` reads YAML, `Recipe.merged` lets flags win over the
file.
"""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lowbit.errors import RecipeError, near_names
from lowbit.formats import Format
from lowbit.solvers import Spec, find, table

MAY_BE_NONE = ("sweeps",)  # counted options of solvers that can be left out altogether


class LayerRule(BaseModel):
    """One exception to the recipe's format (and method, if it names one): layers whose full name matches."""

    model_config = ConfigDict(extra="forbid")
    match: str
    format: str
    method: str = ""
    options: dict[str, Any] = Field(default_factory=dict)


class Recipe(BaseModel):
    """See the module's text. Raises RecipeError or FormatError on anything unknown, never ignores it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    method: str = "gptq"
    bits: int = Field(4, ge=1, le=8)
    group: int = Field(64, ge=-1)
    format: str = ""
    layers: tuple[LayerRule, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)
    data: str = ""
    windows: int = Field(24, ge=1)
    context: int = Field(512, ge=2)
    seed: int = Field(0, ge=-(2**63), lt=2**64)  # what torch takes
    embeddings: int | str = 8
    activations: Literal["float", "int8"] = "float"
    gram: Literal["inputs", "oac", "guided", "fisher"] = "inputs"

    def __init__(self, **fields: Any) -> None:
        for name, value in fields.items():  # YAML reads yes, no, on and off as these, and they would count as 1 and 0
            if isinstance(value, bool):
                raise RecipeError(f"recipe field {name}={value!r}: no field is true or false; leave it out.")
        spec = table().get(fields.get("method", "gptq"))
        for name in ("bits", "group") if spec is not None and not fields.get("format") else ():
            fields.setdefault(name, getattr(spec, name))  # the method's usual ones
        try:
            super().__init__(**fields)
        except ValidationError as e:
            raise RecipeError(readable(e, list(Recipe.model_fields))) from None
        if self.group == 0:
            raise RecipeError("group 0: use a positive group size such as 64, or -1 for one group per row.")
        self._check_embeddings()
        self._check_gram(self.solver)
        _check_options(self.solver, self.options)
        for rule in self.layers:
            self._check_rule(rule)
        for text in (self.format, *self._formats_named()):
            if text not in ("", "float") and Format.parse(text).rounding == "stochastic":
                raise RecipeError(f"{text}: stochastic rounding gives other codes on every run. Leave that word out.")

    def _check_gram(self, spec: Spec) -> None:
        if self.gram != "inputs" and not spec.uses_gram:
            with_it = ", ".join(n for n, s in table().items() if s.uses_gram)
            raise RecipeError(f"method {spec.name!r} does not use gram={self.gram}. Methods that do: {with_it}.")

    def _check_rule(self, rule: LayerRule) -> None:
        _check_options(find(rule.method or self.method), rule.options)
        if rule.method in ("", self.method):
            return
        spec = find(rule.method)
        if spec.smooth is not None or spec.tune is not None:
            raise RecipeError(f"{rule.match}: {rule.method} works on whole blocks and cannot be a rule's method.")

    def _formats_named(self) -> list[str]:
        return [rule.format for rule in self.layers] + [t for t in [self.embeddings] if isinstance(t, str)]

    def _check_embeddings(self) -> None:
        if isinstance(self.embeddings, str):
            Format.parse(self.embeddings)
        elif not (1 <= self.embeddings <= 8 or self.embeddings == 16):
            raise RecipeError(f"embeddings: {self.embeddings} bits; use 1 to 8, or 16 to leave them as they are.")

    @property
    def solver(self) -> Spec:
        return find(self.method)

    @property
    def needs_data(self) -> bool:
        """Whether any of its methods does, or its Gram matrices."""
        return self.gram != "inputs" or any(
            find(m).needs_data for m in {self.method, *(rule.method or self.method for rule in self.layers)}
        )

    def solver_for(self, layer: str) -> "tuple[Spec, dict[str, Any]]":
        """A layer's method and the options it runs with."""
        rule = self._rule(layer)
        if rule is None or rule.method in ("", self.method):
            return self.solver, self.solver_options | (rule.options if rule else {})
        spec = find(rule.method)
        return spec, spec.options | rule.options

    def _rule(self, layer: str) -> "LayerRule | None":
        return next((rule for rule in self.layers if fnmatchcase(layer, rule.match)), None)

    @property
    def solver_options(self) -> dict[str, Any]:
        """The method's defaults with this recipe's changes."""
        return self.solver.options | self.options

    def format_for(self, layer: str) -> "Format | None":
        """The format of a layer by its full name; None leaves it as it is."""
        rule = self._rule(layer)
        text = self.format if rule is None else rule.format
        if text:
            return None if text == "float" else Format.parse(text)
        return self.solver.default_format(self.bits, self.group)

    def embedding_format(self, width: int) -> "Format | None":
        """Format of embeddings and head with rows of `width` weights.

        Symmetric groups of the recipe's group size where it divides. None leaves them as they are.
        """
        if isinstance(self.embeddings, str):
            return Format.parse(self.embeddings)
        if self.embeddings == 16:
            return None
        group = next((g for g in (self.group, 64, 32, 16) if g > 0 and width % g == 0), -1)
        return Format.parse(f"int{self.embeddings}-" + ("channel" if group == -1 else f"g{group}"))

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, every field named, so that a file says all that was done."""
        return self.model_dump(mode="json")

    @classmethod
    def load(cls, path: "str | Path") -> "Recipe":
        """Read a YAML recipe. Raises RecipeError naming what is wrong in it."""
        return cls(**read_yaml(path))

    @classmethod
    def merged(cls, base: "str | Path | Recipe | None", **flags: Any) -> "Recipe":
        """A recipe, or the file of one, with flags on top.

        Flags that are None do not count; `options` are merged one by one; bits or group replace a format.
        """
        fields = base.as_dict() if isinstance(base, Recipe) else read_yaml(base) if base else {}
        given = {k: v for k, v in flags.items() if v is not None}
        if given.get("format") == "":
            raise RecipeError("the format is empty: give one, e.g. --format uint4-g64, or leave it out.")
        if "options" in given:
            if not isinstance(given["options"], dict):
                raise RecipeError(f"options should be a dict such as {{'damping': 0.05}}, not {given['options']!r}.")
            given["options"] = {**fields.get("options", {}), **given["options"]}
        if ("bits" in given or "group" in given) and "format" not in given:
            fields.pop("format", None)
        return cls(**(fields | given))


def _check_options(spec: Spec, options: dict[str, Any]) -> None:
    """Options that the method has, of the kind it takes. Raises RecipeError."""
    for name, value in options.items():
        if name not in spec.options:
            known = list(spec.options) or ["(none)"]
            raise RecipeError(f"method {spec.name!r} has no option {name!r}. {near_names(name, known)}")
        least = 0 if name in MAY_BE_NONE else 1
        if not _like(value, spec.options[name], least):
            wanted = {bool: "true or false", int: f"a whole number of at least {least}"}
            raise RecipeError(
                f"option {name}={value!r} of {spec.name!r} should be "
                f"{wanted.get(type(spec.options[name]), 'a number of at least 0')}, "
                f"e.g. {spec.options[name]}."
            )


def _like(value: Any, default: Any, least: int) -> bool:
    """Whether an option's value is of its default's kind: bool, a count, or a finite number that is not negative."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(default, bool) and isinstance(value, bool)
    if isinstance(default, int):
        return isinstance(value, int) and value >= least
    return isinstance(value, (int, float)) and 0 <= value < float("inf")


def read_yaml(path: "str | Path", example: str = "`method: gptq` and `bits: 4`") -> dict[str, Any]:
    """A recipe file as a dict of fields; example: lines that such a file may hold."""
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        fields = yaml.safe_load(text)
        if twice := _written_twice(yaml.compose(text, yaml.SafeLoader)):
            raise RecipeError(f"recipe {str(path)!r} has {twice!r} twice; leave one of them.")
    except OSError as e:
        raise RecipeError(f"recipe {str(path)!r} cannot be read ({e.strerror or e}); check the path.") from e
    except (yaml.YAMLError, UnicodeDecodeError, ValueError) as e:
        raise RecipeError(f"recipe {str(path)!r} is not YAML: {_problem(e)}") from e
    except RecursionError:
        raise RecipeError(f"recipe {str(path)!r} is not YAML that can be read: its brackets are too deep.") from None
    if not isinstance(fields, dict) or not all(isinstance(k, str) for k in fields):
        raise RecipeError(f"recipe {str(path)!r} should be lines such as {example}.")
    return fields


def _problem(e: Exception) -> str:
    """What a YAML reader complains of, and in which line."""
    mark = getattr(e, "problem_mark", None)
    words = getattr(e, "problem", None) or str(e).splitlines()[0]
    return words if mark is None else f"{words}, in line {mark.line + 1}"


def _written_twice(node: Any) -> "str | None":
    """A key that a mapping of a YAML document holds twice; YAML readers take the last without a word."""
    if node is None or isinstance(node.value, str):
        return None
    pairs = [pair for pair in node.value if isinstance(pair, tuple)]
    keys = [str(key.value) for key, _ in pairs]
    inner = [value for _, value in pairs] if pairs else node.value
    again = (key for i, key in enumerate(keys) if key in keys[:i])
    return next(again, None) or next(filter(None, map(_written_twice, inner)), None)


def readable(e: ValidationError, known: list[str]) -> str:
    """The first fault of a recipe in a sentence; `known`: the fields there are."""
    first = e.errors()[0]
    where = ".".join(str(p) for p in first["loc"])
    if first["type"] == "extra_forbidden":
        return f"a recipe has no field {where!r}. {near_names(where, known)}"
    return f"recipe field {where}={first.get('input')!r}: {first['msg'].lower()}."
