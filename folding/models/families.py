"""Families of Hugging Face checkpoints: one entry per `model_type`.

An entry maps fields of config.json to `ModelConfig` (see `Family`), names the
tensors (`Layout`) and, if llama.cpp has it, the architecture of a GGUF file. To
add a family, add an entry: `hf_config`, `hf_weights` and the exports read these.
"""

import dataclasses
from typing import Any

from folding.models import hf_family as hf
from folding.models.hf_family import Family, Layout, Rule

_FIELDS = {
  "num_layers": "num_hidden_layers",
  "width": "hidden_size",
  "num_heads": "num_attention_heads",
  "mlp_width": "intermediate_size",
  "activation": "hidden_act",
}
_CAPS = {  # field of ModelConfig: of config.json
  "attention_cap": "attn_logit_softcapping",
  "logit_cap": "final_logit_softcapping",
}
_DECODER: dict[str, Any] = {"positions": "learned"}
_ENCODER = _DECODER | {"causal": False, "norm_position": "post"}
_FIRST: dict[str, Any] = {"pooling": "first", "pooler": True}

_EMBEDDINGS = {
  "embed": "embeddings.word_embeddings",
  "position_embed": "embeddings.position_embeddings",
  "norm_embed": "embeddings.LayerNorm",
}
_SEGMENTS = {"segment_embed": "embeddings.token_type_embeddings"}
_BERT_DEFAULTS = {
  "hidden_act": "gelu",
  "layer_norm_eps": 1e-12,
  "hidden_dropout_prob": 0.1,
  "max_position_embeddings": 512,
  "pad_token_id": 0,
}
_BERT = Family(
  prefix="Bert",
  fields=_FIELDS
  | {"norm_epsilon": "layer_norm_eps", "dropout": "hidden_dropout_prob"},
  defaults=_BERT_DEFAULTS | {"type_vocab_size": 2},
  computes=_ENCODER,
  classifier=_FIRST,
  only={"position_embedding_type": "absolute"},
  writes={"attention_probs_dropout_prob": 0.0},
  layout=Layout(
    prefix="bert.",
    outer=_EMBEDDINGS | _SEGMENTS | {"pooler": "pooler.dense"},
    blocks="encoder.layer",
    block={
      "attn/q": "attention.self.query",
      "attn/k": "attention.self.key",
      "attn/v": "attention.self.value",
      "attn/o": "attention.output.dense",
      "norm_attn": "attention.output.LayerNorm",
      "mlp/up": "intermediate.dense",
      "mlp/down": "output.dense",
      "norm_mlp": "output.LayerNorm",
    },
    classifier={"head": "classifier"},
    idle_pooler="pooler.dense",
    has_biases=True,
  ),
)
_ROBERTA = dataclasses.replace(
  _BERT,
  prefix="Roberta",
  first_position=None,
  defaults=_BERT.defaults | {"pad_token_id": 1},
  layout=dataclasses.replace(
    _BERT.layout,
    prefix="roberta.",
    outer=_EMBEDDINGS | _SEGMENTS,  # its classifier does not read its pooler
    classifier={"pooler": "classifier.dense", "head": "classifier.out_proj"},
  ),
)
_MPNET = dataclasses.replace(
  _BERT,
  prefix="MPNet",
  first_position=2,
  defaults=_BERT_DEFAULTS | {"pad_token_id": 1},
  computes=_ENCODER | {"relative_buckets": 32},
  # Its positions count the tokens that are not 1, whatever the pad token is.
  only=_BERT.only | {"relative_attention_num_buckets": 32, "pad_token_id": 1},
  writes=_BERT.writes | {"relative_attention_num_buckets": 32},
  layout=dataclasses.replace(
    _ROBERTA.layout,
    prefix="mpnet.",
    outer=_EMBEDDINGS,
    block=_BERT.layout.block
    | {
      "attn/q": "attention.attn.q",
      "attn/k": "attention.attn.k",
      "attn/v": "attention.attn.v",
      "attn/o": "attention.attn.o",
      "norm_attn": "attention.LayerNorm",
    },
    relative="encoder.relative_attention_bias",
  ),
)
_EMBEDDING_SIZE = Rule(
  lambda values: {
    "embed_width": values["embedding_size"]
    if values.get("embedding_size", values["hidden_size"])
    != values["hidden_size"]
    else 0
  },
  lambda config: {"embedding_size": config.embed_width or config.width},
)
_ELECTRA = dataclasses.replace(
  _BERT,
  prefix="Electra",
  defaults=_BERT.defaults | {"embedding_size": 128},
  classifier=_FIRST | {"pooler_activation": "gelu"},
  rules=(_EMBEDDING_SIZE,),
  layout=dataclasses.replace(
    _ROBERTA.layout,
    prefix="electra.",
    outer=_ROBERTA.layout.outer | {"embed_project": "embeddings_project"},
    idle_pooler="",
  ),
)
# Without relative attention it has BERT's layers, and embeddings of any width.
_DEBERTA = dataclasses.replace(
  _BERT,
  prefix="DebertaV2",
  fields=_BERT.fields | {"pooler_activation": "pooler_hidden_act"},
  defaults=_BERT.defaults
  | {
    "layer_norm_eps": 1e-7,
    "pooler_hidden_act": "gelu",
    "type_vocab_size": 0,
  },
  computes=_ENCODER | {"project_first": True},
  only=_BERT.only
  | {"relative_attention": False, "position_biased_input": True},
  rules=(_EMBEDDING_SIZE,),
  writes=_BERT.writes
  | {"relative_attention": False, "position_biased_input": True}
  | {"pooler_dropout": 0.0},
  layout=dataclasses.replace(
    _BERT.layout,
    prefix="deberta.",
    outer=_EMBEDDINGS | _SEGMENTS | {"embed_project": "embeddings.embed_proj"},
    block=_BERT.layout.block
    | {
      f"attn/{x}": f"attention.self.{name}_proj"
      for x, name in zip("qkv", ("query", "key", "value"), strict=True)
    },
    classifier={"pooler": "pooler.dense", "head": "classifier"},
    idle_pooler="",
  ),
)
_DISTILBERT = Family(
  prefix="DistilBert",
  fields={
    "num_layers": "n_layers",
    "width": "dim",
    "num_heads": "n_heads",
    "mlp_width": "hidden_dim",
    "activation": "activation",
    "dropout": "dropout",
  },
  defaults={
    "activation": "gelu",
    "dropout": 0.1,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
  },
  computes=_ENCODER | {"norm_epsilon": 1e-12},
  classifier=_FIRST | {"pooler_activation": "relu"},
  writes={"attention_dropout": 0.0},
  layout=Layout(
    prefix="distilbert.",
    outer=_EMBEDDINGS,
    blocks="transformer.layer",
    block={
      "attn/q": "attention.q_lin",
      "attn/k": "attention.k_lin",
      "attn/v": "attention.v_lin",
      "attn/o": "attention.out_lin",
      "norm_attn": "sa_layer_norm",
      "mlp/up": "ffn.lin1",
      "mlp/down": "ffn.lin2",
      "norm_mlp": "output_layer_norm",
    },
    classifier={"pooler": "pre_classifier", "head": "classifier"},
    has_biases=True,
  ),
)
_MODERNBERT = Family(
  prefix="ModernBert",
  fields=_FIELDS
  | {
    "activation": "hidden_activation",
    "norm_epsilon": "norm_eps",
    "pooling": "classifier_pooling",
  },
  defaults={
    "hidden_activation": "gelu",
    "norm_eps": 1e-5,
    "max_position_embeddings": 8192,
    "local_attention": 128,
    "global_attn_every_n_layers": 3,
    "global_rope_theta": 160000.0,
    "local_rope_theta": 10000.0,
    "pad_token_id": 50283,
    "classifier_pooling": "cls",
  },
  computes={
    "causal": False,
    "embed_norm": True,
    "positions": "rope",
    "gated": True,
    "use_bias": False,
  },
  classifier={
    "pooler": True,
    "pooler_activation": "gelu",
    "pooler_norm": True,
  },
  only={
    "attention_bias": False,
    "mlp_bias": False,
    "norm_bias": False,
    "classifier_bias": False,
    "classifier_activation": "gelu",
  },
  rules=(
    hf.windows(
      lambda values, n: n % values["global_attn_every_n_layers"] > 0,
      field="local_attention",
      both_sides=True,
      bases={hf.FULL: "global_rope_theta", hf.SLIDING: "local_rope_theta"},
    ),
  ),
  layout=Layout(
    prefix="model.",
    outer={
      "embed": "embeddings.tok_embeddings",
      "norm_embed": "embeddings.norm",
      "norm_final": "final_norm",
    },
    blocks="layers",
    block={
      "norm_attn": "attn_norm",
      "attn/q attn/k attn/v": "attn.Wqkv",
      "attn/o": "attn.Wo",
      "norm_mlp": "mlp_norm",
      "mlp/gate mlp/up": "mlp.Wi",
      "mlp/down": "mlp.Wo",
    },
    classifier={
      "pooler": "head.dense",
      "norm_pooler": "head.norm",
      "head": "classifier",
    },
  ),
)
_GPT2 = Family(
  prefix="GPT2",
  lm="GPT2LMHeadModel",
  fields={
    "num_layers": "n_layer",
    "width": "n_embd",
    "num_heads": "n_head",
    "mlp_width": "n_inner",
    "activation": "activation_function",
    "norm_epsilon": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
    "tie_embeddings": "tie_word_embeddings",
  },
  positions="n_positions",
  defaults={
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "resid_pdrop": 0.1,
    "tie_word_embeddings": True,
    "n_positions": 1024,
  },
  computes=_DECODER,
  rules=(Rule(write=lambda config: {"embd_pdrop": config.dropout}),),
  writes={"attn_pdrop": 0.0},
  layout=Layout(
    prefix="transformer.",
    outer={"embed": "wte", "position_embed": "wpe", "norm_final": "ln_f"},
    blocks="h",
    block={
      "norm_attn": "ln_1",
      "attn/q attn/k attn/v": "attn.c_attn",
      "attn/o": "attn.c_proj",
      "norm_mlp": "ln_2",
      "mlp/up": "mlp.c_fc",
      "mlp/down": "mlp.c_proj",
    },
    has_biases=True,
    is_transposed=True,
  ),
)
_OPT = Family(
  prefix="OPT",
  fields=_FIELDS
  | {
    "mlp_width": "ffn_dim",
    "activation": "activation_function",
    "dropout": "dropout",
    "tie_embeddings": "tie_word_embeddings",
  },
  first_position=2,
  counts_first=False,
  defaults={
    "activation_function": "relu",
    "dropout": 0.1,
    "tie_word_embeddings": True,
    "max_position_embeddings": 2048,
    "pad_token_id": 1,
  },
  computes=_DECODER | {"norm_epsilon": 1e-5},
  only={
    "do_layer_norm_before": True,
    "_remove_final_layer_norm": False,
    "enable_bias": True,
    "layer_norm_elementwise_affine": True,
  },
  equal={"word_embed_proj_dim": "hidden_size"},
  writes={"attention_dropout": 0.0},
  layout=Layout(
    prefix="model.",
    outer={
      "embed": "decoder.embed_tokens",
      "position_embed": "decoder.embed_positions",
      "norm_final": "decoder.final_layer_norm",
    },
    blocks="decoder.layers",
    block={
      "norm_attn": "self_attn_layer_norm",
      "attn/q": "self_attn.q_proj",
      "attn/k": "self_attn.k_proj",
      "attn/v": "self_attn.v_proj",
      "attn/o": "self_attn.out_proj",
      "norm_mlp": "final_layer_norm",
      "mlp/up": "fc1",
      "mlp/down": "fc2",
    },
    has_biases=True,
  ),
)
_GPT_NEOX = Family(
  prefix="GPTNeoX",
  fields=_FIELDS
  | {
    "norm_epsilon": "layer_norm_eps",
    "dropout": "hidden_dropout",
    "tie_embeddings": "tie_word_embeddings",
    "parallel": "use_parallel_residual",
  },
  defaults={
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-5,
    "hidden_dropout": 0.0,
    "tie_word_embeddings": False,
    "use_parallel_residual": True,
    "max_position_embeddings": 2048,
    "rotary_emb_base": 10000.0,
    "rotary_pct": 0.25,
  },
  computes={"positions": "rope"},
  only={"attention_bias": True},
  rules=(hf.rope("rotary_emb_base", "rotary_pct"),),
  writes={"attention_dropout": 0.0},
  layout=Layout(
    prefix="gpt_neox.",
    outer={"embed": "embed_in", "norm_final": "final_layer_norm"},
    blocks="layers",
    block={
      "norm_attn": "input_layernorm",
      "attn/q attn/k attn/v": "attention.query_key_value",
      "attn/o": "attention.dense",
      "norm_mlp": "post_attention_layernorm",
      "mlp/up": "mlp.dense_h_to_4h",
      "mlp/down": "mlp.dense_4h_to_h",
    },
    lm_head="embed_out",
    has_biases=True,
    is_stacked_by_head=True,
  ),
)
_LLAMA_FIELDS = _FIELDS | {
  "num_kv_heads": "num_key_value_heads",
  "head_dim": "head_dim",
  "norm_epsilon": "rms_norm_eps",
  "tie_embeddings": "tie_word_embeddings",
}
_LLAMA_COMPUTES: dict[str, Any] = {
  "norm": "rmsnorm",
  "positions": "rope",
  "gated": True,
}
_LLAMA = Family(
  prefix="Llama",
  fields=_LLAMA_FIELDS | {"use_bias": "mlp_bias"},
  defaults={
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "max_position_embeddings": 2048,
  },
  computes=_LLAMA_COMPUTES,
  equal={"attention_bias": "mlp_bias"},
  rules=(hf.rope(),),
  layout=Layout(
    prefix="model.",
    outer={"embed": "embed_tokens", "norm_final": "norm"},
    blocks="layers",
    block={
      "norm_attn": "input_layernorm",
      "attn/q": "self_attn.q_proj",
      "attn/k": "self_attn.k_proj",
      "attn/v": "self_attn.v_proj",
      "attn/o": "self_attn.o_proj",
      "norm_mlp": "post_attention_layernorm",
      "mlp/gate": "mlp.gate_proj",
      "mlp/up": "mlp.up_proj",
      "mlp/down": "mlp.down_proj",
    },
  ),
  gguf=hf.Architecture("llama", "deci", "silu", True, True),
)
_MISTRAL = dataclasses.replace(
  _LLAMA,
  prefix="Mistral",
  fields=_LLAMA_FIELDS | {"window": "sliding_window"},
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 131072,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False},
  equal={},
)
# llama.cpp computes it as a Llama, whose biases are optional there.
_QWEN2 = dataclasses.replace(
  _LLAMA,
  prefix="Qwen2",
  fields=_LLAMA_FIELDS,
  defaults=_LLAMA.defaults
  | {
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
  },
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qkv_bias": True},
  equal={},
  rules=(
    hf.windows(lambda values, n: n >= values["max_window_layers"]),
    Rule(
      lambda values: {} if values["use_sliding_window"] else {"window": None},
      lambda config: {
        "use_sliding_window": config.window is not None,
        "max_window_layers": 0,
      },
    ),
    hf.rope(),
  ),
)
_QK_NORMS = {
  "attn/q_norm": "self_attn.q_norm",
  "attn/k_norm": "self_attn.k_norm",
}
_QWEN3 = dataclasses.replace(
  _QWEN2,
  prefix="Qwen3",
  defaults=_QWEN2.defaults | {"head_dim": 128},
  computes=_LLAMA_COMPUTES | {"use_bias": False, "qk_norm": True},
  only={"attention_bias": False},
  layout=dataclasses.replace(
    _LLAMA.layout, block=_LLAMA.layout.block | _QK_NORMS
  ),
  gguf=hf.Architecture("qwen3"),
)
_GEMMA2 = Family(
  prefix="Gemma2",
  fields=_LLAMA_FIELDS | {"activation": "hidden_activation"} | _CAPS,
  defaults={
    "hidden_activation": "gelu_pytorch_tanh",
    "num_key_value_heads": 4,
    "head_dim": 256,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
    "max_position_embeddings": 8192,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
  },
  computes=_LLAMA_COMPUTES
  | {"norm_position": "both", "use_bias": False, "scale_embeddings": True},
  only={"attention_bias": False, "use_bidirectional_attention": False},
  equal={"query_pre_attn_scalar": "head_dim"},
  rules=(hf.windows(lambda _, n: n % 2 == 0), hf.rope()),
  layout=dataclasses.replace(
    _LLAMA.layout,
    block=_LLAMA.layout.block
    | {
      "norm_attn_out": "post_attention_layernorm",
      "norm_mlp": "pre_feedforward_layernorm",
      "norm_mlp_out": "post_feedforward_layernorm",
    },
    norm_shift=1.0,
  ),
)
_GEMMA3 = dataclasses.replace(
  _GEMMA2,
  prefix="Gemma3Text",
  lm="Gemma3ForCausalLM",
  fields=_LLAMA_FIELDS | {"activation": "hidden_activation"},
  defaults=_GEMMA2.defaults
  | {
    "max_position_embeddings": 131072,
    "sliding_window_pattern": 6,
    "rope_theta": 1e6,
    "rope_local_base_freq": 1e4,
  }
  | dict.fromkeys(_CAPS.values()),
  computes=_GEMMA2.computes | {"qk_norm": True},
  only=_GEMMA2.only | dict.fromkeys(_CAPS.values()),
  rules=(
    hf.windows(
      lambda values, n: (n + 1) % values["sliding_window_pattern"] > 0,
      bases={hf.FULL: "rope_theta", hf.SLIDING: "rope_local_base_freq"},
    ),
  ),
  layout=dataclasses.replace(
    _GEMMA2.layout, block=_GEMMA2.layout.block | _QK_NORMS
  ),
)

# In the order in which `family_of` tries them.
FAMILIES: dict[str, Family] = {
  "bert": _BERT,
  "roberta": _ROBERTA,
  "xlm-roberta": dataclasses.replace(_ROBERTA, prefix="XLMRoberta"),
  "distilbert": _DISTILBERT,
  "electra": _ELECTRA,
  "deberta-v2": _DEBERTA,
  "mpnet": _MPNET,
  "modernbert": _MODERNBERT,
  "gpt2": _GPT2,
  "opt": _OPT,
  "gpt_neox": _GPT_NEOX,
  "llama": _LLAMA,
  "mistral": _MISTRAL,
  "qwen2": _QWEN2,
  "qwen3": _QWEN3,
  "gemma2": _GEMMA2,
  "gemma3_text": _GEMMA3,
}
