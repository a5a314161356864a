"""Batches: they come in their order, with each view of an image in its epoch."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from pipeline.dataset.version import Version
from tests.trainer.small_trainings import CPU, replace, train_to, train_until_saved, weights
from trainer.build import build_checkpoint
from trainer.data import Example, examples_in
from trainer.features import OnlineFeatures
from trainer.loop.batch_loader import BatchLoader
from trainer.train import train


@pytest.mark.parametrize("storage", ["bf16", "none"])
def test_epochs_show_views_in_turn_which_are_kept_like_images(
    version: Version, clip: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str
) -> None:
    config = replace(encoder=clip, augment_views=2, steps=0, epochs=6, feature_storage=storage, batch_size=8)
    shown: Counter[tuple[int, int]] = Counter()
    show = BatchLoader.example

    def note(self: BatchLoader, index: int, epoch: int) -> Example:
        example = show(self, index, epoch)
        shown[index, example.view] += epoch < config.epochs  # the last batch may begin another one
        return example

    monkeypatch.setattr(BatchLoader, "example", note)
    metrics = train(version, config, tmp_path / "views")
    images = {index for index, _ in shown}
    assert len(images) > 20 and shown == {(index, view): 2 for index in images for view in range(3)}
    monkeypatch.undo()
    assert weights(tmp_path / "views") != weights(train_to(tmp_path / "plain", version, config, augment_views=0))
    train_until_saved(version, config, tmp_path / "cut", monkeypatch)
    assert train(version, config, tmp_path / "cut", resume=True) == metrics
    assert weights(tmp_path / "cut") == weights(tmp_path / "views")


def test_batches_are_loaded_ahead_in_their_order(version: Version, clip: str) -> None:
    config = replace(encoder=clip).with_defaults(40)
    examples = examples_in(version, "train")
    checkpoint = build_checkpoint(version, config, examples)
    loader = BatchLoader(config, checkpoint.tokenizer, examples, OnlineFeatures(checkpoint.captioner.encoder, CPU))
    order = [[0, 1], [5, 2], [7]]
    ahead = list(loader.load_ahead(order))
    for indices, batch in zip(order, ahead, strict=True):
        (own,) = loader.load([examples[index] for index in indices]).micro_batches
        assert torch.equal(batch.micro_batches[0][0], own[0])
        assert torch.equal(batch.micro_batches[0][1].ids_CT, own[1].ids_CT)
        assert (batch.num_images, batch.num_tokens) == (len(indices), int(own[1].learned_CT.sum()))
    with pytest.raises(IndexError):
        list(loader.load_ahead([[0], [9999]]))
