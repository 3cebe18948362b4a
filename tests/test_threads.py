"""One loaded model under threads, event loops and forks: calls wait for each other, each gives what it gives alone."""

import asyncio
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import AsyncTextIteratorStreamer, StoppingCriteriaList, TextIteratorStreamer

import tiered
from tests.commands import make_store
from tests.waiting import SECONDS, wait_until
from tiered.api import LoadedModel
from tiered.errors import BudgetError, ConfigError
from tiered.host import PROCESS
from tiered.units import MIB

PROMPTS: Final = ("The function returns", "To install the package, run the following", "Returns")


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_store(tmp_path_factory.mktemp("threads"))


@pytest.fixture(scope="module")
def loaded(store: Path) -> Iterator[LoadedModel]:
    with open_model(store) as loaded:
        yield loaded


def open_model(store: Path) -> LoadedModel:
    return tiered.load(store, context=128, sequences=2, threads=1)


def complete(loaded: LoadedModel, prompt: str, count: int = 6, **arguments: Any) -> list[int]:
    inputs = loaded.tokenizer(prompt, return_tensors="pt")
    output = loaded.model.generate(**inputs, max_new_tokens=count, min_new_tokens=count, do_sample=False, **arguments)
    tokens: list[int] = output[0].tolist()
    return tokens


def at_once(*calls: Callable[[], Any]) -> list[Any]:
    """The results of `calls`, each in a thread of its own, all begun together."""
    together = threading.Barrier(len(calls))

    def begin(call: Callable[[], Any]) -> Any:
        together.wait(SECONDS)
        return call()

    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(SECONDS) for future in [pool.submit(begin, call) for call in calls]]


def during_generate(loaded: LoadedModel, call: Callable[[], Any]) -> Future[list[int]]:
    """Have a thread generate, and `call` called in this one while it does."""
    begun, may_go_on = threading.Event(), threading.Event()

    def hold(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        begun.set()
        assert may_go_on.wait(SECONDS)
        return torch.zeros(len(ids), dtype=torch.bool)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(complete, loaded, PROMPTS[0], stopping_criteria=StoppingCriteriaList([hold]))
        try:
            assert begun.wait(SECONDS)
            call()
        finally:
            may_go_on.set()
    return running


def test_threads_that_generate_at_once_get_what_they_get_alone(loaded: LoadedModel) -> None:
    expected = [complete(loaded, prompt) for prompt in PROMPTS]
    for _ in range(2):
        found = at_once(*(lambda prompt=prompt: complete(loaded, prompt) for prompt in PROMPTS))
        assert found == expected


def test_forwards_beside_generate_give_the_same_logits(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    tokens, logits = complete(loaded, PROMPTS[0]), loaded.model(ids).logits

    def forwards() -> list[torch.Tensor]:
        return [loaded.model(ids).logits for _ in range(5)]

    found, one, other = at_once(lambda: complete(loaded, PROMPTS[0]), forwards, forwards)
    assert found == tokens
    assert all(torch.equal(each, logits) for each in (*one, *other))


def test_text_is_streamed_from_a_thread(loaded: LoadedModel) -> None:
    expected = loaded.tokenizer.decode(complete(loaded, PROMPTS[0], 30))
    streamer = TextIteratorStreamer(loaded.tokenizer, timeout=SECONDS)
    thread = threading.Thread(target=complete, args=(loaded, PROMPTS[0], 30), kwargs={"streamer": streamer})
    thread.start()
    assert "".join(streamer) == expected
    thread.join()


def test_coroutines_generate_beside_threads_and_stream(loaded: LoadedModel) -> None:
    expected = [complete(loaded, prompt) for prompt in PROMPTS]

    async def streamed() -> str:
        streamer = AsyncTextIteratorStreamer(loaded.tokenizer, timeout=SECONDS)
        task = asyncio.create_task(asyncio.to_thread(complete, loaded, PROMPTS[0], streamer=streamer))
        text = "".join([piece async for piece in streamer])
        await task
        return text

    async def everything() -> tuple[list[list[int]], list[int], str]:
        tasks = [asyncio.create_task(asyncio.to_thread(complete, loaded, prompt)) for prompt in PROMPTS]
        await asyncio.sleep(0)
        directly = complete(loaded, PROMPTS[0])
        return list(await asyncio.gather(*tasks)), directly, await streamed()

    found, directly, text = asyncio.run(asyncio.wait_for(everything(), SECONDS))
    assert found == expected
    assert directly == expected[0]
    assert text == loaded.tokenizer.decode(expected[0])


def test_what_generate_calls_may_call_the_model(loaded: LoadedModel) -> None:
    ids = loaded.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    expected, logits = complete(loaded, PROMPTS[0]), loaded.model(ids).logits
    inner = []

    def look_elsewhere(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        inner.append(loaded.model(ids).logits)
        inner.append(torch.tensor(complete(loaded, PROMPTS[2], 2)))
        return torch.zeros(len(input_ids), dtype=torch.bool)

    short = torch.tensor(complete(loaded, PROMPTS[2], 2))
    found = complete(loaded, PROMPTS[0], stopping_criteria=StoppingCriteriaList([look_elsewhere]))
    assert found == expected
    assert len(inner) == 12
    assert all(torch.equal(each, logits) for each in inner[::2])
    assert all(torch.equal(each, short) for each in inner[1::2])


def test_a_call_that_waits_for_its_turn_can_be_interrupted(loaded: LoadedModel) -> None:
    expected = complete(loaded, PROMPTS[0])

    class Turns:
        """The lock for turns; whoever is about to wait for it is interrupted."""

        def __enter__(self) -> None:
            threading.Timer(0.05, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
            lock.acquire()

        def __exit__(self, *_: object) -> None:
            lock.release()

    def wait_and_be_interrupted() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(loaded.runtime, "_calls", Turns())
            with pytest.raises(KeyboardInterrupt):
                complete(loaded, PROMPTS[1])

    lock = loaded.runtime._calls
    running = during_generate(loaded, wait_and_be_interrupted)
    assert running.result() == expected
    assert complete(loaded, PROMPTS[0]) == expected


def test_leaving_ends_what_other_threads_run_and_wait_for(store: Path) -> None:
    threads = set(threading.enumerate())
    results: list[Future[list[int]]] = []
    opened: list[LoadedModel] = []

    def stay(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Do not end before the model is closed, however late this thread comes to that."""
        while ids.shape[1] > 95 and opened[0].runtime.is_open:
            time.sleep(0.001)
        return torch.zeros(len(ids), dtype=torch.bool)

    with ThreadPoolExecutor(3) as pool:
        with open_model(store) as loaded:
            opened.append(loaded)
            staying = {"stopping_criteria": StoppingCriteriaList([stay])}
            results = [pool.submit(complete, loaded, prompt, 100, **staying) for prompt in PROMPTS]
            wait_until(lambda: loaded.runtime.passes)
        for result in results:
            # A thread that has not come to its call before finds no model any more.
            with pytest.raises(ConfigError, match=r"closed|not open"):
                result.result(SECONDS)
    assert set(threading.enumerate()) <= threads


def test_leaving_between_two_passes_waits_for_nobody(store: Path) -> None:
    with open_model(store) as loaded:
        running = during_generate(loaded, lambda: loaded.__exit__(None, None, None))
        with pytest.raises(ConfigError, match="the model is closed"):
            running.result()


def test_a_model_is_entered_once_at_a_time(store: Path) -> None:
    loaded = open_model(store)

    def enter() -> bool:
        try:
            loaded.__enter__()
        except ConfigError as error:
            assert "open already" in str(error)
            return False
        return True

    assert sorted(at_once(enter, enter, enter)) == [False, False, True]
    expected = complete(loaded, PROMPTS[0])
    with pytest.raises(ConfigError, match="open already"), loaded:
        pass
    assert complete(loaded, PROMPTS[0]) == expected
    loaded.__exit__(None, None, None)
    loaded.__exit__(None, None, None)
    with pytest.raises(ConfigError, match="not open"):
        _ = loaded.model
    with loaded:
        assert complete(loaded, PROMPTS[0]) == expected


@pytest.mark.parametrize("order", [(0, 1), (1, 0)], ids=["first closed first", "last closed first"])
def test_two_models_are_open_at_once_and_close_in_any_order(store: Path, order: tuple[int, int]) -> None:
    opened = [open_model(store), open_model(store)]
    for loaded in opened:
        loaded.__enter__()
    expected = complete(opened[0], PROMPTS[0])
    assert at_once(*(lambda loaded=loaded: complete(loaded, PROMPTS[0]) for loaded in opened)) == [expected] * 2
    opened[order[0]].__exit__(None, None, None)
    assert complete(opened[order[1]], PROMPTS[0]) == expected
    opened[order[1]].__exit__(None, None, None)


def test_a_second_budget_has_the_first_ones_plan_within_it(store: Path) -> None:
    """The budget bounds the process, and nothing of the first model may have been read when the second is opened."""
    # As if a large model were resident, of which nothing has been read.
    with open_model(store) as first, PROCESS.member() as large:
        large.planned_nbytes = first.runtime.plan.budget + 1000 * MIB
        ram = first.runtime.plan.budget + 900 * MIB
        with pytest.raises(BudgetError) as refused, tiered.load(store, ram=ram, context=64):
            pass
        assert refused.value.smallest_bytes is not None
        assert refused.value.smallest_bytes > large.planned_nbytes
        with tiered.load(store, ram=refused.value.smallest_bytes, context=64) as second:
            assert second.model(torch.tensor([[5]])).logits.shape == (1, 1, 4096)


def in_child(call: Callable[[], Any]) -> str:
    """What `call` raises in a forked child, which must not take long; "" where it raises nothing."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        message = ""
        try:
            call()
        except BaseException as error:
            message = f"{type(error).__name__}: {error}"
        os.write(writing, message.encode()[:4096])
        os._exit(0)
    os.close(writing)
    deadline = time.monotonic() + SECONDS
    while not (ended := os.waitpid(pid, os.WNOHANG)[0]) and time.monotonic() < deadline:
        time.sleep(0.01)
    if not ended:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    with os.fdopen(reading, "rb") as file:
        message = file.read().decode()
    assert ended, "the child hung"
    return message


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_is_told_at_once(loaded: LoadedModel) -> None:
    expected = complete(loaded, PROMPTS[0])
    inputs = loaded.tokenizer(PROMPTS[0], return_tensors="pt")
    calls: dict[str, Callable[[], Any]] = {
        "generate": lambda: loaded.model.generate(**inputs, max_new_tokens=2),
        "forward": lambda: loaded.model(**inputs),
        "enter": loaded.__enter__,
    }

    def all_are_told() -> None:
        for name, call in calls.items():
            assert in_child(call).startswith("ConfigError: the model was opened before this process was forked"), name
        assert in_child(lambda: loaded.__exit__(None, None, None)) == ""

    all_are_told()
    # While another thread has the turn, which in the child nobody would ever give back.
    assert during_generate(loaded, all_are_told).result() == expected
    assert complete(loaded, PROMPTS[0]) == expected


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_may_open_a_model_whatever_its_parent_was_opening(loaded: LoadedModel) -> None:
    def begin() -> None:
        with PROCESS.opening, PROCESS.member():
            assert PROCESS.planned_nbytes == 0

    with PROCESS.opening:
        assert in_child(begin) == ""
    assert PROCESS.planned_nbytes > 0
