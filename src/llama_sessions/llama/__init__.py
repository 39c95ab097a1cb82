"""The only package that touches llama.cpp. Above it nobody needs to know what aborts and what lies.

Every symbol used is checked here, once, at import: a llama-cpp-python that lacks one fails now, with its name, and not
in the middle of a chat.
"""

from __future__ import annotations

from collections.abc import Sequence

import llama_cpp

REQUIRED = (
    "Llama", "llama_backend_init", "llama_batch", "llama_context_default_params", "llama_decode", "llama_free",
    "llama_get_causal_attn", "llama_get_logits_ith", "llama_get_memory", "llama_get_model", "llama_init_from_model",
    "llama_log_callback", "llama_log_get", "llama_log_set", "llama_memory_can_shift",
    "llama_memory_clear", "llama_memory_seq_add", "llama_memory_seq_cp", "llama_memory_seq_pos_max",
    "llama_memory_seq_pos_min", "llama_memory_seq_rm", "llama_model_chat_template", "llama_model_default_params",
    "llama_model_desc", "llama_model_free", "llama_model_get_vocab", "llama_model_has_decoder",
    "llama_model_has_encoder", "llama_model_is_diffusion", "llama_model_is_hybrid", "llama_model_is_recurrent",
    "llama_model_meta_count", "llama_model_meta_key_by_index", "llama_model_meta_val_str_by_index",
    "llama_model_n_params", "llama_model_size",
    "llama_model_load_from_file", "llama_model_meta_val_str", "llama_model_n_ctx_train", "llama_model_n_embd",
    "llama_model_n_head", "llama_model_n_head_kv", "llama_model_n_layer", "llama_model_n_swa", "llama_n_batch",
    "llama_n_ctx", "llama_n_ctx_seq", "llama_n_seq_max", "llama_n_threads", "llama_n_threads_batch", "llama_n_ubatch",
    "llama_print_system_info", "llama_sampler_accept",
    "llama_sampler_apply", "llama_sampler_chain_add", "llama_sampler_chain_default_params",
    "llama_sampler_chain_init", "llama_sampler_free", "llama_sampler_init_dist", "llama_sampler_init_greedy",
    "llama_sampler_clone", "llama_sampler_init_grammar", "llama_sampler_init_min_p",
    "llama_sampler_init_penalties", "llama_sampler_init_temp", "llama_sampler_init_top_k", "llama_sampler_init_top_p",
    "llama_state_seq_get_data_ext", "llama_state_seq_get_size_ext", "llama_state_seq_set_data_ext",
    "llama_supports_gpu_offload", "llama_token_data", "llama_token_data_array", "llama_token_to_piece",
    "llama_tokenize", "llama_vocab_bos", "llama_vocab_eos", "llama_vocab_get_add_bos", "llama_vocab_get_attr",
    "llama_vocab_get_text", "llama_vocab_is_eog", "llama_vocab_n_tokens", "llama_vocab_type",
    "llama_chat_format.Jinja2ChatFormatter",
    "llama_grammar.BuiltinRule", "llama_grammar.INVALID_RULE_CHARS_RE", "llama_grammar.PRIMITIVE_RULES",
    "llama_grammar.RESERVED_NAMES", "llama_grammar.SchemaConverter",
    # Fields: ctypes takes an unknown one without a word, and llama.cpp would never see it.
    *(
        f"llama_context_params.{name}"
        for name in (
            "flash_attn_type", "kv_unified", "n_batch", "n_ctx", "n_seq_max", "n_threads", "n_threads_batch",
            "n_ubatch", "no_perf", "swa_full", "type_k", "type_v",
        )
    ),
    "llama_model_params.n_gpu_layers", "llama_model_params.use_extra_bufts",
)  # fmt: skip


def check_symbols(module: object, names: tuple[str, ...] = REQUIRED) -> None:
    """Raise ImportError that names what `module` lacks."""
    missing = [name for name in names if not _has(module, name.split("."))]
    if missing:
        version = getattr(module, "__version__", "of unknown version")
        raise ImportError(
            f"llama-cpp-python {version} lacks {', '.join(missing)}; "
            "llama-sessions needs another one: pip install 'llama-cpp-python>=0.3.36,<0.4'"
        )


def _has(thing: object, path: Sequence[str]) -> bool:
    if not path:
        return True
    return hasattr(thing, path[0]) and _has(getattr(thing, path[0]), path[1:])


check_symbols(llama_cpp)
