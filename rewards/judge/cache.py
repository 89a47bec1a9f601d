"""Answers on disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

BUSY_SECONDS = 30.0
"""How long to wait while another process writes."""


class Answers:
    """Texts by key in an SQLite file that several processes may read and write at once.

    Each answer is kept as soon as it is put, so a run that is killed resumes where it stopped. The directory must be on a
    local disk: SQLite's locks do not hold on network file systems.

    Args:
        path: the file, made if missing. None keeps nothing.

    Example:
        >>> answers = Answers(None)
        >>> answers.put("key", "7"), answers.get("key")
        (None, None)
    """

    def __init__(self, path: Path | None) -> None:
        # All use is on the one thread of the event loop, though not on the thread that makes the object.
        self.database = path and sqlite3.connect(
            path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False
        )
        if self.database:
            self.database.execute("PRAGMA journal_mode = WAL")
            self.database.execute("PRAGMA synchronous = NORMAL")
            self.database.execute("CREATE TABLE IF NOT EXISTS answers (key TEXT PRIMARY KEY, answer TEXT NOT NULL)")

    def get(self, key: str) -> str | None:
        """What was put under ``key``, by any process; None if nothing."""
        if not self.database:
            return None
        row = self.database.execute("SELECT answer FROM answers WHERE key = ?", (key,)).fetchone()
        return row and row[0]

    def put(self, key: str, answer: str) -> None:
        """Keep ``answer``, in the place of an earlier one."""
        if self.database:
            self.database.execute("INSERT OR REPLACE INTO answers VALUES (?, ?)", (key, answer))
