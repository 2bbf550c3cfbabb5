"""Builds one plan: parse, set GPUs and profiles, serialize; every message of the library ends in an error or nowhere.

Where the builder has REQUIRE_USER_ALLOCATION it is set: without it, a plan whose tensors can grow beyond a limit of TensorRT's
own allocates them while it runs. Such memory is not in the size that the plan states, and no CUDA graph can hold it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import onnx

from fluxc.base.errors import BuildError
from fluxrt.backends.library import make_logger
from fluxrt.manifest import dimension_size

USER_ALLOCATION = "REQUIRE_USER_ALLOCATION"
"""A builder flag that TensorRT-RTX 1.7 has, and full TensorRT 10.16 has not."""

Profile = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True)
class PlanRequest:
    """A graph to compile: the model, or with baked weights the file whose external data holds them; for which GPUs; its
    optimization profiles, what a dimension counts to least, best and greatest."""

    name: str
    model: onnx.ModelProto
    compute_capabilities: tuple[str, ...]
    profiles: tuple[Profile, ...] = ()
    path: Path | None = None


def build_plan(trt: ModuleType, request: PlanRequest) -> bytes:
    """The serialized plan. `trt` is the tensorrt or tensorrt_rtx module.

    Where the library takes compute capabilities, the plan runs on those GPUs and no others; full TensorRT builds for the GPU
    it runs on. Raises BuildError with the library's own words.
    """
    logger = make_logger(trt)
    builder = trt.Builder(logger)
    flags = 1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED)
    network = builder.create_network(flags)
    parser = trt.OnnxParser(network, logger)
    parsed = (
        parser.parse_from_file(str(request.path))
        if request.path
        else parser.parse(request.model.SerializeToString(deterministic=True))
    )
    if not parsed:
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise BuildError(f"{request.name}: {trt.__name__} does not accept the graph: {'; '.join(errors)}")
    inputs = [network.get_input(i) for i in range(network.num_inputs)]
    on_host = [tensor.name for tensor in inputs if tensor.is_shape_tensor]
    if on_host:
        raise BuildError(
            f"{request.name}: TensorRT wants {', '.join(on_host)} on the host; fluxrt binds GPU memory alone"
        )
    config = builder.create_builder_config()
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    if hasattr(trt.BuilderFlag, USER_ALLOCATION):
        config.set_flag(getattr(trt.BuilderFlag, USER_ALLOCATION))
    if hasattr(config, "set_compute_capability"):
        config.num_compute_capabilities = len(request.compute_capabilities)
        for index, capability in enumerate(request.compute_capabilities):
            kind = getattr(trt.ComputeCapability, f"SM{capability.replace('.', '')}", None)
            # It answers False and goes on where it will not build for a GPU.
            if kind is None or not config.set_compute_capability(kind, index):
                raise BuildError(f"{request.name}: {trt.__name__} {trt.__version__} does not build for {capability}")
    for profile in request.profiles:
        _add_profile(builder, config, request.model, profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise BuildError(f"{request.name}: {trt.__name__} {trt.__version__} built no plan: {logger.told()}")
    return bytes(plan)


def _add_profile(builder: Any, config: Any, model: onnx.ModelProto, profile: Profile) -> None:
    optimization = builder.create_optimization_profile()
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        if any(d.dim_param for d in dimensions):
            bounds = [{symbol: sizes[at] for symbol, sizes in profile.items()} for at in range(3)]
            shapes = [[dimension_size(d.dim_param or d.dim_value, sizes) for d in dimensions] for sizes in bounds]
            optimization.set_shape(value.name, *shapes)
    if config.add_optimization_profile(optimization) < 0:
        raise BuildError(f"the optimization profile {dict(profile)} was refused")


def _parser_error(error: Any) -> str:
    return f"node {error.node_name() or error.node()}: {error.desc()}"
