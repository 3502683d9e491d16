"""A stand-in for the wandb server: enough of its protocol to start, resume, feed and finish runs, on
loopback.

Written from the observed behaviour of the 0.31 client (what it asks and what it needs answered); it says
nothing of the vendor's server. Lines of a run's files are kept by their offset, so a repeated transmission
overwrites itself, as the client expects. `WandbServer.history` is what a person would see: the rows as they
lie on the server.

    with WandbServer() as server:
        environment = server.environment(tmp_path)     # for a process that uses wandb
        ...
        rows = server.history("project", "run-id")
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any

ENTITY = "lab"
HISTORY = "wandb-history.jsonl"


@dataclass
class RemoteRun:
    """One run as the server knows it. `files`: name -> {line number: line}."""

    config: str = "{}"
    started: bool = False
    complete: bool = False
    preempting: bool = False
    exit_code: int | None = None
    files: dict[str, dict[int, str]] = field(default_factory=dict)

    def lines(self, name: str) -> list[str]:
        """Lines of a file in order; a hole in the numbering shows as a missing line number, see `holes`."""
        return [line for _, line in sorted(self.files.get(name, {}).items())]

    def count(self, name: str) -> int:
        """Length of a file in lines, holes included."""
        return max(self.files.get(name, {}), default=-1) + 1

    def holes(self, name: str) -> int:
        """Line numbers that were never sent."""
        return self.count(name) - len(self.files.get(name, {}))

    def last(self, name: str) -> list[str]:
        """The last line of a file as a list of one, or nothing."""
        return self.lines(name)[-1:]


class WandbServer:
    """Context manager: the server of one test. `available = False` makes it answer 503 to everything,
    `takes_files = False` to uploads of files alone."""

    def __init__(self) -> None:
        self.runs: dict[tuple[str, str], RemoteRun] = {}
        self.operations: list[str] = []
        self.uploads: list[str] = []  # names of files sent, as in run-id/media/images/preview_0_HASH.png
        self.available = True
        self.takes_files = True
        self.lock = threading.RLock()
        self._answers: dict[str, Callable[[dict[str, Any]], dict[str, Any]]] = {
            "Viewer": self._viewer,
            "ServerFeaturesQuery": lambda variables: {"serverInfo": {"features": []}},
            "RunResumeStatus": self._resume_status,
            "UpsertBucket": self._upsert,
            "CreateRunFiles": self._create_files,
        }

    def __enter__(self) -> WandbServer:
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler_class())
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.05})
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def environment(self, folder: Path) -> dict[str, str]:
        """Variables that make a wandb client talk to this server alone and keep its own files in `folder`."""
        return {
            "WANDB_BASE_URL": f"http://127.0.0.1:{self.port}",
            "WANDB_API_KEY": "0" * 40,
            "WANDB_ERROR_REPORTING": "false",
            "WANDB_CONFIG_DIR": str(folder / "wandb-config"),
            "WANDB_CACHE_DIR": str(folder / "wandb-cache"),
            "WANDB_DATA_DIR": str(folder / "wandb-data"),
        }

    def history(self, project: str, run_id: str) -> list[dict[str, Any]]:
        """The rows of a run in order; none for a run that does not exist. A hole in the numbering is an
        error.
        """
        with self.lock:
            run = self.runs.get((project, run_id), RemoteRun())
            assert run.holes(HISTORY) == 0, f"{run.holes(HISTORY)} lines of the history were never sent"
            return [json.loads(line) for line in run.lines(HISTORY)]

    def lost_pictures(self, project: str, run_id: str) -> list[str]:
        """Names of pictures that rows speak of and that never arrived."""
        with self.lock:
            arrived = {name.removeprefix(f"{run_id}/") for name in self.uploads}
        found = []
        for row in self.history(project, run_id):
            for value in row.values():
                if isinstance(value, dict) and str(value.get("_type", "")).startswith("images"):
                    found += [name for name in value["filenames"] if name not in arrived]
        return found

    # ---- what the client asks

    def _run(self, variables: dict[str, Any]) -> tuple[str, str, RemoteRun]:
        project = variables.get("project") or "uncategorized"
        run_id = variables.get("name") or variables.get("run")
        assert isinstance(run_id, str)
        return project, run_id, self.runs.setdefault((project, run_id), RemoteRun())

    def _bucket(self, project: str, run_id: str, run: RemoteRun) -> dict[str, Any]:
        return {
            "id": f"remote-{run_id}",
            "name": run_id,
            "displayName": run_id,
            "config": run.config,
            "sweepName": None,
            "project": {"id": "p", "name": project, "entity": {"id": "e", "name": ENTITY}},
            "historyLineCount": run.count(HISTORY),
        }

    def _viewer(self, variables: dict[str, Any]) -> dict[str, Any]:
        person = {"id": "u", "entity": ENTITY, "username": ENTITY, "email": "u@lab", "flags": "{}"}
        return {"viewer": {**person, "teams": {"edges": []}}}

    def _resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        project, run_id, run = self._run(variables)
        bucket: dict[str, Any] | None = None
        if run.started:
            bucket = self._bucket(project, run_id, run)
            bucket |= {
                "wandbConfig": json.dumps({"t": 1}),  # without the key "t" the client takes the run for a new one
                "summaryMetrics": (run.last("wandb-summary.json") or ["{}"])[0],
                "historyTail": json.dumps(run.last(HISTORY)),
                "eventsTail": json.dumps(run.last("wandb-events.jsonl")),
                "eventsLineCount": run.count("wandb-events.jsonl"),
                "logLineCount": run.count("output.log"),
                "tags": [],
                "notes": None,
            }
        entity = {"id": "e", "name": ENTITY}
        return {"model": {"id": "p", "name": project, "entity": entity, "bucket": bucket}}

    def _upsert(self, variables: dict[str, Any]) -> dict[str, Any]:
        project, run_id, run = self._run(variables)
        inserted, run.started = not run.started, True
        run.config = variables.get("config") or run.config
        return {"upsertBucket": {"bucket": self._bucket(project, run_id, run), "inserted": inserted}}

    def _create_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        _, run_id, _ = self._run(variables)
        address = f"http://127.0.0.1:{self.port}/upload/{run_id}/"
        files = [{"name": name, "uploadUrl": address + name} for name in variables["files"]]
        return {"createRunFiles": {"runID": run_id, "uploadHeaders": [], "files": files}}

    def graphql(self, question: dict[str, Any]) -> dict[str, Any]:
        """Answer one GraphQL request; unknown operations get an error, which the client tolerates where it
        may.
        """
        match = re.search(r"(?:query|mutation)\s+(\w+)", question["query"])
        operation = match[1] if match else ""
        with self.lock:
            self.operations.append(operation)
            if operation not in self._answers:
                return {"data": None, "errors": [{"message": f"{operation} is not known here"}]}
            return {"data": self._answers[operation](question.get("variables") or {})}

    def file_stream(self, project: str, run_id: str, body: dict[str, Any]) -> None:
        """Take lines of a run's files, each at its offset, and the run's end."""
        with self.lock:
            run = self.runs.setdefault((project, run_id), RemoteRun())
            for name, chunk in (body.get("files") or {}).items():
                numbered = enumerate(chunk["content"], start=chunk["offset"])
                run.files.setdefault(name, {}).update(numbered)
            run.preempting = run.preempting or bool(body.get("preempting"))
            run.complete = bool(body.get("complete"))
            run.exit_code = body.get("exitcode") if run.complete else None

    def _handler_class(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _body(self) -> bytes:
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def _reply(self, answer: dict[str, Any], taken: bool = True) -> None:
                content = json.dumps(answer).encode()
                self.send_response(200 if server.available and taken else 503)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def do_POST(self) -> None:
                body, parts = self._body(), self.path.strip("/").split("/")
                if not server.available:
                    self._reply({})
                elif parts == ["graphql"]:
                    self._reply(server.graphql(json.loads(body)))
                else:  # files/ENTITY/PROJECT/RUN/file_stream
                    server.file_stream(parts[2], parts[3], json.loads(body))
                    self._reply({})

            def do_PUT(self) -> None:
                body = self._body()
                taken = server.takes_files
                if server.available and taken and body:
                    with server.lock:
                        server.uploads.append(self.path.removeprefix("/upload/"))
                self._reply({}, taken)

            def log_message(self, format: str, *args: Any) -> None:
                pass

            def handle(self) -> None:
                try:
                    super().handle()
                except ConnectionError:
                    pass  # a client that was killed: what these tests do for a living

        return Handler
