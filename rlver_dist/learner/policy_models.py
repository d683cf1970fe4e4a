"""What a policy learner computes with: the engine around the policy, and frozen replicas of it or of the base
model."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from rlver_dist.bundled_models import resolve
from rlver_dist.config.algorithm import AlgorithmConfig
from rlver_dist.config.learner import LearnerConfig
from rlver_dist.config.model import ModelConfig
from rlver_dist.learner.engine import TrainingEngine, deepspeed_config, sharded_construction
from rlver_dist.learner.lora import add_adapters
from rlver_dist.learner.rank import RankPlace
from rlver_dist.learner.scoring import PolicyModel, load_model

Weights = dict[str, Tensor]
"""Whole tensors under their Hugging Face names."""


@dataclass(kw_only=True, slots=True, frozen=True)
class PolicySettings:
    """What a policy learner is built from.

    Attributes:
        model: the policy, with its adapters.
        algorithm: losses, KL and optimizer steps of an iteration.
        learner: the learner's own options.
        temperature: of the sampling; log-probs are taken at it unless said otherwise.
        seed: of the adapters' initialisation.
        warm_start: folder of a warmed-up policy to start from, which then is the reference too; None starts
            from `model.path`.
    """

    model: ModelConfig
    algorithm: AlgorithmConfig
    learner: LearnerConfig
    temperature: float
    seed: int
    warm_start: str | None = None


class PolicyModels:
    """Loads the models of one rank; holds none of them."""

    def __init__(self, settings: PolicySettings, place: RankPlace) -> None:
        self._settings = settings
        self._place = place

    @property
    def _dtype(self) -> torch.dtype:
        return getattr(torch, self._settings.model.dtype.value)

    @property
    def base_path(self) -> str:
        """Folder or hub id of the base model."""
        return resolve(self._settings.model.path)

    @property
    def start_path(self) -> str:
        """Folder or hub id of the policy that training starts from."""
        return self._settings.warm_start or self.base_path

    def engine(
        self, config: LearnerConfig, replacement: Weights | None = None, decay_steps: int | None = None
    ) -> TrainingEngine:
        """An engine with a fresh optimizer around the model of `start_path`; collective.

        Args:
            config: of the optimizer and ZeRO.
            replacement: weights in place of that model's own; None keeps those.
            decay_steps: steps over which the learning rate falls to 0; None keeps it.
        """
        settings = deepspeed_config(config, self._settings.model.dtype)
        # Replacements go into a whole model, which DeepSpeed shards afterwards.
        with sharded_construction(settings) if replacement is None else nullcontext():
            model = load_model(self.start_path, self._dtype)
        if replacement is not None:
            model.load_state_dict(replacement)
        # After the weights, whose names change with the wrappers that adapters put around layers.
        if self._settings.model.lora.rank > 0:
            add_adapters(model, self._settings.model.lora, self._settings.seed)
        policy = PolicyModel(model, recompute=config.gradient_checkpointing)
        return TrainingEngine(
            policy,
            config=config,
            settings=settings,
            world_size=self._place.world_size,
            decay_steps=decay_steps,
        )

    def frozen(self, path: str, replacement: Weights | None = None) -> PolicyModel:
        """A whole, frozen replica of the model at `path`, or of `replacement` in its shape, on the rank's
        device."""
        model = load_model(path, self._dtype)
        if replacement is not None:
            model.load_state_dict(replacement)
        return PolicyModel(model, recompute=False).requires_grad_(False).eval().to(self._place.torch_device)
