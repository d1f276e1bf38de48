"""Cases on disk to samples for a network: tasks, layouts, preprocessing, data sets and generated anatomy."""
