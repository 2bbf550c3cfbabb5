"""Memory the weights of a source take, by component and as planned."""

from __future__ import annotations

from fluxc.checkpoint.components import WEIGHTS_FILE
from fluxc.quantize.memory import WeightsMemory, weights_memory
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.source import Source, kept_tensors, narrowed


def memory_by_component(source: Source) -> dict[str, WeightsMemory]:
    """Weights in memory of every component, and of `all` together."""
    table = {name: planned_memory(source, name, source.plans.get(name, [])) for name in WEIGHTS_FILE}
    return {**table, "all": sum(table.values(), WeightsMemory(0, 0, 0))}


def planned_memory(source: Source, component: str, plan: list[LayerPlan]) -> WeightsMemory:
    """Weights in memory of one component under `plan`."""
    tensors = kept_tensors(source, component)
    shapes = {name: ref.shape for name, ref in tensors.items()}
    halved = set(narrowed(component, tensors))
    stored = {name: ref.nbytes // (2 if name in halved else 1) for name, ref in tensors.items()}
    linears = {linear.name: linear for linear in source.linears(component)}
    for name, layer in source.quantized.get(component, {}).items():
        if f"{name}.weight" in tensors:
            for part in layer.tensors:
                del shapes[f"{name}.{part}"]
            shapes[f"{name}.weight"] = (linears[name].out_features, linears[name].in_features)
            stored[f"{name}.weight"] = layer.nbytes
    return weights_memory(shapes, plan, stored)
