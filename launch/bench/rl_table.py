"""The rows of `gossamer bench rl` as Markdown.

The one idea: what was measured, on which machine and how busy it was stand above the rows.
"""

from __future__ import annotations

import json
from pathlib import Path

from gossamer.launch.bench.rl import COMMAND
from gossamer.launch.quantities import format_percent

BEGIN, END = "<!-- bench rl: begin -->", "<!-- bench rl: end -->"
HEAD = (
    "| mode | engines | samples/s | trainer idle | step to token | slowest tenth | pause |"
    " staleness |"
)
SPARSITY_HEAD = (
    "| lr | steps | changed in a step | of these, in the step before, too | ever changed |"
    " differ in the end | least, most of an expert |"
)


def render_table(path: Path) -> str:
    """A table of speeds and one of sparsity. Raises ValueError for other JSON."""
    try:
        result = json.loads(path.read_text())
        batch, (before, after) = result["batch"], result["load_average"]
        lines = [
            f"`{result['command']}` on {result['machine']}; load average {before} before and"
            f" {after} after. {batch['steps']} steps of {batch['prompts_per_step']} prompts x"
            f" {batch['samples_per_prompt']} samples of at most {batch['max_new_tokens']} tokens,"
            " one trainer rank, one thread a process, times in ms.",
            "",
            *_head(HEAD),
        ]
        for row in result["rows"]:
            cells = [row["mode"], str(row["engines"]), f"{row['samples_per_s']:.0f}"]
            cells += [format_percent(row["trainer_idle"])]
            times = ("step_to_token_s", "step_to_token_p90_s", "pause_s")
            cells += [f"{1000 * row[name]:.3g}" for name in times]
            cells += [f"{row['staleness_mean']:.2f}"]
            lines.append(f"| {' | '.join(cells)} |")
        lines += ["", *_head(SPARSITY_HEAD)]
        for row in result["sparsity"]:
            cells = [f"{row['lr']:g}", str(row["steps"])]
            shares = ("changed_share", "kept_share", "ever_share", "net_share")
            cells += [format_percent(row[name]) for name in shares]
            least, most = (format_percent(row[f"expert_net_{end}"]) for end in ("min", "max"))
            lines.append(f"| {' | '.join([*cells, f'{least}, {most}'])} |")
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} does not hold rows of `{COMMAND}`: {error}") from error
    return "\n".join(lines)


def _head(head: str) -> list[str]:
    return [head, "|" + "---|" * (head.count("|") - 1)]
