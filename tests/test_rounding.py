"""`rounding: gptq`: the calls calibration keeps, second moments, solved weights in a build, and where none can be."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from conftest import NANO, RECIPE
from fluxc.base.errors import CheckpointError, RecipeError
from fluxc.base.progress import StageProgress
from fluxc.base.safetensors import read_header
from fluxc.build.build import build
from fluxc.calibrate.calls import Calls, of_arrays
from fluxc.calibrate.file import read_calls
from fluxc.calibrate.moments import Moments, held_out
from fluxc.calibrate.solve import Problem, solve_component
from fluxc.checkpoint.source import open_checkpoint
from fluxc.fidelity.gates import gated_snr
from fluxc.formats.nvfp4 import dequantize
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.solved import Solved
from fluxc.recipe.load import load_recipe
from fluxc.report.structs import REPORT_JSON
from fluxc.running.model import PlacedModel, ReferenceModel
from fluxc.running.placement import Placement
from fluxrt.bundle import open_bundle
from quick import QUICK, results_of

LAYERS = Placement("cpu", torch.bfloat16, "layer")
SOLVED = (*QUICK, "precision.transformer.rounding=gptq")


@pytest.fixture(scope="module")
def solved_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = build(load_recipe(RECIPE, SOLVED), tmp_path_factory.mktemp("solved") / "bundle", StageProgress())
    assert found is not None
    return found


@pytest.fixture(scope="module")
def calls(quick_bundle: Path, shared_cache: Path) -> dict[str, Calls]:
    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    return read_calls(made / "calibration.safetensors")


def weights(bundle: Path) -> dict[str, torch.Tensor]:
    return load_file(bundle / "transformer" / "diffusion_pytorch_model.safetensors")


def test_calls_are_those_of_diffusers_and_give_its_velocities(calls: dict[str, Calls]) -> None:
    """Two prompts of three steps with two rows for guidance, and three texts; each is run again by an unplaced model."""
    from diffusers import Flux2Transformer2DModel

    assert {name: len(kept) for name, kept in calls.items()} == {"transformer": 12, "text_encoder": 3}
    kept = calls["transformer"]
    # Steps and rows differ, prompts and ids are shared.
    assert len({call["hidden_states"] for call in kept.calls}) == 6
    assert len({call["encoder_hidden_states"] for call in kept.calls}) == 3
    assert len({call["img_ids"] for call in kept.calls}) == 1
    model = Flux2Transformer2DModel.from_pretrained(NANO / "transformer", torch_dtype=torch.bfloat16)
    found = []
    with ReferenceModel(open_checkpoint(str(NANO), None, NANO), LAYERS).component("transformer") as placed:
        found = placed.run([lambda n=n: placed.module(**kept[n], return_dict=False)[0] for n in range(len(kept))])
    with torch.no_grad():
        for number, velocity in enumerate(found):
            assert torch.equal(velocity, model(**kept[number], return_dict=False)[0])


def test_calls_survive_storing(calls: dict[str, Calls]) -> None:
    arrays = {name: array for component, kept in calls.items() for name, array in kept.arrays(component).items()}
    for component, read in of_arrays(arrays).items():
        assert read.calls == calls[component].calls
        assert all(torch.equal(value, calls[component].values[digest]) for digest, value in read.values.items())
    first = next(name for name in arrays if "/values/" in name)
    with pytest.raises(IndexError):
        of_arrays({name: array for name, array in arrays.items() if name != first})


def placed_nano(layers: Placement = LAYERS):
    return ReferenceModel(open_checkpoint(str(NANO), None, NANO), layers).component("transformer")


def inputs_of(calls: Calls, layer: str) -> list[torch.Tensor]:
    """What a Linear gets in each call, by a hook of our own on diffusers' model."""
    from diffusers import Flux2Transformer2DModel

    model = Flux2Transformer2DModel.from_pretrained(NANO / "transformer", torch_dtype=torch.bfloat16)
    found: list[torch.Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, x: found.append(x[0].flatten(0, -2).double()))
    with torch.no_grad():
        for number in range(len(calls)):
            model(**calls[number])
    return found


def test_second_moments_are_numpys(calls: dict[str, Calls]) -> None:
    kept, layer = calls["transformer"], "single_transformer_blocks.2.attn.to_out"
    with placed_nano() as placed:
        moments = Moments(placed.module, [layer], len(kept))
        placed.run([lambda n=n: placed.module(**kept[n]) for n in range(len(kept))])
        assert moments.calls_of(layer) == len(kept)
        sums, rows = moments.take(layer)
    seen = inputs_of(kept, layer)
    apart = held_out(len(kept))
    assert apart == [5]
    x = np.concatenate([x.numpy() for number, x in enumerate(seen) if number not in apart])
    assert np.allclose(np.triu(sums.numpy()), np.triu(x.T @ x), rtol=1e-5, atol=1e-5 * np.abs(x.T @ x).max())
    assert {row.tobytes() for row in rows.numpy()} <= {row.tobytes() for row in seen[5].float().numpy()}
    assert len(rows) > len(seen[5]) // 2


@pytest.mark.parametrize("count", [1, 7, 8, 9, 64])
def test_some_of_eight_calls_are_held_out(count: int) -> None:
    apart = held_out(count)
    assert len(apart) == (0 if count < 8 else len(range(5, count, 8)))
    assert all(number < count for number in apart)


def test_solved_weights_lose_less_of_every_output(
    solved_bundle: Path, quick_bundle: Path, calls: dict[str, Calls]
) -> None:
    """On the inputs of the call that was held out, which are computed here; weights read by nvfp4.dequantize."""
    ours, nearest = weights(solved_bundle), weights(quick_bundle)
    source = load_file(NANO / "transformer" / "diffusion_pytorch_model.safetensors")
    assert ours.keys() == nearest.keys()
    entries = [entry for entry in open_bundle(solved_bundle).manifest.precision if entry.format == "nvfp4"]
    assert len(entries) == 36
    shown = json.loads((solved_bundle / REPORT_JSON).read_text())["layers"]
    roundings = {layer["name"]: layer["rounding"] for layer in shown if layer["format"] == "nvfp4"}
    assert {of["rounding"] for of in roundings.values()} == {"gptq"}
    for name in ("transformer_blocks.1.ff.linear_out", "single_transformer_blocks.4.attn.to_qkv_mlp_proj"):
        x, exact = inputs_of(calls["transformer"], name)[5].float(), source[f"{name}.weight"].float()
        lost = []
        for tensors in (ours, nearest):
            parts = (tensors[f"{name}.{part}"] for part in ("weight", "weight_scale", "weight_scale_2"))
            lost.append(float((x @ (exact - dequantize(*parts)).T).square().sum() / (x @ exact.T).square().sum()))
        assert lost[0] < 0.7 * lost[1]
        decibels = [-10 * np.log10(value) for value in lost]
        assert np.allclose(decibels, [roundings[name]["snr_db"], roundings[name]["nearest_snr_db"]], atol=0.3)
    for name in ours:
        if name.rpartition(".")[2] not in ("weight", "weight_scale"):
            assert torch.equal(ours[name], nearest[name]), name


def test_velocities_are_nearer(solved_bundle: Path, quick_bundle: Path) -> None:
    errors = [
        json.loads((bundle / REPORT_JSON).read_text())["targets"]["onnxruntime-exact"]["step_error"]
        for bundle in (solved_bundle, quick_bundle)
    ]
    assert errors[0] < 0.85 * errors[1]


def test_a_gate_of_snr_is_about_the_output_of_a_solved_layer() -> None:
    """Its weight moves where no input is lost by it, so the weight's own ratio says little."""
    layer = {"snr_db": 14.3, "output_snr_db": 31.0, "rounding": {"rounding": "gptq"}}
    assert gated_snr(layer) == 31.0
    assert gated_snr(layer | {"rounding": {"rounding": "nearest"}}) == 14.3
    assert gated_snr(layer | {"rounding": None}) == 14.3
    assert gated_snr(layer | {"output_snr_db": None}) == 14.3


def problem(calls: Calls, layers: list[LayerPlan]) -> Problem:
    component = open_checkpoint(str(NANO), None, NANO).components["transformer"]
    return Problem("transformer", layers, component.tensors, calls, "max")


@pytest.fixture(scope="module")
def to_solve(solved_bundle: Path) -> list[LayerPlan]:
    from fluxc.build.job import open_job

    source = open_job(load_recipe(RECIPE, SOLVED), solved_bundle.parent / "none").original
    return [entry for entry in source.plans["transformer"] if entry.format == "nvfp4"]


def solved(placed: PlacedModel, asked: Problem, folder: Path) -> Solved:
    folder.mkdir(exist_ok=True)
    solve_component(placed, asked, folder)
    return Solved(folder)


def test_few_and_singular_moments_are_solved_with_damping(
    calls: dict[str, Calls], to_solve: list[LayerPlan], tmp_path: Path
) -> None:
    """One call alone: 96 rows for layers of up to 512 inputs, and nothing held out."""
    kept = calls["transformer"]
    one = replace(kept, calls=kept.calls[:1])
    with placed_nano() as placed:
        found = solved(placed, problem(one, to_solve), tmp_path / "one")
    assert len(found.layers) == 36
    assert {of.damping for of in found.roundings.values()} == {0.01}
    assert {of.snr_db for of in found.roundings.values()} == {None}


def test_a_layer_whose_inputs_do_not_vary_is_solved_too(
    calls: dict[str, Calls], to_solve: list[LayerPlan], tmp_path: Path
) -> None:
    layers = [entry for entry in to_solve if entry.layer.name.startswith("transformer_blocks.0.attn.to_out")]
    for value in (0.0, 1.0):
        with placed_nano() as placed:
            constant = placed.module.get_submodule(layers[0].layer.name).register_forward_pre_hook(
                lambda _, x, value=value: (torch.full_like(x[0], value),)
            )
            found = solved(placed, problem(calls["transformer"], layers), tmp_path / f"{value}")
            constant.remove()
        assert found.roundings[layers[0].layer.name].rounding == ("nearest" if value == 0 else "gptq")


def test_a_layer_is_never_worse_than_rounded_to_nearest(
    calls: dict[str, Calls], to_solve: list[LayerPlan], tmp_path: Path
) -> None:
    """Held-out inputs that have nothing to do with those it would be solved on: each coordinate alone, with equal weight."""
    layers = [entry for entry in to_solve if entry.layer.name == "transformer_blocks.1.ff.linear_in"]
    name, kept = layers[0].layer.name, calls["transformer"]
    numbers: list[int] = []

    def unlike(_: torch.nn.Module, x: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
        numbers.append(len(numbers))
        if numbers[-1] not in held_out(len(kept)):
            return x
        return (10 * torch.eye(x[0].shape[-1], dtype=x[0].dtype)[: x[0].shape[-2]].expand_as(x[0]),)

    with placed_nano() as placed:
        placed.module.get_submodule(name).register_forward_pre_hook(unlike)
        found = solved(placed, problem(kept, layers), tmp_path / "unlike")
    rounding = found.roundings[name]
    assert rounding.rounding == "nearest" or (rounding.snr_db or 0) > (rounding.nearest_snr_db or 0)
    assert rounding.damping != 0.01


def test_a_layer_that_no_call_reaches_says_so(
    calls: dict[str, Calls], to_solve: list[LayerPlan], tmp_path: Path
) -> None:
    with placed_nano() as placed:
        block = placed.module.get_submodule("transformer_blocks.1.ff_context")
        block.forward = lambda x: torch.zeros_like(x)
        found = solved(placed, problem(calls["transformer"], to_solve), tmp_path / "unreached")
    left = {name: of for name, of in found.roundings.items() if of.rounding == "nearest"}
    assert left.keys() == {f"transformer_blocks.1.ff_context.linear_{way}" for way in ("in", "out")}
    assert {of.why for of in left.values()} == {"calibration's calls reach it 0 times, not 12"}
    assert len(found.layers) == 34


THREADS = """\
import sys
from pathlib import Path
from fluxc.base.threads import computing_with
with computing_with(int(sys.argv[2])):
    sys.path.insert(0, {tests!r})
    from conftest import RECIPE
    from test_rounding import SOLVED
    from fluxc.base.progress import StageProgress
    from fluxc.build.build import build
    from fluxc.recipe.load import load_recipe
    build(load_recipe(RECIPE, SOLVED), Path(sys.argv[1]), StageProgress(), "weights")
"""


def test_the_bytes_do_not_depend_on_threads(solved_bundle: Path, shared_cache: Path, tmp_path: Path) -> None:
    from fluxc.base.cache import ENVIRONMENT
    from fluxc.base.threads import HOW_MANY, HOW_TO_WAIT

    results = results_of(shared_cache, solved_bundle)
    (tmp_path / ".fluxc").mkdir()
    for known in results:
        if known.name.startswith(("export-", "template-", "calibration-")):
            (tmp_path / ".fluxc" / known.name).symlink_to(known)
    kept = {name: value for name, value in os.environ.items() if name not in (*HOW_MANY, *HOW_TO_WAIT, ENVIRONMENT)}
    code = THREADS.format(tests=str(Path(__file__).parent))
    command = [sys.executable, "-c", code, str(tmp_path / "bundle"), "3"]
    subprocess.run(command, check=True, timeout=300, env=kept, capture_output=True)
    made = list((tmp_path / ".fluxc").glob("rounding-*/*.safetensors"))
    assert len(made) == 8
    for path in made:
        assert path.read_bytes() == (shared_cache / path.relative_to(tmp_path / ".fluxc")).read_bytes(), path


@pytest.mark.usefixtures("own_cache")
def test_killed_and_run_again_gives_the_same_bytes(solved_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "bundle"
    arguments = [a for change in SOLVED for a in ("--set", change)]
    command = [sys.executable, "-m", "fluxc", "build", str(RECIPE), *arguments, "--out", str(out), "--until", "weights"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    pattern = ".fluxc/progress/rounding-*/*.safetensors"
    while process.poll() is None and not list(tmp_path.glob(pattern)):
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    (part, *_) = list(tmp_path.glob(pattern))
    part.with_name("9999.safetensors").write_bytes(part.read_bytes()[:-9])
    part.with_name("9999.safetensors").unlink()
    subprocess.run(command, check=True, capture_output=True)
    (folder,) = tmp_path.glob(".fluxc/weights-transformer-*")
    file = "transformer/diffusion_pytorch_model.safetensors"
    assert next(folder.glob("*.safetensors")).read_bytes() == (solved_bundle / file).read_bytes()
    assert list((tmp_path / ".fluxc/progress").iterdir()) == []


def test_the_text_encoder_is_solved_too(tmp_path: Path) -> None:
    changes = (
        *QUICK,
        "precision.text_encoder={default: nvfp4, rounding: gptq, scales: mse}",
        "precision.transformer={default: bf16}",
    )
    build(load_recipe(RECIPE, changes), tmp_path / "bundle", StageProgress(), "weights")
    root = Path(os.environ["FLUXC_CACHE"])
    newest = max(root.glob("rounding-text_encoder-*"), key=lambda path: path.stat().st_mtime)
    found = Solved(newest)
    assert found.roundings
    assert {of.rounding for of in found.roundings.values()} == {"gptq"}


def test_other_rules_solve_nothing_again(solved_bundle: Path, shared_cache: Path) -> None:
    """As `fluxc tune` writes them: in bf16, and in NVFP4 with inputs in 16 bits, whose weight is the one that was solved."""
    rules = 'rules=[{match: "*.ff.linear_out", format: bf16}, {match: "*.to_qkv_mlp_proj", format: nvfp4-w4a16}]'
    before, known = (
        {path.name for path in shared_cache.glob(f"{stage}-*")} for stage in ("rounding", "weights-transformer")
    )
    out = solved_bundle.with_name("ruled")
    build(load_recipe(RECIPE, (*SOLVED, f"precision.transformer.{rules}")), out, StageProgress(), "weights")
    assert {path.name for path in shared_cache.glob("rounding-*")} == before
    (folder,) = (path for path in shared_cache.glob("weights-transformer-*") if path.name not in known)
    ours, solved = load_file(next(folder.glob("*.safetensors"))), weights(solved_bundle)
    name = "single_transformer_blocks.2.attn.to_qkv_mlp_proj"
    assert torch.equal(ours[f"{name}.weight"], solved[f"{name}.weight"])
    assert f"{name}.input_scale" not in ours
    assert ours["transformer_blocks.0.ff.linear_out.weight"].dtype == torch.bfloat16


def test_a_layer_in_another_format_is_stored_in_it(solved_bundle: Path, tmp_path: Path) -> None:
    """What was solved for NVFP4 is no FP8: the layer is rounded to nearest, and nothing says otherwise."""
    fp8 = 'precision.transformer.rules=[{match: "*.ff.*", format: fp8}]'
    nearest = (*QUICK, fp8, "precision.transformer.scales=mse")
    paths = [
        build(load_recipe(RECIPE, changes), solved_bundle.with_name(name), StageProgress())
        for name, changes in (("with-fp8", (*SOLVED, fp8)), ("nearest-fp8", nearest))
    ]
    ours, theirs = (weights(path) for path in paths if path)
    mixed = [name for name in ours if ".ff." in name]
    assert len(mixed) == 4 * 3
    assert all(
        torch.equal(ours[name].view(torch.uint8), theirs[name].view(torch.uint8)) for name in mixed if ours[name].ndim
    )
    layers = json.loads((solved_bundle.with_name("with-fp8") / REPORT_JSON).read_text())["layers"]
    found = {layer["name"]: layer["rounding"] for layer in layers if layer["format"] in ("fp8", "nvfp4")}
    assert {bool(rounding) for name, rounding in found.items() if ".ff." in name} == {False}
    assert {bool(rounding) for name, rounding in found.items() if ".ff." not in name} == {True}


def test_weights_alone_in_nvfp4_are_solved_too(solved_bundle: Path) -> None:
    """No layer has an input scale, so nothing else asks for a calibration."""
    out = solved_bundle.with_name("w4a16")
    changes = (*SOLVED, "precision.transformer.default=nvfp4-w4a16")
    bundle = build(load_recipe(RECIPE, changes), out, StageProgress())
    assert bundle is not None
    layers = json.loads((bundle / REPORT_JSON).read_text())["layers"]
    solved_layers = [layer for layer in layers if layer["format"] == "nvfp4-w4a16"]
    assert {layer["rounding"]["rounding"] for layer in solved_layers} == {"gptq"}
    assert all(layer["output_snr_db"] for layer in solved_layers)
    ours, solved = weights(bundle), weights(solved_bundle)
    assert all(
        torch.equal(tensor.view(torch.uint8), solved[name].view(torch.uint8))
        for name, tensor in ours.items()
        if tensor.ndim
    )


def test_every_cause_of_the_error_is_measured_alone(tmp_path: Path) -> None:
    """On the page and in the JSON; the text encoder is solved too, and is a cause of its own."""
    changes = (
        *SOLVED,
        "fidelity.attribution=true",
        "precision.text_encoder={default: nvfp4, rounding: gptq}",
        "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]",
    )
    bundle = build(load_recipe(RECIPE, changes), tmp_path / "bundle", StageProgress())
    assert bundle is not None
    report = json.loads((bundle / REPORT_JSON).read_text())
    errors = report["attribution"]["errors"]
    assert set(errors) == {"weights", "inputs", "text encoder", "all"}
    # Independent causes: their squares add up, nearly.
    alone = sum(errors[cause] ** 2 for cause in ("weights", "inputs", "text encoder")) ** 0.5
    assert errors["all"] == pytest.approx(alone, rel=0.25)
    assert errors["weights"] == pytest.approx(report["targets"]["onnxruntime-exact"]["step_error"], rel=0.6)
    assert errors["inputs"] > errors["weights"]
    page = (bundle / "report" / "index.html").read_text()
    assert "Where the error comes from" in page
    assert str(errors["text encoder"]) in page
    for layer in report["layers"]:
        assert (layer["rounding"] or {"rounding": "gptq"})["rounding"] == "gptq"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (("calibration.engine=none",), "calibration.engine: none sees none"),
        (("calibration.engine=modelopt",), "quantizes these itself"),
        (("precision.transformer.default=fp8",), "quantizes none of the transformer's layers to that"),
        (("precision.text_encoder.rounding=gptq",), "quantizes none of the text_encoder's layers to that"),
    ],
)
def test_where_there_is_nothing_to_solve_it_is_refused(changes: tuple[str, ...], said: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="rounding: gptq") as refused:
        build(load_recipe(RECIPE, (*SOLVED, *changes)), tmp_path / "bundle", StageProgress())
    assert said in str(refused.value)
    assert not (tmp_path / "bundle").exists()


def test_a_calibration_file_without_calls_is_refused_at_once(
    quick_bundle: Path, shared_cache: Path, tmp_path: Path
) -> None:
    from fluxc.calibrate.file import read_calibration, write_calibration

    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    file = read_calibration(made / "calibration.safetensors")
    assert not any(name.startswith("calls/") for layer in file.records for name in file.records[layer])
    write_calibration(tmp_path / "old", file.origin, file.records)
    with pytest.raises(RecipeError, match="holds no calls of the transformer"):
        build(load_recipe(RECIPE, (*SOLVED, f"calibration.file={tmp_path / 'old'}")), tmp_path / "b", StageProgress())
    build(
        load_recipe(RECIPE, (*QUICK, f"calibration.file={tmp_path / 'old'}")),
        tmp_path / "b",
        StageProgress(),
        "weights",
    )


def test_damaged_calls_are_refused(quick_bundle: Path, shared_cache: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file as load
    from safetensors.numpy import save_file

    (made,) = (path for path in results_of(shared_cache, quick_bundle) if path.name.startswith("calibration-"))
    path = made / "calibration.safetensors"
    header = json.loads(path.read_bytes()[8 : 8 + int.from_bytes(path.read_bytes()[:8], "little")])
    tensors = {name: value for name, value in load(path).items() if "/values/" not in name}
    assert len(tensors) < len(read_header(path))
    save_file(tensors, tmp_path / "file", metadata=header["__metadata__"])
    with pytest.raises(CheckpointError, match="its calls are incomplete"):
        read_calls(tmp_path / "file")
