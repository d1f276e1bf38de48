"""Images drawn on phantoms and label maps."""
