"""A graph is built without filling parameters that hold nothing; whatever holds something is filled."""

import threading

import torch
from torch.nn import init
from transformers import initialization

from tiered.arch.unfilled import meta_unfilled


def test_real_tensors_are_filled_and_those_that_hold_nothing_are_returned_as_they_are() -> None:
    real, meta = torch.full((4, 4), 7.0), torch.empty(4, 4, device="meta")
    with meta_unfilled():
        assert init.normal_(meta) is meta and initialization.zeros_(meta) is meta
        init.ones_(real[0])
        initialization.zeros_(real[1])
    assert real.tolist() == [[1.0] * 4, [0.0] * 4, [7.0] * 4, [7.0] * 4]


def test_the_functions_come_back_whatever_happens() -> None:
    before = dict(vars(init)), dict(initialization.TORCH_INIT_FUNCTIONS)
    try:
        with meta_unfilled():
            assert init.normal_ is not before[0]["normal_"]
            raise LookupError
    except LookupError:
        pass
    assert (dict(vars(init)), dict(initialization.TORCH_INIT_FUNCTIONS)) == before


def test_other_threads_fill_meanwhile() -> None:
    filled = torch.zeros(3)
    with meta_unfilled():
        thread = threading.Thread(target=init.ones_, args=(filled,))
        thread.start()
        thread.join()
    assert filled.tolist() == [1.0] * 3
