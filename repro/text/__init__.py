"""Texts: principles, queries, prompts, rules, and the seam between a prompt and an answer."""
