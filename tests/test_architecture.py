"""The house: who may import whom, how long a file may be, and the names that users rely on."""

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import distloop
from distloop.config import RunConfig

ROOT = Path(__file__).parents[1]
# A module may import only from lower floors; within floor 0 there is an order of its own, checked as "no cycle".
FLOORS = {
    "errors": 0,
    "config": 0,
    "cluster": 0,
    "storage": 0,
    "say": 0,
    "workdir": 0,
    "tasks": 0,
    "launcher": 0,
    "launcher.beacon": 0,
    "launcher.error_record": 0,
    "launcher.topology": 0,
    "launcher.ports": 0,
    "launcher.wire": 0,
    "launcher.rendezvous": 0,
    "launcher.meeting": 0,
    "launcher.agreement": 0,
    "launcher.readiness": 0,
    "launcher.proxies": 0,
    "launcher.machine": 0,
    "launcher.checks": 0,
    "launcher.doctor": 0,
    "launcher.plan": 0,
    "launcher.slurm": 0,
    "launcher.devices": 0,
    "launcher.emit_settings": 0,
    "launcher.manifests": 0,
    "launcher.emit": 0,
    "launcher.fault": 0,
    "launcher.processes": 0,
    "launcher.logs": 0,
    "launcher.report": 0,
    "launcher.policy": 0,
    "launcher.watchdog": 0,
    "launcher.interrupts": 0,
    "launcher.member": 0,
    "launcher.group": 0,
    "launcher.supervisor": 0,
    "launcher_flags": 6,
    "launcher.data_service": 0,
    "runtime": 1,
    "strategies": 1,
    "local_reduction": 0.4,
    "reduction": 0.5,
    "fused": 1,
    "metrics": 1,
    "position": 1,
    "sharding": 1.5,
    "lifecycle": 1.5,
    "checkpoint_files": 1,
    "writers": 1,
    "console": 1,
    "keras_metrics": 1.5,
    "scopes": 1.5,
    "records": 1.5,
    "pipeline": 1.6,
    "determinism": 1.6,
    "task": 2,
    "precision": 2,
    "sources": 2,
    "data": 2.2,
    "inputs": 2.3,
    "caching": 2.2,
    "datasets": 2.2,
    "backward": 2.2,
    "updates": 2.2,
    "service": 2.4,
    "gradients": 2.4,
    "steps": 3,
    "checkpoint": 3,
    "rehearsal": 3,
    "finetune": 3.2,
    "preflight": 3,
    "loop": 4,
    "actions": 4.5,
    "guard": 4.5,
    "startup": 4.5,
    "evaluation": 4.8,
    "xla": 4.8,
    "experiment": 5,
    "serving": 5,
    "flags": 6,
    "__main__": 7,
    "data_server": 7,
    "tasks._images": 6,
    "tasks._transformer": 6,
    "tasks.bert_base": 7,
    "tasks.dlrm_small": 7,
    "tasks.gpt2_124m": 7,
    "tasks.mnist_cnn": 7,
    "tasks.mnist_tutorial": 7,
    "tasks.null": 7,
    "tasks.resnet50": 7,
    "tasks.vgg16": 7,
    "tasks.vit_b16": 7,
    "tasks.bert_large": 8,
    "tasks.gpt_350m": 8,
}
FILES = sorted((ROOT / "distloop").rglob("*.py"))
BENCHMARKS = sorted((ROOT / "benchmarks").glob("*.py"))


def module_name(path):
    parts = path.relative_to(ROOT / "distloop").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__") or "distloop"


def imported(path, *, top_level_only=False):
    """Return the names of the modules that a file imports, dotted, with those of its functions too."""
    tree = ast.parse(path.read_text())
    found = set()
    for node in tree.body if top_level_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def own_imports(path):
    lazy = {f"distloop.{name}" for name in distloop.__all__} & imported(path)
    assert not lazy or module_name(path).startswith("tasks."), f"{path} imports {lazy} from the top"
    names = {name.removeprefix("distloop.") for name in imported(path) if name.startswith("distloop.")}
    return names & set(FLOORS)


@pytest.mark.parametrize("path", [f for f in FILES if module_name(f) != "distloop"], ids=module_name)
def test_a_module_imports_only_from_lower_floors(path):
    floor = FLOORS[module_name(path)]
    for name in own_imports(path) - {module_name(path)}:
        assert FLOORS[name] < floor or FLOORS[name] == floor == 0, f"{module_name(path)} imports {name}"


@pytest.mark.parametrize(
    "graph",
    [
        {module_name(f): own_imports(f) for f in FILES if FLOORS.get(module_name(f)) == 0},
        {f"benchmarks.{f.stem}": imported(f) for f in BENCHMARKS},
    ],
    ids=["ground floor", "benchmarks"],
)
def test_there_is_no_cycle(graph):
    graph = dict(graph)
    while graph:
        leaves = [name for name, needs in graph.items() if not needs & set(graph)]
        assert leaves, f"a cycle among {sorted(graph)}"
        for leaf in leaves:
            del graph[leaf]


def test_only_named_modules_import_absl_and_only_launchers_stay_outside():
    assert [module_name(f) for f in FILES if any(n.split(".")[0] == "absl" for n in imported(f))] == [
        "flags",
        "launcher_flags",
    ]
    commands = ["command", "compare", "predict", "report", "run"]
    assert [f.stem for f in BENCHMARKS if any(n.split(".")[0] == "absl" for n in imported(f))] == commands
    assert not set().union(*map(imported, BENCHMARKS)) & {f"benchmarks.{name}" for name in commands[1:]}
    for path in FILES:
        assert not {name.split(".")[0] for name in imported(path)} & {"launch", "benchmarks", "tests"}


@pytest.mark.parametrize(
    ("call", "homes"),
    [
        (".all_reduce(", ["reduction"]),
        ("strategy.run(", ["gradients", "preflight", "steps"]),
        (".is_chief", ["experiment", "startup"]),
        ("FLAGS", ["flags", "launcher_flags"]),
    ],
)
def test_what_is_easy_to_get_wrong_has_one_home(call, homes):
    assert [module_name(f) for f in FILES if call in f.read_text() and module_name(f) != "cluster"] == homes


def test_files_are_short():
    for path in [*FILES, *(ROOT / "launch").glob("*.py"), *BENCHMARKS]:
        assert len(path.read_text().splitlines()) <= 300, path


def test_public_names_are_frozen():
    assert distloop.__all__ == [
        *("Metric", "NotFiniteError", "PeerLostError", "Pipeline", "PreflightError", "RunConfig", "State", "Stopped"),
        *("StorageError", "Task", "UsageError", "evaluate", "export", "gather", "in_memory", "keras_metric"),
        *("load_tfds", "load_tfrecords", "mean", "minimize", "on_disk", "train"),
    ]
    for name in distloop.__all__:
        assert getattr(distloop, name).__doc__
    with pytest.raises(AttributeError, match="module 'distloop' has no attribute 'fit'"):
        _ = distloop.fit


def test_flags_are_frozen():
    assert [setting.name for setting in fields(RunConfig)] == [
        *("task", "task_args", "workdir", "strategy", "replicas", "dataset", "data_dir", "data_service"),
        *("global_batch_size", "epochs", "train_steps", "steps_per_call", "eval_every_steps", "checkpoint_every_steps"),
        *("keep_checkpoints", "best_metric", "best_mode", "init_from", "seed", "learning_rate"),
        *("precision", "loss_scale", "initial_loss_scale", "loss_scale_growth_steps", "loss_scale_growth_factor"),
        *("loss_scale_backoff_factor", "min_loss_scale", "clip_global_norm", "clip_norm", "clip_value"),
        *("gradient_norm", "micro_batches", "ema_momentum", "shard_optimizer", "bytes_per_pack", "wire_dtype"),
        *("jit_compile", "deterministic"),
    ]


@pytest.mark.parametrize("path", [*FILES, *BENCHMARKS], ids=lambda path: path.stem)
def test_public_functions_and_classes_have_a_docstring(path):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), path
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name}"


def loaded_after(statement):
    script = f"import sys; before = set(sys.modules); {statement}; print(*(set(sys.modules) - before))"
    out = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {name.split(".")[0] for name in out.split()}


def test_import_distloop_loads_nothing_but_itself():
    assert loaded_after("import distloop") - sys.stdlib_module_names == {"distloop"}


@pytest.mark.parametrize("module", [f"distloop.{name}" for name, floor in FLOORS.items() if floor == 0])
def test_the_ground_floor_loads_no_tensorflow(module):
    assert not loaded_after(f"import {module}") & {"tensorflow", "keras", "numpy", "rich", "absl"}


@pytest.mark.parametrize("command", ["run", "report", "compare", "predict"])
def test_benchmark_commands_load_no_tensorflow_themselves(command):
    assert not loaded_after(f"import benchmarks.{command}") & {"tensorflow", "keras"}
