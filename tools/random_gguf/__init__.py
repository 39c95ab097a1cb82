"""Random-weight GGUF files, for tests and benchmarks: right in shape and vocabulary, nonsense in what they say.

english      words, and the merges a vocabulary gets from them
vocab        the tokenizer's metadata: byte-level BPE, SentencePiece, WordPiece
weights      a tensor described, its values drawn, the file written
transformer  the shape of a decoder, and its tensors

Needs `gguf` and `numpy`; nothing is downloaded. The same arguments give the same bytes on every machine.
"""
