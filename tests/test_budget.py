"""The budget: counts against torch, predictions against what processes took, and what does not fit refused with figures."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from torch.utils.flop_counter import FlopCounterMode

from conftest import NANO, RECIPE, hollow_checkpoint
from fluxc.base.estimate import WholeEstimate
from fluxc.base.memory import chosen_memory, limited_to, memory_limit, read_bytes
from fluxc.build.budget import budget_of, measuring_budget, predicted_seconds, predicted_time, rates_for
from fluxc.build.budget_rates import Rates
from fluxc.build.budget_stages import Work
from fluxc.build.job import Job, open_job
from fluxc.checkpoint.needs import (
    PROCESS,
    Asked,
    Models,
    decoding_flop,
    memory_by_component,
    memory_by_layer,
    models_of,
    parts_of,
    text_flop,
    weights_read,
)
from fluxc.checkpoint.source import open_checkpoint
from fluxc.cli.main import main
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.published import KLEIN_4B, QWEN3_4B
from fluxc.models.qwen3 import Qwen3
from fluxc.recipe.load import load_recipe
from fluxrt.errors import RequestError
from quick import QUICK

GIB = 1 << 30
AT_MOST = 2.0
"""A prediction is at least what was measured, and at most so many times as much."""
KLEIN = Models(Flux2Transformer.read(KLEIN_4B), Qwen3.read(QWEN3_4B), Flux2VAE(), 28, 3)
WIDE = {**KLEIN_4B, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 96, "in_channels": 32}
"""klein 4B's width, a block of each kind, for flux2-nano's text encoder and VAE."""


def sets(*changes: str) -> list[str]:
    return [option for change in changes for option in ("--set", change)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("12GiB", 12 * GIB),
        ("12 gib", 12 * GIB),
        ("12GB", 12 * 10**9),
        ("12288MiB", 12 * GIB),
        ("1.5GiB", 3 * GIB // 2),
        ("1TiB", 1 << 40),
        ("2000000KB", 2 * 10**9),
    ],
)
def test_an_amount_of_memory_is_a_number_and_a_unit(text: str, expected: int) -> None:
    assert read_bytes(text) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("12884901888", "has no unit; write a number and a unit: 12GiB, 12GB or 12288MiB"),
        ("12G", "the units are KB, MB, GB, TB"),
        ("12GiBs", "is no amount of memory"),
        ("much", "is no amount of memory"),
        ("-1GiB", "is no amount of memory"),
        ("1KiB", "is not between 1MiB and 1024TiB"),
        ("9999999TiB", "is not between"),
    ],
)
def test_other_amounts_are_refused_with_a_hint(text: str, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        read_bytes(text)


def test_what_the_user_chose_limits_what_is_free_and_never_adds_to_it() -> None:
    free = memory_limit()
    with limited_to(1 << 25):
        assert chosen_memory() == memory_limit() == 1 << 25
        with limited_to(1 << 24):
            assert memory_limit() == 1 << 24
        assert memory_limit() == 1 << 25
    with limited_to(1 << 50):
        assert memory_limit() < 2 * free
    assert chosen_memory() is None


def test_parts_hold_every_value_of_a_model_but_its_table_of_embeddings() -> None:
    encoder = KLEIN.text_encoder
    text = parts_of(encoder.tensors(28))
    # 36 layers, 4.02 billion parameters with the table (Qwen3-4B's model card).
    assert len(text) == 28 + 1
    assert sum(text.values()) / 28 * 36 + 151936 * 2560 == pytest.approx(4.02e9, rel=0.01)
    transformer = parts_of(KLEIN.transformer.tensors)
    assert sum(name.startswith("single_transformer_blocks.") for name in transformer) == 20
    assert sum(transformer.values()) == pytest.approx(3.9e9, rel=0.01)
    assert {"x_embedder", "time_guidance_embed", "double_stream_modulation_img", "norm_out"} <= set(transformer)


def test_memory_layer_by_layer_does_not_grow_with_depth_and_by_component_does() -> None:
    asked = Asked(4, 1, 4, (256, 256), 512)
    deep = replace(KLEIN, transformer=Flux2Transformer.read({**KLEIN_4B, "num_single_layers": 80}))
    assert memory_by_layer(deep, asked) == memory_by_layer(KLEIN, asked)
    # 60 blocks of 3072 x (27648 + 12288) values and two norms in 16 bits.
    assert memory_by_component(deep, asked) - memory_by_component(KLEIN, asked) == 60 * 2 * (3072 * 39936 + 2 * 128)
    assert memory_by_layer(KLEIN, asked) < memory_by_component(KLEIN, asked) / 3


def test_layer_by_layer_the_transformer_is_read_once_a_step_for_eight_prompts() -> None:
    once = weights_read(KLEIN, Asked(8, 1, 4, (256, 256), 512), by_layer=False)
    transformer = 2 * sum(parts_of(KLEIN.transformer.tensors).values())
    assert weights_read(KLEIN, Asked(8, 1, 4, (256, 256), 512), by_layer=True) == once + 3 * transformer
    assert weights_read(KLEIN, Asked(9, 1, 4, (256, 256), 512), by_layer=True) == once + 7 * transformer


def counted(work: Callable[[], Any]) -> int:
    """FLOP by torch's own counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        work()
    return counter.get_total_flops()


def test_flop_of_the_decoder_are_those_that_torch_counts() -> None:
    from diffusers import AutoencoderKLFlux2

    config = json.loads((NANO / "vae/config.json").read_text())
    with torch.device("meta"):
        vae = AutoencoderKLFlux2.from_config(config)
        latents = torch.empty(1, config["latent_channels"], 32, 16)
    read = Flux2VAE.read(config)
    pixels = 2 ** (len(read.block_out_channels) - 1)
    found = decoding_flop(read, (32 * pixels, 16 * pixels))
    assert found == pytest.approx(counted(lambda: vae.decode(latents)), rel=0.01)


def test_flop_of_the_text_encoder_are_those_that_torch_counts() -> None:
    from transformers import Qwen3Config, Qwen3Model

    config = json.loads((NANO / "text_encoder/config.json").read_text())
    encoder = Qwen3.read(config)
    with torch.device("meta"):
        model = Qwen3Model(Qwen3Config.from_dict(config | {"attn_implementation": "eager"}))
        ids = torch.zeros(1, 48, dtype=torch.long)
    models = replace(KLEIN, text_encoder=encoder, text_layers=encoder.num_hidden_layers)
    assert text_flop(models, 48) == pytest.approx(counted(lambda: model(input_ids=ids)), rel=0.02)


RUN = """\
import sys
from pathlib import Path
import torch
from fluxc.base.memory import memory_peak
from fluxc.base.progress import OfSteps
from fluxc.checkpoint.reference import Generation
from fluxc.checkpoint.source import open_checkpoint
from fluxc.fidelity.trace import record
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement
checkpoint = open_checkpoint(sys.argv[1], None, Path())
model = ReferenceModel(checkpoint, Placement("cpu", torch.bfloat16, sys.argv[2]))
for _ in record(model, ["one", "two"], 1, Generation((64, 64), 1, 1.0, 0, 32, (9, 18, 27)), OfSteps(None, 2, 2, 1)):
    pass
print(memory_peak())
"""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A transformer of klein 4B's width with two blocks, of zeros that take no disk, with flux2-nano's other components."""
    encoder = json.loads((NANO / "text_encoder/config.json").read_text())
    root = hollow_checkpoint(tmp_path_factory.mktemp("wide") / "checkpoint", WIDE, encoder)
    shutil.copyfile(NANO / "text_encoder/model.safetensors", root / "text_encoder/model.safetensors")
    return root


@pytest.mark.parametrize(("pieces", "count"), [("component", memory_by_component), ("layer", memory_by_layer)])
def test_running_a_model_of_real_width_takes_what_is_predicted(
    pieces: str, count: Callable[[Models, Asked], int], wide: Path
) -> None:
    """Peak by the kernel's count, of a process that does nothing else."""
    done = subprocess.run([sys.executable, "-c", RUN, str(wide), pieces], capture_output=True, text=True, check=True)
    measured = int(done.stdout.split()[-1])
    predicted = count(models_of(open_checkpoint(str(wide), None, NANO)), Asked(2, 1, 1, (64, 64), 32))
    assert measured <= predicted <= AT_MOST * measured, (measured, predicted)


def nano_job(tmp_path: Path, *changes: str) -> Job:
    return open_job(load_recipe(RECIPE, changes), tmp_path / "cache")


def test_every_stage_of_a_build_stays_below_its_prediction(tmp_path: Path, own_cache: None, shared_cache: Path) -> None:
    """A whole build of flux2-nano in a process of its own, its graphs from the cache: the peak after each stage."""
    changes = (*QUICK, "sampling.steps=2", "calibration.seed=7", "fidelity.seed=77")
    for exported in shared_cache.glob("export-*"):
        shutil.copytree(exported, tmp_path / ".fluxc" / exported.name)
    loaded = load_recipe(RECIPE, changes)
    budget = budget_of(open_job(loaded, tmp_path / ".fluxc"), tmp_path / "bundle")
    arguments = ["build", str(RECIPE), *sets(*changes), "--out", str(tmp_path / "bundle"), "--log-format", "json"]
    done = subprocess.run([sys.executable, "-m", "fluxc", *arguments], capture_output=True, text=True, check=True)
    events = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    peaks = [event["peak_memory_bytes"] for event in events if event.get("event") == "finished"]
    assert peaks[-1] <= budget.peak[1] <= AT_MOST * peaks[-1], (peaks, budget.peak)
    files = [file for file in tmp_path.rglob("*") if file.is_file() and not file.is_symlink()]
    written = {file.stat().st_ino: file.stat().st_blocks * 512 for file in files}
    seeded = sum(file.stat().st_size for file in (tmp_path / ".fluxc").glob("export-*/*"))
    assert sum(written.values()) - seeded <= 1.25 * budget.disk
    # The weights lie on the disk once.
    weights = [file for file in files if file.name == "diffusion_pytorch_model.safetensors"]
    assert len({file.stat().st_ino for file in weights}) == 2
    assert predicted_seconds(budget, Rates())[0] == 0.0
    shown = {event["stage"]: event["stages"] for event in events if event.get("event") in ("done", "cached")}
    assert set(shown.values()) == {len(predicted_seconds(budget, Rates()))} == {len(shown)}


def test_what_is_in_the_cache_needs_nothing(quick_bundle: Path) -> None:
    with limited_to(1 << 20):
        ready = json.loads(plan(*sets(*QUICK), "--out", quick_bundle, "--json").stdout)
    assert ready["budget"]["memory_bytes"] == ready["budget"]["disk_bytes"] == ready["budget"]["seconds"] == 0
    assert ready["lacking_here"] == []


def plan(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["plan", str(RECIPE), *map(str, arguments)])


def test_plan_as_json_has_the_budget(tmp_path: Path, own_cache: None) -> None:
    result = plan("--json", "--memory", "4GiB", "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    budget = json.loads(result.stdout)["budget"]
    assert budget["memory_chosen_bytes"] == 4 * GIB >= budget["memory_limit_bytes"]
    stages = {stage["name"]: stage for stage in budget["stages"]}
    assert next(iter(stages)) == "hash"
    assert list(stages)[-1] == "bundle"
    assert stages["calibrate"]["runs"] == "a component at a time"
    assert budget["memory_bytes"] == max(stage["memory_bytes"] for stage in stages.values())
    assert budget["memory_stage"] == max(stages.values(), key=lambda stage: stage["memory_bytes"])["name"]
    scratch = max(stage["scratch_bytes"] for stage in stages.values())
    assert budget["disk_bytes"] == sum(stage["disk_bytes"] for stage in stages.values()) + scratch
    assert budget["seconds"] == pytest.approx(sum(stage["seconds"] for stage in stages.values()), abs=1)
    assert budget["disks"][0]["folder"] == str(tmp_path)
    # The weights as the recipe plans them, to the byte, and a MiB for small files.
    planned = json.loads(result.stdout)["weights_bytes"]
    for name in ("transformer", "text_encoder", "vae"):
        assert stages[f"weights-{name}"]["disk_bytes"] == planned[name]["planned"] + (1 << 20)


@pytest.fixture(scope="module")
def klein(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of klein 4B's shapes, its large weights holes."""
    encoder = json.loads((NANO / "text_encoder/config.json").read_text()) | QWEN3_4B
    encoder["layer_types"] = ["full_attention"] * 36
    transformer = {**KLEIN_4B, "in_channels": 32}
    return hollow_checkpoint(tmp_path_factory.mktemp("klein") / "checkpoint", transformer, encoder)


def klein_sets(klein: Path) -> list[str]:
    return sets(f"model.source={klein}", "sampling={steps: 4, guidance: 1.0}", "text.length=512", "gates={}")


def test_a_limit_decides_between_components_and_layers(klein: Path, tmp_path: Path, own_cache: None) -> None:
    def stages(memory: str) -> dict[str, Any]:
        result = plan("--json", "--memory", memory, "--out", tmp_path / "bundle", *klein_sets(klein))
        return {stage["name"]: stage for stage in json.loads(result.stdout)["budget"]["stages"]}

    loaded = load_recipe(RECIPE, tuple(klein_sets(klein)[1::2]))
    with limited_to(4 * GIB):
        job = open_job(loaded, tmp_path / "cache")
        need = measuring_budget(job, "calibrate").to_run[1][1]
    assert need.how == "layer by layer"
    assert need.memory < 4 * GIB
    assert stages("4GiB")["calibrate"]["runs"] == "layer by layer"
    assert stages("4GiB")["calibrate"]["memory_bytes"] == need.memory
    assert stages("4GiB")["reference"]["memory_bytes"] < 6 * GIB


def test_solving_klein_with_factors_of_low_rank_stays_within_8_gib(
    klein: Path, tmp_path: Path, own_cache: None
) -> None:
    """Rank 128 beside every layer takes more memory and time than rounding alone, and says so before it begins."""
    stages = {}
    for rank, rounding in ((0, "gptq"), (32, "gptq"), (128, "gptq"), (128, "nearest")):
        low_rank = f'[{{match: "*", rank: {rank}}}]' if rank else "[]"
        precision = (f"precision.transformer.rounding={rounding}", f"precision.transformer.low_rank={low_rank}")
        changes = [*klein_sets(klein), *sets(*precision)]
        found = plan("--json", "--memory", "8GiB", "--out", tmp_path / "bundle", *changes)
        every = {stage["name"]: stage for stage in json.loads(found.stdout)["budget"]["stages"]}
        stages[rank, rounding] = every["rounding-transformer"]
    memory = {of: stage["memory_bytes"] for of, stage in stages.items()}
    seconds = {of: stage["seconds"] for of, stage in stages.items()}
    assert memory[0, "gptq"] < memory[32, "gptq"] == memory[128, "gptq"] < 8 * GIB
    assert memory[128, "nearest"] < memory[128, "gptq"]
    assert seconds[0, "gptq"] < seconds[32, "gptq"] < seconds[128, "gptq"]
    assert seconds[128, "nearest"] < seconds[128, "gptq"]


def test_what_is_rounded_in_memory_is_counted(klein: Path, tmp_path: Path, own_cache: None) -> None:
    """The largest weight twice in fp32, and the time of rounding it whenever it is read."""
    steps = ("sampling={steps: 10, guidance: 1.0}", "fidelity.attribution=true")

    def stages(traced: str, *more: str) -> dict[str, Any]:
        cache = f"step_cache={{traced: {traced}}}"
        asked = [*klein_sets(klein), *sets(*steps, cache, *more)]
        result = plan("--json", "--memory", "8GiB", "--out", tmp_path / "bundle", *asked)
        assert result.exit_code == 0, result.stderr
        return {stage["name"]: stage for stage in json.loads(result.stdout)["budget"]["stages"]}

    own, rounded = (stages(traced)["step-trace"] for traced in ("reference", "quantized"))
    assert own["runs"] == rounded["runs"] == "layer by layer"
    assert rounded["memory_bytes"] - own["memory_bytes"] == 8 * 3072 * (3 * 3072 + 2 * 9216)
    assert rounded["seconds"] > own["seconds"]
    # A large model is compared in stages, and images go with level images.
    assert stages("quantized")["attribution-images"]["result"] == "nothing to do"
    found = stages("quantized", "fidelity.size=[64, 64]", "fidelity.level=images", "fidelity.max_prompts=2")
    assert found["attribution-images"]["memory_bytes"] > found["reference"]["memory_bytes"]
    assert 5 < found["attribution-images"]["seconds"] / found["reference"]["seconds"] < 8


@pytest.mark.parametrize("verb", ["plan", "build"])
def test_what_does_not_fit_is_refused_with_figures_and_what_would_do(
    verb: str, klein: Path, tmp_path: Path, own_cache: None
) -> None:
    arguments = [verb, str(RECIPE), *klein_sets(klein), "--memory", "1600MiB", "--out", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    told = result.stderr
    assert "stage calibrate needs" in told
    assert "of memory, even layer by layer, and --memory gives 1.6 GiB; use calibration.engine: none, " in told
    assert "stage reference needs" in told
    assert "stage compare needs" in told
    assert "fidelity.level: none" in told
    assert "or a larger --memory, or a machine with " in told
    assert "stages weights-" not in told
    assert list(tmp_path.iterdir()) == []


def test_measuring_is_refused_too(klein: Path, tmp_path: Path, own_cache: None) -> None:
    arguments = ["calibrate", str(RECIPE), *klein_sets(klein), "--memory", "1GiB", "--out", str(tmp_path / "file")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert "stage calibrate needs" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_more_than_is_free_is_no_limit(tmp_path: Path, own_cache: None) -> None:
    result = plan("--no-layers", "--memory", "900TiB", "--out", tmp_path / "bundle")
    assert result.exit_code == 0, result.stderr
    assert " is free. Disk: " in result.stdout.replace("\n", " ")


@pytest.mark.parametrize("verb", ["plan", "build"])
def test_a_disk_that_is_too_small_is_refused_with_figures(
    verb: str, klein: Path, tmp_path: Path, own_cache: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """klein 4B's bundle in bf16 text encoder takes more than 8 GiB; 3 are free."""
    monkeypatch.setattr("fluxc.build.budget.shutil.disk_usage", lambda _: SimpleNamespace(free=3 * GIB))
    arguments = [verb, str(RECIPE), *klein_sets(klein), "--out", str(tmp_path / "bundle")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 1
    assert f"{tmp_path}: 3.0 GiB of disk is free there, and the cache with the bundle" in result.stderr
    assert "write elsewhere with --out, FLUXC_CACHE and TMPDIR" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_shared_cache_costs_a_copy_of_the_weights(
    klein: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bundle(cache: Path) -> int:
        monkeypatch.setenv("FLUXC_CACHE", str(cache))
        loaded = load_recipe(RECIPE, tuple(klein_sets(klein)[1::2]))
        stages = budget_of(open_job(loaded, cache), tmp_path / "bundle").stages
        need = stages[-1].need
        assert need is not None
        return need.disk

    copied = bundle(tmp_path / "elsewhere")
    monkeypatch.delenv("FLUXC_CACHE")
    assert bundle(tmp_path / ".fluxc") < 1 << 21
    assert copied > 8 * GIB


def test_only_the_stages_up_to_a_part_count(tmp_path: Path, own_cache: None) -> None:
    job = nano_job(tmp_path)
    names = [stage.name for stage, _ in budget_of(job, tmp_path / "bundle", "calibrate").to_run]
    assert names[-1] == "calibrate"
    assert "compare" not in names


def test_times_follow_work_and_rates() -> None:
    rates = SimpleNamespace(float32=1e9, bfloat16=4e9, hashing=1e8, copying=1e9, reading=1e7)
    work = Work(1.0, float32=2e9, bfloat16=4e9, read=5e7, hashed=1e8, copied=1e9)
    # Reading takes 5 s beside computing (1 + 2 + 1 s); hashing and copying come on top.
    assert work.seconds(rates) == pytest.approx(5 + 1 + 1)
    assert (work * 2 + work).seconds(rates) == pytest.approx(21)


def test_rates_are_measured_once_and_only_where_they_are_needed(tmp_path: Path) -> None:
    job = nano_job(tmp_path)
    rates = rates_for(job)
    assert rates is rates_for(job)
    assert Work(3.0).seconds(Rates()) == 3.0
    assert 1e7 < rates.float32 < 1e15
    assert 1e6 < rates.reading <= rates.copying < 1e12


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        (0.4, "under 1 s"),
        (7.4, "about 7 s"),
        (47, "about 50 s"),
        (130, "about 2 min"),
        (2650, "about 44 min"),
        (9000, "about 2 h 30 min"),
        (7100, "about 2 h"),
    ],
)
def test_a_predicted_time_has_no_digit_that_means_nothing(seconds: float, expected: str) -> None:
    assert predicted_time(seconds) == expected


def test_time_left_of_all_stages_is_corrected_by_what_stages_took() -> None:
    whole = WholeEstimate([100.0, 100.0, 200.0])
    assert whole.left(1, 0.0, None) == 400.0
    # What the stage itself says counts more than its prediction.
    assert whole.left(1, 10.0, 30.0) == 330.0
    whole.finished(1, 230.0)
    factor = (30 + 230) / (30 + 100)
    assert whole.left(2, 50.0, None) == pytest.approx(factor * 100 - 50 + factor * 200)
    assert whole.left(2, 500.0, None) == pytest.approx(factor * 200)
    assert whole.left(3, 0.0, 5.0) is None
    assert WholeEstimate().left(1, 0.0, 5.0) is None
    for _ in range(9):
        whole.finished(1, 1e6)
    assert whole.left(2, 0.0, 0.0) == 4 * 200.0


def test_nothing_is_counted_for_a_process_that_is_not_there() -> None:
    nothing = Asked(1, 1, 1, (64, 64), 32)
    nano = models_of(open_checkpoint(str(NANO), None, NANO))
    assert PROCESS < memory_by_layer(nano, nothing) < memory_by_component(nano, nothing) < PROCESS + (64 << 20)
