"""From files and data sets to pairs: sources, columns, labels and messages."""
