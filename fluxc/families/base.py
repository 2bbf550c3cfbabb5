"""What a family is, and which there are."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import Any, Literal

from fluxc.base.errors import CheckpointError
from fluxc.models.flux2_transformer import Flux2Transformer
from fluxc.models.flux2_vae import Flux2VAE
from fluxc.models.qwen3 import Qwen3
from fluxc.models.text_encoder import TextEncoder

FLUX2_SCHEDULE = {
    "use_dynamic_shifting": True,
    "time_shift_type": "exponential",
    "shift_terminal": None,
    "invert_sigmas": False,
    "stochastic_sampling": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "num_train_timesteps": 1000,
}


@dataclass(frozen=True)
class Prompts:
    """How a pipeline makes a conversation of a prompt, and tokens of that.

    The chat template is rendered with `options`, around the text that `system`, "module:NAME", holds, if one is named. Strings
    of `removed` are taken out of a prompt before. `padding` is the side that is filled up. `special_tokens`: whether the
    tokenizer adds those of its own to what was rendered. With `parts` the content of a message is a list of its parts.
    """

    options: dict[str, Any] = field(default_factory=dict)
    system: str | None = None
    removed: tuple[str, ...] = ()
    padding: Literal["left", "right"] = "right"
    special_tokens: bool = True
    parts: bool = False


@dataclass(frozen=True)
class Family:
    """A kind of FLUX.2 pipeline: the models it is composed of, how it reads prompts, its schedule.

    `pipeline_class` is what model_index.json says, `diffusers_class` the pipeline of diffusers that is the reference, by
    default the same. `text_layers` are the hidden states taken, `prompts` is how prompts are read. `schedule` names fluxrt's,
    `scheduler` holds the settings of the checkpoint's scheduler under which that schedule is its own.
    """

    pipeline_class: str
    text_layers: tuple[int, ...]
    prompts: Prompts = field(default_factory=Prompts)
    transformer: type[Flux2Transformer] = Flux2Transformer
    text_encoder: type[TextEncoder] = Qwen3
    vae: type[Flux2VAE] = Flux2VAE
    scheduler_class: str = "FlowMatchEulerDiscreteScheduler"
    schedule: str = "flux2-flow-match"
    scheduler: dict[str, Any] = field(default_factory=lambda: dict(FLUX2_SCHEDULE))
    diffusers_class: str | None = None

    @property
    def reference_class(self) -> str:
        """The class in diffusers that the reference is generated with."""
        return self.diffusers_class or self.pipeline_class

    def classes(self) -> dict[str, str]:
        """The class of every component."""
        return {
            "transformer": self.transformer.class_name,
            "text_encoder": self.text_encoder.class_name,
            "vae": self.vae.class_name,
            "scheduler": self.scheduler_class,
        }

    def fingerprint(self) -> dict[str, Any]:
        """What a stage's key takes of it: every field, of models the name of their class."""
        values = {found.name: getattr(self, found.name) for found in fields(self)} | {"prompts": asdict(self.prompts)}
        return {"classes": self.classes()} | {name: v for name, v in values.items() if not isinstance(v, type)}

    def cfg_batch(self, guidance_embeds: bool, index: dict[str, Any]) -> bool:
        """Whether guidance means two rows a step (conditional and empty prompt) instead of an embedded scale.

        `guidance_embeds`: whether the transformer embeds that scale; `index` is model_index.json.
        """
        return not guidance_embeds and not index.get("is_distilled", False)

    def text_layers_stored(self, layers: int) -> int:
        """How many text-encoder layers a bundle stores, of `layers`: one more than the last whose output is taken.

        transformers applies the final norm to the last entry of `hidden_states`; with exactly the taken layers an unmodified
        loader would return a normed last entry without a word, so one further layer is kept and never run.
        """
        last = self.text_layers[-1]
        if layers <= last:
            raise CheckpointError(
                f"the text encoder has {layers} layers; this family takes the output of layer {last}, "
                f"so it needs at least {last + 1}"
            )
        return last + 1


FAMILIES: dict[str, Family] = {}


def register(family: Family) -> None:
    """Make `family` known under the pipeline class that a checkpoint names."""
    FAMILIES[family.pipeline_class] = family
