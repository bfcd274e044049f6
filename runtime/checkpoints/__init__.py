"""Checkpoints: Hugging Face directories, members, the local store, and the decoder in torch. Needs torch."""
