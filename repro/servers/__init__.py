"""OpenAI-compatible servers: one place for requests, their ledger, their cost and their oddities."""
