"""Submitting commands as Ray jobs."""
