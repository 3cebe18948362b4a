"""States on their way from a device arrive whole, in order, and only while somebody wants them."""

from functools import partial

import pytest
import torch

from tests.late_device import LateDevice
from tiered.cache import KVShape, Outbox, layer_groups
from tiered.device import Lease
from tiered.plan.kv import outbox_nbytes

GROUPS = layer_groups((0,), KVShape(2, 16, 8, "bfloat16"))
Stored = list[tuple[torch.Tensor, torch.Tensor]]


def outbox_of(rows: int) -> tuple[Outbox, LateDevice]:
    """With room for two micro-batches of `rows` tokens."""
    device, nbytes = LateDevice(), outbox_nbytes(GROUPS, rows)
    return Outbox(Lease(device, nbytes, "kv"), torch.empty(nbytes, dtype=torch.uint8)), device


def states(tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    # As a family's code hands them over: [tokens, heads, width], turned round.
    keys, values = (torch.randn(tokens, 2, n, generator=generator).bfloat16().transpose(0, 1) for n in (16, 8))
    return keys, values


def keep(stored: Stored, keys: torch.Tensor, values: torch.Tensor) -> None:
    stored.append((keys.clone(), values.clone()))


def test_states_are_stored_as_they_were_sent_and_in_that_order() -> None:
    outbox, _ = outbox_of(8)
    stored: Stored = []
    sent = [states(tokens, tokens) for tokens in (8, 5)]
    for each in sent:
        outbox.send(*each, torch.bfloat16, partial(keep, stored))
    assert not stored, "nobody has waited yet"
    outbox.flush()
    for found, expected in zip(stored, sent, strict=True):
        assert all(map(torch.equal, found, expected))
    outbox.flush()
    assert len(stored) == len(sent)


def test_what_finds_no_room_waits_for_what_was_sent_before() -> None:
    outbox, device = outbox_of(8)
    stored: Stored = []
    sent = [states(8, seed) for seed in range(5)]
    for each in sent:
        outbox.send(*each, torch.bfloat16, partial(keep, stored))
    assert (len(stored), device.copied_out) == (4, 5)
    outbox.flush()
    for found, expected in zip(stored, sent, strict=True):
        assert all(map(torch.equal, found, expected))


def test_what_a_failed_pass_has_sent_is_waited_for_and_forgotten() -> None:
    outbox, _ = outbox_of(8)
    stored: Stored = []
    outbox.send(*states(8, 0), torch.bfloat16, partial(keep, stored))
    outbox.drop()
    outbox.flush()
    assert not stored
    outbox.send(*states(8, 1), torch.bfloat16, partial(keep, stored))
    outbox.flush()
    assert torch.equal(stored[0][0], states(8, 1)[0])


def test_an_error_of_whoever_stores_leaves_nothing_on_its_way() -> None:
    def fail(keys: torch.Tensor, values: torch.Tensor) -> None:
        raise ValueError("of the test's own")

    outbox, _ = outbox_of(8)
    stored: Stored = []
    outbox.send(*states(8, 0), torch.bfloat16, fail)
    outbox.send(*states(8, 1), torch.bfloat16, partial(keep, stored))
    with pytest.raises(ValueError, match="of the test's own"):
        outbox.flush()
    outbox.flush()
    assert not stored
