"""Processes: how they meet, what they exchange, and how a hanging one ends the job."""
