"""Which experts should stay in memory? Replays the choices of a mixture's routers on real text under several policies.

    python tools/expert_policies.py MODEL TEXT ... [--prompt 128] [--tokens 384]

MODEL is a Hugging Face folder of a mixture of the family qwen3_moe whose routers are trained (`tools/train_mixture.py`
makes one); each TEXT is a file. A text is one sequence: its first tokens are a prompt, computed in one pass, the others
come one by one, as if they had been generated. The cache goes on from text to text. Prints, as Markdown, the share of
choices that found their expert in memory, over the passes of one token:

- least recently used, and uses that count half as much after so many passes (what `tiered` does, HALF_LIFE);
- fixed: those used most in all other texts, for good;
- Belady: of those in memory, what is not used for longest goes. No policy does better, and none can know it.

Also, how many of a layer's choices its router, given the hidden states of the layer before, would have made already.
"""

import argparse
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from tiered.stream.experts import Slots

SHARES: Final = (1 / 8, 1 / 4, 1 / 2)
HALF_LIVES: Final = (1e-3, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 1e9)


class Step(NamedTuple):
    """What one layer asks for in one pass: experts, and how many tokens have chosen each."""

    layer: int
    uses: dict[int, int]
    is_decode: bool


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("texts", type=Path, nargs="+")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each text that are its prompt")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of each piece of text, prompt and all")
    parser.add_argument("--pieces", type=int, default=24, help="pieces at most, of all texts together")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    tokenizer = Tokenizer.from_file(str(arguments.model / "tokenizer.json"))
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    pieces = list(_pieces(arguments.texts, tokenizer, arguments.tokens))[: arguments.pieces]
    routed = [route(model, ids) for ids in pieces]
    chosen = torch.stack([found.chosen for found in routed])
    layers, experts = chosen.shape[1], model.config.num_experts
    print(f"{len(pieces)} texts of {arguments.tokens} tokens, {layers} layers of {experts} experts, ", end="")
    print(f"{chosen.shape[-1]} chosen; loss {sum(r.loss for r in routed) / len(routed):.2f}")
    again = (chosen[:, :, 1:, :, None] == chosen[:, :, :-1, None, :]).any(-1).float().mean()
    print(f"chosen for the token before too: {again:.0%}; by the next router ahead: ", end="")
    print(f"{torch.stack([found.foreseen for found in routed]).mean():.0%}\n")
    texts = [list(steps(found, arguments.prompt)) for found in chosen]
    print(f"| held | {' | '.join(f'{share:.0%}' for share in SHARES)} |\n|---|{'---|' * len(SHARES)}")
    for half_life in HALF_LIVES:
        name = {1e-3: "least recently used", 1e9: "least often used"}.get(half_life, f"half life {half_life:g}")
        print(f"| {name} | {' | '.join(f'{by_use(texts, n, half_life):.0%}' for n in counts(layers * experts))} |")
    for name, policy in (("fixed", fixed), ("Belady", belady)):
        print(f"| {name} | {' | '.join(f'{policy(texts, n):.0%}' for n in counts(layers * experts))} |")
    return 0


class Routed(NamedTuple):
    """What routers chose for the tokens of a text."""

    chosen: torch.Tensor  # [layers, tokens, k]
    foreseen: (
        torch.Tensor
    )  # [layers - 1]: share of a layer's choices that its router makes of the layer before's states
    loss: float


@torch.no_grad()
def route(model: Any, ids: Sequence[int]) -> Routed:
    """Run the model over `ids` and note its routers' choices."""
    states: list[torch.Tensor] = []
    chosen: list[torch.Tensor] = []
    layers = model.model.layers
    hooks = [
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, a: states.append(a[0])) for layer in layers
    ]
    hooks += [layer.mlp.gate.register_forward_hook(lambda _, __, out: chosen.append(out[2])) for layer in layers]
    try:
        loss = model(input_ids=torch.tensor([ids]), labels=torch.tensor([ids])).loss
    finally:
        for hook in hooks:
            hook.remove()
    foreseen = []
    for layer, before, choice in zip(layers[1:], states, chosen[1:], strict=False):
        guess = layer.mlp.gate(layer.post_attention_layernorm(before).reshape(-1, before.shape[-1]))[2]
        foreseen.append((choice[:, :, None] == guess[:, None, :]).any(-1).float().mean())
    return Routed(torch.stack(chosen), torch.stack(foreseen), float(loss))


def steps(chosen: torch.Tensor, prompt: int) -> Iterator[Step]:
    """The passes over a text, layer by layer: first the prompt's, then one for each token."""
    for start, stop in ((0, prompt), *((at, at + 1) for at in range(prompt, chosen.shape[1]))):
        for layer, choices in enumerate(chosen):
            uses = Counter(choices[start:stop].flatten().tolist())
            yield Step(layer, dict(sorted(uses.items())), stop - start == 1)


def counts(experts: int) -> list[int]:
    return [round(share * experts) for share in SHARES]


def by_use(texts: Sequence[Sequence[Step]], held: int, half_life: float) -> float:
    """The hit rate of `Slots`."""
    slots, number, rate = Slots(held, half_life), 0, _Rate()
    for step in (step for text in texts for step in text):
        number += step.layer == 0
        keys = [(step.layer << 16) + expert for expert in step.uses]
        here = [key in slots for key in keys]
        rate.note(step, sum(here), len(keys))
        for key, uses in zip(keys, step.uses.values(), strict=True):
            slots.note(key, uses, number)
            if key in slots:
                slots.pin(key)
        for key, is_here in zip(keys, here, strict=True):
            if is_here or slots.take(key) is not None:
                slots.unpin(key)
    return rate.value


def fixed(texts: Sequence[Sequence[Step]], held: int) -> float:
    """The hit rate of those used most in all other texts."""
    uses = [Counter[tuple[int, int]]() for _ in texts]
    for count, text in zip(uses, texts, strict=True):
        for step in text:
            count.update({(step.layer, expert): n for expert, n in step.uses.items()})
    every, rate = sum(uses, Counter()), _Rate()
    for count, text in zip(uses, texts, strict=True):
        inside = {key for key, _ in (every - count).most_common(held)}
        for step in text:
            rate.note(step, sum((step.layer, expert) in inside for expert in step.uses), len(step.uses))
    return rate.value


def belady(texts: Sequence[Sequence[Step]], held: int) -> float:
    """The hit rate of throwing out whatever is not used for longest."""
    every = [step for text in texts for step in text]
    following: list[dict[int, int]] = [{} for _ in every]
    last: dict[tuple[int, int], int] = defaultdict(lambda: len(every))
    for at in range(len(every) - 1, -1, -1):
        for expert in every[at].uses:
            following[at][expert] = last[every[at].layer, expert]
            last[every[at].layer, expert] = at
    inside: dict[tuple[int, int], int] = {}
    rate = _Rate()
    for at, step in enumerate(every):
        keys = [(step.layer, expert) for expert in step.uses]
        rate.note(step, sum(key in inside for key in keys), len(keys))
        for key in keys:
            if key not in inside and len(inside) == held:
                others = [other for other in inside if other not in keys] or list(inside)
                del inside[max(others, key=inside.__getitem__)]
            inside[key] = following[at][key[1]]
    return rate.value


class _Rate:
    """Hits among the choices of passes of one token."""

    def __init__(self) -> None:
        self._hits = self._all = 0

    def note(self, step: Step, hits: int, count: int) -> None:
        if step.is_decode:
            self._hits, self._all = self._hits + hits, self._all + count

    @property
    def value(self) -> float:
        return self._hits / max(self._all, 1)


def _pieces(paths: Sequence[Path], tokenizer: Tokenizer, tokens: int) -> Iterator[list[int]]:
    for path in paths:
        ids = [2, *tokenizer.encode(path.read_text(encoding="utf-8"), add_special_tokens=False).ids]
        yield from (ids[start : start + tokens] for start in range(0, len(ids) - tokens + 1, tokens))


if __name__ == "__main__":
    sys.exit(main())
