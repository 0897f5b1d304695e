"""The page of a run: what it found, in figures, examples and words, from the files of the run."""
