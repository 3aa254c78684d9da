"""Training on a stream: resumed bitwise, and what it needs."""

from hf_kdtl.data.augmentation import Augmentation
from tests.data.test_stream import stream, write_shards
from tests.support.headless import headless
from tests.support.helpers import largest_difference, trainer, weights

ENTRIES = [{"name": "feature_kd", "sample": 8}, {"name": "similarity", "weight": 0.1, "bank": 6}]


def run(folder, shards, **settings):
    data = stream(shards, augmentation=Augmentation({"flip": True}))
    settings = {"per_device_train_batch_size": 3, "learning_rate": 1e-3, "save_steps": 3} | settings
    student, teacher = (headless("vit", image_size=8, patch_size=4, seed=s, hidden_dropout_prob=0.1) for s in (0, 1))
    return trainer(folder, student, teacher, data, ENTRIES, save_strategy="steps", **settings)


def test_resuming_is_bitwise_also_in_a_later_pass(tmp_path):
    shards = write_shards(tmp_path / "shards", rows=4)
    settings = {"max_steps": 10, "gradient_accumulation_steps": 2}  # 60 images of 16: the fourth pass
    whole = run(tmp_path / "run", shards, **settings)
    whole.train()
    again = run(tmp_path / "run", shards, **settings)
    again.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-6"))
    assert again.state.global_step == 10
    assert largest_difference(weights(whole.distiller), weights(again.distiller)) == 0
    elsewhere = run(tmp_path / "other", shards, max_steps=10, gradient_accumulation_steps=2, seed=1)
    elsewhere.train()
    assert largest_difference(weights(whole.model), weights(elsewhere.model)) > 1e-5
