"""Text ↔ token ids: tokenizer, prompts, streamed text, long documents."""
