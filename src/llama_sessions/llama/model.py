"""A model file: loaded, questioned, freed."""

from __future__ import annotations

import ctypes
import hashlib
import os
import weakref
from functools import cached_property
from pathlib import Path
from typing import Any

import llama_cpp

from ..errors import ModelError, OptionError
from . import log
from .template import CHATML, ChatTemplate
from .vocab import LlamaVocab

# Settings of a context that change what the model says, and what `Llama` sets where nobody asks for them.
_ROPE = {"rope_scaling_type": -1, "rope_freq_base": 0.0, "rope_freq_scale": 0.0, "yarn_ext_factor": -1.0}
_N_SAMPLED = 512  # tokens whose text goes into a fingerprint


def _check_file(path: str | os.PathLike[str]) -> Path:
    try:
        file = Path(os.fspath(path))
    except TypeError:
        raise OptionError(f"the model path must be text or a path, not {path!r}") from None
    try:
        if file.is_dir():
            raise ModelError(f"{file} is a directory; name a GGUF file in it")
        if file.exists() and not file.is_file():  # opening a pipe would wait for a writer
            raise ModelError(f"{file} is no regular file; name a GGUF file")
        with file.open("rb") as f:
            magic = f.read(4)
    except (OSError, ValueError) as e:
        raise ModelError(f"cannot read {file}: {getattr(e, 'strerror', None) or e}") from e
    if magic != b"GGUF":
        raise ModelError(f"{file} is not a GGUF file: it starts with {magic!r}, not b'GGUF'; convert the model first")
    return file


class Model:
    """Weights of one model. `handle` is a `llama_model_p`; owned ones are freed by `close`, or at exit.

    `lender`: the `llama_cpp.Llama` whose weights they are; it is kept alive.
    """

    def __init__(self, handle: Any, *, owned: bool, name: str, lender: Any = None) -> None:
        self.handle = handle
        self.name = name
        self._lender = lender
        pid = os.getpid()

        def free() -> None:
            if owned and os.getpid() == pid:
                with log.capture:
                    llama_cpp.llama_model_free(handle)

        self._finalizer = weakref.finalize(self, free)

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, n_gpu_layers: int = -1) -> Model:
        """Raises ModelError for what is no file, no GGUF, or no model that can chat."""
        file = _check_file(path)
        log.install()
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        # With AMX, llama.cpp built by GCC 12 dies in the tile kernels of quantised weights at the first batch of two
        # (seen with 0.3.36); which compiler built it cannot be asked. f16 and f32 do not go there.
        if b"AMX_INT8 = 1" in llama_cpp.llama_print_system_info():
            params.use_extra_bufts = False
        with log.capture as captured:
            handle = llama_cpp.llama_model_load_from_file(os.fsencode(file), params)
            detail = captured.last_error
        if not handle:
            raise ModelError(
                f"llama.cpp could not load {file}: {detail or 'no reason given'}; "
                "the file may be cut off or damaged, or newer than this llama-cpp-python: fetch or convert it again"
            )
        model = cls(handle, owned=True, name=str(file))
        model._check_it_can_chat()
        return model

    @classmethod
    def borrow(cls, llm: Any) -> Model:
        """The weights of a `llama_cpp.Llama`. Raises OptionError for something else, ModelError for one that cannot
        chat."""
        if not isinstance(llm, llama_cpp.Llama):
            raise OptionError(f"from_llama takes a llama_cpp.Llama, not {llm!r}")
        if not llm.model:
            raise OptionError("the Llama is closed; load it again")
        if llm.model_params.vocab_only:  # llama.cpp asserts as soon as such a model is asked about its layers
            raise ModelError(f"{llm.model_path} cannot chat: it has no weights (vocab_only=True); load it with them")
        own = [] if llm.lora_path is None else [f"LoRA {llm.lora_path}"]
        own += [name for name, default in _ROPE.items() if getattr(llm.context_params, name) != default]
        if own:
            log.logger.warning("sessions go without what belongs to the Llama's own context: %s", ", ".join(own))
        log.install()
        model = cls(llm.model, owned=False, name=str(llm.model_path), lender=llm)
        model._check_it_can_chat()
        return model

    @property
    def is_lent(self) -> bool:
        """Whether the weights are a `llama_cpp.Llama`'s."""
        return self._lender is not None

    @property
    def is_gone(self) -> bool:
        """Whether the weights were lent, and have been freed by their owner."""
        return self._lender is not None and not self._lender.model

    def _check_it_can_chat(self) -> None:
        why = None
        if llama_cpp.llama_model_has_encoder(self.handle) or not llama_cpp.llama_model_has_decoder(self.handle):
            why = "it has an encoder"
        elif llama_cpp.llama_model_is_diffusion(self.handle):
            why = "it is a diffusion model"
        elif llama_cpp.llama_vocab_type(self.vocab_handle) == 0:
            why = "it has no vocabulary"
        if why is not None:
            self.close()
            raise ModelError(f"{self.name} cannot chat: {why}; use a decoder-only text model")

    @property
    def vocab_handle(self) -> Any:
        return llama_cpp.llama_model_get_vocab(self.handle)

    def meta(self, key: str) -> str | None:
        """A metadata value as text; `{arch}` in `key` stands for the architecture."""
        if "{arch}" in key:
            key = key.replace("{arch}", self.meta("general.architecture") or "")
        size = 256
        while True:
            buffer = ctypes.create_string_buffer(size)
            n = llama_cpp.llama_model_meta_val_str(self.handle, key.encode(), buffer, size)
            if n < 0:
                return None
            if n < size:
                return buffer.value.decode("utf-8", "replace")
            size = n + 1

    def meta_number(self, key: str) -> float | None:
        try:
            return float(self.meta(key) or "")
        except ValueError:
            return None

    @property
    def description(self) -> str:
        """Its name, if it has one, and llama.cpp's description: `tiny-chat (llama 1.8M F16)`."""
        buffer = ctypes.create_string_buffer(256)
        llama_cpp.llama_model_desc(self.handle, buffer, 256)
        described, name = buffer.value.decode("utf-8", "replace"), self.meta("general.name")
        # llama.cpp knows the sizes of models that were published, and calls all others "?B".
        n = int(llama_cpp.llama_model_n_params(self.handle))
        described = described.replace("?B", f"{n / 1e6:.1f}M" if n < 1e9 else f"{n / 1e9:.1f}B")
        return f"{name} ({described})" if name else described

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits over the metadata, the size of the weights, and a sample of the vocabulary."""
        digest = hashlib.sha256()
        handle, vocab = self.handle, self.vocab_handle
        n_vocab = int(llama_cpp.llama_vocab_n_tokens(vocab))
        numbers = (llama_cpp.llama_model_n_params(handle), llama_cpp.llama_model_size(handle), n_vocab)
        digest.update(repr(tuple(map(int, numbers))).encode())
        buffer = ctypes.create_string_buffer(1024)
        for i in range(int(llama_cpp.llama_model_meta_count(handle))):
            for read in (llama_cpp.llama_model_meta_key_by_index, llama_cpp.llama_model_meta_val_str_by_index):
                read(handle, i, buffer, len(buffer))
                digest.update(buffer.value + b"\0")
        for token in range(0, n_vocab, max(1, n_vocab // _N_SAMPLED)):
            digest.update(bytes(llama_cpp.llama_vocab_get_text(vocab, token)) + b"\0")
        return digest.hexdigest()[:16]

    @property
    def n_ctx_train(self) -> int:
        return int(llama_cpp.llama_model_n_ctx_train(self.handle))

    def head_size(self, what: str) -> int:
        """Numbers in one head of "key" or "value"."""
        n_head = max(1, int(llama_cpp.llama_model_n_head(self.handle)))
        default = int(llama_cpp.llama_model_n_embd(self.handle)) // n_head
        return int(self.meta_number(f"{{arch}}.attention.{what}_length") or default)

    def kv_values_per_token(self) -> int:
        """Numbers of K and V one token takes over all layers (an upper bound where layers differ)."""
        heads = int(llama_cpp.llama_model_n_head_kv(self.handle))
        values = self.head_size("key") + self.head_size("value")
        return int(llama_cpp.llama_model_n_layer(self.handle) * heads * values)

    def vocab(self) -> LlamaVocab:
        is_gone = (lambda: self.is_gone) if self.is_lent else None
        return LlamaVocab(self.vocab_handle, self.meta("tokenizer.ggml.pre") or "default", is_gone)

    def template(self, vocab: LlamaVocab, override: str | None = None) -> ChatTemplate:
        """The chat template: `override`, else the model's own, else ChatML (said in the log)."""
        text = override
        if text is None:
            own = llama_cpp.llama_model_chat_template(self.handle, None)
            text = bytes(own).decode("utf-8", "replace") if own else None
        if text is None:
            log.logger.warning("%s has no chat template; using ChatML. Pass chat_template=... for another", self.name)
            text = CHATML
        return ChatTemplate(
            text,
            bos="" if vocab.bos is None else vocab.text(vocab.bos),
            eos="" if vocab.eos is None else vocab.text(vocab.eos),
        )

    def close(self) -> None:
        """Free the weights, if they are ours. Again: nothing."""
        self._finalizer()
