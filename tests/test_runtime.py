"""The thin runtime: requests it serves, requests it refuses, and what it does not need."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import fluxrt
from conftest import ROOT
from fluxrt import RequestError
from fluxrt.cli import main
from fluxrt.request import Request

PROMPT = "a large red circle at the left on a white background"


@pytest.fixture(scope="module")
def pipeline(quick_bundle: Path) -> Iterator[fluxrt.Pipeline]:
    with fluxrt.load(quick_bundle) as loaded:
        yield loaded


def test_the_same_seed_generates_the_same_image(pipeline: fluxrt.Pipeline) -> None:
    first, second = (np.asarray(pipeline.generate(Request(PROMPT, seed=3)).images[0]) for _ in range(2))
    assert np.array_equal(first, second)
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, np.asarray(pipeline.generate(Request(PROMPT, seed=4)).images[0]))


def test_an_image_does_not_depend_on_its_batch(pipeline: fluxrt.Pipeline) -> None:
    other = "a small green square at the top right on a black background"
    batch = pipeline.generate(Request([other, PROMPT], seed=5)).images
    assert np.array_equal(np.asarray(batch[1]), np.asarray(pipeline.generate(Request(PROMPT, seed=6)).images[0]))
    chosen = pipeline.generate(Request([other, PROMPT], seed=[9, 6])).images
    assert np.array_equal(np.asarray(chosen[1]), np.asarray(batch[1]))


def test_steps_and_guidance_change_the_image(pipeline: fluxrt.Pipeline) -> None:
    images = [
        np.asarray(pipeline.generate(Request(PROMPT, **request)).images[0])
        for request in ({}, {"steps": 5}, {"guidance": 1.0}, {"guidance": 5.0})
    ]
    assert all(not np.array_equal(images[0], other) for other in images[1:])


def test_guidance_one_is_the_conditional_branch_alone(pipeline: fluxrt.Pipeline) -> None:
    assert pipeline.encode_text(PROMPT, 1.0).shape[0] == 1
    assert pipeline.encode_text(PROMPT, 2.0).shape[0] == 2


def test_given_latents_replace_the_noise(pipeline: fluxrt.Pipeline) -> None:
    from fluxrt.pipeline import starting_noise

    noise = starting_noise(12, 64, 32)
    given = pipeline.generate(Request(PROMPT, seed=99, latents=noise[None])).images[0]
    assert np.array_equal(np.asarray(given), np.asarray(pipeline.generate(Request(PROMPT, seed=12)).images[0]))
    with pytest.raises(RequestError, match=r"latents have shape \[1, 3, 32\], this request needs \[1, 64, 32\]"):
        pipeline.generate(Request(PROMPT, latents=noise[None, :3]))


def test_steps_are_reported(pipeline: fluxrt.Pipeline) -> None:
    seen: list[tuple[int, int]] = []
    result = pipeline.generate(Request([PROMPT, PROMPT], steps=2), lambda done, total: seen.append((done, total)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert set(result.seconds) == {"text", "steps", "decode"}


def test_a_prompt_longer_than_compiled_is_refused_not_cut(pipeline: fluxrt.Pipeline) -> None:
    with pytest.raises(RequestError, match=r"tokens long .* compiled for 32.*text\.length"):
        pipeline.generate(Request("a red circle " * 20))


def test_the_longest_prompt_that_fits_is_served(pipeline: fluxrt.Pipeline) -> None:
    prompt = "a"
    while True:
        try:
            _, mask = pipeline.tokenize([prompt])
        except RequestError:
            break
        longest = mask.sum()
        prompt += " red"
    assert longest == 32


def test_a_size_that_was_not_compiled_is_refused_with_those_that_were(pipeline: fluxrt.Pipeline) -> None:
    with pytest.raises(RequestError, match=r"size 128x64 .* was not compiled; this bundle has 64x64"):
        pipeline.generate(Request(PROMPT, size=(128, 64)))


def test_wrong_requests_are_refused(pipeline: fluxrt.Pipeline, quick_bundle: Path) -> None:
    with pytest.raises(RequestError, match="2 prompts but 1 seeds"):
        pipeline.generate(Request([PROMPT, PROMPT], seed=[1]))
    with pytest.raises(RequestError, match="at least 1 and at most 100000, got 0"):
        pipeline.generate(Request(PROMPT, steps=0))
    with pytest.raises(
        RequestError, match="no target 'tpu' in this bundle; it has: onnxruntime, onnxruntime-exact, onnxruntime-nvfp4"
    ):
        fluxrt.load(quick_bundle, target="tpu")


def test_an_image_that_is_not_finite_is_refused() -> None:
    from fluxrt.pipeline import to_image

    with pytest.raises(fluxrt.BackendError, match="NaN or infinity"):
        to_image(np.full((2, 2, 3), np.nan, dtype=np.float32))


def test_generate_writes_png_files(quick_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "image.png"
    assert main(["generate", str(quick_bundle), "--prompt", PROMPT, "--seed", "3", "--out", str(out)]) == 0
    expected = fluxrt.load(quick_bundle).generate(Request(PROMPT, seed=3)).images[0]
    with Image.open(out) as image:
        assert np.array_equal(np.asarray(image), np.asarray(expected))
    arguments = [
        "generate",
        str(quick_bundle),
        "--prompt",
        PROMPT,
        "--prompt",
        PROMPT,
        "--steps",
        "2",
        "--size",
        "64x64",
    ]
    assert main([*arguments, "--out", str(out)]) == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["image-0.png", "image-1.png", "image.png"]
    assert capsys.readouterr().out.splitlines() == [str(out), *(str(tmp_path / f"image-{i}.png") for i in (0, 1))]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--size", "128x128"], "was not compiled"),
        (["--prompt", "red " * 40], "tokens long"),
        (["--out", "image.jpg"], "ends in .png"),
        (["--out", "no/such/folder/a.png"], "does not exist"),
        (["--steps", "0"], "at least 1"),
    ],
)
def test_generate_refuses_in_one_paragraph_with_exit_code_2(
    quick_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], extra: list[str], message: str
) -> None:
    arguments = ["generate", str(quick_bundle), "-q", "--prompt", PROMPT, "--out", str(tmp_path / "a.png"), *extra]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.startswith("fluxrt: ")
    assert len(error.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_generate_on_a_damaged_bundle_exits_with_1(quick_copy: Path, tmp_path: Path) -> None:
    (quick_copy / "bundle.json").write_text("{")
    assert main(["generate", str(quick_copy), "--prompt", PROMPT, "--out", str(tmp_path / "a.png")]) == 1


def run_python(code: str, *arguments: str, python: str = sys.executable, folder: Path | None = None) -> str:
    command = [python, "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_fluxrt_loads_nothing_heavy() -> None:
    heavy = ("numpy", "onnxruntime", "tokenizers", "PIL", "msgspec")
    code = f"import sys, fluxrt; print([m for m in {heavy} if m in sys.modules])"
    assert run_python(code).strip() == "[]"


def test_opening_a_bundle_reads_only_the_manifest(quick_bundle: Path) -> None:
    code = """
import sys, json
root, opened = sys.argv[1], []
sys.addaudithook(lambda event, args: opened.append(str(args[0])) if event == "open" and root in str(args[0]) else None)
import fluxrt
fluxrt.load(root)
print(json.dumps(opened))
"""
    assert json.loads(run_python(code, str(quick_bundle))) == [str(quick_bundle / "bundle.json")]


def test_it_generates_in_an_environment_without_torch_diffusers_transformers_and_onnx(
    quick_bundle: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "venv"
    venv.create(folder, with_pip=True)
    python = str(folder / "bin" / "python")
    # Built from a copy: a build leaves files beside its source.
    source = shutil.copytree(
        ROOT / "runtime", tmp_path / "runtime", ignore=shutil.ignore_patterns("build", "*.egg-info")
    )
    install = [python, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
    subprocess.run(
        [*install, "-c", str(ROOT / "constraints.txt"), str(source)],
        check=True,
        capture_output=True,
        timeout=600,
    )
    absent = "torch diffusers transformers onnx onnxscript modelopt safetensors fluxc"
    code = f"import importlib.util as u; print([m for m in '{absent}'.split() if u.find_spec(m)])"
    assert run_python(code, python=python, folder=tmp_path).strip() == "[]"
    out = tmp_path / "image.png"
    command = [str(folder / "bin" / "fluxrt"), "generate", str(quick_bundle), "--prompt", PROMPT, "--seed", "3"]
    subprocess.run([*command, "--out", str(out)], check=True, capture_output=True, timeout=300)
    expected = fluxrt.load(quick_bundle).generate(Request(PROMPT, seed=3)).images[0]
    with Image.open(out) as image:
        difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert difference.max() <= 1
