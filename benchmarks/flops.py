"""Floating-point operations of what TensorFlow traced: the matrix products and convolutions that training needs.

As model FLOPs are counted (https://arxiv.org/abs/2204.02311, appendix B): 2 for a multiplication with its addition;
elementwise operations, normalization, lookups and the optimizer count nothing. Masked attention counts in full.
"""

import math
import re
from typing import Any

import tensorflow as tf

from distloop.steps import CompiledSteps

_PRODUCT = re.compile("MatMul|BatchMatMul(V2|V3)?")
_CONVOLUTION = re.compile("(Conv2D|Conv3D|DepthwiseConv2dNative)(Backprop(Input|Filter)(V2)?)?")
_CALLS = {
    "PartitionedCall": ("f",),
    "StatefulPartitionedCall": ("f",),
    "While": ("body",),
    "StatelessWhile": ("body",),
    "If": ("then_branch", "else_branch"),
    "StatelessIf": ("then_branch", "else_branch"),
    "Case": ("branches",),
    "StatelessCase": ("branches",),
}


def per_example(steps: CompiledSteps, examples: int) -> float:
    """Return the FLOPs of one step over `examples`, those that it gets in this process."""
    return count(steps.traced) / examples


def count(concrete_function: Any) -> float:
    """Return the FLOPs of one call of a concrete function, with those of the functions that it calls.

    A loop counts as one iteration, as it is not known how many there will be: what is counted of the compiled steps is
    one step. A branch counts as the larger of its sides. What no result depends on is not run and not counted.
    """
    return _count_graph(concrete_function.graph)


def _count_graph(graph: Any) -> float:
    return sum(_count_operation(graph, operation) for operation in _needed(graph))


def _needed(graph: Any) -> set[tf.Operation]:
    """Return the operations that the graph's results depend on: TensorFlow prunes the others."""
    waiting = [tensor.op for tensor in graph.outputs] + list(graph.control_outputs)
    needed = set(waiting)
    while waiting:
        operation = waiting.pop()
        before = {tensor.op for tensor in operation.inputs} | set(operation.control_inputs)
        waiting += before - needed
        needed |= before
    return needed


def _count_operation(graph: Any, operation: tf.Operation) -> float:
    if _PRODUCT.fullmatch(operation.type):
        return _product(operation)
    if _CONVOLUTION.fullmatch(operation.type):
        return _convolution(operation)
    if operation.type == "Einsum":
        return _einsum(operation)
    called = {name: operation.get_attr(name) for name in _CALLS.get(operation.type, ())}
    functions = [one for value in called.values() for one in (value if isinstance(value, list) else [value])]
    # There is no public way from the name of a function to its graph.
    return max((_count_graph(graph._get_function(function.name).graph) for function in functions), default=0.0)


def _product(operation: tf.Operation) -> float:
    """`[..., m, k]` times `[..., k, n]`, each perhaps transposed: 2 k for each number of the result."""
    transposed = operation.get_attr("transpose_a" if operation.type == "MatMul" else "adj_x")
    return 2.0 * _size(operation.outputs[0]) * _shape(operation.inputs[0])[-2 if transposed else -1]


def _einsum(operation: tf.Operation) -> float:
    """2 for each combination of all indices of two tensors; a sum over one tensor multiplies nothing."""
    if len(operation.inputs) == 1:
        return 0.0
    terms = operation.get_attr("equation").decode().partition("->")[0].split(",")
    sizes: dict[str | int, int] = {}
    for term, tensor in zip(terms, operation.inputs, strict=True):
        before, _, after = term.partition("...")
        # The axes of an ellipsis are numbered from the last, as they are broadcast.
        hidden = range(len(before) + len(after) - len(tensor.shape), 0)
        for index, size in zip([*before, *hidden, *after], _shape(tensor), strict=True):
            sizes[index] = max(size, sizes.get(index, 1))
    return 2.0 * math.prod(sizes.values())


def _convolution(operation: tf.Operation) -> float:
    """Count a convolution, or the gradient of one, which takes as many operations; padding counts as data does.

    Each number of the result needs the taps of a kernel `[..., in / groups, out]`, depthwise `[..., in, multiplier]`.
    """
    result = operation.inputs[2] if "Backprop" in operation.type else operation.outputs[0]
    kernel = operation.outputs[0] if "BackpropFilter" in operation.type else operation.inputs[1]
    taps = _shape(kernel)[: -2 if "Depthwise" in operation.type else -1]
    return 2.0 * _size(result) * math.prod(taps)


def _size(tensor: Any) -> int:
    return math.prod(_shape(tensor))


def _shape(tensor: Any) -> list[int]:
    if not tensor.shape.is_fully_defined():
        raise ValueError(f"{tensor.op.name} has the shape {tensor.shape}; FLOPs are counted for fixed shapes only.")
    return tensor.shape.as_list()
