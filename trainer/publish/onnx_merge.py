"""Put both steps of a decoder into one file that has its weights once, as transformers.js loads it.

The file takes what either step takes, and `use_cache_branch`, which says whether there was a step before. Weights lie in the
graph, and each step is a branch that refers to them.
"""

from pathlib import Path
from typing import Any

BRANCH = "use_cache_branch"


def merge_steps(first: Path, following: Path, out: Path) -> None:
    """Write the first and the following step of a decoder as one part, whose outputs are those of the first step.

    What the following step does not give (keys and values of the image) is what it was given.
    """
    import onnx
    from onnx import TensorProto, helper

    steps = [onnx.load(str(path)) for path in (first, following)]
    weights: dict[bytes, Any] = {}
    branches = [_branch(step.graph, prefix, weights) for step, prefix in zip(steps, ("first_", "next_"), strict=True)]
    outputs = list(steps[0].graph.output)
    given = {value.name for value in steps[1].graph.output}
    for value in outputs:
        if value.name not in given:
            past = value.name.replace("present", "past_key_values")
            branches[1].node.append(helper.make_node("Identity", [past], [f"next_{value.name}"]))
    del branches[1].output[:]  # in the order of the first step
    branches[1].output.extend(helper.make_value_info(f"next_{value.name}", value.type) for value in outputs)
    chosen = helper.make_node(
        "If", [BRANCH], [value.name for value in outputs], then_branch=branches[1], else_branch=branches[0]
    )
    inputs = {value.name: value for step in reversed(steps) for value in step.graph.input}  # of as many tokens as a prompt has
    inputs[BRANCH] = helper.make_tensor_value_info(BRANCH, TensorProto.BOOL, [1])
    graph = helper.make_graph([chosen], "decoder", list(inputs.values()), outputs, list(weights.values()))
    imports = {(entry.domain, entry.version): entry for step in steps for entry in step.opset_import}
    model = helper.make_model(graph, opset_imports=list(imports.values()), ir_version=steps[0].ir_version)
    onnx.checker.check_model(model)
    onnx.save(model, str(out))


def _branch(graph: Any, prefix: str, weights: dict[bytes, Any]) -> Any:
    """Return a step as a branch: its own names begin with a prefix, and its weights are among those of both steps."""
    from onnx import compose, helper

    renamed = compose.add_prefix_graph(graph, prefix, rename_inputs=False)
    shared = {}
    for weight in renamed.initializer:
        name, weight.name = weight.name, ""
        kept = weights.setdefault(weight.SerializeToString(deterministic=True), weight)
        kept.name = kept.name or name
        shared[name] = kept.name
    for node in renamed.node:
        for number, name in enumerate(node.input):
            node.input[number] = shared.get(name, name)
    # A weight that is an output, or is read in a branch of the step itself, would be missed: no exported step has either.
    return helper.make_graph(renamed.node, f"{prefix}step", [], list(renamed.output))
