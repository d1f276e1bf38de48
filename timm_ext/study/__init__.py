"""Comparing initialisations: plans of steps, the runner, statistics, the report and the demo."""
