"""Many runs: sweeps over models, texts, targets and recipes, on one machine or a cluster."""
