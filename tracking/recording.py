"""A run as Sacred records it."""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sacred import SETTINGS, Experiment
from sacred.host_info import HostInfoGetter
from sacred.observers import RunObserver
from sacred.run import Run

from config import ModelConfig, config_to_json
from tracking.provenance import git_state, sources
from tracking.transcript import Transcript

ROOT = Path(__file__).resolve().parent.parent
_COMMAND = ROOT / "run_experiment.py"
_BEAT_INTERVAL = 5.0  # seconds between two writings of metrics and output


def record(
    name: str,
    config: ModelConfig,
    observer: RunObserver,
    transcript: Transcript,
    meta: Mapping[str, Any],
    devices: Mapping[str, Any],
    work: Callable[[Run], Any],
) -> None:
    """Do `work(run)` and record it: what it returns is the run's result, and how it ends is the run's end.

    Raises:
      Whatever `work` raises, once it is recorded: INTERRUPTED for a KeyboardInterrupt, FAILED for anything else.
    """
    SETTINGS.DISCOVER_SOURCES = "none"  # Sacred would record the modules that this process imports
    SETTINGS.DISCOVER_DEPENDENCIES = "pkg"
    git = git_state(ROOT)
    experiment = Experiment(
        name,
        base_dir=str(ROOT),
        save_git_info=False,
        additional_host_info=[HostInfoGetter(lambda: dict(devices), "devices")],
    )
    experiment.sources = sources(ROOT, git)
    experiment.mainfile = next(source for source in experiment.sources if source.filename == str(_COMMAND))
    experiment.logger = logging.getLogger("sacred")
    experiment.logger.setLevel(logging.CRITICAL)  # a record that cannot be begun is the caller's to explain
    experiment.add_config(json.loads(config_to_json(config)))
    experiment.observers.append(observer)
    experiment.captured_out_filter = lambda _: transcript.text()

    @experiment.main
    def main(_run: Run) -> Any:
        experiment.logger.setLevel(logging.WARNING)
        try:
            return work(_run)
        finally:  # Sacred's last look at the output would be before an error
            _run.captured_out = transcript.text()

    options = {"--capture": "no", "--beat_interval": _BEAT_INTERVAL}
    experiment.run(meta_info={**meta, "git": git}, options=options)
