"""What a run shows and leaves behind: files, tables, the terminal. Knows no torch."""
