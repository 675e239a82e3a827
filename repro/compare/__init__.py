"""SAMI's objective and its rivals on the same sampled pairs."""
