"""The drawing page, and the server behind its Dream button."""
