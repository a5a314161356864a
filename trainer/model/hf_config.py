"""Models of transformers as a checkpoint names them: settings in plain JSON, and nothing of this machine."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

NOT_OF_THE_MODEL = ("architectures", "dtype", "id2label", "label2id", "transformers_version")


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return all that `AutoConfig.for_model` needs to make the same config again; no path and no label of a classifier."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in NOT_OF_THE_MODEL}


@contextmanager
def quietly() -> Iterator[None]:
    """Load without bars and reports: that a pooling layer is not used is not news."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
