"""`PolicyEngine` on a real vLLM engine, against Hugging Face's forward pass of the same weights (tiny model,
float32)."""

import asyncio
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlver_dist.bundled_models import TINY, resolve
from rlver_dist.config.enums import Device, Precision
from rlver_dist.errors import GoneError, WeightSyncError
from rlver_dist.rollout.collector import GenerateRequest
from rlver_dist.rollout.engine import EngineSettings, PolicyEngine
from rlver_dist.rollout.probe import compare_logprobs
from rlver_dist.rollout.renderer import Renderer
from tests.timing import hang_limit

Weights = dict[str, torch.Tensor]


class Served:
    """The engine, an event loop that its tests share, and the model whose weights it should hold."""

    def __init__(self, runner: asyncio.Runner) -> None:
        folder = resolve(TINY)
        self.run = runner.run
        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        renderer = Renderer(tokenizer, "You are kind.")
        self.end_token_id = renderer.end_token_id
        # Longer than one block of the key-value cache (128 tokens on CPUs), so that the prefix cache holds
        # some of it.
        self.prompt_ids = renderer.opening_prompt(
            "Nobody came to my birthday, and I had cooked for ten people. " * 10
        )
        self.version = 0
        self.others = set(psutil.Process().children(recursive=True))
        """Processes of this one that are not the engine's."""
        self.engine = PolicyEngine(
            EngineSettings(
                model_path=folder,
                dtype=Precision.float32,
                device=Device.cpu,
                seed=0,
                max_context_tokens=2048,
                stop_token_ids=(self.end_token_id,),
                kv_cache_gib=0.25,
            )
        )

    def request(self, *, max_tokens: int = 16, temperature: float = 1.0, seed: int = 7) -> GenerateRequest:
        return GenerateRequest(
            dialogue_id="d",
            turn_index=0,
            prompt_ids=self.prompt_ids,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )

    def expected_logprobs(self, token_ids: list[int], temperature: float = 1.0) -> list[float]:
        with torch.no_grad():
            logits = self.model(torch.tensor([token_ids])).logits[0, :-1]
        scores = torch.log_softmax(logits / temperature, dim=-1)
        return scores.gather(1, torch.tensor(token_ids[1:]).unsqueeze(1)).squeeze(1).tolist()

    def perturb(self, seed: int, scale: float = 0.05) -> Weights:
        """Add noise to the model's weights; returns all tensors as a learner sends them, the tied head
        included."""
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for weight in self.model.parameters():
                weight += scale * torch.randn(weight.shape, generator=generator)
        return {name: tensor.clone() for name, tensor in self.model.state_dict().items()}

    async def sync(self, weights: Weights, folder: Path) -> None:
        self.version += 1
        path = folder / f"{self.version}.safetensors"
        save_file(weights, path)
        await self.engine.update_from_file(str(path), self.version)

    def processes(self) -> list[psutil.Process]:
        """Those that the engine has started, but for multiprocessing's own."""
        started = set(psutil.Process().children(recursive=True)) - self.others
        # A zombie has no command line.
        commands = {process: process.as_dict(["cmdline"])["cmdline"] or [] for process in started}
        return [one for one, command in commands.items() if "resource_tracker" not in " ".join(command)]

    async def probe(self) -> None:
        engine = await self.engine.score(self.prompt_ids)
        compare_logprobs(
            self.expected_logprobs(self.prompt_ids),
            engine,
            Precision.float32,
            engine_index=0,
            step=self.version,
        )


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with asyncio.Runner() as runner:
        served = Served(runner)
        runner.run(served.engine.start())
        try:
            yield served
        finally:
            served.engine.close()


def test_seeded_sampling_repeats_bit_for_bit(served: Served) -> None:
    async def sample() -> None:
        alone = await served.engine.generate(served.request())
        crowd = [served.engine.generate(served.request(seed=seed)) for seed in (1, 7, 2)]
        others = await asyncio.gather(*crowd)
        assert others[1] == alone
        assert others[0].token_ids != alone.token_ids
        stats = served.engine.stats()
        assert stats["unfinished"] == 0
        assert stats["reply_tokens"] == 4 * 16
        assert 3 * 128 <= stats["cached_tokens"] < stats["prompt_tokens"] == 4 * len(served.prompt_ids)

    served.run(sample())


def test_seeded_prompts_beyond_one_batch_are_sampled(served: Served) -> None:
    """More prompt tokens at once than the engine takes in a step: a prompt cut in two would end a CPU
    engine."""

    async def flood() -> None:
        prompts = [[first, *served.prompt_ids] for first in range(100, 116)]
        assert sum(map(len, prompts)) > 2048
        requests = [
            dataclasses.replace(served.request(max_tokens=2), prompt_ids=prompt) for prompt in prompts
        ]
        replies = await asyncio.gather(*map(served.engine.generate, requests))
        assert [len(reply.token_ids) for reply in replies] == [2] * 16

    served.run(flood())


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_are_those_of_the_sampling_distribution(served: Served, temperature: float) -> None:
    reply = served.run(served.engine.generate(served.request(temperature=temperature)))
    expected = served.expected_logprobs([*served.prompt_ids, *reply.token_ids], temperature)[
        -len(reply.token_ids) :
    ]
    assert reply.logprobs == pytest.approx(expected, abs=1e-4)
    assert reply.finish_reason == "length" and len(reply.token_ids) == 16


def test_probe_passes_after_an_update_and_versions_are_labelled(served: Served, tmp_path: Path) -> None:
    before = served.run(served.engine.generate(served.request(seed=3)))
    served.run(served.sync(served.perturb(seed=1), tmp_path))
    served.run(served.probe())
    after = served.run(served.engine.generate(served.request(seed=3)))
    assert before.policy_version == (served.version - 1, served.version - 1)
    assert after.policy_version == (served.version, served.version)
    # The prompt was in the prefix cache under the old weights: its keys and values must not be reused.
    expected = served.expected_logprobs([*served.prompt_ids, *after.token_ids])[-len(after.token_ids) :]
    assert after.logprobs == pytest.approx(expected, abs=1e-4)


def test_request_in_flight_goes_on_under_new_weights(served: Served, tmp_path: Path) -> None:
    async def overlap() -> None:
        old = served.version
        running = asyncio.create_task(served.engine.generate(served.request(max_tokens=400, seed=5)))
        # Sampled in the same batch, so once it is done the long reply has begun.
        await served.engine.generate(served.request(max_tokens=4))
        await served.sync(served.perturb(seed=2), tmp_path)
        reply = await running
        assert reply.policy_version == (old, served.version)
        assert len(reply.token_ids) == 400
        expected = served.expected_logprobs([*served.prompt_ids, *reply.token_ids])
        assert reply.logprobs[-50:] == pytest.approx(expected[-50:], abs=1e-4)

    served.run(overlap())


def test_a_reply_that_nobody_waits_for_is_no_longer_sampled(served: Served) -> None:
    async def give_up() -> None:
        running = asyncio.create_task(served.engine.generate(served.request(max_tokens=400, seed=5)))
        await served.engine.generate(served.request(max_tokens=4))
        assert served.engine.stats()["unfinished"] == 1
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        assert served.engine.stats()["unfinished"] == 0
        assert len((await served.engine.generate(served.request(max_tokens=4))).token_ids) == 4

    served.run(give_up())


def test_reply_ends_with_its_end_token(served: Served, tmp_path: Path) -> None:
    """Every token embeds as ones and no layer adds to it, so with a tied head the end token, twice ones, gets
    twice the logit."""
    with torch.no_grad():
        for layer in served.model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        served.model.model.norm.weight.fill_(1.0)
        served.model.model.embed_tokens.weight.fill_(1.0)
        served.model.model.embed_tokens.weight[served.end_token_id] = 2.0
    served.run(served.sync(served.perturb(seed=3, scale=0.0), tmp_path))
    reply = served.run(served.engine.generate(served.request()))
    assert reply.token_ids == [served.end_token_id]
    assert reply.finish_reason == "stop"
    assert reply.logprobs == pytest.approx([0.0], abs=1e-4)


def test_planted_wrong_tensor_is_caught_by_the_probe(served: Served, tmp_path: Path) -> None:
    weights = served.perturb(seed=4)
    weights["model.layers.1.mlp.down_proj.weight"] = weights["model.layers.1.mlp.down_proj.weight"] * 1.05
    served.run(served.sync(weights, tmp_path))
    with pytest.raises(WeightSyncError, match=r"step \d+, engine 0"):
        served.run(served.probe())


def test_omitted_tied_head_is_caught_and_a_full_update_heals(served: Served, tmp_path: Path) -> None:
    weights = served.perturb(seed=5)
    headless = {name: tensor for name, tensor in weights.items() if name != "lm_head.weight"}
    with pytest.raises(WeightSyncError, match="lm_head"):
        served.run(served.sync(headless, tmp_path))
    served.run(served.sync(weights, tmp_path))
    served.run(served.probe())


def test_an_engine_whose_process_died_says_that_it_is_gone(served: Served) -> None:
    """The last test of this file, since nothing brings the process back."""

    async def die() -> None:
        await served.engine.pause()
        waiting = asyncio.create_task(served.engine.generate(served.request()))
        while served.engine.stats()["unfinished"] == 0:
            await asyncio.sleep(0.01)
        processes = served.processes()
        assert processes
        for process in processes:
            process.kill()
        for call in (waiting, served.engine.generate(served.request())):
            with pytest.raises(GoneError, match=r"^vLLM engine: its process died$"):
                await asyncio.wait_for(call, timeout=hang_limit(60))

    served.run(die())
