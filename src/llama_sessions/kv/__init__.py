"""Rows and where their tokens come from. Nothing here imports llama_cpp."""
