"""`gossamer log`: looks at a weight log, checks it, tends it, and passes it on.

The one idea: needs the base install alone, so that it runs wherever a log is written or followed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gossamer.comm.log import WeightLog

KEEP_VERSIONS, KEEP_ANCHORS, GRACE_S = 100, 2, 3600.0


def add_log_commands(parser: argparse.ArgumentParser) -> None:
    """Adds the subcommands; each sets `run`, a function of the parsed arguments."""
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, what: str, run: Callable, on_log: bool = True) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=what, description=what)
        command.set_defaults(run=run)
        if on_log:
            command.add_argument("log", metavar="LOG", help="a folder, or a URL such as s3://...")
            command.add_argument("--public-key", type=Path, help="refuse what it did not sign")
        return command

    command = add("ls", "a line for each version", _ls)
    command.add_argument("--json", action="store_true")
    command = add("inspect", "what a version changed, by layer, and how it was coded", _inspect)
    command.add_argument("version", type=int, nargs="?", help="default: the head")
    command.add_argument("--tensors", action="store_true", help="a row for each tensor")
    command.add_argument("--json", action="store_true")
    command = add("verify", "check every hash, link, sum and signature", _verify)
    command.add_argument("--replay", action="store_true", help="also apply every version")
    command = add("fold", "write one delta over many versions, for whoever lags", _fold)
    command.add_argument("first", type=int)
    command.add_argument("last", type=int)
    command.add_argument("--key", type=Path, help="private key to sign with")
    command = add("gc", "delete what no reader needs any more", _gc)
    command.add_argument("--keep-versions", type=int, default=KEEP_VERSIONS)
    command.add_argument("--keep-anchors", type=int, default=KEEP_ANCHORS)
    command.add_argument(
        "--grace-s",
        type=float,
        default=GRACE_S,
        help="parts outlive their manifest this long: a pass deletes those of earlier passes",
    )
    command = add("serve", "offer the log over HTTP", _serve)
    command.add_argument(
        "--host", default="127.0.0.1", help="others than this machine need $GOSSAMER_LOG_TOKEN"
    )
    command.add_argument("--port", type=int, default=8470, help="0: a free one")
    command.add_argument(
        "--writable", action="store_true", help="any folder, that whoever may read may write"
    )
    command = add("mirror", "copy the log to a nearer store", _mirror)
    command.add_argument("destination", metavar="DST")
    command.add_argument("--follow", action="store_true", help="go on with new versions")
    command = add("follow", "keep a running vLLM server at the head", _follow)
    command.add_argument("--engine", required=True, metavar="URL", help="http://127.0.0.1:8000")
    command.add_argument(
        "--mode",
        default="keep",
        choices=("keep", "wait", "abort"),
        help="requests in flight at a commit",
    )
    command.add_argument("--audit-every", type=int, default=0, metavar="N", help="0: never")
    command = add("keygen", "make a pair of Ed25519 keys", _keygen, on_log=False)
    command.add_argument("path", type=Path, help="the private key; PATH.pub is the public one")


def _open(arguments: argparse.Namespace) -> WeightLog:
    from gossamer.comm.log import WeightLog

    return WeightLog.open(arguments.log, public_key=arguments.public_key)


def _ls(arguments: argparse.Namespace) -> None:
    from gossamer.comm.inspect import list_versions
    from gossamer.launch.log_tables import print_versions
    from gossamer.launch.meter import Meter

    with Meter("reading manifests") as meter:
        rows = list_versions(_open(arguments), meter)
    print(json.dumps(rows, indent=1)) if arguments.json else print_versions(rows)


def _inspect(arguments: argparse.Namespace) -> None:
    from gossamer.comm.inspect import inspect_version
    from gossamer.launch.log_tables import print_version

    found = inspect_version(_open(arguments), arguments.version)
    if arguments.json:
        print(json.dumps(found, indent=1))
    else:
        print_version(found, arguments.tensors)


def _verify(arguments: argparse.Namespace) -> int:
    from gossamer.comm.verify import verify
    from gossamer.launch.meter import Meter
    from gossamer.launch.quantities import format_bytes

    with Meter("verifying") as meter:
        verdict = verify(_open(arguments), arguments.replay, meter)
    for fault in verdict.faults:
        print(f"gossamer: {fault}", file=sys.stderr)
    state = f"{len(verdict.faults)} faults" if verdict.faults else "all sound"
    signed = f", signed by {arguments.public_key}" if arguments.public_key else ""
    print(
        f"{verdict.versions} versions, {verdict.folds} folds, {format_bytes(verdict.nbytes)}: "
        f"{state}{'' if verdict.faults else signed}"
    )
    return 1 if verdict.faults else 0


def _fold(arguments: argparse.Namespace) -> None:
    from gossamer.comm.fold import fold
    from gossamer.comm.signing import Signer
    from gossamer.launch.meter import Meter
    from gossamer.launch.quantities import format_bytes

    signer = Signer.from_file(arguments.key) if arguments.key else None
    with Meter("folding") as meter:
        folded = fold(_open(arguments), arguments.first, arguments.last, signer, meter)
    print(
        f"{folded.name}: {format_bytes(folded.nbytes)} instead of "
        f"{format_bytes(folded.delta_bytes)} in {arguments.last - arguments.first} deltas"
    )


def _gc(arguments: argparse.Namespace) -> None:
    from gossamer.comm.retention import gc
    from gossamer.launch.meter import Meter

    kept = (arguments.keep_versions, arguments.keep_anchors, arguments.grace_s)
    with Meter("deleting") as meter:
        swept = gc(_open(arguments), *kept, meter)
    if swept is None:
        print("the log is empty")
        return
    print(
        f"kept version {swept.floor} and later; deleted {swept.manifests} manifests and "
        f"{swept.parts} parts, {swept.waiting} parts wait for their grace to end"
    )


def _serve(arguments: argparse.Namespace) -> None:
    import threading

    from gossamer.comm.store import open_store
    from gossamer.comm.store.http import TOKEN_VARIABLE
    from gossamer.comm.store.serve import serve
    from gossamer.launch.endpoint import token_for

    token_for(arguments.host, TOKEN_VARIABLE)
    if arguments.writable:
        store, what = open_store(arguments.log, create=True), arguments.log
    else:
        log = _open(arguments)
        store, what = log.store, f"run {log.run_id}"
    server = serve(store, arguments.host, arguments.port, arguments.writable)
    print(f"{what} at {server.url}", flush=True)
    try:
        threading.Event().wait()
    finally:
        server.close()


def _mirror(arguments: argparse.Namespace) -> None:
    from gossamer.comm.mirror import Mirrored, mirror
    from gossamer.comm.store import open_store
    from gossamer.launch.meter import Meter
    from gossamer.launch.quantities import format_bytes

    destination = open_store(arguments.destination, create=True)
    with Meter("mirroring") as meter:

        def tell(copied: Mirrored) -> None:
            meter((copied.version or 0) + 1, (copied.head or 0) + 1)

        copied = mirror(_open(arguments), destination, follow=arguments.follow, on_progress=tell)
    print(f"version {copied.version} of {copied.head}, {format_bytes(copied.copied_bytes)} copied")


def _follow(arguments: argparse.Namespace) -> None:
    from gossamer.comm.engines.follow import Progress, follow
    from gossamer.launch.quantities import format_bytes

    def tell(done: Progress) -> None:
        if done.event == "committed":
            print(
                f"version {done.version}: {format_bytes(done.fetched_bytes)} fetched, staged in "
                f"{done.stage_s:.3f} s, paused for {done.pause_s:.3f} s {done.detail}".rstrip(),
                flush=True,
            )
        else:
            print(f"{done.event} {done.detail}".rstrip(), flush=True)

    follow(
        arguments.log,
        arguments.engine,
        public_key=arguments.public_key,
        mode=arguments.mode,
        audit_every_versions=arguments.audit_every,
        on_progress=tell,
    )


def _keygen(arguments: argparse.Namespace) -> None:
    from gossamer.comm.signing import write_keys

    public = write_keys(arguments.path)
    print(f"{arguments.path} signs and stays with the trainer; {public} is for every reader")
