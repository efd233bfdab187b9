"""Reports of a search for people: ranking, tables and figures."""
