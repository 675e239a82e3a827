"""What a run takes before it starts."""
