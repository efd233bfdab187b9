"""Runs, references and the registry on Ray and MLflow: everything that needs a cluster stands here."""
