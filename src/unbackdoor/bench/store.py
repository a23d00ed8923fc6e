"""The store: one SQLite file for what was measured, and a folder of artefacts beside it.

Only drivers write the database, each change in one transaction that is on the disk before it counts.
Several drivers may share a store: a cell is claimed before it runs, and a claim ends with the life of its
driver, because the operating system releases the driver's lock file however the driver dies.
"""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import shutil
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self

from unbackdoor.errors import DiskFull, InputError, IntegrityError

State = Literal["waiting", "running", "done", "failed"]
SCHEMA_VERSION = 3
_PATIENCE = 60.0  # seconds that a driver waits for the others
_SCHEMA = """
CREATE TABLE suite (
    label TEXT PRIMARY KEY, sha256 TEXT NOT NULL, content TEXT NOT NULL
) STRICT;
CREATE TABLE cell (
    key TEXT PRIMARY KEY, kind TEXT NOT NULL, spec TEXT NOT NULL, parent TEXT,
    state TEXT NOT NULL DEFAULT 'waiting', owner TEXT, tries INTEGER NOT NULL DEFAULT 0,
    result TEXT, error TEXT, log TEXT, seconds REAL, finished REAL
) STRICT;
CREATE INDEX cell_state ON cell (state);
CREATE INDEX cell_parent ON cell (parent);
CREATE TABLE member (
    suite TEXT NOT NULL REFERENCES suite (label), key TEXT NOT NULL REFERENCES cell (key),
    place INTEGER NOT NULL, labels TEXT NOT NULL, PRIMARY KEY (suite, place)
) STRICT;
CREATE INDEX member_key ON member (key);
"""
# What each later version added. Changes are numbered by a trigger, so that a driver of an older version that
# is at work on a store while it is brought up to date has its own numbered as well.
_UPGRADES = {
    2: (
        "ALTER TABLE cell ADD COLUMN changed INTEGER NOT NULL DEFAULT 0",
        "CREATE INDEX cell_changed ON cell (changed)",
        # The largest number in use would not do: removing a cell must not turn the count back.
        "CREATE TABLE clock (changes INTEGER NOT NULL) STRICT",
        "INSERT INTO clock VALUES (0)",
        "CREATE TRIGGER cell_changes AFTER UPDATE OF state ON cell BEGIN "
        "UPDATE clock SET changes = changes + 1; "
        "UPDATE cell SET changed = (SELECT changes FROM clock) WHERE key = NEW.key; END",
    ),
    3: ("CREATE TABLE pinned (key TEXT PRIMARY KEY REFERENCES cell (key), sha256 TEXT NOT NULL) STRICT",),
}


@dataclass(frozen=True)
class Cell:
    """One unit of work as it stands in the store.

    Attributes:
        key: Hash of everything the result depends on, 64 hex digits.
        kind: ``victim``, ``repair`` or ``scan``.
        spec: JSON-ready description; enough to do the work.
        parent: Key of the victim that a repair or a scan needs, or None.
        state: ``waiting``, ``running``, ``done`` or ``failed``.
        tries: How often it was started.
        result: What was measured, when done.
        error: Why it failed.
        log: What the cell printed, cut to its end.
        seconds: Wall time of the cell.
    """

    key: str
    kind: str
    spec: Mapping[str, Any]
    parent: str | None
    state: State
    tries: int
    result: Mapping[str, Any] | None
    error: str | None
    log: str | None
    seconds: float | None


class _Connection(sqlite3.Connection):
    """A connection that raises our typed errors, so that a full disk is not reported as a defect."""

    def execute(self, *words: Any) -> sqlite3.Cursor:
        try:
            return super().execute(*words)
        except sqlite3.OperationalError as error:
            full = error.sqlite_errorcode == sqlite3.SQLITE_FULL
            raise (DiskFull if full else InputError)(
                "the store cannot be used",
                got=str(error),
                remedy="Free some space; finished cells are kept" if full else None,
            ) from error


class Store:
    """An open store; use it as a context.

    Args:
        folder: Where ``results.db`` and ``artefacts/`` are, or shall be.

    Raises:
        InputError: If the folder cannot be written or holds something else.
        IntegrityError: If the store was made by a later version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.artefacts = folder / "artefacts"
        self._locks = folder / "drivers"
        self.owner = f"{os.getpid()}-{secrets.token_hex(4)}"
        self._lock: IO[bytes] | None = None
        try:
            self.artefacts.mkdir(parents=True, exist_ok=True)
            self._locks.mkdir(exist_ok=True)
            self._db = self._connected()
            self._create()
        except DiskFull:
            raise
        except (OSError, sqlite3.DatabaseError, InputError) as error:
            got = error.got if isinstance(error, InputError) else error
            raise InputError("the store cannot be opened", got=got, where=folder) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Give back what this driver claimed and close the file."""
        try:
            if self._lock is not None:
                with suppress(InputError):
                    self.release()
        finally:
            # An interrupt may have come while the lock was made, or comes now.
            for name in (self.owner, f".{self.owner}"):
                (self._locks / name).unlink(missing_ok=True)
        if self._lock is not None:
            self._lock.close()
            self._lock = None
        self._db.close()

    # -- suites and cells ---------------------------------------------------------------------------

    def register(
        self, label: str, sha256: str, content: str, cells: Iterable[tuple[dict[str, Any], dict[str, Any]]]
    ) -> None:
        """Enter a suite with its cells in order; cells that other suites entered before are shared.

        Args:
            label: Name and version of the suite.
            sha256: Hash of its content.
            content: Its text.
            cells: For each cell its ``key``, ``kind``, ``parent`` and ``spec``, and the labels of its row.

        Raises:
            IntegrityError: If the label stands for another content in this store.
        """
        listed = [(cell, json.dumps(labels)) for cell, labels in cells]
        registered = self._is_registered(label, sha256)
        if registered and self._lists(label, listed):
            return  # the ordinary case when a run is taken up again
        with self._transaction():
            # Checked again: another driver may have registered it first.
            if not self._is_registered(label, sha256):
                self._db.execute("INSERT INTO suite VALUES (?, ?, ?)", (label, sha256, content))
            # The code may have changed since: the suite's rows now are the cells of the present code.
            self._db.execute("DELETE FROM member WHERE suite = ?", (label,))
            self._db.executemany(
                "INSERT OR IGNORE INTO cell (key, kind, spec, parent) VALUES (?, ?, ?, ?)",
                (
                    (cell["key"], cell["kind"], json.dumps(cell["spec"], sort_keys=True), cell["parent"])
                    for cell, _ in listed
                ),
            )
            self._db.executemany(
                "INSERT INTO member VALUES (?, ?, ?, ?)",
                ((label, cell["key"], place, labels) for place, (cell, labels) in enumerate(listed)),
            )

    def _is_registered(self, label: str, sha256: str) -> bool:
        row = self._db.execute("SELECT sha256 FROM suite WHERE label = ?", (label,)).fetchone()
        if row is not None and row["sha256"] != sha256:
            raise IntegrityError(
                f"{label} stands for another content in this store",
                expected=row["sha256"][:12],
                got=sha256[:12],
                where=self.folder,
                remedy="Raise the version of the suite",
            )
        return row is not None

    def _lists(self, label: str, listed: list[tuple[dict[str, Any], str]]) -> bool:
        """Return whether the members of a suite are these, in this order; their keys stand for the specs."""
        rows = self._db.execute("SELECT key, labels FROM member WHERE suite = ? ORDER BY place", (label,))
        expected = ((cell["key"], labels) for cell, labels in listed)
        return all(row is not None and tuple(row) == one for row, one in zip_longest(rows, expected))

    def members(self, label: str) -> list[tuple[Cell, dict[str, Any]]]:
        """Return the cells of a suite in order, each with the labels of its row."""
        rows = self._db.execute(
            "SELECT cell.*, member.labels FROM member JOIN cell USING (key) WHERE suite = ? ORDER BY place",
            (label,),
        )
        return [(_cell(row), json.loads(row["labels"])) for row in rows]

    def outline(self, label: str) -> list[tuple[str, str | None, dict[str, Any]]]:
        """Return key, parent and labels of a suite's cells in order; much cheaper than :meth:`members`."""
        rows = self._db.execute(
            "SELECT key, parent, labels FROM member JOIN cell USING (key) WHERE suite = ? ORDER BY place",
            (label,),
        )
        return [(row["key"], row["parent"], json.loads(row["labels"])) for row in rows]

    def failed(self, label: str) -> list[tuple[Cell, dict[str, Any]]]:
        """Return the failed cells of a suite in order, as :meth:`members` does."""
        rows = self._db.execute(
            "SELECT cell.*, member.labels FROM cell JOIN member USING (key) "
            "WHERE state = 'failed' AND suite = ? ORDER BY place",
            (label,),
        )
        return [(_cell(row), json.loads(row["labels"])) for row in rows]

    def suites(self) -> list[str]:
        """Return the labels of all suites in the store."""
        return [row["label"] for row in self._db.execute("SELECT label FROM suite ORDER BY label")]

    def get(self, key: str) -> Cell | None:
        """Return a cell, or None."""
        row = self._db.execute("SELECT * FROM cell WHERE key = ?", (key,)).fetchone()
        return None if row is None else _cell(row)

    def states(self, label: str) -> dict[str, State]:
        """Return the state of every cell of a suite by key; much cheaper than :meth:`members`."""
        rows = self._db.execute(
            "SELECT DISTINCT key, state FROM member JOIN cell USING (key) WHERE suite = ?", (label,)
        )
        return {row["key"]: row["state"] for row in rows}

    def counts(self, label: str) -> dict[str, int]:
        """Return how many cells of a suite are in each state."""
        rows = self._db.execute(
            "SELECT state, COUNT(DISTINCT key) AS n FROM member JOIN cell USING (key) "
            "WHERE suite = ? GROUP BY state",
            (label,),
        )
        return {"waiting": 0, "running": 0, "done": 0, "failed": 0} | {row["state"]: row["n"] for row in rows}

    def changes(self, since: int) -> tuple[int, list[tuple[str, State]]]:
        """Return what cells became after a change, whoever changed them; the cost is that of the changes.

        Args:
            since: Number of the last change already read; 0 for all.

        Returns:
            Number of the last change, and key and present state of each changed cell.
        """
        rows = self._db.execute(
            "SELECT key, state, changed FROM cell WHERE changed > ? ORDER BY changed", (since,)
        ).fetchall()
        return (rows[-1]["changed"] if rows else since), [(row["key"], row["state"]) for row in rows]

    def last_change(self) -> int:
        """Return the number of the last change."""
        return int(self._db.execute("SELECT changes FROM clock").fetchone()[0])

    # -- claiming -----------------------------------------------------------------------------------

    def claim(self, key: str) -> bool:
        """Take a waiting cell for this driver; False if somebody else has it or it is finished."""
        self._live()
        with self._transaction():
            done = self._db.execute(
                "UPDATE cell SET state = 'running', owner = ?, tries = tries + 1 "
                "WHERE key = ? AND state = 'waiting'",
                (self.owner, key),
            )
        return done.rowcount == 1

    def finish(self, key: str, result: Mapping[str, Any], *, seconds: float, log: str = "") -> None:
        """Record the result of a cell that this driver claimed."""
        text = json.dumps(result, sort_keys=True, allow_nan=False)
        self._end(key, "done", text, None, seconds, log)

    def fail(self, key: str, error: str, *, seconds: float, log: str = "") -> None:
        """Record that a cell that this driver claimed failed; it is not tried again unless asked for."""
        self._end(key, "failed", None, error, seconds, log)

    def adopt(self, key: str, spec: Mapping[str, Any], result: Mapping[str, Any], *, sha256: str) -> bool:
        """Enter a trained victim that was made elsewhere, pinned by its weights.

        Args:
            key: Its address.
            spec: Its specification, whatever the code that it was trained with.
            result: What the judge measured.
            sha256: Hash of its weights.

        Returns:
            False if this store has it already, or its own result at the same address; that one stays.
        """
        text = json.dumps(result, sort_keys=True, allow_nan=False)
        with self._transaction():
            self._db.execute(
                "INSERT OR IGNORE INTO cell (key, kind, spec) VALUES (?, 'victim', ?)",
                (key, json.dumps(spec, sort_keys=True)),
            )
            done = self._db.execute(
                "UPDATE cell SET state = 'done', result = ?, error = NULL, finished = ? "
                "WHERE key = ? AND state IN ('waiting', 'failed')",
                (text, time.time(), key),
            )
            # A cell that was done and never started here came by an import of a time before there were pins.
            self._db.execute(
                "INSERT OR IGNORE INTO pinned SELECT key, ? FROM cell "
                "WHERE key = ? AND state = 'done' AND (? OR tries = 0)",
                (sha256, key, done.rowcount == 1),
            )
        return done.rowcount == 1

    def pinned(self) -> dict[str, dict[str, Any]]:
        """Return the specification of every victim that was taken over, by address, the latest last."""
        rows = self._db.execute("SELECT key, spec FROM pinned JOIN cell USING (key) ORDER BY pinned.rowid")
        return {row["key"]: json.loads(row["spec"]) for row in rows}

    def trained(self, keys: Iterable[str]) -> set[str]:
        """Return which of some cells are done."""
        requested = set(keys)
        rows = self._db.execute("SELECT key FROM cell WHERE kind = 'victim' AND state = 'done'")
        return {row["key"] for row in rows} & requested

    def give_up(self, keys: Iterable[str], error: str) -> None:
        """Fail those of some waiting cells whose victim has failed, all in one transaction."""
        with self._transaction():
            self._db.executemany(
                "UPDATE cell SET state = 'failed', error = ?, log = '', seconds = 0, finished = ?, "
                "tries = tries + 1 WHERE key = ? AND state = 'waiting' "
                "AND (SELECT state FROM cell AS victim WHERE victim.key = cell.parent) = 'failed'",
                [(error, time.time(), key) for key in keys],
            )

    def release(self) -> int:
        """Put this driver's unfinished cells back; return how many there were."""
        with self._transaction():
            done = self._db.execute(
                "UPDATE cell SET state = 'waiting', owner = NULL WHERE state = 'running' AND owner = ?",
                (self.owner,),
            )
        return done.rowcount

    def reclaim(self) -> int:
        """Put back the unfinished cells of drivers that are no longer alive; return how many."""
        # Fetched whole: a statement that an interrupt left open would hold back other drivers.
        rows = self._db.execute("SELECT DISTINCT owner FROM cell WHERE state = 'running'").fetchall()
        owners = [row["owner"] for row in rows]
        dead = [owner for owner in owners if owner != self.owner and not self._alive(owner)]
        total = 0
        for owner in dead:
            with self._transaction():
                done = self._db.execute(
                    "UPDATE cell SET state = 'waiting', owner = NULL WHERE state = 'running' AND owner = ?",
                    (owner,),
                )
                total += done.rowcount
            (self._locks / owner).unlink(missing_ok=True)
        return total

    def retry(self, label: str) -> int:
        """Put the failed cells of a suite back; return how many there were."""
        with self._transaction():
            done = self._db.execute(
                "UPDATE cell SET state = 'waiting', error = NULL WHERE state = 'failed' "
                "AND key IN (SELECT key FROM member WHERE suite = ?)",
                (label,),
            )
        return done.rowcount

    def sweep(self) -> None:
        """Remove what killed drivers left behind: work folders, drafts of files, and their locks."""
        drafts = [draft for name in ("checkpoints", "samples") for draft in (self.folder / name).glob(".*")]
        owners = {lock.name for lock in self._locks.glob("[!.]*")} - {self.owner}
        living = {owner for owner in owners if self._alive(owner)}
        for folder in (self.folder / "work").glob("*"):
            owner = "-".join(folder.name.split("-")[:2])
            if owner != self.owner and owner not in living and not self._alive(owner):
                shutil.rmtree(folder, ignore_errors=True)
        # Only drivers cause files to be written. Drafts that existed before the search for living drivers,
        # which returned none, belong to no driver.
        for draft in [] if living else drafts:
            draft.unlink(missing_ok=True)
        for owner in owners - living:
            (self._locks / owner).unlink(missing_ok=True)

    # -- artefacts ----------------------------------------------------------------------------------

    def artefact(self, key: str) -> Path:
        """Return the folder of a cell's artefacts, whether it exists or not."""
        return artefact_folder(self.artefacts, key)

    def collect_garbage(self, *, dry_run: bool = False) -> list[Path]:
        """Remove cells and artefacts that no suite refers to; return the folders of the artefacts.

        Victims that were taken over stay: a suite that is planned later may go on with them.
        """
        referenced = {
            row["key"] for row in self._db.execute("SELECT key FROM member UNION SELECT key FROM pinned")
        }
        referenced |= {
            row["parent"]
            for row in self._db.execute(
                "SELECT DISTINCT parent FROM cell JOIN member USING (key) WHERE parent IS NOT NULL"
            )
        }
        folders = [f for f in sorted(self.artefacts.glob("*/*")) if f.name not in referenced and _old(f)]
        if dry_run:
            return folders
        with self._transaction():
            for row in self._db.execute("SELECT key FROM cell WHERE state <> 'running'").fetchall():
                if row["key"] not in referenced:
                    self._db.execute("DELETE FROM cell WHERE key = ?", (row["key"],))
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        return folders

    # -- inside -------------------------------------------------------------------------------------

    def _connected(self) -> sqlite3.Connection:
        end = time.monotonic() + _PATIENCE
        while True:
            db = sqlite3.connect(
                self.folder / "results.db", timeout=_PATIENCE, isolation_level=None, factory=_Connection
            )
            db.row_factory = sqlite3.Row
            try:
                # FULL: a commit that was acknowledged survives a power cut, not only a crash.
                for pragma in ("journal_mode = WAL", "synchronous = FULL", "foreign_keys = ON"):
                    db.execute(f"PRAGMA {pragma}")
            except BaseException as error:
                db.close()
                cause = error.__cause__
                busy = isinstance(cause, sqlite3.Error) and cause.sqlite_errorcode == sqlite3.SQLITE_BUSY
                if not busy or time.monotonic() > end:
                    raise
                # Two drivers make a store at once: here alone SQLite fails instead of waiting.
                time.sleep(0.02)
            else:
                return db

    def _create(self) -> None:
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version > SCHEMA_VERSION:
                raise IntegrityError(
                    "the store was made by a later version of unbackdoor",
                    expected=f"at most {SCHEMA_VERSION}",
                    got=version,
                    where=self.folder,
                    remedy="Update unbackdoor, or use another store",
                )
            statements = [] if version else [text for text in _SCHEMA.split(";") if text.strip()]
            for later in range(max(version, 1) + 1, SCHEMA_VERSION + 1):
                statements += _UPGRADES[later]
            for statement in statements:
                self._db.execute(statement)
            if version < SCHEMA_VERSION:
                self._db.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _end(
        self, key: str, state: State, result: str | None, error: str | None, seconds: float, log: str
    ) -> None:
        with self._transaction():
            done = self._db.execute(
                "UPDATE cell SET state = ?, owner = NULL, result = ?, error = ?, log = ?, seconds = ?, "
                "finished = ? WHERE key = ? AND state = 'running' AND owner = ?",
                (state, result, error, log[-20_000:], seconds, time.time(), key, self.owner),
            )
        if done.rowcount != 1:
            raise IntegrityError("a cell was finished that this driver does not hold", where=key)

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        # They are never nested: one that is still open was cut off by an interrupt on its way in or out,
        # where no handler of this function could see it.
        if self._db.in_transaction:
            self._db.execute("ROLLBACK")
        try:
            # IMMEDIATE takes the write lock at once, so that two drivers wait instead of failing half-way.
            self._db.execute("BEGIN IMMEDIATE")
            yield
            self._db.execute("COMMIT")
        except BaseException:
            # There is nothing left to roll back after some failed commits, or once the store is closed.
            with suppress(InputError, sqlite3.ProgrammingError):
                self._db.execute("ROLLBACK")
            raise

    def _live(self) -> None:
        """Hold this driver's lock for as long as the process lives."""
        if self._lock is None:
            # Locked before it gets its name: another driver takes an unlocked file for that of a dead driver.
            draft = self._locks / f".{self.owner}"
            self._lock = draft.open("wb")
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            draft.rename(self._locks / self.owner)

    def _alive(self, owner: str) -> bool:
        try:
            with (self._locks / owner).open("rb") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False


def artefact_folder(root: Path, key: str) -> Path:
    """Return where the artefacts of a cell belong."""
    return root / key[:2] / key


def _old(folder: Path) -> bool:
    """Spare drafts that a worker may still be writing."""
    return not folder.name.startswith(".") or time.time() - folder.stat().st_mtime > 24 * 3600


def _cell(row: sqlite3.Row) -> Cell:
    return Cell(
        key=row["key"],
        kind=row["kind"],
        spec=json.loads(row["spec"]),
        parent=row["parent"],
        state=row["state"],
        tries=row["tries"],
        result=json.loads(row["result"]) if row["result"] else None,
        error=row["error"],
        log=row["log"],
        seconds=row["seconds"],
    )
