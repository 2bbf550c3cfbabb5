"""Shared fixtures: the repository's recipe and checkpoint, and bundles that are compiled once a session."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Two workers on two cores: threads that wait for one another would make both many times slower. Nor can killed_in.py fork
# with threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from fluxc.base.cache import ENVIRONMENT, StageCache
from fluxc.base.progress import StageProgress
from fluxc.build.build import WRITE_BUNDLE, build
from fluxc.build.runner import run
from fluxc.build.stages import export_of
from fluxc.families.registry import FAMILIES
from fluxc.graph.stage import ExportInputs
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.recipe.load import LoadedRecipe, load_recipe
from fluxc.report.structs import REPORT_JSON, encode_report, read_report
from quick import QUICK, results_of

ROOT = Path(__file__).resolve().parent.parent
NANO = ROOT / "models" / "flux2-nano"
NANO_DEV = ROOT / "models" / "flux2-nano-dev"
RECIPE = ROOT / "recipes" / "flux2-nano.yaml"
sys.path.insert(0, str(NANO))
pytest.register_assert_rewrite("predicted")


class RecordingProgress(StageProgress):
    """Remembers which stages' results were found in the cache and which were made, and what was said."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.found: list[str] = []
        self.said: list[str] = []

    def stage(self, title: str):
        if title != WRITE_BUNDLE:
            self.ran.append(title)
        return super().stage(title)

    def cached(self, title: str) -> None:
        if title != WRITE_BUNDLE:
            self.found.append(title)

    def say(self, line: str) -> None:
        self.said.append(line)


def compile_into(out: Path, *changes: str, progress: StageProgress | None = None, recipe: Path = RECIPE) -> Path:
    built = build(load_recipe(recipe, changes), out, progress or RecordingProgress())
    assert built is not None
    assert encode_report(read_report(built / REPORT_JSON)) == (built / REPORT_JSON).read_bytes()
    return built


def exported(component: str, config: dict[str, Any], text_length: int, **how: Any) -> dict[str, onnx.ModelProto]:
    """A component's neutral graphs, made by the build's own stage: once in a run, for its tests and its bundles."""
    inputs = ExportInputs(component, config, text_length, **how)
    with StageCache(Path(os.environ[ENVIRONMENT]), RecordingProgress()) as cache:
        folder = run(cache, export_of(inputs))
        return {path.stem: onnx.load(path) for path in folder.glob("*.onnx")}


def copy_checkpoint(target: Path, source: Path = NANO) -> Path:
    """flux2-nano's own files, or another's of models/, to be damaged."""
    shutil.copytree(source, target, ignore=shutil.ignore_patterns(".work", "*.py", "__pycache__", "*.md"))
    return target


def quantized_by_modelopt(*changes: dict[str, Any]) -> Any:
    """flux2-nano's pipeline, its transformer quantized to NVFP4 and calibrated by modelopt as the quick bundle is by fluxc.

    `changes` are appended to modelopt's default configuration.
    """
    import modelopt.torch.quantization as mtq
    import torch

    from fluxc.checkpoint.reference import Generation, generate, load_pipeline
    from fluxc.checkpoint.source import open_checkpoint

    checkpoint = open_checkpoint(str(NANO), None, ROOT)
    pipeline = load_pipeline(checkpoint, torch.bfloat16)
    prompts = [p for p in (ROOT / "tests/data/two-prompts.txt").read_text().splitlines() if not p.startswith("#")]

    def forward(_: torch.nn.Module) -> None:
        for number, prompt in enumerate(prompts):
            generate(pipeline, checkpoint, prompt, Generation((64, 64), 3, 1.5, number, 32, (9, 18, 27)))

    config = copy.deepcopy(mtq.NVFP4_DEFAULT_CFG)
    config["quant_cfg"] += changes
    mtq.quantize(pipeline.transformer, config, forward)
    return pipeline


def write_hollow(path: Path, shapes: dict[str, tuple[int, ...]]) -> None:
    """A safetensors file of bf16 tensors whose data is a hole: its size and header are real, and it takes no disk."""
    header, position = {}, 0
    for name, shape in shapes.items():
        end = position + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [position, end]}
        position = end
    encoded = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + position)


def hollow_checkpoint(
    root: Path, transformer: dict[str, Any], text_encoder: dict[str, Any], small: Path = NANO
) -> Path:
    """A checkpoint with these configs, as published, and the rest of `small`'s; the large weights are holes."""
    copy_checkpoint(root, small)
    index = json.loads((root / "model_index.json").read_text())
    encoder = FAMILIES[index["_class_name"]].text_encoder.read(text_encoder)
    parts: list[tuple[str, str, dict[str, Any], dict[str, tuple[int, ...]]]] = [
        ("transformer", "diffusion_pytorch_model.safetensors", transformer, Flux2Transformer.read(transformer).tensors),
        ("text_encoder", "model.safetensors", text_encoder, encoder.tensors(encoder.num_hidden_layers)),
    ]
    for name, weights, config, shapes in parts:
        (root / name / "config.json").write_text(json.dumps(config))
        write_hollow(root / name / weights, shapes)
    return root


# The long files first, so that both processes end together, and in an order in which neither waits for the other's bundle.
FIRST = (
    "build ulysses_gpu tensorrt ulysses stepcache_nano sensitivity oracle dev calibrate quantized_source cuda_runtime "
    "gpu_check parity openvino"
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of FIRST in its order, then the rest as collected."""
    place = {f"test_{name}": at for at, name in enumerate(FIRST.split())}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


EXPORTS, KEPT_EXPORTS = ROOT / ".pytest_cache" / "exports", 200
"""Graphs that earlier runs traced, by keys that hold configs, versions and the code that traces; the most recent are kept."""


def copy_exports(source: Path, target: Path) -> None:
    """Copy the results of export stages that `target` lacks; two processes may do it at once."""
    target.mkdir(parents=True, exist_ok=True)
    for result in source.glob("export-*"):
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch, contextlib.suppress(OSError):
            if not (target / result.name).exists():
                shutil.copytree(result, Path(scratch) / result.name)
                (Path(scratch) / result.name).rename(target / result.name)
            # A result's time is that of its last use.
            os.utime(target / result.name, ns=(result.stat().st_atime_ns, result.stat().st_mtime_ns))


@pytest.fixture(scope="session", autouse=True)
def shared_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The stage cache of all builds of a run, and of all its workers: what one has made, none makes again."""
    base = tmp_path_factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    folder = base / "stage-cache"
    copy_exports(EXPORTS, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(ENVIRONMENT, str(folder))
        yield folder
    copy_exports(folder, EXPORTS)
    for old in sorted(EXPORTS.iterdir(), key=lambda path: path.stat().st_mtime, reverse=True)[KEPT_EXPORTS:]:
        shutil.rmtree(old, ignore_errors=True)


def seed_cache(shared: Path, bundle: Path, folder: Path) -> None:
    """Give builds in `folder` a cache of their own that knows what `bundle` was made from, and nothing else."""
    for result in results_of(shared, bundle):
        shutil.copytree(result, folder / ".fluxc" / result.name)


@pytest.fixture
def own_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    """Builds keep their results beside the bundle, as they do for users."""
    monkeypatch.delenv(ENVIRONMENT)


@pytest.fixture(scope="session")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for bundles."""
    return tmp_path_factory.mktemp("artifacts")


@pytest.fixture(scope="session")
def nano_bundle(workshop: Path) -> Path:
    """recipes/flux2-nano.yaml, compiled as it stands."""
    return compile_into(workshop / "nano")


@pytest.fixture(scope="session")
def dev_bundle(workshop: Path) -> Path:
    """recipes/flux2-nano-dev.yaml, compiled as it stands."""
    return compile_into(workshop / "nano-dev", recipe=RECIPE.with_name("flux2-nano-dev.yaml"))


@pytest.fixture(scope="session")
def quick_bundle(workshop: Path) -> Path:
    """flux2-nano with two prompts and three steps."""
    return compile_into(workshop / "quick", *QUICK)


@pytest.fixture(scope="session")
def exact_bundle(workshop: Path) -> Path:
    """flux2-nano with every layer left in bf16."""
    return compile_into(
        workshop / "exact", "precision.transformer={default: bf16}", "targets=[{kind: onnxruntime}]", "gates={}"
    )


@pytest.fixture
def quick_copy(quick_bundle: Path, tmp_path: Path) -> Path:
    """A copy of the quick bundle, to be damaged."""
    return Path(shutil.copytree(quick_bundle, tmp_path / "bundle"))


@pytest.fixture
def recipe() -> LoadedRecipe:
    return load_recipe(RECIPE)
