"""The method: token ids, log-prob matrices, objective, training."""
