"""Stage 4: one file per link, from log-ratios and beta to a loss per pair."""
