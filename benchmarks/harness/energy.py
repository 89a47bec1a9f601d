"""Energy, where Linux tells it: the counters of the processor packages (RAPL)."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class Energy:
    """What the processors have used since this was made, whatever ran on them.

    The counters begin anew every hour or so of full load, so :meth:`read` must be called more often than that.

    Args:
        folder: of the counters.
    """

    def __init__(self, folder: Path = POWERCAP) -> None:
        # A package is intel-rapl:0, on AMD too; intel-rapl:0:0 is a part of it.
        packages = [path for path in sorted(folder.glob("intel-rapl:*")) if path.name.count(":") == 1]
        self._last = {path: first for path in packages if (first := _microjoules(path, "energy_uj")) is not None}
        self._used = 0

    def read(self) -> None:
        """Add what was used since the last time."""
        for path, last in self._last.items():
            now = _microjoules(path, "energy_uj")
            assert now is not None, "it could be read before"
            wrapped = now < last
            self._used += now - last + (wrapped and (_microjoules(path, "max_energy_range_uj") or 0))
            self._last[path] = now

    def joules(self) -> float | None:
        """So far; None where the machine does not tell."""
        self.read()
        return self._used / 1e6 if self._last else None


def _microjoules(package: Path, name: str) -> int | None:
    try:
        return int((package / name).read_text())
    except (OSError, ValueError):  # most systems let only root read it
        return None
