"""The one importer of PEFT: low-rank adapters in the policy, and what its weights are once they are merged.

LoRA (arXiv:2106.09685, section 4.1): a linear layer computes W x + (alpha / rank) B A x, of which only A and
B learn. The learner keeps W, A and B apart; whoever reads its weights sees W + (alpha / rank) B A under W's
own name, as if the whole model had been trained.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from rlver_dist.config.model import LoraConfig

if TYPE_CHECKING:
    from transformers import PreTrainedModel

ADAPTER = "default"
"""PEFT's name of an adapter that was given none."""


@dataclass(kw_only=True, slots=True)
class Weight:
    """A parameter of the model under the name that it had before `add_adapters`, with the adapter that
    belongs to it.

    Attributes:
        name: Hugging Face name.
        base: the parameter, `[out, in]` where it has an adapter.
        down: A, `[rank, in]`; None without an adapter.
        up: B, `[out, rank]`; None without an adapter.
        scaling: alpha / rank.
    """

    name: str
    base: torch.nn.Parameter
    down: torch.nn.Parameter | None = None
    up: torch.nn.Parameter | None = None
    scaling: float = 0.0

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The parameters that `merged` reads."""
        return [parameter for parameter in (self.base, self.down, self.up) if parameter is not None]

    @torch.no_grad()
    def merged(self) -> torch.Tensor:
        """base + scaling * up @ down, summed in float32 and rounded once to the base's dtype; without an
        adapter the base itself.

        Under ZeRO-3 the parameters have to be gathered.

        Returns:
            `[out, in]`; without an adapter of whatever shape the base has.
        """
        if self.down is None or self.up is None:
            return self.base.detach()
        # In bfloat16 a small update would vanish in the base's rounding before it has been added up.
        return torch.addmm(self.base.float(), self.up.float(), self.down.float(), alpha=self.scaling).to(
            self.base.dtype
        )


def add_adapters(model: PreTrainedModel, config: LoraConfig, seed: int) -> None:
    """Freeze `model` and put trainable adapters into it, in place; what it computes stays the same, since B
    starts at zero.

    The adapters have the dtype of the layers they are on. Every A starts from `seed`, the same on every rank,
    since the ranks are copies of one model; torch's generators are untouched.

    Raises:
        ConfigError: `config.target_modules` names what is no linear layer of this model, or is its head.
    """
    import peft

    settings = peft.LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=_targets(model, config))  # type: ignore[arg-type]
    # PEFT draws A from torch's global generator, whose state a run's other draws must not notice.
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        peft.inject_adapter_in_model(settings, model, ADAPTER)


def _targets(model: PreTrainedModel, config: LoraConfig) -> list[str]:
    """Full names of the linear layers that get an adapter. The head is none of them: it can be tied to the
    embeddings."""
    head = model.get_output_embeddings()
    linear = [
        name
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and module is not head
    ]
    chosen = config.targets({name.rpartition(".")[2] for name in linear})
    return [name for name in linear if name.rpartition(".")[2] in chosen]


def named_weights(model: PreTrainedModel) -> list[Weight]:
    """The weights of `model` in its own order, a tied head included; adapters come with the weights they
    belong to."""
    found = []
    # PEFT puts a wrapper in a linear layer's place: `q_proj.weight` becomes `q_proj.base_layer.weight`, with
    # `q_proj.lora_A.default.weight` and `q_proj.lora_B.default.weight` beside it.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        path, adapted, kind = name.partition(".base_layer.")
        if not adapted:
            if not _in_adapter(name):
                found.append(Weight(name=name, base=parameter))
            continue
        weight = Weight(name=f"{path}.{kind}", base=parameter)
        if kind == "weight":
            layer: Any = model.get_submodule(path)
            weight.down = layer.lora_A[ADAPTER].weight
            weight.up = layer.lora_B[ADAPTER].weight
            weight.scaling = layer.scaling[ADAPTER]
        found.append(weight)
    return found


def _in_adapter(name: str) -> bool:
    return ".lora_A." in name or ".lora_B." in name
