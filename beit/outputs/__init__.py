"""What a run, a prediction or an export writes."""
