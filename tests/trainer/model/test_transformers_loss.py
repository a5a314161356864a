"""The published model in `transformers.Trainer`."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import Trainer, TrainingArguments

from tests.trainer.tiny_models import IMAGE, SIDE_PX, TOWER
from trainer.model.transformers_model import SynthCaptioner, SynthCaptionerConfig


def collate(rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    ids = pad_sequence([row["ids"] for row in rows], batch_first=True)
    labels = pad_sequence([row["labels"] for row in rows], batch_first=True, padding_value=-100)
    pixels = torch.stack([row["pixels"] for row in rows])
    return {"input_ids": ids, "labels": labels, "pixel_values": pixels, "attention_mask": (ids > 0).long()}


def test_gradient_accumulation_changes_neither_loss_nor_gradient(tmp_path: Path) -> None:
    """Texts differ in length, so a mean of means would differ from the mean over all tokens."""
    decoder = {"vocab_size": 50, "width": 32, "depth": 1, "heads": 2}
    config = SynthCaptionerConfig({"model": {"model_type": "vit", **TOWER, **IMAGE}}, decoder, eos_id=1)
    random, rows = torch.Generator().manual_seed(0), []
    for number in range(8):
        ids = torch.randint(1, 50, (4 + 3 * number,), generator=random)
        labels = torch.cat([torch.tensor([-100, -100]), ids[2:]])
        pixels = torch.randn(3, SIDE_PX, SIDE_PX, generator=random)
        rows.append({"ids": ids, "labels": labels, "pixels": pixels})
    logged: list[dict[str, Any]] = []
    for size, parts in ((8, 1), (2, 4)):
        torch.manual_seed(0)
        model = SynthCaptioner(config)
        options: dict[str, Any] = {"max_steps": 1, "logging_steps": 1, "use_cpu": True, "report_to": "none"}
        options |= {"per_device_train_batch_size": size, "gradient_accumulation_steps": parts}
        arguments = TrainingArguments(
            str(tmp_path), remove_unused_columns=False, save_strategy="no", disable_tqdm=True, **options
        )
        trainer = Trainer(model, arguments, data_collator=collate, train_dataset=rows)
        trainer.train()
        logged.append(trainer.state.log_history[0])
    for name in ("loss", "grad_norm"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-4)
