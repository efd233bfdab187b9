"""Soft labels by AI feedback: frozen judges are asked which of two answers is better."""
