"""The files of sentence-transformers: written, read back, and refused."""

import json

import pytest
import tokenizers

from folding.config import ModelConfig
from folding.errors import ConfigError
from folding.models import sentence

# As sentence-transformers names them.
POOLINGS = {
  "first": "pooling_mode_cls_token",
  "mean": "pooling_mode_mean_tokens",
  "last": "pooling_mode_lasttoken",
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_written_files_are_read_back(tmp_path, pooling, normalize):
  model = ModelConfig(width=12, pooling=pooling, normalize=normalize)
  sentence.write(tmp_path, model, 9)
  found = sentence.read(tmp_path)
  assert found == (pooling, normalize, 9)
  changed = found.applied(ModelConfig(width=12, pooler=True))
  assert changed == model
  modes = json.loads((tmp_path / "1_Pooling" / "config.json").read_text())
  assert [name for name in modes if modes[name] is True] == [POOLINGS[pooling]]
  modules = json.loads((tmp_path / "modules.json").read_text())
  kinds = ["Transformer", "Pooling", "Normalize"][: 2 + normalize]
  assert [m["type"].rsplit(".", 1)[-1] for m in modules] == kinds


@pytest.mark.parametrize(
  ("mode", "pooling"),
  [
    ("cls", "first"),
    ("mean", "mean"),
    ("lasttoken", "last"),
    (["cls"], "first"),
  ],
)
def test_pooling_of_sentence_transformers_5_4_is_read(tmp_path, mode, pooling):
  sentence.write(tmp_path, ModelConfig(), 9)
  config = {"embedding_dimension": 12, "pooling_mode": mode}
  (tmp_path / "1_Pooling/config.json").write_text(json.dumps(config))
  # The length of texts is then in the options of the tokenizer.
  (tmp_path / "sentence_bert_config.json").write_text(
    json.dumps({"transformer_task": "feature-extraction"})
  )
  assert sentence.read(tmp_path) == (pooling, False, None)
  options = tmp_path / "tokenizer_config.json"
  options.write_text(json.dumps({"model_max_length": 7}))
  assert sentence.read(tmp_path) == (pooling, False, 7)


def test_cross_encoder_makes_no_vectors(tmp_path):
  module = {"idx": 0, "type": "x.transformer.Transformer", "path": ""}
  (tmp_path / "modules.json").write_text(json.dumps([module]))
  assert sentence.read(tmp_path) is None


def test_prompt_before_each_text_is_refused(tmp_path):
  sentence.write(tmp_path, ModelConfig(), 9)
  path = tmp_path / "config_sentence_transformers.json"
  values = {"prompts": {"query": "query: "}, "default_prompt_name": None}
  path.write_text(json.dumps(values))
  assert sentence.read(tmp_path) == ("mean", False, 9)
  values["default_prompt_name"] = "query"
  path.write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="'query'.*default_prompt_name to null"):
    sentence.read(tmp_path)
  values["prompts"]["query"] = ""
  path.write_text(json.dumps(values))
  assert sentence.read(tmp_path) == ("mean", False, 9)
  values["prompts"] = {}
  path.write_text(json.dumps(values))
  with pytest.raises(ConfigError, match="'query'"):
    sentence.read(tmp_path)


def test_lower_case_needs_a_tokenizer_that_makes_it(tmp_path):
  sentence.write(tmp_path, ModelConfig(), 9)
  limits = {"max_seq_length": 9, "do_lower_case": True}
  (tmp_path / "sentence_bert_config.json").write_text(json.dumps(limits))
  inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, "a"))
  path = tmp_path / "tokenizer.json"
  inner.save(str(path))
  with pytest.raises(ConfigError, match="Lowercase normalizer"):
    sentence.read(tmp_path)
  inner.normalizer = tokenizers.normalizers.Lowercase()
  inner.save(str(path))
  assert sentence.read(tmp_path) == ("mean", False, 9)


@pytest.mark.parametrize("family", ["roberta", "distilbert", "xlm-roberta"])
def test_limits_are_read_under_their_former_names(tmp_path, family):
  sentence.write(tmp_path, ModelConfig(), 9)
  limits = tmp_path / "sentence_bert_config.json"
  limits.rename(tmp_path / f"sentence_{family}_config.json")
  assert sentence.read(tmp_path) == ("mean", False, 9)


def test_folder_without_the_files_says_nothing(tmp_path):
  assert sentence.read(tmp_path) is None


@pytest.mark.parametrize(
  ("file", "change", "word"),
  [
    ("modules.json", [{"type": "x.Pooling"}], "path"),
    ("modules.json", [3], "damaged"),
    ("modules.json", [{"type": 3, "path": ""}], "damaged"),
    ("modules.json", [{"type": "x.Pooling", "path": "none"}], "none"),
    ("modules.json", {}, "list"),
    ("modules.json", [{"type": "x.SpladePooling", "path": ""}], "by Splade"),
    ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "by max;"),
    ("1_Pooling/config.json", dict.fromkeys(POOLINGS.values(), True), "cls"),
    ("1_Pooling/config.json", {}, "nothing"),
    ("1_Pooling/config.json", {"pooling_mode": "weightedmean"}, "weighted"),
    ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "cls, mean;"),
    ("1_Pooling/config.json", {"pooling_mode": 3}, "damaged"),
    ("sentence_bert_config.json", {"max_seq_length": 0}, "0"),
    ("sentence_bert_config.json", {"max_seq_length": True}, "True"),
    ("sentence_bert_config.json", {"max_seq_length": "9"}, "'9'"),
  ],
)
def test_damaged_or_unsupported_file_is_refused(tmp_path, file, change, word):
  sentence.write(tmp_path, ModelConfig(), 9)
  (tmp_path / file).write_text(json.dumps(change))
  with pytest.raises(ConfigError, match=word):
    sentence.read(tmp_path)


def test_step_that_is_not_known_is_refused(tmp_path):
  sentence.write(tmp_path, ModelConfig(), 9)
  path = tmp_path / "modules.json"
  modules = json.loads(path.read_text())
  dense = {"type": "sentence_transformers.models.Dense", "path": "2_Dense"}
  path.write_text(json.dumps([*modules, dense]))
  with pytest.raises(ConfigError, match="Dense"):
    sentence.read(tmp_path)
