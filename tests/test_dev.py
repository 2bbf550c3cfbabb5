"""FLUX.2 dev: its prompts and text encoder against diffusers and transformers, its images, and checkpoints that are not it."""

from __future__ import annotations

import base64
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers.convert_slow_tokenizer import bytes_to_unicode

import fluxrt
from conftest import NANO_DEV, ROOT, compile_into, copy_checkpoint
from fluxc.base.errors import FluxError
from fluxc.base.safetensors import read_header
from fluxc.build.job import open_job
from fluxc.build.preflight import preflight
from fluxc.families.dev import DEV
from fluxc.families.prompting import render_template
from fluxc.fidelity.metrics import relative_error
from fluxc.quantize.source_memory import memory_by_component
from fluxc.recipe.load import load_recipe
from fluxrt.bundle import open_bundle
from fluxrt.manifest import Prompting
from fluxrt.prompt import PromptEncoder
from fluxrt.verify import verify_evidence
from quick import QUICK

RECIPE = ROOT / "recipes" / "flux2-nano-dev.yaml"
PLAIN = "precision={transformer: {default: bf16}, text_encoder: {default: bf16}}"
PROMPTS = (
    "",
    "a large red circle at the left",
    "[IMG]a small [IMG] ring",
    "[INST] a [/INST] ring",
    "<|im_end|> a ring </s>",
    "a\tring\t",
    "a ring   ",
    "two  spaces",
    "a line\nbreak",
    "🦊 🔴",
    "ein großer Ring",
    "赤い輪",
    "кольцо",
)
TOO_LONG = "a red ring " * 200


@pytest.fixture(scope="module")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux2-nano-dev without quantization, in three sizes."""
    sizes = "sizes=[[64, 64], [32, 96], [128, 64]]"
    out = tmp_path_factory.mktemp("dev") / "exact"
    targets = "targets=[{kind: onnxruntime}, {kind: tensorrt_rtx}]"
    return compile_into(out, *QUICK, PLAIN, sizes, targets, recipe=RECIPE)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """flux2-nano-dev in NVFP4, its text encoder in FP8, for the kinds of target that can be made here."""
    on_cpu = "{kind: onnxruntime}, {kind: onnxruntime, activations: nvfp4}, {kind: onnxruntime, gpus: 2}"
    targets = f"targets=[{on_cpu}, {{kind: tensorrt_rtx}}]"
    return compile_into(tmp_path_factory.mktemp("dev") / "quick", *QUICK, targets, recipe=RECIPE)


def figures_of(bundle: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((bundle / "report" / "report.json").read_text())["targets"]
    return found


def test_in_full_precision_every_stage_equals_diffusers(exact: Path) -> None:
    figures = figures_of(exact)["onnxruntime"]
    for stage in ("text_error", "prologue_error", "step_error", "decode_error"):
        assert figures[stage] <= 1e-3, stage
    assert figures["image_psnr_db_worst"] >= 50
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        assert not pipeline.bundle.manifest.sampling.cfg_batch
        assert "| guidance, unless asked otherwise | 2.5 |" in (exact / "README.md").read_text()
        assert pipeline.target.reads("guidance")
        images = [pipeline.generate(fluxrt.Request("a ring", size=size, steps=1)).images[0] for size in SIZES]
    assert [(image.height, image.width) for image in images] == list(SIZES)


SIZES = ((64, 64), (32, 96), (128, 64))


@pytest.mark.parametrize("size", SIZES)
def test_another_size_equals_diffusers(exact: Path, size: tuple[int, int]) -> None:
    from fluxc.checkpoint.reference import Generation, generate, load_pipeline
    from fluxc.checkpoint.source import open_checkpoint

    checkpoint = open_checkpoint(str(NANO_DEV), None, ROOT)
    expected = generate(
        load_pipeline(checkpoint, torch.float32),
        checkpoint,
        "a ring",
        Generation(size, 3, 2.5, 5, 64, DEV.text_layers),
    )
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        image = pipeline.generate(fluxrt.Request("a ring", size=size, seed=5)).images[0]
    assert np.abs(np.asarray(image) - expected * 255).max() <= 1


def test_where_the_text_encoder_is_exact_no_image_tells_it_apart(exact: Path) -> None:
    assert figures_of(exact)["onnxruntime"]["image_psnr_db_reference_text"] is None
    assert "given text" not in (exact / "report" / "index.html").read_text()


def test_guidance_is_an_input_of_the_transformer(exact: Path) -> None:
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        one, other = (
            np.asarray(pipeline.generate(fluxrt.Request("a large red ring at the left", guidance=scale)).images[0])
            for scale in (1.0, 4.0)
        )
    assert np.abs(one.astype(int) - other).max() > 10


@pytest.fixture
def processor(monkeypatch: pytest.MonkeyPatch) -> Any:
    """dev's processor, as transformers has it; it asks for torchvision, of which texts need nothing."""
    import transformers
    from transformers.image_processing_base import ImageProcessingMixin

    for name in ("", ".transforms", ".transforms.v2", ".transforms.v2.functional"):
        module = ModuleType(f"torchvision{name}")
        monkeypatch.setitem(sys.modules, module.__name__, module)
        parent, _, last = module.__name__.rpartition(".")
        if parent:
            monkeypatch.setattr(sys.modules[parent], last, module, raising=False)
    monkeypatch.setattr(sys.modules["torchvision.transforms"], "InterpolationMode", object, raising=False)
    from transformers.models.pixtral.processing_pixtral import PixtralProcessor

    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(NANO_DEV / "tokenizer")
    return PixtralProcessor(ImageProcessingMixin(), tokenizer, chat_template=tokenizer.chat_template)


@pytest.fixture(scope="module")
def encoder() -> Any:
    """The checkpoint's text encoder as transformers loads it, vision tower and head included."""
    from transformers import Mistral3ForConditionalGeneration

    return Mistral3ForConditionalGeneration.from_pretrained(NANO_DEV / "text_encoder", dtype=torch.float32).eval()


def diffusers_reads(encoder: Any, processor: Any, prompt: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(input_ids, attention_mask, embeddings) of `prompt` by Flux2Pipeline's own code."""
    from diffusers import Flux2Pipeline

    seen: dict[str, Any] = {}
    handle = encoder.register_forward_pre_hook(lambda _module, _args, given: seen.update(given), with_kwargs=True)
    try:
        with torch.no_grad():
            text = Flux2Pipeline._get_mistral_3_small_prompt_embeds(encoder, processor, prompt, max_sequence_length=64)
    finally:
        handle.remove()
    return seen["input_ids"].numpy(), seen["attention_mask"].numpy(), text.numpy()


@pytest.mark.parametrize("prompt", PROMPTS, ids=repr)
def test_tokens_padding_mask_and_embeddings_are_diffusers(
    exact: Path, encoder: Any, processor: Any, prompt: str
) -> None:
    """Of all 64 rows: what stands in the rows of padding reaches the transformer too."""
    ids, mask, expected = diffusers_reads(encoder, processor, prompt)
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        ours = pipeline.tokenize([prompt])
        text = pipeline.encode_text(prompt, 2.5)
    np.testing.assert_array_equal(ours[0], ids)
    np.testing.assert_array_equal(ours[1], mask)
    assert mask[0, 0] == 0
    assert mask[0, -1] == 1
    assert relative_error(text, expected) < 1e-5
    assert max(relative_error(text[0, row], expected[0, row]) for row in range(64)) < 1e-4


@pytest.mark.parametrize("padding", [0, 1, 2])
def test_a_prompt_that_fills_the_text_is_diffusers_too(exact: Path, encoder: Any, processor: Any, padding: int) -> None:
    """Rows of padding are cut off but for one: here there is none to cut, or one."""
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        prompt = "ring"
        while pipeline.tokenize([prompt])[1].sum() < 64 - padding:
            prompt += " ring"
        _, mask, expected = diffusers_reads(encoder, processor, prompt)
        assert (mask == 0).sum() == padding
        assert relative_error(pipeline.encode_text(prompt, 2.5), expected) < 1e-5


def test_the_cpus_graph_computes_no_more_rows_than_there_are_tokens(exact: Path, tmp_path: Path) -> None:
    """The prompt's tokens and one row of padding are looked up in the table of embeddings."""
    folder = Path(shutil.copytree(exact / "text_encoder", tmp_path / "text_encoder"))
    model = onnx.load(folder / "text_encoder.onnx", load_external_data=False)
    (looked_up,) = (node.input[1] for node in model.graph.node if node.op_type == "Gather" and "embed" in node.input[0])
    model.graph.output.append(onnx.helper.make_tensor_value_info(looked_up, onnx.TensorProto.INT64, None))
    onnx.save(model, folder / "probe.onnx")
    session = onnxruntime.InferenceSession(folder / "probe.onnx", providers=["CPUExecutionProvider"])
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        ids, mask = pipeline.tokenize(["a large red circle"])
    _, computed = session.run(None, {"input_ids": ids, "attention_mask": mask})
    assert computed.shape == (1, mask.sum() + 1)


def test_a_prompt_whose_end_would_be_cut_off_is_refused(exact: Path, encoder: Any, processor: Any) -> None:
    ids, _, _ = diffusers_reads(encoder, processor, TOO_LONG)
    closing = 4
    assert closing not in ids, "diffusers cuts [/INST] off without a word"
    with (
        fluxrt.load(exact, target="onnxruntime") as pipeline,
        pytest.raises(fluxrt.RequestError, match="this bundle was compiled for 64"),
    ):
        pipeline.tokenize([TOO_LONG])


@pytest.fixture(scope="module")
def tekken(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer's folder with Mistral's own vocabulary of 131072, from the file that mistral-common brings."""
    folder = copy_checkpoint(tmp_path_factory.mktemp("tekken") / "dev", NANO_DEV) / "tokenizer"
    given = json.loads(tekken_file().read_text())
    number, special = given["config"]["default_vocab_size"], given["config"]["default_num_special_tokens"]
    spelled = [base64.b64decode(entry["token_bytes"]) for entry in given["vocab"][: number - special]]
    ranks = {token: rank for rank, token in enumerate(spelled)}
    letters = bytes_to_unicode()

    def written(token: bytes) -> str:
        return "".join(letters[byte] for byte in token)

    merges = []
    for token in spelled:
        parts = [(token[:at], token[at:]) for at in range(1, len(token))]
        known = [(ranks[a], ranks[b], a, b) for a, b in parts if a in ranks and b in ranks]
        merges += [(written(a), written(b)) for *_, a, b in sorted(known)]
    ours = json.loads((folder / "tokenizer.json").read_text())
    names = {entry["id"]: entry["content"] for entry in ours["added_tokens"]}
    names |= {at: f"<SPECIAL_{at}>" for at in range(special) if at not in names}
    vocabulary = {name: at for at, name in names.items()} | {written(t): special + r for t, r in ranks.items()}
    whole = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=True))
    split = pre_tokenizers.Split(Regex(given["config"]["pattern"]), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    whole.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    whole.add_special_tokens([AddedToken(names[at], special=True, normalized=False) for at in range(special)])
    whole.save(str(folder / "tokenizer.json"))
    return folder


def tekken_file() -> Path:
    import mistral_common

    return Path(mistral_common.__file__).parent / "data" / "tekken_240911.json"


def test_tokens_of_mistrals_own_vocabulary_are_mistral_commons(tekken: Path) -> None:
    """mistral-common puts a conversation together from its parts, and knows no template."""
    from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
    from mistral_common.tokens.tokenizers.tekken import Tekkenizer

    theirs = Tekkenizer.from_file(tekken_file())
    rendered = render_template(tekken, "PixtralProcessor", DEV.prompts, tekken)
    prompting = Prompting(**{"tokenizer": "", "length": 512} | rendered)
    ours = PromptEncoder(prompting, tekken / "tokenizer.json")
    for prompt in (*PROMPTS, TOO_LONG):
        if "[INST]" in prompt or "</s>" in prompt:
            continue  # diffusers takes these for the special tokens that they spell
        plain = prompt.replace("[IMG]", "")
        parts = [theirs.encode(text, bos=False, eos=False) for text in (SYSTEM_MESSAGE, plain)]
        assert ours.tokens(prompt) == [1, 17, *parts[0], 18, 3, *parts[1], 4], prompt
    ids, mask = ours.encode(["a large red circle"])
    assert ids[0, : 512 - mask.sum()].tolist() == [11] * int(512 - mask.sum())


def test_a_row_of_padding_does_not_depend_on_the_prompt(exact: Path) -> None:
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        rows = [pipeline.encode_text(prompt, 2.5)[0, :4] for prompt in ("", "a large red circle")]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rows[0], np.broadcast_to(rows[0][0], rows[0].shape), rtol=1e-5, atol=1e-6)


def test_the_bundles_text_encoder_loads_in_transformers_and_encodes_alike(exact: Path) -> None:
    from transformers import Mistral3ForConditionalGeneration

    stored = read_header(exact / "text_encoder" / "model.safetensors")
    assert not [name for name in stored if name.startswith(("vision_tower", "multi_modal", "language_model.lm_head"))]
    encoder = Mistral3ForConditionalGeneration.from_pretrained(exact / "text_encoder", dtype=torch.float32)
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        ids, mask = pipeline.tokenize(["a small blue ring"])
        text = pipeline.encode_text("a small blue ring", 2.5)
    with torch.no_grad():
        states = encoder(
            input_ids=torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), output_hidden_states=True
        ).hidden_states
    assert relative_error(text, torch.cat([states[k] for k in DEV.text_layers], dim=-1).numpy()) < 1e-5


def test_quantized_it_is_compiled_for_every_target_that_can_be_made_here(quick: Path) -> None:
    manifest = open_bundle(quick).manifest
    assert [target.name for target in manifest.targets] == [
        "onnxruntime",
        "onnxruntime-nvfp4",
        "onnxruntime-2gpus",
        "tensorrt_rtx",
    ]
    formats = {layer.format for layer in manifest.precision if layer.component == "text_encoder"}
    assert formats == {"fp8"}
    for target in ("onnxruntime", "onnxruntime-nvfp4"):
        figures = manifest.fidelity.targets[target]
        assert figures["step_cosine"] > 0.98
        assert figures["prologue_error"] < 1e-3
        assert figures["text_error"] < 0.1
        # FP8 in the text encoder costs the images little beside NVFP4 in the transformer.
        assert figures["image_psnr_db_reference_text"] == pytest.approx(figures["image_psnr_db"], abs=6)
    assert manifest.fidelity.ranks["onnxruntime-2gpus"].image_psnr_db > 40


@pytest.mark.parametrize(("full", "bound"), [(True, 2e-3), (False, 5e-2)])
def test_the_gpu_targets_graphs_encode_as_the_cpu_target_does(exact: Path, full: bool, bound: float) -> None:
    """Through an evaluator of those graphs, in fp32 and in bf16; rows of padding are the same on every target."""
    from fluxc.rehearsal.operators import Player

    bundle = open_bundle(exact)
    player = Player(bundle, bundle.target("tensorrt_rtx"), full)
    with fluxrt.load(exact, target="onnxruntime") as pipeline:
        ids, mask = pipeline.tokenize(["a large red circle at the left"])
        text = pipeline.encode_text("a large red circle at the left", 2.5)
    encoded = player.run("text_encoder", {"input_ids": ids, "attention_mask": mask})["encoded"]
    padding = mask[0] == 0
    assert np.abs(text[0, padding]).max() > 0.01
    for rows in (padding, ~padding):
        assert relative_error(encoded[0, rows], text[0, rows]) < bound


def test_evidence_is_replayed_on_the_cpu_and_on_the_fakes_of_tensorrt(quick: Path, tmp_path: Path) -> None:
    from fluxc.gpu_check.replay import replay_on_gpu
    from fluxc.rehearsal.place import MadeUpPlace

    for target in ("onnxruntime", "onnxruntime-nvfp4"):
        (found,) = verify_evidence(open_bundle(quick), target, threads=1)
        assert (found.status, found.notes) == ("passed", ())
    root = Path(shutil.copytree(quick, tmp_path / "bundle"))
    lines = list(replay_on_gpu(root, ["tensorrt_rtx"], MadeUpPlace(is_rehearsal=False)))
    assert lines[1].endswith("a made-up RTX: tensorrt_rtx matched on the target; entries of 1 machines in all")


# What is not a dev checkpoint.


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    return copy_checkpoint(tmp_path / "damaged", NANO_DEV)


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def refusal(checkpoint: Path, *changes: str) -> str:
    with pytest.raises(FluxError) as caught:
        preflight(load_recipe(RECIPE, (*QUICK, f"model.source={checkpoint}", *changes)), checkpoint.parent / "out")
    return str(caught.value)


def test_a_checkpoint_without_a_text_encoder_is_refused(damaged: Path) -> None:
    shutil.rmtree(damaged / "text_encoder")
    assert "component 'text_encoder' is missing" in refusal(damaged)


def test_a_text_encoder_of_another_family_is_refused(damaged: Path) -> None:
    edit(damaged / "model_index.json", lambda index: index.update(text_encoder=["transformers", "Qwen3ForCausalLM"]))
    assert "text_encoder is a Qwen3ForCausalLM, expected Mistral3ForConditionalGeneration" in refusal(damaged)


def test_another_language_model_in_mistral3_is_refused(damaged: Path) -> None:
    edit(damaged / "text_encoder" / "config.json", lambda config: config["text_config"].update(model_type="ministral3"))
    assert "text_config is of the type 'ministral3', expected that of a Mistral" in refusal(damaged)


def test_a_tokenizer_without_its_file_is_refused(damaged: Path) -> None:
    (damaged / "tokenizer" / "tokenizer.json").unlink()
    assert "there is no tokenizer.json" in refusal(damaged)


def test_a_config_of_more_layers_than_are_stored_is_refused(damaged: Path) -> None:
    edit(damaged / "text_encoder" / "config.json", lambda config: config["text_config"].update(num_hidden_layers=40))
    said = refusal(damaged)
    assert "its tensors do not match its config.json: missing: language_model.model.layers.31." in said


def test_too_few_layers_for_what_is_taken_are_refused(damaged: Path) -> None:
    edit(damaged / "text_encoder" / "config.json", lambda config: config["text_config"].update(num_hidden_layers=30))
    assert "the text encoder has 30 layers; this family takes the output of layer 30" in refusal(damaged)


def test_a_sliding_window_that_is_shorter_than_the_text_is_refused(damaged: Path) -> None:
    edit(damaged / "text_encoder" / "config.json", lambda config: config["text_config"].update(sliding_window=16))
    assert "sliding_window is 16 tokens, and text.length is 64" in refusal(damaged)


def test_a_template_with_a_system_message_of_its_own_is_refused(damaged: Path) -> None:
    template = damaged / "tokenizer" / "chat_template.jinja"
    given = "{%- set system_message = messages[0]['content'][0]['text'] %}"
    text = template.read_text()
    assert given in text
    template.write_text(text.replace(given, "{%- set system_message = 'You are a poet.' %}"))
    assert "does not hold the system message of FLUX.2" in refusal(damaged)


def test_a_tokenizer_that_pads_on_the_right_is_refused(damaged: Path) -> None:
    edit(damaged / "tokenizer" / "tokenizer_config.json", lambda config: config.update(padding_side="right"))
    assert "pad on the left" in refusal(damaged)


def test_vision_tower_and_head_are_not_needed(damaged: Path) -> None:
    file = damaged / "text_encoder" / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(file).items() if name.startswith("language_model.model.")}
    assert len(kept) < len(load_file(file))
    save_file(kept, file, metadata={"format": "pt"})
    open_job(load_recipe(RECIPE, (*QUICK, f"model.source={damaged}")), damaged.parent)


def test_weights_in_fp32_are_stored_in_bf16(damaged: Path, exact: Path, tmp_path: Path) -> None:
    """As a loader that takes no dtype from the config saves them; rounded they are the checkpoint's again."""
    for name in ("transformer", "text_encoder"):
        (file,) = (damaged / name).glob("*.safetensors")
        save_file({key: value.float() for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
    changes = (*QUICK, PLAIN, f"model.source={damaged}", "targets=[{kind: onnxruntime}]")
    job = open_job(load_recipe(RECIPE, changes), tmp_path)
    memory = memory_by_component(job.original)
    assert all(memory[name].planned == memory[name].bf16 for name in ("transformer", "text_encoder"))
    out = compile_into(tmp_path / "out", *changes, recipe=RECIPE)
    for name in ("transformer", "text_encoder"):
        ours, theirs = (next((folder / name).glob("*.safetensors")) for folder in (out, exact))
        assert memory[name].planned == sum(ref.nbytes for ref in read_header(ours).values())
        assert all(torch.equal(load_file(ours)[key], value) for key, value in load_file(theirs).items())


def test_a_template_in_the_processors_own_file_is_read(damaged: Path) -> None:
    """As processors were saved before templates had files of their own."""
    template = damaged / "tokenizer" / "chat_template.jinja"
    (damaged / "tokenizer" / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    found = preflight(load_recipe(RECIPE, (*QUICK, f"model.source={damaged}")), damaged.parent / "out")
    assert found.prompting.suffix == "[/INST]"
    assert found.prompting.padding == "left"
