"""The streaming writer: shards in and out, memory, errors of weights and outputs, and being killed while it writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from fluxc.base.errors import BuildError, CheckpointError
from fluxc.base.safetensors import TensorRef, read_header
from fluxc.formats import cpu, fp8, nvfp4
from fluxc.models.base import Linear
from fluxc.quantize import writer
from fluxc.quantize.plan import LayerPlan, precision_plan
from fluxc.quantize.writer import CHUNK_BYTES, LayerReport, write_weights
from fluxc.recipe.structs import ComponentPrecision, Rule

LAYERS = [
    *(Linear(f"block.attn.to_{part}", 64, 128, "block.attn.qkv") for part in "qkv"),
    Linear("block.ff", 48, 64),
    Linear("block.out", 40, 64),
    Linear("last", 32, 64),
]
PLAN = precision_plan(
    "transformer",
    LAYERS,
    ComponentPrecision("nvfp4", ("last",), rules=(Rule(match="block.out", format="fp8"),)),
)
INPUTS = {layer.name: 3.0 for layer in LAYERS}


def weights(dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"{layer.name}.weight": torch.randn(layer.out_features, layer.in_features, generator=generator).to(dtype)
        / (9 + i)
        for i, layer in enumerate(LAYERS)
    }
    return {**tensors, "norm.weight": torch.rand(128, generator=generator).to(dtype), "count": torch.tensor([7])}


def checkpoint(folder: Path, tensors: dict[str, torch.Tensor], shards: int = 1) -> dict[str, TensorRef]:
    folder.mkdir(exist_ok=True)
    names = list(tensors)
    for number in range(shards):
        save_file({name: tensors[name] for name in names[number::shards]}, folder / f"{number}.safetensors")
    found = {n: ref for file in sorted(folder.glob("*.safetensors")) for n, ref in read_header(file).items()}
    return {name: found[name] for name in names}


def write(path: Path, refs: dict[str, TensorRef], **options: Any) -> list[LayerReport]:
    return write_weights(path, refs, PLAN, INPUTS, **options)


def test_any_number_of_source_files_gives_the_same_bytes(tmp_path: Path) -> None:
    for shards in (1, 3, 8):
        write(tmp_path / f"{shards}.safetensors", checkpoint(tmp_path / f"in{shards}", weights(), shards))
    assert len({(tmp_path / f"{shards}.safetensors").read_bytes() for shards in (1, 3, 8)}) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_tensors_are_those_of_the_pure_functions(dtype: torch.dtype, tmp_path: Path) -> None:
    source = weights(dtype)
    reports = write(tmp_path / "out.safetensors", checkpoint(tmp_path / "in", source))
    stored = load_file(tmp_path / "out.safetensors")
    shared = nvfp4.tensor_scale(torch.cat([source[f"block.attn.to_{p}.weight"].flatten() for p in "qkv"]).abs().amax())
    for name, scale in (*((f"block.attn.to_{p}", shared) for p in "qkv"), ("block.ff", None)):
        expected = nvfp4.quantize(source[f"{name}.weight"], scale)
        assert torch.equal(stored[f"{name}.weight"], expected.codes)
        assert torch.equal(stored[f"{name}.weight_scale"].view(torch.uint8), expected.block_scales.view(torch.uint8))
        assert torch.equal(stored[f"{name}.weight_scale_2"], expected.tensor_scale)
        assert stored[f"{name}.input_scale"].item() == np.float32(3.0) / np.float32(2688)
    scale = fp8.tensor_scale(source["block.out.weight"].abs().amax())
    expected8 = fp8.quantize(source["block.out.weight"], scale)
    assert torch.equal(stored["block.out.weight"].view(torch.uint8), expected8.view(torch.uint8))
    assert torch.equal(stored["block.out.weight_scale"], scale)
    for name in ("last.weight", "norm.weight", "count"):
        assert torch.equal(stored[name], source[name])
    by_name = {report.name: report for report in reports}
    exact = source["block.ff.weight"].double()
    restored = nvfp4.dequantize(*nvfp4.quantize(source["block.ff.weight"])).double()
    snr = 10 * torch.log10(exact.square().sum() / (exact - restored).square().sum()).item()
    assert by_name["block.ff"].snr_db == pytest.approx(snr, abs=1e-3)
    assert by_name["block.ff"].output_snr_db is None


def test_output_error_is_that_of_the_layer_on_the_sampled_inputs(tmp_path: Path) -> None:
    source = weights()
    inputs = {
        layer.name: np.random.default_rng(1).standard_normal((16, layer.in_features)).astype("f") for layer in LAYERS
    }
    reports = write(tmp_path / "out.safetensors", checkpoint(tmp_path / "in", source), input_rows=inputs.get)
    for report in reports:
        stored = load_file(tmp_path / "out.safetensors")
        weight, x = source[f"{report.name}.weight"].float(), torch.from_numpy(inputs[report.name])
        parts = {k.removeprefix(f"{report.name}."): v for k, v in stored.items() if k.startswith(f"{report.name}.")}
        if report.format == "nvfp4":
            restored = nvfp4.dequantize(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        else:
            restored = fp8.dequantize(parts["weight"], parts["weight_scale"])
        output, error = x @ weight.T, x @ (weight - restored).T
        expected = 10 * torch.log10(output.double().square().sum() / error.double().square().sum()).item()
        assert report.output_snr_db == pytest.approx(expected, abs=1e-3)


def test_output_error_of_many_outputs_is_that_of_evenly_spaced_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a chunk does not start at one of them."""
    monkeypatch.setattr(writer, "OUTPUTS", 10)
    monkeypatch.setattr(writer, "CHUNK_BYTES", 5 * 2 * 64)
    weight = torch.randn(37, 64, generator=torch.Generator().manual_seed(2)).bfloat16()
    refs = checkpoint(tmp_path / "in", {"layer.weight": weight})
    x = np.random.default_rng(3).standard_normal((16, 64)).astype("f")
    for format, restored in (
        ("nvfp4", nvfp4.dequantize(*nvfp4.quantize(weight))),
        ("fp8", fp8.dequantize(fp8.quantize(weight, scale := fp8.tensor_scale(weight.abs().amax())), scale)),
    ):
        plan = [LayerPlan("transformer", Linear("layer", 37, 64), format, "default", 0)]
        (report,) = write_weights(tmp_path / "out", refs, plan, {"layer": 1.0}, input_rows=lambda _: x)
        exact, error = weight.float()[::3], (weight.float() - restored)[::3]
        sums = [(torch.from_numpy(x) @ w.T).double().square().sum() for w in (exact, error)]
        assert report.output_snr_db == pytest.approx(10 * torch.log10(sums[0] / sums[1]).item(), abs=1e-3)


def test_better_scales_lose_less_and_read_the_same_way(tmp_path: Path) -> None:
    refs = checkpoint(tmp_path / "in", weights())
    snr = {}
    for scales in ("max", "four-over-six", "mse"):
        reports = write(tmp_path / f"{scales}.safetensors", refs, scales=scales)
        snr[scales] = [report.snr_db for report in reports if report.format == "nvfp4"]
        stored = load_file(tmp_path / f"{scales}.safetensors")
        assert len({stored[f"block.attn.to_{part}.weight_scale_2"].item() for part in "qkv"}) == 1
    assert all(a < b < c for a, b, c in zip(snr["max"], snr["four-over-six"], snr["mse"], strict=True))


def test_a_large_component_is_split_with_an_index_and_groups_stay_together(tmp_path: Path) -> None:
    refs = checkpoint(tmp_path / "in", weights())
    write(tmp_path / "whole.safetensors", refs)
    write(tmp_path / "model.safetensors", refs, shard_bytes=9_000)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [f"model-{i + 1:05}-of-{len(files):05}.safetensors" for i in range(len(files))]
    assert len(files) > 1
    whole = load_file(tmp_path / "whole.safetensors")
    stored = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert set(stored) == set(whole) == set(index["weight_map"])
    assert all(torch.equal(stored[n].view(torch.uint8), whole[n].view(torch.uint8)) for n in whole if whole[n].ndim)
    assert index["metadata"]["total_size"] == sum(
        ref.nbytes for ref in read_header(tmp_path / "whole.safetensors").values()
    )
    assert all(index["weight_map"][name] == file for file in files for name in read_header(tmp_path / file))
    places = {index["weight_map"][name] for name in whole if name.startswith("block.attn.to_")}
    assert len(places) == 1
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.parametrize("tensor", ["block.ff.weight", "block.out.weight", "norm.weight"])
def test_a_value_that_is_not_finite_is_named_and_nothing_is_written(tensor: str, tmp_path: Path) -> None:
    source = weights()
    source[tensor][..., 5] = torch.nan
    at = r"\[0, 5\]" if source[tensor].ndim == 2 else r"\[5\]"
    refs = checkpoint(tmp_path / "in", source, shards=2)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(CheckpointError, match=rf"tensor '{tensor}' is not finite \(NaN or infinity\) at {at}"):
        write(out / "weights.safetensors", refs, shard_bytes=9_000)
    assert list(out.iterdir()) == []


def test_a_position_beyond_the_first_chunk_is_counted_from_the_start(tmp_path: Path) -> None:
    rows = 3 * CHUNK_BYTES // (2 * 64)
    source = {"big.weight": torch.zeros(rows, 64, dtype=torch.bfloat16)}
    source["big.weight"][rows - 2, 63] = torch.inf
    refs = checkpoint(tmp_path / "in", source)
    for format in ("nvfp4", "fp8", "bf16"):
        plan = [LayerPlan("transformer", Linear("big", rows, 64), format, "default", 0)]
        with pytest.raises(CheckpointError, match=rf"at \[{rows - 2}, 63\]"):
            write_weights(tmp_path / "out.safetensors", refs, plan, {"big": 1.0})


def test_a_layer_without_calibration_is_named(tmp_path: Path) -> None:
    refs = checkpoint(tmp_path / "in", weights())
    with pytest.raises(BuildError, match=r"calibration measured no input of 'block\.ff'"):
        write_weights(tmp_path / "out", refs, PLAN, {k: v for k, v in INPUTS.items() if k != "block.ff"})


def test_integers_cannot_be_quantized(tmp_path: Path) -> None:
    source = {**weights(), "block.ff.weight": torch.ones(48, 64, dtype=torch.int32)}
    with pytest.raises(CheckpointError, match=r"tensor 'block\.ff\.weight' is I32; only bf16, fp16 and fp32"):
        write(tmp_path / "out", checkpoint(tmp_path / "in", source))


def test_weights_at_odd_byte_offsets_are_read(tmp_path: Path) -> None:
    refs = checkpoint(tmp_path / "in", weights())
    moved = {}
    for name, ref in refs.items():
        file = tmp_path / f"{name}.odd"
        file.write_bytes(b"\1" + bytes(ref.bytes_view()))
        moved[name] = TensorRef(name, ref.dtype, ref.shape, file, 1, ref.nbytes)
    write(tmp_path / "even.safetensors", refs)
    write(tmp_path / "odd.safetensors", moved)
    assert (tmp_path / "even.safetensors").read_bytes() == (tmp_path / "odd.safetensors").read_bytes()


def test_progress_counts_bytes_and_tensors_and_says_how_fast(tmp_path: Path) -> None:
    refs = checkpoint(tmp_path / "in", weights())
    seen: list[tuple[int, int, str]] = []
    write(
        tmp_path / "out.safetensors",
        refs,
        on_progress=lambda done, total, detail="": seen.append((done, total, detail)),
    )
    total = sum(ref.nbytes for ref in refs.values())
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][:2] == (total, total)
    assert seen[-1][2].startswith(f"{len(refs)}/{len(refs)} tensors, ")
    assert seen[-1][2].endswith(" GB/s")


# Run in a process of its own: a checkpoint of 24 files and 700 MB, quantized; prints its own peak memory in KiB.
CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from fluxc.models.base import Linear
from fluxc.base.safetensors import read_header
from fluxc.quantize.plan import LayerPlan
from fluxc.quantize.writer import write_weights
source, out = map(Path, sys.argv[1:])
refs = {{n: r for file in sorted(source.glob("*.safetensors")) for n, r in read_header(file).items()}}
plan = [LayerPlan("transformer", Linear(n[:-7], *r.shape), "nvfp4", "default", 0) for n, r in refs.items()]
def rss():
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
write_weights(out, refs, plan, {{entry.layer.name: 1.0 for entry in plan}})
print(rss())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large")
    weight = torch.randn(2048, 7168, generator=torch.Generator().manual_seed(0)).bfloat16()
    for number in range(24):
        save_file({f"layer.{number}.weight": weight}, folder / f"{number:02}.safetensors")
    return folder


def start(large: Path, out: Path) -> subprocess.Popen:
    code = CHILD.format(tests=str(Path(__file__).parent))
    return subprocess.Popen([sys.executable, "-c", code, large, out], stdout=subprocess.PIPE, text=True)


def test_memory_follows_the_chunk_not_the_checkpoint(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "out.safetensors")
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 0
    assert int(output) < 400 * 1024, f"peak of {int(output) // 1024} MiB for a checkpoint of 700 MB"


def test_killed_while_writing_leaves_nothing_and_writes_the_same_bytes_again(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    killed = 0
    for wait in (0.0, 0.05, 0.15):
        process = start(large, out)
        partial = out.with_name(f".{out.name}.partial")
        while process.poll() is None and not partial.exists():
            time.sleep(0.001)
        time.sleep(wait)
        if process.poll() is None:
            os.kill(process.pid, signal.SIGKILL)
            killed += 1
        process.wait()
        if process.returncode:
            assert not out.exists()
    assert killed
    assert start(large, out).wait(timeout=300) == 0
    assert [p.name for p in tmp_path.iterdir()] == [out.name]
    stored = load_file(out)
    expected = nvfp4.quantize(load_file(large / "00.safetensors")["layer.0.weight"])
    for number in range(24):
        assert torch.equal(stored[f"layer.{number}.weight"], expected.codes)
    again = tmp_path / "again.safetensors"
    assert start(large, again).wait(timeout=300) == 0
    assert again.read_bytes() == out.read_bytes()


def test_first_non_finite_looks_at_every_element() -> None:
    for size in (1, 5, 4096, 4097, 9000):
        values = np.ones(size, np.float32)
        assert cpu.first_non_finite(values.view(np.uint32), "F32") is None
        for at in {0, size // 2, size - 1}:
            spoilt = values.copy()
            spoilt[at] = -np.inf
            assert cpu.first_non_finite(spoilt.view(np.uint32), "F32") == (at,)
