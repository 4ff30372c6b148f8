"""The records: JSON Lines of the published schema, checked when they are written and when they are read."""

import functools
import json
import math
import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, final

from jsonschema import Draft202012Validator
from jsonschema.exceptions import best_match

from benchmarks import cases
from distloop.errors import UsageError

SCHEMA = "distloop.bench/1"
_ROUNDING = 1e-3  # relative; what was rounded to 4 digits still agrees


def new_id() -> str:
    """Return a new name of a run or a launch."""
    return uuid.uuid4().hex[:12]


@final
class Recorder:
    """Append records of one run to a file, one JSON object a line. What is no valid record is not written."""

    def __init__(self, path: Path, run: str) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path = path
        self._run = run
        self._results: dict[str, dict[str, Any]] = {}

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Write one record and return it.

        Raises ValueError if it does not follow the schema, or contradicts itself or the result of its baseline, which
        must be written before.
        """
        now = datetime.now(timezone.utc).isoformat(timespec="milliseconds")
        record = {"schema": SCHEMA, "kind": kind, "run": self._run, "time": now, **fields}
        check(record)
        if kind == "result":
            _check_efficiency(record, self._results)
            self._results[record["key"]] = record
        line = json.dumps(record, allow_nan=False)
        with self.path.open("a") as file:
            file.write(line + "\n")
        return record


def read(paths: Iterable[Path]) -> list[dict[str, Any]]:
    """Return the records in files, and in the *.jsonl files of folders.

    Raises UsageError, with file and line, for what is no valid record of this schema.
    """
    files: dict[Path, None] = {}
    for path in paths:
        found = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        if not found or not found[0].is_file():
            raise UsageError(f"{path} holds no records; expected a file or a folder of *.jsonl that a run has written.")
        files |= dict.fromkeys(found)
    return [
        _parse(line, f"{file}, line {number}", cut_off=not line.endswith("\n"))
        for file in files
        for number, line in enumerate(file.read_text().splitlines(keepends=True), 1)
    ]


def check(record: Mapping[str, Any]) -> None:
    """Raise ValueError, with one sentence, unless a record follows the schema and agrees with itself."""
    kind = str(record.get("kind"))
    if error := best_match(_validator(kind).iter_errors(record)):
        raise ValueError(f"{kind}: {error.json_path}: {error.message}.")
    if "case" in record:
        case = cases.from_dict(record["case"])
        _agree("key", record["key"], case.key, "the hash of the case")
        batch = record["global_batch"] if kind == "result" else record["facts"]["global_batch"]
        parts = f"{case.workers} workers * {case.replicas} replicas * {case.per_replica_batch} examples"
        _agree("global_batch", batch, case.global_batch, parts)
    if kind == "result":
        _check_result(record, cases.from_dict(record["case"]))
    if kind == "comm_point":
        _agree("algbw", record["algbw"], record["bytes"] / record["seconds"]["median"], "bytes / seconds")
        share = 2 * (record["replicas"] - 1) / record["replicas"]
        _agree("busbw", record["busbw"], record["algbw"] * share, "algbw * 2 (n - 1) / n")


def _check_result(record: Mapping[str, Any], case: cases.Case) -> None:
    throughput, step, flops = record["throughput"], record["step_ms"], record["flops"]
    if throughput is not None and step is not None:
        examples = case.global_batch / (step["median"] / 1e3)
        _agree(
            "throughput.median", throughput["median"], examples * record["units_per_example"], "units of a batch / step"
        )
        _agree("per_device", record["per_device"], throughput["median"] / case.total_replicas, "throughput / replicas")
    for name, found in (("throughput", throughput), ("step_ms", step)):
        if found is not None and not found["low"] <= found["median"] <= found["high"]:
            raise ValueError(f"result: {name}.median ({found['median']:g}) is outside of its interval.")
    parts = [part for part in (record["breakdown_ms"] or {}).values() if part is not None]
    if parts and step is not None:
        _agree("breakdown_ms", sum(parts), step["median"], "step_ms.median, to which its parts must add up")
    if flops is not None and flops["mfu"] is not None and step is not None:
        per_second = flops["per_example"] * case.global_batch / (step["median"] / 1e3)
        _agree("flops.mfu", flops["mfu"], per_second / (case.total_replicas * flops["peak"]), "FLOPs / peak")


def _check_efficiency(record: Mapping[str, Any], results: Mapping[str, Mapping[str, Any]]) -> None:
    efficiency = record["efficiency"]
    if efficiency is None:
        return
    case = cases.from_dict(record["case"])
    baseline = results.get(efficiency["baseline"])
    if baseline is None:
        raise ValueError(f"result: efficiency.baseline is {efficiency['baseline']}, which has no result before it.")
    base = cases.from_dict(baseline["case"])
    if base.scaling_key != case.scaling_key:
        raise ValueError(f"result: efficiency.baseline {base} is no point of the same scaling curve as {case}.")
    kept = "per_replica_batch" if efficiency["kind"] == "weak" else "global_batch"
    _agree(kept, getattr(case, kept), getattr(base, kept), f"that of the baseline, as scaling is {efficiency['kind']}")
    ideal = baseline["throughput"]["median"] * case.total_replicas / base.total_replicas
    _agree("efficiency.value", efficiency["value"], record["throughput"]["median"] / ideal, "throughput / ideal")


def _agree(name: str, found: Any, expected: Any, meaning: str) -> None:
    numbers = all(isinstance(value, int | float) for value in (found, expected))
    exact = not numbers or (isinstance(found, int) and isinstance(expected, int))
    if found != expected if exact else not math.isclose(found, expected, rel_tol=_ROUNDING):
        shown = expected if exact else f"{expected:g}"
        raise ValueError(f"{name} is {found}; expected {shown}: {meaning}.")


def _parse(line: str, place: str, *, cut_off: bool) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        if cut_off:
            raise UsageError(f"{place}, the last, is cut off: the run was killed while it wrote; delete it.") from None
        raise UsageError(f"{place} is no JSON; expected a record of {SCHEMA}.") from None
    schema = record.get("schema") if isinstance(record, dict) else None
    if schema != SCHEMA:
        raise UsageError(f"{place} is of schema {schema!r}; expected {SCHEMA!r}, as this version writes it.")
    try:
        check(record)
    except ValueError as error:
        raise UsageError(f"{place} is no valid record: {error}") from None
    return record


@functools.cache
def _validator(kind: str) -> Draft202012Validator:
    """Return what validates one kind: the error of `oneOf` would not say which of the kinds was meant."""
    schema = json.loads(Path(__file__).with_name("schema.json").read_text())
    del schema["oneOf"]
    if kind in schema["properties"]["kind"]["enum"]:
        schema["allOf"] = [{"$ref": f"#/$defs/{kind}"}]
    return Draft202012Validator(schema, format_checker=Draft202012Validator.FORMAT_CHECKER)
