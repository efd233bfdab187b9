"""From pairs to token ids: rendering, truncation, tables, and the files that keep them."""
