"""What a search found, for a person: ranking, tables and pictures."""
