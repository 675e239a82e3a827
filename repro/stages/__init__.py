"""A run: its folder, its inputs, its stages in order."""
