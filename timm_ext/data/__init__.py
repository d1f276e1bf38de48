"""From cases on disk to samples for a network: formats, volumes, tasks, preprocessing and augmentation."""
