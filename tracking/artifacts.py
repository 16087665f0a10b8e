"""The files of a run that its record keeps: predictions as they are written, and the final config."""

import os
from collections.abc import Callable, Mapping

from tracking.files import Version, escaped, fetch, matching, version

_TYPES: Mapping[str, str] = {".txt": "text/plain", ".json": "application/json", ".jsonl": "application/x-ndjson"}
FINAL_CONFIG = "final_config.json"  # `config.json` is Sacred's own


class Artifacts:
    """Finds the files and hands over copies, since a server that is away takes them later."""

    def __init__(
        self, add: Callable[[str, str, str], None], copies: str, model_path: str, sacred_id: str, output: str | None
    ):
        """`add(path of the copy, name, content type)` records a file.

        `copies` is a folder that stays until everything is recorded; `output` is what --output names.
        """
        self._add = add
        self._copies = copies
        self._config = os.path.join(model_path, "config.json")
        self._patterns = [os.path.join(escaped(model_path), f"predictions_{sacred_id}_*.txt")]
        self._patterns += [escaped(output)] if output else []
        self._count = 0
        # What is there before the run is of others.
        self._known = {path: version(path) for path in self._predictions()}
        self._known[self._config] = version(self._config)

    def _predictions(self) -> list[str]:
        return [path for pattern in self._patterns for path in matching(pattern)]

    def record_predictions(self) -> bool:
        """Record the files of predictions that are new or have changed; whether there was one."""
        recorded = [self._record(path, os.path.basename(path)) for path in self._predictions()]
        return any(recorded)

    def record_config(self, is_ours: bool) -> bool:
        """Record the config in model_path, if the run wrote it or `is_ours` says that it is that of its model."""
        if is_ours:
            self._known.pop(self._config, None)
        return self._record(self._config, FINAL_CONFIG)

    def _record(self, path: str, name: str) -> bool:
        found: Version | None = version(path)
        if found is None or found == self._known.get(path):
            return False
        self._count += 1
        folder = os.path.join(self._copies, str(self._count))
        os.mkdir(folder)
        copy = os.path.join(folder, name)
        fetch(path, copy)
        self._known[path] = found
        self._add(copy, name, _TYPES.get(os.path.splitext(name)[1], "application/octet-stream"))
        return True
