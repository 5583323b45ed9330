"""Where weights come from: folders, files and the hub, their layouts, names and settings."""
