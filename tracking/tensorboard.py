"""A TensorBoard of the run, reachable from this machine only, for as long as the run goes on."""

import logging
import re
import subprocess
import sys
import threading
from typing import IO

from tracking.processes import end, start

logger = logging.getLogger(__name__)

_PATIENCE = 5.0  # seconds to end


class TensorBoard:
    """A context manager. The port is a free one, which TensorBoard finds itself; its URL is logged when it answers."""

    def __init__(self, logdir: str):
        self._logdir = logdir
        self._process: subprocess.Popen[bytes] | None = None
        self._ending = False

    def __enter__(self) -> "TensorBoard":
        command = [sys.executable, "-m", "tensorboard.main", "--logdir", self._logdir, "--host", "127.0.0.1"]
        # it loads TensorFlow, which would take a GPU's memory for itself
        self._process = start([*command, "--port", "0"], {"CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"})
        assert self._process.stdout is not None and self._process.stderr is not None
        for stream in (self._process.stdout, self._process.stderr):
            threading.Thread(target=self._listen, args=(stream,), daemon=True).start()
        return self

    def _listen(self, stream: IO[bytes]) -> None:
        """Wait for the line that tells the port; read the rest, so that it never waits for us."""
        last = ""
        with stream:
            for line in stream:
                last = line.decode("utf-8", "replace").strip() or last
                if found := re.search(r"^TensorBoard \S+ at (http://\S+)", last):
                    logger.info("TensorBoard: %s", found[1])
                    last = ""
        assert self._process is not None
        if stream is self._process.stderr and not self._ending:
            logger.warning("TensorBoard has ended (%s); the run goes on", last or "without a word")

    def __exit__(self, *_: object) -> None:
        self._ending = True
        if self._process is not None:
            end(self._process, _PATIENCE)
