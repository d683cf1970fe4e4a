"""Train the fluency and the strategy head of the embedded appraiser and write the package's
`heads.safetensors`.

    python -m scripts.sample_replies --out samples.jsonl
    python -m scripts.train_heads --samples samples.jsonl

Fluency: sentences of the seed situations, of `strategy_templates.yaml` and of cold samples of the small chat
model, against corruptions of them (shuffled, dropped, doubled and foreign words, spliced halves, repeated
phrases, heaps of feeling words) and hot samples. Strategy: filled templates; the prototypes serve as its
held-out set, since no template was made from them. Prints the held-out figures. Takes a few minutes on one
core; bit-equality from machine to machine is not promised, hence the shipped file.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file
from torch import nn

from rlver_dist.simulator.rules import heads, penalties
from rlver_dist.simulator.rules.embedding import SentenceEncoder
from rlver_dist.simulator.rules.strategies import load_prototypes
from rlver_dist.simulator.sentences import sentences
from rlver_dist.simulator.strategy import Strategy
from scripts.sample_replies import seed_situations

HERE = Path(__file__).parent
NONE = len(Strategy)
"""Class of a sentence that uses no strategy."""
COLD, HOT = 1.0, 1.4
"""Samples up to COLD count as fluent, from HOT as gibberish."""


@dataclass(kw_only=True, slots=True)
class Labelled:
    """A sentence with its label, kept out of training where `held_out`."""

    text: str
    label: int
    held_out: bool
    source: str


def fill(template: str, slots: dict[str, list[str]], rng: random.Random) -> str:
    """The template with every slot filled anew, and a capital in front."""
    text = re.sub(r"\{(\w+)\}", lambda match: rng.choice(slots[match.group(1)]), template)
    return text[0].upper() + text[1:]


def strategy_sentences(rng: random.Random, fills: int) -> list[Labelled]:
    """Filled templates for training, prototypes held out."""
    material = yaml.safe_load((HERE / "strategy_templates.yaml").read_text(encoding="utf-8"))
    slots = material.pop("slots")
    names = [strategy.value for strategy in Strategy] + ["none"]
    found = []
    for name, templates in material.items():
        for template in templates:
            texts = {fill(template, slots, rng) for _ in range(fills if "{" in template else 1)}
            found += [
                Labelled(text=text, label=names.index(name), held_out=False, source="template")
                for text in sorted(texts)
            ]
    for strategy, lines in load_prototypes().items():
        found += [
            Labelled(text=line, label=names.index(strategy.value), held_out=True, source="prototype")
            for line in lines
        ]
    return found


def situation_texts(situation: dict) -> list[str]:
    """All prose of one seed situation."""
    prose = [situation["cause"], situation["now"], situation["hides"]]
    for key in ("timeline", "people", "failed", "facts"):
        prose += situation[key]
    return [*prose, *situation["wants"].values(), *situation["openings"].values()]


def corrupt(text: str, other: str, vocabulary: list[str], rng: random.Random) -> tuple[str, str]:
    """(kind, corrupted text)."""
    tokens, strange = text.split(), other.split()
    kind = rng.choice(
        ["shuffle", "shuffle", "swaps", "drop", "foreign", "double", "splice", "phrase", "salad", "mixed"]
    )
    if kind == "shuffle":
        rng.shuffle(tokens)
    elif kind == "swaps":
        for _ in range(max(2, len(tokens) // 3)):
            i = rng.randrange(len(tokens) - 1)
            tokens[i], tokens[i + 1] = tokens[i + 1], tokens[i]
    elif kind == "drop":
        tokens = [token for token in tokens if rng.random() > 0.4] or tokens[:2]
    elif kind == "foreign":
        tokens = [rng.choice(vocabulary) if rng.random() < 0.35 else token for token in tokens]
    elif kind == "double":
        tokens = [piece for token in tokens for piece in [token] * (3 if rng.random() < 0.3 else 1)]
    elif kind == "splice":
        cut = rng.randrange(2, len(tokens) - 1)
        pieces = [tokens[cut:], strange[: len(strange) // 2], tokens[: cut // 2]]
        tokens = [token for piece in pieces for token in piece]
    elif kind == "phrase":
        start = rng.randrange(len(tokens) - 2)
        tokens = tokens[: start + 3] + tokens[start : start + 3] * rng.randrange(2, 5)
    elif kind == "salad":
        tokens = rng.choices(sorted(penalties.FEELING_WORDS), k=rng.randrange(4, 14))
        tokens += rng.choices([*tokens, "you", "so", "and", "I", "your", "very"], k=len(tokens) // 2)
        rng.shuffle(tokens)
    else:
        tokens = tokens + strange
        rng.shuffle(tokens)
    return kind, " ".join(tokens)


def fluency_sentences(rng: random.Random, samples: list[dict], filled: list[Labelled]) -> list[Labelled]:
    """Label 1 for fluent sentences, 0 for corrupted and hot ones; a fifth of situations, samples and
    templates is held out."""
    fluent: list[Labelled] = []
    for situation in seed_situations():
        held_out = rng.random() < 0.2
        parts = [part for text in situation_texts(situation) for part in sentences(text)]
        fluent += [Labelled(text=part, label=1, held_out=held_out, source="seed") for part in parts]
    fluent += [
        Labelled(text=one.text, label=1, held_out=rng.random() < 0.2, source="template")
        for one in rng.sample(filled, 1500)
    ]
    broken: list[Labelled] = []
    for sample in samples:
        held_out = rng.random() < 0.2
        cold = sample["temperature"] <= COLD
        # A cold sample's last sentence is mostly cut at the token limit; that is no fault of its language.
        parts = sentences(sample["text"])
        source = f"sample T={sample['temperature']}"
        target = fluent if cold else broken if sample["temperature"] >= HOT else None
        if target is not None:
            target += [
                Labelled(text=part, label=int(cold), held_out=held_out, source=source)
                for part in parts
                if len(part.split()) >= 3
            ]
    for one in rng.sample(fluent, len(fluent) // 8):
        tokens = one.text.split()
        if len(tokens) >= 10:
            text = " ".join(tokens[: rng.randrange(5, len(tokens))])
            fluent.append(Labelled(text=text, label=1, held_out=one.held_out, source="cut"))
    vocabulary = sorted({word for one in fluent for word in one.text.split()})
    for one in fluent:
        if len(one.text.split()) >= 5:
            kind, text = corrupt(one.text, rng.choice(fluent).text, vocabulary, rng)
            broken.append(Labelled(text=text, label=0, held_out=one.held_out, source=kind))
    return fluent + broken


def encode_all(encoder: SentenceEncoder, items: list[Labelled]) -> list[torch.Tensor]:
    """Token states `[T, STATE_DIM]` of each sentence, float16 to save memory."""
    return [encoder.encode(one.text).states.half() for one in items]


def padded(states: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """`[B, T, D]` float32 states and `[B, T]` mask."""
    batch = nn.utils.rnn.pad_sequence([one.float() for one in states], batch_first=True)
    mask = torch.zeros(batch.shape[:2])
    for row, one in enumerate(states):
        mask[row, : len(one)] = 1.0
    return batch, mask


def train_binary(head: nn.Module, states: list[torch.Tensor], labels: torch.Tensor, epochs: int) -> None:
    """AdamW over shuffled batches of 64 with dropout of 0.2 on the states; learning rate 1e-3 falling to
    0."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.05)
    steps = epochs * ((len(states) + 63) // 64)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(states)).split(64):
            batch, mask = padded([states[row] for row in rows])
            output = head(nn.functional.dropout(batch, 0.2), mask)
            loss = nn.functional.binary_cross_entropy_with_logits(output, labels[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def logits(head: nn.Module, states: list[torch.Tensor]) -> torch.Tensor:
    """The head's output for every sentence."""
    with torch.inference_mode():
        return torch.cat([head(*padded(states[start : start + 64])) for start in range(0, len(states), 64)])


def auc(positive: torch.Tensor, negative: torch.Tensor) -> float:
    """Area under the ROC curve: probability that a positive outranks a negative."""
    return float((positive[:, None] > negative[None]).float().mean())


def train_fluency(encoder: SentenceEncoder, items: list[Labelled]) -> heads.FluencyHead:
    """Train on the items not held out; print the held-out AUC and, per source, the mean probability of being
    fluent."""
    states = encode_all(encoder, items)
    kept = [i for i, one in enumerate(items) if not one.held_out]
    head = heads.FluencyHead()
    labels = torch.tensor([float(items[i].label) for i in kept])
    train_binary(head, [states[i] for i in kept], labels, epochs=8)
    held = [i for i, one in enumerate(items) if one.held_out]
    scores = logits(head, [states[i] for i in held])
    truth = torch.tensor([items[i].label for i in held]) == 1
    print(
        f"fluency: {len(kept)} training, {len(held)} held-out sentences, held-out AUC "
        f"{auc(scores[truth], scores[~truth]):.4f}"
    )
    for source in sorted({items[i].source for i in held}):
        for label in (1, 0):
            rows = [
                row for row, i in enumerate(held) if items[i].source == source and items[i].label == label
            ]
            if rows:
                chances = scores[rows].sigmoid()
                passed = (chances >= 0.5).float().mean()
                print(
                    f"  {source:14s} label {label}: n={len(rows):4d} mean {chances.mean():.3f} share>=0.5 "
                    f"{passed:.3f}"
                )
    return head


def train_strategy(encoder: SentenceEncoder, items: list[Labelled]) -> heads.StrategyHead:
    """Train on the filled templates; print accuracy on the prototypes.

    AdamW on standardised mean states with dropout of 0.5; the standardisation is folded into the weights
    afterwards.
    """
    states = encode_all(encoder, items)
    pooled = torch.stack([one.float().mean(dim=0) for one in states])
    labels = torch.tensor([one.label for one in items])
    kept = torch.tensor([i for i, one in enumerate(items) if not one.held_out])
    mean, scale = pooled[kept].mean(dim=0), pooled[kept].std(dim=0) + 1e-3
    standard = (pooled - mean) / scale
    head = heads.StrategyHead(NONE + 1)
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3, weight_decay=0.2)
    for _ in range(10):
        for rows in kept[torch.randperm(len(kept))].split(64):
            output = head.out(nn.functional.dropout(standard[rows], 0.5))
            loss = nn.functional.cross_entropy(output, labels[rows], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        for group in optimizer.param_groups:
            group["lr"] *= 0.8
    with torch.no_grad():
        head.out.bias -= head.out.weight @ (mean / scale)
        head.out.weight /= scale
    held = [i for i, one in enumerate(items) if one.held_out]
    guess = logits(head, [states[i] for i in held]).argmax(dim=-1)
    truth = torch.tensor([items[i].label for i in held])
    print(
        f"strategy: {len(kept)} training sentences, accuracy on {len(held)} prototypes "
        f"{(guess == truth).float().mean():.3f}"
    )
    for index, strategy in enumerate(Strategy):
        rows = truth == index
        wrong = [
            list(Strategy)[g].value if g < NONE else "none" for g in guess[rows & (guess != truth)].tolist()
        ]
        print(f"  {strategy.value:24s} {(guess[rows] == index).float().mean():.2f} mistaken for {wrong}")
    return head


def main() -> None:
    """Command line: train both heads and write the file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=Path, required=True)
    parser.add_argument(
        "--out", type=Path, default=HERE.parent / "rlver_dist" / "simulator" / "rules" / heads.HEADS_FILE
    )
    arguments = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rng = random.Random(0)
    encoder = SentenceEncoder()
    strategies = strategy_sentences(rng, fills=14)
    strategy = train_strategy(encoder, strategies)
    samples = [json.loads(line) for line in arguments.samples.read_text(encoding="utf-8").splitlines()]
    fluency = train_fluency(
        encoder, fluency_sentences(rng, samples, [one for one in strategies if not one.held_out])
    )
    tensors = {f"fluency.{key}": value.half() for key, value in fluency.state_dict().items()}
    tensors |= {f"strategy.{key}": value.half() for key, value in strategy.state_dict().items()}
    save_file(tensors, arguments.out)
    print(f"{arguments.out}: {arguments.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
