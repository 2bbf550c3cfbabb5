"""Trains flux2-nano-dev, a small FLUX.2 [dev], and writes it beside this file in diffusers format.

    python models/flux2-nano-dev/train.py        # about an hour on 2 cores; run it again to resume

It needs flux2-nano, its teacher. Three stages, each seeded and check-pointed in `.work/` (delete that folder to start over):
1. tokenizer     byte-level BPE over the captions and dev's system message, Mistral's special tokens under their ids
2. text encoder  a Mistral3 of 31 layers, width 48, trained to predict captions and to keep what they say; its vision tower
                 and its head stay as they were made, since nothing reads them
3. transformer   flux2-nano's with an embedding of the guidance scale, distilled: one pass gives the velocity that flux2-nano
                 gives with classifier-free guidance of that scale, as dev was made from its own teacher
The VAE is flux2-nano's. Weights are saved in bfloat16, as the published checkpoints are.
"""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from diffusers.pipelines.flux2.system_messages import SYSTEM_MESSAGE
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Mistral3Config, Mistral3ForConditionalGeneration, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
TEACHER = HERE.parent / "flux2-nano"
sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]
sys.path.insert(0, str(TEACHER))
sys.modules.pop("train", None)

from pictures import TEMPLATES, render, split_specs  # noqa: E402
from train import Reader, answers_of, run_stage  # noqa: E402
from train import tokenize as tokenize_klein  # noqa: E402

TEXT_LENGTH = 64
TEXT_LAYERS = (10, 20, 30)
WIDTH = 48
STEPS = {"text_encoder": 1200, "transformer": 3000}
GUIDANCE = (1.0, 4.0)
SPECIAL = {
    0: "<unk>",
    1: "<s>",
    2: "</s>",
    3: "[INST]",
    4: "[/INST]",
    5: "[AVAILABLE_TOOLS]",
    6: "[/AVAILABLE_TOOLS]",
    7: "[TOOL_RESULTS]",
    8: "[/TOOL_RESULTS]",
    9: "[TOOL_CALLS]",
    10: "[IMG]",
    11: "<pad>",
    12: "[IMG_BREAK]",
    13: "[IMG_END]",
    14: "[PREFIX]",
    15: "[MIDDLE]",
    16: "[SUFFIX]",
    17: "[SYSTEM_PROMPT]",
    18: "[/SYSTEM_PROMPT]",
    19: "[TOOL_CONTENT]",
}
"""Mistral's special tokens under their ids."""


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write the tokenizer's folder as dev's is: a fast tokenizer that pads on the left, its template, a Pixtral processor."""
    training, _ = split_specs()
    learned = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated")
    learned.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=640, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [spec.caption(template) for spec in training for template in range(len(TEMPLATES))]
    learned.train_from_iterator(corpus + [SYSTEM_MESSAGE] * 200, trainer)
    model = json.loads(learned.to_str())["model"]
    shifted = {token: number + len(SPECIAL) for token, number in model["vocab"].items()}
    merges = [tuple(pair) for pair in model["merges"]]
    whole = Tokenizer(models.BPE({name: at for at, name in SPECIAL.items()} | shifted, merges))
    whole.pre_tokenizer, whole.decoder = learned.pre_tokenizer, decoders.ByteLevel()
    whole.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in SPECIAL.values()])
    # As Mistral's own, it would put a second <s> before a rendered conversation, if it were asked to.
    whole.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=whole,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = (HERE / "chat_template.jinja").read_text()
    shutil.rmtree(folder, ignore_errors=True)
    fast.save_pretrained(folder)
    processor = {
        "processor_class": "PixtralProcessor",
        "patch_size": 14,
        "spatial_merge_size": 2,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    }
    image = {"image_processor_type": "PixtralImageProcessor", "patch_size": {"height": 14, "width": 14}}
    image |= {"size": {"longest_edge": 28}, "do_rescale": True, "rescale_factor": 1 / 255, "do_convert_rgb": True}
    (folder / "processor_config.json").write_text(json.dumps(processor, indent=2) + "\n")
    (folder / "preprocessor_config.json").write_text(json.dumps(image, indent=2) + "\n")
    return fast


def tokenize(tokenizer: PreTrainedTokenizerFast, prompts: list[str], side: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both [N, 64], padded on `side`; on the left they are those of Flux2Pipeline."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "system", "content": SYSTEM_MESSAGE}, {"role": "user", "content": prompt}], tokenize=False
        )
        for prompt in prompts
    ]
    batch = tokenizer(
        texts,
        return_tensors="pt",
        padding="max_length",
        max_length=TEXT_LENGTH,
        truncation=True,
        padding_side=side,
        add_special_tokens=False,
    )
    return batch["input_ids"], batch["attention_mask"]


def train_text_encoder(tokenizer: PreTrainedTokenizerFast) -> Mistral3ForConditionalGeneration:
    """As flux2-nano's: the probes make every layer that conditions the transformer keep what the caption said.

    Captions are padded on the right while it is trained, which gives their tokens the same states as padding on the left.
    """
    torch.manual_seed(11)
    text = {
        "model_type": "mistral",
        "vocab_size": 672,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 31,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e9},
        "sliding_window": None,
        "initializer_range": 0.08,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {
        "model_type": "pixtral",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "head_dim": 16,
        "image_size": 28,
        "patch_size": 14,
    }
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=10, tie_word_embeddings=False)
    encoder = Mistral3ForConditionalGeneration(config)
    # The caption's last token and the one that closes it are asked.
    reader = Reader(encoder, WIDTH, TEXT_LAYERS, asked=2)
    training, unseen = split_specs()

    def batch_of(specs: list, template: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return *tokenize(tokenizer, [spec.caption(template) for spec in specs], "right"), answers_of(specs)

    batches = [batch_of(training, template) for template in range(len(TEMPLATES))]
    longest = max(int(mask.sum(1).max()) for _, mask, _ in batches)
    print(f"text_encoder: at most {longest} tokens of {TEXT_LENGTH}", flush=True)

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(training), (48,), generator=generator)
        ids, mask, answers = batches[int(torch.randint(len(TEMPLATES), (), generator=generator))]
        ids, mask = ids[rows, :longest], mask[rows, :longest]
        next_token, probe, _ = reader.losses(ids, mask, {k: v[rows] for k, v in answers.items()})
        return 0.3 * next_token + probe

    run_stage("text_encoder", reader, loss_at, lr=3e-3, steps=STEPS["text_encoder"], work=WORK)
    with torch.no_grad():
        _, _, right = reader.losses(*batch_of(unseen, 0))
        # transformers makes the embedding of padding zero. dev's is not, and its rows reach the transformer.
        pad = torch.randn(WIDTH, generator=torch.Generator().manual_seed(13)) * text["initializer_range"]
        encoder.model.language_model.embed_tokens.weight[tokenizer.pad_token_id] = pad
    print(f"text_encoder: probes name {right:.1%} of the attributes of unseen captions", flush=True)
    return encoder.eval()


@torch.no_grad()
def make_dataset(
    tokenizer: PreTrainedTokenizerFast, encoder: Mistral3ForConditionalGeneration
) -> dict[str, torch.Tensor]:
    """latents [specs, views, 64, 32], text [specs, templates, 64, 144], teacher's text [specs, templates, 32, 96], all float16,
    and its text of the empty prompt [32, 96]."""
    path = WORK / "dataset.pt"
    if path.exists():
        return torch.load(path, weights_only=True)
    training, _ = split_specs()
    teacher = Flux2KleinPipeline.from_pretrained(TEACHER, torch_dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    mean = teacher.vae.bn.running_mean.view(1, -1, 1, 1)
    std = (teacher.vae.bn.running_var.view(1, -1, 1, 1) + teacher.vae.config.batch_norm_eps).sqrt()
    views = 3
    latents = torch.empty(len(training), views, 64, 32, dtype=torch.float16)
    for view in range(views):
        for at in range(0, len(training), 64):
            images = render(training[at : at + 64], generator)
            mode = teacher.vae.encode(images).latent_dist.mode()
            packed = (Flux2KleinPipeline._patchify_latents(mode) - mean) / std
            latents[at : at + 64, view] = Flux2KleinPipeline._pack_latents(packed).half()
        print(f"dataset view {view + 1}/{views}", flush=True)

    def embed_klein(prompts: list[str]) -> torch.Tensor:
        ids, mask = tokenize_klein(teacher.tokenizer, prompts)
        states = teacher.text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat([states[k] for k in (9, 18, 27)], dim=-1)

    def embed(prompts: list[str]) -> torch.Tensor:
        ids, mask = tokenize(tokenizer, prompts, "left")
        states = encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat([states[k] for k in TEXT_LAYERS], dim=-1)

    text = torch.empty(len(training), len(TEMPLATES), TEXT_LENGTH, 3 * WIDTH, dtype=torch.float16)
    taught = torch.empty(len(training), len(TEMPLATES), 32, 96, dtype=torch.float16)
    for template in range(len(TEMPLATES)):
        for at in range(0, len(training), 256):
            captions = [spec.caption(template) for spec in training[at : at + 256]]
            text[at : at + 256, template] = embed(captions).half()
            taught[at : at + 256, template] = embed_klein(captions).half()
    result = {"latents": latents, "text": text, "taught": taught, "empty": embed_klein([""])[0]}
    torch.save(result, path)
    return result


def train_transformer(
    dataset: dict[str, torch.Tensor], on_checkpoint: Callable[[torch.nn.Module], None]
) -> Flux2Transformer2DModel:
    """The student begins as its teacher with new embeddings of text and guidance."""
    teacher = Flux2Transformer2DModel.from_pretrained(TEACHER / "transformer", torch_dtype=torch.float32).eval()
    torch.manual_seed(12)
    config = dict(teacher.config) | {"joint_attention_dim": 3 * WIDTH, "guidance_embeds": True}
    model = Flux2Transformer2DModel.from_config(config)
    kept = {name: value for name, value in teacher.state_dict().items() if not name.startswith("context_embedder")}
    model.load_state_dict(kept, strict=False)
    # At the start the guidance changes nothing.
    torch.nn.init.zeros_(model.time_guidance_embed.guidance_embedder.linear_2.weight)
    latents, text, taught, empty = (dataset[name] for name in ("latents", "text", "taught", "empty"))
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, 8, 8))
    text_ids = Flux2KleinPipeline._prepare_text_ids(text[:1, 0])
    taught_ids = Flux2KleinPipeline._prepare_text_ids(empty[None])
    batch = 32

    def velocity(network: torch.nn.Module, noisy, sigma, context, ids, guidance=None) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            found = network(
                hidden_states=noisy,
                encoder_hidden_states=context,
                timestep=sigma,
                guidance=guidance,
                img_ids=image_ids,
                txt_ids=ids,
                return_dict=False,
            )[0]
        return found.float()

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        view = torch.randint(latents.shape[1], (batch,), generator=generator)
        template = torch.randint(text.shape[1], (batch,), generator=generator)
        clean = latents[rows, view].float()
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2 + 0.4)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(batch, generator=generator)
        with torch.no_grad():
            both = torch.cat([taught[rows, template].float(), empty.expand(batch, -1, -1)])
            found = velocity(teacher, noisy.repeat(2, 1, 1), sigma.repeat(2), both, taught_ids)
            conditional, unconditional = found.chunk(2)
            wanted = unconditional + guidance[:, None, None] * (conditional - unconditional)
        given = velocity(model, noisy, sigma, text[rows, template].float(), text_ids, guidance)
        return (given - wanted).square().mean()

    steps = STEPS["transformer"]
    found = run_stage("transformer", model, loss_at, 1.5e-3, 0.998, on_checkpoint, steps=steps, work=WORK)
    return found.eval()


def save(encoder, transformer, folder: Path) -> None:
    """Write the pipeline in bfloat16; the tokenizer's folder is written already."""
    partial = WORK / "saved"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    encoder.to(torch.bfloat16).save_pretrained(partial / "text_encoder")
    transformer.to(torch.bfloat16).save_pretrained(partial / "transformer")
    vae = AutoencoderKLFlux2.from_pretrained(TEACHER / "vae", torch_dtype=torch.bfloat16)
    vae.save_pretrained(partial / "vae")
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    scheduler.save_pretrained(partial / "scheduler")
    index = {
        "_class_name": "Flux2Pipeline",
        "_diffusers_version": json.loads((partial / "scheduler" / "scheduler_config.json").read_text())[
            "_diffusers_version"
        ],
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Mistral3ForConditionalGeneration"],
        "tokenizer": ["transformers", "PixtralProcessor"],
        "transformer": ["diffusers", "Flux2Transformer2DModel"],
        "vae": ["diffusers", "AutoencoderKLFlux2"],
    }
    (partial / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    for config in partial.glob("*/config.json"):
        fields = json.loads(config.read_text())
        fields.pop("_name_or_path", None)
        config.write_text(json.dumps(fields, indent=2) + "\n")
    for part in partial.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)


def main() -> None:
    WORK.mkdir(exist_ok=True)
    tokenizer = make_tokenizer(HERE / "tokenizer")
    encoder = train_text_encoder(tokenizer).to(torch.bfloat16).float()
    dataset = make_dataset(tokenizer, encoder)

    def save_now(transformer: torch.nn.Module) -> None:
        save(copy.deepcopy(encoder), copy.deepcopy(transformer), HERE)

    save_now(train_transformer(dataset, save_now))
    print(f"saved to {HERE}")


if __name__ == "__main__":
    main()
