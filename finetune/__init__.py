"""Fine-tuning: data sets, the frozen trunk, tails."""
