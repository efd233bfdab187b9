"""A service of frozen reference models: replicas, routers, the score store and the worker's client."""
