"""Opening and verifying bundles: everything damaged, altered or foreign is refused by name."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import fluxrt
from fluxc.base.errors import BuildError
from fluxc.fidelity.verify import verify_bundle
from fluxrt import BundleError, VerifyError
from fluxrt.bundle import open_bundle, verify_files
from fluxrt.manifest import decode_manifest, encode_manifest, manifest_digest


def edit_manifest(bundle: Path, edit) -> None:
    path = bundle / "bundle.json"
    manifest = json.loads(path.read_text())
    edit(manifest)
    path.write_text(json.dumps(manifest))


def reseal(bundle: Path, edit) -> None:
    """Change the manifest and make its digest right again, as a careful forger would."""
    edit_manifest(bundle, edit)
    manifest = decode_manifest((bundle / "bundle.json").read_bytes())
    (bundle / "bundle.json").write_bytes(encode_manifest(manifest))


def test_a_whole_bundle_verifies_and_generates_its_image_again(quick_bundle: Path) -> None:
    lines = list(verify_bundle(quick_bundle))
    assert "match their SHA-256" in lines[0]
    assert ["evidence replayed: text encoder" in line for line in lines[1:]] == [True, True, True, False, False, False]
    assert ["generated again (identical)" in line for line in lines[1:]] == [False, False, False, True, True, True]


def test_a_changed_byte_is_found_and_named(quick_copy: Path) -> None:
    path = quick_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-100] ^= 1
    path.write_bytes(data)
    fluxrt.load(quick_copy)
    with pytest.raises(BundleError, match=r"altered: transformer/diffusion_pytorch_model\.safetensors"):
        verify_files(open_bundle(quick_copy))


def test_a_changed_graph_is_not_run(quick_copy: Path) -> None:
    path = quick_copy / "transformer" / "body.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(
        BundleError, match=r"body\.onnx: its SHA-256 is not the one in bundle\.json, so it will not be run"
    ):
        fluxrt.load(quick_copy).generate(
            fluxrt.Request("a large red circle at the left on a white background", steps=1)
        )


def test_a_truncated_file_is_named_on_opening(quick_copy: Path) -> None:
    path = quick_copy / "vae" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(BundleError, match=r"vae/diffusion_pytorch_model\.safetensors: .* truncated or altered"):
        open_bundle(quick_copy)


def test_a_missing_file_is_named_on_opening(quick_copy: Path) -> None:
    (quick_copy / "transformer" / "body.onnx").unlink()
    with pytest.raises(BundleError, match=r"body\.onnx: listed in bundle\.json but missing"):
        open_bundle(quick_copy)


def test_a_file_nobody_listed_is_found(quick_copy: Path) -> None:
    (quick_copy / "transformer" / "extra.safetensors").write_bytes(b"x")
    with pytest.raises(BundleError, match=r"not listed in the manifest: transformer/extra\.safetensors"):
        verify_files(open_bundle(quick_copy))


@pytest.mark.parametrize("name", [".DS_Store", "Thumbs.db", "desktop.ini", ".directory"])
def test_what_file_managers_leave_is_not_a_foreign_file(quick_copy: Path, name: str) -> None:
    (quick_copy / "transformer" / name).write_bytes(b"x")
    bundle = open_bundle(quick_copy)
    verify_files(bundle)
    (quick_copy / "transformer" / name).unlink()
    (quick_copy / "transformer" / name).symlink_to("config.json")
    with pytest.raises(BundleError, match=rf"not listed in the manifest: transformer/{name}"):
        verify_files(bundle)


@pytest.mark.parametrize("name", ["._config.json", ".DS_Store.safetensors", ".fseventsd", "THUMBS"])
def test_every_other_foreign_file_is_found(quick_copy: Path, name: str) -> None:
    """Among them macOS's `._` files: a loader that looks for *.safetensors takes `._model.safetensors` for weights."""
    (quick_copy / "vae" / name).write_bytes(b"x")
    with pytest.raises(BundleError, match=rf"not listed in the manifest: vae/{name}"):
        verify_files(open_bundle(quick_copy))


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "a//b", "./a", "a\\b", ""])
def test_a_path_that_leaves_the_bundle_is_refused(quick_copy: Path, name: str) -> None:
    reseal(quick_copy, lambda m: m["files"].update({name: {"size": 1, "sha256": "0" * 64}}))
    with pytest.raises(BundleError, match="leaves the bundle or is not plain; refused"):
        open_bundle(quick_copy)


def test_a_link_that_leaves_the_bundle_is_refused(quick_copy: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    path = quick_copy / "model_index.json"
    secret.write_bytes(path.read_bytes())
    path.unlink()
    path.symlink_to(secret)
    with pytest.raises(BundleError, match=r"model_index\.json: a link that leaves the bundle"):
        open_bundle(quick_copy)


def test_a_bundle_of_format_7_generates_the_same_image(quick_copy: Path) -> None:
    """There the text encoder left its result in `text`, all rows were called branches, and latents were of one image."""
    import onnx

    request = fluxrt.Request("a large red circle", seed=3)
    with fluxrt.load(quick_copy, target="onnxruntime") as pipeline:
        expected = pipeline.generate(request).images[0]
    manifest = json.loads((quick_copy / "bundle.json").read_text())
    (entry,) = (target for target in manifest["targets"] if target["name"] == "onnxruntime")
    encoder = quick_copy / entry["graphs"]["text_encoder"]["file"]
    model = onnx.load(encoder, load_external_data=False)
    for node in model.graph.node:
        node.output[:] = ["text" if name == "encoded" else name for name in node.output]
    model.graph.output[0].name = "text"
    encoder.write_bytes(model.SerializeToString())
    digest, size = hashlib.sha256(encoder.read_bytes()).hexdigest(), encoder.stat().st_size

    def as_before(manifest: dict[str, Any]) -> None:
        manifest["format_version"] = 7
        manifest["files"][entry["graphs"]["text_encoder"]["file"]].update(sha256=digest, size=size)
        (target,) = (target for target in manifest["targets"] if target["name"] == "onnxruntime")
        target["graphs"]["text_encoder"]["outputs"][0]["name"] = "text"
        for graph in target["graphs"].values():
            for port in (*graph["inputs"], *graph["outputs"]):
                port["shape"] = [{"batch": "branches", "images": 1}.get(size, size) for size in port["shape"]]

    reseal(quick_copy, as_before)
    with fluxrt.load(quick_copy, target="onnxruntime") as pipeline:
        assert pipeline.generate(request).images[0].tobytes() == expected.tobytes()
        with pytest.raises(fluxrt.RequestError, match="this bundle makes one image at once"):
            pipeline(["a", "b"], batch=2)


def test_an_edited_manifest_is_refused(quick_copy: Path) -> None:
    edit_manifest(quick_copy, lambda m: m["sampling"].update(guidance=9.0))
    with pytest.raises(BundleError, match="altered after the build"):
        open_bundle(quick_copy)


@pytest.mark.parametrize(
    ("version", "way_out"),
    [
        (4, "build the bundle again from its recipe, or take the fluxrt that came with"),
        (5, "build the bundle again from its recipe, or take the fluxrt that came with"),
        (99, "bring the checkout .*/runtime up to date"),
    ],
)
def test_another_format_version_names_both(quick_copy: Path, version: int, way_out: str) -> None:
    edit_manifest(quick_copy, lambda m: m.update(format_version=version))
    with pytest.raises(BundleError, match=f"bundle format {version}, this fluxrt reads format 10; {way_out}"):
        open_bundle(quick_copy)


def test_a_target_has_the_fields_of_its_kind(quick_copy: Path) -> None:
    whole = json.loads((quick_copy / "bundle.json").read_text())["targets"][0]
    assert list(whole) == ["kind", "name", "activations", "graphs", "device", "sharding"]
    edit_manifest(quick_copy, lambda m: m["targets"][1].update(engine=None))
    with pytest.raises(BundleError, match=r"targets\[1\]: Object contains unknown field `engine`"):
        open_bundle(quick_copy)
    edit_manifest(quick_copy, lambda m: m["targets"][1].pop("kind"))
    with pytest.raises(BundleError, match=r"targets\[1\]: Object missing required field `kind`"):
        open_bundle(quick_copy)


def test_a_target_of_an_unknown_kind_is_kept_and_never_chosen(quick_copy: Path) -> None:
    """As of a kind that the machine which built the bundle had registered, and this one has not."""
    foreign = {"kind": "abacus", "name": "abacus", "beads per wire": 10, "runs_on": ["wood"], "sharding": {"wires": 7}}
    reseal(quick_copy, lambda m: m["targets"].insert(0, foreign))
    bundle = open_bundle(quick_copy)
    assert json.loads(encode_manifest(bundle.manifest))["targets"][0] == foreign
    assert fluxrt.load(quick_copy).target.name == bundle.manifest.targets[1].name
    reason = "kind 'abacus', which this fluxrt cannot run; choose another target"
    with pytest.raises(fluxrt.BackendError, match=reason):
        fluxrt.load(quick_copy, target="abacus")


def test_an_unknown_manifest_field_is_refused(quick_copy: Path) -> None:
    edit_manifest(quick_copy, lambda m: m.update(surprise=1))
    with pytest.raises(BundleError, match="unknown field `surprise`"):
        open_bundle(quick_copy)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'{"format": "other"}',
        b"\xff\xfe",
        b'{"format": "\xee"}',
        b'{"fo\xee": 1}',
        b'{"format": ' + b"[" * 100_000,
        b'{"format": "fluxc-bundle", "format_version": 6, "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    ],
    ids=range(9),
)
def test_a_manifest_that_is_none_is_refused(quick_copy: Path, content: bytes) -> None:
    (quick_copy / "bundle.json").write_bytes(content)
    with pytest.raises(BundleError, match=r"bundle\.json"):
        open_bundle(quick_copy)


@pytest.mark.parametrize("name", ["bundle.json", "vae/config.json"])
def test_what_cannot_be_read_is_named(quick_copy: Path, name: str) -> None:
    path = quick_copy / name
    for make in (lambda path: path.mkdir(), lambda path: path.symlink_to(path.name)):
        path.rmdir() if path.is_dir() else path.unlink()
        make(path)
        with pytest.raises(BundleError, match=rf"{path.name}: it (cannot be read|is not a file)"):
            open_bundle(quick_copy)


def test_a_bundle_path_that_the_system_does_not_take_is_refused() -> None:
    with pytest.raises(BundleError, match="cannot be read: File name too long"):
        open_bundle("n" * 300)


def test_a_folder_without_a_manifest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not a fluxc bundle"):
        open_bundle(tmp_path)
    with pytest.raises(BundleError, match="no such bundle folder"):
        open_bundle(tmp_path / "none")


def test_the_build_time_is_outside_the_digest_and_everything_else_inside(quick_bundle: Path) -> None:
    import msgspec

    manifest = open_bundle(quick_bundle).manifest
    later = msgspec.structs.replace(manifest.provenance, built_at="later")
    assert manifest_digest(msgspec.structs.replace(manifest, provenance=later)) == manifest.digest
    for field in manifest.__struct_fields__:
        if field in ("digest", "provenance"):
            continue
        value = getattr(manifest, field)
        empty = 0 if isinstance(value, int) else type(value)() if isinstance(value, (str, dict, tuple)) else None
        if empty is not None:
            assert manifest_digest(msgspec.structs.replace(manifest, **{field: empty})) != manifest.digest, field


def test_an_image_that_is_generated_otherwise_fails_verification(quick_copy: Path) -> None:
    """Weights that are wrong but sealed: hashes cannot find them, the evidence does, and where there is none the image."""
    from fluxrt.bundle import sha256_file

    weights = quick_copy / "transformer" / "diffusion_pytorch_model.safetensors"
    data = bytearray(weights.read_bytes())
    tail = len(data) // 2
    swapped = bytes((b >> 4 | b << 4) & 255 for b in data[tail : tail + 400_000])
    data[tail : tail + 400_000] = swapped
    weights.write_bytes(data)
    name = "transformer/diffusion_pytorch_model.safetensors"
    reseal(quick_copy, lambda m: m["files"][name].update(sha256=sha256_file(weights)))
    verify_files(open_bundle(quick_copy))
    with pytest.raises(VerifyError, match=r"the velocity at sigma .* do not serve with it"):
        list(verify_bundle(quick_copy))
    reseal(quick_copy, lambda m: m.pop("evidence"))
    for file in (quick_copy / "evidence").iterdir():
        reseal(quick_copy, lambda m, file=file: m["files"].pop(f"evidence/{file.name}"))
    shutil.rmtree(quick_copy / "evidence")
    with pytest.raises(BuildError, match=r"dB of the image recorded in .* do not serve with it"):
        list(verify_bundle(quick_copy))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"ranks": [[]]}, r"Expected `object`, got `array` - at `\$.fidelity.ranks`"),
        ({"ranks": {"x": {"ranks": 2}}}, r"missing required field `against` - at `\$.fidelity.ranks"),
        ({"targets": {"onnxruntime": 1}}, r"Expected `object`, got `int` - at `\$.fidelity.targets"),
        ({"step_cache": 3}, r"got `int` - at `\$.fidelity.step_cache`"),
    ],
)
def test_fidelity_has_its_fields(quick_copy: Path, change: dict[str, Any], says: str) -> None:
    edit_manifest(quick_copy, lambda m: m["fidelity"].update(change))
    with pytest.raises(BundleError, match=says):
        open_bundle(quick_copy)
