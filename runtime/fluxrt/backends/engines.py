"""TensorRT's engines of a target, and the contexts that run them.

A sequence of graphs has contexts of its own: what a CUDA graph was captured from is never bound to anything else while the
graph lives. The working memory is one piece for all of them, since they never run at the same time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from fluxrt.backends.buffers import profile_for, resolve
from fluxrt.backends.kernel_cache import KernelCaches
from fluxrt.backends.library import make_logger
from fluxrt.errors import BackendError

if TYPE_CHECKING:
    from collections.abc import Iterable

    from fluxrt.backends.buffers import Sizes
    from fluxrt.backends.nccl import Communicator
    from fluxrt.bundle import Bundle
    from fluxrt.cuda import Driver
    from fluxrt.group import Group
    from fluxrt.manifest import TensorRTTarget

JOINING = 120.0
"""Seconds in which every rank must have joined a communicator."""


@dataclass
class Context:
    """TensorRT's execution context of one plan for one of its profiles, the sizes its shapes were set for, and the working
    memory (address, bytes) it was given."""

    handle: Any
    sizes: Sizes = field(default_factory=dict)
    scratch: tuple[int, int] = (0, 0)


class Engines:
    """The engines of `target` on the GPU of `driver`; `notes` takes what went wrong and was worked around."""

    def __init__(
        self,
        bundle: Bundle,
        target: TensorRTTarget,
        driver: Driver,
        library: Any,
        ranks: tuple[Group, Communicator] | None,
        notes: list[str],
    ) -> None:
        self._bundle, self._target, self._driver, self._library = bundle, target, driver, library
        self._ranks = ranks
        self._plans = target.engine.plans
        self._logger = make_logger(library)
        self._runtime = library.Runtime(self._logger)
        self._engines: dict[str, Any] = {}
        self._caches = KernelCaches(driver.gpu, str(library.__version__), notes)

    def told(self) -> str:
        """What TensorRT logged last."""
        return str(self._logger.told())

    def working_memory(self, plans: Iterable[str], sizes: Sizes) -> int:
        """Bytes that the hungriest of these plans needs, which are read from the bundle when they are not yet there."""
        return max(
            int(self._engine(name).get_device_memory_size_for_profile_v2(profile_for(name, self._plans[name], sizes)))
            for name in plans
        )

    def make_context(self, name: str, profile: int) -> Context:
        """A new context of a plan; BackendError when TensorRT refuses."""
        engine = self._engine(name)
        strategy = self._library.ExecutionContextAllocationStrategy.USER_MANAGED
        if hasattr(engine, "create_runtime_config") and hasattr(self._library, "CudaGraphStrategy"):
            config = engine.create_runtime_config()
            config.set_execution_context_allocation_strategy(strategy)
            config.cuda_graph_strategy = self._library.CudaGraphStrategy.DISABLED
            # Compiled in the background, kernels for the shapes at hand would be ready only after a step was captured without.
            eager = self._library.DynamicShapesKernelSpecializationStrategy.EAGER
            config.dynamic_shapes_kernel_specialization_strategy = eager
            file = self._plans[name].file
            self._caches.attach(config, name, self._bundle.manifest.files[str(file)].sha256)
            handle = engine.create_execution_context(config)
        else:
            handle = engine.create_execution_context(strategy)
        if handle is None:
            raise BackendError(f"plan {name}: no execution context on {self._driver.gpu.name}: {self.told()}")
        # The profile first: how much working memory a context wants depends on it.
        profiles = self._plans[name].profiles
        if profiles and not handle.set_optimization_profile_async(profile, self._driver.stream):
            raise BackendError(f"plan {name}: its optimization profile {profile} was refused: {self.told()}")
        if self._plans[name].expected.get("collectives"):
            self._join(name, handle)
        return Context(handle)

    def set_shapes(self, name: str, context: Context, sizes: Sizes) -> None:
        """Make a context ready for `sizes`; while nothing is being captured."""
        plan = self._plans[name]
        if context.sizes == sizes:
            return
        for port in plan.inputs if plan.profiles else ():
            shape = resolve(port.shape, sizes)
            if not context.handle.set_input_shape(port.name, shape):
                raise BackendError(f"plan {name} refused {port.name} as {list(shape)}: {self.told()}")
        context.sizes = dict(sizes)

    def save_kernels(self) -> None:
        """Keep the kernels that were compiled for this GPU."""
        self._caches.save()

    def clear(self) -> None:
        """Drop all engines; their contexts must be gone."""
        self._caches.clear()
        self._engines.clear()

    def _engine(self, name: str) -> Any:
        if name not in self._engines:
            file = self._plans[name].file
            assert file is not None
            engine = self._runtime.deserialize_cuda_engine(self._bundle.checked_file(file).read_bytes())
            if engine is None:
                raise BackendError(
                    f"{self._bundle.root / file}: {self._target.kind} {self._library.__version__} does not load it on "
                    f"{self._driver.gpu.name}: {self.told()}; rebuild the bundle for this GPU and version"
                )
            self._engines[name] = engine
        return self._engines[name]

    def _join(self, name: str, handle: Any) -> None:
        """Give a new context the communicator: a call that returns when every rank has made it."""
        joined = False
        if self._ranks:
            group, communicator = self._ranks
            with group.together(f"plan {name} to join NCCL's communicator", JOINING):
                joined = handle.set_communicator(communicator.capsule)
        if not joined:
            raise BackendError(
                f"plan {name}: TensorRT refused the communicator, so its collectives would not run: {self.told()}"
            )
