"""Registered models: verified at registration, compared at promotion, checked after a download."""
