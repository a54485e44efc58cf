"""The table of a frame: its runs as JSON, small because alike runs are told together.

The one idea: a model's tensors are many layers of many experts. Names that differ in numbers only
are a family: the text once, the numbers as a product of lists, and what all share once.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from itertools import product
from typing import Any

from gossamer.comm.codec.hazard import LENGTHS
from gossamer.comm.codec.kernels import NUM_STEP_SYMBOLS, STEP_BITS
from gossamer.comm.run import (
    BLOCK_ROWS,
    DTYPE_BYTES,
    Model,
    Run,
    WireError,
    name_numbers,
    name_pieces,
    tensor_rows,
)

MAX_RUN_ELEMENTS = 2**32 - 8
MAX_CLASSES = 512
COLUMNS = ("codecs", "counts", "block_rows", "models")


def write_table(run_id: str, runs: list[Run]) -> dict[str, Any]:
    """The table of `runs`, which must be in the order of `in_families`."""
    models: dict[Model, int] = {}
    families: list[dict[str, Any]] = []
    for (name, dtype, shape, row_start, num_rows), members in _families(runs):
        numbers = [name_numbers(run.name) for run in members]
        axes = [list(dict.fromkeys(axis)) for axis in zip(*numbers, strict=True)]
        is_product = numbers == list(product(*axes))
        families.append(
            {
                "name": name,
                **({"axes": axes} if is_product else {"numbers": numbers}),
                "dtype": dtype,
                "shape": shape,
                "row_start": row_start,
                "num_rows": num_rows,
                "codecs": [run.codec for run in members],
                "counts": [run.count for run in members],
                "block_rows": [run.block_rows for run in members],
                "models": [
                    None if run.model is None else models.setdefault(run.model, len(models))
                    for run in members
                ],
                "nbytes": [nbytes for run in members for nbytes in run.block_nbytes],
            }
        )
    entries = [
        {"first": m.first, "lengths": m.lengths, "counts": m.counts, "steps": m.steps}
        for m in models
    ]
    return {"run_id": run_id, "models": entries, "families": families}


def in_families(runs: list[Run]) -> list[Run]:
    """The same runs in the order in which a frame holds them."""
    return [run for _, members in _families(runs) for run in members]


def _families(runs: list[Run]) -> list[tuple[tuple, list[Run]]]:
    families: dict[tuple, list[Run]] = defaultdict(list)
    for run in runs:
        families[name_pieces(run.name), run.dtype, run.shape, run.row_start, run.num_rows].append(
            run
        )
    return sorted(
        (key, sorted(members, key=lambda run: name_numbers(run.name)))
        for key, members in families.items()
    )


def read_table(
    table: object, num_runs: int, payload_nbytes: int, payload: bytes | memoryview
) -> tuple[str, list[Run]]:
    """(run_id, runs), each with its piece of `payload`, or without where that is empty.

    Raises WireError for anything that `write_table` cannot have made.
    """
    run_id = _get(table, "run_id", str)
    models = [_read_model(entry) for entry in _get(table, "models", list)]
    runs: list[Run] = []
    taken = 0
    for family in _get(table, "families", list):
        for run in _read_family(family, models, num_runs - len(runs)):
            nbytes = sum(run[1])
            _expect(taken + nbytes <= payload_nbytes, f"blocks of {run[0].name} leave the payload")
            piece = payload[taken : taken + nbytes]
            runs.append(_with_blocks(run[0], run[1], piece))
            taken += nbytes
    _expect(len(runs) == num_runs, f"{len(runs)} runs where its header promises {num_runs}")
    _expect(taken == payload_nbytes, f"its blocks hold {taken} of {payload_nbytes} payload bytes")
    return run_id, runs


def _with_blocks(run: Run, block_nbytes: list[int], payload: bytes | memoryview) -> Run:
    return Run(
        run.name,
        run.dtype,
        run.shape,
        run.row_start,
        run.num_rows,
        run.codec,
        run.count,
        run.block_rows,
        tuple(block_nbytes),
        payload,
        run.model,
    )


def _read_family(family: object, models: list[Model], most: int) -> Iterator[tuple[Run, list[int]]]:
    """Runs without payloads, and the bytes of their blocks."""
    names = _read_names(family, most)
    what = names[0] if names else "a family"
    dtype, shape = _get(family, "dtype", str), _get(family, "shape", list)
    row_start, num_rows = _get(family, "row_start", int), _get(family, "num_rows", int)
    _expect(dtype in DTYPE_BYTES, f"dtype {dtype!r} of {what} is unknown")
    _expect(_are_naturals(shape), f"shape {shape} of {what} must be a list of counts")
    _expect(_are_naturals([row_start, num_rows]), f"rows of {what} must be counts")
    shape = tuple(shape)
    rows = tensor_rows(shape)
    _expect(0 < num_rows <= rows - row_start, f"rows of {what} leave its shape")
    columns = [_get(family, column, list) for column in COLUMNS]
    _expect(
        all(len(column) == len(names) for column in columns),
        f"{', '.join(COLUMNS)} of {what} must have {len(names)} entries",
    )
    nbytes = _get(family, "nbytes", list)
    _expect(_are_naturals(nbytes), f"nbytes of {what} must be counts")
    taken = 0
    for name, codec, count, block_rows, model in zip(names, *columns, strict=True):
        _expect(isinstance(codec, str), f"codec of {name} must be a string")
        _expect(
            _are_naturals([count, block_rows]) and block_rows > 0 and block_rows % BLOCK_ROWS == 0,
            f"count and block_rows of {name} must be counts, block_rows of whole bands",
        )
        _expect(
            model is None or (_are_naturals([model]) and model < len(models)),
            f"model {model} of {name} is not one of {len(models)}",
        )
        run = Run(
            name,
            dtype,
            shape,
            row_start,
            num_rows,
            codec,
            count,
            block_rows,
            model=None if model is None else models[model],
        )
        elements = run.num_elements
        _expect(0 < elements <= MAX_RUN_ELEMENTS, f"shape {shape} of {name} is out of bounds")
        _expect(0 < count <= elements, f"{name} codes {count} of {elements} elements")
        sizes = nbytes[taken : taken + run.num_blocks]
        _expect(len(sizes) == run.num_blocks, f"{name} has {len(sizes)} of {run.num_blocks} blocks")
        taken += run.num_blocks
        yield run, sizes
    _expect(taken == len(nbytes), f"nbytes of {what} has {len(nbytes)} entries, not {taken}")


def _read_names(family: object, most: int) -> list[str]:
    """At most `most` names."""
    pieces = _get(family, "name", list)
    _expect(
        bool(pieces) and all(isinstance(piece, str) for piece in pieces), "a name must be strings"
    )
    if isinstance(family, dict) and "numbers" in family:
        numbers = _get(family, "numbers", list)
        _expect(len(numbers) <= most, "a family has more runs than its header promises")
        _expect(
            all(_are_naturals(each) and len(each) == len(pieces) - 1 for each in numbers),
            f"numbers of {pieces} must be {len(pieces) - 1} counts each",
        )
    else:
        axes = _get(family, "axes", list)
        _expect(
            len(axes) == len(pieces) - 1 and all(map(_are_naturals, axes)),
            f"axes of {pieces} must be {len(pieces) - 1} lists of counts",
        )
        _expect(
            math.prod(map(len, axes)) <= most, "a family has more runs than its header promises"
        )
        numbers = product(*axes)
    return [
        pieces[0]
        + "".join(f"{number}{piece}" for number, piece in zip(each, pieces[1:], strict=True))
        for each in numbers
    ]


def _read_model(entry: object) -> Model:
    first = _get(entry, "first", int)
    lengths, counts = _get(entry, "lengths", list), _get(entry, "counts", list)
    steps = _get(entry, "steps", list)
    _expect(
        _are_naturals([first])
        and all(map(_are_naturals, (lengths, counts, *steps)))
        and len(lengths) == len(counts) == len(steps)
        and 0 < len(steps) <= first + len(steps) <= MAX_CLASSES,
        "a model must have counts in lengths, counts and steps, one a class",
    )
    for length, row in zip(lengths, steps, strict=True):
        _expect(length < len(LENGTHS), f"length {length} of a model is unknown")
        _expect(
            len(row) <= NUM_STEP_SYMBOLS and sum(row) == (1 << STEP_BITS if length else 0),
            "steps of a model must add up to 4096 for each class that changes",
        )
    return Model(first, tuple(lengths), tuple(counts), tuple(map(tuple, steps)))


def _expect(good: bool, what: str) -> None:
    if not good:
        raise WireError(f"not a sound frame: {what}")


def _get(entry: object, key: str, kind: type) -> Any:  # noqa: ANN401
    _expect(isinstance(entry, dict), "an entry of its table must be an object")
    value = entry.get(key)  # type: ignore[attr-defined]
    _expect(type(value) is kind, f"{key} of its table must be of type {kind.__name__}")
    return value


def _are_naturals(values: object) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value < 2**62 for value in values
    )
