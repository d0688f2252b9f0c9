import dataclasses

import pytest

from folding import config as config_lib
from folding import schema
from folding.models import hf_config, hf_save
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, C, D, F, H, N, P, V

# As the hub has them: files that transformers 4 wrote.
GPT2 = {
  "architectures": ["GPT2LMHeadModel"],
  "activation_function": "gelu_new",
  **{"attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1},
  "layer_norm_epsilon": 1e-05,
  "model_type": "gpt2",
  **{"n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12},
  "n_positions": 1024,
  "vocab_size": 50257,
}
ROBERTA = {
  "architectures": ["RobertaForMaskedLM"],
  **{"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1},
  "hidden_act": "gelu",
  **{"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1},
  **{"hidden_size": 768, "intermediate_size": 3072},
  "layer_norm_eps": 1e-05,
  "max_position_embeddings": 514,
  "model_type": "roberta",
  **{"num_attention_heads": 12, "num_hidden_layers": 12},
  **{"type_vocab_size": 1, "vocab_size": 50265},
}
LLAMA3 = {
  "architectures": ["LlamaForCausalLM"],
  **{"attention_bias": False, "mlp_bias": False},
  **{"bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009]},
  **{"head_dim": 64, "hidden_act": "silu", "hidden_size": 2048},
  **{"intermediate_size": 8192, "max_position_embeddings": 131072},
  "model_type": "llama",
  **{"num_attention_heads": 32, "num_hidden_layers": 16},
  **{"num_key_value_heads": 8, "rms_norm_eps": 1e-05},
  "rope_scaling": {
    **{"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
    **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
  },
  **{"rope_theta": 500000.0, "tie_word_embeddings": True},
  "vocab_size": 128256,
}


def test_gpt2_is_our_gpt2():
  described = hf_config.describe(GPT2)
  ours = config_lib.gpt2(
    **{"num_layers": 12, "width": 768, "num_heads": 12, "num_kv_heads": 12},
    **{"head_dim": 64, "mlp_width": 3072, "qkv_bias": True, "dropout": 0.1},
    pooling="last",
  )
  assert described == hf_config.Description(
    family="gpt2", config=ours, vocab_size=50257, max_length=1024
  )


def test_roberta_is_our_bert_with_later_positions():
  described = hf_config.describe(ROBERTA)
  ours = config_lib.bert(
    **{"num_layers": 12, "width": 768, "num_heads": 12, "num_kv_heads": 12},
    **{"head_dim": 64, "mlp_width": 3072, "qkv_bias": True, "dropout": 0.1},
    **{"norm_epsilon": 1e-5, "pooler": True},
  )
  assert described == hf_config.Description(
    family="roberta",
    config=ours,
    vocab_size=50265,
    **{"max_length": 512, "pad_id": 1, "token_types": 1},
  )
  assert described.position_offset == 2


def test_llama_3_is_our_llama_with_scaled_rotations():
  described = hf_config.describe(LLAMA3)
  ours = config_lib.llama(
    **{"num_layers": 16, "width": 2048, "num_heads": 32, "num_kv_heads": 8},
    **{"head_dim": 64, "mlp_width": 8192, "qkv_bias": False},
    **{"rope_base": 500000.0, "rope_scaling": (32.0, 1.0, 4.0, 8192.0)},
    **{"tie_embeddings": True, "pooling": "last"},
  )
  assert described == hf_config.Description(
    family="llama", config=ours, vocab_size=128256, max_length=131072
  )


def test_what_transformers_5_writes_reads_the_same():
  rope = LLAMA3["rope_scaling"] | {"rope_theta": LLAMA3["rope_theta"]}
  newer = {k: v for k, v in LLAMA3.items() if not k.startswith("rope")}
  newer |= {"rope_parameters": rope}
  assert hf_config.describe(newer) == hf_config.describe(LLAMA3)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_file_leaves_out_is_what_transformers_assumes(name):
  values = FAMILIES[name]
  described = checkpoints.description(name, "classify")
  assert (described.vocab_size, described.max_length) == (V, P)
  config = described.config
  assert (config.num_layers, config.width, config.num_heads) == (N, D, H)
  assert (config.mlp_width, described.num_classes) == (F, C)
  assert described.label_names == ("class 0", "class 1", "class 2")
  assert config.head_dim == values.get("head_dim", D // H)
  assert config.activation == {
    "bert": "relu",
    "roberta": "gelu",
    "xlm-roberta": "gelu",
    "distilbert": "gelu",
    "gpt2": "gelu_tanh",
  }.get(name, "silu")
  epsilon = {"bert": 1e-12, "distilbert": 1e-12}.get(name, 1e-5)
  assert config.norm_epsilon == epsilon
  assert config.tie_embeddings == (
    name in ("gpt2", "llama_biases_scaled") or not config.causal
  )


def test_of_two_dicts_of_rotation_the_older_counts():
  linear = {"rope_type": "linear", "factor": 3.0}
  both = {"rope_scaling": linear, "rope_parameters": {"rope_type": "default"}}
  described = hf_config.describe(FAMILIES["llama"] | both)
  assert described.config.rope_scaling == (3.0,)


def test_a_length_beside_the_rotation_goes_before_that_in_it():
  values = LLAMA3 | {"original_max_position_embeddings": 32}
  described = hf_config.describe(values)
  assert described.config.rope_scaling == (32.0, 1.0, 4.0, 32.0)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_no_number_of_keys_is_as_many_as_heads(family):
  values = FAMILIES[family] | {"num_key_value_heads": None}
  described = hf_config.describe(values)
  assert described.config.num_kv_heads == values["num_attention_heads"]


REFUSED = {
  "t5": (
    "bert",
    {"model_type": "t5"},
    "model_type 't5' is not supported; supported are bert, roberta, "
    "xlm-roberta, distilbert, gpt2, llama, mistral, qwen2",
  ),
  "no_type": ("bert", {"model_type": None}, "model_type None is not supported"),
  "relative": (
    "bert",
    {"position_embedding_type": "relative_key"},
    "position_embedding_type='relative_key' is not supported; only 'absolute'",
  ),
  "decoder": ("bert", {"is_decoder": True}, "is_decoder=True is not supported"),
  "activation": (
    "gpt2",
    {"activation_function": "quick_gelu"},
    "activation 'quick_gelu' is not supported; supported are gelu, gelu_new",
  ),
  "gpt2_scale": (
    "gpt2",
    {"scale_attn_by_inverse_layer_idx": True},
    "scale_attn_by_inverse_layer_idx=True is not supported",
  ),
  "yarn": (
    "llama",
    {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}},
    "rope_type 'yarn' is not supported; supported are default, linear, llama3",
  ),
  "no_factor": (
    "llama",
    {"rope_scaling": {"type": "linear"}},
    r"rope_type linear needs \['factor'\]",
  ),
  "partial": (
    "llama",
    {"rope_parameters": {"partial_rotary_factor": 0.5}},
    "partial_rotary_factor=0.5 is not supported",
  ),
  "some_biases": (
    "llama",
    {"attention_bias": True},
    "attention_bias=True with mlp_bias=False is not supported",
  ),
  "some_windows": (
    "qwen2",
    {"use_sliding_window": True, "max_window_layers": 1},
    "a sliding window for some layers only is not supported",
  ),
  "quantized": (
    "llama",
    {"quantization_config": {"bits": 4}},
    r"quantization_config=\{'bits': 4\} is not supported",
  ),
  "no_width": ("bert", {"hidden_size": None}, "hidden_size is missing"),
  "word": ("bert", {"hidden_size": "big"}, "config.json.width must be int"),
  "no_vocabulary": ("gpt2", {"vocab_size": 0}, "vocab_size must be a number"),
  "heads": ("gpt2", {"n_head": 3}, "16 is not divisible by model.num_heads 3"),
  "labels": (
    "bert",
    {
      "architectures": ["BertForSequenceClassification"],
      "id2label": {"1": "a", "2": "b"},
    },
    "id2label must name the classes 0, 1, 2",
  ),
  "same_labels": (
    "bert",
    {
      "architectures": ["BertForSequenceClassification"],
      "id2label": {"0": "a", "1": "a"},
    },
    "id2label has one name for two classes",
  ),
  "regression": (
    "bert",
    {
      "architectures": ["BertForSequenceClassification"],
      "id2label": {"0": "score"},
    },
    "of one label is not supported; .*take the old one's name out of archi",
  ),
}


@pytest.mark.parametrize(
  ("name", "options", "message"), REFUSED.values(), ids=REFUSED
)
def test_what_ours_does_not_compute_is_refused(name, options, message):
  with pytest.raises(schema.ConfigError, match=message) as caught:
    hf_config.describe(FAMILIES[name] | options)
  assert "\n" not in str(caught.value)


def _resolved(config):
  task = "lm" if config.causal else "classify"
  run = config_lib.Config(task=task, preset="none", model=config)
  return config_lib.resolve(run).model


@pytest.mark.parametrize(
  ("config", "family"),
  [
    (config_lib.gpt2(), "gpt2"),
    (config_lib.gpt2(activation="gelu", use_bias=False), "gpt2"),
    (config_lib.bert(), "bert"),
    (config_lib.llama(), "llama"),
    (config_lib.llama(use_bias=True), "llama"),
    (config_lib.llama(window=8), "mistral"),
    (config_lib.llama(qkv_bias=True, window=8), "qwen2"),
  ],
)
def test_a_model_from_scratch_belongs_to_a_family(config, family):
  config = _resolved(config)
  assert hf_config.family_of(config) == family
  described = hf_config.Description(
    family=family, config=config, vocab_size=V, max_length=P, token_types=2
  )
  again = hf_config.describe(hf_save.to_hf(described)).config
  again = dataclasses.replace(again, pooling=config.pooling)
  # Biases that a family always has are zeros in the export.
  assert dataclasses.replace(
    again,
    **{
      name: getattr(config, name) for name in ("use_bias", "qkv_bias", "pooler")
    },
  ) == dataclasses.replace(config, pooling=again.pooling)


@pytest.mark.parametrize("family", ["bert", "distilbert", "gpt2", "mistral"])
def test_a_classifier_belongs_to_the_family_of_its_head(family):
  described = checkpoints.description(family, "classify")
  assert hf_config.family_of(described.config, C) == family


def test_a_classifier_that_no_family_has_is_told():
  config = _resolved(config_lib.bert(pooling="mean"))
  assert hf_config.family_of(config) == "bert"
  with pytest.raises(
    schema.ConfigError,
    match="; bert's sequence classifier needs model.pooling='first'; it is 'me",
  ):
    hf_config.family_of(config, C)


MISFITS = {
  "alibi": (config_lib.ModelConfig(), "llama needs model.norm='rmsnorm'"),
  "both_ways": (
    config_lib.gpt2(causal=False),
    "gpt2 needs model.causal=True; it is False",
  ),
  "ungated": (config_lib.llama(gated=False), "llama needs model.gated=True"),
  "widths": (
    config_lib.gpt2(num_layers=2, mlp_width=(8, 9)),
    "gpt2 has one model.mlp_width for all layers",
  ),
  "heads": (
    config_lib.gpt2(num_layers=2, heads=((0,), (1, 2))),
    "gpt2 has all heads in every layer",
  ),
  "groups": (
    config_lib.gpt2(num_kv_heads=4),
    "gpt2 needs as many model.num_kv_heads as model.num_heads",
  ),
  "head_dim": (
    config_lib.gpt2(head_dim=3),
    "gpt2 needs heads that share out model.width",
  ),
}


@pytest.mark.parametrize(("config", "message"), MISFITS.values(), ids=MISFITS)
def test_what_no_family_computes_is_told(config, message):
  with pytest.raises(
    schema.ConfigError, match=f"no model of transformers .*{message}"
  ):
    hf_config.family_of(_resolved(config))
