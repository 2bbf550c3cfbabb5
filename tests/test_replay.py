"""Evidence: recorded stages, replayed on every CPU target, on the fakes of GPU backends, and wherever one value was altered."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from safetensors.numpy import load_file

import fluxrt.cli
from fluxc.checkpoint.reference import load_pipeline
from fluxc.checkpoint.source import open_checkpoint
from fluxc.fidelity.evidence import LARGE, _encoded, _write, as_stored, spread, tensors_of
from fluxc.fidelity.gates import evidence_bounds
from fluxc.fidelity.on_target import FILES, digest_without_entries, entries_of
from fluxc.fidelity.verify import verify_bundle
from fluxc.gpu_check.replay import replay_on_gpu
from fluxc.recipe.targets import OnnxRuntimeTarget as CpuOrCuda
from fluxc.recipe.targets import TensorRTRtxTarget as Rtx
from fluxc.rehearsal.place import MadeUpPlace
from fluxrt.bundle import Bundle, open_bundle, sha256_file, verify_files
from fluxrt.errors import BundleError, VerifyError
from fluxrt.evidence import STAGE_OF, Recorded, faults_of, read_evidence, relative_error, replay, stage_of
from fluxrt.manifest import MANIFEST, Evidence, File, Manifest, encode_manifest
from fluxrt.pipeline import Pipeline
from fluxrt.verify import check_target, measured_of, verify_evidence
from test_onnxruntime_cuda import bundle as cuda_bundle  # noqa: F401
from test_serving import bundle as sharded_bundle  # noqa: F401
from test_tensorrt import rtx_bundle  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
CPU = ("onnxruntime", "onnxruntime-nvfp4")
PROLOGUE = ["hidden", "modulation_img", "modulation_txt", "rope_cos", "rope_sin", "text_hidden"]
TENSORS = [*STAGE_OF, *(f"prologue.{name}" for name in PROLOGUE)]


def evidence_of(bundle: Bundle) -> Evidence:
    evidence = bundle.manifest.recorded
    assert evidence is not None
    return evidence


def seal(root: Path, change: Callable[[Manifest], Manifest] = lambda manifest: manifest) -> Bundle:
    """Write a manifest that has the hashes of the files as they are."""
    manifest = json.loads((root / MANIFEST).read_text())
    manifest["digest"] = ""
    for name, file in manifest["files"].items():
        file.update(size=(root / name).stat().st_size, sha256=sha256_file(root / name))
    decoded = fluxrt.manifest.decode_manifest(json.dumps(manifest).encode())
    (root / MANIFEST).write_bytes(encode_manifest(change(decoded)))
    return open_bundle(root)


def alter(root: Path, tensor: str, change: Callable[[np.ndarray], np.ndarray], hides: bool) -> Bundle:
    """Change a tensor of the first prompt, with the file's hash made right, and if it `hides` the tensor's own digest too."""
    bundle = open_bundle(root)
    evidence = evidence_of(bundle)
    (recorded, *_) = read_evidence(bundle, evidence)
    tensors = {name: np.array(array) for name, array in tensors_of(recorded).items()}
    before = tensors[tensor]
    tensors[tensor] = change(before.copy()).astype(before.dtype)
    assert not np.array_equal(tensors[tensor], before, equal_nan=True)
    entry = evidence.prompts[0]
    stages = _write(root / entry.file, tensors)

    def with_digests(manifest: Manifest) -> Manifest:
        if not hides:
            return manifest
        prompts = (msgspec.structs.replace(entry, stages=stages), *evidence.prompts[1:])
        return msgspec.structs.replace(manifest, evidence=msgspec.structs.replace(evidence, prompts=prompts))

    return seal(root, with_digests)


def one_value(array: np.ndarray) -> np.ndarray:
    """The last bit of one value that is not zero, or one token."""
    flat = array.reshape(-1)
    at = int(np.flatnonzero(flat)[0])
    flat[at] = flat[at] + 1 if flat.dtype.kind == "i" else np.nextafter(flat[at], flat.dtype.type(np.inf))
    return array


def far_off(array: np.ndarray) -> np.ndarray:
    """One value that is as large as ten times all the others, or one token."""
    flat = array.reshape(-1)
    flat[0] = 1 - flat[0] if flat.dtype.kind == "i" else 10 * np.linalg.norm(flat) + 1
    return array


@pytest.fixture(scope="module")
def warm(quick_bundle: Path) -> Iterator[Pipeline]:
    """One pipeline for every replay of this file that alters evidence: its graphs are not altered."""
    with Pipeline(open_bundle(quick_bundle), target="onnxruntime", threads=1) as pipeline:
        yield pipeline


def checked_on(warm: Pipeline, bundle: Bundle) -> Any:
    evidence = evidence_of(bundle)
    recorded = read_evidence(bundle, evidence)
    return check_target(bundle, evidence, warm.target, recorded, lambda: contextlib.nullcontext(warm))


@pytest.mark.parametrize("target", CPU)
def test_a_replay_measures_what_the_build_did(quick_bundle: Path, target: str) -> None:
    bundle = open_bundle(quick_bundle)
    (found,) = verify_evidence(bundle, target, threads=1)
    assert (found.status, found.notes, len(found.prompts)) == ("passed", (), 2)
    for ours, built in zip(measured_of(found), evidence_of(bundle).targets[target].measured, strict=True):
        assert ours.step_error == pytest.approx(built.step_error, rel=1e-3)
        assert ours.step_cosine == pytest.approx(built.step_cosine, abs=1e-5)
        assert max(ours.text_error, ours.prologue_error, ours.decode_error) < 1e-5
        assert len(ours.step_error) == 3


def test_what_is_recorded_is_diffusers_own_work(quick_bundle: Path) -> None:
    """diffusers' modules, given the recorded inputs, make the recorded results; the file is safetensors' own."""
    bundle = open_bundle(quick_bundle)
    evidence = evidence_of(bundle)
    recorded = read_evidence(bundle, evidence)[0]
    stored = load_file(bundle.path(evidence.prompts[0].file))
    assert sorted(stored) == sorted(TENSORS)
    for name, array in tensors_of(recorded).items():
        np.testing.assert_array_equal(stored[name], array)
    pipeline = load_pipeline(open_checkpoint(str(ROOT / "models" / "flux2-nano"), None, ROOT), torch.float32)
    ids, mask = (torch.from_numpy(np.array(a[:1])) for a in (recorded.input_ids, recorded.attention_mask))
    with torch.no_grad():
        states = pipeline.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        text = torch.cat([states[layer] for layer in (9, 18, 27)], -1)
        final = torch.from_numpy(np.array(recorded.final))
        rows = int(final.shape[1] ** 0.5)
        grid = final.reshape(1, rows, rows, -1).permute(0, 3, 1, 2)
        mean = pipeline.vae.bn.running_mean.view(1, -1, 1, 1)
        deviation = torch.sqrt(pipeline.vae.bn.running_var.view(1, -1, 1, 1) + pipeline.vae.config.batch_norm_eps)
        decoded = pipeline.vae.decode(pipeline._unpatchify_latents(grid * deviation + mean)).sample
    assert relative_error(text.numpy(), recorded.text[:1]) < 1e-5
    image = (decoded[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1).numpy()
    assert relative_error(image, recorded.image) < 1e-5


@pytest.mark.parametrize("tensor", TENSORS)
def test_the_smallest_change_of_one_value_fails_with_its_stage(quick_copy: Path, tensor: str) -> None:
    """Although the manifest has the altered file's hash."""
    bundle = alter(quick_copy, tensor, one_value, hides=False)
    verify_files(bundle)
    named = rf"0\.safetensors: stage {stage_of(tensor)}: the tensor '{tensor}' of 'a large .* is not the one that was recorded"
    with pytest.raises(BundleError, match=named):
        list(verify_evidence(bundle))


@pytest.mark.parametrize("tensor", TENSORS)
def test_a_value_far_off_fails_the_replay_with_its_stage_whatever_its_digest_says(
    quick_copy: Path, warm: Pipeline, tensor: str
) -> None:
    bundle = alter(quick_copy, tensor, far_off, hides=True)
    if tensor == "sigmas":
        with pytest.raises(BundleError, match=r"stage velocity: its sigmas .* are not the manifest's"):
            checked_on(warm, bundle)
        return
    found = checked_on(warm, bundle)
    assert found.status == "failed"
    assert f"target onnxruntime: {'the ' * (stage_of(tensor) != 'tokens')}{stage_of(tensor)}" in found.why
    if stage_of(tensor) != "tokens":
        assert "of 'a large red circle at the left on a white background' has relative error" in found.why
        assert "of 'a small green square" not in found.why
        assert "; the build measured " in found.why


def test_a_nan_is_a_fault_and_no_number_of_the_output(quick_copy: Path, warm: Pipeline) -> None:
    def with_nan(array: np.ndarray) -> np.ndarray:
        array.reshape(-1)[3] = np.nan
        return array

    found = checked_on(warm, alter(quick_copy, "image", with_nan, hides=True))
    assert found.status == "failed"
    assert "the decoder of 'a large red circle at the left on a white background' has relative error nan" in found.why
    assert [one.error for one in found.prompts[0].stages if one.stage == "decoder"] == [None]
    json.dumps(found.as_json(), allow_nan=False)


def test_sigmas_of_another_schedule_are_told(quick_bundle: Path, warm: Pipeline) -> None:
    """Of evidence whose manifest and files agree, for another number of steps."""
    bundle = open_bundle(quick_bundle)
    evidence = evidence_of(bundle)
    sigmas = tuple(sigma * 0.9 for sigma in evidence.sigmas)
    recorded = [replace(one, sigmas=sigmas) for one in read_evidence(bundle, evidence)]
    other = msgspec.structs.replace(evidence, sigmas=sigmas)
    found = check_target(bundle, other, warm.target, recorded, lambda: contextlib.nullcontext(warm))
    assert (found.status, found.prompts) == ("failed", ())
    assert "the recorded sigma 0.9 is none of the runtime's schedule [1.0, 0.93" in found.why


def test_tensors_that_do_not_fit_are_refused_before_anything_runs(quick_copy: Path) -> None:
    bundle = open_bundle(quick_copy)
    evidence = evidence_of(bundle)
    (recorded, *_) = read_evidence(bundle, evidence)
    tensors = tensors_of(recorded) | {"final": recorded.final[:, 1:]}
    stages = _write(quick_copy / evidence.prompts[0].file, tensors)
    prompts = (msgspec.structs.replace(evidence.prompts[0], stages=stages), *evidence.prompts[1:])
    changed = msgspec.structs.replace(evidence, prompts=prompts)
    bundle = seal(quick_copy, lambda manifest: msgspec.structs.replace(manifest, evidence=changed))
    with pytest.raises(BundleError, match=r"stage decoder: the tensor 'final' has shape \[1, 63, 32\]"):
        list(verify_evidence(bundle))
    tensors.pop("velocities")
    _write(quick_copy / evidence.prompts[0].file, tensors)
    with pytest.raises(BundleError, match=r"stage velocity: the file lacks the tensor 'velocities'"):
        list(verify_evidence(seal(quick_copy)))
    (quick_copy / evidence.prompts[0].file).write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match=r"0\.safetensors: truncated: 40 bytes"):
        list(verify_evidence(seal(quick_copy)))


def test_a_missing_evidence_file_is_named(quick_copy: Path) -> None:
    (quick_copy / "evidence" / "1.safetensors").unlink()
    with pytest.raises(BundleError, match=r"evidence/1\.safetensors: listed in bundle\.json but missing"):
        open_bundle(quick_copy)


def test_evidence_on_wrong_weights_fails_by_stage_prompt_and_target(quick_copy: Path) -> None:
    """Weights that changed with their hash: the stages that read them are named, and no other."""
    file = quick_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(file.read_bytes())
    begin = 8 + int.from_bytes(data[:8], "little")
    middle = begin + (len(data) - begin) // 2
    data[middle : middle + 200_000] = bytes(200_000)
    file.write_bytes(bytes(data))
    (found,) = verify_evidence(seal(quick_copy), "onnxruntime", threads=1)
    assert "target onnxruntime: the velocity at sigma " in found.why
    assert "of 'a large red circle" in found.why
    assert "of 'a small green" in found.why
    assert "text encoder" not in found.why
    assert "decoder" not in found.why
    with pytest.raises(VerifyError, match="the velocity at sigma"):
        list(verify_bundle(quick_copy))


def run_verify(*arguments: object) -> tuple[int, str, str]:
    result = subprocess.run(
        [sys.executable, "-m", "fluxrt", "verify", *map(str, arguments)], capture_output=True, text=True, check=False
    )
    return result.returncode, result.stdout, result.stderr


def test_verify_is_for_a_start_script(quick_bundle: Path, quick_copy: Path) -> None:
    """Exit codes, quiet, JSON; no torch."""
    code, out, err = run_verify(quick_bundle, "-q", "--target", "onnxruntime")
    assert (code, out, err) == (0, "", "")
    code, out, _ = run_verify(quick_bundle, "--json", "--target", "onnxruntime")
    told = json.loads(out)
    assert (code, told["passed"], told["evidence"]) == (0, True, True)
    assert told["bundle"] == open_bundle(quick_bundle).manifest.digest
    (target,) = told["targets"]
    assert (target["target"], target["status"], len(target["prompts"])) == ("onnxruntime", "passed", 2)
    stages = target["prompts"][0]["stages"]
    assert [one["stage"] for one in stages] == ["text encoder", "prologue", *["velocity"] * 3, "decoder"]
    assert all(0 < one["error"] <= one["bound"] for one in stages)
    assert stages[2]["sigma"] == 1.0
    assert stages[2]["at_build"] == pytest.approx(stages[2]["error"], rel=1e-3)
    alter(quick_copy, "image", far_off, hides=True)
    code, out, err = run_verify(quick_copy, "-q", "--json", "--target", "onnxruntime")
    assert (code, json.loads(out)["passed"]) == (1, False)
    assert err.count("\n") == 1
    assert "the decoder of 'a large red circle" in err


def test_verify_answers_what_it_cannot_replay(
    quick_copy: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verify(*arguments: object) -> tuple[int, str, str]:
        code = fluxrt.cli.main(["verify", *map(str, arguments)])
        return (code, *capsys.readouterr())

    code, _, err = verify(quick_copy, "--target", "nothing")
    assert (code, "no target 'nothing' in this bundle" in err) == (2, True)
    monkeypatch.setattr("fluxrt.verify.why_not_replayed", lambda *_: "does not run here: there is no GPU")
    code, out, err = verify(quick_copy)
    assert code == 1
    assert "target onnxruntime: not run: does not run here: there is no GPU" in out
    assert "no target of this bundle was replayed: target onnxruntime does not run here: there is no GPU" in err
    (quick_copy / "README.md").write_bytes((quick_copy / "README.md").read_bytes()[:-1] + b"!")
    code, _, err = verify(quick_copy)
    assert (code, "altered: README.md" in err) == (1, True)


def test_a_bundle_of_the_format_before_evidence_opens_and_says_that_it_has_none(
    quick_copy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(quick_copy / "evidence")
    manifest = json.loads((quick_copy / MANIFEST).read_text())
    manifest["format_version"] = 6
    del manifest["evidence"], manifest["fidelity"]["level"], manifest["fidelity"]["not_compared"]
    del manifest["provenance"]["computed"], manifest["provenance"]["measured"]
    manifest["files"] = {name: file for name, file in manifest["files"].items() if not name.startswith("evidence/")}
    # Sealed as it was then: a field that came later counts for nothing in its digest.
    built_at = manifest["provenance"].pop("built_at")
    del manifest["digest"]
    digest = hashlib.sha256(msgspec.json.encode(manifest, order="deterministic")).hexdigest()
    manifest["provenance"]["built_at"] = built_at
    (quick_copy / MANIFEST).write_text(json.dumps(manifest | {"digest": digest}))
    assert fluxrt.cli.main(["verify", str(quick_copy)]) == 0
    assert "this bundle has no evidence" in capsys.readouterr().err
    lines = list(verify_bundle(quick_copy, "onnxruntime"))
    assert "this bundle has no evidence" in lines[1]
    assert lines[2].endswith("the recorded image is generated again (identical)")


def test_sharded_targets_say_why_they_are_not_replayed(sharded_bundle: Path) -> None:  # noqa: F811
    one, two = verify_evidence(open_bundle(sharded_bundle), threads=1)
    assert one.status == "passed"
    assert (two.target, two.status) == ("onnxruntime-2gpus", "not run")
    assert two.why == "its 2 processes hold each image in shards, so no stage of it is compared; generate with it"


def test_nothing_of_a_replay_needs_torch(quick_bundle: Path) -> None:
    script = (
        "import sys, fluxrt.cli; code = fluxrt.cli.main(['verify', sys.argv[1], '-q', '--target', 'onnxruntime']); "
        "assert not {'torch', 'fluxc', 'safetensors', 'skimage'} & set(sys.modules); sys.exit(code)"
    )
    subprocess.run([sys.executable, "-c", script, str(quick_bundle)], check=True)


def on_fakes(root: Path, target: str) -> Any:
    place, bundle = MadeUpPlace(), open_bundle(root)
    entry, evidence = bundle.target(target), evidence_of(bundle)

    def open_pipeline() -> Pipeline:
        return Pipeline(bundle, target=target, backend=place.backend(bundle, entry, place.driver(), True))

    return check_target(bundle, evidence, entry, read_evidence(bundle, evidence), open_pipeline)


def test_evidence_is_replayed_on_the_fakes_of_tensorrt(rtx_bundle: Path) -> None:  # noqa: F811
    """Every stage is compared; the velocity's error is that of the CPU target that rounds alike, but for bf16."""
    found = on_fakes(rtx_bundle, "tensorrt_rtx")
    assert (found.status, found.why) == ("passed", "")
    # Of the prologue's results, its plans keep one in another buffer.
    assert found.notes == (
        "text_hidden is not compared: no program of target 'tensorrt_rtx' reads or writes 'text_hidden'",
    )
    twin = evidence_of(open_bundle(rtx_bundle)).targets["onnxruntime-nvfp4"].measured
    for ours, built in zip(measured_of(found), twin, strict=True):
        assert 0 < ours.text_error < 0.02
        assert 0 < ours.prologue_error < 0.02
        assert 0 < ours.decode_error < 0.02
        assert max(ours.step_error) < 1.3 * max(built.step_error)


@pytest.mark.parametrize("target", ["onnxruntime-cuda", "onnxruntime-cuda-float16"])
def test_evidence_is_replayed_on_the_stand_in_of_onnxruntime_on_cuda(cuda_bundle: Bundle, target: str) -> None:  # noqa: F811
    found = on_fakes(cuda_bundle.root, target)
    assert (found.status, found.why) == ("passed", "")
    if target.endswith("float16"):
        assert found.notes == ()
    else:
        assert found.notes[0] == (
            "encoded is not compared: 'encoded' is bf16, which ONNX Runtime does not give to numpy; read what it leads to"
        )
        assert [note.partition(" ")[0] for note in found.notes] == ["encoded", *PROLOGUE[:3], "text_hidden"]
        assert [one.error for one in found.prompts[0].stages if one.stage == "text encoder"] == [None]


def test_a_fault_of_a_gpu_is_found_on_the_fakes(rtx_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    root = Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    alter(root, "velocities", far_off, hides=True)
    found = on_fakes(root, "tensorrt_rtx")
    assert found.status == "failed"
    assert "target tensorrt_rtx: the velocity at sigma 1 of 'a large red circle" in found.why
    assert "(2 times what onnxruntime-nvfp4 had when it was built)" in found.why


def test_figures_of_a_replay_on_a_gpu_go_into_manifest_and_report(rtx_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    """On the fakes, as `fluxc finish` does on a GPU: what runs keeps its digest."""
    root = Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    before = open_bundle(root).manifest
    place = MadeUpPlace(is_rehearsal=False)
    lines = list(replay_on_gpu(root, ["tensorrt_rtx"], place))
    assert lines[0].startswith("target tensorrt_rtx: evidence replayed: text encoder 0.0")
    assert lines[1].endswith("a made-up RTX: tensorrt_rtx matched on the target; entries of 1 machines in all")
    bundle = open_bundle(root)
    verify_files(bundle)
    after = bundle.manifest
    assert (digest_without_entries(after), after.evidence) == (before.digest, before.evidence)
    (entry,) = entries_of(after)
    assert entry.tiers == {"tensorrt_rtx": "matched on the target"}
    figures = entry.checks["evidence:tensorrt_rtx"].figures
    assert [one["stage"] for one in figures["prompts"][0]["stages"]][-1] == "decoder"
    page = next(name for name in after.files if name.startswith(FILES) and name.endswith(".html"))
    text = (root / page).read_text()
    assert "evidence:tensorrt_rtx" in text
    assert "a large red circle at the left on a white background" in text
    from fluxc.cli.main import main

    shown = " ".join(CliRunner().invoke(main, ["inspect", str(root)]).output.split())
    assert (
        "tensorrt_rtx: matched on the target: a made-up RTX, driver none; evidence replayed: text encoder 0.0" in shown
    )
    # A replay of the same machine takes the place of the one before.
    assert len(list(replay_on_gpu(root, ["tensorrt_rtx"], place))) == 2
    assert len(entries_of(open_bundle(root).manifest)) == 1
    verify_files(open_bundle(root))


def test_a_replay_that_fails_is_recorded_and_told(rtx_bundle: Path, tmp_path: Path) -> None:  # noqa: F811
    root = Path(shutil.copytree(rtx_bundle, tmp_path / "bundle"))
    alter(root, "image", far_off, hides=True)
    with pytest.raises(VerifyError, match=r"target tensorrt_rtx: the decoder of 'a large red"):
        list(replay_on_gpu(root, ["tensorrt_rtx"], MadeUpPlace(is_rehearsal=False)))
    (entry,) = entries_of(open_bundle(root).manifest)
    assert entry.tiers == {"tensorrt_rtx": "failed on the target"}
    assert entry.checks["evidence:tensorrt_rtx"].status == "failed"


def test_a_target_that_does_not_run_there_leaves_no_entry(quick_copy: Path) -> None:
    manifest = (quick_copy / MANIFEST).read_bytes()
    from fluxc.cli.main import main

    result = CliRunner().invoke(main, ["finish", str(quick_copy)])
    assert result.exit_code == 0, result.output
    assert "nothing is left to build" in result.output
    assert (quick_copy / MANIFEST).read_bytes() == manifest


def test_velocity_bounds_follow_a_target_that_rounds_alike() -> None:
    """Twice what it had; at least what its dtype explains; without such a target, what formats explain."""
    plans: dict[str, Any] = {"transformer": [], "text_encoder": []}
    exact, rounding = CpuOrCuda(), CpuOrCuda(activations="nvfp4")
    cuda, half, gpu = CpuOrCuda(device="cuda"), CpuOrCuda(device="cuda", dtype="float16"), Rtx()
    targets = [exact, rounding, cuda, half, gpu]
    measured = {exact.name: 0.05, rounding.name: 0.11}
    found = evidence_bounds(targets, "float32", plans, measured)
    velocity = {name: bounds["step_error"] for name, bounds in found.items()}
    assert [velocity[t.name].error for t in targets] == [0.1, 0.22, 0.15, 0.1, 0.22]
    assert velocity[gpu.name].of == "2 times what onnxruntime-nvfp4 had when it was built"
    assert velocity[exact.name].of == "2 times what it had when it was built"
    assert velocity[cuda.name].of == "rounding to bfloat16"
    alone = evidence_bounds([gpu], "float32", plans, {})
    assert alone[gpu.name]["step_error"].error == 0.15


def test_a_large_prompt_is_rounded_where_that_costs_little() -> None:
    """fp16 of embeddings, prologue and image; bf16 values as they are; what fp16 cannot hold as fp32."""
    rng = np.random.default_rng(0)
    text = rng.standard_normal((1, 64, 32)).astype(np.float32)
    huge = text.copy()
    huge[0, 0, 0] = 1e6
    step = rng.standard_normal((4, 16, 8)).astype(np.float32)
    ids = np.ones((1, 64), np.int64)
    recorded = Recorded(
        "a",
        0,
        ids,
        ids,
        text,
        {"hidden": huge, "rope": np.float32([[0.5, -2.0]])},
        (1.0,) * 4,
        step,
        step,
        step[:1],
        text[0],
        4,
    )
    assert as_stored(recorded, is_large=False) is recorded
    stored = as_stored(recorded, is_large=True)
    assert 0 < relative_error(stored.text, text) < 4e-4
    assert stored.prologue["hidden"] is huge
    np.testing.assert_array_equal(stored.latents, step)
    kinds = {name: _encoded(array)[0] for name, array in tensors_of(stored).items()}
    assert kinds == {
        "input_ids": "I64",
        "attention_mask": "I64",
        "text": "F16",
        "image": "F16",
        "sigmas": "F64",
        "latents": "F32",
        "velocities": "F32",
        "final": "F32",
        "prologue.hidden": "F32",
        "prologue.rope": "BF16",
    }
    assert text.nbytes < LARGE


def test_what_is_written_is_read_to_the_bit(quick_copy: Path) -> None:
    """In each of the dtypes."""
    bundle = open_bundle(quick_copy)
    evidence = evidence_of(bundle)
    recorded = read_evidence(bundle, evidence)[0]
    halves = recorded.text.astype(np.float16).astype(np.float32)
    eighths = (recorded.image.view(np.uint32) & 0xFFFF0000).view(np.float32)
    changed = replace(recorded, text=halves, image=eighths)
    entry = evidence.prompts[0]
    stages = _write(quick_copy / entry.file, tensors_of(changed))
    prompts = (msgspec.structs.replace(entry, stages=stages), *evidence.prompts[1:])
    evidence = msgspec.structs.replace(evidence, prompts=prompts)
    size = (quick_copy / entry.file).stat().st_size
    assert size < bundle.manifest.files[entry.file].size
    bundle.manifest.files[entry.file] = File(size, "")
    read = read_evidence(bundle, evidence)[0]
    for name, array in tensors_of(changed).items():
        np.testing.assert_array_equal(tensors_of(read)[name], array)


def test_recorded_steps_are_spread_over_all() -> None:
    assert [spread(number, 4) for number in (1, 3, 4, 5, 50)] == [
        [0],
        [0, 1, 2],
        [0, 1, 2, 3],
        [0, 1, 3, 4],
        [0, 16, 33, 49],
    ]


def test_faults_name_the_worst_sigma_alone(quick_bundle: Path, warm: Pipeline) -> None:
    bundle = open_bundle(quick_bundle)
    evidence = evidence_of(bundle)
    recorded = read_evidence(bundle, evidence)[:1]
    found = replay(lambda: contextlib.nullcontext(warm), recorded, evidence.size, evidence.guidance)
    errors = found.errors[0].step_error
    limits = evidence.targets["onnxruntime"]
    second = sorted(errors)[-2]
    bound = msgspec.structs.replace(limits.bounds["step_error"], error=(second + max(errors)) / 2)
    limits = msgspec.structs.replace(limits, bounds={**limits.bounds, "step_error": bound})
    (fault,) = faults_of("onnxruntime", limits, recorded, found)
    assert f"the velocity at sigma {recorded[0].sigmas[errors.index(max(errors))]:.4g} of" in fault
