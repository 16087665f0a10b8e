"""The same metrics in Weights & Biases, for --wandb; needs the optional package wandb."""

import itertools
import json
import logging
import os
from collections.abc import Sequence
from typing import Any

from config import ModelConfig, config_to_json
from errors import UserError
from tracking.metrics_tail import Point

logger = logging.getLogger(__name__)

STEP = "global_step"


class WandbSink:
    """A run in W&B; what goes wrong with it once it has begun is a warning, and the run goes on."""

    def __init__(self, project: str, name: str, config: ModelConfig, folder: str):
        """`folder` gets W&B's own files. Its variables count: WANDB_MODE=offline, WANDB_API_KEY and so on.

        Raises:
          UserError: wandb is not installed, or cannot begin.
        """
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                f"--wandb {project!r} needs a package that is not installed; pip install 'wandb==0.28.*'"
            ) from error
        os.makedirs(folder, exist_ok=True)
        try:
            run = wandb.init(
                project=project,
                name=name,
                config=json.loads(config_to_json(config)),
                dir=folder,
                settings=wandb.Settings(console="off", silent=True, disable_git=True, save_code=False),
            )
            # W&B's own counter would drop an evaluation that is read after the training steps behind it
            run.define_metric(STEP)
            run.define_metric("*", step_metric=STEP)
        except Exception as error:  # W&B raises errors of many kinds
            raise UserError(
                f"--wandb {project!r} cannot begin ({' '.join(str(error).split())}); log in with `wandb login`, or set "
                "WANDB_MODE=offline"
            ) from error
        self._run: Any = run
        where = f"offline, in {os.path.dirname(run.dir)}" if run.offline else run.url
        logger.info("W&B: project %r, %s", project, where)

    def log(self, points: Sequence[Point]) -> None:
        """Log points, which come in the order of their steps."""
        try:
            for step, group in itertools.groupby(points, key=lambda point: point.step):
                self._run.log({STEP: step, **{point.name: point.value for point in group}})
        except Exception as error:  # a record is no reason to end training
            logger.warning("W&B takes no metrics (%s)", error)

    def finish(self, code: int) -> None:
        """End the run; it has failed unless `code` is 0."""
        try:
            self._run.finish(exit_code=code)
        except Exception as error:
            logger.warning("W&B did not end the run well (%s)", error)
