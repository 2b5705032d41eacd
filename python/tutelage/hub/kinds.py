"""The kinds of models that transformers has: what those that run here are told, and what the others have that is missing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from tutelage.config import Head

# What transformers' class assumes where config.json says nothing.
DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "head_dim": 128,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    "smollm3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 4,
        "rope_theta": 2e6,
        "no_rope_layer_interval": 4,
        "tie_word_embeddings": True,
    },
    "gpt2": {"n_positions": 1024, "activation_function": "gelu_new", "tie_word_embeddings": True},
}
# Other names that transformers' class takes for its fields.
ALIASES: Mapping[str, Mapping[str, str]] = {
    "gpt2": {
        "hidden_size": "n_embd",
        "max_position_embeddings": "n_positions",
        "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    }
}
# Options that would change what the model computes, with the values that leave it as it is.
NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "original_max_position_embeddings": (None,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}
DROPOUTS = ("attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop")
ROPE_FIELDS = (
    "rope_theta",
    "rope_type",
    "type",
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
    "partial_rotary_factor",
    "beta_fast",
    "beta_slow",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "truncate",
)
BY_LENGTH = ("dynamic", "longrope", "su")
GELUS: Mapping[str, Literal["gelu", "gelu_erf"]] = {
    "gelu_new": "gelu",
    "gelu_pytorch_tanh": "gelu",
    "gelu": "gelu_erf",
}
HEADS: Mapping[str, Head] = {
    "ForCausalLM": "lm",
    "LMHeadModel": "lm",
    "ForSequenceClassification": "scalar",
    "Model": "lm",  # the backbone alone: enough where the head is tied
}
CLASSES = {
    "llama": "Llama",
    "mistral": "Mistral",
    "qwen2": "Qwen2",
    "qwen3": "Qwen3",
    "smollm3": "SmolLM3",
    "gpt2": "GPT2",
}

# Fields that are read, beside those of every kind.
_LLAMA_FIELDS = (
    "head_dim",
    "hidden_act",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "rope_parameters",
    "rope_scaling",
    "rope_theta",
)
_QWEN_FIELDS = ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window")
READ: Mapping[str, frozenset[str]] = {
    "llama": frozenset({*_LLAMA_FIELDS, "attention_bias", "mlp_bias"}),
    "mistral": frozenset({*_LLAMA_FIELDS, "sliding_window"}),
    "qwen2": frozenset({*_LLAMA_FIELDS, *_QWEN_FIELDS}),
    "qwen3": frozenset({*_LLAMA_FIELDS, *_QWEN_FIELDS, "attention_bias"}),
    "smollm3": frozenset(
        {*_LLAMA_FIELDS, *_QWEN_FIELDS, "attention_bias", "mlp_bias", "no_rope_layer_interval", "no_rope_layers"}
    ),
    "gpt2": frozenset({"activation_function", "layer_norm_epsilon", "n_embd", "n_head", "n_inner", "n_layer", "n_positions"}),
}
# Read for every kind, or written anew by whoever saves.
BASIC = frozenset(
    {
        "architectures",
        "dtype",
        "eos_token_id",
        "id2label",
        "label2id",
        "model_type",
        "num_labels",
        "reward_bias",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "vocab_size",
    }
)
# What changes no log-prob: kept when the model is saved again.
HARMLESS = frozenset(
    {
        "attn_implementation",
        "bos_token_id",
        "chunk_size_feed_forward",
        "decoder_start_token_id",
        "finetuning_task",
        "gradient_checkpointing",
        "initializer_range",
        "is_decoder",
        "is_llama_config",
        "mask_token_id",
        "max_sequence_length",
        "model_max_length",
        "n_ctx",
        "neftune_noise_alpha",
        "output_attentions",
        "output_hidden_states",
        "output_past",
        "pad_token_id",
        "prefix",
        "pretraining_tp",
        "problem_type",
        "reorder_and_upcast_attn",
        "return_dict",
        "sep_token_id",
        "summary_activation",
        "summary_first_dropout",
        "summary_proj_to_labels",
        "summary_type",
        "summary_use_proj",
        "task_specific_params",
        "tf_legacy_loss",
        "tokenizer_class",
        "torchscript",
        "transformers.js_config",
        "unk_token_id",
        "unsloth_fixed",
        "unsloth_version",
        "use_bfloat16",
        "use_cache",
        "use_flash_attn",
    }
)
# What older versions of transformers kept here, and newer ones in generation_config.json.
GENERATION = frozenset(
    {
        "bad_words_ids",
        "diversity_penalty",
        "do_sample",
        "early_stopping",
        "encoder_no_repeat_ngram_size",
        "exponential_decay_length_penalty",
        "forced_bos_token_id",
        "forced_eos_token_id",
        "length_penalty",
        "max_length",
        "max_new_tokens",
        "min_length",
        "min_p",
        "no_repeat_ngram_size",
        "num_beam_groups",
        "num_beams",
        "num_return_sequences",
        "output_scores",
        "remove_invalid_values",
        "repetition_penalty",
        "return_dict_in_generate",
        "suppress_tokens",
        "begin_suppress_tokens",
        "temperature",
        "top_k",
        "top_p",
        "typical_p",
    }
)

_MOE = "experts with a router (a mixture of experts) in the place of its MLP"
_IMAGES = "an encoder of images or sound before the language model"
_GEMMA = "norms that multiply by 1 + weight, scaled embeddings and a GELU-gated MLP"
_STATE = "a recurrent state in the place of attention, in all or some blocks"
_ALIBI = "positions by ALiBi"
_PARALLEL = "attention and MLP side by side in a block"
_PARTIAL = "a rotation of a part of each head"
_SCALED = "factors on its embeddings, residuals or logits"
_ENCODER = "attention in both directions (it is no language model that reads from left to right)"
# What the models of other kinds have that this engine lacks.
MISSING: Mapping[str, str] = {
    "gemma": _GEMMA,
    "gemma2": f"{_GEMMA}, norms behind attention and MLP, and logits that are capped softly",
    **dict.fromkeys(
        ("gemma3", "gemma3_text"),
        f"{_GEMMA}, norms behind attention and MLP, and two rotary bases by block",
    ),
    **dict.fromkeys(
        (
            "dbrx",
            "deepseek_v2",
            "deepseek_v3",
            "ernie4_5_moe",
            "glm4_moe",
            "gpt_oss",
            "granitemoe",
            "minimax",
            "mixtral",
            "olmoe",
            "phimoe",
            "qwen2_moe",
            "qwen3_moe",
        ),
        _MOE,
    ),
    **dict.fromkeys(("jamba", "qwen3_next"), f"{_MOE}, and {_STATE}"),
    "llama4": f"{_MOE}, and {_IMAGES}",
    **dict.fromkeys(
        (
            "idefics3",
            "internvl",
            "llava",
            "mistral3",
            "mllama",
            "paligemma",
            "phi4_multimodal",
            "qwen2_5_vl",
            "qwen2_audio",
            "qwen2_vl",
            "qwen3_vl",
            "smolvlm",
        ),
        _IMAGES,
    ),
    **dict.fromkeys(
        (
            "bamba",
            "falcon_h1",
            "falcon_mamba",
            "granitemoehybrid",
            "mamba",
            "mamba2",
            "nemotron_h",
            "recurrent_gemma",
            "rwkv",
            "zamba",
            "zamba2",
        ),
        _STATE,
    ),
    "lfm2": "convolutions in the place of attention, in some blocks",
    **dict.fromkeys(("bloom", "mpt"), _ALIBI),
    **dict.fromkeys(("cohere", "cohere2", "codegen", "falcon"), _PARALLEL),
    **dict.fromkeys(("gpt_neox", "gptj", "phi"), f"{_PARALLEL}, and {_PARTIAL}"),
    **dict.fromkeys(("glm", "glm4", "persimmon", "stablelm"), _PARTIAL),
    "nemotron": f"{_PARTIAL}, norms that multiply by 1 + weight, and an MLP of squared ReLU",
    **dict.fromkeys(("granite", "minicpm"), _SCALED),
    "phi3": "matrices of q, k, v and of gate, up in one tensor each",
    "internlm2": "matrices of q, k, v in one tensor",
    **dict.fromkeys(("olmo2", "olmo3", "exaone4"), "norms behind attention and MLP in the place of those before"),
    "olmo": "norms without weights",
    "opt": "an MLP of ReLU, and learned positions that begin at 2",
    "gpt_neo": "attention to a window in every second block, unscaled",
    "gpt_bigcode": "one head of keys and values beside learned positions",
    "starcoder2": "LayerNorms and a GELU MLP beside rotary positions",
    **dict.fromkeys(("arcee", "apertus"), "an MLP of another activation without a gate"),
    **dict.fromkeys(
        ("albert", "bert", "deberta", "deberta-v2", "distilbert", "electra", "modernbert", "roberta", "xlm-roberta"), _ENCODER
    ),
    **dict.fromkeys(
        ("bart", "mbart", "mt5", "pegasus", "t5", "t5gemma", "umt5", "whisper"),
        "an encoder beside its decoder, and attention between the two",
    ),
}
