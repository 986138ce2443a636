"""Training recipes: what `lowbit train` does, as data. A YAML file, or one of those that ship with lowbit.

title: Digits, ternary weights          a line for the list of recipes
task: digits                            digits, cifar10, shakespeare
data: ""                                a folder, file or hub name, where the task needs one
architecture: {name: mlp, width: 256}   mlp, resnet, vit, lstm, gpt with their options, or only a name
weights: ternary                        what `lowbit.prepare` takes: a method, a format, or {method: ..., ...}
activations: float                      the same for the inputs of layers
layers: [], skip: [], keep_ends: true   as for `lowbit.prepare`
epochs: 20, batch: 64                   passes over the training examples, examples a step
optimizer: adamw, lr: 0.003             sgd (momentum 0.9), adam, adamw
decay: 0.0, clip: 0.0                   weight decay of matrices only; largest gradient norm, 0 for none
schedule: cosine, warmup: 0.5           cosine, linear or constant after `warmup` epochs of rising lr
precision: float32                      or bf16 (autocast)
evaluate: 1                             epochs between two looks at the test set
seeds: [0]                              one training each
device: auto                            auto, cpu, cuda
train_examples: 0, test_examples: 0     use only so many; 0 for all
diagnostics: true                       record flip rates, gradient growth, ... once an epoch
"""

import math
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from lowbit.errors import RecipeError, near_names
from lowbit.recipe import read_yaml, readable
from lowbit.train.architectures import architecture
from lowbit.train.tasks import task
from lowbit.training import read_choices

SHIPPED = Path(__file__).parent / "recipes"
# what a finished training may be looked at, or an unfinished one gone on, with another value of
FREE = ("title", "device", "data")


class TrainRecipe(BaseModel):
    """See the module's text. Raises RecipeError or FormatError on anything unknown, never ignores it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    title: str = ""
    task: str
    data: str = ""
    architecture: dict[str, Any]
    weights: Any = "ternary"
    activations: Any = "float"
    layers: tuple[dict[str, Any], ...] = ()
    skip: tuple[str, ...] = ()
    keep_ends: bool = True
    epochs: int = Field(20, ge=1)
    batch: int = Field(64, ge=1)
    optimizer: Literal["sgd", "adam", "adamw"] = "adamw"
    lr: float = Field(3e-3, gt=0, allow_inf_nan=False)
    decay: float = Field(0.0, ge=0, allow_inf_nan=False)
    clip: float = Field(0.0, ge=0, allow_inf_nan=False)
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = Field(0.5, ge=0, allow_inf_nan=False)
    precision: Literal["float32", "bf16"] = "float32"
    evaluate: int = Field(1, ge=1)
    seeds: tuple[int, ...] = (0,)
    device: str = "auto"
    train_examples: int = Field(0, ge=0)
    test_examples: int = Field(0, ge=0)
    diagnostics: bool = True

    def __init__(self, **fields: Any) -> None:
        known = list(type(self).model_fields)
        for name, value in fields.items():  # YAML reads yes, no, on and off as these, and they would count as 1 and 0
            if isinstance(value, bool) and name not in ("keep_ends", "diagnostics"):
                raise RecipeError(f"recipe field {name}={value!r} is not true or false; leave it out.")
        if missing := [n for n in ("task", "architecture") if n not in fields]:
            raise RecipeError(f"a training recipe needs {missing[0]!r}, e.g. task: digits and architecture: mlp.")
        try:
            super().__init__(**fields)
        except ValidationError as e:
            raise RecipeError(readable(e, known)) from None
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise RecipeError(f"seeds {list(self.seeds)}: give different whole numbers from 0 on, e.g. [0, 1, 2].")
        architecture(self.network).check(task(self.task).kind, self.network_options)
        read_choices(self.choices)

    @field_validator("architecture", mode="before")
    @classmethod
    def _named(cls, value: Any) -> Any:
        value = {"name": value} if isinstance(value, str) else value
        if isinstance(value, dict) and "name" not in value:
            raise ValueError("an architecture has a name, e.g. {name: mlp, width: 256}")
        return value

    @property
    def network(self) -> str:
        return str(self.architecture["name"])

    @property
    def network_options(self) -> dict[str, Any]:
        return {k: v for k, v in self.architecture.items() if k != "name"}

    @property
    def choices(self) -> dict[str, Any]:
        """What `lowbit.prepare` is given."""
        names = ("weights", "activations", "layers", "skip", "keep_ends")
        return {name: getattr(self, name) for name in names}

    @property
    def rounds_weights(self) -> bool:
        """False for a float baseline, which is not packed."""
        return any(r.weights for r in read_choices(self.choices).rules)

    @property
    def rounds_inputs(self) -> bool:
        return any(r.activations for r in read_choices(self.choices).rules)

    def lr_at(self, step: int, per_epoch: int) -> float:
        """The learning rate of step `step`, counted from 0."""
        total, warm = self.epochs * per_epoch, self.warmup * per_epoch
        rising = min(1.0, (step + 1) / warm) if warm >= 1 else 1.0
        done = step / total
        falling = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
        return self.lr * rising * falling[self.schedule]

    def as_dict(self) -> dict[str, Any]:
        """JSON-able, every field named."""
        return self.model_dump(mode="json")

    def identity(self) -> dict[str, Any]:
        """What must be the same for a checkpoint to go on; seeds are trained one by one."""
        return {k: v for k, v in self.as_dict().items() if k not in (*FREE, "seeds")}


def shipped() -> dict[str, Path]:
    """Name -> file of the recipes that come with lowbit."""
    return {p.stem: p for p in sorted(SHIPPED.glob("*.yaml"))}


def load_recipe(name: "str | Path", **changes: Any) -> TrainRecipe:
    """A shipped recipe by name, or a YAML file; changes that are None do not count. Raises RecipeError."""
    given = {k: v for k, v in changes.items() if v is not None}
    fields = read_yaml(_file(str(name)), "`task: digits` and `architecture: mlp`") | given
    return TrainRecipe(**fields)


def _file(name: str) -> Path:
    known = shipped()
    if name in known:
        return known[name]
    if Path(name).suffix in (".yaml", ".yml") or Path(name).exists():
        return Path(name)
    raise RecipeError(f"there is no training recipe {name!r}, and no such file. {near_names(name, list(known))}")
