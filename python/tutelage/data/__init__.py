"""Data: tokenizer, documents, corpus, packing."""
