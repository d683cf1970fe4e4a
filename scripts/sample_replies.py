"""Sample replies of the small chat model at several temperatures: raw material for the fluency head
(`train_heads.py`).

    python -m scripts.sample_replies --out samples.jsonl

Each line is `{"temperature": float, "text": str}`. Prompts are the openings and facts of the seed situations.
Cold samples serve as fluent text, hot ones as gibberish. Sampling is seeded; 1,200 replies of 40 tokens take
a few minutes on one core.
"""

from __future__ import annotations

import argparse
import json
import random
from importlib import resources
from pathlib import Path

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlver_dist.bundled_models import SMOLLM2, resolve
from rlver_dist.config.model import ModelConfig

TEMPERATURES = (0.6, 0.8, 1.0, 1.4, 1.8)


def seed_situations() -> list[dict]:
    """All seed situations of the package, in file order."""
    folder = resources.files("rlver_dist.data").joinpath("seeds")
    files = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".yaml")), key=lambda entry: entry.name
    )
    return [situation for entry in files for situation in yaml.safe_load(entry.read_text(encoding="utf-8"))]


def prompts(rng: random.Random, count: int) -> list[list[dict[str, str]]]:
    """`count` chats that wait for a reply: an opening, every second one followed by a plain reply and a
    fact."""
    situations = seed_situations()
    chats = []
    for index in range(count):
        situation = rng.choice(situations)
        chat = [
            {"role": "system", "content": ModelConfig().system_prompt},
            {"role": "user", "content": rng.choice(list(situation["openings"].values()))},
        ]
        if index % 2:
            chat += [
                {"role": "assistant", "content": "Go on, I'm listening."},
                {"role": "user", "content": rng.choice(situation["facts"])},
            ]
        chats.append(chat)
    return chats


def sample(model, tokenizer, chats: list, temperature: float, new_tokens: int) -> list[str]:
    """One reply a chat at `temperature`, cut at `new_tokens` tokens."""
    texts = [
        tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for chat in chats
    ]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    out = model.generate(
        **batch,
        do_sample=True,
        temperature=temperature,
        top_p=1.0,
        top_k=0,
        max_new_tokens=new_tokens,
        pad_token_id=tokenizer.pad_token_id,
    )
    return tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    """Command line: write the samples."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--per-temperature", type=int, default=192)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=44)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    rng = random.Random(0)
    tokenizer = AutoTokenizer.from_pretrained(resolve(SMOLLM2), padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = AutoModelForCausalLM.from_pretrained(resolve(SMOLLM2), dtype=torch.bfloat16).eval()
    with arguments.out.open("w", encoding="utf-8") as file:
        for temperature in TEMPERATURES:
            for _ in range(arguments.per_temperature // arguments.batch):
                for text in sample(
                    model, tokenizer, prompts(rng, arguments.batch), temperature, arguments.tokens
                ):
                    file.write(json.dumps({"temperature": temperature, "text": text}) + "\n")
            print(f"temperature {temperature}: {arguments.per_temperature} samples", flush=True)


if __name__ == "__main__":
    main()
