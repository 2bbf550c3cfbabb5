"""Trains flux2-nano from nothing and writes it beside this file in diffusers format.

    python models/flux2-nano/train.py            # about an hour on 2 cores; run it again to resume

Four stages, each seeded and check-pointed in `.work/` (delete that folder to start over):
1. tokenizer     byte-level BPE over the captions, Qwen2's pre-tokenizer
2. text encoder  a Qwen3 of 28 layers, width 32, trained to predict captions and to keep what they say
3. vae           AutoencoderKLFlux2, L1 + MSE + a light KL, 4x down, 8 latent channels
4. transformer   Flux2Transformer2DModel, flow matching on the VAE's latents, EMA weights
Weights are saved in bfloat16, as the published checkpoints are.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

HERE = Path(__file__).resolve().parent
WORK = HERE / ".work"
sys.path.insert(0, str(HERE))

from pictures import COLOURS, POSITIONS, SHAPES, SIZES, TEMPLATES, Spec, render, split_specs  # noqa: E402

TEXT_LENGTH = 32
TEXT_LAYERS = (9, 18, 27)
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
STEPS = {"text_encoder": 1200, "vae": 2400, "transformer": 6500}


def run_stage(
    name: str,
    model: torch.nn.Module,
    loss_at: Callable[[torch.Generator], torch.Tensor],
    lr: float,
    ema_decay: float | None = None,
    on_checkpoint: Callable[[torch.nn.Module], None] | None = None,
    steps: int | None = None,
    work: Path = WORK,
) -> torch.nn.Module:
    """Train `model` for `steps` (else STEPS[name]) steps of AdamW (warm-up, cosine to 2 %), resuming from NAME.pt in `work`."""
    total, path = steps or STEPS[name], work / f"{name}.pt"
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    generator = torch.Generator().manual_seed(len(name) * 1000 + 17)
    averaged = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(ema_decay or 0.0), use_buffers=True
    )
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        averaged.load_state_dict(state["averaged"])
        generator.set_state(state["generator"])
        start = state["step"]
    began, shown = time.time(), 0.0
    for step in range(start, total):
        warm = min(1.0, (step + 1) / 200)
        rate = lr * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / total)))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = loss_at(generator)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        averaged.update_parameters(model)
        shown = loss.item() if step == start else 0.98 * shown + 0.02 * loss.item()
        if (step + 1) % 100 == 0:
            speed = (time.time() - began) / (step + 1 - start)
            print(f"{name} {step + 1}/{total} loss {shown:.4f} {speed:.3f} s/step", flush=True)
        if (step + 1) % 500 == 0 or step + 1 == total:
            partial = path.with_suffix(".part")
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "averaged": averaged.state_dict(),
                    "generator": generator.get_state(),
                    "step": step + 1,
                },
                partial,
            )
            partial.replace(path)
            if on_checkpoint:
                on_checkpoint(averaged.module)
    return averaged.module if ema_decay else model


def make_tokenizer() -> Qwen2TokenizerFast:
    """Byte-level BPE of 380 entries: every caption word is one token, any other text still encodes."""
    training, _ = split_specs()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480, special_tokens=[], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    corpus = [spec.caption(t) for spec in training for t in range(len(TEMPLATES))]
    frame = "user\nassistant\n<think>\n\n</think>\n\n"
    tokenizer.train_from_iterator(corpus + [frame] * 200, trainer)
    folder = WORK / "bpe"
    folder.mkdir(exist_ok=True)
    tokenizer.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    merges = [tuple(line.split(" ")) for line in (folder / "merges.txt").read_text().splitlines()[1:]]
    fast = Qwen2TokenizerFast(
        vocab=vocab,
        merges=merges,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokenize(tokenizer: Qwen2TokenizerFast, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """(input_ids, attention_mask), both [N, 32], as Flux2KleinPipeline makes them."""
    texts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
        for p in prompts
    ]
    batch = tokenizer(texts, return_tensors="pt", padding="max_length", max_length=TEXT_LENGTH, truncation=True)
    return batch["input_ids"], batch["attention_mask"]


CLASSES = {
    "size": list(SIZES),
    "colour": list(COLOURS),
    "shape": list(SHAPES),
    "position": list(POSITIONS),
    "background": list(COLOURS),
}


def answers_of(specs: list[Spec]) -> dict[str, torch.Tensor]:
    """The number of each attribute's word among its CLASSES."""
    return {name: torch.tensor([words.index(getattr(spec, name)) for spec in specs]) for name, words in CLASSES.items()}


class Reader(torch.nn.Module):
    """A text encoder with linear probes that name a caption's attributes from each of `layers`, which the pipeline takes.

    The last `asked` tokens of a caption with its template, padded on the right, have seen all of it: each of them is asked.
    """

    def __init__(self, encoder: torch.nn.Module, width: int, layers: tuple[int, ...], asked: int) -> None:
        super().__init__()
        self.encoder, self.layers, self.asked = encoder, layers, asked
        self.probes = torch.nn.ModuleList(
            torch.nn.ModuleDict({name: torch.nn.Linear(width, len(words)) for name, words in CLASSES.items()})
            for _ in layers
        )

    def losses(
        self, ids: torch.Tensor, mask: torch.Tensor, answers: dict[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(next-token loss, probe loss, share of right probe answers) over a batch of captions [N, length]."""
        output = self.encoder(
            input_ids=ids,
            attention_mask=mask,
            labels=ids.masked_fill(mask == 0, -100),
            output_hidden_states=True,
        )
        place = torch.arange(ids.shape[1])
        length = mask.sum(1, keepdim=True)
        asked = (place >= length - self.asked) & (place < length)
        probe, right = [], []
        for probes, layer in zip(self.probes, self.layers, strict=True):
            states = output.hidden_states[layer]
            for name, answer in answers.items():
                logits = probes[name](states[asked])
                wanted = answer.repeat_interleave(self.asked)
                probe.append(torch.nn.functional.cross_entropy(logits, wanted))
                right.append((logits.argmax(-1) == wanted).float().mean())
        return output.loss, torch.stack(probe).mean(), torch.stack(right).mean()


def train_text_encoder(tokenizer: Qwen2TokenizerFast) -> Qwen3ForCausalLM:
    """Next-token prediction alone would forget a colour as soon as it is read, since what follows does not depend on it;
    the probes make every layer that conditions the transformer keep what the caption said."""
    torch.manual_seed(1)
    encoder = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=384,
            hidden_size=32,
            intermediate_size=96,
            num_hidden_layers=28,
            num_attention_heads=2,
            num_key_value_heads=1,
            head_dim=16,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=None,
            initializer_range=0.08,
        )
    )
    reader = Reader(encoder, encoder.config.hidden_size, TEXT_LAYERS, asked=8)

    def batch_of(specs: list[Spec], template: int) -> tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]:
        return *tokenize(tokenizer, [spec.caption(template) for spec in specs]), answers_of(specs)

    training, unseen = split_specs()
    batches = [batch_of(training, template) for template in range(len(TEMPLATES))]

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(training), (64,), generator=generator)
        ids, mask, answers = batches[int(torch.randint(len(TEMPLATES), (), generator=generator))]
        next_token, probe, _ = reader.losses(ids[rows], mask[rows], {k: v[rows] for k, v in answers.items()})
        return 0.3 * next_token + probe

    run_stage("text_encoder", reader, loss_at, lr=3e-3)
    with torch.no_grad():
        _, _, right = reader.losses(*batch_of(unseen, 0))
    print(f"text_encoder: probes name {right:.1%} of the attributes of unseen captions", flush=True)
    return encoder.eval()


def train_vae() -> AutoencoderKLFlux2:
    torch.manual_seed(2)
    vae = AutoencoderKLFlux2(
        block_out_channels=(32, 64, 96),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=16,
        sample_size=64,
    ).to(memory_format=torch.channels_last)
    training, _ = split_specs()

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(training), (16,), generator=generator)
        images = render([training[i] for i in rows], generator).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(images).latent_dist
            mean, std = posterior.mean.float(), posterior.std.float()
            noise = torch.randn(mean.shape, generator=generator)
            # The decoder meets sampled latents, which are a little off: train it on latents a little off.
            generated = vae.decode(mean + (std**2 + 0.05**2).sqrt() * noise).sample.float()
        kl = 0.5 * (mean**2 + std**2 - 1 - 2 * std.log()).mean()
        error = generated - images
        return error.abs().mean() + 2 * error.square().mean() + 1e-3 * kl

    vae = run_stage("vae", vae, loss_at, lr=2e-3, ema_decay=0.995).eval()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        rows = torch.randperm(len(training), generator=generator)[:2048]
        latents = [
            Flux2KleinPipeline._patchify_latents(
                vae.encode(render([training[i] for i in part], generator)).latent_dist.mode()
            )
            for part in rows.split(64)
        ]
        stacked = torch.cat(latents)
        vae.bn.running_mean.copy_(stacked.mean((0, 2, 3)))
        vae.bn.running_var.copy_(stacked.var((0, 2, 3)))
    # What follows must see the weights that are saved.
    return vae.to(torch.bfloat16).float()


@torch.no_grad()
def make_dataset(
    tokenizer: Qwen2TokenizerFast, text_encoder: Qwen3ForCausalLM, vae: AutoencoderKLFlux2, views: int = 6
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(latents [specs, views, 64, 32], text [specs, templates, 32, 96], empty text [32, 96]), float16 but the last."""
    path = WORK / "dataset.pt"
    if path.exists():
        return tuple(torch.load(path, weights_only=True))
    training, _ = split_specs()
    generator = torch.Generator().manual_seed(4)
    mean = vae.bn.running_mean.view(1, -1, 1, 1)
    std = (vae.bn.running_var.view(1, -1, 1, 1) + vae.config.batch_norm_eps).sqrt()
    latents = torch.empty(len(training), views, 64, 32, dtype=torch.float16)
    for view in range(views):
        for at in range(0, len(training), 64):
            images = render(training[at : at + 64], generator)
            with torch.autocast("cpu", torch.bfloat16):
                mode = vae.encode(images.to(memory_format=torch.channels_last)).latent_dist.mode().float()
            packed = (Flux2KleinPipeline._patchify_latents(mode) - mean) / std
            latents[at : at + 64, view] = Flux2KleinPipeline._pack_latents(packed).half()
        print(f"dataset view {view + 1}/{views}", flush=True)

    def embed(prompts: list[str]) -> torch.Tensor:
        ids, mask = tokenize(tokenizer, prompts)
        states = text_encoder(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
        return torch.cat([states[k] for k in TEXT_LAYERS], dim=-1)

    text = torch.empty(len(training), len(TEMPLATES), TEXT_LENGTH, 96, dtype=torch.float16)
    for template in range(len(TEMPLATES)):
        for at in range(0, len(training), 256):
            text[at : at + 256, template] = embed([s.caption(template) for s in training[at : at + 256]]).half()
    result = (latents, text, embed([""])[0])
    torch.save(list(result), path)
    return result


def train_transformer(
    dataset: tuple[torch.Tensor, torch.Tensor, torch.Tensor], on_checkpoint: Callable[[torch.nn.Module], None]
) -> Flux2Transformer2DModel:
    torch.manual_seed(5)
    model = Flux2Transformer2DModel(
        in_channels=32,
        num_layers=2,
        num_single_layers=6,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=96,
        timestep_guidance_channels=128,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    latents, text, empty = dataset
    image_ids = Flux2KleinPipeline._prepare_latent_ids(torch.empty(1, 32, 8, 8))
    text_ids = Flux2KleinPipeline._prepare_text_ids(empty[None])
    batch = 36

    def loss_at(generator: torch.Generator) -> torch.Tensor:
        rows = torch.randint(len(latents), (batch,), generator=generator)
        view = torch.randint(latents.shape[1], (batch,), generator=generator)
        template = torch.randint(text.shape[1], (batch,), generator=generator)
        clean = latents[rows, view].float()
        context = text[rows, template].float()
        context[torch.rand(batch, generator=generator) < 0.1] = empty
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) * 1.2 + 0.4)
        noise = torch.randn(clean.shape, generator=generator)
        noisy = clean + sigma[:, None, None] * (noise - clean)
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            velocity = model(
                hidden_states=noisy,
                encoder_hidden_states=context,
                timestep=sigma,
                img_ids=image_ids,
                txt_ids=text_ids,
                return_dict=False,
            )[0]
        return (velocity.float() - (noise - clean)).square().mean()

    return run_stage("transformer", model, loss_at, lr=1.5e-3, ema_decay=0.999, on_checkpoint=on_checkpoint).eval()


def save(tokenizer, text_encoder, vae, transformer, folder: Path) -> None:
    """Write the pipeline in bfloat16; the folder is replaced only when everything is written."""
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, shift=3.0)
    partial = WORK / "saved"
    shutil.rmtree(partial, ignore_errors=True)
    pipeline = Flux2KleinPipeline(scheduler, vae, text_encoder, tokenizer, transformer, is_distilled=False)
    pipeline.to(torch.bfloat16).save_pretrained(partial)
    for part in partial.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        part.replace(target)


def main() -> None:
    torch.set_num_threads(2)
    WORK.mkdir(exist_ok=True)
    tokenizer = make_tokenizer()
    text_encoder = train_text_encoder(tokenizer).to(torch.bfloat16).float()
    vae = train_vae()
    dataset = make_dataset(tokenizer, text_encoder, vae)

    def save_now(transformer: torch.nn.Module) -> None:
        save(tokenizer, copy.deepcopy(text_encoder), copy.deepcopy(vae), copy.deepcopy(transformer), HERE)

    save_now(train_transformer(dataset, save_now))
    print(f"saved to {HERE}")


if __name__ == "__main__":
    main()
