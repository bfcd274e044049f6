"""Checkpoints as fine-tuning and export read them: Hugging Face directories, the decoder in torch. Needs torch."""
