"""Frozen reference models as a service: replicas, routers, the score store and the worker's client."""
