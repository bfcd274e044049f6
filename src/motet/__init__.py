"""Motet serves a weighted ensemble of fine-tuned language models as one model, for close to the price of one."""
