"""Every reply, kept: an SQLite file of calls by the hash of what was asked.

A reply is written when it arrives, so that a run that is killed loses only the calls under way; asking again what was
asked before costs nothing and gives the same. Keys are never part of it.
"""

import json
import sqlite3
import time
from pathlib import Path
from types import TracebackType

from saetool.errors import ArtifactError
from saetool.llm.client import Client, Reply, Request

_TABLE = """CREATE TABLE IF NOT EXISTS calls (
  key TEXT PRIMARY KEY, kind TEXT NOT NULL, model TEXT NOT NULL, host TEXT,
  request TEXT NOT NULL, reply TEXT NOT NULL, time REAL NOT NULL) WITHOUT ROWID"""
APPLICATION_ID = 0x5AE700
"""Marks the file as one of ours (SQLite's own field for that)."""


class CallStore:
    """The file at ``path``; None keeps calls in memory."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        try:
            self._db = sqlite3.connect(":memory:" if path is None else str(path), timeout=60, isolation_level=None)
            (application,) = self._db.execute("PRAGMA application_id").fetchone()
            (tables,) = self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
            if tables and application != APPLICATION_ID:
                raise ArtifactError(f"{path}: a database of something else", "choose another --call-cache")
            if path is not None:
                self._db.execute("PRAGMA journal_mode=WAL")
                self._db.execute("PRAGMA synchronous=NORMAL")  # a crash of the program loses nothing
            if not tables:
                self._db.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._db.execute(_TABLE)
        except sqlite3.Error as error:
            raise ArtifactError(
                f"{path}: not usable as a call cache ({error})", "choose another --call-cache"
            ) from None

    def get(self, key: str) -> Reply | None:
        """The reply kept under a ``call_key``."""
        try:
            row = self._db.execute("SELECT reply FROM calls WHERE key = ?", (key,)).fetchone()
            return None if row is None else Reply.from_json(json.loads(row[0]))
        except (sqlite3.Error, ValueError, TypeError, KeyError) as error:
            raise ArtifactError(
                f"{self.path}: damaged ({error})", "delete it, or choose another --call-cache"
            ) from None

    def put(self, key: str, client: Client, request: Request, reply: Reply) -> None:
        row = (
            key,
            client.kind,
            client.model,
            client.host,
            json.dumps(request.to_json(), ensure_ascii=False),
            json.dumps(reply.to_json(), ensure_ascii=False),
            time.time(),
        )
        try:
            self._db.execute("INSERT OR REPLACE INTO calls VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        except sqlite3.Error as error:
            raise ArtifactError(f"{self.path}: cannot be written ({error})", "choose another --call-cache") from None

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> "CallStore":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        self.close()
