"""The README.md of a bundle: true to the manifest, the same for equal bundles, with the model's licence."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from conftest import NANO
from fluxc.build.readme import NAME, _copy_licences, _licence, _rendered
from fluxc.models.published import KLEIN_4B, KLEIN_9B
from fluxrt.bundle import open_bundle
from fluxrt.manifest import read_target


@pytest.fixture(scope="module")
def readme(quick_bundle: Path) -> str:
    return (quick_bundle / NAME).read_text()


def test_it_is_one_of_the_bundles_files_and_says_what_the_manifest_says(quick_bundle: Path, readme: str) -> None:
    manifest = open_bundle(quick_bundle).manifest
    assert NAME in manifest.files
    for target in manifest.targets:
        assert f"| {target.name} | CPU | nothing | `--target {target.name}` |" in readme
        assert str(manifest.fidelity.targets[target.name]["image_psnr_db"]) in readme
    assert manifest.images[0].prompt in readme
    assert "| sizes, height x width in pixels | 64x64 |" in readme
    assert "apache-2.0, as the checkpoint's own README.md states." in readme
    assert str(quick_bundle) not in readme


def test_its_python_example_runs(
    quick_bundle: Path, readme: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = readme.split("```python\n")[1].split("```")[0]
    monkeypatch.chdir(tmp_path)
    exec(code.replace('load(".")', f"load({str(quick_bundle)!r})"), {})
    assert (tmp_path / "image.png").read_bytes().startswith(b"\x89PNG")


def test_gpu_targets_name_their_gpu_and_their_packages(quick_bundle: Path) -> None:
    manifest = open_bundle(quick_bundle).manifest
    engine = {
        "library": "tensorrt_rtx",
        "version": "1.7.1.116",
        "compute_capabilities": ["12.0"],
        "plans": {
            "double": {"source": "a.onnx", "file": None, "inputs": [], "outputs": [], "weights": [], "profiles": []}
        },
        "programs": {},
    }
    entries = (
        {"kind": "tensorrt_rtx", "name": "rtx-2gpus", "engine": engine, "sharding": {"ranks": 2, "text_tokens": 16}},
        {"kind": "onnxruntime", "name": "cuda", "activations": "none", "graphs": {}, "device": "cuda"},
        {
            "kind": "visual_gen",
            "name": "vg",
            "folder": "visual_gen",
            "schema": "1",
            "configs": {"1": "visual_gen/1gpu.yaml"},
            "text_length": 512,
        },
    )
    manifest = msgspec.structs.replace(manifest, targets=tuple(map(read_target, entries)))
    text = _rendered(manifest, "a licence", [])
    exact = "'cuda-bindings>=13' tensorrt-rtx-cu13==1.7.1.116 'nccl4py[cu13]>=0.6'"
    for row in (
        "| rtx-2gpus | 2 NVIDIA GPUs, each of compute capability 12.0 (RTX 50, RTX PRO Blackwell); plans are built on it "
        f"first, by `fluxc finish` | `python -m pip install {exact}` | `--gpus 2` |",
        "| cuda | NVIDIA GPU of compute capability 9.0 or later | `python -m pip uninstall -y onnxruntime && python -m pip ",
        "| `trtllm-serve visual_gen --visual_gen_args visual_gen/1gpu.yaml` |",
    ):
        assert row in text


@pytest.mark.parametrize(
    ("card", "config", "expected"),
    [
        (
            "---\nlicense: apache-2.0\ntags: [a]\n---\n# A model\n",
            KLEIN_9B,
            "apache-2.0, as the checkpoint's own README.md states",
        ),
        (
            "---\nlicense: other\nlicense_name: flux-nc\nlicense_link: LICENSE.md\n---\n",
            KLEIN_4B,
            "flux-nc (LICENSE.md), as",
        ),
        ("# No front matter\n", KLEIN_4B, "FLUX.2 [klein] 4B: Apache License 2.0, as its publisher states"),
        ("---\nlicense: [\n---\n", KLEIN_9B, "FLUX.2 [klein] 9B: FLUX Non-Commercial License, as its publisher states"),
        (None, {**KLEIN_4B, "num_layers": 1}, "not known: the checkpoint names none"),
    ],
)
def test_the_licence_is_the_checkpoints_own_or_that_of_its_shape(
    card: str | None, config: dict[str, object], expected: str, tmp_path: Path
) -> None:
    if card is not None:
        (tmp_path / NAME).write_text(card)
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    assert _licence(tmp_path, tmp_path).startswith(expected)


def test_licence_files_of_the_checkpoint_go_into_the_bundle(tmp_path: Path, quick_bundle: Path) -> None:
    checkpoint, staging = tmp_path / "checkpoint", tmp_path / "staging"
    for folder in (checkpoint, checkpoint / "LICENSES", staging):
        folder.mkdir()
    (checkpoint / "LICENSE.md").write_bytes(b"the licence\n")
    (checkpoint / "NOTICE").write_bytes(b"the notice\n")
    names = _copy_licences(checkpoint, staging)
    assert names == ["LICENSE.md", "NOTICE"]
    assert [(staging / name).read_bytes() for name in names] == [b"the licence\n", b"the notice\n"]
    text = _rendered(open_bundle(quick_bundle).manifest, "A licence", names)
    assert "A licence. The text is in LICENSE.md, NOTICE." in text
    assert not list(NANO.glob("LICENSE*"))
