"""Submitting a command as a Ray job."""
