"""Plan files that `timm-ext study` knows by name."""
