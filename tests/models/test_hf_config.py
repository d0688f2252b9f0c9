import dataclasses

import pytest

from folding import config as config_lib
from folding.errors import ConfigError
from folding.models import hf_config
from tests.models import checkpoints
from tests.models.checkpoints import FAMILIES, C, N, P, V

# What config.json of the hub's files has, without fields that nothing reads.
# fmt: off
GPT2 = {
  "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"],
  "activation_function": "gelu_new", "layer_norm_epsilon": 1e-05,
  "attn_pdrop": 0.1, "embd_pdrop": 0.1, "resid_pdrop": 0.1,
  "n_ctx": 1024, "n_embd": 768, "n_head": 12, "n_layer": 12,
  "n_positions": 1024, "vocab_size": 50257,
}
ROBERTA = {
  "model_type": "roberta", "architectures": ["RobertaForMaskedLM"],
  "bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1,
  "hidden_act": "gelu", "layer_norm_eps": 1e-05,
  "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1,
  "hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12,
  "num_hidden_layers": 12, "max_position_embeddings": 514,
  "type_vocab_size": 1, "vocab_size": 50265,
}
LLAMA3 = {
  "model_type": "llama", "architectures": ["LlamaForCausalLM"],
  "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True,
  "bos_token_id": 128000, "eos_token_id": [128001, 128008, 128009],
  "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048,
  "intermediate_size": 8192, "max_position_embeddings": 131072,
  "num_attention_heads": 32, "num_hidden_layers": 16,
  "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "vocab_size": 128256,
  "rope_scaling": {
    "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192, "rope_type": "llama3",
  },
  "rope_theta": 500000.0,
}
BASE = {
  "num_layers": 12, "width": 768, "num_heads": 12, "num_kv_heads": 12,
  "head_dim": 64, "mlp_width": 3072, "qkv_bias": True, "dropout": 0.1,
}
# fmt: on


def test_describe_gpt2_is_gpt2():
  described = hf_config.describe(GPT2)
  assert described == hf_config.Description(
    family="gpt2",
    config=config_lib.gpt2(**BASE, pooling="last"),
    vocab_size=50257,
    max_length=1024,
  )
  # The usual one of several names.
  assert hf_config.to_hf(described)["activation_function"] == "gelu_new"


def test_describe_roberta_is_bert_with_later_positions():
  config = config_lib.bert(**BASE, norm_epsilon=1e-5, pooler=True)
  assert hf_config.describe(ROBERTA) == hf_config.Description(
    family="roberta",
    config=config,
    vocab_size=50265,
    **{"max_length": 512, "pad_id": 1, "token_types": 1},
  )
  described = hf_config.describe(ROBERTA | {"pad_token_id": 3})
  assert (described.max_length, described.position_offset) == (510, 4)


def test_describe_llama_3_is_llama_with_scaled_rotations():
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
  # As transformers 5 writes it.
  rope = LLAMA3["rope_scaling"] | {"rope_theta": LLAMA3["rope_theta"]}
  newer = {k: v for k, v in LLAMA3.items() if not k.startswith("rope")}
  assert hf_config.describe(newer | {"rope_parameters": rope}) == described


def test_describe_ignores_segments_that_a_family_does_not_have():
  values = FAMILIES["distilbert"]
  assert hf_config.describe(
    values | {"type_vocab_size": 2}
  ) == hf_config.describe(values)


def test_describe_orders_labels_by_their_ids():
  labels = {str(i): f"class {i}" for i in range(11, -1, -1)}
  values = FAMILIES["bert"] | CLASSES | {"id2label": labels}
  described = hf_config.describe(values)
  assert described.label_names == tuple(f"class {i}" for i in range(12))


LINEAR = {"rope_type": "linear", "factor": 3.0}
PARTIAL = {"rope_parameters": {"partial_rotary_factor": 0.25}}
OLDER = {"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "default"}}
LONGER = {"original_max_position_embeddings": 32}
LONGER["rope_scaling"] = LLAMA3["rope_scaling"]
SLIDING = {"use_sliding_window": True, "sliding_window": 5}
# fmt: off
READ = [
  ("llama", OLDER, "rope_scaling", (3.0,)),
  ("llama", LONGER, "rope_scaling", (32.0, 1.0, 4.0, 32.0)),
  ("llama", SLIDING, "window", None),
  ("mistral", {"num_key_value_heads": None}, "num_kv_heads", 4),
  ("mistral", {"sliding_window": 7}, "window", 7),
  ("mistral", {"sliding_window": None}, "window", None),
  # Mistral does not read layer_types.
  ("mistral", {"layer_types": ["full_attention"] * N}, "window", 3),
  ("qwen2", {"sliding_window": 5}, "window", None),
  ("modernbert", {"classifier_pooling": "cls"}, "pooling", "first"),
  # In transformers 4; transformers 5 fails.
  ("modernbert", {"local_rope_theta": None}, "rope_base", 100.0),
  # It has no such option, and some of its files have BERT's with any value.
  ("modernbert", {"position_embedding_type": "sans_pos"}, "causal", False),
  ("gpt_neox", PARTIAL, "rope_share", 0.25),
  ("gemma2", {"attn_logit_softcapping": None}, "attention_cap", None),
  # The first 28 layers have none.
  ("qwen2", {"use_sliding_window": True}, "window", None),
  ("qwen2", {"sliding_window": 5, "layer_types": ["sliding_attention"] * N}, "window", None),
  ("qwen2", SLIDING | {"max_window_layers": 0}, "window", 5),
  ("qwen2", SLIDING | {"max_window_layers": 1}, "window", (0, 5)),
  ("qwen2", SLIDING | {"layer_types": ["sliding_attention"] * N}, "window", 5),
]
# fmt: on


@pytest.mark.parametrize(("name", "options", "field", "value"), READ)
def test_describe_reads_options_as_transformers(name, options, field, value):
  described = hf_config.describe(FAMILIES[name] | options)
  assert getattr(described.config, field) == value


CLASSES = {"architectures": ["BertForSequenceClassification"]}
YARN = {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}
MULTI = {"problem_type": "multi_label_classification"}
# fmt: off
REFUSED = [
  ("bert", {"model_type": "t5"}, "model_type 't5'.*bert, roberta"),
  ("bert", {"model_type": None}, "model_type None"),
  ("bert", {"position_embedding_type": "relative_key"}, "only 'absolute' is"),
  ("bert", {"is_decoder": True}, "is_decoder=True"),
  ("gpt2", {"activation_function": "quick_gelu"}, "activation_function 'quick_gelu'"),
  ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "inverse_layer_idx=True"),
  ("llama", YARN, "rope_type 'yarn'"),
  ("llama", {"rope_scaling": {"type": "linear"}}, r"needs \['factor'\]"),
  ("llama", PARTIAL, "partial_rotary_factor=0.25"),
  ("llama", {"is_causal": False}, "is_causal=False .*; only True is"),
  ("llama", {"attention_bias": True}, "with mlp_bias=False"),
  ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
  ("qwen2", SLIDING | {"layer_types": ["chunked"] * N}, "layer_types"),
  ("opt", {"do_layer_norm_before": False}, "only True is"),
  ("opt", {"word_embed_proj_dim": 8}, "word_embed_proj_dim=8"),
  ("modernbert", {"mlp_bias": True}, "mlp_bias=True"),
  ("modernbert", {"classifier_pooling": "max"}, "'max' .* are cls, mean"),
  ("gpt_neox", {"attention_bias": False}, "attention_bias=False"),
  ("gpt_neox", {"rotary_pct": 0.1}, "rotates 0 of 8"),
  ("modernbert", CLASSES | {"classifier_bias": True}, "classifier_bias=True"),
  ("gemma3_text", {"query_pre_attn_scalar": 5}, "with head_dim=6"),
  ("gemma3_text", {"final_logit_softcapping": 30.0}, "softcapping=30.0"),
  ("gemma3_text", {"rope_scaling": LINEAR}, "'linear' beside windows"),
  ("qwen3", {"attention_bias": True}, "attention_bias=True"),
  ("bert", {"hidden_size": None}, "hidden_size is missing"),
  ("bert", {"hidden_size": "big"}, "width must be int"),
  ("gpt2", {"vocab_size": 0}, "vocab_size must be"),
  ("roberta", {"max_position_embeddings": 2}, "no positions left"),
  ("gpt2", {"n_head": 3}, "not divisible by model.num_heads 3"),
  ("bert", {"type_vocab_size": "a"}, "type_vocab_size must be"),
  ("bert", CLASSES | {"problem_type": "regression"}, "'regression' with 2"),
  ("bert", CLASSES | MULTI | {"num_labels": 1}, "'multi_.* with 1 labels"),
  ("bert", CLASSES | {"problem_type": "other"}, "supported are single_label"),
  ("bert", {"pad_token_id": "a"}, "pad_token_id"),
  ("bert", CLASSES | {"id2label": {"1": "a", "2": "b"}}, "id2label must"),
  ("bert", CLASSES | {"id2label": {"0": [1], "1": {}}}, "id2label must"),
  ("bert", CLASSES | {"id2label": {"0": "a", "1": "a"}}, "id2label must"),
]
# fmt: on


@pytest.mark.parametrize(("name", "options", "message"), REFUSED)
def test_describe_refuses_the_unsupported_in_one_line(name, options, message):
  with pytest.raises(ConfigError, match=message) as caught:
    hf_config.describe(FAMILIES[name] | options)
  assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("name", "head"), checkpoints.CASES)
def test_to_hf_is_the_inverse_of_describe(name, head):
  described = checkpoints.description(name, head)
  assert described.head == head
  assert described.label_names == (
    ("class 0", "class 1", "class 2") if head == "classify" else ()
  )
  assert hf_config.describe(hf_config.to_hf(described)) == described


@pytest.mark.parametrize(
  ("options", "task", "num_outputs"),
  [
    ({"num_labels": 1}, "regress", 1),
    ({"id2label": {"0": "x"}, "problem_type": "regression"}, "regress", 1),
    ({"id2label": {"0": "x", "1": "y"}} | MULTI, "multilabel", 2),
    ({"num_labels": 3}, "classify", 3),
  ],
)
def test_problem_type_is_the_task_in_both_directions(
  options, task, num_outputs
):
  described = hf_config.describe(FAMILIES["bert"] | CLASSES | options)
  assert (described.task, described.num_classes) == (task, num_outputs)
  assert hf_config.describe(hf_config.to_hf(described)) == described


def test_decoder_that_makes_vectors_has_no_head():
  described = hf_config.describe(FAMILIES["llama"])
  assert (described.head, described.task) == ("lm", "lm")
  described = dataclasses.replace(described, problem="embed")
  assert (described.head, described.task) == ("none", "embed")


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
def test_family_of_model_from_scratch(config, family):
  config = _resolved(config)
  assert hf_config.family_of(config) == family
  described = hf_config.Description(
    family=family, config=config, vocab_size=V, max_length=P, token_types=2
  )
  again = hf_config.describe(hf_config.to_hf(described)).config
  # Biases that a family always has are zeros in the export, and the pooling of
  # its classifier does not matter here.
  free = {
    name: getattr(config, name)
    for name in ("use_bias", "qkv_bias", "pooler", "pooling")
  }
  assert dataclasses.replace(again, **free) == config


def test_family_of_classifier_depends_on_its_head():
  for family in ("bert", "distilbert", "gpt2", "mistral"):
    described = checkpoints.description(family, "classify")
    assert hf_config.family_of(described.config, C) == family
  config = _resolved(config_lib.bert(pooling="mean"))
  assert hf_config.family_of(config) == "bert"
  with pytest.raises(ConfigError, match="model.pooling='first'; it is 'mean'"):
    hf_config.family_of(config, C)


# fmt: off
MISFITS = [
  (config_lib.ModelConfig(), "llama needs model.norm='rmsnorm'"),
  (config_lib.gpt2(causal=False), "gpt2 needs model.causal=True"),
  (config_lib.llama(gated=False), "llama needs model.gated=True"),
  (config_lib.gpt2(num_layers=2, mlp_width=(8, 9)), "gpt2 has one model.mlp_w"),
  (config_lib.gpt2(num_layers=2, heads=((0,), (1, 2))), "gpt2 has all heads"),
  (config_lib.gpt2(num_kv_heads=4), "gpt2 needs .*num_kv_heads"),
  (config_lib.gpt2(head_dim=3), "gpt2 needs model.head_dim"),
]
# fmt: on


@pytest.mark.parametrize(("config", "message"), MISFITS)
def test_family_of_unknown_architecture_is_refused(config, message):
  with pytest.raises(ConfigError, match=f"no model of .*{message}"):
    hf_config.family_of(_resolved(config))


# fmt: off
@pytest.mark.parametrize(("name", "fields", "message"), [
  ("bert", {"pooler": False}, "needs model.pooler=True"),
  ("bert", {"pooler_norm": True}, "needs model.pooler_norm=False"),
  # transformers has no projection of embeddings as wide as the model.
  ("electra", {"embed_width": 16}, "needs model.embed_width=0"),
  ("modernbert", {"pooling": "last"}, "pooling='first' or 'mean'; it is 'last'"),
  ("distilbert", {"pooler_activation": "tanh"}, "pooler_activation='relu'"),
  ("distilbert", {"norm_epsilon": 1e-5}, "needs model.norm_epsilon=1e-12"),
  ("llama", {"pooling": "mean"}, "needs model.pooling='last'"),
  ("llama", {"qkv_bias": True}, "needs model.qkv_bias=False"),
  ("mistral", {"use_bias": True}, "needs model.use_bias=False"),
])
# fmt: on
def test_to_hf_refuses_a_misfit(name, fields, message):
  described = checkpoints.description(name, "classify")
  config = dataclasses.replace(described.config, **fields)
  with pytest.raises(ConfigError, match=f"no export as .*{message}"):
    hf_config.to_hf(dataclasses.replace(described, config=config))
