"""What factors of low rank (`low_rank`) and `smoothing` gain on flux2-nano, beside rounding alone and modelopt's awq_lite and
svdquant.

    python benchmarks/low_rank.py                    # everything
    python benchmarks/low_rank.py --parts ours       # without modelopt; or smoothed, or modelopt
    python benchmarks/low_rank.py --work FOLDER      # keeps finished variants there, and goes on after an interruption

Every variant is a whole build of flux2-nano under one plan, compared with one reference of diffusers in fp32 on the prompts of
benchmarks/rounding.py, whose columns these are. `MB` is the size of the transformer's weights.

modelopt quantizes as `calibration.engine: modelopt` lets it: its own calibration, search of scales, decomposition and export,
on the prompts that fluxc calibrates on. Its NVFP4 rounding runs on CUDA alone. Without a GPU, fluxc's takes the place of that
one kernel; both give the same values (tests/test_nvfp4.py).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from calibration import CALIBRATED, HELD_OUT, summarized, write_prompts
from cpu_step import cpu_name
from rounding import ATTENDING, TARGETS, figures_of

from fluxc.calibrate import modelopt
from fluxc.checkpoint.reference import Generation, generate, load_pipeline
from fluxc.checkpoint.source import Checkpoint
from fluxc.formats.constants import E2M1_MAX, E4M3_MAX
from fluxc.formats.nvfp4 import fake_quantize
from fluxc.quantize.plan import LayerPlan

PARTS = ("ours", "smoothed", "modelopt")


@dataclass(frozen=True)
class Variant:
    """One build. `rank` 0 is without factors, others are beside the layers `where`; of modelopt's `algorithm`, its own rank,
    32, counts."""

    scales: str = "max"
    rounding: str = "nearest"
    rank: int = 0
    where: tuple[str, ...] = ("*",)
    algorithm: str = ""
    smoothing: str = "none"
    guidance: float = 1.5
    prompts: int = CALIBRATED
    steps: int = 24

    @property
    def method(self) -> str:
        """In words."""
        own = f"{self.rounding}, {self.scales}" + (f", rank {self.rank}" if self.rank else "")
        own += ", attention's inputs" if self.where == ATTENDING else ""
        own += ", smoothing" if self.smoothing != "none" else ""
        return f"modelopt {self.algorithm}" if self.algorithm else own

    @property
    def name(self) -> str:
        """For files; no two variants share one."""
        how = self.method.replace(", ", "-").replace(" ", "-").replace("'", "")
        return f"{how}-guidance-{self.guidance}-{self.prompts}-prompts-{self.steps}-steps"

    @property
    def changes(self) -> tuple[str, ...]:
        """To recipes/flux2-nano.yaml."""
        engine = ("calibration.engine=modelopt", f"calibration.algorithm={self.algorithm}") if self.algorithm else ()
        entries = ", ".join(f'{{match: "{pattern}", rank: {self.rank}}}' for pattern in self.where)
        return (
            *engine,
            *([f"precision.transformer.low_rank=[{entries}]"] if self.rank else []),
            f"precision.transformer.scales={self.scales}",
            f"precision.transformer.rounding={self.rounding}",
            f"precision.transformer.smoothing={self.smoothing}",
            f"sampling.guidance={self.guidance}",
            f"calibration.max_prompts={self.prompts}",
            f"calibration.steps={self.steps}",
            "targets=[{kind: onnxruntime, compute: exact}, {kind: onnxruntime, activations: nvfp4}]",
            "gates={}",
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=[*PARTS])
    parser.add_argument("--guidance", type=float, nargs="+", default=[1.5, 3.0], help="(default 1.5 3)")
    parser.add_argument("--prompts", type=int, default=CALIBRATED, help=f"calibrated on (default {CALIBRATED})")
    parser.add_argument("--steps", type=int, default=24, help="denoising steps of every image (default 24)")
    parser.add_argument("--work", type=Path, help="a folder for finished variants")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        modelopt.check_available = lambda: None
        modelopt.quantize_transformer = quantize_on_cpu
    with tempfile.TemporaryDirectory() as scratch:
        work = options.work or Path(scratch)
        work.mkdir(parents=True, exist_ok=True)
        write_prompts(work)
        print(f"flux2-nano, 64x64, {options.steps} steps, on {cpu_name()}", flush=True)
        for guidance in options.guidance:
            shared: dict[str, Any] = {"guidance": guidance, "prompts": options.prompts, "steps": options.steps}
            ours = [
                Variant(**shared),
                *(Variant("mse", rounding, rank, **shared) for rank in (0, 16, 32) for rounding in ("nearest", "gptq")),
                Variant("mse", "gptq", 32, ATTENDING, **shared),
            ]
            theirs = [Variant(algorithm=algorithm, **shared) for algorithm in ("max", "awq_lite", "svdquant")]
            smoothed = [replace(one, smoothing="auto") for one in ours if one.rank or one.rounding != "nearest"]
            variants = dict(zip(PARTS, (ours, smoothed, theirs), strict=True))
            print_table([one for part in options.parts for one in variants[part]], work, options.steps)


def print_table(variants: list[Variant], work: Path, steps: int) -> None:
    """One row a variant, as benchmarks/rounding.py has them."""
    measured = [f"{target}: {what}" for target in TARGETS for what in ("velocity", "PSNR", "worst", "oracle", "unlike")]
    columns = ["guidance", "weights", "MB", "output SNR", *measured]
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}", flush=True)
    for variant in variants:
        figures = figures_of(variant, work, steps)
        size = work / f"{variant.name}-bytes.json"
        if not size.exists():
            manifest = json.loads((work / "bundle" / "bundle.json").read_text())
            size.write_text(json.dumps(manifest["files"]["transformer/diffusion_pytorch_model.safetensors"]["size"]))
        snr = figures["output_snr_db"]
        row = [f"{variant.guidance:g}", variant.method, f"{json.loads(size.read_text()) / 1e6:.2f}"]
        row.append("-" if snr is None else f"{snr:.1f}")
        for target in TARGETS:
            of_target = figures[target]
            row += [*summarized(of_target["prompts"][:HELD_OUT]), f"{of_target['oracle']}"]
            row.append(next(summarized(of_target["prompts"][HELD_OUT:])))
        print(f"| {' | '.join(row)} |", flush=True)


def quantize_on_cpu(
    checkpoint: Checkpoint, plan: list[LayerPlan], algorithm: str, prompts: list[str], generation: Generation, out: Path
) -> None:
    """fluxc.calibrate.modelopt.quantize_transformer without a GPU."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization import tensor_quant

    def rounded(x: torch.Tensor, block: int, amax: torch.Tensor, *bits: int) -> torch.Tensor:
        assert (block, bits) == (16, (4, 2, 8, 4))
        return fake_quantize(x, amax.float().amax() / (E2M1_MAX * E4M3_MAX)).to(x.dtype)

    tensor_quant.dynamic_block_quantize_op = rounded
    pipeline = load_pipeline(checkpoint, torch.bfloat16)

    def forward(_: Any) -> None:
        for number, prompt in enumerate(prompts):
            generate(pipeline, checkpoint, prompt, generation.of_prompt(number))

    mtq.quantize(pipeline.transformer, modelopt.quantize_config(plan, algorithm), forward)
    export_hf_checkpoint(pipeline.transformer, export_dir=out)


if __name__ == "__main__":
    main()
