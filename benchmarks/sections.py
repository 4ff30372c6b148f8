"""What a report consists of: records of one environment a section, grouped into tables and figures."""

import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from markupsafe import Markup
from matplotlib.figure import Figure

from benchmarks import plots, tables
from benchmarks.cases import MODES, PEERS, from_dict
from benchmarks.comparison import step_times
from benchmarks.growth import growths
from distloop.errors import UsageError

Record = Mapping[str, Any]
_T = TypeVar("_T")
_SCALED_MODES = ("step", "h2d", "e2e")  # those whose throughput is that of training


class Image(NamedTuple):
    """Hold a figure in its two forms."""

    name: str
    title: str
    about: str
    svg: Markup
    png: bytes


class Section(NamedTuple):
    """Hold what was measured in one environment."""

    title: str
    facts: dict[str, str]
    commands: list[str]
    findings: list[dict[str, str]]
    warnings: list[str]
    images: list[Image]
    tables: list[tables.Table]


def make_sections(found: Sequence[Record]) -> list[Section]:
    """Return one section an environment: numbers of different ones are never in one table or figure."""
    environments = {record["hash"]: record for record in found if record["kind"] == "env"}
    of_run = {record["run"]: record["hash"] for record in found if record["kind"] == "env"}
    of_launch = {record["launch"]: record["env"] for record in found if record["kind"] == "run"}
    parts: dict[str, list[Record]] = {hash_: [] for hash_ in environments}
    for record in found:
        hash_ = record.get("env") or of_launch.get(record.get("launch")) or of_run.get(record["run"], "")
        if hash_ not in environments:
            raise UsageError(
                f"{record['file']}: the environment of run {record['run']} is missing; give its file, too."
            )
        parts[hash_].append(record)
    kept = [(environments[hash_], part) for hash_, part in parts.items() if _of_kind(part, "result", "comm_point")]
    return [_section(env, part, suffix=f"-{env['hash']}" if len(kept) > 1 else "") for env, part in kept]


def _section(env: Record, part: Sequence[Record], suffix: str) -> Section:
    device = env["hardware"]["device"]
    results = sorted(_of_kind(part, "result"), key=_order)
    points = sorted(_of_kind(part, "comm_point"), key=lambda point: point["bytes"])
    fits = _of_kind(part, "fit")
    groups = list(_peer_groups(results))
    split = [result for result in results if result["breakdown_ms"] and result["step_ms"]]
    in_other_table = {point["key"] for point in points}
    rows = [result for result in results if result["key"] not in in_other_table]
    made = [tables.speeds(rows, device)] if rows else []
    made += [tables.steps(split)] if split else []
    times = step_times(part)
    made += [tables.peers(group, times) for group in groups]
    made += [tables.startup(started)] if (started := [result for result in results if result["startup_s"]]) else []
    made += [tables.communication(points)] if points else []
    made += [tables.fits(fits)] if fits else []
    figures = [
        *_curves(results, fits),
        *_growths(results),
        *_splits(split),
        *_peer_figures(groups),
        *_bandwidths(points, part, fits),
    ]
    return Section(
        title=f"{env['hardware']['devices']} x {device}",
        facts=_facts(env, part, results),
        commands=list(dict.fromkeys(shlex.join(run["argv"]) for run in _of_kind(part, "run"))),
        findings=[_finding(verdict, results) for verdict in _of_kind(part, "verdict")],
        warnings=[
            *env.get("warnings", []),
            *(
                f"{tables.label(result['case'])}: {'; '.join(result['warnings'])}"
                for result in results
                if result["warnings"]
            ),
        ],
        images=_images(figures, suffix),
        tables=made,
    )


def _of_kind(part: Iterable[Record], *kinds: str) -> list[Record]:
    return [record for record in part if record["kind"] in kinds]


def _order(result: Record) -> tuple[Any, ...]:
    case = result["case"]
    place = (MODES.index(case["mode"]), PEERS.index(case["peer"]))
    return (case["workload"], *place, tables.settings_of(case), tables.replicas_of(case), case["per_replica_batch"])


def _facts(env: Record, part: Sequence[Record], results: Sequence[Record]) -> dict[str, str]:
    hardware = env["hardware"]
    each = f" of {tables.gib(hardware['device_memory_bytes'])}" if hardware.get("device_memory_bytes") else ""
    words = [f"{hardware['devices']} x {hardware['device']}{each}"]
    words += [hardware["cpu"]] if hardware["cpu"] != hardware["device"] else []
    words += [f"{hardware['cores']} cores", f"{tables.gib(hardware['memory_bytes'])} of memory"]
    words += [f"driver {hardware['driver']}"] if hardware.get("driver") else []
    words += [f"{hardware['hosts']} hosts"] if hardware.get("hosts", 1) > 1 else []
    runs = _of_kind(part, "run")
    commits = {f"{run['commit'] or 'unknown'}{' with changes' if run['dirty'] else ''}" for run in runs}
    times = sorted({f"{record['time'][:16].replace('T', ' ')} UTC" for record in part})
    counted = [result["flops"] for result in results if result["flops"]]
    peaks = {f"{each['peak'] / 1e12:.4g} TFLOP/s a device ({each['peak_source']})" for each in counted if each["peak"]}
    versions = (f"{name} {version}" for name, version in env["versions"].items() if version)
    facts = {
        "hardware": "; ".join(words),
        "versions": ", ".join(versions),
        "environment": " ".join(f"{name}={value}" for name, value in env["environment"].items()),
        "commit": ", ".join(sorted(commits)),
        "measured": f"{' to '.join(dict.fromkeys([times[0], times[-1]]))}, {len(runs)} launches",
        "MFU": "; ".join(sorted({each["formula"] for each in counted})),
        "peak": "; ".join(sorted(peaks)),
    }
    return {name: value for name, value in facts.items() if value}


def _finding(verdict: Record, results: Sequence[Record]) -> dict[str, str]:
    """Return a verdict and the speed of its result in words."""
    measured = [result for result in results if result["key"] == verdict["key"] and result["run"] == verdict["run"]]
    rate = measured[0]["throughput"] if measured else None
    return {
        "case": tables.label(measured[0]["case"]) if measured else verdict["key"],
        "speed": f"{tables.number(rate['median'])} {measured[0]['unit']}/s" if rate else tables.DASH,
        "sentence": verdict["sentence"],
        "advice": verdict["advice"],
        "source": ", ".join(tables.source(verdict)),
    }


def _images(figures: Iterable[tuple[str, str, Figure]], suffix: str) -> list[Image]:
    names: list[str] = []
    images = []
    for title, about, figure in figures:
        name = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-")[:80]
        names.append(name)
        count = names.count(name)
        whole = f"{name}{f'-{count}' if count > 1 else ''}{suffix}"
        images.append(Image(whole, title, about, Markup(plots.to_svg(figure)), plots.to_png(figure)))
    return images


def _grouped(items: Iterable[_T], key: Callable[[_T], Any]) -> dict[Any, list[_T]]:
    groups: dict[Any, list[_T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def _curves(results: Sequence[Record], fits: Sequence[Record]) -> Iterator[tuple[str, str, Figure]]:
    """Yield a figure for each workload, mode and way of scaling of which several sizes were measured."""
    measured = [result for result in results if result["throughput"] and result["case"]["mode"] in _SCALED_MODES]
    drawn = [fit for fit in fits if {"key", "per_replica_batch", "curve"} <= fit.keys()]
    models = {("weak", fit["key"], fit["per_replica_batch"]): fit["curve"] for fit in drawn}
    for kind, kept in ("weak", "per_replica_batch"), ("strong", "global_batch"):
        curves = _grouped(measured, lambda result, kept=kept: _curve(result["case"], kept))
        curves = [curve for curve in curves.values() if len({tables.replicas_of(r["case"]) for r in curve}) > 1]
        for (workload, mode), chosen in _grouped(curves, lambda curve: _workload_mode(curve[0]["case"])).items():
            named = {_curve_name(curve[0]["case"], kept): curve for curve in chosen}
            lines = {name: models.get((kind, *_curve(curve[0]["case"], kept))) for name, curve in named.items()}
            title = f"Throughput of {workload}, {mode}, {kind} scaling"
            fixed = "batch a replica" if kind == "weak" else "global batch"
            about = f"The {fixed} stays the same. Bars are 95 % intervals."
            yield title, about, plots.throughput(title, named, {name: line for name, line in lines.items() if line})


def _curve(case: Record, kept: str) -> tuple[str, int]:
    return from_dict(case).scaling_key, getattr(from_dict(case), kept)


def _workload_mode(case: Record) -> tuple[str, str]:
    return case["workload"], case["mode"]


def _curve_name(case: Record, kept: str) -> str:
    batch = f"{kept.replace('_', ' ')} {getattr(from_dict(case), kept)}"
    return ", ".join(filter(None, [tables.PEER_NAMES[case["peer"]], tables.settings_of(case), batch]))


def _growths(results: Sequence[Record]) -> Iterator[tuple[str, str, Figure]]:
    series = growths(result for result in results if result["case"]["mode"] in _SCALED_MODES)
    for (workload, mode, number), chosen in _grouped(series, lambda one: one[:3]).items():
        title = f"Time of a step of {workload}, {mode}, against {number}"
        yield title, "All else stays the same. Bars are 95 % intervals.", plots.growth(title, chosen)


def _splits(results: Sequence[Record]) -> Iterator[tuple[str, str, Figure]]:
    for workload, chosen in _grouped(results, lambda result: result["case"]["workload"]).items():
        title = f"Where a step of {workload} goes"
        bars = [(tables.label(result["case"]).removeprefix(f"{workload}, "), result) for result in chosen]
        yield title, "The parts of the median step.", plots.step_time(title, bars)


def _peer_groups(results: Sequence[Record]) -> list[list[Record]]:
    """Return the results that differ by their peer alone, where there are several."""
    groups = _grouped(results, lambda result: str({**result["case"], "peer": None})).values()
    return [group for group in groups if len({result["case"]["peer"] for result in group}) > 1]


def _peer_figures(groups: Sequence[Sequence[Record]]) -> Iterator[tuple[str, str, Figure]]:
    for group in groups:
        title = f"Peers on {tables.label(group[0]['case'], with_peer=False)}"
        yield title, "Further right is faster. Bars are 95 % intervals.", plots.peers(title, group)


def _bandwidths(
    points: Sequence[Record], part: Sequence[Record], fits: Sequence[Record]
) -> Iterator[tuple[str, str, Figure]]:
    if points:
        cases = {run["key"]: run["case"] for run in part if run["kind"] == "run"}
        curves = _grouped(points, lambda point: _points_name(point, cases))
        models = {_points_key(fit): fit["curve"] for fit in fits if "curve" in fit}
        lines = {
            name: models[_points_key(curve[0])] for name, curve in curves.items() if _points_key(curve[0]) in models
        }
        title = "Bus bandwidth of an all-reduce"
        yield title, "Size / time * 2 (n - 1) / n. Bars are 95 % intervals.", plots.bus_bandwidth(title, curves, lines)


def _points_key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("what", "replicas", "hosts"))


def _points_name(point: Record, cases: Mapping[str, Record]) -> str:
    hosts = f"{point['hosts']} host{'s' if point['hosts'] > 1 else ''}"
    settings = dict(cases.get(point["key"], {}).get("settings", {}))
    settings.pop("task_args", None)  # the sizes of a sweep
    words = [point.get("what"), f"{point['replicas']} replicas on {hosts}", tables.settings_of({"settings": settings})]
    return ", ".join(filter(None, words))
