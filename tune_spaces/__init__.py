"""Search spaces over dispersion, losses, references and soft labels."""
