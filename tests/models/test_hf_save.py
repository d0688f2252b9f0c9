"""Folders written for `transformers`, as this library reads them."""

import dataclasses
import json

import pytest

from folding import schema
from folding.models import hf_config, hf_save, pretrained
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, WORDS


def test_a_model_of_another_head_is_refused_before_anything_is_written(
  tmp_path,
):
  described = checkpoints.description("bert", "classify")
  described.config.pooling = "mean"
  with pytest.raises(schema.ConfigError, match="needs model.pooling='first'"):
    hf_save.save_pretrained(
      checkpoints.random_params(described),
      described.config,
      "bert",
      tmp_path / "out",
      tokenizer_path=checkpoints.write_tokenizer(tmp_path / "tokenizer.json"),
      max_length=described.max_length,
      num_classes=described.num_classes,
    )
  assert not (tmp_path / "out").exists()


def test_a_classifier_sees_the_end_of_its_texts_after_an_export(tmp_path):
  words = ["<none>", *WORDS[1:]]  # no "<pad>": the end has to do that
  checkpoints.write(tmp_path / "a", "llama", "classify", words=words)
  values = json.loads((tmp_path / "a" / "config.json").read_text())
  names = json.loads((tmp_path / "a" / "tokenizer_config.json").read_text())
  # Not 2, "</s>", which transformers would pass over as padding.
  assert (values["pad_token_id"], values["eos_token_id"]) == (1, 2)
  assert names["pad_token"] == "<s>"
  assert pretrained.load_pretrained(tmp_path / "a").pad_id == 1
  path = tmp_path / "a" / "config.json"
  path.write_text(json.dumps(values | {"pad_token_id": 2}))
  with pytest.raises(
    schema.ConfigError, match=r"ends each text .*add_eos_token"
  ):
    pretrained.load_pretrained(tmp_path / "a")


def test_a_decoder_without_begin_generates_from_an_end(tmp_path):
  described = checkpoints.description("gpt2", "lm")
  path = checkpoints.write_tokenizer(tmp_path / "tokenizer.json")
  path.write_text(
    json.dumps(json.loads(path.read_text()) | {"post_processor": None})
  )
  hf_save.save_pretrained(
    checkpoints.random_params(described),
    described.config,
    "gpt2",
    tmp_path / "out",
    tokenizer_path=path,
    max_length=described.max_length,
  )
  values = json.loads((tmp_path / "out" / "config.json").read_text())
  assert (values["bos_token_id"], values["eos_token_id"]) == (2, 2)


@pytest.mark.parametrize("head", ["classify", "own"])
@pytest.mark.parametrize("name", FAMILIES)
def test_written_and_read_again_it_is_the_same(name, head):
  head = checkpoints.own_head(FAMILIES[name]) if head == "own" else head
  described = checkpoints.description(name, head)
  assert hf_config.describe(hf_save.to_hf(described)) == described


@pytest.mark.parametrize(
  ("name", "fields", "message"),
  [
    (
      "bert",
      {"pooling": "mean"},
      "bert's sequence classifier needs model.pooling='first'; it is 'mean'",
    ),
    ("bert", {"pooler": False}, "needs model.pooler=True; it is False"),
    (
      "distilbert",
      {"pooler_activation": "tanh"},
      "needs model.pooler_activation='relu'; it is 'tanh'",
    ),
    ("distilbert", {"norm_epsilon": 1e-5}, "needs model.norm_epsilon=1e-12"),
    ("llama", {"pooling": "mean"}, "needs model.pooling='last'"),
    ("llama", {"qkv_bias": True}, "llama needs model.qkv_bias=False"),
    ("mistral", {"use_bias": True}, "mistral needs model.use_bias=False"),
  ],
)
def test_an_export_of_another_head_is_refused(name, fields, message):
  described = checkpoints.description(name, "classify")
  config = dataclasses.replace(described.config, **fields)
  other = dataclasses.replace(described, config=config)
  with pytest.raises(schema.ConfigError, match=f"no export as .*{message}"):
    hf_save.to_hf(other)
