import keras
import pytest
import tensorflow as tf

from distloop import RunConfig, State, Task
from distloop.errors import UsageError
from distloop.task import check_layers, load_task
from distloop.tasks import find, names


def model():
    return keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])


def test_a_state_holds_its_parts_by_name_and_builds_the_optimizer():
    net, optimizer = model(), keras.optimizers.Adam()
    state = State(model=net, optimizer=optimizer, best=tf.Variable(0.0))
    assert (state.model, state.optimizer) == (net, optimizer)
    assert optimizer.built
    assert int(state.step.numpy()) == 0


def test_two_models_and_two_optimizers_need_no_other_concept():
    one, two = model(), model()
    first, second = keras.optimizers.SGD(), keras.optimizers.SGD()
    first.build(one.trainable_variables)
    second.build(two.trainable_variables)
    assert State(one=one, two=two, first=first, second=second).second is second


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        (lambda: dict(model=3), "State got model=int; expected Keras models, optimizers, seed generators or variables"),
        (lambda: dict(step=tf.Variable(0)), "State got step="),
        (lambda: dict(parts=model()), "State got parts="),
        (lambda: dict(model=keras.Sequential([keras.layers.Dense(1)])), "the model 'model' has no weights yet"),
        (lambda: dict(a=model(), b=model(), o=keras.optimizers.SGD()), "'o' is not built and there are 2 models"),
    ],
)
def test_parts_that_cannot_be_trained_are_refused(parts, sentence):
    with pytest.raises(UsageError) as refusal:
        State(**parts())
    assert sentence in str(refusal.value)


def test_a_task_with_half_an_evaluation_is_refused():
    with pytest.raises(UsageError, match="one of eval_step and eval_data; give it both"):
        Task(lambda: State(), lambda state, batch: {}, lambda: {}, eval_data=lambda: {})


def test_a_layer_that_replicas_cannot_share_is_refused():
    inner = keras.Sequential([keras.Input([2]), keras.layers.BatchNormalization(synchronized=True)])
    state = State(model=keras.Sequential([keras.Input([2]), inner, keras.layers.Dense(1)]))
    check_layers(state, replicas=2, jit_compile=False)
    check_layers(state, replicas=1, jit_compile=True)
    with pytest.raises(
        UsageError, match=r"of 'model' is synchronized=True: .* in the part that --jit_compile compiles"
    ):
        check_layers(state, replicas=2, jit_compile=True)
    lstm = keras.Sequential([keras.Input(batch_shape=[4, 3, 2]), keras.layers.LSTM(2, stateful=True)])
    check_layers(State(net=lstm), replicas=1, jit_compile=False)
    with pytest.raises(UsageError, match="of 'net' is stateful=True: its state belongs to the examples of one replica"):
        check_layers(State(net=lstm), replicas=2, jit_compile=False)


def test_a_missing_part_is_answered_with_those_that_are_there():
    with pytest.raises(AttributeError, match="holds model, optimizer and step, but no 'net'"):
        _ = State(model=model(), optimizer=keras.optimizers.SGD()).net


def test_library_tasks_are_found_by_file_name_and_load():
    assert names() == [
        *("bert_base", "bert_large", "dlrm_small", "gpt2_124m", "gpt_350m", "mnist_cnn", "mnist_tutorial", "null"),
        *("resnet50", "vgg16", "vit_b16"),
    ]
    for name in names():
        assert isinstance(load_task(name, RunConfig()), Task)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (None, "task is not given; expected one of "),
        ("mnist_cn", "there is no task 'mnist_cn'; expected one of "),
        ("nowhere.at_all:make_task", "there is no module 'nowhere' for the task"),
        ("tests.toy:", "expected my_package.my_module:make_task"),
        (".toy:make_task", "there is no module ''"),
    ],
)
def test_an_unknown_task_is_refused_before_anything_is_imported(name, sentence):
    with pytest.raises(UsageError) as refusal:
        find(name)
    assert sentence in str(refusal.value)


def test_task_args_are_the_arguments_of_make_task(tmp_path, monkeypatch):
    (tmp_path / "task_with_arguments.py").write_text(
        "from distloop import State, Task\n"
        "def make_task(config, *, layers=12, rate=0.1, pool='max', wide=False, depth=None):\n"
        "    def build(): raise ValueError((layers, rate, pool, wide, depth))\n"
        "    return Task(build, lambda state, batch: {}, dict)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    for text, values in [
        (None, (12, 0.1, "max", False, None)),
        ("", (12, 0.1, "max", False, None)),
        ("layers=2, pool=mean,wide=True", (2, 0.1, "mean", True, None)),
        ("rate=1e-3,depth=4", (12, 0.001, "max", False, 4)),
        ("rate=1,pool='a b'", (12, 1, "a b", False, None)),
    ]:
        task = load_task("task_with_arguments:make_task", RunConfig(task_args=text))
        with pytest.raises(ValueError) as told:  # noqa: PT011
            task.build()
        assert told.value.args == (values,)
    taken = "but the task takes layers=12, rate=0.1, pool='max', wide=False, depth=None."
    for text in ("width=3", "layers=two", "layers=2.0", "wide=1", "pool=1"):
        with pytest.raises(UsageError) as refusal:
            load_task("task_with_arguments:make_task", RunConfig(task_args=text))
        assert str(refusal.value).endswith(taken), text
    with pytest.raises(UsageError, match="task_args has layers=2, but the task takes no arguments"):
        load_task("mnist_tutorial", RunConfig(task_args="layers=2"))


@pytest.mark.parametrize("init", ["import not_installed", "def broken(:"])
def test_a_package_that_does_not_import_is_refused_with_its_error(tmp_path, monkeypatch, init):
    (tmp_path / "own_package").mkdir()
    (tmp_path / "own_package/__init__.py").write_text(init)
    (tmp_path / "own_package/tasks.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    find("own_package.tasks:make_task")  # runs nothing of it
    with pytest.raises(UsageError, match=r"importing 'own_package\.tasks' failed with (ModuleNotFound|Syntax)Error: "):
        load_task("own_package.tasks:make_task", RunConfig())


@pytest.mark.parametrize(
    ("source", "function", "sentence"),
    [
        (
            "import missing_package",
            "make_task",
            "importing 'own_task' failed with ModuleNotFoundError: No module named",
        ),
        ("1 / 0", "make_task", "importing 'own_task' failed with ZeroDivisionError: division by zero; make python -c"),
        ("x = 1", "make_task", "'own_task' has no function 'make_task'"),
        ("def make_task(config): return 3", "make_task", "make_task(config) returned int; expected a distloop.Task"),
    ],
)
def test_a_module_that_gives_no_task_is_refused(tmp_path, monkeypatch, source, function, sentence):
    (tmp_path / "own_task.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "own_task", raising=False)
    with pytest.raises(UsageError) as refusal:
        load_task(f"own_task:{function}", RunConfig())
    assert sentence in str(refusal.value)
