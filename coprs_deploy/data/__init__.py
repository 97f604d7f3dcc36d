"""Examples and their sources: example files and synthetic scenes. Never imports torch."""
