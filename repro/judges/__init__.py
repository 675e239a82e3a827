"""Which of two responses follows a constitution better: by rule, by likelihood, by a language model."""
