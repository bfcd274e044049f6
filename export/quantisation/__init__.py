"""How a model's weights become groups of few bits: what calibration text says of each weight, and what the methods do."""
