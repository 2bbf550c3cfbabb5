"""One image by diffusers and by fluxrt, and how far apart they are, for `real_size.py`, which runs it in processes of its own.

    python benchmarks/real_size_image.py reference CHECKPOINT OUT.npz --size 256 --steps 4 --prompt "a lighthouse"
    python benchmarks/real_size_image.py replay BUNDLE OUT.npz

`reference` runs diffusers' own pipeline in bf16 from fluxrt's noise and records text embeddings, the latents and velocity of
every step, and the image. `replay` gives a target of the bundle the same tokens and latents, and prints the relative error of
what it computes. Relative error: Euclidean norm of the difference, divided by the norm of what diffusers computed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

TEXT_LAYERS = (9, 18, 27)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("reference", "replay"))
    parser.add_argument("source", type=Path, help="the checkpoint; of replay the bundle")
    parser.add_argument("record", type=Path)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--text-length", type=int, default=512)
    parser.add_argument("--prompt", default="")
    parser.add_argument("--target", default="onnxruntime")
    options = parser.parse_args()
    if options.what == "reference":
        np.savez(options.record, **reference(options))
    else:
        print(json.dumps(replay(options.source, options.target, dict(np.load(options.record)))))


def reference(options: argparse.Namespace) -> dict[str, Any]:
    """What diffusers computes: text [1, S, features], latents and velocities [steps, 1, tokens, channels], image, and sigmas as
    its timesteps were rounded there."""
    import torch
    from diffusers import Flux2KleinPipeline

    from fluxrt.pipeline import starting_noise

    pipeline = Flux2KleinPipeline.from_pretrained(options.source, torch_dtype=torch.bfloat16, local_files_only=True)
    found: dict[str, list[Any]] = {"latents": [], "velocities": [], "sigmas": []}
    text: list[Any] = []

    def on_pass(_module: Any, _arguments: Any, given: dict[str, Any], output: Any) -> None:
        text[:] = [given["encoder_hidden_states"].float().numpy()]
        found["latents"].append(given["hidden_states"].float().numpy().copy())
        # As diffusers goes on: it multiplies by 1000 in the type of the latents, where 957 becomes 956.
        found["sigmas"].append(float(given["timestep"][0].to(given["hidden_states"].dtype) * 1000) / 1000)
        found["velocities"].append(output[0].float().numpy().copy())

    pipeline.transformer.register_forward_hook(on_pass, with_kwargs=True)
    channels = pipeline.transformer.config.in_channels
    pixels = 2 ** len(pipeline.vae.config.block_out_channels)
    side = options.size // pixels
    noise = torch.from_numpy(starting_noise(options.seed, side * side, channels)[None])
    image = pipeline(
        prompt=options.prompt,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        guidance_scale=1.0,
        latents=noise.reshape(1, side, side, channels).permute(0, 3, 1, 2).to(torch.bfloat16),
        max_sequence_length=options.text_length,
        text_encoder_out_layers=TEXT_LAYERS,
        output_type="np",
    ).images[0]
    return {
        "text": text[0],
        "image": image.astype(np.float32),
        "seed": options.seed,
        "prompt": options.prompt,
        **{name: np.array(values, np.float32) for name, values in found.items()},
    }


def replay(bundle: Path, target: str, recorded: dict[str, Any]) -> dict[str, Any]:
    """Relative errors of text and of every step's velocity, each from diffusers' own input, and the cosines of the latter."""
    from fluxrt.bundle import open_bundle
    from fluxrt.pipeline import Pipeline

    pipeline = Pipeline(open_bundle(bundle), target=target)
    pixels = pipeline.bundle.manifest.sampling.pixels_per_token
    grid = pipeline.grid((recorded["image"].shape[0], recorded["image"].shape[1]))
    assert (grid[0] * pixels, grid[1] * pixels) == recorded["image"].shape[:2]
    text = pipeline.encode_text(str(recorded["prompt"]), 1.0)
    errors, cosines = [], []
    for latents, velocity, sigma in zip(recorded["latents"], recorded["velocities"], recorded["sigmas"], strict=True):
        pipeline.begin(latents, grid, 1.0, recorded["text"])
        # An Euler step of length one adds the velocity.
        pipeline.step(float(sigma), float(sigma) + 1.0)
        ours = pipeline.backend.get("latents") - latents
        errors.append(relative_error(ours, velocity))
        cosines.append(float(np.vdot(ours, velocity) / (np.linalg.norm(ours) * np.linalg.norm(velocity))))
    return {"text": relative_error(text, recorded["text"]), "velocity": errors, "cosine": cosines}


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Norm of the difference over the norm of `theirs`."""
    return float(np.linalg.norm(ours.astype(np.float64) - theirs) / np.linalg.norm(theirs))


def psnr(ours: np.ndarray, theirs: np.ndarray) -> float:
    """Decibels between two images with values in 0..1, both rounded to 8 bits."""
    a, b = (np.round(255 * image.astype(np.float64)) / 255 for image in (ours, theirs))
    return float(-10 * np.log10(max(np.mean((a - b) ** 2), 1e-12)))


if __name__ == "__main__":
    main()
