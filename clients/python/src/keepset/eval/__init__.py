"""A small language model with a readable retrieval task, for demos and for measuring policies."""
