"""Prompts to responses, by a model in this process or a server next door."""
