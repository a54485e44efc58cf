"""`gossamer sparsity`: a plan before it is run, and the methods of the literature as recipes.

The one idea: the plan itself is asked, step by step, on the shapes of the recipe's model; nothing
is drawn from formulas that the run does not use.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gossamer.launch.quantities import format_count

if TYPE_CHECKING:
    from gossamer.trainer.config import ModelConfig, TrainConfig
    from gossamer.trainer.sparsity.method import Shapes

COLUMNS, LINES = 64, 8
EIGHTHS = " ▁▂▃▄▅▆▇█"


def add_sparsity_commands(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands; each sets `run`, a function of the parsed arguments."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    command = commands.add_parser("plan", help="draw what a recipe's plan will do, and its cost")
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="train.seed=2, and so on")
    command.add_argument("--method", metavar="NAME", help="instead of the recipe's own plan")
    command.add_argument("--json", type=Path, metavar="OUT", help="also write it there")
    command.set_defaults(run=_plan)
    command = commands.add_parser("methods", help="list methods, or write one as YAML")
    command.add_argument("name", nargs="?", metavar="NAME")
    command.set_defaults(run=_methods)


def _methods(arguments: argparse.Namespace) -> None:
    from gossamer.trainer.sparsity.recipes import RECIPES

    if arguments.name is None:
        print("\n".join(RECIPES))
        return
    config = _recipe(arguments.name)
    print(f"train:\n  sparsity:\n{_yaml(_not_default(config), '    ')}")


def _recipe(name: str) -> Any:  # noqa: ANN401
    from gossamer.trainer.sparsity.recipes import RECIPES

    if name not in RECIPES:
        raise ValueError(f"{name} is no method; expected one of {', '.join(RECIPES)}")
    return RECIPES[name]


def _not_default(config: Any) -> Any:  # noqa: ANN401
    """The fields of a config that differ from their defaults."""
    if isinstance(config, tuple):
        return [_not_default(each) for each in config]
    if not is_dataclass(config):
        return config
    found = {}
    for field in fields(config):
        value, made = getattr(config, field.name), field.default_factory
        if value != (field.default if made is MISSING else made()):
            found[field.name] = _not_default(value)
    return found


def _yaml(tree: Mapping[str, Any], indent: str) -> str:
    import yaml

    text = yaml.safe_dump(tree, sort_keys=False, width=96 - len(indent))
    return "\n".join(indent + line for line in text.rstrip().split("\n"))


@dataclass(frozen=True, slots=True)
class Course:
    """What a plan does over a run."""

    shapes: Shapes
    """Of the governed matrices."""
    num_parameters: int
    """Of the whole model."""
    total_steps: int
    density: list[float]
    """Target of all governed weights together, after each step from 0."""
    updates: list[int]
    """Steps after which masks change."""
    scored: int
    """Steps whose dense gradient is needed."""
    final: dict[str, float]
    """Target of each matrix at the end."""
    rewarm: list[int]
    """Steps at a lower learning rate than the phase's."""

    @property
    def governed(self) -> int:
        return sum(rows * columns for rows, columns in self.shapes.values())

    @property
    def mean_density(self) -> float:
        return sum(self.density[:-1]) / self.total_steps


def course_of(config: TrainConfig, shapes: Shapes) -> Course:
    """Asks the plan of `config` about every step. Raises ValueError where it does not fit."""
    from gossamer.trainer.import_path import resolve
    from gossamer.trainer.sparsity.config import SPARSITY_METHODS
    from gossamer.trainer.sparsity.method import Horizon, Point

    sparsity = config.sparsity
    if sparsity is None:
        raise ValueError("the recipe has no train.sparsity; expected a plan, or --method NAME")
    steps = config.max_steps
    horizon = Horizon(sparsity.total_steps or steps, sparsity.total_tokens)
    method = resolve(sparsity.method, SPARSITY_METHODS, "sparsity.method")(sparsity)
    names = method.begin(shapes, horizon)
    size = {name: shapes[name][0] * shapes[name][1] for name in names}
    governed, tokens = sum(size.values()), sparsity.total_tokens or 0
    density, updates, rewarm, scored, target = [], [], [], 0, dict.fromkeys(names, 1.0)
    for step in range(steps + 1):
        point = Point(step, tokens * step // horizon.total_steps)
        plan = method.step(point)
        scored += bool(plan.scores) and step < steps
        rewarm += [step + 1] if plan.lr_factor != 1.0 else []
        if plan.updates:
            updates.append(step)
            now = method.target(point)
            target |= {name: now[name] for name in plan.updates}
        density.append(sum(target[name] * size[name] for name in names) / governed)
    return Course(
        shapes={name: shapes[name] for name in names},
        num_parameters=sum(math.prod(shape) for shape in shapes.values()),
        total_steps=steps,
        density=density,
        updates=updates,
        scored=scored,
        final=target,
        rewarm=rewarm,
    )


def model_shapes(model: ModelConfig, vocab_size: int) -> Shapes:
    """Every tensor of a model by its checkpoint name; no weights are made."""
    import torch
    from gossamer.comm.names import logical_views
    from gossamer.trainer.model import hf_config
    from gossamer.trainer.tokenizer import token_fields
    from transformers import AutoModelForCausalLM

    hf = hf_config(model, token_fields(vocab_size))
    with torch.device("meta"):
        module = AutoModelForCausalLM.from_config(hf)
    views = logical_views(module.named_parameters(), model_type=hf.model_type)
    return {name: tuple(view.shape) for name, view in views.items()}


def _plan(arguments: argparse.Namespace) -> None:
    from gossamer.launch.recipe import load_recipe

    config = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.method is not None:
        config = replace(config, train=replace(config.train, sparsity=_recipe(arguments.method)))
    train = config.train
    course = course_of(train, model_shapes(train.model, train.tokenizer.vocab_size))
    print(draw(course))
    if arguments.json is not None:
        told = asdict(course) | {"mean_density": course.mean_density}
        arguments.json.write_text(json.dumps(told, indent=1))


def draw(course: Course) -> str:
    """The course as lines for a terminal."""
    governed, every = course.governed, course.num_parameters
    kept = every - governed * (1.0 - course.mean_density)
    lines = [
        f"{len(course.shapes)} matrices, {format_count(governed)} of {format_count(every)} weights,"
        f" over {course.total_steps} steps",
        "",
        *_chart(course.density),
        "",
        f"density      {course.density[0]:.3f} at first, {course.density[-1]:.3f} at the end,"
        f" {course.mean_density:.4f} on average",
        f"kept weights {format_count(kept)} of the model on average",
        f"masks change {len(course.updates)} times{_span(course.updates)}",
        f"gradients    of masked weights needed in {course.scored} steps",
    ]
    if course.rewarm:
        lines.append(
            f"learning rate rises again over {len(course.rewarm)} steps{_span(course.rewarm)}"
        )
    return "\n".join([*lines, "", *_by_kind(course)])


def _chart(density: Sequence[float]) -> list[str]:
    """Columns of blocks; each is the mean of its steps."""
    count = min(COLUMNS, len(density))
    cuts = [len(density) * i // count for i in range(count + 1)]
    means = [sum(density[a:b]) / (b - a) for a, b in zip(cuts, cuts[1:], strict=False)]
    lines = []
    for line in reversed(range(LINES)):
        filled = [min(8, max(0, round((mean * LINES - line) * 8))) for mean in means]
        label = f"{(line + 1) / LINES:4.2f}" if (line + 1) % 2 == 0 else "    "
        lines.append(f"{label} │{''.join(EIGHTHS[eighths] for eighths in filled)}")
    last = str(len(density) - 1)
    return [*lines, "     └" + "─" * count, "      0" + " " * (count - 1 - len(last)) + last]


def _by_kind(course: Course) -> list[str]:
    """Final densities of matrices that are called alike."""
    kinds: dict[str, list[str]] = {}
    for name in course.shapes:
        kind = ".".join("*" if part.isdigit() else part for part in name.split("."))
        kinds.setdefault(kind, []).append(name)
    width = max(map(len, kinds))
    lines = [f"{'matrices at the end':{width}}  number  rows x columns   density"]
    for kind, names in kinds.items():
        found = sorted(course.final[name] for name in names)
        low, high = found[0], found[-1]
        told = f"{low:.3f}" if low == high else f"{low:.3f} to {high:.3f}"
        shape = "{} x {}".format(*course.shapes[names[0]])
        lines.append(f"{kind:{width}}  {len(names):6}  {shape:>14}   {told}")
    return lines


def _span(steps: Sequence[int]) -> str:
    return f", from step {steps[0]} to {steps[-1]}" if steps else ""
