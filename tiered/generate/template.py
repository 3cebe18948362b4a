"""Chat templates, which are programs that came with a model: rendered within limits of time, memory and length.

In: a tokenizer and messages. Out: the text that its template makes of them, or `TemplateRefused`. `tiered generate
--chat` and `jobs/prompts.py` call it.

A single operator (`'a' * 10**10`, `10**10**9`) can take all memory or never end, inside one call that nothing in its
own process can interrupt; only a process of its own can be bounded. Starting one takes some 100 ms with its imports,
forking one a few, so a helper process is forked, renders what is asked within a second, and ends: if it stayed, it
would keep a copy of every page that this process changes. It shares all other pages, and may take `_NBYTES` more.
"""

import contextlib
import gc
import json
import os
import resource
import signal
import time
import warnings
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NoReturn, Self

from transformers import PreTrainedTokenizerBase

from tiered.errors import shortened
from tiered.process import interrupts_later
from tiered.units import MIB, format_size

_SECONDS: Final = 10.0
"""For one conversation. Real templates take milliseconds."""
_NBYTES: Final = 256 * MIB
_LENGTH: Final = 32 * MIB
"""Characters of a rendered conversation."""
_LIFE_SECONDS: Final = 1.0
_IDLE_SECONDS: Final = 5.0
"""After which a helper that is asked nothing more ends by itself."""

Messages = Sequence[Mapping[str, str]]


class TemplateRefused(Exception):
    """The template raised an error, or went beyond a limit; the text says which."""


class ChatTemplate:
    """Renders conversations with the chat template of `tokenizer`, which must have one, until it is closed."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seconds: float = _SECONDS) -> None:
        self._tokenizer, self._seconds = tokenizer, seconds
        self._helper: _Helper | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._close()

    def render(self, messages: Messages) -> str:
        """The text of `messages` and of what begins an answer; raises TemplateRefused."""
        if self._helper is not None and not self._helper.is_young:
            self._close()
        question = json.dumps(messages).encode()
        answer = None
        # A helper ends by itself when it is idle for a while. If one has ended, a new one shows whether that was why.
        for is_new in (self._helper is None, True):
            self._helper = self._helper or _Helper(self._tokenizer)
            try:
                answer = self._helper.ask(question, self._seconds)
            except TimeoutError:
                self._close()
                raise TemplateRefused(f"it takes more than {self._seconds:g} s for one conversation") from None
            except OSError:
                self._close()
            if answer is not None or is_new:
                break
        if answer is None:
            raise TemplateRefused(f"it takes more than {format_size(_NBYTES)} of memory for one conversation")
        value = json.loads(answer)
        if "text" not in value:
            raise TemplateRefused(value["refused"])
        return str(value["text"])

    def _close(self) -> None:
        if self._helper is not None:
            self._helper.close()
        self._helper = None


class _Helper:
    """A forked process that renders until it is closed, or asked nothing for a while."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        ours, theirs = Pipe()
        self._ends_at = time.monotonic() + _LIFE_SECONDS
        # Raised in a function that Python itself calls around a fork, a KeyboardInterrupt is swallowed, and a lock
        # that the function holds (logging's) stays locked for ever.
        with interrupts_later(), warnings.catch_warnings():
            # Forking beside threads is safe for a child that takes none of their locks.
            warnings.simplefilter("ignore", DeprecationWarning)
            self._pid = os.fork()
            if self._pid == 0:
                _serve(theirs, tokenizer)
        theirs.close()
        self._connection = ours

    @property
    def is_young(self) -> bool:
        return time.monotonic() < self._ends_at

    def ask(self, question: bytes, seconds: float) -> bytes | None:
        """The answer; None where the helper ends without one. Raises TimeoutError, or OSError if it was gone before."""
        self._connection.send_bytes(question)
        if not self._connection.poll(seconds):
            raise TimeoutError
        try:
            return self._connection.recv_bytes(8 * _LENGTH)
        except EOFError:
            return None

    def close(self) -> None:
        """End it, whatever it is doing."""
        self._connection.close()
        # Where SIGCHLD is ignored, it may be gone already, and nobody has to wait for it.
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(self._pid, signal.SIGKILL)
            os.waitpid(self._pid, 0)


def _serve(connection: Connection, tokenizer: PreTrainedTokenizerBase) -> NoReturn:
    """In the helper: answer until nobody asks any more. Touches nothing that belongs to the other process."""
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the other process ends this one
        gc.disable()
        _let_go_of_files(connection.fileno())
        _limit_self()
        while connection.poll(_IDLE_SECONDS):
            connection.send_bytes(json.dumps(_answer(connection.recv_bytes(), tokenizer)).encode())
    except BaseException:
        os._exit(1)
    os._exit(0)


def _let_go_of_files(keep: int) -> None:
    """Close the other process's files: its lock on results would outlast it, and readers of its output would wait."""
    for path in list(Path("/proc/self/fd").iterdir()):
        if (fd := int(path.name)) > 2 and fd != keep:
            with contextlib.suppress(OSError):
                os.close(fd)
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in range(3):
        os.dup2(nowhere, fd)


def _limit_self() -> None:
    used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + _NBYTES,) * 2)
    # Ends it even where no other process is left to do so.
    seconds = int(_LIFE_SECONDS + _SECONDS) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with contextlib.suppress(OSError):
        # If memory runs out all the same, the kernel kills this process first.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")


def _answer(question: bytes, tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    try:
        text: Any = tokenizer.apply_chat_template(json.loads(question), add_generation_prompt=True, tokenize=False)
        if len(text) > _LENGTH:
            return {"refused": f"it makes {len(text):,} characters of one conversation, expected at most {_LENGTH:,}"}
        text.encode()
        return {"text": text}
    except MemoryError:
        return {"refused": f"it takes more than {format_size(_NBYTES)} of memory for one conversation"}
    except BaseException as error:
        # Templates may raise anything, most often for an order of roles they do not know. Panics are no Exceptions.
        return {"refused": shortened(error)}
