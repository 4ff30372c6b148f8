"""What 16 bits on the wire do to the loss: 500 steps on MNIST and on characters of Shakespeare, two processes.

python docs/evidence/sixteen_bit_wire.py DATA_DIR      # with mnist and tiny_shakespeare prepared by TFDS

Another seed in float32 tells what is noise. Each 50 steps both workers compare checksums of all that they hold.
"""

import dataclasses
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
STEPS, CALL = 500, 50
MODELS = {
    "MNIST, CNN": dict(task="mnist_cnn", global_batch_size=64),
    "Shakespeare, GPT": dict(
        task="gpt2_124m",
        task_args="layers=2,width=64,heads=4,vocabulary=256,length=64,dropout=0.0",
        dataset="tiny_shakespeare",
        global_batch_size=16,
    ),
}
VARIANTS = {
    "float32": {},
    "bfloat16": dict(wire_dtype="bfloat16"),
    "float16": dict(wire_dtype="float16"),
    "float32, another seed": dict(seed=1),
}


def worker(settings: str) -> None:
    """Train; write a checksum of every variable after each call to `<workdir>.worker<k>`."""
    from distloop import RunConfig, State, cluster, train
    from distloop.task import load_task, named_variables

    config = RunConfig(**json.loads(settings), train_steps=STEPS, steps_per_call=CALL, checkpoint_every_steps=STEPS)
    task = load_task(config.task, config)
    built: list[State] = []

    def build() -> State:
        built.append(task.build())
        return built[-1]

    index = cluster.from_tf_config(os.environ["TF_CONFIG"]).index
    with Path(f"{config.workdir}.worker{index}").open("w") as checksums:

        def check(_: object) -> None:
            values = [v.numpy().tobytes() for name, v in named_variables(built[0]).items() if "seed" not in name]
            print(hashlib.sha256(b"".join(values)).hexdigest(), file=checksums)

        train(dataclasses.replace(task, build=build, eval_data=None, eval_step=None), config, extra_actions=[check])


def losses(settings: dict[str, object]) -> list[float]:
    """Run two workers; return the mean loss of each call, and fail if the workers ever differ."""
    with tempfile.TemporaryDirectory() as folder:
        text = json.dumps({**settings, "workdir": f"{folder}/run"})
        command = [sys.executable, "-m", "launch.run", "--workers=2", "--", sys.executable, __file__, "--worker", text]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        subprocess.run(command, check=True, cwd=folder, env=environment, stdout=subprocess.DEVNULL)
        one, other = [Path(f"{folder}/run.worker{k}").read_text().splitlines() for k in range(2)]
        assert one == other
        assert len(one) == STEPS // CALL
        lines = map(json.loads, Path(f"{folder}/run/metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["split"] == "train" and "loss" in line]


def main(data_dir: str) -> None:
    """Print a table a model."""
    for model, settings in MODELS.items():
        print(f"{model}: loss, mean of the {CALL} steps that end with")
        print(f"{'':22}" + "".join(f"{step:8}" for step in range(CALL, STEPS + 1, CALL)))
        for name, variant in VARIANTS.items():
            found = losses({**settings, **variant, "data_dir": str(Path(data_dir).resolve())})
            print(f"{name:22}" + "".join(f"{loss:8.4f}" for loss in found), flush=True)
    print("both workers held the same bits after each call")


if __name__ == "__main__":
    worker(sys.argv[2]) if sys.argv[1] == "--worker" else main(sys.argv[1])
