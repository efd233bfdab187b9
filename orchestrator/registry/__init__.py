"""Registered models: verified when registered, compared when promoted, checked when downloaded."""
