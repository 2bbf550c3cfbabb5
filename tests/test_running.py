"""The checkpoint's own model under every placement is diffusers' pipeline to the bit."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from conftest import NANO
from fluxc.base.cpu import multiplies_bf16
from fluxc.base.errors import BuildError, CheckpointError
from fluxc.checkpoint.dequantized import empty_model
from fluxc.checkpoint.needs import Asked
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import Checkpoint, open_checkpoint
from fluxc.running import weights as weights_module
from fluxc.running.lockstep import CALL, Lockstep, result_of, wait_for_part
from fluxc.running.model import ReferenceModel
from fluxc.running.placement import Placement, find_placement
from fluxc.running.weights import PartWeights, parts_of

LAYERS = (9, 18, 27)
ASKED = Asked(3, 1, 2, (64, 64), 32)
PROMPTS = ["a large red circle", "a small blue ring at the left", "a green cross"]


@pytest.fixture(scope="module")
def nano() -> Checkpoint:
    return open_checkpoint(str(NANO), None, NANO)


def images_of(
    model: ReferenceModel, guidance: float, reads: list[str] | None = None
) -> tuple[list[torch.Tensor], list[np.ndarray]]:
    """Embeddings and images of PROMPTS, two steps each; what `reads` gets are the parts of the transformer that were read."""
    generation = Generation((64, 64), 2, guidance, 5, 32, LAYERS)
    with model.component("text_encoder", LAYERS) as encoder:
        *texts, empty = model.encode(encoder, [*PROMPTS, ""], generation)
    with model.component("transformer") as transformer:
        if reads is not None:
            transformer.on_load = lambda part, _: reads.append(part)
        generations = [generation.of_prompt(number) for number in range(len(texts))]
        finals = model.denoise(transformer, texts, empty if guidance > 1 else None, generations)
    return texts, [model.decode(final) for final in finals]


@pytest.mark.parametrize("guidance", [1.0, 1.5])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_placement_generates_what_diffusers_pipeline_does(
    nano: Checkpoint, dtype: torch.dtype, guidance: float
) -> None:
    generation = Generation((64, 64), 2, guidance, 5, 32, LAYERS)
    pipeline = load_pipeline(nano, dtype)
    expected = [generate(pipeline, nano, prompt, generation.of_prompt(n)) for n, prompt in enumerate(PROMPTS)]
    with torch.no_grad():
        embedded, _ = pipeline.encode_prompt(PROMPTS[1], max_sequence_length=32, text_encoder_out_layers=LAYERS)
    for pieces in ("component", "layer"):
        texts, images = images_of(ReferenceModel(nano, Placement("cpu", dtype, pieces)), guidance)
        assert torch.equal(texts[1], embedded)
        for ours, theirs in zip(images, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_a_step_reads_the_model_once_for_all_prompts_and_guidance_rows(nano: Checkpoint, guidance: float) -> None:
    reads: list[str] = []
    images_of(ReferenceModel(nano, Placement("cpu", torch.bfloat16, "layer")), guidance, reads)
    parts = list(parts_of(empty_model(nano.components["transformer"])))
    assert sorted(reads) == sorted(2 * parts)
    assert len(parts) > 10


def test_all_parameters_belong_to_one_part(nano: Checkpoint) -> None:
    for name in ("transformer", "text_encoder"):
        model = empty_model(nano.components[name])
        listed = [f"{part}.{n}" for part in parts_of(model) for n, _ in model.get_submodule(part).named_parameters()]
        assert sorted(listed) == sorted(dict(model.named_parameters(remove_duplicate=False)))


def test_layer_by_layer_two_parts_are_in_memory_at_most(nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that computes and the one that is read ahead: counted in tensors of parameters that are alive."""
    largest = 0
    read, load = PartWeights._read, PartWeights.load
    sizes: dict[str, int] = {}

    def counted(weights: PartWeights, part: str) -> dict[str, torch.Tensor]:
        found = read(weights, part)
        sizes[part] = sum(tensor.nbytes for tensor in found.values())
        return found

    def loaded(weights: PartWeights, part: str) -> None:
        nonlocal largest
        load(weights, part)
        gc.collect()
        parameters = [p for p in gc.get_objects() if isinstance(p, nn.Parameter) and p.device.type == "cpu"]
        ours = {id(p) for p in weights._model.parameters()}
        largest = max(largest, sum(p.nbytes for p in parameters if id(p) in ours))

    monkeypatch.setattr(PartWeights, "_read", counted)
    monkeypatch.setattr(PartWeights, "load", loaded)
    model = ReferenceModel(nano, Placement("cpu", torch.bfloat16, "layer"))
    with model.component("transformer") as transformer:
        arguments = {
            "hidden_states": torch.zeros(1, 4, transformer.module.config.in_channels, dtype=torch.bfloat16),
            "encoder_hidden_states": torch.zeros(
                1, 3, transformer.module.config.joint_attention_dim, dtype=torch.bfloat16
            ),
            "timestep": torch.ones(1),
            "img_ids": torch.zeros(4, 4),
            "txt_ids": torch.zeros(3, 4),
            "return_dict": False,
        }
        transformer.run([lambda: transformer.module(**arguments)])
    assert largest == max(sizes.values())
    assert largest < sum(sizes.values()) / 4


def test_an_error_in_one_call_ends_the_others_and_is_raised(nano: Checkpoint) -> None:
    ended: list[int] = []

    def call(number: int) -> Callable[[], None]:
        def work() -> None:
            try:
                wait_for_part("a")
                if number == 1:
                    raise BuildError("here")
                wait_for_part("b")
            finally:
                ended.append(number)

        return work

    freed: list[str] = []
    lockstep = Lockstep(lambda part: None, freed.append)
    with pytest.raises(BuildError, match="here"):
        lockstep.run([call(number) for number in range(3)])
    assert (sorted(ended), freed) == ([0, 1, 2], ["a"])
    assert lockstep.run([lambda: 5]) == [5]


def test_calls_go_part_by_part_in_their_order_and_know_their_number() -> None:
    seen: list[tuple[str, int]] = []

    def work() -> int:
        for part in "abab":
            wait_for_part(part)
            seen.append((part, CALL.get()))
        return CALL.get()

    assert Lockstep(lambda part: None, lambda part: None).run([work] * 3) == [0, 1, 2]
    assert seen == [(part, number) for part in "abab" for number in range(3)]


def test_calls_of_different_length_all_end() -> None:
    def work(parts: str) -> str:
        for part in parts:
            wait_for_part(part)
        return parts

    wanted = ["ab", "abab", "", "ba"]
    loaded: list[str] = []
    found = Lockstep(loaded.append, lambda part: None).run([lambda parts=parts: work(parts) for parts in wanted])
    assert found == wanted
    assert len(loaded) <= 5


def test_a_call_that_awaits_one_which_waits_for_a_part_gets_its_result() -> None:
    """As the step trace goes: the second pass of a step runs the last parts once more, when the first one has ended."""
    loaded: list[str] = []
    lockstep = Lockstep(loaded.append, lambda part: None)

    def second() -> int:
        for part in "abbc":
            wait_for_part(part)
        return 7

    def first() -> int:
        row = lockstep.beside(second)
        for part in "ab":
            wait_for_part(part)
        return result_of(row)

    assert lockstep.run([first]) == [7]
    assert loaded == ["a", "b", "b", "c"]


def test_a_tensor_that_the_checkpoint_lacks_is_named(nano: Checkpoint, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    (tmp_path / "transformer").mkdir()
    source = nano.components["transformer"]
    tensors = load_file(source.weight_files[0])
    tensors.pop("transformer_blocks.1.attn.to_k.weight")
    save_file(tensors, tmp_path / "transformer" / source.weight_files[0].name)
    (tmp_path / "transformer" / "config.json").write_text((source.folder / "config.json").read_text())
    from dataclasses import replace

    lacking = replace(source, folder=tmp_path / "transformer")
    weights = PartWeights(empty_model(source), lacking, torch.float32, torch.device("cpu"))
    with pytest.raises(CheckpointError, match=r"has no tensor transformer_blocks\.1\.attn\.to_k\.weight"):
        weights.load("transformer_blocks.1")


def test_embedding_tables_are_not_copied(nano: Checkpoint) -> None:
    component = nano.components["text_encoder"]
    model = empty_model(component)
    weights = PartWeights(model, component, torch.float32, torch.device("cpu"))
    assert weights.tables == ["model.embed_tokens"]
    table = model.get_submodule("model.embed_tokens")
    stored = weights_module.PlainTensors(component, torch.float32)["model.embed_tokens.weight"]
    ids = torch.tensor([[3, 1, 4]])
    rows = table(ids)
    assert table.weight.dtype == torch.bfloat16
    assert rows.dtype == torch.float32
    assert torch.equal(rows, stored[ids])


def test_the_budget_decides_how_much_is_in_memory_and_never_the_type(nano: Checkpoint) -> None:
    found = {memory: find_placement(nano, "cpu", torch.float32, ASKED, memory) for memory in (1 << 30, 1 << 20)}
    assert [placement.pieces for placement in found.values()] == ["component", "layer"]
    assert {str(placement) for placement in found.values()} == {"cpu, float32"}
    assert found[1 << 30].groups(3, 8) == [[0], [1], [2]]
    assert found[1 << 20].groups(3, 2) == [[0, 1], [2]]


@pytest.mark.parametrize(
    ("line", "isa", "expected"),
    [
        ("flags\t\t: fpu avx2 avx512f avx512_bf16 sse", "", True),
        ("flags\t\t: fpu avx2 amx_bf16", "DEFAULT", True),
        ("flags\t\t: fpu avx2 avx512f avx512_vnni", "", False),
        ("Features\t: fp asimd bf16 i8mm", "", True),
        ("flags\t\t: fpu amx_bf16 avx512_bf16", "AVX2", False),
        ("flags\t\t: fpu amx_bf16 avx512_bf16", "AVX512_CORE_BF16", True),
    ],
)
def test_bfloat16_is_multiplied_where_the_cpu_does_and_onednn_may(
    line: str, isa: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"processor\t: 0\n{line}\n")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", isa)
    assert multiplies_bf16(tmp_path) is expected


def test_a_cpu_without_bfloat16_computes_in_float32(nano: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    placement = find_placement(nano, "cpu", torch.bfloat16, ASKED)
    assert str(placement) == "cpu, float32"
