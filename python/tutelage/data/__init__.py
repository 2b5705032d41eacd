"""Data: tokenizer, chat templates, documents, corpus, packing; rows and examples."""
