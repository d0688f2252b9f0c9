"""Tokens that leave the tokenizer before the first step."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from folding import config as c
from folding.data.batches import make_data
from folding.models.transformer import make_model
from folding.training import start, trim
from folding.training.loop import Run
from tests.models import checkpoints
from tests.training.conftest import CLASS_WORDS, recovery_config


def test_of_tokens_without_use_the_last_are_the_first_to_go(
  checkpoint, tmp_path
):
  # Texts that differ, all of the words a, b and c.
  words = [
    ["abc"[i % 3], *("ab"[int(bit)] for bit in f"{i:08b}")] for i in range(160)
  ]
  rows = [f"topic {text[0]}\t{' '.join(text)}" for text in words]
  (tmp_path / "rows.tsv").write_text("\n".join(rows) + "\n")
  config = c.resolve(recovery_config(checkpoint[0], tmp_path / "rows.tsv"))
  data = make_data(config)
  usage = np.asarray(Run(config, data).usage())
  size = data.num_examples["train"] // 8
  epoch = [data.train_batch(i) for i in range(size)]
  used = np.unique(np.concatenate([b["tokens"][b["mask"]] for b in epoch]))
  unused = np.setdiff1d(np.arange(len(usage)), used)
  assert len(unused) > 3
  assert (np.diff(usage[unused]) < 0).all()
  assert usage[unused].max() < usage[used].min()
  assert usage.sum() == pytest.approx(1)


def test_what_cannot_be_trimmed_or_need_not_be_stays_whole(
  checkpoint, topics, tmp_path
):
  shutil.copytree(checkpoint[0], tmp_path / "hf")
  words = [(word, -1.0) for word in checkpoints.WORDS]
  inner = tokenizers.Tokenizer(tokenizers.models.Unigram(words, unk_id=3))
  inner.save(str(tmp_path / "hf" / "tokenizer.json"))
  for source, expected in ((checkpoint[0], "trim"), (tmp_path / "hf", "row")):
    found = recovery_config(source, topics)
    assert found.fpp.embedding_granularity == expected
  config = recovery_config(checkpoint[0], topics, fpp__overall=None)
  config.fpp.linear, config.fpp.embedding = 0.5, 0.0
  data = make_data(config := c.resolve(config))
  assert trim.trim_vocabulary(config, data) is data


def test_as_many_tokens_go_as_are_to_go(dense_run, topics):
  config = recovery_config(dense_run, topics, fpp__overall=None)
  config.fpp.linear, config.fpp.embedding = 0.5, 0.4
  data = make_data(config := c.resolve(config))
  found = trim.trim_vocabulary(config, data).tokenizer
  assert (data.tokenizer.vocab_size, found.vocab_size) == (10, 6)


def _logits(model, params, data, text):
  tokens = data.tokenizer.encode_batch([text], 12)[0]
  return np.asarray(
    model.apply({"params": params}, jax.numpy.asarray(tokens[None]))
  )


def test_without_folding_a_trimmed_start_reads_what_stays_as_before(
  dense_run, topics
):
  unfolded = {"fold__groups": 0, "fold__values": "dense"}
  config = recovery_config(dense_run, topics, fpp__overall=None, **unfolded)
  config.fpp.linear, config.fpp.embedding = 0.5, 0.4
  config = c.resolve(config)
  plain = make_data(config)
  data = trim.trim_vocabulary(config, plain)
  known = json.loads(data.tokenizer.to_json())["model"]["vocab"]
  assert 0 < len(set(CLASS_WORDS) & set(known)) < len(CLASS_WORDS)
  _, params, _ = start.folded_start(config, data)
  dense, expected = start.dense_start(str(dense_run), config, plain)
  model = make_model(config, data.tokenizer.vocab_size, data.num_classes)
  taught = start.teacher_of(config, data)
  assert taught is not None
  text = " ".join(word for word in CLASS_WORDS if word in known)
  before = _logits(dense, expected, plain, text)
  after = _logits(model, params, data, text)
  np.testing.assert_array_equal(after, before)
  batch = start.calibration(config, data)[0]
  ours = next(data.first_epoch())
  for old, new in zip(batch["tokens"], ours["tokens"], strict=True):
    assert plain.tokenizer.decode(old) == data.tokenizer.decode(new)
  half = jax.tree.map(lambda w: w.astype(np.float32), taught[1])
  of_teacher = _logits(taught[0], half, data, text)
  np.testing.assert_allclose(of_teacher, before, rtol=0.02, atol=0.02)
