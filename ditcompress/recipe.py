"""Recipes: YAML to strict models, and from a recipe and a layout to a plan.

A recipe is a list of rules; the first rule that matches a linear decides about it, and a linear that no rule matches
stays as it is. There is no inheritance and there are no import paths; `--set` changes single values.
"""

from __future__ import annotations

import fnmatch
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from .distill.settings import Options
from .errors import DitcompressError, printable
from .plan import ActivationSpec, LayerDecision, Plan, StepSpec, WeightSpec
from .registry import nearest
from .sections import Bitsandbytes, Evaluation, Pruning, Report, SchedulerSearch, Strict
from .sections import Calibration as Calibration
from .sections import Training as Training
from .strict_yaml import read_yaml

if TYPE_CHECKING:
    from .models.base import Layout, Site

Role = Literal["qkv", "attn_out", "ffn_in", "ffn_out", "modulation", "time_embedding", "embedding", "head", "other"]


class Weight(BaseModel):
    """`format` names a module of `formats/`; the other keys are its parameters."""

    model_config = ConfigDict(extra="allow", frozen=True)
    format: str

    def spec(self) -> WeightSpec:
        return WeightSpec(self.format, dict(sorted((self.model_extra or {}).items())))


class Activation(Strict):
    mode: Literal["none", "token", "tensor", "static"] = "none"
    bits: int = Field(8, ge=2, le=8)
    symmetric: bool = True
    group: int = Field(0, ge=0)
    element: Literal["int", "e1m2", "e2m1", "e3m0", "e2m3", "e3m2", "e4m3", "e5m2"] = "int"
    scale: Literal["float32", "e8m0", "e4m3"] = "float32"

    @model_validator(mode="after")
    def _grouped(self) -> Activation:
        if (self.group or self.scale != "float32" or self.element != "int") and self.mode != "token":
            raise ValueError("group, element and scale of an activation need mode: token")
        if self.scale != "float32" and not self.group:
            raise ValueError(f"scale: {self.scale} needs a group")
        return self


class Rule(Strict):
    """One rule. It matches when role, block range and name pattern all do; what is left out matches everything."""

    roles: tuple[Role, ...] = ()
    blocks: str = ""
    names: tuple[str, ...] = ()
    keep: bool = False  # matched linears stay as they are
    weight: Weight | None = None
    activation: Activation = Activation()
    smooth: Literal["none", "fold", "online"] = "none"
    rank: int = Field(0, ge=0)
    rotate: Literal["none", "full"] | Annotated[int, Field(ge=2)] = "none"
    low_rank_input: Literal["rounded", "float"] = "rounded"
    output_norm: Literal["none", "rms"] = "none"
    steps: tuple[StepSpec, ...] = (StepSpec("rtn"),)

    @field_validator("steps", mode="before")
    @classmethod
    def _named_steps(cls, value: Any) -> tuple[StepSpec, ...]:
        if not isinstance(value, list):
            raise ValueError("a list of steps is expected")
        return tuple(_step(item) for item in value)

    @field_validator("blocks")
    @classmethod
    def _range(cls, value: str) -> str:
        if value and not re.fullmatch(r"-?\d+(-\d+)?", value):
            raise ValueError("a block range looks like 0-3, 5 or -1")
        return value


def _step(item: Any) -> StepSpec:
    if isinstance(item, str):
        return StepSpec(item)
    if isinstance(item, dict) and len(item) == 1:
        ((name, params),) = item.items()
        if params is None or isinstance(params, dict):
            return StepSpec(str(name), params or {})
    raise ValueError("a step is a name, or a name with its parameters: {gptq: {damp: 0.01}}")


class Recipe(Strict):
    """A validated recipe. `source` names the paper of a faithful recipe and is empty for our own."""

    name: str
    description: str = ""
    source: str = ""
    calibration: Calibration | None = None
    training: Training | None = None
    evaluation: Evaluation = Evaluation()
    backend: Literal["ditcompress", "bitsandbytes"] = "ditcompress"
    options: Bitsandbytes | None = None
    scheduler_search: SchedulerSearch | None = None
    prune: Pruning | None = None
    distill: Options | None = None
    rules: tuple[Rule, ...] = ()
    report: Report | None = None

    @property
    def staged(self) -> bool:
        """Whether it is more than a quantization: the stages are prune, distill, rules and report, in this order."""
        return any(stage is not None for stage in (self.prune, self.distill, self.report))

    @model_validator(mode="after")
    def _does_something(self) -> Recipe:
        if not self.rules and not self.prune and not self.distill:
            raise ValueError("rules are needed (or a stage: prune, distill)")
        return self

    @model_validator(mode="after")
    def _of_one_backend(self) -> Recipe:
        if (self.backend == "bitsandbytes") != (self.options is not None):
            raise ValueError("backend: bitsandbytes and options go together")
        for rule in self.rules if self.options else ():
            if wrong := sorted(rule.model_fields_set - {"roles", "blocks", "names", "keep"}):
                raise ValueError(f"{wrong[0]} in a rule means nothing to bitsandbytes")
        return self

    def to_json(self) -> dict[str, Any]:
        """JSON values that `parse_recipe` reads back to an equal recipe."""
        value = self.model_dump(mode="json", exclude=None if self.options else {"backend", "options"})
        if self.options:
            value["options"] = self.options.params()
            value["rules"] = [rule.model_dump(mode="json", exclude_unset=True) for rule in self.rules]
            return value
        for section in ("scheduler_search", "prune", "distill", "report"):  # most recipes have none
            if getattr(self, section) is None:
                del value[section]
        for rule, read in zip(value["rules"], self.rules, strict=True):
            rule["steps"] = [{step.name: dict(step.params)} for step in read.steps]
            if read.weight is not None:
                rule["weight"] = {"format": read.weight.format, **(read.weight.model_extra or {})}
        return value


# --- reading --------------------------------------------------------------------------------------------------------


def parse_recipe(value: Any, where: str) -> Recipe:
    """A recipe from parsed YAML or JSON; E202 names the key and the nearest known one."""
    if not isinstance(value, dict):
        raise DitcompressError("E202", where, "is not a mapping of keys", "see `ditcompress recipes show w4a8`")
    try:
        return Recipe.model_validate(value)
    except ValidationError as error:
        faults = sorted(
            error.errors(), key=lambda fault: fault["type"] != "extra_forbidden"
        )  # a typo explains the rest
        first = faults[0]
        place = ".".join(str(part) for part in first["loc"])
        remedy = "see `ditcompress recipes show w4a8`"
        if first["type"] == "extra_forbidden":
            remedy = nearest(str(first["loc"][-1]), _known_keys(first["loc"]))
        raise DitcompressError("E202", f"{where}: {place}", _reason(first), remedy) from None


def _reason(fault: Any) -> str:
    if fault["type"] == "extra_forbidden":
        return "unknown key"
    return f"{fault['msg']} (found {printable(fault.get('input'), 60)})"


def _known_keys(location: Sequence[str | int]) -> list[str]:
    """The legal keys beside the unknown one that `location` ends in."""
    model: type[BaseModel] = Recipe
    for part in location[:-1]:
        inner: dict[str, type[BaseModel]] = {
            "calibration": Calibration,
            "training": Training,
            "rules": Rule,
            "options": Bitsandbytes,
            "activation": Activation,
            "scheduler_search": SchedulerSearch,
            "prune": Pruning,
            "distill": Options,
            "report": Report,
        }
        model = inner.get(str(part), model)
    return list(model.model_fields)


# --- finding recipes -----------------------------------------------------------------------------------------------


def data_folder(name: str) -> Path:
    """`recipes` or `calib_data`: inside an installed package, else beside it in the source tree."""
    package = Path(__file__).resolve().parent
    installed = package / "_data" / name
    return installed if installed.is_dir() else package.parent / name


def recipe_files() -> dict[str, Path]:
    """Every shipped recipe by name."""
    return {path.stem: path for path in sorted(data_folder("recipes").rglob("*.yaml"))}


def load_recipe(name_or_path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """A shipped recipe by name, or a recipe file; then the `key=value` overrides. Steps and formats are validated."""
    files, path = recipe_files(), Path(name_or_path)
    if str(name_or_path) in files:
        path = files[str(name_or_path)]
    elif path.suffix not in (".yaml", ".yml"):
        raise DitcompressError(
            "E201", f"recipe {str(name_or_path)!r}", "is not known", nearest(str(name_or_path), list(files))
        )
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DitcompressError(
            "E202", path, f"cannot be read ({type(error).__name__})", "give a YAML text file"
        ) from None
    value = read_yaml(text, path.name)
    if isinstance(value, dict):
        value.setdefault("name", path.stem)
    for change in overrides:
        override(value, change)
    return parse_recipe(value, path.name)


def override(value: Any, text: str) -> None:
    """Set one value: `calibration.samples=8`, `rules.0.rank=16`; `*` stands for every entry of a list."""
    path, found, raw = text.partition("=")
    if not found or not path:
        raise DitcompressError("E203", f"--set {text}", "is not key=value", "for example --set calibration.samples=8")
    new = read_yaml(raw, f"--set {path}")
    keys = path.split(".")
    for parent in _walk(value, keys[:-1], path):
        if isinstance(parent, list) and keys[-1].isdigit() and int(keys[-1]) < len(parent):
            parent[int(keys[-1])] = new
        elif isinstance(parent, dict):
            parent[keys[-1]] = new
        else:
            raise DitcompressError(
                "E203", f"--set {path}", "names no key of the recipe", "see `ditcompress recipes show`"
            )


def _walk(value: Any, keys: Sequence[str], path: str) -> Iterator[Any]:
    if not keys:
        yield value
    elif isinstance(value, list) and keys[0] == "*":
        for item in value:
            yield from _walk(item, keys[1:], path)
    elif isinstance(value, list) and keys[0].isdigit() and int(keys[0]) < len(value):
        yield from _walk(value[int(keys[0])], keys[1:], path)
    elif isinstance(value, dict) and (value.get(keys[0]) is not None or keys[0] in Recipe.model_fields):
        yield from _walk(value.setdefault(keys[0], {}), keys[1:], path)
    else:
        raise DitcompressError(
            "E203", f"--set {path}", f"the recipe has no {keys[0]!r}", "see `ditcompress recipes show`"
        )


# --- from recipe to plan -------------------------------------------------------------------------------------------


def make_plan(recipe: Recipe, layout: Layout) -> Plan:
    """One decision for each linear that a rule matches, in forward order."""
    decisions = []
    for site in layout.sites:
        for number, rule in enumerate(recipe.rules):
            if _matches(rule, site, layout):
                if not rule.keep and recipe.options is not None:
                    decisions.append(_foreign(recipe.options, site, f"rule {number + 1}"))
                elif not rule.keep and rule.weight is not None:
                    decisions.append(_decide(rule, site, f"rule {number + 1}"))
                break
    return Plan(tuple(decisions))


def _matches(rule: Rule, site: Site, layout: Layout) -> bool:
    if not site.block and not rule.names:
        return False  # linears outside the blocks (embedders, head) are touched only when named
    if rule.roles and site.role not in rule.roles:
        return False
    if rule.names and not any(fnmatch.fnmatchcase(site.name, pattern) for pattern in rule.names):
        return False
    if rule.blocks:
        return site.block in _block_range(rule.blocks, layout.blocks)
    return True


def _block_range(text: str, blocks: Sequence[str]) -> Sequence[str]:
    if text.startswith("-"):
        return blocks[int(text) :][:1]
    first, _, last = text.partition("-")
    return blocks[int(first) : int(last or first) + 1]


def _foreign(options: Bitsandbytes, site: Site, reason: str) -> LayerDecision:
    """What another library does to a linear."""
    spec = WeightSpec(f"bitsandbytes-{options.quant_type}", options.params())
    return LayerDecision(site.name, site.role, spec, reason=reason)


def _decide(rule: Rule, site: Site, reason: str) -> LayerDecision:
    assert rule.weight is not None
    activation = ActivationSpec(**rule.activation.model_dump())
    from .hadamard import block_for  # torch: only where a plan is made

    rotate = 0 if rule.rotate == "none" else block_for(site.in_features, 0 if rule.rotate == "full" else rule.rotate)
    rotate = 0 if rotate < 2 else rotate
    rank = min(rule.rank, site.in_features, site.out_features)
    return LayerDecision(
        site.name,
        site.role,
        rule.weight.spec(),
        activation,
        rule.steps,
        rule.smooth,
        rank,
        rotate,
        rule.low_rank_input,
        rule.output_norm == "rms",
        reason,
    )


def canonical(recipe: Recipe) -> str:
    """One line of JSON that two equal recipes share."""
    return json.dumps(recipe.to_json(), sort_keys=True)
