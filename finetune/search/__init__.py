"""Many runs: Bayesian search, and fusing the best trials into an ensemble."""
