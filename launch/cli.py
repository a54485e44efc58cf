"""The `gossamer` command.

The one idea: parse first, import later; `--help` and `validate` load neither torch nor Ray.
"""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from pathlib import Path

from gossamer.launch.engines_cli import add_engines_command
from gossamer.launch.log_cli import add_log_commands
from gossamer.launch.place import add_place_command
from gossamer.launch.prometheus import add_metrics_command
from gossamer.launch.run_argument import open_here
from gossamer.launch.sparsity_cli import add_sparsity_commands
from gossamer.launch.submit import add_submit_commands
from gossamer.launch.top import add_top_command
from gossamer.trainer.run_folder import inside, is_url

POOLS = tuple(f"rollout.{name}=" for name in ("engines", "num_cpus", "num_gpus", "pools"))
PLACES = ("cluster.", "recovery.", *POOLS, "train.outer.url=")
"""What begins an override of `resume`."""


def main(argv: list[str] | None = None) -> int:
    """Runs one command; returns the exit code. Errors of the user's are one sentence on stderr."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    if any(word.startswith("-") or not hasattr(arguments, "overrides") for word in rest):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:  # argparse takes overrides behind an option for strays
        arguments.overrides += rest
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _as_ctrl_c)  # `ray job stop`, systemd, Slurm
    try:
        return arguments.run(arguments) or 0
    except (ValueError, OSError, RuntimeError) as error:
        print(f"gossamer: {error}", file=sys.stderr)
        return 1
    except ImportError as error:
        print(f"gossamer: {error}; expected `pip install gossamer[all]`", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        print("gossamer: " + "; ".join(filter(None, ["stopped", str(error)])), file=sys.stderr)
        return 130


def _as_ctrl_c(*_: object) -> None:
    raise KeyboardInterrupt


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gossamer",
        description="Trains sparse mixture-of-experts models over thin networks.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, what in (("train", "train on text"), ("rl", "train on text and by RL")):
        command = commands.add_parser(name, help=f"{what}, as a recipe says")
        _add_recipe(command)
        command.add_argument(
            "--run-dir", metavar="RUN_DIR", help="a folder or s3://, ...; default: runs/NAME"
        )
        command.add_argument("--overwrite", action="store_true", help="delete an earlier run there")
        command.set_defaults(run=_start, command=name)
    command = commands.add_parser("join", help="add one more replica to a run, from any cluster")
    command.add_argument(
        "log", metavar="LOG", help="where the replicas meet: RUN_DIR/rounds, s3://"
    )
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="what differs from theirs")
    command.add_argument("--run-dir", metavar="RUN_DIR", help="default: runs/NAME-REPLICA")
    command.add_argument("--name", help="of a replica to take the place of; default: a new one")
    command.set_defaults(run=_join)
    command = commands.add_parser("resume", help="go on with a run that was stopped or killed")
    command.add_argument("run_dir", metavar="RUN_DIR", help="its folder, or s3://, ...")
    command.add_argument(
        "overrides", nargs="*", metavar="a.b=c", help=f"where it runs: {', '.join(PLACES)}"
    )
    command.set_defaults(run=_resume)
    command = commands.add_parser("validate", help="check a recipe and say what it resolves to")
    _add_recipe(command)
    command.add_argument(
        "--data", action="store_true", help="also read the data: does every prompt fit? (seconds)"
    )
    command.set_defaults(run=_validate)
    command = commands.add_parser("report", help="write summary.json and report.html of a run")
    command.add_argument("run_dir", metavar="RUN_DIR", help="its folder, or s3://, ...")
    command.set_defaults(run=_report)
    command = commands.add_parser("export", help="write a checkpoint as a HF folder")
    command.add_argument("run_dir", metavar="RUN_DIR", help="its folder, or s3://, ...")
    command.add_argument("out", type=Path)
    command.add_argument("--step", type=int, metavar="N", help="default: the newest whole one")
    command.set_defaults(run=_export)
    _add_upcycle(commands.add_parser("upcycle", help="make a dense HF folder's MLPs into experts"))
    add_submit_commands(commands)
    add_top_command(commands.add_parser("top", help="watch a run, and who waits in it"))
    add_engines_command(commands.add_parser("engines", help="a run's engines: see, grow, shrink"))
    add_metrics_command(commands.add_parser("metrics", help="a run's numbers, for Prometheus"))
    add_place_command(commands.add_parser("place", help="say where experts should live"))
    add_sparsity_commands(commands.add_parser("sparsity", help="sparse plans, before one runs"))
    add_log_commands(commands.add_parser("log", help="look at a weight log, tend it, pass it on"))
    _add_bench(commands.add_parser("bench", help="measure, beside what others do"))
    return parser


def _add_upcycle(command: argparse.ArgumentParser) -> None:
    command.add_argument("source", type=Path, metavar="IN", help="HF folder of a dense model")
    command.add_argument("out", type=Path, metavar="OUT", help="HF folder that is written")
    command.add_argument("--experts", type=int, required=True, metavar="N", help="of a layer")
    command.add_argument("--top-k", type=int, required=True, metavar="K", help="of a token")
    command.add_argument("--noise", type=float, default=0.0, metavar="S", help="relative std")
    command.add_argument(
        "--granularity",
        type=int,
        default=1,
        metavar="G",
        help="experts that one copy of the MLP is cut into; divides N and K",
    )
    command.add_argument("--seed", type=int, default=0, help="of the router and the noise")
    command.set_defaults(run=_upcycle)


def _add_bench(command: argparse.ArgumentParser) -> None:
    benches = command.add_subparsers(required=True, metavar="BENCH")
    sync = benches.add_parser("sync", help="bytes and times of a weight update, by codec and link")
    sync.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    sync.add_argument("--quick", action="store_true", help="small models, under a minute")
    sync.add_argument("--traces", type=Path, metavar="DIR", help="keep recorded traces here")
    sync.set_defaults(run=_bench_sync)
    placement = benches.add_parser("placement", help="where experts live: methods, drift, bounds")
    placement.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    placement.add_argument("--quick", action="store_true", help="few and small, about a minute")
    placement.add_argument("--traces", type=Path, metavar="DIR", help="keep recorded traces here")
    placement.set_defaults(run=_bench_placement)
    moe = benches.add_parser("moe", help="a training step of MoE layers, beside others'")
    moe.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    moe.add_argument("--quick", action="store_true", help="tiny layers: says nothing about speed")
    moe.set_defaults(run=_bench_moe)
    replicas = benches.add_parser("replicas", help="outer rules: loss, bytes and seconds by link")
    replicas.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    replicas.add_argument("--quick", action="store_true", help="tiny: says nothing about losses")
    replicas.set_defaults(run=_bench_replicas)
    sparsity = benches.add_parser("sparsity", help="sparse plans at equal compute, several seeds")
    sparsity.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    sparsity.add_argument("--quick", action="store_true", help="tiny: says nothing about losses")
    sparsity.set_defaults(run=_bench_sparsity)
    rl = benches.add_parser("rl", help="samples a second and who waits, and how sparse RL is")
    rl.add_argument("--json", type=Path, required=True, metavar="OUT", help="where rows go")
    rl.add_argument("--quick", action="store_true", help="three short runs, a minute or two")
    rl.set_defaults(run=_bench_rl)
    table = benches.add_parser("table", help="the rows of a benchmark as Markdown")
    table.add_argument("json", type=Path)
    table.add_argument("--into", type=Path, metavar="FILE", help="replace the table in FILE")
    table.set_defaults(run=_bench_table)


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", help="a YAML file, or the name of a shipped recipe")
    command.add_argument("overrides", nargs="*", metavar="a.b=c", help="train.seed=2, and so on")


def _start(arguments: argparse.Namespace) -> None:
    from gossamer.launch.recipe import RecipeError, load_recipe

    config = load_recipe(arguments.recipe, arguments.overrides)
    if arguments.command == "train" and config.has_rollouts:
        raise RecipeError(f"{arguments.recipe} has a grpo phase; run it with `gossamer rl`")
    if arguments.command == "rl" and not config.has_rollouts:
        raise RecipeError(f"{arguments.recipe} has no grpo phase; run it with `gossamer train`")
    where = arguments.run_dir or f"runs/{config.name}"
    if config.replicas > 1:
        from gossamer.launch.replicas import start_replicas

        if is_url(where):
            raise RecipeError(
                f"replicas is {config.replicas} and --run-dir a URL: what one command starts shares"
                " a folder; expected a path, and train.outer.url and train.checkpoint.url there"
            )
        return start_replicas(config, open_here(where), arguments.overwrite)
    from gossamer.launch.controller import start_run

    start_run(config, open_here(where, create=True), arguments.overwrite)


def _join(arguments: argparse.Namespace) -> None:
    from gossamer.launch.controller import start_run
    from gossamer.launch.replicas_members import joining

    config, name, returns = joining(arguments.log, arguments.overrides, arguments.name)
    run_dir = open_here(arguments.run_dir or f"runs/{config.name}-{name}", create=True)
    start_run(config, run_dir, overwrite=False, takes_over=returns)


def _resume(arguments: argparse.Namespace) -> None:
    for override in arguments.overrides:
        if not override.startswith(PLACES):
            raise ValueError(
                f"override {override!r}: a run that goes on may be told where it runs, and no more;"
                f" expected {', '.join(PLACES)}"
            )
    run_dir = open_here(arguments.run_dir)
    config = _load_run(run_dir, arguments.overrides)
    if config.replicas > 1:
        from gossamer.launch.replicas import resume_replicas

        return resume_replicas(config, run_dir)
    from gossamer.launch.controller import resume_run

    has_new_pools = any(override.startswith(POOLS) for override in arguments.overrides)
    resume_run(config, run_dir, has_new_pools)


def _validate(arguments: argparse.Namespace) -> None:
    import json
    from dataclasses import asdict

    from gossamer.launch.recipe import load_recipe
    from gossamer.trainer.import_path import check_module
    from gossamer.trainer.moe.config import ROUTERS
    from gossamer.trainer.rl.config import REWARDS
    from gossamer.trainer.sparsity.config import CRITERIA, SPARSITY_METHODS

    config = load_recipe(arguments.recipe, arguments.overrides)
    if config.train.model.router is not None:
        check_module(config.train.model.router, ROUTERS, "model.router")
    if config.has_rollouts:
        check_module(config.train.rl.reward, REWARDS, "rl.reward")
    if config.train.sparsity is not None:
        check_module(config.train.sparsity.method, SPARSITY_METHODS, "sparsity.method")
        for rule in config.train.sparsity.rules:
            for name in (rule.criterion, rule.initial.criterion, rule.regrow.criterion):
                check_module(name, {**CRITERIA, "none": "gossamer"}, "a rule's criterion")
    if arguments.data:
        import tempfile

        from gossamer.trainer.prepare import prepare_run

        with tempfile.TemporaryDirectory() as folder:
            prepare_run(config.train, Path(folder), config.name)
    print(json.dumps(asdict(config), indent=1))


def _report(arguments: argparse.Namespace) -> None:
    from gossamer.launch.replicas_report import write_fleet_report
    from gossamer.launch.replicas_summary import is_fleet
    from gossamer.launch.report import write_report
    from gossamer.launch.summary import write_summary

    run_dir = open_here(arguments.run_dir)
    if is_fleet(run_dir):
        print(write_fleet_report(run_dir))
        return
    write_summary(run_dir)
    print(write_report(run_dir))
    if is_url(arguments.run_dir):
        print(inside(run_dir, "report.html"))


def _export(arguments: argparse.Namespace) -> None:
    from gossamer.launch.export import export_run

    run_dir = open_here(arguments.run_dir)
    config = _load_run(run_dir)
    if config.replicas > 1:
        raise ValueError(
            f"{run_dir} is of {config.replicas} replicas; expected {run_dir}/replica-0"
        )
    print(export_run(config, run_dir, arguments.out, arguments.step))


def _upcycle(arguments: argparse.Namespace) -> None:
    from gossamer.launch.upcycle import Upcycling, upcycle

    plan = Upcycling(
        experts=arguments.experts,
        top_k=arguments.top_k,
        granularity=arguments.granularity,
        noise=arguments.noise,
        seed=arguments.seed,
    )
    print(upcycle(arguments.source, arguments.out, plan))


def _bench_sync(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.sync import bench_sync

    bench_sync(arguments.json, arguments.traces, arguments.quick)


def _bench_placement(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.placement import bench_placement

    bench_placement(arguments.json, arguments.traces, arguments.quick)


def _bench_moe(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.moe import bench_moe

    bench_moe(arguments.json, arguments.quick)


def _bench_replicas(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.replicas import bench_replicas

    bench_replicas(arguments.json, arguments.quick)


def _bench_sparsity(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.sparsity import bench_sparsity

    bench_sparsity(arguments.json, arguments.quick)


def _bench_rl(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench.rl import bench_rl

    bench_rl(arguments.json, arguments.quick)


def _bench_table(arguments: argparse.Namespace) -> None:
    from gossamer.launch.bench import (
        moe_table,
        placement_table,
        replicas_table,
        rl_table,
        sparsity_table,
        table,
    )

    beginning = arguments.json.read_text(errors="replace")[:9999]
    others = (moe_table, placement_table, replicas_table, rl_table, sparsity_table)
    named = (each for each in others if each.COMMAND in beginning)
    bench = next(named, table)
    text = bench.render_table(arguments.json)
    if arguments.into is None:
        print(text)
    else:
        table.put_table(arguments.into, text, bench.BEGIN, bench.END)


def _load_run(run_dir: Path, overrides: list[str] | None = None):  # noqa: ANN202
    from gossamer.launch.recipe import load_recipe

    path = run_dir / "config.json"
    if not path.is_file():
        raise FileNotFoundError(
            f"{inside(run_dir, path.name)} is missing; expected the folder of a gossamer run"
        )
    return load_recipe(str(path), overrides or [])


if __name__ == "__main__":
    sys.exit(main())
