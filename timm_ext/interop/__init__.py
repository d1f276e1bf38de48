"""Networks of other programs: read into what ours are, and written back."""
