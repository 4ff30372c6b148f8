"""Published throughputs, as plain data with their sources: what the scaling model is checked against."""

from typing import NamedTuple


class Row(NamedTuple):
    """One published number: examples a second of a configuration on some devices."""

    config: str
    devices: int
    hosts: int
    per_replica_batch: float
    throughput: float


def _table(
    devices: list[int], devices_per_host: int, configs: dict[tuple[str, float], list[float | None]]
) -> list[Row]:
    return [
        Row(name, count, -(-count // devices_per_host), batch, throughput)
        for (name, batch), throughputs in configs.items()
        for count, throughput in zip(devices, throughputs, strict=True)
        if throughput is not None
    ]


# DLPerf (Oneflow-Inc/DLPerf): TensorFlow 2.3, Model Garden's BERT-Base, sequences of 128; hosts of 8 V100-SXM2-16GB
# with one EDR InfiniBand card each; MirroredStrategy on one host, MultiWorkerMirroredStrategy (NCCL) on two.
# Sentences a second, median of 5 runs. About 110.1 million parameters, gradients in float32.
BERT_BASE_BYTES = 440e6
BERT_BASE = _table(
    [1, 2, 4, 8, 16],
    8,
    {
        ("fp32 b32", 32): [103.58, 177.18, 347.83, 675.82, 909.0],
        ("fp32 b32 XLA", 32): [125.37, 216.46, 421.79, 775.93, 1022.99],
        ("fp32 b48", 48): [108.94, 194.29, 384.59, 752.21, 1106.71],
        ("fp32 b48 XLA", 48): [131.27, 236.58, 468.83, 877.55, 1262.4],
        ("fp32 b64", 64): [112.99, 204.16, 402.02, 805.43, 1239.3],
        ("fp32 b64 XLA", 64): [138.21, 254.91, 505.63, 959.02, 1448.74],
        ("fp16 b64", 64): [228.66, 385.19, 746.9, 1402.41, 1893.51],
        ("fp16 b64 XLA", 64): [414.78, 748.66, 1311.35, 2241.6, 2565.99],
        ("fp16 b96", 96): [258.18, 440.72, 868.12, 1669.07, 2421.33],
        ("fp16 b96 XLA", 96): [466.34, 851.97, 1557.31, 2773.8, 3506.12],
    },
)
# The same source, cluster and model under other stacks.
HOROVOD = _table(
    [1, 8, 16, 32],
    8,
    {
        ("Horovod fp32 b32", 32): [107.33, 790.03, 1404.04, 2727.9],
        ("Horovod amp XLA b64", 64): [422.53, 3112.73, 5050.86, 9409.2],
    },
)
PYTORCH = _table([1, 8, 16, 32], 8, {("PyTorch amp b64", 64): [444.51, 3251.7, 4936.92, 9331.72]})
# A GPT of 0.5 billion parameters, 2 sequences of 2048 a GPU, float16 gradients.
MEGATRON_BYTES = 1e9
MEGATRON = _table([1, 8, 16, 32], 8, {("Megatron b2", 2): [4.31, 33.27, 48.16, 93.63]})

# The same source: ResNet-50 v1.5 (25.6 million parameters), ImageNet, images a second.
RESNET50_BYTES = 102e6
# The batch normalization of some rows differs between one host and several: no model explains these.
RESNET50_FP16 = _table(
    [1, 2, 4, 8, 16, 32],
    8,
    {
        ("fp16 b128", 128): [938.09, 1572.3, 3061.66, 5734.83, 8418.2, 16250.19],
        ("fp16 b256", 256): [1075.27, None, 3560.81, 6898.0, 9870.15, 19314.31],
    },
)
RESNET50_FP32 = _table(
    [1, 2, 4, 8, 16, 32], 8, {("fp32 b128", 128): [321.8, 574.66, 1143.46, 2458.74, 4849.68, 9418.44]}
)
RESNET50_PEERS = _table(
    [1, 4, 8, 16, 32],
    8,
    {
        ("Horovod fp32 b128", 128): [362.44, 1391.28, 2721.98, 5099.42, 9514.64],
        ("Horovod amp XLA b224", 224): [1198.55, 4360.83, 8588.45, 14931.03, 29171.69],
        ("PyTorch fp32 b128", 128): [348.62, 1226.38, 2632.93, 5115.4, 10021.29],
    },
)

# tensorflow/docs_src/performance/benchmarks (May 2017): EC2 p2.8xlarge, hosts of 8 K80, synthetic images a second.
# Parameters of ResNet-50 and InceptionV3 (23.8 million) in float32.
INCEPTION3_BYTES = 95e6
K80_RESNET50 = _table(
    [1, 8, 16, 32, 64],
    8,
    {("b64", 64): [52.4, 378, 751, 1388, 2744], ("b32", 32): [48.4, 333, 667, 1180, 2315]},
)
K80_INCEPTION3 = _table(
    [1, 8, 16, 32, 64],
    8,
    {("b64", 64): [29.7, 229, 459, 902, 1783], ("b32", 32): [29.2, 219, 427, 820, 1608]},
)

# e-bug/distributed-tensorflow-benchmarks (ETH/CSCS): InceptionV3, batches of 64, parameter servers, images a second.
_TO_128 = [1, 2, 4, 8, 16, 32, 64, 128]
DAINT_SYNTHETIC = _table(
    _TO_128, 1, {("synthetic", 64): [138.23, 264.57, 523.38, 1018.18, 2001.0, 3840.35, 7118.31, 9219.7]}
)
DAINT_REAL = _table(_TO_128, 1, {("real", 64): [137.03, 260.84, 516.71, 911.84, 1772.34, 3425.55, 6348.74, 9055.64]})
P2_XLARGE = _table(_TO_128, 1, {("synthetic", 64): [30.55, 57.45, 114.57, 228.41, 431.64, 825.64, 996.32, 1077.59]})
P2_8XLARGE = _table(_TO_128, 8, {("synthetic", 64): [30.55, 58.38, 116.34, 230.75, 448.57, 863.72, 1731.31, 3333.2]})

# NVIDIA/DeepLearningExamples, TensorFlow 2, BERT-Large (334 million parameters) with LAMB on hosts of 8 A100-80GB;
# sequences a second. One global batch for all sizes: the micro-batches of a step are in `per_replica_batch`.
BERT_LARGE_BYTES = 1340e6


def _accumulated(name: str, batch: int, sizes: dict[int, tuple[int, float]], devices_per_host: int = 8) -> list[Row]:
    return [
        Row(name, count, count // devices_per_host, micro_batches * batch, throughput)
        for count, (micro_batches, throughput) in sizes.items()
    ]


BERT_LARGE = [
    _accumulated("AMP 128", 312, {8: (32, 3803.82), 16: (16, 7551.37), 64: (4, 29711.11), 256: (1, 110280.73)}),
    _accumulated("TF32 128", 176, {8: (64, 2062.98), 16: (32, 4084.76), 64: (8, 16134.02), 256: (2, 59569.77)}),
    _accumulated("AMP 512", 40, {8: (96, 749.73), 16: (48, 1491.87), 64: (12, 5870.83), 256: (3, 22506.23)}),
]

# AI-Hypercomputer/maxtext: TPU v5e pods of 256 chips joined by the data-center network; MFU in percent on 1, 2, 4 ...
# pods, here in place of a throughput a chip.
MAXTEXT = [
    _table(
        [256, 512, 1024, 2048, 4096, 8192],
        256,
        {(name, 1): [m * n for m, n in zip(mfu, (1, 2, 4, 8, 16, 32), strict=True)]},
    )
    for name, mfu in {
        "16B": (61.1, 59.4, 59.1, 58.3, 56.6, 54.7),
        "32B": (66.9, 64.8, 64.1, 63.7, 62.3, 60.4),
        "64B": (59.9, 56.7, 55.9, 55.0, 53.3, 50.2),
        "128B": (56.1, 55.8, 54.9, 52.9, 50.9, 46.3),
    }.items()
]
