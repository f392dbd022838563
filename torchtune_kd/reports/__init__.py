"""Logs read, pictures drawn; without torch, so that a laptop can do it."""
