"""Folders that appear whole or not at all, and what is known of the files in them."""
