"""Stands in for the hub: serves an OPT model of any size whose files are made when they are fetched.

    python -m tools.hub_stand_in configs/models/opt-30b.toml [--layers N] [--shard-size 10GB] [--port 8765]
    HF_ENDPOINT=http://127.0.0.1:8765 HF_HOME=EMPTY tiered convert someone/opt-30b --delete-downloads -o OUT

It answers what huggingface_hub asks to download one revision of one repository, and runs until Ctrl-C.
"""

import argparse
import json
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final

from tiered.convert.synthetic import ShapeFile
from tiered.errors import TieredError
from tiered.units import parse_size
from tools.made_checkpoint import MOST_READ_NBYTES, MadeFile, MadeModel

_RANGE: Final = re.compile(r"bytes=(\d+)-(\d+)")
COMMIT: Final = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """A server of one repository with one commit, on this machine."""

    def __init__(self, repo_id: str, files: Mapping[str, MadeFile], port: int = 0) -> None:
        """With `port` 0 on any that is free."""
        super().__init__(("127.0.0.1", port), _Handler)
        self.repo_id, self.files = repo_id, files
        self.fetched: list[str] = []
        """Files that were asked for whole."""
        self.ranges: list[tuple[str, int]] = []
        """Files of which a part was asked for, and its bytes."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        answer = self._answer()
        if answer is None:
            return
        file, asked = answer
        for offset in range(asked.start, asked.stop, MOST_READ_NBYTES):
            self.wfile.write(file.read(offset, min(MOST_READ_NBYTES, asked.stop - offset)))

    def log_message(self, *_: object) -> None:
        """Nobody reads an access log."""

    def _answer(self) -> tuple[MadeFile, range] | None:
        """Send the status and headers; what is to follow them, and which of its bytes."""
        path, hub = self.path.split("?")[0], self.server
        api = f"/api/models/{hub.repo_id}"
        files = f"/{hub.repo_id}/resolve/"
        name = path.removeprefix(files).partition("/")[2] if path.startswith(files) else ""  # after the revision
        headers = {"X-Repo-Commit": COMMIT}
        if path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name, "size": file.nbytes} for name, file in hub.files.items()]
            info = {"id": hub.repo_id, "modelId": hub.repo_id, "sha": COMMIT, "siblings": siblings}
            file = MadeFile.of(json.dumps(info).encode())
            headers |= {"Content-Type": "application/json"}
        elif name in hub.files:
            file = hub.files[name]
            # Of the published ones it is a checksum; the library only keeps files apart by it.
            headers |= {"ETag": f'"{name}-{file.nbytes}"'}
            if self.command == "GET" and "Range" not in self.headers:
                hub.fetched.append(name)
        else:
            self._send(404, {"X-Error-Code": "EntryNotFound" if name else "RepoNotFound"})
            return None
        asked = _RANGE.fullmatch(self.headers.get("Range", ""))
        if asked is not None and not int(asked[1]) <= min(int(asked[2]), file.nbytes - 1):
            self._send(416, {"Content-Range": f"bytes */{file.nbytes}"})
            return None
        sent = range(file.nbytes)
        if asked is not None:
            sent = range(int(asked[1]), min(file.nbytes, int(asked[2]) + 1))
            headers |= {"Content-Range": f"bytes {sent.start}-{sent.stop - 1}/{file.nbytes}"}
            hub.ranges.append((name, len(sent)))
        self._send(200 if asked is None else 206, headers, len(sent))
        return file, sent

    def _send(self, status: int, headers: Mapping[str, str], nbytes: int = 0) -> None:
        """The status and headers of an answer whose body has `nbytes` bytes."""
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(nbytes)}.items():
            self.send_header(key, value)
        self.end_headers()


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.hub_stand_in", description="Serves a model as the hub does.")
    parser.add_argument("shape", type=Path, help="a toml file of an OPT's shape, such as configs/models/opt-30b.toml")
    parser.add_argument("--layers", type=int, help="as many instead of the shape's")
    parser.add_argument("--shard-size", default="10GB", help="of safetensors files, at most (default: 10GB)")
    parser.add_argument("--port", type=int, default=8765)
    options = parser.parse_args(arguments)
    try:
        shape = ShapeFile.read(options.shape)
        files = MadeModel.of_shape(shape, options.layers).huggingface(parse_size(options.shard_size))
    except TieredError as error:
        print(f"hub_stand_in: error: {error}", file=sys.stderr)
        return error.exit_code
    for number in (signal.SIGTERM, signal.SIGINT):  # the second is ignored where a script starts this with &
        signal.signal(number, signal.default_int_handler)
    with Hub(f"someone/{shape.name}", files, options.port) as hub:
        print(f"HF_ENDPOINT={hub.url} serves {hub.repo_id}; Ctrl-C ends this", flush=True)
        try:
            hub.serve_forever()
        except KeyboardInterrupt:
            print(f"fetched: {', '.join(hub.fetched)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
