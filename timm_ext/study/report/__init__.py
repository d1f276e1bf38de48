"""The report of a study: its results as tidy frames, statistics, tables, figures and one page."""
