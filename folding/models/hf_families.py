"""The families of Hugging Face models that ours can be, as tables.

Nothing is computed here: how a config.json names what, what it assumes when
it is silent, and what each family computes in the words of `ModelConfig`.
"""

from typing import Any

# Family (the `model_type` of config.json): how transformers' classes begin.
FAMILIES = {
  "bert": "Bert",
  "roberta": "Roberta",
  "xlm-roberta": "XLMRoberta",
  "distilbert": "DistilBert",
  "gpt2": "GPT2",
  "llama": "Llama",
  "mistral": "Mistral",
  "qwen2": "Qwen2",
}
# Families of one layout have the same names of fields and tensors.
LAYOUTS = {name: name for name in FAMILIES} | {
  "xlm-roberta": "roberta",
  "mistral": "llama",
  "qwen2": "llama",
}

_NAMES = {
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "activation": "hidden_act",
}
_BERT_NAMES = _NAMES | {
  "norm_epsilon": "layer_norm_eps",
  "dropout": "hidden_dropout_prob",
}
# Layout: field of ModelConfig: field of config.json.
FIELD_NAMES: dict[str, dict[str, str]] = {
  "bert": _BERT_NAMES,
  "roberta": _BERT_NAMES,
  "distilbert": {
    "num_layers": "n_layers",
    "width": "dim",
    "num_heads": "n_heads",
    "mlp_width": "hidden_dim",
    "activation": "activation",
    "dropout": "dropout",
  },
  "gpt2": {
    "num_layers": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "mlp_width": "n_inner",
    "activation": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
  },
  "llama": _NAMES
  | {
    "num_kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "norm_epsilon": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
  },
}
FIELD_NAMES["gpt2"]["tie_embeddings"] = "tie_word_embeddings"
POSITION_NAMES = dict.fromkeys(FIELD_NAMES, "max_position_embeddings") | {
  "gpt2": "n_positions"
}

# Activation of config.json: ours, where ours is first met under its best name.
ACTIVATIONS = {
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "silu": "silu",
  "swish": "silu",
  "relu": "relu",
}

# What transformers assumes where config.json is silent, in its own words.
_BERT_DEFAULTS: dict[str, Any] = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
  "max_position_embeddings": 512,
  "type_vocab_size": 2,
  "pad_token_id": 0,
}
_LLAMA_DEFAULTS: dict[str, Any] = {
  "hidden_act": "silu",
  "rms_norm_eps": 1e-6,
  "tie_word_embeddings": False,
  "attention_bias": False,
  "mlp_bias": False,
}
DEFAULTS: dict[str, dict[str, Any]] = {
  "bert": _BERT_DEFAULTS,
  "roberta": _BERT_DEFAULTS | {"pad_token_id": 1},
  "xlm-roberta": _BERT_DEFAULTS | {"pad_token_id": 1},
  "distilbert": {
    "activation": "gelu",
    "dropout": 0.1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
  },
  "gpt2": {
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "n_positions": 1024,
  },
  "llama": _LLAMA_DEFAULTS | {"max_position_embeddings": 2048},
  "mistral": _LLAMA_DEFAULTS
  | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
  },
  "qwen2": _LLAMA_DEFAULTS
  | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
  },
}

# Kind of rotary scaling: the fields whose values `rope_scaling` lists.
ROPE_SCALINGS: dict[str, tuple[str, ...]] = {
  "default": (),
  "linear": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
}

# Options that change what is computed: the one value that ours computes.
ONLY: dict[str, Any] = {
  "position_embedding_type": "absolute",
  "is_decoder": False,
  "is_encoder_decoder": False,
  "add_cross_attention": False,
  "scale_attn_weights": True,
  "scale_attn_by_inverse_layer_idx": False,
  "partial_rotary_factor": 1.0,
  "quantization_config": None,
}

# What a family computes, in our words; a field that is not here is free.
_ENCODER: dict[str, Any] = {
  "causal": False,
  "norm": "layernorm",
  "norm_position": "post",
  "positions": "learned",
  "window": None,
  "gated": False,
}
_LLAMA: dict[str, Any] = {
  "causal": True,
  "norm": "rmsnorm",
  "norm_position": "pre",
  "positions": "rope",
  "gated": True,
}
COMPUTES: dict[str, dict[str, Any]] = {
  "gpt2": _ENCODER | {"causal": True, "norm_position": "pre"},
  "llama": _LLAMA | {"window": None},
  "mistral": _LLAMA | {"use_bias": False, "qkv_bias": False},
  "qwen2": _LLAMA | {"use_bias": False, "qkv_bias": True},
  "bert": _ENCODER,
  "roberta": _ENCODER,
  "xlm-roberta": _ENCODER,
  "distilbert": _ENCODER | {"norm_epsilon": 1e-12},
}

# What a family's sequence classifier reads, as fields of ModelConfig.
_FIRST = {"pooling": "first", "pooler": True, "pooler_activation": "tanh"}
_LAST = {"pooling": "last", "pooler": False}
CLASSIFIER_FIELDS: dict[str, dict[str, Any]] = {
  **dict.fromkeys(("bert", "roberta", "xlm-roberta"), _FIRST),
  "distilbert": _FIRST | {"pooler_activation": "relu"},
  **dict.fromkeys(("gpt2", "llama", "mistral", "qwen2"), _LAST),
}
