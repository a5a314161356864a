"""Configs of transformers models as a checkpoint stores them: plain JSON without local paths."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedConfig
from transformers.utils import logging

NOT_OF_THE_MODEL = ("architectures", "dtype", "id2label", "label2id", "transformers_version")


def settings_of(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the settings that `AutoConfig.for_model` needs to rebuild a config, without paths and classifier labels."""
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if not name.startswith("_") and name not in NOT_OF_THE_MODEL}


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Silence progress bars and reports while loading, such as those about an unused pooling layer."""
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        logging.enable_progress_bar()
